"""ImageNet backbones by name, cut into stages: timm's first, then torchvision's. Each takes
`pretrained: bool` for the published weights; a file of weights is loaded by whoever builds the
network."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import norms
from common.errors import UserError


class StageEnd(NamedTuple):
    """Where a stage of a network ends: its last layer, and what its map is like."""

    layer: int
    reduction: int
    channels: int


class Stages(nn.Module):
    """A torchvision network with a `features` sequence (MobileNet, EfficientNet, ...) -> the last
    map of each stage. Strides beyond `stride` become dilations."""

    def __init__(self, features: nn.Sequential, stride: int):
        super().__init__()
        self.features = features
        self.ends: dict[int, StageEnd] = {}
        stage = 0
        reduction = 1
        x = torch.zeros(1, 3, 64, 64)
        for place, layer in enumerate(features):
            for conv in layer.modules():
                if not isinstance(conv, nn.Conv2d):
                    continue
                dilation = 2**stage // reduction
                if conv.stride[0] > 1:
                    stage += 1
                    if reduction == stride:
                        conv.stride = (1, 1)
                    else:
                        reduction *= 2
                half = conv.kernel_size[0] // 2
                conv.dilation = (dilation, dilation)
                conv.padding = (dilation * half, dilation * half)
            with torch.no_grad():
                x = layer.eval()(x)
            self.ends[stage] = StageEnd(place, reduction, x.shape[1])
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        last_layers = {end.layer for end in self.ends.values()}
        maps = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in last_layers:
                maps.append(x)
        return maps


def build(
    name: str, stride: int = 32, pretrained: bool = False, **more
) -> tuple[nn.Module, list[int], list[int]]:
    """The network, which maps (B, 3, H, W) to a list of feature maps, and each map's reduction and
    channels.

    `stride` is the smallest map's reduction where the network can be dilated (8, 16, 32);
    transformers keep their own. `more` (out_indices) goes to timm. Raises UserError for an unknown
    name or weights that cannot be had."""
    import timm
    import torchvision

    try:
        if timm.is_model(name):
            return build_timm(name, stride, pretrained, **more)
        if name in torchvision.models.list_models():
            return build_torchvision(name, stride, pretrained)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (hub, network and file errors have no common class)
        if not pretrained:
            raise cannot_be_cut(name, type(error).__name__) from None
        raise UserError(
            f"The ImageNet weights of {name} could not be fetched ({type(error).__name__}); give a "
            f"file of them with --weights FILE, or start from random weights with --weights none."
        ) from None
    similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
    hint = f"did you mean {similar}?" if similar else "timm.list_models() lists the names."
    raise UserError(f"--backbone {name} is neither a timm nor a torchvision network; {hint}")


def build_timm(
    name: str, stride: int, pretrained: bool, **more
) -> tuple[nn.Module, list[int], list[int]]:
    import timm

    try:
        body = timm.create_model(
            name, features_only=True, output_stride=stride, pretrained=pretrained, **more
        )
    except (NotImplementedError, TypeError, ValueError):  # a transformer: one stride, any size
        body = timm.create_model(
            name,
            features_only=True,
            pretrained=pretrained,
            dynamic_img_size=True,
            dynamic_img_pad=True,
        )
    return body, body.feature_info.reduction(), body.feature_info.channels()


def build_torchvision(
    name: str, stride: int, pretrained: bool
) -> tuple[nn.Module, list[int], list[int]]:
    import torchvision

    network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    if not hasattr(network, "features"):
        raise UserError(
            f"--backbone {name} of torchvision has no `features` to cut; take a timm name."
        )
    body = Stages(network.features, stride)
    ends = list(body.ends.values())
    if len(ends) < 3:
        raise cannot_be_cut(name, "too few stages")
    return body, [end.reduction for end in ends], [end.channels for end in ends]


def cannot_be_cut(name: str, why: str) -> UserError:
    return UserError(
        f"--backbone {name} cannot be cut into feature maps of several strides ({why}); take "
        f"another, for example resnet18."
    )


class FourMaps(nn.Module):
    """A CNN by its timm or torchvision name: (B, 3, H, W) -> four maps of strides 4, 8, 16, 32, of
    `channels` (res2 .. res5). If `frozen`, its BatchNorm layers are constants."""

    def __init__(self, name: str, frozen: bool, pretrained: bool):
        super().__init__()
        self.body, reduction, channels = build(name, 32, pretrained)
        if not {4, 8, 16, 32} <= set(reduction):
            raise UserError(
                f"--backbone {name} has maps of strides {reduction}, and 4, 8, 16, 32 are needed; "
                f"take another, for example resnet18."
            )
        last_first = reduction[::-1]
        # Where the last map of each stride is.
        self.places = [len(reduction) - 1 - last_first.index(stride) for stride in (4, 8, 16, 32)]
        self.channels = [channels[place] for place in self.places]
        if frozen:
            self.body = norms.frozen(self.body)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        return [maps[place] for place in self.places]
