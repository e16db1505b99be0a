"""Measure what a checkpoint costs those who work meanwhile: one writer, and a client that asks `info` all the time.

uv run scripts/benchmarks/checkpoint.py            a full table of 1 M small rows, and one of 20 k images
"""

import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # rl_buffer as it is here

import numpy as np
import tyro

import rl_buffer as rb
from rl_buffer.launch import ProcessGroup
from rl_buffer.tables import CheckpointReport

SPECS = {
    "192 B": rb.TransitionSpec(obs=rb.Field((17,)), action=rb.Field((6,))),
    "56 KB": rb.TransitionSpec(obs=rb.Field((4, 84, 84), "uint8"), action=rb.Field((), "int64")),
}
FILL_NUM_ENVS = {"192 B": 1000, "56 KB": 20}
DEADLINE_S = 600.0


@dataclass
class Options:
    """What is measured, and where."""

    capacities: tuple[int, ...] = (1_000_000, 20_000)
    """Rows of 192 B, and rows of 56 KB."""
    directory: Path | None = None
    """Where checkpoints are written; a fresh temporary one if not given."""
    num_turns: int = 5
    """Checkpoints of each table."""


def main(options: Options) -> None:
    """Print a line for each checkpoint."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory, ProcessGroup() as group:
        for row, capacity in zip(SPECS, options.capacities, strict=True):
            measure(row, capacity, Path(directory) / "checkpoint", options.num_turns, group)


def measure(row: str, capacity: int, path: Path, num_turns: int, group: ProcessGroup) -> None:
    """Fill a table, keep a writer at work, and take checkpoints."""
    table = rb.ReplayTable(SPECS[row], capacity, rb.Prioritized(), seed=0)
    with rb.BufferServer({"replay": table}) as server, rb.connect(server.address, DEADLINE_S) as client:
        fill(client, row, capacity)
        filled = num_inserts(client)
        group.start(row, write, server.address, row)
        while num_inserts(client) < filled + 1000:
            time.sleep(0.01)
        for _ in range(num_turns):
            rate, slowest_ms = watch(client, functools.partial(has_come, time.monotonic() + 1.0))
            report, rate_meanwhile, slowest_meanwhile_ms = watch_checkpoint(client, path)
            print(
                f"{capacity:,} rows of {row}: {report.nbytes / 1e6:,.0f} MB in {report.duration_s:.2f} s; "
                f"server stopped for {report.pause_ms:.1f} ms, writers for {report.writers_waited_ms:.0f} ms\n"
                f"    before: {rate:,.0f} rows/s, slowest answer {slowest_ms:.1f} ms\n"
                f"    meanwhile: {rate_meanwhile:,.0f} rows/s, slowest answer {slowest_meanwhile_ms:.1f} ms",
                flush=True,
            )
        group.stop()


def fill(client: rb.Client, row: str, num_rows: int) -> None:
    """Write as many rows as the table holds, of random numbers."""
    num_envs, rng = FILL_NUM_ENVS[row], np.random.default_rng(0)
    with client.writer("replay", num_envs=num_envs, autoreset=None, chunk_size=num_envs) as writer:
        steps = [random_step(SPECS[row], num_envs, rng) for _ in range(8)]
        for i in range(num_rows // num_envs + 1):
            writer.add(**steps[i % 8])


def write(address: str, row: str) -> None:
    """Write one environment's steps until killed."""
    rng = np.random.default_rng(1)
    with rb.connect(address) as client, client.writer("replay", num_envs=1, autoreset=None) as writer:
        steps = [random_step(SPECS[row], 1, rng) for _ in range(8)]
        while True:
            for step in steps:
                writer.add(**step)


def random_step(spec: rb.TransitionSpec, num_envs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arguments of `add`."""

    def random(field: rb.Field) -> np.ndarray:
        return rng.integers(256, size=(num_envs, *field.shape)).astype(field.dtype)

    zeros = np.zeros(num_envs)
    return {
        "obs": random(spec.obs), "action": random(spec.action), "reward": zeros, "done": zeros,
        "next_obs": random(spec.obs),
    }  # fmt: skip


def watch_checkpoint(client: rb.Client, path: Path) -> tuple[CheckpointReport, float, float]:
    """Take one, and what `watch` says meanwhile."""
    reports: list[CheckpointReport] = []
    taking = threading.Thread(target=lambda: reports.append(client.checkpoint(path, DEADLINE_S)))
    taking.start()
    rate, slowest_ms = watch(client, lambda: not taking.is_alive())
    (report,) = reports
    return report, rate, slowest_ms


def num_inserts(client: rb.Client) -> int:
    """Rows written so far."""
    return int(client.info()["tables"]["replay"]["inserts"])


def has_come(time_s: float) -> bool:
    """Whether it is that late."""
    return time.monotonic() > time_s


def watch(client: rb.Client, is_over: Callable[[], bool]) -> tuple[float, float]:
    """(rows written per second, slowest answer to `info` in ms) until it is over."""
    started_s = now_s = time.monotonic()
    first = last = num_inserts(client)
    slowest_s = 0.0
    while not is_over():
        asked_s = time.monotonic()
        last = num_inserts(client)
        now_s = time.monotonic()
        slowest_s = max(slowest_s, now_s - asked_s)
    return (last - first) / max(1e-9, now_s - started_s), slowest_s * 1e3


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
