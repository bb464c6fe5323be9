"""gpu_check.py runs to its end without a GPU, and no part stops the others."""

import json
import subprocess
import sys

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
    "late": gpu_check.Part(fails, 1),
}
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
    done = run("-c", PLANTED, "--device", "cpu", "--small", "--minutes", "0.25")
    assert done.returncode == 1
    records = {r["part"]: r for r in json.loads(done.stdout.splitlines()[-1])}
    assert {name: r["status"] for name, r in records.items()} == {
        "fails": "failed",
        "crashes": "failed",
        "device": "ok",
        "equal gist": "ok",
        "hangs": "failed",
        "late": "skipped",
    }
    assert records["fails"]["seen"] == 3 and "losses differ" in records["fails"]["error"]
    assert "Traceback" in records["fails"]["log"]
    assert "crashed, with -9" in records["crashes"]["error"]
    assert "not done after" in records["hangs"]["error"]
    assert "are left" in records["late"]["error"]


@pytest.mark.parametrize("name", ["nothing", "spee d"])
def test_a_part_that_does_not_exist_is_refused(name):
    done = run("tests/gpu_check.py", "--only", name, "--list")
    assert done.returncode == 2 and "no such part" in done.stderr
