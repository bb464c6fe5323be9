"""Weights as other programs save them are found, and what cannot be read says why."""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoints
from common.errors import UserError


def a_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 2, 1)))


PLAIN = a_network().state_dict()


def with_prefix(prefix: str, more: dict | None = None) -> dict:
    return {f"{prefix}{key}": value for key, value in PLAIN.items()} | (more or {})


OTHER = {"head.weight": torch.ones(5, 5), "head.bias": torch.ones(5)}

LAYOUTS = {
    "plain": PLAIN,
    "ordered": OrderedDict(PLAIN),
    "DDP": with_prefix("module."),
    "compiled": with_prefix("_orig_mod."),
    "compiled, then DDP": with_prefix("module._orig_mod."),
    "DDP, then compiled": with_prefix("_orig_mod.module."),
    "compiled inside": with_prefix("backbone._orig_mod."),
    "a part of a network": with_prefix("backbone.", OTHER),
    "a part of a part": with_prefix("model.encoder.body.", OTHER),
    "any other name": with_prefix("my_very_own_name.", OTHER),
    "a part of a network under DDP": with_prefix("module.backbone.", {"module.x.y": torch.ones(2)}),
    "model": {"model": PLAIN, "epoch": 3},
    "model_state": {"model_state": PLAIN, "optimizer_state": {"state": {0: torch.ones(3)}}},
    "model_state_dict": {"model_state_dict": PLAIN},
    "ema": {"ema": PLAIN, "step": 3},
    "model_ema": {"model_ema": PLAIN},
    "state_dict in state_dict": {"state_dict": {"state_dict": PLAIN}},
    "module in ema": {"ema": {"module": PLAIN, "decay": 0.99}},
    "settings under a wrapper's name": {"model": {"depth": 18}, "state_dict": PLAIN},
    "numpy numbers": {"model": PLAIN, "best": np.float64(77.5), "epoch": np.int64(3)},
    "numpy arrays": {"model": PLAIN, "means": np.arange(3.0), "names": ["a"]},
    "a Namespace": {"model": PLAIN, "args": argparse.Namespace(lr=0.1, out=Path("runs/x"))},
    "numbers for names": {"state_dict": PLAIN | {0: torch.ones(2)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_the_layouts_of_others_are_found(tmp_path, layout):
    torch.save(LAYOUTS[layout], tmp_path / "net.pth")
    torch.manual_seed(2)
    net = a_network()
    for value in net.state_dict().values():
        value.zero_()
    checkpoints.load_matching(net, checkpoints.read_weights(tmp_path / "net.pth"), "net.pth")
    for key, value in net.state_dict().items():
        assert torch.equal(value, PLAIN[key]), key


def test_names_that_fit_as_they_are_are_taken_before_those_under_a_prefix():
    other = {f"backbone.{key}": value + 1 for key, value in PLAIN.items()}
    net = a_network()
    checkpoints.load_matching(net, {**other, **PLAIN}, "both")
    assert torch.equal(net.state_dict()["0.weight"], PLAIN["0.weight"])


class Custom:
    """A class of somebody's program."""


@pytest.mark.parametrize("name", ["net.pth", "net.pkl"])
def test_the_reason_why_weights_cannot_be_read_is_shown(tmp_path, name):
    content = {"model": {"a": np.ones(3)}, "config": Custom()}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match="Custom") as caught:
        checkpoints.read_weights(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "weights_only" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb_went_off"),))


def test_a_bomb_in_weights_does_not_go_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net.pth", "net.pkl"):
        torch.save({"model": PLAIN, "x": Bomb()}, tmp_path / name)
        if name.endswith("pkl"):
            (tmp_path / name).write_bytes(pickle.dumps({"x": Bomb()}))
        with pytest.raises(UserError):
            checkpoints.read_weights(tmp_path / name)
    assert not (tmp_path / "bomb_went_off").exists()
