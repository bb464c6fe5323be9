"""What BatchNorm costs in the forms of common/norms.py, as ratios measured in one run: `make
bench`. Kernels and waits are counted from operators (`counting.py`); times are CPU seconds."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).parent))
from counting import count

from common import norms


def resnet(kind: str) -> nn.Module:
    """An R50 whose BatchNorm is a constant: ours; F.batch_norm in eval mode; timm's layers, which
    scale and shift, back in the type of their input."""
    torch.manual_seed(0)
    net = timm.create_model("resnet50", features_only=True, pretrained=False)
    if kind == "ours":
        return norms.frozen(net)
    if kind == "eval mode":
        return net.eval().requires_grad_(True)
    net = freeze_batch_norm_2d(net)
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
    return net


def step_of(net: nn.Module, size: int) -> Callable[[], None]:
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)

    def step() -> None:
        for parameter in net.parameters():
            parameter.grad = None
        sum(m.sum() for m in net(x)).backward()

    return step


def kept(net: nn.Module, size: int) -> int:
    """Bytes that a forward pass in bf16 keeps for its backward pass, beside the weights."""
    seen = {p.untyped_storage()._cdata: 0 for p in net.parameters()}
    hold = []

    def pack(tensor):
        seen.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        hold.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        hold.append(net(torch.randn(2, 3, size, size)))
    return sum(seen.values())


def bench_frozen(size: int = 224) -> None:
    kinds = ("timm's", "eval mode", "ours")
    steps = {kind: step_of(resnet(kind), size) for kind in kinds}
    kernels = {kind: count(step).kernels.total() for kind, step in steps.items()}
    times = {kind: [] for kind in kinds}
    for _ in range(5):
        for kind, step in steps.items():
            start = time.process_time()
            step()
            times[kind].append(time.process_time() - start)
    rounded = {}
    for kind, step in steps.items():
        with torch.autocast("cpu", torch.bfloat16):
            rounded[kind] = count(step).kernels.total()
    memory = {kind: kept(resnet(kind), 64) for kind in kinds}
    for kind in kinds[:2]:
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times[kind], strict=True))
        print(
            f"frozen BatchNorm of an R50, 2 x {size}, forward and backward, ours over {kind}: "
            f"time {ratio:.2f}; kernels {kernels['ours']} / {kernels[kind]} = "
            f"{kernels['ours'] / kernels[kind]:.2f}, in bf16 {rounded['ours']} / {rounded[kind]} = "
            f"{rounded['ours'] / rounded[kind]:.2f}; kept in bf16 "
            f"{memory['ours'] / memory[kind]:.2f}"
        )


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    bench_frozen()
