"""How long a save holds training up, synchronous and asynchronous ones in turn in one run; and the memory it costs.

python -m tests.drills.stall                                        the drills' model
python -m tests.drills.stall --config runs/demo/stage3.yaml         another run; it trains into a temporary folder
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from megatron_hgpt.testing.distributed import run_ranks
from tests.drills.assets import write_assets

Stall = tuple[bool, float, int]
"""Whether the save was asynchronous, seconds until training went on, bytes of host memory that the copies hold."""


def measure(config_file: Path, output: Path, overrides: list[str], num_saves: int) -> list[Stall]:
    """Train a step before each save, on this rank; what its saves took, without the first of either way."""
    import torch

    from megatron_hgpt import checkpoint, run_stage
    from megatron_hgpt.model_folders import load_resolved

    stalls: list[Stall] = []

    class Timed(checkpoint.Checkpointer):
        def save(self, *args: Any, **kwargs: Any) -> None:
            self._settle(wait=True)  # an asynchronous save before it is no part of this one
            self.config.checkpoint.async_save = len(stalls) % 2 == 1
            torch.distributed.barrier()
            started = time.perf_counter()
            super().save(*args, **kwargs)
            seconds = time.perf_counter() - started
            stalls.append((self.config.checkpoint.async_save, seconds, self._copies.num_bytes))

    own = [
        f"output_dir={output}", f"training.num_steps={num_saves}", "checkpoint.save_interval_steps=1",
        "checkpoint.keep_last=2", "checkpoint.async_save=true", "logging.sample_images_interval_steps=0",
    ]  # fmt: skip
    checkpoint.Checkpointer = Timed  # type: ignore[misc]
    run_stage.main(load_resolved(config_file, [*own, *overrides]))
    return stalls[2:]


def main() -> None:
    """Print one line for each way of saving, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="of a run; default: the drills' model, tensor-parallel")
    parser.add_argument("--processes", type=int, default=2, help="of the run, on this machine")
    parser.add_argument("--saves", type=int, default=12, help="of both ways together; the first two do not count")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stall_") as temporary:
        folder, overrides = Path(temporary), given.overrides
        config = given.config or write_assets(folder / "assets")
        if given.config is None:
            overrides = ["parallel.tensor_model_parallel_size=2", *overrides]
        arguments = (config.resolve(), folder / "run", overrides, given.saves)
        ranks = run_ranks(measure, given.processes, *arguments, timeout_s=3600.0)
    # A save holds training up until the slowest rank goes on.
    slowest = [max(saves, key=lambda stall: stall[1]) for saves in zip(*ranks, strict=True)]
    stalls = {way: median(seconds for is_async, seconds, _ in slowest if is_async is way) for way in (False, True)}
    for way, name in ((False, "synchronous"), (True, "asynchronous")):
        sys.stdout.write(f"{name}: training stands still for {1000 * stalls[way]:.1f} ms a save (median)\n")
    memory = " + ".join(f"{saves[-1][2] / 1e6:.1f}" for saves in ranks)
    sys.stdout.write(f"ratio {stalls[False] / stalls[True]:.1f}; host memory of the copies, by rank: {memory} MB\n")


if __name__ == "__main__":
    main()
