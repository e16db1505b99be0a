"""One store with its writers and its learner, each a process of its own: `team.py STORE LOAD`, LOAD being JSON.

    stdin   {"num_writers": 2, "seconds": 1.0, ...}      a turn: JSON, a line each; see `Team.turn`
    stdout  {"seconds": 1.0, "num_inserts": 9000, ...}   what was counted in it; the first line says "ready"

Between turns everybody sleeps, so that teams can take turns on the same cores. This process is the learner. Counts are
taken while all of them are at work: rates of writers and learner are of the same seconds.

Runs in the interpreter of the store that it measures: nothing but NumPy is imported here.
"""

import contextlib
import importlib
import json
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # rl_buffer as it is here

import numpy as np
from numpy.typing import NDArray

STORES = {
    "rl_buffer": ("benchmarks.store_rl_buffer", "RLBufferStore"),
    "cpprb MP": ("benchmarks.store_cpprb", "CpprbStore"),
    "Reverb": ("benchmarks.store_reverb", "ReverbStore"),
}
LEARN, GATHER, COPY = "learn", "gather", "copy"  # tasks of the learner
_SETTLING_S = 0.1  # of a turn, before counting begins
_NUM_STEPS_MADE_UP = 8  # batches of rows that a writer repeats


@dataclass(frozen=True)
class Load:
    """What a team does. Observations and actions are arrays of one type each."""

    obs_shape: tuple[int, ...]
    obs_dtype: str
    action_shape: tuple[int, ...]
    capacity: int  # transitions
    num_filled: int  # before the first turn
    rows_per_add: int
    batch_size: int
    max_writers: int

    def columns(self, num_rows: int, seed: int) -> dict[str, NDArray[Any]]:
        """obs, action, reward, done, next_obs of made-up transitions, [num_rows, ...]."""
        random = np.random.default_rng(seed)

        def observations() -> NDArray[Any]:
            shape = (num_rows, *self.obs_shape)
            if self.obs_dtype == "uint8":
                return random.integers(256, size=shape, dtype=np.uint8)
            return random.random(shape, np.float32)

        return {
            "obs": observations(),
            "action": random.random((num_rows, *self.action_shape), np.float32),
            "reward": random.random(num_rows, np.float32),
            "done": np.zeros(num_rows, np.bool_),
            "next_obs": observations(),
        }


class Store(Protocol):
    """What is compared. Made before the writers are forked, started after."""

    def start(self) -> str:
        """Serve, and fill the table; return what `writer` needs to know."""

    def writer(self, address: str, load: Load) -> Callable[[dict[str, NDArray[Any]]], object]:
        """In a writer's process: a function that adds `rows_per_add` transitions."""

    def learner(self) -> Callable[[], object]:
        """A function that samples a batch, looks at it, and updates its priorities."""

    def floor(self, task: str) -> Callable[[], object]:
        """A function that moves the bytes of a batch with nothing around it: GATHER or COPY."""

    def server(self) -> dict[str, float]:
        """CPU seconds and messages of the server's process so far; {} where there is none."""

    def stop(self) -> None:
        """End all that was started."""


class Gate:
    """Shared by a team: who may work, and how much each writer did."""

    def __init__(self, num_writers: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, 128 * num_writers), np.int64).reshape(num_writers, 2, 8)
        self.is_open = self._memory[:, 0, 0]
        self.every_ns = self._memory[:, 0, 1]  # add; 0: as fast as it can
        self.num_inserts = self._memory[:, 1, 0]  # on a cache line of its own


def store_of(name: str, load: Load) -> Store:
    """By name; raises ImportError where its library is missing."""
    module, kind = STORES[name]
    store: Store = getattr(importlib.import_module(module), kind)(load)
    return store


class Writers:
    """Forked before any library is loaded that would not bear it; they wait for an address first."""

    def __init__(self, store: Store, load: Load) -> None:
        self.gate = Gate(load.max_writers)
        self._pids: list[int] = []
        self._pipes: list[int] = []
        self._ready_fd, ready_fd = os.pipe()
        for number in range(load.max_writers):
            reading_fd, writing_fd = os.pipe()
            pid = os.fork()
            if pid == 0:
                for fd in (*self._pipes, writing_fd, self._ready_fd):
                    os.close(fd)
                _write(store, load, self.gate, number, os.fdopen(reading_fd, "rb"), ready_fd)
            os.close(reading_fd)
            self._pids.append(pid)
            self._pipes.append(writing_fd)
        os.close(ready_fd)

    def connect(self, address: str) -> None:
        """Tell them where to write, and wait until all can."""
        for pipe in self._pipes:
            os.write(pipe, address.encode() + b"\n")
        for _ in self._pipes:
            if not os.read(self._ready_fd, 1):
                raise RuntimeError("a writer ended before it could write")

    def open(self, num_writers: int, every_ns: int) -> None:
        """Let the first ones work, with an add each so often; 0: as fast as they can."""
        self.gate.every_ns[:] = every_ns
        self.gate.is_open[:num_writers] = 1
        for pipe in self._pipes[:num_writers]:
            os.write(pipe, b"\n")

    def shut(self) -> None:
        """Let nobody work."""
        self.gate.is_open[:] = 0

    def stop(self) -> None:
        """End them."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)


def _write(store: Store, load: Load, gate: Gate, number: int, pipe: Any, ready_fd: int) -> NoReturn:
    """The life of a writer."""
    parent = os.getppid()
    os.dup2(2, 1)  # what a library prints is no answer of the team
    try:
        add = store.writer(pipe.readline().decode().strip(), load)
        parts = [load.columns(load.rows_per_add, 1_000 * number + i) for i in range(_NUM_STEPS_MADE_UP)]
        os.write(ready_fd, b"+")
        os.close(ready_fd)
        i, due_s = 0, time.perf_counter()
        while os.getppid() == parent:
            if not gate.is_open[number]:
                if not pipe.readline():
                    break
                due_s = time.perf_counter()
                continue
            if gate.every_ns[number]:
                due_s += gate.every_ns[number] * 1e-9
                time.sleep(max(0.0, due_s - time.perf_counter()))
            add(parts[i])
            gate.num_inserts[number] += load.rows_per_add
            i = (i + 1) % _NUM_STEPS_MADE_UP
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def take_turn(
    store: Store, load: Load, writers: Writers, turn: dict[str, Any], steps: dict[str, Any]
) -> dict[str, Any]:
    """Work for some seconds and count."""
    task = turn["task"]
    if task not in steps:
        steps[task] = store.learner() if task == LEARN else store.floor(task)
    step, clock_ns = steps[task], time.perf_counter_ns
    num_writers, inserts_per_s, batches_per_s = (turn[key] for key in ("num_writers", "inserts_per_s", "batches_per_s"))
    every_ns = int(1e9 / batches_per_s) if batches_per_s else 0
    writers.open(num_writers, int(num_writers * load.rows_per_add * 1e9 / inserts_per_s) if inserts_per_s else 0)
    try:
        settled_ns = clock_ns() + int(_SETTLING_S * 1e9)
        while clock_ns() < settled_ns:
            step()
        latencies_ns: list[int] = []
        server, inserts = store.server(), writers.gate.num_inserts.copy()
        learner_s, began_ns = time.process_time(), clock_ns()
        now_ns, due_ns, end_ns = began_ns, began_ns, began_ns + int(turn["seconds"] * 1e9)
        while now_ns < end_ns:
            if every_ns:
                due_ns += every_ns
                time.sleep(max(0, due_ns - now_ns) * 1e-9)
                now_ns = clock_ns()
            step()
            latencies_ns.append(-now_ns)
            now_ns = clock_ns()
            latencies_ns[-1] += now_ns
        learner_s = time.process_time() - learner_s
        num_inserts = int((writers.gate.num_inserts - inserts).sum())
        server = {key: value - server[key] for key, value in store.server().items()}
    finally:
        writers.shut()
    p50, p99 = np.percentile(latencies_ns, (50, 99)) * 1e-9
    return {
        "seconds": (now_ns - began_ns) * 1e-9,
        "num_inserts": num_inserts,
        "num_samples": len(latencies_ns) * load.batch_size,
        "p50_s": p50,
        "p99_s": p99,
        "learner_cpu_s": learner_s,
        **server,
    }


def main(name: str, load: Load) -> None:
    """Serve turns until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    store = store_of(name, load)
    writers = Writers(store, load)
    try:
        writers.connect(store.start())
        print("ready", file=answers, flush=True)
        steps: dict[str, Callable[[], object]] = {}
        for line in sys.stdin:
            print(json.dumps(take_turn(store, load, writers, json.loads(line), steps)), file=answers, flush=True)
    finally:
        writers.stop()
        with contextlib.suppress(Exception):
            store.stop()


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_load(text: str) -> Load:
    """From JSON."""
    values = json.loads(text)
    return Load(**values | {key: tuple(values[key]) for key in ("obs_shape", "action_shape")})


if __name__ == "__main__":
    main(sys.argv[1], read_load(sys.argv[2]))
