"""common/splits.py: the published lists against their hashes, formats, counts, draws, and files
that must be refused."""

import hashlib
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from common import splits
from common.errors import UserError
from common.splits import SplitError

REPO = Path(__file__).resolve().parents[1]


LISTS = (REPO / os.environ.get("TEST_DATA", "../shared/data")).resolve() / "splits"


published = pytest.mark.skipif(
    not LISTS.is_dir(), reason=f"no published lists in TEST_DATA ({LISTS})"
)


GTA_SEG = [key for key in splits.PUBLISHED if key[1] == "gta_seg" and key[2] != "val"]


def copy_of(dataset: str, family: str, name: str, file: str = "labeled.txt") -> Path:
    if family == "guided_distillation":
        return LISTS / family / "data_splits" / dataset / f"perc_{name[:-1]}.txt"
    place = LISTS / "gta_seg" / "data" / "splits" / {"voc": "pascal"}.get(dataset, dataset)
    return place / "val.txt" if name == "val" else place / name / file


def ids_of(path: Path, dataset: str) -> list[str]:
    return [splits.short_id(image, dataset) for image, _ in splits.read_list(path)]


# ---------------------------------------------------------------------------------- published lists


@published
@pytest.mark.parametrize(
    "key",
    [key for key in splits.PUBLISHED if key[1] in ("gta_seg", "guided_distillation")],
    ids="-".join,
)
def test_published_lists_have_their_hashes_and_counts(key):
    path, item = copy_of(*key), splits.PUBLISHED[key]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == item.sha256
    ids = ids_of(path, key[0])
    assert len(ids) == item.count
    assert splits.fingerprint(ids) == item.ids_sha256
    assert splits.published_name(reversed(ids)) == " ".join(key)
    assert splits.published_name(ids[1:]) is None


@published
@pytest.mark.parametrize("key", GTA_SEG, ids="-".join)
def test_labeled_and_unlabeled_are_disjoint_and_all_of_train(key):
    dataset = key[0]
    labeled, unlabeled = (
        ids_of(copy_of(*key, file), dataset) for file in ("labeled.txt", "unlabeled.txt")
    )
    val = ids_of(copy_of(dataset, "gta_seg", "val"), dataset)
    total, ids_sha256 = splits.TRAIN[dataset]
    assert not set(labeled) & set(unlabeled)
    assert not set(val) & {*labeled, *unlabeled}
    assert len(labeled) + len(unlabeled) == total
    assert splits.fingerprint(labeled + unlabeled) == ids_sha256
    assert splits.published_name(labeled + unlabeled) == f"{dataset} train"


@published
def test_facts_about_the_lists_that_the_documentation_warns_of():
    voc = {
        name: set(ids_of(copy_of("voc", "gta_seg", name), "voc"))
        for name in ("92", "183", "366", "732", "1464", "662", "1323", "2646", "5291")
    }
    fine = voc["1464"]
    assert voc["662"] < fine and voc["1323"] < fine and fine < voc["2646"] and fine < voc["5291"]
    assert voc["92"] | voc["183"] | voc["366"] | voc["732"] < fine
    assert len(voc["92"] & voc["183"]) == 9
    assert not voc["183"] < voc["366"] and not voc["366"] < voc["732"]
    guided = [
        set(ids_of(copy_of("cityscapes", "guided_distillation", f"{p}%"), "cityscapes"))
        for p in (5, 10)
    ]
    assert len(guided[0] & guided[1]) == 23


def test_the_table_of_published_lists_is_complete_and_well_formed():
    names = {
        key[:2]: [k[2] for k in splits.PUBLISHED if k[:2] == key[:2]] for key in splits.PUBLISHED
    }
    assert names == {
        ("voc", "gta_seg"): [
            "92",
            "183",
            "366",
            "732",
            "1464",
            "662",
            "1323",
            "2646",
            "5291",
            "val",
        ],
        ("cityscapes", "gta_seg"): ["100", "186", "372", "744", "1488", "val"],
        ("voc", "s4gan"): ["1/50", "1/20", "1/8"],
        ("cityscapes", "guided_distillation"): ["5%", "10%", "20%", "30%"],
        ("coco", "unbiased_teacher"): ["COCO_supervision"],
    }
    for item in splits.PUBLISHED.values():
        assert item.url.startswith("https://raw.githubusercontent.com/")
        assert all(len(digest) == 64 for digest in (item.sha256, item.ids_sha256) if digest)
    hashes = [item.ids_sha256 for item in splits.PUBLISHED.values() if item.ids_sha256]
    assert len(set(hashes)) == len(hashes)


def test_the_readme_lists_them_as_they_are():
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:6]]
        for line in (REPO / "data" / "README.md").read_text().splitlines()
        if line.startswith(("| voc |", "| cityscapes |"))
    ]
    expected = [
        [*key, str(item.count), item.ids_sha256[:8]]
        for key, item in splits.PUBLISHED.items()
        if key[0] != "coco"
    ]
    assert rows == expected


def test_fingerprint_is_the_sha256_of_sorted_lines():
    # printf 'a_1\nb_2\n' | sha256sum
    expected = "f87149f8e69a8ac3a1a23934dce111d7fa93a914d8367bd4ad6f82c31d8d242e"
    assert splits.fingerprint(["b_2", "a_1"]) == expected
    assert splits.fingerprint(["b_2"]) != expected


@pytest.mark.parametrize(
    "name, folder", [("1/8", "1-of-8"), ("5%", "5pc"), ("183", "183"), ("2645", "2646")]
)
def test_folder_name(name, folder):
    assert splits.folder_name(name) == folder


# -------------------------------------------------------------------------------------------- S4GAN


@published
@pytest.mark.parametrize("name", ["1/50", "1/20", "1/8"])
def test_s4gan_lists(name):
    folder = LISTS / "s4gan" / "voc"
    ids = splits.read_s4gan(folder / "split_0.pkl", folder / "train_aug.txt", name)
    assert ids == (folder / f"{name.replace('/', '-')}.txt").read_text().split()
    assert len(ids) == splits.PUBLISHED["voc", "s4gan", name].count == splits.count(name, 10582)
    assert ids[:3] == ["2008_006967", "2011_000850", "2008_001551"]
    assert splits.published_name(ids) == f"voc s4gan {name}"


@published
def test_s4gan_order_of_all_ids(tmp_path):
    folder = LISTS / "s4gan" / "voc"
    unsorted = tmp_path / "train_aug.txt"
    unsorted.write_text("\n".join(reversed((folder / "train_aug.txt").read_text().split())))
    ids = splits.read_s4gan(folder / "split_0.pkl", unsorted, "1/50")
    assert ids == splits.read_s4gan(folder / "split_0.pkl", folder / "train_aug.txt", "1/50")
    ids = splits.read_s4gan(folder / "split_0.pkl", folder / "train_aug.txt", "all")
    assert ids == (folder / "permutation.txt").read_text().split()
    with pytest.raises(SplitError, match="1/50, 1/20, 1/8, all"):
        splits.read_s4gan(folder / "split_0.pkl", folder / "train_aug.txt", "1/3")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps(Malicious()), "mkdir"),
        (pickle.dumps(np.array([Malicious()], dtype=object)), "not a pickled"),
        (pickle.dumps([1, 0]), "not a pickled list of integers"),
        (pickle.dumps(np.array([1.0, 0.0])), "not a pickled list of integers"),
        (pickle.dumps(np.array([1, 1])), "not an order of the 2 images"),
        (pickle.dumps(np.array([0, 1, 2])), "not an order of the 2 images"),
        (pickle.dumps(np.array([1, 0])), "do not give S4GAN's published list"),
        (pickle.dumps(np.array([1, 0]))[:-20], "not a pickled integer array"),
        (b"<html>", "not a pickled integer array"),
    ],
)
def test_s4gan_refuses_other_pickles(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("ids.txt").write_text("2007_000001\n2007_000002\n")
    Path("order.pkl").write_bytes(content)
    with pytest.raises(SplitError, match=message):
        splits.read_s4gan("order.pkl", "ids.txt", "1/8")
    assert not Path("it_ran").exists()


# ------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    "line, dataset, entry, name",
    [
        ("2007_000733", "voc", ("2007_000733", None), "2007_000733"),
        (
            "JPEGImages/2008_006748.jpg SegmentationClass/2008_006748.png",
            "voc",
            ("JPEGImages/2008_006748.jpg", "SegmentationClass/2008_006748.png"),
            "2008_006748",
        ),
        (
            "leftImg8bit/train/aachen/aachen_000140_000019_leftImg8bit.png",
            "cityscapes",
            ("leftImg8bit/train/aachen/aachen_000140_000019_leftImg8bit.png", None),
            "aachen_000140_000019",
        ),
        (
            "leftImg8bit/train/ulm/ulm_000079_000019_leftImg8bit.png\t"
            "gtFine/ulm/ulm_000079_000019_gtFine_labelTrainIds.png",
            "cityscapes",
            (
                "leftImg8bit/train/ulm/ulm_000079_000019_leftImg8bit.png",
                "gtFine/ulm/ulm_000079_000019_gtFine_labelTrainIds.png",
            ),
            "ulm_000079_000019",
        ),
        (
            "bremen_000041_000019_gtFine_instanceIds.png",
            "cityscapes",
            ("bremen_000041_000019_gtFine_instanceIds.png", None),
            "bremen_000041_000019",
        ),
        (
            "/data/my.photos/scene.v2.JPG",
            "folder",
            ("/data/my.photos/scene.v2.JPG", None),
            "scene.v2",
        ),
        ("scene.v2", "folder", ("scene.v2", None), "scene.v2"),
        (r"C:\data\scene_1.png", "folder", ("C:/data/scene_1.png", None), "scene_1"),
    ],
)
def test_formats(tmp_path, line, dataset, entry, name):
    path = tmp_path / "list.txt"
    for text in (line, f"{line}\n", f"\n  {line}\r\n\r\n", f"\ufeff{line}\n"):
        path.write_text(text, encoding="utf-8", newline="")
        assert splits.read_list(path) == [entry]
    assert splits.short_id(entry[0], dataset) == name
    if entry[1]:
        assert splits.short_id(entry[1], dataset) == name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"2007_000001\n2007_000002\n2007_000001\n", "line 3: 2007_000001 is in the list twice"),
        (b"a.jpg b.png c.png\n", "line 1: expected"),
        (b"ok.jpg\nmy photo.jpg\n", "line 2: expected"),
        (b"2007_000001 -1\n", "line 1: expected"),
        (json.dumps({"1.0": {"0": [3, 4]}}).encode(), "line 1: expected"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a text file"),
    ],
)
def test_bad_lists_are_named(tmp_path, content, message):
    path = tmp_path / "my_list.txt"
    path.write_bytes(content)
    with pytest.raises(SplitError, match=message) as caught:
        splits.read_list(path)
    assert "my_list.txt" in str(caught.value)


def test_missing_list_is_named(tmp_path):
    with pytest.raises(SplitError, match="absent.txt .No such file"):
        splits.read_list(tmp_path / "absent.txt")


# ------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "text, total, expected",
    [
        ("183", 10582, 183),
        ("1/8", 10582, 1322),
        ("1/50", 10582, 211),
        ("5%", 10582, 529),
        ("12.5%", 10582, 1322),
        ("29%", 100, 29),
        ("0.1%", 50, 1),
        ("1/100", 50, 1),
        ("all", 7, 7),
        ("100%", 7, 7),
        ("1/1", 7, 7),
        ("7", 7, 7),
    ],
)
def test_count(text, total, expected):
    assert splits.count(text, total) == expected


@pytest.mark.parametrize(
    "text", ["0", "-3", "0%", "0/5", "1/0", "1.5", "many", "", "5 %x", "1/-8", "٣", "1e3"]
)
def test_count_refuses_nonsense(text):
    with pytest.raises(SplitError, match="is no number of images"):
        splits.count(text, 100)


@pytest.mark.parametrize("text", ["101", "150%", "3/2"])
def test_count_refuses_more_than_there_are(text):
    with pytest.raises(SplitError, match="only 100"):
        splits.count(text, 100)


# -------------------------------------------------------------------------------------------- draws


def long_tailed(n: int, k: int) -> dict[str, set[int]]:
    """Class 0 in every image, class c in about n / 2^c of them, at least in 3."""
    rng = np.random.default_rng(0)
    images = {f"i{i:05d}": {0} for i in range(n)}
    for c in range(1, k):
        for i in rng.choice(n, max(3, n >> c), replace=False):
            images[f"i{i:05d}"].add(c)
    return images


IMAGES = long_tailed(400, 12)


@pytest.mark.parametrize("classes", [None, IMAGES.__getitem__], ids=["plain", "balanced"])
def test_draws_are_nested_seeded_and_do_not_depend_on_the_order_of_ids(classes):
    longest = splits.draw(list(IMAGES), len(IMAGES), 3, classes)
    assert sorted(longest) == sorted(IMAGES)
    for n in (1, 7, 50, 399):
        assert splits.draw(list(reversed(IMAGES)), n, 3, classes) == longest[:n]
    assert splits.draw(list(IMAGES), 50, 4, classes) != longest[:50]


def test_draws_stay_what_they_are_on_every_platform():
    ids = [f"i{i}" for i in range(10)]
    assert splits.draw(ids, 4, 0) == ["i3", "i2", "i1", "i8"]
    assert splits.draw(ids, 4, 1, lambda name: {int(name[1]) % 3}) == ["i2", "i4", "i9", "i5"]


@pytest.mark.parametrize("seed", range(5))
def test_draws_cover_all_classes_and_balance_the_rare_ones(seed):
    drawn = splits.draw(list(IMAGES), 12, seed, IMAGES.__getitem__)
    assert set().union(*(IMAGES[name] for name in drawn)) == set(range(12))

    def holding(names, c):
        return sum(c in IMAGES[name] for name in names)

    balanced, plain = (splits.draw(list(IMAGES), 36, seed, f) for f in (IMAGES.__getitem__, None))
    assert min(holding(balanced, c) for c in range(12)) == 3  # all there are of the rarest classes
    assert min(holding(plain, c) for c in range(12)) < 3


def test_each_step_of_a_draw_takes_a_least_covered_class():
    drawn = splits.draw(list(IMAGES), 60, 1, IMAGES.__getitem__)
    covered, left = dict.fromkeys(range(12), 0), dict(IMAGES)
    for name in drawn:
        available = [c for c in covered if any(c in held for held in left.values())]
        fewest = min(covered[c] for c in available)
        assert any(covered[c] == fewest for c in left[name])
        for c in left.pop(name):
            covered[c] += 1


def test_draws_depend_on_the_seed_among_equals():
    firsts = {
        splits.draw(list("abcdefgh"), 1, seed, lambda name: {ord(name)})[0] for seed in range(40)
    }
    assert len(firsts) >= 6


def test_classes_are_asked_for_once_per_image_and_may_be_empty():
    asked = []
    ids = [f"i{i}" for i in range(20)]
    drawn = splits.draw(
        ids, 20, 0, lambda name: asked.append(name) or ([5, 5] if name in ("i3", "i7") else [])
    )
    assert sorted(asked) == sorted(ids)
    assert set(drawn[:2]) == {"i3", "i7"}
    assert sorted(drawn) == sorted(ids)


def test_a_draw_of_full_size_is_quick():
    rng = np.random.default_rng(0)
    held = {f"i{i}": set(rng.integers(0, 1203, 12).tolist()) for i in range(10582)}
    start = time.perf_counter()
    assert len(splits.draw(list(held), 10582, 0, held.__getitem__)) == 10582
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "ids, n, seed", [(["a", "b"], 3, 0), (["a", "b"], 0, 0), (["a", "a"], 1, 0), (["a"], 1, -1)]
)
def test_impossible_draws_are_refused(ids, n, seed):
    with pytest.raises(SplitError):
        splits.draw(ids, n, seed)


def test_names_with_spaces_in_a_list_of_files(tmp_path):
    names = [tmp_path / "my photos" / "a b.jpg", tmp_path / "my photos" / "c.jpg copy.jpg"]
    names[0].parent.mkdir()
    [name.touch() for name in names]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    assert splits.read_list(tmp_path / "list.txt") == [(str(name), None) for name in names]


def test_a_wrong_list_is_an_error_for_the_user(tmp_path):
    """A program that reads a list needs no translation: the command line prints the sentence."""
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        splits.read_list(tmp_path / "list.txt")
