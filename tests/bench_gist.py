"""What gist_rist.py costs, counted and as ratios measured in one run: `make bench`.

Counts come from the script's own searches, `refine`, `label_images` and store, with the paper's
nine stages, where networks and iterations are left out and scores are drawn. Times are of a few
iterations on drawn pictures; what is compared runs in turn, and the median of the ratios is
printed: machines are noisy."""

import contextlib
import io
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gist_rist
from common import semantic
from common.distributed import World, rng
from common.nodes import Nodes

SEARCHES = {f"GIST {n}": dict(search=("gist",), beam=n) for n in (1, 2, 3)} | {
    f"RIST {n}": dict(search=("rist",), trials=n) for n in (1, 2, 4, 8)
}


TOGETHER = {
    "GIST 1, RIST 2": dict(search=("gist", "rist")),
    "GIST 1, RIST 2, FIST, batch-wise": dict(search=("gist", "rist", "fist", "batchwise")),
}


PAPER = gist_rist.preset("voc", weights="none")


POOL = 10_582 - 10_582 // 50 - PAPER.dev_size  # VOC's unlabeled images at 1/50


TINY = dict(
    weights="none",
    backbone="test_resnet",
    bn="live",
    resize=1,
    batch_size=4,
    dev_size=4,
    stage0_steps=3,
    eval_every=3,
    steps=4,
    stages=3,
    val_every_stage=False,
    keep_nodes=True,
    workers=0,
    device="cpu",
    crop_size=(48, 48),
)  # of 64 x 64, nearly as 321 x 321 of 375 x 500


def counted(**flags) -> tuple[Counter, set[str]]:
    """What these searches do in a store of their own, and the nodes: trainings, iterations, passes
    over the unlabeled images (done), nodes that ask for pseudo labels (asked), and nodes that have
    children (parents)."""
    args, count, labels = (
        replace(PAPER, **flags),
        Counter(),
        mock.Mock(wraps=gist_rist.label_images),
    )

    def fit(tree, path, state, step_of, streams, total):
        count.update(trainings=1, iterations=total)
        return 0.0

    def finish_node(tree, path, net=None, facts=None, seconds=0.0):
        tree.store.folder(path).mkdir(parents=True, exist_ok=True)
        (tree.store.folder(path) / "weights.pt").touch()
        tree.store.finish(path, {"dev": {str(args.dev_size): rng("score", path).random()}})

    def passes(pictures, data, args, world, labels):
        count.update(done=1)
        yield [gist_rist.WholePicture(0, torch.zeros(3, 1, 1), None, (1, 1))]

    def forward_whole(net, group, device):
        return torch.zeros(1, 2, 1, 1)

    def network(tree, weights):
        return nn.ModuleDict({"backbone": nn.Linear(1, 1), "head": nn.Linear(1, 1)})

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(
            gist_rist,
            fit=fit,
            finish_node=finish_node,
            passes=passes,
            forward_whole=forward_whole,
            label_images=labels,
        ),
        mock.patch.object(gist_rist.Tree, "network", network),
        mock.patch.object(Nodes, "weights", lambda store, path, script: {}),
    ):
        store = Nodes(Path(folder, "stage0"), Path(folder, "nodes"), gist_rist.parent_of)
        data, pool = SimpleNamespace(classes=["a"]), [semantic.Picture("a", Path(), None)]
        tree = gist_rist.Tree(args, World(), data, [], pool, [], store)
        finish_node(tree, gist_rist.ROOT)
        gist_rist.search_all(tree)
    nodes = set(store.records) - {gist_rist.ROOT}
    return count + Counter(
        asked=labels.call_count, parents=len(set(map(gist_rist.parent_of, nodes)))
    ), nodes


def bench_counts() -> None:
    print(
        f"{PAPER.stages} stages of {PAPER.steps:,}: trainings and iterations, nodes shared / not "
        "shared; passes over the unlabeled images: one a training / not for alpha = 1 / one a "
        "parent / as done"
    )
    found = {name: counted(**flags) for name, flags in (SEARCHES | TOGETHER).items()}
    for name, (c, _) in found.items():
        # not shared: each search, and each trial of RIST, by itself
        flags = (SEARCHES | TOGETHER)[name]
        parts = [
            counted(**flags | dict(search=(s,), independent=s == "rist"))[0]
            for s in flags["search"]
        ]
        n, iterations = (sum(part[key] for part in parts) for key in ("trainings", "iterations"))
        print(
            f"  {name}: {c['trainings']} / {n}, {c['iterations']:,} / {iterations:,}, "
            f"not shared / shared {n / c['trainings']:.2f}; passes {c['trainings']} / {c['asked']}"
            f" / {c['parents']} / {c['done']}, first / last {c['trainings'] / c['done']:.2f}"
        )
    beams = [found[f"GIST {n}"][1] for n in (1, 2, 3)]
    union, apart = len(set.union(*beams)), sum(map(len, beams))
    print(
        f"  GIST 1, 2 and 3: {apart} trainings with a store each, {union} distinct nodes, "
        f"ratio {apart / union:.2f}"
    )
    for n in (2, 4, 8):
        sizes = []
        for seed in range(1000):
            paths = gist_rist.rist_paths(replace(PAPER, seed=seed, trials=n))
            sizes.append(len({node for path in paths for node in gist_rist.prefixes(path)}))
        print(f"  RIST {n}, mean of 1000 seeds: {mean(sizes):.1f} trainings when shared")


def bench_flops() -> None:
    size, crop = (375, 500), (PAPER.batch_size, *PAPER.crop_size)
    # off in fp32, and unknown to meta
    no_autocast = mock.Mock(return_value=contextlib.nullcontext())
    with torch.device("meta"), mock.patch.object(torch, "autocast", no_autocast):
        net, teacher = (gist_rist.SegNet(PAPER, 21) for _ in range(2))
        batch = semantic.Batch(
            torch.empty(crop[0], 3, *crop[1:]),
            torch.ones(crop, dtype=torch.bool),
            torch.zeros(crop, dtype=torch.long),
            torch.zeros(crop[0]),
        )
        s = gist_rist.State(
            net.train(), gist_rist.optimizer_of(net, PAPER), teacher.requires_grad_(False).eval()
        )
        stages = {}
        for cl_on in ("active", "both"):
            with FlopCounterMode(display=False) as counter:
                gist_rist.refine_step(s, replace(PAPER, cl_on=cl_on), "P", 0.0, 0, batch, batch)
            stages[cl_on] = counter.get_total_flops() * PAPER.steps
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gist_rist.upsample(net.eval()(torch.empty(1, 3, *size))[0], size)
    labels = counter.get_total_flops() * POOL
    print(f"R101, pass over {POOL:,} images of {size[0]}x{size[1]}: {labels / 1e15:.2f} PFLOP")
    for cl_on, stage in stages.items():
        print(
            f"  {PAPER.steps:,} iterations, {crop[0]} crops of {crop[1]}, --cl-on {cl_on}: "
            f"{stage / 1e15:.2f} PFLOP; pass / iterations {labels / stage:.2f}, "
            f"pass / P stage {labels / (labels + stage):.2f}"
        )


def seconds(function, *args) -> float:
    """Seconds of function(*args), without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        function(*args)
        return time.perf_counter() - start


def planted(root: Path, pool: int = 8, **flags) -> gist_rist.Tree:
    """A tree on drawn pictures, `pool` of them unlabeled, with stage 0 done and an empty folder for
    other nodes."""
    tree, _ = gist_rist.set_up(
        gist_rist.preset("shapes", **TINY | flags, root=str(root), store=str(root / "store"))
    )
    seconds(tree.store.make_if_free, gist_rist.ROOT, tree.train)
    tree.pool, tree.store.others = tree.pool[:pool], Path(tempfile.mkdtemp(dir=root))
    return tree


def bench_searches(root: Path) -> None:
    def searched(flags: dict) -> tuple[float, int, int]:
        tree = planted(root, **flags)
        time_of, records = seconds(gist_rist.search_all, tree), tree.store.records
        return (
            time_of,
            len(records) - 1,
            sum(record["steps"] for path, record in records.items() if path),
        )

    ways = SEARCHES | {
        f"{name} --independent": flags | {"independent": True}
        for name, flags in SEARCHES.items()
        if "RIST" in name
    }
    searched(SEARCHES["GIST 1"])  # the first one imports
    rounds = [{name: searched(ways[name]) for name in sorted(ways)} for _ in range(2)]
    print(
        f"wall time, drawn pictures, {TINY['stages']} stages of {TINY['steps']} iterations, "
        "relative to GIST 1"
    )
    for name in ways:
        (_, trained, iterations), shared = rounds[0][name], name.removesuffix(" --independent")
        one, same = (
            median(x[name][0] / x[other][0] for x in rounds) for other in ("GIST 1", shared)
        )
        print(
            f"  {name}: {trained} trainings, {iterations} iterations, "
            f"{median(x[name][0] for x in rounds):.1f} s, "
            f"{one:.2f}" + f"; not shared / shared {same:.2f}" * (name != shared)
        )


def bench_share(root: Path) -> None:
    steps, size = 25, TINY["batch_size"]
    pool = round(POOL / PAPER.steps / PAPER.batch_size * steps * size)
    print(
        f"wall time, drawn pictures, {pool} unlabeled images and {steps} iterations of {size}, "
        "in VOC's ratio"
    )
    for cl_on in ("active", "both"):
        found = []
        for _ in range(3):
            tree = planted(root, pool, steps=steps, cl_on=cl_on)
            stage_l = seconds(tree.store.make_if_free, "L", tree.train)
            labels = seconds(gist_rist.label_images, tree, gist_rist.ROOT)
            stage_p = seconds(tree.store.make_if_free, "P", tree.train)  # finds the labels
            found.append((labels / (labels + stage_p), 1 + labels / stage_l))
        share, spared = map(median, zip(*found, strict=True))
        print(
            f"  --cl-on {cl_on}: pass / P stage {share:.2f}; "
            f"L stage with a pass / without {spared:.2f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread")
    bench_counts()
    bench_flops()
    with tempfile.TemporaryDirectory() as folder:
        bench_searches(Path(folder))
        bench_share(Path(folder))
