"""GTA-Seg: Semi-Supervised Semantic Segmentation via Gentle Teaching Assistant.
Jin, Wang, Lin. NeurIPS 2022. https://arxiv.org/abs/2301.07340

Trains a network that gives each pixel of an image a class, from a few labeled images and many
unlabeled ones. A teacher labels the unlabeled images. These pseudo labels are often wrong; the
paper says that they still teach good features, but spoil the last layers. So an assistant (GTA)
learns from them and hands the student only its feature extractor f, by a moving average; the
student itself learns from human labels, and only these reach its mask predictor g. The teacher, a
moving average of the student, is the result.

    paper                                           this file
    Sec. 3.1  feature extractor f, predictor g      Features, Predictor, SegNet (joins them)
    Eq. 1     prediction and its confidence         confidence
    Eq. 2     pseudo labels over a threshold        pseudo_label
    Eq. 3     teacher-student loss                  teacher_student_loss
    Eq. 4     gradient step of the student          update (called by mean_teacher_step)
    Eq. 5     teacher follows the student           ema_update (called by mean_teacher_step)
    Eq. 6     weights of pseudo labels              reweight
    Eq. 7     unsupervised loss L_u                 unsupervised_loss
    Eq. 8     gradient step of the assistant        update (called by train_step)
    Eq. 9     student's f follows assistant's f     ema_update_parameters (called by train_step)
    Eq. 10    supervised loss L_l                   supervised_loss
    Eq. 11    gradient step of the student          update (called by train_step)
    Eq. 12    teacher follows the student           ema_update (called by train_step)
    Algorithm 1  line 1 (initialization)            end_of_warmup
    Algorithm 1  line 2 (minibatches)               train, batches
    Algorithm 1  lines 3 to 12 (a minibatch)        train_step
    Sec. 4.1  data sets; all others are unlabeled   --dataset, --split, --unlabeled
    Sec. 4.2  ResNet-101, DeepLabv3+                Features, ASPP, Predictor
    Sec. 4.2  numbers, for VOC and Cityscapes       Args, PRESETS
    Sec. 4.2  optimizer, poly schedule              optimizer_of, learning_rate_factor
    Sec. 4.2  warm-up on labels                     warmup_step, warmup_steps (how many)
    Sec. 4.2  20 % of pseudo labels abandoned       drop_threshold, --drop
    Sec. 4.2  crops and windows in evaluation       evaluate, centre_crop, predict_logits
    Sec. 4.2  mIoU; mean of seeds 0, 1, 2           common/metrics.py; --seed, docs/compare.py
    Table 1   VOC; SupOnly, MT, CutMix rows         --split, --method, --cutmix
    Table 2   VOC, augmented training set           --split
    Table 3   Cityscapes                            --dataset, --split
    Table 4   components                            --method, --reweight
    Table 5   what the assistant hands over         --transfer, --method, --reweight (none)
    Table 5   Unbiased ST                           unbiased_st_step
    Table 6   the three networks                    evaluate (scores all of them in each run)
    Table 7   who learns from which labels          --gta-data, --student-data, loss_on
    Table 8   alpha, warm-up                        --alpha-gta, --alpha-teacher, --warmup-epochs
    Table 9   re-weighting, Laplace smoothing       --reweight, --tau
    Fig. 1    (a), a network's own pseudo labels    mean_teacher_step, --alpha-teacher (0)
    Fig. 1    (b), the earlier framework            mean_teacher_step
    Fig. 2    overview; also Fig. 1 (c)             train_step, teach
    Figs. 3, 4  pictures of predictions             score_networks, docs/compare.py
    Release   the loop that the authors released    train_step_released, --recipe

Shapes: B images, K classes, H x W pixels, h x w cells of stride 4. Suffix _l labeled, _u unlabeled.
Lines marked DEPARTS[name] leave the paper or decide what it leaves open; docs/gta_seg.md says why.

    torchrun --nproc_per_node 8 gta_seg.py --split 183    # VOC 2012, 183 labels
    python gta_seg.py --dataset shapes                    # embedded data, no download, CPU, minutes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from common import (
    backbones,
    checkpoints,
    cli,
    distributed,
    loading,
    metrics,
    norms,
    plots,
    predictions,
    runs,
    semantic,
    transforms,
)
from common.check import first_look, look_at_all
from common.distributed import World, rng
from common.errors import UserError
from common.semantic import Batch, Segmentation

SCRIPT = "gta_seg.py"
IGNORE = 255  # the label of a pixel without a label
RETURNED = ("teacher", "student")  # the network that the method returns, or its baseline
OHEM_KEPT = 50_000  # how many labeled pixels of each image --ohem keeps at least
PREVIEWS = 6  # scored images that are drawn


# ========================================================================================= settings
# A number without a range of its own must be finite and not negative.
Share = Annotated[float, Meta(ge=0, le=1)]
Dilation = Annotated[int, Meta(ge=1, le=512)]
Factor = Annotated[float, Meta(ge=0.01, le=100)]


@dataclass
class Args:
    """Train a network for semantic segmentation, which gives each pixel of an image a class, from a
    few labeled and many unlabeled images (GTA-Seg, NeurIPS 2022). --dataset, --method and --recipe
    pick the numbers of the paper; every other flag overrides them. DEPARTS[name] is explained in
    docs/gta_seg.md."""

    # what to run

    # what to train on; also picks the defaults
    dataset: Literal["voc", "cityscapes", "shapes", "folder"] = "voc"
    # gta: the paper's. suponly: labels alone. mt: mean teacher. unbiased-st: Table 5's. Tables 1, 4
    method: Literal["gta", "suponly", "mt", "unbiased-st"] = "gta"
    # Algorithm 1 as printed, or the loop that the authors released
    recipe: Literal["paper", "released"] = "paper"
    root: str = "datasets/voc"  # where the data lie, see data/README.md
    # labeled images: a published list, random:N, random:1/N, random:N%, all, or a list file
    split: str = "183"
    split_seed: int = 0  # number of the draw, for random splits
    unlabeled: str = ""  # folder or list of unlabeled images; empty: all other training images
    val: str = "val"  # name of the list or folder that is scored
    out: str = ""  # run folder; empty: runs/gta_seg-<dataset>-<split>-d<split seed>-s<seed>
    resume: bool = False  # continue the run in --out; starts afresh when there is none
    # initial weights, order of images, augmentation. The paper averages 0, 1, 2 (Sec. 4.2)
    seed: int = 0
    # open all files of the run, say what is wrong or odd with them, and train nothing
    check: bool = False
    eval: str = ""  # evaluate this checkpoint, train nothing
    # write predictions: a checkpoint, then images or folders
    predict: list[str] = field(default_factory=list)
    # side of the windows in which --predict sees larger pictures; 0: it sees them whole
    predict_tile: Annotated[int, Meta(ge=0)] = 0
    # write the network of this checkpoint as a .safetensors file, train nothing
    export: str = ""

    # the method (Sec. 3.2) and the tables

    alpha_gta: Share = 0.99  # EMA assistant -> student, Eq. 9, Table 8
    alpha_teacher: Share = 0.99  # EMA student -> teacher, Eqs. 5 and 12, Table 8
    ramp_gta: bool = False  # let --alpha-gta rise from 0, as released. DEPARTS[ramp]
    ramp_teacher: bool = False  # let --alpha-teacher rise from 0, as released. DEPARTS[ramp]
    mu: float = 1.0  # weight of L_u, Eq. 3; also scales the assistant's step, DEPARTS[mu]
    tau: float = 1.0  # Laplace smoothing, added to each confidence: Eq. 6, Table 9
    # weights of the pseudo labels: as in Eq. 6, or all equal, Tables 4, 9
    reweight: Literal["laplace", "none"] = "laplace"
    # share of the least confident pixels that get no pseudo label, Sec. 4.2
    drop: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    # epochs on labels alone, before the assistant exists, Sec. 4.2, Table 8
    warmup_epochs: float = 1
    # the images of which one epoch of the warm-up is a pass. DEPARTS[warmup-epoch]
    warmup_over: Literal["unlabeled", "labeled"] = "unlabeled"
    # what the assistant learns from, Table 7
    gta_data: Literal["pseudo", "labeled", "both"] = "pseudo"
    # what the student learns from, Table 7
    student_data: Literal["labeled", "pseudo"] = "labeled"
    # what the assistant hands over, Table 5. DEPARTS[original-ema]
    transfer: Literal["features", "all"] = "features"
    # probability that a step mixes the unlabeled batch, Table 1. DEPARTS[cutmix]
    cutmix: Share = 0.5
    # probability that a step mixes the labeled batch, for fair baselines. DEPARTS[cutmix]
    cutmix_labeled: Share = 0
    # student and assistant share g, as in the released loop. DEPARTS[share-predictor]
    share_predictor: bool = False

    # optimisation (Sec. 4.2)

    # labeled images per step over all processes, and as many unlabeled. DEPARTS[batch]
    batch_size: int = 16
    # side of the square training crops, in pixels. DEPARTS[open]
    crop_size: Annotated[int, Meta(ge=16, le=100_000)] = 513
    scale: tuple[Factor, Factor] = (0.5, 2.0)  # random scaling of training images. DEPARTS[open]
    epochs: float = 80  # passes over the unlabeled images. DEPARTS[open]
    # steps of the whole run, with the warm-up; 0: as many as --epochs makes
    steps: int = 0
    lr: float = 0.001  # initial learning rate of the backbone, Sec. 4.2
    # factor on --lr for everything behind the backbone, Sec. 4.2. DEPARTS[decoder-lr]
    decoder_lr: float = 10
    weight_decay: float = 1e-4  # of all parameters, Sec. 4.2
    aux: float = 0  # weight of an auxiliary loss on the third stage. DEPARTS[cityscapes]
    # learn only from labeled pixels whose true class has at most this probability, and from 50,000
    # an image at least; 0: from all. DEPARTS[cityscapes]
    ohem: Share = 0

    # network (Sec. 4.2: ResNet-101, DeepLabv3+, 512-dimensional features)

    # a timm name, else a torchvision one; a ViT, Swin or ConvNeXt picks the numbers of UniMatch V2
    # for --lr, --decoder-lr and --weight-decay. DEPARTS[deep-stem], DEPARTS[transformers]
    backbone: str = "resnet101s.gluon_in1k"
    # the backbone is not trained and stays in eval mode, which takes less memory.
    # DEPARTS[transformers]
    freeze_backbone: bool = False
    # imagenet, none, a file of backbone weights, or shapes (learned from drawn pictures)
    weights: str = "imagenet"
    # image pixels per cell of the deepest features: dilated in CNNs, enlarged in others.
    # DEPARTS[open], DEPARTS[transformers]
    output_stride: Literal[8, 16, 32] = 8
    # dilations of ASPP. DEPARTS[open]
    aspp_rates: tuple[Dilation, Dilation, Dilation] = (12, 24, 36)
    # channels of the decoder; the paper's 512-dimensional features are twice that
    width: Annotated[int, Meta(ge=4, le=4096)] = 256

    # evaluation and bookkeeping

    window: int = 0  # side of the sliding window; 0: whole images. DEPARTS[whole-image]
    eval_every: int = 0  # steps between evaluations; 0: once per epoch
    save_every: int = 0  # steps between checkpoints; 0: with every evaluation
    log_every: Annotated[int, Meta(ge=1)] = 20  # steps between log lines
    # read the unlabeled images' labels, to log how many pseudo labels are right; never to learn
    monitor_labels: bool = False
    workers: int = loading.default_workers()  # decoding processes per process and stream
    device: str = "auto"  # auto, cpu, cuda
    # arithmetic inside the network; auto: bf16 on GPUs, fp32 elsewhere
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # torch.compile the networks in training; scoring and predicting never are
    compile: bool = False


# ======================================================================================== equations
def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1: logits (B, K, H, W) of g(f(x)) -> the confidence c (B, H, W), which is the largest of
    the K probabilities p, and its class (B, H, W)."""
    conf, label = logits.softmax(dim=1).max(dim=1)
    return conf, label


def drop_threshold(conf: Tensor, valid: Tensor, drop: float) -> Tensor:
    """Sec. 4.2: the threshold gamma_t of Eq. 2 that leaves out a share `drop` of the valid pixels,
    those of lowest confidence. `conf`, `valid` (B, H, W) of the whole batch -> ().

    With n valid pixels it is the k-th smallest of their confidences, k = floor(drop (n - 1)) + 1.
    The same pixels are above numpy's percentile, which interpolates. When `drop` is 0 or no pixel
    is valid it is -1, which every confidence exceeds."""
    # sorted, and not torch.kthvalue, which would copy k to the host and wait for the device
    ordered = torch.where(valid, conf, torch.inf).flatten().sort().values
    n = valid.sum()
    index = (drop * (n - 1).double()).floor().long().clamp(min=0)
    gamma = ordered.gather(0, index[None])[0]
    return torch.where((n > 0) & (drop > 0), gamma, torch.full_like(gamma, -1))


def pseudo_label(label: Tensor, conf: Tensor, valid: Tensor, gamma: Tensor | float) -> Tensor:
    """Eq. 2: the teacher's class where its confidence is above gamma_t, and 255 ("ignore")
    elsewhere, as in padding. All tensors are (B, H, W)."""
    return label.masked_fill(~(valid & (conf > gamma)), IGNORE)


def reweight(
    conf: Tensor, keep: Tensor, tau: float, total: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Eq. 6: weights (B, H, W) of the pseudo labels. Kept pixels (above gamma_t) have weights in
    proportion to c + tau, which sum to the number of kept pixels; all others have weight 0.

    `conf` is float32 and carries no gradient. `total` sums a tensor over all processes, so that the
    sums of Eq. 6 are those of the global batch."""
    raw = (conf + tau) * keep
    return raw * (total(keep.sum()) / total(raw.sum()).clamp(min=1e-12))


def unsupervised_loss(
    logits: Tensor, label: Tensor, weight: Tensor, mean: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Eq. 7: logits (B, K, H, W), label and weight (B, H, W) -> L_u, (). The sum over pixels is
    divided by the number of kept pixels. DEPARTS[mean]

    `mean` averages a count over all processes. DDP averages the gradients of all processes, too;
    together they divide the sum over the global batch by the count of the global batch."""
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # 0 where ignored
    kept = mean((label != IGNORE).sum())
    return (weight * loss).sum() / kept.clamp(min=1e-6)  # a mean count may be below 1


def supervised_loss(
    logits: Tensor, label: Tensor, mean: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Eq. 10: logits (B, K, H, W), label (B, H, W) -> L_l, (). The sum over pixels is divided by
    the number of labeled pixels. DEPARTS[mean] `mean` is what it is in unsupervised_loss."""
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    labeled = mean((label != IGNORE).sum())
    return loss.sum() / labeled.clamp(min=1e-6)


def teacher_student_loss(loss_l: Tensor, loss_u: Tensor, mu: float) -> Tensor:
    """Eq. 3: L = L_l + mu L_u."""
    return loss_l + mu * loss_u


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Eqs. 4, 8, 11: theta := theta - lambda dL / dtheta, as the optimizer does it: one step of SGD
    with momentum and weight decay, for the parameters that were given to the optimizer."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# Eqs. 5 and 12: the teacher (target) follows the student (source), f and g alike.
@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, in place, for every parameter and for
    BatchNorm's running statistics; its integer counters stay. A decay of 0 copies."""
    targets = [*target.parameters(), *target.buffers()]
    sources = [*source.parameters(), *source.buffers()]
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - decay)


@torch.no_grad()
def ema_update_parameters(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Eq. 9: target <- decay * target + (1 - decay) * source, in place, for parameters only. The
    target is the student's f and the source the assistant's; the student keeps its own BatchNorm
    statistics. DEPARTS[bn-ema]"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - decay)


def ema_decay(n: int, alpha: float, ramp: bool) -> float:
    """The alpha of Eqs. 5, 9, 12 in the n-th update (n = 0, 1, ...). It is constant, as printed.
    With `ramp` it rises as 1 - 1 / (n + 1) until it reaches alpha: up to there, the target is the
    plain mean of the sources of all updates. DEPARTS[ramp]"""
    if ramp:
        return min(1 - 1 / (n + 1), alpha)
    return alpha


def learning_rate_factor(step: int, total: int) -> float:
    """Sec. 4.2: lr / lr_init = (1 - t / T)^0.9."""
    return max(0.0, 1 - step / total) ** 0.9


def hard_pixels(
    logits: Tensor,
    label: Tensor,
    thresh: float,
    min_kept: int,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Online hard example mining (OHEM): logits (B, K, H, W), label (B, H, W) -> the label with 255
    on easy pixels. DEPARTS[cityscapes]

    A pixel is hard when the probability of its true class is at most `thresh`, or is one of the
    `min_kept` smallest in the batch. When fewer pixels than that have a label, all of them are
    kept. `gather` concatenates a tensor over all processes."""
    valid = label != IGNORE
    prob = logits.softmax(dim=1).gather(1, label.masked_fill(~valid, 0)[:, None])[:, 0]  # (B, H, W)
    ordered = gather(torch.where(valid, prob, torch.inf).flatten()).sort().values
    last_kept = min(min_kept, len(ordered)) - 1
    limit = ordered[last_kept].clamp(min=thresh)  # infinite when too few pixels have a label
    return label.masked_fill(prob > limit, IGNORE)


# ========================================================================================== network
def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), corners aligned as everywhere in this network."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def conv_bn(
    inputs: int, outputs: int, kernel: int, dilation: int = 1, bias: bool = False
) -> nn.Sequential:
    """A convolution that keeps height and width, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """(B, C, h', w') -> (B, 5 * width, h', w'): image pooling, 1x1 and three dilated 3x3 branches,
    side by side."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...]):
        super().__init__()
        self.pool = conv_bn(inputs, width, 1)
        self.branches = nn.ModuleList([conv_bn(inputs, width, 1)])
        for rate in rates:
            self.branches.append(conv_bn(inputs, width, 3, rate))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return torch.cat([pooled, *(branch(x) for branch in self.branches)], dim=1)


class Features(nn.Module):
    """The paper's f: images (B, 3, H, W) -> features (B, 2 * width, h, w) at stride 4, and the
    third stage's map (B, C, h', w') for an auxiliary head.

    This is wider than DeepLabv3+ (Sec. 4.2): the low-level map has `width` channels, and ASPP does
    not project its output. DEPARTS[open] A ViT, Swin or ConvNeXt has adaptors in front of both. If
    `freeze`, the backbone does not learn and stays in eval mode. DEPARTS[transformers]"""

    def __init__(
        self,
        backbone: str,
        stride: int,
        rates: tuple[int, ...],
        width: int,
        pretrained: bool,
        freeze: bool = False,
    ):
        super().__init__()
        self.backbone, reductions, channels = backbones.build(backbone, stride, pretrained)
        deeplab_resnet(self.backbone, stride)
        self.freeze = freeze
        if freeze:
            self.backbone.requires_grad_(False)
        # the deepest map of stride 4 or finer; the first map when all are coarser
        self.low_map = 0
        for i, reduction in enumerate(reductions):
            if reduction <= 4:
                self.low_map = i
        up_to_low = slice(self.low_map + 1)
        self.fine = backbones.adaptor(self.backbone, reductions[up_to_low], channels[up_to_low], 4)
        self.deep = backbones.adaptor(self.backbone, reductions, channels, stride)
        self.third_channels = channels[-2]
        self.aspp = ASPP(self.deep.channels, width, rates)
        self.head = nn.Sequential(*conv_bn(5 * width, width, 3), nn.Dropout2d(0.1))
        self.low = conv_bn(self.fine.channels, width, 1, bias=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)
        low = self.low(self.fine(maps[: self.low_map + 1]))
        deep = self.head(self.aspp(self.deep(maps)))
        return torch.cat([low, upsample(deep, low.shape[-2:])], dim=1), maps[-2]

    def train(self, mode: bool = True) -> Features:
        super().train(mode)
        self.backbone.train(mode and not self.freeze)
        return self


def deeplab_resnet(body: nn.Module, stride: int) -> None:
    """Change a ResNet as the released network does: its max pooling rounds sizes up, and at stride
    8 the three bottlenecks of its last stage have dilations 4, 8 and 16. DEPARTS[open]

    Other backbones stay as they are, and so do toys with one block a stage, such as test_resnet."""
    blocks = list(getattr(body, "layer4", ()))
    if len(blocks) < 2:
        return
    if isinstance(getattr(body, "maxpool", None), nn.MaxPool2d):
        body.maxpool.ceil_mode = True
    bottlenecks = all(
        hasattr(block, "conv3") and isinstance(getattr(block, "conv2", None), nn.Conv2d)
        for block in blocks
    )
    if stride == 8 and len(blocks) == 3 and bottlenecks:
        for block, dilation in zip(blocks, (4, 8, 16), strict=True):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)


class Predictor(nn.Module):
    """The paper's g: features (B, 2 * width, h, w) -> logits (B, K, h, w), and None.

    With `aux_channels` it has an auxiliary head on the third stage's map, whose logits take the
    place of None in training."""

    def __init__(self, width: int, num_classes: int, aux_channels: int = 0):
        super().__init__()
        self.classifier = nn.Sequential(
            *conv_bn(2 * width, width, 3, bias=True),
            nn.Dropout2d(0.1),
            *conv_bn(width, width, 3, bias=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_classes, 1),
        )
        self.aux = None
        if aux_channels:
            self.aux = nn.Sequential(
                *conv_bn(aux_channels, width, 3, bias=True),
                nn.Dropout2d(0.1),
                nn.Conv2d(width, num_classes, 1),
            )

    def forward(self, features: Tensor, third: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(features)
        if self.aux is None or not self.training:
            return logits, None
        return logits, self.aux(third)


class SegNet(nn.Module):
    """The whole network, cut into f and g as in the paper: images (B, 3, H, W) -> g(f(x)), which
    are float32 logits (B, K, h, w), and auxiliary logits or None. `pretrained`: the backbone starts
    from timm's ImageNet weights."""

    def __init__(self, args: Args, num_classes: int, pretrained: bool = False, bf16: bool = False):
        super().__init__()
        self.features = Features(
            args.backbone,
            args.output_stride,
            args.aspp_rates,
            args.width,
            pretrained,
            args.freeze_backbone,
        )
        aux_channels = self.features.third_channels if args.aux else 0
        self.predictor = Predictor(args.width, num_classes, aux_channels)
        self.bf16 = bf16

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        device = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            logits, aux = self.predictor(*self.features(images))
        return logits.float(), None if aux is None else aux.float()


# ========================================================================================= the step
@dataclass
class State:
    """What a step changes: networks, optimizers, the step's number and the scores. A checkpoint
    holds all of it (see `snapshot`)."""

    student: SegNet
    teacher: SegNet | None  # no gradients, eval mode
    gta: SegNet | None  # the assistant
    opt_student: torch.optim.Optimizer
    opt_gta: torch.optim.Optimizer | None
    forward_student: Callable  # the student, which on several processes is wrapped in DDP
    forward_gta: Callable | None  # the assistant, likewise
    warmup: int  # how many steps learn from labels alone
    epoch: int  # how many steps make a pass over the unlabeled images
    step: int = 0
    scored: int = 0  # the last step that was scored
    last: dict = field(default_factory=dict)  # name of a network -> its newest score
    best: dict = field(default_factory=dict)  # name of a network -> its best score

    def networks(self) -> dict[str, SegNet]:
        """The networks that the method has, by name."""
        named = {"student": self.student, "teacher": self.teacher, "gta": self.gta}
        return {name: net for name, net in named.items() if net is not None}

    def result(self) -> str:
        """The network that a run is about: the teacher (Algorithm 1, Output), or the student when
        the method has no teacher."""
        return "student" if self.teacher is None else "teacher"


class Pseudo(NamedTuple):
    """The unlabeled batch with the teacher's pseudo labels."""

    images: Tensor  # (B, 3, H, W), mixed by CutMix
    label: Tensor  # (B, H, W), 255 where there is no pseudo label
    weight: Tensor  # (B, H, W), 0 where there is no pseudo label
    log: dict[str, Tensor]  # what the run's log shows of them


def train_step(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """Algorithm 1, lines 3 to 12: one minibatch. Composes the equations.

    `labeled` has normalised images (B, 3, H, W) and int64 labels (B, H, W). `unlabeled` has images
    and `valid` (False where padded) of any number and any size; its labels are not looked at."""
    n = s.step - s.warmup  # counts the steps after the warm-up: 0, 1, ...
    # line 3, Step 1: the teacher labels the unlabeled images and weighs its labels
    pseudo = teach(s.teacher, unlabeled, args, s.step, world)  # line 4, Eqs. 1, 2; line 5, Eq. 6
    loss_u = loss_on(args.gta_data, s.forward_gta, labeled, pseudo, args, world)  # line 5, Eq. 7
    # line 6, Step 2: the assistant alone learns from them, and hands over its f, but not its g
    update(s.opt_gta, loss_u)  # line 7, Eq. 8
    alpha = ema_decay(n, args.alpha_gta, args.ramp_gta)
    ema_update_parameters(s.student.features, s.gta.features, alpha)  # line 8, Eq. 9
    if args.transfer == "all":  # Table 5: g, too. DEPARTS[original-ema]
        ema_update_parameters(s.student.predictor.classifier, s.gta.predictor.classifier, alpha)
    # line 9, Step 3: the student learns from human labels; the teacher follows it
    loss_l = loss_on(args.student_data, s.forward_student, labeled, pseudo, args, world)  # line 10
    update(s.opt_student, loss_l)  # line 11, Eq. 11
    ema_update(s.teacher, s.student, ema_decay(n, args.alpha_teacher, args.ramp_teacher))  # line 12
    return {"loss_l": loss_l.detach(), "loss_u": loss_u.detach(), **pseudo.log}


@torch.no_grad()
def teach(teacher: SegNet, unlabeled: Batch, args: Args, step: int, world: World) -> Pseudo:
    """Step 1, Eqs. 1, 2 and 6: pseudo labels and their weights, by a teacher in eval mode.

    The teacher sees the unmixed images. Then CutMix mixes images, labels and confidences alike, and
    the threshold and the weights are those of the mixed batch."""
    size = unlabeled.images.shape[-2:]
    conf, label = confidence(upsample(teacher(unlabeled.images)[0], size))  # Eq. 1
    images, valid, label, conf = mix(
        args.cutmix, "u", args, step, world, unlabeled.images, unlabeled.valid, label, conf
    )
    gamma = drop_threshold(world.gather(conf), world.gather(valid), args.drop)
    label = pseudo_label(label, conf, valid, gamma)  # Eq. 2
    keep = label != IGNORE
    if args.reweight == "laplace":
        weight = reweight(conf, keep, args.tau, world.sum)  # Eq. 6
    else:
        weight = keep.float()
    pixels = valid.sum().clamp(min=1)
    log = {"conf": (conf * valid).sum() / pixels, "kept": keep.sum() / pixels}
    if args.monitor_labels:  # nothing learns from these labels; they are mixed as the images were
        (truth,) = mix(args.cutmix, "u", args, step, world, unlabeled.label)
        log["pseudo_acc"] = pseudo_accuracy(label, truth)
    return Pseudo(images, label, weight, log)


def pseudo_accuracy(label: Tensor, truth: Tensor) -> Tensor:
    """The share of pseudo labels that are right: label, truth (B, H, W) -> (). Pixels count that
    have both labels, of which at least one is not background (class 0)."""
    both = (label != IGNORE) & (truth != IGNORE)
    counted = both & ((truth > 0) | (label > 0))
    return ((label == truth) & counted).sum() / counted.sum().clamp(min=1)


def loss_on(
    data: str, forward: Callable, labeled: Batch, pseudo: Pseudo, args: Args, world: World
) -> Tensor:
    """The loss of a network that learns from `data` (Table 7): from "labeled" L_l (Eq. 10), from
    "pseudo" mu L_u (Eq. 7), from "both" L_l + mu L_u (Eq. 3). So mu scales the assistant's step of
    Eq. 8, too. DEPARTS[mu] `forward` is the network's forward pass."""
    if data == "labeled":
        logits, aux = forward(labeled.images)
        return labeled_loss(logits, aux, labeled.label, args, world)
    if data == "pseudo":
        logits, aux = forward(pseudo.images)
        # pseudo labels do not teach the auxiliary head, but DDP waits for its gradient
        unused = 0 if aux is None else 0 * aux.sum()
        return args.mu * pseudo_loss(logits, pseudo, world) + unused
    # Both batches, whose images have one size, pass together and so share BatchNorm's statistics.
    # DEPARTS[one-pass]
    logits, aux = forward(torch.cat([labeled.images, pseudo.images]))
    b = len(labeled.images)
    aux_l = None if aux is None else aux[:b]
    loss_l = labeled_loss(logits[:b], aux_l, labeled.label, args, world)
    loss_u = pseudo_loss(logits[b:], pseudo, world)
    return teacher_student_loss(loss_l, loss_u, args.mu)


def labeled_loss(
    logits: Tensor, aux: Tensor | None, label: Tensor, args: Args, world: World
) -> Tensor:
    """Eq. 10, plus --aux times the same loss of the auxiliary head, if there is one.
    DEPARTS[cityscapes]"""
    loss = head_loss(logits, label, args, world)
    if aux is not None:
        loss = loss + args.aux * head_loss(aux, label, args, world)
    return loss


def head_loss(logits: Tensor, label: Tensor, args: Args, world: World) -> Tensor:
    """Eq. 10 of one head's logits, enlarged to the size of the labels; with --ohem, of the hard
    pixels alone."""
    logits = upsample(logits, label.shape[-2:])
    if args.ohem:
        kept = OHEM_KEPT * args.batch_size  # pixels of the global batch
        label = hard_pixels(logits.detach(), label, args.ohem, kept, world.gather)
    return supervised_loss(logits, label, world.mean)


def pseudo_loss(logits: Tensor, pseudo: Pseudo, world: World) -> Tensor:
    """Eq. 7 of logits, enlarged to the size of the pseudo labels."""
    logits = upsample(logits, pseudo.label.shape[-2:])
    return unsupervised_loss(logits, pseudo.label, pseudo.weight, world.mean)


def warmup_step(s: State, labeled: Batch, args: Args, world: World) -> dict[str, Tensor]:
    """Sec. 4.2: one minibatch of the warm-up, which learns from labels alone. The paper trains "all
    three components". Three equal copies that are trained alike stay equal, so one is trained here,
    and end_of_warmup copies it. DEPARTS[warmup]"""
    logits, aux = s.forward_student(labeled.images)
    loss = labeled_loss(logits, aux, labeled.label, args, world)
    update(s.opt_student, loss)
    return {"loss_l": loss.detach()}


def end_of_warmup(s: State, args: Args) -> None:
    """Algorithm 1, line 1: after the warm-up, teacher and assistant start as copies of the student.
    DEPARTS[warmup]

    Nothing is copied for the released loop: train_step_released ties the networks by itself, and
    they keep their own BatchNorm statistics."""
    if args.recipe == "released":
        return
    weights = s.student.state_dict()
    for net in (s.teacher, s.gta):
        if net is not None:
            # by the names that `net` has: the assistant has no auxiliary head
            net.load_state_dict({name: weights[name] for name in net.state_dict()})


# ---------------------------------------------------------------------- other methods of the tables
def mean_teacher_step(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """Sec. 3.1, Fig. 1 (b), Tables 1 and 4: the student itself learns from labels and pseudo
    labels. Composes Eqs. 1 to 5. It has neither CutMix nor Eq. 6, unless --cutmix and --reweight
    ask for them. DEPARTS[mean-teacher]"""
    pseudo = teach(s.teacher, unlabeled, args, s.step, world)  # Eqs. 1, 2
    loss = loss_on("both", s.forward_student, labeled, pseudo, args, world)  # Eq. 3
    update(s.opt_student, loss)  # Eq. 4
    alpha = ema_decay(s.step - s.warmup, args.alpha_teacher, args.ramp_teacher)
    ema_update(s.teacher, s.student, alpha)  # Eq. 5
    return {"loss": loss.detach(), **pseudo.log}


def unbiased_st_step(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """Table 5, "Unbiased ST": student and assistant share the parameters of f (`build` ties them),
    and each has a g of its own. So pseudo labels train the student's f directly, and Eq. 9 is left
    out. DEPARTS[unbiased-st]"""
    pseudo = teach(s.teacher, unlabeled, args, s.step, world)
    loss_u = loss_on("pseudo", s.forward_gta, labeled, pseudo, args, world)
    update(s.opt_gta, loss_u)
    loss_l = loss_on("labeled", s.forward_student, labeled, pseudo, args, world)
    update(s.opt_student, loss_l)
    alpha = ema_decay(s.step - s.warmup, args.alpha_teacher, args.ramp_teacher)
    ema_update(s.teacher, s.student, alpha)
    return {"loss_l": loss_l.detach(), "loss_u": loss_u.detach(), **pseudo.log}


# ------------------------------------------------------------ the released loop, beside the paper's
def train_step_released(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """train_step as the authors released it, to be read beside the paper's. What differs, and what
    follows from that, is in docs/gta_seg.md, section 4. Each process has its own threshold, weights
    and denominators."""
    n = s.step - s.warmup
    b = len(labeled.images)
    size = labeled.images.shape[-2:]
    if n < s.epoch:  # in the first epoch each step begins with three networks that are one
        alias(s.gta, s.student)
        alias(s.teacher, s.student)
    with torch.no_grad():
        # The teacher's first pass, on clean images in eval mode, gives the labels.
        _, label = confidence(upsample(s.teacher(unlabeled.images)[0], size))
        images_u, label = mix(args.cutmix, "u", args, s.step, world, unlabeled.images, label)
        # Its second pass, on labeled and mixed images in train mode, gives the confidences.
        both = torch.cat([labeled.images, images_u])
        s.teacher.train()
        conf, _ = confidence(upsample(s.teacher(both)[0][b:], size))
        s.teacher.eval()
        everywhere = torch.ones_like(conf, dtype=torch.bool)  # padding counts, too
        gamma = drop_threshold(conf, everywhere, args.drop)
        label = pseudo_label(label, conf, everywhere, gamma)
        keep = label != IGNORE
        raw = conf * keep + args.tau  # dropped pixels add tau to the denominator of Eq. 6
        weight = raw / raw.sum() * keep.sum()
    # Assistant and student see both batches, and each learns from one.
    logits_u = upsample(s.forward_gta(both)[0][b:], size)
    loss_u = unsupervised_loss(logits_u, label, weight)
    update(s.opt_gta, loss_u)
    ema_rebind(s.student.features, s.gta.features, ema_decay(n, args.alpha_gta, args.ramp_gta))
    logits_l = upsample(s.forward_student(both)[0][:b], size)
    loss_l = supervised_loss(logits_l, labeled.label)
    update(s.opt_student, loss_l)
    alpha = ema_decay(n, args.alpha_teacher, args.ramp_teacher)
    ema_rebind(s.teacher, s.student, alpha)  # the teacher keeps its own BatchNorm statistics
    return {
        "loss_l": loss_l.detach(),
        "loss_u": loss_u.detach(),
        "conf": conf.mean(),
        "kept": keep.float().mean(),
    }


def warmup_step_released(s: State, labeled: Batch, args: Args, world: World) -> dict[str, Tensor]:
    """warmup_step as the authors released it. The student learns, with a denominator of its own in
    each process. Teacher and assistant only see the images, which moves their BatchNorm statistics.
    """
    with torch.no_grad():
        for net in (s.teacher.train(), s.gta):
            net(labeled.images)
    s.teacher.eval()
    logits, _ = s.forward_student(labeled.images)
    loss = supervised_loss(upsample(logits, labeled.label.shape[-2:]), labeled.label)
    update(s.opt_student, loss)
    return {"loss_l": loss.detach()}


def alias(target: nn.Module, source: nn.Module) -> None:
    """Make the parameters of `target` share the storage of those of `source`, so that a change in
    place of one changes both."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data = s.data


def ema_rebind(target: nn.Module, source: nn.Module, decay: float) -> None:
    """The same average as ema_update_parameters, but in new tensors: `target` no longer shares its
    storage with anything (see `alias`)."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data = t.data.clone().mul_(decay).add_(s.data, alpha=1 - decay)


# ================================================================================ views and batches
def augment(
    args: Args, image: Tensor, label: Tensor | None, generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One image and its label -> image, label, valid of the crop's size: a random scale, flip and
    crop. The paper names no augmentation; this is the released code's. DEPARTS[open]

    `valid` is False in padding, which has no label; in the released recipe it has class 0.
    DEPARTS[padding]"""
    size = random_size(image.shape[-2:], *args.scale, generator)
    view = transforms.random_view(size, args.crop_size, generator)
    pad_label = IGNORE if args.recipe == "paper" else 0
    return transforms.cut_out(image, label, view, pad_label)


def random_size(
    size: tuple[int, int], low: float, high: float, generator: np.random.Generator
) -> tuple[int, int]:
    """Scale both sides by one factor. When the range holds 1, factors below and above 1 are equally
    likely: half of the time the factor is uniform in [low, 1], else in [1, high]."""
    if low < 1 < high:
        shrink = generator.random() < 0.5
        low, high = (low, 1) if shrink else (1, high)
    factor = generator.uniform(low, high)
    height, width = size
    return max(int(height * factor), 2), max(int(width * factor), 2)


def prepare(batch: Batch, world: World) -> Batch:
    """The batch on the device, with normalised images (channels last) and int64 labels."""
    batch = batch.to(world.device)
    images = transforms.normalize(batch.images, batch.valid)
    images = images.contiguous(memory_format=torch.channels_last)
    return batch._replace(images=images, label=batch.label.long())


def mix_labeled(batch: Batch, args: Args, step: int, world: World) -> Batch:
    """The labeled batch, mixed by CutMix with the probability --cutmix-labeled."""
    images, valid, label = mix(
        args.cutmix_labeled, "l", args, step, world, batch.images, batch.valid, batch.label
    )
    return batch._replace(images=images, valid=valid, label=label)


def mix(
    probability: float, stream: str, args: Args, step: int, world: World, *maps: Tensor
) -> tuple[Tensor, ...]:
    """CutMix: mix the images of a batch with `probability`, and all their `maps` (images, labels,
    confidences) alike. DEPARTS[cutmix]

    One coin decides for the whole batch, on all processes, and each image has a box of its own.
    They depend on seed, `stream` ("l" or "u" for the labeled or unlabeled batch), step and the
    image's place in the global batch, and on nothing else. So the number of processes does not
    matter, and a second call mixes further maps in the same way."""
    if rng(args.seed, "cutmix", stream, step).random() >= probability:
        return maps
    b, device = len(maps[0]), maps[0].device
    samples = range(world.rank * b, (world.rank + 1) * b)
    generators = [rng(args.seed, "box", stream, step, sample) for sample in samples]
    boxes = cutmix_boxes(maps[0].shape[-2:], generators)
    if args.recipe == "released":
        partner = torch.arange(b).roll(-1)  # the next image of the process
    else:
        partner = neighbours(b)
    boxes = boxes.to(device, non_blocking=True)
    partner = partner.to(device, non_blocking=True)
    return cutmix(boxes, partner, *maps)


def neighbours(count: int) -> Tensor:
    """For each of `count` images, the image whose pixels show in its box, (B,). Images 0 and 1 are
    partners, 2 and 3, and so on. In an odd batch the last image shows pixels of the first; an image
    that is alone stays as it is."""
    partner = torch.arange(count) ^ 1  # flips the last bit: 0 <-> 1, 2 <-> 3
    return torch.where(partner < count, partner, 0)


def cutmix_boxes(size: tuple[int, int], generators: list[np.random.Generator]) -> Tensor:
    """A box with half of the image's area from each generator, (B, 4): top, bottom, left, right.
    DEPARTS[cutmix]"""
    height, width = size
    boxes = []
    for generator in generators:
        # from half of the image's width on; the height follows from the area
        w = int(generator.integers(max(width // 2, 1), max(width, 2)))
        h = min(round(height * width / 2 / w), height)
        top = int(generator.integers(0, height - h + 1))
        left = int(generator.integers(0, width - w + 1))
        boxes.append((top, top + h, left, left + w))
    return torch.tensor(boxes)


def cutmix(boxes: Tensor, partner: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """Paste into image i, inside box i, what the unmixed image partner[i] shows there; alike for
    images (B, C, H, W) and for labels, confidences and validity (B, H, W)."""
    height, width = maps[0].shape[-2:]
    ys = torch.arange(height, device=boxes.device)
    xs = torch.arange(width, device=boxes.device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows = (ys >= top) & (ys < bottom)  # (B, H)
    columns = (xs >= left) & (xs < right)  # (B, W)
    inside = rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    mixed = []
    for m in maps:
        mask = inside[:, None] if m.dim() == 4 else inside
        mixed.append(torch.where(mask, m[partner], m))
    return tuple(mixed)


# ======================================================================================= evaluation
@torch.no_grad()
# images have many sizes, and trying out convolution algorithms for each would take too long
@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def evaluate(
    networks: dict[str, SegNet], data: Segmentation, args: Args, world: World
) -> tuple[dict[str, Tensor], list[list]]:
    """Sec. 4.2: confusion counts (K, K) of each network over the validation images, from which
    common/metrics.py makes mIoU; and rows of preview pictures (image, label, predictions).

    Each image is scored once, on any number of processes, at its own scale and without a flip. On
    VOC the paper crops the centre, which only pads an image. Whole images are scored here, without
    padding; --recipe released crops. DEPARTS[whole-image] On Cityscapes a window slides over the
    image, and logits are averaged where windows overlap (--window)."""
    num_classes = len(data.classes)
    counts = {name: torch.zeros(num_classes, num_classes, dtype=torch.int64) for name in networks}
    previews: list[list] = []
    training = {name: net.training for name, net in networks.items()}
    for net in networks.values():
        net.eval()
    for _, image, label in semantic.score_loader(data.val, data, world, args.workers):
        valid = None
        if args.recipe == "released" and args.dataset == "voc":
            image, label, valid = centre_crop(image, label, args.crop_size)
            valid = valid[None].to(world.device)
        x = transforms.normalize(image[None].to(world.device), valid)
        predicted = []
        for name, net in networks.items():
            prediction = predict_logits(net, x, args.window).argmax(1)[0]
            counts[name] += metrics.confusion(prediction, label.to(prediction.device), num_classes)
            predicted.append(prediction)
        if len(previews) < PREVIEWS:
            colours = [plots.colour(indices) for indices in (label, *predicted)]
            previews.append([image.permute(1, 2, 0).numpy(), *colours])
    for name, net in networks.items():
        net.train(training[name])
    return {name: world.sum(c) for name, c in counts.items()}, previews


def centre_crop(image: Tensor, label: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The view in which the released code scores an image -> image, label, valid: `size` pixels a
    side around the centre. Padding is labeled, and so scored, as class 0."""
    height, width = label.shape
    top, left = -((size - height) // 2), -((size - width) // 2)
    return transforms.crop(image, label, top, left, size, size, pad_label=0)


def predict_logits(net: SegNet, images: Tensor, window: int = 0) -> Tensor:
    """Normalised images (B, 3, H, W) -> logits (B, K, H, W). With a `window`, an image larger than
    that is cut into square windows, two thirds of a side apart, and logits are averaged where they
    overlap; otherwise the network sees the whole image."""
    height, width = images.shape[-2:]
    if not window or max(height, width) <= window:
        # net(...) may be compiled, anew for every size of image; net.forward never is
        return upsample(net.forward(images)[0], (height, width))
    stride = -(-window * 2 // 3)  # two thirds of the window, rounded up
    total, count = 0, 0
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            part = images[:, :, top : top + window, left : left + window]
            logits = upsample(net.forward(part)[0], part.shape[-2:])
            right = width - left - part.shape[-1]
            bottom = height - top - part.shape[-2]
            border = (left, right, top, bottom)  # what of the image lies around this window
            total = total + F.pad(logits, border)
            count = count + F.pad(torch.ones_like(logits[:, :1]), border)
    return total / count


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: `stride` apart, and the last one ends at the border."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


# ========================================================================================= training
def train(args: Args) -> dict:
    """Train from the start, or from the run's checkpoint, and return what results.json holds."""
    check(args, distributed.launched())
    checkpoints.need_weights(args.weights)
    data = find_data(args)
    chosen = semantic.choose(
        data, args.split, args.split_seed, args.unlabeled, "gta_seg", args.method != "suponly"
    )
    if args.check:
        return look_at_all(data, chosen.labeled, chosen.unlabeled, data.val)
    looked = first_look(data, chosen.labeled, data.val)
    epoch = epoch_steps(chosen.unlabeled or chosen.labeled, args)
    warmup = warmup_steps(chosen, args)
    args = finish_settings(args, epoch, warmup)
    out = Path(args.out)
    resuming = runs.open_run(out, SCRIPT, args, args.resume, distributed.launched().main)
    world = distributed.start(args.device)
    distributed.warn_of_slow_bf16(args.precision, world)
    s, notes = build(args, len(data.classes), world, warmup, epoch)
    state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT, Saved) if resuming else None
    if state is not None:
        with checkpoints.fitting(state["path"]):
            restore(s, state, args)
    facts = {
        "method": args.method,
        "recipe": args.recipe,
        "val": args.val,
        "split_fingerprint": chosen.fingerprint,
    }
    about_run = {"classes": data.classes, "images": chosen.text, "weights_notes": notes}
    run = runs.Run(out, SCRIPT, args, world, s.step, state, facts | about_run)
    run.say(
        f"{chosen.text}; scored on {len(data.val)}",
        *looked,
        *(f"weights {note}" for note in notes),
        f"{args.method}, {args.recipe} recipe: steps {s.step} to {args.steps}, "
        f"warm-up {warmup}, {epoch} an epoch; in {out}",
    )
    if s.step > s.scored and run.score_is_due(s.step):
        score_networks(s, data, args, world, run)  # the run ended between saving and scoring

    warm_up, learn = steps_of(args)
    labeled_batches = batches(chosen.labeled, "labeled", True, s.step, data, args, world)
    start = max(s.step, s.warmup)
    unlabeled_batches = batches(
        chosen.unlabeled, "unlabeled", args.monitor_labels, start, data, args, world
    )
    s.student.train()
    for step in run.steps(s.step, args.steps):
        schedule(s, step, args)
        labeled = mix_labeled(prepare(next(labeled_batches), world), args, step, world)
        unlabeled = None if step < s.warmup else prepare(next(unlabeled_batches), world)
        # dropout is the same in a run that was resumed
        distributed.seed_torch(args.seed, "step", step, world.rank)
        if unlabeled is None:
            values = warm_up(s, labeled, args, world)
        else:
            values = learn(s, labeled, unlabeled, args, world)
        s.step = step + 1
        if s.step == s.warmup:
            end_of_warmup(s, args)

        run.tally(step, values, labeled, unlabeled)
        if run.log_is_due(s.step):
            run.log(s.step, lr=s.opt_student.param_groups[0]["lr"], **distance(s))
        if run.save_is_due(s.step):
            run.save("last.pt", snapshot(s, data, args))  # before the evaluation, which may fail
        run.leave_if_asked(s.step)
        if run.score_is_due(s.step):
            score_networks(s, data, args, world, run)

    scores = {name: {"last": s.last[name], "best": s.best[name]} for name in s.networks()}
    return run.finish(scores, facts, s.result(), "miou")


def finish_settings(args: Args, epoch: int, warmup: int) -> Args:
    """The settings with what is left to be decided when the data are known: the number of steps,
    the steps between evaluations and the run's folder."""
    steps = args.steps or round(args.epochs * epoch)
    if steps <= warmup:
        raise UserError(
            f"{steps} steps end within the {warmup} of the warm-up; give more --steps or --epochs, "
            f"or fewer --warmup-epochs."
        )
    out = str(runs.default_out(SCRIPT, args))
    return replace(args, steps=steps, eval_every=args.eval_every or epoch, out=out)


def steps_of(args: Args) -> tuple[Callable, Callable]:
    """The function for a step of the warm-up, and the one for a step of the method."""
    if args.recipe == "released":
        return warmup_step_released, train_step_released
    if args.method == "mt":
        return warmup_step, mean_teacher_step
    if args.method == "unbiased-st":
        return warmup_step, unbiased_st_step
    # gta; and suponly, whose warm-up is the whole run (see `build`)
    return warmup_step, train_step


def check(args: Args, world: World) -> None:
    """Refuse, before any work is done, settings that cannot run or would spoil a comparison."""
    cli.check_ranges(args)
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: the smaller factor comes first.")
    # Refuses a batch that the processes cannot share evenly. CutMix pairs neighbours, so that each
    # process must have an even number of images.
    world.share(args.batch_size, multiple=1 if args.recipe == "released" else 2)
    if args.ohem and args.crop_size**2 <= OHEM_KEPT:
        raise UserError(
            f"--ohem keeps {OHEM_KEPT:,} pixels an image at least, which is all of a crop of "
            f"--crop-size {args.crop_size}; take a larger one, or --ohem 0."
        )
    if args.recipe != "released":
        return
    if args.method != "gta":
        raise UserError(
            f"--recipe released is a loop of --method gta; --method {args.method} has only "
            f"--recipe paper."
        )
    table_7 = (args.gta_data, args.student_data) != ("pseudo", "labeled")
    if table_7 or args.transfer != "features" or args.reweight != "laplace" or args.mu != 1:
        raise UserError(
            "--recipe released is one fixed loop, without --gta-data, --student-data, --transfer, "
            "--reweight and --mu; leave them out, or take --recipe paper."
        )
    if args.aux or args.ohem or args.share_predictor:
        raise UserError(
            "--recipe released has neither --aux nor --ohem, and shares its predictor by itself; "
            "leave them and --share-predictor out."
        )


def epoch_steps(pictures: list[semantic.Picture], args: Args) -> int:
    """How many steps make a pass over the pictures; what does not fill a batch is left out."""
    return max(len(pictures) // args.batch_size, 1)


def warmup_steps(chosen: semantic.Chosen, args: Args) -> int:
    """How many steps the warm-up has. Sec. 4.2: "on labeled data for one epoch". An epoch is a pass
    over the unlabeled images, as everywhere in the run, or, read literally, over the labeled ones
    (--warmup-over). DEPARTS[warmup-epoch]"""
    if args.method == "suponly":
        return 0
    pictures = chosen.unlabeled if args.warmup_over == "unlabeled" else chosen.labeled
    return round(args.warmup_epochs * epoch_steps(pictures, args))


def batches(
    pictures: list[semantic.Picture],
    name: str,
    labels: bool,
    start: int,
    data: Segmentation,
    args: Args,
    world: World,
) -> Iterator[Batch]:
    """The augmented batches of this process from step `start` on. `name` seeds the order of the
    pictures and their augmentation."""
    views = semantic.Pictures(pictures, data, labels, partial(augment, args), args.seed, name)
    return loading.stream(views, args.batch_size, start, args.steps, world, args.workers)


def score_networks(s: State, data: Segmentation, args: Args, world: World, run: runs.Run) -> None:
    """Evaluate all networks (Table 6). Their scores go into the log, pictures as in Figs. 3 and 4
    into previews/, and best.pt is written when the result was never better."""
    networks = s.networks()
    counts, previews = evaluate(networks, data, args, world)
    s.last = {name: metrics.iou_record(c, data.classes, s.step) for name, c in counts.items()}
    for name, record in s.last.items():
        if name not in s.best or record["miou"] > s.best[name]["miou"]:
            s.best[name] = record
    s.scored = s.step
    run.write(s.step, **{f"miou_{name}": record["miou"] for name, record in s.last.items()})
    if world.main:
        path = run.out / "previews" / f"{s.step:07d}.png"
        plots.strip(previews, ["image", "label", *networks], path)
    if s.best[s.result()] is s.last[s.result()]:
        run.save("best.pt", snapshot(s, data, args, optimizers=False))


def distance(s: State) -> dict[str, float]:
    """For the log: how far the student's f is from the assistant's, relative to the latter."""
    if s.gta is None:
        return {}
    return {"f_distance": metrics.distance(s.student.features, s.gta.features)}


def optimizer_of(net: SegNet, args: Args, world: World) -> torch.optim.Optimizer:
    """SGD as in Sec. 4.2; everything behind the backbone learns --decoder-lr times as fast. The
    paper names no momentum. DEPARTS[open] With a ViT, Swin or ConvNeXt it is AdamW.
    DEPARTS[transformers]"""
    f = net.features
    trained = [] if args.freeze_backbone else list(f.backbone.parameters())
    groups = [{"params": trained, "initial_lr": args.lr}]
    for part in (f.aspp, f.head, f.low, net.predictor, f.fine, f.deep):
        params = list(part.parameters())
        if params:  # a CNN has no adaptors
            groups.append({"params": params, "initial_lr": args.lr * args.decoder_lr})
    for group in groups:
        group["lr"] = group["initial_lr"]
    fused = world.device.type == "cuda"
    if backbones.is_layer_normed(args.backbone):
        return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused)
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay, fused=fused)


def schedule(s: State, step: int, args: Args) -> None:
    """Set the learning rates of this step, Sec. 4.2."""
    factor = learning_rate_factor(step, args.steps)
    set_learning_rates(s.opt_student, factor)
    if s.opt_gta is not None:
        # the released code never schedules the assistant. DEPARTS[gta-lr]
        set_learning_rates(s.opt_gta, 1.0 if args.recipe == "released" else factor)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group of parameters its initial learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


# ========================================================================= networks of a run, files
def build(
    args: Args,
    num_classes: int,
    world: World,
    warmup: int = 0,
    epoch: int = 1,
    train: bool = True,
) -> tuple[State, list[str]]:
    """The networks, optimizers and forward passes of a method, and notes on weights of --weights
    that did not fit. Without `train` no weights are fetched, for a checkpoint brings its own."""
    weights = backbone_weights(args) if train else None
    pretrained = train and args.weights == "imagenet"
    notes: list[str] = []

    def network(name: str, aux: float) -> SegNet:
        # All networks start alike. In the released code they start apart, and are tied later.
        distributed.seed_torch(args.seed, name if args.recipe == "released" else "student")
        bf16 = world.bf16(args.precision)
        net = SegNet(replace(args, aux=aux), num_classes, pretrained, bf16)
        if weights is not None:  # in all networks alike, and so are the notes
            backbone = backbones.bare(net.features.backbone)
            notes[:] = checkpoints.load_matching(backbone, weights, args.weights)
        net = norms.over_processes(net, world)
        net = net.to(world.device, memory_format=torch.channels_last)
        if args.compile:
            net.compile()
        return net

    student = network("student", args.aux)
    teacher = gta = None
    if args.method != "suponly":
        teacher = network("teacher", args.aux).requires_grad_(False).eval()
    if args.method in ("gta", "unbiased-st"):
        gta = network("gta", aux=0)  # an auxiliary head learns from labels, which it does not see
        if args.share_predictor:  # DEPARTS[share-predictor]
            alias(gta.predictor.classifier, student.predictor.classifier)
        if args.method == "unbiased-st":  # one f, two g. DEPARTS[unbiased-st]
            alias(gta.features, student.features)
    if args.freeze_backbone:  # all networks have the same one, so one is enough
        for net in (teacher, gta):
            if net is not None:
                alias(net.features.backbone, student.features.backbone)

    def parallel(net: SegNet) -> nn.Module:
        return distributed.parallel(net, world) if train else net

    s = State(
        student=student,
        teacher=teacher,
        gta=gta,
        opt_student=optimizer_of(student, args, world),
        opt_gta=None if gta is None else optimizer_of(gta, args, world),
        forward_student=parallel(student),
        forward_gta=None if gta is None else parallel(gta),
        warmup=args.steps if args.method == "suponly" else warmup,  # labels alone, to the end
        epoch=epoch,
    )
    return s, notes


def backbone_weights(args: Args) -> dict[str, Tensor] | None:
    """The tensors that --weights names, a file's or the embedded data's own; None for imagenet and
    none."""
    if args.weights in ("imagenet", "none"):
        return None
    if args.weights == "shapes":
        from data import shapes

        return checkpoints.read_weights(shapes.pretrained(Path(args.root), args.backbone))
    return checkpoints.read_weights(Path(args.weights))


def find_data(args: Args, classes: list[str] | None = None) -> Segmentation:
    """The data set that --dataset and --root name; the embedded one is drawn on first use."""
    root = Path(args.root)
    if args.dataset == "shapes":
        from data import shapes

        root = shapes.make_voc(root / "voc")
    return semantic.find(args.dataset, root, args.val, classes)


def snapshot(s: State, data: Segmentation, args: Args, optimizers: bool = True) -> dict:
    """What a checkpoint holds. best.pt is for scoring and predicting, and has no `optimizers`."""
    state = {
        "settings": json.loads(json.dumps(vars(args))),
        "classes": data.classes,
        "step": s.step,
        "scored": s.scored,
        "last": s.last,
        "best": s.best,
        "networks": {name: net.state_dict() for name, net in s.networks().items()},
    }
    if optimizers:
        state["opt_student"] = s.opt_student.state_dict()
        if s.opt_gta is not None:
            state["opt_gta"] = s.opt_gta.state_dict()
    return state


class Saved(checkpoints.Trained, kw_only=True):
    """What `snapshot` gives to a run that goes on."""

    opt_student: dict


def restore(s: State, state: dict, args: Args) -> None:
    """The reverse of `snapshot`, in place, so that shared storage stays shared."""
    s.step, s.scored = state["step"], state["scored"]
    s.last, s.best = state["last"], state["best"]
    if args.recipe == "released" and "opt_gta" in state and s.step > s.warmup:
        # the first step of train_step_released ties the two predictors, and nothing unties them
        alias(s.gta.predictor, s.student.predictor)
    for name, net in s.networks().items():
        path = state.get("path", "the checkpoint")
        checkpoints.load_exact(net, state["networks"][name], path)
    if "opt_student" in state:
        s.opt_student.load_state_dict(state["opt_student"])
        if s.opt_gta is not None:
            s.opt_gta.load_state_dict(state["opt_gta"])


class Loaded(NamedTuple):
    """A checkpoint, ready to score and to predict."""

    networks: dict[str, SegNet]
    state: dict
    world: World


def load(path: str, args: Args) -> Loaded:
    """The networks of a checkpoint, in eval mode, and what else it holds. `args` are the settings
    that were saved in it (see `settings`)."""
    state = checkpoints.load_checkpoint(Path(path), SCRIPT, checkpoints.Trained)
    world = distributed.start(args.device)
    s, _ = build(args, len(state["classes"]), world, train=False)
    without_optimizers = {k: value for k, value in state.items() if not k.startswith("opt_")}
    with checkpoints.fitting(path):
        restore(s, without_optimizers, args)
    networks = {name: net.eval() for name, net in s.networks().items()}
    return Loaded(networks, state, world)


def score_checkpoint(args: Args) -> dict:
    """--eval: score a checkpoint's networks and write <checkpoint>.results.json."""
    networks, state, world = load(args.eval, args)
    data = find_data(args, state["classes"])
    counts, previews = evaluate(networks, data, args, world)
    scores = {
        name: {"last": metrics.iou_record(c, data.classes, state["step"])}
        for name, c in counts.items()
    }
    facts = {
        "dataset": args.dataset,
        "split": args.split,
        "val": args.val,
        "seed": args.seed,
        "confusion": {name: c.tolist() for name, c in counts.items()},
    }
    if world.main:
        plots.strip(previews, ["image", "label", *networks], Path(f"{args.eval}.previews.png"))
        path, where = Path(f"{args.eval}.results.json"), f"{len(data.val)} of {data.root}"
        runs.write_scores(path, scores, facts, "miou", where)
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: index PNGs, confidences and overlays of images or folders into
    <checkpoint>.predictions/."""
    checkpoint, *images = args.predict
    networks, state, world = load(checkpoint, args)
    net = networks[checkpoints.returned(networks, RETURNED)]

    def logits_of(batch: Tensor) -> Tensor:
        return predict_logits(net, transforms.normalize(batch), args.window)

    out = Path(f"{checkpoint}.predictions")
    how = (logits_of, world, args.workers, args.predict_tile)
    predictions.predict_labels(images, out, state["classes"], *how)


# ================================================================================ presets, command
PRESETS: dict[str, dict[str, Any]] = {
    "voc": {},  # the defaults of Args
    "cityscapes": dict(
        root="datasets/cityscapes",
        split="186",
        crop_size=769,
        lr=0.01,
        decoder_lr=1,
        weight_decay=5e-4,
        epochs=200,
        window=769,
        aux=0.4,
        ohem=0.7,
        eval_every=1740,
    ),
    "shapes": dict(
        root="datasets/shapes",
        split="random:10",
        backbone="test_resnet",
        weights="shapes",
        width=64,
        aspp_rates=(1, 2, 3),
        batch_size=8,
        crop_size=64,
        steps=1200,
        lr=0.01,
        decoder_lr=3,
        eval_every=300,
        scale=(0.75, 1.33),
        warmup_epochs=3,
        cutmix=1.0,
        cutmix_labeled=0.5,
    ),
    "folder": dict(root="datasets/folder", split="random:1/8", crop_size=321),
}

# The mean teacher of Table 1 has neither CutMix nor the paper's Eq. 6. DEPARTS[mean-teacher]
MEAN_TEACHER: dict[str, Any] = dict(cutmix=0.0, reweight="none")

# What the released code sets in its configuration; the rest is in train_step_released.
RELEASED: dict[str, Any] = dict(
    alpha_gta=0.999, alpha_teacher=0.999, ramp_gta=True, ramp_teacher=True, aux=0.0, ohem=0.0
)


# What UniMatch V2 sets for DINOv2, for every ViT, Swin and ConvNeXt. DEPARTS[transformers]
LAYER_NORMED: dict[str, Any] = dict(lr=5e-6, decoder_lr=40, weight_decay=0.01)


def preset(
    dataset: str = "voc", recipe: str = "paper", method: str = "gta", **overrides: Any
) -> Args:
    """The settings for a data set, a recipe, a method and a backbone; `overrides` are settings by
    name."""
    values: dict[str, Any] = dict(dataset=dataset, recipe=recipe, method=method)
    values |= PRESETS[dataset]
    if method == "mt":
        values |= MEAN_TEACHER
    if recipe == "released":
        values |= RELEASED
        if dataset == "voc":
            values["batch_size"] = 12  # the released configuration is for VOC only
    if backbones.is_layer_normed(overrides.get("backbone", "")):
        values |= LAYER_NORMED
    return Args(**(values | overrides))


def settings(
    dataset: str = "voc",
    recipe: str = "paper",
    method: str = "gta",
    eval: str = "",
    predict: str = "",
    export: str = "",
    **backbone: str,
) -> Args:
    """What the command line starts from: a preset, or the settings inside a checkpoint to score or
    predict with."""
    checkpoint = eval or predict or export
    if checkpoint:
        return cli.saved_settings(Args, Path(checkpoint), SCRIPT)
    return preset(dataset, recipe, method, **backbone)


# Flags that pick the defaults of the others.
CHOOSERS = ("dataset", "recipe", "method", "backbone", "eval", "predict", "export")


def main(args: Args) -> Any:
    if args.eval:
        return score_checkpoint(args)
    if args.predict:
        return predict(args)
    if args.export:
        return checkpoints.export(Path(args.export), SCRIPT, RETURNED)
    return train(args)


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=CHOOSERS)
