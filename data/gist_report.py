"""What a run of gist_rist.py found, from its stored nodes and without training: tables (Tables II
and III, Fig. 7), the search tree (Fig. 3), curves by stage (Figs. 1 and 6), masks (Figs. 2, 8, 9)
and confidences (Fig. 5).

    python gist_rist.py --report runs/gist_rist-shapes-10-d0-s0

Functions on numbers come first and need no run. `tree` is gist_rist.Tree throughout.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

from common import files, plots, semantic
from common.errors import UserError

GROUP = 5  # paths in a group of Table II


# --------------------------------------------------------------------------------------- on numbers
def best_of(dev: list[float], val: list[float], n: int) -> tuple[float, float]:
    """Fig. 7: mean and standard deviation of the val score of the best on dev, over all ways to
    take `n` solutions."""
    ordered = np.array(val)[np.argsort(-np.array(dev), kind="stable")]
    # in which the i-th is the best
    ways = [math.comb(len(ordered) - 1 - i, n - 1) for i in range(len(ordered))]
    chance = np.array(ways) / math.comb(len(ordered), n)
    mean = float(chance @ ordered)
    return mean, float(chance @ (ordered - mean) ** 2) ** 0.5


def group_scores(dev: list[float], val: list[float], size: int) -> list[float]:
    """Table II: the val score of the best on dev in each full group of `size` neighbours."""
    groups = [range(i, i + size) for i in range(0, len(dev) - size + 1, size)]
    return [val[max(group, key=lambda i: dev[i])] for group in groups]


def longest_run(path: str) -> int:
    """The most equal letters in a row."""
    return max((len(list(same)) for _, same in itertools.groupby(path)), default=0)


def rejected_share(stages: int, max_run: int) -> float:
    """Sec. IV-A: the share of all paths of L and P that --max-run would draw again."""
    return (
        sum(longest_run("".join(p)) > max_run for p in itertools.product("LP", repeat=stages))
        / 2**stages
    )


def bloat(shares: list[float], rise: float = 0.1) -> list[bool]:
    """Where the dominant class's share of the pseudo labels is more than `rise` above the least
    share (Fig. 2)."""
    return [share > min(shares) + rise for share in shares]


def erased(labels: dict | None, phi: float) -> str:
    """What is printed of a stage's pseudo labels; a share that says that --phi does not fit comes
    with a hint."""
    if labels is None:
        return ""
    fits = phi <= 0 or 0.2 <= labels["kept"] <= 0.98
    hint = "" if fits else ": a --phi that fits this network would erase some pixels and keep most"
    return f"(Label Erase kept {labels['kept']:.0%}{hint})"


def table(head: str, rows: list[tuple]) -> str:
    """Markdown. `head` names the columns, with commas between; floats get two digits, NaN a
    dash."""

    def cell(v) -> str:
        return str(v) if not isinstance(v, float) else "-" if v != v else f"{v:.2f}"

    names = head.split(", ")
    lines = [names, ["---"] * len(names), *([cell(v) for v in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ----------------------------------------------------------------------------------------- on a run
def write(tree, results: dict, out: Path) -> dict:
    """results.json, log.jsonl (a line a node), report.md and pictures into the run folder `out`;
    the results."""
    store, visited = tree.store, results["visited"]
    nodes = sorted(
        {p for paths in visited.values() for p in paths},
        key=lambda p: (store.record(p)["stage"], p),
    )
    records = [store.record(p) for p in nodes]
    logs = [files.read_log(f) for p in nodes if (f := store.folder(p) / "log.jsonl").is_file()]
    speeds = sorted(
        line["images_per_second"] for log in logs for line in log if "images_per_second" in line
    )
    results |= {
        "trainings": len(nodes) - 1,
        "steps": sum(r["steps"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "images_per_second": speeds[len(speeds) // 2] if speeds else None,
    }
    files.write_text(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    val = {p: val_of(tree, p) for p in nodes}
    files.write_text(out / "report.md", "\n".join(tables(tree, results, nodes, val)))
    draw_tree(tree, nodes, {tree.best(paths) for paths in visited.values()}, out / "tree.png")
    draw_curves(tree, visited, val, out / "curves.png")
    for name, paths in visited.items():
        end = deepest(tree, paths)
        draw_masks(tree, end, out / "previews" / f"{name.replace(' ', '-')}-{end or 'stage0'}.png")
    files.write_text(out / "results.json", json.dumps(results, indent=1))
    said = [
        f"{name} {r['miou']:.2f} ({r['path'] or 'stage 0'})"
        for name, r in results.items()
        if isinstance(r, dict) and "miou" in r
    ]
    print(f"\nmiou: {', '.join(said)}, chosen by {results['dev_size']} development images")
    print(
        f"in {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.name[0] != '.'))}; nodes in {store.others}"
    )
    return results


def again(tree, out: Path) -> dict:
    """--report: the same for a run that is finished; UserError when it is not, or its nodes are
    gone."""
    if not (out / "results.json").is_file():
        raise UserError(f"{out} is not a finished run of gist_rist.py: it has no results.json.")
    results = json.loads((out / "results.json").read_text())
    tree.store.root, tree.store.others = Path(results["stage0_folder"]), Path(results["nodes"])
    lost = [
        p or "stage 0"
        for paths in results["visited"].values()
        for p in paths
        if not tree.store.done(p)
    ]
    if lost:
        raise UserError(
            f"{len(lost)} nodes of {out} are not in {tree.store.others} any more, for example {lost[0]}; "
            f"the run's command trains them again."
        )
    write(tree, results, out)
    print("\n" + (out / "report.md").read_text())
    return results


def val_of(tree, path: str) -> float:
    """mIoU of a node on val, NaN where it was not scored there (--val-every-stage does)."""
    file = tree.store.folder(path) / f"val-{tree.args.val}.json"
    return json.loads(file.read_text())["miou"] if file.is_file() else float("nan")


def trail(tree, path: str) -> list[str]:
    """Stage 0 and all stages up to `path`."""
    return [path] if not path else [*trail(tree, tree.store.parent_of(path)), path]


def leaves(tree, paths: list[str]) -> list[str]:
    """The paths that are no beginning of another, stage 0 left out."""
    parents = {tree.store.parent_of(p) for p in paths if p}
    return [p for p in dict.fromkeys(paths) if p and p not in parents]


def deepest(tree, paths: list[str]) -> str:
    """Of the longest paths the one with the best end, by dev: GIST's leaves are also what it gave
    up on the way."""
    return min(
        leaves(tree, paths) or [""], key=lambda p: (-tree.store.record(p)["stage"], *tree.order(p))
    )


def tables(tree, results: dict, nodes: list[str], val: dict[str, float]) -> list[str]:
    """The parts of report.md."""
    store, visited, nan = tree.store, results["visited"], float("nan")
    best = {name: tree.best(paths) for name, paths in visited.items()}
    text = [
        "## Searches\n",
        table(
            "search, trainings, path, stage, dev, val",
            [
                (
                    name,
                    len(set(paths)) - 1,
                    best[name] or "stage 0",
                    store.record(best[name])["stage"],
                    tree.dev_of(best[name]),
                    val[best[name]],
                )
                for name, paths in visited.items()
            ],
        ),
    ]
    labels = [store.record(p).get("labels", {"kept": nan, "dominant": nan}) for p in nodes]
    shares = [x["dominant"] for x in labels if x["dominant"] == x["dominant"]]
    alarm = dict(zip(shares, bloat(shares), strict=True)) if shares else {}
    text += [
        "## Nodes\n",
        table(
            "path, dev, val, pseudo labels kept, share of their dominant class, seconds",
            [
                (
                    p or "stage 0",
                    tree.dev_of(p),
                    val[p],
                    x["kept"],
                    "-"
                    if x["dominant"] != x["dominant"]
                    else f"{x['dominant']:.2f}{' bloat' if alarm[x['dominant']] else ''}",
                    store.record(p)["seconds"],
                )
                for p, x in zip(nodes, labels, strict=True)
            ],
        ),
    ]
    drawn = results.get("trials", leaves(tree, visited.get("rist", [])))  # some may be equal
    ends = [*drawn, *leaves(tree, visited.get("path", []))]
    chosen = [tree.best(trail(tree, end)) for end in ends]
    dev, scored = [tree.dev_of(p) for p in chosen], [val[p] for p in chosen]
    if len(ends) > 1 and np.isnan(scored).any():
        text += [
            "Not all chosen nodes are scored on val: Table II and Fig. 7 need --val-every-stage (and nodes whose "
            "weights are still there).\n"
        ]
    elif len(ends) > 1:
        groups = ", ".join(f"{g:.2f}" for g in group_scores(dev, scored, GROUP))
        text += [
            "## Paths, each at the stage that dev chooses (Table II)\n",
            table(
                "path, stage, dev, val",
                [
                    (end, store.record(p)["stage"], tree.dev_of(p), val[p])
                    for end, p in zip(ends, chosen, strict=True)
                ],
            ),
            f"val {np.mean(scored):.2f} ± {np.std(scored, ddof=1):.2f} over {len(scored)} paths; best on dev in "
            f"each group of {GROUP}: {groups or 'no full group'}\n",
            "## Best of n paths by dev (Fig. 7)\n",
            table(
                "n, mean val, deviation",
                [(n, *best_of(dev, scored, n)) for n in range(1, min(len(scored), 10) + 1)],
            ),
        ]
    sizes = [n for n in (10, 25, 50, 100, 200, 500) if n <= len(tree.dev) and "rist" in visited]
    if len(sizes) > 1:
        picked = {size: tree.best(visited["rist"], size) for size in sizes}
        text += [
            "## Development images (Table III, RIST)\n",
            table(
                "images, path, val", [(size, p or "stage 0", val[p]) for size, p in picked.items()]
            ),
        ]
    return text


# ----------------------------------------------------------------------------------------- pictures
def draw_tree(tree, nodes: list[str], best: set[str], file: Path) -> None:
    """The search tree as in Fig. 3: open nodes learned from labels, filled ones from pseudo labels;
    dev mIoU beside."""
    plt = pyplot()
    parent, stage = tree.store.parent_of, {p: tree.store.record(p)["stage"] for p in nodes}
    ends = sorted(leaves(tree, nodes)) or [""]
    row = {end: -float(i) for i, end in enumerate(ends)}
    # a parent stands in the middle of its children
    for path in sorted(nodes, key=lambda p: -stage[p]):
        kids = [row[p] for p in nodes if p and parent(p) == path]
        row[path] = sum(kids) / len(kids) if kids else row[path]
    ways = {p for end in best for p in trail(tree, end)}
    figure, axis = plt.subplots(figsize=(2 + 1.5 * max(stage.values()), 1.5 + 0.45 * len(ends)))
    for path in nodes:
        if path:
            axis.plot(
                [stage[path] - 1, stage[path]],
                [row[parent(path)], row[path]],
                zorder=1,
                color="tab:red" if path in ways else "lightgray",
                linewidth=2.5 if path in ways else 1,
            )
        fill = {"L": "white", "P": "dimgray"}.get(path[-1:], "lightsteelblue" if path else "gold")
        axis.scatter(
            stage[path],
            row[path],
            s=130,
            color=fill,
            edgecolor="black",
            zorder=2,
            linewidth=2.5 if path in best else 1,
        )
        axis.annotate(
            f"{tree.dev_of(path):.1f}",
            (stage[path], row[path]),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_title(
        "dev mIoU; learned from: gold stage 0, open labels, filled pseudo labels\n"
        "red: the way to the best node of each search, thick ring",
        fontsize=9,
    )
    axis.set_xlabel("stage")
    axis.set_xticks(range(max(stage.values()) + 1))
    axis.set_yticks([])
    axis.margins(0.08, 0.15)
    save(figure, file)


def draw_curves(tree, visited: dict[str, list[str]], val: dict[str, float], file: Path) -> None:
    """mIoU by stage of every search (Figs. 1 and 6), and confidences before and after temperature
    scaling (Fig. 5)."""
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4))
    for number, (name, paths) in enumerate(visited.items()):
        ends = leaves(tree, paths)
        for i, end in enumerate(ends if name != "gist" else [deepest(tree, paths)]):
            way = trail(tree, end)
            for axis, scores in (
                (axes[0], [tree.dev_of(p) for p in way]),
                (axes[1], [val[p] for p in way]),
            ):
                axis.plot(
                    range(len(way)),
                    scores,
                    color=f"C{number}",
                    marker=".",
                    label=name if i == 0 else None,
                )
    scores = np.load(tree.store.folder("") / "scores.npz")
    for row, temp in zip(scores["confidence"], scores["temps"], strict=True):
        edges = np.linspace(0, 1, row.size + 1)
        axes[2].stairs(row / max(row.sum(), 1), edges, fill=True, alpha=0.5, label=f"T = {temp:g}")
    for axis, title, below in zip(
        axes,
        ("dev mIoU", "val mIoU", "pixels of stage 0 by confidence"),
        ("stage", "stage", "confidence"),
        strict=True,
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(below)
        axis.xaxis.get_major_locator().set_params(integer=below == "stage")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, file)


def draw_masks(tree, path: str, file: Path) -> None:
    """Development images with their predictions at stages 0, 1, 5, 9 and the last of `path` (Figs.
    2, 8, 9)."""
    shown = [
        p for p in trail(tree, path) if tree.store.record(p)["stage"] in (0, 1, 5, 9) or p == path
    ]
    masks = [np.load(tree.store.folder(p) / "scores.npz") for p in shown]
    rows = []
    for i, picture in enumerate(tree.dev[:6]):
        image, label = semantic.load_picture(picture, tree.data)
        rows.append(
            [
                image.permute(1, 2, 0).numpy(),
                *(plots.colour(torch.from_numpy(m[f"mask{i}"])) for m in masks),
                plots.colour(label),
            ]
        )
    plots.strip(rows, ["image", *(p or "stage 0" for p in shown), "label"], file)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot().close(figure)
