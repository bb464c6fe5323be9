"""BatchNorm over several processes is nn.BatchNorm2d on their joined batch, and frozen BatchNorm is
nn.BatchNorm2d in eval mode; both without a wait for the device."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from counting import count
from helpers import Started, free_port
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from common import distributed, norms
from common.distributed import World

NETWORKS = ["resnet18", "mobilenetv3_small_050", "tf_efficientnet_lite0", "regnetx_002"]
SHARES = (slice(0, 2), slice(2, 5))  # of five images, for each of two processes


def on_two(function: Callable, folder: Path) -> list:
    """What function() returns on each of two processes that have joined a group."""
    port = str(free_port())
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        Started(in_group, (function, folder), folder, {**env, "RANK": r, "LOCAL_RANK": r})
        for r in "01"
    ]
    for process in started:
        process.wait().ok()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def in_group(function: Callable, folder: Path) -> None:
    world = distributed.start("cpu")
    torch.save(function(world), folder / f"{world.rank}.pt")
    distributed.stop()


# ----------------------------------------------------------------------------- over the processes
def randomised(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With other numbers than a fresh layer's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    return norm


def batch(kind: torch.dtype, mean: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Five images and gradients, channels last. The mean is large beside the spread."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 5, 6, 7, 9, dtype=kind)
    return (x + mean).contiguous(memory_format=torch.channels_last), grad


def passed(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """What two forward and backward passes give."""
    for _ in range(2):
        x = x.detach().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(grad)
    found = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | dict(norm.named_buffers())


def share_of(kind: torch.dtype, world: World, fault: str = "") -> dict[str, torch.Tensor]:
    """The same of this process's share of the images."""
    norm = norms.over_processes(randomised(nn.BatchNorm2d(6)).to(kind), world)
    if fault == "alone":
        dist.all_reduce = lambda tensor: None
    if fault == "equal counts":
        reduce = dist.all_reduce
        dist.all_reduce = lambda tensor: reduce(tensor.mul_(5 / 2 / (2 + world.rank)))
    x, grad = batch(kind)
    return passed(norm, x[SHARES[world.rank]], grad[SHARES[world.rank]])


def largest_difference(folder: Path, kind: torch.dtype, fault: str = "") -> float:
    """Of what two processes compute to what one does on the joined batch."""
    first, second = on_two(partial(share_of, kind, fault=fault), folder)
    whole = passed(randomised(nn.BatchNorm2d(6)).to(kind), *batch(kind))
    joined = {name: torch.cat([first[name], second[name]]) for name in ("y", "x")}
    joined |= {name: first[name] + second[name] for name in ("weight", "bias")}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if not fault:
            assert torch.equal(first[name], second[name])
        joined[name] = first[name]
    assert joined.keys() == whole.keys()
    return max((joined[k].double() - whole[k].double()).abs().max().item() for k in whole)


@pytest.mark.parametrize("kind, near", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_two_processes_normalise_as_one_does_the_joined_batch(tmp_path, kind, near):
    """Of two and three images: outputs, gradients and statistics."""
    assert largest_difference(tmp_path, kind) < near


@pytest.mark.parametrize("fault", ["alone", "equal counts"])
def test_a_fault_in_the_sums_would_be_seen(tmp_path, fault):
    assert largest_difference(tmp_path, torch.float64, fault) > 1e-2


def waits_of_a_pass(world: World) -> tuple[int, int]:
    norm = norms.over_processes(randomised(nn.BatchNorm2d(6)), world)
    x, grad = batch(torch.float32)
    calls = count(partial(passed, norm, x, grad))
    return calls.kernels.total(), calls.waits.total()


def test_it_never_waits_for_the_device(tmp_path):
    for kernels, waits in on_two(waits_of_a_pass, tmp_path):
        assert kernels > 20 and waits == 0


def test_one_pixel_of_one_image_is_enough_in_each_process(tmp_path):
    """nn.BatchNorm2d refuses it, nn.SyncBatchNorm too (pooled features of a small batch)."""
    for y in on_two(normalised_pixel, tmp_path):
        assert y.abs().max() <= 1.01


def normalised_pixel(world: World) -> torch.Tensor:
    norm = norms.over_processes(nn.BatchNorm2d(3), world)
    return norm(torch.full((1, 3, 1, 1), float(world.rank))).detach()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_over_processes_keeps_its_names_and_what_it_computes(name):
    """timm's BatchNormAct2d applies an activation, too. In eval mode no process is asked."""
    net = timm.create_model(name, features_only=True, pretrained=False).eval()
    x, keys = torch.randn(2, 3, 64, 64), list(net.state_dict())
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    parameters = [id(p) for p in net.parameters()]
    with torch.no_grad():
        before = net(x)
        net = norms.over_processes(net, World(0, 2)).eval()
        after = net(x)
    assert sum(isinstance(m, norms.SharedBatchNorm) for m in net.modules()) == layers > 10
    assert list(net.state_dict()) == keys and [id(p) for p in net.parameters()] == parameters
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_process_keeps_its_batchnorm():
    assert type(norms.over_processes(nn.BatchNorm2d(3), World())) is nn.BatchNorm2d


# ------------------------------------------------------------------------------------------ DDP
def weights_after_five_steps(as_view: bool, world: World) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=3).to(memory_format=torch.channels_last)
    real = nn.parallel.DistributedDataParallel
    if not as_view:
        nn.parallel.DistributedDataParallel = partial(without_view, real)
    forward = distributed.parallel(norms.over_processes(net, world), world)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step in range(5):
        torch.manual_seed(10 * step + world.rank)
        loss = nn.functional.cross_entropy(forward(torch.randn(2, 3, 64, 64)), torch.arange(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return net.state_dict()


def without_view(real, network, gradient_as_bucket_view, **more) -> nn.Module:
    assert gradient_as_bucket_view
    return real(network, **more)


def test_gradients_in_ddps_buckets_give_the_same_weights(tmp_path):
    found = []
    for as_view in (True, False):
        folder = tmp_path / str(as_view)
        folder.mkdir()
        found.append(on_two(partial(weights_after_five_steps, as_view), folder))
    (view, view_1), (copied, _) = found
    fresh = timm.create_model("resnet18", num_classes=3).state_dict()
    assert view.keys() == fresh.keys()
    for name, value in view.items():
        assert torch.equal(value, view_1[name]) and torch.equal(value, copied[name]), name


# ---------------------------------------------------------------------------------------- frozen
@pytest.mark.parametrize("kind, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_frozen_batchnorm_is_batchnorm_in_eval_mode(kind, near):
    norm = randomised(nn.BatchNorm2d(6)).to(kind)
    x, grad = batch(kind)
    frozen = norms.frozen(deepcopy(norm)).train()
    torchvisions = FrozenBatchNorm2d(6).to(kind)
    torchvisions.load_state_dict({**norm.state_dict()})
    results = []
    for layer in (frozen, norm.eval(), torchvisions):
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(grad)
        results.append((layer(leaf).detach(), leaf.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() < near
    assert frozen.state_dict().keys() == torchvisions.state_dict().keys()
    assert not list(frozen.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_network_computes_what_it_does_in_eval_mode(name):
    net = timm.create_model(name, features_only=True, pretrained=False).eval()
    x = torch.randn(2, 3, 64, 64)
    keys = {k for k in net.state_dict() if not k.endswith("num_batches_tracked")}
    with torch.no_grad():
        before = net(x)
        after = norms.frozen(net)(x)
    assert set(net.state_dict()) == keys
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_batchnorm_loads_what_was_trained_and_keeps_bf16():
    norm = randomised(nn.BatchNorm2d(6))
    frozen = norms.frozen(nn.Sequential(nn.BatchNorm2d(6)))
    frozen.load_state_dict(nn.Sequential(norm).state_dict())
    x, _ = batch(torch.bfloat16, mean=0.0)
    assert frozen(x).dtype == torch.bfloat16 and torch.equal(frozen[0].weight, norm.weight)


def kept_and_launched(layer: nn.Module) -> tuple[int, int]:
    """Bytes that a convolution in bf16, a BatchNorm and a ReLU keep for their backward pass, and
    the kernels of both passes."""
    net = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1).bfloat16(), layer, nn.ReLU(inplace=True))
    x, _ = batch(torch.bfloat16)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    launched = count(lambda: net(x).sum().backward()).kernels.total()
    assert y.dtype == torch.bfloat16
    return sum(kept.values()), launched


class InFloat32(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


def test_frozen_batchnorm_launches_less_and_keeps_nothing():
    kept, launched = kept_and_launched(norms.frozen(nn.BatchNorm2d(6)))
    kept_before, launched_before = kept_and_launched(InFloat32(6))
    x, _ = batch(torch.bfloat16)
    assert kept < kept_before + x.nbytes / 8 and launched <= launched_before - 8
    assert kept < 3 * x.nbytes  # the convolution's input, the ReLU's output, and little else
