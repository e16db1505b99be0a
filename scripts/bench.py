"""Measure rl_buffer beside other libraries, in one process and with a server: tables, a chart and a JSON file.

uv run scripts/bench.py                            everything, about twenty minutes
uv run scripts/bench.py --sections mixed stall     some parts
uv run scripts/bench.py --quick                    seconds each: does it run? Its figures say little
uv pip install cpprb stable-baselines3 torchrl     the others, of which any may be missing (Reverb: --reverb-python)

in-process    buffers in the learner's process               images     4 x 84 x 84 frames beside raw copies
gae           advantages of a rollout                        payload    400 B to 400 KB, bytes in and out
startup       actors until they can write, their memory      server     messages per core, share of a core
mixed         2 writers and a learner at once                stall      the learner beside 1 to 8 writers

From mixed on, the processes of each library form a team, and teams take turns on the same cores: ratios are of a turn.

A promise that is not met is reported and does not change the exit status: timings of a busy machine are no test.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rl_buffer as it is here, whatever is installed
# Read once, when the libraries below are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import torch
import tyro
from benchmarks.advantages import GAE, TENSORS, gae
from benchmarks.images import ALONE, GATHER_FLOOR, PAPER, SAMPLED, images
from benchmarks.in_process import ADD, ADD_MANY, GET, UNIFORM_ADD, in_process
from benchmarks.libraries import SERVED
from benchmarks.measure import OURS, Case, Measurement, Options
from benchmarks.mixed import INSERTS, P99, SAMPLES, SIZE, mixed
from benchmarks.payload import payload
from benchmarks.report import Bar, Report
from benchmarks.server_load import server_load
from benchmarks.stall import PER_CPU_S, stall
from benchmarks.startup import ARRAYS_ONLY, CONNECTED, RESIDENT, startup
from benchmarks.teams import CPPRB, REVERB
from rich.console import Console

import rl_buffer as rb

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: dict[str, Callable[[Options], list[Measurement]]] = {
    "in-process": in_process,
    "gae": gae,
    "startup": startup,
    "mixed": mixed,
    "stall": stall,
    "images": images,
    "payload": payload,
    "server": server_load,
}
PEERS = ("cpprb", "stable-baselines3", "torchrl")
QUICK = Options(
    sizes=(1_000, 4_000),
    num_turns=3,
    slice_s=0.01,
    num_actors=(1,),
    num_starts=1,
    num_team_turns=2,
    team_s=0.2,
    team_capacity=10_000,
    table_nbytes=50_000_000,
    num_writers=(1, 2),
    payloads_nbytes=(400,),
    reverb_python="",
)
BARS = (
    Bar("prioritized get, 1 M: cpprb / rl_buffer", Case(GET, "1 M", "cpprb"), Case(GET, "1 M", OURS), at_least=10),
    Bar("prioritized get, 1 M: torchrl / rl_buffer", Case(GET, "1 M", "torchrl"), Case(GET, "1 M", OURS), at_least=12),
    Bar("prioritized get: growth from 64 k to 8 M", Case(GET, "8 M", OURS), Case(GET, "64 k", OURS), below=3),
    Bar("add of one step, 1 M: cpprb / rl_buffer", Case(ADD, "1 M", "cpprb"), Case(ADD, "1 M", OURS), at_least=1),
    Bar("add of one step to a server: microseconds", Case(UNIFORM_ADD, "1 M", SERVED), below=12),
    Bar("add of one step to a server: times SB3's", *(Case(UNIFORM_ADD, "1 M", x) for x in (SERVED, "SB3")), below=2),
    Bar(
        "add of 64 envs' steps to a server: times SB3's",
        *(Case(ADD_MANY, "1 M", x) for x in (SERVED, "SB3")),
        below=1.5,
    ),
    # A loop over tensors is what people write; the same loop over arrays or floats is in the table.
    Bar(
        "GAE 128 x 8: loop over tensors / rl_buffer", *(Case(GAE, "128 x 8", x) for x in (TENSORS, OURS)), at_least=100
    ),
    Bar("16 actors connected: times as long as 1", Case(CONNECTED, "16", OURS), Case(CONNECTED, "1", OURS), below=3),
    Bar("an actor without torch connected: seconds", Case(CONNECTED, "1", ARRAYS_ONLY), below=0.5),
    Bar("an actor without torch resident: megabytes", Case(RESIDENT, "1", ARRAYS_ONLY), below=80),
    *(
        Bar(f"mixed: {operation}: {OURS} / {peer}", Case(operation, SIZE, peer), Case(operation, SIZE, OURS), least)
        for peer, least in ((CPPRB, 10), (REVERB, 50))
        for operation in (INSERTS, SAMPLES)
    ),
    Bar("mixed: learner's p99: cpprb MP / rl_buffer", Case(P99, SIZE, CPPRB), Case(P99, SIZE, OURS), at_least=3),
    Bar("stall: samples per CPU second, 1 writer / 8", *(Case(PER_CPU_S, n, OURS) for n in ("8", "1")), below=1.25),
    Bar("images: index_select / learner alone", *(Case(SAMPLED, ALONE, x) for x in (OURS, GATHER_FLOOR)), below=1.25),
    Bar("images: index_select / with writers", *(Case(SAMPLED, PAPER, x) for x in (OURS, GATHER_FLOOR)), below=1.43),
)


@dataclass
class Bench:
    """Options of the measurements."""

    sections: tuple[str, ...] = tuple(SECTIONS)
    """Parts to run: in-process, gae, startup, mixed, stall, images, payload, server."""
    output: Path = Path("runs/bench")
    """Directory for bench.json and bench.png."""
    measure: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    quick: bool = False
    """Small buffers, 2 or 3 turns of 0.01 to 0.2 s; the options of the measurements do not count then."""


def main(options: Bench) -> None:
    """Measure, print, write."""
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown or not options.sections:
        raise rb.InvalidInput(f"--sections takes {', '.join(SECTIONS)}, not {', '.join(unknown) or 'nothing'}")
    if options.quick:
        options.measure = QUICK
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 160)
    measurements: list[Measurement] = []
    for name in options.sections:
        console.print(f"measuring {name}", highlight=False)
        measurements += SECTIONS[name](options.measure)
    report, environment = Report(measurements, BARS), describe_environment()
    for table in report.tables():
        console.print(table)
    console.print(environment)
    absent = [peer for peer in PEERS if environment["versions"][peer] is None]
    if absent:
        console.print(f"to compare with what is not installed: uv pip install {' '.join(absent)}", highlight=False)
    document = {
        "environment": environment,
        "options": asdict(options),
        "measurements": report.measurements(),
        "ratios": report.ratios(),
        "bars": report.bars(),
    }
    (options.output / "bench.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
    report.draw(options.output / "bench.png")
    console.print(f"written to {options.output}/bench.json and bench.png", highlight=False)


def describe_environment() -> dict[str, Any]:
    """The machine, the versions (None: not installed) and the revision."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        OURS: tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
    }
    for package in ("torch", "numpy", "numba", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "versions": versions,
        "revision": revision(),
    }


def revision() -> str:
    """Of this checkout, "-dirty" where it was changed."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except KeyboardInterrupt:
        print("stopped")
    except (rb.RLBufferError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
