"""What the semantic scripts cost with other backbones than the papers': `make bench`, and by
itself `python -m tests.bench_backbones`. docs/gta_seg.md and docs/gist_rist.md quote it.

Nothing is computed: fake tensors have shapes and sizes only. Operations are those of products of
matrices in a forward pass over one training crop. Memory is counted, in fp32: bytes that the
forward pass of one crop in training keeps for its backward pass, each storage once, attention by
flash kernels; and gradients and the optimizer's state, of one network. Weights, the teacher and
buffers of kernels come on top."""

from functools import partial
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import gist_rist
import gta_seg
from common import backbones

ROWS = (
    ("", False),  # the paper's ResNet-101
    ("vit_small_patch14_dinov2.lvd142m", False),
    ("vit_small_patch14_dinov2.lvd142m", True),
    ("vit_base_patch14_dinov2.lvd142m", False),
    ("vit_base_patch14_dinov2.lvd142m", True),
    ("swin_tiny_patch4_window7_224.ms_in1k", False),
    ("convnext_tiny.fb_in1k", False),
)


class Cost(NamedTuple):
    parameters: int
    learned: int
    operations: float  # of a forward pass over one crop
    kept: float  # bytes that one crop keeps for its backward pass
    optimizer: int  # bytes of gradients and state


def cost(script, settings, size: tuple[int, int]) -> Cost:
    network = script.SegNet(settings, 21)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = {
            name: mode.from_tensor(tensor)
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]
        }
        images = torch.empty(2, 3, *size)  # two, for BatchNorm behind the pooling of ASPP
        forward = partial(functional_call, network, weights, (images,))
        network.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
        network.train()
        storages = {}

        def pack(tensor):
            storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward()
    own = {id(tensor.untyped_storage()) for tensor in weights.values()}
    kept = sum(storage.nbytes() for place, storage in storages.items() if place not in own)
    del output
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    floats = 3 if backbones.is_layer_normed(settings.backbone) else 2  # AdamW, SGD
    return Cost(
        sum(p.numel() for p in network.parameters()),
        learned,
        counter.get_total_flops() / len(images),
        kept / len(images),
        4 * floats * learned,
    )


def main() -> None:
    print("a crop of --dataset voc         M parameters  learned    GFLOP  kept MiB  optimizer MiB")
    for script in (gta_seg, gist_rist):
        for backbone, freeze in ROWS:
            named = {"backbone": backbone} if backbone else {}
            settings = script.preset("voc", freeze_backbone=freeze, weights="none", **named)
            side = settings.crop_size
            c = cost(script, settings, (side, side) if script is gta_seg else side)
            name = backbone.split(".")[0] or settings.backbone
            print(
                f"{script.SCRIPT} {name}{' frozen' if freeze else ''}\n{c.parameters / 1e6:44.1f} "
                f"{c.learned / 1e6:8.1f} {c.operations / 1e9:8.0f} {c.kept / 2**20:9.0f} "
                f"{c.optimizer / 2**20:14.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
