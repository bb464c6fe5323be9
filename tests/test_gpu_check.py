"""gpu_check.py runs to its end without a GPU, and no part stops the others."""

import json
import subprocess
import sys

import gpu_check
import helpers
import pytest

PLANTED = """
import os, sys
sys.path.insert(0, "tests")
import gpu_check

def fails(facts, setup):
    facts["seen"] = 3
    gpu_check.compare_losses({"loss": 1.0}, {"loss": 1.001}, 1e-4)

def crashes(facts, setup):
    os.kill(os.getpid(), 9)

def hangs(facts, setup):
    import time
    gpu_check.fork(time.sleep, 600)
    time.sleep(600)

gpu_check.PARTS = {
    "fails": gpu_check.Part(fails, 1),
    "crashes": gpu_check.Part(crashes, 1),
    **{name: gpu_check.PARTS[name] for name in ("device", "equal gist")},
    "hangs": gpu_check.Part(hangs, 1),
    "passes": gpu_check.Part(lambda facts, setup: None, 1),
}
gpu_check.LEAST = 5
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def run(*line: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *line],
        cwd=helpers.REPO,
        env=helpers.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_all_parts_pass_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("tests/gpu_check.py", "--device", "cpu", "--small", "--out", str(out))
    records = json.loads(out.read_text())
    assert [r for r in records if r["status"] != "ok"] == []
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == records
    kinds = {r["part"].split()[0] for r in records}
    assert kinds == {
        "device", "equal", "ranks", "profile", "compile", "resume", "speed", "bf16", "train"
    }  # fmt: skip
    found = {r["part"]: r for r in records}
    assert found["equal guided"]["pseudo_per_image"] > 0
    assert found["equal better"]["pseudo_per_image"] > 0
    assert found["speed gta R101 513"]["TFLOP a step"] > 0


def test_a_part_that_fails_crashes_or_hangs_is_reported_and_the_others_go_on():
    done = run("-c", PLANTED, "--device", "cpu", "--small")
    assert done.returncode == 1
    records = {r["part"]: r for r in json.loads(done.stdout.splitlines()[-1])}
    assert {name: r["status"] for name, r in records.items()} == {
        "fails": "failed",
        "crashes": "failed",
        "device": "ok",
        "equal gist": "ok",
        "hangs": "failed",
        "passes": "ok",
    }
    assert records["fails"]["seen"] == 3 and "losses differ" in records["fails"]["error"]
    assert "Traceback" in records["fails"]["log"]
    assert "crashed, with -9" in records["crashes"]["error"]
    assert "not done after 5 s" in records["hangs"]["error"]


def test_a_part_is_not_begun_when_too_little_time_is_left_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "PARTS", {"late": gpu_check.Part(pytest.fail, 20)})
    setup = gpu_check.Setup("cpu", False, tmp_path)
    (record,) = gpu_check.check(["late"], setup, 0.1, None)
    assert record["status"] == "skipped" and "6 s of 0.1 minutes are left" in record["error"]


@pytest.mark.parametrize("name", ["nothing", "spee d"])
def test_a_part_that_does_not_exist_is_refused(name, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--only", name, "--list"])
    assert left.value.code == 2 and "no such part" in capsys.readouterr().err
