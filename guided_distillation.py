"""Guided Distillation for Semi-Supervised Instance Segmentation.
Berrada, Couprie, Alahari, Verbeek. WACV 2024. https://arxiv.org/abs/2308.02668

A few images have their objects outlined; many have not. A teacher network first learns from the
few. A student network, which starts afresh, then learns from the same few and from the objects that
the teacher finds in the many (its pseudo labels), while the teacher stays as it is: this is the
guided burn-in. At its end the teacher becomes a copy of the student, and from then on it follows
the student as a moving average. Both networks are Mask2Former (Cheng et al., CVPR 2022,
https://arxiv.org/abs/2112.01527), which is complete in this file.

    paper                                     here
    Sec. 3.1  architecture                    Mask2Former, PixelDecoder, Decoder
    Sec. 3.1  step 1, teacher pre-training    train, train_stage, train_step
    Sec. 3.1  step 2, improved burn-in        train, TEACHING, train_step
    Sec. 3.1  step 3, distillation stage      train_step, ema_update
    Sec. 3.1  pseudo-label extraction         pseudo_labels, --class-threshold, --size-threshold
    Sec. 3.2  bipartite matching              match, match_costs, assign
    Sec. 3.2  points by importance sampling   mask_losses
    Sec. 3.2  L_s and L_u                     criterion
    Eq. 1     l_CE + lambda_D l_D + ...       weighted_loss, LossWeights, mask_losses (l_CE, l_D),
                                              criterion (l_C, and the sum over heads)
    Eq. 2     average over the batch          batch_average, normalisers, criterion
    Eq. 3     one-hot pseudo labels           pseudo_labels
    Eq. 4     L = L_s + lambda_u L_u          total_loss, train_step
    Eq. 5     moving average of weights       ema_update
    Table 1   who learns from what, and when  TEACHING, teaching_plan
    Fig. 3    the three steps                 train, train_step
    Fig. 4    one step of distillation        train_step, teach, learn
    Sec. 4.1  data sets and splits            find_data, --dataset, --split, --pool
    Sec. 4.1  hyper-parameters                Args, PRESETS, preset, adamw, learning_rate_factor
    Sec. 4.1  early stopping                  score_networks (best.pt), --eval-every
    Sec. 4.1  mixed precision                 Mask2Former.forward, --precision
    Sec. 4.1  mask AP                         detect, evaluate
    Table 2   length of the burn-in           BURN_IN, --burn-in-steps
    Table 3   results, a command for each     --dataset, --split, --backbone, --stage,
                                              docs/guided_distillation.md
    Table 4   other burn-ins                  TEACHING, --burn-in
    Table 5   weight of L_u                   --lambda-u
    Table 6   pre-training of the backbone    --backbone, docs/guided_distillation.md (their names)
    Table 7   fixed backbone                  ViT (freeze), --freeze-backbone
    Sec. 4.3  weak views: crops and flips     weak_view, jitter_crop, street_crop
    Sec. 4.3  strong views                    strong_view
    Sec. 4.3  ViT backbones                   ViT
    Fig. 6    strong views compared           unlabeled_view, strong_view, erase_boxes, --strong-aug
    Fig. 1    AP over the share of labels     docs/guided_distillation.md
    Figs. 2, 5  pictures of results           draw_previews, predict
    (Mask2Former) masked attention            visible, Attention
    (Mask2Former) deformable attention        DeformableAttention, WeightedSamples
    (Mask2Former) sine positions              sine_positions
    (Mask2Former) classes of pixels           segment, evaluate_pixels, class_masks, --task

Shapes: B images, Q queries, K classes, N targets of an image, L = 10 prediction heads, P points, C
= 256 channels, H x W pixels, h x w cells of stride 4, S tokens of strides 8, 16, 32. Suffix _u
unlabeled. Lines marked DEPARTS[name] leave the paper or decide what it leaves open;
docs/guided_distillation.md says why.

    torchrun --nproc_per_node 8 guided_distillation.py --dataset coco --split 5%
    python guided_distillation.py --dataset shapes --split 5%    # drawn data, no download, CPU
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import (
    backbones,
    checkpoints,
    cli,
    colour,
    distributed,
    instances,
    judge,
    loading,
    mask_ap,
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
from common.errors import UserError, one_line
from common.files import write_text
from common.instances import Batch, Target
from common.objects import (
    Instances,
    Photo,
    Window,
    cut_out,
    masks_of,
    nearest_in_window,
    read_ids,
    singles,
)
from common.semantic import IGNORE, Segmentation

SCRIPT = "guided_distillation.py"
RETURNED = ("student", "supervised")  # the network that the method returns, or its baseline
HEADS = 8  # of all attention layers
METRIC = {"instance": "ap", "semantic": "miou"}  # the score that counts
NO_OBJECT = 0.1  # weight of the class "no object" beside 1 for the others (Mask2Former)

# ========================================================================================= settings
Count = Annotated[int, msgspec.Meta(ge=1)]
Side = Annotated[int, msgspec.Meta(ge=32)]
Factor = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass
class Args:
    """Guided Distillation: instance segmentation from a few labeled images and many unlabeled ones.
    A teacher learns from the labels, and its predictions help to train a student; both are
    Mask2Former. --dataset, --split, --stage, --backbone and --steps pick the paper's numbers, and
    every other flag overrides one of them. docs/guided_distillation.md explains DEPARTS[...]."""

    # What the masks are of. instance: single objects, as in the paper; semantic: all pixels of a
    # class. DEPARTS[semantic]
    task: Literal["instance", "semantic"] = "instance"
    # What to train on. coco: any COCO JSON. voc and folder are of --task semantic.
    dataset: Literal["coco", "cityscapes", "shapes", "voc", "folder"] = "coco"
    # Labeled images: a published share or list, random:N, random:N%, random:1/N, all, a list, a
    # COCO JSON.
    split: str = "5%"
    # Number of the draw, of random splits and of COCO's ten published ones. DEPARTS[splits]
    split_seed: int = 1
    # teacher: step 1 of Sec. 3.1 alone, for the supervised rows of Table 3; student: steps 2 and 3;
    # all: one after the other.
    stage: Literal["teacher", "student", "all"] = "all"
    # File of a trained teacher, ours or official Mask2Former weights, in place of step 1.
    teacher: str = ""
    # How the student starts, Tables 1 and 4; guided is the paper's own.
    burn_in: Literal["guided", "standard", "fixed", "none"] = "guided"
    # Length of the burn-in, Table 2. The default follows from --dataset, --split and --steps.
    burn_in_steps: int = 30_000
    # Steps of the teacher, and again of the student with its burn-in, Sec. 4.1.
    steps: Count = 368_750

    # ---- Sec. 4.1, hyper-parameters of the method

    ema: Share = 0.9996  # alpha of Eq. 5, the decay of the teacher's average
    lambda_u: float = 2.0  # weight of the loss on pseudo labels, Eq. 4, Table 5
    # alpha_C of Sec. 3.1: pseudo labels have a higher class probability.
    class_threshold: Share = 0.7
    # alpha_S of Sec. 3.1: pseudo labels have a larger mask, in cells of stride 4. DEPARTS[size]
    size_threshold: float = 5.0
    # Weight of the class loss, Eq. 1; 1 in the paper's text. DEPARTS[loss-weights]
    lambda_c: float = 2.0
    # Weight of the masks' cross-entropy, Eq. 1; 1 in the paper's text. DEPARTS[loss-weights]
    lambda_ce: float = 5.0
    # The student's view, Fig. 6: ours, ours with cut-out (PT), or the teacher's view itself.
    # DEPARTS[strong-view]
    strong_aug: Literal["ours", "cutout", "same"] = "ours"
    # How the student's labeled images are drawn: more often if their classes are rare, or all
    # alike. DEPARTS[sampling]
    labeled_sampling: Literal["repeat", "uniform"] = "repeat"
    # Unlabeled images: all training images, or all but the labeled ones. DEPARTS[pool]
    pool: Literal["all", "remaining"] = "all"

    # ---- network (Secs. 3.1, 4.1; Mask2Former)

    # Name in timm (swin_*, vit_*dinov2*, deit_*, any CNN), or else in torchvision; Tables 3, 6, 7.
    backbone: str = "resnet50.tv_in1k"
    # imagenet (what the tag of --backbone says), none, shapes, or a file of a backbone or a model.
    weights: str = "imagenet"
    freeze_backbone: bool = False  # Table 7, "Fixed": a ViT's body is not trained. DEPARTS[freeze]
    # BatchNorm of a CNN. frozen: constants; live: trained, and synchronised on GPUs (Cityscapes).
    norm: Literal["frozen", "live"] = "frozen"
    queries: Count = 100  # how many, K of Sec. 3.1; 200 for Swin-L. DEPARTS[queries]
    # How the images and the maps of a ViT are resized, Sec. 4.3. DEPARTS[vit-resize]
    vit_resize: Literal["bilinear", "nearest"] = "bilinear"
    # Channels of both decoders, a multiple of 32. As in Mask2Former, like the next two.
    width: Annotated[int, msgspec.Meta(ge=32)] = 256
    encoder_layers: Count = 6  # layers of the pixel decoder
    decoder_layers: Count = 9  # layers of the transformer decoder

    # ---- optimisation (Sec. 4.1)

    # Labeled images in a step of all processes together, and as many unlabeled. DEPARTS[batch]
    batch_size: Count = 16
    lr: float = 1e-4  # highest learning rate, of all but the backbone
    backbone_lr: Share = 0.1  # learning rate of the backbone, as a share of --lr
    # How the learning rate falls: in two drops (COCO), or as a polynomial (Cityscapes).
    # DEPARTS[schedule]
    schedule: Literal["step", "poly"] = "step"
    points: Annotated[int, msgspec.Meta(ge=16)] = 12544  # at how many points masks are compared
    crop_size: tuple[Side, Side] = (1024, 1024)  # height and width in training, multiples of 32
    # Range of the random scale of crops; Cityscapes draws from a list of its own instead.
    scale: tuple[Factor, Factor] = (0.1, 2.0)
    # Size of images in evaluation: of the shorter side, and at most of the longer one.
    test_size: tuple[Side, Side] = (800, 1333)

    # ---- where the data lie

    root: str = "datasets/coco"  # folder of the data set, see data/README.md
    train_json: str = ""  # annotations of the training images; empty: the usual names
    val_json: str = ""  # annotations of the images that are scored; empty: the usual names
    images: str = ""  # folder of the images; empty: the usual places
    unlabeled: str = ""  # folder or list of unlabeled images, in place of --pool
    val: str = "val"  # name of the part that is scored

    # ---- the run

    # Run folder; empty: runs/guided_distillation-<dataset>-<split>-d<split seed>-s<seed>, with
    # -semantic before the data set where that is the task.
    out: str = ""
    resume: bool = False  # continue the run in --out; starts afresh when there is none
    seed: int = 0  # initial weights, the order of images, augmentation and points follow from it
    workers: int = loading.default_workers()  # decoding processes per process and stream
    device: str = "auto"  # auto, cpu, cuda
    # Precision of the network that learns; auto: bf16 on GPUs that have it. DEPARTS[amp]
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile the backbone and the pixel decoder in training
    # Parts in which a process computes its share of the batch: less memory, same gradients.
    accumulate: Count = 1
    # Compute activations again in the backward pass: less memory, same gradients.
    checkpointing: bool = False
    eval_every: Count = 5000  # steps between evaluations
    save_every: int = 0  # steps between checkpoints; 0: with every evaluation
    log_every: Count = 20  # steps between log lines
    # open all files of the run, say what is wrong or odd with them, and train nothing
    check: bool = False
    eval: str = ""  # evaluate this checkpoint, train nothing
    # A checkpoint, then images or folders: write what it finds in them, train nothing.
    predict: list[str] = field(default_factory=list)
    # side of the windows in which --predict sees larger pictures; 0: it sees them whole
    predict_tile: Annotated[int, msgspec.Meta(ge=0)] = 0
    # Write the network of this checkpoint as a .safetensors file, train nothing.
    export: str = ""


PRESETS: dict[str, dict[str, Any]] = {
    "coco": {},  # the defaults of Args
    "cityscapes": {
        "root": "datasets/cityscapes",
        "split_seed": 0,
        "norm": "live",
        "steps": 90_000,
        "schedule": "poly",
        "crop_size": (512, 1024),
        "test_size": (1024, 2048),
    },
    "shapes": {
        "root": "datasets/shapes",
        "split_seed": 0,
        "backbone": "test_resnet",
        "weights": "shapes",
        "norm": "live",
        "width": 64,
        "queries": 20,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "points": 512,
        "batch_size": 8,
        "steps": 800,
        "lr": 1e-3,
        "backbone_lr": 0.3,
        "ema": 0.99,
        "schedule": "poly",
        "crop_size": (96, 96),
        "scale": (0.7, 1.4),
        "test_size": (96, 96),
        "eval_every": 400,
    },
}

# Table 2: steps of the burn-in by the text of --split. The paper has no number for "else".
# fmt: off
BURN_IN: dict[str, dict[str, int]] = {
    "coco":       {"1%": 20_000, "2%": 25_000, "5%": 30_000, "10%": 60_000, "else": 30_000},
    "cityscapes": {"5%": 15_000, "10%": 25_000, "20%": 30_000, "30%": 35_000, "all": 50_000,
                   "else": 25_000},
    "shapes":     {"else": 300},
    "voc":        {"else": 25_000},  # these two are ours, see SEMANTIC
    "folder":     {"else": 25_000},
}
# fmt: on


# What --task semantic takes beside these, or, of data sets without objects, in their place.
# DEPARTS[semantic]
SEMANTIC: dict[str, dict[str, Any]] = {
    "voc": {
        "root": "datasets/voc",
        "split": "183",
        "split_seed": 0,
        "pool": "remaining",
        "steps": 90_000,
        "schedule": "poly",
        "crop_size": (512, 512),
        "scale": (0.5, 2.0),
        "test_size": (512, 2048),
    },
    "cityscapes": {"split": "186", "pool": "remaining"},
    "shapes": {"split": "random:10", "pool": "remaining"},
}
SEMANTIC["folder"] = SEMANTIC["voc"] | {"root": "datasets/folder", "split": "random:1/8"}


def preset(dataset: str = "coco", task: str = "instance", **overrides: Any) -> Args:
    """The paper's numbers for a data set. The length of a run, the burn-in and the number of
    queries also follow from `split`, `stage`, `steps` and `backbone` among the overrides."""
    if task == "semantic":
        usual = PRESETS.get(dataset, {}) | SEMANTIC[dataset]
    else:
        usual = PRESETS[dataset]
    given = {**usual, **overrides}
    args = Args(task=task, dataset=dataset, **given)
    length = usual.get("steps", Args.steps)
    if dataset == "cityscapes" and args.split == "all" and args.stage != "teacher":
        length = 180_000  # Sec. 4.1: "beneficial to double the training length"
    if "steps" not in overrides:
        args.steps = length
    if "burn_in_steps" not in overrides:
        table = BURN_IN[dataset]
        share = table.get(args.split, table["else"]) / length
        args.burn_in_steps = round(share * args.steps)
    if "queries" not in given and args.backbone.startswith("swin_large"):
        args.queries = 200
    return args


# =========================================================================== predictions and losses
class Heads(NamedTuple):
    """What Mask2Former predicts, after 0, 1, ..., 9 decoder layers. The mask logits (Q, h, w) of
    head l and image b are `mask_embed[l, b] @ mask_features[b]`: whoever needs masks makes those
    that are needed, where they are needed.

    Plain mask logits (Q, h, w) of one image and one head go in as `mask_features`, with the
    identity of Q x Q as `mask_embed`."""

    class_logits: Tensor  # (L, B, Q, K + 1) float32, the last class is "no object"
    mask_embed: Tensor  # (L, B, Q, C) float32
    mask_features: Tensor  # (B, C, h, w) float32


class LossWeights(NamedTuple):
    """The scaling parameters of Eq. 1. DEPARTS[loss-weights]"""

    lambda_c: float = 2.0  # of l_C, the cross-entropy of classes
    lambda_ce: float = 5.0  # of l_CE, the binary cross-entropy of masks
    lambda_d: float = 5.0  # of l_D, the Dice loss of masks


MASK2FORMER_WEIGHTS = LossWeights()


class Norms(NamedTuple):
    """What the losses of a batch are divided by: the same for all its heads, parts and
    processes."""

    classes: Tensor  # sum over all queries of 1 for a matched one, NO_OBJECT for another
    masks: Tensor  # number of targets (their mean over the processes), 1 at least


def weighted_loss(
    l_c: Tensor, l_ce: Tensor, l_d: Tensor, weights: LossWeights = MASK2FORMER_WEIGHTS
) -> Tensor:
    """Eq. 1: the weighted sum of the three losses, be they of one pair of target and query, or
    averages over a batch."""
    return weights.lambda_c * l_c + weights.lambda_ce * l_ce + weights.lambda_d * l_d


def batch_average(losses: Tensor, weights: Tensor, norm: Tensor) -> Tensor:
    """Eq. 2: the losses of all targets (or of all queries) of a batch, each times a weight of its
    own, summed and divided by `norm`. The paper divides by the number of an image's objects and
    then by the number of images; here one division does for the batch. DEPARTS[normaliser]"""
    return (losses * weights).sum() / norm


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """maps (n, c, h, w) at points (n, P, 2), x and y in 0..1 -> (n, c, P); bilinear, zero
    outside."""
    grid = (2 * points).sub_(1)[:, :, None]
    return F.grid_sample(maps, grid, align_corners=False).squeeze(3)


def random_points(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    valid: Tensor | None = None,
) -> Tensor:
    """Random points (*shape, 2), x and y in 0..1. They are uniform; or, with `valid` (H, W) bool,
    they are the centres of pixels that are drawn from the valid ones. DEPARTS[valid-points]"""
    if valid is None:
        return torch.rand(*shape, 2, generator=generator, device=device)
    number_up_to = valid.flatten().cumsum(0)  # of valid pixels, up to each pixel
    before = torch.rand(*shape, generator=generator, device=device) * number_up_to[-1]
    # The pixel which has so many valid ones before it. Where none is valid, no mask is compared.
    pixel = torch.searchsorted(number_up_to, before.long(), right=True).clamp(max=valid.numel() - 1)
    height, width = valid.shape
    row, column = pixel // width, pixel % width
    return torch.stack([(column + 0.5) / width, (row + 0.5) / height], dim=-1)


def match_costs(
    class_logits: Tensor,
    mask_embed: Tensor,
    mask_features: Tensor,
    target: Target,
    points: Tensor,
    weights: LossWeights = MASK2FORMER_WEIGHTS,
) -> Tensor:
    """Costs (L, Q, N) of giving each target of one image to each query; masks are compared at
    points (P, 2).

    class_logits (L, Q, K + 1), mask_embed (L, Q, C), mask_features (C, h, w). All heads share the
    points, so features and targets are sampled once; sampling commutes with the product over
    channels. DEPARTS[points]"""
    features = sample_points(mask_features[None], points[None])[0]  # (C, P)
    masks = (target.masks != 0).to(features.dtype)
    truth = sample_points(masks[None], points[None])[0].T  # (P, N)
    x = mask_embed @ features  # (L, Q, P) mask logits
    # Of every query with every target, (L, Q, N). Cross-entropy with the truth t at a point is
    # -t log sigmoid(x) - (1 - t) log sigmoid(-x), which equals softplus(x) - t x.
    x_of_target = mask_embed @ (features @ truth)
    l_ce = (F.softplus(x).sum(2, keepdim=True) - x_of_target) / len(points)
    p = x.sigmoid_()
    l_d = 1 - (2 * (p @ truth) + 1) / (p.sum(2, keepdim=True) + truth.sum(0) + 1)
    # As in DETR, the class costs minus its probability, without the logarithm of the loss.
    l_c = -class_logits.softmax(2)[..., target.labels]
    return weighted_loss(l_c, l_ce, l_d, weights)


def assign(costs: list[Tensor]) -> tuple[list[Tensor], int]:
    """Hungarian matching. `costs` (L, Q, N) are those of each image. Returned are, for each image,
    the query (L, N) that each head gives to each target, or -1 where there are more targets than
    queries; and how many costs were not finite (these count as very large). The costs of all images
    and heads go to the CPU in one transfer."""
    from scipy.optimize import linear_sum_assignment

    flat = torch.cat([cost.flatten() for cost in costs]).cpu().double().numpy()
    not_finite = int(np.count_nonzero(~np.isfinite(flat)))
    flat = np.nan_to_num(flat, nan=1e9, posinf=1e9, neginf=1e9)
    matches, start = [], 0
    for heads, num_queries, n in [cost.shape for cost in costs]:
        end = start + heads * num_queries * n
        query = np.full((heads, n), -1)
        for head, cost in enumerate(flat[start:end].reshape(heads, num_queries, n)):
            rows, columns = linear_sum_assignment(cost)
            query[head, columns] = rows
        matches.append(torch.from_numpy(query))
        start = end
    return matches, not_finite


@torch.no_grad()
def match(
    heads: Heads,
    targets: list[Target],
    generators: list[torch.Generator],
    weights: LossWeights = MASK2FORMER_WEIGHTS,
    num_points: int = 12544,
) -> tuple[list[Tensor], int]:
    """Sec. 3.2: match the targets of each image of a batch with queries. Masks are compared at
    random points, new ones for each image. Returns what `assign` returns."""
    costs = []
    for i, (target, generator) in enumerate(zip(targets, generators, strict=True)):
        device = heads.mask_features.device
        points = random_points((num_points,), generator, device, target.valid)
        of_image = heads.class_logits[:, i], heads.mask_embed[:, i], heads.mask_features[i]
        costs.append(match_costs(*of_image, target, points, weights))
    return assign(costs)


def mask_losses(
    mask_logits: Tensor, masks: Tensor, points: Tensor, more: Tensor
) -> tuple[Tensor, Tensor]:
    """l_CE and l_D (N, L) of matched masks, mostly at points where the network is unsure
    (PointRend).

    mask_logits (N, L, h, w) are compared with masks (N, H', W') at P points each. `points`
    (N, L, 3 P, 2) are candidates, of which the 0.75 P whose logits are nearest 0 are kept; all of
    `more` (N, L, 0.25 P, 2) are added to them."""
    n, heads = mask_logits.shape[:2]
    logits = mask_logits.flatten(0, 1)[:, None]
    num_points = points.shape[2] // 3  # P
    keep = num_points - more.shape[2]  # 0.75 P
    with torch.no_grad():
        distance_from_0 = sample_points(logits, points.flatten(0, 1))[:, 0].abs()  # (N L, 3 P)
        nearest = distance_from_0.topk(keep, dim=1, largest=False, sorted=False).indices
        chosen = points.flatten(0, 1).gather(1, nearest[..., None].expand(-1, -1, 2))
        chosen = torch.cat([chosen, more.flatten(0, 1)], dim=1)  # (N L, P, 2)
        points_of_target = chosen.unflatten(0, (n, heads)).flatten(1, 2)  # (N, L P, 2)
        binary = (masks != 0)[:, None].to(logits.dtype)
        truth = sample_points(binary, points_of_target)[:, 0].unflatten(1, (heads, -1))  # (N, L, P)
    x = sample_points(logits, chosen).squeeze(1).unflatten(0, (n, heads))
    l_ce = F.binary_cross_entropy_with_logits(x, truth, reduction="none").mean(-1)
    p = x.sigmoid()
    l_d = 1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + truth.sum(-1) + 1)
    return l_ce, l_d


def normalisers(
    targets: list[Target], queries: int, mean: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Norms:
    """What the losses of this process's whole batch are divided by. On several processes `mean`
    averages it over them, because DDP averages their gradients. DEPARTS[normaliser]"""
    counts = [len(target.labels) for target in targets]
    matched = sum(min(count, queries) for count in counts)
    unmatched = len(counts) * queries - matched
    sums = torch.tensor([matched + NO_OBJECT * unmatched, sum(counts)], dtype=torch.float64)
    sums = sums.to(targets[0].labels.device, non_blocking=True)
    classes, masks = mean(sums).float()
    return Norms(classes, masks.clamp(min=1))


def wanted_classes(query: Tensor, labels: Tensor, num_queries: int, none: int) -> Tensor:
    """The class (L, Q) that each query of an image shall predict: that of its target, or `none`.
    `query` (L, N) is the query of each target, `labels` (N,) are the targets' classes."""
    heads = torch.arange(len(query), device=query.device)[:, None]
    # The query of targets without one is -1: they write into an additional last column, which is
    # cut off.
    wanted = torch.full((len(query), num_queries + 1), none, device=query.device)
    wanted[heads, query] = labels.expand_as(query)
    return wanted[:, :num_queries]


def criterion(
    heads: Heads,
    targets: list[Target],
    norms: Norms,
    generators: list[torch.Generator],
    weights: LossWeights = MASK2FORMER_WEIGHTS,
    num_points: int = 12544,
) -> dict[str, Tensor]:
    """Eqs. 1 and 2 of a batch, or of a part of it, summed over all heads. "loss" is lambda_C l_C +
    lambda_CE l_CE + lambda_D l_D, the others are what it consists of, to be logged. `norms` are
    those of the whole batch.

    Labels are 0..K-1 (K would silently mean "no object"); in masks, 0 is outside and any other
    value inside; they are compared in `valid` pixels alone. `generators` draw each image's points,
    so that they depend neither on the batch nor on the number of processes."""
    number_of_heads, _, num_queries, columns = heads.class_logits.shape
    device, none = heads.class_logits.device, columns - 1
    matches, bad_costs = match(heads, targets, generators, weights, num_points)
    head = torch.arange(number_of_heads, device=device)[:, None]
    wanted, of_masks = [], []
    features = heads.mask_features.unbind(0)
    for i, (query, target) in enumerate(zip(matches, targets, strict=True)):
        query = query.to(device, non_blocking=True)  # (L, N)
        wanted.append(wanted_classes(query, target.labels, num_queries, none))
        for start in range(0, query.shape[1], 32):  # 32 targets at a time, to save memory
            some, masks = query[:, start : start + 32], target.masks[start : start + 32]
            # A target without a query borrows query 0 here; its losses get the weight 0 below.
            embed = heads.mask_embed[head, i, some.clamp(min=0)].transpose(0, 1)  # (n, L, C)
            logits = torch.einsum("nlc,chw->nlhw", embed, features[i])
            shape = (len(masks), number_of_heads)
            number_more = num_points - int(0.75 * num_points)
            draw = partial(random_points, device=device, valid=target.valid)
            points = draw((*shape, 3 * num_points), generators[i])
            more = draw((*shape, number_more), generators[i])
            has_query = (some >= 0).T
            of_masks.append((*mask_losses(logits, masks, points, more), has_query))  # each (n, L)
    if of_masks:
        l_ce, l_d, has_query = (torch.cat(parts) for parts in zip(*of_masks, strict=True))
        l_ce = batch_average(l_ce, has_query, norms.masks)
        l_d = batch_average(l_d, has_query, norms.masks)
    else:
        # Zero, but with a gradient: DDP waits for one of every parameter.
        l_ce = l_d = 0 * (heads.mask_embed.sum() + heads.mask_features.sum())
    wanted = torch.stack(wanted, dim=1).flatten()  # of (L, B, Q)
    l_c = F.cross_entropy(heads.class_logits.flatten(0, 2), wanted, reduction="none")
    l_c = batch_average(l_c, torch.where(wanted == none, NO_OBJECT, 1.0), norms.classes)
    return {
        "loss": weighted_loss(l_c, l_ce, l_d, weights),
        "class": l_c.detach(),
        "mask": l_ce.detach(),
        "dice": l_d.detach(),
        "bad_costs": l_c.new_full((), float(bad_costs)),
    }


# ======================================================================= teacher, student, Eqs. 3-5
@torch.no_grad()
def pseudo_labels(
    heads: Heads, class_threshold: float = 0.7, size_threshold: float = 5.0
) -> tuple[list[Target], list[Tensor]]:
    """Sec. 3.1 and Eq. 3: those predictions of the teacher's final head whose class is sure and
    whose mask is not tiny, as one class and one binary mask each; and their class probabilities
    (N,). The size of a mask is the sum of its probabilities at stride 4. DEPARTS[size] The paper
    compares with >=, the released code and this one with >; only ties differ."""
    probability, label = heads.class_logits[-1].softmax(-1).max(-1)  # (B, Q)
    is_object = label < heads.class_logits.shape[-1] - 1
    sure = is_object & (probability > class_threshold)
    targets, probabilities = [], []
    for b in range(len(label)):
        queries = sure[b].nonzero().flatten()
        embed = heads.mask_embed[-1, b, queries]
        logits = torch.einsum("nc,chw->nhw", embed, heads.mask_features[b])
        large = (logits.sigmoid().sum((1, 2)) > size_threshold).nonzero().flatten()
        masks = logits[large] > 0  # Eq. 3: where the sigmoid is above 0.5
        targets.append(Target(label[b, queries[large]], masks))
        probabilities.append(probability[b, queries[large]])
    return targets, probabilities


def one_mask_per_class(target: Target) -> Target:
    """Masks of the same class become one, their union. DEPARTS[one-mask]"""
    labels = target.labels.unique()
    is_of_class = labels[:, None] == target.labels  # (classes, N)
    counts = torch.einsum("cn,nhw->chw", is_of_class.float(), target.masks.float())
    return target._replace(labels=labels, masks=counts > 0)


def total_loss(loss_s: Tensor, loss_u: Tensor, lambda_u: float = 2.0) -> Tensor:
    """Eq. 4: L_s of the labeled batch, and lambda_u times L_u of the unlabeled one."""
    return loss_s + lambda_u * loss_u


# SAME AS gta_seg.py:ema_update
@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, in place, for every parameter and for
    BatchNorm's running statistics; its integer counters stay. A decay of 0 copies."""
    targets = [*target.parameters(), *target.buffers()]
    sources = [*source.parameters(), *source.buffers()]
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - decay)


START, END_OF_BURN_IN, NEVER = "start", "end of burn-in", "never"


class Teaching(NamedTuple):
    """A column of Table 1. From the copy on, the teacher is averaged by Eq. 5."""

    pretrained: bool  # Init 0: the teacher is trained on the labels first (step 1)
    pseudo_from: str  # when the student, beside D_s, begins to learn from D_u
    copy_at: str  # Init 1: when the teacher becomes a copy of the student, T <- S


# fmt: off
TEACHING = {
    #                     Init 0: T is   the student learns  Init 1: T <- S at,
    #                     pre-trained    from D_u from       EMA after it        Table 1
    "guided":   Teaching(True,           START,              END_OF_BURN_IN),  # Guided Distillation
    "standard": Teaching(False,          END_OF_BURN_IN,     END_OF_BURN_IN),  # Polite Teacher
    "fixed":    Teaching(True,           START,              NEVER),           # Noisy Boundaries
    "none":     Teaching(False,          START,              START),           # Table 4, no burn-in
}  # "none": DEPARTS[fresh-teacher]
# fmt: on


class Plan(NamedTuple):
    """Steps of the student's stage, counted from its beginning."""

    pseudo_from: float  # the first step with pseudo labels
    copy_at: float  # the step before which the teacher becomes a copy of the student


LABELS_ALONE = Plan(math.inf, math.inf)  # Sec. 3.1, step 1


def teaching_plan(burn_in: str, burn_in_steps: int) -> Plan:
    """Table 1 in steps: teaching_plan("guided", 30_000) is (0, 30_000)."""
    step_of = {START: 0, END_OF_BURN_IN: burn_in_steps, NEVER: math.inf}
    teaching = TEACHING[burn_in]
    return Plan(step_of[teaching.pseudo_from], step_of[teaching.copy_at])


@dataclass
class State:
    """A stage of training: its networks and its place in the run. `snapshot` saves what changes."""

    stage: str  # "teacher": the network that learns is the supervised one; or "student"
    student: Mask2Former  # the network that learns
    teacher: Mask2Former | None  # no gradients, eval mode
    optimizer: torch.optim.Optimizer
    forward: Callable[[Tensor], Heads]  # the student, wrapped in DDP on several processes
    plan: Plan
    begun: int  # the step of the run at which this stage began
    step: int  # of the run
    scored: int = 0  # the last step that was scored
    last: dict[str, dict] = field(default_factory=dict)  # network -> its newest score
    best: dict[str, dict] = field(default_factory=dict)  # network -> its best one

    def networks(self) -> dict[str, Mask2Former]:
        """By the names under which they are scored; the network that learns comes first."""
        if self.stage == "teacher":
            return {"supervised": self.student}
        return {"student": self.student, "teacher": self.teacher}


def train_step(
    s: State, labeled: Batch, unlabeled: Batch | None, args: Args, world: World
) -> dict[str, Tensor]:
    """Sec. 3.1: a step of the student, in burn-in (step 2) or distillation (step 3); or one of the
    teacher-to-be (step 1), which learns from labels alone.

    It puts ema_update, teach, learn and update together. The caller advances s.step."""
    t = s.step - s.begun  # steps of this stage so far
    if t == s.plan.copy_at:
        ema_update(s.teacher, s.student, decay=0)  # step 3 begins: T <- S
    elif t > s.plan.copy_at:
        ema_update(s.teacher, s.student, args.ema)  # Eq. 5, before the teacher is asked
    s.optimizer.zero_grad(set_to_none=True)
    with_pseudo_labels = t >= s.plan.pseudo_from
    # Gradients add up, so that Eq. 4 is two backward passes, L_s and lambda_u L_u, in half the
    # memory of one. Processes exchange gradients in the last of them.
    exchange = not with_pseudo_labels
    log = learn(s, labeled.images, labeled.targets, 1.0, "l", args, world, exchange=exchange)
    if with_pseudo_labels:
        targets, counts = teach(s.teacher, unlabeled, args)
        log |= counts
        log |= learn(s, unlabeled.images, targets, args.lambda_u, "u", args, world, exchange=True)
        log["loss"] = total_loss(log["loss_l"], log["loss_u"], args.lambda_u)
    update(s)
    return log


@torch.no_grad()
def teach(
    teacher: Mask2Former, unlabeled: Batch, args: Args
) -> tuple[list[Target], dict[str, Tensor]]:
    """Pseudo labels of the weak views, and what is logged of them."""
    weak = unlabeled.weak
    targets, probabilities = [], []
    for part in weak.split(math.ceil(len(weak) / args.accumulate)):
        heads = teacher(transforms.normalize(part), last_only=True)
        found, sure = pseudo_labels(heads, args.class_threshold, args.size_threshold)
        targets += found
        probabilities += sure
    if args.task == "semantic":
        targets = [one_mask_per_class(target) for target in targets]
        places = zip(targets, unlabeled.targets, strict=True)
        targets = [target._replace(valid=place.valid) for target, place in places]
    probabilities = torch.cat(probabilities)
    counts = torch.tensor([float(len(target.labels)) for target in targets])
    counts = counts.to(weak.device, non_blocking=True)
    log = {
        "pseudo_per_image": counts.mean(),
        "pseudo_none": (counts == 0).float().mean(),
        "conf": probabilities.mean() if len(probabilities) else counts.new_zeros(()),
    }
    return targets, log


def learn(
    s: State,
    images: Tensor,
    targets: list[Target],
    factor: float,
    name: str,
    args: Args,
    world: World,
    exchange: bool,
) -> dict[str, Tensor]:
    """Add the gradient of `factor` times Eq. 2 on images (B, 3, H, W) uint8, computed in
    --accumulate parts. `exchange`: the processes average their gradients in the last part. Returns
    what is logged, with `name` at the end of its keys."""
    norms = normalisers(targets, args.queries, world.mean)
    weights = LossWeights(args.lambda_c, args.lambda_ce)  # lambda_D is always the paper's
    size = math.ceil(len(images) / args.accumulate)
    total: dict[str, Tensor] = {}
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        is_last = start + size >= len(images)
        exchange_later = world.size > 1 and not (exchange and is_last)
        generators = []
        for i in range(start, min(start + size, len(images))):
            sample = world.rank * len(images) + i  # its place in the batch of all processes
            generators.append(generator(world.device, args.seed, "points", name, s.step, sample))
        with s.forward.no_sync() if exchange_later else contextlib.nullcontext():
            heads = s.forward(transforms.normalize(images[part]))
            losses = criterion(heads, targets[part], norms, generators, weights, args.points)
            (factor * losses.pop("loss")).backward()
        for key, value in losses.items():
            total[key] = total.get(key, 0) + value
    log = {f"{key}_{name}": value for key, value in total.items()}
    log[f"targets_{name}"] = norms.masks
    log[f"loss_{name}"] = weighted_loss(total["class"], total["mask"], total["dice"], weights)
    return log


def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A torch generator that depends on its key alone."""
    return torch.Generator(device).manual_seed(int(rng(*key).integers(2**63)))


def update(s: State) -> None:
    """One step of AdamW. The gradient, whose norm is nearly always larger, is first scaled down to
    the norm 0.01. DEPARTS[clip]"""
    parameters = [p for p in s.student.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(parameters, 0.01, foreach=True)
    s.optimizer.step()


def learning_rate_factor(t: int, steps: int, schedule: str) -> float:
    """The learning rate at step t of a stage of so many steps, as a share of the highest one. COCO
    ("step"): a tenth from 8/9 of the stage on, a hundredth from 26/27 on. Cityscapes ("poly"): the
    share of the stage that is left, to the power 0.9. DEPARTS[schedule]"""
    if schedule == "poly":
        return max(0.0, 1 - t / steps) ** 0.9
    first_drop = round(steps * 327_778 / 368_750)
    second_drop = round(steps * 355_092 / 368_750)
    if t >= second_drop:
        return 0.1**2
    if t >= first_drop:
        return 0.1
    return 1.0


# SAME AS gta_seg.py:set_learning_rates
def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group of parameters its initial learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


NO_DECAY = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)


def adamw(net: Mask2Former, lr: float, backbone_lr: float, fused: bool) -> torch.optim.AdamW:
    """Sec. 4.1: the backbone learns a tenth as fast, weight decay is 0.05. As in Mask2Former,
    norms, embeddings and tables of relative positions do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}  # (of the backbone, decays) -> ...
    for name, module in net.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decays = not isinstance(module, NO_DECAY) and own != "relative_position_bias_table"
            groups.setdefault((name.startswith("backbone"), decays), []).append(parameter)
    param_groups = []
    for (of_backbone, decays), parameters in groups.items():
        rate = lr * backbone_lr if of_backbone else lr
        decay = 0.05 if decays else 0.0
        param_groups.append(
            {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        )
    return torch.optim.AdamW(param_groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)


# ======================================================================================== backbones
def family(backbone: str) -> Literal["cnn", "swin", "vit"]:
    """What kind of network a timm or torchvision name means."""
    if backbone.startswith("swin_"):
        return "swin"
    if backbone.startswith(("vit_", "deit")):
        return "vit"
    return "cnn"


def timm_transformer(name: str, pretrained: bool, **settings: Any) -> nn.Module:
    """A transformer of timm; UserError when there is none of this name, or its weights cannot be
    had."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)
    except Exception as error:  # noqa: BLE001 (hub, network, unknown name)
        raise UserError(
            f"timm cannot give --backbone {name} ({one_line(error)}); correct the name, or, "
            f"without a network, give --weights FILE or none."
        ) from None


class Swin(nn.Module):
    """Swin Transformer, made of timm's layers but in the published order: pad the map to whole
    windows, roll it, attend, roll it back, cut the padding off. timm rolls before it pads, which
    gives another result wherever a map does not divide into windows. DEPARTS[swin]"""

    def __init__(
        self, name: str, pretrained: bool, checkpointing: bool = False, drop_path: float = 0.3
    ):
        super().__init__()
        body = timm_transformer(
            name,
            pretrained,
            drop_path_rate=drop_path,
            strict_img_size=False,
            always_partition=True,
        )
        self.patch_embed, self.layers = body.patch_embed, body.layers
        self.channels = [stage["num_chs"] for stage in body.feature_info]
        # These norms belong to the detector; files of ImageNet weights have none.
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.checkpointing = checkpointing

    def forward(self, images: Tensor) -> list[Tensor]:
        recompute = self.checkpointing and self.training
        x, maps = self.patch_embed(images), []  # (B, h, w, C)
        for stage, norm in zip(self.layers, self.norms, strict=True):
            x = stage.downsample(x)
            for i, block in enumerate(stage.blocks):
                x = maybe_checkpoint(recompute, self.block, block, x, i % 2 == 1)
            maps.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return maps

    def block(self, block: nn.Module, x: Tensor, shifted: bool) -> Tensor:
        """One block on (B, h, w, C): attention within windows, which every other block shifts by
        half a window, and an MLP; both are residual."""
        height, width = x.shape[1:3]
        window = block.window_size[0]
        shift = window // 2 if shifted else 0
        y = F.pad(block.norm1(x), (0, 0, 0, -width % window, 0, -height % window))
        b, padded, c = len(y), y.shape[1:3], y.shape[3]
        rows, columns = padded[0] // window, padded[1] // window
        mask = None
        if shifted:
            y = y.roll((-shift, -shift), (1, 2))
            mask = shift_mask(padded, window, shift, y.device)
        # Windows join the batch: (b rows columns, window^2, c).
        y = y.view(b, rows, window, columns, window, c).transpose(2, 3)
        y = block.attn(y.reshape(-1, window * window, c), mask=mask)
        y = y.view(b, rows, columns, window, window, c).transpose(2, 3).reshape(b, *padded, c)
        if shifted:
            y = y.roll((shift, shift), (1, 2))
        x = x + block.drop_path1(y[:, :height, :width])
        return x + block.drop_path2(block.mlp(block.norm2(x)))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept may be needed in training later
def shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """What is added to the attention between two places of a window, (windows, window^2, window^2):
    0, or -100 if they became neighbours only because the map was rolled."""
    parts = []
    for n in size:
        place = torch.arange(n, device=device)
        # 0: in front of the last window; 1: its first part; 2: what came from the other side.
        parts.append((place >= n - window).long() + (place >= n - shift))
    region = 3 * parts[0][:, None] + parts[1]
    windows = region.view(size[0] // window, window, size[1] // window, window).transpose(1, 2)
    windows = windows.flatten(2).flatten(0, 1)  # (windows, window^2)
    return torch.where(windows[:, :, None] == windows[:, None], 0.0, -100.0)


class ViT(nn.Module):
    """A plain vision transformer (DINOv2, DeiT) with Sec. 4.3's adaptor: the patch tokens of its
    last layer are resized to four strides, and each size has a 1x1 convolution. Images are enlarged
    to whole patches first (DEPARTS[vit-resize]), and timm resizes the table of positions to them
    (DEPARTS[vit-positions]).

    `freeze` is Table 7's "Fixed": no gradient in the body, which stays in eval mode, while the
    adaptor learns. DEPARTS[freeze]"""

    def __init__(
        self,
        name: str,
        pretrained: bool,
        checkpointing: bool = False,
        freeze: bool = False,
        mode: str = "bilinear",
    ):
        super().__init__()
        self.body = timm_transformer(name, pretrained, dynamic_img_size=True)
        self.body.set_grad_checkpointing(checkpointing)
        self.patch = self.body.patch_embed.patch_size[0]
        self.channels = [128, 256, 512, 1024]
        self.adaptor = nn.ModuleList(nn.Conv2d(self.body.embed_dim, c, 1) for c in self.channels)
        self.mode, self.freeze = mode, freeze
        if freeze:
            self.body.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        grid = (-(-height // self.patch), -(-width // self.patch))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            x = self.resize(images, (grid[0] * self.patch, grid[1] * self.patch))
            x = self.body.forward_features(x)  # (B, class and other tokens + patches, width)
            x = x[:, self.body.num_prefix_tokens :]
        x = x.transpose(1, 2).unflatten(2, grid)
        maps = []
        for conv, stride in zip(self.adaptor, (4, 8, 16, 32), strict=True):
            maps.append(conv(self.resize(x, (height // stride, width // stride))))
        return maps

    def resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.mode == "nearest":
            return F.interpolate(x, size=size, mode="nearest")
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def train(self, mode: bool = True) -> ViT:
        super().train(mode)
        self.body.train(mode and not self.freeze)
        return self


def maybe_checkpoint(on: bool, function: Callable, *inputs):
    """function(*inputs); when `on`, activations are computed again in the backward pass instead of
    being kept."""
    if on:
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# ==================================================================================== pixel decoder
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def sine_positions(size: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """A code (h * w, width) of each cell's place: the first half of the channels stands for its
    row, the second half for its column. Both are counted from 1 and scaled so that the map ends at
    2 pi. Each half holds waves of width / 4 lengths, from 1 to nearly 10,000 times 2 pi: for each
    length a sine, followed by a cosine."""
    half = width // 2
    number_of_wave = torch.div(torch.arange(half, device=device), 2, rounding_mode="floor")
    wave = 10000 ** (2 * number_of_wave / half)
    parts = []
    for n in size:
        share = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angle = share[:, None] / wave  # (n, half)
        parts.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1))
    rows = parts[0][:, None].expand(-1, size[1], -1)
    columns = parts[1][None].expand(size[0], -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def cell_centres(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cell of each token lies, x and y in -1..1, (S, 2), one level after the other; and
    how wide and high a cell of each level is there, (levels, 1, 1, 1, 2)."""
    parts = []
    for h, w in sizes:
        y = (2 * torch.arange(h, device=device) + 1) / h - 1
        x = (2 * torch.arange(w, device=device) + 1) / w - 1
        parts.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=2).flatten(0, 1))
    cells = torch.tensor([(2 / w, 2 / h) for h, w in sizes], device=device)
    return torch.cat(parts), cells[:, None, None, None]


class DeformableAttention(nn.Module):
    """Each token looks at 4 places on each of 3 levels, in each of 8 heads. Plain PyTorch, nothing
    compiled. (Deformable DETR, https://arxiv.org/abs/2010.04159)"""

    def __init__(self, width: int, levels: int = 3, points: int = 4):
        super().__init__()
        self.levels, self.points = levels, points
        self.sampling_offsets = nn.Linear(width, HEADS * levels * points * 2)
        self.attention_weights = nn.Linear(width, HEADS * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # At first, head i looks into direction i of eight, 1, 2, 3 and 4 cells away.
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        ray = torch.stack([angle.cos(), angle.sin()], 1)
        ray = (ray / ray.abs().amax(1, keepdim=True)).view(HEADS, 1, 1, 2)
        distance = torch.arange(1, points + 1).view(1, 1, points, 1)
        with torch.no_grad():
            offsets = (ray * distance).expand(HEADS, levels, points, 2)
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        """query, value (B, S, C), of levels of these sizes -> (B, S, C)."""
        b, s, _ = query.shape
        centres, cells = cell_centres(sizes, query.device)
        # Heads join the batch: n = B heads. Places come last, as grid_sample reads them.
        value = self.value_proj(value).view(b, s, HEADS, -1)
        value = value.permute(0, 2, 3, 1).flatten(0, 1).contiguous()  # (n, C / heads, S)
        offsets = self.sampling_offsets(query).view(b, s, HEADS, self.levels, self.points, 2)
        offsets = offsets.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).contiguous()
        places = torch.addcmul(centres, offsets, cells)  # (levels, n, points, S, 2) in -1..1
        weights = self.attention_weights(query).view(b, s, HEADS, -1)
        weights = weights.permute(0, 2, 3, 1).flatten(0, 1).contiguous().softmax(1)
        weights = weights.unflatten(1, (self.levels, self.points))  # (n, levels, points, S)
        seen = WeightedSamples.apply(value, places, weights, sizes)
        seen = seen.unflatten(0, (b, HEADS)).flatten(1, 2).transpose(1, 2).contiguous()
        return self.output_proj(seen)


class WeightedSamples(torch.autograd.Function):
    """What deformable attention sees: value (n, c, S) of levels of these sizes, places (levels, n,
    points, S, 2) in -1..1, weights (n, levels, points, S) -> (n, c, S), the sum over levels of

        (F.grid_sample(value_of_level, place, align_corners=False) * weight[:, None]).sum(2)

    The samples (n, c, points, S) of a level are the largest tensor of the network, so they are not
    kept: the backward pass makes them anew."""

    @staticmethod
    def forward(
        ctx, value: Tensor, places: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        ctx.save_for_backward(value, places, weights)
        ctx.sizes = sizes
        seen = []
        for of_level, place, weight in WeightedSamples.levels(value, places, weights, sizes):
            samples = F.grid_sample(of_level, place, align_corners=False)  # (n, c, points, S)
            seen.append(samples.mul_(weight[:, None]).sum(2))
        return sum(seen[1:], seen[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        grads = []
        for of_level, place, weight in WeightedSamples.levels(*ctx.saved_tensors, ctx.sizes):
            inputs = of_level.detach().requires_grad_(), place.detach().requires_grad_()
            with torch.enable_grad():
                samples = F.grid_sample(*inputs, align_corners=False)
            # The samples may be written over: grid_sample's backward pass needs its inputs only.
            grad_weight = samples.detach().mul_(grad[:, :, None]).sum(1)
            grad_samples = torch.mul(grad[:, :, None], weight[:, None], out=samples.detach())
            grad_value, grad_place = torch.autograd.grad(samples, inputs, grad_samples)
            grads.append((grad_value.flatten(2), grad_place, grad_weight))
        values, places, weights = zip(*grads, strict=True)
        return torch.cat(values, 2), torch.stack(places), torch.stack(weights, 1), None

    @staticmethod
    def levels(
        value: Tensor, places: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The map (n, c, h, w) of each level, its places and its weights."""
        values = value.split([h * w for h, w in sizes], dim=2)
        for of_level, size, place, weight in zip(
            values, sizes, places, weights.unbind(1), strict=True
        ):
            yield of_level.unflatten(2, size), place, weight


class EncoderLayer(nn.Module):
    """Deformable self-attention and FFN on all tokens; residual, normalised after each."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attn = DeformableAttention(width)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, position: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, x, sizes))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class PixelDecoder(nn.Module):
    """Backbone maps -> token maps of strides 32, 16, 8 and mask features of stride 4, in
    float32."""

    def __init__(
        self, channels: list[int], width: int = 256, num_layers: int = 6, checkpointing=False
    ):
        super().__init__()
        projections = []
        for inputs in channels[:0:-1]:  # of strides 32, 16, 8
            projections.append(nn.Sequential(nn.Conv2d(inputs, width, 1), nn.GroupNorm(32, width)))
        self.input_proj = nn.ModuleList(projections)
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(num_layers))
        self.lateral = nn.Sequential(
            nn.Conv2d(channels[0], width, 1, bias=False), nn.GroupNorm(32, width)
        )
        self.output = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(32, width)
        )
        self.mask_features = nn.Conv2d(width, width, 1)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)
        self.checkpointing = checkpointing

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """maps of strides 4, 8, 16, 32 -> [(B, C, h', w') of strides 32, 16, 8], (B, C, h, w)."""
        recompute = self.checkpointing and self.training
        maps = [m.float() for m in maps]
        levels = [proj(m) for proj, m in zip(self.input_proj, maps[:0:-1], strict=True)]
        sizes = tuple(tuple(level.shape[-2:]) for level in levels)
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, S, C)
        positions = []
        for size, embed in zip(sizes, self.level_embed, strict=True):
            positions.append(sine_positions(size, x.shape[2], x.device) + embed)
        position = torch.cat(positions)
        for layer in self.layers:
            x = maybe_checkpoint(recompute, layer, x, position, sizes)
        parts = x.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
        levels = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        fine = resize_bilinear(levels[-1], maps[0].shape[-2:])
        return levels, self.mask_features(self.output(self.lateral(maps[0]) + fine).relu())


def resize_bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), corners not aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def autocast_type(x: Tensor) -> str:
    return "cuda" if x.is_cuda else "cpu"


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
        width = query.shape[2]
        if key is query:  # one product makes both
            parts, inputs = (2 * width, width), (query, value)
        else:
            parts, inputs = (width, width, width), (query, key, value)
        weights, biases = self.in_proj_weight.split(parts), self.in_proj_bias.split(parts)
        projected = [F.linear(*part) for part in zip(inputs, weights, biases, strict=True)]
        if key is query:
            projected = [*projected[0].chunk(2, dim=2), projected[1]]
        # Each is (B, heads, Q or S, C / heads).
        projected = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in projected]
        mask = None if mask is None else mask[:, None]
        x = F.scaled_dot_product_attention(*projected, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked cross-attention, then self-attention, then FFN; residual, normalised after each."""

    def __init__(self, width: int):
        super().__init__()
        self.cross_attn = Attention(width)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.self_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 8 * width)
        self.linear2 = nn.Linear(8 * width, width)
        self.ffn_norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, place: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """x and its positions `place` (B, Q, C), key and value (B, S, C), mask (B, Q, S)."""
        x = self.cross_norm(x + self.cross_attn(x + place, key, value, mask))
        placed = x + place
        x = self.self_norm(x + self.self_attn(placed, placed, x))
        return self.ffn_norm(x + self.linear2(self.linear1(x).relu()))


def visible(mask_logits: Tensor) -> Tensor:
    """Masked attention: (B, Q, S) logits of the previous head's masks on the cells of a level ->
    True where a query may look: inside its mask, or everywhere if its mask is empty."""
    inside = mask_logits >= 0
    return inside | ~inside.any(dim=-1, keepdim=True)


class Decoder(nn.Module):
    """Nine layers over three levels in turn, and the shared prediction heads before and after
    each."""

    def __init__(self, num_classes: int, width: int = 256, queries: int = 100, num_layers: int = 9):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(num_layers))
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(3, width)
        self.decoder_norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )

    def forward(
        self, levels: list[Tensor], mask_features: Tensor, last_only: bool = False
    ) -> Heads:
        """`last_only`: L = 1, the final head alone."""
        b = len(mask_features)
        values, keys, features_of_level = [], [], []
        for level, embed in zip(levels, self.level_embed.weight, strict=True):
            size = tuple(level.shape[-2:])
            value = level.flatten(2).transpose(1, 2) + embed
            values.append(value)
            keys.append(value + sine_positions(size, value.shape[2], value.device))
            # Resizing commutes with the product over channels: masks for attention are made at
            # the size of their level, which is 30 times cheaper.
            with torch.no_grad():
                features_of_level.append(resize_bilinear(mask_features, size).flatten(2))
        x = self.query_feat.weight.expand(b, -1, -1)
        place = self.query_embed.weight.expand(b, -1, -1)
        queries = [x]  # before the first layer and after each
        for i, layer in enumerate(self.layers):
            level = i % 3
            # No gradient goes through these masks. The heads that learn follow for all layers at
            # once, which is cheaper than to keep each of them here.
            with torch.no_grad(), torch.autocast(autocast_type(x), enabled=False):
                embed = self.mask_embed(self.decoder_norm(x.float()))  # (B, Q, C)
                may_look = visible(embed @ features_of_level[level])
            x = layer(x, place, keys[level], values[level], may_look)
            queries.append(x)
        y = self.decoder_norm(torch.stack(queries[-1:] if last_only else queries))  # (L, B, Q, C)
        return Heads(self.class_embed(y).float(), self.mask_embed(y).float(), mask_features)


class Mask2Former(nn.Module):
    """Normalised images (B, 3, H, W), sides multiples of 32 -> Heads. `bf16` is for training
    alone; `pretrained` fetches the backbone's weights."""

    def __init__(self, args: Args, num_classes: int, bf16: bool = False, pretrained: bool = False):
        super().__init__()
        kind = family(args.backbone)
        if kind == "swin":
            self.backbone = Swin(args.backbone, pretrained, args.checkpointing)
        elif kind == "vit":
            self.backbone = ViT(
                args.backbone,
                pretrained,
                args.checkpointing,
                args.freeze_backbone,
                args.vit_resize,
            )
        else:
            self.backbone = backbones.FourMaps(args.backbone, args.norm == "frozen", pretrained)
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, args.width, args.encoder_layers, args.checkpointing
        )
        self.decoder = Decoder(num_classes, args.width, args.queries, args.decoder_layers)
        self.bf16 = bf16

    def forward(self, images: Tensor, last_only: bool = False) -> Heads:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"images of {height} x {width}: pad the sides to multiples of 32")
        device = autocast_type(images)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16 and self.training):
            maps = self.backbone(images)
            with torch.autocast(device, enabled=False):
                levels, mask_features = self.pixel_decoder(maps)
            return self.decoder(levels, mask_features, last_only)


# ============================================================================================ views
def jitter_crop(
    size: tuple[int, int],
    crop_size: tuple[int, int],
    scale: tuple[float, float],
    g: np.random.Generator,
) -> Window:
    """COCO's crop (large-scale jitter). The image is flipped half of the time and resized so that
    it just fits into a box of `crop_size` times a random factor from `scale`; a window of
    `crop_size` is cut from it, padded at the right and the bottom where the image is smaller. As in
    Detectron2, one random number, rounded to whole pixels, places the window on both axes.
    DEPARTS[diagonal]"""
    flip = bool(g.random() < 0.5)
    factor = g.uniform(*scale)
    share = g.random()
    ratio = min(factor * crop_size[0] / size[0], factor * crop_size[1] / size[1])
    new = scaled(size, ratio)
    top = round(max(new[0] - crop_size[0], 0) * share)
    left = round(max(new[1] - crop_size[1], 0) * share)
    return Window(flip, new, top, left, crop_size)


def street_crop(
    size: tuple[int, int],
    crop_size: tuple[int, int],
    test_size: tuple[int, int],
    g: np.random.Generator,
) -> Window:
    """Cityscapes' crop. The shorter side becomes 0.5, 0.6, ... or 2.0 times test_size[0], unless
    the longer one would then exceed 4 times test_size[0]; a window is cut at random and flipped
    half of the time."""
    short = int(test_size[0] * g.integers(5, 21) / 10)
    new = scaled(size, min(short / min(size), 4 * test_size[0] / max(size)))
    top = int(g.integers(0, max(new[0] - crop_size[0], 0) + 1))
    left = int(g.integers(0, max(new[1] - crop_size[1], 0) + 1))
    return Window(bool(g.random() < 0.5), new, top, left, crop_size)


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width times a factor, rounded, and one pixel at least."""
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def weak_view(args: Args, image: Tensor, g: np.random.Generator) -> tuple[Tensor, Window]:
    """The view (3, h, w) uint8 of an image (3, H, W) uint8 that labeled images are trained on and
    the teacher labels, and its window: jitter_crop, or on Cityscapes street_crop and SSD's
    colours."""
    size = tuple(image.shape[-2:])
    if args.dataset != "cityscapes":
        window = jitter_crop(size, args.crop_size, args.scale, g)
        return cut_out(image, window, fill=128), window  # DEPARTS[fill]
    window = street_crop(size, args.crop_size, args.test_size, g)
    # Sec. 4.3 has crops and flips only, for the teacher. DEPARTS[ssd-colours]
    return photometric_distortion(cut_out(image, window, fill=128), g), window


def photometric_distortion(image: Tensor, g: np.random.Generator) -> Tensor:
    """SSD's colour distortion of (3, H, W) uint8: brightness, contrast, saturation and hue, each
    half of the time; contrast comes before the others or after them."""

    def contrast(x: np.ndarray) -> np.ndarray:
        if g.random() < 0.5:
            return np.clip(x.astype(np.float32) * g.uniform(0.5, 1.5), 0, 255).astype(np.uint8)
        return x

    x = image.permute(1, 2, 0).numpy()
    if g.random() < 0.5:
        x = np.clip(x.astype(np.float32) + g.uniform(-32, 32), 0, 255).astype(np.uint8)
    contrast_first = g.random() < 0.5
    if contrast_first:
        x = contrast(x)
    hsv = np.array(Image.fromarray(x).convert("HSV")).astype(np.float32)
    saturation = g.uniform(0.5, 1.5) if g.random() < 0.5 else 1
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
    turn = g.integers(-18, 19) * 256 / 180 if g.random() < 0.5 else 0
    hsv[..., 0] = (hsv[..., 0] + turn) % 256
    pixels = hsv.astype(np.uint8).tobytes()
    x = np.array(Image.frombytes("HSV", (x.shape[1], x.shape[0]), pixels).convert("RGB"))
    if not contrast_first:
        x = contrast(x)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


def strong_view(image: Tensor, g: np.random.Generator, cutout: bool = False) -> Tensor:
    """Sec. 4.3, "data augmentations": the student's view, made from a weak view (3, H, W) uint8 by
    colour jitter, grey and blur, and for Fig. 6 cut-out. No pixel moves, so that the teacher's
    masks fit. The paper gives no numbers; these are the released code's. DEPARTS[strong-view]"""
    if g.random() < 0.8:
        jitters = [
            (colour.brightness, g.uniform(0.6, 1.4)),
            (colour.contrast, g.uniform(0.6, 1.4)),
            (colour.saturation, g.uniform(0.6, 1.4)),
            (colour.hue, g.uniform(-0.1, 0.1)),
        ]
        for i in g.permutation(4):
            adjust, strength = jitters[i]
            image = adjust(image, strength)
    if g.random() < 0.2:
        image = colour.grey(image)
    if g.random() < 0.5:
        image = colour.blur(image, g.uniform(0.1, 2.0))
    return erase_boxes(image, g) if cutout else image


# (chance, range of the area as a share of the image, range of height over width)
ERASED = (
    (0.7, (0.05, 0.2), (0.3, 3.3)),
    (0.5, (0.02, 0.2), (0.1, 6)),
    (0.3, (0.02, 0.2), (0.05, 8)),
)


def erase_boxes(image: Tensor, g: np.random.Generator) -> Tensor:
    """Fig. 6, "PT": cut-out as Unbiased Teacher has it, up to three boxes of noise in (3, H, W)
    uint8. The released code has it commented out, so that it is a guess. DEPARTS[strong-view]"""
    height, width = image.shape[1:]
    for chance, area, aspect in ERASED:
        if g.random() >= chance:
            continue
        ratio = math.exp(g.uniform(math.log(aspect[0]), math.log(aspect[1])))
        pixels = g.uniform(*area) * height * width
        rows = min(round(math.sqrt(pixels * ratio)), height)
        columns = min(round(math.sqrt(pixels / ratio)), width)
        top = int(g.integers(0, height - rows + 1))
        left = int(g.integers(0, width - columns + 1))
        noise = g.integers(0, 256, (3, rows, columns), dtype=np.uint8)
        image = image.clone()
        image[:, top : top + rows, left : left + columns] = torch.from_numpy(noise)
    return image


def labeled_view(
    args: Args, data: Instances, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, None, Target]:
    """The weak view of a labeled image and the objects in it, or its classes. Objects that the crop
    cut away are dropped (DEPARTS[empty-targets]); masks are drawn at the crop's size
    (DEPARTS[outlines])."""
    image, window = weak_view(args, image, g)
    if args.task == "semantic":
        label = semantic.read_label(photo.label, data).numpy()
        return image, None, class_masks(nearest_in_window(label, window, outside=IGNORE))
    labels, masks, _ = masks_of(photo, data, window, empty=False)
    return image, None, Target(labels, masks)


def class_masks(label: np.ndarray) -> Target:
    """A map (h, w) of classes, 255 for none -> one mask for each class that occurs. Pixels of no
    class belong to none of them, and are not valid."""
    label = torch.from_numpy(label)
    valid = label != IGNORE
    classes = label[valid].unique()
    return Target(classes.long(), label == classes[:, None, None], valid)


def unlabeled_view(
    args: Args, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, Tensor, Target | None]:
    """The student's view, a strong one unless --strong-aug is "same", and the teacher's, a weak
    one, of the same crop; and, for classes of pixels, where they show the image and no padding."""
    weak, window = weak_view(args, image, g)
    target = None
    if args.task == "semantic":
        valid = torch.from_numpy(nearest_in_window(np.ones(image.shape[-2:], bool), window))
        no_labels, no_masks = torch.zeros(0, dtype=torch.int64), valid.new_zeros(0, *valid.shape)
        target = Target(no_labels, no_masks, valid)
    if args.strong_aug == "same":
        return weak, weak, target
    return strong_view(weak, g, cutout=args.strong_aug == "cutout"), weak, target


def repeat_factors(photos: list[Photo], num_classes: int, threshold: float) -> np.ndarray:
    """How often each picture comes in a pass, (len(photos),) float64, 1 or more: of its classes the
    largest r(c) = max(1, sqrt(threshold / f_c)), f_c the share of `photos` that hold class c (LVIS,
    arXiv 1908.03195)."""
    classes_of = [sorted(singles(photo)) for photo in photos]
    every = np.array([c for classes in classes_of for c in classes], np.int64)
    counts = np.bincount(every, minlength=num_classes)
    factors = np.maximum(1, np.sqrt(threshold * len(photos) / np.maximum(counts, 1)))
    return np.array([factors[classes].max(initial=1) for classes in classes_of])


# ======================================================================================= evaluation
class Seen(NamedTuple):
    """What the network predicts of one picture, and at which sizes (height, width)."""

    heads: Heads  # the last one alone, of this picture alone
    padded: tuple[int, int]  # of what the network sees
    resized: tuple[int, int]  # of the picture in it, which is padded at the right and the bottom
    size: tuple[int, int]  # of the picture itself


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # sizes differ: no search for each
def see(net: Mask2Former, images: Tensor, test_size: tuple[int, int]) -> list[Seen]:
    """The predictions for images (B, 3, H, W) uint8, which the network sees with their shorter side
    at test_size[0], unless the longer one would then exceed test_size[1]."""
    size = tuple(images.shape[-2:])
    new = scaled(size, min(test_size[0] / min(size), test_size[1] / max(size)))
    x = images.float()
    if new != size:
        x = F.interpolate(x, size=new, mode="bilinear", antialias=True)
    # Padding after normalising pads with the mean colour.
    x = F.pad(transforms.normalize(x), (0, -new[1] % 32, 0, -new[0] % 32))
    heads = net.forward(x, last_only=True)
    seen = []
    for b in range(len(images)):
        alone = slice(b, b + 1)
        logits, embed = heads.class_logits[:, alone], heads.mask_embed[:, alone]
        of_image = Heads(logits, embed, heads.mask_features[alone])
        seen.append(Seen(of_image, tuple(x.shape[-2:]), new, size))
    return seen


TOGETHER = 20  # of so many queries masks are made at a time, to save memory


def masks_of_queries(seen: Seen, queries: Tensor) -> Iterator[Tensor]:
    """The mask logits (n, H, W) of these queries on the pixels of the picture, of TOGETHER queries
    at a time: brought to the size that the network saw, cut from the padding, and resized."""
    for some in queries.split(TOGETHER):
        embed = seen.heads.mask_embed[-1, 0, some]
        logits = torch.einsum("qc,chw->qhw", embed, seen.heads.mask_features[0])[None]
        logits = resize_bilinear(logits, seen.padded)[..., : seen.resized[0], : seen.resized[1]]
        if seen.resized != seen.size:
            logits = resize_bilinear(logits, seen.size)
        yield logits[0]


class Detections(NamedTuple):
    """Objects found in an image, those with the highest class probability first (which are not
    always those with the highest score). Masks may overlap."""

    labels: Tensor  # (n,) int64
    scores: Tensor  # (n,)
    masks: Tensor  # (n, H, W) bool


def detect(
    net: Mask2Former, image: Tensor, test_size: tuple[int, int], top: int = 100
) -> Detections:
    """The objects of an image (3, H, W) uint8, see `objects_of`."""
    [seen] = see(net, image[None], test_size)
    return objects_of(seen, top)


def objects_of(seen: Seen, top: int = 100) -> Detections:
    """The objects of an image: its `top` pairs of query and class with the highest class
    probability, of which one query may give several.

    An object's score is its class probability times the mean probability of its mask's own pixels.
    Nothing is thresholded, and no duplicates are suppressed."""
    probabilities = seen.heads.class_logits[-1, 0].softmax(-1)[:, :-1]  # (Q, K)
    scores, place = probabilities.flatten().topk(min(top, probabilities.numel()))
    # Each query's mask is made once, however many of the pairs have it.
    queries, query_of_pair = (place // probabilities.shape[1]).unique(return_inverse=True)
    masks, inside = [], []
    for logits in masks_of_queries(seen, queries):
        mask = logits > 0
        masks.append(mask)
        inside.append((logits.sigmoid() * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6))
    labels = place % probabilities.shape[1]
    scores = scores * torch.cat(inside)[query_of_pair]
    return Detections(labels, scores, torch.cat(masks)[query_of_pair])


def segment(net: Mask2Former, image: Tensor, test_size: tuple[int, int]) -> Tensor:
    """The scores (K, H, W) of all classes in the pixels of an image (3, H, W) uint8, see
    `scores_of`."""
    [seen] = see(net, image[None], test_size)
    return scores_of(seen)


def scores_of(seen: Seen) -> Tensor:
    """The scores (K, H, W) of all classes in the pixels of an image, as in Mask2Former: the sum
    over queries of class probability, which is not renormalised without "no object", times mask
    probability. Queries of one class add up, so that scores may exceed 1."""
    classes = seen.heads.class_logits[-1, 0].softmax(-1)[:, :-1]  # (Q, K)
    queries = torch.arange(len(classes), device=classes.device)
    scores = torch.zeros(classes.shape[1], *seen.size, device=classes.device)
    parts = zip(classes.split(TOGETHER), masks_of_queries(seen, queries), strict=True)
    for classes_of_some, logits in parts:
        scores += torch.einsum("qk,qhw->khw", classes_of_some, logits.sigmoid())
    return scores


def evaluate_pixels(
    networks: dict[str, Mask2Former], data: Segmentation, args: Args, world: World
) -> dict[str, dict]:
    """Mean IoU of each network, and the IoU of each class, in percent, from the counts of all
    pixels that are labeled. Every image counts once on any number of processes."""
    number = len(data.classes)
    counts = {name: torch.zeros(number, number, dtype=torch.int64) for name in networks}
    for _, image, label in semantic.score_loader(data.val, data, world, args.workers):
        for name, net in networks.items():
            found = segment(net.eval(), image.to(world.device), args.test_size).argmax(0)
            counts[name] += metrics.confusion(found, label.to(found.device), number)
    return {name: metrics.iou_scores(world.sum(c), data.classes) for name, c in counts.items()}


def evaluate(
    networks: dict[str, Mask2Former], data: Instances | Segmentation, args: Args, world: World
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Mask AP of each network in percent, and its detections in COCO's result format; of classes of
    pixels mean IoU, and no detections.

    COCO's AP, and as `box_ap` that of the boxes around the masks; on Cityscapes the AP of its
    benchmark, with COCO's as `coco_ap`.
    DEPARTS[metric] Every image counts once on any number of processes."""
    if args.task == "semantic":
        return evaluate_pixels(networks, data, args, world), {}
    found = {name: [] for name in networks}
    street = {}
    if args.dataset == "cityscapes":
        street = {name: mask_ap.CityscapesAP() for name in networks}
    for index, image in instances.score_loader(data.val, world, args.workers):
        photo = data.val[index]
        for name, net in networks.items():
            objects = detect(net.eval(), image.to(world.device), args.test_size)
            found[name].append((index, mask_ap.results_of(photo.id, data.ids, *objects)))
            if street:
                labels, scores, masks = (x.cpu() for x in objects)
                triples = zip(labels.tolist(), scores.tolist(), masks.numpy(), strict=True)
                street[name].add(read_ids(photo.label), list(triples))
    results = {}
    for name, parts in found.items():
        ordered = mask_ap.gather(world, parts)  # of all processes
        results[name] = [entry for _, entries in ordered for entry in entries]
    scores = {name: {} for name in networks}
    if world.main:
        truth = mask_ap.truth_of(data)
        for name, entries in results.items():
            scores[name] = judge.coco_ap(truth, entries)
            scores[name]["box_ap"] = judge.coco_ap(truth, entries, "bbox")["ap"]
    for name, evaluator in street.items():
        of_coco = {"coco_ap": scores[name].get("ap"), "box_ap": scores[name].get("box_ap")}
        scores[name] = {**of_coco, **evaluator.result(world)}
    scores = mask_ap.from_main(world, scores)
    for score in scores.values():
        score.pop("stats", None)
        if score["ap"] is None:
            raise UserError(
                f"--val {args.val} of {data.root} has no object to score on; name another --val."
            )
    return scores, results


def draw_previews(
    networks: dict[str, Mask2Former],
    data: Instances | Segmentation,
    args: Args,
    world: World,
    path: Path,
) -> None:
    """Figs. 2 and 5: six scored images, their labels, and what each network finds: objects with a
    score of 0.5 and more, or the classes of all pixels."""
    if not world.main:
        return
    rows = []
    for photo in data.val[:6]:
        if args.task == "semantic":
            rows.append(row_of_pixels(networks, photo, data, args, world))
            continue
        image = instances.load(photo)
        labels, masks, _ = masks_of(photo, data)
        truth = plots.draw_objects(image, labels, torch.ones(len(labels)), masks.bool())
        row = [image.permute(1, 2, 0).numpy(), truth]
        for net in networks.values():
            objects = detect(net.eval(), image.to(world.device), args.test_size)
            row.append(plots.draw_objects(image, *(x.cpu() for x in objects)))
        rows.append(row)
    plots.strip(rows, ["image", "label", *networks], path, height=192)


def row_of_pixels(
    networks: dict[str, Mask2Former],
    picture: semantic.Picture,
    data: Segmentation,
    args: Args,
    world: World,
) -> list[np.ndarray]:
    """A scored image, its label map, and the map of each network, in colours."""
    image, label = semantic.load_picture(picture, data)
    row = [image.permute(1, 2, 0).numpy(), plots.colour(label)]
    for net in networks.values():
        scores = segment(net.eval(), image.to(world.device), args.test_size)
        row.append(plots.colour(scores.argmax(0)))
    return row


# ========================================================================================= training
def train(args: Args) -> dict:
    """One run, from the start or from its checkpoint to results.json, whose contents it returns.
    It takes Sec. 3.1's step 1, unless a trained teacher is named or none is needed, and then
    steps 2 and 3."""
    check(args, distributed.launched())
    folder = SCRIPT if args.task == "instance" else f"{Path(SCRIPT).stem}-semantic"
    args = replace(args, out=str(runs.default_out(folder, args)))
    out = Path(args.out)
    checkpoints.need_weights(args.weights)
    data = find_data(args)
    with_student = args.stage != "teacher"
    chosen = choose_images(args, data, needed=with_student)
    if args.check:
        return look_at_all(data, chosen.labeled, chosen.unlabeled, data.val)
    looked = first_look(data, chosen.labeled, data.val)
    if args.task == "semantic":
        chosen = instances.of_regions(chosen, data)
    resuming = runs.open_run(out, SCRIPT, args, args.resume, distributed.launched().main)
    world = distributed.start(args.device)
    distributed.warn_of_slow_bf16(args.precision, world)
    state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT, Saved) if resuming else None

    border = args.steps if trains_teacher(args) else 0  # the teacher's stage ends here
    total = border + (args.steps if with_student else 0)
    if state is not None:  # the checkpoint holds the teacher, too: none is read from a file
        s, notes = begin(state["stage"], args, data, world, border)
        with checkpoints.fitting(state["path"]):
            restore(s, state)
    elif border:
        s, notes = begin("teacher", args, data, world, border)
    else:
        s, notes = begin("student", args, data, world, border, trained_teacher(args))
    facts = {
        "classes": data.classes,
        "images": chosen.text,
        "fingerprint": chosen.fingerprint,
        "weights_notes": notes,
    }
    run = runs.Run(out, SCRIPT, args, world, s.step, state, facts, ends=(border, total))
    run.say(
        f"{chosen.text}; scored on {len(data.val)}",
        *looked,
        *(f"weights {note}" for note in notes),
        f"teacher: steps 0 to {border}; student, burn-in {args.burn_in}: steps {border} to {total}"
        f"; in {out}",
    )

    if s.stage == "teacher":
        train_stage(s, border, chosen, data, args, world, run)  # step 1
        if with_student:
            world.barrier()  # teacher.pt is written
            carried_over = {"last": s.last, "best": s.best, "scored": s.scored}
            s, _ = begin("student", args, data, world, border, trained_teacher(args))
            s = replace(s, **carried_over)
    if s.stage == "student":
        train_stage(s, total, chosen, data, args, world, run)  # steps 2 and 3

    scores = {name: {"last": s.last[name], "best": s.best[name]} for name in s.last}
    facts = {
        "stage": args.stage,
        "burn_in": args.burn_in,
        "val": args.val,
        "split_fingerprint": chosen.fingerprint,
    }
    headline = "student" if with_student else "supervised"  # DEPARTS[reported]
    return run.finish(scores, facts, headline, METRIC[args.task])


def train_stage(
    s: State,
    end: int,
    chosen: instances.Chosen,
    data: Instances,
    args: Args,
    world: World,
    run: runs.Run,
) -> None:
    """The steps of a stage, to the step `end` of the run."""
    labeled_batches, unlabeled_batches = streams(s, end, chosen, data, args, world)
    if s.step > s.scored and run.score_is_due(s.step):  # stopped after saving, before scoring
        score_networks(s, data, args, world, run)
    for step in run.steps(s.step, end):
        t = step - s.begun
        factor = learning_rate_factor(t, args.steps, args.schedule)
        set_learning_rates(s.optimizer, factor)
        labeled = instances.to_device(next(labeled_batches), world.device)
        unlabeled = None
        if t >= s.plan.pseudo_from:
            unlabeled = instances.to_device(next(unlabeled_batches), world.device)
        distributed.seed_torch(args.seed, "step", step, world.rank)  # what drop path draws from
        values = train_step(s, labeled, unlabeled, args, world)
        s.step = step + 1
        run.tally(step, values, labeled, unlabeled)
        if run.log_is_due(s.step):
            run.log(s.step, lr=args.lr * factor)
        if run.save_is_due(s.step):
            run.save("last.pt", snapshot(s, args, data))  # before scoring, which may fail
        run.leave_if_asked(s.step)
        if run.score_is_due(s.step):
            score_networks(s, data, args, world, run)


def streams(
    s: State, end: int, chosen: instances.Chosen, data: Instances, args: Args, world: World
) -> tuple[Iterator[Batch], Iterator[Batch]]:
    """The labeled batches of a stage, from the state's step on; and its unlabeled ones, from the
    step at which the student begins to learn from pseudo labels."""
    factors = None
    if s.stage == "student" and args.labeled_sampling == "repeat":
        # DEPARTS[sampling]
        factors = repeat_factors(chosen.labeled, len(data.classes), threshold=10.0)
    stream = partial(
        loading.stream,
        batch_size=args.batch_size,
        stop=end,
        world=world,
        workers=args.workers,
        collate=instances.collate,
    )
    views = partial(labeled_view, args, data)
    labeled = instances.Views(chosen.labeled, views, args.seed, f"{s.stage} labeled")
    labeled_batches = stream(labeled, start=s.step, factors=factors)
    if s.stage == "teacher":
        return labeled_batches, iter(())
    views = partial(unlabeled_view, args)
    unlabeled = instances.Views(chosen.unlabeled, views, args.seed, "unlabeled")
    first = s.begun + s.plan.pseudo_from
    return labeled_batches, stream(unlabeled, start=max(s.step, first))


def trains_teacher(args: Args) -> bool:
    """Whether a run has Sec. 3.1's step 1."""
    if args.stage == "all":
        return TEACHING[args.burn_in].pretrained and not args.teacher
    return args.stage == "teacher"


def trained_teacher(args: Args) -> Path | None:
    """The file of the teacher that step 1 gave, or that is named; None where Table 1 needs none."""
    if not TEACHING[args.burn_in].pretrained:
        return None
    return Path(args.teacher or Path(args.out) / "teacher.pt")


def begin(
    stage: str, args: Args, data: Instances, world: World, border: int, teacher: Path | None = None
) -> tuple[State, list[str]]:
    """A stage at its beginning, and lines on weights that did not load. The student's stage, which
    begins at the step `border` of the run, has a student of which all but the pre-trained backbone
    is fresh (DEPARTS[student-init]), and a teacher, from the file `teacher` if there is one."""
    student, notes = network(args, len(data.classes), world, stage)
    begun, plan = 0, LABELS_ALONE
    teacher_network = None
    if stage == "student":
        begun, plan = border, teaching_plan(args.burn_in, args.burn_in_steps)
        teacher_network, _ = network(args, len(data.classes), world, "teacher", fresh=True)
        if teacher is not None:
            notes = notes + load_teacher(teacher_network, teacher)
        teacher_network.requires_grad_(False).eval()
    if args.compile:
        student.backbone.compile()
        student.pixel_decoder.compile()
    forward = distributed.parallel(student.train(), world)
    optimizer = adamw(student, args.lr, args.backbone_lr, fused=world.device.type == "cuda")
    s = State(stage, student, teacher_network, optimizer, forward, plan, begun, step=begun)
    return s, notes


def score_networks(s: State, data: Instances, args: Args, world: World, run: runs.Run) -> None:
    """Score the networks that have changed and note the best score of each. When the network that
    learns is better than ever, save it: as best.pt, and in the teacher's stage also as teacher.pt,
    which will teach. This is the paper's early stopping. DEPARTS[select]"""
    networks = s.networks()
    headline = next(iter(networks))  # the network that learns
    # Through the burn-in, and always if it is fixed, the teacher is scored only once.
    teacher_is_unchanged = s.step - s.begun <= s.plan.copy_at
    if "teacher" in s.last and teacher_is_unchanged:
        networks.pop("teacher")
    # Pictures come in many sizes, and each would be compiled anew.
    eager = contextlib.nullcontext()
    if args.compile:
        eager = torch.compiler.set_stance("force_eager")
    with eager:
        scores, detections = evaluate(networks, data, args, world)
        draw_previews(networks, data, args, world, run.out / "previews" / f"{s.step:07d}.png")
    s.student.train()
    s.scored = s.step
    metric = METRIC[args.task]
    improved = []
    for name, score in scores.items():
        s.last[name] = {"step": s.step, **score}
        if name not in s.best or score[metric] > s.best[name][metric]:
            s.best[name] = s.last[name]
            improved.append(name)
    run.write(s.step, **{f"{metric}_{name}": score[metric] for name, score in scores.items()})
    if world.main:
        for name, entries in detections.items():
            write_text(run.out / f"{name}.segm.json", json.dumps(entries))
    if headline in improved:
        if s.stage == "teacher":
            run.save("teacher.pt", snapshot(s, args, data, with_optimizer=False))
        run.save("best.pt", snapshot(s, args, data, with_optimizer=False))


# ====================================================================== settings, data, checkpoints
def check(args: Args, world: World) -> None:
    """Refuse, before any work, what cannot run, and mistakes that would spoil a comparison."""
    cli.check_ranges(args)
    check_task(args)
    if args.width % 32 or any(side % 32 for side in args.crop_size):
        raise UserError(
            f"--crop-size {args.crop_size[0]} {args.crop_size[1]}, --width {args.width}: give "
            f"multiples of 32."
        )
    if args.scale[0] > args.scale[1] or args.test_size[0] > args.test_size[1]:
        raise UserError(
            f"--scale {args.scale[0]} {args.scale[1]}, --test-size {args.test_size[0]} "
            f"{args.test_size[1]}: the smaller number comes first."
        )
    live = args.norm == "live" and family(args.backbone) == "cnn"
    # `share` refuses less than two images in each process, which live BatchNorm needs; without it
    # one image in each is enough.
    if live or args.batch_size != world.size:
        world.share(args.batch_size)
    if live and args.accumulate > 1:
        raise UserError(
            "--accumulate would change the batch statistics of --norm live; give --norm frozen."
        )
    if args.freeze_backbone and family(args.backbone) != "vit":
        raise UserError(
            "--freeze-backbone is for ViTs (Table 7); give a --backbone vit_... or deit_..."
        )
    if args.stage == "teacher":
        return
    teaching = TEACHING[args.burn_in]
    if args.stage == "student" and teaching.pretrained and not args.teacher:
        raise UserError(
            "--stage student needs a trained teacher: name one with --teacher, or take --stage all."
        )
    if teaching.copy_at == END_OF_BURN_IN and args.burn_in_steps >= args.steps:
        raise UserError(
            f"--burn-in-steps {args.burn_in_steps} must be less than --steps {args.steps}."
        )


def check_task(args: Args) -> None:
    """Refuse data sets of the other task, and flags that the task would not use."""
    if args.task == "instance":
        if args.dataset in ("voc", "folder"):
            raise UserError(
                f"--dataset {args.dataset} has classes of pixels and no objects; give --task "
                f"semantic, or a COCO file with --dataset coco."
            )
        return
    if args.dataset == "coco":
        raise UserError(
            "--task semantic learns from maps of classes; give --dataset voc, cityscapes, folder "
            "or shapes."
        )
    for flag in ("train_json", "val_json", "images"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag.replace('_', '-')} is for --dataset coco, which --task semantic does not "
                f"read; leave it out."
            )
    if args.pool == "all":
        raise UserError(
            "--pool all is of --task instance; with --task semantic the images without a label in "
            "--split are unlabeled, or those that --unlabeled names: give --pool remaining."
        )


def find_data(args: Args, classes: list[str] | None = None) -> Instances | Segmentation:
    """The data set that --dataset and --root name; the embedded one is drawn on first use."""
    root = Path(args.root)
    if args.dataset == "shapes":
        from data import shapes

        if args.task == "semantic":
            root = shapes.make_voc(root / "voc")
        else:
            root = shapes.make_things(root / "things")
    if args.task == "semantic":
        return semantic.find(args.dataset, root, args.val, classes)
    return instances.find(
        args.dataset, root, args.train_json, args.val_json, args.images, args.val, classes
    )


def choose_images(
    args: Args, data: Instances | Segmentation, needed: bool
) -> instances.Chosen | semantic.Chosen:
    """The labeled images, and the unlabeled ones, which may be `needed`. Published lists of classes
    of pixels are those of GTA-Seg."""
    if args.task == "semantic":
        return semantic.choose(data, args.split, args.split_seed, args.unlabeled, "gta_seg", needed)
    return instances.choose(
        data, args.split, args.split_seed, args.unlabeled, args.pool, needed=needed
    )


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


def network(
    args: Args, num_classes: int, world: World, name: str, fresh: bool = False
) -> tuple[Mask2Former, list[str]]:
    """A Mask2Former on the device, and lines on weights that did not load. It starts with the
    weights that --weights names; `fresh` leaves them out, for networks that are loaded whole
    afterwards. What is random follows from the seed and `name`."""
    distributed.seed_torch(args.seed, name)
    bf16 = world.bf16(args.precision)  # DEPARTS[amp]
    pretrained = args.weights == "imagenet" and not fresh
    net = Mask2Former(args, num_classes, bf16, pretrained)
    notes = []
    weights = None if fresh else backbone_weights(args)
    if weights is not None:
        notes = load_weights(net, weights, args.weights)
    if args.norm == "live":
        net = norms.over_processes(net, world)
    return net.to(world.device), notes


def load_weights(net: Mask2Former, weights: dict[str, Tensor], what: str) -> list[str]:
    """Load weights of a whole model, or of a backbone alone. Returns lines on what did not fit, for
    example the class head of a model with other classes."""
    named = our_names(weights)
    if any(key.startswith(("pixel_decoder.", "decoder.", "backbone.")) for key in named):
        return checkpoints.load_matching(net, named, what)
    body = getattr(net.backbone, "body", net.backbone)  # Swin is its own body
    return checkpoints.load_matching(body, named, what)


def load_teacher(net: Mask2Former, path: Path) -> list[str]:
    """A whole model: the teacher of a checkpoint of this script, or official weights."""
    notes = load_weights(net, checkpoints.read_weights(path, "--teacher"), str(path))
    if any(not note.startswith("in the file") for note in notes):
        raise UserError(
            f"--teacher {path} does not fit this network ({notes[0][:120]}); give the --backbone, "
            f"--width and --queries it was trained with."
        )
    return notes


def snapshot(
    s: State, args: Args, data: Instances | Segmentation, with_optimizer: bool = True
) -> dict:
    """What a checkpoint holds. best.pt and teacher.pt, which are for scoring, predicting and
    teaching, have no optimizer."""
    state = {
        "settings": json.loads(json.dumps(vars(args))),
        "classes": data.classes,
        "ids": data.ids if args.task == "instance" else list(range(len(data.classes))),
        "stage": s.stage,
        "step": s.step,
        "scored": s.scored,
        "last": s.last,
        "best": s.best,
        "networks": {name: net.state_dict() for name, net in s.networks().items()},
    }
    if with_optimizer:
        state["optimizer"] = s.optimizer.state_dict()
    return state


class Saved(checkpoints.Trained, kw_only=True):
    """What `snapshot` gives."""

    ids: list[int | str]
    stage: Literal["teacher", "student"]


def restore(s: State, state: dict) -> None:
    """The reverse of `snapshot`."""
    s.step, s.scored = state["step"], state["scored"]
    s.last, s.best = state["last"], state["best"]
    for name, net in s.networks().items():
        checkpoints.load_exact(net, state["networks"][name], state["path"])
    s.optimizer.load_state_dict(state["optimizer"])


def load_networks(path: str, args: Args) -> tuple[dict[str, Mask2Former], dict, World]:
    """The networks of a checkpoint, built from the settings it holds; and the checkpoint."""
    cli.check_ranges(args)
    check_task(args)
    state = checkpoints.load_checkpoint(Path(path), SCRIPT, Saved)
    world = distributed.start(args.device)
    task = state["settings"].get("task", "instance")
    if args.task != task:
        raise UserError(f"{path} is of --task {task}; leave --task {args.task} out.")
    networks = {}
    for name, weights in state["networks"].items():
        net, _ = network(args, len(state["classes"]), world, name, fresh=True)
        checkpoints.load_exact(net, weights, path)
        networks[name] = net.eval()
    return networks, state, world


def score_checkpoint(args: Args) -> dict:
    """--eval: score a checkpoint's networks, and write <checkpoint>.results.json,
    <checkpoint>.previews.png and, of objects, <checkpoint>.<network>.segm.json."""
    networks, state, world = load_networks(args.eval, args)
    data = find_data(args, state["classes"])
    records, detections = evaluate(networks, data, args, world)
    draw_previews(networks, data, args, world, Path(f"{args.eval}.previews.png"))
    scores = {name: {"last": {"step": state["step"], **record}} for name, record in records.items()}
    facts = {"dataset": args.dataset, "split": args.split, "val": args.val, "seed": args.seed}
    if world.main:
        for name, entries in detections.items():
            write_text(Path(f"{args.eval}.{name}.segm.json"), json.dumps(entries))
        where = f"{len(data.val)} of {data.root}"
        path = Path(f"{args.eval}.results.json")
        runs.write_scores(path, scores, facts, METRIC[args.task], where)
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: find objects in images, or in those of folders, by the student
    where there is one. Into <checkpoint>.predictions/ go overlays, and predictions.json in COCO's
    result format, with paths for `image_id`; or, with --task semantic, overlays, index PNGs and
    confidences."""
    path, *images = args.predict
    networks, state, world = load_networks(path, args)
    net = networks[checkpoints.returned(networks, RETURNED)]
    out = Path(f"{path}.predictions")

    def logits_of(batch: Tensor) -> Tensor:
        """The logarithm of scores, whose softmax is the share of a score in the sum of all."""
        scores = torch.stack([scores_of(seen) for seen in see(net, batch, args.test_size)])
        return scores.clamp(min=1e-30).log()

    def objects_of_batch(batch: list[Tensor]) -> list[Detections]:
        seen_images = see(net, torch.stack(batch).to(world.device), args.test_size)
        return [objects_of(seen) for seen in seen_images]

    how = (world, args.workers, args.predict_tile)
    if args.task == "semantic":
        predictions.predict_labels(images, out, state["classes"], logits_of, *how)
    else:
        classes = (state["ids"], state["classes"])
        predictions.predict_objects(images, out, objects_of_batch, *classes, *how)


def settings(
    dataset: str = "coco",
    task: str = "instance",
    eval: str = "",
    predict: str = "",
    export: str = "",
    steps: str = "",
    **chosen: str,
) -> Args:
    """What the command line starts from: a preset, or the settings inside a checkpoint to score or
    predict with."""
    if eval or predict or export:
        return cli.saved_settings(Args, Path(eval or predict or export), SCRIPT)
    if steps.isdigit():
        return preset(dataset, task, steps=int(steps), **chosen)
    return preset(dataset, task, **chosen)


# Flags that pick the defaults of the others.
CHOOSERS = ("dataset", "task", "split", "stage", "backbone", "steps", "eval", "predict", "export")


# SAME AS gta_seg.py:main
def main(args: Args) -> Any:
    if args.eval:
        return score_checkpoint(args)
    if args.predict:
        return predict(args)
    if args.export:
        return checkpoints.export(Path(args.export), SCRIPT, RETURNED)
    return train(args)


# ================================================================================= official weights
# (pattern, replacement), applied one after the other to each name of a foreign file.
# Mask2Former and Detectron2.
OFFICIAL = [
    (r"^(stem|res\d)\.", r"backbone.\1."),
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"^backbone\.stem\.", "backbone.body."),
    (r"^(backbone\.res\d\.\d+\.)shortcut\.norm\.", r"\1downsample.1."),
    (r"^(backbone\.res\d\.\d+\.)shortcut\.", r"\1downsample.0."),
    (r"^(backbone\.res\d\.\d+\.)conv(\d)\.norm\.", r"\1bn\2."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.body.layer{int(m[1]) - 1}."),
    # Swin: the end of a stage there is the start of the next one here
    (
        r"^((?:backbone\.)?layers\.)(\d)\.downsample\.",
        lambda m: f"{m[1]}{int(m[2]) + 1}.downsample.",
    ),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    # older files leave out `pixel_decoder.`
    (r"^sem_seg_head\.(?!predictor|pixel_decoder)", "sem_seg_head.pixel_decoder."),
    (r"^sem_seg_head\.pixel_decoder\.(transformer\.)?(encoder\.)?", "pixel_decoder."),
    (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral.0."),
    (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.output.1."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output.0."),
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

# transformers' Mask2FormerForUniversalSegmentation, versions 4 and 5.
HUGGING_FACE = [
    (r"^model\.pixel_level_module\.", ""),
    (r"^encoder\.", "backbone."),
    (r"^decoder\.", "pixel_decoder."),
    # ResNet
    (r"^backbone\.embedder\.embedder\.conv\w+\.", "backbone.body.conv1."),
    (r"^backbone\.embedder\.embedder\.n\w+\.", "backbone.body.bn1."),
    (
        r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d+)\.",
        lambda m: f"backbone.body.layer{int(m[1]) + 1}.{m[2]}.",
    ),
    (r"\.layer\.(\d)\.conv\w+\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.n\w+\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    # Swin
    (r"^backbone\.(swin|model)\.", "backbone."),
    (r"^backbone\.encoder\.", "backbone."),
    (r"^backbone\.embeddings\.(patch_embeddings\.)?", "backbone.patch_embed."),
    (r"\.projection\.", ".proj."),
    (
        r"^backbone\.layers\.(\d)\.downsample\.",
        lambda m: f"backbone.layers.{int(m[1]) + 1}.downsample.",
    ),
    (r"^backbone\.hidden_states_norms\.stage(\d)\.", lambda m: f"backbone.norms.{int(m[1]) - 1}."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"(\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.attention\.(self\.)?(relative_position_bias\.)?relative_pos", ".attn.relative_pos"),
    (r"\.attention\.(?:self\.)?(query|key|value|[qkv]_proj)\.", lambda m: f".attn.qkv.{m[1][0]}."),
    # pixel decoder
    (r"^(pixel_decoder\.)encoder\.", r"\1"),
    (r"^(pixel_decoder\.)input_projections\.", r"\1input_proj."),
    (r"^(pixel_decoder\.layers\.\d\.)self_attn_layer_norm\.", r"\1norm1."),
    (r"^(pixel_decoder\.layers\.\d\.)final_layer_norm\.", r"\1norm2."),
    (r"^(pixel_decoder\.)adapter_1\.", r"\1lateral."),
    (r"^(pixel_decoder\.)layer_1\.", r"\1output."),
    (r"^(pixel_decoder\.)mask_projection\.", r"\1mask_features."),
    # decoder
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

OFFICIAL_SIGNS = r"sem_seg_head|(backbone\.)?(stem\.conv1|res2|layers\.0\.downsample)\."
USELESS = (
    r"relative_position_index|attn_mask|empty_weight|num_batches_tracked"
    r"|^backbone\.(\w+\.)?layernorm\."
)


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names of this script. Whole models may be this script's,
    official Mask2Former's (also the released code's, of which `modelStudent.` is preferred to
    `modelTeacher.`) or transformers'. Tensors of a backbone alone keep their names."""
    for prefix in ("modelStudent.", "modelTeacher.", "student.", "supervised."):
        inner = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if inner:
            weights = inner
    table = []
    if any(re.match(OFFICIAL_SIGNS, key) for key in weights):
        table = OFFICIAL
    elif any(key.startswith("model.pixel_level_module.") for key in weights):
        table = HUGGING_FACE
    named = {}
    for key, value in weights.items():
        for pattern, replacement in table:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    for key in list(named):  # query, key and value: three tensors there, one here
        is_query = re.fullmatch(r"(.*)\.(qkv|in_proj)\.q\.(weight|bias)", key)
        if is_query:
            where, kind, what = is_query.groups()
            joined = torch.cat([named.pop(f"{where}.{kind}.{x}.{what}") for x in "qkv"])
            named[f"{where}.qkv.{what}" if kind == "qkv" else f"{where}.in_proj_{what}"] = joined
    return {key: value for key, value in named.items() if not re.search(USELESS, key)}


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=CHOOSERS)
