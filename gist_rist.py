"""Self-training for semantic segmentation in many stages, and two searches for their best order.

The GIST and RIST of Iterative Self-Training for Semi-Supervised Segmentation.
Teh, DeVries, Duke, Jiang, Aarabi, Taylor. CRV 2022. https://arxiv.org/abs/2103.17105

A network learns from a few labeled images (stage 0), labels all other images, and is trained on in
stages. When every stage mixes human and pseudo labels at one ratio (FIST), the network ends worse
than it began: one class spreads over the images. Stages that learn from human labels alone (L) or
from pseudo labels alone (P) do better, along a path such as LPPLLLPPL. GIST finds a path by beam
search, RIST draws some at random, and a small development set picks the best stage of all paths.
The weights of a stage follow from its path alone, so each is trained once, by any free process.

    paper                                                     this file
    Eq. 1                       cross entropy on labels       upsampled_cross_entropy
    Eq. 2                       labels and pseudo labels      mix_losses
    Eq. 3                       mean teacher                  ema_update
    Eqs. 4, 5                   outputs and features          outputs_and_features
    Eqs. 6, 7, 8                consistency loss CL           consistency
    Eq. 9                       Label Erase LE, with TS       label_erase
    Algorithm 1, lines 1 to 5   GIST: two children each       gist
    Algorithm 1, lines 6 to 14  one child                     refine (in these parts)
    Algorithm 1, lines 6 to 8   its pseudo labels             label_images, label_erase
    Algorithm 1, lines 9 to 12  its K iterations              fit, refine_step, update
    Algorithm 1, lines 13, 14   its weights and its score     finish_node, evaluate, dev_miou
    Algorithm 1, lines 17, 18   the best G go on              gist, Tree.order
    Algorithm 2, lines 1, 2     RIST: alpha of each stage     rist_path
    Algorithm 2, lines 3 to 10  one stage                     refine (in these parts)
    Algorithm 2, lines 4 to 6   its pseudo labels             label_images, label_erase
    Algorithm 2, lines 7 to 10  its K iterations              fit, refine_step, update
    Sec. III-B                  FIST                          planned_paths, --search, --alpha
    Sec. III-C                  add-ons CL, LE, TS            --cl, --cl-on, --phi, --temp
    Sec. IV                     numbers, by data set          Args, PRESETS, MOMENTUM
    Sec. IV                     labeled images, all others    choose_pictures, --split
    Sec. IV                     development set, choice       hold_out, Tree.best
    Sec. IV                     mIoU, on val and on dev       val_record, dev_miou, evaluate,
                                                              common/metrics.py
    Sec. IV                     network, its COCO weights     SegNet, caffe_style, initial_weights
    Sec. IV                     schedule, optimizer           learning_rate_factor, optimizer_of
    Sec. IV                     augmentation                  augment, random_size, resized
    Sec. IV                     search cost of two            --beam, --trials
    Sec. IV-A                   degenerate paths              longest_run, rejected_share, --max-run
    Table I                     three kinds of stage 0        --dataset, --split, --stage0,
                                                              train_stage0, supervised_step,
                                                              s4gan_step, classmix_step
    Table II                    15 paths of RIST              --trials, --independent, --path,
                                                              table_of_paths, group_scores,
                                                              longest_run
    Table III                   development set's size        --dev-size, --dev-reserve,
                                                              table_of_dev_sizes
    Table IV                    beam of GIST                  --beam, --path
    Table V                     without the add-ons           --cl, --phi, --temp
    Figs. 1, 6                  scores by stage               --search, --alpha, draw_curves
    Fig. 6                      batch-wise choice             planned_paths, refine_step
    Figs. 2, 8, 9               predicted masks               draw_masks, bloat
    Fig. 3                      tree of a search              draw_tree
    Fig. 4                      picture of CL                 outputs_and_features, consistency
    Fig. 5                      confidences without, with TS  confidence_histograms, draw_curves
    Fig. 7                      best of n paths               best_of, table_of_best_of_n
    (not in the paper)          nodes of many processes       Tree, search_all, common/nodes.py

Shapes: B images, K classes, H x W pixels, h x w cells of stride 8. Suffix _l labeled, _u unlabeled,
_p pseudo-labeled. Lines marked DEPARTS[name] leave the paper or decide what it leaves open;
docs/gist_rist.md says why.

    torchrun --nproc_per_node 8 gist_rist.py --split 1/50 --weights resnet101COCO-41f33a49.pth
    python gist_rist.py --dataset shapes                 # embedded data, no download, CPU, minutes
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
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
    nodes,
    plots,
    predictions,
    runs,
    semantic,
    splits,
    transforms,
)
from common.check import first_look, look_at_all
from common.distributed import World, rng
from common.errors import UserError, one_line
from common.nodes import NodeForm, Nodes, Search, fingerprint
from common.semantic import Batch, Picture, Segmentation
from common.typed_json import read_record

SCRIPT = "gist_rist.py"
IGNORE = 255  # the label of a pixel without a label
ROOT = ""  # the path of stage 0

# Numbers that no table of the paper varies, and so without a flag.
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Sec. IV
CL_DECAY, CL_DROP = 0.99, 0.5  # beta of Eq. 3, dropout of Eqs. 6 and 7. DEPARTS[cl]
GAN_FEATURES, GAN_SELF_TRAINING = 0.1, 1.0  # weights of two losses of S4GAN. DEPARTS[s4gan]
MIX_DECAY, MIX_CONFIDENCE = 0.99, 0.968  # ClassMix: EMA, and a sure pixel. DEPARTS[classmix]

# ========================================================================================= settings
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Side = Annotated[int, msgspec.Meta(ge=16)]


@dataclass
class Args:
    """Train a segmentation network on few labels, then on in stages that learn from the labels or
    from its own predictions, in an order that GIST or RIST searches for. The network after a stage
    is called a node. --dataset picks the paper's numbers, every other flag overrides one of them.
    Marks such as DEPARTS[cl] are explained in docs/gist_rist.md."""

    # data

    # what to train on; also picks the defaults
    dataset: Literal["voc", "cityscapes", "shapes", "folder"] = "voc"
    root: str = "datasets/voc"  # where the data lie, see data/README.md
    # labeled images: a published list (1/50, 1/20, 1/8), random:N, random:N%, or a list file
    split: str = "1/50"
    split_seed: int = 0  # which draw, for random splits
    unlabeled: str = ""  # folder or list of unlabeled images; empty: all other training images
    val: str = "val"  # name of the list or folder that is scored; nothing is chosen on it
    # labeled images beside the split that only choose stages and paths, Sec. IV. DEPARTS[dev]
    dev_size: Positive = 50
    # keep at least so many labeled images out of training, of which --dev-size choose, so that runs
    # of different --dev-size train on the same images; 500 for Table III
    dev_reserve: int = 0

    # the search (Sec. III-B)

    # which searches to run, side by side; batchwise is Fig. 6, path walks the paths of --path
    search: tuple[Literal["fist", "gist", "rist", "batchwise", "path"], ...] = ("gist", "rist")
    stages: int = 9  # S, refinement stages of a path
    beam: Positive = 1  # GIST: the beam size G, Table IV
    trials: Positive = 2  # RIST: number of paths, Table II
    # FIST: the share of labels alpha, Eq. 2; each value is a search of its own. DEPARTS[fist]
    alpha: tuple[Share, ...] = (0.75,)
    path: tuple[str, ...] = ()  # with --search path: paths such as LPPLLLPPL, Tables II and IV
    # RIST: draw a path again that has more equal letters in a row; 0: never. DEPARTS[max-run]
    max_run: int = 0
    # RIST: train equal beginnings of two paths separately, as a study of their spread needs it
    independent: bool = False

    # a refinement stage (Sec. III)

    steps: Positive = 3000  # K, iterations of a refinement stage
    cl: float = 1.0  # weight of the consistency loss, Eq. 8; 0: none, Table V. DEPARTS[cl]
    # images of the consistency loss: both labeled and unlabeled ones, or the active ones, which are
    # those that the stage learns from. DEPARTS[cl-on]
    cl_on: Literal["both", "active"] = "both"
    # phi of Label Erase, Eq. 9; 0 erases nothing, Table V; take about 0.9 without TS. DEPARTS[le]
    phi: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.5
    # T multiplies the logits before the confidence of Eq. 9; 1: no TS, Table V. DEPARTS[ts]
    temp: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)] = 0.2

    # stage 0 (Table I)

    # supervised, s4gan, classmix, or a checkpoint to start from. DEPARTS[stage0-best]
    stage0: str = "supervised"
    stage0_steps: Positive = 25_000  # iterations of stage 0
    gan_lr: float = 1e-4  # S4GAN: learning rate of the discriminator. DEPARTS[s4gan]
    gan_gamma: Share = 0.6  # S4GAN: score above which an image is trusted. DEPARTS[s4gan]
    mix_colour: bool = False  # ClassMix: jitter and blur the mixed images. DEPARTS[classmix]

    # network (Sec. IV: DeepLabV2 from MS-COCO weights, all BatchNorm frozen)

    # the Caffe-style ResNet that COCO weights fit, or the name of a network of timm or torchvision;
    # a ViT, Swin or ConvNeXt picks the numbers of UniMatch V2 for --lr and --head-lr.
    # DEPARTS[transformers]
    backbone: str = "caffe_resnet101"
    # the backbone is not trained and stays in eval mode, which takes less memory.
    # DEPARTS[transformers]
    freeze_backbone: bool = False
    # a file of COCO weights, or of another backbone's; imagenet; none; shapes: the embedded set's
    weights: str = ""
    # channel order and scale that the weights expect: bgr for COCO weights. DEPARTS[pixels]
    pixels: Literal["bgr", "rgb", "imagenet"] = "bgr"
    # stride of the features, dilated in CNNs and enlarged otherwise; the Caffe-style ResNet has 8
    output_stride: Literal[8, 16, 32] = 8
    # how many of the backbone's last stages to leave out, when the file lacks their weights
    cut: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    # dilations of the classifier's branches, which are summed. DEPARTS[aspp]
    aspp_rates: tuple[Annotated[int, msgspec.Meta(ge=1, le=512)], ...] = (6, 12, 18, 24)
    # BatchNorm; live is for weights from another domain, or for a network that starts without any.
    # DEPARTS[bn]
    bn: Literal["frozen", "live"] = "frozen"

    # optimisation (Sec. IV)

    # labeled images per step of a node, and as many unlabeled
    batch_size: Annotated[int, msgspec.Meta(ge=2)] = 8
    # multiplies the size of images and labels before all else; Cityscapes 0.5. DEPARTS[cityscapes]
    resize: Annotated[float, msgspec.Meta(ge=0.05, le=20)] = 1
    crop_size: tuple[Side, Side] = (321, 321)  # height and width of crops in training
    # lowest and highest factor of random resizing. DEPARTS[scale]
    scale: tuple[float, float] = (0.5, 1.5)
    lr: float = 2.5e-4  # learning rate of the backbone at the beginning of each node
    head_lr: float = 10  # learning rate of the classifier, as a multiple of --lr. DEPARTS[lr]

    # the run

    out: str = ""  # run folder; empty: runs/gist_rist-<dataset>-<split>-d<split seed>-s<seed>
    store: str = "runs/gist_rist-nodes"  # trained nodes, shared by runs, searches and processes
    resume: bool = False  # continue the run in --out; nodes in the store are never trained twice
    # for initial weights, order of images, augmentation and RIST's draws; each node adds its path
    seed: int = 0
    # keep the weights of all nodes, not only of those that a search may still need
    keep_nodes: bool = False
    # score every node on val, too: to report (Fig. 1, Table II), never to choose
    val_every_stage: bool = False
    eval_every: Positive = 1000  # steps of stage 0 between evaluations on the development set
    save_every: Positive = 500  # steps between checkpoints of a node in training
    log_every: Positive = 50  # steps between log lines
    workers: int = loading.default_workers()  # decoding processes per training process and stream
    device: str = "auto"  # auto, cpu, cuda
    precision: Literal["fp32", "bf16"] = "fp32"  # numbers inside the networks
    compile: bool = False  # torch.compile the networks in training
    # open all files of the run, say what is wrong or odd with them, and train nothing
    check: bool = False
    eval: str = ""  # score this checkpoint on val, train nothing
    # checkpoint, then images or folders: write predictions
    predict: list[str] = field(default_factory=list)
    # side of the windows in which --predict sees larger pictures; 0: it sees them whole
    predict_tile: Annotated[int, msgspec.Meta(ge=0)] = 0
    # write the network of this checkpoint as a .safetensors file, train nothing
    export: str = ""
    # write the tables and pictures of this finished run once more, from its nodes; train nothing
    report: str = ""


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
        pixels="imagenet",
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
        root="datasets/folder",
        split="random:1/8",
        backbone="resnet50.tv_in1k",
        weights="imagenet",
        pixels="imagenet",
    ),
}

# Table I: how many images the fractions of Cityscapes are; drawn uniformly. DEPARTS[cityscapes]
CITYSCAPES = {"1/50": 59, "1/30": 100, "1/20": 148, "1/8": 371, "1/4": 743}


# What UniMatch V2 sets for DINOv2, for every ViT, Swin and ConvNeXt. DEPARTS[transformers]
LAYER_NORMED: dict[str, Any] = dict(lr=5e-6, head_lr=40, pixels="imagenet")
ADAMW_DECAY = 0.01


def preset(dataset: str = "voc", **overrides: Any) -> Args:
    """The settings of a data set, and of a backbone."""
    values: dict[str, Any] = dict(dataset=dataset) | PRESETS[dataset]
    if backbones.is_layer_normed(overrides.get("backbone", "")):
        values = dict(weights="imagenet") | values | LAYER_NORMED
    return Args(**(values | overrides))


# ======================================================================================== equations
def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) -> (B, K, *size), corners aligned."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def upsampled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Eq. 1: the mean over the labeled pixels of the batch, at the labels' size; 0 without any.
    Logits (B, K, h, w), labels (B, H, W) int64 with 255 where a pixel has none. DEPARTS[mean]"""
    logits = upsample(logits, label.shape[-2:])
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return loss / (label != IGNORE).sum().clamp(min=1)


def mix_losses(loss_l: Tensor | float, loss_p: Tensor | float, alpha: float) -> Tensor | float:
    """Eq. 2: the loss on labels and the loss on pseudo labels, by the share of labels alpha."""
    return alpha * loss_l + (1 - alpha) * loss_p


# SAME AS gta_seg.py:ema_update
@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, in place, for every parameter and for
    BatchNorm's running statistics; its integer counters stay. A decay of 0 copies."""
    targets = [*target.parameters(), *target.buffers()]
    sources = [*source.parameters(), *source.buffers()]
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - decay)


def outputs_and_features(
    student: nn.Module, teacher: nn.Module | None, images: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eqs. 4 and 5: the student's logits o (B, K, h, w) and features f (B, C, h, w), and the
    teacher's features f*, which carry no gradient; None without a teacher. Networks map images
    (B, 3, H, W) and a mask of what is not padding (B, H, W) to logits and features."""
    o, f = student(images, valid)
    if teacher is None:
        return o, f, None
    with torch.no_grad():
        _, f_teacher = teacher(images, valid)
    return o, f, f_teacher


def consistency(f: Tensor, f_teacher: Tensor, drop: float) -> Tensor:
    """Eqs. 6, 7, 8: mean |drop(pool(f)) - drop(pool(f*))| of features (B, C, h, w), with a dropout
    mask for each of the two. DEPARTS[cl]"""
    pooled = F.dropout(f.mean((2, 3)), drop)
    pooled_teacher = F.dropout(f_teacher.mean((2, 3)), drop)
    return (pooled - pooled_teacher).abs().mean()


def label_erase(logits: Tensor, phi: float, temp: float) -> tuple[Tensor, Tensor]:
    """Eq. 9: labels (B, H, W), the class where its confidence reaches `phi` and 255 elsewhere, and
    the confidences (B, H, W), of logits (B, K, H, W).

    The confidence is the softmax of T = `temp` times the logits: temperature scaling (TS), which
    cannot change the class. With T = 0.2, the paper's, phi is 0.5 here. DEPARTS[ts], DEPARTS[le]"""
    confidence, label = (temp * logits).softmax(dim=1).max(dim=1)
    return label.masked_fill(confidence < phi, IGNORE), confidence


def learning_rate_factor(step: int, total: int) -> float:
    """Sec. IV: lr / lr_0 = (1 - iter / max_iter)^0.9."""
    return max(0.0, 1 - step / total) ** 0.9


# ========================================================================================== network
CAFFE = ("caffe_resnet50", "caffe_resnet101", "caffe_resnet152")
CAFFE_STAGES = {"layer1": (1, 1), "layer2": (2, 1), "layer3": (1, 2), "layer4": (1, 4)}

# of RGB pixels in 0..255, as the older code has them
MEAN = {
    "voc": (122.67891434, 116.66876762, 104.00698793),
    "cityscapes": (73.15835921, 82.90891754, 72.39239876),
}


class SegNet(nn.Module):
    """DeepLabV2: RGB images (B, 3, H, W) in 0..255 -> float32 logits (B, K, h, w), and the features
    (B, C, h, w) before ASPP, Eqs. 4 and 5. `pretrained`: with timm's or torchvision's weights. When
    `frozen`, BatchNorm keeps its statistics and weights in every mode. DEPARTS[bn] A ViT, Swin or
    ConvNeXt has an adaptor between backbone and ASPP. DEPARTS[transformers]"""

    def __init__(self, args: Args, num_classes: int, pretrained: bool = False):
        super().__init__()
        self.pixels = args.pixels
        self.bf16 = args.precision == "bf16"
        self.frozen = args.bn == "frozen"
        self.freeze_backbone = args.freeze_backbone
        is_caffe = args.backbone in CAFFE
        name = args.backbone.removeprefix("caffe_")
        stride = 32 if is_caffe else args.output_stride
        kept = {}
        if args.cut > 0:  # a first network only tells how many stages there are
            _, _, all_channels = backbones.build(name, stride)
            kept = {"out_indices": tuple(range(len(all_channels) - args.cut))}
        self.backbone, reductions, channels = backbones.build(name, stride, pretrained, **kept)
        if is_caffe:
            caffe_style(self.backbone)
        if self.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.adaptor = backbones.adaptor(self.backbone, reductions, channels, stride)
        self.head = nn.ModuleList(  # DEPARTS[aspp]
            nn.Conv2d(self.adaptor.channels, num_classes, 3, padding=rate, dilation=rate)
            for rate in args.aspp_rates
        )
        for branch in self.head:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)
        mean = torch.tensor(MEAN.get(args.dataset, MEAN["voc"]))[:, None, None]
        self.register_buffer("mean", mean, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> SegNet:
        super().train(mode)
        self.backbone.train(mode and not self.freeze_backbone)
        if self.frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval().requires_grad_(False)
        return self

    def scaled(self, images: Tensor, valid: Tensor | None) -> Tensor:
        """Pixels as the weights want them, padding 0, which is the mean colour. DEPARTS[pixels]"""
        if self.pixels == "imagenet":
            return transforms.normalize(images, valid)
        images = images.float() - self.mean
        if self.pixels == "bgr":
            images = images.flip(1)
        return images if valid is None else images * valid[:, None]

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        device = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            pixels = self.scaled(images, valid).contiguous(memory_format=torch.channels_last)
            features = self.adaptor(self.backbone(pixels))
            logits = sum(branch(features) for branch in self.head)
        return logits.float(), features.float()


def caffe_style(body: nn.Module) -> None:
    """Make a timm ResNet, in place, the one of DeepLabV2's COCO weights: ceil-mode pooling, strides
    on the first 1x1 convolution, stride 8 in all, and stages three and four dilated in all their
    blocks, the first included."""
    body.maxpool.ceil_mode = True
    for name, (stride, dilation) in CAFFE_STAGES.items():
        layer = getattr(body, name)
        for i, block in enumerate(layer):
            block.conv1.stride = (stride, stride) if i == 0 else (1, 1)
            block.conv2.stride = (1, 1)
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        layer[0].downsample[0].stride = (stride, stride)


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
            x = F.leaky_relu(conv(x), 0.2)
            x = F.dropout2d(x, 0.5, self.training and i < 3)
        features = x.mean((2, 3))
        return self.score(features)[:, 0].sigmoid(), features


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
    scored: int = 0  # stage 0: the last step that was scored on the development images
    best_dev: float = -1.0  # stage 0: the best development score so far
    best_step: int = 0  # and its step

    def networks(self) -> dict[str, nn.Module]:
        named = {"student": self.student, "teacher": self.teacher, "critic": self.critic}
        return {name: network for name, network in named.items() if network is not None}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        named = {"opt": self.opt, "opt_critic": self.opt_critic}
        return {name: optimizer for name, optimizer in named.items() if optimizer is not None}


def refine_step(
    s: State,
    args: Args,
    path: str,
    alpha: float | None,
    step: int,
    labeled: Batch | None = None,
    pseudo: Batch | None = None,
) -> dict[str, Tensor]:
    """Algorithm 1, lines 10 and 11 (Algorithm 2, lines 8 and 9), with the consistency loss: one
    iteration on labels (alpha = 1), pseudo labels (alpha = 0), both, or one of them drawn by a coin
    (alpha is None, Fig. 6). It composes Eqs. 1 to 8. With --cl-on both, a batch that the stage does
    not learn from serves the consistency loss alone. Returned for the log: `loss`; `loss_l`, `cl_l`
    and `mean_l` of the labeled batch; `loss_p`, `cl_p` and `mean_p` of the other one."""
    if alpha is None:  # the coin
        alpha = float(rng(args.seed, path, "alpha", step).random() > 0.5)
    losses = {"l": 0.0, "p": 0.0}
    loss_cl = 0.0
    log = {}
    # Each kind of labels has a batch, and a weight in Eq. 2.
    for name, batch, weight in (("l", labeled, alpha), ("p", pseudo, 1 - alpha)):
        in_consistency = s.teacher is not None and (weight > 0 or args.cl_on == "both")
        if batch is None or (weight == 0 and not in_consistency):
            continue
        teacher = s.teacher if in_consistency else None
        # Eqs. 4, 5
        o, f, f_teacher = outputs_and_features(s.student, teacher, batch.images, batch.valid)
        if weight > 0:
            losses[name] = upsampled_cross_entropy(o, batch.label)  # Eq. 1
            log[f"loss_{name}"] = losses[name].detach()
        if in_consistency:
            loss_of_batch = consistency(f, f_teacher, CL_DROP)  # Eqs. 6, 7, 8
            loss_cl = loss_cl + loss_of_batch
            log[f"cl_{name}"] = loss_of_batch.detach()
            log[f"mean_{name}"] = f.detach().mean()
    loss = mix_losses(losses["l"], losses["p"], alpha) + args.cl * loss_cl  # Eq. 2 and CL
    update(s.opt, loss)  # line 11
    if s.teacher is not None:
        ema_update(s.teacher, s.student, CL_DECAY)  # Eq. 3
    return {"loss": loss.detach(), **log}


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Algorithm 1, line 11: one gradient step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def optimizer_of(net: SegNet, args: Args) -> torch.optim.Optimizer:
    """Sec. IV; every parameter once, the classifier learns `head_lr` times faster. DEPARTS[lr] With
    a ViT, Swin or ConvNeXt it is AdamW. DEPARTS[transformers]"""
    body, behind = [], []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            body.append(parameter)
        else:
            behind.append(parameter)
    groups = []
    for trained, lr in ((body, args.lr), (behind, args.lr * args.head_lr)):
        groups.append({"params": trained, "lr": lr, "initial_lr": lr})
    if backbones.is_layer_normed(args.backbone):
        return torch.optim.AdamW(groups, weight_decay=ADAMW_DECAY)
    return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def set_learning_rates(s: State, factor: float) -> None:
    """Give every group of parameters its initial learning rate times `factor`."""
    for optimizer in s.optimizers().values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def resized(image: Tensor, label: Tensor | None, times: float) -> tuple[Tensor, Tensor | None]:
    """A picture (3, H, W) and its label (H, W) at --resize, `times` their size on disk, as they are
    trained on and scored."""
    if times == 1:
        return image, label
    size = tuple(round(side * times) for side in image.shape[-2:])
    image = image.to(torch.float32, memory_format=torch.contiguous_format)
    small = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    if label is not None:
        label = transforms.resize_label(label, size)
    return small.round().clamp(0, 255).byte(), label


def augment(
    args: Args, image: Tensor, label: Tensor | None, generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sec. IV: random resizing, flip, crop -> image, label and what is not padding. Padding carries
    no label. DEPARTS[padding]"""
    image, label = resized(image, label, args.resize)
    size = random_size(image.shape[-2:], *args.scale, generator)
    view = transforms.random_view(size, args.crop_size, generator)
    return transforms.cut_out(image, label, view)


# SAME AS gta_seg.py:random_size
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


# ------------------------------------------------------------------------------- stage 0 (Table I)
def supervised_step(s: State, args: Args, step: int, labeled: Batch) -> dict[str, Tensor]:
    """Stage 0 on labels alone: Eq. 1."""
    logits, _ = s.student(labeled.images, labeled.valid)
    loss = upsampled_cross_entropy(logits, labeled.label)
    update(s.opt, loss)
    return {"loss": loss.detach()}


def s4gan_step(
    s: State, args: Args, step: int, labeled: Batch, unlabeled: Batch, again: Batch
) -> dict[str, Tensor]:
    """Stage 0 with S4GAN (Mittal et al. 2019): cross entropy, feature matching, and self-training
    on images whose prediction the discriminator trusts; then the discriminator's own step. `again`
    is a second labeled batch, of any number of images. DEPARTS[s4gan]"""
    logits_l, _ = s.student(labeled.images, labeled.valid)
    loss_l = upsampled_cross_entropy(logits_l, labeled.label)
    logits_u, _ = s.student(unlabeled.images, unlabeled.valid)
    logits_u = upsample(logits_u, unlabeled.valid.shape[-2:])  # (B, K, H, W)
    maps_u = logits_u.softmax(dim=1) * unlabeled.valid[:, None]
    fake = torch.cat([maps_u, minmax01(unlabeled.images)], dim=1)
    real = torch.cat([class_maps(again.label, logits_u.shape[1]), minmax01(again.images)], dim=1)

    s.critic.requires_grad_(False)
    trust, features_fake = s.critic(fake)
    _, features_real = s.critic(real)
    loss_fm = (features_real.mean(0) - features_fake.mean(0)).abs().mean()
    # Whole images are trusted, and none in the first step.
    chosen = (trust > args.gan_gamma)[:, None, None] & unlabeled.valid & (step > 0)
    pseudo = logits_u.detach().argmax(1).masked_fill(~chosen, IGNORE)
    loss_st = upsampled_cross_entropy(logits_u, pseudo)
    update(s.opt, loss_l + GAN_FEATURES * loss_fm + GAN_SELF_TRAINING * loss_st)

    s.critic.requires_grad_(True)
    score_fake, _ = s.critic(fake.detach())
    score_real, _ = s.critic(real)
    loss_fake = F.binary_cross_entropy(score_fake, torch.zeros_like(score_fake))
    loss_real = F.binary_cross_entropy(score_real, torch.ones_like(score_real))
    loss_d = (loss_fake + loss_real) / 2
    update(s.opt_critic, loss_d)
    return {
        "loss": loss_l.detach(),
        "loss_fm": loss_fm.detach(),
        "loss_st": loss_st.detach(),
        "loss_d": loss_d.detach(),
        "trusted": (trust > args.gan_gamma).float().mean(),
    }


def class_maps(label: Tensor, num_classes: int) -> Tensor:
    """Labels (B, H, W) as maps of ones and zeros (B, K, H, W); all zero where the label is 255."""
    one_hot = F.one_hot(label.clamp(max=num_classes), num_classes + 1)
    return one_hot[..., :-1].permute(0, 3, 1, 2).float()


def minmax01(images: Tensor) -> Tensor:
    """S4GAN: the batch (B, 3, H, W), stretched to [0, 1] by its own extremes."""
    return (images - images.min()) / (images.max() - images.min()).clamp(min=1e-6)


def classmix_step(
    s: State, args: Args, step: int, labeled: Batch, unlabeled: Batch
) -> dict[str, Tensor]:
    """Stage 0 with ClassMix (Olsson et al. 2021): half of the classes of image i, cut out by the
    teacher's prediction, are pasted into image i + 1; the student learns the mixed prediction,
    weighted by the share of sure pixels. DEPARTS[classmix]"""
    logits_l, _ = s.student(labeled.images, labeled.valid)
    loss_l = upsampled_cross_entropy(logits_l, labeled.label)
    with torch.no_grad():
        logits_u, _ = s.teacher(unlabeled.images, unlabeled.valid)
        probs = upsample(logits_u, unlabeled.valid.shape[-2:]).softmax(dim=1)
        predicted = probs.argmax(1).masked_fill(~unlabeled.valid, IGNORE)
        scores = rng(args.seed, "classmix", step).random(probs.shape[:2], dtype=np.float32)
        scores = torch.from_numpy(scores).to(probs.device, non_blocking=True)
        cut_out = classmix_mask(predicted, scores)  # (B, H, W)
        images = paste(unlabeled.images, cut_out[:, None])
        valid = paste(unlabeled.valid, cut_out)
        confidence, label = paste(probs, cut_out[:, None]).max(dim=1)
        # the share of sure pixels, one number for the whole batch
        sure = ((confidence >= MIX_CONFIDENCE) & valid).sum() / valid.sum().clamp(min=1)
        if args.mix_colour:
            images = jitter_and_blur(images, rng(args.seed, "colour", step))
    logits_mixed, _ = s.student(images, valid)
    label = label.masked_fill(~valid, IGNORE)  # DEPARTS[padding]
    loss_u = sure * upsampled_cross_entropy(logits_mixed, label)
    update(s.opt, loss_l + loss_u)
    ema_update(s.teacher, s.student, min(1 - 1 / (step + 1), MIX_DECAY))
    return {"loss": loss_l.detach(), "loss_u": loss_u.detach(), "sure": sure}


def classmix_mask(label: Tensor, scores: Tensor) -> Tensor:
    """ClassMix: the pixels (B, H, W) of half of each image's classes, rounded down: of those with
    the smallest scores. Labels (B, H, W) with 255 for no class, random scores (B, K)."""
    batch, num_classes = scores.shape
    classes = label.clamp(max=num_classes).flatten(1)  # 255 becomes one more class
    present = torch.zeros(batch, num_classes + 1, device=label.device)
    present = present.scatter_(1, classes, 1)[:, :num_classes] > 0
    by_score = torch.where(present, scores, torch.inf).argsort(1)  # absent classes come last
    place = by_score.argsort(1)  # the inverse permutation: the place of each class in that order
    chosen = present & (place < present.sum(1, keepdim=True) // 2)
    chosen = F.pad(chosen, (0, 1))  # the class of 255 is never chosen
    return chosen.gather(1, classes).view_as(label)


def paste(values: Tensor, cut_out: Tensor) -> Tensor:
    """What is cut out of each image of a batch, pasted over the next one."""
    return torch.where(cut_out, values, values.roll(-1, 0))


def jitter_and_blur(images: Tensor, generator: np.random.Generator) -> Tensor:
    """ClassMix's photometric noise, one draw for the whole batch (B, 3, H, W) in 0..255: jitter of
    strength 0.25 with probability 0.8, blur of deviation 0.15 to 1.15 with a kernel of a tenth of
    the side with probability 0.5."""
    from torchvision.transforms.v2 import functional as tv

    brightness, contrast, saturation = generator.uniform(0.75, 1.25, 3)
    hue, jitter, blur, sigma = generator.uniform((-0.25, 0, 0, 0.15), (0.25, 1, 1, 1.15))
    images = images / 255
    if jitter > 0.2:
        images = tv.adjust_contrast(tv.adjust_brightness(images, brightness), contrast)
        images = tv.adjust_hue(tv.adjust_saturation(images, saturation), hue)
    if blur > 0.5:
        height, width = images.shape[-2:]
        kernel = [int(0.1 * side) // 2 * 2 + 1 for side in (width, height)]  # odd
        images = tv.gaussian_blur(images, kernel, [sigma, sigma])
    return images * 255


STAGE0 = {"supervised": supervised_step, "s4gan": s4gan_step, "classmix": classmix_step}


# ======================================================================================= the search
# A path says what each stage learned from, with one token for a stage: L for labels, P for pseudo
# labels, F0.75 for both with alpha = 0.75, and B for one of the two, drawn in each iteration. A
# node is the network at the end of a path; stage 0 has the empty path.
def tokens(path: str) -> list[str]:
    """LPF0.75B -> [L, P, F0.75, B]. T3LP is LP of trial 3 alone, see --independent."""
    return re.findall(r"T\d+[LP]|[LPB]|F\d*\.\d+", path)


def parent_of(path: str) -> str:
    """LPP -> LP; the parent of a node of one stage is stage 0."""
    return "".join(tokens(path)[:-1])


def prefixes(path: str) -> list[str]:
    """LPP -> [L, LP, LPP]."""
    return list(itertools.accumulate(tokens(path)))


def alpha_of(token: str) -> float | None:
    """The share of labels in the loss of a stage, Eq. 2; None for B, where each iteration draws
    it."""
    if token == "B":
        return None
    if token.startswith("F"):
        return float(token[1:])
    return 1.0 if token.endswith("L") else 0.0


def token_of(alpha: float) -> str:
    """The token of a stage of FIST: L or P at the ends of the range, such as F0.75 between them."""
    if alpha == 1:
        return "L"
    if alpha == 0:
        return "P"
    return f"F{alpha:.9f}".rstrip("0")


def gist(stages: int, beam: int, order: Callable[[str], Any]) -> Iterator[list[str]]:
    """Algorithm 1: beam search with G = `beam`. It yields the nodes of one stage, and expects that
    they are trained and scored before it is asked for the next stage; nodes sorted by `order(path)`
    have the best first. It returns nothing: the answer is the best of all nodes that it yielded.
    DEPARTS[copies]"""
    kept = [ROOT]  # line 1
    for _ in range(stages):  # line 2
        children = [theta + letter for theta in kept for letter in "LP"]  # lines 4, 5
        yield children  # lines 6 to 14
        kept = sorted(children, key=order)[:beam]  # lines 17, 18


def rist_path(stages: int, generator: np.random.Generator, max_run: int = 0) -> str:
    """Algorithm 2, line 2, for all stages at once: a path of RIST. With `max_run`, a path that has
    more equal letters in a row is drawn again. DEPARTS[max-run]"""
    while True:
        path = "".join("L" if u > 0.5 else "P" for u in generator.random(stages))
        if max_run == 0 or longest_run(path) <= max_run:
            return path


def longest_run(path: str) -> int:
    """Sec. IV-A: the most equal letters in a row."""
    letters = path.lstrip("T0123456789")  # of a path with its trial's number, see --independent
    return max((len(list(same)) for _, same in itertools.groupby(letters)), default=0)


def rist_paths(args: Args) -> list[str]:
    """The paths of RIST's trials, by --seed. A path of --independent begins with its trial, so that
    it shares no node with others."""
    paths = []
    for trial in range(args.trials):
        path = rist_path(args.stages, rng(args.seed, "rist", trial), args.max_run)
        paths.append(f"T{trial}{path}" if args.independent else path)
    return paths


def planned_paths(args: Args) -> dict[str, list[str]]:
    """The paths of all searches but GIST, which are known before anything is trained."""
    planned = {}
    if "rist" in args.search:
        planned["rist"] = rist_paths(args)
    if "path" in args.search:
        planned["path"] = list(args.path)
    if "batchwise" in args.search:  # Fig. 6
        planned["batchwise"] = ["B" * args.stages]
    if "fist" in args.search:  # Sec. III-B
        for alpha in args.alpha:
            name = "fist" if len(args.alpha) == 1 else f"fist {alpha:g}"
            planned[name] = [token_of(alpha) * args.stages]
    return planned


def search_all(tree: Tree) -> dict[str, list[str]]:
    """Run all searches side by side -> the nodes that each visited, stage 0 first. How processes
    share the work is told in common/nodes.py."""
    args = tree.args
    searches = {}
    if "gist" in args.search:
        searches["gist"] = Search(gist(args.stages, args.beam, tree.order), adaptive=True)
    for name, paths in planned_paths(args).items():
        on_the_way = [prefixes(path) for path in paths]
        all_nodes = list(itertools.chain.from_iterable(on_the_way))
        searches[name] = Search(iter([all_nodes]))  # it asks once, for all of them
    launched = distributed.launched()
    nodes.explore(
        searches.values(), tree.store, tree.train, tree.best, tree.tidy, tree.wait, launched
    )
    return {name: search.visited for name, search in searches.items()}


# ================================================================================ training a node
class NodeRecord(TypedDict):
    """What node.json holds at least."""

    step: int
    steps: int
    seconds: float
    weights: str
    dev: dict[str, float]


@dataclass
class Tree:
    """What the nodes of a run share. A node's folder holds, beside what common/nodes.py says,
    scores.npz, log.jsonl, config.json, its score on val and, while it is trained, last.pt."""

    args: Args
    world: World  # a world of one: each process trains nodes of its own
    data: Segmentation
    labeled: list[Picture]
    pool: list[Picture]  # unlabeled, without the development images
    dev: list[Picture]  # development images; the first dev_size of them choose
    store: Nodes = field(default_factory=lambda: Nodes(Path(), Path(), parent_of, NodeRecord))
    init: dict[str, Tensor] | None = None  # weights to start stage 0 from
    content: str = ""  # the fingerprint of pictures and labels
    signals: runs.Signals | None = None

    @cached_property
    def content_of_val(self) -> str:
        """The fingerprint of what --val scores."""
        return content_of(self.data.val, [])

    def dev_of(self, path: str, size: int | None = None) -> float:
        """mIoU of a node on the first `size` development images, --dev-size by default."""
        return self.store.record(path)["dev"][str(size or self.args.dev_size)]

    def order(self, path: str, size: int | None = None) -> tuple:
        """Sorts nodes: the best on the development images first, then the earlier stage, then the
        name."""
        return -self.dev_of(path, size), len(tokens(path)), path

    def best(self, paths: list[str], size: int | None = None) -> str:
        """Sec. IV: the stage and path that the development images choose, stage 0 included.
        DEPARTS[pick]"""
        return min(filter(self.store.done, paths), key=partial(self.order, size=size))

    def train(self, path: str) -> None:
        """Train the node `path`, whose parent is done, from the beginning or its checkpoint."""
        if path == ROOT:
            train_stage0(self)
        else:
            refine(self, path)

    def network(self, weights: dict[str, Tensor] | None) -> SegNet:
        """A student with these weights; without any, as --weights says, with a fresh classifier."""
        distributed.seed_torch(self.args.seed, "student")
        pretrained = weights is None and self.args.weights == "imagenet"
        net = SegNet(self.args, len(self.data.classes), pretrained)
        if weights is not None:
            net.load_state_dict(weights)
        net = net.to(self.world.device, memory_format=torch.channels_last)
        if self.args.compile:
            net.compile()
        return net.train()

    def stream(
        self, path: str, name: str, pictures: list[Picture], start: int, total: int
    ) -> Iterator[Batch]:
        """The batches of a node from step `start` on: `name` says what they are for. Their order
        and augmentation follow from (seed, path, name, step, sample)."""
        data = self.data
        if name == "pseudo":  # the labels that we wrote are class indices already
            data = replace(data, to_class=None)
        augmented = partial(augment, self.args)
        seed, size = self.args.seed, self.args.batch_size
        views = semantic.Pictures(pictures, data, True, augmented, seed, f"{path} {name}")
        for batch in loading.stream(views, size, start, total, self.world, self.args.workers):
            batch = batch.to(self.world.device)
            yield batch._replace(images=batch.images.float(), label=batch.label.long())

    def tidy(self, needed: set[str]) -> None:
        """The main process removes the weights and pseudo labels that the searches of this run do
        not need any more. With --val-every-stage it first scores the nodes on val that an earlier
        run trained without doing so."""
        if not distributed.launched().main:
            return
        if self.args.val_every_stage:
            for path in list(self.store.records):
                if self.store.has_weights(path):
                    val_record(self, path)
        if not self.args.keep_nodes:
            self.store.remove_weights(keep=needed)

    def wait(self) -> None:
        """Pass a moment in which other processes train all that this one could train. A run that
        was told to stop stops here."""
        if self.signals is not None and self.signals.name:
            raise errors.Stopped(
                f"Stopped by {self.signals.name} between two nodes; continue with --resume."
            )
        time.sleep(0.2)


def train_stage0(tree: Tree) -> None:
    """Stage 0, theta_0 of Algorithm 1, by the method that --stage0 names. It ends with the weights
    that score best on the development images. DEPARTS[stage0-best]"""
    args = tree.args
    net = tree.network(tree.init)
    if args.stage0 not in STAGE0:
        weights = checkpoints.read_weights(Path(args.stage0), "--stage0")
        checkpoints.load_exact(net, weights, args.stage0)
        return finish_node(tree, ROOT, net, {"step": 0, "steps": 0})
    s = State(net, optimizer_of(net, args))
    pictures_of = {"labeled": tree.labeled}
    if args.stage0 == "classmix":
        pictures_of["unlabeled"] = tree.pool
        s.teacher = tree.network(net.state_dict()).requires_grad_(False).eval()
    if args.stage0 == "s4gan":
        pictures_of["unlabeled"] = tree.pool
        pictures_of["again"] = tree.labeled
        distributed.seed_torch(args.seed, "critic")
        s.critic = Discriminator(len(tree.data.classes)).to(tree.world.device)
        group = {"params": s.critic.parameters(), "initial_lr": args.gan_lr}
        s.opt_critic = torch.optim.Adam([group], args.gan_lr, betas=(0.9, 0.99))
    streams = {}
    for name, pictures in pictures_of.items():
        streams[name] = partial(tree.stream, ROOT, name, pictures)
    step_of = partial(STAGE0[args.stage0], s, args)
    seconds = fit(tree, ROOT, s, step_of, streams, args.stage0_steps)
    best = checkpoints.load_checkpoint(tree.store.root / "best.pt", SCRIPT, NodeForm)
    s.student.load_state_dict(best["networks"]["student"])
    facts = {"step": s.best_step, "steps": args.stage0_steps}
    finish_node(tree, ROOT, s.student, facts, seconds)


def refine(tree: Tree, path: str) -> None:
    """Algorithm 1, lines 6 to 14 (Algorithm 2, lines 3 to 10): a refinement stage, which is what
    all searches are made of. It runs K iterations on labels or pseudo labels, from a copy of the
    parent's weights. Optimizer, schedule and mean teacher start afresh. DEPARTS[restart]"""
    args = tree.args
    parent = parent_of(path)
    alpha = alpha_of(tokens(path)[-1])
    theta = tree.store.weights(parent, SCRIPT)
    student = tree.network(theta)
    s = State(student, optimizer_of(student, args))
    if args.cl > 0:
        s.teacher = tree.network(theta).requires_grad_(False).eval()
    facts = {"step": args.steps, "steps": args.steps, "parent": fingerprint(theta)}
    learns_labels = alpha != 0  # also where a coin decides, of which alpha is None
    learns_pseudo = alpha != 1
    consistency_on_both = args.cl > 0 and args.cl_on == "both"
    streams = {}
    if learns_labels or consistency_on_both:
        streams["labeled"] = partial(tree.stream, path, "labeled", tree.labeled)
    if learns_pseudo:
        pictures, facts["labels"] = label_images(tree, parent)  # lines 6 to 8
        streams["pseudo"] = partial(tree.stream, path, "pseudo", pictures)
    elif consistency_on_both:  # these images need no labels
        streams["pseudo"] = partial(tree.stream, path, "unlabeled", tree.pool)
    step_of = partial(refine_step, s, args, path, alpha)
    seconds = fit(tree, path, s, step_of, streams, args.steps)  # lines 9 to 12
    finish_node(tree, path, s.student, facts, seconds)  # lines 13, 14


def fit(
    tree: Tree, path: str, s: State, step_of: Callable, streams: dict[str, Callable], total: int
) -> float:
    """Algorithm 1, lines 9 to 12: the `total` iterations of a node -> the seconds that they took.
    Each calls step_of(step, **batches), with the next batch of every stream; a stream begins when
    it is called with the first and the last step. A node that was stopped goes on from its own
    checkpoint. Only stage 0 is scored on the way."""
    args, folder = tree.args, tree.store.folder(path)
    state = None
    if (folder / "last.pt").is_file():
        state = checkpoints.load_checkpoint(folder / "last.pt", SCRIPT, NodeForm)
        with checkpoints.fitting(state["path"]):
            restore(s, state)
    eval_every = args.eval_every if path == ROOT else 0
    run = runs.Run(
        folder,
        SCRIPT,
        args,
        tree.world,
        s.step,
        state,
        {"path": path},
        ends=(total,),
        eval_every=eval_every,
        signals=tree.signals,
    )
    feeds = {name: make(s.step, total) for name, make in streams.items()}
    if path == ROOT and s.step > s.scored and run.score_is_due(s.step):
        score_stage0(tree, s, run)  # it was stopped between saving and scoring
    s.student.train()
    for step in run.steps(s.step, total):  # line 9
        set_learning_rates(s, learning_rate_factor(step, total))
        batches = {name: next(feed) for name, feed in feeds.items()}
        distributed.seed_torch(args.seed, path, "step", step)  # of dropout
        values = step_of(step, **batches)  # lines 10, 11
        run.tally(step, values, *batches.values())
        s.step = step + 1
        if run.log_is_due(s.step):
            run.log(s.step, lr=s.opt.param_groups[0]["lr"])
        if run.save_is_due(s.step):
            run.save("last.pt", snapshot(s, tree))  # before scoring, which may fail
        run.leave_if_asked(s.step)
        if path == ROOT and run.score_is_due(s.step):
            score_stage0(tree, s, run)
            s.student.train()
    run.close()
    return run.seconds


def score_stage0(tree: Tree, s: State, run: runs.Run) -> None:
    """Keep the weights of stage 0 that are the best so far on the development images."""
    pictures = tree.dev[: tree.args.dev_size]
    dev = dev_miou(evaluate(s.student, pictures, tree.data, tree.args, tree.world).counts)
    run.write(s.step, dev_miou=dev)
    s.scored = s.step
    if dev > s.best_dev:
        s.best_dev, s.best_step = dev, s.step
        run.save("best.pt", node_checkpoint(tree, s.student, s.step))


def snapshot(s: State, tree: Tree) -> dict:
    """What last.pt holds: all that a node in training needs to go on."""
    return node_checkpoint(tree, s.student, s.step) | {
        "scored": s.scored,
        "best_dev": s.best_dev,
        "best_step": s.best_step,
        "networks": {name: network.state_dict() for name, network in s.networks().items()},
        "optimizers": {name: opt.state_dict() for name, opt in s.optimizers().items()},
    }


def restore(s: State, state: dict) -> None:
    """The reverse of `snapshot`."""
    s.step, s.scored = state["step"], state["scored"]
    s.best_dev, s.best_step = state["best_dev"], state["best_step"]
    for name, network in s.networks().items():
        network.load_state_dict(state["networks"][name])
    for name, optimizer in s.optimizers().items():
        optimizer.load_state_dict(state["optimizers"][name])


def node_checkpoint(tree: Tree, net: SegNet, step: int) -> dict:
    """What a checkpoint holds, so that every node can be scored, predicted with and refined."""
    return {
        "settings": json.loads(json.dumps(vars(tree.args))),
        "classes": tree.data.classes,
        "step": step,
        "networks": {"student": net.state_dict()},
    }


def finish_node(tree: Tree, path: str, net: SegNet, facts: dict, seconds: float = 0.0) -> None:
    """Algorithm 1, lines 13 and 14: write the weights and the scores of a node, and last its
    record, which marks it as done."""
    folder = tree.store.folder(path)
    state = node_checkpoint(tree, net, facts["step"])
    checkpoints.save_checkpoint(folder / "weights.pt", SCRIPT, state)
    scores = evaluate(net, tree.dev, tree.data, tree.args, tree.world)
    save_scores(folder / "scores.npz", scores, tree.args.temp)
    if tree.args.val_every_stage:
        val_record(tree, path, net)
    sizes = range(1, len(tree.dev) + 1)  # of development sets, Table III
    record = {
        "path": path,
        "stage": len(tokens(path)),
        **facts,
        "seconds": round(seconds, 2),
        "weights": fingerprint(net.state_dict()),
        "device": tree.world.device.type,
        "dev": {str(n): dev_miou(scores.counts[:n]) for n in sizes},
    }
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    tree.store.finish(path, record)
    line = f"dev {tree.dev_of(path):.2f}, {facts['steps']} steps in {seconds:.0f} s"
    notice = label_erase_notice(facts.get("labels"), tree.args.phi)
    print(f"{path or 'stage 0'}: {line}", notice, flush=True)


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # hundreds of sizes: no time for trials
def label_images(tree: Tree, path: str) -> tuple[list[Picture], dict]:
    """Algorithm 1, lines 6 to 8: label all unlabeled images with the node `path`, once for all its
    children; the labels are index PNGs of the images' size -> the pictures with these labels, and
    facts about the labels (see label_facts). DEPARTS[le]"""

    def fill(folder: Path) -> None:
        args, device = tree.args, tree.world.device
        net = tree.network(tree.store.weights(path, SCRIPT)).eval()
        counts = np.zeros(256, np.int64)
        for group in passes(tree.pool, tree.data, args, tree.world, labels=False):
            logits = forward_whole(net, group, device)
            for picture, z in zip(group, logits, strict=True):
                label, _ = label_erase(z[None], args.phi, args.temp)
                label = F.interpolate(label[None].byte(), size=picture.size, mode="nearest-exact")
                label = label[0, 0].cpu().numpy()
                counts += np.bincount(label.flatten(), minlength=256)
                Image.fromarray(label).save(folder / f"{picture.index}.png", compress_level=1)
        if not counts.any():
            number, first = len(tree.pool), tree.pool[0].image
            raise errors.RankError(
                f"None of the {number} images can be read, such as {first}; fetch them again."
            )
        facts = label_facts(counts, len(tree.data.classes))
        (folder / "stats.json").write_text(json.dumps(facts))

    target = tree.store.labels_folder(path)
    nodes.fill_once(target, fill)
    cure = f"remove the folder {target}, and the same command makes it again"
    facts = read_record(target / "stats.json", LabelFacts, cure)
    pictures = []
    for i, picture in enumerate(tree.pool):
        label = target / f"{i}.png"
        if label.is_file():
            pictures.append(Picture(picture.name, picture.image, label))
    return pictures, facts


class LabelFacts(TypedDict):
    """What `label_facts` gives, as stats.json holds it."""

    kept: float
    dominant: float
    share: list[float]


def label_facts(counts: np.ndarray, num_classes: int) -> dict:
    """From the number of pixels with each value 0..255: `kept`, the share that Label Erase leaves,
    and among the pixels that are left `dominant`, the share of the most frequent class, and
    `share`, that of every class."""
    kept = counts[:IGNORE]
    total = max(kept.sum(), 1)
    return {
        "kept": float(kept.sum() / counts.sum()),
        "dominant": float(kept.max() / total),
        "share": (kept[:num_classes] / total).tolist(),
    }


def label_erase_notice(labels: dict | None, phi: float) -> str:
    """What is printed about the pseudo labels of a stage: the share that Label Erase left, with a
    hint when so small or large a share shows that --phi does not fit."""
    if labels is None:
        return ""
    said = f"Label Erase kept {labels['kept']:.0%}"
    if phi > 0 and not 0.2 <= labels["kept"] <= 0.98:
        said += ": a --phi that fits this network would erase some pixels and keep most"
    return f"({said})"


# ============================================================================= the development set
def hold_out(
    data: Segmentation, labeled: list[Picture], split_seed: int, number: int
) -> list[Picture]:
    """Sec. IV: the development set, `number` labeled images that are not in the split. They are
    taken from the end of the order that splits are cut from (S4GAN's permutation where its file is
    there, else a seeded order), the last one first. So a smaller set is the beginning of a larger
    one. DEPARTS[dev]"""
    permutation = data.root / "splits" / "s4gan" / "permutation.txt"
    if data.name == "voc" and permutation.is_file():
        order = [name for name, _ in splits.read_list(permutation)]
    else:
        order = splits.draw(list(data.train), len(data.train), split_seed)
    taken = {picture.name for picture in labeled}
    held_out: list[Picture] = []
    for name in reversed(order):
        picture = data.train.get(name)
        if len(held_out) == number:
            break
        if name not in taken and picture is not None and picture.label.is_file():
            held_out.append(picture)
    if len(held_out) < number:
        raise UserError(
            f"{number} images with labels are to be held out (--dev-size, --dev-reserve), but "
            f"beside the {len(taken)} labeled ones there are only {len(held_out)}; ask for fewer, "
            f"or a smaller --split."
        )
    return held_out


def dev_miou(counts: np.ndarray) -> float:
    """Mean IoU in percent, over the classes that occur in the labels, of (n, K, K) counts.
    DEPARTS[dev]"""
    total = torch.from_numpy(counts.sum(0))
    in_labels = total.sum(1) > 0
    return round(metrics.iou(total)[in_labels].mean().item(), 4)


# ===================================================================== tables and pictures of a run
GROUP, DEGENERATE = 5, 4  # Table II: paths in a group, and the most equal letters in a row


def best_of(dev: list[float], val: list[float], n: int) -> tuple[float, float]:
    """Fig. 7: mean and standard deviation of the val score of the best on dev, over all ways to
    take `n` of the solutions."""
    ordered = np.array(val)[np.argsort(-np.array(dev), kind="stable")]  # the best on dev first
    # The i-th is the best of n whenever the n - 1 others are taken from those behind it.
    ways = [math.comb(len(ordered) - 1 - i, n - 1) for i in range(len(ordered))]
    chance = np.array(ways) / math.comb(len(ordered), n)
    mean = float(chance @ ordered)
    return mean, float(chance @ (ordered - mean) ** 2) ** 0.5


def group_scores(dev: list[float], val: list[float], size: int) -> list[float]:
    """Table II: the first `size` solutions are a group, the next ones another, and so on; of each
    full group, the val score of the solution that is best on dev."""
    groups = [range(i, i + size) for i in range(0, len(dev) - size + 1, size)]
    return [val[max(group, key=lambda i: dev[i])] for group in groups]


def rejected_share(stages: int, max_run: int) -> float:
    """Sec. IV-A: the share of all paths of L and P with more than `max_run` equal letters in a
    row."""
    # ways[n]: in how many ways n stages can be cut into runs that are short enough. The last run
    # has 1 to max_run stages, which leaves n - 1 to n - max_run stages for the runs before it.
    ways = [1]
    for n in range(1, stages + 1):
        ways.append(sum(ways[max(n - max_run, 0) :]))
    # The letter of the first run decides the letters of all others.
    return 1 - 2 * ways[stages] / 2**stages


def bloat(shares: list[float], rise: float = 0.1) -> list[bool]:
    """Fig. 2: for each node's share of the dominant class among its pseudo labels, whether it is
    more than `rise` above the smallest of these shares."""
    return [share > min(shares) + rise for share in shares]


def spread(values: list[float]) -> str:
    """Mean and sample deviation, as in Table II."""
    if len(values) < 2:
        return f"{np.mean(values):.2f}" if values else "-"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def markdown(head: str, rows: list[tuple]) -> str:
    """A table. `head` names the columns, with commas between; floats get two digits, NaN a dash."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return "-" if math.isnan(value) else f"{value:.2f}"

    names = head.split(", ")
    lines = [names, ["---"] * len(names)]
    lines += [[cell(value) for value in row] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def trail(path: str) -> list[str]:
    """Stage 0 and all stages up to `path`."""
    return [ROOT, *prefixes(path)]


def leaves(paths: list[str]) -> list[str]:
    """The paths that are no beginning of another, stage 0 left out."""
    parents = {parent_of(path) for path in paths if path}
    return [path for path in dict.fromkeys(paths) if path and path not in parents]


def deepest(tree: Tree, paths: list[str]) -> str:
    """The longest path, and of several the one whose end is best on dev. (The leaves of GIST would
    not do: they include the children that it gave up on the way.)"""
    longest = max(len(tokens(path)) for path in paths)
    return min((p for p in paths if len(tokens(p)) == longest), key=tree.order)


def tables(tree: Tree, results: dict, visited: list[str], val: dict[str, float]) -> list[str]:
    """The parts of report.md. `visited` are all nodes, `val` their scores on val."""
    searches = results["visited"]
    parts = [table_of_searches(tree, searches, val), table_of_nodes(tree, visited, val)]
    # Two trials of RIST may have drawn the same path, which then counts twice.
    drawn = results.get("trials", leaves(searches.get("rist", [])))
    ends = [*drawn, *leaves(searches.get("path", []))]
    if len(ends) > 1:
        chosen = [tree.best(trail(end)) for end in ends]
        dev, scored = [tree.dev_of(p) for p in chosen], [val[p] for p in chosen]
        if any(math.isnan(score) for score in scored):
            parts.append(
                "Not all chosen nodes are scored on val: Table II and Fig. 7 need "
                "--val-every-stage (and nodes whose weights are still there).\n"
            )
        else:
            parts.append(table_of_paths(ends, chosen, dev, scored))
            parts.append(table_of_best_of_n(dev, scored))
    if "rist" in searches and len(tree.dev) >= 25:
        parts.append(table_of_dev_sizes(tree, searches["rist"], val))
    return parts


def table_of_searches(tree: Tree, searches: dict[str, list[str]], val: dict[str, float]) -> str:
    """What each search chose, and how many nodes it visited."""
    rows = []
    for name, paths in searches.items():
        best = tree.best(paths)
        stage, dev = len(tokens(best)), tree.dev_of(best)
        rows.append((name, len(set(paths)) - 1, best or "stage 0", stage, dev, val[best]))
    return "## Searches\n\n" + markdown("search, trainings, path, stage, dev, val", rows)


def table_of_nodes(tree: Tree, visited: list[str], val: dict[str, float]) -> str:
    """All nodes, with their pseudo labels: what Label Erase kept, and whether one class spreads."""
    records = {path: tree.store.record(path) for path in visited}
    on_pseudo = [path for path, record in records.items() if "labels" in record]
    flags = bloat([records[path]["labels"]["dominant"] for path in on_pseudo])
    bloated = dict(zip(on_pseudo, flags, strict=True))
    rows = []
    for path, record in records.items():
        kept, dominant = float("nan"), "-"
        if path in bloated:
            kept, dominant = record["labels"]["kept"], f"{record['labels']['dominant']:.2f}"
            if bloated[path]:
                dominant += " bloat"
        dev, seconds = tree.dev_of(path), record["seconds"]
        rows.append((path or "stage 0", dev, val[path], kept, dominant, seconds))
    head = "path, dev, val, pseudo labels kept, share of their dominant class, seconds"
    return "## Nodes\n\n" + markdown(head, rows)


def table_of_paths(ends: list[str], chosen: list[str], dev: list[float], val: list[float]) -> str:
    """Table II: paths, each at the stage that dev chooses, with groups and deviations."""
    stages = [len(tokens(path)) for path in chosen]
    text = "## Paths, each at the stage that dev chooses (Table II)\n\n"
    text += markdown("path, stage, dev, val", list(zip(ends, stages, dev, val, strict=True)))
    text += f"\nval {spread(val)} over {len(val)} paths"
    groups = group_scores(dev, val, GROUP)
    said = ", ".join(f"{score:.2f}" for score in groups)
    text += f"; best on dev in each group of {GROUP}: {said or 'no full group'}"
    text += f" ({spread(groups)})\n" if len(groups) > 1 else "\n"
    kept = [v for end, v in zip(ends, val, strict=True) if longest_run(end) <= DEGENERATE]
    if len(kept) < len(val):
        share = rejected_share(max(len(tokens(end)) for end in ends), DEGENERATE)
        text += (
            f"\nWithout the paths of more than {DEGENERATE} equal letters in a row "
            f"({share:.2%} of all paths): val {spread(kept)} over {len(kept)} paths\n"
        )
    return text


def table_of_best_of_n(dev: list[float], val: list[float]) -> str:
    """Fig. 7."""
    rows = [(n, *best_of(dev, val, n)) for n in range(1, min(len(val), 10) + 1)]
    return "## Best of n paths by dev (Fig. 7)\n\n" + markdown("n, mean val, deviation", rows)


def table_of_dev_sizes(tree: Tree, paths: list[str], val: dict[str, float]) -> str:
    """Table III for RIST, whose nodes do not depend on the development set."""
    sizes = [size for size in (10, 25, 50, 100, 200, 500) if size <= len(tree.dev)]
    rows = []
    for size in sizes:
        best = tree.best(paths, size)
        rows.append((size, best or "stage 0", val[best]))
    return "## Development images (Table III, RIST)\n\n" + markdown("images, path, val", rows)


def draw_tree(tree: Tree, visited: list[str], best: set[str], file: Path) -> None:
    """Fig. 3: open nodes learned from labels, filled ones from pseudo labels, and stage 0 is gold;
    dev mIoU is written beside each. `best` are the nodes that the searches chose."""
    paths = sorted(visited)
    parents, fills = [], []
    for path in paths:
        parents.append(None if path == ROOT else paths.index(parent_of(path)))
        fills.append(fill_of(path))
    plots.search_tree(
        parents=parents,
        depths=[len(tokens(path)) for path in paths],
        values=[tree.dev_of(path) for path in paths],
        fills=fills,
        best=[path in best for path in paths],
        path=file,
        title="dev mIoU; learned from: gold stage 0, open labels, filled pseudo labels\n"
        "red: the way to the best node of each search, thick ring",
    )


def fill_of(path: str) -> str:
    """The colour of a node in the tree, by what its last stage learned from."""
    if path == ROOT:
        return "gold"
    if path.endswith("L"):
        return "white"
    return "dimgray" if path.endswith("P") else "lightsteelblue"


def draw_curves(
    tree: Tree, searches: dict[str, list[str]], val: dict[str, float], file: Path
) -> None:
    """Figs. 1 and 6: mIoU by stage of every search; Fig. 5: confidences of stage 0 before and after
    temperature scaling."""
    dev_curves, val_curves = {}, {}
    for name, paths in searches.items():
        ends = [deepest(tree, paths)] if name == "gist" else leaves(paths)
        dev_curves[name] = [[tree.dev_of(path) for path in trail(end)] for end in ends]
        val_curves[name] = [[val[path] for path in trail(end)] for end in ends]
    scores = load_scores(tree, ROOT, ["temps", "confidence"])
    temps, confidence = scores["temps"], scores["confidence"]
    histograms = {f"T = {t:g}": row for t, row in zip(temps, confidence, strict=True)}
    plots.curves_by_stage(
        {"dev mIoU": dev_curves, "val mIoU": val_curves},
        {"pixels of stage 0 by confidence": histograms},
        file,
    )


def draw_masks(tree: Tree, path: str, file: Path) -> None:
    """Figs. 2, 8, 9: development images with their predictions at stages 0, 1, 5, 9 and the last of
    `path`."""
    shown = [p for p in trail(path) if len(tokens(p)) in (0, 1, 5, 9) or p == path]
    names = [f"mask{i}" for i in range(len(tree.dev[:6]))]
    masks = [load_scores(tree, path, names) for path in shown]
    rows = []
    for i, picture in enumerate(tree.dev[:6]):
        image, label = semantic.load_picture(picture, tree.data)
        predicted = [plots.colour(torch.from_numpy(mask[f"mask{i}"])) for mask in masks]
        rows.append([image.permute(1, 2, 0).numpy(), *predicted, plots.colour(label)])
    plots.strip(rows, ["image", *(p or "stage 0" for p in shown), "label"], file)


def write_report(tree: Tree, results: dict, out: Path) -> dict:
    """Write results.json, log.jsonl (a line for each node), report.md and pictures into the run
    folder `out` -> the results, to which the totals of the run are added."""
    store, searches = tree.store, results["visited"]
    visited = {path for paths in searches.values() for path in paths}
    visited = sorted(visited, key=lambda path: (len(tokens(path)), path))
    records = [store.record(path) for path in visited]
    results |= {
        "trainings": len(visited) - 1,
        "steps": sum(record["steps"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "images_per_second": median_speed([store.folder(path) for path in visited]),
    }
    files.write_text(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    val = {path: val_of(tree, path) for path in visited}
    files.write_text(out / "report.md", "\n".join(tables(tree, results, visited, val)))
    draw_tree(tree, visited, {tree.best(paths) for paths in searches.values()}, out / "tree.png")
    draw_curves(tree, searches, val, out / "curves.png")
    for name, paths in searches.items():
        end = deepest(tree, paths)
        draw_masks(tree, end, out / "previews" / f"{name.replace(' ', '-')}-{end or 'stage0'}.png")
    files.write_text(out / "results.json", json.dumps(results, indent=1))
    reached = [
        f"{name} {result['miou']:.2f} ({result['path'] or 'stage 0'}){runs.classes_note(result)}"
        for name, result in results.items()
        if isinstance(result, dict) and "miou" in result
    ]
    written = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    print(f"\nmiou: {', '.join(reached)}, chosen by {results['dev_size']} development images")
    print(f"in {out}: {', '.join(written)}; nodes in {store.others}")
    return results


def median_speed(folders: list[Path]) -> float | None:
    """Images per second, the median of all lines in the logs of these nodes."""
    speeds = []
    for folder in folders:
        if (folder / "log.jsonl").is_file():
            records = files.read_log(folder / "log.jsonl")
            speeds += [r["images_per_second"] for r in records if "images_per_second" in r]
    return sorted(speeds)[len(speeds) // 2] if speeds else None


# ====================================================================================== evaluation
class WholePicture(NamedTuple):
    """A picture as it is scored or labeled: whole, at --resize."""

    index: int  # its place in the list of pictures
    image: Tensor  # (3, H, W) uint8
    label: Tensor | None  # (H, W)
    size: tuple[int, int]  # height and width on disk


class Scores(NamedTuple):
    """What an evaluation finds out."""

    counts: np.ndarray  # (n, K, K) confusion counts of each picture; rows are labels
    masks: list[np.ndarray]  # (H, W) predictions of the first six pictures (Figs. 2, 8, 9)
    confidence: np.ndarray  # (2, 50) histograms of their confidences (Fig. 5)


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # hundreds of sizes: no time for trials
def evaluate(
    net: SegNet, pictures: list[Picture], data: Segmentation, args: Args, world: World
) -> Scores:
    """EVAL of Algorithm 1: whole pictures, single scale, no flip, at --resize."""
    net.eval()
    counts, masks, confidence = [], [], np.zeros((2, 50), np.int64)
    for group in passes(pictures, data, args, world, labels=True):
        logits = forward_whole(net, group, world.device)
        for picture, z in zip(group, logits, strict=True):
            prediction = z.argmax(0)
            label = picture.label.to(prediction.device)
            counts.append(metrics.confusion(prediction, label, len(data.classes)).numpy())
            if len(masks) < 6:
                masks.append(prediction.byte().cpu().numpy())
                confidence += confidence_histograms(z, args.temp)
    return Scores(np.stack(counts), masks, confidence)


def confidence_histograms(logits: Tensor, temp: float) -> np.ndarray:
    """Fig. 5: histograms (2, 50) of the confidences of logits (K, H, W), without temperature
    scaling and with it."""
    rows = []
    for t in (1.0, temp):
        _, confidence = label_erase(logits[None], 0, t)
        rows.append(torch.histc(confidence.cpu(), 50, 0, 1).long().numpy())
    return np.stack(rows)


def passes(
    pictures: list[Picture], data: Segmentation, args: Args, world: World, labels: bool
) -> Iterator[list[WholePicture]]:
    """Whole pictures, in groups that go through the network in one pass: neighbours of one size, as
    many as the size allows. Without `labels`, a picture that cannot be read is left out."""
    group: list[WholePicture] = []
    for index, image, label in semantic.score_loader(pictures, data, world, args.workers, labels):
        if image is None:
            continue
        size = tuple(image.shape[-2:])
        most = min(max(2**21 // (size[0] * size[1]), 1), 16)  # about two million pixels at once
        if group and (size != group[0].size or len(group) == most):
            yield group
            group = []
        group.append(WholePicture(index, *resized(image, label, args.resize), size))
    if group:
        yield group


def forward_whole(net: SegNet, group: list[WholePicture], device: torch.device) -> Tensor:
    """Logits (n, K, H, W) at the pictures' size."""
    images = torch.stack([picture.image for picture in group]).to(device)
    logits, _ = net.forward(images)  # not the compiled network: there are many sizes
    return upsample(logits, images.shape[-2:])


def val_record(tree: Tree, path: str, net: SegNet | None = None) -> dict:
    """`miou` and `iou` of a node on --val, kept in its folder. Nothing is ever chosen by them."""
    file = val_file(tree, path)
    record = read_val(tree, path)
    if record is None:
        if net is None:
            net = tree.network(tree.store.weights(path, SCRIPT))
        counts = evaluate(net, tree.data.val, tree.data, tree.args, tree.world).counts
        record = metrics.iou_record(torch.from_numpy(counts.sum(0)), tree.data.classes, 0)
        files.write_text(file, json.dumps(record | {"data": tree.content_of_val}))
    return record


def val_file(tree: Tree, path: str) -> Path:
    """Where `val_record` keeps the score of a node."""
    return tree.store.folder(path) / f"val-{tree.args.val}.json"


def val_of(tree: Tree, path: str) -> float:
    """mIoU of a node on val, NaN where it was not scored there (--val-every-stage does)."""
    record = read_val(tree, path)
    return float("nan") if record is None else record["miou"]


class ValRecord(TypedDict):
    """What a file of `val_file` holds at least; `data` is the fingerprint of what was scored."""

    miou: float
    iou: dict[str, float | None]
    data: str


def read_val(tree: Tree, path: str) -> dict | None:
    """What `val_record` has written of a node, or None where it is not there, is damaged, or was
    measured on other data than now."""
    file = val_file(tree, path)
    if not file.is_file():
        return None
    try:
        record = read_record(file, ValRecord, "it is made anew")
    except UserError as error:
        print(error, flush=True)
        return None
    if record.pop("data") != tree.content_of_val:
        print(f"{file} is of other pictures or labels; it is made anew.", flush=True)
        return None
    return record


def save_scores(file: Path, scores: Scores, temp: float) -> None:
    """scores.npz of a node: `counts`, `mask0`, `mask1`, ..., and `confidence` at `temps`."""
    arrays = {"temps": np.array([1, temp]), "confidence": scores.confidence}
    arrays |= {f"mask{i}": mask for i, mask in enumerate(scores.masks)}
    np.savez_compressed(file, **arrays, counts=scores.counts)


def load_scores(tree: Tree, path: str, names: list[str]) -> dict[str, np.ndarray]:
    """Some arrays of what `save_scores` has written of a node."""
    folder = tree.store.folder(path)
    try:
        with np.load(folder / "scores.npz", allow_pickle=False) as scores:
            return {name: scores[name] for name in names}
    except Exception as error:  # noqa: BLE001 (zip, zlib and numpy have their own)
        raise UserError(
            f"{folder / 'scores.npz'} cannot be read ({one_line(error)}); remove the folder "
            f"{folder}, and the run's command trains it again."
        ) from None


# ========================================================================== data, weights, and runs
# SAME AS gta_seg.py:backbone_weights
def backbone_weights(args: Args) -> dict[str, Tensor] | None:
    """The tensors that --weights names, a file's or the embedded data's own; None for imagenet and
    none."""
    if args.weights in ("imagenet", "none"):
        return None
    if args.weights == "shapes":
        from data import shapes

        return checkpoints.read_weights(shapes.pretrained(Path(args.root), args.backbone))
    return checkpoints.read_weights(Path(args.weights))


def initial_weights(args: Args, num_classes: int) -> tuple[dict[str, Tensor] | None, list[str]]:
    """The tensors of a whole network, which are those that --weights names and a fresh classifier;
    None where Tree.network builds them from --weights by itself. And lines for the user."""
    if not args.weights:
        raise UserError(
            "The paper starts from MS-COCO weights: give the file resnet101COCO-41f33a49.pth (or "
            "another layout of docs/gist_rist.md) with --weights FILE, or start with --weights "
            "imagenet --pixels imagenet."
        )
    weights = backbone_weights(args)
    check_pixels(args, weights)
    if args.weights == "imagenet" and args.backbone in CAFFE:
        # torchvision's network has its strides in other convolutions, but the same names.
        name = args.backbone.removeprefix("caffe_") + ".tv_in1k"
        weights = backbones.build(name, 32, True)[0].state_dict()
    if weights is None:
        return None, []
    distributed.seed_torch(args.seed, "student")
    net = SegNet(args, num_classes)
    notes = []
    if args.backbone in CAFFE:
        weights = caffe_weights(weights, net.backbone, args.weights)
        kind = "ImageNet, normalised RGB" if args.pixels == "imagenet" else "COCO, 0 to 255"
        notes.append(f"of {args.weights}: {kind}")
    else:
        check_cut(args, weights, backbones.bare(net.backbone))
    notes += checkpoints.load_matching(backbones.bare(net.backbone), weights, args.weights)
    return net.state_dict(), notes


def check_pixels(args: Args, weights: dict[str, Tensor] | None) -> None:
    """UserError when --pixels does not fit the weights: frozen statistics fit one range of values,
    and training does not mend the wrong one. DEPARTS[pixels]"""
    if args.weights == "none":
        return
    of_torchvision = {"fc.weight", "layer1.0.conv1.weight"}
    is_file = args.weights not in ("imagenet", "shapes")
    is_coco = args.backbone in CAFFE and is_file and not of_torchvision <= weights.keys()
    if is_coco and args.pixels == "imagenet":
        raise UserError(
            f"--weights {args.weights} holds COCO weights; give --pixels bgr (or rgb) with it."
        )
    if not is_coco and args.pixels != "imagenet":
        raise UserError(f"--weights {args.weights} holds no COCO weights; give --pixels imagenet.")


def check_cut(args: Args, weights: dict[str, Tensor], backbone: nn.Module) -> None:
    """UserError when a file has no weights for the last stage, which would stay random."""
    last = list(backbone.state_dict())[-1].split(".")[0]
    if not any(name.startswith(f"{last}.") for name in weights):
        raise UserError(
            f"--weights {args.weights} has no tensors of {last}, the last part of {args.backbone}; "
            f"leave it out with --cut {args.cut + 1}."
        )


# SAME AS gta_seg.py:find_data
def find_data(args: Args, classes: list[str] | None = None) -> Segmentation:
    """The data set that --dataset and --root name; the embedded one is drawn on first use."""
    root = Path(args.root)
    if args.dataset == "shapes":
        from data import shapes

        root = shapes.make_voc(root / "voc")
    return semantic.find(args.dataset, root, args.val, classes)


def choose_pictures(args: Args, data: Segmentation) -> tuple[Tree, str]:
    """A tree with the labeled, unlabeled and development images of a run, and a line about them."""
    split, balanced = args.split, True
    if args.dataset == "cityscapes" and split in CITYSCAPES:
        split, balanced = f"random:{CITYSCAPES[split]}", False
    chosen = semantic.choose(
        data, split, args.split_seed, args.unlabeled, "s4gan", balanced=balanced
    )
    reserve = max(args.dev_size, args.dev_reserve)
    dev = hold_out(data, chosen.labeled, args.split_seed, reserve)
    held_out = {picture.image for picture in dev}
    # The labels of the pool are never opened.
    pool = [Picture(p.name, p.image, None) for p in chosen.unlabeled if p.image not in held_out]
    if not pool:
        raise UserError(
            f"--split {args.split} and {len(dev)} development images leave no unlabeled image; "
            f"take a smaller split or --dev-size, or name some with --unlabeled."
        )
    line = (
        f"{chosen.text}; {len(dev)} held out, {len(pool)} left to label; "
        f"{len(chosen.labeled) + args.dev_size} labels used in all; scored on {len(data.val)}"
    )
    one_of_many = distributed.start(args.device, join=False)
    distributed.warn_of_slow_bf16(args.precision, one_of_many)
    # Processes do not talk: each trains its nodes as if it were alone.
    world = replace(one_of_many, rank=0, size=1)
    return Tree(args, world, data, chosen.labeled, pool, dev), line


# Settings that change no node's weights: those that say which nodes are wanted, and bookkeeping.
# (Pictures and initial weights do, but key_of and set_up take these by content, not by name.)
SEARCH_ONLY = {
    "search", "alpha", "beam", "trials", "path", "stages", "max_run", "independent", "dev_size",
    "dev_reserve",
}  # fmt: skip
BOOKKEEPING = {
    "root", "split", "split_seed", "unlabeled", "val", "out", "store", "resume", "workers",
    "device", "compile", "save_every", "log_every", "keep_nodes", "val_every_stage", "eval",
    "predict", "predict_tile", "export", "report", "weights", "check",
}  # fmt: skip
# Settings that shape the weights of stage 0 only, and those that shape all other nodes only.
STAGE0_ONLY = {"stage0", "stage0_steps", "gan_lr", "gan_gamma", "mix_colour", "eval_every"}
REFINE_ONLY = {"cl", "cl_on", "phi", "temp", "steps"}


def key_of(tree: Tree, without: set[str], *more: Any) -> str:
    """The name of a folder of nodes, a hash of what shapes their weights: all settings but those in
    `without`, the lists of images, and `more`."""
    without = SEARCH_ONLY | BOOKKEEPING | without
    if not tree.args.freeze_backbone:
        without = without | {"freeze_backbone"}  # stores from before this flag keep their names
    shaping = {name: v for name, v in vars(tree.args).items() if name not in without}
    lists = [
        splits.fingerprint(picture.name for picture in pictures)
        for pictures in (tree.labeled, tree.pool, tree.dev)
    ]
    content = [shaping, tree.data.classes, lists, more]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def set_up(args: Args) -> tuple[Tree, list[str]]:
    """Find the data, choose the pictures and the device, read the initial weights, and name the
    folder of stage 0 -> the tree, and lines to print."""
    data = find_data(args)
    tree, line = choose_pictures(args, data)
    looked = first_look(data, tree.labeled + tree.dev, data.val)
    tree.init, notes = initial_weights(args, len(data.classes))
    if tree.world.device.type == "cpu":
        torch.set_num_threads(1)  # sums, and so weights, depend on the number of threads
    # Stage 0 depends on its initial weights, and on how many images choose its best iteration.
    start = args.weights if tree.init is None else fingerprint(tree.init)
    if args.stage0 not in STAGE0:
        start = hashlib.sha256(Path(args.stage0).read_bytes()).hexdigest() + start
    key = key_of(tree, REFINE_ONLY, start, args.dev_size)
    lines = [line, *looked, *(f"weights {note}" for note in notes)]
    name = f"stage0-{key}"
    tree.content = content_of([*tree.labeled, *tree.dev], tree.pool)
    tree.store.root = Path(args.store) / f"{name}{tree.content}"
    others = [folder.name for folder in Path(args.store).glob(f"{name}*")]
    if others and tree.store.root.name not in others:
        lines.append(
            f"{Path(args.store) / others[0]} was made with these settings, but of other pictures "
            f"or labels; all nodes are made anew"
        )
    return tree, lines


def content_of(labeled: list[Picture], unlabeled: list[Picture]) -> str:
    """A fingerprint of what networks are made of: the labels by their content, and the pictures by
    their sizes in bytes, because there may be many. So a copy of a data set is the same one."""
    digest = hashlib.sha256()
    for picture in labeled:
        with contextlib.suppress(OSError):  # whoever needs it will say so
            digest.update(picture.label.read_bytes())
    for picture in [*labeled, *unlabeled]:
        with contextlib.suppress(OSError):
            digest.update(f"{picture.name} {picture.image.stat().st_size};".encode())
    return digest.hexdigest()[:8]


def check(args: Args) -> None:
    """Refuse, before any work, what cannot run."""
    cli.check_ranges(args)
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: give the smaller number first.")
    if "path" in args.search:
        fits = [re.fullmatch(r"([LPB]|F0?\.\d+)+", path) for path in args.path]
        if not fits or not all(fits):
            raise UserError(
                "--search path needs --path with words of L and P (or B, F0.75), such as --path "
                "LPPLLLPPL."
            )
    if args.stage0 not in STAGE0 and not Path(args.stage0).is_file():
        raise UserError(f"--stage0 {args.stage0} is no file; give one, or {', '.join(STAGE0)}.")


def train(args: Args) -> dict:
    """One run: stage 0, all searches, the chosen networks on val, results.json, whose contents are
    returned."""
    check(args)
    if args.check:
        tree, _ = choose_pictures(args, find_data(args))
        return look_at_all(tree.data, tree.labeled + tree.dev, tree.pool, tree.data.val)
    out = runs.default_out(SCRIPT, args)
    args = replace(args, out=str(out))
    tree, lines = set_up(args)
    main = distributed.launched().main
    if main:
        is_new = not (out / "config.json").exists()
        runs.open_run(out, SCRIPT, args, args.resume, is_new)
        facts = {"images": "; ".join(lines), "stage0": str(tree.store.root)}
        runs.write_config(out, SCRIPT, args, tree.world, facts)
        searches = ", ".join(args.search)
        print(*lines, sep="\n")
        print(f"{args.stage0} stage 0; {searches}; in {out}, nodes in {args.store}")
    tree.signals = runs.Signals(say=main)
    try:
        return search_and_report(tree, out)
    finally:
        tree.signals.give_back()


def search_and_report(tree: Tree, out: Path) -> dict:
    """Stage 0, all searches, and, on the main process, the results of what they chose."""
    args, store = tree.args, tree.store
    store.ensure(ROOT, tree.train, tree.wait)
    key = key_of(tree, STAGE0_ONLY, store.record(ROOT)["weights"], tree.content)
    store.others = Path(args.store) / key
    visited = search_all(tree)
    if not distributed.launched().main:
        return {}
    results = collect_results(tree, visited)
    save_best(tree, visited, out)
    return write_report(tree, results, out)


def collect_results(tree: Tree, visited: dict[str, list[str]]) -> dict:
    """results.json: what each search chose, its score on val, and where everything lies."""
    args, store = tree.args, tree.store
    best = {"stage0": ROOT} | {name: tree.best(paths) for name, paths in visited.items()}
    results: dict[str, Any] = {}
    for name, path in best.items():
        store.ensure(path, tree.train, tree.wait)
        results[name] = {
            "path": path,
            "stage": len(tokens(path)),
            "dev": tree.dev_of(path),
            **val_record(tree, path),
            "step": store.record(path)["step"],
        }
    for name in ("dataset", "split", "split_seed", "seed", "val", "dev_size"):
        results[name] = getattr(args, name)
    results["split_fingerprint"] = splits.fingerprint(p.name for p in tree.labeled)
    results["stage0_folder"] = str(store.root)
    results["nodes"] = str(store.others)
    results["visited"] = visited
    results["trials"] = rist_paths(args) if "rist" in visited else []
    return results


def save_best(tree: Tree, visited: dict[str, list[str]], out: Path) -> None:
    """best.pt of the run: the best node of all searches, with the settings of this run."""
    path = tree.best([path for paths in visited.values() for path in paths])
    state = checkpoints.load_checkpoint(tree.store.folder(path) / "weights.pt", SCRIPT, NodeForm)
    state["settings"] = json.loads(json.dumps(vars(tree.args)))
    checkpoints.save_checkpoint(out / "best.pt", SCRIPT, state)


class Results(TypedDict):
    """What --report needs of results.json."""

    stage0_folder: str
    nodes: str
    visited: dict[str, list[str]]
    trials: list[str]
    dev_size: int
    split_fingerprint: str


def report_again(args: Args) -> dict:
    """--report: tables and pictures of a finished run once more; UserError when it is not finished,
    or its nodes are gone."""
    out = Path(args.report)
    if not (out / "results.json").is_file():
        raise UserError(
            f"{out} is no finished run: it has no results.json; finish it with --resume."
        )
    tree, _ = set_up(args)
    results = read_record(
        out / "results.json", Results, "the run's command, with --resume, writes it anew"
    )
    tree.store.root, tree.store.others = Path(results["stage0_folder"]), Path(results["nodes"])
    visited = [path for paths in results["visited"].values() for path in [ROOT, *paths]]
    visited += results["trials"]
    lost = [path or "stage 0" for path in visited if not tree.store.done(path)]
    if lost:
        raise UserError(
            f"{len(lost)} nodes of {out} are not in {tree.store.others} any more, for example "
            f"{lost[0]}; the run's command trains them again."
        )
    write_report(tree, results, out)
    print("\n" + (out / "report.md").read_text())
    return results


class Loaded(NamedTuple):
    """A checkpoint, ready to be used."""

    net: SegNet
    classes: list[str]
    world: World


def load(path: str, args: Args) -> Loaded:
    """The network of a checkpoint, built from the settings that it holds."""
    state = checkpoints.load_checkpoint(Path(path), SCRIPT, NodeForm)
    world = replace(distributed.start(args.device, join=False), rank=0, size=1)
    net = SegNet(args, len(state["classes"]))
    checkpoints.load_exact(net, state["networks"]["student"], path)
    net = net.to(world.device, memory_format=torch.channels_last).eval()
    return Loaded(net, state["classes"], world)


def score_checkpoint(args: Args) -> dict:
    """--eval: score a checkpoint on val and write <checkpoint>.results.json."""
    loaded = load(args.eval, args)
    data = find_data(args, loaded.classes)
    counts = evaluate(loaded.net, data.val, data, args, loaded.world).counts
    total = torch.from_numpy(counts.sum(0))
    scores = {"student": {"last": metrics.iou_record(total, data.classes, 0)}}
    facts = {name: getattr(args, name) for name in ("dataset", "split", "val", "seed")}
    facts["confusion"] = total.tolist()
    file = Path(f"{args.eval}.results.json")
    runs.write_scores(file, scores, facts, "miou", f"{args.val} of {data.root}")
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: index PNGs, confidences and overlays of images or folders into
    <checkpoint>.predictions/."""
    checkpoint, *images = args.predict
    loaded = load(checkpoint, args)

    def logits_of(batch: Tensor) -> Tensor:
        small = torch.stack([resized(image, None, args.resize)[0] for image in batch])
        return upsample(loaded.net(small)[0], batch.shape[-2:])

    out = Path(f"{checkpoint}.predictions")
    how = (logits_of, loaded.world, args.workers, args.predict_tile)
    predictions.predict_labels(images, out, loaded.classes, *how)


def settings(
    dataset: str = "voc",
    eval: str = "",
    predict: str = "",
    export: str = "",
    report: str = "",
    **backbone: str,
) -> Args:
    """What the command line starts from: a preset, or the settings of a checkpoint or run that is
    looked at."""
    checkpoint = eval or predict or export
    if report:
        if not Path(report, "config.json").is_file():
            raise UserError(f"--report {report}: there is no run in this folder; name its --out.")
        checkpoint = f"{report}/best.pt"
    if checkpoint:
        return cli.saved_settings(Args, Path(checkpoint), SCRIPT)
    return preset(dataset, **backbone)


# Flags that pick the defaults of the others.
CHOOSERS = ("dataset", "backbone", "eval", "predict", "export", "report")


def main(args: Args) -> Any:
    if args.report:
        return report_again(args)
    if args.eval:
        return score_checkpoint(args)
    if args.predict:
        return predict(args)
    if args.export:
        return checkpoints.export(Path(args.export), SCRIPT, ("student",))
    return train(args)


# ================================================================================= official weights
def caffe_weights(weights: dict[str, Tensor], backbone: nn.Module, file: str) -> dict[str, Tensor]:
    """The tensors of a Caffe-style ResNet in a file of any layout of docs/gist_rist.md; UserError
    when one is missing. The file's own classifier is left out. DEPARTS[init-head]"""
    weights = {deeplab_name(name): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    lost = []
    for name, own in backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in weights or weights[name].shape != own.shape:
            lost.append(name)
    if lost:
        raise UserError(
            f"--weights {file} lacks {len(lost)} tensors, such as {lost[0]}; give a file of a "
            f"layout in docs/gist_rist.md."
        )
    return weights


CONVOLUTIONS = {"reduce": 1, "conv3x3": 2, "increase": 3}  # of a block, in layout C


def deeplab_name(name: str) -> str:
    """A tensor's name in a weight file of DeepLabV2 (layouts A to E of docs/gist_rist.md) -> that
    of torchvision's and timm's ResNet; branches of the classifier become head.0 to head.3."""
    name = re.sub(r"^(Scale|backbone|base)\.", "", name)
    name = re.sub(r"^(layer5\.conv2d_list\.|classifier\.|aspp\.c)(\d)\.", r"head.\2.", name)
    # Layout C: the stem, and stages 2 to 5.
    name = re.sub(r"^layer1\.conv1\.(conv|bn)\.", r"\g<1>1.", name)
    found = re.match(r"layer(\d)\.block(\d+)\.(\w+)\.(conv|bn)\.(.+)", name)
    if found is None:
        return name
    stage, block, place, kind, rest = found.groups()
    if place == "shortcut":
        layer = "downsample.0" if kind == "conv" else "downsample.1"
    else:
        layer = f"{kind}{CONVOLUTIONS.get(place, place)}"
    return f"layer{int(stage) - 1}.{int(block) - 1}.{layer}.{rest}"


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=CHOOSERS)
