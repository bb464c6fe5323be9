"""guided_distillation.py's network, matching and losses against transformers' Mask2Former with the
same weights."""

import importlib.util
from functools import partial

import pytest
import torch
from networks import near

import guided_distillation as gd

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed (tests/requirements.txt)", allow_module_level=True)

from transformers import (  # noqa: E402
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

CLASSES = 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "resnet50": partial(ResNetConfig, out_features=STAGES),
    "swin_tiny_patch4_window7_224": partial(
        SwinConfig,
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,
        out_features=STAGES,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def double():
    """Both networks compute in float64, also where they ask for float32. In float32 a mask logit
    next to 0 may have another sign in each of them, on one CPU and not on another, and a query then
    looks at other places."""
    cached = gd.sine_positions, gd.cell_centres, gd.shift_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        for function in cached:
            function.cache_clear()
        yield
    torch.set_default_dtype(torch.float32)
    for function in cached:
        function.cache_clear()


@pytest.fixture(scope="module", params=list(BACKBONES))
def pair(request):
    """transformers' network with random weights, none of them zero, and ours with the same."""
    torch.manual_seed(0)
    theirs = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=BACKBONES[request.param](), num_labels=CLASSES, num_queries=30
        )
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("bias") or "sampling_offsets" in name or "attention_weights" in name:
                p.add_(0.05 * torch.randn_like(p))
        for module in theirs.modules():  # statistics that are not 0 and 1
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    ours = gd.Mask2Former(gd.preset("coco", backbone=request.param, queries=30), CLASSES).eval()
    named = gd.our_names(theirs.state_dict())
    own = {k for k in ours.state_dict() if "num_batches" not in k}
    assert named.keys() == own  # every key, both ways
    ours.load_state_dict(named, strict=False)
    return theirs, ours


# 40 x 88 does not divide by 7
@pytest.mark.parametrize("size", [(192, 256), (224, 224), (160, 352)], ids=str)
def test_logits_of_all_heads(pair, size):
    theirs, ours = pair
    torch.manual_seed(0)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images, output_auxiliary_logits=True)
        heads = ours(images)
        final = ours(images, last_only=True)
    masks = torch.einsum("lbqc,bchw->lbqhw", heads.mask_embed, heads.mask_features)
    layers = [
        *expected.auxiliary_logits,
        {
            "class_queries_logits": expected.class_queries_logits,
            "masks_queries_logits": expected.masks_queries_logits,
        },
    ]
    assert len(layers) == len(masks) == 10
    for i, layer in enumerate(layers):
        assert near(heads.class_logits[i], layer["class_queries_logits"], 1e-5)
        assert near(masks[i], layer["masks_queries_logits"], 1e-4)
    assert torch.equal(final.class_logits[0], heads.class_logits[-1])
    assert torch.equal(final.mask_embed[0], heads.mask_embed[-1])


def test_losses_with_the_same_points(pair, monkeypatch):
    """Matching and losses of all ten heads. Random points depend on their number alone, in both."""
    theirs, ours = pair
    torch.manual_seed(1)
    base = torch.rand(3 * 12544, 2)

    def fixed(*shape, generator=None, device=None, **_):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return base[: shape[-2]].expand(*shape).clone()

    images = torch.randn(2, 3, 128, 160)
    masks = [(torch.rand(n, 128, 160) > 0.5).float() for n in (4, 0)]
    masks[0][:, 30:90, 20:70] = 1
    labels = [torch.tensor([1, 0, 4, 1]), torch.zeros(0, dtype=torch.long)]
    monkeypatch.setattr(torch, "rand", fixed)
    with torch.no_grad():
        expected = theirs(images, mask_labels=masks, class_labels=labels).loss.item()
        targets = [
            gd.Target(label, mask.to(torch.uint8))
            for label, mask in zip(labels, masks, strict=True)
        ]
        norms = gd.normalisers(targets, 30)
        got = gd.criterion(ours(images), targets, norms, [torch.Generator(), torch.Generator()])
    assert got["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert got["bad_costs"] == 0
