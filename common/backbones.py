"""ImageNet backbones by name, cut into stages: timm's first, then torchvision's. Each takes
`pretrained: bool` for the published weights; a file of weights is loaded by whoever builds the
network, into what `bare` returns.

CNNs are dilated to the stride that is asked for. ViTs, Swin and ConvNeXt keep their strides
(`LayerNormed`), and an `Adaptor` enlarges their maps."""

import contextlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import norms
from common.errors import UserError, one_line


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

    `stride` (8, 16, 32) is the smallest map's reduction in a CNN; other networks keep their own,
    see `adaptor`. `more` (out_indices: which maps) goes to timm. Raises UserError for an unknown
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
            raise cannot_be_cut(name, one_line(error)) from None
        raise UserError(
            f"The ImageNet weights of {name} could not be fetched ({one_line(error)}); give a "
            f"file of them with --weights FILE, or start from random weights with --weights none."
        ) from None
    similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
    hint = f"did you mean {similar}?" if similar else "timm.list_models() lists the names."
    raise UserError(f"--backbone {name} is neither a timm nor a torchvision network; {hint}")


def build_timm(
    name: str, stride: int, pretrained: bool, **more
) -> tuple[nn.Module, list[int], list[int]]:
    import timm

    if is_layer_normed(name):
        body = LayerNormed(name, pretrained, **more)
        return body, body.reductions, body.channels
    body = timm.create_model(
        name, features_only=True, output_stride=stride, pretrained=pretrained, **more
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


# ------------------------------------------------------------------------- ViT, Swin, ConvNeXt
@lru_cache
def is_layer_normed(name: str) -> bool:
    """Whether timm's network of this name is normalised by LayerNorm and nowhere by BatchNorm, as
    ViTs, Swin and ConvNeXt are. Such networks learn by AdamW, and none of them is dilated."""
    if not name:
        return False
    import timm

    if not timm.is_model(name):
        return False
    # Layers without numbers, for they are only looked at; nothing is drawn for them either.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        layers = list(timm.create_model(name).modules())
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers):
        return False
    return any(isinstance(layer, nn.LayerNorm) for layer in layers)


def of_any_size(name: str, pretrained: bool = False, num_classes: int = 0) -> nn.Module:
    """timm's network of this name; a ViT or Swin for pictures of any size."""
    import timm

    settings = dict(pretrained=pretrained, num_classes=num_classes)
    if not is_layer_normed(name):
        return timm.create_model(name, **settings)
    # ViTs resize their table of positions. Swin's windows also shift where one holds a whole map,
    # which may hold more than a window in a larger picture.
    for more in (
        dict(strict_img_size=False, always_partition=True),
        dict(dynamic_img_size=True),
    ):
        with contextlib.suppress(TypeError):  # the network does not know one of these
            return timm.create_model(name, **settings, **more)
    return timm.create_model(name, **settings)


class LayerNormed(nn.Module):
    """A ViT, Swin or ConvNeXt of timm: (B, 3, H, W) -> feature maps (B, C, h, w).

    A plain ViT has maps of one stride, and those after each quarter of its blocks are returned,
    each through its last norm, as DINOv2 returns them. The others have a map for each stage, which
    is returned as it is. Images are first enlarged to whole patches, so that the cells of all maps
    cover the image and nothing else."""

    def __init__(self, name: str, pretrained: bool, out_indices: tuple[int, ...] | None = None):
        super().__init__()
        self.body = of_any_size(name, pretrained)
        stages = self.body.feature_info
        places = list(range(len(stages)))
        plain = len({stage["reduction"] for stage in stages}) == 1
        if plain:
            places = sorted({-(-len(stages) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
        if out_indices is not None:
            places = [places[i] for i in out_indices]
        self.reductions = [stages[place]["reduction"] for place in places]
        self.channels = [stages[place]["num_chs"] for place in places]
        self.patch = max(self.reductions)
        # Some ViTs have their last norm behind the pooling, where no map passes.
        self.normed = plain and isinstance(self.body.norm, nn.LayerNorm)
        # What no map needs is left out, for it would never have a gradient.
        self.places = self.body.prune_intermediate_layers(places, prune_norm=not self.normed)
        self.try_another_size(name)

    def try_another_size(self, name: str) -> None:
        """UserError when the network takes pictures of its own size only."""
        self.eval()
        images = next(self.parameters()).new_zeros(1, 3, 2 * self.patch, 3 * self.patch)
        expected = [
            (1, channels, 2 * self.patch // reduction, 3 * self.patch // reduction)
            for channels, reduction in zip(self.channels, self.reductions, strict=True)
        ]
        try:
            with torch.no_grad():
                fits = [tuple(m.shape) for m in self(images)] == expected
        except (AssertionError, RuntimeError, ValueError):
            fits = False
        if not fits:
            raise UserError(
                f"--backbone {name} has no maps of pictures of other sizes than its own; take "
                f"another, for example vit_small_patch14_dinov2.lvd142m."
            )
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        size = tuple(-(-side // self.patch) * self.patch for side in images.shape[-2:])
        if size != images.shape[-2:]:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return self.body.forward_intermediates(
            images,
            indices=self.places,
            norm=self.normed,
            output_fmt="NCHW",
            intermediates_only=True,
        )


def bare(backbone: nn.Module) -> nn.Module:
    """The network within a backbone whose tensors have the names that files of weights have."""
    return backbone.body if isinstance(backbone, LayerNormed) else backbone


class Deepest(nn.Module):
    """The last map of a list."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[-1]


class Adaptor(nn.Module):
    """Maps of a LayerNormed network -> one map (B, C, h, w) of `stride`, or the nearest that its
    patches allow: the deepest one, whose sides are doubled and whose channels are halved as often
    as that needs, by transposed convolutions as in ViTDet. Where the network itself has a map of
    the stride that was reached, it is added through a 1x1 convolution."""

    def __init__(self, normed: bool, reductions: list[int], channels: list[int], stride: int):
        super().__init__()
        from timm.layers import LayerNorm2d

        reduction, width = reductions[-1], channels[-1]
        self.first = nn.Identity() if normed else LayerNorm2d(width)
        self.doublings = nn.ModuleList()
        self.norms = nn.ModuleList()
        self.laterals = nn.ModuleDict()  # by the place of their map
        self.added: list[int | None] = []  # the place of the map that each doubling meets
        while reduction > 1.5 * stride:
            reduction, half = reduction / 2, width // 2
            self.doublings.append(nn.ConvTranspose2d(width, half, kernel_size=2, stride=2))
            self.norms.append(LayerNorm2d(half))
            place = reductions.index(reduction) if reduction in reductions else None
            self.added.append(place)
            if place is not None:
                own = channels[place]
                self.laterals[str(place)] = nn.Sequential(LayerNorm2d(own), nn.Conv2d(own, half, 1))
            width = half
        self.channels = width

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.first(maps[-1])
        for double, norm, place in zip(self.doublings, self.norms, self.added, strict=True):
            x = double(x)
            if place is not None:
                x = x + self.laterals[str(place)](maps[place])
            x = F.gelu(norm(x))
        return x


def adaptor(
    backbone: nn.Module, reductions: list[int], channels: list[int], stride: int
) -> Deepest | Adaptor:
    """What makes one map of `stride`, with its `channels`, out of the backbone's maps; of a CNN,
    which is dilated to its stride, this is its deepest map as it is."""
    if isinstance(backbone, LayerNormed):
        return Adaptor(backbone.normed, reductions, channels, stride)
    return Deepest(channels[-1])


# --------------------------------------------------------------------------------- a pyramid
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
