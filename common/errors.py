"""Sentences for the user: the exceptions that carry one, and which foreign errors become one."""

import errno
import os
import re

import torch

LOST = "another process of this run stopped, or the network to it failed; see its message."

# What gloo, NCCL and torchrun's store say when another process is gone. NCCL says other things too.
WORDS_OF_LOST_PEERS = (
    "closed by peer",
    "closed by remote peer",
    "onnection reset",
    "remote process exited",
    "likely closed",
)

# What torch says when /dev/shm is full: in a worker that asks for too much, and of one that
# was killed because it wrote to what it could not have.
WORDS_OF_SHARED_MEMORY = (
    "out of shared memory",
    "unable to allocate shared memory",
    "unable to write to file </torch_",
)


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what, where, what to do."""


class RankError(UserError):
    """A UserError that only one process met, so that this process must say it."""


class Stopped(Exception):
    """A run that was asked to leave and has saved its state."""


def one_line(error: BaseException) -> str:
    """What a library's error says, for the brackets of a sentence: in one line, and its kind where
    it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_of_open_files(error: BaseException) -> bool:
    """Whether this process, or one of its workers, could open no further file. A worker's error
    comes wrapped, and torch's own errors have no number."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    text = str(error)
    return isinstance(error, (OSError, RuntimeError)) and (
        os.strerror(errno.EMFILE) in text or "received 0 items of ancdata" in text
    )


def user_sentence(error: BaseException) -> str | None:
    """The sentence for the user, or None when the error is a defect of ours and deserves its
    traceback."""
    text = str(error)
    if isinstance(error, UserError):
        # A DataLoader's worker hands on its error wrapped in the worker's traceback.
        return re.split(r"(?:BrokenImage|RankError|UserError|SplitError): ", text)[-1].strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the run folder"
        return (
            f"No space left on the disk, or in its quota, while writing {place}; the last "
            f"checkpoint is whole, so free some space and continue with --resume."
        )
    if is_of_open_files(error):
        return (
            "Too many files are open at once; allow more with `ulimit -n 65536` in this shell, or "
            "give a smaller --workers."
        )
    if isinstance(error, RuntimeError) and any(words in text for words in WORDS_OF_SHARED_MEMORY):
        return (
            "The shared memory (/dev/shm), through which --workers hand on their images, is full; "
            "make it larger (docker: --shm-size 16g), or give a smaller --workers."
        )
    several_processes = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if isinstance(error, RuntimeError) and several_processes:
        if any(words in text for words in WORDS_OF_LOST_PEERS):
            return LOST
    if isinstance(error, torch.OutOfMemoryError) and "out of memory" in text.lower():
        return "The GPU ran out of memory; use a smaller --batch-size or --crop-size, or more GPUs."
    return None
