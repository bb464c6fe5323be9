"""Better (Pseudo-)Labels for Semi-Supervised Instance Segmentation.
Porcher, Couprie, Szafraniec, Verbeek. ICLR 2024 workshop. https://arxiv.org/abs/2403.11675

A teacher learns from labels that are smoothed towards similar and towards rare classes. On labels
it has not seen, its error of confidence is measured for each class. A student learns from labels,
and from the teacher's soft pseudo labels with that error taken out; the teacher follows it by EMA.
Unlabeled pictures come from a large pool: the neighbours of rare objects. Both networks are Cascade
Mask R-CNN with an EVA-02 backbone, complete in this file.

    paper                                              this file
    Sec. 3.1  Eq. 1, class prototypes                  prototypes, embed_objects
    Sec. 3.1  Eq. 2, similarities and frequencies      similar_classes
    Sec. 3.1  Eq. 3, smoothed labels                   smoothed_targets
    Sec. 3.2  Eq. 4, CCECE                             ccece, shrunk, calibrate
    Sec. 3.2  Eq. 5, corrected pseudo labels           corrected, pseudo_targets, pseudo_labels
    Sec. 3.2  the student                              train_step, ema_update
    Sec. 4.1  retrieval of unlabeled images            retrieve
    Sec. 4.1  85 % and 15 %, the grid search           plan, grid
    Sec. 4.1  Cascade Mask R-CNN                       Detector: RPN, CascadeHeads, MaskHead
    Sec. 4.1  EVA-02                                   EVA02, SimplePyramid
    Sec. 4.1  schedule, optimizer, evaluation          schedule, adamw, detect, evaluate
    Table 1; Figs. 2-4                                 Args, evaluate; commands in docs/better_pseudo_labels.md

Shapes: B images of S x S pixels, C classes, N objects of an image, A anchors, R regions (RoIs), W
channels of the pyramid. Boxes are x0, y0, x1, y1 in pixels of the padded square. There is no public
code of this paper; where it is silent, EVA-02's detector, Detectron2 and Guided Distillation are
followed. Lines marked DEPARTS[name] leave the paper or decide what it leaves open;
docs/better_pseudo_labels.md says why.

    torchrun --nproc_per_node 8 better_pseudo_labels.py --pool photos/     # LVIS, the paper's setting
    python better_pseudo_labels.py --dataset shapes                        # embedded data, no download, CPU, minutes
"""

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.ops import FeaturePyramidNetwork, batched_nms, nms, roi_align

from common import (
    backbones,
    checkpoints,
    cli,
    distributed,
    instances,
    loading,
    lvis_ap,
    mask_ap,
    metrics,
    plots,
    predictions,
    runs,
    transforms,
)
from common.boxes import (
    anchors_of,
    boxes_of,
    decode_boxes,
    encode_boxes,
    mask_targets,
    match_boxes,
    paste_masks,
    sample_regions,
    shares,
    sided,
    suppress,
)
from common.distributed import World, rng
from common.errors import UserError
from common.files import pictures, write_text
from common.instances import Batch, Target
from common.nodes import fingerprint
from common.objects import Instances, Photo, Window, cut_out, masks_of, singles, true_objects
from data import retrieval, shapes

SCRIPT = "better_pseudo_labels.py"


CASCADE = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)


FRINGE = 0.02  # smaller scores are no detections, and no support in Eq. 5


# nearly 0 when normalised
FILL = torch.tensor(transforms.IMAGENET_MEAN).round().to(torch.uint8).view(3, 1, 1)


# ========================================================================================= settings
@dataclass
class Args:
    """Better (Pseudo-)Labels. --dataset picks the paper's numbers, other flags override them.
    DEPARTS: see docs."""

    # data and bookkeeping
    # what to train on (coco, lvis: any such JSON); picks defaults
    dataset: Literal["lvis", "coco", "shapes"] = "lvis"
    root: str = "datasets/lvis"  # where the data lie, see data/README.md
    # annotations of the training images; empty: the first usual name that exists
    train_json: str = ""
    val_json: str = ""  # annotations of the images that are scored; empty: the same
    images: str = ""  # folder of the images; empty: the usual places
    # labeled images: all, random:N, random:N% (Fig. 2), random:1/N, a list, a COCO JSON
    split: str = "all"
    split_seed: int = 0  # which draw; also of the labels held out
    # folder or list of unlabeled images; empty: what --pool gave, else unlabeled training images
    unlabeled: str = ""
    val: str = "val"  # name of the part that is scored
    # who is rare: as the file says, or thirds by labeled images
    frequency: Literal["file", "subset"] = "file"
    # run folder; empty: runs/better_pseudo_labels-<dataset>-<split>-d<split seed>-s<seed>
    out: str = ""
    resume: bool = False  # continue the run in --out; starts afresh when there is none
    seed: int = 0  # initial weights, order of images, augmentation, sampling
    workers: int = loading.default_workers()  # decoding processes per training process and stream
    device: str = "auto"  # auto, cpu, cuda
    # of backbone and pyramid; auto: bf16 on GPUs. DEPARTS[amp]
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile the backbone in training
    eval_every: int = 5000  # steps between evaluations
    save_every: int = 0  # steps between checkpoints; 0: with every evaluation
    log_every: int = 20  # steps between log lines
    eval: str = ""  # evaluate this checkpoint, train nothing
    # checkpoint, then images or folders: write predictions
    predict: list[str] = field(default_factory=list)

    # what to do (Sec. 4.1)
    stage: Literal["prototypes", "teacher", "calibrate", "retrieve", "student", "all"] = "all"
    tune: bool = False  # learn from 85 % of the labels, score on the other 15 %
    # the search over eps and gamma, or lambda and weight, with --tune
    grid: Literal["no", "teacher", "student"] = "no"
    holdout: float = 0.15  # share of labeled images held out
    stratify: bool = False  # hold out an image at least of each class with two. DEPARTS[holdout]
    teacher: str = ""  # a trained teacher (teacher.pt): no teacher stage
    calibration: str = ""  # what a calibrate stage wrote (calibration.json): no calibrate stage

    # labels of the teacher: Eqs. 1 to 3
    # Fig. 2
    smoothing: Literal["none", "uniform", "similarity", "similarity+freq"] = "similarity+freq"
    eps: float = 0.1  # epsilon, Eq. 3
    gamma: float = 1.5  # Eq. 2, of similarity+freq
    # S' of Eq. 3: row or column of the true class. DEPARTS[convention]
    convention: Literal["row", "literal"] = "row"
    sim_tau: float = 1.0  # temperature of Eq. 2. DEPARTS[temperature]
    sim_center: bool = False  # take the mean prototype off before the cosine
    sim_exclude_self: bool = False  # S' without its diagonal
    sim_topk: int = 0  # S' among so many most similar classes; 0: all
    # embeddings of Eq. 1: of crops, or pooled from whole images. DEPARTS[proto]
    proto: Literal["crop", "roi"] = "crop"
    proto_per_class: int = 200  # objects of a class that are embedded, at most
    counts: Literal["instances", "images"] = "instances"  # N of Eq. 2. DEPARTS[counts]
    embed_size: int = 224  # pixels a side of crops that are embedded
    smooth_heads: Literal["all", "first"] = "all"  # of the cascade. DEPARTS[smooth-where]
    # labeled images of the student. DEPARTS[smooth-where]
    student_labels: Literal["smoothed", "onehot"] = "smoothed"

    # pseudo labels of the student: Eqs. 4 and 5, Table 1
    # a one; the teacher's scores; those after Eq. 5
    pseudo: Literal["onehot", "soft", "calibrated"] = "calibrated"
    lambda_calib: float = 2.0  # lambda, Eq. 5
    # what is counted in Eq. 4. DEPARTS[samples]
    calib_samples: Literal["detections", "gt"] = "detections"
    calib_iou: Literal["box", "mask"] = "box"  # overlap of 0.5 that makes a detection right
    calib_min_score: float = 0.3  # smaller confidences are not counted. DEPARTS[samples]
    bins: int = 10  # B, Eq. 4
    # samples that the mean of the group (r, c, f) weighs; 0: Eq. 4 alone. DEPARTS[shrink]
    shrink: float = 20.0
    # entries that Eq. 5 corrects. DEPARTS[support]
    support: Literal["support", "top1", "all"] = "support"
    # of which Eq. 4 is: of 85 %, or itself. DEPARTS[delta]
    delta_from: Literal["heldout", "teacher"] = "heldout"
    # steps between measuring Eq. 4 again (then the held-out labels teach no one). DEPARTS[refresh]
    refresh: int = 0
    threshold: float = 0.5  # confidence from which an object is a pseudo label. DEPARTS[threshold]
    # which confidence --threshold cuts: before Eq. 5, or after it
    filter_on: Literal["raw", "corrected"] = "raw"
    size_threshold: float = 5.0  # smallest pseudo mask, in pixels
    # suppressed by any class, or its own. DEPARTS[pseudo-nms]
    pseudo_nms: Literal["agnostic", "class"] = "agnostic"
    unsup_weight: float = 1.0  # of the loss on unlabeled images
    ema: float = 0.9996  # share of itself that the teacher keeps in a step. DEPARTS[ema]
    # whether the teacher follows the student, or stays
    teacher_update: Literal["ema", "frozen"] = "ema"
    # where the student begins. DEPARTS[student-init]
    student_init: Literal["teacher", "fresh"] = "teacher"
    burn_in: int = 0  # steps before the teacher is made a copy of the student and follows it

    # retrieval (Sec. 4.1)
    pool: str = ""  # folder or list of images to search for neighbours of rare objects
    neighbours: int = 64  # images found for each rare object
    # any of timm's, else torchvision's. DEPARTS[dinov2]
    retrieval_model: str = "vit_large_patch14_dinov2.lvd142m"
    # imagenet (what the name's tag says), none, shapes, or a file
    retrieval_weights: str = "imagenet"
    index: str = "exact"  # exact and streaming, or a Faiss factory string
    duplicate: float = 0.95  # cosine from which two images are one. DEPARTS[duplicate]

    # network
    # timm's eva02_*; or any CNN, with a feature pyramid network
    backbone: str = "eva02_large_patch14_224.mim_m38m"
    # imagenet (what the name's tag says), none, shapes, or a file. DEPARTS[contamination]
    weights: str = "imagenet"
    init_detector: str = ""  # a whole detector: EVA-02's, or ours. DEPARTS[init]
    image_size: int = 1024  # S: training crop, and side of the test image
    window: int = 16  # tokens a side of windowed attention
    global_blocks: int = 4  # blocks that attend to the whole image, evenly spread
    # 14 -> 16 pixels; bicubic: as EVA. DEPARTS[patch]
    patch_resize: Literal["timm", "bicubic"] = "timm"
    # chance that the last block of EVA-02 is skipped; less for those before it
    drop_path: float = 0.3
    norm: Literal["frozen", "live"] = "frozen"  # BatchNorm of a CNN
    width: int = 256  # W; smaller numbers are for CPUs, as the next seven
    fc: int = 1024  # units of the box heads
    head_convs: int = 4  # of box and mask heads
    anchor_scale: float = 8.0  # side of an anchor over its stride
    proposals: int = 1000  # of the RPN, per image
    rpn_batch: int = 256  # anchors sampled per image
    roi_batch: int = 512  # proposals sampled per image
    # compute activations again in the backward pass: less memory, same gradients
    checkpointing: bool = False

    # classification loss
    cls_loss: Literal["sigmoid", "softmax"] = "sigmoid"  # of the box heads. DEPARTS[sigmoid]
    federated: int = 50  # classes per image whose scores are learned; 0: all. DEPARTS[federated]
    # which more, for soft labels. DEPARTS[federated]
    fed_soft: Literal["mask", "fg-all", "topk"] = "mask"
    prior: float = 0.01  # initial score of a class; 0.5: bias 0. DEPARTS[prior]

    # optimisation and evaluation
    # labeled images per student step over all processes, and as many unlabeled. DEPARTS[batch]
    batch_size: int = 16
    teacher_batch_size: int = 32  # of the teacher
    # parts in which a process computes its share of the batch; exact with --norm frozen
    accumulate: int = 1
    # of the teacher, and of the one before it that Eq. 4 is of. DEPARTS[steps]
    teacher_steps: int = 15_000
    steps: int = 15_000  # of the student
    lr: float = 4e-5  # of pyramid and heads, at its highest
    schedule: Literal["cosine", "constant"] = "cosine"  # to zero. DEPARTS[cosine]
    warmup: float = 0.01  # share of the steps
    weight_decay: float = 0.1  # of AdamW, on everything
    # of the learning rate, from block to block; a CNN's whole body learns at this rate
    layer_decay: float = 0.8
    clip: float = 0.0  # largest gradient norm; 0: none
    # images of rarer classes than this share are repeated (repeat-factor sampling)
    repeat: float = 0.001
    scale: tuple[float, float] = (0.1, 2.0)  # range of the random scale
    detections: int = 300  # kept per image, at most
    nms: float = 0.5  # overlap from which the less sure of two detections of a class is dropped
    soft_nms: bool = False  # linear, from an overlap of 0.6
    maskness: bool = False  # score times the mean mask probability inside the mask


PRESETS: dict[str, dict[str, Any]] = {
    "lvis": {},
    "coco": dict(root="datasets/coco", frequency="subset", federated=0),
    "shapes": dict(
        root="datasets/shapes",
        split="60",
        frequency="subset",
        backbone="test_resnet",
        weights="shapes",
        norm="live",
        image_size=96,
        width=32,
        fc=64,
        head_convs=1,
        anchor_scale=6.0,
        proposals=100,
        rpn_batch=64,
        roi_batch=20,
        embed_size=64,
        batch_size=8,
        teacher_batch_size=8,
        teacher_steps=1200,
        steps=600,
        lr=2e-3,
        layer_decay=0.3,
        weight_decay=0.05,
        scale=(0.7, 1.4),
        ema=0.99,
        eval_every=600,
        drop_path=0.0,
        retrieval_model="test_resnet",
        retrieval_weights="shapes",
        warmup=0.05,
        repeat=0.3,
    ),
}


def preset(dataset: str = "lvis", **overrides: Any) -> Args:
    return Args(**(dict(dataset=dataset) | PRESETS[dataset] | overrides))


# ======================================================================================== backbones
class EVA02(nn.Module):
    """EVA-02 (Fang et al., 2023) as a detector's backbone: (B, 3, S, S) -> (B, D, S/16, S/16), the
    tokens of the last block, without a final norm. Most blocks attend within windows, in which
    rotary positions start anew (ViTDet)."""

    def __init__(self, args: Args, weights: str):
        super().__init__()
        body = create(args.backbone, weights, drop_path_rate=args.drop_path, dynamic_img_size=True)
        patch, grid, self.channels = (
            body.patch_embed.proj,
            body.patch_embed.grid_size,
            body.embed_dim,
        )
        self.proj = nn.Conv2d(3, self.channels, 16, stride=16)
        self.proj.weight = nn.Parameter(resize_patch(patch.weight.data, 16, args.patch_resize))
        self.proj.bias = patch.bias
        places = body.pos_embed.data[:, 1:].transpose(1, 2)  # without the class token's
        self.pos_embed = nn.Parameter(places.reshape(1, self.channels, *grid).contiguous())
        self.blocks, self.rope = body.blocks, body.rope
        for block in self.blocks:
            block.attn.num_prefix_tokens = 0  # there is no class token
        depth = len(self.blocks)
        if depth % args.global_blocks:
            raise UserError(
                f"--global-blocks {args.global_blocks} does not divide {depth} blocks; give another."
            )
        self.whole = [(i + 1) % (depth // args.global_blocks) == 0 for i in range(depth)]
        self.window, self.checkpointing = args.window, args.checkpointing

    def _load_from_state_dict(self, state: dict, prefix: str, *more):
        # EVA-02's detectors have another size
        table = state.get(f"{prefix}pos_embed", self.pos_embed)
        if table.shape != self.pos_embed.shape:
            self.pos_embed = nn.Parameter(table.to(self.pos_embed))
        super()._load_from_state_dict(state, prefix, *more)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)
        size, w = list(x.shape[-2:]), self.window
        x = (x + F.interpolate(self.pos_embed, size, mode="bicubic", align_corners=False)).permute(
            0, 2, 3, 1
        )
        inside, across = self.rope.get_embed(shape=[w, w]), self.rope.get_embed(shape=size)
        for block, whole in zip(self.blocks, self.whole, strict=True):
            x = maybe_checkpoint(
                self.checkpointing and self.training,
                self.block,
                block,
                x,
                whole,
                across if whole else inside,
            )
        return x.permute(0, 3, 1, 2).contiguous()

    def block(self, block: nn.Module, x: Tensor, whole: bool, rope: Tensor) -> Tensor:
        """One block on (B, h, v, D): attention, within windows unless `whole`, and MLP, both
        residual."""
        y, size = block.norm1(x), x.shape[1:3]
        y = block.attn(y.flatten(1, 2) if whole else windows(y, self.window), rope=rope)
        x = x + block.drop_path1(y.unflatten(1, size) if whole else unwindows(y, self.window, size))
        return x + block.drop_path2(block.mlp(block.norm2(x)))


# SAME AS guided_distillation.py
def maybe_checkpoint(on: bool, function: Callable, *inputs):
    """function(*inputs); when `on`, activations are computed again in the backward pass instead of
    being kept."""
    return checkpoint(function, *inputs, use_reentrant=False) if on else function(*inputs)


class SimplePyramid(nn.Module):
    """ViTDet's pyramid of one map of stride 16: -> four maps (B, W, h, w) of strides 4, 8, 16,
    32."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        from timm.layers import LayerNorm2d

        def out(c: int) -> list[nn.Module]:
            return [
                nn.Conv2d(c, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            ]

        half, up = channels // 2, partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        self.levels = nn.ModuleList(
            nn.Sequential(*layers)
            for layers in (
                [
                    up(channels, half),
                    LayerNorm2d(half),
                    nn.GELU(),
                    up(half, half // 2),
                    *out(half // 2),
                ],
                [up(channels, half), *out(half)],
                out(channels),
                [nn.MaxPool2d(2), *out(channels)],
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


class ConvPyramid(nn.Module):
    """A CNN with a feature pyramid network: (B, 3, S, S) -> four maps (B, W, h, w) of strides 4, 8,
    16, 32."""

    def __init__(self, args: Args, pretrained: bool):
        super().__init__()
        self.cnn = backbones.Strides(args.backbone, args.norm == "frozen", pretrained)
        self.fpn = FeaturePyramidNetwork(self.cnn.channels, args.width)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(dict(enumerate(self.cnn(images)))).values())


# ============================================================================================ boxes
class Objects(NamedTuple):
    """Objects of one image, true or pseudo, on its padded square."""

    labels: Tensor  # (N,) int64: the channel of the mask head that learns
    boxes: Tensor  # (N, 4)
    masks: Tensor  # (N, S, S) uint8 or bool
    probs: Tensor  # (N, C) what the scores of the classes shall become
    named: Tensor  # (N, C) bool: of which classes its label speaks


# SAME AS guided_distillation.py
def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A torch generator that depends on its key alone."""
    return torch.Generator(device).manual_seed(int(rng(*key).integers(2**63)))


# ======================================================================================== proposals
class RPN(nn.Module):
    """Region proposal network (Ren et al., 2015), with two convolutions as in EVA-02's detector."""

    def __init__(self, args: Args):
        super().__init__()
        self.args, w = args, args.width
        self.convs = nn.Sequential(
            drawn(nn.Conv2d(w, w, 3, padding=1), 0.01),
            nn.ReLU(),
            drawn(nn.Conv2d(w, w, 3, padding=1), 0.01),
            nn.ReLU(),
        )
        self.objectness = drawn(nn.Conv2d(w, 3, 1), 0.01)  # three anchors at each place
        self.deltas = drawn(nn.Conv2d(w, 12, 1), 0.01)

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Five maps -> objectness logits (B, A) and deltas (B, A, 4), in the order of
        `anchors_of`."""
        maps = [self.convs(x) for x in pyramid]
        objectness = [self.objectness(x).permute(0, 2, 3, 1).flatten(1) for x in maps]
        deltas = [self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in maps]
        return torch.cat(objectness, dim=1), torch.cat(deltas, dim=1)

    @torch.no_grad()
    def propose(self, objectness: Tensor, deltas: Tensor) -> list[Tensor]:
        """The proposals (n, 4) of each image, --proposals many: the best of each level (in training
        twice as many), less those that overlap a better one by 0.7; of all these the best."""
        anchors, numbers = anchors_of(
            self.args.image_size, self.args.anchor_scale, objectness.device
        )
        found = []
        for scores, steps in zip(objectness.float(), deltas.float(), strict=True):
            kept = []
            for here, start in zip(
                scores.split(numbers), itertools.accumulate([0, *numbers[:-1]]), strict=True
            ):
                best = (
                    here.topk(min((1 + self.training) * self.args.proposals, len(here))).indices
                    + start
                )
                boxes = decode_boxes(
                    steps[best], anchors[best], (1.0, 1.0, 1.0, 1.0), self.args.image_size
                )
                ok = sided(boxes) & torch.isfinite(scores[best])
                # last, over nothing
                boxes, points = boxes.where(ok[:, None], 0.0), scores[best].where(ok, -torch.inf)
                keep = nms(boxes, points, 0.7)
                kept.append((boxes[keep], points[keep]))
            boxes, points = (torch.cat(x) for x in zip(*kept, strict=True))
            points, best = points.topk(min(self.args.proposals, len(points)))
            found.append(boxes[best[points > -torch.inf]])
        return found

    def losses(
        self, objectness: Tensor, deltas: Tensor, objects: list[Objects], draws: list
    ) -> dict[str, Tensor]:
        """Means over the images: binary cross-entropy of sampled anchors, L1 of those of objects,
        over --rpn-batch."""
        anchors, _ = anchors_of(self.args.image_size, self.args.anchor_scale, objectness.device)
        loss = {"rpn": objectness.new_zeros(()), "rpn_box": objectness.new_zeros(())}
        for scores, steps, o, g in zip(objectness, deltas, objects, draws, strict=True):
            matches = match_boxes(anchors, o.boxes, 0.3, 0.7, rescue=True)
            taken = sample_regions(matches, self.args.rpn_batch, 0.5, g)
            real = taken[matches[taken] >= 0]
            answer = (matches[taken] >= 0).float()
            goal = encode_boxes(o.boxes[matches[real]], anchors[real], (1.0, 1.0, 1.0, 1.0))
            loss["rpn"] = loss["rpn"] + F.binary_cross_entropy_with_logits(
                scores[taken], answer, reduction="sum"
            )
            loss["rpn_box"] = loss["rpn_box"] + (steps[real] - goal).abs().sum()
        return {name: value / (self.args.rpn_batch * len(objects)) for name, value in loss.items()}


# ============================================================================================ heads
def roi_pool(pyramid: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """Boxes (n, 4) of each image -> (R, W, size, size): averages of bilinear samples on the level
    of the box's size, of stride 16 for 224 x 224 pixels, of twice the stride for twice the side."""
    rois = torch.cat(
        [torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)]
    )
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
    level = (4 + torch.log2(side / 224 + 1e-8)).floor().clamp(2, 5) - 2
    out = pyramid[0].new_zeros(len(rois), pyramid[0].shape[1], size, size)
    # one wait for all levels
    numbers = (level == torch.arange(4, device=level.device)[:, None]).sum(1).tolist()
    # less boxes that are not numbers
    order = level.argsort(stable=True)[: sum(numbers)].split(numbers)
    for i, (maps, here) in enumerate(zip(pyramid[:4], order, strict=True)):
        out[here] = roi_align(
            maps, rois[here], size, 1 / 2 ** (i + 2), sampling_ratio=0, aligned=True
        )
    return out


def convs(args: Args) -> list[nn.Module]:
    """--head-convs convolutions 3x3, each normalised over its channels, with ReLU."""
    from timm.layers import LayerNorm2d

    layers = []
    for _ in range(args.head_convs):
        conv = nn.Conv2d(args.width, args.width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, LayerNorm2d(args.width), nn.ReLU()]
    return layers


class BoxHead(nn.Module):
    """One head of the cascade: pooled features (R, W, 7, 7) -> class logits (R, columns) and deltas
    (R, 4)."""

    def __init__(self, args: Args, num_classes: int):
        super().__init__()
        self.convs = nn.Sequential(*convs(args))
        self.fc = nn.Linear(49 * args.width, args.fc)
        units = num_classes + (args.cls_loss == "softmax")  # the last of softmax: background
        self.classes = drawn(nn.Linear(args.fc, units), 0.01)
        self.deltas = drawn(nn.Linear(args.fc, 4), 0.001)
        nn.init.kaiming_uniform_(self.fc.weight, a=1)
        nn.init.zeros_(self.fc.bias)
        if args.cls_loss == "sigmoid":
            # DEPARTS[prior]
            nn.init.constant_(self.classes.bias, -math.log((1 - args.prior) / args.prior))

    def forward(self, x: Tensor, columns: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc(self.convs(x).flatten(1)))
        return F.linear(x, self.classes.weight[columns], self.classes.bias[columns]), self.deltas(x)


class MaskHead(nn.Module):
    """Pooled features (n, W, 14, 14) and a class of each -> mask logits (n, 28, 28): of the last
    convolution's C channels only the wanted one is computed."""

    def __init__(self, args: Args, num_classes: int):
        super().__init__()
        self.convs = nn.Sequential(*convs(args))
        self.up = nn.ConvTranspose2d(args.width, args.width, 2, 2)
        self.masks = drawn(nn.Conv2d(args.width, num_classes, 1), 0.001)
        nn.init.kaiming_normal_(self.up.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.up(self.convs(x)))
        return (
            torch.einsum("nchw,nc->nhw", x, self.masks.weight[labels, :, 0, 0])
            + self.masks.bias[labels, None, None]
        )


class CascadeHeads(nn.Module):
    """Three box heads of rising overlap, each on the boxes of the one before (Cai and Vasconcelos,
    2019)."""

    def __init__(self, args: Args, num_classes: int):
        super().__init__()
        self.args = args
        self.boxes = nn.ModuleList(BoxHead(args, num_classes) for _ in CASCADE)
        self.mask = MaskHead(args, num_classes)
        # classes that had an object
        self.register_buffer("learned", torch.ones(num_classes, dtype=torch.bool))

    def losses(
        self,
        pyramid: list[Tensor],
        proposals: list[Tensor],
        objects: list[Objects],
        known: Tensor,
        draws: list,
    ) -> dict[str, Tensor]:
        """Means over the images of each loss's mean over an image's regions: neither the number of
        processes nor --accumulate changes them. `known` (B, C): the classes learned on an image.
        DEPARTS[per-image]"""
        args, boxes, loss = self.args, [], {}
        for b, o, g in zip(proposals, objects, draws, strict=True):
            b = torch.cat([b, o.boxes])  # true boxes are proposals, too
            boxes.append(
                b[sample_regions(match_boxes(b, o.boxes, 0.5, 0.5), args.roi_batch, 0.25, g)]
            )
        matches = [match_boxes(b, o.boxes, 0.5, 0.5) for b, o in zip(boxes, objects, strict=True)]
        loss["mask"] = self.mask_loss(pyramid, boxes, matches, objects)
        more = args.cls_loss == "softmax" or args.fed_soft == "fg-all"
        columns = (self.learned if more else known.any(0)).nonzero().flatten()
        for stage, (head, (overlap, weights)) in enumerate(zip(self.boxes, CASCADE, strict=True)):
            if stage:
                boxes = [b[sided(b)] for b in boxes]
                matches = [
                    match_boxes(b, o.boxes, overlap, overlap)
                    for b, o in zip(boxes, objects, strict=True)
                ]
            image = torch.cat([torch.full_like(m, i) for i, m in enumerate(matches)])
            per = shares(matches)
            x = roi_pool(pyramid, boxes, 7)
            x = x / 3 + x.detach() * (2 / 3)  # a third of the gradient: three heads share x
            logits, deltas = head(x, slice(None) if args.cls_loss == "softmax" else columns)
            probs, goal = zip(
                *(
                    wanted(m, o, args.smooth_heads == "all" or not stage)
                    for m, o in zip(matches, objects, strict=True)
                ),
                strict=True,
            )
            probs, goal, real = torch.cat(probs), torch.cat(goal), torch.cat(matches) >= 0
            mask = (known[image] | (real[:, None] & (args.fed_soft == "fg-all")))[:, columns]
            value = (
                softmax_loss(logits, probs)
                if args.cls_loss == "softmax"
                else sigmoid_loss(logits, probs[:, columns], mask)
            )
            loss[f"class{stage + 1}"] = (value * per).sum()
            rois, real = torch.cat(boxes), real.nonzero().flatten()
            off = (deltas[real] - encode_boxes(goal[real], rois[real], weights)).abs().sum(1)
            loss[f"box{stage + 1}"] = (off * per[real]).sum()
            boxes = decode_boxes(deltas.detach(), rois, weights, args.image_size).split(
                [len(b) for b in boxes]
            )
        return loss

    def mask_loss(
        self,
        pyramid: list[Tensor],
        boxes: list[Tensor],
        matches: list[Tensor],
        objects: list[Objects],
    ) -> Tensor:
        """Binary cross-entropy of the masks of the first head's objects, on 28 x 28 cells.
        DEPARTS[mask-targets]"""
        real = [(m >= 0).nonzero().flatten() for m in matches]
        boxes, mine = ([x[r] for x, r in zip(xs, real, strict=True)] for xs in (boxes, matches))
        labels = torch.cat([o.labels[m] for o, m in zip(objects, mine, strict=True)])
        logits = self.mask(roi_pool(pyramid, boxes, 14), labels)
        goal = torch.cat(
            [mask_targets(o.masks, m, b) for o, m, b in zip(objects, mine, boxes, strict=True)]
        )
        loss = F.binary_cross_entropy_with_logits(logits, goal, reduction="none").mean((1, 2))
        return (loss * shares(mine)).sum()

    def scores(self, pyramid: list[Tensor], boxes: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each image the boxes (R, 4) after three heads, and the mean of the heads' class
        probabilities (R, C)."""
        total = 0
        for head, (_, weights) in zip(self.boxes, CASCADE, strict=True):
            logits, deltas = head(roi_pool(pyramid, boxes, 7))
            total = total + (
                logits.sigmoid() if self.args.cls_loss == "sigmoid" else logits.softmax(1)[:, :-1]
            )
            numbers = [len(b) for b in boxes]
            boxes = decode_boxes(deltas, torch.cat(boxes), weights, self.args.image_size).split(
                numbers
            )
        probs = total / len(CASCADE) * self.learned
        return list(zip(boxes, probs.split(numbers), strict=True))


def wanted(matches: Tensor, objects: Objects, soft: bool) -> tuple[Tensor, Tensor]:
    """What regions shall become: class scores (R, C), zero on background, and boxes (R, 4), zero
    there, too."""
    probs, boxes = (x.new_zeros(len(matches), x.shape[1]) for x in (objects.probs, objects.boxes))
    real = (matches >= 0).nonzero().flatten()
    labels = F.one_hot(objects.labels[matches[real]], objects.probs.shape[1]).to(probs)
    probs[real], boxes[real] = (
        objects.probs[matches[real]] if soft else labels,
        objects.boxes[matches[real]],
    )
    return probs, boxes


def sigmoid_loss(logits: Tensor, probs: Tensor, known: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, summed over the known classes: (R, K) three times ->
    (R,). A logit's gradient is its score minus the target, so any target in [0, 1] is legal;
    background is zero everywhere."""
    return (F.binary_cross_entropy_with_logits(logits, probs, reduction="none") * known).sum(1)


def softmax_loss(logits: Tensor, probs: Tensor) -> Tensor:
    """Cross-entropy with soft targets and a background: logits (R, C + 1), probs (R, C) of any sum
    -> (R,). Background gets what is missing to 1; a sum over 1 is brought to 1."""
    probs = torch.cat([probs, (1 - probs.sum(1, keepdim=True)).clamp(min=0)], dim=1)
    return -(probs / probs.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)


# ========================================================================================= detector
class Detector(nn.Module):
    """Cascade Mask R-CNN. In training normalised images (B, 3, S, S) and what to find -> losses."""

    def __init__(self, args: Args, num_classes: int, bf16: bool = False, weights: str = "none"):
        super().__init__()
        if args.backbone.startswith("eva02"):
            self.backbone = EVA02(args, weights)
            self.neck = SimplePyramid(self.backbone.channels, args.width)
        else:
            self.backbone, self.neck = ConvPyramid(args, weights == "imagenet"), nn.Identity()
        self.rpn, self.heads, self.bf16 = RPN(args), CascadeHeads(args, num_classes), bf16

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Five maps (B, W, h, w) float32 of strides 4, 8, 16, 32, 64."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            maps = self.neck(self.backbone(images))
        maps = [x.float() for x in maps]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]

    def forward(
        self, images: Tensor, objects: list[Objects], known: Tensor, draws: list
    ) -> dict[str, Tensor]:
        """`objects` and a generator `draws` of each image; `known` (B, C) the classes whose scores
        it teaches."""
        pyramid = self.pyramid(images)
        with torch.autocast(images.device.type, enabled=False):
            scored = self.rpn(pyramid)
            return self.rpn.losses(*scored, objects, draws) | self.heads.losses(
                pyramid, self.rpn.propose(*scored), objects, known, draws
            )

    def infer(self, images: Tensor) -> tuple[list[Tensor], list]:
        """The pyramid, and of each image boxes (R, 4) and class scores (R, C)."""
        pyramid = self.pyramid(images)
        with torch.autocast(images.device.type, enabled=False):
            return pyramid, self.heads.scores(pyramid, self.rpn.propose(*self.rpn(pyramid)))

    @torch.backends.cudnn.flags(enabled=True, benchmark=False)  # another number of boxes each time
    def masks(self, pyramid: list[Tensor], image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask probabilities (n, 28, 28) of boxes of one image, each of its class."""
        mine = [x[image : image + 1] for x in pyramid]
        with torch.autocast(boxes.device.type, enabled=False):
            parts = [
                self.heads.mask(roi_pool(mine, [b], 14), part).sigmoid()
                for b, part in zip(boxes.split(128), labels.split(128), strict=True)
            ]
        return torch.cat([boxes.new_zeros(0, 28, 28), *parts])


# ====================================================================================== Eqs. 1 to 3
class Classes(NamedTuple):
    """What the labels say of the C classes, on the device."""

    images: Tensor  # (C,) how many labeled images hold it
    instances: Tensor  # (C,) how many labeled objects it has, N of Eqs. 1 and 2
    targets: Tensor  # (C, C) row c: the label of an object of class c, Eq. 3
    similar: Tensor  # (C, C) bool, row c: itself and the 20 most similar
    groups: list[str]  # r, c or f


def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 1: the mean embedding of each class, (N, D) and (N,) -> (C, D); zero for a class without
    an object."""
    total = embeddings.new_zeros(num_classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return total / torch.bincount(labels, minlength=num_classes).clamp(min=1)[:, None]


def cosines(prototypes: Tensor, center: bool = False) -> Tensor:
    """S (C, C) of Eq. 2; zero where a class has no prototype. `center` takes their mean off
    before."""
    there = prototypes.abs().sum(1) > 0
    if center:
        prototypes = (prototypes - prototypes[there].mean(0)) * there[:, None]
    unit = F.normalize(prototypes, dim=1)
    return unit @ unit.T


def similar_classes(
    similarity: Tensor,
    counts: Tensor,
    gamma: float,
    tau: float = 1.0,
    exclude_self: bool = False,
    topk: int = 0,
) -> Tensor:
    """Eq. 2: S' (C, C), each row a distribution, from S (C, C) and N (C,): the fewer objects N_j a
    class has, the larger the exponent S_ij / N_j^gamma. A class with N = 0 gets nothing, and its
    row is zero. DEPARTS[temperature]"""
    there = counts > 0
    logits = similarity / (tau * counts.clamp(min=1).to(similarity) ** gamma)
    able = there.expand(len(counts), -1)
    if exclude_self:
        able = able & ~torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    if 0 < topk < len(counts):
        near = similarity.masked_fill(~able, -math.inf)
        able = able & (near >= near.topk(topk, dim=1).values[:, -1:])
    return logits.masked_fill(~able, -math.inf).softmax(1).nan_to_num() * there[:, None]


def smoothed_targets(distribution: Tensor, eps: float, convention: str = "row") -> Tensor:
    """Eq. 3 for every class: row c is (1 - eps) e_c + eps times what S' (C, C) says of c: its row,
    a distribution; or `literal`, as printed, S' e_c, the column, which is none.
    DEPARTS[convention]"""
    mixed = distribution if convention == "row" else distribution.T
    one_hot = torch.eye(len(mixed), device=mixed.device, dtype=mixed.dtype)
    return (1 - eps) * one_hot + eps * mixed


def similarities(args: Args, data: Instances, labeled: list[Photo], world: World) -> Tensor:
    """S (C, C) of Eq. 2. The prototypes of Eq. 1 are made once and kept in the run folder:
    prototypes.pt."""
    path, key = (
        Path(args.out) / "prototypes.pt",
        made_of(args, PROTOTYPES_OF, data.classes),
    )
    if not needs_prototypes(args):
        return torch.eye(len(data.classes))
    made = (
        checkpoints.load_checkpoint(path, PROTOTYPES)
        if main_says(world, path.exists())
        else {"key": ""}
    )
    if made["key"] != key:  # of a command that stopped before it trained, or none
        made = {**embed_objects(args, data, labeled, world), "classes": data.classes, "key": key}
        if world.main:
            checkpoints.save_checkpoint(path, PROTOTYPES, made)
    return cosines(made["prototypes"], args.sim_center)


def label_statistics(
    args: Args, data: Instances, labeled: list[Photo], similarity: Tensor, world: World
) -> Classes:
    """Counts, groups and the targets of Eq. 3 (Fig. 2's four smoothings), from the labeled images
    and S (C, C)."""
    held, c = [[t.category for t in p.things if not t.crowd] for p in labeled], len(data.classes)
    number, images = (
        torch.bincount(torch.tensor([k for ks in held for k in of(ks)]), minlength=c)
        for of in (list, set)
    )
    counts = number if args.counts == "instances" else images
    there, same = counts > 0, torch.eye(c)
    groups = (
        data.frequency
        if args.frequency == "file" and data.frequency
        else lvis_ap.group_by_count(images.numpy())
    )
    mixed = similar_classes(
        similarity,
        counts,
        args.gamma if args.smoothing == "similarity+freq" else 0.0,
        args.sim_tau,
        args.sim_exclude_self,
        args.sim_topk,
    )
    if args.smoothing == "uniform":
        mixed = (there.float() / there.sum()).expand(c, c) * there[:, None]
    targets = (
        same if args.smoothing == "none" else smoothed_targets(mixed, args.eps, args.convention)
    )
    near = similarity >= similarity.topk(min(21, c), dim=1).values[:, -1:]
    return Classes(*(x.to(world.device) for x in (images, number, targets, near & there)), groups)


def embed_objects(
    args: Args, data: Instances, photos: list[Photo], world: World
) -> dict[str, Tensor]:
    """The prototypes (C, D) of Eq. 1, of up to --proto-per-class objects of each class, and how
    many they were (C,). `roi` pools the detector's own features of stride 16 from the whole image
    instead of crops. DEPARTS[proto]"""
    chosen = choose_objects(
        photos, {*range(len(data.classes))}, args.proto_per_class, args.split_seed
    )
    if args.proto == "crop":
        distributed.seed_torch(args.seed, "prototypes")
        net = Embedder(args.backbone, args.weights, args.root, args.embed_size).to(world.device)
        embeddings, labels, _ = embed_crops(net, chosen, data, args.embed_size, world, args.workers)
    else:
        net, found = network(args, len(data.classes), world, "prototypes")[0].eval(), []
        for photo, places in chosen[world.rank :: world.size]:
            x, factors = test_view(instances.load(photo), args)
            labels, _, boxes = true_objects(photo, data, places)
            with torch.no_grad():
                maps = getattr(net.backbone, "cnn", net.backbone)(x.to(world.device))
            maps = maps if isinstance(maps, Tensor) else maps[2]
            pooled = roi_align(
                maps.float(), [boxes.to(maps) * factors.to(maps)], 1, 1 / 16, 0, aligned=True
            )
            found.append((0, pooled.flatten(1).cpu(), labels))
        embeddings, labels = (
            torch.cat(x) for x in list(zip(*mask_ap.gather(world, found), strict=True))[1:]
        )
    return {
        "prototypes": prototypes(embeddings, labels, len(data.classes)),
        "embedded": torch.bincount(labels, minlength=len(data.classes)),
    }


# ===================================================================================== Eqs. 4 and 5
def ccece(
    conf: Tensor, right: Tensor, labels: Tensor, num_classes: int, bins: int = 10
) -> tuple[Tensor, Tensor]:
    """Eq. 4: Delta (C,) and the number of samples (C,), from confidences (n,), whether right (n,)
    and classes (n,).

    Delta_i is the sum over the bins b of N_ib / N_i (acc_ib - conf_ib): positive for an
    underconfident class, zero for one without a sample. Being signed, it is mean accuracy minus
    mean confidence, whatever the bins are."""
    cell = labels * bins + (conf * bins).long().clamp(max=bins - 1)  # (n,) class and bin
    size = num_classes * bins
    number = torch.bincount(cell, minlength=size).double()  # N_ib
    acc = torch.bincount(cell, right.double(), size) / number.clamp(min=1)
    mean_conf = torch.bincount(cell, conf.double(), size) / number.clamp(min=1)
    number, gap = number.view(num_classes, bins), (acc - mean_conf).view(num_classes, bins)
    total = number.sum(1)
    return (number / total.clamp(min=1)[:, None] * gap).sum(1).float(), total.long()


def shrunk(delta: Tensor, number: Tensor, groups: list[str], kappa: float) -> Tensor:
    """Delta (C,) of few samples is drawn to Delta_g, the mean of its group (r, c, f): (n_i Delta_i
    + kappa Delta_g) / (n_i + kappa); and Delta_g in the same way to the mean of all. kappa = 0 is
    Eq. 4 alone. DEPARTS[shrink]"""
    if kappa == 0:
        return delta
    total, out = number * delta, delta.clone()
    everything = total.sum() / number.sum().clamp(min=1)
    for group in set(groups):
        mine = torch.tensor([g == group for g in groups], device=delta.device)
        mean = (total[mine].sum() + kappa * everything) / (number[mine].sum() + kappa)
        out[mine] = (total[mine] + kappa * mean) / (number[mine] + kappa)
    return out


def corrected(probs: Tensor, delta: Tensor, strength: float, support: str = "support") -> Tensor:
    """Eq. 5: y + lambda Delta, (n, C) and (C,) -> (n, C) within [0, 1]. Corrected are the entries
    over 0.02; or the largest; or `all`, as printed: then an object is a little of every
    underconfident class. DEPARTS[support]"""
    mask = {
        "all": torch.ones_like(probs, dtype=torch.bool),
        "support": probs > FRINGE,
        "top1": F.one_hot(probs.argmax(1), probs.shape[1]).bool(),
    }[support]
    return torch.where(
        mask, (probs + strength * delta).clamp(0, 1), torch.where(probs > FRINGE, probs, 0.0)
    )


def pseudo_targets(probs: Tensor, delta: Tensor | None, args: Args) -> Tensor:
    """Table 1: what the student learns of objects with the teacher's scores (n, C): their best
    class; the scores over 0.02; or these with the teacher's error taken out, Eq. 5."""
    if args.pseudo == "onehot":
        return F.one_hot(probs.argmax(1), probs.shape[1]).to(probs)
    soft = torch.where(probs > FRINGE, probs, 0.0)
    return (
        soft if args.pseudo == "soft" else corrected(probs, delta, args.lambda_calib, args.support)
    )


def objects_found(
    boxes: Tensor, probs: Tensor, args: Args, least: float = 0.05, most: int = 100
) -> Tensor:
    """Indices (n,) of the regions (R, 4), (R, C) that stand for an object each: confident, and none
    that overlaps a more confident one by half, of whatever class. DEPARTS[pseudo-nms]"""
    conf, labels = probs.max(1)
    chosen = (conf > least).nonzero().flatten()
    one = (0 * labels if args.pseudo_nms == "agnostic" else labels)[chosen].unique(
        return_inverse=True
    )[1]
    return chosen[batched_nms(boxes[chosen].double(), conf[chosen].double(), one, 0.5)[:most]]


@torch.no_grad()
def pseudo_labels(
    teacher: Detector, weak: Tensor, delta: Tensor | None, args: Args
) -> tuple[list[Objects], Tensor]:
    """What the teacher finds on weak views (B, 3, S, S) uint8, from --threshold on, and its
    confidences."""
    pyramid, seen = teacher.infer(transforms.normalize(weak))
    found, confs = [], []
    for i, (boxes, probs) in enumerate(seen):
        keep = objects_found(boxes, probs, args)
        boxes, probs = boxes[keep], probs[keep]
        targets = pseudo_targets(probs, delta, args)
        conf = (probs if args.filter_on == "raw" else targets).amax(1)
        keep = ((conf >= args.threshold) & sided(boxes, 2)).nonzero().flatten()
        boxes, probs, targets, conf = (x[keep] for x in (boxes, probs, targets, conf))
        able = targets.masked_fill(probs <= FRINGE, -1.0)  # also where Eq. 5 corrects all
        # ties: the raw best
        best = torch.where(able == able.amax(1, keepdim=True), probs, -1.0).argmax(1)
        masks = (
            paste_masks(teacher.masks(pyramid, i, boxes, best), boxes, tuple(weak.shape[-2:])) > 0.5
        )
        large = (masks.sum((1, 2)) > args.size_threshold).nonzero().flatten()
        named = targets > 0 if args.pseudo == "onehot" else (targets > 0) | (probs > FRINGE)
        found.append(Objects(*(x[large] for x in (best, boxes, masks, targets, named))))
        confs.append(conf[large])
    return found, torch.cat(confs)


def pseudo_log(found: list[Objects], conf: Tensor, world: World) -> dict[str, Tensor]:
    """What is logged of pseudo labels; means over processes are means over their images, or
    objects."""
    counts = torch.tensor([float(len(o.labels)) for o in found]).to(conf.device, non_blocking=True)
    number = world.mean(counts.sum()).clamp(min=1 / world.size)
    return {
        "pseudo_per_image": counts.mean(),
        "pseudo_none": (counts == 0).float().mean(),
        "conf": conf.sum() / number,
        "mass": sum(o.probs.sum() for o in found) / number,
    }


def calibrate(net: Detector, data: Instances, groups: list[str], args: Args, world: World) -> dict:
    """Eq. 4 of a network on the scored images of `data`, which it must not have learned from: Delta
    of each class, and the reliability diagram of the same samples."""
    entries = []
    for index, image in instances.score_loader(data.val, world, args.workers):
        entries += counted(net, image, look(net, image, args), data.val[index], data, args)
    samples = samples_of(mask_ap.gather(world, entries), mask_ap.truth_of(data), data, args)
    conf, right, labels = (
        torch.from_numpy(x) for x in (samples.conf, samples.right, samples.labels)
    )
    delta, number = ccece(conf, right, labels, len(data.classes), args.bins)
    there = torch.zeros(len(data.classes), dtype=torch.bool)
    # else its group's mean
    there[[t.category for photo in data.val for t in photo.things if not t.crowd]] = True
    return {
        "classes": data.classes,
        "delta": shrunk(delta, number * there, groups, args.shrink).tolist(),
        "raw_delta": delta.tolist(),
        "samples": number.tolist(),
        "images": len(data.val),
        "reliability": metrics.reliability(samples, args.bins, groups),
    }


@torch.no_grad()
def counted(
    net: Detector, image: Tensor, seen: "Seen", photo: Photo, data: Instances, args: Args
) -> list:
    """What Eq. 4 counts on an image (3, H, W) uint8: `detections`, found as pseudo labels are, as
    entries of a results file; or of each true object, `gt`, class, best score at its box, and
    whether it is its class's. DEPARTS[samples]"""
    if args.calib_samples == "gt":
        labels, _, boxes = true_objects(photo, data)
        [(_, probs)] = net.heads.scores(seen.pyramid, [boxes.to(seen.boxes) * seen.factors])
        conf, best = (t.cpu() for t in probs.max(1))
        return [
            *zip(
                [photo.id] * len(labels),
                labels.tolist(),
                conf.tolist(),
                (best == labels).tolist(),
                strict=True,
            )
        ]
    keep = objects_found(seen.boxes, seen.probs, args, args.calib_min_score)
    boxes, (conf, best) = seen.boxes[keep], seen.probs[keep].max(1)
    masks = None
    if args.calib_iou == "mask":
        masks = net.masks(seen.pyramid, 0, boxes, best)
        masks = paste_masks(masks, boxes / seen.factors, tuple(image.shape[1:])) > 0.5
    return mask_ap.results_of(photo.id, data.ids, best, conf, masks, boxes / seen.factors)


def samples_of(entries: list, truth: dict, data: Instances, args: Args) -> lvis_ap.Samples:
    """The samples of Eq. 4: class, confidence, and whether right. `truth` is what ap.truth_of
    gives."""
    if args.calib_samples == "detections":
        kind = "bbox" if args.calib_iou == "box" else "segm"
        return lvis_ap.samples(truth, entries, kind, federated=data.lvis)
    rows = np.array([e[1:] for e in entries if e[2] > args.calib_min_score]).reshape(-1, 3)
    return lvis_ap.Samples(rows[:, 0].astype(np.int64), rows[:, 1], rows[:, 2] > 0)


# ============================================================================================ views
def jitter_crop(size: tuple[int, int], args: Args, g: np.random.Generator) -> Window:
    """Flip; a scale u in --scale, so that the image fits into u times the square; a random window,
    padded at the right and the bottom where the image is smaller (large-scale jitter)."""
    flip, u, (down, across) = bool(g.random() < 0.5), g.uniform(*args.scale), g.random(2)
    factor = u * args.image_size / max(size)
    new = tuple(max(round(n * factor), 1) for n in size)
    top, left = (
        int(max(n - args.image_size, 0) * shift)
        for n, shift in zip(new, (down, across), strict=True)
    )
    return Window(flip, new, top, left, (args.image_size, args.image_size))


def strong_view(image: Tensor, g: np.random.Generator) -> Tensor:
    """The student's view of a weak one (3, H, W) uint8, in the same geometry, as in Guided
    Distillation: jitter of brightness, contrast, saturation and hue in any order, grey, blur."""
    from torchvision.transforms.v2 import functional as tv

    if g.random() < 0.8:
        jitter = (
            (tv.adjust_brightness, 0.6, 1.4),
            (tv.adjust_contrast, 0.6, 1.4),
            (tv.adjust_saturation, 0.6, 1.4),
            (tv.adjust_hue, -0.1, 0.1),
        )
        for i in g.permutation(4):
            change, low, high = jitter[i]
            image = change(image, g.uniform(low, high))
    if g.random() < 0.2:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if g.random() < 0.5:
        blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(
            ImageFilter.GaussianBlur(g.uniform(0.1, 2.0))
        )
        image = torch.from_numpy(np.array(blurred)).permute(2, 0, 1).contiguous()
    return image


def labeled_view(
    args: Args, data: Instances, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, None, Target]:
    window = jitter_crop(tuple(image.shape[-2:]), args, g)
    labels, masks, _ = masks_of(photo, data, window)
    seen = masks.flatten(1).any(1).bool()
    return cut_out(image, window, FILL), None, Target(labels[seen], masks[seen])


def unlabeled_view(
    args: Args, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, Tensor, None]:
    weak = cut_out(image, jitter_crop(tuple(image.shape[-2:]), args, g), FILL)
    return strong_view(weak, g), weak, None


def test_view(image: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """(3, H, W) uint8 -> (1, 3, S, S) normalised, the longer side S pixels, zeros at the right and
    the bottom; and the factors (4,) of a box from its pixels to those."""
    factor = args.image_size / max(image.shape[-2:])
    new, x = tuple(max(round(n * factor), 1) for n in image.shape[-2:]), image[None].float()
    x = (
        F.interpolate(x, size=new, mode="bilinear", antialias=True)
        if new != tuple(image.shape[-2:])
        else x
    )
    x = transforms.normalize(x)
    factors = x.new_tensor([new[1] / image.shape[2], new[0] / image.shape[1]] * 2)
    return F.pad(x, (0, args.image_size - new[1], 0, args.image_size - new[0])), factors


# ========================================================================================= training
@dataclass
class State:
    """All that training changes (saved whole), and the forward pass that DDP wraps."""

    phase: str  # heldout, teacher: one network learns from labels; student
    student: Detector  # the network that learns
    teacher: Detector | None  # no gradients, eval mode
    optimizer: torch.optim.Optimizer
    forward: Callable
    classes: Classes
    delta: Tensor | None = None  # (C,) of Eq. 5
    step: int = 0  # of the whole run
    begun: int = 0  # the step at which this phase began
    last: dict = field(default_factory=dict)  # network -> its newest score
    best: dict = field(default_factory=dict)  # network -> its best one

    def networks(self) -> dict[str, Detector]:
        return (
            {"student": self.student, "teacher": self.teacher}
            if self.phase == "student"
            else {"supervised": self.student}
        )


def train_step(
    s: State, labeled: Batch, unlabeled: Batch | None, args: Args, world: World
) -> dict[str, Tensor]:
    """Sec. 3: one step of a network that learns from smoothed labels alone (the teacher-to-be); or
    of the student, which learns from corrected pseudo labels too, and whom its teacher follows."""
    student = s.phase == "student"
    smooth = not student or args.student_labels == "smoothed"
    s.optimizer.zero_grad(set_to_none=True)
    objects = [labeled_objects(t, s.classes, smooth) for t in labeled.targets]  # Eq. 3
    log = learn(s, labeled.images, objects, 1.0, "l", args, world, last=not student)
    if student:
        parts = [
            pseudo_labels(s.teacher, x, s.delta, args)
            for x in unlabeled.weak.split(-(-len(unlabeled.weak) // args.accumulate))
        ]
        objects = [o for found, _ in parts for o in found]  # Eq. 5
        log |= pseudo_log(objects, torch.cat([conf for _, conf in parts]), world)
        log |= learn(s, unlabeled.images, objects, args.unsup_weight, "u", args, world, last=True)
    if args.clip > 0:
        nn.utils.clip_grad_norm_(s.student.parameters(), args.clip, foreach=True)
    s.optimizer.step()
    t = s.step - s.begun + 1  # steps of this phase that are done
    if student and args.teacher_update == "ema" and t >= args.burn_in:
        ema_update(s.teacher, s.student, 0.0 if t == args.burn_in else args.ema)
        s.teacher.heads.learned.copy_(s.student.heads.learned)
    return log


def labeled_objects(target: Target, classes: Classes, smooth: bool) -> Objects:
    """The objects of a labeled image, whose classes become their rows of Eq. 3."""
    table = (
        classes.targets if smooth else torch.eye(len(classes.targets), device=target.labels.device)
    )
    named = F.one_hot(target.labels, len(table)).bool()
    return Objects(target.labels, boxes_of(target.masks), target.masks, table[target.labels], named)


def learn(
    s: State,
    images: Tensor,
    objects: list[Objects],
    factor: float,
    name: str,
    args: Args,
    world: World,
    last: bool,
) -> dict[str, Tensor]:
    """Add the gradient of factor * loss on (B, 3, S, S) uint8 images, in --accumulate parts.
    Labeled and unlabeled ones have a backward pass each: the same gradient in half the memory.
    Processes exchange it in the `last` of a step."""
    size, total = -(-len(images) // args.accumulate), {}
    for start in range(0, len(images), size):
        here = slice(start, start + size)
        places = range(
            world.rank * len(images) + start,
            world.rank * len(images) + min(start + size, len(images)),
        )
        draws = [
            generator(world.device, args.seed, "regions", s.phase, name, s.step, place)
            for place in places
        ]
        known = known_classes(objects[here], s.classes, name == "u", args, draws)
        wait = last and start + size >= len(images) or world.size == 1
        with contextlib.nullcontext() if wait else s.forward.no_sync():
            losses = s.forward(transforms.normalize(images[here]), objects[here], known, draws)
            share = len(objects[here]) / len(images)
            (factor * share * sum(losses.values())).backward()
        for key, value in losses.items():
            total[key] = total.get(key, 0) + share * value.detach()
    return {f"loss_{name}": sum(total.values()), **{f"{k}_{name}": v for k, v in total.items()}}


def known_classes(
    objects: list[Objects], classes: Classes, pseudo: bool, args: Args, draws: list
) -> Tensor:
    """Federated loss (Zhou et al., 2021): the classes (B, C) whose scores an image teaches, its own
    and others, drawn by the root of their number of images, up to --federated in all.
    DEPARTS[federated]"""
    there = classes.images > 0
    if args.federated == 0:
        return there.expand(len(objects), -1)
    rows = []
    for o, g in zip(objects, draws, strict=True):
        mine = o.named.any(0)
        if args.fed_soft == "topk" and not pseudo:
            mine |= classes.similar[o.labels].any(0)
        mine &= there
        weights = classes.images.float().sqrt() * ~mine
        own, able = torch.stack([mine.sum(), (weights > 0).sum()]).tolist()
        if number := min(max(args.federated - own, 0), able):
            mine[torch.multinomial(weights, number, generator=g)] = True
        rows.append(mine)
    return torch.stack(rows)


# SAME AS guided_distillation.py
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


def schedule(t: int, steps: int, args: Args) -> float:
    """lr / lr_init at step t of a phase: linear warm-up from a thousandth, then a cosine to zero,
    or constant."""
    warmup = max(round(args.warmup * steps), 1)
    rise = min(0.001 + 0.999 * t / warmup, 1.0)
    return rise * (0.5 + 0.5 * math.cos(math.pi * t / steps) if args.schedule == "cosine" else 1.0)


def adamw(net: Detector, args: Args, world: World) -> torch.optim.AdamW:
    """AdamW with the same weight decay on everything. Block i of n of EVA-02 learns layer_decay^(n
    - i) as fast, its embeddings layer_decay^(n + 1); a CNN's body layer_decay."""
    depth, groups = len(getattr(net.backbone, "blocks", ())), {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            block = re.match(r"backbone\.blocks\.(\d+)\.", name)
            power = (
                depth - int(block[1])
                if block
                else depth + 1
                if depth and name.startswith("backbone.")
                else int(name.startswith("backbone.cnn."))
            )
            groups.setdefault(power, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "lr": (lr := args.lr * args.layer_decay**power), "initial_lr": lr}
            for power, params in sorted(groups.items())
        ],
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
        fused=world.device.type == "cuda",
    )


# ========================================================================================== weights
EVA_NAMES = [
    (re.compile(pattern), new)
    for pattern, new in [  # EVA-02's and Detectron2's names
        (r"^backbone\.net\.patch_embed\.proj\.", "backbone.proj."),
        (r"^backbone\.net\.", "backbone."),
        (r"\.attn\.q_bias$", ".attn.q_proj.bias"),
        (r"\.attn\.v_bias$", ".attn.v_proj.bias"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (
            r"^backbone\.simfp_(\d)\.(\d)\.(norm\.)?",
            lambda m: (
                f"neck.levels.{int(m[1]) - 2}."
                # a 3x3 comes behind the norm of a 1x1
                f"{int(m[2]) + (m[1] + m[2] in ('25', '32', '41', '52')) + bool(m[3])}."
            ),
        ),
        (r"^proposal_generator\.rpn_head\.", "rpn."),
        (r"^rpn\.conv\.conv(\d)\.", lambda m: f"rpn.convs.{2 * int(m[1])}."),
        (r"^rpn\.objectness_logits\.", "rpn.objectness."),
        (r"^rpn\.anchor_deltas\.", "rpn.deltas."),
        (
            r"^roi_heads\.box_head\.(\d)\.conv(\d)\.(norm\.)?",
            lambda m: f"heads.boxes.{m[1]}.convs.{3 * int(m[2]) - 3 + bool(m[3])}.",
        ),
        (r"^roi_heads\.box_head\.(\d)\.fc1\.", r"heads.boxes.\1.fc."),
        (r"^roi_heads\.box_predictor\.(\d)\.cls_score\.", r"heads.boxes.\1.classes."),
        (r"^roi_heads\.box_predictor\.(\d)\.bbox_pred\.", r"heads.boxes.\1.deltas."),
        (
            r"^roi_heads\.mask_head\.mask_fcn(\d)\.(norm\.)?",
            lambda m: f"heads.mask.convs.{3 * int(m[1]) - 3 + bool(m[2])}.",
        ),
        (r"^roi_heads\.mask_head\.deconv\.", "heads.mask.up."),
        (r"^roi_heads\.mask_head\.predictor\.", "heads.mask.masks."),
    ]
]


def load_detector(net: Detector, path: Path, flag: str = "--init-detector") -> list[str]:
    """Load a whole detector, of EVA-02's release or ours; lines on what did not fit. Rotary tables
    are made, not loaded; a background unit, which a sigmoid does not have, is cut off."""
    weights = {}
    for key, value in checkpoints.read_weights(path, flag).items():
        for prefix in ("teacher.", "supervised.", "student.", "model_ema.", "model."):
            key = key.removeprefix(prefix)
        theirs = key.startswith(
            ("backbone.net.", "backbone.simfp_", "proposal_generator.", "roi_heads.")
        )
        for pattern, new in EVA_NAMES if theirs else ():
            key = pattern.sub(new, key)
        weights.setdefault(key, value)
    weights = {
        k: v for k, v in weights.items() if "rope" not in k and "fed_loss_cls_weights" not in k
    }
    places = weights.get("backbone.pos_embed")
    # (1, 1 + g * g, D)
    if places is not None and places.dim() == 3 and hasattr(net.backbone, "pos_embed"):
        side = math.isqrt(places.shape[1])
        places = places[:, -side * side :].transpose(1, 2).reshape(1, -1, side, side)
        net.backbone.pos_embed = nn.Parameter(places.to(net.backbone.pos_embed))
        weights["backbone.pos_embed"] = places
    for k, own in net.state_dict().items():
        if re.search(r"\.classes\.\w+$", k) and k in weights and len(weights[k]) == len(own) + 1:
            weights[k] = weights[k][:-1]
    notes = checkpoints.load_matching(net, weights, str(path))
    # which labels there are is no weight
    return [note for note in notes if not note.endswith("(1): heads.learned")]


# ======================================================================================= evaluation
class Seen(NamedTuple):
    """What a network sees on one image: R regions in pixels of the padded square, `factors` (4,)
    times its own."""

    factors: Tensor
    pyramid: list[Tensor]
    boxes: Tensor  # (R, 4), within the image
    probs: Tensor  # (R, C)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def look(net: Detector, image: Tensor, args: Args) -> Seen:
    """An image (3, H, W) uint8 as `net` sees it."""
    x, factors = test_view(image.to(next(net.parameters()).device), args)
    pyramid, [(boxes, probs)] = net.infer(x)
    ends = factors * factors.new_tensor([image.shape[2], image.shape[1]] * 2)
    return Seen(factors, pyramid, torch.minimum(boxes, ends), probs)


@torch.no_grad()
def detect(
    net: Detector, image: Tensor, seen: Seen, args: Args, known: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The best --detections of an image (3, H, W) uint8: labels (n,), scores (n,), masks (n, H, W)
    bool, boxes (n, 4); after that cut without classes that are not `known` (C,), which in LVIS are
    neither right nor wrong."""
    rows, labels = (seen.probs > FRINGE).nonzero().unbind(1)
    keep, scores = suppress(
        seen.boxes[rows], seen.probs[rows, labels], labels, args.nms, args.soft_nms
    )
    best = scores.argsort(descending=True, stable=True)[: args.detections]
    keep, scores = keep[best], scores[best]
    if known is not None:
        use = known.to(labels.device)[labels[keep]]
        keep, scores = keep[use], scores[use]
    boxes, labels, size = seen.boxes[rows[keep]], labels[keep], tuple(image.shape[1:])
    probs = net.masks(seen.pyramid, 0, boxes, labels)
    if args.maskness:
        inside = probs > 0.5
        scores = scores * (probs * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    boxes = boxes / seen.factors
    masks = [
        paste_masks(p, b, size) > 0.5 for p, b in zip(probs.split(16), boxes.split(16), strict=True)
    ]
    return (
        labels,
        scores,
        torch.cat([torch.zeros(0, *size, dtype=torch.bool, device=boxes.device), *masks]),
        boxes,
    )


def evaluate(
    networks: dict[str, Detector], data: Instances, groups: list[str], args: Args, world: World
) -> tuple[dict[str, dict], dict[str, list], list, dict]:
    """Mask and box AP of each network in percent, also of rare, common and frequent classes, and
    its calibration error; its results in COCO's format, rows of preview pictures, and reliability
    diagrams."""
    found, entries, rows = {name: [] for name in networks}, {name: [] for name in networks}, []
    for index, image in instances.score_loader(data.val, world, args.workers):
        photo = data.val[index]
        known = None
        if data.lvis:
            known = torch.zeros(len(data.classes), dtype=torch.bool)
            known[[t.category for t in photo.things] + list(photo.negative)] = True
        if shown := len(rows) < 6:
            labels, masks, _ = masks_of(photo, data)
            rows.append(
                [
                    image.permute(1, 2, 0).numpy(),
                    plots.draw_objects(image, labels, torch.ones(len(labels)), masks.bool()),
                ]
            )
        for name, net in networks.items():
            seen = look(net.eval(), image, args)
            out = detect(net, image, seen, args, known)
            found[name] += mask_ap.results_of(photo.id, data.ids, *out)
            entries[name] += counted(net, image, seen, photo, data, args)
            if shown:
                rows[-1].append(plots.draw_objects(image, *(t.cpu() for t in out[:3])))
    found, entries = (
        {name: mask_ap.gather(world, part) for name, part in parts.items()}
        for parts in (found, entries)
    )
    scores, records = {}, {}
    if world.main:
        answers, judge = mask_ap.truth_of(data), lvis_ap.lvis_ap if data.lvis else mask_ap.coco_ap
        for name, results in found.items():
            samples = samples_of(entries[name], answers, data, args)
            records[name] = metrics.reliability(samples, args.bins, groups)
            masks, boxes = (
                judge(answers, results, kind, args.detections, groups) for kind in ("segm", "bbox")
            )
            scores[name] = (
                {k: v for k, v in masks.items() if k != "stats"}
                | {"ece": records[name]["ece"]}
                | {f"box_{k}": boxes[k] for k in ("ap", "apr", "apc", "apf")}
            )
    scores = mask_ap.gather(world, [(0, scores)] if world.main else [])[0][1]
    if any(s["ap"] is None for s in scores.values()):
        raise UserError(f"--val {args.val} of {data.root} has no object to score on.")
    return scores, found, rows, records


# ======================================================================================== retrieval
def retrieve(
    args: Args, data: Instances, labeled: list[Photo], groups: list[str], world: World
) -> None:
    """Sec. 4.1: the --neighbours images of the pool nearest to each labeled object of a rare class,
    without duplicates and what is labeled or scored: retrieved.txt, a list for --unlabeled, beside
    a report of what each class found."""
    out, size = Path(args.out), args.embed_size
    distributed.seed_torch(args.seed, "retrieval")
    net = Embedder(args.retrieval_model, args.retrieval_weights, args.root, size).to(world.device)
    rare = {c for c, g in enumerate(groups) if g == "r"}
    chosen = choose_objects(labeled, rare, 10**9, args.split_seed)
    if not chosen:
        raise UserError(
            "--pool: no labeled object is of a rare class, to search with; give another --frequency."
        )
    queries, labels, examples = embed_crops(net, chosen, data, size, world, args.workers)
    pool = [p.image for p in instances.unlabeled_photos(args.pool, data, "--pool")]
    key = f"{args.retrieval_model} {fingerprint(net.state_dict())}"
    embed = partial(
        retrieval.embed, network=net, key=key, size=size, world=world, workers=args.workers
    )
    store = embed(pool, folder=out / "embedded" / "pool")
    others = embed([p.image for p in data.train + data.val], folder=out / "embedded" / "known")
    if world.main:
        queries, at = F.normalize(queries, dim=1).numpy(), {"device": world.device}
        cosine, rows = retrieval.search(queries, store, args.neighbours, args.index, **at)
        found = np.unique(rows[rows >= 0])
        kept = found[retrieval.duplicates(store, found, args.duplicate, **at) == found]
        kept = kept[~retrieval.known(store, kept, others, args.duplicate, **at)]
        print(retrieval.histogram(store, found, args.duplicate, **at))
        if len(kept):
            retrieval.report(
                out,
                store,
                found,
                kept,
                rows,
                cosine,
                labels.numpy(),
                examples,
                data.classes,
                made_of(args, RETRIEVED_OF, data.classes),
            )
    if not main_says(world, world.main and len(kept) > 0):
        raise UserError(
            f"--pool {args.pool}: all neighbours are duplicates, or labeled or scored themselves; take "
            f"another pool, or a higher --duplicate."
        )


# ============================================================================================= main
STUDENT_ONLY = (
    "pseudo lambda_calib support refresh threshold filter_on size_threshold unsup_weight ema unlabeled "
    "steps teacher_update student_init burn_in student_labels batch_size calibration"
)


PROTOTYPES = f"prototypes of {SCRIPT}"


PROTOTYPES_OF = (
    "dataset root train_json images split split_seed tune refresh holdout stratify backbone weights "
    "init_detector proto proto_per_class embed_size image_size seed"
)


RETRIEVED_OF = f"{PROTOTYPES_OF} pool neighbours retrieval_model retrieval_weights index duplicate frequency val"


RANGES = dict.fromkeys(
    "eps ema threshold drop_path calib_min_score layer_decay repeat warmup".split(), (0, 1)
)


RANGES |= dict.fromkeys(
    "accumulate steps teacher_steps eval_every bins neighbours global_blocks window head_convs "
    "proposals rpn_batch roi_batch detections proto_per_class".split(),
    (1, 1e9),
) | {
    "image_size": (32, 8192),
    "width": (8, 4096),
    "fc": (8, 65536),
    "scale": (0.01, 100),
    "holdout": (0.01, 0.99),
    "prior": (1e-9, 0.5),
    "duplicate": (0, 1),
    "embed_size": (14, 4096),
    "nms": (0.01, 1),
    "anchor_scale": (0.1, 99),
    "sim_tau": (1e-6, 1e6),
}


GRIDS = {
    "teacher": {"eps": (0.05, 0.1, 0.2), "gamma": (0.0, 0.5, 1.0, 1.5, 2.0)},
    # DEPARTS[grid]
    "student": {"lambda_calib": (0.5, 1.0, 2.0, 3.0), "unsup_weight": (0.5, 1.0, 2.0)},
}


def check(args: Args, world: World) -> None:
    """Refuse, before any work, what cannot run and flags that would be ignored."""
    cli.check_ranges(args, RANGES)
    eva = args.backbone.startswith("eva02")
    phases = [name for name, _ in plan(args)]
    for name, size in (("student", args.batch_size), ("teacher", args.teacher_batch_size)):
        if name in phases or (name == "teacher" and "heldout" in phases):
            share = world.share(size) if args.norm == "live" and not eva else size // world.size
            if size % world.size or args.accumulate > share:
                raise UserError(
                    f"The batch of the {name}, {size}, does not divide into {world.size} processes of "
                    f"--accumulate {args.accumulate} parts; give a multiple."
                )
    student, given = args.stage == "student", args.calibration or measures_teacher(args)
    for wrong, sentence in (
        (
            eva and args.image_size % (16 * args.window),
            f"--image-size {args.image_size} does not divide into "
            f"windows of {args.window} x {args.window} tokens of 16 pixels; give a multiple, or another --window.",
        ),
        (args.image_size % 32, f"--image-size {args.image_size}: give a multiple of 32."),
        (
            args.accumulate > 1 and args.norm == "live" and not eva,
            "--accumulate would change the batch statistics of --norm live; give --norm frozen with it.",
        ),
        (
            student and not args.teacher,
            "--stage student needs a trained teacher: name one with --teacher.",
        ),
        (
            student and args.pseudo == "calibrated" and not given,
            "--stage student --pseudo calibrated needs "
            "--calibration FILE, which a calibrate stage writes; or --delta-from teacher, or --stage all.",
        ),
        (
            args.stage == "retrieve" and not args.pool,
            "--stage retrieve searches a --pool: name a folder or list.",
        ),
        (
            args.student_init == "fresh" and args.teacher_update == "ema" and not args.burn_in,
            "--student-init fresh needs a --burn-in, or the teacher would follow an untrained student.",
        ),
        (
            args.refresh and args.tune,
            "--refresh measures on the labels that --tune scores on; leave one out.",
        ),
    ):
        if wrong:
            raise UserError(sentence)
    delta = args.pseudo == "calibrated" or args.stage == "calibrate"
    base = preset(args.dataset)
    cli.check_meaning(
        args,
        base,
        args.stage,
        {
            "student all": STUDENT_ONLY,
            "teacher calibrate all": "teacher_steps teacher_batch_size",
            "calibrate student all": "shrink delta_from",
            "calibrate all student": "teacher",
            "student all retrieve": "pool neighbours retrieval_model retrieval_weights index duplicate",
        },
        {
            "eps": args.smoothing == "none",
            "gamma": args.smoothing != "similarity+freq",
            "norm": eva and args.norm != base.norm,
            "filter_on": args.pseudo != "calibrated",
            "pool": args.unlabeled > "",
            "fed_soft": not args.federated or args.cls_loss == "softmax",
            "calib_iou": args.calib_samples == "gt",
            **{
                name: off
                for names, off in (
                    (
                        "sim_tau sim_center sim_exclude_self sim_topk counts",
                        not args.smoothing.startswith("similarity"),
                    ),
                    ("proto proto_per_class", not needs_prototypes(args)),
                    ("val", args.tune),
                    ("holdout stratify", not holds_out(args)),
                    ("embed_size", not needs_prototypes(args) and not args.pool),
                    ("convention student_labels", args.smoothing == "none"),
                    ("lambda_calib support refresh calibration", not delta),
                    (
                        "shrink delta_from",
                        not delta or (args.calibration > "" and not args.refresh),
                    ),
                    ("neighbours retrieval_model retrieval_weights index duplicate", not args.pool),
                    ("window global_blocks patch_resize drop_path checkpointing", not eva),
                    ("federated prior", args.cls_loss == "softmax"),
                    ("ema burn_in", args.teacher_update == "frozen"),
                    ("teacher_steps teacher_batch_size", not {"teacher", "heldout"} & {*phases}),
                )
                for name in names.split()
            },
        },
    )


def plan(args: Args) -> list[tuple[str, int]]:
    """Sec. 4.1: the networks that a run trains, in order, with their steps. `heldout` learns from
    85 % of the labels, so that Eq. 4 can be measured on the others; `teacher` from all.
    DEPARTS[delta]"""
    student, teacher = (
        [("student", args.steps)],
        [] if args.teacher else [("teacher", args.teacher_steps)],
    )
    heldout = [("heldout", args.teacher_steps)]
    if args.stage == "calibrate":
        return [] if args.teacher else teacher if measures_teacher(args) else heldout
    first = (
        heldout
        if args.pseudo == "calibrated" and not args.calibration and not measures_teacher(args)
        else []
    )
    return {"teacher": teacher, "student": student, "all": first + teacher + student}.get(
        args.stage, []
    )


def measures_teacher(args: Args) -> bool:
    """Whether Eq. 4 is measured of the teacher itself; with --tune or --refresh it has not seen the
    held-out labels."""
    return args.tune or args.refresh > 0 or args.delta_from == "teacher"


def holds_out(args: Args) -> bool:
    """Whether some of the labels are held out."""
    measures = (
        args.stage == "calibrate"
        or args.stage in ("student", "all")
        and args.pseudo == "calibrated"
    )
    return args.tune or args.refresh > 0 or (measures and not args.calibration)


def needs_prototypes(args: Args) -> bool:
    similar = args.smoothing.startswith("similarity") or args.fed_soft == "topk"
    return similar and args.stage != "retrieve" or args.stage == "prototypes"


def find(args: Args, classes: list[str] | None = None) -> Instances:
    """The data set; of `shapes` the long-tailed one, in LVIS's layout."""
    root = Path(args.root)
    if args.dataset == "shapes":
        root = shapes.make_tail(root / "tail")
    kind = "coco" if args.dataset == "coco" else "lvis"
    return instances.find(
        kind, root, args.train_json, args.val_json, args.images, args.val, classes
    )


def backbone_weights(weights: str, backbone: str, root: str) -> dict[str, Tensor] | None:
    """The tensors that --weights names, a file's or the embedded data's own; None for imagenet and
    none."""
    if weights in ("imagenet", "none"):
        return None
    if weights == "shapes":
        return checkpoints.read_weights(shapes.pretrained(Path(root), backbone))
    return checkpoints.read_weights(Path(weights))


def network(
    args: Args, num_classes: int, world: World, name: str, pretrained: bool = True
) -> tuple[Detector, list]:
    """A detector with its starting weights, on the device; and lines on weights that did not
    load."""
    distributed.seed_torch(args.seed, name)
    net = Detector(
        args, num_classes, world.bf16(args.precision), args.weights if pretrained else "none"
    )
    notes, cnn = [], not args.backbone.startswith("eva02")
    if (
        pretrained
        and cnn
        and (weights := backbone_weights(args.weights, args.backbone, args.root)) is not None
    ):
        notes = checkpoints.load_matching(net.backbone.cnn.body, weights, args.weights)
    if pretrained and args.init_detector:
        notes = load_detector(net, Path(args.init_detector))
    net = distributed.sync_batchnorm(net, world) if args.norm == "live" else net
    return net.to(world.device), notes


def begin(
    phase: str,
    args: Args,
    data: Instances,
    classes: Classes,
    delta: Tensor | None,
    world: World,
    begun: int,
    state: dict | None,
) -> tuple[State, list[str]]:
    """The networks of a phase at its beginning, student and its teacher with the trained teacher's
    weights; or as its checkpoint `state` has them, which needs no other file."""
    copied, teacher = phase == "student" and args.student_init == "teacher", None
    net, notes = network(
        args, len(data.classes), world, phase, pretrained=not copied and state is None
    )
    if phase == "student":
        teacher = (
            network(args, len(data.classes), world, "teacher", False)[0].eval()
            if state is not None
            else trained(args, data, args.teacher or "teacher.pt", world)
        )
        teacher.requires_grad_(False)
    if copied:
        net.load_state_dict(teacher.state_dict())
    net.heads.learned.copy_(net.heads.learned * copied | (classes.images > 0))
    if args.compile:
        net.backbone.compile()
    s = State(phase, net, teacher, None, None, classes, delta, begun, begun)
    for name, weights in (state["networks"] if state else {}).items():
        checkpoints.load_exact(s.networks()[name], weights, state["path"])
    s.optimizer, s.forward = adamw(net, args, world), distributed.parallel(net.train(), world)
    if state is not None:
        s.step, s.delta = (
            state["step"],
            None if state["delta"] is None else state["delta"].to(world.device),
        )
        s.optimizer.load_state_dict(state["optimizer"])
    return s, notes


def trained(args: Args, data: Instances, name: str, world: World) -> Detector:
    """The network of a checkpoint, in eval mode: of the run folder, or wherever --teacher lies."""
    path = Path(name) if name == args.teacher else Path(args.out) / name
    state, net = (
        checkpoints.load_checkpoint(path, SCRIPT),
        network(args, len(data.classes), world, "teacher", False)[0],
    )
    if state["classes"] != data.classes:
        raise UserError(f"{path} knows other classes than {data.root} has; they must be the same.")
    checkpoints.load_exact(
        net, state["networks"].get("teacher", state["networks"].get("supervised")), str(path)
    )
    return net.eval()


def main_says(world: World, fact: bool) -> bool:
    """What the main process finds: on other machines a network disk may show its files later."""
    return mask_ap.gather(world, [(world.rank, fact)])[0][1]


def delta_of(
    args: Args, data: Instances, held: list[Photo], groups: list[str], world: World
) -> Tensor | None:
    """Delta of Eq. 5 (C,): from --calibration, or measured on the held-out labels and written to
    the run folder."""
    if args.pseudo != "calibrated" and args.stage != "calibrate":
        return None
    path, record = Path(args.calibration or Path(args.out) / "calibration.json"), None
    if not args.calibration and not main_says(world, path.exists()):
        name = (
            args.teacher
            if args.teacher and (measures_teacher(args) or args.stage == "calibrate")
            else "teacher.pt"
            if measures_teacher(args)
            else "heldout.pt"
        )
        net = trained(args, data, name, world)
        record = calibrate(net, instances.scored_on(data, held), groups, args, world)
        if world.main:
            plots.diagram({Path(name).stem: record["reliability"]}, path.with_suffix(".png"))
            write_text(path, json.dumps(record, indent=1))
            ece = record["reliability"]["ece"]
            print(
                f"calibration: {sum(record['samples'])} samples on {len(held)} held-out images, ECE "
                f"{'none' if ece is None else f'{ece:.3f}'}; {path}"
            )
    try:
        record = record or json.loads(path.read_text())
        delta = dict(
            zip(record["classes"], np.asarray_chkfinite(record["delta"]).tolist(), strict=True)
        )
        return torch.tensor([delta[name] for name in data.classes], device=world.device)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--calibration {path} cannot be read, or is of other classes ({error}); a calibrate stage "
            f"writes one."
        ) from None


def train(args: Args) -> dict:
    """One run, from the start or from its checkpoint, to results.json, whose contents are
    returned."""
    args = replace(args, out=str(runs.default_out(SCRIPT, args)))
    check(args, distributed.launched())
    phases, out, data = plan(args), Path(args.out), find(args)
    student = "student" in dict(phases)
    choose = partial(
        instances.choose, data, args.split, args.split_seed, pool="remaining", balanced=False
    )
    chosen = choose(args.unlabeled, needed=student and not args.pool)
    learned, held = chosen.labeled, []
    if holds_out(args):
        learned, held = hold_out(
            learned, args.holdout, args.split_seed, args.stratify, len(data.classes)
        )
    labeled = learned if args.tune or args.refresh else chosen.labeled
    scored = instances.scored_on(data, held) if args.tune else data
    resuming = runs.open_run(out, SCRIPT, args, args.resume, distributed.launched().main)
    world = distributed.start(args.device)
    state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT) if resuming else None
    step, total = state["step"] if state else 0, sum(steps for _, steps in phases)
    if state is None:  # files are looked at before anything is trained
        _ = args.teacher and trained(args, data, args.teacher, world)
        _ = args.calibration and delta_of(args, data, held, [], world)
    similarity = similarities(args, data, labeled, world)
    classes = label_statistics(args, data, labeled, similarity, world)
    if args.stage == "retrieve" or (student and args.pool):
        if not main_says(world, retrieval.done(out, made_of(args, RETRIEVED_OF, data.classes))):
            retrieve(args, data, labeled, classes.groups, world)
        chosen = choose(str(out / "retrieved.txt"), needed=student)

    def start(phase: str, begun: int) -> tuple[State, list[str], list[Photo]]:
        """A phase from its beginning or its checkpoint, lines on its weights, and its labeled
        images."""
        photos, again = (
            labeled if phase != "heldout" else learned,
            state is not None and state["phase"] == phase,
        )
        own = label_statistics(args, data, photos, similarity, world)
        delta = (
            delta_of(args, data, held, classes.groups, world)
            if phase == "student" and not again
            else None
        )
        return *begin(phase, args, data, own, delta, world, begun, state if again else None), photos

    spans = [
        (phase, begun := sum(steps for _, steps in phases[:i]), begun + phases[i][1])
        for i, (phase, _) in enumerate(phases)
    ]
    ahead = [span for span in spans if step < span[2]]
    first = start(*ahead[0][:2]) if ahead else None
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
            "held_out": [p.name for p in held],
        },
    )
    run.say(
        f"{chosen.text}; scored on {len(scored.val)}; networks: "
        f"{', '.join(f'{name} ({steps} steps)' for name, steps in phases) or 'none'}; in {out}"
    )
    last, best = (state["last"], state["best"]) if state else ({}, {})
    for phase, begun, border in ahead:
        s, notes, photos = first or start(phase, begun)
        first = None
        run.say(*(f"weights {note}" for note in notes))
        s.last, s.best = last, best
        batch_size = args.batch_size if phase == "student" else args.teacher_batch_size
        views = instances.Views(
            photos, partial(labeled_view, args, data), args.seed, f"{phase} labeled"
        )
        more = instances.Views(
            chosen.unlabeled, partial(unlabeled_view, args), args.seed, "unlabeled"
        )
        factors = instances.repeat_factors(photos, len(data.classes), args.repeat)
        stream = partial(
            loading.stream,
            batch_size=batch_size,
            start=s.step,
            stop=border,
            world=world,
            workers=args.workers,
            collate=instances.collate,
        )
        feeds = [
            stream(views, factors=factors),
            stream(more) if phase == "student" else itertools.repeat(None),
        ]
        for now in run.steps(s.step, border):
            done = now - begun
            if phase == "student" and args.refresh and done and done % args.refresh == 0:
                some = instances.scored_on(data, held[:2000])
                record = calibrate(s.teacher, some, classes.groups, args, world)
                s.delta = torch.tensor(record["delta"], device=world.device)
            for group in s.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(done, border - begun, args)
            batches = [instances.to_device(next(feed), world.device) for feed in feeds]
            distributed.seed_torch(args.seed, "step", now, world.rank)  # drop path
            values = train_step(s, *batches, args, world)
            run.tally(now, values, *batches)
            distributed.average_buffers(world, *s.networks().values())
            s.step = now + 1

            asked, ends = run.asked(s.step), s.step == border
            scoring = s.step % args.eval_every == 0 or ends
            if s.step % args.log_every == 0 or scoring:
                run.log(s.step, lr=s.optimizer.param_groups[0]["lr"])
            if scoring and phase != "heldout":
                score_networks(s, scored, args, world, run)
            if ends and phase != "student":
                run.save(f"{phase}.pt", snapshot(s, args, data, optimizer=False))
            if scoring or asked or (args.save_every and s.step % args.save_every == 0):
                run.save("last.pt", snapshot(s, args, data))
            if asked and s.step < total:
                run.leave(s.step)  # does not return
        last, best = s.last, s.best
        world.barrier()  # its checkpoint is written
    if args.stage == "calibrate":
        delta_of(args, data, held, classes.groups, world)
    facts = {
        "stage": args.stage,
        "val": "held out" if args.tune else args.val,
        "split_fingerprint": chosen.fingerprint,
    }
    if world.main and {"supervised", "student"} <= last.keys():  # Fig. 4
        new = "student" if args.teacher_update == "frozen" else "teacher"
        groups, counts = (
            dict(zip(data.classes, x, strict=True))
            for x in (classes.groups, classes.instances.tolist())
        )
        plots.scatter(
            last["supervised"]["per_class"],
            last[new]["per_class"],
            groups,
            counts,
            out / "per_class.png",
            ("supervised", new),
        )
    if not last:
        return run.say(f"done; in {out}") or facts
    return run.finish(
        {name: {"last": last[name], "best": best[name]} for name in last},
        facts,
        "teacher" if "teacher" in last else "supervised",
        "ap",
    )


def score_networks(s: State, data: Instances, args: Args, world: World, run: runs.Run) -> None:
    """Score the networks, note the best, keep its weights: best.pt (of the teacher's, once there is
    a student)."""
    networks = s.networks()
    if s.phase == "student" and args.teacher_update == "frozen" and "teacher" in s.last:
        networks.pop("teacher")  # it is what it was
    headline = (
        "supervised" if s.phase == "teacher" else "teacher" if "teacher" in networks else "student"
    )
    scores, found, rows, records = evaluate(networks, data, s.classes.groups, args, world)
    s.student.train()
    for name, record in scores.items():
        s.last[name] = {"step": s.step, **record}
        if name not in s.best or s.last[name]["ap"] > s.best[name]["ap"]:
            s.best[name] = s.last[name]
    run.write(
        s.step, **{f"{k}_{name}": s.last[name][k] for name in scores for k in ("ap", "apr", "ece")}
    )
    if world.main:
        plots.strip(
            rows,
            ["image", "label", *networks],
            run.out / "previews" / f"{s.step:07d}.png",
            height=192,
        )
        plots.diagram(records, run.out / f"reliability_{s.phase}.png")
        for name in scores:
            write_text(run.out / f"{name}.segm.json", json.dumps(found[name]))
            write_text(run.out / f"{name}.reliability.json", json.dumps(records[name], indent=1))
    if s.best[headline] is s.last[headline]:
        run.save("best.pt", snapshot(s, args, data, optimizer=False))


def snapshot(s: State, args: Args, data: Instances, optimizer: bool = True) -> dict:
    """What a checkpoint holds. best.pt, heldout.pt and teacher.pt have no `optimizer`: to score,
    predict, teach."""
    state = {
        "settings": json.loads(json.dumps(vars(args))),
        "classes": data.classes,
        "ids": data.ids,
        "phase": s.phase,
        "step": s.step,
        "last": s.last,
        "best": s.best,
        "delta": s.delta,
        "groups": s.classes.groups,
        "networks": {name: net.state_dict() for name, net in s.networks().items()},
    }
    return state | ({"optimizer": s.optimizer.state_dict()} if optimizer else {})


def grid(args: Args) -> dict:
    """Sec. 4.1: the small search on labels held out, one resumable run after the other; grid.json
    has the best."""
    if args.stage != "all":
        raise UserError("--grid chooses the stage itself; leave --stage out.")

    def run(folder: Path, **values: float) -> dict:
        results = train(
            replace(
                args, grid="no", tune=True, stage=args.grid, out=str(folder), resume=True, **values
            )
        )
        distributed.stop()
        return results["supervised" if args.grid == "teacher" else best]

    best = "teacher" if args.teacher_update == "ema" else "student"
    return grid_search(
        run, GRIDS[args.grid], runs.default_out(SCRIPT, args), distributed.launched().main
    )


def load(path: str, args: Args) -> tuple[dict[str, Detector], dict, World]:
    """The networks of a checkpoint, built from the settings it holds."""
    state, world = checkpoints.load_checkpoint(Path(path), SCRIPT), distributed.start(args.device)
    nets = {}
    for name, weights in state["networks"].items():
        nets[name] = network(args, len(state["classes"]), world, name, pretrained=False)[0].eval()
        checkpoints.load_exact(nets[name], weights, path)
    return nets, state, world


def score_checkpoint(args: Args) -> dict:
    """--eval: score a checkpoint's networks; <checkpoint>.results.json, and
    <checkpoint>.<network>.segm.json."""
    networks, state, world = load(args.eval, args)
    data = find(args, state["classes"])
    scores, found, rows, records = evaluate(networks, data, state["groups"], args, world)
    scores = {name: {"last": {"step": state["step"], **record}} for name, record in scores.items()}
    facts = {"dataset": args.dataset, "split": args.split, "val": args.val, "seed": args.seed}
    if world.main:
        plots.strip(
            rows, ["image", "label", *networks], Path(f"{args.eval}.previews.png"), height=192
        )
        plots.diagram(records, Path(f"{args.eval}.reliability.png"))
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
    """--predict CKPT IMAGES...: <checkpoint>.predictions/ with overlays and, in COCO's format,
    predictions.json."""
    nets, state, world = load(args.predict[0], args)
    net, files = nets.get("teacher", next(iter(nets.values()))), pictures(args.predict[1:])
    predictions.predict_objects(
        files,
        Path(f"{args.predict[0]}.predictions"),
        lambda image: detect(net, image, look(net, image, args), args),
        state["ids"],
        state["classes"],
        world,
    )


def settings(dataset: str = "lvis", eval: str = "", predict: str = "") -> Args:
    """What the command line starts from: a preset, or the settings inside a checkpoint to score or
    predict with."""
    return (
        cli.saved_settings(Args, Path(eval or predict), SCRIPT)
        if eval or predict
        else preset(dataset)
    )


def main(args: Args) -> Any:
    try:
        cli.check_ranges(args, RANGES)
        return (
            score_checkpoint(args)
            if args.eval
            else predict(args)
            if args.predict
            else train(args)
            if args.grid == "no"
            else grid(args)
        )
    finally:
        distributed.stop()


def grid_search(run: Callable[..., dict], values: dict[str, tuple], out: Path, main: bool) -> dict:
    """Runs every combination of `values`, run(folder, **combination) -> a record of results.json,
    prints a table and writes out/grid.json: `runs` and, by AP, the `best`, which is returned."""
    rows = []
    for chosen in itertools.product(*values.values()):
        here = dict(zip(values, chosen, strict=True))
        record = run(out / "_".join(f"{name}-{value:g}" for name, value in here.items()), **here)[
            "last"
        ]
        rows.append({**here, **{k: record[k] for k in ("ap", "apr", "ece")}})
        if main:
            print(
                *(f"{k} {'-' if v is None else f'{v:.3g}'}" for k, v in rows[-1].items()),
                flush=True,
            )
    best = max(rows, key=lambda row: row["ap"])
    if main:
        write_text(out / "grid.json", json.dumps({"runs": rows, "best": best}, indent=1))
    return best


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

        found = None if name.startswith(PLAIN) else backbone_weights(weights, name, root)
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
            checkpoints.load_matching(self.body, found, weights)
        facts = getattr(self.body, "pretrained_cfg", {})
        for key, default in (("mean", transforms.IMAGENET_MEAN), ("std", transforms.IMAGENET_STD)):
            values = [255 * v for v in facts[key]] if facts.get(key) else default
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        return (self.body(x)[-1].mean((2, 3)) if self.maps else self.body(x)).float()


def embed_crops(
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
        **loading.helpers(workers),
        collate_fn=lambda item: crops(item[0], data, item[1], size),
    )
    for i, (crops, labels) in enumerate(crops_of):
        if len(labels):
            new = {c: x for c, x in zip(labels.tolist(), crops, strict=True) if c not in examples}
            examples |= new
            vectors = torch.cat([net(x.to(world.device)) for x in crops.split(64)]).cpu()
            found.append((world.rank + i * world.size, vectors, labels, new))
    found = mask_ap.gather(world, found)
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


def hold_out(
    photos: list[Photo], share: float, seed: int, stratify: bool = False, num_classes: int = 0
) -> tuple[list[Photo], list[Photo]]:
    """The pictures to learn from and those held out, both in the order given. round(share * n) are
    held out, but one at least and one at most not; which ones, depends on the seed and the names
    alone.

    With `stratify` a class (of `num_classes`) that two pictures have, or more, comes into both
    parts where that is possible: the rarest class not yet held out chooses first, and never the
    last picture to learn a class from."""
    if len(photos) < 2:
        raise UserError(
            f"Of {len(photos)} labeled images none can be held out; a part to tune on needs two or more."
        )
    number = min(max(round(share * len(photos)), 1), len(photos) - 1)
    ranked = sorted(range(len(photos)), key=lambda i: photos[i].name)
    order = [ranked[i] for i in rng(seed, "hold out").permutation(len(photos))]
    if stratify:
        order = [
            order[i]
            for i in spread([sorted(singles(photos[i])) for i in order], num_classes, number)
        ]
    chosen = set(order[:number])
    return (
        [p for i, p in enumerate(photos) if i not in chosen],
        [p for i, p in enumerate(photos) if i in chosen],
    )


def spread(held: list[list[int]], num_classes: int, number: int) -> list[int]:
    """For pictures that hold these classes, their places, with the `number` to hold out first (see
    `hold_out`); where the classes leave a choice, earlier pictures are taken first."""
    counts = np.bincount(
        np.array([c for classes in held for c in classes], np.int64), minlength=num_classes
    )
    left, taken = counts.copy(), {}  # a dict keeps the order
    homes: list[list[int]] = [[] for _ in counts]
    for i, classes in enumerate(held):
        for c in classes:
            homes[c].append(i)

    def take(places: Iterable[int], most: int) -> None:
        for least in (0, 2):  # a class's only picture only if there is no other
            for i in places:
                if (
                    most > 0
                    and i not in taken
                    and all(left[c] > 1 or counts[c] < least for c in held[i])
                ):
                    taken[i] = True
                    left[held[i]] -= 1
                    most -= 1

    for c in np.argsort(counts, kind="stable"):
        if counts[c] > 1 and left[c] == counts[c]:
            take(homes[c], 1)
    take(range(len(held)), number - len(taken))
    return [*taken, *(i for i in range(len(held)) if i not in taken)]


def choose_objects(
    photos: list[Photo], classes: set[int], most: int, seed: int
) -> list[tuple[Photo, list[int]]]:
    """Up to `most` objects (crowds are none) of each of the `classes`, at random: pictures and the
    places of theirs."""
    places: dict[int, list] = {}
    for p, photo in enumerate(photos):
        for i, thing in enumerate(photo.things):
            if thing.category in classes and not thing.crowd:
                places.setdefault(thing.category, []).append((p, i))
    taken: dict[int, list[int]] = {}
    for category, here in sorted(places.items()):
        for j in sorted(rng(seed, "objects", category).permutation(len(here))[:most].tolist()):
            taken.setdefault(here[j][0], []).append(here[j][1])
    return [(photos[p], sorted(taken[p])) for p in sorted(taken)]


def crops(photo: Photo, data: Instances, chosen: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Crops (n, 3, size, size) uint8 of `chosen` objects, their boxes enlarged by a tenth of the
    side at each end, and their classes (n,)."""
    image = instances.load(photo)
    labels, _, boxes = true_objects(photo, data, chosen)
    found = [torch.zeros(0, 3, size, size, dtype=torch.uint8)]
    for x0, y0, x1, y1 in boxes.tolist():
        dx, dy = 0.1 * (x1 - x0), 0.1 * (y1 - y0)
        part = image[
            None,
            :,
            max(int(y0 - dy), 0) : math.ceil(y1 + dy),
            max(int(x0 - dx), 0) : math.ceil(x1 + dx),
        ]
        found.append(F.interpolate(part, (size, size), mode="bicubic", antialias=True))
    return torch.cat(found), labels


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=("dataset", "eval", "predict"))
