"""Better (Pseudo-)Labels for Semi-Supervised Instance Segmentation.
Porcher, Couprie, Szafraniec, Verbeek. ICLR 2024 workshop. https://arxiv.org/abs/2403.11675

Instance segmentation with many classes, most of them rare, few labels and many unlabeled pictures.
A teacher learns from labels that are smoothed towards similar and towards rare classes. On labels
that it has not seen, we measure for each class how far its confidence is off. A student then learns
from the labels and from the teacher's soft pseudo labels, from which that error is taken out, and
the teacher follows the student by an exponential moving average (EMA). The unlabeled pictures are
neighbours of rare objects, found in a large pool. All networks are Cascade Mask R-CNN with an
EVA-02 backbone. They are written out in this file; only the arithmetic on boxes is in
common/boxes.py.

    paper                                           this file
    Eq. 1        class prototypes                   prototypes
    Eq. 2        similarities, class frequencies    similarity_distribution
    Eq. 3        smoothed labels                    smoothed_targets
    Eqs. 1 to 3  joined: the label of each class    class_targets, class_similarities,
                                                    label_statistics
    Eq. 4        CCECE, the error of confidence     ccece, shrunk, calibrate
    Eq. 5        corrected pseudo labels            corrected, pseudo_targets, pseudo_labels
    Sec. 2       weak and strong views              unlabeled_view, jittered_window, strong_view
    Sec. 2       filtering by confidence            objects_found, --threshold
    Sec. 3       binary cross-entropy               sigmoid_loss, known_classes
    Sec. 3.1     embeddings of objects, B(x)        Embedder, embed_objects
    Sec. 3.1     the similarity matrix S            cosines
    Sec. 3.2     the step of the student            train_step, ema_update
    Sec. 4.1     retrieval of unlabeled images      retrieve, crop_objects, --neighbours
    Sec. 4.1     85 % and 15 %, order of training   hold_out, divide, plan
    Sec. 4.1     the grid search                    grid, GRIDS
    Sec. 4.1     what the search found              --eps, --gamma, --lambda-calib, --unsup-weight
    Sec. 4.1     EVA-02                             EVA02, SimplePyramid
    Sec. 4.1     Cascade Mask R-CNN                 Detector, RPN, CascadeHeads, BoxHead, MaskHead
    Sec. 4.1     schedule, optimizer, batch         learning_rate_factor, adamw, --lr, --batch-size
    Sec. 4.1     evaluation, AP of 300 instances    evaluate, detect, --detections
    Sec. 4.1     AP_r: which classes are rare       label_statistics, --frequency, group_by_count
    Table 1      three kinds of pseudo labels       --pseudo, pseudo_targets
    Table 1      the supervised row                 --stage (teacher), class_targets
    Fig. 1       the AP of Table 1 as bars          --pseudo, docs/better_pseudo_labels.md
    Fig. 2       four smoothings, shares of labels  --smoothing, --split, class_targets
    Fig. 3       calibration of both networks       score_results, confident_results,
                                                    common/metrics.py (reliability, with the ECE)
    Fig. 4       AP of each class by its frequency  draw_per_class
    Fig. 5       pictures with found objects        score_networks, --predict

Shapes: B images of S x S pixels, C classes, N objects of an image, A anchors, R regions, W channels
of the pyramid. Boxes are x0, y0, x1, y1 in pixels of the padded square. No code of this paper is
public; where it is silent, we follow EVA-02's detector, Detectron2 and Guided Distillation. Lines
marked DEPARTS[name] leave the paper or decide what it leaves open; docs/better_pseudo_labels.md
says why.

    torchrun --nproc_per_node 8 better_pseudo_labels.py --pool photos/     # LVIS, as in the paper
    python better_pseudo_labels.py --dataset shapes    # embedded data, no download, CPU, minutes
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

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
    transforms,
)
from common.boxes import (
    anchors_of,
    boxes_of,
    decode_boxes,
    encode_boxes,
    match_boxes,
    paste_masks,
    sample_regions,
    sided,
    suppress,
    suppress_by_group,
)
from common.check import first_look, look_at_all
from common.distributed import World, rng
from common.errors import UserError, one_line
from common.files import write_text
from common.instances import Batch, Target
from common.nodes import fingerprint
from common.objects import (
    Instances,
    Photo,
    Thing,
    Window,
    cut_out,
    masks_of,
    singles,
    true_objects,
)
from common.typed_json import read_record
from common.waits import draw_by_weight, places, those_used

SCRIPT = "better_pseudo_labels.py"
RETURNED = ("teacher", "supervised")  # the network that the method returns, or its baseline

# The three heads of the cascade: the overlap from which a region is an object's, and the weights of
# its box deltas.
CASCADE = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)

# Class scores up to this one are neither detections nor part of a pseudo label.
FRINGE = 0.02

# The colour around an image that is smaller than its window: nearly 0 when normalised.
FILL = torch.tensor(transforms.IMAGENET_MEAN).round().to(torch.uint8).view(3, 1, 1)

# The grid search of Sec. 4.1. DEPARTS[grid]
GRIDS = {
    "teacher": {"eps": (0.05, 0.1, 0.2), "gamma": (0.0, 0.5, 1.0, 1.5, 2.0)},
    "student": {"lambda_calib": (0.5, 1.0, 2.0, 3.0), "unsup_weight": (0.5, 1.0, 2.0)},
}


# ======================================================================================== settings
Count = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Scale = Annotated[float, msgspec.Meta(ge=0.01, le=100)]


@dataclass
class Args:
    """Better (Pseudo-)Labels for semi-supervised instance segmentation: a teacher learns from
    smoothed labels, a student from its calibrated pseudo labels. --dataset picks the paper's
    numbers, and every other flag overrides one of them. Marks such as DEPARTS[ema] are explained
    in docs/better_pseudo_labels.md."""

    # data

    # what to train on (coco and lvis: any such JSON); it picks the other flags' defaults
    dataset: Literal["lvis", "coco", "shapes"] = "lvis"
    root: str = "datasets/lvis"  # where the data lie, see data/README.md
    # annotations of the training images; empty: the first usual name that exists
    train_json: str = ""
    # annotations of the images that are scored; empty: the first usual name that exists
    val_json: str = ""
    images: str = ""  # folder of the images; empty: the usual places
    # labeled images: all, random:N, random:N% (Fig. 2), random:1/N, a list, a COCO JSON
    split: str = "all"
    split_seed: int = 0  # which draw of labeled images, and of those that are held out
    # folder or list of unlabeled images; empty: what --pool gave, else unlabeled training images
    unlabeled: str = ""
    val: str = "val"  # name of the part that is scored
    # which classes are rare: as the file says, or thirds by their labeled images
    frequency: Literal["file", "subset"] = "file"

    # what to do (Sec. 4.1)

    # a part of the method, or all of it
    stage: Literal["prototypes", "teacher", "calibrate", "retrieve", "student", "all"] = "all"
    tune: bool = False  # learn from 85 % of the labels, score on the other 15 %
    # search over eps and gamma, or over lambda and weight, with --tune
    grid: Literal["no", "teacher", "student"] = "no"
    # share of the labeled images that is held out. DEPARTS[holdout]
    holdout: Annotated[float, msgspec.Meta(ge=0.01, le=0.99)] = 0.15
    teacher: str = ""  # a trained teacher (teacher.pt), in place of the teacher's stage
    # what a calibrate stage wrote (calibration.json), in place of that stage
    calibration: str = ""

    # labels of the teacher: Eqs. 1 to 3

    # how labels are smoothed, Fig. 2
    smoothing: Literal["none", "uniform", "similarity", "similarity+freq"] = "similarity+freq"
    eps: Fraction = 0.1  # epsilon, Eq. 3
    gamma: float = 1.5  # gamma, Eq. 2, with similarity+freq
    # what Eq. 3 takes of S': the row or the column of the true class. DEPARTS[convention]
    convention: Literal["row", "literal"] = "row"
    # temperature of Eq. 2. DEPARTS[temperature]
    sim_tau: Annotated[float, msgspec.Meta(ge=1e-6)] = 1.0
    proto_per_class: Count = 200  # objects of a class in Eq. 1, at most. DEPARTS[proto]
    # pixels a side of the crops that are embedded
    embed_size: Annotated[int, msgspec.Meta(ge=14)] = 224
    # what labeled images teach the student. DEPARTS[smooth-where]
    student_labels: Literal["smoothed", "onehot"] = "smoothed"

    # pseudo labels of the student: Eqs. 4 and 5

    # Table 1: the best class, the teacher's scores, or these after Eq. 5
    pseudo: Literal["onehot", "soft", "calibrated"] = "calibrated"
    lambda_calib: float = 2.0  # lambda, Eq. 5
    # entries that Eq. 5 corrects: scores over 0.02, the largest, or all. DEPARTS[support]
    support: Literal["support", "top1", "all"] = "support"
    bins: Count = 10  # B, Eq. 4
    # samples that the mean of the class's group (r, c, f) weighs; 0: Eq. 4 alone. DEPARTS[shrink]
    shrink: float = 20.0
    # confidence from which an object is a pseudo label, and a sample of Eq. 4. DEPARTS[threshold]
    threshold: Fraction = 0.5
    size_threshold: float = 5.0  # a pseudo mask has more pixels than that
    unsup_weight: float = 1.0  # weight of the loss on unlabeled images
    ema: Fraction = 0.9996  # share of itself that the teacher keeps in a step. DEPARTS[ema]

    # retrieval (Sec. 4.1)

    pool: str = ""  # folder or list of images to search for neighbours of rare objects
    neighbours: Count = 64  # images found for each rare object
    # network that embeds crops and pool: any of timm's or torchvision's. DEPARTS[dinov2]
    retrieval_model: str = "vit_large_patch14_dinov2.lvd142m"
    # its weights: imagenet (what the name's tag says), none, shapes, or a file
    retrieval_weights: str = "imagenet"
    index: str = "exact"  # exact, which reads the pool part by part, or a Faiss factory string
    duplicate: Fraction = 0.95  # cosine from which two images count as one. DEPARTS[duplicate]

    # network

    # timm's eva02_*; or any CNN, with a feature pyramid network
    backbone: str = "eva02_large_patch14_224.mim_m38m"
    # weights of the backbone: imagenet (what the name's tag says), none, shapes, or a file.
    # DEPARTS[contamination]
    weights: str = "imagenet"
    init_detector: str = ""  # a whole detector to start from: EVA-02's, or ours. DEPARTS[init]
    # S, the side of the training crop and of the test image
    image_size: Annotated[int, msgspec.Meta(ge=32, le=8192)] = 1024
    window: Count = 16  # tokens a side of windowed attention
    global_blocks: Count = 4  # blocks that attend to the whole image, evenly spread
    # chance that the last block of EVA-02 is skipped; smaller for those before it
    drop_path: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.3
    norm: Literal["frozen", "live"] = "frozen"  # BatchNorm of a CNN
    # W, channels of the pyramid; --dataset shapes has less of this and of the next six, for CPUs
    width: Annotated[int, msgspec.Meta(ge=8)] = 256
    fc: Annotated[int, msgspec.Meta(ge=8)] = 1024  # units of the box heads
    head_convs: Count = 4  # convolutions of box and mask heads
    anchor_scale: Annotated[float, msgspec.Meta(gt=0)] = 8.0  # side of an anchor over its stride
    proposals: Count = 1000  # boxes that the region proposal network gives of each image
    rpn_batch: Count = 256  # anchors sampled in each image
    roi_batch: Count = 512  # proposals sampled in each image
    # compute activations again in the backward pass: less memory, same gradients
    checkpointing: bool = False

    # classification loss

    # classes whose scores an image teaches; 0: all. DEPARTS[federated]
    federated: int = 50
    # initial score of each class; 0.5: a bias of 0. DEPARTS[prior]
    prior: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.01

    # optimisation

    # labeled images in a student's step over all processes, and as many unlabeled. DEPARTS[batch]
    batch_size: Count = 16
    teacher_batch_size: Count = 32  # labeled images in a teacher's step
    # parts in which a process computes its share of the batch; exact with --norm frozen
    accumulate: Count = 1
    # steps of the teacher, and of the network before it that Eq. 4 is measured on. DEPARTS[steps]
    teacher_steps: Count = 15_000
    steps: Count = 15_000  # steps of the student
    lr: float = 4e-5  # learning rate of pyramid and heads, at its highest
    # what follows the warm-up: a cosine to zero, or the same rate. DEPARTS[cosine]
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.01  # share of a stage's steps in which the rate rises
    weight_decay: float = 0.1  # AdamW's, on every parameter
    # factor of the learning rate from block to block; a CNN's whole body learns at this rate
    layer_decay: Fraction = 0.8
    clip: float = 0.0  # largest gradient norm; 0: none
    # a class that a smaller share of the images holds is rare: its images come more often
    # (repeat-factor sampling)
    repeat: Fraction = 0.001
    scale: tuple[Scale, Scale] = (0.1, 2.0)  # range of the random scale

    # evaluation

    detections: Count = 300  # detections kept in an image, at most
    soft_nms: bool = False  # linear soft-NMS, from an overlap of 0.6
    maskness: bool = False  # multiply a score by the mean mask probability inside the mask
    # open all files of the run, say what is wrong or odd with them, and train nothing
    check: bool = False
    eval: str = ""  # evaluate this checkpoint, train nothing
    # a checkpoint, then images or folders: write predictions
    predict: list[str] = field(default_factory=list)
    # side of the windows in which --predict sees larger pictures; 0: it sees them whole
    predict_tile: Annotated[int, msgspec.Meta(ge=0)] = 0
    # write the network of this checkpoint as a .safetensors file, train nothing
    export: str = ""

    # the run

    # run folder; empty: runs/better_pseudo_labels-<dataset>-<split>-d<split seed>-s<seed>
    out: str = ""
    resume: bool = False  # continue the run in --out, or start it if there is none
    seed: int = 0  # seed of initial weights, order of images, augmentation, sampling
    # processes that decode images, for each training process and stream
    workers: int = loading.default_workers()
    device: str = "auto"  # auto, cpu, cuda
    # number format of backbone and pyramid; auto: bf16 on GPUs. DEPARTS[amp]
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile the backbone in training
    eval_every: Count = 5000  # steps between evaluations
    # steps between checkpoints; 0: one before each evaluation
    save_every: int = 0
    log_every: Count = 20  # steps between log lines


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
    """The settings of a data set, with some replaced."""
    return Args(**(dict(dataset=dataset) | PRESETS[dataset] | overrides))


# ============================================================== labels of the teacher: Eqs. 1 to 3
def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 1: the mean embedding of each class, (N, D) and (N,) -> (C, D); zero for a class without
    an object."""
    total = embeddings.new_zeros(num_classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return total / torch.bincount(labels, minlength=num_classes).clamp(min=1)[:, None]


def cosines(prototypes: Tensor) -> Tensor:
    """S (C, C) of Eq. 2, the cosine similarity of prototypes (C, D); zero where a class has
    none."""
    unit = F.normalize(prototypes, dim=1)
    return unit @ unit.T


def similarity_distribution(
    similarity: Tensor, counts: Tensor, gamma: float, tau: float = 1.0
) -> Tensor:
    """Eq. 2: S' (C, C), each row a distribution, from S (C, C) and N (C,). The fewer objects N_j a
    class has, the larger the exponent S_ij / N_j^gamma. A class without an object gets no mass,
    and its own row is zero. `tau` divides the exponent. DEPARTS[temperature]"""
    has_objects = counts > 0
    logits = similarity / (tau * counts.clamp(min=1).to(similarity) ** gamma)
    logits = logits.masked_fill(~has_objects, -math.inf)
    return logits.softmax(1).nan_to_num() * has_objects[:, None]


def smoothed_targets(distribution: Tensor, eps: float, convention: str = "row") -> Tensor:
    """Eq. 3 for every class: row c of the result (C, C) is (1 - eps) e_c + eps times what S' (C, C)
    says of class c. That is the row of S', a distribution; or `literal`, as printed, S' e_c, the
    column, which does not sum to 1. A row of zeros in S' leaves 1 - eps. DEPARTS[convention]"""
    mixed = {"row": distribution, "literal": distribution.T}[convention]
    one_hot = torch.eye(len(mixed), device=mixed.device, dtype=mixed.dtype)
    return (1 - eps) * one_hot + eps * mixed


def class_targets(
    smoothing: str,
    similarity: Tensor,
    counts: Tensor,
    eps: float,
    gamma: float,
    tau: float = 1.0,
    convention: str = "row",
) -> Tensor:
    """Eqs. 2 and 3, and the four curves of Fig. 2: row c of (C, C) is the label of an object of
    class c, from similarities S (C, C) and the number of objects of each class (C,)."""
    if smoothing == "none":
        return torch.eye(len(counts))
    if smoothing == "uniform":  # over the classes that there are
        has_objects = counts > 0
        share = has_objects.float() / has_objects.sum()
        distribution = share.expand(len(counts), -1) * has_objects[:, None]
    else:
        exponent = {"similarity": 0.0, "similarity+freq": gamma}[smoothing]
        distribution = similarity_distribution(similarity, counts, exponent, tau)
    return smoothed_targets(distribution, eps, convention)


class Classes(NamedTuple):
    """What the labels say of the C classes, on the device."""

    images: Tensor  # (C,) how many labeled images hold it
    instances: Tensor  # (C,) how many labeled objects it has: N of Eqs. 1 and 2. DEPARTS[counts]
    targets: Tensor  # (C, C) row c: the label of an object of class c, Eq. 3
    groups: list[str]  # r, c or f: rare, common or frequent


def label_statistics(
    args: Args, data: Instances, labeled: list[Photo], similarity: Tensor, world: World
) -> Classes:
    """Counts, groups and labels of the classes, from the labeled images and S (C, C) of Eq. 2."""
    images = torch.zeros(len(data.classes), dtype=torch.int64)
    objects = torch.zeros(len(data.classes), dtype=torch.int64)
    for photo in labeled:
        images[list(singles(photo))] += 1
        for thing in photo.things:
            if not thing.crowd:
                objects[thing.category] += 1
    if args.frequency == "file" and data.frequency:
        groups = data.frequency
    else:
        groups = group_by_count(images.numpy())
    targets = class_targets(
        args.smoothing, similarity, objects, args.eps, args.gamma, args.sim_tau, args.convention
    )
    device = world.device
    return Classes(images.to(device), objects.to(device), targets.to(device), groups)


def group_by_count(counts: np.ndarray) -> list[str]:
    """r, c or f of each class: thirds of the classes that have some, by their number of pictures
    `counts` (C,), for a subset or a data set in which no class is rare by LVIS's own limits (10 and
    100 pictures). Classes without a picture are r.

    Equal counts are never parted: they go to the third that holds the middle of their ranks, to c
    if that lies on a border. So thirds may be unequal or empty, and all are c if all are equal."""
    counts = np.asarray(counts)
    ascending = np.sort(counts[counts > 0])
    first = np.searchsorted(ascending, counts, "left")  # the ranks first..last-1 have this count
    last = np.searchsorted(ascending, counts, "right")
    middle_ranks = (first + last) / 2
    groups = []
    for count, middle in zip(counts.tolist(), middle_ranks.tolist(), strict=True):
        if count == 0 or 3 * middle < len(ascending):
            groups.append("r")
        elif 3 * middle <= 2 * len(ascending):
            groups.append("c")
        else:
            groups.append("f")
    return groups


# ============================================================= embeddings of objects, B(x) of Eq. 1
# Transformers that are built for one size of picture.
ONE_SIZE = ("eva02", "vit")

PROTOTYPES = f"prototypes of {SCRIPT}"

# The settings that prototypes follow from.
PROTOTYPES_OF = (
    "dataset", "root", "train_json", "images", "split", "split_seed", "tune", "holdout",
    "backbone", "weights", "proto_per_class", "embed_size", "seed",
)  # fmt: skip


class Embedder(nn.Module):
    """Pictures (B, 3, size, size) uint8 -> (B, D) float32, B(x) of Eq. 1. Of EVA-02 the mean of the
    patch tokens, through the norm of its pre-training; of DINOv2 the class token; of a CNN the mean
    of its last map. Pictures are normalised as the network learned them (EVA-02: CLIP's numbers).
    `name` is timm's, else torchvision's. DEPARTS[proto]"""

    def __init__(self, name: str, size: int, pretrained: bool):
        super().__init__()
        import timm

        weights = "imagenet" if pretrained else "none"
        self.has_maps = not timm.is_model(name)  # torchvision's give maps, timm's a vector
        if self.has_maps:
            self.body = backbones.build(name, 32, pretrained)[0]
        elif name.startswith(ONE_SIZE):
            self.body = create(name, weights, img_size=size)
            patch = self.body.patch_embed.patch_size[0]
            if size % patch:
                raise UserError(
                    f"--embed-size {size} does not divide into patches of {name}, {patch} pixels; "
                    "give a multiple."
                )
        else:
            self.body = create(name, weights)
        facts = getattr(self.body, "pretrained_cfg", {})
        for key, default in (("mean", transforms.IMAGENET_MEAN), ("std", transforms.IMAGENET_STD)):
            values = [255 * v for v in facts[key]] if facts.get(key) else default
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = self.body((images.float() - self.mean) / self.std)
        if self.has_maps:
            x = x[-1].mean((2, 3))
        return x.float()


def class_similarities(args: Args, data: Instances, labeled: list[Photo], world: World) -> Tensor:
    """S (C, C) of Eq. 2. The prototypes of Eq. 1 are made once and kept in the run folder, in
    prototypes.pt; those of other settings, or of no settings, are made anew."""
    if not needs_prototypes(args):
        return torch.eye(len(data.classes))
    path = Path(args.out) / "prototypes.pt"
    key = made_of(args, PROTOTYPES_OF, data.classes)
    if mask_ap.from_main(world, path.exists()):
        kept = kept_prototypes(path, key, len(data.classes))
        if kept is not None:
            return cosines(kept)
    record = embed_objects(args, data, labeled, world)
    if world.main:
        record = {**record, "classes": data.classes, "key": key}
        checkpoints.save_checkpoint(path, PROTOTYPES, record)
    return cosines(record["prototypes"])


class Prototypes(checkpoints.Form, kw_only=True):
    """What prototypes.pt holds."""

    prototypes: Tensor
    key: str


def kept_prototypes(path: Path, key: str, num_classes: int) -> Tensor | None:
    """The prototypes (C, D) in a file; None where they are of other settings, or damaged."""
    try:
        record = checkpoints.load_checkpoint(path, PROTOTYPES, Prototypes)
    except UserError as error:
        print(f"{error} The prototypes are made anew.", flush=True)
        return None
    found = record["prototypes"]
    is_whole = found.dim() == 2 and len(found) == num_classes
    return found if record["key"] == key and is_whole else None


def needs_prototypes(args: Args) -> bool:
    """Whether anything in this run looks at similarities of classes."""
    similar = args.smoothing in ("similarity", "similarity+freq")
    return args.stage == "prototypes" or (similar and args.stage != "retrieve")


def embed_objects(
    args: Args, data: Instances, photos: list[Photo], world: World
) -> dict[str, Tensor]:
    """The prototypes (C, D) of Eq. 1, of up to --proto-per-class objects of each class, and how
    many these were (C,). DEPARTS[proto]"""
    num_classes = len(data.classes)
    chosen = choose_objects(photos, {*range(num_classes)}, args.proto_per_class, args.split_seed)
    distributed.seed_torch(args.seed, "prototypes")
    net = embedder(args).to(world.device)
    found = embed_crops(net, chosen, data, args.embed_size, world, args.workers)
    return {
        "prototypes": prototypes(found.embeddings, found.labels, num_classes),
        "embedded": torch.bincount(found.labels, minlength=num_classes),
    }


def choose_objects(
    photos: list[Photo], classes: set[int], most: int, seed: int
) -> list[tuple[Photo, list[int]]]:
    """Up to `most` objects of each of the `classes`, drawn at random; crowds are none. Gives the
    pictures that hold some, each with the places of these among its things."""
    where: dict[int, list[tuple[int, int]]] = {}  # class -> (picture, place) of its objects
    for p, photo in enumerate(photos):
        for place, thing in enumerate(photo.things):
            if thing.category in classes and not thing.crowd:
                where.setdefault(thing.category, []).append((p, place))
    taken: dict[int, list[int]] = {}
    for category, objects in sorted(where.items()):
        drawn = rng(seed, "objects", category).permutation(len(objects))[:most]
        for j in sorted(drawn.tolist()):
            p, place = objects[j]
            taken.setdefault(p, []).append(place)
    return [(photos[p], sorted(taken[p])) for p in sorted(taken)]


def crop_objects(
    photo: Photo, data: Instances, chosen: list[int], size: int
) -> tuple[Tensor, Tensor]:
    """Crops (n, 3, size, size) uint8 of the `chosen` objects, their boxes enlarged by a tenth of
    the side at each end, and their classes (n,)."""
    image = instances.load(photo)
    labels, _, boxes = true_objects(photo, data, chosen)
    crops = [torch.zeros(0, 3, size, size, dtype=torch.uint8)]
    for x0, y0, x1, y1 in boxes.tolist():
        dx, dy = 0.1 * (x1 - x0), 0.1 * (y1 - y0)
        rows = slice(max(int(y0 - dy), 0), math.ceil(y1 + dy))
        columns = slice(max(int(x0 - dx), 0), math.ceil(x1 + dx))
        crop = image[None, :, rows, columns]
        crops.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True))
    return torch.cat(crops), labels


class Embedded(NamedTuple):
    """Embeddings of N objects, on every process."""

    embeddings: Tensor  # (N, D)
    labels: Tensor  # (N,)
    examples: dict[int, Tensor]  # class -> one of its crops (3, size, size) uint8


def embed_crops(
    net: nn.Module,
    chosen: list[tuple[Photo, list[int]]],
    data: Instances,
    size: int,
    world: World,
    workers: int,
) -> Embedded:
    """Embeddings of the chosen objects' crops, in the order of `chosen`, each made by one
    process."""
    loader = DataLoader(
        chosen[world.rank :: world.size],
        batch_size=None,
        generator=torch.Generator(),
        collate_fn=lambda item: crop_objects(item[0], data, item[1], size),
        **loading.helpers(workers),
    )
    found, seen = [], set()
    for i, (crops, labels) in enumerate(loader):
        if len(labels) == 0:
            continue
        examples = {}  # a crop of each class that this process has not seen before
        for label, crop in zip(labels.tolist(), crops, strict=True):
            if label not in seen:
                examples[label] = crop
        seen |= examples.keys()
        vectors = [net(part.to(world.device)) for part in crops.split(64)]
        place = world.rank + i * world.size  # in `chosen`; `gather` sorts by it
        found.append((place, torch.cat(vectors).cpu(), labels, examples))
    found = mask_ap.gather(world, found)
    if not found:
        raise UserError(
            f"None of the labeled objects of {data.root} shows a pixel in its image, so that none "
            f"can be embedded; correct the annotations, or take a larger --split."
        )
    first_examples: dict[int, Tensor] = {}
    for _, _, _, examples in found:
        for label, crop in examples.items():
            first_examples.setdefault(label, crop)
    return Embedded(
        torch.cat([vectors for _, vectors, _, _ in found]),
        torch.cat([labels for _, _, labels, _ in found]),
        first_examples,
    )


# ================================================================ calibration and its correction
def ccece(
    conf: Tensor, right: Tensor, labels: Tensor, num_classes: int, bins: int = 10
) -> tuple[Tensor, Tensor]:
    """Eq. 4: Delta (C,) and the number of samples (C,), from confidences in 0..1 (n,), whether
    right (n,) and classes (n,).

    Delta_i is the sum over the bins b of N_ib / N_i (acc_ib - conf_ib): positive for an
    underconfident class, zero for one without a sample. Being signed, it is mean accuracy minus
    mean confidence, whatever the bins are."""
    cell = labels * bins + (conf * bins).long().clamp(max=bins - 1)  # (n,) class and bin
    size = num_classes * bins
    count = torch.bincount(cell, minlength=size).double()  # N_ib
    acc = torch.bincount(cell, right.double(), size) / count.clamp(min=1)
    mean_conf = torch.bincount(cell, conf.double(), size) / count.clamp(min=1)
    count = count.view(num_classes, bins)
    gap = (acc - mean_conf).view(num_classes, bins)
    total = count.sum(1)  # N_i
    return (count / total.clamp(min=1)[:, None] * gap).sum(1).float(), total.long()


def shrunk(delta: Tensor, counts: Tensor, groups: list[str], kappa: float) -> Tensor:
    """Delta (C,) of few samples is drawn to Delta_g, the mean of its group (r, c, f): (n_i Delta_i
    + kappa Delta_g) / (n_i + kappa); and Delta_g in the same way to the mean of all. kappa = 0 is
    Eq. 4 alone. DEPARTS[shrink]"""
    if kappa == 0:
        return delta
    total, out = counts * delta, delta.clone()
    mean_of_all = total.sum() / counts.sum().clamp(min=1)
    for group in set(groups):
        members = torch.tensor([g == group for g in groups], device=delta.device)
        mean = (total[members].sum() + kappa * mean_of_all) / (counts[members].sum() + kappa)
        out[members] = (total[members] + kappa * mean) / (counts[members] + kappa)
    return out


def corrected(probs: Tensor, delta: Tensor, strength: float, support: str = "support") -> Tensor:
    """Eq. 5: y + lambda Delta, scores in 0..1 (n, C) and (C,) -> (n, C), cut to 0..1. Corrected
    are the scores over 0.02; or only the largest; or `all`, as printed: then each object is a
    little of every underconfident class. Scores up to 0.02 that are not corrected become 0, also
    where Delta is 0. DEPARTS[support]"""
    visible = probs > FRINGE
    corrects = {
        "support": visible,
        "top1": F.one_hot(probs.argmax(1), probs.shape[1]).bool(),
        "all": torch.ones_like(visible),
    }[support]
    without_error = (probs + strength * delta).clamp(0, 1)  # Eq. 5
    return torch.where(corrects, without_error, torch.where(visible, probs, 0.0))


def pseudo_targets(
    probs: Tensor, kind: str, delta: Tensor | None, strength: float, support: str = "support"
) -> Tensor:
    """Table 1: what the student learns of objects with the teacher's scores (n, C). `onehot`: their
    best class; `soft`: the scores over 0.02; `calibrated`: these after Eq. 5."""
    if kind == "onehot":
        return F.one_hot(probs.argmax(1), probs.shape[1]).to(probs)
    if kind == "soft":
        return torch.where(probs > FRINGE, probs, 0.0)
    return corrected(probs, delta, strength, support)


@torch.no_grad()
def calibrate(net: Detector, data: Instances, groups: list[str], args: Args, world: World) -> dict:
    """Eq. 4 of a network on the scored images of `data`, from which it must not have learned: Delta
    of each class, and the reliability diagram of the same samples.

    The network sees what a teacher sees when it makes pseudo labels: one weak view of each image,
    drawn by --seed. Each object found there with a confidence of --threshold or more is a sample.
    It is right if an object of its class overlaps it by half in the window. DEPARTS[samples]"""
    entries, views = [], []
    for index, image in instances.score_loader(data.val, world, args.workers):
        size = tuple(image.shape[-2:])
        window = jittered_window(size, args, rng(args.seed, "calibration", index))
        weak = cut_out(image, window, FILL)[None].to(world.device)
        _, [(boxes, probs)] = net.infer(transforms.normalize(weak))
        photo = within(data.val[index], data, window)
        views.append((index, photo))
        entries += confident_results(photo.id, data.ids, boxes, probs, args.threshold)
    photos = [photo for _, photo in mask_ap.gather(world, views)]
    truth = mask_ap.truth_of(instances.scored_on(data, photos))
    samples = judge.samples(truth, mask_ap.gather(world, entries), "bbox", federated=data.lvis)
    conf, right, labels = (
        torch.from_numpy(x) for x in (samples.conf, samples.right, samples.labels)
    )
    delta, counts = ccece(conf, right, labels, len(data.classes), args.bins)
    # A class without an object here can only be found wrongly, which says nothing of its true
    # error: its samples do not count, so `shrunk` gives it the mean of its group.
    has_objects = torch.zeros(len(data.classes), dtype=torch.bool)
    for photo in photos:
        has_objects[list(singles(photo))] = True
    return {
        "classes": data.classes,
        "delta": shrunk(delta, counts * has_objects, groups, args.shrink).tolist(),
        "raw_delta": delta.tolist(),
        "samples": counts.tolist(),
        "images": len(data.val),
        "reliability": metrics.reliability(samples, args.bins, groups),
    }


def within(photo: Photo, data: Instances, window: Window) -> Photo:
    """The labels of a picture as a window shows them: objects that reach into it, their masks as
    run lengths. A class of the picture that has no object in the window is known to be absent."""
    labels, masks, crowds = masks_of(photo, data, window, crowds=True)
    visible = masks.flatten(1).any(1).bool()
    things = []
    for label, crowd, run_lengths in zip(
        labels[visible].tolist(),
        crowds[visible].tolist(),
        mask_ap.encode(masks[visible]),
        strict=True,
    ):
        things.append(Thing(label, run_lengths, crowd, 0.0))
    absent = {*photo.negative, *labels.tolist()} - {thing.category for thing in things}
    height, width = window.out
    return photo._replace(
        height=height, width=width, things=tuple(things), negative=tuple(sorted(absent))
    )


def confident_results(
    image_id: int,
    ids: list[int],
    boxes: Tensor,
    probs: Tensor,
    threshold: float,
    factors: Tensor | float = 1.0,
) -> list[dict]:
    """The samples of Eq. 4 and Fig. 3 in an image, as entries of a COCO results file: the objects
    that would become pseudo labels. Dividing boxes (R, 4) by `factors` gives the image's own
    pixels."""
    keep = objects_found(boxes, probs, threshold)
    conf, labels = probs[keep].max(1)
    return mask_ap.results_of(image_id, ids, labels, conf, None, boxes[keep] / factors)


# ================================================================================= pseudo labels
class Objects(NamedTuple):
    """Objects of one image, true or pseudo, on its padded square."""

    labels: Tensor  # (N,) int64: the channel of the mask head that learns
    boxes: Tensor  # (N, 4) x0, y0, x1, y1 in pixels
    masks: Tensor  # (N, S, S) uint8 or bool
    probs: Tensor  # (N, C) what the scores of the classes shall become: Eq. 3 or Eq. 5
    named: Tensor  # (N, C) bool: the classes of which the label says something


def objects_found(boxes: Tensor, probs: Tensor, threshold: float, most: int = 100) -> Tensor:
    """Indices (n,) of the regions (R, 4), (R, C) that stand for an object each: their best score is
    `threshold` at least, and none overlaps a more confident one by half, of whatever class. The
    sides are longer than 2 pixels. DEPARTS[pseudo-nms]"""
    from torchvision.ops import nms

    conf = probs.amax(1)
    kept = nms(boxes.double(), conf.double(), 0.5)[:most]  # the most confident come first
    return kept[(conf[kept] >= threshold) & sided(boxes[kept], 2)]


def mask_channel(targets: Tensor, probs: Tensor) -> Tensor:
    """The class whose mask an object gets, (n,): of those that the teacher scores over 0.02, the
    one with the largest corrected score `targets` (n, C); among equals the one with the largest raw
    score `probs` (n, C)."""
    candidates = targets.masked_fill(probs <= FRINGE, -1.0)
    best = candidates == candidates.amax(1, keepdim=True)
    return probs.masked_fill(~best, -1.0).argmax(1)


@torch.no_grad()
def pseudo_labels(
    teacher: Detector, weak: Tensor, delta: Tensor | None, args: Args
) -> tuple[list[Objects], Tensor]:
    """What the teacher finds on weak views (B, 3, S, S) uint8, and its confidences (sum N,). It
    composes `objects_found`, Eq. 5 in `pseudo_targets`, and `mask_channel`. The threshold is on
    the teacher's own scores, so that the rows of Table 1 differ in targets alone."""
    pyramid, regions = teacher.infer(transforms.normalize(weak), least=args.threshold)
    size = tuple(weak.shape[-2:])
    found, confidences, are_large = [], [], []
    for i, (boxes, probs) in enumerate(regions):
        keep = objects_found(boxes, probs, args.threshold)
        boxes, probs = boxes[keep], probs[keep]
        targets = pseudo_targets(
            probs, args.pseudo, delta, args.lambda_calib, args.support
        )  # Eq. 5
        labels = mask_channel(targets, probs)
        masks = paste_masks(teacher.masks(pyramid, i, boxes, labels), boxes, size) > 0.5
        named = targets > 0
        if args.pseudo != "onehot":  # also classes whose score Eq. 5 has cut to 0
            named = named | (probs > FRINGE)
        found.append(Objects(labels, boxes, masks, targets, named))
        confidences.append(probs.amax(1))
        are_large.append(masks.sum((1, 2)) > args.size_threshold)
    large = places(are_large)
    found = [Objects(*(x[i] for x in objects)) for objects, i in zip(found, large, strict=True)]
    return found, torch.cat([conf[i] for conf, i in zip(confidences, large, strict=True)])


def pseudo_log(found: list[Objects], conf: Tensor, world: World) -> dict[str, Tensor]:
    """What is logged of pseudo labels. The log averages each value over the processes, which may
    have found different numbers of objects. So a sum is divided here by the mean number of objects
    of a process: the average of these is the mean over all objects."""
    counts = torch.tensor([float(len(objects.labels)) for objects in found])
    counts = counts.to(conf.device, non_blocking=True)
    mean_number = world.mean(counts.sum()).clamp(min=1 / world.size)
    return {
        "pseudo_per_image": counts.mean(),
        "pseudo_none": (counts == 0).float().mean(),
        "conf": conf.sum() / mean_number,
        "mass": sum(objects.probs.sum() for objects in found) / mean_number,
    }


# ====================================================================================== backbones
class EVA02(nn.Module):
    """EVA-02 (Fang et al., 2023) as a detector's backbone: (B, 3, S, S) -> (B, D, S/16, S/16), the
    tokens of the last block, without a final norm. Most blocks attend within windows, in which
    rotary positions start anew (ViTDet)."""

    def __init__(self, args: Args, pretrained: bool):
        super().__init__()
        weights = "imagenet" if pretrained else "none"
        self.take(create(args.backbone, weights, **eva_options(args)))
        depth = len(self.blocks)
        if depth % args.global_blocks:
            raise UserError(
                f"--global-blocks {args.global_blocks} does not divide {depth} blocks; give "
                "another."
            )
        self.whole = [(i + 1) % (depth // args.global_blocks) == 0 for i in range(depth)]
        self.window, self.checkpointing = args.window, args.checkpointing

    def take(self, body: nn.Module) -> None:
        """Take over the layers of timm's EVA-02. Its patches of 14 pixels become 16 wide, so that
        the answer to an enlarged picture stays (DEPARTS[patch]); the class token goes."""
        from timm.layers import resample_patch_embed

        patch = body.patch_embed
        self.channels = body.embed_dim
        self.proj = nn.Conv2d(3, self.channels, 16, stride=16)
        self.proj.weight = nn.Parameter(resample_patch_embed(patch.proj.weight.data, [16, 16]))
        self.proj.bias = patch.proj.bias
        places = body.pos_embed.data[:, 1:].transpose(1, 2)  # without the class token's
        places = places.reshape(1, self.channels, *patch.grid_size)
        self.pos_embed = nn.Parameter(places.contiguous())
        self.blocks, self.rope = body.blocks, body.rope
        for block in self.blocks:
            block.attn.num_prefix_tokens = 0

    def _load_from_state_dict(self, state: dict, prefix: str, *more):
        # The table of positions of EVA-02's detectors has another size.
        table = state.get(f"{prefix}pos_embed", self.pos_embed)
        if table.shape != self.pos_embed.shape:
            self.pos_embed = nn.Parameter(table.to(self.pos_embed))
        super()._load_from_state_dict(state, prefix, *more)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)
        size = list(x.shape[-2:])
        x = x + F.interpolate(self.pos_embed, size, mode="bicubic", align_corners=False)
        x = x.permute(0, 2, 3, 1)  # (B, h, v, D)
        inside = self.rope.get_embed(shape=[self.window, self.window])
        across = self.rope.get_embed(shape=size)
        recompute = self.checkpointing and self.training
        for block, whole in zip(self.blocks, self.whole, strict=True):
            rope = across if whole else inside
            x = maybe_checkpoint(recompute, self.block, block, x, whole, rope)
        return x.permute(0, 3, 1, 2).contiguous()

    def block(self, block: nn.Module, x: Tensor, whole: bool, rope: Tensor) -> Tensor:
        """One block on (B, h, v, D): attention, within windows unless `whole`, and MLP, both
        residual."""
        size = x.shape[1:3]
        y = block.norm1(x)
        if whole:
            y = block.attn(y.flatten(1, 2), rope=rope).unflatten(1, size)
        else:
            y = unwindows(block.attn(windows(y, self.window), rope=rope), self.window, size)
        x = x + block.drop_path1(y)
        return x + block.drop_path2(block.mlp(block.norm2(x)))


def eva_options(args: Args) -> dict[str, Any]:
    """How timm builds EVA-02 for a detector."""
    return {"drop_path_rate": args.drop_path, "dynamic_img_size": True}


def windows(x: Tensor, w: int) -> Tensor:
    """(B, h, v, D) tokens -> (B * h/w * v/w, w * w, D)."""
    b, h, v, d = x.shape
    return x.view(b, h // w, w, v // w, w, d).transpose(2, 3).reshape(-1, w * w, d)


def unwindows(x: Tensor, w: int, size: tuple[int, int]) -> Tensor:
    """The reverse of `windows`: -> (B, *size, D)."""
    h, v = size
    x = x.view(-1, h // w, v // w, w, w, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, h, v, x.shape[-1])


# SAME AS guided_distillation.py:maybe_checkpoint
def maybe_checkpoint(on: bool, function: Callable, *inputs):
    """function(*inputs); when `on`, activations are computed again in the backward pass instead of
    being kept."""
    if on:
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class SimplePyramid(nn.Module):
    """ViTDet's pyramid of one map of stride 16: -> four maps (B, W, h, w) of strides 4, 8, 16,
    32."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        from timm.layers import LayerNorm2d

        def doubled(inputs: int, outputs: int) -> nn.Module:
            return nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)

        def output(inputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            ]

        half, quarter = channels // 2, channels // 2 // 2
        stride4 = [doubled(channels, half), LayerNorm2d(half), nn.GELU(), doubled(half, quarter)]
        stride4 += output(quarter)
        stride8 = [doubled(channels, half), *output(half)]
        stride16 = output(channels)
        stride32 = [nn.MaxPool2d(2), *output(channels)]
        self.levels = nn.ModuleList(
            nn.Sequential(*layers) for layers in (stride4, stride8, stride16, stride32)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


class ConvPyramid(nn.Module):
    """A CNN with a feature pyramid network: (B, 3, S, S) -> four maps (B, W, h, w) of strides 4, 8,
    16, 32."""

    def __init__(self, args: Args, pretrained: bool):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.cnn = backbones.FourMaps(args.backbone, args.norm == "frozen", pretrained)
        self.fpn = FeaturePyramidNetwork(self.cnn.channels, args.width)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.fpn(dict(enumerate(self.cnn(images)))).values())


# ======================================================================================= proposals
class RPN(nn.Module):
    """Region proposal network (Ren et al., 2015), with two convolutions as in EVA-02's detector."""

    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        w = args.width
        self.convs = nn.Sequential(
            initialized(nn.Conv2d(w, w, 3, padding=1), 0.01),
            nn.ReLU(),
            initialized(nn.Conv2d(w, w, 3, padding=1), 0.01),
            nn.ReLU(),
        )
        self.objectness = initialized(nn.Conv2d(w, 3, 1), 0.01)  # three anchors at each place
        self.deltas = initialized(nn.Conv2d(w, 12, 1), 0.01)

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
        twice as many), less those that overlap a better one by 0.7; of all these the best. Where
        there are too few, boxes without an area may be among them."""
        size = self.args.image_size
        anchors, per_level = anchors_of(size, self.args.anchor_scale, objectness.device)
        most = self.args.proposals * (2 if self.training else 1)
        proposals = []
        for scores, steps in zip(objectness.float(), deltas.float(), strict=True):
            best_of_levels, levels = [], []
            start = 0
            for level, number in enumerate(per_level):
                best = scores[start : start + number].topk(min(most, number)).indices + start
                best_of_levels.append(best)
                levels.append(torch.full_like(best, level))
                start += number
            best = torch.cat(best_of_levels)
            boxes = decode_boxes(steps[best], anchors[best], (1.0, 1.0, 1.0, 1.0), size)
            # What is no box becomes an empty one with the lowest score: taking it out here would
            # wait for the device.
            usable = sided(boxes) & torch.isfinite(scores[best])
            boxes = boxes.where(usable[:, None], 0.0)
            points = scores[best].where(usable, -torch.inf)
            kept = suppress_by_group(boxes, points, torch.cat(levels), 0.7)
            proposals.append(boxes[kept[: self.args.proposals]])
        return proposals

    def losses(
        self, objectness: Tensor, deltas: Tensor, objects: list[Objects], draws: list
    ) -> dict[str, Tensor]:
        """Means over the images: binary cross-entropy of sampled anchors and L1 of those that are
        objects', both over --rpn-batch."""
        args, weights = self.args, (1.0, 1.0, 1.0, 1.0)
        anchors, _ = anchors_of(args.image_size, args.anchor_scale, objectness.device)
        class_loss = box_loss = objectness.new_zeros(())
        matches = [match_boxes(anchors, o.boxes, 0.3, 0.7, rescue=True) for o in objects]
        sampled = sample_regions(matches, args.rpn_batch, 0.5, draws)
        for scores, steps, truth, match, (foreground, background) in zip(
            objectness, deltas, objects, matches, sampled, strict=True
        ):
            taken = torch.cat([foreground, background])
            is_object = match[taken] >= 0
            class_loss = class_loss + F.binary_cross_entropy_with_logits(
                scores[taken], is_object.float(), reduction="sum"
            )
            goal = encode_boxes(truth.boxes[match[foreground]], anchors[foreground], weights)
            box_loss = box_loss + (steps[foreground] - goal).abs().sum()
        number = args.rpn_batch * len(objects)
        return {"rpn": class_loss / number, "rpn_box": box_loss / number}


# =========================================================================================== heads
def roi_pool(pyramid: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """Boxes (n, 4) of each image -> (R, W, size, size): averages of bilinear samples on the level
    of the box's size, of stride 16 for 224 x 224 pixels, of twice the stride for twice the side."""
    from torchvision.ops import roi_align

    rois = torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
    level = (4 + torch.log2(side / 224 + 1e-8)).floor().clamp(2, 5) - 2
    out = torch.zeros((), device=rois.device)
    for i, maps in enumerate(pyramid[:4]):
        # Boxes of other levels become empty ones here, of which nothing is pooled: zeros. Taking
        # them out would wait for the device. Boxes that are not numbers have no level.
        here = rois.where((level == i)[:, None], 0.0)
        scale = 1 / 2 ** (i + 2)
        out = out + roi_align(maps, here, size, scale, sampling_ratio=0, aligned=True)
    return out


def head_layers(args: Args) -> nn.Sequential:
    """--head-convs convolutions 3x3, each normalised over its channels, with ReLU."""
    from timm.layers import LayerNorm2d

    layers = []
    for _ in range(args.head_convs):
        conv = nn.Conv2d(args.width, args.width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, LayerNorm2d(args.width), nn.ReLU()]
    return nn.Sequential(*layers)


def initialized(layer: nn.Module, std: float) -> nn.Module:
    """The layer, with weights of this deviation and a bias of zero."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class BoxHead(nn.Module):
    """One head of the cascade: pooled features (R, W, 7, 7) -> class logits (R, columns) and deltas
    (R, 4). A class's initial score is --prior, DEPARTS[prior]."""

    def __init__(self, args: Args, num_classes: int):
        super().__init__()
        self.convs = head_layers(args)
        self.fc = nn.Linear(49 * args.width, args.fc)
        self.classes = initialized(nn.Linear(args.fc, num_classes), 0.01)
        self.deltas = initialized(nn.Linear(args.fc, 4), 0.001)
        nn.init.kaiming_uniform_(self.fc.weight, a=1)
        nn.init.zeros_(self.fc.bias)
        nn.init.constant_(self.classes.bias, -math.log((1 - args.prior) / args.prior))

    def forward(self, x: Tensor, columns: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc(self.convs(x).flatten(1)))
        logits = F.linear(x, self.classes.weight[columns], self.classes.bias[columns])
        return logits, self.deltas(x)


class MaskHead(nn.Module):
    """Pooled features (n, W, 14, 14) and a class of each -> mask logits (n, 28, 28): of the last
    convolution's C channels only the wanted one is computed."""

    def __init__(self, args: Args, num_classes: int):
        super().__init__()
        self.convs = head_layers(args)
        self.up = nn.ConvTranspose2d(args.width, args.width, 2, 2)
        self.masks = initialized(nn.Conv2d(args.width, num_classes, 1), 0.001)
        nn.init.kaiming_normal_(self.up.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.up(self.convs(x)))
        weight, bias = self.masks.weight[labels, :, 0, 0], self.masks.bias[labels]
        return torch.einsum("nchw,nc->nhw", x, weight) + bias[:, None, None]


class CascadeHeads(nn.Module):
    """Three box heads of rising overlap, each on the boxes of the one before (Cai and Vasconcelos,
    2019), and a mask head."""

    def __init__(self, args: Args, num_classes: int):
        super().__init__()
        self.args = args
        self.boxes = nn.ModuleList(BoxHead(args, num_classes) for _ in CASCADE)
        self.mask = MaskHead(args, num_classes)
        # The classes of which a label was seen; the others are never found.
        self.register_buffer("learned", torch.ones(num_classes, dtype=torch.bool))

    def losses(
        self,
        pyramid: list[Tensor],
        proposals: list[Tensor],
        objects: list[Objects],
        known: Tensor,
        draws: list,
    ) -> dict[str, Tensor]:
        """Means over the images of each loss's mean over an image's regions, so neither the number
        of processes nor --accumulate changes them. DEPARTS[per-image]

        `known` (B, C) are the classes whose scores each image teaches, and `draws` has a generator
        for each image. The objects' own boxes are added to the proposals here. Boxes are x0, y0,
        x1, y1, which nothing checks (x, y, width, height would go through), and are clipped to the
        padded square, not to the picture in it."""
        boxes, of_objects, matches = candidates_of(proposals, objects, self.args.roi_batch, draws)
        loss = {"mask": self.mask_loss(pyramid, of_objects, matches, objects)}
        counts = [len(b) for b in boxes]
        image_of_region = torch.cat(
            [b.new_full((len(b),), i, dtype=torch.int64) for i, b in enumerate(boxes)]
        )
        columns = places([known.any(0)])[0]  # no image teaches the scores of other classes
        taught = known[image_of_region][:, columns]  # (R, columns)
        for stage, (head, (overlap, weights)) in enumerate(zip(self.boxes, CASCADE, strict=True)):
            foreground, target_probs, target_boxes = targets_of_batch(boxes, objects, overlap)
            # A decoded box may have no area left. It stays among the regions, but weighs nothing.
            weight = region_weights([sided(b) for b in boxes])  # (R,)

            x = roi_pool(pyramid, boxes, 7)
            # The same values, with a third of the gradient: three heads learn from the pyramid.
            x = x / 3 + x.detach() * (2 / 3)
            logits, deltas = head(x, columns)
            class_loss = sigmoid_loss(logits, target_probs[:, columns], taught)
            loss[f"class{stage + 1}"] = (class_loss * weight).sum()

            regions = torch.cat(boxes)
            goal = encode_boxes(target_boxes, regions, weights).where(foreground[:, None], 0.0)
            box_loss = (deltas - goal).abs().sum(1) * foreground
            loss[f"box{stage + 1}"] = (box_loss * weight).sum()
            boxes = decode_boxes(deltas.detach(), regions, weights, self.args.image_size)
            boxes = boxes.split(counts)
        return loss

    def mask_loss(
        self,
        pyramid: list[Tensor],
        boxes: list[Tensor],
        matches: list[Tensor],
        objects: list[Objects],
    ) -> Tensor:
        """Binary cross-entropy of the masks of the first head's objects, on 28 x 28 cells: of each
        image the boxes (n, 4) that stand for an object, and which one (n,)."""
        labels, goal = [], []
        for of_image, match, truth in zip(boxes, matches, objects, strict=True):
            labels.append(truth.labels[match])
            goal.append(mask_targets(truth.masks, match, of_image))
        logits = self.mask(roi_pool(pyramid, boxes, 14), torch.cat(labels))
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(goal), reduction="none")
        weight = region_weights([torch.ones_like(m, dtype=torch.bool) for m in matches])
        return (loss.mean((1, 2)) * weight).sum()

    def scores(
        self, pyramid: list[Tensor], boxes: list[Tensor], least: float = 0.0
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each image the boxes (R, 4) after three heads, and the confidences (R, C): the mean
        of the heads' class probabilities, each at the boxes that it was given. Boxes whose best
        confidence would stay below `least`, whatever the next heads say, are left out on the
        way."""
        counts = [len(b) for b in boxes]
        total = torch.zeros(())
        for stage, (head, (_, weights)) in enumerate(zip(self.boxes, CASCADE, strict=True)):
            heads_left = len(CASCADE) - stage
            if heads_left < len(CASCADE) * least:  # the sum must be high by now
                best = (total * self.learned).amax(1)
                # A little less is required than that, because of rounding.
                promising = best + heads_left > len(CASCADE) * least - 1e-3
                left = places(promising.split(counts))
                boxes = [b[i] for b, i in zip(boxes, left, strict=True)]
                total = torch.cat([t[i] for t, i in zip(total.split(counts), left, strict=True)])
                counts = [len(b) for b in boxes]
            logits, deltas = head(roi_pool(pyramid, boxes, 7))
            total = total + logits.sigmoid()
            boxes = decode_boxes(deltas, torch.cat(boxes), weights, self.args.image_size)
            boxes = boxes.split(counts)
        probs = total / len(CASCADE) * self.learned
        return list(zip(boxes, probs.split(counts), strict=True))


# ========================================================================================== losses
class Candidates(NamedTuple):
    """The regions of each image that the heads learn from."""

    boxes: list[Tensor]  # (n, 4): those that stand for an object, then background
    of_objects: list[Tensor]  # (m, 4): the former alone
    matches: list[Tensor]  # (m,): the object that each of these stands for


def candidates_of(
    proposals: list[Tensor], objects: list[Objects], number: int, draws: list[torch.Generator]
) -> Candidates:
    """Draw `number` of the proposals (n, 4) and of the objects' own boxes in each image, of which
    up to a quarter overlap an object by half."""
    boxes, of_objects, all_boxes, all_matches, matches = [], [], [], [], []
    for of_image, truth in zip(proposals, objects, strict=True):
        of_image = torch.cat([of_image, truth.boxes])
        match = match_boxes(of_image, truth.boxes, 0.5, 0.5)
        all_boxes.append(of_image)
        all_matches.append(match.where(sided(of_image), -2))  # neither an object nor background
    sampled = sample_regions(all_matches, number, 0.25, draws)
    for of_image, match, indices in zip(all_boxes, all_matches, sampled, strict=True):
        boxes.append(of_image[torch.cat(indices)])
        of_objects.append(of_image[indices.foreground])
        matches.append(match[indices.foreground])
    return Candidates(boxes, of_objects, matches)


class Targets(NamedTuple):
    """What the regions of all images learn, one image after the other."""

    foreground: Tensor  # (R,) bool: whether a region stands for an object
    probs: Tensor  # (R, C) class scores, and
    boxes: Tensor  # (R, 4), both zero on background


def targets_of_batch(boxes: list[Tensor], objects: list[Objects], overlap: float) -> Targets:
    """A region, of each image (n, 4), stands for the object that it overlaps most, by `overlap` at
    least."""
    foreground, target_probs, target_boxes = [], [], []
    for of_image, truth in zip(boxes, objects, strict=True):
        match = match_boxes(of_image, truth.boxes, overlap, overlap)
        goal_probs, goal_boxes = targets_of_regions(match, truth)
        foreground.append(match >= 0)
        target_probs.append(goal_probs)
        target_boxes.append(goal_boxes)
    return Targets(torch.cat(foreground), torch.cat(target_probs), torch.cat(target_boxes))


def targets_of_regions(matches: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """What the regions of an image learn, by the object that each is matched to (R,), below 0 for
    background: class scores (R, C) and boxes (R, 4), both zero on background."""
    row = matches.clamp(min=-1)  # the last row, of zeros, is background's
    return F.pad(objects.probs, (0, 0, 0, 1))[row], F.pad(objects.boxes, (0, 0, 0, 1))[row]


def sigmoid_loss(logits: Tensor, probs: Tensor, taught: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, summed over the classes that are taught: (R, K) three
    times -> (R,). A logit's gradient is its score minus the target, so any target in 0..1 is legal;
    background is zero everywhere. DEPARTS[sigmoid]"""
    return (F.binary_cross_entropy_with_logits(logits, probs, reduction="none") * taught).sum(1)


def region_weights(counted: list[Tensor]) -> Tensor:
    """The weight (R,) of each region in a mean over images of the mean over an image's regions,
    from a mask (n,) of each image, which says which regions count. The others weigh nothing."""
    weights = []
    for counts in counted:
        weight = 1 / counts.sum().clamp(min=1).double() / len(counted)
        weights.append(counts * weight.float())
    return torch.cat(weights)


def mask_targets(masks: Tensor, matches: Tensor, boxes: Tensor, size: int = 28) -> Tensor:
    """Masks (N, S, S), the object of each box (n,) and boxes (n, 4) -> (n, size, size) 0/1: what of
    the object lies in the box, averaged over each cell, from a half on. DEPARTS[mask-targets]"""
    from torchvision.ops import roi_align

    used, place = those_used(matches, len(masks))
    rois = torch.cat([place[:, None].to(boxes), boxes], dim=1)
    cells = roi_align(masks[used][:, None].float(), rois, size, 1.0, 0, aligned=True)[:, 0]
    return (cells >= 0.5).float()


def known_classes(
    objects: list[Objects], image_counts: Tensor, number: int, draws: list[torch.Generator]
) -> Tensor:
    """Federated loss (Zhou et al., 2021): the classes (B, C) whose scores each image teaches: those
    that its labels name, and others, drawn by the root of their `image_counts` (C,), up to `number`
    in all; with `number` 0 all that have an image. DEPARTS[federated]"""
    has_images = image_counts > 0
    if number == 0:
        return has_images.expand(len(objects), -1)
    rows = []
    for truth, draw in zip(objects, draws, strict=True):
        known = truth.named.any(0) & has_images
        weights = image_counts.float().sqrt() * ~known
        missing = number - known.sum()
        rows.append(known | draw_by_weight(weights, missing, number, draw))
    return torch.stack(rows)


# ======================================================================================== detector
class Detector(nn.Module):
    """Cascade Mask R-CNN. In training normalised images (B, 3, S, S) and what to find -> losses."""

    def __init__(self, args: Args, num_classes: int, pretrained: bool = False, bf16: bool = False):
        super().__init__()
        if args.backbone.startswith("eva02"):
            self.backbone = EVA02(args, pretrained)
            self.neck = SimplePyramid(self.backbone.channels, args.width)
        else:
            self.backbone = ConvPyramid(args, pretrained)
            self.neck = nn.Identity()
        self.rpn = RPN(args)
        self.heads = CascadeHeads(args, num_classes)
        self.bf16 = bf16

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Five maps (B, W, h, w) float32 of strides 4, 8, 16, 32, 64."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            maps = self.neck(self.backbone(images))
        maps = [x.float() for x in maps]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]

    def forward(
        self, images: Tensor, objects: list[Objects], known: Tensor, draws: list
    ) -> dict[str, Tensor]:
        """The losses of RPN and heads. `draws` has a generator for each image; `known` (B, C) are
        the classes whose scores it teaches."""
        pyramid = self.pyramid(images)
        with torch.autocast(images.device.type, enabled=False):
            objectness, deltas = self.rpn(pyramid)
            proposals = self.rpn.propose(objectness, deltas)
            losses = self.rpn.losses(objectness, deltas, objects, draws)
            return losses | self.heads.losses(pyramid, proposals, objects, known, draws)

    def infer(
        self, images: Tensor, least: float = 0.0
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The pyramid, and of each image boxes (R, 4) and class scores (R, C), all those at least
        whose best score is `least` or more."""
        pyramid = self.pyramid(images)
        with torch.autocast(images.device.type, enabled=False):
            proposals = self.rpn.propose(*self.rpn(pyramid))
            with_area = places([sided(b) for b in proposals])
            proposals = [b[i] for b, i in zip(proposals, with_area, strict=True)]
            return pyramid, self.heads.scores(pyramid, proposals, least)

    # The number of boxes is another one each time: nothing for cuDNN to try out.
    @torch.backends.cudnn.flags(enabled=True, benchmark=False)
    def masks(self, pyramid: list[Tensor], image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask probabilities (n, 28, 28) of boxes of one image, each of its class."""
        maps = [x[image : image + 1] for x in pyramid]
        parts = [boxes.new_zeros(0, 28, 28)]
        with torch.autocast(boxes.device.type, enabled=False):
            for some, their_labels in zip(boxes.split(128), labels.split(128), strict=True):
                logits = self.heads.mask(roi_pool(maps, [some], 14), their_labels)
                parts.append(logits.sigmoid())
        return torch.cat(parts)


# ======================================================================================== the step
@dataclass
class State:
    """All that training changes (saved whole), and the forward pass that DDP wraps.

    A run trains up to three networks, one after the other, and a phase has the name of its network.
    In the phases `heldout` and `teacher` a network learns from labels alone. The second one gives
    the paper's teacher, which results.json calls `supervised`. In the phase `student` two networks
    start as copies of it: the student, and the average of the student's weights, which makes the
    pseudo labels. results.json calls them `student` and `teacher`. What is quoted is the average,
    so look for the student of Fig. 3 under `teacher`."""

    phase: str  # heldout, teacher, student: which network is trained
    student: Detector  # the network that learns, in each phase
    teacher: Detector | None  # its average, without gradients, in eval mode; in the last phase
    optimizer: torch.optim.Optimizer
    forward: Callable
    classes: Classes
    delta: Tensor | None = None  # (C,) of Eq. 5
    step: int = 0  # steps done in the whole run
    scored: int = 0  # the last step after which the networks were scored
    last: dict = field(default_factory=dict)  # network -> its newest score
    best: dict = field(default_factory=dict)  # network -> its best one

    def networks(self) -> dict[str, Detector]:
        """By the names that results.json gives them."""
        if self.phase == "student":
            return {"student": self.student, "teacher": self.teacher}
        return {"supervised": self.student}


def train_step(
    s: State, labeled: Batch, unlabeled: Batch | None, args: Args, world: World
) -> dict[str, Tensor]:
    """Sec. 3, one step: of a network that learns from smoothed labels alone, or of the student,
    which learns from corrected pseudo labels, too, and is followed by its teacher. It composes
    `labeled_objects` (Eq. 3), `pseudo_labels` (Eq. 5), `backward` and `ema_update`."""
    has_pseudo_labels = s.phase == "student"
    s.optimizer.zero_grad(set_to_none=True)
    table = s.classes.targets
    if has_pseudo_labels and args.student_labels == "onehot":  # DEPARTS[smooth-where]
        table = torch.eye(len(table), device=table.device)
    objects = [labeled_objects(target, table) for target in labeled.targets]  # Eq. 3
    log = backward(s, labeled.images, objects, 1.0, "l", args, world, last=not has_pseudo_labels)
    if has_pseudo_labels:
        objects, confidences = [], []
        for weak in unlabeled.weak.split(part_size(unlabeled.weak, args)):
            found, conf = pseudo_labels(s.teacher, weak, s.delta, args)  # Eq. 5
            objects += found
            confidences.append(conf)
        log |= pseudo_log(objects, torch.cat(confidences), world)
        weight = args.unsup_weight
        log |= backward(s, unlabeled.images, objects, weight, "u", args, world, last=True)
    if args.clip > 0:
        nn.utils.clip_grad_norm_(s.student.parameters(), args.clip, foreach=True)
    s.optimizer.step()
    if s.teacher is not None:
        ema_update(s.teacher, s.student, args.ema)
        s.teacher.heads.learned.copy_(s.student.heads.learned)
    return log


def labeled_objects(target: Target, table: Tensor) -> Objects:
    """The objects of a labeled image, whose classes become their rows of `table` (C, C), Eq. 3."""
    named = F.one_hot(target.labels, len(table)).bool()
    boxes = boxes_of(target.masks)
    return Objects(target.labels, boxes, target.masks, table[target.labels], named)


def backward(
    s: State,
    images: Tensor,
    objects: list[Objects],
    factor: float,
    name: str,
    args: Args,
    world: World,
    last: bool,
) -> dict[str, Tensor]:
    """Add the gradient of factor * loss on (B, 3, S, S) uint8 images, in --accumulate parts; the
    losses for the log, named after `name` (l: labeled, u: unlabeled images). Each of the two has a
    backward pass of its own, which gives the same gradient in half the memory. Processes exchange
    the sum of all gradients once a step, in the last part of the `last` pass."""
    size = part_size(images, args)
    total: dict[str, Tensor] = {}
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        draws = []
        for i in range(start, min(start + size, len(images))):
            place = world.rank * len(images) + i  # in the global batch
            key = (args.seed, "regions", s.phase, name, s.step, place)
            draws.append(generator(world.device, *key))
        known = known_classes(objects[part], s.classes.images, args.federated, draws)
        is_last_part = last and start + size >= len(images)
        keeps_gradient = world.size > 1 and not is_last_part
        with s.forward.no_sync() if keeps_gradient else contextlib.nullcontext():
            losses = s.forward(transforms.normalize(images[part]), objects[part], known, draws)
            share = len(objects[part]) / len(images)
            (factor * share * sum(losses.values())).backward()
        for key, value in losses.items():
            total[key] = total.get(key, 0) + share * value.detach()
    log = {f"{key}_{name}": value for key, value in total.items()}
    return {f"loss_{name}": sum(total.values()), **log}


def part_size(images: Tensor, args: Args) -> int:
    """How many images a process looks at together."""
    return math.ceil(len(images) / args.accumulate)


# SAME AS guided_distillation.py:generator
def generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A torch generator that depends on its key alone."""
    return torch.Generator(device).manual_seed(int(rng(*key).integers(2**63)))


# SAME AS gta_seg.py:ema_update
@torch.no_grad()
def ema_update(target: nn.Module, source: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, in place, for every parameter and for
    BatchNorm's running statistics; its integer counters stay. A decay of 0 copies."""
    targets = [*target.parameters(), *target.buffers()]
    sources = [*source.parameters(), *source.buffers()]
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - decay)


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The learning rate over its highest value at a step of a phase: in a share `warmup` of the
    steps a linear rise from a thousandth, then a cosine to zero, or a constant. DEPARTS[cosine]"""
    rise = min(0.001 + 0.999 * step / max(round(warmup * steps), 1), 1.0)
    if schedule == "constant":
        return rise
    return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def set_learning_rates(s: State, step: int, steps: int, args: Args) -> None:
    """The rates for a step of a phase."""
    factor = learning_rate_factor(step, steps, args.schedule, args.warmup)
    for group in s.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def adamw(net: Detector, args: Args, world: World) -> torch.optim.AdamW:
    """AdamW with the same weight decay on everything. Block i of n of EVA-02 learns layer_decay^(n
    - i) as fast, its embeddings layer_decay^(n + 1); a CNN's body layer_decay."""
    blocks = len(getattr(net.backbone, "blocks", ()))
    by_power: dict[int, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            by_power.setdefault(decay_power(name, blocks), []).append(parameter)
    groups = []
    for power, parameters in sorted(by_power.items()):
        rate = args.lr * args.layer_decay**power
        groups.append({"params": parameters, "lr": rate, "initial_lr": rate})
    return torch.optim.AdamW(
        groups,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
        fused=world.device.type == "cuda",
    )


def decay_power(name: str, blocks: int) -> int:
    """How often --layer-decay is taken for the parameter `name`, in a network of so many `blocks`,
    0 for a CNN."""
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        return blocks - int(block[1])
    if blocks > 0 and name.startswith("backbone."):
        return blocks + 1
    if name.startswith("backbone.cnn."):
        return 1
    return 0


# =========================================================================================== views
# SAME AS guided_distillation.py:repeat_factors
def repeat_factors(photos: list[Photo], num_classes: int, threshold: float) -> np.ndarray:
    """How often each picture comes in a pass, (len(photos),) float64, 1 or more: of its classes the
    largest r(c) = max(1, sqrt(threshold / f_c)), f_c the share of `photos` that hold class c (LVIS,
    arXiv 1908.03195)."""
    classes_of = [sorted(singles(photo)) for photo in photos]
    every = np.array([c for classes in classes_of for c in classes], np.int64)
    counts = np.bincount(every, minlength=num_classes)
    factors = np.maximum(1, np.sqrt(threshold * len(photos) / np.maximum(counts, 1)))
    return np.array([factors[classes].max(initial=1) for classes in classes_of])


def jittered_window(size: tuple[int, int], args: Args, g: np.random.Generator) -> Window:
    """The geometry of a view of a picture of `size` (height, width): flip; a scale u in --scale, so
    that the picture fits into u times the square; a random window, padded at the right and the
    bottom where the picture is smaller (large-scale jitter). DEPARTS[crop]"""
    flip = bool(g.random() < 0.5)
    u = g.uniform(*args.scale)
    down, across = g.random(2)
    factor = u * args.image_size / max(size)
    height, width = (max(round(n * factor), 1) for n in size)
    top = int(max(height - args.image_size, 0) * down)
    left = int(max(width - args.image_size, 0) * across)
    return Window(flip, (height, width), top, left, (args.image_size, args.image_size))


def strong_view(image: Tensor, g: np.random.Generator) -> Tensor:
    """The student's view of a weak one (3, H, W) uint8, in the same geometry, as in Guided
    Distillation: jitter of brightness, contrast, saturation and hue in any order, grey, blur."""
    if g.random() < 0.8:
        jitter = (
            (colour.brightness, 0.6, 1.4),
            (colour.contrast, 0.6, 1.4),
            (colour.saturation, 0.6, 1.4),
            (colour.hue, -0.1, 0.1),
        )
        for i in g.permutation(4):
            change, low, high = jitter[i]
            image = change(image, g.uniform(low, high))
    if g.random() < 0.2:
        image = colour.grey(image)
    if g.random() < 0.5:
        image = colour.blur(image, g.uniform(0.1, 2.0))
    return image


def labeled_view(
    args: Args, data: Instances, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, None, Target]:
    """A labeled picture (3, H, W) uint8 and the masks that are left of its objects."""
    window = jittered_window(tuple(image.shape[-2:]), args, g)
    labels, masks, _ = masks_of(photo, data, window, empty=False)
    return cut_out(image, window, FILL), None, Target(labels, masks)


def unlabeled_view(
    args: Args, image: Tensor, photo: Photo, g: np.random.Generator
) -> tuple[Tensor, Tensor, None]:
    """The student's strong view of an unlabeled picture, and its teacher's weak one."""
    weak = cut_out(image, jittered_window(tuple(image.shape[-2:]), args, g), FILL)
    return strong_view(weak, g), weak, None


def test_view(image: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """(3, H, W) uint8 -> (1, 3, S, S) normalised, the longer side S pixels, zeros at the right and
    the bottom; and the factors (4,) of a box from its pixels to those."""
    height, width = image.shape[-2:]
    factor = args.image_size / max(height, width)
    new_height, new_width = (max(round(n * factor), 1) for n in (height, width))
    x = image[None].float()
    if (new_height, new_width) != (height, width):
        x = F.interpolate(x, size=(new_height, new_width), mode="bilinear", antialias=True)
    x = transforms.normalize(x)
    factors = x.new_tensor([new_width / width, new_height / height] * 2)
    return F.pad(x, (0, args.image_size - new_width, 0, args.image_size - new_height)), factors


# ====================================================================================== evaluation
PREVIEWS = 6  # images in a preview


class Regions(NamedTuple):
    """What a network makes of one image before anything is suppressed: R regions, in pixels of the
    padded square. A box of the image times `factors` (4,) is one of the square."""

    factors: Tensor
    pyramid: list[Tensor]
    boxes: Tensor  # (R, 4), within the image
    probs: Tensor  # (R, C)


class Detections(NamedTuple):
    """What is found in one image, best first, in its own pixels."""

    labels: Tensor  # (n,)
    scores: Tensor  # (n,)
    masks: Tensor  # (n, H, W) bool
    boxes: Tensor  # (n, 4)


class Evaluation(NamedTuple):
    """What `evaluate` gives. The keys of its dictionaries are the names of the networks."""

    scores: dict[str, dict]  # a record of results.json
    results: dict[str, list[dict]]  # entries of a COCO results file; complete in the main process
    reliability: dict[str, dict]  # Fig. 3; in the main process alone
    # preview: in each row an image, its labels, what each network found
    rows: list[list[np.ndarray]]


@torch.no_grad()
def evaluate(
    networks: dict[str, Detector], data: Instances, groups: list[str], args: Args, world: World
) -> Evaluation:
    """Sec. 4.1: mask and box AP of each network in percent, also of rare, common and frequent
    classes, and its calibration error, on the scored images of `data`."""
    results: dict[str, list[dict]] = {name: [] for name in networks}
    confident: dict[str, list[dict]] = {name: [] for name in networks}
    rows: list[list[np.ndarray]] = []
    for index, image in instances.score_loader(data.val, world, args.workers):
        photo = data.val[index]
        known = annotated_classes(photo, data)
        shown = len(rows) < PREVIEWS
        if shown:
            rows.append([image.permute(1, 2, 0).numpy(), draw_labels(image, photo, data)])
        for name, net in networks.items():
            [regions] = find_regions(net.eval(), [image], args)
            found = detect(net, image, regions, args, known)
            results[name] += mask_ap.results_of(photo.id, data.ids, *found)
            confident[name] += confident_results(
                photo.id, data.ids, regions.boxes, regions.probs, args.threshold, regions.factors
            )
            if shown:
                rows[-1].append(plots.draw_objects(image, *(x.cpu() for x in found[:3])))
    scores, reliability = {}, {}
    truth = mask_ap.truth_of(data) if world.main else None
    for name in networks:
        results[name] = mask_ap.gather(world, results[name])
        confident[name] = mask_ap.gather(world, confident[name])
        if world.main:
            scores[name], reliability[name] = score_results(
                results[name], confident[name], truth, data, groups, args
            )
    scores = mask_ap.from_main(world, scores)
    if any(record["ap"] is None for record in scores.values()):
        raise UserError(
            f"--val {args.val} of {data.root} has no object to score on; name another --val."
        )
    return Evaluation(scores, results, reliability, rows)


def annotated_classes(photo: Photo, data: Instances) -> Tensor | None:
    """The classes (C,) bool of which LVIS says whether the picture holds them; None: all."""
    if not data.lvis:
        return None
    known = torch.zeros(len(data.classes), dtype=torch.bool)
    known[[thing.category for thing in photo.things] + list(photo.negative)] = True
    return known


def draw_labels(image: Tensor, photo: Photo, data: Instances) -> np.ndarray:
    """The picture with its labeled objects."""
    labels, masks, _ = masks_of(photo, data)
    return plots.draw_objects(image, labels, torch.ones(len(labels)), masks.bool())


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def find_regions(net: Detector, images: list[Tensor], args: Args) -> list[Regions]:
    """The regions and scores of `net` in images (3, H, W) uint8 of any sizes."""
    device = next(net.parameters()).device
    views = [test_view(image.to(device), args) for image in images]
    x = torch.cat([view for view, _ in views])
    if args.compile:
        with torch.compiler.set_stance("force_eager"):
            pyramid, found = net.infer(x)
    else:
        pyramid, found = net.infer(x)
    regions = []
    for b, (image, (_, factors), (boxes, probs)) in enumerate(
        zip(images, views, found, strict=True)
    ):
        ends = factors * factors.new_tensor([image.shape[2], image.shape[1]] * 2)
        maps = [level[b : b + 1] for level in pyramid]
        regions.append(Regions(factors, maps, torch.minimum(boxes, ends), probs))
    return regions


@torch.no_grad()
def detect(
    net: Detector, image: Tensor, regions: Regions, args: Args, known: Tensor | None = None
) -> Detections:
    """The best --detections of an image (3, H, W) uint8, suppressed class by class from an overlap
    of 0.5. Of these, the ones whose class is not `known` (C,) are then left out, and no mask is
    made for them: LVIS counts them neither as right nor as wrong."""
    rows, labels = (regions.probs > FRINGE).nonzero().unbind(1)
    scores = regions.probs[rows, labels]
    keep, scores = suppress(regions.boxes[rows], scores, labels, 0.5, args.soft_nms)
    best = scores.argsort(descending=True, stable=True)[: args.detections]
    keep, scores = keep[best], scores[best]
    if known is not None:
        use = known.to(labels.device)[labels[keep]]
        keep, scores = keep[use], scores[use]
    boxes, labels, size = regions.boxes[rows[keep]], labels[keep], tuple(image.shape[1:])
    probs = net.masks(regions.pyramid, 0, boxes, labels)
    if args.maskness:
        inside = probs > 0.5
        scores = scores * (probs * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    boxes = boxes / regions.factors
    masks = [torch.zeros(0, *size, dtype=torch.bool, device=boxes.device)]
    for some, their_boxes in zip(probs.split(16), boxes.split(16), strict=True):
        masks.append(paste_masks(some, their_boxes, size) > 0.5)
    return Detections(labels, scores, torch.cat(masks), boxes)


def score_results(
    results: list[dict],
    confident: list[dict],
    truth: dict,
    data: Instances,
    groups: list[str],
    args: Args,
) -> tuple[dict, dict]:
    """A network's record of results.json and its reliability diagram (Fig. 3), from its detections
    and from those that `confident_results` counts."""
    average_precision = judge.lvis_ap if data.lvis else judge.coco_ap
    masks = average_precision(truth, results, "segm", args.detections, groups)
    boxes = average_precision(truth, results, "bbox", args.detections, groups)
    samples = judge.samples(truth, confident, "bbox", federated=data.lvis)
    reliability = metrics.reliability(samples, args.bins, groups)
    record = {k: v for k, v in masks.items() if k != "stats"}
    record["ece"] = reliability["ece"]
    record |= {f"box_{k}": boxes[k] for k in ("ap", "apr", "apc", "apf")}
    return record, reliability


# ======================================================================================= retrieval
# The settings that the list of retrieved images follows from.
RETRIEVED_OF = (
    *PROTOTYPES_OF, "pool", "neighbours", "retrieval_model", "retrieval_weights", "index",
    "duplicate", "frequency", "val",
)  # fmt: skip


def retrieve(
    args: Args, data: Instances, labeled: list[Photo], groups: list[str], world: World
) -> None:
    """Sec. 4.1: the --neighbours images of the pool nearest to each labeled object of a rare class,
    without duplicates and without what is labeled or scored: retrieved.txt, a list for --unlabeled,
    and beside it a report of what each class found."""
    from data import retrieval

    out = Path(args.out)
    distributed.seed_torch(args.seed, "retrieval")
    of_retrieval = {"backbone": args.retrieval_model, "weights": args.retrieval_weights}
    net = embedder(replace(args, **of_retrieval)).to(world.device)
    rare = {c for c, group in enumerate(groups) if group == "r"}
    chosen = choose_objects(labeled, rare, most=10**9, seed=args.split_seed)  # all of them
    if not chosen:
        raise UserError(
            "--pool: no labeled object is of a rare class, to search with; give another "
            "--frequency."
        )
    queries = embed_crops(net, chosen, data, args.embed_size, world, args.workers)
    pool = [photo.image for photo in instances.unlabeled_photos(args.pool, data, "--pool")]
    known = [photo.image for photo in data.train + data.val]
    embed = partial(
        retrieval.embed,
        network=net,
        key=f"{args.retrieval_model} {fingerprint(net.state_dict())}",
        size=args.embed_size,
        world=world,
        workers=args.workers,
    )
    pool_store = embed(pool, folder=out / "embedded" / "pool")
    known_store = embed(known, folder=out / "embedded" / "known")
    some_left = False
    if world.main:
        most, device = args.duplicate, world.device
        vectors = F.normalize(queries.embeddings, dim=1).numpy()
        cosine, rows = retrieval.search(
            vectors, pool_store, args.neighbours, args.index, device=device
        )
        different = np.unique(rows[rows >= 0])
        stands_for = retrieval.duplicates(pool_store, different, most, device=device)
        kept = different[stands_for == different]  # one of each group of duplicates
        is_known = retrieval.known(pool_store, kept, known_store, most, device=device)
        kept = kept[~is_known]
        print(retrieval.histogram(pool_store, different, most, device=device))
        some_left = len(kept) > 0
        if some_left:
            asked = retrieval.Queries(queries.labels.numpy(), queries.examples)
            found = retrieval.Found(cosine, rows, different, kept)
            key = made_of(args, RETRIEVED_OF, data.classes)
            retrieval.report(out, pool_store, asked, found, data.classes, key)
    if not mask_ap.from_main(world, some_left):
        raise UserError(
            f"--pool {args.pool}: all neighbours are duplicates, or labeled or scored themselves; "
            "take another pool, or a higher --duplicate."
        )


def is_retrieved(args: Args, data: Instances, world: World) -> bool:
    """Whether the run folder holds the list of images that these settings find."""
    from data import retrieval

    key = made_of(args, RETRIEVED_OF, data.classes)
    return mask_ap.from_main(world, retrieval.done(Path(args.out), key))


# ============================================================================= phases and training
class Phase(NamedTuple):
    """The training of one network, in steps of the whole run."""

    name: str  # heldout, teacher, student
    begin: int
    end: int


def plan(args: Args) -> list[Phase]:
    """Sec. 4.1: the networks that a run trains, in order. `heldout` learns from 85 % of the labels,
    so that Eq. 4 can be measured on the others; `teacher` from all. With --tune the teacher itself
    learns from 85 %. DEPARTS[delta]"""
    names = []
    if args.stage == "all":
        if measures_delta(args) and not args.tune:
            names.append("heldout")
        if not args.teacher:
            names.append("teacher")
        names.append("student")
    elif args.stage == "calibrate" and not args.teacher:
        names.append("teacher" if args.tune else "heldout")
    elif args.stage in ("teacher", "student"):
        names.append(args.stage)
    steps = {"heldout": args.teacher_steps, "teacher": args.teacher_steps, "student": args.steps}
    phases, begin = [], 0
    for name in names:
        phases.append(Phase(name, begin, begin + steps[name]))
        begin += steps[name]
    return phases


def measures_delta(args: Args) -> bool:
    """Whether the run measures Eq. 4 on labels that are held out."""
    if args.stage == "calibrate":
        return True
    corrects = args.stage in ("student", "all") and args.pseudo == "calibrated"
    return corrects and not args.calibration


class Pictures(NamedTuple):
    """Which networks learn from which labeled pictures."""

    labeled: list[Photo]  # teacher and student learn from these
    learned: list[Photo]  # the network `heldout` learns from these
    held: list[Photo]  # Eq. 4 is measured on these; with --tune, networks are scored on them

    def of(self, phase: Phase) -> list[Photo]:
        return self.learned if phase.name == "heldout" else self.labeled


def divide(args: Args, labeled: list[Photo]) -> Pictures:
    """Sec. 4.1: 85 % and 15 % of the labeled pictures, where the settings need two parts."""
    if not args.tune and not measures_delta(args):
        return Pictures(labeled, labeled, [])
    learned, held = hold_out(labeled, args.holdout, args.split_seed)
    return Pictures(learned if args.tune else labeled, learned, held)


def hold_out(photos: list[Photo], share: float, seed: int) -> tuple[list[Photo], list[Photo]]:
    """The pictures to learn from and those held out, both in the order given. round(share * n) are
    held out, but one at least and one at most not; which ones, depends on the seed and the names
    alone. DEPARTS[holdout]"""
    if len(photos) < 2:
        raise UserError(
            f"Of {len(photos)} labeled images none can be held out to tune on; take a larger "
            f"--split, of two images at least."
        )
    number = min(max(round(share * len(photos)), 1), len(photos) - 1)
    by_name = sorted(range(len(photos)), key=lambda i: photos[i].name)
    order = rng(seed, "hold out").permutation(len(photos))
    chosen = {by_name[i] for i in order[:number]}
    learned = [photo for i, photo in enumerate(photos) if i not in chosen]
    held = [photo for i, photo in enumerate(photos) if i in chosen]
    return learned, held


class Material(NamedTuple):
    """What the networks of a run learn from, and what they are scored on."""

    data: Instances
    scored: Instances  # whose `val` is scored: `data`, or with --tune its held-out part
    chosen: instances.Chosen  # labeled and unlabeled pictures, and a line about them
    photos: Pictures  # the labeled ones by who learns from them
    similarity: Tensor  # S (C, C) of Eq. 2
    classes: Classes  # what the labels of teacher and student say


def train(args: Args) -> dict:
    """One run, from the start or from its checkpoint, to results.json, whose contents are
    returned."""
    cli.check_ranges(args)
    args = replace(args, out=str(runs.default_out(SCRIPT, args)))
    check(args, distributed.launched())
    checkpoints.need_weights(args.weights)
    phases = plan(args)
    trains_student = any(phase.name == "student" for phase in phases)
    data = find_data(args)
    chosen = choose(args, data, args.unlabeled, needed=trains_student and not args.pool)
    if args.check:
        return look_at_all(data, chosen.labeled, chosen.unlabeled, data.val)
    looked = first_look(data, chosen.labeled, data.val)
    photos = divide(args, chosen.labeled)
    out = Path(args.out)
    resuming = runs.open_run(out, SCRIPT, args, args.resume, distributed.launched().main)
    world = distributed.start(args.device)
    distributed.warn_of_slow_bf16(args.precision, world)
    state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT, Saved) if resuming else None
    if state is None:
        check_files(args, data, world)
    material = prepare(args, data, chosen, photos, trains_student, world)

    step, scored_before = 0, 0
    if state is not None:
        step, scored_before = state["step"], state["scored"]
    # A phase whose last step is done is still left: its score may be due.
    left = [phase for phase in phases if step <= phase.end]
    # The first network is made before the run folder is written to, for its weights may not fit.
    s = start_phase(left[0], material, state, args, world) if left else None
    facts = {
        "dataset": args.dataset,
        "split": args.split,
        "split_seed": args.split_seed,
        "seed": args.seed,
        "classes": data.classes,
        "images": material.chosen.text,
        "fingerprint": material.chosen.fingerprint,
        "held_out": [photo.name for photo in photos.held],
    }
    ends = [phase.end for phase in phases]
    run = runs.Run(out, SCRIPT, args, world, step, state, facts, ends)
    networks = ", ".join(f"{phase.name} ({phase.end - phase.begin} steps)" for phase in phases)
    scored_on = f"scored on {len(material.scored.val)}"
    run.say(f"{material.chosen.text}; {scored_on}; networks: {networks or 'none'}", *looked)

    for phase in left:
        if phase is not left[0]:
            s = replace(start_phase(phase, material, state, args, world), last=s.last, best=s.best)
        train_phase(s, phase, material, args, world, run)
        world.barrier()  # the main process has written the checkpoint
    if left and s.scored == s.step and s.scored > scored_before:
        # last.pt was saved before the last score; now a resumed run need not repeat it
        run.save("last.pt", snapshot(s, args, data))
    if args.stage == "calibrate":
        delta_of(args, data, photos.held, material.classes.groups, world)
    last, best = (s.last, s.best) if left else ({}, {})
    results = finish(run, last, best, material, args, world)
    world.barrier()  # nobody leaves the group, to join the next run's, before all is written
    return results


def prepare(
    args: Args,
    data: Instances,
    chosen: instances.Chosen,
    photos: Pictures,
    trains_student: bool,
    world: World,
) -> Material:
    """What comes before the first network: the prototypes' similarities, the labels of the
    classes, and with --pool the unlabeled pictures, which are retrieved here."""
    similarity = class_similarities(args, data, photos.labeled, world)
    classes = label_statistics(args, data, photos.labeled, similarity, world)
    if args.stage == "retrieve" or (trains_student and args.pool):
        if not is_retrieved(args, data, world):
            retrieve(args, data, photos.labeled, classes.groups, world)
        # The same labeled pictures; the unlabeled ones are those that were retrieved.
        retrieved = str(Path(args.out) / "retrieved.txt")
        chosen = choose(args, data, retrieved, needed=trains_student)
    scored = instances.scored_on(data, photos.held) if args.tune else data
    return Material(data, scored, chosen, photos, similarity, classes)


def start_phase(
    phase: Phase, material: Material, state: dict | None, args: Args, world: World
) -> State:
    """A phase from its beginning; or from the checkpoint `state`, where that is of this phase."""
    data, photos = material.data, material.photos
    classes = label_statistics(args, data, photos.of(phase), material.similarity, world)
    if state is not None and state["phase"] == phase.name:
        return begin(phase, args, data, classes, None, world, state)
    delta = None
    if phase.name == "student" and args.pseudo == "calibrated":
        delta = delta_of(args, data, photos.held, material.classes.groups, world)
    return begin(phase, args, data, classes, delta, world, None)


def train_phase(
    s: State, phase: Phase, material: Material, args: Args, world: World, run: runs.Run
) -> None:
    """Train the network of a phase from where `s` stands to the end."""
    data, labeled = material.data, material.photos.of(phase)
    if phase.name != "heldout" and s.scored < s.step and run.score_is_due(s.step):
        score_networks(s, material.scored, args, world, run)  # stopped before this score
    is_student = phase.name == "student"
    stream = partial(
        loading.stream,
        batch_size=args.batch_size if is_student else args.teacher_batch_size,
        start=s.step,
        stop=phase.end,
        world=world,
        workers=args.workers,
        collate=instances.collate,
    )
    augment = partial(labeled_view, args, data)
    views = instances.Views(labeled, augment, args.seed, f"{phase.name} labeled")
    factors = repeat_factors(labeled, len(data.classes), args.repeat)
    labeled_batches = stream(views, factors=factors)
    unlabeled_batches = itertools.repeat(None)
    if is_student:
        augment = partial(unlabeled_view, args)
        views = instances.Views(material.chosen.unlabeled, augment, args.seed, "unlabeled")
        unlabeled_batches = stream(views)

    for step in run.steps(s.step, phase.end):
        set_learning_rates(s, step - phase.begin, phase.end - phase.begin, args)
        labeled_batch = instances.to_device(next(labeled_batches), world.device)
        unlabeled_batch = instances.to_device(next(unlabeled_batches), world.device)
        distributed.seed_torch(args.seed, "step", step, world.rank)  # what drop path draws from
        values = train_step(s, labeled_batch, unlabeled_batch, args, world)
        s.step = step + 1
        run.tally(step, values, labeled_batch, unlabeled_batch)
        if run.log_is_due(s.step):
            run.log(s.step, lr=s.optimizer.param_groups[0]["lr"])
        if s.step == phase.end and not is_student:
            run.save(f"{phase.name}.pt", snapshot(s, args, data, optimizer=False))
        if run.save_is_due(s.step):
            run.save("last.pt", snapshot(s, args, data))  # before scoring, which may fail
        run.leave_if_asked(s.step)
        if phase.name != "heldout" and run.score_is_due(s.step):
            score_networks(s, material.scored, args, world, run)


def begin(
    phase: Phase,
    args: Args,
    data: Instances,
    classes: Classes,
    delta: Tensor | None,
    world: World,
    state: dict | None,
) -> State:
    """The networks of a phase: at its beginning, where the student and the average of it both have
    the trained teacher's weights (DEPARTS[student-init]); or as the checkpoint `state` has them,
    which needs no other file."""
    num_classes = len(data.classes)
    has_images = classes.images > 0
    if phase.name == "student":
        if state is None:
            path = Path(args.teacher) if args.teacher else Path(args.out) / "teacher.pt"
            teacher = trained(args, data, path, world)
        else:
            teacher = network(args, num_classes, world, "teacher", fresh=False).eval()
        teacher.requires_grad_(False)
        net = network(args, num_classes, world, phase.name, fresh=False)
        net.load_state_dict(teacher.state_dict())
        net.heads.learned.logical_or_(has_images)
    else:
        teacher = None
        net = network(args, num_classes, world, phase.name, fresh=state is None)
        net.heads.learned.copy_(has_images)
    if args.compile:
        net.backbone.compile()
    s = State(
        phase=phase.name,
        student=net,
        teacher=teacher,
        optimizer=None,  # made below
        forward=None,
        classes=classes,
        delta=delta,
        step=phase.begin,
        scored=phase.begin,
    )
    s.optimizer = adamw(net, args, world)
    if state is not None:
        with checkpoints.fitting(state["path"]):
            restore(s, state, world)
    s.forward = distributed.parallel(net.train(), world)
    return s


def snapshot(s: State, args: Args, data: Instances, optimizer: bool = True) -> dict:
    """What a checkpoint holds. best.pt, heldout.pt and teacher.pt have no `optimizer`: they are to
    score, predict and teach with."""
    state = {
        "settings": json.loads(json.dumps(vars(args))),
        "classes": data.classes,
        "ids": data.ids,
        "phase": s.phase,
        "step": s.step,
        "scored": s.scored,
        "last": s.last,
        "best": s.best,
        "delta": s.delta,
        "groups": s.classes.groups,
        "networks": {name: net.state_dict() for name, net in s.networks().items()},
    }
    if optimizer:
        state["optimizer"] = s.optimizer.state_dict()
    return state


class Saved(checkpoints.Trained, kw_only=True):
    """What `snapshot` gives."""

    scored: checkpoints.Count
    ids: list[int | str]
    phase: Literal["heldout", "teacher", "student"]
    groups: list[str]
    delta: Tensor | None


def restore(s: State, state: dict, world: World) -> None:
    """A phase as `snapshot` has left it; what follows from the data is there already."""
    s.step, s.scored = state["step"], state["scored"]
    s.last, s.best = state["last"], state["best"]
    for name, net in s.networks().items():
        checkpoints.load_exact(net, state["networks"][name], state["path"])
    s.optimizer.load_state_dict(state["optimizer"])
    if state["delta"] is not None:
        s.delta = state["delta"].to(world.device)


def score_networks(s: State, data: Instances, args: Args, world: World, run: runs.Run) -> None:
    """Score the networks, write their results and pictures, note the best, and keep its weights in
    best.pt: of the supervised network, and of the teacher once there is a student."""
    networks = s.networks()
    found = evaluate(networks, data, s.classes.groups, args, world)
    s.student.train()
    s.scored = s.step
    values = {}
    for name, record in found.scores.items():
        s.last[name] = {"step": s.step, **record}
        if name not in s.best or record["ap"] > s.best[name]["ap"]:
            s.best[name] = s.last[name]
        values |= {f"{key}_{name}": record[key] for key in ("ap", "apr", "ece")}
    run.write(s.step, **values)
    if world.main:
        titles = ["image", "label", *networks]
        plots.strip(found.rows, titles, run.out / "previews" / f"{s.step:07d}.png", height=192)
        plots.diagram(found.reliability, run.out / f"reliability_{s.phase}.png")
        for name in networks:
            write_text(run.out / f"{name}.segm.json", json.dumps(found.results[name]))
            diagram = json.dumps(found.reliability[name], indent=1)
            write_text(run.out / f"{name}.reliability.json", diagram)
    headline = "teacher" if s.phase == "student" else "supervised"
    if s.best[headline] is s.last[headline]:  # this evaluation is its best one
        run.save("best.pt", snapshot(s, args, data, optimizer=False))


def delta_of(
    args: Args, data: Instances, held: list[Photo], groups: list[str], world: World
) -> Tensor:
    """Delta of Eq. 5 (C,): from --calibration, or measured once on the held-out labels and written
    to the run folder. DEPARTS[once]"""
    if args.calibration:
        return read_delta(Path(args.calibration), data.classes, world)
    path = Path(args.out) / "calibration.json"
    if mask_ap.from_main(world, path.exists()):
        try:
            return read_delta(path, data.classes, world)
        except UserError as error:
            print(f"{error} It is measured anew.", flush=True)
    if args.teacher and (args.tune or args.stage == "calibrate"):
        measured = Path(args.teacher)
    else:
        measured = Path(args.out) / ("teacher.pt" if args.tune else "heldout.pt")
    net = trained(args, data, measured, world)
    record = calibrate(net, instances.scored_on(data, held), groups, args, world)
    if world.main:
        plots.diagram({measured.stem: record["reliability"]}, path.with_suffix(".png"))
        write_text(path, json.dumps(record, indent=1))
        ece = record["reliability"]["ece"]
        error = "none" if ece is None else f"{ece:.3f}"
        number = sum(record["samples"])
        print(f"calibration: {number} samples on {len(held)} held-out images, ECE {error}; {path}")
    return delta_in(record, data.classes, world)


class Calibration(TypedDict):
    """What is used of calibration.json."""

    classes: list[str]
    delta: list[float]


def read_delta(path: Path, classes: list[str], world: World) -> Tensor:
    """Delta (C,) of a file that a calibrate stage wrote."""
    cure = "a calibrate stage writes one"
    try:
        record = read_record(path, Calibration, cure)
        return delta_in(record, classes, world)
    except UserError as error:
        raise UserError(f"--calibration {error}") from None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"--calibration {path} is of other classes ({one_line(error)}); {cure}."
        ) from None


def delta_in(record: dict, classes: list[str], world: World) -> Tensor:
    """Delta (C,) of what `calibrate` gives, whose classes may be in another order."""
    values = np.asarray_chkfinite(record["delta"]).tolist()
    delta = dict(zip(record["classes"], values, strict=True))
    return torch.tensor([delta[name] for name in classes], device=world.device)


def finish(
    run: runs.Run, last: dict, best: dict, material: Material, args: Args, world: World
) -> dict:
    """Write results.json with the scores of all networks, `last` and `best` -> what it holds. A run
    that has scored none has no such file."""
    facts = {
        "stage": args.stage,
        "val": "held out" if args.tune else args.val,
        "split_fingerprint": material.chosen.fingerprint,
    }
    if world.main and "supervised" in last and "teacher" in last:
        draw_per_class(last, material.classes, material.data, run.out / "per_class.png")
    if not last:
        run.close()
        run.say(f"done; in {run.out}")
        return facts
    scores = {name: {"last": last[name], "best": best[name]} for name in last}
    headline = "teacher" if "teacher" in last else "supervised"
    return run.finish(scores, facts, headline, "ap")


def draw_per_class(last: dict, classes: Classes, data: Instances, path: Path) -> None:
    """Fig. 4: the AP of each class over its number of labeled objects, of the supervised teacher
    and of the average of the student."""
    before, after = last["supervised"]["per_class"], last["teacher"]["per_class"]
    groups = dict(zip(data.classes, classes.groups, strict=True))
    counts = dict(zip(data.classes, classes.instances.tolist(), strict=True))
    plots.scatter(before, after, groups, counts, path, ("supervised", "teacher"))


def grid(args: Args) -> dict:
    """Sec. 4.1: the small search on labels held out, one resumable run after the other. A table is
    printed; grid.json holds all runs and the best by AP, which is returned."""
    if args.stage != "all":
        raise UserError("--grid chooses the stage itself; leave --stage out.")
    values = GRIDS[args.grid]
    main = distributed.launched().main
    out = runs.default_out(SCRIPT, args)
    network_name = "supervised" if args.grid == "teacher" else "teacher"
    rows = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        folder = out / "_".join(f"{name}-{value:g}" for name, value in chosen.items())
        fixed = {"grid": "no", "tune": True, "stage": args.grid, "resume": True}
        results = train(replace(args, out=str(folder), **fixed, **chosen))
        distributed.stop()
        record = results[network_name]["last"]
        rows.append({**chosen, "ap": record["ap"], "apr": record["apr"], "ece": record["ece"]})
        if main:
            said = [f"{k} {'-' if v is None else f'{v:.3g}'}" for k, v in rows[-1].items()]
            print(*said, flush=True)
    best = max(rows, key=lambda row: row["ap"])
    if main:
        write_text(out / "grid.json", json.dumps({"runs": rows, "best": best}, indent=1))
    return best


# ======================================================================================== plumbing
def check(args: Args, world: World) -> None:
    """Refuse, before any work, what cannot run and what would spoil a comparison."""
    transformer = args.backbone.startswith("eva02")
    for phase in plan(args):
        check_batch(phase.name, args, world)
    if args.scale[0] > args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: give the smaller number first.")
    if transformer and args.image_size % (16 * args.window):
        raise UserError(
            f"--image-size {args.image_size} does not divide into windows of {args.window} x "
            f"{args.window} tokens of 16 pixels; give a multiple, or another --window."
        )
    if args.image_size % 32:
        raise UserError(f"--image-size {args.image_size}: give a multiple of 32.")
    if args.accumulate > 1 and args.norm == "live" and not transformer:
        raise UserError(
            "--accumulate would change the batch statistics of --norm live; give --norm frozen "
            "with it."
        )
    if args.pool and args.unlabeled:
        raise UserError("--pool finds unlabeled images, and --unlabeled names them; give one.")
    if args.stage == "retrieve" and not args.pool:
        raise UserError("--stage retrieve searches a --pool: name a folder or list.")
    if args.stage == "student":
        check_student(args)


def check_files(args: Args, data: Instances, world: World) -> None:
    """Read the files that are needed late in a run, before anything is trained."""
    if args.teacher:
        trained(args, data, Path(args.teacher), world)
    if args.calibration:
        read_delta(Path(args.calibration), data.classes, world)


def check_batch(phase: str, args: Args, world: World) -> None:
    """Whether the batch of a phase divides over processes and parts."""
    size = args.batch_size if phase == "student" else args.teacher_batch_size
    live = args.norm == "live" and not args.backbone.startswith("eva02")
    share = world.share(size) if live else size // world.size
    if size % world.size or args.accumulate > share:
        raise UserError(
            f"The batch of the {phase} phase, {size}, does not divide into {world.size} processes "
            f"of --accumulate {args.accumulate} parts; give a multiple."
        )


def check_student(args: Args) -> None:
    """What a student needs that is trained alone."""
    if not args.teacher:
        raise UserError("--stage student needs a trained teacher: name one with --teacher.")
    if args.pseudo == "calibrated" and not args.calibration and not args.tune:
        raise UserError(
            "--stage student --pseudo calibrated needs --calibration FILE, which a calibrate stage "
            "writes; or take --stage all."
        )


def find_data(args: Args, classes: list[str] | None = None) -> Instances:
    """The data set; of `shapes` the long-tailed one, in LVIS's layout."""
    root, kind = Path(args.root), args.dataset
    if args.dataset == "shapes":
        from data import shapes

        root, kind = shapes.make_tail(root / "tail"), "lvis"
    return instances.find(
        kind, root, args.train_json, args.val_json, args.images, args.val, classes
    )


def choose(args: Args, data: Instances, unlabeled: str, needed: bool) -> instances.Chosen:
    """The labeled pictures, drawn without regard to classes, and the unlabeled ones."""
    return instances.choose(
        data,
        args.split,
        args.split_seed,
        unlabeled,
        pool="remaining",
        needed=needed,
        balanced=False,
    )


def made_of(args: Args, names: tuple[str, ...], classes: list[str]) -> str:
    """A hash of the settings, by their `names`, and of the classes that a file was made with. A
    file with another key is made again."""
    values = [str(getattr(args, name)) for name in names]
    return hashlib.sha256(json.dumps([values, classes]).encode()).hexdigest()[:16]


def create(name: str, weights: str, **options: Any) -> nn.Module:
    """A network of timm without a classifier; `weights`: imagenet (what the name's tag says), none,
    or a file in any layout that timm reads. UserError when there is none of this name, or its
    weights cannot be had."""
    import timm

    if weights not in ("imagenet", "none"):
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        return timm.create_model(name, pretrained=weights != "none", num_classes=0, **options)
    except Exception as error:  # noqa: BLE001 (hub, network, unknown name)
        raise UserError(
            f"timm cannot give --backbone {name} with --weights {weights} ({one_line(error)}); "
            f"correct the name, or, without a network, give --weights FILE or none."
        ) from None


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


def embedder(args: Args) -> Embedder:
    """What embeds objects: --backbone with the weights that --weights names, in eval mode."""
    net = Embedder(args.backbone, args.embed_size, pretrained=args.weights == "imagenet")
    if args.weights not in ("imagenet", "none"):
        if args.backbone.startswith(ONE_SIZE):  # timm reads EVA-02's own files
            net.body = create(args.backbone, args.weights, img_size=args.embed_size)
        else:
            checkpoints.load_matching(net.body, backbone_weights(args), args.weights)
    return net.requires_grad_(False).eval()


def network(args: Args, num_classes: int, world: World, name: str, fresh: bool = True) -> Detector:
    """A detector on the device; if `fresh`, with its starting weights, and with lines on those that
    did not load."""
    distributed.seed_torch(args.seed, name)
    pretrained = fresh and args.weights == "imagenet"
    net = Detector(args, num_classes, pretrained, world.bf16(args.precision))
    notes = []
    if fresh and args.weights not in ("imagenet", "none"):
        if args.backbone.startswith("eva02"):
            net.backbone.take(create(args.backbone, args.weights, **eva_options(args)))
        else:
            weights = backbone_weights(args)
            body = backbones.bare(net.backbone.cnn.body)
            notes = checkpoints.load_matching(body, weights, args.weights)
    if fresh and args.init_detector:
        notes = load_detector(net, Path(args.init_detector))
    if world.main:
        for note in notes:
            print(f"weights {note}", flush=True)
    if args.norm == "live":
        net = norms.over_processes(net, world)
    return net.to(world.device)


def trained(args: Args, data: Instances, path: Path, world: World) -> Detector:
    """The network of a checkpoint, in eval mode: the average of a student, or a supervised one."""
    state = checkpoints.load_checkpoint(path, SCRIPT, checkpoints.Trained)
    net = network(args, len(data.classes), world, "teacher", fresh=False)
    if state["classes"] != data.classes:
        raise UserError(
            f"{path} knows other classes than {data.root} has; give a network of these classes."
        )
    networks = state["networks"]
    weights = networks["teacher"] if "teacher" in networks else networks["supervised"]
    checkpoints.load_exact(net, weights, str(path))
    return net.eval()


def load(path: str, args: Args) -> tuple[dict[str, Detector], dict, World]:
    """The networks of a checkpoint, built from the settings it holds; its contents; the world."""
    state = checkpoints.load_checkpoint(Path(path), SCRIPT, Saved)
    world = distributed.start(args.device)
    networks = {}
    for name, weights in state["networks"].items():
        networks[name] = network(args, len(state["classes"]), world, name, fresh=False).eval()
        checkpoints.load_exact(networks[name], weights, path)
    return networks, state, world


def score_checkpoint(args: Args) -> dict:
    """--eval: score a checkpoint's networks; <checkpoint>.results.json, and
    <checkpoint>.<network>.segm.json."""
    networks, state, world = load(args.eval, args)
    data = find_data(args, state["classes"])
    found = evaluate(networks, data, state["groups"], args, world)
    scores = {}
    for name, record in found.scores.items():
        scores[name] = {"last": {"step": state["step"], **record}}
    facts = {"dataset": args.dataset, "split": args.split, "val": args.val, "seed": args.seed}
    if world.main:
        titles = ["image", "label", *networks]
        plots.strip(found.rows, titles, Path(f"{args.eval}.previews.png"), height=192)
        plots.diagram(found.reliability, Path(f"{args.eval}.reliability.png"))
        for name, results in found.results.items():
            write_text(Path(f"{args.eval}.{name}.segm.json"), json.dumps(results))
        where = f"{len(data.val)} of {data.root}"
        runs.write_scores(Path(f"{args.eval}.results.json"), scores, facts, "ap", where)
    return scores | facts


def predict(args: Args) -> None:
    """--predict CKPT IMAGES...: <checkpoint>.predictions/ with overlays and, in COCO's format,
    predictions.json."""
    path, *images = args.predict
    networks, state, world = load(path, args)
    net = networks[checkpoints.returned(networks, RETURNED)]

    def detect_batch(batch: list[Tensor]) -> list[Detections]:
        regions = find_regions(net, batch, args)
        return [detect(net, image, r, args) for image, r in zip(batch, regions, strict=True)]

    how = (world, args.workers, args.predict_tile, args.image_size)
    classes = (state["ids"], state["classes"])
    out = Path(f"{path}.predictions")
    predictions.predict_objects(images, out, detect_batch, *classes, *how)


def settings(dataset: str = "lvis", eval: str = "", predict: str = "", export: str = "") -> Args:
    """What the command line starts from: a preset, or the settings inside a checkpoint to score or
    predict with."""
    if eval or predict or export:
        return cli.saved_settings(Args, Path(eval or predict or export), SCRIPT)
    return preset(dataset)


# Flags that pick the defaults of the others.
CHOOSERS = ("dataset", "eval", "predict", "export")


def main(args: Args) -> Any:
    """What the flags ask for."""
    cli.check_ranges(args)
    if args.export:
        return checkpoints.export(Path(args.export), SCRIPT, RETURNED)
    if args.eval:
        return score_checkpoint(args)
    if args.predict:
        return predict(args)
    if args.grid != "no":
        return grid(args)
    return train(args)


# ================================================================================ official weights
def pyramid_layer(match: re.Match) -> str:
    """EVA-02's backbone.simfp_<level>.<layer>.[norm.] -> our name. There a norm belongs to its
    convolution; here it is a layer of its own. So a norm comes one place after its convolution, and
    the second convolution of a level, whose number is listed, moves up by one."""
    level, layer, is_norm = int(match[1]), int(match[2]), bool(match[3])
    is_second = (level, layer) in ((2, 5), (3, 2), (4, 1), (5, 2))
    return f"neck.levels.{level - 2}.{layer + is_second + is_norm}."


# EVA-02's and Detectron2's names -> ours.
EVA_NAMES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"^backbone\.net\.patch_embed\.proj\.", "backbone.proj."),
        (r"^backbone\.net\.", "backbone."),
        (r"\.attn\.q_bias$", ".attn.q_proj.bias"),
        (r"\.attn\.v_bias$", ".attn.v_proj.bias"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (r"^backbone\.simfp_(\d)\.(\d)\.(norm\.)?", pyramid_layer),
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

# What stands before a network's name in checkpoints.
WRAPPERS = ("teacher.", "supervised.", "student.", "model_ema.", "model.")
THEIRS = ("backbone.net.", "backbone.simfp_", "proposal_generator.", "roi_heads.")


def load_detector(net: Detector, path: Path, flag: str = "--init-detector") -> list[str]:
    """Load a whole detector, of EVA-02's release or ours; lines on what did not fit. Rotary tables
    are made, not loaded; a background unit, which a sigmoid does not have, is cut off."""
    weights = {}
    for key, value in checkpoints.read_weights(path, flag).items():
        key = our_name(key)
        if "rope" not in key and "fed_loss_cls_weights" not in key:
            weights.setdefault(key, value)
    places = weights.get("backbone.pos_embed")
    # (1, 1 + side * side, D), the first for the class token
    if places is not None and places.dim() == 3 and hasattr(net.backbone, "pos_embed"):
        side = math.isqrt(places.shape[1])
        places = places[:, -side * side :].transpose(1, 2).reshape(1, -1, side, side)
        net.backbone.pos_embed = nn.Parameter(places.to(net.backbone.pos_embed))
        weights["backbone.pos_embed"] = places
    for key, own in net.state_dict().items():
        is_classifier = re.search(r"\.classes\.\w+$", key)
        if is_classifier and key in weights and len(weights[key]) == len(own) + 1:
            weights[key] = weights[key][:-1]
    notes = checkpoints.load_matching(net, weights, str(path))
    # `learned` follows from the labels of a run, so it need not be in the file.
    return [note for note in notes if not note.endswith("(1): heads.learned")]


def our_name(key: str) -> str:
    """The name here of a tensor in a detector's file."""
    for wrapper in WRAPPERS:
        key = key.removeprefix(wrapper)
    if key.startswith(THEIRS):
        for pattern, new in EVA_NAMES:
            key = pattern.sub(new, key)
    return key


if __name__ == "__main__":
    cli.cli(Args, settings, main, choosers=CHOOSERS)
