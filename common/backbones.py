"""ImageNet backbones by name, cut into stages: timm first, then torchvision, and their weights with
clear errors."""

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from common.errors import UserError


class Stages(nn.Module):
    """A torchvision network with a `features` sequence (MobileNet, EfficientNet, ...) -> the last
    map of each stage.

    Strides beyond `stride` become dilations."""

    def __init__(self, features: nn.Sequential, stride: int):
        super().__init__()
        self.features, self.ends = features, {}  # stage -> (layer, reduction, channels)
        done, stage, x = 1, 0, torch.zeros(1, 3, 64, 64)
        for i, layer in enumerate(features):
            for conv in [m for m in layer.modules() if isinstance(m, nn.Conv2d)]:
                dilation = 2**stage // done
                if conv.stride[0] > 1:
                    stage += 1
                    if done == stride:
                        conv.stride = (1, 1)
                    else:
                        done *= 2
                half = conv.kernel_size[0] // 2
                conv.dilation, conv.padding = (dilation,) * 2, (dilation * half,) * 2
            with torch.no_grad():
                x = layer.eval()(x)
            self.ends[stage] = (i, done, x.shape[1])
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps, ends = [], {layer for layer, _, _ in self.ends.values()}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in ends:
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
            try:
                body = timm.create_model(
                    name, features_only=True, output_stride=stride, pretrained=pretrained, **more
                )
            # a transformer: one stride, any size
            except (NotImplementedError, TypeError, ValueError):
                body = timm.create_model(
                    name,
                    features_only=True,
                    pretrained=pretrained,
                    dynamic_img_size=True,
                    dynamic_img_pad=True,
                )
            return body, body.feature_info.reduction(), body.feature_info.channels()
        if name in torchvision.models.list_models():
            network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
            if not hasattr(network, "features"):
                raise UserError(
                    f"--backbone {name} of torchvision has no `features` to cut; take a timm name."
                )
            body = Stages(network.features, stride)
            if len(body.ends) < 3:
                raise uncut(name, "too few stages")
            return (
                body,
                [end[1] for end in body.ends.values()],
                [end[2] for end in body.ends.values()],
            )
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (hub, network and file errors have no common class)
        if not pretrained:
            raise uncut(name, type(error).__name__) from None
        raise UserError(
            f"The ImageNet weights of {name} could not be fetched ({type(error).__name__}); give a file of "
            f"them with --weights FILE, or start from random weights with --weights none."
        ) from None
    close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
    raise UserError(
        f"--backbone {name} is neither a timm nor a torchvision network; "
        + (f"did you mean {close}?" if close else "timm.list_models() lists the names.")
    )


def uncut(name: str, why: str) -> UserError:
    return UserError(
        f"--backbone {name} cannot be cut into feature maps of several strides ({why}); take another, "
        f"for example resnet18."
    )


class Strides(nn.Module):
    """A CNN by its timm or torchvision name: (B, 3, H, W) -> four maps of strides 4, 8, 16, 32, of
    `channels`. With `frozen` its BatchNorm is a constant, which keeps the type of a map."""

    def __init__(self, name: str, frozen: bool, pretrained: bool):
        super().__init__()
        self.body, reduction, channels = build(name, 32, pretrained)
        if not {4, 8, 16, 32} <= set(reduction):
            raise UserError(
                f"--backbone {name} has maps of strides {reduction}, and 4, 8, 16, 32 are needed; take "
                f"another, for example resnet18."
            )
        self.places = [
            len(reduction) - 1 - reduction[::-1].index(stride) for stride in (4, 8, 16, 32)
        ]
        self.channels = [channels[i] for i in self.places]
        if frozen:
            from timm.utils.model import freeze_batch_norm_2d

            self.body = freeze_batch_norm_2d(self.body)
            for m in self.body.modules():
                if isinstance(m, FrozenBatchNorm2d):  # its buffers would make bf16 maps float32
                    m.register_forward_hook(lambda _, inputs, out: out.to(inputs[0].dtype))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        return [maps[i] for i in self.places]
