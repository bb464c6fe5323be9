"""Checkpoints, atomically saved and safely loaded, and files of weights from elsewhere."""

import argparse
import collections
import contextlib
import json
import pathlib
import pickle
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, one_line
from common.files import write_bytes, written
from common.typed_json import said

# Keys under which programs keep a state dict, at any depth. Where several stand side by side, the
# first one here is taken.
WRAPPERS = (
    "networks",
    "model",
    "model_state",
    "model_state_dict",
    "state_dict",
    "teacher",
    "supervised",
    "student",
    "model_ema",
    "ema",
    "ema_state_dict",
    "net",
    "network",
    "module",
)


# -------------------------------------------------------------------------------------- checkpoints
Count = Annotated[int, msgspec.Meta(ge=0)]
Setting = bool | int | float | str | list | None


class Form(msgspec.Struct, kw_only=True):
    """What any checkpoint holds, where it has it."""

    networks: dict[str, dict[str, Tensor]] = {}
    step: Count = 0
    scored: Count = 0
    seconds: float = 0.0
    skipped: Count = 0


class Score(TypedDict):
    """The score of a network: its step, and the numbers of a metric."""

    step: int


class Trained(Form, kw_only=True):
    """What a checkpoint must hold to be scored and predicted with, and the scores of its networks.
    A script may ask for more in a form of its own."""

    networks: Annotated[dict[str, dict[str, Tensor]], msgspec.Meta(min_length=1)]
    step: Count
    settings: dict[str, Setting]
    classes: Annotated[list[str], msgspec.Meta(min_length=1)]
    last: dict[str, Score] = {}
    best: dict[str, Score] = {}

    def __post_init__(self):
        if self.last.keys() != self.best.keys():
            raise ValueError("`last` and `best` are scores of different networks")


def save_checkpoint(path: Path, script: str, state: dict) -> None:
    """torch.save, atomically, and tensor by tensor: no copy of the whole lies in memory. `state`
    holds tensors, numbers, strings, lists and dicts only. The file has a check sum of each of its
    parts, see `is_damaged`."""
    with written(path) as file:
        try:
            torch.save({"script": script, **state}, file)
        except RuntimeError as error:
            # What the disk said, of which torch makes an error of its own.
            raise cause_of(error, OSError) from None


def cause_of(error: BaseException, kind: type[BaseException]) -> BaseException:
    """The error of this kind that led to `error`, or `error` itself where there is none."""
    earlier = error
    while earlier is not None and not isinstance(earlier, kind):
        earlier = earlier.__context__
    return error if earlier is None else earlier


def load_checkpoint(path: Path, script: str, form: type[Form] = Form) -> dict:
    """Read what `save_checkpoint` wrote, which must have this form; UserError for a missing, broken
    or foreign file."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; name one, such as runs/x/best.pt.")
    if is_damaged(path):
        raise UserError(
            f"{path} is not readable any more: it has changed since it was written (its check sums "
            f"differ); give another one, or train again with another --out."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (zip, pickle, runtime errors)
        raise UserError(
            f"{path} is not a readable checkpoint ({reason_of(error)}); "
            f"give another one, or train again with another --out."
        ) from None
    if not isinstance(state, dict) or "script" not in state:
        raise UserError(
            f"{path} is a file of weights, not a checkpoint of {script}; give it to --weights."
        )
    if state["script"] != script:
        raise UserError(
            f"{path} is a checkpoint of {state['script']}, not of {script}; give another one."
        )
    try:
        msgspec.convert({key: state[key] for key in state if isinstance(key, str)}, form)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(
            f"{path} is not a checkpoint that {script} wrote ({said(error)}); give another one."
        ) from None
    return state | {"path": str(path)}


def is_damaged(path: Path) -> bool:
    """Whether a zip archive, as torch.save writes them, differs from the check sums (CRC-32) in it,
    at which torch.load does not look. False for files of other kinds, which have none."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Those who switch the check sums off (torch.serialization) have the same in all parts.
            sums = {part.CRC for part in archive.infolist() if part.file_size}
            return len(sums) > 1 and archive.testzip() is not None
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError):
        return zipfile.is_zipfile(path)


@contextlib.contextmanager
def fitting(path: str) -> Iterator[None]:
    """`with fitting(path)`: what a checkpoint holds goes into networks and optimizers here, and
    when it does not fit them, it is a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)[:90]
        raise UserError(
            f"{path} does not hold what this run needs ({reason}); give another one, or train "
            f"again with another --out."
        ) from None


def returned(networks: dict, names: tuple[str, ...]) -> str:
    """The first of the `names` that is among the networks of a checkpoint, else their first."""
    for name in names:
        if name in networks:
            return name
    return next(iter(networks))


def export(path: Path, script: str, names: tuple[str, ...]) -> None:
    """Write the network that `returned` chooses as <path>.safetensors: its weights, and in the
    header, under "facts", JSON with the script, the network, the step, the classes and the
    settings."""
    from safetensors.torch import save

    state = load_checkpoint(path, script, Trained)
    name = returned(state["networks"], names)
    # Each tensor in memory of its own, in plain order: the format knows no others.
    weights = {key: value.clone().contiguous() for key, value in state["networks"][name].items()}
    facts = {"script": script, "network": name, "step": state["step"]}
    facts |= {"classes": state["classes"], "settings": state["settings"]}
    header = {"format": "pt", "facts": json.dumps(facts)}
    file = path.with_name(f"{path.name}.safetensors")
    write_bytes(file, save(weights, header))
    print(f"{file}: {name}, {len(weights)} tensors; settings and classes are in its header")


# ----------------------------------------------------------------------------- weights of others
def read_weights(path: Path, flag: str = "--weights") -> dict[str, Tensor]:
    """A flat dict of tensors from .pth, .pt or .bin (weights_only), .safetensors or .pkl, without
    what other programs wrap around them; UserError, which names the `flag`, when there is none."""
    need_weights(str(path), flag)
    if is_damaged(path):
        raise UserError(
            f"{flag} {path} has changed since it was written (its check sums differ); fetch or "
            f"save it again."
        )
    try:
        weights = unwrapped(read_any(path))
    except Exception as error:  # noqa: BLE001 (each format has its own)
        raise UserError(
            f"{flag} {path} cannot be read as weights ({reason_of(error)}); save it again as a "
            f"plain state dict."
        ) from None
    if not weights:
        raise UserError(
            f"{flag} {path} holds no dictionary of tensors; save it again as a plain state dict."
        )
    return weights


def need_weights(weights: str, flag: str = "--weights") -> None:
    """UserError when a flag names a file of weights that is not there; before any work."""
    if weights not in ("imagenet", "none", "shapes") and not Path(weights).is_file():
        raise UserError(f"{flag} {weights}: no such file; give imagenet, none or a file.")


def reason_of(error: Exception) -> str:
    """Why a file of weights could not be read: what a restricted unpickler refused, without torch's
    advice on how to read the file without restrictions."""
    refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    if refused is not None:
        return f"it holds an object of {refused[1]}, and may only hold tensors and plain values"
    _, _, inner = str(error).partition("WeightsUnpickler error:")
    return one_line(Exception(inner)) if inner.strip() else one_line(error)


def read_any(path: Path):
    """What a file of weights holds, by its suffix. Nothing in the file is executed."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            return ArraysOnly(file, encoding="latin1").load()
    with torch.serialization.safe_globals(harmless_classes()):
        return torch.load(path, map_location="cpu", weights_only=True)


def harmless_classes() -> list:
    """What programs keep beside their tensors (settings, a best score as a numpy number), for
    torch's list of what may be built. None of these does anything when it is built."""
    array = np.zeros(1)
    rebuild = array.__reduce__()[0]
    number = np.float64(0).__reduce__()[0]
    kinds = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
    names_of_numpy = [  # under NumPy 1 and 2
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((rebuild, "_reconstruct"), (number, "scalar"))
    ]
    return [
        argparse.Namespace,
        collections.defaultdict,
        pathlib.PosixPath,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
        *names_of_numpy,
    ]


def unwrapped(content) -> dict[str, Tensor]:
    """The tensors of a state dict, out of the dictionaries and without the prefixes that training
    programs wrap around it (DDP's and torch.compile's; those of a network's part are left out by
    `load_matching`, which knows what the network calls it)."""
    inner = content
    while inner is not None:
        content = inner
        inner = next_wrapped(content)
    if not isinstance(content, dict):
        return {}
    weights = {}
    for key, value in content.items():
        if isinstance(key, str) and hasattr(value, "shape"):
            weights[re.sub(r"(?<![^.])_orig_mod\.", "", key)] = torch.as_tensor(value)
    while weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def next_wrapped(content) -> dict | None:
    """The dictionary with tensors that a dictionary keeps under the first name in WRAPPERS."""
    if not isinstance(content, dict):
        return None
    for wrapper in WRAPPERS:
        if holds_tensors(content.get(wrapper)):
            return content[wrapper]
    return None


def holds_tensors(content, depth: int = 6) -> bool:
    """Whether a dictionary has tensors, itself or in dictionaries within."""
    if not isinstance(content, dict) or depth == 0:
        return False
    if any(hasattr(value, "shape") for value in content.values()):
        return True
    return any(holds_tensors(value, depth - 1) for value in content.values())


class ArraysOnly(pickle.Unpickler):
    """Reads Detectron2's and Caffe2's .pkl files: dicts of numpy arrays, and nothing else may be
    built, so that a foreign file cannot run anything."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weight file")
        return super().find_class(module, name)


# -------------------------------------------------------------------------------- into a network
def load_exact(network: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load all tensors of the checkpoint `path`; UserError when the network was built with other
    settings."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:90]
        raise UserError(
            f"{path} does not fit the network of these settings ({first}); leave --backbone, "
            f"--width and other network flags as they were."
        ) from None


def load_matching(network: nn.Module, weights: dict[str, Tensor], what: str) -> list[str]:
    """Load every tensor whose name and shape fit, below the prefix under which most do; return
    lines that report each one that did not.

    Raises UserError when nothing fits."""
    own = network.state_dict()
    prefix = common_prefix(weights, own)
    weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    fits = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not any(v.dim() > 1 for v in fits.values()):
        raise UserError(
            f"None of the {len(weights)} tensors of {what} fits this --backbone (for example "
            f"{next(iter(weights))}); give the --backbone that it is of, or another file."
        )
    network.load_state_dict(fits, strict=False)
    reports = {
        "of another shape, left fresh": [k for k in weights if k in own and k not in fits],
        "not in the file, left fresh": [
            k for k in own if k not in fits and not k.endswith("num_batches_tracked")
        ],
        "in the file, not in the network": [k for k in weights if k not in own],
    }
    return [f"{what} ({len(keys)}): {', '.join(keys)}" for what, keys in reports.items() if keys]


def common_prefix(weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What stands before the network's own names in a file: "backbone." where a larger network has
    this one under that name, "" where most names are equal as they are."""
    fits: Counter[str] = Counter({"": 0})
    for key, value in weights.items():
        place = 0
        while True:
            rest = key[place:]
            if rest in own and own[rest].shape == value.shape:
                fits[key[:place]] += 1
            place = key.find(".", place) + 1
            if place == 0:
                break
    return max(fits, key=lambda prefix: (fits[prefix], -len(prefix)))
