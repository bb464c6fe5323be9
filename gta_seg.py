"""GTA-Seg: Semi-Supervised Semantic Segmentation via Gentle Teaching Assistant.
Jin, Wang, Lin. NeurIPS 2022. https://arxiv.org/abs/2301.07340

Pseudo labels are good for the feature extractor f and bad for the mask predictor g. So an assistant
(GTA) learns from them and hands the student its feature extractor only, by EMA; the student alone
sees human labels, and the teacher, which makes the pseudo labels and is the result, is the
student's EMA.

    paper                                           this file
    Sec. 3.1  f and g                               Features, Predictor (SegNet.features, SegNet.predictor)
    Eq. 1     prediction and confidence             confidence
    Eq. 2     threshold, pseudo label               drop_threshold, pseudo_label
    Eq. 3     teacher-student loss L_l + mu L_u     loss_on("both"), mean_teacher_step
    Eq. 6     confidence weights, Laplace smoothed  reweight
    Eq. 7     unsupervised loss L_u                 unsupervised_loss
    Eq. 10    supervised loss L_l                   supervised_loss
    Eqs. 4, 8, 11  gradient steps                   update
    Eqs. 5, 9, 12  exponential moving averages      ema_update, ema_decay
    Algorithm 1                                     end_of_warmup (line 1), train_step (lines 3 to 12)
    Sec. 4.2  poly schedule, warm-up, evaluation    poly, warmup_step, evaluate
    Tables 4-9                                      flags under "the paper's tables" in Args
    (not in the paper) the released code's loop     train_step_released, see docs/gta_seg.md

Shapes: B images, K classes, H x W pixels, h x w cells of stride 4. Suffix _l labeled, _u unlabeled.
Lines marked DEPARTS[name] leave the paper or decide what it leaves open; docs/gta_seg.md says why.

    torchrun --nproc_per_node 8 gta_seg.py --split 183      # VOC 2012, 183 labels
    python gta_seg.py --dataset shapes                      # embedded data, no download, CPU, minutes
"""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    backbones,
    checkpoints,
    cli,
    distributed,
    loading,
    metrics,
    plots,
    predictions,
    runs,
    semantic,
    transforms,
)
from common.distributed import World, rng
from common.errors import UserError
from common.metrics import confusion
from common.semantic import Batch, Segmentation
from common.transforms import normalize
from data import shapes

SCRIPT, IGNORE = "gta_seg.py", 255


OHEM_KEPT = 50_000  # labeled pixels an image that --ohem keeps at least


# ========================================================================================= settings
@dataclass
class Args:
    """GTA-Seg. --dataset picks the paper's numbers, other flags override them. DEPARTS: see
    docs."""

    # data and bookkeeping
    # what to train on; also picks the defaults
    dataset: Literal["voc", "cityscapes", "shapes", "folder"] = "voc"
    # Algorithm 1, or what the released code does instead
    recipe: Literal["paper", "released"] = "paper"
    root: str = "datasets/voc"  # where the data lie, see data/README.md
    # labeled images: a published list, random:N, random:1/N, random:N%, all, or a list file
    split: str = "183"
    split_seed: int = 0  # which draw, for random splits
    unlabeled: str = ""  # folder or list of unlabeled images; empty: all other training images
    val: str = "val"  # name of the list or folder that is scored
    out: str = ""  # run folder; empty: runs/gta_seg-<dataset>-<split>-d<split seed>-s<seed>
    resume: bool = False  # continue the run in --out; starts afresh when there is none
    # initial weights, order of images, augmentation. The paper averages 0, 1, 2 (Sec. 4.2)
    seed: int = 0
    workers: int = loading.default_workers()  # decoding processes per training process and stream
    device: str = "auto"  # auto, cpu, cuda
    # inside the network; auto: bf16 on GPUs, fp32 elsewhere
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # torch.compile the networks in training; scoring and predicting never are
    compile: bool = False
    eval_every: int = 0  # steps between evaluations; 0: once per epoch
    save_every: int = 0  # steps between checkpoints; 0: with every evaluation
    log_every: int = 20  # steps between log lines
    # open the unlabeled images' labels to log how right pseudo labels are; never to learn
    monitor_labels: bool = False
    eval: str = ""  # evaluate this checkpoint, train nothing
    # checkpoint, then images or folders: write predictions
    predict: list[str] = field(default_factory=list)

    # network (Sec. 4.2: ResNet-101, DeepLabv3+, 512-dimensional features)
    # a timm name, else a torchvision one. DEPARTS[deep-stem]
    backbone: str = "resnet101s.gluon_in1k"
    # imagenet, none, a file of backbone weights, or shapes (made on first use)
    weights: str = "imagenet"
    # image pixels per cell of the deepest features. DEPARTS[open]
    output_stride: Literal[8, 16, 32] = 8
    aspp_rates: tuple[int, int, int] = (12, 24, 36)  # dilations of ASPP. DEPARTS[open]
    width: int = 256  # channels of the decoder; the paper's 512-dim features are twice that

    # optimisation (Sec. 4.2)
    # labeled images per step over all processes, and as many unlabeled. DEPARTS[batch]
    batch_size: int = 16
    crop_size: int = 513  # pixels a side in training. DEPARTS[open]
    scale: tuple[float, float] = (0.5, 2.0)  # random scaling of training images. DEPARTS[open]
    epochs: float = 80  # passes over the unlabeled images. DEPARTS[open]
    steps: int = 0  # whole run, warm-up included; 0: as many as `epochs` makes
    lr: float = 0.001  # of the backbone, Sec. 4.2
    decoder_lr: float = 10  # times lr, for everything behind the backbone, Sec. 4.2
    weight_decay: float = 1e-4  # Sec. 4.2
    aux: float = 0  # weight of an auxiliary loss on the third stage. DEPARTS[cityscapes]
    # keep labeled pixels up to this true-class probability, 50,000 an image at least (crops under
    # 224: all); 0: all
    ohem: float = 0
    # side of the sliding window in evaluation; 0: whole images. DEPARTS[whole-image]
    window: int = 0

    # the method (Sec. 3.2) and the paper's tables
    method: Literal["gta", "suponly", "mt", "unbiased-st"] = "gta"  # Tables 1, 4, 5
    alpha_gta: float = 0.99  # EMA assistant -> student, Eq. 9, Table 8
    alpha_teacher: float = 0.99  # EMA student -> teacher, Eqs. 5 and 12, Table 8
    mu: float = 1.0  # weight of L_u, Eq. 3; also scales the assistant's step, Eq. 8
    tau: float = 1.0  # Laplace smoothing, Eq. 6
    # Eq. 6 or equal weights: Tables 4, 9 (its second row: --tau 0)
    reweight: Literal["laplace", "none"] = "laplace"
    drop: float = 0.2  # share of the least confident pixels that get no pseudo label, Sec. 4.2
    threshold: float = 0  # fixed gamma_t of Eq. 2 in place of `drop`; 0: use `drop`
    warmup_epochs: float = 1  # on labels alone, before the assistant exists, Sec. 4.2, Table 8
    # what the assistant learns from, Table 7
    gta_data: Literal["pseudo", "labeled", "both"] = "pseudo"
    # what the student learns from, Table 7
    student_data: Literal["labeled", "pseudo", "both"] = "labeled"
    # what the assistant hands over, Table 5
    transfer: Literal["features", "all", "none"] = "features"
    cutmix: float = 0.5  # probability, per step, to mix the unlabeled batch. DEPARTS[cutmix]
    # the same for the labeled batch: a fair baseline has it, the paper does not
    cutmix_labeled: float = 0
    gta_lr: Literal["poly", "constant"] = "poly"  # the assistant's schedule. DEPARTS[gta-lr]
    # assistant and student see both batches, each learns from its own. DEPARTS[joint-bn]
    joint_bn: bool = False
    # student and assistant share g, as in the released code. DEPARTS[share-predictor]
    share_predictor: bool = False


PRESETS: dict[str, dict[str, Any]] = {
    "voc": {},
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


RELEASED: dict[str, Any] = dict(
    batch_size=12, alpha_gta=0.999, alpha_teacher=0.999, gta_lr="constant", aux=0, ohem=0
)


def preset(dataset: str = "voc", recipe: str = "paper", **overrides: Any) -> Args:
    """The settings of a data set and recipe; the released recipe's batch was published for VOC
    only."""
    values: dict[str, Any] = dict(dataset=dataset, recipe=recipe) | PRESETS[dataset]
    if recipe == "released":
        values |= {k: v for k, v in RELEASED.items() if k != "batch_size" or dataset == "voc"}
    return Args(**(values | overrides))


# ========================================================================================== network
def deeplab_resnet(body: nn.Module, stride: int) -> None:
    """Where a ResNet has them: ceil-mode pooling; at stride 8, last bottlenecks dilated by 4, 8,
    16. DEPARTS[open]"""
    if isinstance(getattr(body, "maxpool", None), nn.MaxPool2d):
        body.maxpool.ceil_mode = True
    blocks = list(getattr(body, "layer4", ()))
    if stride == 8 and len(blocks) == 3 and hasattr(blocks[0], "conv3"):
        for block, dilation in zip(blocks, (4, 8, 16), strict=True):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), corners aligned as everywhere in this network."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def conv_bn(
    inputs: int, outputs: int, kernel: int, dilation: int = 1, bias: bool = False
) -> nn.Sequential:
    conv = nn.Conv2d(
        inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias
    )
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """(B, C, h', w') -> (B, 5 * width, h', w'): image pooling, 1x1 and three dilated 3x3 branches,
    side by side."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...]):
        super().__init__()
        self.pool = conv_bn(inputs, width, 1)
        self.branches = nn.ModuleList(
            [conv_bn(inputs, width, 1), *(conv_bn(inputs, width, 3, rate) for rate in rates)]
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return torch.cat([pooled, *(branch(x) for branch in self.branches)], dim=1)


class Features(nn.Module):
    """The paper's f: (B, 3, H, W) -> (B, 2 * width, h, w) at stride 4, and the third stage's map
    (B, C, h', w'). Wider than DeepLabv3+: `width` low-level channels, no projection inside ASPP.
    DEPARTS[open]"""

    def __init__(self, args: Args):
        super().__init__()
        pretrained = args.weights == "imagenet"
        self.backbone, reduction, channels = backbones.build(
            args.backbone, args.output_stride, pretrained
        )
        if args.backbone.startswith("resnet") and not args.backbone.startswith("resnetv2"):
            deeplab_resnet(self.backbone, args.output_stride)
        self.low_map = max((i for i, r in enumerate(reduction) if r <= 4), default=0)
        self.third_channels = channels[-2]
        self.aspp = ASPP(channels[-1], args.width, args.aspp_rates)
        self.head = nn.Sequential(*conv_bn(5 * args.width, args.width, 3), nn.Dropout2d(0.1))
        self.low = conv_bn(channels[self.low_map], args.width, 1, bias=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)
        low, deep = self.low(maps[self.low_map]), self.head(self.aspp(maps[-1]))
        return torch.cat([low, upsample(deep, low.shape[-2:])], dim=1), maps[-2]


class Predictor(nn.Module):
    """The paper's g: features (B, 2 * width, h, w) -> logits (B, K, h, w); also the auxiliary
    logits, or None."""

    def __init__(self, args: Args, num_classes: int, third_channels: int):
        super().__init__()
        w = args.width
        self.classifier = nn.Sequential(
            *conv_bn(2 * w, w, 3, bias=True),
            nn.Dropout2d(0.1),
            *conv_bn(w, w, 3, bias=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(w, num_classes, 1),
        )
        self.aux = (
            nn.Sequential(
                *conv_bn(third_channels, w, 3, bias=True),
                nn.Dropout2d(0.1),
                nn.Conv2d(w, num_classes, 1),
            )
            if args.aux
            else None
        )

    def forward(self, features: Tensor, third: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.classifier(features), self.aux(
            third
        ) if self.aux is not None and self.training else None


class SegNet(nn.Module):
    """DeepLabv3+, cut into f and g as in the paper: images -> float32 logits (B, K, h, w),
    auxiliary ones or None."""

    def __init__(self, args: Args, num_classes: int, bf16: bool = False):
        super().__init__()
        self.features = Features(args)
        self.predictor = Predictor(args, num_classes, self.features.third_channels)
        self.bf16 = bf16

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(
            "cuda" if images.is_cuda else "cpu", dtype=torch.bfloat16, enabled=self.bf16
        ):
            logits, aux = self.predictor(*self.features(images))
        return logits.float(), None if aux is None else aux.float()


# ======================================================================================== equations
def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1: logits (B, K, H, W) -> confidence c (B, H, W) in [0, 1] and its class (B, H, W)."""
    return tuple(logits.softmax(dim=1).max(dim=1))


def drop_threshold(conf: Tensor, valid: Tensor, drop: float) -> Tensor:
    """Sec. 4.2: the gamma_t of Eq. 2 that leaves out the `drop` share of least confident valid
    pixels. It is their k-th smallest confidence with k = floor(drop (n - 1)) + 1, so that `conf >
    gamma_t` equals numpy's percentile rule; -1 when `drop` is 0 or nothing is valid. `conf`,
    `valid` (B, H, W) of the whole batch -> ()."""
    # no kthvalue: k stays on the device
    ordered = torch.where(valid, conf, torch.inf).flatten().sort().values
    n = valid.sum()
    index = (drop * (n - 1).double()).floor().long().clamp(min=0)
    return torch.where(
        (n > 0) & (drop > 0), ordered.gather(0, index[None])[0], torch.full_like(ordered[0], -1)
    )


def pseudo_label(label: Tensor, conf: Tensor, valid: Tensor, gamma: Tensor | float) -> Tensor:
    """Eq. 2: the teacher's class where it is sure, ignore elsewhere and in padding. (B, H, W) ->
    (B, H, W)."""
    return label.masked_fill(~(valid & (conf > gamma)), IGNORE)


def reweight(
    conf: Tensor, keep: Tensor, tau: float, total: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Eq. 6: weights (B, H, W) in proportion to c + tau on kept pixels, 0 elsewhere; they sum to
    the kept count. `total` sums a tensor over all processes, so that the weights belong to the
    global batch."""
    raw = (conf + tau) * keep
    return raw * (total(keep.sum()) / total(raw.sum()).clamp(min=1e-12))


def unsupervised_loss(
    logits: Tensor, label: Tensor, weight: Tensor, share: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Eq. 7 divided by the number of kept pixels. DEPARTS[mean] logits (B, K, H, W); label, weight
    (B, H, W) -> (). `share` averages a count over processes, as DDP averages gradients: together
    they make the global mean."""
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # 0 where ignored
    # a mean count may be below 1
    return (weight * loss).sum() / share((label != IGNORE).sum()).clamp(min=1e-6)


def supervised_loss(
    logits: Tensor, label: Tensor, share: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Eq. 10 divided by the number of labeled pixels. DEPARTS[mean] logits (B, K, H, W), label (B,
    H, W) -> ()."""
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    return loss.sum() / share((label != IGNORE).sum()).clamp(min=1e-6)


def hard_pixels(
    logits: Tensor,
    label: Tensor,
    thresh: float,
    min_kept: int,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """OHEM: logits (B, K, H, W), label (B, H, W) -> label without its easy pixels. Hard is a
    true-class probability of at most `thresh`, or among the `min_kept` smallest of the batch; fewer
    valid pixels than that are all kept."""
    valid = label != IGNORE
    prob = logits.softmax(dim=1).gather(1, label.masked_fill(~valid, 0)[:, None])[:, 0]  # (B, H, W)
    ordered = gather(torch.where(valid, prob, torch.inf).flatten()).sort().values
    cut = ordered[min(min_kept, len(ordered)) - 1].clamp(min=thresh)  # inf when too few are valid
    return label.masked_fill(prob > cut, IGNORE)


def ema_decay(n: int, alpha: float) -> float:
    """The decay of the n-th update (n = 0, 1, ...): a plain mean at first, alpha in the end.
    DEPARTS[ramp]"""
    return min(1 - 1 / (n + 1), alpha)


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float, buffers: bool = False) -> None:
    """Eqs. 5, 9, 12: target <- decay * target + (1 - decay) * source, in place; `buffers`:
    BatchNorm statistics, too (counters are copied). DEPARTS[bn-ema]"""
    pairs = list(zip(target.parameters(), source.parameters(), strict=True))
    pairs += zip(target.buffers(), source.buffers(), strict=True) if buffers else ()
    mean = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in mean], [s for _, s in mean], 1 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


def cutmix_boxes(size: tuple[int, int], generators: list[np.random.Generator]) -> Tensor:
    """A box of half the image's area from each generator: (B, 4) rows of top, bottom, left, right.
    DEPARTS[cutmix]"""
    (height, width), boxes = size, []
    for g in generators:
        w = int(g.integers(max(width // 2, 1), max(width, 2)))
        h = min(round(height * width / 2 / w), height)
        top, left = int(g.integers(0, height - h + 1)), int(g.integers(0, width - w + 1))
        boxes.append((top, top + h, left, left + w))
    return torch.tensor(boxes)


def cutmix(boxes: Tensor, partner: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """Paste into image i, inside box i, what image partner[i] shows there: the same for images (B,
    C, H, W) and for labels, confidences and validity (B, H, W). Unmixed originals are pasted."""
    height, width = maps[0].shape[-2:]
    ys, xs = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    top, bottom, left, right = (b[:, None] for b in boxes.unbind(1))  # (B, 1) each
    rows, columns = (ys >= top) & (ys < bottom), (xs >= left) & (xs < right)  # (B, H), (B, W)
    inside = rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    return tuple(
        torch.where(inside[:, None] if m.dim() == 4 else inside, m[partner], m) for m in maps
    )


def poly(step: int, total: int) -> float:
    """Sec. 4.2: lr / lr_init = (1 - t / T)^0.9."""
    return max(0.0, 1 - step / total) ** 0.9


# ========================================================================================= training
@dataclass
class State:
    """All that training changes (saved whole), and the forward passes that DDP wraps."""

    student: SegNet
    teacher: SegNet | None  # no gradients, eval mode
    gta: SegNet | None  # the assistant
    opt_student: torch.optim.Optimizer
    opt_gta: torch.optim.Optimizer | None
    forward_student: Callable
    forward_gta: Callable | None
    # (of the student, of the assistant): what Eq. 9 averages
    transfer: list[tuple[nn.Module, nn.Module]]
    warmup: int  # steps on labels alone
    epoch: int  # steps per pass over the unlabeled images
    step: int = 0
    last: dict = field(default_factory=dict)  # network -> its newest score
    best: dict = field(default_factory=dict)  # network -> its best one

    def networks(self) -> dict[str, SegNet]:
        return {
            n: net for n in ("student", "teacher", "gta") if (net := getattr(self, n)) is not None
        }


class Pseudo(NamedTuple):
    """What the teacher made of the unlabeled batch: mixed images (B, 3, H, W); label (255: none),
    weight (B, H, W)."""

    images: Tensor
    label: Tensor
    weight: Tensor
    log: dict[str, Tensor]


def train_step(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """Algorithm 1, lines 3 to 12."""
    n = s.step - s.warmup
    # Step 1: the teacher labels the unlabeled images and weighs its labels
    pseudo = teach(s.teacher, unlabeled, args, s.step, world)  # Eqs. 1, 2, 6
    # Step 2: the assistant, and nobody else, learns from them, and hands over its feature extractor
    loss_u = loss_on(args.gta_data, s.forward_gta, labeled, pseudo, args, world)  # Eq. 7
    update(s.opt_gta, loss_u)  # Eq. 8
    for of_student, of_gta in s.transfer:
        ema_update(of_student, of_gta, ema_decay(n, args.alpha_gta))  # Eq. 9
    # Step 3: the student learns from human labels; the teacher follows it
    loss_l = loss_on(args.student_data, s.forward_student, labeled, pseudo, args, world)  # Eq. 10
    update(s.opt_student, loss_l)  # Eq. 11
    ema_update(s.teacher, s.student, ema_decay(n, args.alpha_teacher), buffers=True)  # Eq. 12
    return {"loss_l": loss_l.detach(), "loss_u": loss_u.detach(), **pseudo.log}


@torch.no_grad()
def teach(teacher: SegNet, unlabeled: Batch, args: Args, step: int, world: World) -> Pseudo:
    """Step 1: Eq. 1 on clean images, CutMix, Eq. 2, Eq. 6."""
    # Eq. 1
    conf, label = confidence(upsample(teacher(unlabeled.images)[0], unlabeled.images.shape[-2:]))
    images, valid, label, conf, truth = mix(
        args.cutmix,
        "u",
        args,
        step,
        world,
        unlabeled.images,
        unlabeled.valid,
        label,
        conf,
        unlabeled.label,
    )
    gamma = args.threshold or drop_threshold(world.gather(conf), world.gather(valid), args.drop)
    label = pseudo_label(label, conf, valid, gamma)  # Eq. 2
    keep = label != IGNORE
    # Eq. 6
    weight = (
        reweight(conf, keep, args.tau, world.sum) if args.reweight == "laplace" else keep.float()
    )
    log = {
        "conf": (conf * valid).sum() / valid.sum().clamp(min=1),
        "kept": keep.sum() / valid.sum().clamp(min=1),
    }
    if args.monitor_labels:  # watched, never learned from
        thing = keep & (truth != IGNORE) & ((truth > 0) | (label > 0))
        log["pseudo_acc"] = ((label == truth) & thing).sum() / thing.sum().clamp(min=1)
    return Pseudo(images, label, weight, log)


def loss_on(
    data: str, forward: Callable, labeled: Batch, pseudo: Pseudo | None, args: Args, world: World
) -> Tensor:
    """L_l (Eq. 10) on "labeled", mu L_u (Eq. 7) on "pseudo", their sum (Eq. 3) on "both", from one
    forward pass."""
    use_l, use_u = data != "pseudo", data != "labeled"
    joint = args.joint_bn and pseudo is not None  # see both batches, learn from one
    images = [labeled.images] * (use_l or joint) + ([pseudo.images] if use_u or joint else [])
    logits, aux = forward(torch.cat(images))  # (B or 2 B, K, h, w)
    b, size = len(labeled.images), labeled.images.shape[-2:]
    # DDP waits for every parameter's gradient
    loss = logits.new_zeros(()) if aux is None else 0 * aux.sum()
    if use_l:
        for z, weight in [(logits, 1.0)] + ([] if aux is None else [(aux, args.aux)]):
            z, label = upsample(z[:b], size), labeled.label
            if args.ohem:  # DEPARTS[cityscapes]
                label = hard_pixels(
                    z.detach(), label, args.ohem, OHEM_KEPT * args.batch_size, world.gather
                )
            loss = loss + weight * supervised_loss(z, label, world.mean)
    if use_u:
        loss = loss + args.mu * unsupervised_loss(
            upsample(logits[-b:], size), pseudo.label, pseudo.weight, world.mean
        )
    return loss


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One gradient step: Eqs. 4, 8, 11."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def warmup_step(s: State, labeled: Batch, args: Args, world: World) -> dict[str, Tensor]:
    """Sec. 4.2: labels alone. One network is trained; three equal copies trained alike would be the
    same."""
    loss = loss_on("labeled", s.forward_student, labeled, None, args, world)
    update(s.opt_student, loss)
    return {"loss_l": loss.detach()}


def mean_teacher_step(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """Table 4, row 2 (Sec. 3.1, Fig. 1b): the student learns from labels and pseudo labels, Eqs. 2
    to 5."""
    pseudo = teach(s.teacher, unlabeled, args, s.step, world)
    loss = loss_on("both", s.forward_student, labeled, pseudo, args, world)  # Eq. 3
    update(s.opt_student, loss)  # Eq. 4
    # Eq. 5
    ema_update(s.teacher, s.student, ema_decay(s.step - s.warmup, args.alpha_teacher), buffers=True)
    return {"loss": loss.detach(), **pseudo.log}


# ------------------------------------------------------------ the released loop, beside the paper's
def train_step_released(
    s: State, labeled: Batch, unlabeled: Batch, args: Args, world: World
) -> dict[str, Tensor]:
    """train_step as the released code has it; read it as a diff. Recipe and consequences:
    docs/gta_seg.md."""
    n, b, size = s.step - s.warmup, len(labeled.images), labeled.images.shape[-2:]
    if n < s.epoch:  # copied by reference, in every step of the first epoch
        alias(s.gta, s.student)
        alias(s.teacher, s.student)
    with torch.no_grad():
        label = confidence(upsample(s.teacher(unlabeled.images)[0], size))[1]  # first pass: labels
        images_u, label = mix(args.cutmix, "u", args, s.step, world, unlabeled.images, label)
        both = torch.cat([labeled.images, images_u])
        s.teacher.train()  # second pass, batch statistics and dropout on: confidence
        conf = confidence(upsample(s.teacher(both)[0][b:], size))[0]
        s.teacher.eval()
        # padding counts; the threshold is per process
        everywhere = torch.ones_like(conf, dtype=torch.bool)
        label = pseudo_label(label, conf, everywhere, drop_threshold(conf, everywhere, args.drop))
        keep = label != IGNORE
        raw = conf * keep + args.tau  # dropped pixels stay in the denominator of Eq. 6 with tau
        weight = raw / raw.sum() * keep.sum()
    loss_u = unsupervised_loss(upsample(s.forward_gta(both)[0][b:], size), label, weight)
    update(s.opt_gta, loss_u)
    ema_rebind(s.student.features, s.gta.features, ema_decay(n, args.alpha_gta))
    loss_l = supervised_loss(upsample(s.forward_student(both)[0][:b], size), labeled.label)
    update(s.opt_student, loss_l)
    ema_rebind(s.teacher, s.student, ema_decay(n, args.alpha_teacher))  # never the statistics
    return {
        "loss_l": loss_l.detach(),
        "loss_u": loss_u.detach(),
        "conf": conf.mean(),
        "kept": keep.float().mean(),
    }


def warmup_step_released(s: State, labeled: Batch, args: Args, world: World) -> dict[str, Tensor]:
    """The student is trained; teacher and assistant only see the images, which moves their
    BatchNorm statistics."""
    with torch.no_grad():
        for net in (s.teacher.train(), s.gta):
            net(labeled.images)
    s.teacher.eval()
    return warmup_step(s, labeled, args, world)


def alias(target: nn.Module, source: nn.Module) -> None:
    """Make the parameters of `target` share the storage of those of `source`: what `t.data =
    s.data` does."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data = s.data


def ema_rebind(target: nn.Module, source: nn.Module, decay: float) -> None:
    """ema_update on parameters that assigns new tensors, and so ends an alias."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data = t.data.clone().mul_(decay).add_(s.data, alpha=1 - decay)


def mix(
    probability: float, name: str, args: Args, step: int, world: World, *maps: Tensor
) -> tuple[Tensor, ...]:
    """CutMix a batch with `probability`, one coin per step for all processes. DEPARTS[cutmix]
    `name` is the stream, l or u. Coins and boxes depend on (seed, step, sample) alone. The partner
    of image i is its neighbour in the pair (i xor 1), on any number of processes; in the released
    recipe the next of the process."""
    if rng(args.seed, "cutmix", name, step).random() >= probability:
        return maps
    b, device = len(maps[0]), maps[0].device
    boxes = cutmix_boxes(
        maps[0].shape[-2:],
        [rng(args.seed, "box", name, step, world.rank * b + i) for i in range(b)],
    )
    partner = torch.arange(b).roll(-1) if args.recipe == "released" else torch.arange(b) ^ 1
    return cutmix(boxes.to(device, non_blocking=True), partner.to(device, non_blocking=True), *maps)


def prepare(batch: Batch, args: Args, world: World, step: int, mixed: float = 0) -> Batch:
    """To the device: normalised images, int64 labels; labeled batches are mixed here when asked
    for."""
    batch = batch.to(world.device)
    images = transforms.normalize(batch.images, batch.valid).contiguous(
        memory_format=torch.channels_last
    )
    images, valid, label = mix(
        mixed, "l", args, step, world, images, batch.valid, batch.label.long()
    )
    return Batch(images, valid, label, batch.skipped)


def augment(
    args: Args, image: Tensor, label: Tensor | None, generator: np.random.Generator
) -> tuple:
    """Scaling, flip and crop as in the released code; the paper names none. DEPARTS[open],
    DEPARTS[padding]"""
    image, label = transforms.random_scale(image, label, *args.scale, generator)
    image, label = transforms.random_flip(image, label, generator)
    return transforms.random_crop(
        image, label, args.crop_size, generator, IGNORE if args.recipe == "paper" else 0
    )


def sgd(net: SegNet, args: Args, world: World) -> torch.optim.SGD:
    """SGD as in Sec. 4.2; everything behind the backbone learns `decoder_lr` times faster.
    DEPARTS[open]: momentum"""
    f = net.features
    parts = [(f.backbone, 1.0)] + [
        (m, args.decoder_lr) for m in (f.aspp, f.head, f.low, net.predictor)
    ]
    groups = [
        {"params": list(m.parameters()), "lr": args.lr * x, "initial_lr": args.lr * x}
        for m, x in parts
    ]
    return torch.optim.SGD(
        groups, momentum=0.9, weight_decay=args.weight_decay, fused=world.device.type == "cuda"
    )


def set_lr(optimizer: torch.optim.Optimizer | None, factor: float) -> None:
    for group in optimizer.param_groups if optimizer else []:
        group["lr"] = group["initial_lr"] * factor


def backbone_weights(args: Args) -> dict[str, Tensor] | None:
    """The tensors that --weights names, a file's or the embedded data's own; None for imagenet and
    none."""
    if args.weights in ("imagenet", "none"):
        return None
    if args.weights == "shapes":
        return checkpoints.read_weights(shapes.pretrained(Path(args.root), args.backbone))
    return checkpoints.read_weights(Path(args.weights))


def find_data(args: Args, classes: list[str] | None = None) -> Segmentation:
    """The data set that --dataset and --root name; the embedded one is drawn on first use."""
    root = Path(args.root)
    if args.dataset == "shapes":
        root = shapes.make_voc(root / "voc")
    return semantic.find(args.dataset, root, args.val, classes)


def build(
    args: Args, num_classes: int, world: World, epoch: int = 1, train: bool = True
) -> tuple[State, list[str]]:
    """Networks, optimizers and forward passes of a method; also lines on weights that did not
    load."""
    weights, notes = backbone_weights(args) if train else None, []

    def network(name: str) -> SegNet:
        # three starts, tied later
        distributed.seed_torch(args.seed, name if args.recipe == "released" else "student")
        net = SegNet(
            args if train else replace(args, weights="none"),
            num_classes,
            world.bf16(args.precision),
        )
        if weights is not None:
            notes[:] = checkpoints.load_matching(net.features.backbone, weights, args.weights)
        net = distributed.sync_batchnorm(net, world).to(
            world.device, memory_format=torch.channels_last
        )
        if args.compile:
            net.compile()
        return net

    student = network("student")
    teacher = network("teacher").requires_grad_(False).eval() if args.method != "suponly" else None
    gta = network("gta") if args.method in ("gta", "unbiased-st") else None
    transfer = []
    if gta is not None:
        gta.predictor.aux = None  # it sees pseudo labels only. DEPARTS[cityscapes]
        parts = {"features": ["features"], "all": ["features", "predictor.classifier"], "none": []}[
            args.transfer
        ]
        transfer = [
            (student.get_submodule(p), gta.get_submodule(p)) for p in parts if args.method == "gta"
        ]
        if args.share_predictor:  # DEPARTS[share-predictor]
            alias(gta.predictor.classifier, student.predictor.classifier)
        if args.method == "unbiased-st":  # one f, two g: no EMA. DEPARTS[unbiased-st]
            alias(gta.features, student.features)
    parallel = partial(distributed.parallel, world=world) if train else lambda net: net
    return State(
        student=student,
        teacher=teacher,
        gta=gta,
        transfer=transfer,
        epoch=epoch,
        opt_student=sgd(student, args, world),
        opt_gta=None if gta is None else sgd(gta, args, world),
        forward_student=parallel(student),
        forward_gta=None if gta is None else parallel(gta),
        warmup=args.steps if args.method == "suponly" else round(args.warmup_epochs * epoch),
    ), notes


def end_of_warmup(s: State, args: Args) -> None:
    """Assistant and teacher start as copies, by value, of the warmed-up student. DEPARTS[warmup]
    The released loop ties parameters in its own step and never copies the statistics."""
    for net in (s.teacher, s.gta) if args.recipe == "paper" else ():
        if net is not None:
            net.load_state_dict(
                {k: v for k, v in s.student.state_dict().items() if k in net.state_dict()}
            )


# ======================================================================================= evaluation
def evaluate(
    networks: dict[str, SegNet], data: semantic.Segmentation, args: Args, world: World
) -> tuple[dict, list]:
    """Confusion counts (K, K) of each network, and rows of preview pictures (image, label,
    predictions).

    Sec. 4.2. Single scale, no flip, every image once on any number of processes; absent classes
    stay out of the mean. VOC and others: whole images, no padding scored. DEPARTS[whole-image]
    Cityscapes: sliding window, mean of logits."""

    def view(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (h, w), c = label.shape, args.crop_size
        # centre crop, padding scored as background
        if args.recipe == "released" and args.dataset == "voc":
            return transforms.crop(
                image, label, -((c - h) // 2), -((c - w) // 2), c, c, pad_label=0
            )
        return image, label, None

    images = semantic.score_loader(data.val, data, world, args.workers)
    logits_of = partial(predict_logits, window=args.window)
    return score_images(networks, logits_of, images, view, len(data.classes), world)


def predict_logits(net: SegNet, images: Tensor, window: int = 0) -> Tensor:
    """Normalised images (1, 3, H, W) -> logits (1, K, H, W): whole, or the mean over windows two
    thirds apart."""
    size = images.shape[-2:]
    if not window or max(size) <= window:
        return upsample(net.forward(images)[0], size)  # not compiled: every size would be once more
    stride, total, count = -(-window * 2 // 3), 0, images.new_zeros(1, 1, *size)
    tops, lefts = (
        [min(i, max(n - window, 0)) for i in range(0, max(n - window, 0) + stride, stride)]
        for n in size
    )
    for top, left in itertools.product(tops, lefts):
        part = images[:, :, top : top + window, left : left + window]
        border = (left, size[1] - left - part.shape[-1], top, size[0] - top - part.shape[-2])
        total = total + F.pad(upsample(net.forward(part)[0], part.shape[-2:]), border)
        count[:, :, top : top + window, left : left + window] += 1
    return total / count


# ============================================================================================= main
FLAGS_OF = {
    "gta": "gta_data student_data transfer share_predictor joint_bn",
    "gta released": "alpha_gta",
    "gta released unbiased-st": "gta_lr",
    "gta mt unbiased-st": "mu reweight threshold monitor_labels",
    "gta released mt unbiased-st": "alpha_teacher tau drop cutmix warmup_epochs",
    # methods -> flags that mean something to them
    "suponly gta mt unbiased-st": "aux ohem",
}


RANGES = dict.fromkeys(
    "alpha_gta alpha_teacher threshold cutmix cutmix_labeled ohem".split(), (0, 1)
) | {
    "crop_size": (16, 1e5),
    "width": (4, 4096),
    "scale": (0.01, 100),
    "drop": (0, 0.999),
    "aspp_rates": (1, 512),
}


def check(args: Args, world: World) -> None:
    """Refuse, before any work, what cannot run and flags that the method would ignore."""
    cli.check_ranges(args, RANGES)
    # CutMix pairs neighbours
    world.share(args.batch_size, multiple=1 if args.recipe == "released" else 2)
    if args.recipe == "released" and args.method != "gta":
        raise UserError(
            f"--recipe released is a loop of --method gta; --method {args.method} has the paper's only."
        )
    if args.ohem and args.crop_size**2 <= OHEM_KEPT:
        raise UserError(
            f"--ohem keeps {OHEM_KEPT:,} pixels an image at least, which is all of a crop of --crop-size "
            f"{args.crop_size}; take a larger one, or --ohem 0."
        )
    base, loop = (
        preset(args.dataset, args.recipe),
        "released" if args.recipe == "released" else args.method,
    )
    idle = {
        "tau": args.reweight == "none",
        "drop": args.threshold > 0,
        "alpha_gta": args.transfer == "none",
    }
    cli.check_meaning(args, base, loop, FLAGS_OF, idle)


def train(args: Args) -> dict:
    """One run, from the start or from its checkpoint, to results.json, whose contents are
    returned."""
    check(args, distributed.launched())
    data = find_data(args)
    chosen = semantic.choose(
        data, args.split, args.split_seed, args.unlabeled, "gta_seg", args.method != "suponly"
    )
    epoch, out = (
        max(len(chosen.unlabeled or chosen.labeled) // args.batch_size, 1),
        runs.default_out(SCRIPT, args),
    )
    steps = args.steps or round(args.epochs * epoch)
    args = replace(args, steps=steps, eval_every=args.eval_every or epoch, out=str(out))
    warmup = 0 if args.method == "suponly" else round(args.warmup_epochs * epoch)
    if args.steps <= warmup:
        raise UserError(
            f"--steps {args.steps} end in the warm-up ({warmup}); see also --epochs and --warmup-epochs."
        )
    resuming = runs.open_run(out, SCRIPT, args, args.resume, distributed.launched().main)
    world = distributed.start(args.device)
    s, notes = build(args, len(data.classes), world, epoch)
    state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT) if resuming else None
    if state is not None:
        restore(s, state, args)
    # Algorithm 1, Output
    networks, result = s.networks(), "student" if args.method == "suponly" else "teacher"
    run = runs.Run(
        out,
        SCRIPT,
        args,
        world,
        s.step,
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
        f"{args.method}, "
        f"{args.recipe} recipe: steps {s.step} to {args.steps}, warm-up {s.warmup}, {epoch} an epoch; in {out}",
    )

    streams = []
    for name, pictures, labels, start in [
        ("labeled", chosen.labeled, True, s.step),
        ("unlabeled", chosen.unlabeled, args.monitor_labels, max(s.step, s.warmup)),
    ]:
        views = semantic.Pictures(pictures, data, labels, partial(augment, args), args.seed, name)
        streams.append(
            loading.stream(views, args.batch_size, start, args.steps, world, args.workers)
        )
    loops = {
        "mt": (warmup_step, mean_teacher_step),
        "released": (warmup_step_released, train_step_released),
    }
    warm, step_of = loops.get(args.recipe, loops.get(args.method, (warmup_step, train_step)))
    s.student.train()
    for step in run.steps(s.step, args.steps):
        set_lr(s.opt_student, poly(step, args.steps))
        set_lr(s.opt_gta, poly(step, args.steps) if args.gta_lr == "poly" else 1)  # DEPARTS[gta-lr]
        labeled = prepare(next(streams[0]), args, world, step, args.cutmix_labeled)
        unlabeled = prepare(next(streams[1]), args, world, step) if step >= s.warmup else None
        # dropout: from (seed, step, process)
        distributed.seed_torch(args.seed, "step", step, world.rank)
        values = (
            warm(s, labeled, args, world)
            if unlabeled is None
            else step_of(s, labeled, unlabeled, args, world)
        )
        run.tally(step, values, labeled, unlabeled)
        distributed.average_buffers(world, *networks.values())
        s.step = step + 1
        if s.step == s.warmup:
            end_of_warmup(s, args)

        asked, scoring = run.asked(s.step), s.step % args.eval_every == 0 or s.step == args.steps
        if s.step % args.log_every == 0 or scoring:
            far = (
                {"f_distance": metrics.distance(s.student.features, s.gta.features)}
                if s.gta is not None
                else {}
            )
            run.log(s.step, lr=s.opt_student.param_groups[0]["lr"], **far)
        if scoring:
            counts, rows = evaluate(networks, data, args, world)
            s.last = {
                name: metrics.iou_record(c, data.classes, s.step) for name, c in counts.items()
            }
            s.best |= {
                n: r for n, r in s.last.items() if n not in s.best or r["miou"] > s.best[n]["miou"]
            }
            run.write(s.step, **{f"miou_{name}": r["miou"] for name, r in s.last.items()})
            if world.main:
                plots.strip(
                    rows, ["image", "label", *networks], out / "previews" / f"{s.step:07d}.png"
                )
            if s.best[result] is s.last[result]:
                run.save("best.pt", snapshot(s, args, data, optimizers=False))
        if scoring or asked or (args.save_every and s.step % args.save_every == 0):
            run.save("last.pt", snapshot(s, args, data))
        if asked and s.step < args.steps:
            run.leave(s.step)  # does not return

    facts = {
        "method": args.method,
        "recipe": args.recipe,
        "val": args.val,
        "split_fingerprint": chosen.fingerprint,
    }
    return run.finish(
        {name: {"last": s.last[name], "best": s.best[name]} for name in networks},
        facts,
        result,
        "miou",
    )


def snapshot(s: State, args: Args, data: semantic.Segmentation, optimizers: bool = True) -> dict:
    """What a checkpoint holds. best.pt has the networks without `optimizers`: to score and to
    predict."""
    state = {
        "settings": json.loads(json.dumps(vars(args))),
        "classes": data.classes,
        "step": s.step,
        "last": s.last,
        "best": s.best,
        "networks": {name: net.state_dict() for name, net in s.networks().items()},
    }
    both = {"opt_student": s.opt_student, "opt_gta": s.opt_gta} if optimizers else {}
    return state | {name: o.state_dict() for name, o in both.items() if o is not None}


def restore(s: State, state: dict, args: Args) -> None:
    """The reverse of `snapshot`, in place, so that shared storage stays shared."""
    s.step, s.last, s.best = state["step"], state["last"], state["best"]
    if args.recipe == "released" and "opt_gta" in state and s.step > s.warmup:
        alias(s.gta.predictor, s.student.predictor)  # tied in the first epoch, and so it stays
    for name, weights in state["networks"].items():
        checkpoints.load_exact(s.networks()[name], weights, state.get("path", "the checkpoint"))
    for name in ("opt_student", "opt_gta"):
        if name in state:
            getattr(s, name).load_state_dict(state[name])


def load(path: str, args: Args) -> tuple[dict[str, SegNet], dict, World]:
    """The networks of a checkpoint, built from the settings it holds."""
    state = checkpoints.load_checkpoint(Path(path), SCRIPT)
    world = distributed.start(args.device)
    s, _ = build(args, len(state["classes"]), world, train=False)
    restore(s, {k: v for k, v in state.items() if not k.startswith("opt_")}, args)
    return {name: net.eval() for name, net in s.networks().items()}, state, world


def score(args: Args) -> dict:
    """--eval: score a checkpoint's networks and write <checkpoint>.results.json."""
    networks, state, world = load(args.eval, args)
    data = find_data(args, state["classes"])
    counts, rows = evaluate(networks, data, args, world)
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
        plots.strip(rows, ["image", "label", *networks], Path(f"{args.eval}.previews.png"))
        runs.write_scores(
            Path(f"{args.eval}.results.json"),
            scores,
            facts,
            "miou",
            f"{len(data.val)} of {data.root}",
        )
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: index PNGs and overlays of images or folders into
    <checkpoint>.predictions/."""
    networks, state, world = load(args.predict[0], args)
    best, out = networks.get("teacher", networks["student"]), Path(f"{args.predict[0]}.predictions")
    predictions.predict_labels(
        args.predict[1:],
        out,
        state["classes"],
        lambda image: predict_logits(best, transforms.normalize(image), args.window),
        world,
    )


def settings(
    dataset: str = "voc", recipe: str = "paper", eval: str = "", predict: str = ""
) -> Args:
    """What the command line starts from: a preset, or the settings inside a checkpoint to score or
    predict with."""
    return (
        cli.saved_settings(Args, Path(eval or predict), SCRIPT)
        if eval or predict
        else preset(dataset, recipe)
    )


def main(args: Args) -> Any:
    try:
        return score(args) if args.eval else predict(args) if args.predict else train(args)
    finally:
        distributed.stop()


@torch.no_grad()
# many sizes: no time to try algorithms for each
@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def score_images(
    networks: dict[str, nn.Module],
    logits_of: Callable,
    images: Iterable,
    view: Callable,
    num_classes: int,
    world,
    previews: int = 6,
) -> tuple[dict[str, Tensor], list]:
    """Confusion counts (K, K) of each network over all processes' `images` (index, image, label),
    and preview rows.

    `view(image, label)` -> what is scored of it (image, label, valid or None); `logits_of(net, x)`
    maps a normalised (1, 3, H, W) to logits (1, K, H, W). Networks are scored in eval mode and left
    in the mode they came in."""
    counts = {name: torch.zeros(num_classes, num_classes, dtype=torch.int64) for name in networks}
    rows, modes = [], [(net, net.training) for net in networks.values()]
    for _, image, label in images:
        image, label, valid = view(image, label)
        x = normalize(
            image[None].to(world.device), None if valid is None else valid[None].to(world.device)
        )
        row = [image.permute(1, 2, 0).numpy(), plots.colour(label)] if len(rows) < previews else []
        for name, net in networks.items():
            prediction = logits_of(net.eval(), x).argmax(1)[0]
            counts[name] += confusion(prediction, label.to(prediction.device), num_classes)
            row += [plots.colour(prediction)] if len(rows) < previews else []
        rows += [row] if len(rows) < previews else []
    for net, training in modes:
        net.train(training)
    return {name: world.sum(c) for name, c in counts.items()}, rows


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=("dataset", "recipe", "eval", "predict"))
