"""One store with its writers and its learner, each a process of its own: `team.py STORE LOAD`, LOAD being JSON.

    stdin   {"num_writers": 2, "seconds": 1.0, ...}      a `Turn`: JSON, a line each
    stdout  {"seconds": ..., "num_inserts": ..., ...}    what was counted in it; the first line says "ready"

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
_SETTLING_S = 0.2  # of a turn, before counting begins
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

    @property
    def row_nbytes(self) -> int:
        """Of one transition, without what a library adds."""
        numbers = 2 * int(np.prod(self.obs_shape)) * np.dtype(self.obs_dtype).itemsize
        return numbers + 4 * int(np.prod(self.action_shape)) + 5

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


@dataclass(frozen=True)
class Turn:
    """Who does what for how long."""

    num_writers: int
    seconds: float
    task: str = LEARN
    inserts_per_s: float = 0.0  # of all writers together; 0: as fast as they can
    batches_per_s: float = 0.0


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
    """Shared by a team: who may work, how often, and how much each writer did."""

    def __init__(self, num_writers: int) -> None:
        memory = np.frombuffer(mmap.mmap(-1, 128 * num_writers), np.int64).reshape(num_writers, 2, 8)
        self.is_open = memory[:, 0, 0]
        self.period_ns = memory[:, 0, 1]  # from one add of a writer to the next; 0: as fast as it can
        self.num_inserts = memory[:, 1, 0]  # on a cache line of its own


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

    def open(self, num_writers: int, period_ns: int) -> None:
        """Let the first ones work."""
        self.gate.period_ns[:] = period_ns
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
        i, due_ns = 0, time.perf_counter_ns()
        while os.getppid() == parent:
            if not gate.is_open[number]:
                if not pipe.readline():
                    break
                due_ns = time.perf_counter_ns()
                continue
            if period_ns := int(gate.period_ns[number]):
                due_ns += period_ns
                time.sleep(max(0, due_ns - time.perf_counter_ns()) * 1e-9)
            add(parts[i])
            gate.num_inserts[number] += load.rows_per_add
            i = (i + 1) % _NUM_STEPS_MADE_UP
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class Learner:
    """This process: takes turns with the writers at work, and counts."""

    def __init__(self, store: Store, load: Load, writers: Writers) -> None:
        self._store, self._load, self._writers = store, load, writers
        self._steps: dict[str, Callable[[], object]] = {}  # by task

    def take(self, turn: Turn) -> dict[str, float]:
        """Work for some seconds; rates and times are of these."""
        load, task = self._load, turn.task
        if task not in self._steps:
            self._steps[task] = self._store.learner() if task == LEARN else self._store.floor(task)
        paced = turn.inserts_per_s and turn.num_writers
        self._writers.open(
            turn.num_writers, int(1e9 * turn.num_writers * load.rows_per_add / turn.inserts_per_s) if paced else 0
        )
        try:
            settled_ns = time.perf_counter_ns() + int(_SETTLING_S * 1e9)
            while time.perf_counter_ns() < settled_ns:
                self._steps[task]()
            before = self._counts()
            latencies_ns, seconds = self._work(turn)
            counts = {key: value - before[key] for key, value in self._counts().items()}
        finally:
            self._writers.shut()
        p50, p99 = np.percentile(latencies_ns, (50, 99)) * 1e-9
        num_samples = len(latencies_ns) * load.batch_size
        return counts | {"seconds": seconds, "num_samples": num_samples, "p50_s": p50, "p99_s": p99}

    def _work(self, turn: Turn) -> tuple[list[int], float]:
        """(nanoseconds of each step, seconds of all)."""
        step, clock_ns, latencies_ns = self._steps[turn.task], time.perf_counter_ns, []
        period_ns = int(1e9 / turn.batches_per_s) if turn.batches_per_s else 0
        began_ns = now_ns = due_ns = clock_ns()
        end_ns = began_ns + int(turn.seconds * 1e9)
        while now_ns < end_ns:
            if period_ns:
                due_ns += period_ns
                time.sleep(max(0, due_ns - now_ns) * 1e-9)
                now_ns = clock_ns()
            step()
            latencies_ns.append(-now_ns)
            now_ns = clock_ns()
            latencies_ns[-1] += now_ns
        return latencies_ns, (now_ns - began_ns) * 1e-9

    def _counts(self) -> dict[str, float]:
        return {
            "num_inserts": float(self._writers.gate.num_inserts.sum()),
            "learner_cpu_s": time.process_time(),
            "learner_queued_s": scheduled_s(os.getpid())[1],
            **self._store.server(),
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
        learner = Learner(store, load, writers)
        for line in sys.stdin:
            print(json.dumps(learner.take(Turn(**json.loads(line)))), file=answers, flush=True)
    finally:
        writers.stop()
        with contextlib.suppress(Exception):
            store.stop()


def scheduled_s(pid: int) -> tuple[float, float]:
    """Seconds that the threads of a process have run, and that they were ready to run and waited for a core."""
    ran_ns = queued_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            ran, queued, _ = path.read_text().split()
            ran_ns, queued_ns = ran_ns + int(ran), queued_ns + int(queued)
    return ran_ns * 1e-9, queued_ns * 1e-9


if __name__ == "__main__":
    values = json.loads(sys.argv[2])
    main(sys.argv[1], Load(**values | {key: tuple(values[key]) for key in ("obs_shape", "action_shape")}))
