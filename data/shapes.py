"""The embedded data set: drawn scenes in the real on-disk formats, so that everything runs without
a download.

Objects have a class-typical form, pattern and hue. Classes come in look-alike pairs of nearly one
hue, so that form and pattern must tell them apart; patterns fade, forms are cut off by what lies in
front. A few labels show the hues at once and the rest badly; many unlabeled pictures show which
forms and patterns go together.

    make_voc         VOC folders with palette PNGs, train / tune / val      semantic segmentation
    make_cityscapes  leftImg8bit and gtFine with labelIds and instanceIds   for format tests
    make_coco        COCO and LVIS JSON of one long-tailed set              instance segmentation
    make_things      COCO JSON of a few evenly frequent classes             the same, in minutes
    make_tail        LVIS JSON of a few long-tailed classes                 the same, in minutes
    make_dusk        classes of the first, fourth and fifth, elsewhere     a shift between domains
    pretrain         a tiny backbone's weights from other classes     what ImageNet is to the papers

    python -m data.shapes [--root datasets/shapes]      draws all (each is drawn on first use, too)
    python -m data.shapes --domain dusk                 draws root/dusk/{semantic,things,tail}
    python -m data.shapes --pretrain test_resnet        makes the weights file beside this program

Every picture depends on (variant, part, index) alone. No randomness is taken from or left in global
generators."""

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from data.drawing import (
    DUSK,
    FORMS,
    PATTERNS,
    THINGS,
    Difficulty,
    Domain,
    draw,
    generator,
    polygons,
    street_scene,
)

SEMANTIC = Difficulty(objects=(1, 3), radius=(0.22, 0.38), grey=0.0, pattern=(0.2, 1.0))


INSTANCE = Difficulty(
    size=96, objects=(2, 5), radius=(0.10, 0.22), grey=0.2, lying=0.05, clutter=0.2
)


PRETRAIN = Difficulty(objects=(1, 1), radius=(0.22, 0.42), grey=0.3, lying=0.0)


# class -> (form, pattern, hue): three pairs of nearly one hue each
SEMANTIC_CLASSES = {
    "disc": ("circle", "stripes", 0.00),
    "box": ("square", "checks", 0.02),
    "tent": ("triangle", "dots", 0.33),
    "star": ("star", "rings", 0.35),
    "hoop": ("ring", "mesh", 0.67),
    "plus": ("cross", "plain", 0.69),
}


# a few classes, evenly frequent, learned in minutes
FEW = Difficulty(size=96, objects=(2, 4), radius=(0.13, 0.26), grey=0.2, clutter=0.2)


THING_CLASSES = {
    "coin": ("circle", "stripes", 0.13),
    "crate": ("square", "checks", 0.10),
    "star": ("star", "plain", 0.15),
    "tent": ("triangle", "dots", 0.33),
    "wheel": ("ring", "rings", 0.60),
    "plus": ("cross", "mesh", 0.64),
}


# a short long tail in clearer scenes (three networks are trained on it), most frequent first: the
# later half are the
# look-alikes of the first, in another pattern
TAIL = Difficulty(
    size=96, objects=(2, 4), radius=(0.15, 0.28), grey=0.1, clutter=0.15, pattern=(0.4, 1.0)
)


TAIL_CLASSES = {
    "coin": ("circle", "stripes", 0.13),
    "tent": ("triangle", "dots", 0.33),
    "wheel": ("ring", "rings", 0.60),
    "crate": ("square", "checks", 0.08),
    "star": ("star", "plain", 0.17),
    "plus": ("cross", "mesh", 0.95),
    "cookie": ("circle", "dots", 0.13),
    "flag": ("triangle", "stripes", 0.33),
    "wreath": ("ring", "dots", 0.60),
    "quilt": ("square", "mesh", 0.08),
    "medal": ("star", "rings", 0.17),
    "mill": ("cross", "checks", 0.95),
}


# the long tail, most frequent first. Look-alikes differ in pattern (tent, flag) or by a step in hue
# (wheel, buoy) alone
INSTANCE_CLASSES = {
    "coin": ("circle", "stripes", 0.13),
    "tent": ("triangle", "stripes", 0.33),
    "crate": ("square", "mesh", 0.08),
    "flag": ("triangle", "dots", 0.33),
    "wheel": ("ring", "rings", 0.60),
    "plus": ("cross", "checks", 0.00),
    "star": ("star", "plain", 0.15),
    "moon": ("moon", "gradient", 0.16),
    "plank": ("bar", "stripes", 0.07),
    "tile": ("square", "checks", 0.08),
    "buoy": ("ring", "rings", 0.72),
    "lime": ("circle", "stripes", 0.25),
    "lantern": ("star", "plain", 0.03),
    "kite": ("cross", "noise", 0.00),
    "fir": ("triangle", "stripes", 0.45),
    "ruler": ("bar", "checks", 0.07),
    "wreath": ("ring", "dots", 0.60),
    "cookie": ("circle", "dots", 0.13),
    "quilt": ("square", "mesh", 0.20),
    "croissant": ("moon", "stripes", 0.16),
    "melon": ("moon", "gradient", 0.28),
    "medal": ("star", "rings", 0.15),
    "mill": ("cross", "checks", 0.88),
    "pencil": ("bar", "stripes", 0.95),
}


# ------------------------------------------------------------------------------------------ on disk
def once(target: Path, version: str, make) -> Path:
    """Run make(folder) into a temporary folder beside `target` and rename it, unless `target` has
    this version.

    Processes of one machine wait for the first of them."""
    mark = target / "version.txt"
    if mark.is_file() and mark.read_text() == version:
        return target  # nothing to write: the root may be read-only
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--root {target.parent} is a file; name a folder.") from None
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = mark.read_text() if mark.is_file() else ""
        if found != version:
            ours = found.split(" ")[0] == version.split(" ")[0]  # an older drawing of the same kind
            if not ours and target.exists() and (target.is_file() or any(target.iterdir())):
                raise UserError(
                    f"{target} holds something else than the embedded data set; name another "
                    f"--root."
                )
            # of processes that were killed
            for left in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            temporary.mkdir(parents=True)
            make(temporary)
            (temporary / "version.txt").write_text(version)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    return target


def save_palette(index: np.ndarray, path: Path) -> None:
    """(H, W) uint8 indices as a palette PNG with VOC's colours, as the real data have it."""
    import torch

    from common.plots import save_index_png

    save_index_png(torch.from_numpy(index), path)


def kind_of(name: str, domain: Domain | None) -> str:
    """The name of a variant in a domain. It begins the scenes, so no domain shows another's."""
    return name if domain is None else f"{name} {domain}"


def semantic_scene(
    part: str, index: int, domain: Domain | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a part: picture (S, S, 3) uint8 and label (S, S) uint8, 0 background, 1..
    the classes."""
    rng = generator(kind_of("semantic", domain), part, index)
    names = list(SEMANTIC_CLASSES)
    chosen = rng.integers(
        0, len(names), int(rng.integers(SEMANTIC.objects[0], SEMANTIC.objects[1] + 1))
    )
    picture, instances, _ = draw(
        rng, [SEMANTIC_CLASSES[names[c]] for c in chosen], list(chosen), SEMANTIC, domain
    )
    return picture, np.concatenate([[0], chosen + 1]).astype(np.uint8)[instances]


def make_voc(root: Path, train: int = 1000, tune: int = 200, val: int = 300) -> Path:
    """VOC folders of the semantic variant: `train` (labels for all; a run uses few), `tune` and
    `val`."""

    def make(folder: Path) -> None:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True)
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            names = [f"{part}_{i:06d}" for i in range(number)]
            for index, name in enumerate(names):
                picture, label = semantic_scene(part, index)
                Image.fromarray(picture).save(
                    folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0
                )
                save_palette(label, folder / "SegmentationClass" / f"{name}.png")
            (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(
                "".join(n + "\n" for n in names)
            )
        (folder / "classes.txt").write_text(
            "".join(n + "\n" for n in ["background", *SEMANTIC_CLASSES])
        )

    return once(root, f"voc {SEMANTIC} {SEMANTIC_CLASSES} {train} {tune} {val}", make)


# --------------------------------------------------------------------------------------- Cityscapes
def make_cityscapes(
    root: Path, train: int = 16, val: int = 4, height: int = 128, width: int = 256
) -> Path:
    """Cityscapes folders of drawn streets: leftImg8bit and gtFine with raw labelIds and 16-bit
    instanceIds."""

    def make(folder: Path) -> None:
        for part, index in [("train", i) for i in range(train)] + [("val", i) for i in range(val)]:
            picture, instances = street_scene(part, index, height, width)
            labels = np.where(instances >= 1000, instances // 1000, instances).astype(np.uint8)
            city = {"train": ("drawnburg", "inkstadt"), "val": ("paperheim", "quillau")}[part][
                index % 2
            ]
            files = {
                "leftImg8bit": picture,
                "gtFine_labelIds": labels,
                "gtFine_instanceIds": instances,
            }
            for name, values in files.items():
                path = (
                    folder
                    / name.split("_")[0]
                    / part
                    / city
                    / f"{city}_{index // 2:06d}_000019_{name}.png"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)

    return once(root, f"cityscapes {THINGS} {train} {val} {height} {width}", make)


# ------------------------------------------------------------------------------------ COCO and LVIS
def instance_scene(part: str, index: int) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    """Scene `index` of a part: picture (H, W, 3) uint8, instance map (H, W) uint8, the class of
    each instance, and how many of them are no members of the crowd that every twelfth scene has in
    front."""
    rng, d, kinds = generator("instance", part, index), INSTANCE, list(INSTANCE_CLASSES.values())
    law = 1 / np.arange(6, 6 + len(kinds)) ** 3
    law /= law.sum()
    if part == "val":  # half of it even, or rare classes go unscored
        law = (law + 1 / len(law)) / 2
    chosen = rng.choice(len(law), int(rng.integers(d.objects[0], d.objects[1] + 1)), p=law).tolist()
    picture, instances, _ = draw(rng, [kinds[c] for c in chosen], chosen, d)
    single = len(chosen)
    if index % 12 == 3:
        half, c = d.size // 2, int(rng.choice(len(law), p=law))
        small, crowd, _ = draw(rng, [kinds[c]] * 8, [], replace(d, size=half))
        y, x = rng.integers(0, half, 2)
        window = np.s_[y : y + half, x : x + half]
        picture[window] = np.where(crowd[..., None] > 0, small, picture[window])
        instances[window] = np.where(crowd > 0, crowd + single, instances[window])
        chosen += [c] * 8
    cut = ((d.size, d.size), (d.size, d.size * 5 // 6), (d.size * 5 // 6, d.size))[rng.integers(3)]
    return picture[: cut[0], : cut[1]], instances[: cut[0], : cut[1]], chosen, single


def make_coco(root: Path, train: int = 400, val: int = 100, labeled: int | None = None) -> Path:
    """COCO folders of the instance variant: images/{train,val} and, of the same scenes,
    annotations/instances_*.json (run lengths, crowds) and lvis_*.json (polygons, federated, no
    file_name, frequencies of the training pictures).

    `labeled`: only so many training pictures are in the JSON files, the others lie in
    images/unlabeled (None: all)."""
    names = sorted(INSTANCE_CLASSES)  # ids 1, 2, ... in LVIS, see coco_id
    place = [names.index(name) for name in INSTANCE_CLASSES]

    def make(folder: Path) -> None:
        head = {
            "info": {"description": "drawn shapes"},
            "licenses": [{"id": 1, "name": "as this code", "url": ""}],
        }
        files = {}
        for kind in ("instances", "lvis"):
            for part in ("train", "val"):
                files[f"{kind}_{part}"] = {
                    **head,
                    "categories": [],
                    "images": [],
                    "annotations": [],
                }
        (folder / "annotations").mkdir()
        for part, index in [("train", i) for i in range(train)] + [("val", i) for i in range(val)]:
            picture, instances, classes, single = instance_scene(part, index)
            number = 3 * index + 1 + (part == "val")
            known = part == "val" or labeled is None or index < labeled
            path = folder / "images" / (part if known else "unlabeled") / f"{number:012d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, quality=95, subsampling=0)
            if not known:
                continue
            objects, crowd = [], []  # (mask, class) of those that are large enough
            for n, c in enumerate(classes, start=1):
                if (instances == n).sum() >= 12:
                    members = crowd if n > single else objects
                    members.append((instances == n, place[c]))
            absent = sorted(set(range(len(names))) - {place[c] for c in classes})
            negative = generator("negative", part, index).permutation(absent)[:6]
            image = {
                "id": number,
                "height": picture.shape[0],
                "width": picture.shape[1],
                "license": 1,
                "coco_url": f"http://localhost/images/{part}/{path.name}",
                "date_captured": "2025-01-01 00:00:00",
            }
            coco, lvis = files[f"instances_{part}"], files[f"lvis_{part}"]
            coco["images"].append({**image, "file_name": path.name})
            lvis["images"].append(
                {
                    **image,
                    "neg_category_ids": sorted((negative + 1).tolist()),
                    "not_exhaustive_category_ids": [c + 1 for _, c in crowd[:1]],
                }
            )
            for mask, c in objects:
                annotate(coco, number, mask, coco_id(c), iscrowd=0)
                annotate(lvis, number, mask, c + 1)
            if crowd:  # one region in COCO, one object of it in LVIS
                mask, c = crowd[0]
                region = np.any([member for member, _ in crowd], axis=0)
                annotate(coco, number, region, coco_id(c), iscrowd=1)
                annotate(lvis, number, mask, c + 1)
        add_categories(files, names)
        for key, data in files.items():
            (folder / "annotations" / f"{key}.json").write_text(json.dumps(data))

    return once(root, f"coco {INSTANCE} {INSTANCE_CLASSES} {train} {val} {labeled}", make)


def add_categories(files: dict[str, dict], names: list[str]) -> None:
    """The categories of `make_coco`'s files, in LVIS with their frequencies among the training
    pictures."""
    pairs = [(a["category_id"], a["image_id"]) for a in files["lvis_train"]["annotations"]]
    for c, name in enumerate(names):
        form = INSTANCE_CLASSES[name][0]
        facts = {
            "synset": f"{name}.n.01",
            "synonyms": [name],
            "def": f"a drawn {form}",
            **frequency_of(c + 1, pairs),
        }
        of_coco = {"id": coco_id(c), "name": name, "supercategory": form}
        of_lvis = {"id": c + 1, "name": name, **facts}
        for key, data in files.items():
            data["categories"].append(of_lvis if key.startswith("lvis") else of_coco)


def coco_id(place: int) -> int:
    """The category id in COCO's file of the class at this place: with gaps, as COCO has them."""
    return 1 + 7 * place // 2


def annotate(data: dict, image: int, mask: np.ndarray, category: int, **crowd: int) -> None:
    """Add an object to a file's content. With `iscrowd` 0 or 1 its outline is run lengths, without
    it polygons."""
    from pycocotools.mask import encode, toBbox

    runs = encode(np.asfortranarray(mask, np.uint8))
    if crowd:
        segmentation = {**runs, "counts": runs["counts"].decode()}
    else:
        segmentation = polygons(mask)
    data["annotations"].append(
        {
            "id": len(data["annotations"]) + 1,
            "image_id": image,
            "category_id": category,
            "area": float(mask.sum()),
            "bbox": toBbox(runs).tolist(),
            **crowd,
            "segmentation": segmentation,
        }
    )


def frequency_of(category: int, pairs: list[tuple[int, int]]) -> dict:
    """What LVIS says of a category, from the (category, image) of each annotation for training."""
    images = len({image for c, image in pairs if c == category})
    if images <= 10:
        frequency = "r"
    elif images <= 100:
        frequency = "c"
    else:
        frequency = "f"
    return {
        "frequency": frequency,
        "image_count": images,
        "instance_count": sum(c == category for c, _ in pairs),
    }


def make_things(
    root: Path, train: int = 400, tune: int = 200, val: int = 200, domain: Domain | None = None
) -> Path:
    """COCO folders of a few evenly frequent classes: images/{train,tune,val},
    annotations/instances_*.json."""
    kind = kind_of("things", domain)

    def make(folder: Path) -> None:
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            data = annotated(folder, kind, part, number, FEW, THING_CLASSES, None, domain)
            (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(data))

    return once(root, f"{kind} {FEW} {THING_CLASSES} {train} {tune} {val}", make)


def make_tail(
    root: Path, train: int = 600, tune: int = 200, val: int = 200, domain: Domain | None = None
) -> Path:
    """LVIS folders of a short long tail: images/{train,tune,val}, annotations/lvis_*.json,
    federated, with frequencies of the training pictures. The others are drawn half by the same law,
    half evenly, or rare classes went unscored."""
    law = 1 / np.arange(2, 2 + len(TAIL_CLASSES)) ** 2
    law /= law.sum()

    def make(folder: Path) -> None:
        files = {}
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            files[part] = annotated(
                folder,
                kind_of("tail", domain),
                part,
                number,
                TAIL,
                TAIL_CLASSES,
                law if part == "train" else (law + 1 / len(law)) / 2,
                domain,
            )
        pairs = [(a["category_id"], a["image_id"]) for a in files["train"]["annotations"]]
        for kind in files["train"]["categories"]:
            facts = frequency_of(kind["id"], pairs)
            for data in files.values():
                data["categories"][kind["id"] - 1].update(facts)
        for part, data in files.items():
            for image in data["images"]:
                here = {
                    a["category_id"] for a in data["annotations"] if a["image_id"] == image["id"]
                }
                absent = sorted({c["id"] for c in data["categories"]} - here)
                few = generator("tail negative", part, image["id"]).permutation(absent)[:6]
                image.update(neg_category_ids=sorted(few.tolist()), not_exhaustive_category_ids=[])
            (folder / "annotations" / f"lvis_{part}.json").write_text(json.dumps(data))

    return once(root, f"{kind_of('tail', domain)} {TAIL} {TAIL_CLASSES} {train} {tune} {val}", make)


def make_dusk(root: Path) -> dict[str, Path]:
    """What `--dataset shapes` draws for the scripts, with the same classes, forms and numbers of
    pictures, in another domain: by name, the folder of each set. The semantic one has the layout of
    `--dataset folder`."""
    return {
        "semantic": make_folder(root / "semantic", DUSK),
        "things": make_things(root / "things", domain=DUSK),
        "tail": make_tail(root / "tail", domain=DUSK),
    }


def make_folder(
    root: Path, domain: Domain, train: int = 1000, tune: int = 200, val: int = 300
) -> Path:
    """The semantic variant in a domain: images/{train,tune,val}, labels/{train,tune,val},
    classes.txt."""

    def make(folder: Path) -> None:
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            images, labels = folder / "images" / part, folder / "labels" / part
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            for index in range(number):
                picture, label = semantic_scene(part, index, domain)
                file = images / f"{index:06d}.jpg"
                Image.fromarray(picture).save(file, quality=95, subsampling=0)
                save_palette(label, labels / f"{index:06d}.png")
        lines = "".join(f"{name}\n" for name in ["background", *SEMANTIC_CLASSES])
        (folder / "classes.txt").write_text(lines)

    version = f"{kind_of('semantic', domain)} {SEMANTIC} {SEMANTIC_CLASSES} {train} {tune} {val}"
    return once(root, version, make)


def annotated(
    folder: Path,
    name: str,
    part: str,
    number: int,
    d: Difficulty,
    classes: dict,
    law: np.ndarray | None,
    domain: Domain | None,
) -> dict:
    """Draws scenes of a part into folder/images/<part>; what a COCO file says of them. `law`: share
    of each class. `name` begins the scenes."""
    data = {
        "info": {"description": "drawn shapes"},
        "images": [],
        "annotations": [],
        "categories": [
            {"id": c + 1, "name": kind, "supercategory": form[0]}
            for c, (kind, form) in enumerate(classes.items())
        ],
    }
    for made in (folder / "annotations", folder / "images" / part):
        made.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        rng = generator(name, part, index)
        chosen = rng.choice(
            len(classes), int(rng.integers(d.objects[0], d.objects[1] + 1)), p=law
        ).tolist()
        kinds = [list(classes.values())[c] for c in chosen]
        picture, instances, _ = draw(rng, kinds, chosen, d, domain)
        image = {
            "id": index + 1,
            "height": d.size,
            "width": d.size,
            "file_name": f"{index + 1:012d}.jpg",
        }
        Image.fromarray(picture).save(
            folder / "images" / part / image["file_name"], quality=95, subsampling=0
        )
        data["images"].append(image)
        for n, c in enumerate(chosen, start=1):
            mask = instances == n
            if mask.sum() >= 12:
                annotate(data, index + 1, mask, c + 1)
                data["annotations"][-1]["iscrowd"] = 0
    return data


# ------------------------------------------------------------------------------------- pre-training
SHIPPED = Path(__file__).with_name("test_resnet.safetensors")  # what `pretrain` made, 1.5 MB


def recipe_of(backbone: str, steps: int, batch_size: int) -> str:
    """What pre-trained weights depend on, beside the rounding of the machine."""
    return f"pretrain {backbone} {PRETRAIN} {steps} {batch_size}"


PRETRAIN_PICTURES = 10_000


def pretrain(root: Path, backbone: str, steps: int = 1200, batch_size: int = 64) -> Path:
    """Weights of a timm backbone that learned form, pattern and hue of single objects, as file
    root/weights/<name>/weights.safetensors.

    What ImageNet is to the papers: features, from classes (FORMS[8:]) that the embedded set does
    not have."""
    import safetensors.torch
    import timm
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from common import backbones
    from common.transforms import normalize

    recipe = recipe_of(backbone, steps, batch_size)

    def make(folder: Path) -> None:
        forms, rng = FORMS[8:], generator("pretrain", backbone)
        if not sys.stderr.isatty():  # else there are bars
            print(
                f"Pre-training {backbone} on drawn pictures of other classes, once: {steps} steps.",
                flush=True,
            )
        pictures, targets = [], []
        for _ in tqdm(
            range(PRETRAIN_PICTURES),
            desc="drawing pictures to pre-train on",
            leave=False,
            disable=None,
        ):
            form, pattern, hue = rng.integers(len(forms)), rng.integers(len(PATTERNS)), rng.random()
            d = PRETRAIN
            picture, _, _ = draw(rng, [(forms[form], PATTERNS[pattern], hue)], [0], d)
            pictures.append(picture)
            targets.append((form, pattern, int(hue * 12)))
        x, y = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = backbones.of_any_size(backbone, num_classes=len(forms) + len(PATTERNS) + 12)
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        bar = tqdm(
            range(steps),
            desc=f"pre-training {backbone} on other drawn classes",
            leave=False,
            disable=None,
        )
        for _ in bar:
            index = torch.from_numpy(rng.integers(0, len(x), batch_size))
            images = normalize(x[index])
            if rng.random() < 0.5:
                images = images.flip(-1)
            if rng.random() < 0.5:
                images = images.flip(-2)
            logits = net(images.to(memory_format=torch.channels_last)).split(
                [len(forms), len(PATTERNS), 12], dim=1
            )
            loss = sum(
                F.cross_entropy(z, t) for z, t in zip(logits, y[index].unbind(1), strict=True)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        right = [
            (z.argmax(1) == t).float().mean().item()
            for z, t in zip(logits, y[index].unbind(1), strict=True)
        ]
        facts = {
            "recipe": recipe,
            "timm": timm.__version__,
            "last batch": json.dumps({"loss": loss.item(), "form, pattern, hue": right}),
        }
        weights = {name: value.contiguous() for name, value in net.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "weights.safetensors", facts)

    version = f"{recipe} {timm.__version__}"
    return once(root / "weights" / backbone, version, make) / "weights.safetensors"


def pretrained(root: Path, backbone: str) -> Path:
    """The file of weights that `--weights shapes` means: the one beside this program for its
    backbone, else one that is pre-trained on first use."""
    import timm

    if backbone == SHIPPED.stem:
        return SHIPPED
    if not timm.is_model(backbone):
        raise UserError(
            f"--weights shapes pre-trains timm networks; --backbone {backbone} is none, so take a "
            f"timm name, or --weights none."
        )
    return pretrain(root, backbone)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, default=Path("datasets/shapes"), help="default %(default)s"
    )
    parser.add_argument(
        "--pretrain", metavar="BACKBONE", help="pre-train this network of timm, and draw nothing"
    )
    parser.add_argument(
        "--domain",
        choices=["dusk"],
        help="draw other scenes of the same classes, on other ground and in other light, into a "
        "folder of this name below --root",
    )
    args = parser.parse_args(argv)
    root = args.root
    if args.pretrain:
        print(pretrain(root, args.pretrain))
        return 0
    if args.domain:
        for folder in make_dusk(root / args.domain).values():
            print(folder)
        return 0
    kinds = {
        "voc": make_voc,
        "cityscapes": make_cityscapes,
        "coco": make_coco,
        "things": make_things,
        "tail": make_tail,
    }
    for name, make in kinds.items():
        start = time.perf_counter()
        try:
            folder = make(root / name)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}, {time.perf_counter() - start:.1f} s")
        for place, number in sorted(
            Counter(p.parent for p in folder.rglob("*") if p.is_file()).items()
        ):
            print(f"    {number:6,} files in {place.relative_to(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
