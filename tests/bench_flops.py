"""What the papers' runs cost: operations of a forward pass, counted on shapes alone, and the hours
that follow for eight GPUs. docs/cluster.md quotes them.

A picture that a network learns from counts three passes, a fourth when activations are computed
again; one that a teacher labels counts one. Scoring, loading and what is no product of matrices
are left out, so the hours say which run is cheap and which is not, and little more.
"""

import contextlib
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import better_pseudo_labels
import gist_rist
import gta_seg
import guided_distillation

SUSTAINED = 8 * 200e12  # operations a second of eight GPUs at a fifth of an H100's bf16 peak


class Stage(NamedTuple):
    steps: int
    learned: int  # pictures that a step learns from, of all processes
    labeled_by_teacher: int  # pictures that a step labels
    again: bool = False  # activations are computed again


class Row(NamedTuple):
    name: str
    forward: float  # operations of a pass over one training crop
    stages: list[Stage]

    def operations(self) -> float:
        passes = sum(
            s.steps * ((4 if s.again else 3) * s.learned + s.labeled_by_teacher)
            for s in self.stages
        )
        return passes * self.forward


def counted(network: torch.nn.Module, *size: int) -> float:
    """Operations of the network on one picture (3, *size)."""
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops()


def gta(dataset: str, split: str, classes: int, unlabeled: int) -> Row:
    args = gta_seg.preset(dataset, split=split)
    forward = counted(gta_seg.SegNet(args, classes), args.crop_size, args.crop_size)
    steps = round(args.epochs * (unlabeled // args.batch_size))
    return Row(
        f"gta_seg.py --dataset {dataset} --split {args.split}",
        forward,
        [Stage(steps, 2 * args.batch_size, args.batch_size)],
    )


def gist(dataset: str, classes: int, pool: int) -> Row:
    """Both searches: GIST trains both children of each of its nodes, RIST one of each path. Half of
    all trainings learn from pseudo labels, for which the teacher sees the pool once."""
    args = gist_rist.preset(dataset)
    forward = counted(gist_rist.SegNet(args, classes), *args.crop_size)
    paths = gist_rist.rist_paths(args)
    nodes = {node for path in paths for node in gist_rist.prefixes(path)}
    trainings = len(nodes) + 2 * args.stages
    return Row(
        f"gist_rist.py --dataset {dataset}, {trainings} stages at most",
        forward,
        [
            Stage(args.stage0_steps, 2 * args.batch_size, 0),
            Stage(trainings * args.steps, 2 * args.batch_size, 0),
            Stage(trainings // 2, 0, pool),
        ],
    )


def guided(dataset: str, classes: int, split: str, backbone: str = "", **more) -> Row:
    chosen = {"backbone": backbone} if backbone else {}
    args = guided_distillation.preset(dataset, split=split, **chosen)
    network = guided_distillation.Mask2Former(args, classes)
    forward = counted(network, *args.crop_size)
    again = bool(more.get("checkpointing"))
    teacher = Stage(args.steps, args.batch_size, 0, again)
    student = Stage(args.steps, 2 * args.batch_size, args.batch_size, again)
    name = f"guided_distillation.py --dataset {dataset} --split {split}"
    if backbone:
        name += f" --backbone {backbone}"
    if again:
        name += " --checkpointing"
    return Row(name, forward, [teacher, student])


class Boxes(torch.nn.Module):
    """The detector's products of matrices: pyramid, proposals, three heads on as many regions as
    are sampled, masks of the quarter of them that is foreground."""

    def __init__(self, network: torch.nn.Module, args):
        super().__init__()
        self.network, self.regions = network, args.roi_batch

    def forward(self, images: torch.Tensor) -> None:
        pyramid = self.network.pyramid(images)
        self.network.rpn(pyramid)
        width = pyramid[0].shape[1]
        regions = torch.empty(self.regions, width, 7, 7, device="meta")
        for head in self.network.heads.boxes:
            head(regions)
        masks = torch.empty(self.regions // 4, width, 14, 14, device="meta")
        self.network.heads.mask(masks, torch.zeros(len(masks), dtype=torch.long, device="meta"))


def better(dataset: str, classes: int) -> Row:
    args = replace(better_pseudo_labels.preset(dataset), checkpointing=False)
    network = better_pseudo_labels.Detector(args, classes)
    forward = counted(Boxes(network, args), args.image_size, args.image_size)
    return Row(
        f"better_pseudo_labels.py --dataset {dataset} --checkpointing",
        forward,
        [
            Stage(2 * args.teacher_steps, args.teacher_batch_size, 0, True),
            Stage(args.steps, 2 * args.batch_size, args.batch_size, True),
        ],
    )


def rows() -> list[Row]:
    no_autocast = mock.Mock(return_value=contextlib.nullcontext())  # unknown to meta
    with torch.device("meta"), mock.patch.object(torch, "autocast", no_autocast):
        return [
            gta("voc", "183", 21, 10_582 - 183),
            gta("cityscapes", "186", 19, 2_975 - 186),
            gist("voc", 21, 10_582),
            gist("cityscapes", 19, 2_975),
            guided("coco", 80, "5%"),
            guided("cityscapes", 8, "5%"),
            guided("coco", 80, "5%", "swin_large_patch4_window12_384.ms_in22k", checkpointing=True),
            guided("coco", 80, "5%", "vit_large_patch14_dinov2.lvd142m", checkpointing=True),
            better("lvis", 1203),
        ]


def main() -> None:
    print("TFLOP a pass   EFLOP a run   hours on 8 GPUs at 200 TFLOP/s each")
    for row in sorted(rows(), key=Row.operations):
        total = row.operations()
        hours = total / SUSTAINED / 3600
        print(f"{row.forward / 1e12:12.3f} {total / 1e18:13.2f} {hours:17.1f}   {row.name}")


if __name__ == "__main__":
    main()
