"""BatchNorm layers in the place of a network's own, with the same names of tensors: whose
statistics are those of all processes' images, or whose statistics and weights stand still."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import World


def over_processes(network: nn.Module, world: World) -> nn.Module:
    """The network with BatchNorm over the images of all processes, if there are several."""
    if world.size == 1:
        return network
    return with_batchnorm(network, SharedBatchNorm)


def frozen(network: nn.Module) -> nn.Module:
    """The network with BatchNorm that is a constant map."""
    return with_batchnorm(network, FrozenBatchNorm)


def with_batchnorm(network: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """The network, in which `make` has made another layer of each BatchNorm2d."""
    if isinstance(network, nn.BatchNorm2d):
        return make(network)
    for name, child in network.named_children():
        setattr(network, name, with_batchnorm(child, make))
    return network


class SharedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d on the joined batch of all processes, in training; each may hold another
    number of images, and has at least one. A layer of timm's also drops and activates: `drop` and
    `act` are its own."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.act(self.drop(super().forward(x)))
        # Any point near the mean serves as the origin, but all processes need the same.
        origin = self.running_mean.clone()
        y, mean, var, count = NormOverProcesses.apply(x, self.weight, self.bias, origin, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # without bias
        return self.act(self.drop(y))


class NormOverProcesses(torch.autograd.Function):
    """BatchNorm of x (B, C, H, W) in training. Mean and variance, and the gradient through them,
    are of all processes: one sum over the processes forward, one backward.

    nn.SyncBatchNorm does the same, but it makes the CPU wait for the device in each forward pass,
    and refuses CPU tensors. The gradients of weight and bias are this process's own, as DDP expects
    them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, origin: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)  # of this process
        away = mean - origin  # squares of small numbers: no digits are lost
        sums = torch.cat([away, var + away.square(), away.new_ones(1)])
        sums *= x.numel() // x.shape[1]
        dist.all_reduce(sums)
        count = sums[-1]
        away, square = (sums[:-1] / count).chunk(2)
        mean, var = origin + away, square - away.square()
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # As if mean and variance were constants; the gradients of weight and bias are right.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, (True, True, True)
        )
        sums = torch.cat([grad_weight, grad_bias])
        dist.all_reduce(sums)
        # What mean and variance add is linear in the normalised x: another normalisation.
        scale = weight * (var + ctx.eps).rsqrt() / count
        of_x, constant = sums.chunk(2)
        through = F.batch_norm(x, mean, var, -scale * of_x, -scale * constant, eps=ctx.eps)
        return grad_x.add_(through), grad_weight, grad_bias, None, None


class FrozenBatchNorm(nn.Module):
    """BatchNorm whose statistics and weights are buffers, which nothing changes: the same map of
    each channel in every mode. Names of tensors are FrozenBatchNorm2d's of torchvision. A map in
    bf16 stays in bf16."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach())
        self.register_buffer("zeros", torch.zeros_like(self.bias), persistent=False)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        buffers = self.running_mean, self.running_var, self.weight, self.bias, self.zeros
        return self.act(self.drop(ConstantNorm.apply(x, *buffers, self.eps)))

    def _load_from_state_dict(self, weights: dict, prefix: str, *args) -> None:
        weights.pop(f"{prefix}num_batches_tracked", None)  # of a BatchNorm that was trained
        super()._load_from_state_dict(weights, prefix, *args)


class ConstantNorm(torch.autograd.Function):
    """F.batch_norm of x (B, C, H, W) by constants. Its gradient is the same map without a shift, so
    that, other than by F.batch_norm, nothing of the size of x is kept for it; `zeros` are its mean.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        zeros: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(zeros, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros, var, weight = ctx.saved_tensors
        grad = F.batch_norm(grad, zeros, var, weight, None, eps=ctx.eps)
        return grad, None, None, None, None, None, None
