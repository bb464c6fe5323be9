"""Networks of timm with their weights, and backbones as feature extractors."""

import hashlib
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d

from common import backbones, runs, transforms
from common.distributed import World
from common.runs import UserError
from data import ap, read, regions
from data.instances import Instances, Photo

PLAIN = ("eva02", "vit")  # transformers that are built for one size


def made_of(args, names: str, classes: list[str]) -> str:
    """A key of the flags `names`, a word each, and the classes that a file was made with."""
    text = json.dumps([[str(getattr(args, name)) for name in names.split()], classes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def create(name: str, weights: str, **more) -> nn.Module:
    """A network of timm without a classifier; `weights`: imagenet (what the name's tag says), none,
    or a file in any layout that timm reads. UserError when there is none of this name, or its
    weights cannot be had."""
    import timm

    if weights not in ("imagenet", "none"):
        more["pretrained_cfg_overlay"] = {"file": weights}
    try:
        return timm.create_model(name, pretrained=weights != "none", num_classes=0, **more)
    except Exception as error:  # noqa: BLE001 (hub, network, unknown name)
        raise UserError(
            f"timm cannot give {name} with weights {weights} ({str(error)[:200]}); correct the name, or "
            f"without a network give a file of weights, or none."
        ) from None


def resize_patch(kernel: Tensor, size: int, how: str) -> Tensor:
    """Patch embedding (D, 3, p, p) -> (D, 3, size, size). `timm`: so that the answer to an enlarged
    picture stays (pseudo-inverse of the resizing); `bicubic`: the kernel itself is enlarged, so
    answers grow by (size / p)^2."""
    if kernel.shape[-1] == size:
        return kernel
    if how == "bicubic":
        return F.interpolate(kernel, (size, size), mode="bicubic", align_corners=False)
    from timm.layers import resample_patch_embed

    return resample_patch_embed(kernel, [size, size])


def windows(x: Tensor, w: int) -> Tensor:
    """(B, h, v, D) tokens -> (B * h/w * v/w, w * w, D)."""
    b, h, v, d = x.shape
    return x.view(b, h // w, w, v // w, w, d).transpose(2, 3).reshape(-1, w * w, d)


def unwindows(x: Tensor, w: int, size: tuple[int, int]) -> Tensor:
    """The reverse of `windows`: -> (B, *size, D)."""
    h, v = size
    return (
        x.view(-1, h // w, v // w, w, w, x.shape[-1]).transpose(2, 3).reshape(-1, h, v, x.shape[-1])
    )


def drawn(layer: nn.Module, std: float) -> nn.Module:
    """The layer, with weights of this deviation and a bias of zero."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class Embedder(nn.Module):
    """Pictures (B, 3, size, size) uint8 -> (B, D) float32. Of EVA-02 the mean of the patch tokens,
    through the norm of its pre-training; of DINOv2 the class token; of a CNN the mean of its last
    map. Pictures are normalised as the network learned them (EVA-02: CLIP's numbers).

    `name` is timm's, else torchvision's; `weights` as in `create`, or shapes, the embedded data's
    under `root`."""

    def __init__(self, name: str, weights: str, root: str, size: int):
        super().__init__()
        import timm

        found = None if name.startswith(PLAIN) else backbones.read(weights, name, root)
        self.maps = not timm.is_model(name)
        if self.maps:
            self.body = backbones.build(name, 32, weights == "imagenet")[0]
        else:
            more = {"img_size": size} if name.startswith(PLAIN) else {}
            self.body = create(name, "none" if found is not None else weights, **more)
            if more and size % self.body.patch_embed.patch_size[0]:
                raise UserError(
                    f"--embed-size {size} does not divide into patches of {name}, "
                    f"{self.body.patch_embed.patch_size[0]} pixels; give a multiple."
                )
        if found is not None:
            runs.load_matching(self.body, found, weights)
        facts = getattr(self.body, "pretrained_cfg", {})
        for key, default in (("mean", transforms.IMAGENET_MEAN), ("std", transforms.IMAGENET_STD)):
            values = [255 * v for v in facts[key]] if facts.get(key) else default
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        return (self.body(x)[-1].mean((2, 3)) if self.maps else self.body(x)).float()


def embed_objects(
    net: nn.Module,
    chosen: list[tuple[Photo, list[int]]],
    data: Instances,
    size: int,
    world: World,
    workers: int,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Embeddings (N, D) of the chosen objects' crops, their classes (N,), and a crop (3, size,
    size) uint8 of each class; on every process and in the order of `chosen`, each made by one
    process."""
    mine, found, examples = chosen[world.rank :: world.size], [], {}
    crops_of = DataLoader(
        mine,
        batch_size=None,
        generator=torch.Generator(),
        **read.helpers(workers),
        collate_fn=lambda item: regions.crops(item[0], data, item[1], size),
    )
    for i, (crops, labels) in enumerate(crops_of):
        if len(labels):
            new = {c: x for c, x in zip(labels.tolist(), crops, strict=True) if c not in examples}
            examples |= new
            vectors = torch.cat([net(x.to(world.device)) for x in crops.split(64)]).cpu()
            found.append((world.rank + i * world.size, vectors, labels, new))
    found = ap.gather(world, found)
    if not found:
        raise UserError(
            "None of the objects whose crops are to be embedded can be seen; look at the annotations."
        )
    examples = {c: x for *_, new in reversed(found) for c, x in new.items()}
    return (
        torch.cat([x for _, x, *_ in found]),
        torch.cat([labels for _, _, labels, _ in found]),
        examples,
    )


class Strides(nn.Module):
    """A CNN by its timm or torchvision name: (B, 3, H, W) -> four maps of strides 4, 8, 16, 32, of
    `channels`. With `frozen` its BatchNorm is a constant, which keeps the type of a map."""

    def __init__(self, name: str, frozen: bool, pretrained: bool):
        super().__init__()
        self.body, reduction, channels = backbones.build(name, 32, pretrained)
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
