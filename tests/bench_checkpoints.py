"""What saving a checkpoint takes in memory above the state itself: `make bench`. Linux."""

import io
import tempfile
from pathlib import Path

import torch

from common import checkpoints
from tests.measure import peak


def bench_save(tensors: int = 40) -> None:
    state = {"networks": {str(i): torch.randn(2_500_000) for i in range(tensors)}}
    size = 10_000_000 * tensors

    def in_memory() -> None:
        torch.save(state, io.BytesIO())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.pt")
        ours = peak(lambda: checkpoints.save_checkpoint(path, "a.py", state))
    print(
        f"saving {size / 1e6:.0f} MB: {ours / size:.2f} of it in memory, "
        f"{peak(in_memory) / size:.2f} by way of a buffer"
    )


if __name__ == "__main__":
    bench_save()
