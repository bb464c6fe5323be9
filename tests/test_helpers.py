"""What the other tests stand on: processes, ports and folders that several workers use at once."""

import os
import signal
import time
from multiprocessing import forkserver

import helpers
from helpers import Started, free_port, once


def say(word: str, seconds: float) -> None:
    time.sleep(seconds)
    print(word)


def leave(code: int, seconds: float) -> None:
    time.sleep(seconds)
    os._exit(code)


def test_the_end_of_the_server_is_not_the_end_of_its_children(tmp_path):
    child, failing = (
        Started(say, ("whole", 1.0), tmp_path),
        Started(leave, (3, 1.0), tmp_path),
    )
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    assert child.wait() == (0, "whole\n", "")
    assert failing.wait().code == helpers.SERVER_IS_GONE
    assert Started(say, ("again", 0), tmp_path).wait() == (0, "again\n", "")
    assert forkserver._forkserver._forkserver_pid != server


def test_tests_that_share_what_their_file_makes_stay_on_one_worker():
    shared = [helpers.stays_with(f"tests/test_runs.py::test_{x}") for x in "ab"]
    own = [helpers.stays_with(f"tests/test_splits.py::test_{x}") for x in "ab"]
    assert shared[0] == shared[1] and own[0] != own[1]


def test_exit_codes_are_passed_on(tmp_path):
    assert Started(leave, (7, 0), tmp_path).wait().code == 7
    sleeping = Started(say, ("never", 60), tmp_path)
    sleeping.kill(signal.SIGTERM)
    assert sleeping.wait().code == -signal.SIGTERM


def ask(n: int) -> None:
    print(*[free_port() for _ in range(n)])


def test_workers_never_choose_the_same_port(tmp_path):
    asked = [Started(ask, (20,), tmp_path, env={"PYTEST_XDIST_WORKER": f"gw{i}"}) for i in range(2)]
    ports = [int(word) for process in asked for word in process.wait().ok().out.split()]
    assert len(set(ports)) == 40


def note(folder) -> None:
    def make(new) -> None:
        time.sleep(0.2)
        (new / "made").write_text(str(os.getpid()))
        with open(folder.parent / "makers.txt", "a") as f:
            f.write("x")

    print((once(folder, make) / "made").read_text())


def test_a_folder_is_made_once(tmp_path):
    both = [Started(note, (tmp_path / "folder",), tmp_path / "io") for _ in range(2)]
    assert len({process.wait().ok().out for process in both}) == 1
    assert (tmp_path / "makers.txt").read_text() == "x"
