"""What computes without waiting for the device gives what its plain counterpart gives."""

from functools import partial

import pytest
import torch
from counting import count
from torchvision.ops import nms

from common.boxes import sample_regions, suppress_by_group
from common.waits import draw_by_weight, places, those_used


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waits_of(function) -> int:
    return count(function).waits.total()


@pytest.mark.parametrize("sizes", [(7,), (5, 0, 12), (0, 0), (300, 1, 40, 2)], ids=str)
def test_places_are_those_of_nonzero(sizes):
    torch.manual_seed(sum(sizes))
    masks = [torch.rand(n) < 0.4 for n in sizes]
    for got, mask in zip(places(masks), masks, strict=True):
        assert torch.equal(got, mask.nonzero().flatten()) and got.dtype == torch.int64
    assert [x.tolist() for x in places([m & False for m in masks])] == [[]] * len(sizes)


def test_indices_that_are_used_are_those_of_unique():
    torch.manual_seed(0)
    for n, number in ((40, 9), (3, 20), (1, 1), (12, 12), (0, 5), (0, 0)):
        indices = torch.randint(max(number, 1), (n,))
        used, place = those_used(indices, number)
        want, of_want = indices.unique(return_inverse=True)
        assert torch.equal(used[: len(want)], want) and torch.equal(place, of_want)
        assert len(used) == len(used.unique()) == min(n, number)
    assert waits_of(partial(those_used, torch.randint(9, (40,)), 9)) == 0


def test_drawing_by_weight_is_multinomial():
    """The same ones from the same generator; nothing of no weight, and no more than there is."""
    for seed in range(200):
        torch.manual_seed(seed)
        weights = torch.rand(30) * (torch.rand(30) < 0.5)
        some = int((weights > 0).sum())
        number = int(torch.randint(1, some + 1, ()))
        got = draw_by_weight(weights, torch.tensor(number), 40, generator(seed))
        want = torch.multinomial(weights, number, generator=generator(seed))
        assert got.nonzero().flatten().tolist() == sorted(want.tolist())
        every = draw_by_weight(weights, torch.tensor(40), 40, generator(seed))
        assert torch.equal(every, weights > 0)
        for none in (0, -3):
            assert not draw_by_weight(weights, torch.tensor(none), 40, generator(seed)).any()
        assert draw_by_weight(weights, torch.tensor(40), 2, generator(seed)).sum() == min(some, 2)
    drawing = partial(draw_by_weight, weights, torch.tensor(3), 5, generator(0))
    assert waits_of(drawing) == 0


def plainly_sampled(matches, number, share, g):
    def pick(is_candidate, most):
        found = is_candidate.nonzero().flatten()
        return found[torch.randperm(len(found), generator=g)[:most]]

    foreground = pick(matches >= 0, int(number * share))
    return foreground, pick(matches == -1, number - len(foreground))


def test_regions_of_all_images_are_sampled_as_those_of_one():
    torch.manual_seed(0)
    matches = [torch.randint(-2, high, (n,)) for n, high in ((200, 5), (50, 0), (9, 2), (0, 1))]
    draws = [generator(i) for i in range(4)]
    for i, (found, match) in enumerate(
        zip(sample_regions(matches, 32, 0.25, draws), matches, strict=True)
    ):
        want = plainly_sampled(match, 32, 0.25, generator(i))
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_suppression_by_group_is_that_of_each_group():
    """In five groups of boxes of up to 1,024 pixels; also where the boxes end with the square, and
    for empty ones, which have the lowest score and stay."""
    torch.manual_seed(0)
    corner, sides = torch.rand(1500, 2) * 900, 100 + torch.rand(1500, 2) * 300
    boxes = torch.cat([corner, (corner + sides).clamp(max=1024)], dim=1)
    scores, groups = torch.randn(1500), torch.randint(5, (1500,))
    boxes[:40], scores[:40] = 0.0, -torch.inf
    kept = []
    for group in range(5):
        here = (groups == group).nonzero().flatten()
        kept += here[nms(boxes[here].double(), scores[here].double(), 0.5)].tolist()
    got = suppress_by_group(boxes, scores, groups, 0.5)
    assert sorted(got.tolist()) == sorted(kept) and len(kept) < 1400
    assert (scores[got].diff() <= 0)[:-40].all() and sorted(got[-40:].tolist()) == [*range(40)]
    assert len(suppress_by_group(boxes[:0], scores[:0], groups[:0], 0.5)) == 0
    assert waits_of(partial(suppress_by_group, boxes, scores, groups, 0.5)) == 1
