"""Sentences for the user: the exceptions that carry one, and which foreign errors become one."""

import errno
import os
import re

import torch

LOST = "another process of this run stopped, or the network to it failed; see its message."


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what, where, what to do."""


class RankError(UserError):
    """A UserError that only one process met, so that this process must say it."""


def user_sentence(error: BaseException) -> str | None:
    """The sentence for the user, or None when this is a defect of ours and deserves its
    traceback."""
    text = str(error)
    if isinstance(error, UserError):  # a DataLoader worker wraps it in its traceback
        return re.split(r"(?:BrokenImage|RankError|UserError): ", text)[-1].strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"No space left on the disk, or in its quota, while writing {error.filename or 'the run folder'}; the "
            f"last checkpoint is whole, so free some space and continue with --resume."
        )
    words = (
        "closed by peer",
        "closed by remote peer",
        "onnection reset",
        "remote process exited",
        "likely closed",
    )
    if (
        isinstance(error, RuntimeError)
        and any(w in text for w in words)
        and int(os.environ.get("WORLD_SIZE", 1)) > 1
    ):
        return LOST  # of gloo, NCCL and the store; NCCL has others, too
    if "out of memory" in text.lower() and isinstance(error, torch.OutOfMemoryError):
        return "The GPU ran out of memory; use a smaller --batch-size or --crop-size, or more GPUs."
    return None


class Stopped(Exception):
    """A run that was asked to leave and has saved its state."""
