"""Lists of labeled images: the published ones, the formats they come in, and seeded draws.

Pure functions on names; nothing here opens an image. The hashes are those of the lists at the
commits in the addresses below, and `fingerprint` is the hash that does not depend on a list's order
or format."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import UserError, one_line
from common.files import read_text


class SplitError(UserError):
    """One sentence for the user: which list is wrong, how, and what to do."""


@dataclass(frozen=True)
class Published:
    """One list as its authors publish it.

    url: address of the labeled list. sha256: hash of that file. ids_sha256: `fingerprint` of its
    ids, None where the file holds many lists. count: ids in the list, 0 where the file holds many
    lists."""

    url: str
    sha256: str | None
    ids_sha256: str | None
    count: int


# Training images in all: number and fingerprint. VOC is train + SBD without val ("train_aug"),
# Cityscapes fine train.
TRAIN = {
    "voc": (10582, "d1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24"),
    "cityscapes": (2975, "7f56ebec1d2eb8db59a3600206fcf7f05b53a7f3a8cf66381e6de73356b9eb7a"),
}

_GITHUB = "https://raw.githubusercontent.com"

_GTA_SEG = f"{_GITHUB}/Jin-Ying/GTA-Seg/534f10f4225ffd11e0cff29db51297ab7da41b44/data/splits"

_S4GAN = (
    f"{_GITHUB}/sud0301/semisup-semseg/586609b7bd4bf851c4b1f2691584ce8b11ba6d50/"
    f"splits/voc/split_0.pkl"
)

_GUIDED = (
    f"{_GITHUB}/facebookresearch/GuidedDistillation/f775b48028eedc5501f66dee2f49d9896027a59e/"
    f"data_splits"
)

_TEACHER = (
    f"{_GITHUB}/facebookresearch/unbiased-teacher/d13947a4c5d5d218c85b8f3a960cf598b564df39/dataseed"
)

# folder in GTA-Seg's repository -> SHA-256 of labeled.txt (or val.txt), fingerprint of its ids
_GTA_SEG_HASHES = {
    "pascal/92": (
        "7feeb5314d99485739e79c385d3b70145d44dc60190acb4d5df63165c630ef6a",
        "325a965b6206ac6e9c4c86961d5f4d9f1aff9c361c42dc79719ca85de7e64cc6",
    ),
    "pascal/183": (
        "5dac0b72efebf63344c90c3700537e6d667c80bfa4c17205d96d459e655ec976",
        "3b208061a59a42b4954b136dc46b00f263178ebf25ead1164eb3509ab6657ce1",
    ),
    "pascal/366": (
        "97abd8fe7d52346b2663e6faed73e89560a171788ea0a12c012bff26c74a25d4",
        "ea8aa0b2ceedf56b536241b16b57fadfd9c0c8301bd93f7c9b7ad6df2ffc4c26",
    ),
    "pascal/732": (
        "b2973f8d47b780e0bc53f598a51fb651c21c7485f4d02111296452abb931ce44",
        "81c3256e4a7fc4c31b6b1e9084c44eec318b44c58c622283035d02f6b17c0137",
    ),
    "pascal/1464": (
        "129f1fe991729b1862115b77738c938c149c1f167baa02b4b3186aea9f0d6a84",
        "aa623bd2c8ce4443a8aaae51c524c0eb165e8e44caf6aa9e3ad33d7b75a3ef20",
    ),
    "pascal/662": (
        "e9bb5d18af8041799389ad0c2274f043161a912837416c2c6403d9d901dee4c1",
        "0c6466b63b2f52069830afd605968347ec2696b15d25b91329d77d203023c1b1",
    ),
    "pascal/1323": (
        "112dcea11e1a1d211e03db87c743989ffb29c16f90ce30da7c118b3c28f8d697",
        "2f24ef964761485ffeb474d2e312d92cf4135e0032e54d0574a3a8a72546e444",
    ),
    "pascal/2646": (
        "4cc769f75d69c74e4eabdb1dff7cb93ac22a4c30a9b759a7cedec3e3c6b7ed28",
        "3c653f4ff30f3c059b091ea51a8ac90e0481aab837721c404e73cbe0a4a14aa9",
    ),
    "pascal/5291": (
        "989051b20c885ee09c37b5e5d005c067a6cd1bbcf40b06df6eb4af9e41992296",
        "8ef07e486384a8252039367570eac09e86e9a1ea1876da9128267030163b8b4d",
    ),
    "pascal/val": (
        "6f8edc37993764f6e212237d39546fb595246244147e8a050813c520aac0ade1",
        "cdc1326d12f69ce5153aa5da04a4d8783e146868d42d19f82f44e74b97ac907d",
    ),
    "cityscapes/100": (
        "d919fdf2ee2a662b4bfd802c5fadb890db1af13d1a24073825a4b39c22b36ca5",
        "d356a23daa743733be4afc4b4e5ce286ff4ad35b00a442266ea721713c78b219",
    ),
    "cityscapes/186": (
        "b325a363ec870628cbf3265bf48f9d9bf3e6e87a6e5c004ca989cda6279a0fd4",
        "c9b2d8a6a7290bcaf224c7cdec576682a677f7248a36dbfde498c55962a363fa",
    ),
    "cityscapes/372": (
        "3d0c8d12a26013a0a48848fb81382bd510e444abd7cccdda0303e03cdcc62dd9",
        "da9db561f5c1f9e3dd2c9fde5fb55f40314592d9adaf5ea4089d74595a705c4e",
    ),
    "cityscapes/744": (
        "489d49d7dde31150a862dbd0aabfa8e787b9278ee51978d7d3d2c8e67d666c66",
        "d787c1a5a4d0e4b8dbff17803e79a1eb2b7e96516fd89a36a3eb1923a6f8bac9",
    ),
    "cityscapes/1488": (
        "1c345bd7ed630b201bc3c3cde2604dce0d65df35c142bbf35ffea8a699485488",
        "245bcea234d21ace2a4f968503cd0662f88b1ace5096d8040e393b8c4c0eb2ca",
    ),
    "cityscapes/val": (
        "8115b5b627fe0b24001c541804788b8c2bb16076b78ad036a9905d471abd11fd",
        "73099b252b778d6fa89467ad05a7068b8a6a0f931693f909e1acbf189a36fb52",
    ),
}

_S4GAN_SHA256 = "4e572847e864fcd1ecc1457c6413751abac38424e4bd40a9277d4f7afdc0c755"

_S4GAN_HASHES = {
    "1/50": (211, "3a73656340d8f32e63a9c46806c29d870f4b1dd123f7d596a2f9cba4fff87976"),
    "1/20": (529, "a5c4123009d66b7e8f1c4257ff3fa0a31b5d093fb0779c2a8a8481359a0abe96"),
    "1/8": (1322, "10e57e4aa33cf70fc08d07271b2af4f4d335abb2f8f6baed4f0dd93f0691c969"),
}

# The fingerprints of these four are computed from the files whose SHA-256 stands beside them;
# nobody published them.
_GUIDED_HASHES = {
    "5%": (
        144,
        "da09a92a74030679fe00288dcbd0f471963cb2330ae07db8338dc91c2a00f7ef",
        "a1f095984fbdd13ce6272b8169798046f15137c6a759ddc00022fd712ae21a4f",
    ),
    "10%": (
        296,
        "53fa4fda61e82362715a1f546a5832b0a7d9bfdeb1398298f402c25e696e2bd6",
        "2211730a781e623dcaf7cab5e9319cdb5a2b60e854a5d6e78b087c30562e1473",
    ),
    "20%": (
        592,
        "19d9af1a1156dbc2ecdf014d415f806cdcaa3a2f6615362a2bb48d7c1c470420",
        "9c51d2414c3c46c74dd55e1031b19345baaa94cc8997334993841041bcef7c3f",
    ),
    "30%": (
        888,
        "94a4ad58a511d0071fcfbe2ad81764fdb388289a94971a356a9eee592256381f",
        "a0646616cd19bfc35c3bdb28a5dffa471dc623de88e157c0e284a9182f764f8f",
    ),
}


def _published() -> dict[tuple[str, str, str], Published]:
    table = {}
    for folder, (sha256, ids_sha256) in _GTA_SEG_HASHES.items():
        place, name = folder.split("/")
        dataset = "voc" if place == "pascal" else place
        count = int(name) if name != "val" else {"voc": 1449, "cityscapes": 500}[dataset]
        url = f"{_GTA_SEG}/{folder}.txt" if name == "val" else f"{_GTA_SEG}/{folder}/labeled.txt"
        table[dataset, "gta_seg", name] = Published(url, sha256, ids_sha256, count)
    for name, (count, ids_sha256) in _S4GAN_HASHES.items():
        table["voc", "s4gan", name] = Published(_S4GAN, _S4GAN_SHA256, ids_sha256, count)
    for name, (count, sha256, ids_sha256) in _GUIDED_HASHES.items():
        url = f"{_GUIDED}/cityscapes/perc_{name[:-1]}.txt"
        table["cityscapes", "guided_distillation", name] = Published(url, sha256, ids_sha256, count)
    table["coco", "unbiased_teacher", "COCO_supervision"] = Published(
        f"{_TEACHER}/COCO_supervision.txt",
        "3dc88c1fee5676d3da717a4a2a357e5e590d9bd7c94e2feadc60d43d70c4401d",
        None,
        0,
    )
    return table


PUBLISHED = _published()  # (data set, family, name) -> Published

ALIASES = {"2645": "2646"}  # GTA-Seg's paper prints 2645 for a list of 2646

_NAMES = {item.ids_sha256: " ".join(key) for key, item in PUBLISHED.items() if item.ids_sha256}

_NAMES |= {ids_sha256: f"{dataset} train" for dataset, (_, ids_sha256) in TRAIN.items()}

# U2PL replaced its 372 list as a bug fix (2022-05-13); GTA-Seg ships the first one.
_NAMES["af350f9ea948a470ca54a5c0fa8c9829a30ce537825aa9d3de2d450a9bbcc839"] = "cityscapes u2pl 372"


def fingerprint(ids: Iterable[str]) -> str:
    """SHA-256 of the sorted `short_id`s, one per line with a final newline: the same for any order
    and format."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(ids)).encode()).hexdigest()


def published_name(ids: Iterable[str]) -> str | None:
    """Which published list these `short_id`s are, e.g. "voc gta_seg 183" or "voc train"; None for
    any other set.

    Other authors' lists of the same images (U2PL, UniMatch, ST++) go by GTA-Seg's name.
    """
    return _NAMES.get(fingerprint(ids))


def folder_name(name: str) -> str:
    """Folder of a published list below `<root>/splits/<family>`: 1/8 -> 1-of-8, 5% -> 5pc, 2645 ->
    2646."""
    return ALIASES.get(name, name).replace("/", "-of-").replace("%", "pc")


_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def read_list(path: str | Path) -> list[tuple[str, str | None]]:
    """Read a list of images in any published format -> [(image, mask or None)], as written (but for
    backslashes, which become slashes) and in the file's order.

    A line is a bare id (GTA-Seg, U2PL, S4GAN on VOC), one path (GTA-Seg's leftImg8bit, Guided
    Distillation's gtFine_instanceIds.png, images of one's own), or an image and its mask (UniMatch,
    ST++), parted by a space, a tab, a comma or a semicolon. The file may come from any system.
    Blank lines are skipped. Raises SplitError when the file cannot be read, is empty, names an
    image twice or has any other format."""
    try:
        lines = read_text(Path(path)).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise SplitError(f"cannot read the list {path} ({reason}); name another") from error
    entries: list[tuple[str, str | None]] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        columns = columns_of(line.strip())
        if not columns:
            continue
        pair = len(columns) == 2 and all(column.lower().endswith(_SUFFIXES) for column in columns)
        if len(columns) > 1 and not pair:
            raise SplitError(
                f"{path}, line {number}: expected an id, an image path, or an image and its mask, "
                f"without spaces in the names, but found {line.strip()[:60]!r}"
            )
        if columns[0] in seen:
            raise SplitError(
                f"{path}, line {number}: {columns[0]} is in the list twice; take it out once"
            )
        seen.add(columns[0])
        entries.append((columns[0], columns[1] if pair else None))
    if not entries:
        raise SplitError(f"the list {path} is empty; write one image a line")
    return entries


def columns_of(line: str) -> list[str]:
    """The parts of a line of a list. A name may hold spaces where a file is called so, and commas
    where these do not part an image from its mask."""
    line = line.replace("\\", "/")
    columns = line.split()
    if len(columns) > 1 and is_file(line):
        return [line]
    parted = [column for column in re.split(r"[\s,;]+", line) if column]
    if len(parted) == 2 and all(column.lower().endswith(_SUFFIXES) for column in parted):
        return parted
    return columns


def is_file(name: str) -> bool:
    """Whether a file has this name; a text that cannot be a name has none."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def short_id(entry: str, dataset: str) -> str:
    """The id of an image in fingerprints: VOC 'YYYY_NNNNNN', Cityscapes 'city_NNNNNN_NNNNNN', else
    the stem.

    entry: an image or label path, or a bare id; a name without the data set's pattern keeps its
    stem."""
    name = PurePosixPath(entry.replace("\\", "/")).name
    stem = name.rpartition(".")[0] if name.lower().endswith(_SUFFIXES) else name
    if dataset == "cityscapes":
        match = re.match(r".+?_\d{6}_\d{6}(?=_|$)", stem)
        return match.group() if match else stem
    return stem


def count(text: str, total: int) -> int:
    """How many of `total` images: '183' -> 183, '1/8' -> floor(total / 8), '5%' -> floor(.05
    total), 'all' -> total.

    A share gives at least one image. Raises SplitError for anything else, and for more than there
    are."""
    text = text.strip()
    share = Fraction(0)
    if re.fullmatch(r"[0-9]{1,9}/[1-9][0-9]{0,9}", text):
        share = Fraction(text)
    elif re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?%", text):
        share = Fraction(text[:-1]) / 100
    if text == "all":
        number = total
    elif share:
        number = max(int(share * total), 1)
    else:
        number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if number <= 0:
        raise SplitError(
            f"{text!r} is no number of images; write a number (183), a share (1/8 or 5%), all, or "
            f"the name of a list that exists"
        )
    if number > total:
        raise SplitError(
            f"{text} asks for {number} labeled images, but there are only {total}; ask for fewer"
        )
    return int(number)


def draw(
    ids: Sequence[str], n: int, seed: int, classes: Callable[[str], Iterable[int]] | None = None
) -> list[str]:
    """Draw n of the ids; nested: with the same seed, a smaller draw is the beginning of a larger
    one.

    classes: id -> the classes in that image, called once per id. With it the draw is balanced:
    again and again it takes a random unused image that holds the class found in the fewest chosen
    images so far, so K images or more cover all K classes. The order of `ids` does not matter, and
    the same seed gives the same draw everywhere: NumPy keeps the raw stream of PCG64 fixed, which
    it does not promise for shuffles. Raises SplitError for an impossible n."""
    names = sorted(ids)
    if len(set(names)) != len(names):
        raise SplitError("the images to draw from are not all different")
    if not 1 <= n <= len(names):
        raise SplitError(
            f"cannot draw {n} labeled images from {len(names)}; ask for another number"
        )
    if seed < 0:
        raise SplitError(f"the seed of a draw is {seed}; give one of 0 or more")
    stream = np.random.PCG64(seed)
    names = [names[i] for i in np.argsort(stream.random_raw(len(names)), kind="stable")]
    if classes is None:
        return names[:n]
    classes_of_image = [set(classes(name)) for name in names]
    found = sorted(set().union(*classes_of_image))
    # A class has a column, in random order, so that argmin breaks ties by the seed.
    order = np.argsort(stream.random_raw(len(found)), kind="stable")
    column_of_class = {found[c]: column for column, c in enumerate(order)}
    columns = [[column_of_class[c] for c in image] for image in classes_of_image]
    waiting: list[list[int]] = [[] for _ in found]  # images of a class, the next one last
    for i in reversed(range(len(names))):
        for k in columns[i]:
            waiting[k].append(i)
    # chosen images that hold the class; infinite when no unused one is left
    covered = np.zeros(len(found))  # (number of classes,)
    used = np.zeros(len(names), dtype=bool)
    chosen: list[str] = []
    while len(chosen) < n and np.isfinite(covered).any():
        k = int(covered.argmin())
        while waiting[k] and used[waiting[k][-1]]:
            waiting[k].pop()
        if not waiting[k]:
            covered[k] = np.inf
            continue
        i = waiting[k].pop()
        used[i] = True
        covered[columns[i]] += 1
        chosen.append(names[i])
    without_class = [name for i, name in enumerate(names) if not used[i]]
    return chosen + without_class[: n - len(chosen)]


class _IntegerArrayUnpickler(pickle.Unpickler):
    """Allows the three names an integer array is made of, so that a foreign file cannot run
    anything."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # the same function under NumPy 1 and 2
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_s4gan(pickle_path: str | Path, ids_path: str | Path, name: str) -> list[str]:
    """Labeled ids of S4GAN's VOC split '1/50', '1/20' or '1/8'; 'all' gives all 10,582 in its
    order.

    pickle_path: split_0.pkl of sud0301/semisup-semseg, a permutation of row numbers. ids_path: the
    list of all ids, which it indexes in sorted order. Labeled are the first floor(ratio * 10582),
    unlabeled the rest. Raises SplitError for an unknown name, a pickle with anything but a
    permutation in it, and ids that do not give the published list."""
    expected = {key[2]: item.ids_sha256 for key, item in PUBLISHED.items() if key[1] == "s4gan"}
    expected["all"] = TRAIN["voc"][1]
    if name not in expected:
        raise SplitError(f"there is no s4gan list {name!r}, only {', '.join(expected)}")
    ids = sorted(short_id(image, "voc") for image, _ in read_list(ids_path))
    try:
        with open(pickle_path, "rb") as file:
            order = _IntegerArrayUnpickler(file).load()
    except OSError as error:
        raise SplitError(f"cannot read {pickle_path} ({error.strerror}); fetch it again") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise SplitError(
            f"{pickle_path} is not a pickled integer array ({one_line(error)}); fetch it again"
        ) from error
    if not (isinstance(order, np.ndarray) and order.ndim == 1 and order.dtype.kind in "iu"):
        raise SplitError(f"{pickle_path} is not a pickled list of integers; fetch it again")
    if not np.array_equal(np.sort(order), np.arange(len(ids))):
        raise SplitError(
            f"{pickle_path} is not an order of the {len(ids)} images in {ids_path}; fetch both "
            f"again"
        )
    chosen = [ids[i] for i in order[: count(name, len(ids))]]
    if fingerprint(chosen) != expected[name]:
        raise SplitError(
            f"{pickle_path} and {ids_path} do not give S4GAN's published list {name}; fetch both "
            f"again"
        )
    return chosen
