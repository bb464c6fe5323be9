"""docs/photographs.py: its list of runs, its queue, the file of logs and the tables of the page."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
from helpers import REPO

# Stands for a script: trains --steps steps of a tenth of a second, saves when it is told to leave,
# and scores; a run whose folder's name has `broken` in it fails.
SCRIPT = """
import json, signal, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--eval" in sys.argv:
    Path(flags["--eval"] + ".results.json").write_text('{"student": {"last": {"miou": 1.5}}}')
    sys.exit()
out = Path(flags["--out"])
out.mkdir(parents=True, exist_ok=True)
(out / "starts").open("a").write(".")
if "broken" in out.name:
    sys.exit("error: broken")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(out / "config.json").write_text(json.dumps({"script": "gta_seg.py", "line": sys.argv}))
(out / "teacher.pt").write_text("large")
last = out / "last.pt"
step = int(last.read_text()) if last.exists() else 0
while step < int(flags["--steps"]):
    time.sleep(0.05)
    step += 1
    last.write_text(str(step))
    if told:
        sys.exit()
(out / "log.jsonl").write_text("{}")
(out / "results.json").write_text("{}")
"""


def load() -> ModuleType:
    """The program as a module: docs/ is no package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("photographs", REPO / "docs" / "photographs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


photographs = load()


# ------------------------------------------------------------------------------------ list of runs
def lines_of_plan() -> list[str]:
    done = subprocess.run(
        [sys.executable, "docs/photographs.py", "plan", "--groups", *photographs.GROUPS],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_every_planned_line_is_one_that_its_script_understands():
    from test_text import parse

    lines = lines_of_plan()
    assert len(lines) > len(photographs.plan(photographs.GROUPS))  # some are scored afterwards
    for line in lines:
        python, script, *flags = line.split()
        assert python == "python"
        if "--eval" not in flags:
            parse(script.removesuffix(".py"), flags)


def test_the_program_needs_the_standard_library_only():
    tree = ast.parse((REPO / "docs" / "photographs.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_method_and_its_baseline_run_together_on_each_draw():
    runs = [run for run in photographs.plan(("A",)) if run.row.script == "gta_seg.py"]
    assert [run.draw for run in runs] == sorted(run.draw for run in runs)
    for draw in (0, 1, 2):
        methods = {run.row.method for run in runs if run.draw == draw}
        assert {"suponly", "mt", "gta"} <= methods
    names = [run.name for run in photographs.plan(photographs.GROUPS)]
    assert len(set(names)) == len(names)


def test_the_methods_that_are_compared_share_all_but_the_method():
    """Network, pictures, augmentation and length are the same (DESIGN, section 10)."""
    own = {"--method", "--warmup-epochs", "--monitor-labels", "--lr"}
    shared = []
    for method in ("suponly", "mt", "gta"):
        words = photographs.GTA_METHODS[method].split("--")
        shared.append({word for word in words if f"--{word.split(' ')[0].strip()}" not in own})
    assert shared[0] == shared[1] == shared[2]


# ---------------------------------------------------------------------------------------- the queue
ROW = photographs.Row("A", "gta_seg.py", "suponly", "0.1", "--steps 3", (0, 1, 2))


@pytest.fixture
def house(tmp_path) -> Path:
    """A checkout whose script is the one above."""
    (tmp_path / "gta_seg.py").write_text(SCRIPT)
    return tmp_path


def queue(house: Path, rows: list, *flags: str, wait: bool = True):
    """`docs/photographs.py run` on these rows, in the house: the exit status, or the process."""
    program = (REPO / "docs" / "photographs.py").read_text()
    made = f"ROWS = [{', '.join(f'Row(*{tuple(row)!r})' for row in rows)}]"
    changed = re.sub(r"^ROWS = rows\(\)$", lambda _: made, program, flags=re.M)
    assert changed != program
    (house / "photographs.py").write_text(changed)
    line = [sys.executable, "photographs.py", "run", "--house", str(house), "--poll", "0.05"]
    line += ["--pack", str(house / "pack.tar.xz"), *flags]
    process = subprocess.Popen(line, cwd=house, stdout=subprocess.PIPE, text=True)
    if not wait:
        return process
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def folder(house: Path, draw: int, method: str = "suponly") -> Path:
    return house / "runs" / "photographs" / f"gta_seg-{method}-0.1-d{draw}"


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def starts(path: Path) -> int:
    return len((path / "starts").read_text()) if (path / "starts").exists() else 0


def test_the_queue_trains_scores_packs_and_skips_what_is_finished(house):
    code, said = queue(house, [ROW], "--at-most", "2")
    assert code == 0, said
    packed = photographs.read_pack(house / "pack.tar.xz")
    assert sorted(packed) == [f"gta_seg-suponly-0.1-d{draw}" for draw in range(3)]
    assert set(packed["gta_seg-suponly-0.1-d0"]) == set(photographs.PACKED) - {"report.md"}
    assert photographs.scores(packed["gta_seg-suponly-0.1-d0"]) == {"student": 1.5}

    content = (house / "pack.tar.xz").read_bytes()
    code, said = queue(house, [ROW])
    assert code == 0 and "0 runs to make" in said
    assert [starts(folder(house, draw)) for draw in range(3)] == [1, 1, 1]

    # On another machine only the pack is there, and what is in it stays.
    (house / "runs").rename(house / "gone")
    more = ROW._replace(draws=(0, 1, 2, 3))
    code, said = queue(house, [more])
    assert code == 0 and "1 runs to make" in said
    assert starts(folder(house, 3)) == 1 and not folder(house, 0).exists()
    assert len(photographs.read_pack(house / "pack.tar.xz")) == 4
    assert len((house / "pack.tar.xz").read_bytes()) >= len(content)


def test_no_more_runs_at_a_time_than_asked_for(house):
    process = queue(house, [ROW._replace(flags="--steps 8")], "--at-most", "2", wait=False)
    until(lambda: folder(house, 0).exists() and folder(house, 1).exists())
    assert not folder(house, 2).exists()
    process.communicate(timeout=60)
    assert process.returncode == 0 and starts(folder(house, 2)) == 1


def test_a_paused_queue_lets_its_runs_save_and_resumes_them(house):
    process = queue(house, [ROW._replace(flags="--steps 20", draws=(0,))], wait=False)
    pause, last = house / "runs" / "photographs" / "pause", folder(house, 0) / "last.pt"
    until(last.exists)
    pause.touch()
    time.sleep(0.5)
    step = last.read_text()
    assert int(step) < 20
    time.sleep(0.3)
    assert last.read_text() == step and starts(folder(house, 0)) == 1
    pause.unlink()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert starts(folder(house, 0)) == 2 and last.read_text() == "20"


def test_a_held_queue_lets_its_runs_stand_still(house):
    process = queue(house, [ROW._replace(flags="--steps 20", draws=(0,))], wait=False)
    hold, last = house / "runs" / "photographs" / "hold", folder(house, 0) / "last.pt"
    until(last.exists)
    hold.touch()
    time.sleep(0.5)
    step = last.read_text()
    time.sleep(0.3)
    assert int(step) < 20 and last.read_text() == step
    hold.unlink()
    process.communicate(timeout=60)
    assert process.returncode == 0 and starts(folder(house, 0)) == 1


def test_a_stopped_queue_leaves_with_its_runs_saved_and_goes_on_later(house):
    rows = [ROW._replace(flags="--steps 20", draws=(0,))]
    process = queue(house, rows, wait=False)
    until((folder(house, 0) / "last.pt").exists)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0 and not (folder(house, 0) / "results.json").exists()
    code, _ = queue(house, rows)
    assert code == 0 and (folder(house, 0) / "last.pt").read_text() == "20"


def test_a_run_that_fails_is_named_and_the_others_go_on(house):
    rows = [ROW._replace(method="broken", draws=(0,)), ROW._replace(draws=(0,))]
    code, said = queue(house, rows)
    assert code == 1 and "FAILED gta_seg-broken-0.1-d0" in said
    assert starts(folder(house, 0, "broken")) == 1
    assert (folder(house, 0) / "results.json").exists()


def taught_by(method: str) -> list:
    """A student, and after it the row of its teacher."""
    student = photographs.Row("A", "gta_seg.py", "student", "0.1", "--steps 3", (0,), method)
    return [student, ROW._replace(method=method, draws=(0,))]


def test_a_student_waits_for_its_teacher_and_gets_it(house):
    code, said = queue(house, taught_by("suponly"), "--at-most", "2", "--only", "student")
    assert code == 0, said
    config = folder(house, 0).parent / "gta_seg-student-0.1-d0" / "config.json"
    line = json.loads(config.read_text())["line"]
    teacher = line[line.index("--teacher") + 1]
    assert teacher == "runs/photographs/gta_seg-suponly-0.1-d0/teacher.pt"
    trained = said.index("gta_seg-suponly-0.1-d0 has more to do")  # it is scored, too
    assert trained < said.index("starts gta_seg-student")


def test_a_student_whose_teacher_fails_is_named(house):
    code, said = queue(house, taught_by("broken"))
    assert code == 1
    assert "FAILED gta_seg-student-0.1-d0, which needs gta_seg-broken-0.1-d0" in said


def test_two_queues_do_not_share_a_folder(house):
    rows = [ROW._replace(flags="--steps 20", draws=(0,))]
    process = queue(house, rows, wait=False)
    until((folder(house, 0) / "last.pt").exists)
    code, _ = queue(house, rows)
    assert code != 0
    process.communicate(timeout=60)
    assert process.returncode == 0


# ----------------------------------------------------------------------------- the pack, the tables
def log_of(miou: float, network: str = "student", steps: int = 6) -> dict[str, str]:
    """The log of a run of gta_seg.py, as it is packed."""
    lines = [{"step": i, f"miou_{network}": miou - steps + i} for i in range(1, steps + 1)]
    lines += [{"step": i, "pseudo_acc": i / 10} for i in range(1, 7)]
    return {
        "config.json": json.dumps({"script": "gta_seg.py"}),
        "log.jsonl": "\n".join(map(json.dumps, lines)),
        "last.pt.results.json": json.dumps(
            {"student": {"last": {"miou": miou - 1}}, "gta": {"last": {"miou": miou - 2}}}
            | {network: {"last": {"miou": miou}}, "seed": 0}
        ),
    }


def test_differences_are_paired_by_draw():
    logs = {}
    for draw, (baseline, method) in enumerate([(40, 43), (50, 51), (60, 59)]):
        logs[f"gta_seg-suponly-0.01-d{draw}"] = log_of(baseline)
        logs[f"gta_seg-gta-0.01-d{draw}"] = log_of(method, "teacher")
    table = photographs.table_of_claims("gta_seg.py", logs)
    assert "| gta > suponly | +1.00 ± 2.00 | 2 of 3 |" in table
    assert "gta > mt" not in table  # without a run of mt there is no pair
    del logs["gta_seg-gta-0.01-d0"]
    assert "+0.00 ± 1.41 | 1 of 2 |" in photographs.table_of_claims("gta_seg.py", logs)
    scores = photographs.table_of_scores("gta_seg.py", logs)
    assert "| suponly | 0.01 | student | 50.00 | 40.00, 50.00, 60.00 |" in scores


def test_curves_and_shares_come_from_the_log():
    logs = {"gta_seg-gta-0.01-d0": log_of(46, "teacher")}
    curves = photographs.table_of_curves("A", "gta_seg.py", logs)
    assert "| gta | 0.01 | 0 | teacher | 41.0 | 42.0 | 43.0 | 44.0 | 45.0 | 46.0 |" in curves
    shares = photographs.table_of_pseudo_labels("gta_seg.py", logs)
    assert "| gta | 0.01 | 0 | 0.150 | 0.350 | 0.550 |" in shares


def test_a_rate_is_chosen_by_the_methods_result_on_the_tuning_pictures():
    names = {rate: f"gta_seg-gta-half-{rate}-d0" for rate in ("0.01", "0.003", "0.03")}
    logs = {name: log_of(60, "student") for name in names.values()}
    for rate, miou in (("0.01", 50), ("0.003", 45), ("0.03", 40)):
        more = log_of(miou, "teacher")["log.jsonl"]
        logs[names[rate]]["log.jsonl"] += "\n" + more
    line = "| gta | 0.01: 50.00, 0.003: 45.00, 0.03: 40.00 | 0.01 |"
    assert line in photographs.table_of_rates(logs)
    del logs[names["0.03"]]
    assert "| gta | 0.01: 50.00, 0.003: 45.00 | open |" in photographs.table_of_rates(logs)


def test_the_rates_of_group_a_are_those_that_were_best():
    logs = photographs.read_pack(photographs.PACK)
    for (script, method), rate in photographs.BEST_RATE.items():
        found = photographs.tried(script, method, logs)
        rates = photographs.RATES[script]
        assert rate in rates and set(found) <= set(rates)
        if len(found) == len(rates):
            assert rate == max(found, key=found.get)


REPORT = """## Searches

| search | trainings | path |
| --- | --- | --- |
| gist | 6 | LP |

## Nodes

| path | dev | val | pseudo labels kept |
| --- | --- | --- | --- |
| stage 0 | 40.00 | 41.00 | - |
| L | 42.00 | 43.00 | - |
| LL | 41.00 | 44.00 | - |
| LP | 41.00 | 45.50 | 0.90 |
| P | 39.00 | 38.00 | 0.90 |
| PP | 38.00 | 37.00 | 0.90 |
| F0.5F0.5 | 38.00 | 37.00 | 0.90 |

## Paths, each at the stage that dev chooses (Table II)

| path | stage | dev | val |
| --- | --- | --- | --- |
| LL | 1 | 1.00 | 1.00 |
"""


def test_a_search_is_scored_where_the_development_pictures_choose():
    log = {
        "config.json": json.dumps({"script": "gist_rist.py"}),
        "results.json": json.dumps({"gist": {"path": "LP", "miou": 45.501}, "seed": 0}),
        "report.md": REPORT,
    }
    assert photographs.scores(log) == {
        "gist": 45.5,
        "LL": 43.0,
        "LL, last": 44.0,
        "PP": 41.0,
        "PP, last": 37.0,
    }


def test_a_table_without_runs_says_so():
    for name in ("gta_seg scores", "gta_seg claims", "gta_seg curves", "machines"):
        assert photographs.TABLES[name]({}) == "No run is there yet."


def test_a_page_gets_the_tables_that_it_names():
    page = "before\n<!-- table: what is there -->\nold\n<!-- end -->\nafter\n"
    written = photographs.page_with_tables(page, {})
    assert (
        "old" not in written
        and "No run" not in written
        and written.startswith("before\n<!-- table: what is there -->\n| ")
    )
    assert photographs.page_with_tables(written, {}) == written


def test_every_table_of_the_page_follows_from_the_pack():
    page = photographs.PAGE.read_text()
    logs = photographs.read_pack(photographs.PACK)
    assert photographs.page_with_tables(page, logs) == page
    by_hand = re.sub(r"<!-- table: .+? -->\n.*?<!-- end -->", "", page, flags=re.S)
    assert not re.search(r"^\|", by_hand, flags=re.M)


def test_the_pack_is_small_and_names_no_machine():
    if not photographs.PACK.is_file():
        pytest.skip("no run has been packed")
    assert photographs.PACK.stat().st_size < 2_000_000  # bytes
    planned = {run.name for run in photographs.plan(photographs.GROUPS)}
    for name, log in photographs.read_pack(photographs.PACK).items():
        assert name in planned
        config = json.loads(log["config.json"])
        words = [*config["command"].split(), *map(str, config["settings"].values())]
        assert [word for word in words if os.path.isabs(word)] == []


def test_a_pack_holds_no_weights(tmp_path):
    with tarfile.open(photographs.PACK if photographs.PACK.is_file() else _empty(tmp_path)) as pack:
        files = {Path(name).name for name in pack.getnames()}
    assert files <= set(photographs.PACKED)


def _empty(tmp_path: Path) -> Path:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    return tmp_path / "empty.tar"
