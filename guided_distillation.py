"""Guided Distillation for Semi-Supervised Instance Segmentation.
Berrada, Couprie, Alahari, Verbeek. WACV 2024. https://arxiv.org/abs/2308.02668

A teacher learns from the few labels. A student, started afresh, learns from labels and from the
teacher's pseudo labels while the teacher stays as it is (guided burn-in); then the teacher becomes
a copy of the student and follows it by EMA. Both are Mask2Former (Cheng et al., CVPR 2022,
https://arxiv.org/abs/2112.01527), complete in this file.

    paper                                            this file
    Sec. 3.1  architecture                           Mask2Former: backbone, PixelDecoder, Decoder
    Sec. 3.1  steps 1, 2 and 3                       train_step
    Table 1   who learns when; other burn-ins        teaching_plan
    Sec. 3.1  thresholds; Eq. 3                      pseudo_labels
    Eqs. 1, 2 matching and losses                    match_costs, assign, mask_losses, criterion
    Eq. 4     L_s + lambda_u L_u                     learn (one backward pass each), train_step
    Eq. 5     exponential moving average             ema_update
    Sec. 4.3  views: crops, flips; colour, grey, blur  jitter_crop, street_crop, strong_view
    Sec. 4.1  schedule, optimizer, evaluation        schedule, adamw, detect, evaluate
    Tables 2-7, Fig. 6                               Args; commands in docs/guided_distillation.md
    (Mask2Former) masked attention                   blocked, Attention
    (Mask2Former) multi-scale deformable attention   DeformableAttention
    (Mask2Former) sine positions                     sine_positions

Shapes: B images, Q queries, K classes, N targets of an image, L = 10 prediction heads, P points, C
= 256 channels, H x W pixels, h x w cells of stride 4, S tokens of strides 8, 16, 32. Suffix _u
unlabeled. Lines marked DEPARTS[name] leave the paper or decide what it leaves open;
docs/guided_distillation.md says why.

    torchrun --nproc_per_node 8 guided_distillation.py --dataset coco --split 5%
    python guided_distillation.py --dataset shapes --split 5%       # embedded data, no download, CPU, minutes
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from common import (
    backbones,
    checkpoints,
    cli,
    distributed,
    instances,
    loading,
    mask_ap,
    plots,
    runs,
    transforms,
)
from common.distributed import World, rng
from common.errors import UserError
from common.files import pictures, readable, write_text
from common.instances import Batch, Target
from common.objects import Instances, Photo, Window, cut_out, masks_of, read_ids
from data import shapes

SCRIPT = "guided_distillation.py"


HEADS = 8  # of all attention layers


# ========================================================================================= settings
@dataclass
class Args:
    """Guided Distillation. --dataset picks the paper's numbers, other flags override them. DEPARTS:
    see docs."""

    # data and bookkeeping
    # what to train on (coco: any COCO JSON); picks defaults
    dataset: Literal["coco", "cityscapes", "shapes"] = "coco"
    root: str = "datasets/coco"  # where the data lie, see data/README.md
    # annotations of the training images; empty: the first usual name that exists
    train_json: str = ""
    val_json: str = ""  # annotations of the images that are scored; empty: the same
    images: str = ""  # folder of the images; empty: the usual places
    # labeled images: a published share, random:N, random:N%, random:1/N, all, a list, a COCO JSON
    split: str = "5%"
    split_seed: int = 0  # which draw, for random splits and COCO's ten published ones
    unlabeled: str = ""  # folder or list of unlabeled images; empty: see --pool
    # unlabeled: all training images, or without the labeled. DEPARTS[pool]
    pool: Literal["all", "remaining"] = "all"
    val: str = "val"  # name of the part that is scored
    # run folder; empty: runs/guided_distillation-<dataset>-<split>-d<split seed>-s<seed>
    out: str = ""
    resume: bool = False  # continue the run in --out; starts afresh when there is none
    seed: int = 0  # initial weights, order of images, augmentation, points
    workers: int = loading.default_workers()  # decoding processes per training process and stream
    device: str = "auto"  # auto, cpu, cuda
    # of the network that learns; auto: bf16 on GPUs. DEPARTS[amp]
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile backbone and pixel decoder in training
    eval_every: int = 5000  # steps between evaluations
    save_every: int = 0  # steps between checkpoints; 0: with every evaluation
    log_every: int = 20  # steps between log lines
    eval: str = ""  # evaluate this checkpoint, train nothing
    # checkpoint, then images or folders: write predictions
    predict: list[str] = field(default_factory=list)

    # the method (Secs. 3.1, 3.2) and the paper's tables
    stage: Literal["teacher", "student", "all"] = "all"  # teacher: the supervised rows of Table 3
    teacher: str = ""  # a trained teacher, ours or official Mask2Former weights: no teacher stage
    burn_in: Literal["guided", "standard", "fixed", "none"] = "guided"  # Tables 1 and 4
    burn_in_steps: int = 0  # 0: Table 2's for the data set and share, in proportion to --steps
    # which of the teacher stage's weights teach. DEPARTS[select]
    select: Literal["best", "last"] = "best"
    ema: float = 0.9996  # alpha, Eq. 5
    lambda_u: float = 2.0  # Eq. 4, Table 5
    class_threshold: float = 0.7  # alpha_C
    size_threshold: float = 5.0  # alpha_S, in cells of stride 4. DEPARTS[size]
    strong_aug: Literal["ours", "cutout", "same"] = "ours"  # Fig. 6: ours, PT, same
    # in the student's stage. DEPARTS[sampling]
    labeled_sampling: Literal["repeat", "uniform"] = "repeat"
    # objects that a crop cut away, as on released Cityscapes. DEPARTS[empty-targets]
    keep_empty_targets: bool = False

    # network (Sec. 3.1, 4.1; Mask2Former)
    # timm's names (swin_*, vit_*dinov2*, deit_*, any CNN), else torchvision's
    backbone: str = "resnet50.tv_in1k"
    # imagenet (what the name's tag says), none, shapes, or a file: backbone or whole model
    weights: str = "imagenet"
    # BatchNorm of a CNN: constant, or trained (synchronised on GPUs)
    norm: Literal["frozen", "live"] = "frozen"
    # Table 7, "fixed": a ViT's weights stay, its adaptor learns. DEPARTS[freeze]
    freeze_backbone: bool = False
    queries: int = 0  # 0: 200 for Swin-L, else 100. DEPARTS[queries]
    drop_path: float = 0.3  # of Swin
    vit_resize: Literal["bilinear", "nearest"] = "bilinear"  # in the adaptor. DEPARTS[vit-resize]
    # channels behind the backbone; Mask2Former's, smaller ones are for CPUs, as the next two
    width: int = 256
    encoder_layers: int = 6  # of the pixel decoder
    decoder_layers: int = 9  # of the transformer decoder
    # compute activations again in the backward pass: less memory, same gradients
    checkpointing: bool = False

    # losses (Mask2Former) and optimisation (Sec. 4.1)
    class_weight: float = 2.0  # of the cross-entropy of classes. DEPARTS[loss-weights], these three
    mask_weight: float = 5.0  # of the binary cross-entropy of masks
    dice_weight: float = 5.0  # of the Dice loss of masks
    no_object: float = 0.1  # class weight of "no object"
    points: int = 12544  # where masks are compared
    # labeled images per step over all processes, and as many unlabeled. DEPARTS[batch]
    batch_size: int = 16
    # parts in which a process computes its share of the batch; exact with --norm frozen
    accumulate: int = 1
    steps: int = 368_750  # of the teacher, and of the student, burn-in included
    lr: float = 1e-4  # at its highest, of all but the backbone
    backbone_lr: float = 0.1  # times lr
    weight_decay: float = 0.05  # of AdamW; none for norms and embeddings
    clip: float = 0.01  # largest gradient norm. DEPARTS[clip]
    schedule: Literal["step", "poly"] = "step"  # of the learning rate. DEPARTS[schedule]
    crop_size: tuple[int, int] = (1024, 1024)  # height and width in training
    # range of the random scale; Cityscapes has a list of its own
    scale: tuple[float, float] = (0.1, 2.0)
    # shorter side, and the most for the longer, in evaluation
    test_size: tuple[int, int] = (800, 1333)


PRESETS: dict[str, dict[str, Any]] = {
    "coco": dict(split_seed=1),
    "cityscapes": dict(
        root="datasets/cityscapes",
        norm="live",
        steps=90_000,
        schedule="poly",
        crop_size=(512, 1024),
        test_size=(1024, 2048),
    ),
    "shapes": dict(
        root="datasets/shapes",
        backbone="test_resnet",
        weights="shapes",
        norm="live",
        width=64,
        queries=20,
        encoder_layers=2,
        decoder_layers=3,
        points=512,
        batch_size=8,
        steps=800,
        lr=1e-3,
        backbone_lr=0.3,
        ema=0.99,
        schedule="poly",
        crop_size=(96, 96),
        scale=(0.7, 1.4),
        test_size=(96, 96),
        eval_every=400,
    ),
}


BURN_IN = {
    "cityscapes": {
        "5%": 15_000,
        "10%": 25_000,
        "20%": 30_000,
        "30%": 35_000,
        "all": 50_000,
        "": 25_000,
    },
    "coco": {"1%": 20_000, "2%": 25_000, "5%": 30_000, "10%": 60_000, "": 30_000},  # Table 2
    "shapes": {"": 300},
}


def preset(dataset: str = "coco", **overrides: Any) -> Args:
    return Args(**(dict(dataset=dataset) | PRESETS[dataset] | overrides))


# ======================================================================================== backbones
class Pyramid(nn.Module):
    """A CNN by its timm or torchvision name: (B, 3, H, W) -> four maps of strides 4, 8, 16, 32
    (res2 .. res5)."""

    def __init__(self, args: Args, pretrained: bool):
        super().__init__()
        self.body, reduction, channels = backbones.build(args.backbone, 32, pretrained)
        if not {4, 8, 16, 32} <= set(reduction):
            raise UserError(
                f"--backbone {args.backbone} has maps of strides {reduction}, and 4, 8, 16, 32 are needed; "
                f"take another, for example resnet18."
            )
        self.places = [
            len(reduction) - 1 - reduction[::-1].index(stride) for stride in (4, 8, 16, 32)
        ]
        self.channels = [channels[i] for i in self.places]
        if args.norm == "frozen":
            from timm.utils.model import freeze_batch_norm_2d

            self.body = freeze_batch_norm_2d(self.body)
            for m in self.body.modules():
                if isinstance(m, FrozenBatchNorm2d):  # its buffers would make bf16 maps float32
                    m.register_forward_hook(lambda _, inputs, out: out.to(inputs[0].dtype))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        return [maps[i] for i in self.places]


def create(args: Args, pretrained: bool, **more) -> nn.Module:
    """A transformer of timm; UserError when there is none of this name, or its weights cannot be
    had."""
    import timm

    try:
        return timm.create_model(args.backbone, pretrained=pretrained, num_classes=0, **more)
    except Exception as error:  # noqa: BLE001 (hub, network, unknown name)
        raise UserError(
            f"timm cannot give --backbone {args.backbone} with --weights {args.weights} ({error}); correct "
            f"the name, or without a network give --weights FILE or none."
        ) from None


class Swin(nn.Module):
    """Swin Transformer of timm's layers, in the published order: pad, roll, attend, roll back, cut.
    timm rolls before it pads, which is another network wherever a map does not divide into windows.
    DEPARTS[swin]"""

    def __init__(self, args: Args, pretrained: bool):
        super().__init__()
        body = create(
            args,
            pretrained,
            drop_path_rate=args.drop_path,
            strict_img_size=False,
            always_partition=True,
        )
        self.patch_embed, self.layers = body.patch_embed, body.layers
        self.channels = [stage["num_chs"] for stage in body.feature_info]
        # of the detector: not in ImageNet files
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.checkpointing = args.checkpointing

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = self.patch_embed(images), []  # (B, h, w, C)
        for stage, norm in zip(self.layers, self.norms, strict=True):
            x = stage.downsample(x)
            for i, block in enumerate(stage.blocks):
                x = maybe_checkpoint(
                    self.checkpointing and self.training, self.block, block, x, i % 2 == 1
                )
            maps.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return maps

    def block(self, block: nn.Module, x: Tensor, shifted: bool) -> Tensor:
        """One block on (B, h, w, C): window attention, shifted by half a window or not, and MLP,
        both residual."""
        (height, width), window = x.shape[1:3], block.window_size[0]
        shift = window // 2 if shifted else 0
        y = F.pad(block.norm1(x), (0, 0, 0, -width % window, 0, -height % window))
        padded = y.shape[1:3]
        y = y.roll((-shift, -shift), (1, 2)) if shift else y
        b, (rows, columns) = len(y), (n // window for n in padded)
        y = (
            y.view(b, rows, window, columns, window, -1)
            .transpose(2, 3)
            .reshape(-1, window * window, y.shape[-1])
        )
        y = block.attn(y, mask=shift_mask(padded, window, shift, y.device) if shift else None)
        y = y.view(b, rows, columns, window, window, -1).transpose(2, 3).reshape(b, *padded, -1)
        y = y.roll((shift, shift), (1, 2)) if shift else y
        x = x + block.drop_path1(y[:, :height, :width])
        return x + block.drop_path2(block.mlp(block.norm2(x)))


@lru_cache(maxsize=8)
def shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, window^2, window^2): -100 between places of a rolled map that were not neighbours,
    else 0."""
    parts = []
    for n in size:
        place = torch.arange(n, device=device)
        parts.append((place >= n - window).long() + (place >= n - shift))
    region = 3 * parts[0][:, None] + parts[1]
    region = (
        region.view(size[0] // window, window, size[1] // window, window)
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)


class ViT(nn.Module):
    """A plain vision transformer (DINOv2, DeiT) with Sec. 4.3's adaptor: patch tokens of the last
    layer, resized to four strides, a 1x1 convolution each. The input is enlarged to whole patches.
    DEPARTS[vit-resize]"""

    def __init__(self, args: Args, pretrained: bool):
        super().__init__()
        self.body = create(args, pretrained, dynamic_img_size=True)
        self.body.set_grad_checkpointing(args.checkpointing)
        more = {} if args.vit_resize == "nearest" else {"align_corners": False}
        self.patch = self.body.patch_embed.patch_size[0]
        self.resize = partial(F.interpolate, mode=args.vit_resize, **more)
        width, self.channels = self.body.embed_dim, [128, 256, 512, 1024]
        self.adaptor = nn.ModuleList(nn.Conv2d(width, c, 1) for c in self.channels)
        self.freeze = args.freeze_backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        size = images.shape[-2:]
        grid = [-(-n // self.patch) for n in size]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            x = self.resize(images, size=[n * self.patch for n in grid])
            x = self.body.forward_features(x)[
                :, self.body.num_prefix_tokens :
            ]  # (B, tokens, width)
        x = x.transpose(1, 2).unflatten(2, grid)
        return [
            conv(self.resize(x, size=[n // stride for n in size]))
            for conv, stride in zip(self.adaptor, (4, 8, 16, 32), strict=True)
        ]

    def train(self, mode: bool = True) -> "ViT":
        super().train(mode)
        self.body.train(mode and not self.freeze)
        return self


def maybe_checkpoint(on: bool, function: Callable, *inputs):
    """function(*inputs); when `on`, activations are computed again in the backward pass instead of
    being kept."""
    return checkpoint(function, *inputs, use_reentrant=False) if on else function(*inputs)


# ==================================================================================== pixel decoder
@lru_cache(maxsize=16)
def sine_positions(size: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(h * w, width): each cell's row and column, counted from 1, as shares of the map times 2 pi,
    in width / 4 sine and as many cosine waves each, of wavelength factors 1 to 10,000, interleaved;
    rows first."""
    half = width // 2
    wave = 10000 ** (
        2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half
    )
    parts = []
    for n in size:
        share = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angle = share[:, None] / wave
        # (n, half)
        parts.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1))
    rows, columns = (
        parts[0][:, None].expand(-1, size[1], -1),
        parts[1][None].expand(size[0], -1, -1),
    )
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


@lru_cache(maxsize=16)
def cell_centres(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(S, 2): x and y in 0..1 of each token's own cell, for all levels one after the other; and
    (levels, 2): width and height of each level in cells."""
    parts = []
    for h, w in sizes:
        ys, xs = (
            (torch.arange(h, device=device) + 0.5) / h,
            (torch.arange(w, device=device) + 0.5) / w,
        )
        parts.append(torch.stack([xs.expand(h, w), ys[:, None].expand(h, w)], dim=2).flatten(0, 1))
    return torch.cat(parts), torch.tensor([(w, h) for h, w in sizes], device=device)


class DeformableAttention(nn.Module):
    """Each token looks at 4 places on each of 3 levels, in each of 8 heads. Plain PyTorch, nothing
    compiled. (Deformable DETR, https://arxiv.org/abs/2010.04159)"""

    def __init__(self, width: int, levels: int = 3, points: int = 4):
        super().__init__()
        self.levels, self.points = levels, points
        self.sampling_offsets = nn.Linear(width, HEADS * levels * points * 2)
        self.attention_weights = nn.Linear(width, HEADS * levels * points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)  # head i looks into direction i ...
        ray = torch.stack([angle.cos(), angle.sin()], 1)
        ray = (ray / ray.abs().amax(1, keepdim=True)).view(HEADS, 1, 1, 2)
        with torch.no_grad():  # ... 1, 2, 3, 4 cells away
            steps = torch.arange(1, points + 1).view(1, 1, points, 1)
            self.sampling_offsets.bias.copy_(
                (ray * steps).expand(HEADS, levels, points, 2).flatten()
            )
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        """query, value (B, S, C), of levels of these sizes -> (B, S, C)."""
        # (S, 2), (levels, 2)
        (b, s, _), (centres, cells) = query.shape, cell_centres(sizes, query.device)
        # (n, c, S)
        value = (
            self.value_proj(value)
            .view(b, s, HEADS, -1)
            .permute(0, 2, 3, 1)
            .flatten(0, 1)
            .contiguous()
        )
        offsets = self.sampling_offsets(query).view(b, s, HEADS, self.levels, self.points, 2)
        # (levels, n, points, S, 2)
        offsets = offsets.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).contiguous()
        weights = self.attention_weights(query).view(b, s, HEADS, -1).softmax(-1)
        weights = (
            weights.unflatten(3, (self.levels, self.points))
            .permute(3, 0, 2, 4, 1)
            .flatten(1, 2)
            .contiguous()
        )
        parts = value.split([h * w for h, w in sizes], dim=2)
        out = sum(
            Look.apply(v.unflatten(2, size), 2 * (centres + offset / cell) - 1, weight)
            for v, size, cell, offset, weight in zip(
                parts, sizes, cells, offsets, weights, strict=True
            )
        )
        return self.output_proj(out.unflatten(0, (b, HEADS)).flatten(1, 2).transpose(1, 2))


class Look(torch.autograd.Function):
    """One level: value (n, c, h, w), grid (n, points, S, 2) in -1..1, weight (n, points, S) -> the
    sum over points of weight times bilinear value, (n, c, S), zero outside. Samples are large: the
    backward pass makes them anew."""

    @staticmethod
    def forward(ctx, value: Tensor, grid: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(value, grid, weight)
        sampled = F.grid_sample(value, grid, align_corners=False)  # (n, c, points, S)
        out = sampled[:, :, 0] * weight[:, None, 0]
        for p in range(1, weight.shape[1]):
            out.addcmul_(sampled[:, :, p], weight[:, None, p])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, grid, weight = ctx.saved_tensors
        grad, inputs = (
            grad.contiguous(),
            (value.detach().requires_grad_(), grid.detach().requires_grad_()),
        )
        with torch.enable_grad():
            sampled = F.grid_sample(*inputs, align_corners=False)
        grad_weight = torch.stack([(s * grad).sum(1) for s in sampled.unbind(2)], 1)
        torch.mul(grad[:, :, None], weight[:, None], out=sampled)  # their gradient, in their memory
        return *torch.autograd.grad(sampled, inputs, sampled), grad_weight


class EncoderLayer(nn.Module):
    """Deformable self-attention and FFN on all tokens; residual, normalised after each."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attn, self.norm1 = DeformableAttention(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, position: Tensor, sizes: tuple) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, x, sizes))
        return self.norm2(x + self.linear2(self.linear1(x).relu_()))


class PixelDecoder(nn.Module):
    """Backbone maps -> token maps of strides 32, 16, 8 and mask features of stride 4, in
    float32."""

    def __init__(self, channels: list[int], args: Args):
        super().__init__()
        c = args.width
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, c, 1), nn.GroupNorm(32, c))
            for inputs in channels[:0:-1]
        )
        self.level_embed = nn.Parameter(torch.randn(3, c))
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(args.encoder_layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], c, 1, bias=False), nn.GroupNorm(32, c))
        self.output = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.GroupNorm(32, c))
        self.mask_features = nn.Conv2d(c, c, 1)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)
        self.checkpointing = args.checkpointing

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """maps of strides 4, 8, 16, 32 -> [(B, C, h', w') of strides 32, 16, 8], (B, C, h, w)."""
        maps = [m.float() for m in maps]
        levels = [proj(m) for proj, m in zip(self.input_proj, maps[:0:-1], strict=True)]
        sizes = tuple(tuple(level.shape[-2:]) for level in levels)
        x = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)  # (B, S, C)
        position = torch.cat(
            [
                sine_positions(size, x.shape[2], x.device) + embed
                for size, embed in zip(sizes, self.level_embed, strict=True)
            ]
        )
        for layer in self.layers:
            x = maybe_checkpoint(self.checkpointing and self.training, layer, x, position, sizes)
        parts = x.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
        levels = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        fine = F.interpolate(
            levels[-1], size=maps[0].shape[-2:], mode="bilinear", align_corners=False
        )
        return levels, self.mask_features(self.output(self.lateral(maps[0]) + fine).relu())


# ========================================================================================== decoder
class Attention(nn.Module):
    """Multi-head attention, parameters as in nn.MultiheadAttention. query (B, Q, C); key and value
    (B, S, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """`mask` (B, Q, S), True where a query may look, the same in all heads."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, heads, n, 32)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None]
        )
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked cross-attention, then self-attention, then FFN; residual, normalised after each."""

    def __init__(self, width: int):
        super().__init__()
        self.cross_attn, self.cross_norm = Attention(width), nn.LayerNorm(width)
        self.self_attn, self.self_norm = Attention(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 8 * width), nn.Linear(8 * width, width)
        self.ffn_norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, place: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        x = self.cross_norm(x + self.cross_attn(x + place, key, value, mask))
        x = self.self_norm(x + self.self_attn(x + place, x + place, x))
        return self.ffn_norm(x + self.linear2(self.linear1(x).relu_()))


def blocked(mask_logits: Tensor) -> Tensor:
    """Masked attention: (B, Q, S) logits of the previous head's masks on the cells of a level ->
    True where a query may NOT look: outside its mask, unless its mask is empty, then it looks
    everywhere."""
    outside = mask_logits < 0
    return outside & ~outside.all(dim=-1, keepdim=True)


class Heads(NamedTuple):
    """What Mask2Former predicts, after 0, 1, ..., 9 decoder layers. The mask logits (Q, h, w) of
    head l and image b are `mask_embed[l, b] @ mask_features[b]`: whoever needs them makes those
    that are needed, where they are needed."""

    class_logits: Tensor  # (L, B, Q, K + 1), the last class is "no object"
    mask_embed: Tensor  # (L, B, Q, C)
    mask_features: Tensor  # (B, C, h, w)


class Decoder(nn.Module):
    """Nine layers over three levels in turn, and the shared prediction heads before and after
    each."""

    def __init__(self, num_classes: int, args: Args):
        super().__init__()
        c = args.width
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(args.decoder_layers))
        self.query_feat, self.query_embed = (
            nn.Embedding(args.queries, c),
            nn.Embedding(args.queries, c),
        )
        self.level_embed, self.decoder_norm = nn.Embedding(3, c), nn.LayerNorm(c)
        self.class_embed = nn.Linear(c, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c)
        )

    def forward(
        self, levels: list[Tensor], mask_features: Tensor, last_only: bool = False
    ) -> Heads:
        """`last_only`: L = 1, the final head alone."""
        b, sizes = len(mask_features), [tuple(level.shape[-2:]) for level in levels]
        # resizing commutes with the product over channels: attention masks at their own level, 30
        # times cheaper
        with torch.no_grad():
            small = [
                F.interpolate(
                    mask_features, size=size, mode="bilinear", align_corners=False
                ).flatten(2)
                for size in sizes
            ]
        values = [
            level.flatten(2).transpose(1, 2) + embed
            for level, embed in zip(levels, self.level_embed.weight, strict=True)
        ]
        keys = [
            v + sine_positions(size, v.shape[2], v.device)
            for v, size in zip(values, sizes, strict=True)
        ]
        x, place = (e.weight.expand(b, -1, -1) for e in (self.query_feat, self.query_embed))
        heads = []
        for i, layer in enumerate(self.layers):
            y = self.decoder_norm(x)
            embed = self.mask_embed(y)  # (B, Q, C)
            heads.append((y, embed))
            with torch.no_grad(), torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
                may_look = ~blocked(embed.float() @ small[i % 3])
            x = layer(x, place, keys[i % 3], values[i % 3], may_look)
        y = self.decoder_norm(x)
        heads.append((y, self.mask_embed(y)))
        chosen = heads[-1:] if last_only else heads
        return Heads(
            torch.stack([self.class_embed(y) for y, _ in chosen]).float(),
            torch.stack([embed for _, embed in chosen]).float(),
            mask_features,
        )


class Mask2Former(nn.Module):
    """Normalised images (B, 3, H, W), sides multiples of 32 -> Heads. In training in bf16 where
    asked for."""

    def __init__(self, args: Args, num_classes: int, bf16: bool = False, pretrained: bool = False):
        super().__init__()
        kind = {"swin": Swin, "vit": ViT, "deit": ViT}.get(
            re.match("[a-z]*", args.backbone)[0].rstrip("_"), Pyramid
        )
        self.backbone = kind(args, pretrained)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, args)
        self.decoder = Decoder(num_classes, args)
        self.bf16 = bf16
        if args.freeze_backbone:
            getattr(self.backbone, "body", self.backbone).requires_grad_(False)

    def forward(self, images: Tensor, last_only: bool = False) -> Heads:
        device = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16 and self.training):
            maps = self.backbone(images)
            with torch.autocast(device, enabled=False):
                levels, mask_features = self.pixel_decoder(maps)
            return self.decoder(levels, mask_features, last_only)


# ============================================================================== matching and losses
def sample(maps: Tensor, points: Tensor) -> Tensor:
    """maps (n, c, h, w) at points (n, P, 2), x and y in 0..1 -> (n, c, P); bilinear, zero
    outside."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def match_costs(
    class_logits: Tensor,
    mask_embed: Tensor,
    mask_features: Tensor,
    target: Target,
    points: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """Costs (L, Q, N) of one image: `weights` of class, mask and Dice, masks compared at points (P,
    2).

    class_logits (L, Q, K + 1), mask_embed (L, Q, C), mask_features (C, h, w). All heads share the
    points, so features and targets are sampled once; sampling commutes with the product over
    channels. DEPARTS[points]"""
    f = sample(mask_features[None], points[None])[0]  # (C, P)
    # (N, P)
    t = sample(target.masks[:, None].to(f.dtype), points.expand(len(target.masks), -1, -1))[:, 0]
    costs = []
    for z, embed in zip(class_logits, mask_embed, strict=True):  # a head at a time: memory
        x = embed @ f  # (Q, P) mask logits
        # t sp(-x) + (1 - t) sp(x) = sp(x) - t x
        bce = (F.softplus(x).sum(1, keepdim=True) - x @ t.T) / len(points)
        s = x.sigmoid_()
        dice = 1 - (2 * s @ t.T + 1) / (s.sum(1, keepdim=True) + t.sum(1) + 1)
        costs.append(
            -weights[0] * z.softmax(1)[:, target.labels] + weights[1] * bce + weights[2] * dice
        )
    return torch.stack(costs)


def assign(costs: list[Tensor]) -> tuple[list[Tensor], int]:
    """Hungarian matching of each image's costs (L, Q, N) -> for each image the query (L, N) of each
    target, -1 for targets beyond the number of queries; and how many costs were not finite (they
    count as very large).

    One transfer to the host for all images and heads."""
    from scipy.optimize import linear_sum_assignment

    shapes = [c.shape for c in costs]
    host = torch.cat([c.flatten() for c in costs]).cpu().double().numpy()
    bad = int(np.count_nonzero(~np.isfinite(host)))
    host = np.nan_to_num(host, nan=1e9, posinf=1e9, neginf=1e9)
    queries, start = [], 0
    for heads, q, n in shapes:
        found = np.full((heads, n), -1)
        for head, cost in enumerate(host[start : start + heads * q * n].reshape(heads, q, n)):
            rows, columns = linear_sum_assignment(cost)
            found[head, columns] = rows
        queries.append(torch.from_numpy(found))
        start += heads * q * n
    return queries, bad


def mask_losses(
    mask_logits: Tensor, masks: Tensor, points: Tensor, more: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice losses (N, L) of matched masks at uncertain points (PointRend).

    mask_logits (N, L, h, w); masks (N, H', W'); `points` (N, L, 3 P, 2) are candidates, of which
    the 0.75 P with the logits nearest 0 stay; `more` (N, L, 0.25 P, 2) join them."""
    n, heads = mask_logits.shape[:2]
    logits, keep = mask_logits.flatten(0, 1)[:, None], points.shape[2] // 3 - more.shape[2]
    with torch.no_grad():
        unsure = sample(logits, points.flatten(0, 1))[:, 0].abs()  # (N L, 3 P)
        nearest = unsure.topk(keep, dim=1, largest=False, sorted=False).indices
        chosen = points.flatten(0, 1).gather(1, nearest[..., None].expand(-1, -1, 2))
        chosen = torch.cat([chosen, more.flatten(0, 1)], dim=1)  # (N L, P, 2)
        t = sample(masks[:, None].to(logits.dtype), chosen.unflatten(0, (n, heads)).flatten(1, 2))[
            :, 0
        ]
        t = t.unflatten(1, (heads, -1))  # (N, L, P)
    x = sample(logits, chosen)[:, 0].unflatten(0, (n, heads))
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(-1)
    s = x.sigmoid()
    dice = 1 - (2 * (s * t).sum(-1) + 1) / (s.sum(-1) + t.sum(-1) + 1)
    return bce, dice


class Norms(NamedTuple):
    """What the losses of a batch are divided by: the same for all its heads, parts and
    processes."""

    classes: Tensor  # sum of the class weights over all queries
    masks: Tensor  # number of targets, 1 at least


def normalisers(targets: list[Target], queries: int, no_object: float, world: World) -> Norms:
    """Of this process's whole batch, averaged over processes, as DDP averages gradients.
    DEPARTS[normaliser]"""
    counts = [len(t.labels) for t in targets]
    found = sum(min(n, queries) for n in counts)
    both = torch.tensor(
        [found + no_object * (len(counts) * queries - found), sum(counts)], dtype=torch.float64
    )
    classes, masks = world.mean(both.to(world.device, non_blocking=True)).float()
    return Norms(classes, masks.clamp(min=1))


def criterion(
    heads: Heads, targets: list[Target], norms: Norms, args: Args, generators: list[torch.Generator]
) -> dict[str, Tensor]:
    """Eqs. 1 and 2 of one part of a batch: the sum over heads of 2 CE + 5 mask + 5 Dice.
    DEPARTS[loss-weights]

    `generators` draw each image's points, so that they depend neither on the batch nor on the
    number of processes."""
    (number, b, q), last = heads.class_logits.shape[:3], heads.class_logits.shape[3] - 1
    p, device, weights = (
        args.points,
        heads.class_logits.device,
        (args.class_weight, args.mask_weight, args.dice_weight),
    )

    def draw(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=generator, device=device)

    with torch.no_grad():
        costs = [
            match_costs(
                heads.class_logits[:, i],
                heads.mask_embed[:, i],
                heads.mask_features[i],
                targets[i],
                draw(generators[i], p),
                weights,
            )
            for i in range(b)
        ]
        queries, bad = assign(costs)
    # no object; a place for the unmatched
    wanted = torch.full((number, b, q + 1), last, device=device)
    # DDP waits for every gradient
    mask = dice = 0 * (heads.mask_embed.sum() + heads.mask_features.sum())
    head = torch.arange(number, device=device)[:, None]
    for i, (query, target) in enumerate(zip(queries, targets, strict=True)):
        for part in range(0, query.shape[1], 32):  # 32 targets at a time: memory
            found = query[:, part : part + 32].to(device, non_blocking=True)  # (L, n)
            matched, place = found >= 0, found.clamp(min=0)
            labels, masks = target.labels[part : part + 32], target.masks[part : part + 32]
            wanted[head, i, found] = labels.expand_as(found)
            embed = heads.mask_embed[head, i, place].transpose(0, 1)  # (n, L, C)
            logits = torch.einsum("nlc,chw->nlhw", embed, heads.mask_features[i])
            candidates = draw(generators[i], len(masks), number, 3 * p)
            more = draw(generators[i], len(masks), number, p - int(0.75 * p))
            bce, overlap = mask_losses(logits, masks, candidates, more)  # (n, L)
            mask = mask + (bce * matched.T).sum() / norms.masks
            dice = dice + (overlap * matched.T).sum() / norms.masks
    wanted = wanted[..., :q]
    weight = torch.where(wanted == last, args.no_object, 1.0)
    ce = F.cross_entropy(heads.class_logits.flatten(0, 2), wanted.flatten(), reduction="none")
    ce = (ce * weight.flatten()).sum() / norms.classes
    return {
        "loss": weights[0] * ce + weights[1] * mask + weights[2] * dice,
        "class": ce.detach(),
        "mask": mask.detach(),
        "dice": dice.detach(),
        "bad_costs": ce.new_full((), float(bad)),
    }


# ============================================================================= semi-supervised step
@torch.no_grad()
def pseudo_labels(
    heads: Heads, class_threshold: float = 0.7, size_threshold: float = 5.0
) -> tuple[list[Target], list[Tensor]]:
    """Sec. 3.1 and Eq. 3: of the teacher's final head, objects whose class is sure and whose mask
    is not tiny, one-hot; and the sureness (N,) of each. The size is the sum of the mask's
    probabilities at stride 4. DEPARTS[size]"""
    conf, label = heads.class_logits[-1].softmax(-1).max(-1)  # (B, Q)
    sure = (label < heads.class_logits.shape[-1] - 1) & (conf > class_threshold)
    found, scores = [], []
    for b in range(len(conf)):
        chosen = sure[b].nonzero().flatten()
        masks = torch.einsum("nc,chw->nhw", heads.mask_embed[-1, b, chosen], heads.mask_features[b])
        large = (masks.sigmoid().sum((1, 2)) > size_threshold).nonzero().flatten()
        found.append(Target(label[b, chosen[large]], masks[large] > 0))  # Eq. 3: sigmoid >= 0.5
        scores.append(conf[b, chosen[large]])
    return found, scores


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, parameters and float buffers, in place. 0
    copies."""
    pairs = [
        (t, s)
        for t, s in zip(
            itertools.chain(teacher.parameters(), teacher.buffers()),
            itertools.chain(student.parameters(), student.buffers()),
            strict=True,
        )
        if t.is_floating_point()
    ]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - decay)


def teaching_plan(stage: str, args: Args) -> tuple[int, int]:
    """Table 1: the step of a stage at which the teacher becomes a copy of the student, and from
    which pseudo labels are used. Guided burn-in (the paper's): after the burn-in; from the start.
    Teacher stage: neither, labels alone."""
    never = args.steps + 1
    return (
        (never, never)
        if stage == "teacher"
        else {
            "guided": (args.burn_in_steps, 0),
            "standard": (args.burn_in_steps, args.burn_in_steps),
            "fixed": (never, 0),
            "none": (0, 0),
        }[args.burn_in]
    )


@dataclass
class State:
    """All that training changes (saved whole), and the forward pass that DDP wraps."""

    stage: str  # teacher: the network that learns is the supervised one; student
    student: Mask2Former  # the network that learns
    teacher: Mask2Former | None  # no gradients, eval mode
    optimizer: torch.optim.Optimizer
    forward: Callable
    step: int = 0  # of the whole run
    begun: int = 0  # the step at which this stage began
    last: dict = field(default_factory=dict)  # network -> its newest score
    best: dict = field(default_factory=dict)  # network -> its best one

    def networks(self) -> dict[str, Mask2Former]:
        return (
            {"supervised": self.student}
            if self.stage == "teacher"
            else {"student": self.student, "teacher": self.teacher}
        )


def train_step(
    s: State, labeled: Batch, unlabeled: Batch | None, args: Args, world: World
) -> dict[str, Tensor]:
    """Sec. 3.1: one step of the student, burn-in (step 2) or distillation (step 3), or of the
    teacher-to-be (step 1), which learns from labels alone."""
    t, (copy_at, pseudo_from) = s.step - s.begun, teaching_plan(s.stage, args)
    if t == copy_at:
        ema_update(s.teacher, s.student, decay=0)  # Sec. 3.1, step 3: T <- S
    elif t > copy_at:
        ema_update(s.teacher, s.student, args.ema)  # Eq. 5, before the teacher is asked
    s.optimizer.zero_grad(set_to_none=True)
    # L_s
    log = learn(s, labeled.images, labeled.targets, 1.0, "l", args, world, last=t < pseudo_from)
    if t >= pseudo_from:
        targets, seen = teach(s.teacher, unlabeled.weak, args, world)  # Eq. 3
        # Eq. 4
        log |= (
            learn(s, unlabeled.images, targets, args.lambda_u, "u", args, world, last=True) | seen
        )
    update(s, args)
    return log


@torch.no_grad()
def teach(
    teacher: Mask2Former, weak: Tensor, args: Args, world: World
) -> tuple[list[Target], dict[str, Tensor]]:
    """Pseudo labels of the weak views (B, 3, H, W) uint8, at stride 4, and what is logged of
    them."""
    parts = [
        pseudo_labels(
            teacher(transforms.normalize(x), last_only=True),
            args.class_threshold,
            args.size_threshold,
        )
        for x in weak.split(-(-len(weak) // args.accumulate))
    ]
    targets, scores = (
        [t for part, _ in parts for t in part],
        torch.cat([x for _, part in parts for x in part]),
    )
    counts = torch.tensor([float(len(t.labels)) for t in targets]).to(
        world.device, non_blocking=True
    )
    return targets, {
        "pseudo_per_image": counts.mean(),
        "pseudo_none": (counts == 0).float().mean(),
        "conf": scores.mean() if len(scores) else counts.new_zeros(()),
    }


def learn(
    s: State,
    images: Tensor,
    targets: list[Target],
    factor: float,
    name: str,
    args: Args,
    world: World,
    last: bool,
) -> dict[str, Tensor]:
    """Add the gradient of factor * Eq. 2 on (B, 3, H, W) uint8 images, in --accumulate parts. Two
    such backward passes, L_s and lambda_u L_u, are Eq. 4 in half the memory. Processes exchange
    gradients in the `last` part of a step."""
    norms, total = normalisers(targets, args.queries, args.no_object, world), {}
    size = -(-len(images) // args.accumulate)
    for start in range(0, len(images), size):
        here = slice(start, start + size)
        wait = last and start + size >= len(images) or world.size == 1
        with contextlib.nullcontext() if wait else s.forward.no_sync():
            heads = s.forward(transforms.normalize(images[here]))
            losses = criterion(
                heads,
                targets[here],
                norms,
                args,
                [
                    generator(
                        world.device,
                        args.seed,
                        "points",
                        name,
                        s.step,
                        world.rank * len(images) + i,
                    )
                    for i in range(start, min(start + size, len(images)))
                ],
            )
            (factor * losses.pop("loss")).backward()
        for key, value in losses.items():
            total[key] = total.get(key, 0) + value
    loss = (
        args.class_weight * total["class"]
        + args.mask_weight * total["mask"]
        + args.dice_weight * total["dice"]
    )
    return {
        f"loss_{name}": loss,
        f"targets_{name}": norms.masks,
        **{f"{k}_{name}": v for k, v in total.items()},
    }


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A torch generator that depends on its key alone."""
    return torch.Generator(device).manual_seed(int(rng(*key).integers(2**63)))


def update(s: State, args: Args) -> None:
    """One AdamW step; the gradient's global norm is cut to --clip (0.01: nearly always active)."""
    nn.utils.clip_grad_norm_(
        [p for p in s.student.parameters() if p.requires_grad], args.clip, foreach=True
    )
    s.optimizer.step()


def schedule(t: int, args: Args) -> float:
    """lr / lr_init at step t of a stage. COCO: a tenth from 8/9, a hundredth from 26/27 on.
    Cityscapes: poly 0.9."""
    if args.schedule == "poly":
        return max(0.0, 1 - t / args.steps) ** 0.9
    return 0.1 ** sum(t >= round(args.steps * step / 368_750) for step in (327_778, 355_092))


def adamw(net: Mask2Former, args: Args, world: World) -> torch.optim.AdamW:
    """Sec. 4.1. The backbone learns a tenth as fast; norms, embeddings and position tables do not
    decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, module in net.named_modules():
        free = isinstance(
            module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)
        )
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                place = (name.startswith("backbone"), free or own == "relative_position_bias_table")
                groups.setdefault(place, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "lr": (lr := args.lr * (args.backbone_lr if backbone else 1)),
                "initial_lr": lr,
                "weight_decay": 0.0 if free else args.weight_decay,
            }
            for (backbone, free), params in groups.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=world.device.type == "cuda",
    )


# ============================================================================================ views
def jitter_crop(size: tuple[int, int], args: Args, g: np.random.Generator) -> Window:
    """COCO: flip; a scale u in `scale`, so that the image fits into u times the crop; a random
    window, padded at the right and the bottom where the image is smaller (large-scale jitter)."""
    flip, u, shift = bool(g.random() < 0.5), g.uniform(*args.scale), g.random()
    factor = min(u * args.crop_size[0] / size[0], u * args.crop_size[1] / size[1])
    new = tuple(max(round(n * factor), 1) for n in size)
    top, left = (int(max(n - c, 0) * shift) for n, c in zip(new, args.crop_size, strict=True))
    return Window(flip, new, top, left, args.crop_size)


def street_crop(size: tuple[int, int], args: Args, g: np.random.Generator) -> Window:
    """Cityscapes: the shorter side one of 16 multiples 0.5, 0.6, ... 2.0 of the test size; a random
    window; flip."""
    short = int(args.test_size[0] * g.integers(5, 21) / 10)
    factor = min(short / min(size), 4 * args.test_size[0] / max(size))
    new = tuple(max(round(n * factor), 1) for n in size)
    top, left = (
        int(g.integers(0, max(n - c, 0) + 1)) for n, c in zip(new, args.crop_size, strict=True)
    )
    return Window(bool(g.random() < 0.5), new, top, left, args.crop_size)


def strong_view(image: Tensor, g: np.random.Generator, cutout: bool = False) -> Tensor:
    """Sec. 4.3, "data augmentations": the student's view of a weak one (3, H, W) uint8, in the same
    geometry: colour jitter, grey, blur; and, for Fig. 6, cut-out."""
    from torchvision.transforms.v2 import functional as tv

    if g.random() < 0.8:
        jitters = [
            (tv.adjust_brightness, g.uniform(0.6, 1.4)),
            (tv.adjust_contrast, g.uniform(0.6, 1.4)),
            (tv.adjust_saturation, g.uniform(0.6, 1.4)),
            (tv.adjust_hue, g.uniform(-0.1, 0.1)),
        ]
        for i in g.permutation(4):
            image = jitters[i][0](image, jitters[i][1])
    if g.random() < 0.2:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if g.random() < 0.5:
        blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(
            ImageFilter.GaussianBlur(g.uniform(0.1, 2.0))
        )
        image = torch.from_numpy(np.array(blurred)).permute(2, 0, 1).contiguous()
    for chance, area, aspect in (
        (
            (0.7, (0.05, 0.2), (0.3, 3.3)),
            (0.5, (0.02, 0.2), (0.1, 6)),
            (0.3, (0.02, 0.2), (0.05, 8)),
        )
        if cutout
        else ()
    ):
        if g.random() < chance:
            (h, w), ratio = image.shape[1:], math.exp(g.uniform(*map(math.log, aspect)))
            share = g.uniform(*area) * h * w
            rows, columns = (
                min(round(math.sqrt(share * ratio)), h),
                min(round(math.sqrt(share / ratio)), w),
            )
            top, left = int(g.integers(0, h - rows + 1)), int(g.integers(0, w - columns + 1))
            image = image.clone()
            noise = g.integers(0, 256, (3, rows, columns), dtype=np.uint8)
            image[:, top : top + rows, left : left + columns] = torch.from_numpy(noise)
    return image


def weak_view(args: Args, image: Tensor, g: np.random.Generator) -> tuple[Tensor, Window]:
    """What labeled pictures, and the teacher, see: jitter_crop, or street_crop and SSD's colours.
    (3, H, W) uint8."""
    street = args.dataset == "cityscapes"
    window = (street_crop if street else jitter_crop)(tuple(image.shape[-2:]), args, g)
    image = cut_out(image, window, fill=128)  # DEPARTS[fill]
    return instances.photometric_distortion(image, g) if street else image, window


def labeled_view(
    args: Args,
    data: Instances,
    image: Tensor,
    photo: Photo,
    g: np.random.Generator,
) -> tuple[Tensor, None, Target]:
    image, window = weak_view(args, image, g)
    labels, masks, _ = masks_of(photo, data, window)
    if not args.keep_empty_targets:  # DEPARTS[empty-targets]
        seen = masks.flatten(1).any(1).bool()
        labels, masks = labels[seen], masks[seen]
    return image, None, Target(labels, masks)


def unlabeled_view(
    args: Args, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, Tensor, None]:
    weak, _ = weak_view(args, image, g)
    return (
        weak if args.strong_aug == "same" else strong_view(weak, g, args.strong_aug == "cutout"),
        weak,
        None,
    )


# ========================================================================================== weights
OFFICIAL = [
    (re.compile(pattern), new)
    for pattern, new in [  # Mask2Former's and Detectron2's names
        (r"^(stem|res\d)\.", r"backbone.\1."),
        (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
        (r"^backbone\.stem\.", "backbone.body."),
        (
            r"^(backbone\.res\d\.\d+\.)shortcut\.(norm\.)?",
            lambda m: f"{m[1]}downsample.{int(bool(m[2]))}.",
        ),
        (r"^(backbone\.res\d\.\d+\.)conv(\d)\.norm\.", r"\1bn\2."),
        (r"^backbone\.res(\d)\.", lambda m: f"backbone.body.layer{int(m[1]) - 1}."),
        (
            r"^((?:backbone\.)?layers\.)(\d)\.downsample\.",
            lambda m: f"{m[1]}{int(m[2]) + 1}.downsample.",
        ),
        (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
        # files of older versions
        (r"^sem_seg_head\.(?!predictor|pixel_decoder)", "sem_seg_head.pixel_decoder."),
        (r"^sem_seg_head\.pixel_decoder\.(transformer\.)?(encoder\.)?", "pixel_decoder."),
        (
            r"^pixel_decoder\.adapter_1\.(norm\.)?",
            lambda m: f"pixel_decoder.lateral.{int(bool(m[1]))}.",
        ),
        (
            r"^pixel_decoder\.layer_1\.(norm\.)?",
            lambda m: f"pixel_decoder.output.{int(bool(m[1]))}.",
        ),
        (r"^sem_seg_head\.predictor\.", "decoder."),
        (r"^decoder\.static_query\.", "decoder.query_feat."),
        (
            r"^decoder\.transformer_(cross|self|ffn)(_attention)?_layers\.(\d)\.norm\.",
            r"decoder.layers.\3.\1_norm.",
        ),
        (
            r"^decoder\.transformer_cross_attention_layers\.(\d)\.multihead_attn\.",
            r"decoder.layers.\1.cross_attn.",
        ),
        (r"^decoder\.transformer_\w+_layers\.", "decoder.layers."),
        (r"^decoder\.mask_embed\.layers\.(\d)\.", lambda m: f"decoder.mask_embed.{2 * int(m[1])}."),
    ]
]


HUGGING_FACE = [
    (re.compile(pattern), new)
    for pattern, new in [  # transformers' names
        (r"^model\.pixel_level_module\.", ""),
        (r"^encoder\.", "backbone."),
        (r"^decoder\.", "pixel_decoder."),
        (
            r"^backbone\.embedder\.embedder\.(conv|n)\w+\.",
            lambda m: f"backbone.body.{'bn' if m[1] == 'n' else 'conv'}1.",
        ),
        (
            r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d+)\.",
            lambda m: f"backbone.body.layer{int(m[1]) + 1}.{m[2]}.",
        ),
        (
            r"\.layer\.(\d)\.(conv|n)\w+\.",
            lambda m: f".{'bn' if m[2] == 'n' else 'conv'}{int(m[1]) + 1}.",
        ),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
        (r"^backbone\.(swin|model)\.", "backbone."),
        (r"^backbone\.encoder\.", "backbone."),
        (r"^backbone\.embeddings\.(patch_embeddings\.)?", "backbone.patch_embed."),
        (r"\.projection\.", ".proj."),
        (
            r"^backbone\.layers\.(\d)\.downsample\.",
            lambda m: f"backbone.layers.{int(m[1]) + 1}.downsample.",
        ),
        (
            r"^backbone\.hidden_states_norms\.stage(\d)\.",
            lambda m: f"backbone.norms.{int(m[1]) - 1}.",
        ),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"(\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.attention\.(self\.)?(relative_position_bias\.)?relative_pos", ".attn.relative_pos"),
        (
            r"\.attention\.(?:self\.)?(query|key|value|[qkv]_proj)\.",
            lambda m: f".attn.qkv.{m[1][0]}.",
        ),
        (r"^(pixel_decoder\.)encoder\.", r"\1"),
        (r"^(pixel_decoder\.)input_projections\.", r"\1input_proj."),
        (r"^(pixel_decoder\.layers\.\d\.)self_attn_layer_norm\.", r"\1norm1."),
        (r"^(pixel_decoder\.layers\.\d\.)final_layer_norm\.", r"\1norm2."),
        (r"^(pixel_decoder\.)adapter_1\.", r"\1lateral."),
        (r"^(pixel_decoder\.)layer_1\.", r"\1output."),
        (r"^(pixel_decoder\.)mask_projection\.", r"\1mask_features."),
        (r"^class_predictor\.", "decoder.class_embed."),
        (r"^model\.transformer_module\.queries_(feat|embed)\w*\.", r"decoder.query_\1."),
        (r"^model\.transformer_module\.(decoder\.)?", "decoder."),
        (r"^decoder\.layernorm\.", "decoder.decoder_norm."),
        (r"^(decoder\.layers\.\d\.)self_attn\.([qkv])_proj\.", r"\1self_attn.in_proj.\2."),
        (r"^(decoder\.layers\.\d\.)(cross|self)_attn_layer_norm\.", r"\1\2_norm."),
        (r"^(decoder\.layers\.\d\.)final_layer_norm\.", r"\1ffn_norm."),
        (
            r"^decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
            lambda m: f"decoder.mask_embed.{2 * int(m[1])}.",
        ),
        (r"^((?:pixel_)?decoder\.layers\.\d\.)fc([12])\.", r"\1linear\2."),
    ]
]


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a whole model by our names, from ours, official Mask2Former (also `modelStudent.`,
    or else `modelTeacher.`, of the released code) or transformers; tensors of a backbone alone as
    they are."""
    for prefix in ("modelStudent.", "modelTeacher.", "student.", "supervised."):
        inner = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        weights = inner or weights
    named, table = (
        {},
        OFFICIAL
        if any(
            re.match(r"sem_seg_head|(backbone\.)?(stem\.conv1|res2|layers\.0\.downsample)\.", k)
            for k in weights
        )
        else HUGGING_FACE
        if any(k.startswith("model.pixel_level_module.") for k in weights)
        else [],
    )
    for key, value in weights.items():
        for pattern, new in table:
            key = pattern.sub(new, key)
        named[key] = value
    # three tensors here, one in ours
    for key in [k for k in named if re.search(r"\.(qkv|in_proj)\.q\.", k)]:
        parts = [named.pop(re.sub(r"\.q\.(\w+)$", rf".{x}.\1", key)) for x in "qkv"]
        fused = (
            re.sub(r"\.in_proj\.q\.", ".in_proj_", key)
            if ".in_proj." in key
            else key.replace(".qkv.q.", ".qkv.")
        )
        named[fused] = torch.cat(parts)
    useless = r"relative_position_index|attn_mask|empty_weight|num_batches_tracked|^backbone\.(\w+\.)?layernorm\."
    return {k: v for k, v in named.items() if not re.search(useless, k)}


def load_weights(net: Mask2Former, weights: dict[str, Tensor], what: str) -> list[str]:
    """Load a whole model, or its backbone's body; lines on what did not fit (a class head of other
    classes)."""
    named = our_names(weights)
    whole = any(k.startswith(("pixel_decoder.", "decoder.", "backbone.")) for k in named)
    return checkpoints.load_matching(
        net if whole else getattr(net.backbone, "body", net.backbone), named, what
    )


# ======================================================================================= evaluation
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # every size would be compiled anew ...
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # ... and tried with all algorithms
def detect(
    net: Mask2Former, image: Tensor, args: Args, top: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """The `top` best (query, class) pairs of an image (3, H, W) uint8: labels (n,), scores (n,),
    masks (n, H, W) bool.

    The score is the class probability times the mask's mean probability inside itself. No
    threshold, no suppression."""
    size, (short, most) = tuple(image.shape[-2:]), args.test_size
    factor = min(short / min(size), most / max(size))
    new = tuple(max(round(n * factor), 1) for n in size)
    x = image[None].float()
    x = transforms.normalize(
        F.interpolate(x, size=new, mode="bilinear", antialias=True) if new != size else x
    )
    x = F.pad(x, (0, -new[1] % 32, 0, -new[0] % 32))  # after normalising: the mean colour
    heads = net.forward(x, last_only=True)
    probs = heads.class_logits[-1, 0].softmax(-1)[:, :-1]  # (Q, K)
    scores, place = probs.flatten().topk(min(top, probs.numel()))
    used, which = (place // probs.shape[1]).unique(return_inverse=True)
    masks, inside = [], []
    for part in used.split(20):
        logits = torch.einsum("qc,chw->qhw", heads.mask_embed[-1, 0, part], heads.mask_features[0])[
            None
        ]
        logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)[
            ..., : new[0], : new[1]
        ]
        logits = (
            F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
            if new != size
            else logits[0]
        )
        mask = logits > 0
        masks.append(mask)
        inside.append((logits.sigmoid() * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6))
    return place % probs.shape[1], scores * torch.cat(inside)[which], torch.cat(masks)[which]


def evaluate(
    networks: dict[str, Mask2Former], data: Instances, args: Args, world: World
) -> tuple[dict[str, dict], dict[str, list], list]:
    """Mask AP of each network in percent, its results in COCO's format, and rows of preview
    pictures.

    COCO's AP by pycocotools; on Cityscapes its own AP, with COCO's as `coco_ap`. Every image counts
    once on any number of processes."""
    found, rows = {name: [] for name in networks}, []
    street = {name: mask_ap.CityscapesAP() for name in networks if args.dataset == "cityscapes"}
    for index, image in instances.score_loader(data.val, world, args.workers):
        photo = data.val[index]
        if shown := len(rows) < 6:
            labels, masks, _ = masks_of(photo, data)
            rows.append(
                [
                    image.permute(1, 2, 0).numpy(),
                    picture(image, labels, torch.ones(len(labels)), masks.bool()),
                ]
            )
        for name, net in networks.items():
            out = detect(net.eval(), image.to(world.device), args)
            found[name].append((index, mask_ap.results_of(photo.id, data.ids, *out)))
            labels, scores, masks = (t.cpu() for t in out) if street or shown else out
            if street:
                street[name].add(
                    read_ids(photo.label),
                    [*zip(labels.tolist(), scores.tolist(), masks.numpy(), strict=True)],
                )
            if shown:
                rows[-1].append(picture(image, labels, scores, masks))
    found = {
        name: [r for _, part in mask_ap.gather(world, parts) for r in part]
        for name, parts in found.items()
    }
    answers = mask_ap.truth_of(data) if world.main else {}
    scores = {
        name: mask_ap.coco_ap(answers, results) if world.main else {}
        for name, results in found.items()
    }
    for name, evaluator in street.items():
        scores[name] = {"coco_ap": scores[name].get("ap"), **evaluator.result(world)}
    scores = mask_ap.gather(world, [(0, scores)] if world.main else [])[0][1]
    if any(s["ap"] is None for s in scores.values()):
        raise UserError(f"--val {args.val} of {data.root} has no object to score on.")
    return (
        {name: {k: v for k, v in s.items() if k != "stats"} for name, s in scores.items()},
        found,
        rows,
    )


def picture(
    image: Tensor, labels: Tensor, scores: Tensor, masks: Tensor, classes: list[str] | None = None
) -> np.ndarray:
    """Image (3, H, W) uint8 with the objects that score 0.5 or more on it, the best in front ->
    (H', W, 3) uint8. With names of `classes`, each in a colour of its own, and a legend; else in
    the colour of its class."""
    shown = [i for i in scores.argsort().tolist() if scores[i] >= 0.5][-250:]
    index = torch.zeros(image.shape[-2:], dtype=torch.uint8)
    for place, i in enumerate(shown, start=1):
        index[masks[i]] = place if classes else 1 + int(labels[i]) % 250
    return plots.overlay(
        image,
        index,
        ["background", *(f"{classes[labels[i]]} {scores[i]:.2f}" for i in shown)]
        if classes
        else [],
    )


# ============================================================================================= main
STUDENT_ONLY = (
    "burn_in burn_in_steps ema lambda_u class_threshold size_threshold strong_aug labeled_sampling pool "
    "teacher unlabeled"
)


RANGES = (
    dict.fromkeys("ema class_threshold drop_path no_object backbone_lr".split(), (0, 1))
    | dict.fromkeys("decoder_layers encoder_layers accumulate steps eval_every".split(), (1, 1e9))
    | {
        "width": (64, 4096),
        "points": (16, 1e6),
        "crop_size": (32, 1e5),
        "test_size": (16, 1e5),
        "scale": (0.01, 100),
    }
)


def resolve(args: Args) -> Args:
    """Fill in what depends on other settings."""
    queries = args.queries or (200 if args.backbone.startswith("swin_large") else 100)
    share = (
        BURN_IN[args.dataset].get(args.split, BURN_IN[args.dataset][""])
        / preset(args.dataset).steps
    )
    burn_in = args.burn_in_steps or round(share * args.steps)
    return replace(
        args, queries=queries, burn_in_steps=burn_in, out=str(runs.default_out(SCRIPT, args))
    )


def check(args: Args, world: World) -> None:
    """Refuse, before any work, what cannot run and flags that would be ignored."""
    cli.check_ranges(args, RANGES)
    share = (
        world.share(args.batch_size) if args.batch_size != world.size or args.norm == "live" else 1
    )
    if any(n % 32 for n in args.crop_size) or args.width % 32:
        raise UserError(
            f"--crop-size {'{} {}'.format(*args.crop_size)}, --width {args.width}: give multiples of 32."
        )
    if args.accumulate > share:
        raise UserError(
            f"--accumulate {args.accumulate} is more than the {share} labeled images of a process."
        )
    if (
        args.accumulate > 1
        and args.norm == "live"
        and not args.backbone.startswith(("swin", "vit", "deit"))
    ):
        raise UserError(
            "--accumulate would change the batch statistics of --norm live; give --norm frozen with it."
        )
    if args.teacher and (args.stage == "teacher" or args.burn_in in ("standard", "none")):
        raise UserError(
            f"--teacher has no meaning with --stage {args.stage} --burn-in {args.burn_in}; leave it out."
        )
    if args.stage == "student" and args.burn_in in ("guided", "fixed") and not args.teacher:
        raise UserError(
            "--stage student needs a trained teacher: name one with --teacher, or take --stage all."
        )
    if args.burn_in_steps >= args.steps:
        raise UserError(
            f"--burn-in-steps {args.burn_in_steps} must be less than --steps {args.steps}."
        )
    if args.freeze_backbone and not args.backbone.startswith(("vit", "deit")):
        raise UserError(
            "--freeze-backbone is for ViTs (Table 7); give a --backbone vit_... or deit_..."
        )
    base, plain = preset(args.dataset), args.backbone.startswith(("swin", "vit", "deit"))
    cli.check_meaning(
        args,
        base,
        args.stage,
        {"student all": STUDENT_ONLY},
        {
            "drop_path": not args.backbone.startswith("swin"),
            "norm": plain and args.norm != base.norm,
            "vit_resize": not args.backbone.startswith(("vit", "deit")),
            "scale": args.dataset == "cityscapes",
            "burn_in_steps": args.burn_in in ("fixed", "none"),
            "ema": args.burn_in == "fixed",
            "pool": args.unlabeled > "",
            "select": bool(args.teacher) or args.burn_in in ("standard", "none"),
            "split_seed": args.split == "all",
            **dict.fromkeys(("train_json", "val_json", "images"), args.dataset == "cityscapes"),
        },
    )


def backbone_weights(args: Args) -> dict[str, Tensor] | None:
    """The tensors that --weights names, a file's or the embedded data's own; None for imagenet and
    none."""
    if args.weights in ("imagenet", "none"):
        return None
    if args.weights == "shapes":
        return checkpoints.read_weights(shapes.pretrained(Path(args.root), args.backbone))
    return checkpoints.read_weights(Path(args.weights))


def find_data(args: Args, classes: list[str] | None = None) -> Instances:
    """The data set that --dataset and --root name; the embedded one is drawn on first use."""
    root = Path(args.root)
    if args.dataset == "shapes":
        root = shapes.make_things(root / "things")
    return instances.find(
        args.dataset, root, args.train_json, args.val_json, args.images, args.val, classes
    )


def network(
    args: Args, num_classes: int, world: World, name: str, pretrained: bool = True
) -> tuple[Mask2Former, list]:
    """A Mask2Former with its starting weights, on the device; and lines on weights that did not
    load."""
    distributed.seed_torch(args.seed, name)
    net = Mask2Former(
        args, num_classes, world.bf16(args.precision), pretrained and args.weights == "imagenet"
    )
    weights = backbone_weights(args) if pretrained else None
    notes = [] if weights is None else load_weights(net, weights, args.weights)
    net = distributed.sync_batchnorm(net, world) if args.norm == "live" else net
    return net.to(world.device), notes


def begin(
    stage: str, args: Args, data: Instances, world: World, step: int, begun: int
) -> tuple[State, list[str]]:
    """The networks of a stage at its beginning: in the student's, a fresh student beside the
    trained teacher."""
    net, notes = network(args, len(data.classes), world, stage)
    teacher = None
    if stage == "student":
        teacher = network(args, len(data.classes), world, "teacher", pretrained=False)[0]
        # later it comes from the checkpoint
        if args.burn_in in ("guided", "fixed") and step == begun:
            notes = [
                *notes,
                *load_teacher(teacher, Path(args.teacher or Path(args.out) / "teacher.pt")),
            ]
        teacher.requires_grad_(False).eval()
    if args.compile:
        net.backbone.compile()
        net.pixel_decoder.compile()
    parallel = distributed.parallel(net.train(), world)
    return State(stage, net, teacher, adamw(net, args, world), parallel, step, begun), notes


def load_teacher(net: Mask2Former, path: Path) -> list[str]:
    """A whole model: the teacher of a checkpoint of this script, or official weights."""
    notes = load_weights(net, checkpoints.read_weights(path, "--teacher"), str(path))
    if any(not n.startswith("in the file") for n in notes):
        raise UserError(
            f"--teacher {path} does not fit this network ({notes[0][:120]}); give the --backbone, --width "
            f"and --queries it was trained with."
        )
    return notes


def train(args: Args) -> dict:
    """One run, from the start or from its checkpoint, to results.json, whose contents are
    returned."""
    check(args, distributed.launched())
    args = resolve(args)
    with_teacher = (
        args.stage != "student"
        and not args.teacher
        and (args.stage == "teacher" or args.burn_in in ("guided", "fixed"))
    )
    data = find_data(args)
    chosen = instances.choose(
        data, args.split, args.split_seed, args.unlabeled, args.pool, args.stage != "teacher"
    )
    out, border = Path(args.out), args.steps if with_teacher else 0
    total = border + (args.steps if args.stage != "teacher" else 0)
    resuming = runs.open_run(out, SCRIPT, args, args.resume, distributed.launched().main)
    world = distributed.start(args.device)
    state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT) if resuming else None
    step = state["step"] if state else 0
    s, notes = begin(
        "teacher" if step < border else "student",
        args,
        data,
        world,
        step,
        0 if step < border else border,
    )
    if state is not None:
        restore(s, state)
    run = runs.Run(
        out,
        SCRIPT,
        args,
        world,
        step,
        state,
        {
            "classes": data.classes,
            "images": chosen.text,
            "fingerprint": chosen.fingerprint,
            "weights_notes": notes,
        },
    )
    run.say(
        f"{chosen.text}; scored on {len(data.val)}",
        *(f"weights {note}" for note in notes),
        f"teacher: steps 0 to {border}; student, burn-in {args.burn_in}: steps {border} to {total}; in {out}",
    )
    factors = instances.repeat_factors(chosen.labeled, len(data.classes), 10.0)  # DEPARTS[sampling]

    def feeds_of(s: State) -> list:
        """Labeled batches of a stage; and unlabeled ones, None before they are used."""
        stop, first = s.begun + args.steps, s.begun + teaching_plan(s.stage, args)[1]
        labeled = instances.Views(
            chosen.labeled, partial(labeled_view, args, data), args.seed, f"{s.stage} labeled"
        )
        unlabeled = instances.Views(
            chosen.unlabeled, partial(unlabeled_view, args), args.seed, "unlabeled"
        )
        repeat = factors if s.stage == "student" and args.labeled_sampling == "repeat" else None
        stream = partial(
            loading.stream,
            stop=stop,
            world=world,
            workers=args.workers,
            collate=instances.collate,
        )
        return [
            stream(labeled, args.batch_size, s.step, factors=repeat),
            itertools.chain(
                itertools.repeat(None, max(first - s.step, 0)),
                stream(unlabeled, args.batch_size, max(s.step, first)),
            ),
        ]

    feeds = feeds_of(s)
    for step in run.steps(s.step, total):
        if step == border and s.stage == "teacher":
            world.barrier()  # teacher.pt is written
            # the supervised network's stay in the results
            scores = {"last": s.last, "best": s.best}
            s = replace(begin("student", args, data, world, step, border)[0], **scores)
            feeds = feeds_of(s)
        for group in s.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step - s.begun, args)
        batches = [instances.to_device(next(feed), world.device) for feed in feeds]
        # drop path: from (seed, step, process)
        distributed.seed_torch(args.seed, "step", step, world.rank)
        values = train_step(s, *batches, args, world)
        run.tally(step, values, *batches)
        distributed.average_buffers(world, *s.networks().values())
        s.step = step + 1

        asked, scoring = (
            run.asked(s.step),
            s.step % args.eval_every == 0 or s.step in (border, total),
        )
        if s.step % args.log_every == 0 or scoring:
            run.log(s.step, lr=s.optimizer.param_groups[-1]["lr"])
        if scoring:
            score_networks(s, data, args, world, run)
        if scoring or asked or (args.save_every and s.step % args.save_every == 0):
            run.save("last.pt", snapshot(s, args, data))
        if asked and s.step < total:
            run.leave(s.step)  # does not return

    facts = {
        "stage": args.stage,
        "burn_in": args.burn_in,
        "val": args.val,
        "split_fingerprint": chosen.fingerprint,
    }
    return run.finish(
        {name: {"last": s.last[name], "best": s.best[name]} for name in s.last},
        facts,
        "student" if "student" in s.last else "supervised",
        "ap",
    )


def score_networks(s: State, data: Instances, args: Args, world: World, run: runs.Run) -> None:
    """Score what has changed, note the best, keep its weights: best.pt; in the teacher stage,
    teacher.pt."""
    networks, headline = s.networks(), "supervised" if s.stage == "teacher" else "student"
    if "teacher" in s.last and s.step - s.begun <= teaching_plan(s.stage, args)[0]:
        networks.pop("teacher")  # burn-in: it is what it was
    scores, found, rows = evaluate(networks, data, args, world)
    s.student.train()
    for name, score in scores.items():
        s.last[name] = {"step": s.step, **score}
        if name not in s.best or s.last[name]["ap"] > s.best[name]["ap"]:
            s.best[name] = s.last[name]
    run.write(s.step, **{f"ap_{name}": s.last[name]["ap"] for name in scores})
    better = s.best[headline] is s.last[headline]
    if world.main:
        plots.strip(
            rows,
            ["image", "label", *networks],
            run.out / "previews" / f"{s.step:07d}.png",
            height=192,
        )
        for name in scores:
            write_text(run.out / f"{name}.segm.json", json.dumps(found[name]))
    if s.stage == "teacher" and (better or args.select == "last"):
        run.save("teacher.pt", snapshot(s, args, data, optimizer=False))
    if better:
        run.save("best.pt", snapshot(s, args, data, optimizer=False))


def snapshot(s: State, args: Args, data: Instances, optimizer: bool = True) -> dict:
    """What a checkpoint holds. best.pt and teacher.pt have no `optimizer`: to score, to predict, to
    teach."""
    state = {
        "settings": json.loads(json.dumps(vars(args))),
        "classes": data.classes,
        "ids": data.ids,
        "stage": s.stage,
        "step": s.step,
        "last": s.last,
        "best": s.best,
        "networks": {name: net.state_dict() for name, net in s.networks().items()},
    }
    return state | ({"optimizer": s.optimizer.state_dict()} if optimizer else {})


def restore(s: State, state: dict) -> None:
    """The reverse of `snapshot`. A checkpoint of the border, where the teacher stage is done, gives
    scores alone."""
    s.step, s.last, s.best = state["step"], state["last"], state["best"]
    if state["stage"] == s.stage:
        for name, weights in state["networks"].items():
            checkpoints.load_exact(s.networks()[name], weights, state.get("path", "the checkpoint"))
        if "optimizer" in state:
            s.optimizer.load_state_dict(state["optimizer"])


def load(path: str, args: Args) -> tuple[dict[str, Mask2Former], dict, World]:
    """The networks of a checkpoint, built from the settings it holds."""
    cli.check_ranges(args, RANGES)
    state, world = checkpoints.load_checkpoint(Path(path), SCRIPT), distributed.start(args.device)
    networks = {}
    for name, weights in state["networks"].items():
        networks[name] = network(args, len(state["classes"]), world, name, pretrained=False)[
            0
        ].eval()
        checkpoints.load_exact(networks[name], weights, path)
    return networks, state, world


def score(args: Args) -> dict:
    """--eval: score a checkpoint's networks; <checkpoint>.results.json, and
    <checkpoint>.<network>.segm.json."""
    networks, state, world = load(args.eval, args)
    data = find_data(args, state["classes"])
    scores, found, rows = evaluate(networks, data, args, world)
    scores = {name: {"last": {"step": state["step"], **record}} for name, record in scores.items()}
    facts = {"dataset": args.dataset, "split": args.split, "val": args.val, "seed": args.seed}
    if world.main:
        plots.strip(
            rows, ["image", "label", *networks], Path(f"{args.eval}.previews.png"), height=192
        )
        for name, results in found.items():
            write_text(Path(f"{args.eval}.{name}.segm.json"), json.dumps(results))
        runs.write_scores(
            Path(f"{args.eval}.results.json"),
            scores,
            facts,
            "ap",
            f"{len(data.val)} of {data.root}",
        )
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: overlays of images or folders, and predictions.json in COCO's
    result format, with paths for `image_id`, into <checkpoint>.predictions/."""
    networks, state, world = load(args.predict[0], args)
    net, out = (
        networks.get("student", next(iter(networks.values()))),
        Path(f"{args.predict[0]}.predictions"),
    )
    files = pictures(args.predict[1:])
    results, _ = [], out.mkdir(exist_ok=True)
    for i, file, image in readable(files, world):
        objects = detect(net, image.to(world.device), args)
        results.append((i, mask_ap.results_of(str(file), state["ids"], *objects)))
        shown = picture(image, *(t.cpu() for t in objects), state["classes"])
        plots.save_picture(shown, out / f"{i:05d}_{file.stem}_overlay.jpg")
    results = [r for _, part in mask_ap.gather(world, results) for r in part]
    if world.main:
        write_text(out / "predictions.json", json.dumps(results))
        print(
            f"{len(files)} images: {out}/*_overlay.jpg (scores from 0.5) and predictions.json (all)"
        )


def settings(dataset: str = "coco", eval: str = "", predict: str = "") -> Args:
    """What the command line starts from: a preset, or the settings inside a checkpoint to score or
    predict with."""
    return (
        cli.saved_settings(Args, Path(eval or predict), SCRIPT)
        if eval or predict
        else preset(dataset)
    )


def main(args: Args) -> Any:
    try:
        return score(args) if args.eval else predict(args) if args.predict else train(args)
    finally:
        distributed.stop()


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=("dataset", "eval", "predict"))
