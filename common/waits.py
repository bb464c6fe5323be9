"""Computing on a GPU without waiting for it. A program runs ahead of its GPU until it asks for a
value, such as how many indices were found; then it waits until all that was asked before is
computed. Each function here gives what a plain one gives, and asks less often, or never."""

import torch
from torch import Tensor


def places(masks: list[Tensor]) -> list[Tensor]:
    """[mask.nonzero().flatten() for mask in masks]: the indices of what is true in masks (n,). It
    waits once, for the numbers of all."""
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    found = []
    for mask, count in zip(masks, counts, strict=True):
        if count == 0:
            found.append(torch.zeros(0, dtype=torch.int64, device=mask.device))
        else:
            found.append(mask.nonzero_static(size=count).flatten())
    return found


def those_used(indices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """indices.unique(return_inverse=True), of indices (n,) below `number`: which ones occur, and
    the place of each among these. How many occur is not asked: others, to which no place leads,
    follow, min(n, number) in all."""
    occurs = torch.zeros(number, dtype=torch.uint8, device=indices.device)
    occurs[indices] = 1
    used = occurs.argsort(descending=True, stable=True)[: len(indices)]
    return used, (occurs.cumsum(0) - 1)[indices]


def draw_by_weight(weights: Tensor, number: Tensor, most: int, g: torch.Generator) -> Tensor:
    """torch.multinomial(weights, number, generator=g), without replacement, as a mask (n,) bool.
    `number` () is on the device and may be 0 or less. At most `most` are drawn, none without
    weight."""
    # A weight over an exponential draw is the largest with a chance that is its share of all
    # weights; of the others the next one is, and so on.
    keys, order = (weights / torch.empty_like(weights).exponential_(generator=g)).topk(
        min(most, len(weights))
    )
    is_drawn = torch.zeros_like(weights, dtype=torch.bool)
    is_drawn[order] = (torch.arange(len(order), device=order.device) < number) & (keys > 0)
    return is_drawn
