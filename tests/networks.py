"""What the tests of equations do with networks: give them other weights, and compare them."""

import torch
from torch import Tensor, nn


def shaken(module: nn.Module, by: float = 0.3) -> nn.Module:
    """Random parameters, so that no bias is 0 and no scale 1; running statistics alike."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))
        for name, b in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.add_(by * torch.rand_like(b))
    return module


def values(net: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-6) -> bool:
    """Floating-point entries alone: counters may differ."""
    return a.keys() == b.keys() and all(
        torch.allclose(a[name].double(), b[name].double(), atol=atol, rtol=1e-5)
        for name in a
        if a[name].is_floating_point()
    )


def near(a: Tensor, b: Tensor, bound: float) -> bool:
    """Whether two tensors of one shape differ by `bound` at most anywhere."""
    return a.shape == b.shape and (a - b).abs().max().item() <= bound
