"""Section in-process: replay buffers that live in the learner's own process, and what an actor's writer costs it."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from benchmarks.libraries import (
    BATCH_SIZE,
    OF_MANY_ENVS,
    PRIORITIZED,
    UNIFORM,
    WRITABLE,
    Buffer,
    full_buffer,
    made_up_steps,
)
from benchmarks.measure import Case, Job, Measurement, Options, take_turns

SECTION = "in-process"
GET, UPDATE, ADD = "prioritized get of 256", "update_priorities of 256", "add 1 step of 1 env"
ADD_AND_GET, ADD_MANY = "add 1 step, then get of 256", "add 1 step of 64 envs"
UNIFORM_GET, UNIFORM_ADD = "uniform get of 256", "uniform: add 1 step of 1 env"
FLOOR = "gather only"

_NUM_ENVS = 64
_NUM_STEPS = 512  # added by one timed call: whole chunks, however large these are

MakeJob = Callable[[Buffer, int], Job]


def in_process(options: Options) -> list[Measurement]:
    """Prioritized buffers at every size; the rest at the largest but one, which is 1 M unless told otherwise."""
    sizes = sorted(options.sizes)
    middle = sizes[-2:-1] or sizes
    prioritized = {GET: _get, UPDATE: _update, ADD: _add, ADD_AND_GET: _add_and_get}
    return [
        *_compare(prioritized, PRIORITIZED, sizes, 1, options),
        *_compare({ADD_MANY: _add}, OF_MANY_ENVS, middle, _NUM_ENVS, options),
        *_compare({UNIFORM_GET: _get}, UNIFORM, middle, 1, options, prioritized=False),
        *_compare({UNIFORM_ADD: _add}, WRITABLE, middle, 1, options, prioritized=False),
    ]


def _compare(
    jobs: Mapping[str, MakeJob],
    libraries: Iterable[str],
    sizes: Sequence[int],
    num_envs: int,
    options: Options,
    *,
    prioritized: bool = True,
) -> list[Measurement]:
    """One job after the other, in which libraries and sizes take turns: growth is then a ratio like any other."""
    buffers = {
        (short(size), name): full_buffer(name, size, num_envs, prioritized=prioritized)
        for size, name in itertools.product(sizes, libraries)
    }
    measurements = []
    for operation, make_job in jobs.items():
        cases: dict[Case, Job | str] = {}
        for (size, name), buffer in buffers.items():
            cases[Case(operation, size, name)] = buffer if isinstance(buffer, str) else make_job(buffer, num_envs)
            if operation == GET and isinstance(buffer, Buffer) and buffer.rows is not None:
                cases[Case(operation, size, FLOOR)] = _gather(buffer)
        measurements += take_turns(SECTION, cases, options)
    for buffer in buffers.values():
        if isinstance(buffer, Buffer):
            buffer.close()
    return measurements


def _get(buffer: Buffer, num_envs: int) -> Job:
    return Job(buffer.get)


def _gather(buffer: Buffer) -> Job:
    """What is under any `get`: numbers of random rows, fresh each time, and one copy of those rows."""
    numbers, batch = torch.empty(BATCH_SIZE, dtype=torch.int64), torch.empty_like(buffer.rows[:BATCH_SIZE])

    def gather() -> None:
        torch.randint(len(buffer.rows), (BATCH_SIZE,), out=numbers)
        torch.index_select(buffer.rows, 0, numbers, out=batch)

    return Job(gather)


def _update(buffer: Buffer, num_envs: int) -> Job:
    """Of the batch just drawn, as a learner does."""
    return Job(buffer.update, prepare=buffer.get)


def _add(buffer: Buffer, num_envs: int) -> Job:
    steps = [buffer.step(*values) for values in made_up_steps(_NUM_STEPS, num_envs)]
    add = buffer.add

    def add_all() -> None:
        for step in steps:
            add(step)

    return Job(add_all, _NUM_STEPS)


def _add_and_get(buffer: Buffer, num_envs: int) -> Job:
    """The usual loop of an off-policy learner."""
    steps = itertools.cycle([buffer.step(*values) for values in made_up_steps(_NUM_STEPS, num_envs)])

    def add_and_get() -> None:
        buffer.add(next(steps))
        buffer.get()

    return Job(add_and_get)


def short(number: int) -> str:
    """64 k for 64,000."""
    for unit, factor in (("M", 10**6), ("k", 10**3)):
        if number % factor == 0:
            return f"{number // factor} {unit}"
    return f"{number:,}"
