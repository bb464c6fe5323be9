"""The GIST and RIST of Iterative Self-Training for Semi-Supervised Segmentation.
Teh, DeVries, Duke, Jiang, Aarabi, Taylor. CRV 2022. https://arxiv.org/abs/2103.17105

Self-training, repeated for many stages at one mix of human and pseudo labels (FIST), ends worse
than it began: one class spreads over the images. Stages that learn from human labels alone (L) or
pseudo labels alone (P) do better, along a path such as LPPLLLPPL. GIST finds one by beam search,
RIST draws some; a small development set picks among all stages of all paths. Weights follow from
the path alone, so each node is trained once, by whichever process is free.

    paper                                           this file
    Eq. 1     cross entropy on labels               cross_entropy
    Eq. 2     labels and pseudo labels, by alpha    refine_step
    Eq. 3     mean teacher of the consistency loss  ema_update
    Eqs. 4, 5 outputs and features of both          SegNet, refine_step
    Eqs. 6, 7, 8  consistency loss CL               consistency
    Eq. 9     Label Erase LE, and TS before it      pseudo_label
    Algorithm 1   GIST, the search                  gist
    Algorithm 2   RIST, the search                  rist_path, search_all
    Algorithm 1, lines 6 to 8    pseudo labels      label_images
    Algorithm 1, lines 9 to 12   K iterations       refine, refine_step, fit
    Algorithm 1, line 14         EVAL               score, dev_miou
    Sec. III-B    FIST; Fig. 6: batch-wise random   search_all, alpha_of
    Sec. IV       network, schedule, augmentation   SegNet, poly, augment
    Sec. IV       stage 0: labels, S4GAN, ClassMix  supervised_step, s4gan_step, classmix_step
    (not in the paper) nodes, shared and resumable  Tree, search_all

Shapes: B images, K classes, H x W pixels, h x w cells of stride 8. Suffix _l labeled, _u unlabeled,
_p pseudo-labeled. Lines marked DEPARTS[name] leave the paper or decide what it leaves open;
docs/gist_rist.md says why.

    torchrun --nproc_per_node 8 gist_rist.py --split 1/50 --weights resnet101COCO-41f33a49.pth    # VOC 2012
    python gist_rist.py --dataset shapes                      # embedded data, no download, CPU, minutes
"""

import hashlib
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import (
    backbones,
    checkpoints,
    cli,
    distributed,
    errors,
    files,
    loading,
    metrics,
    predictions,
    runs,
    semantic,
    splits,
    transforms,
)
from common.distributed import World, rng
from common.errors import UserError
from common.nodes import Nodes, claim, fingerprint
from common.semantic import Batch, Picture, Segmentation
from data import gist_report, shapes

SCRIPT, IGNORE, ROOT = "gist_rist.py", 255, ""  # ROOT is the path of stage 0


# ========================================================================================= settings
@dataclass
class Args:
    """GIST and RIST. --dataset picks the paper's numbers, other flags override them. DEPARTS: see
    docs."""

    # data and bookkeeping
    # what to train on; also picks the defaults
    dataset: Literal["voc", "cityscapes", "shapes", "folder"] = "voc"
    root: str = "datasets/voc"  # where the data lie, see data/README.md
    # labeled images: a published list (1/50, 1/20, 1/8), random:N, random:N%, or a list file
    split: str = "1/50"
    split_seed: int = 0  # which draw, for random splits
    unlabeled: str = ""  # folder or list of unlabeled images; empty: all other training images
    val: str = "val"  # name of the list or folder that is scored; nothing is chosen on it
    dev_size: int = 50  # labeled images that only choose stages and paths, Sec. IV. DEPARTS[dev]
    dev_reserve: int = 0  # images kept out of training for it, at least dev_size; 500 for Table III
    out: str = ""  # run folder; empty: runs/gist_rist-<dataset>-<split>-d<split seed>-s<seed>
    store: str = "runs/gist_rist-nodes"  # trained nodes, shared by runs, searches and processes
    resume: bool = False  # continue the run in --out; nodes in the store are never trained twice
    # initial weights, order of images, augmentation, RIST's draws; each node adds its path
    seed: int = 0
    workers: int = loading.default_workers()  # decoding processes per training process and stream
    # CPU threads of a process: sums, and so weights, differ in the last bit between numbers of them
    threads: int = 1
    device: str = "auto"  # auto, cpu, cuda
    precision: Literal["fp32", "bf16"] = "fp32"  # inside the network
    compile: bool = False  # torch.compile the networks
    eval_every: int = 1000  # steps of stage 0 between evaluations on the development set
    save_every: int = 500  # steps between checkpoints of a node in training
    log_every: int = 50  # steps between log lines
    # keep the weights of all nodes, not only of those which a search may still need
    keep_nodes: bool = False
    # score every node on val, too: to report (Fig. 1, Table II), never to choose
    val_every_stage: bool = False
    eval: str = ""  # evaluate this checkpoint, train nothing
    # checkpoint, then images or folders: write predictions
    predict: list[str] = field(default_factory=list)
    # write tables and pictures of this finished run, from its nodes, and train nothing
    report: str = ""

    # network (Sec. IV: DeepLabV2 from MS-COCO weights, all BatchNorm frozen)
    # the Caffe-style ResNet of COCO weights; or a timm name, else a torchvision one
    backbone: str = "caffe_resnet101"
    # a file of COCO weights; imagenet, none, shapes, or a file for another backbone
    weights: str = ""
    # channel order and scale. DEPARTS[pixels]
    pixels: Literal["auto", "bgr", "rgb", "imagenet"] = "auto"
    # load the file's classifier, too, where the classes agree. DEPARTS[init-head]
    init_head: bool = False
    # of timm and torchvision backbones; the Caffe-style one has 8
    output_stride: Literal[8, 16, 32] = 8
    # of the backbone's own stages, the last ones to leave out; -1: those without weights in the
    # file
    cut: int = -1
    aspp_rates: tuple[int, ...] = (6, 12, 18, 24)  # dilations, summed. DEPARTS[aspp]
    # BatchNorm; auto: live in stage 0 without weights. DEPARTS[bn]
    bn: Literal["auto", "frozen", "live"] = "auto"

    # optimisation (Sec. IV)
    batch_size: int = 8  # labeled images per step of a node, and as many unlabeled
    # of images and labels, before anything else; Cityscapes 0.5. DEPARTS[cityscapes]
    resize: float = 1
    crop_size: tuple[int, int] = (321, 321)  # height and width in training
    scale: tuple[float, float] = (0.5, 1.5)  # random resizing. DEPARTS[scale]
    lr: float = 2.5e-4  # of the backbone
    backbone_lr: float = 1  # times lr, for the backbone; older code does about 3. DEPARTS[lr]
    head_lr: float = 10  # times lr, for the classifier. DEPARTS[lr]
    weight_decay: float = 5e-4  # of SGD
    stage0_steps: int = 25_000  # of stage 0
    steps: int = 3000  # K, of each refinement stage; Cityscapes 4000
    stages: int = 9  # S

    # stage 0 (Table I)
    stage0: str = "supervised"  # supervised, s4gan, classmix, or a checkpoint to start from
    gan_lr: float = 1e-4  # S4GAN: of the discriminator. DEPARTS[s4gan]
    gan_gamma: float = 0.6  # S4GAN: score above which an image is trusted
    gan_fm: float = 0.1  # S4GAN: weight of feature matching
    gan_st: float = 1.0  # S4GAN: weight of self-training
    # ClassMix: confidence that counts for the weight. DEPARTS[classmix]
    mix_threshold: float = 0.968
    mix_alpha: float = 0.99  # ClassMix: EMA of the teacher
    mix_weight: float = 1.0  # ClassMix: weight of the unlabeled loss
    mix_colour: bool = False  # ClassMix: jitter and blur the mixed images

    # refinement (Sec. III) and the paper's tables
    # Figs. 1, 6; Table I
    search: tuple[Literal["fist", "gist", "rist", "batchwise", "path"], ...] = ("gist", "rist")
    # FIST: share of labels, Eq. 2; several: several paths. DEPARTS[fist]
    alpha: tuple[float, ...] = (0.75,)
    beam: int = 1  # GIST: G, Table IV
    trials: int = 2  # RIST: paths, Table II
    path: tuple[str, ...] = ()  # with --search path: paths such as LPPLLLPPL
    # RIST: draw again a path with more equal letters in a row; 0: off. DEPARTS[max-run]
    max_run: int = 0
    # RIST: paths share no nodes, not even equal beginnings: for a study of the spread
    independent: bool = False
    cl: float = 1.0  # weight of the consistency loss, Eq. 8; 0: none, Table V. DEPARTS[cl]
    cl_beta: float = 0.99  # EMA of its teacher, Eq. 3. DEPARTS[cl]
    cl_drop: float = 0.5  # dropout of Eqs. 6 and 7. DEPARTS[cl]
    # labeled and unlabeled images, or those that the stage learns from
    cl_on: Literal["both", "active"] = "both"
    # Label Erase, Eq. 9; 0: none, Table V; -1: 0.5 with --temp below 1, else 0.9. DEPARTS[le]
    phi: float = -1
    # T multiplies the logits before the confidence of Eq. 9; 1: none, Table V. DEPARTS[ts]
    temp: float = 0.2


PRESETS: dict[str, dict[str, Any]] = {
    "voc": {},
    "cityscapes": dict(
        root="datasets/cityscapes",
        batch_size=6,
        resize=0.5,
        crop_size=(256, 512),
        steps=4000,
        gan_lr=1e-5,
        gan_gamma=0.7,
        mix_colour=True,
    ),
    "shapes": dict(
        root="datasets/shapes",
        split="random:10",
        backbone="test_resnet",
        weights="shapes",
        bn="live",
        aspp_rates=(1, 2, 3, 4),
        resize=2,
        crop_size=(128, 128),
        scale=(0.75, 1.33),
        lr=0.001,
        phi=0.3,
        stage0_steps=200,
        eval_every=200,
        steps=300,
        stages=3,
        cl_on="active",
        val_every_stage=True,
    ),
    "folder": dict(
        root="datasets/folder", split="random:1/8", backbone="resnet50.tv_in1k", weights="imagenet"
    ),
}


# Table I
CITYSCAPES = {
    f"1/{n}": f"random:{m}" for n, m in ((50, 59), (30, 100), (20, 148), (8, 371), (4, 743))
}


def preset(dataset: str = "voc", **overrides: Any) -> Args:
    """The settings of a data set."""
    return Args(**(dict(dataset=dataset) | PRESETS[dataset] | overrides))


# ========================================================================================== network
def caffe_style(body: nn.Module) -> None:
    """Make a timm ResNet, in place, the one of DeepLabV2's COCO weights: ceil-mode pooling, strides
    on the first 1x1 convolution, stride 8 in all, and stages three and four dilated in all their
    blocks, the first included."""
    body.maxpool.ceil_mode = True
    for name, stride, dilation in (
        ("layer1", 1, 1),
        ("layer2", 2, 1),
        ("layer3", 1, 2),
        ("layer4", 1, 4),
    ):
        for i, block in enumerate(layer := getattr(body, name)):
            block.conv1.stride, block.conv2.stride = (stride if i == 0 else 1,) * 2, (1, 1)
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        layer[0].downsample[0].stride = (stride, stride)


CAFFE = ("caffe_resnet50", "caffe_resnet101", "caffe_resnet152")


# RGB
MEAN = {
    "voc": (122.67891434, 116.66876762, 104.00698793),
    "cityscapes": (73.15835921, 82.90891754, 72.39239876),
}


class SegNet(nn.Module):
    """DeepLabV2: RGB images (B, 3, H, W) in 0..255 -> float32 logits (B, K, h, w), and the features
    (B, C, h, w) before ASPP, Eqs. 4 and 5. With `frozen`, BatchNorm keeps its statistics and
    weights in every mode. DEPARTS[bn]"""

    def __init__(self, args: Args, num_classes: int, pretrained: bool = False):
        super().__init__()
        self.pixels, self.bf16, self.frozen = args.pixels, args.precision == "bf16", False
        caffe = args.backbone in CAFFE
        make = partial(
            backbones.build,
            args.backbone.removeprefix("caffe_"),
            32 if caffe else args.output_stride,
        )
        self.backbone, _, channels = make(pretrained)
        if args.cut > 0:
            self.backbone, _, channels = make(
                pretrained, out_indices=tuple(range(len(channels) - args.cut))
            )
        if caffe:
            caffe_style(self.backbone)
        conv = partial(nn.Conv2d, channels[-1], num_classes, 3)
        # DEPARTS[aspp]
        self.head = nn.ModuleList(conv(padding=rate, dilation=rate) for rate in args.aspp_rates)
        self.register_buffer(
            "mean",
            torch.tensor(MEAN.get(args.dataset, MEAN["voc"]))[:, None, None],
            persistent=False,
        )
        for branch in self.head:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def train(self, mode: bool = True) -> "SegNet":
        super().train(mode)
        for m in self.modules() if self.frozen else ():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval().requires_grad_(False)
        return self

    def scaled(self, images: Tensor, valid: Tensor | None) -> Tensor:
        """Pixels as the weights want them, padding 0, which is the mean colour. DEPARTS[pixels]"""
        if self.pixels == "imagenet":
            return transforms.normalize(images, valid)
        images = (
            (images.float() - self.mean).flip(1)
            if self.pixels == "bgr"
            else images.float() - self.mean
        )
        return images if valid is None else images * valid[:, None]

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(
            "cuda" if images.is_cuda else "cpu", dtype=torch.bfloat16, enabled=self.bf16
        ):
            f = self.backbone(
                self.scaled(images, valid).contiguous(memory_format=torch.channels_last)
            )[-1]
            return sum(branch(f) for branch in self.head).float(), f.float()


class Discriminator(nn.Module):
    """S4GAN's: class maps and image (B, K + 3, H, W) -> score in (0, 1) of each (B,), and features
    (B, 512)."""

    def __init__(self, num_classes: int):
        super().__init__()
        widths = (num_classes + 3, 64, 128, 256, 512)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in itertools.pairwise(widths))
        self.score = nn.Linear(512, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, conv in enumerate(self.convs):
            x = F.dropout2d(F.leaky_relu(conv(x), 0.2), 0.5, self.training and i < 3)
        return self.score(x := x.mean((2, 3)))[:, 0].sigmoid(), x


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) -> (B, K, *size), corners aligned."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


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


def initial(args: Args, num_classes: int) -> tuple[Args, dict[str, Tensor] | None, list[str]]:
    """--weights: the settings they imply (pixels, cut), the tensors of a SegNet or None, and lines
    for the user."""
    if args.dataset in ("voc", "cityscapes") and not args.weights:
        raise UserError(
            "The paper starts from MS-COCO weights: give the file resnet101COCO-41f33a49.pth (or another "
            "layout of docs/gist_rist.md) with --weights FILE, or start with --weights imagenet."
        )
    file, caffe, notes = args.weights not in ("", "none", "imagenet"), args.backbone in CAFFE, []
    weights = backbone_weights(args) if file else None
    if caffe and args.weights == "imagenet":
        weights = backbones.build(args.backbone.removeprefix("caffe_") + ".tv_in1k", 32, True)[
            0
        ].state_dict()
    # not torchvision's
    coco = caffe and file and not ("fc.weight" in weights and "layer1.0.conv1.weight" in weights)
    if args.cut < 0:
        last = [
            *SegNet(
                args, num_classes, args.weights == "imagenet" and not caffe
            ).backbone.named_children()
        ][-1][0]
        args = replace(
            args, cut=int(file and not caffe and not any(k.startswith(f"{last}.") for k in weights))
        )
    if args.pixels == "auto":
        args = replace(args, pixels="bgr" if coco else "imagenet")
    if weights is None:
        return args, None, notes
    distributed.seed_torch(args.seed, "student")
    net = SegNet(args, num_classes)
    if caffe:
        weights = {deeplab_name(name): value for name, value in weights.items()}
        own = {
            k: v.shape
            for k, v in net.backbone.state_dict().items()
            if not k.endswith("num_batches_tracked")
        }
        if lost := [k for k, shape in own.items() if k not in weights or weights[k].shape != shape]:
            raise UserError(
                f"{args.weights} lacks {len(lost)} tensors, such as {lost[0]}; layouts: docs/gist_rist.md"
            )
        head = {
            k.removeprefix("head."): weights.pop(k) for k in list(weights) if k.startswith("head.")
        }
        said = (
            f"; its classifier {head['0.weight'].std():.4f} in deviation (0.01: untrained)"
            if head
            else ""
        )
        notes.append(
            f"of {args.weights}: {'COCO, BGR 0 to 255' if coco else 'ImageNet, normalised RGB'}{said}"
        )
        if args.init_head and len(head.get("0.bias", ())) == num_classes:
            notes += checkpoints.load_matching(net.head, head, args.weights)
    notes += checkpoints.load_matching(net.backbone, weights, args.weights)
    return args, net.state_dict(), notes


# ======================================================================================== equations
def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Eq. 1, the mean over the batch's labeled pixels. DEPARTS[mean] (B, K, h, w), upsampled, and
    (B, H, W) -> ()."""
    logits = upsample(logits, label.shape[-2:])
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return loss / (label != IGNORE).sum().clamp(min=1)


def consistency(f: Tensor, f_teacher: Tensor, drop: float) -> Tensor:
    """Eqs. 6, 7, 8: mean |drop(pool(f)) - drop(pool(f*))|, masks drawn apart. (B, C, h, w) twice ->
    (). DEPARTS[cl]"""
    pooled, pooled_teacher = (F.dropout(x.mean((2, 3)), drop) for x in (f, f_teacher))
    return (pooled - pooled_teacher).abs().mean()


def pseudo_label(logits: Tensor, phi: float, temp: float) -> tuple[Tensor, Tensor]:
    """Eq. 9: the class where the confidence reaches `phi`, 255 elsewhere, and the confidence (B, H,
    W).

    The confidence is the softmax of `temp` times the logits: temperature scaling, which moves no
    argmax. DEPARTS[ts]"""
    conf, label = (temp * logits).softmax(dim=1).max(dim=1)
    return label.masked_fill(conf < phi, IGNORE), conf


@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Eq. 3: target <- decay * target + (1 - decay) * source, in place; BatchNorm statistics, too,
    where they move."""
    t, s = (
        [x for x in itertools.chain(net.parameters(), net.buffers()) if x.is_floating_point()]
        for net in (target, source)
    )
    torch._foreach_lerp_(t, s, 1 - decay)


def classmix_mask(label: Tensor, scores: Tensor) -> Tensor:
    """ClassMix: half of each image's classes, rounded down. label (B, H, W) with 255 for none,
    `scores` (B, K) random -> (B, H, W) bool, True on the classes with the smallest scores."""
    b, k = scores.shape
    present = (
        torch.zeros(b, k + 1, device=label.device).scatter_(1, label.clamp(max=k).flatten(1), 1)[
            :, :k
        ]
        > 0
    )
    rank = torch.where(present, scores, torch.inf).argsort(1).argsort(1)
    # 255 is never chosen
    chosen = F.pad((rank < present.sum(1, keepdim=True) // 2) & present, (0, 1))
    return chosen.gather(1, label.clamp(max=k).flatten(1)).view_as(label)


def minmax01(images: Tensor) -> Tensor:
    """S4GAN: the batch (B, 3, H, W), stretched to [0, 1] by its own extremes."""
    return (images - images.min()) / (images.max() - images.min()).clamp(min=1e-6)


def poly(step: int, total: int) -> float:
    """Sec. IV: lr / lr_0 = (1 - iter / max_iter)^0.9."""
    return max(0.0, 1 - step / total) ** 0.9


# =================================================================================== training steps
@dataclass
class State:
    """All that changes while a node is trained."""

    student: SegNet
    opt: torch.optim.Optimizer
    teacher: SegNet | None = None  # of CL, or of ClassMix; no gradients, eval mode
    critic: Discriminator | None = None  # of S4GAN
    opt_critic: torch.optim.Optimizer | None = None
    step: int = 0
    best: tuple[float, int] = (-1.0, 0)  # stage 0: the best development score so far, and its step

    def of(self, kind: type) -> dict[str, Any]:
        """The networks or the optimizers, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, kind)}


def refine_step(
    s: State,
    args: Args,
    path: str,
    alpha: float | None,
    step: int,
    labeled: Batch | None = None,
    pseudo: Batch | None = None,
) -> dict[str, Tensor]:
    """Algorithm 1, lines 10 and 11, with the consistency loss: one iteration on labels (alpha = 1),
    pseudo labels (alpha = 0) or both. Without a weight of its own, a batch serves the consistency
    loss alone."""
    # Fig. 6
    alpha = float(rng(args.seed, path, "alpha", step).random() > 0.5) if alpha is None else alpha
    loss, log = 0.0, {}
    for name, batch, weight in (("l", labeled, alpha), ("p", pseudo, 1 - alpha)):
        if batch is None or not (weight or (s.teacher is not None and args.cl_on == "both")):
            continue
        logits, f = s.student(batch.images, batch.valid)  # Eq. 4
        if weight:
            ent = cross_entropy(logits, batch.label)  # Eq. 1
            loss = loss + weight * ent  # Eq. 2
            log[f"loss_{name}"] = ent.detach()
        if s.teacher is not None:
            with torch.no_grad():
                f_teacher = s.teacher(batch.images, batch.valid)[1]  # Eq. 5
            distance = consistency(f, f_teacher, args.cl_drop)  # Eqs. 6, 7, 8
            loss = loss + args.cl * distance
            log |= {f"cl_{name}": distance.detach(), f"mean_{name}": f.detach().mean()}
    update(s.opt, loss)
    if s.teacher is not None:
        ema_update(s.teacher, s.student, args.cl_beta)  # Eq. 3
    return {"loss": loss.detach(), **log}


def supervised_step(s: State, args: Args, step: int, labeled: Batch) -> dict[str, Tensor]:
    """Stage 0 on labels alone: Eq. 1."""
    loss = cross_entropy(s.student(labeled.images, labeled.valid)[0], labeled.label)
    update(s.opt, loss)
    return {"loss": loss.detach()}


def s4gan_step(
    s: State, args: Args, step: int, labeled: Batch, unlabeled: Batch, again: Batch
) -> dict[str, Tensor]:
    """Stage 0 with S4GAN (Mittal et al. 2019): cross entropy, feature matching, and self-training
    on images whose prediction the discriminator trusts; then its own step. `again` is a second
    labeled batch. DEPARTS[s4gan]"""
    loss_l = cross_entropy(s.student(labeled.images, labeled.valid)[0], labeled.label)
    # (B, K, H, W)
    z = upsample(s.student(unlabeled.images, unlabeled.valid)[0], labeled.label.shape[-2:])
    # ignored: 0
    maps = F.one_hot(again.label.clamp(max=z.shape[1]), z.shape[1] + 1)[..., :-1].permute(
        0, 3, 1, 2
    )
    real = torch.cat([maps.float(), minmax01(again.images)], dim=1)
    fake = torch.cat(
        [z.softmax(dim=1) * unlabeled.valid[:, None], minmax01(unlabeled.images)], dim=1
    )
    s.critic.requires_grad_(False)
    trust, v_fake = s.critic(fake)
    loss_fm = (s.critic(real)[1].mean(0) - v_fake.mean(0)).abs().mean()
    chosen = (trust > args.gan_gamma)[:, None, None] & unlabeled.valid & (step > 0)  # whole images
    loss_st = cross_entropy(z, z.detach().argmax(1).masked_fill(~chosen, IGNORE))
    update(s.opt, loss_l + args.gan_fm * loss_fm + args.gan_st * loss_st)
    s.critic.requires_grad_(True)
    loss_d = (
        sum(
            F.binary_cross_entropy(s.critic(x)[0], torch.full_like(trust, is_real))
            for x, is_real in ((fake.detach(), 0), (real, 1))
        )
        / 2
    )
    update(s.opt_critic, loss_d)
    return {
        "loss": loss_l.detach(),
        "loss_fm": loss_fm.detach(),
        "loss_st": loss_st.detach(),
        "loss_d": loss_d.detach(),
        "trusted": (trust > args.gan_gamma).float().mean(),
    }


def classmix_step(
    s: State, args: Args, step: int, labeled: Batch, unlabeled: Batch
) -> dict[str, Tensor]:
    """Stage 0 with ClassMix (Olsson et al. 2021): half of the classes of image i, cut out by the
    teacher's prediction, are pasted into image i + 1; the student learns the mixed prediction,
    weighted by how sure it is."""
    loss_l = cross_entropy(s.student(labeled.images, labeled.valid)[0], labeled.label)
    with torch.no_grad():
        probs = upsample(
            s.teacher(unlabeled.images, unlabeled.valid)[0], labeled.label.shape[-2:]
        ).softmax(dim=1)
        scores = rng(args.seed, "classmix", step).random(probs.shape[:2], dtype=np.float32)
        seen = probs.argmax(1).masked_fill(~unlabeled.valid, IGNORE)
        # (B, H, W)
        mask = classmix_mask(seen, torch.from_numpy(scores).to(seen.device, non_blocking=True))
        images, valid, probs = (
            torch.where(mask[:, None] if x.dim() == 4 else mask, x, x.roll(-1, 0))
            for x in (unlabeled.images, unlabeled.valid, probs)
        )
        conf, label = probs.max(dim=1)
        # one number a batch
        weight = ((conf >= args.mix_threshold) & valid).sum() / valid.sum().clamp(min=1)
        if args.mix_colour:
            images = transforms.jitter_and_blur(images, rng(args.seed, "colour", step))
    # DEPARTS[padding]
    loss_u = weight * cross_entropy(s.student(images, valid)[0], label.masked_fill(~valid, IGNORE))
    update(s.opt, loss_l + args.mix_weight * loss_u)
    ema_update(s.teacher, s.student, min(1 - 1 / (step + 1), args.mix_alpha))
    return {"loss": loss_l.detach(), "loss_u": loss_u.detach(), "sure": weight}


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Algorithm 1, line 11: one gradient step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def sgd(net: SegNet, args: Args) -> torch.optim.SGD:
    """Sec. IV; every parameter once, the classifier learns `head_lr` times faster. DEPARTS[lr]"""
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr": args.lr * times}
        for part, times in ((net.backbone, args.backbone_lr), (net.head, args.head_lr))
    ]
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)


def resized(args: Args, image: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images and labels as they are trained on and scored: --resize times their size on disk."""
    if args.resize == 1:
        return image, label
    size = tuple(round(side * args.resize) for side in image.shape[-2:])
    picture = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    return picture.round().clamp(0, 255).byte(), None if label is None else transforms.resize(
        image, label, size
    )[1]


def augment(
    args: Args, image: Tensor, label: Tensor | None, generator: np.random.Generator
) -> tuple:
    """Sec. IV: random resizing, flip, crop. What is padded carries no label. DEPARTS[padding]"""
    image, label = transforms.random_scale(*resized(args, image, label), *args.scale, generator)
    image, label = transforms.random_flip(image, label, generator)
    return transforms.random_crop(image, label, args.crop_size, generator)


# ========================================================================================= searches
def tokens(path: str) -> list[str]:
    """LPF0.75B -> [L, P, F0.75, B], a token a stage: L labels, P pseudo labels, Fa both by alpha, B
    batch-wise. T3LP is LP of trial 3 alone, see --independent."""
    return re.findall(r"T\d+[LP]|[LPB]|F\d*\.\d+", path)


def parent_of(path: str) -> str:
    return "".join(tokens(path)[:-1])


def prefixes(path: str) -> list[str]:
    """LPP -> [L, LP, LPP]."""
    return list(itertools.accumulate(tokens(path)))


def alpha_of(token: str) -> float | None:
    """Share of labels in the loss of a stage, Eq. 2; None for batch-wise, where each iteration
    draws it."""
    return (
        None if token == "B" else float(token[1:]) if token[0] == "F" else float(token[-1] == "L")
    )


# A search yields the nodes that it needs next, trained in any order by any process, and goes on
# with their scores.
def gist(tree: "Tree", args: Args) -> Iterator[list[str]]:
    """Algorithm 1: beam search with G = --beam. Children start from copies of their parent.
    DEPARTS[copies]"""
    beam = [ROOT]  # line 1
    for _ in range(args.stages):  # line 2
        kids = [theta + letter for theta in beam for letter in "LP"]  # lines 4, 5: alpha = 1 and 0
        yield kids  # lines 6 to 14
        beam = sorted(kids, key=tree.order)[: args.beam]  # lines 17, 18


def rist_path(args: Args, trial: int) -> str:
    """The path of one RIST: Algorithm 2, line 2, for each stage. With `max_run`, too uniform ones
    are drawn again."""
    generator = rng(args.seed, "rist", trial)
    while True:
        path = "".join("L" if u > 0.5 else "P" for u in generator.random(args.stages))
        if not args.max_run or gist_report.longest_run(path) <= args.max_run:
            return f"T{trial}{path}" if args.independent else path


def search_all(tree: "Tree", args: Args) -> dict[str, list[str]]:
    """Run all searches side by side -> the nodes that each visited, stage 0 first. Every process
    runs this function and trains any node whose parent is there and which nobody else trains; who
    trains what makes no difference."""
    known = {
        "rist": [rist_path(args, trial) for trial in range(args.trials)],
        "path": args.path,
        "batchwise": ["B" * args.stages],
    }  # Fig. 6
    for alpha in args.alpha:  # Sec. III-B
        token = {0: "P", 1: "L"}.get(alpha, f"F{alpha:.9f}".rstrip("0"))
        known["fist" if len(args.alpha) == 1 else f"fist {alpha:g}"] = [token * args.stages]
    active = {"gist": gist(tree, args)} if "gist" in args.search else {}
    for name in (n for n in known if n.split()[0] in args.search):
        active[name] = iter([[node for path in known[name] for node in prefixes(path)]])
    visited, wanted = {name: [ROOT] for name in active}, {name: [] for name in active}
    while True:
        for name in list(active):
            while name in active and all(map(tree.store.done, wanted[name])):
                wanted[name] = list(dict.fromkeys(next(active[name], [])))
                visited[name] += wanted[name]
                if not wanted[name]:
                    del active[name]
        pending = list(
            dict.fromkeys(p for name in active for p in wanted[name] if not tree.store.done(p))
        )
        # each has its own
        start = distributed.launched().rank * len(pending) // distributed.launched().size
        ready = dict.fromkeys(
            tree.store.first_to_make(parent_of(p)) or p for p in pending[start:] + pending[:start]
        )
        tree.prune(
            {tree.best(nodes) for nodes in visited.values()}
            | {*ready, *map(parent_of, [*ready, *pending])}
            | {p for p in wanted.get("gist", []) if tree.store.done(p)}
        )
        if not active:
            return visited
        any(tree.store.make_if_free(p, tree.train) for p in ready) or tree.wait()


# ================================================================================ the tree of nodes
@dataclass
class Tree:
    """What the nodes of a run share. A node's folder holds, beside what common/nodes.py says,
    scores.npz, log.jsonl, config.json, its score on val and, while it is trained, last.pt."""

    args: Args
    world: World  # of this process alone
    data: semantic.Segmentation
    labeled: list[Picture]
    pool: list[Picture]  # unlabeled, without the development images
    dev: list[Picture]  # the first dev_size of them choose
    store: Nodes = field(default_factory=lambda: Nodes(Path(), Path(), parent_of))
    init: dict[str, Tensor] | None = None  # weights to start stage 0 from
    run: runs.Run | None = None  # of the node in training: it hears signals

    def dev_of(self, path: str, size: int = 0) -> float:
        """mIoU of a node on the first `size` (0: dev_size) development images."""
        return self.store.record(path)["dev"][str(size or self.args.dev_size)]

    def order(self, path: str, size: int = 0) -> tuple:
        """Sorts nodes: best on the development images first, then the earlier stage, then the
        name."""
        return -self.dev_of(path, size), len(tokens(path)), path

    def best(self, paths: list[str], size: int = 0) -> str:
        """Sec. IV: the stage and path that the development images choose, stage 0 included.
        DEPARTS[pick]"""
        return min(filter(self.store.done, paths), key=partial(self.order, size=size))

    def weights(self, path: str) -> dict[str, Tensor]:
        """The weights of a node; UserError when they are not those that were scored."""
        state = checkpoints.load_checkpoint(self.store.folder(path) / "weights.pt", SCRIPT)[
            "networks"
        ]["student"]
        self.store.records.pop(path, None)  # another process may have trained it again
        if fingerprint(state) != self.store.record(path)["weights"]:
            raise errors.RankError(
                f"The weights in {self.store.folder(path)} are not those that were scored; remove "
                f"this folder, and the same command trains them again."
            )
        return state

    def train(self, path: str) -> None:
        train_stage0(self) if path == ROOT else refine(self, path)

    def wait(self) -> None:
        """Other processes train all that this one could: look again soon."""
        if self.run is not None and self.run.signal:
            raise errors.Stopped(
                f"Stopped by {self.run.signal} between two nodes; continue with --resume."
            )
        time.sleep(0.2)

    def prune(self, needed: set[str]) -> None:
        """The main process removes weights and pseudo labels that the searches of this run do not
        need any more."""
        main = distributed.launched().main
        for path in [*self.store.records] if main and self.args.val_every_stage else ():
            # of a run that did not ask for the score
            if (self.store.folder(path) / "weights.pt").is_file():
                val_record(self, path)
        for path in set(self.store.records) - needed if main and not self.args.keep_nodes else ():
            if path != ROOT:
                (self.store.folder(path) / "weights.pt").unlink(missing_ok=True)
            shutil.rmtree(self.store.others / f"labels-{path}", ignore_errors=True)

    def network(self, weights: dict[str, Tensor] | None, frozen: bool = True) -> SegNet:
        """A student with these weights, or with those that --weights implies and a fresh
        classifier."""
        distributed.seed_torch(self.args.seed, "student")
        net = SegNet(
            self.args, len(self.data.classes), self.args.weights == "imagenet" and weights is None
        )
        if weights is not None:
            net.load_state_dict(weights)
        net = net.to(self.world.device, memory_format=torch.channels_last)
        if self.args.compile:
            net.compile()
        net.frozen = frozen
        return net.train()

    def stream(
        self, path: str, name: str, pictures: list[Picture], start: int, total: int
    ) -> Iterator[Batch]:
        """Batches of a node: their order and augmentation follow from (seed, path, step,
        sample)."""
        # ours are class indices
        data = replace(self.data, to_class=None) if name == "pseudo" else self.data
        views = semantic.Pictures(
            pictures, data, True, partial(augment, self.args), self.args.seed, f"{path} {name}"
        )
        for batch in loading.stream(
            views, self.args.batch_size, start, total, self.world, self.args.workers
        ):
            batch = batch.to(self.world.device)
            yield batch._replace(images=batch.images.float(), label=batch.label.long())


# ================================================================================== training a node
def train_stage0(tree: Tree) -> None:
    """Stage 0, theta_0 of Algorithm 1: --stage0, the best of its evaluations on the development
    images."""
    args, classes = tree.args, len(tree.data.classes)
    if args.stage0 not in STAGE0:
        net = tree.network(tree.init)
        checkpoints.load_exact(net, checkpoints.read_weights(Path(args.stage0)), args.stage0)
        return finish(tree, ROOT, net, {"step": 0, "steps": 0})
    frozen = args.bn == "frozen" or (args.bn == "auto" and args.weights not in ("", "none"))
    net = tree.network(tree.init, frozen)
    s = State(net, sgd(net, args))
    feeds = {"labeled": tree.labeled} | (
        {} if args.stage0 == "supervised" else {"unlabeled": tree.pool}
    )
    if args.stage0 == "classmix":
        s.teacher = tree.network(net.state_dict(), frozen).requires_grad_(False).eval()
    if args.stage0 == "s4gan":
        distributed.seed_torch(args.seed, "critic")
        s.critic, feeds["again"] = Discriminator(classes).to(tree.world.device), tree.labeled
        s.opt_critic = torch.optim.Adam(s.critic.parameters(), args.gan_lr, betas=(0.9, 0.99))
    streams = {name: partial(tree.stream, ROOT, name, pictures) for name, pictures in feeds.items()}
    fit(tree, ROOT, s, partial(STAGE0[args.stage0], s, args), streams, args.stage0_steps)
    s.student.load_state_dict(
        checkpoints.load_checkpoint(tree.store.root / "best.pt", SCRIPT)["networks"]["student"]
    )
    finish(tree, ROOT, s.student, {"step": s.best[1], "steps": args.stage0_steps})


STAGE0 = {"supervised": supervised_step, "s4gan": s4gan_step, "classmix": classmix_step}


def refine(tree: Tree, path: str) -> None:
    """A refinement stage, the only step of every search: K iterations on labels or pseudo labels,
    from a copy of the parent's weights. Optimizer, schedule and mean teacher start afresh.
    DEPARTS[restart]"""
    args, parent, alpha = tree.args, parent_of(path), alpha_of(tokens(path)[-1])
    theta, facts, streams = tree.weights(parent), {"step": args.steps, "steps": args.steps}, {}
    net, teacher = (tree.network(theta, frozen=args.bn != "live") for _ in range(2))
    s = State(net, sgd(net, args), teacher.requires_grad_(False).eval() if args.cl else None)
    both = args.cl > 0 and args.cl_on == "both"  # then CL sees labeled and unlabeled images
    if alpha != 0 or both:
        streams["labeled"] = partial(tree.stream, path, "labeled", tree.labeled)
    if alpha != 1:
        pictures, facts["labels"] = label_images(tree, parent)
        streams["pseudo"] = partial(tree.stream, path, "pseudo", pictures)
    elif both:
        streams["pseudo"] = partial(tree.stream, path, "unlabeled", tree.pool)
    fit(tree, path, s, partial(refine_step, s, args, path, alpha), streams, args.steps)
    finish(tree, path, s.student, facts | {"parent": fingerprint(theta)})


def fit(
    tree: Tree, path: str, s: State, step_of: Callable, streams: dict[str, Callable], total: int
) -> None:
    """Algorithm 1, lines 9 to 12: the iterations of a node, from its own checkpoint when it was
    stopped before."""
    args, folder, heard = tree.args, tree.store.folder(path), tree.run.signal if tree.run else ""
    state = (
        checkpoints.load_checkpoint(folder / "last.pt", SCRIPT)
        if (folder / "last.pt").is_file()
        else None
    )
    if state is not None:
        s.step, s.best = state["step"], tuple(state["best"])
        for name, part in (s.of(nn.Module) | s.of(torch.optim.Optimizer)).items():
            part.load_state_dict({**state["networks"], **state["optimizers"]}[name])
    tree.run = run = runs.Run(folder, SCRIPT, args, tree.world, s.step, state, {"path": path})
    run.signal = heard
    feeds = {name: make(s.step, total) for name, make in streams.items()}
    s.student.train()
    for step in run.steps(s.step, total):
        for group in itertools.chain(
            *(opt.param_groups for opt in s.of(torch.optim.Optimizer).values())
        ):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * poly(step, total)
        batches = {name: next(feed) for name, feed in feeds.items()}
        # dropout follows from (seed, path, step)
        distributed.seed_torch(args.seed, path, "step", step)
        run.tally(step, step_of(step, **batches), *batches.values())
        s.step = step + 1
        asked = run.asked(s.step)
        if s.step % args.log_every == 0 or s.step == total:
            run.log(s.step, lr=s.opt.param_groups[0]["lr"])
        if path == ROOT and (s.step % args.eval_every == 0 or s.step == total):
            dev = dev_miou(score(tree, s.student, tree.dev[: args.dev_size])["counts"])
            run.write(s.step, dev_miou=dev)
            if dev > s.best[0]:
                s.best = (dev, s.step)
                run.save("best.pt", snapshot(tree, s.student, s.step))
            s.student.train()
        if asked or s.step % args.save_every == 0 or s.step == total:
            run.save(
                "last.pt",
                snapshot(tree, s.student, s.step)
                | {
                    "best": s.best,
                    "networks": {name: net.state_dict() for name, net in s.of(nn.Module).items()},
                    "optimizers": {
                        name: opt.state_dict() for name, opt in s.of(torch.optim.Optimizer).items()
                    },
                },
            )
        if asked:
            run.leave(s.step)  # does not return


def snapshot(tree: Tree, net: SegNet, step: int) -> dict:
    """What a checkpoint holds, so that every node can be scored, predicted with and refined."""
    return {
        "settings": json.loads(json.dumps(vars(tree.args))),
        "classes": tree.data.classes,
        "step": step,
        "networks": {"student": net.state_dict()},
    }


def finish(tree: Tree, path: str, net: SegNet, facts: dict) -> None:
    """Algorithm 1, lines 13 and 14: weights, scores and, as the mark that it is done, the record of
    a node."""
    folder, seconds = tree.store.folder(path), tree.run.seconds if tree.run else 0.0
    checkpoints.save_checkpoint(folder / "weights.pt", SCRIPT, snapshot(tree, net, facts["step"]))
    np.savez_compressed(folder / "scores.npz", **(found := score(tree, net, tree.dev)))
    if tree.args.val_every_stage:
        val_record(tree, path, net)
    record = {
        "path": path,
        "stage": len(tokens(path)),
        **facts,
        "seconds": round(seconds, 2),
        "weights": fingerprint(net.state_dict()),
        "device": tree.world.device.type,
        # Table III
        "dev": {str(n): dev_miou(found["counts"][:n]) for n in range(1, len(tree.dev) + 1)},
    }
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    tree.store.finish(path, record)
    print(
        f"{path or 'stage 0'}: dev {tree.dev_of(path):.2f}, {facts['steps']} steps in {seconds:.0f} s",
        gist_report.erased(facts.get("labels"), tree.args.phi),
        flush=True,
    )


# ===================================================================================== whole images
@torch.no_grad()
def forward_all(tree: Tree, net: SegNet, pictures: list[Picture], labels: bool) -> Iterator[tuple]:
    """Whole pictures, single scale, no flip: index, label (H, W) or None, logits (K, H, W) and size
    on disk of each, neighbours of one size in one pass. A picture without label that cannot be read
    is left out."""
    net.eval()
    loader, group, room = (
        semantic.score_loader(pictures, tree.data, tree.world, tree.args.workers, labels),
        [],
        0,
    )
    for index, image, label in itertools.chain(loader, [(-1, None, None)]):
        if group and (image is None or image.shape[-2:] != group[0][3] or len(group) == room):
            images = torch.stack([x for _, x, _, _ in group]).to(tree.world.device)
            # many sizes: not the compiled one
            logits = upsample(net.forward(images)[0], images.shape[-2:])
            yield from ((i, y, z, size) for (i, _, y, size), z in zip(group, logits, strict=True))
            group = []
        if image is not None:
            room = min(max(2**21 // image[0].numel(), 1), 16)  # images in a pass, by their size
            group.append((index, *resized(tree.args, image, label), image.shape[-2:]))


# hundreds of sizes: no time to try algorithms
@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def label_images(tree: Tree, path: str) -> tuple[list[Picture], dict]:
    """Algorithm 1, lines 6 to 8: pseudo labels of all unlabeled images from the node `path`, once
    for all its children, as index PNGs of the images' size -> the pictures with them, and what they
    look like. DEPARTS[le]"""
    target, args, counts = tree.store.others / f"labels-{path}", tree.args, np.zeros(256, np.int64)
    with claim(target.with_name(f".{target.name}"), wait=True):
        if not target.is_dir():
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for i, _, logits, size in forward_all(
                tree, tree.network(tree.weights(path)), tree.pool, labels=False
            ):
                label = pseudo_label(logits[None], args.phi, args.temp)[0].byte()
                label = (
                    F.interpolate(label[None], size=size, mode="nearest-exact")[0, 0].cpu().numpy()
                )
                counts += np.bincount(label.flatten(), minlength=256)
                Image.fromarray(label).save(temporary / f"{i}.png", compress_level=1)
            if not counts.any():
                raise errors.RankError(
                    f"None of the {len(tree.pool)} images can be read, such as {tree.pool[0].image}."
                )
            kept, total = counts[:IGNORE], max(counts[:IGNORE].sum(), 1)
            stats = {
                "kept": float(kept.sum() / counts.sum()),
                "dominant": float(kept.max() / total),
                "share": (kept[: len(tree.data.classes)] / total).tolist(),
            }
            (temporary / "stats.json").write_text(json.dumps(stats))
            temporary.rename(target)
    stats, found = (
        json.loads((target / "stats.json").read_text()),
        {int(p.stem) for p in target.glob("*.png")},
    )
    return [
        Picture(p.name, p.image, target / f"{i}.png") for i, p in enumerate(tree.pool) if i in found
    ], stats


@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def score(tree: Tree, net: SegNet, pictures: list[Picture]) -> dict[str, np.ndarray]:
    """EVAL of Algorithm 1: `counts` (n, K, K) of each picture; of the first six also `maskN`, the
    predictions (Figs. 2, 8, 9), and `confidence` (2, 50), histograms at T = 1 and --temp (Fig.
    5)."""
    counts, found = (
        [],
        {"temps": np.array([1, tree.args.temp]), "confidence": np.zeros((2, 50), np.int64)},
    )
    for i, label, logits, _ in forward_all(tree, net, pictures, labels=True):
        prediction = logits.argmax(0)
        counts.append(
            metrics.confusion(
                prediction, label.to(prediction.device), len(tree.data.classes)
            ).numpy()
        )
        if i < 6:
            found[f"mask{i}"] = prediction.byte().cpu().numpy()
            conf = torch.stack(
                [pseudo_label(logits[None], 0, temp)[1] for temp in found["temps"].tolist()]
            ).cpu()
            found["confidence"] += (
                torch.stack([torch.histc(c, 50, 0, 1) for c in conf]).long().numpy()
            )
    return found | {"counts": np.stack(counts)}


def dev_miou(counts: np.ndarray) -> float:
    """Mean IoU in percent, over the classes that occur in the labels, of (n, K, K) counts.
    DEPARTS[dev]"""
    total = torch.from_numpy(counts.sum(0))
    return round(metrics.iou(total)[total.sum(1) > 0].mean().item(), 4)


def val_record(tree: Tree, path: str, net: SegNet | None = None) -> dict:
    """`miou` and `iou` of a node on --val, kept in its folder. Nothing is ever chosen by them."""
    file = tree.store.folder(path) / f"val-{tree.args.val}.json"
    if not file.is_file():
        counts = score(tree, net or tree.network(tree.weights(path)), tree.data.val)["counts"]
        files.write_text(
            file,
            json.dumps(metrics.iou_record(torch.from_numpy(counts.sum(0)), tree.data.classes, 0)),
        )
    return json.loads(file.read_text())


# ============================================================================================= main
# What shapes no weights: flags that choose nodes, and bookkeeping. What shapes stage 0 alone, or
# all but stage 0.
SEARCHES = "search alpha beam trials path stages max_run independent dev_size dev_reserve".split()


BOOKKEEPING = (
    "root split split_seed unlabeled val out store resume workers device compile save_every log_every "
    "keep_nodes val_every_stage eval predict report weights"
).split()


STAGE0_ONLY = [f for f in Args.__dataclass_fields__ if f.startswith(("stage0", "gan_", "mix_"))] + [
    "eval_every"
]


REFINE_ONLY = "cl cl_beta cl_drop cl_on phi temp steps".split()


FLAGS_OF = {
    "s4gan": "gan_lr gan_gamma gan_fm gan_st",
    "classmix": "mix_threshold mix_alpha mix_weight mix_colour",
}


RANGES = (
    dict.fromkeys("gan_gamma mix_threshold mix_alpha alpha cl_beta".split(), (0, 1))
    | dict.fromkeys(
        "beam trials steps stage0_steps dev_size eval_every save_every threads".split(), (1, 1e9)
    )
    | {
        "crop_size": (16, 1e5),
        "scale": (0.01, 100),
        "aspp_rates": (1, 512),
        "cl_drop": (0, 0.999),
        "phi": (-1, 2),
        "cut": (-1, 3),
        "resize": (0.05, 20),
        "temp": (1e-6, 1e6),
        "batch_size": (2, 1e6),
    }
)


def check(args: Args) -> None:
    """Refuse, before any work, what cannot run and flags that would be ignored."""
    cli.check_ranges(args, RANGES)
    ignored = {
        flag: search not in args.search
        for flag, search in dict(
            alpha="fist",
            beam="gist",
            path="path",
            trials="rist",
            max_run="rist",
            independent="rist",
        ).items()
    } | {
        "init_head": args.backbone not in CAFFE,
        "cut": args.backbone in CAFFE,
        "stages": {*args.search} == {"path"},
        "stage0_steps": args.stage0 not in STAGE0,
        **dict.fromkeys(("cl_beta", "cl_drop", "cl_on"), args.cl == 0),
    }
    cli.check_meaning(args, preset(args.dataset), args.stage0, FLAGS_OF, ignored)
    if "path" in args.search and not (
        args.path and all(re.fullmatch(r"([LPB]|F0?\.\d+)+", p) for p in args.path)
    ):
        raise UserError(
            "--search path needs --path with words of L and P (or B, F0.75), such as --path LPPLLLPPL."
        )
    if args.stage0 not in STAGE0 and not Path(args.stage0).is_file():
        raise UserError(f"--stage0 {args.stage0} is neither {', '.join(STAGE0)} nor a file.")


def plant(args: Args) -> tuple[Tree, list[str]]:
    """Data, splits, device, initial weights, the folder of stage 0, named by what shapes it; and
    lines to print."""
    data = find_data(args)
    split = CITYSCAPES.get(args.split, args.split) if args.dataset == "cityscapes" else args.split
    chosen = semantic.choose(
        data,
        split,
        args.split_seed,
        args.unlabeled,
        "s4gan",
        held_out=max(args.dev_reserve, args.dev_size),
    )
    # their labels are never opened
    pool = [Picture(p.name, p.image, None) for p in chosen.unlabeled]
    args, init, notes = initial(args, len(data.classes))
    world = distributed.start(args.device, join=False)
    if world.device.type == "cpu":
        torch.set_num_threads(args.threads)
    tree = Tree(
        args, replace(world, rank=0, size=1), data, chosen.labeled, pool, chosen.held_out, init=init
    )
    start = (
        "" if args.stage0 in STAGE0 else hashlib.sha256(Path(args.stage0).read_bytes()).hexdigest()
    )
    start += fingerprint(init) if init else args.weights
    tree.store.root = Path(args.store) / f"stage0-{key_of(tree, REFINE_ONLY, start, args.dev_size)}"
    return tree, [
        f"{chosen.text}; {len(chosen.labeled) + args.dev_size} labels used in all; scored on {len(data.val)}",
        *(f"weights {note}" for note in notes),
    ]


def key_of(tree: Tree, without: list[str], *more: Any) -> str:
    """A name for what shapes weights: settings, lists of images and `more`."""
    lists = [
        splits.fingerprint(p.name for p in pictures)
        for pictures in (tree.labeled, tree.pool, tree.dev)
    ]
    shape = {k: v for k, v in vars(tree.args).items() if k not in SEARCHES + BOOKKEEPING + without}
    text = json.dumps([shape, tree.data.classes, lists, more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(args: Args) -> dict:
    """One run: stage 0, all searches, the chosen networks on val, results.json, whose contents are
    returned."""
    check(args)
    out, phi = (
        runs.default_out(SCRIPT, args),
        args.phi if args.phi >= 0 else 0.5 if args.temp < 1 else 0.9,
    )
    args = replace(args, phi=phi, out=str(out))
    tree, lines = plant(args)
    store, main = tree.store, distributed.launched().main
    if main:
        runs.open_run(out, SCRIPT, args, args.resume, not (out / "config.json").exists())
        runs.write_config(
            out, SCRIPT, args, tree.world, {"images": "; ".join(lines), "stage0": str(store.root)}
        )
        print(
            *lines,
            f"{args.stage0} stage 0; {', '.join(args.search)}; in {out}, nodes in {args.store}",
            sep="\n",
        )
    while not (store.done(ROOT) and store.first_to_make(ROOT) is None):
        store.make_if_free(ROOT, tree.train) or tree.wait()
    store.others = Path(args.store) / key_of(tree, STAGE0_ONLY, store.record(ROOT)["weights"])
    visited = search_all(tree, args)
    if not main:
        return {}
    best = {"stage0": ROOT} | {name: tree.best(nodes) for name, nodes in visited.items()}
    while lost := [n for path in best.values() if (n := store.first_to_make(path)) is not None]:
        store.make_if_free(lost[0], tree.train) or tree.wait()
    results = {
        name: {
            "path": path,
            "stage": len(tokens(path)),
            "dev": tree.dev_of(path),
            **val_record(tree, path),
            "step": store.record(path)["step"],
        }
        for name, path in best.items()
    }
    results |= {
        k: getattr(args, k) for k in ("dataset", "split", "split_seed", "seed", "val", "dev_size")
    }
    results |= {
        "split_fingerprint": splits.fingerprint(p.name for p in tree.labeled),
        "stage0_folder": str(store.root),
        "nodes": str(store.others),
        "visited": visited,
        "trials": [rist_path(args, trial) for trial in range(args.trials)]
        if "rist" in visited
        else [],
    }
    state = checkpoints.load_checkpoint(
        store.folder(tree.best([*best.values()])) / "weights.pt", SCRIPT
    )
    checkpoints.save_checkpoint(
        out / "best.pt", SCRIPT, state | {"settings": json.loads(json.dumps(vars(tree.args)))}
    )
    return gist_report.write(tree, results, out)


def load(path: str, args: Args) -> tuple[SegNet, Tree]:
    """The network of a checkpoint, built from the settings it holds, and a tree without
    pictures."""
    state = checkpoints.load_checkpoint(Path(path), SCRIPT)
    world = replace(distributed.start(args.device, join=False), rank=0, size=1)
    net = SegNet(args, len(state["classes"]))
    checkpoints.load_exact(net, state["networks"]["student"], path)
    data = semantic.Segmentation(args.dataset, Path(args.root), state["classes"], {}, [])
    return net.to(world.device, memory_format=torch.channels_last).eval(), Tree(
        args, world, data, [], [], []
    )


def evaluate(args: Args) -> dict:
    """--eval: score a checkpoint on val and write <checkpoint>.results.json."""
    net, tree = load(args.eval, args)
    tree.data = find_data(args, tree.data.classes)
    counts = torch.from_numpy(score(tree, net, tree.data.val)["counts"].sum(0))
    scores = {"student": {"last": metrics.iou_record(counts, tree.data.classes, 0)}}
    facts = {k: getattr(args, k) for k in ("dataset", "split", "val", "seed")} | {
        "confusion": counts.tolist()
    }
    runs.write_scores(
        Path(f"{args.eval}.results.json"), scores, facts, "miou", f"{args.val} of {tree.data.root}"
    )
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: index PNGs and overlays of images or folders into
    <checkpoint>.predictions/."""
    net, tree = load(args.predict[0], args)
    predictions.predict_labels(
        args.predict[1:],
        Path(f"{args.predict[0]}.predictions"),
        tree.data.classes,
        lambda images: upsample(net(resized(args, images[0], None)[0][None])[0], images.shape[-2:]),
        tree.world,
    )


def settings(dataset: str = "voc", eval: str = "", predict: str = "", report: str = "") -> Args:
    """What the command line starts from: a preset, or the settings of a checkpoint or run that is
    looked at."""
    checkpoint = eval or predict or (report and f"{report}/best.pt")
    return cli.saved_settings(Args, Path(checkpoint), SCRIPT) if checkpoint else preset(dataset)


def main(args: Args) -> Any:
    return (
        gist_report.again(plant(args)[0], Path(args.report))
        if args.report
        else evaluate(args)
        if args.eval
        else predict(args)
        if args.predict
        else train(args)
    )


PLACES = {"reduce": 1, "conv3x3": 2, "increase": 3}


def deeplab_name(name: str) -> str:
    """A tensor's name in a weight file of DeepLabV2 (layouts A to E of docs/gist_rist.md) -> that
    of torchvision's and timm's ResNet; branches of the classifier become head.0 to head.3."""
    name = re.sub(r"^(Scale|backbone|base)\.", "", name)
    name = re.sub(r"^(layer5\.conv2d_list\.|classifier\.|aspp\.c)(\d)\.", r"head.\2.", name)
    # C: the stem, and stages 2 to 5
    name = re.sub(r"^layer1\.conv1\.(conv|bn)\.", r"\g<1>1.", name)
    if not (found := re.match(r"layer(\d)\.block(\d+)\.(\w+)\.(conv|bn)\.(.+)", name)):
        return name
    stage, block, place, kind, rest = found.groups()
    layer = (
        f"downsample.{int(kind == 'bn')}"
        if place == "shortcut"
        else f"{kind}{PLACES.get(place, place)}"
    )
    return f"layer{int(stage) - 1}.{int(block) - 1}.{layer}.{rest}"


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=("dataset", "eval", "predict", "report"))
