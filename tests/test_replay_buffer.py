"""What only the in-process replay buffers have; what they share with served tables is in test_conformance."""

import os
import shutil
import tempfile
from collections import deque
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from safetensors import safe_open

import rl_buffer as rb
from rl_buffer.batches import leaf_views
from rl_buffer.buffer_files import write_file
from rl_buffer.local_rows import LocalRows
from rl_buffer.prioritized_replay_buffer import PrioritizedReplayBuffer
from rl_buffer.replay_buffer import ReplayBuffer
from rl_buffer.spec import RowLayout
from rl_buffer.stats_tracker import StatsTracker

pytestmark = pytest.mark.timeout(60)
torch.set_num_threads(1)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GAMMA = 0.5  # with whole rewards every sum is exact in float32
ALPHA, EPSILON = 0.7, 0.01
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


def make(buffer_size=10, num_envs=1, *, prioritized=False, **options):
    kind = PrioritizedReplayBuffer if prioritized else ReplayBuffer
    options = {"obs_shape": 2, "action_shape": (), "action_dtype": "int64", "gamma": GAMMA, "seed": 0} | options
    if prioritized:
        options = {"alpha": ALPHA, "epsilon": EPSILON} | options
    return kind(buffer_size, num_envs, **options)


def add(buffer, numbers, *, done=False, **options):
    """Steps of all environments; action and reward are number * num_envs + env."""
    envs = np.arange(buffer.num_envs)
    for number in numbers:
        obs = np.stack((envs, np.full(buffer.num_envs, number)), axis=1)
        serial = number * buffer.num_envs + envs
        buffer.add(obs, serial, serial, np.full(buffer.num_envs, done), obs + [0, 1], **options)


def stored(buffer):
    """In the order of their commit: (obs, action, reward, next_obs, n_steps, discount, terminated, truncated)."""
    buffer.flush()
    rows = torch.from_numpy(buffer._state.allocator.committed())
    leaves = leaf_views(buffer.table.layout, buffer._rows.block.cpu())
    names = ("observations", "actions", "rewards", "next_observations", "n_steps", "discounts", "terminateds")
    columns = [leaves[name][rows].tolist() for name in (*names, "truncateds")]
    assert leaves["dones"][rows].bool().tolist() == columns[6]
    return [tuple(map(as_key, row)) for row in zip(*columns, strict=True)]


def as_key(value):
    return tuple(value) if isinstance(value, list) else value


def masses(buffer):
    """In the order of their commit."""
    buffer.flush()
    return buffer._state._sampler.masses_of(buffer._state.allocator.committed()).tolist()


def snapshot(buffer):
    """All that can be seen of a buffer."""
    buffer.flush()
    arrays, values = buffer._state.state()
    steps, steps_values = buffer._history.state()
    return (
        stored(buffer),
        {name: array.tolist() for name, array in arrays.items()},
        values,
        {name: array[: buffer._history.num_steps].tobytes() for name, array in steps.items()},
        steps_values,
        None if buffer.stats_tracker is None else buffer.stats_tracker.get_raw_values(),
    )


def drawn(buffer, num_batches=3, batch_size=4):
    return [buffer.get(batch_size).actions.tolist() for _ in range(num_batches)]


# ---- the example of the issue ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_call_of_the_issue_works_as_it_stands(device):
    DEVICE = device
    stats_tracker = StatsTracker(num_envs=4)
    replay_buffer = ReplayBuffer(
        buffer_size=1000, num_envs=4, obs_shape=(16,), action_shape=(4,), stats_tracker=stats_tracker, device=DEVICE
    )
    torch.manual_seed(0)
    for _ in range(1000):
        obs = torch.randn(4, 16)
        action = torch.randn(4, 4)
        reward = torch.randn(4)
        done = torch.rand(4) < 0.01
        truncated = torch.zeros(4, dtype=torch.float32)
        next_obs = torch.randn(4, 16)
        replay_buffer.add(obs, action, reward, done, next_obs, truncated)
    assert len(replay_buffer) == 1000
    assert replay_buffer.num_transitions == 4000
    if len(replay_buffer) > 64:
        batch = replay_buffer.get(batch_size=64)
    shapes = {name: tuple(getattr(batch, name).shape) for name in ("observations", "actions", "next_observations")}
    assert shapes == {"observations": (64, 16), "actions": (64, 4), "next_observations": (64, 16)}
    for name in ("rewards", "dones", "truncateds"):
        assert getattr(batch, name).shape == (64,)
    assert {tensor.device.type for tensor in (batch.observations, batch.rewards, batch.dones)} == {device}
    stats = stats_tracker.get_statistics()
    assert 20 < stats["train/num_episodes"] < 60


# ---- a plain list model ---------------------------------------------------------------------------------------

ENDS = st.sampled_from(["", "", "", "", "terminated", "truncated", "both"])
TD_ERRORS = st.integers(-50, 50).map(lambda tenths: tenths / 10)


class ListModel:
    """The same promises with lists: a step at a time, no rows, no chunks of arrays.

    items: [row, mass], the oldest first. steps: every step ever, as the lists of its environments.
    """

    def __init__(self, capacity, num_envs, n_step, autoreset):
        self.capacity, self.num_envs, self.n_step, self.autoreset = capacity, num_envs, n_step, autoreset
        self.items = []
        self.steps = []
        self.open = []  # (step, env) that no transition begins with yet
        self.ended = [False] * num_envs
        self.num_stale = 0
        self.running = [[] for _ in range(num_envs)]
        self.episodes = []

    def add(self, kinds, priorities):
        step = len(self.steps)
        self.steps.append([])
        for env, kind in enumerate(kinds):
            dummy = self.autoreset == "next_step" and self.ended[env]
            kind = "" if dummy else kind
            terminated, truncated = kind in ("terminated", "both"), kind in ("truncated", "both")
            reward = step % 7 + env
            priority = None if priorities is None else priorities[env]
            self.steps[step].append(
                {"reward": reward, "terminated": terminated, "truncated": truncated, "cut": bool(kind)}
                | {"priority": priority}
            )
            self.ended[env] = bool(kind)
            if dummy:
                continue
            self.open.append((step, env))
            self.running[env].append(reward)
            if kind:
                self.episodes.append((sum(self.running[env]), len(self.running[env])))
                self.running[env] = []

    def on_reset(self, mask):
        for env in np.flatnonzero(mask):
            if self.steps:
                self.steps[-1][env]["cut"] = True
            self.ended[env] = False
            self.running[env] = []

    def flush(self, close=False):
        done = []
        for step, env in sorted(self.open):
            window = []
            for later in range(step, len(self.steps)):
                window.append(self.steps[later][env])
                if window[-1]["cut"] or len(window) == self.n_step:
                    break
            if close or window[-1]["cut"] or len(window) == self.n_step:
                done.append((step, env))
                reward = sum(GAMMA**k * part["reward"] for k, part in enumerate(window))
                terminated, truncated = window[-1]["terminated"], window[-1]["truncated"]
                discount = 0.0 if terminated else GAMMA ** len(window)
                obs, next_obs = (env, step), (env, step + len(window))
                row = (obs, step, reward, next_obs, len(window), discount, terminated, truncated)
                done[-1] = (step, env, row, window[0]["priority"])
        self.open = sorted(set(self.open) - {place[:2] for place in done})
        self.commit([row for *_, row, _ in done], [priority for *_, priority in done])

    def commit(self, rows, td_errors):
        kept = self.items[max(0, len(self.items) + len(rows) - self.capacity) :]
        largest = max((item[1] for item in kept), default=1.0)
        new = [[row, largest if td is None else mass(td)] for row, td in zip(rows, td_errors, strict=True)]
        self.items = (kept + new)[-self.capacity :]

    def clear(self):
        self.items, self.open = [], []

    def update(self, items, td_errors):
        """items: as `self.items` held them when they were drawn; None where nothing was."""
        live = {id(item) for item in self.items}
        for item, td_error in zip(items, td_errors, strict=True):
            if item is None or id(item) not in live:
                self.num_stale += 1
            else:
                item[1] = mass(td_error)


def mass(td_error):
    return float((np.abs(np.float64(td_error)) + EPSILON) ** ALPHA)


class BufferMachine(RuleBasedStateMachine):
    """Random calls of a buffer and of its model, compared after each look."""

    prioritized = False

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()

    def teardown(self):
        if hasattr(self, "buffer"):
            self.compare()
        shutil.rmtree(self.folder)

    @initialize(
        buffer_size=st.integers(1, 6),
        num_envs=st.integers(1, 3),
        n_step=st.integers(1, 3),
        autoreset=st.sampled_from([None, "next_step", "disabled"]),
        chunk_steps=st.sampled_from([2, 7, 64]),  # the fewer, the sooner a row holds another transition
    )
    def begin(self, buffer_size, num_envs, n_step, autoreset, chunk_steps):
        self.chunk_steps = chunk_steps
        self.options = {
            "buffer_size": buffer_size,
            "num_envs": num_envs,
            "n_step": n_step,
            "autoreset": autoreset,
            "stats_tracker": StatsTracker(num_envs, window=100_000),
            "prioritized": self.prioritized,
        }
        self.buffer = self.make()
        self.model = ListModel(buffer_size * num_envs, num_envs, n_step, autoreset)
        self.new_steps = 0  # since the last time that complete windows went into rows
        self.batches = []  # (batch, its items in the model)
        self.drawn = deque(maxlen=16)  # (rows, items) of which bare indices are remembered
        self.closed = False
        self.num_extended = 0

    def make(self, **options):
        with mock.patch("rl_buffer.replay_buffer._CHUNK_STEPS", self.chunk_steps):
            return make(**self.options | options)

    def look(self):
        """What every look does: complete windows go into rows."""
        if self.new_steps:
            self.model.flush()
        self.new_steps = 0

    @precondition(lambda self: not self.closed)
    @rule(data=st.data(), num_steps=st.integers(1, 5))
    def add(self, data, num_steps):
        self.add_steps(data, num_steps)

    @precondition(lambda self: not self.closed)
    @rule(data=st.data())
    def add_more_than_a_chunk(self, data):
        self.add_steps(data, self.chunk_steps + 3)

    def add_steps(self, data, num_steps):
        num_envs = self.buffer.num_envs
        with_priorities = self.prioritized and self.model.n_step == 1 and data.draw(st.booleans())
        every = data.draw(st.lists(st.lists(ENDS, min_size=num_envs, max_size=num_envs), min_size=1, max_size=5))
        for i in range(num_steps):
            kinds, step = every[i % len(every)], len(self.model.steps)
            priorities = None
            if with_priorities:
                priorities = [abs(data.draw(TD_ERRORS)) for _ in range(num_envs)] if i < 3 else [1.5] * num_envs
            self.model.add(kinds, priorities)
            obs = np.array([(env, step) for env in range(num_envs)])
            truncated, terminated = (np.isin(kinds, (flag, "both")) for flag in ("truncated", "terminated"))
            rewards = [step % 7 + env for env in range(num_envs)]
            outcome = (rewards, truncated | terminated, obs + [0, 1], truncated, terminated)
            self.buffer.add(obs, [step] * num_envs, *outcome, priority=priorities)
            self.new_steps += 1
            if self.new_steps == self.chunk_steps:
                self.look()

    @precondition(lambda self: not self.closed)
    @rule()
    def a_bad_step(self):
        obs = np.zeros((self.buffer.num_envs, 2))
        with pytest.raises(rb.InvalidInput, match="reward is nan"):
            self.buffer.add(obs, [0] * len(obs), [np.nan] * len(obs), [True] * len(obs), obs)

    @rule(data=st.data())
    def on_reset(self, data):
        num_envs = self.buffer.num_envs
        mask = data.draw(st.lists(st.booleans(), min_size=num_envs, max_size=num_envs))
        self.buffer.on_reset(mask)
        self.model.on_reset(mask)
        self.model.flush()
        self.new_steps = 0

    @rule(share=st.floats(0.01, 1.0))
    def get(self, share):
        self.look()
        size = len(self.model.items)
        if not size:
            with pytest.raises(rb.InvalidInput, match="batch_size is 1, but the buffer holds 0 transitions"):
                self.buffer.get(1)
            return
        with pytest.raises(rb.InvalidInput, match=f"batch_size is {size + 1}, but the buffer holds {size} transitions"):
            self.buffer.get(size + 1)
        self.take(self.buffer.get(max(1, int(share * size))))

    def take(self, batch):
        """Note what was drawn, by what the batch holds."""
        names = ("observations", "actions", "rewards", "next_observations", "n_steps", "discounts", "terminateds")
        columns = [getattr(batch, name).tolist() for name in (*names, "truncateds")]
        rows = [tuple(map(as_key, row)) for row in zip(*columns, strict=True)]
        by_row = {item[0]: item for item in self.model.items}
        items = [by_row[row] for row in rows]  # a KeyError: what was drawn is not in the model
        if self.prioritized:
            # Rows that are equal in all columns are told apart by their place.
            places = {row: place for place, row in enumerate(self.buffer._state.allocator.committed().tolist())}
            items = [self.model.items[places[row]] for row in batch.indices.tolist()]
            assert [item[0] for item in items] == rows
            expected = np.array([item[1] for item in items]) ** -0.4
            np.testing.assert_allclose(batch.weights, expected / expected.max(), rtol=1e-5)
            self.batches.append((batch, items))
            self.drawn.appendleft((batch.indices.tolist(), items))

    @precondition(lambda self: self.prioritized and self.batches)
    @rule(data=st.data())
    def update_by_batch(self, data):
        batch, items = data.draw(st.sampled_from(self.batches))
        td_errors = data.draw(st.lists(TD_ERRORS, min_size=len(items), max_size=len(items)))
        self.look()
        self.buffer.update_priorities(batch, np.array(td_errors))
        self.model.update(items, td_errors)

    @precondition(lambda self: self.prioritized and self.batches)
    @rule(data=st.data())
    def update_by_drawn_indices(self, data):
        batch, _ = data.draw(st.sampled_from(self.batches))
        self.update_bare(data, batch.indices.tolist())

    @precondition(lambda self: self.prioritized)
    @rule(data=st.data())
    def update_by_any_indices(self, data):
        rows = data.draw(st.lists(st.integers(0, self.buffer.table.num_rows - 1), min_size=1, max_size=6))
        self.update_bare(data, rows)

    def update_bare(self, data, rows):
        td_errors = data.draw(st.lists(TD_ERRORS, min_size=len(rows), max_size=len(rows)))
        self.look()
        remembered = [items for drawn, items in self.drawn if drawn == rows]
        if remembered:
            items = remembered[0]
        else:
            self.buffer.flush()
            places = {row: place for place, row in enumerate(self.buffer._state.allocator.committed().tolist())}
            items = [self.model.items[places[row]] if row in places else None for row in rows]
        self.buffer.update_priorities(torch.tensor(rows), np.array(td_errors))
        self.model.update(items, td_errors)

    @rule(num_rows=st.integers(0, 40), data=st.data())
    def extend(self, num_rows, data):
        serial = self.num_extended + np.arange(num_rows)
        self.num_extended += num_rows
        flags = [data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)) for _ in range(2)]
        terminateds, truncateds = flags
        n_steps = serial % self.model.n_step + 1
        observations = np.stack((serial - 10**6, serial), axis=1)
        td_errors = None
        if self.prioritized and data.draw(st.booleans()):
            td_errors = data.draw(st.lists(TD_ERRORS, min_size=num_rows, max_size=num_rows))
        self.look()
        columns = {"observations": observations, "actions": serial, "rewards": serial % 11, "n_steps": n_steps}
        columns |= {"next_observations": observations + 1, "terminateds": terminateds, "truncateds": truncateds}
        self.buffer.extend(
            {name: np.asarray(column, None if num_rows else self.dtype_of(name)) for name, column in columns.items()},
            td_errors,
        )
        rows = []
        for i, number in enumerate(serial.tolist()):
            discount = 0.0 if terminateds[i] else GAMMA ** n_steps[i].item()
            obs, next_obs = (number - 10**6, number), (number - 10**6 + 1, number + 1)
            rows.append((obs, number, number % 11, next_obs, n_steps[i].item(), discount, *(f[i] for f in flags)))
        # In parts: the largest priority of the live is looked up for each.
        part = min(self.buffer.table.headroom, self.model.capacity)
        for start in range(0, num_rows, part):
            stop = min(start + part, num_rows)
            self.model.commit(rows[start:stop], [None] * (stop - start) if td_errors is None else td_errors[start:stop])

    def dtype_of(self, name):
        return self.buffer.table.layout.fields[name].dtype

    @rule()
    def clear(self):
        self.buffer.clear()
        self.model.clear()
        self.new_steps = 0

    @precondition(lambda self: not self.closed)
    @rule(really=st.sampled_from([False, False, False, True]))
    def close(self, really):
        if really:
            self.buffer.close()
            self.model.flush(close=True)
            self.new_steps = 0
            self.closed = True

    @rule()
    def save_and_go_on_with_a_fresh_buffer(self):
        self.look()
        path = os.path.join(self.folder, "buffer")
        self.buffer.save(path)
        old, self.buffer = self.buffer, self.make(seed=99)
        self.buffer.load(path)
        self.closed = False
        self.drawn.clear()
        assert snapshot(self.buffer) == snapshot(old)
        if self.model.items:
            size = len(self.model.items)
            batch = self.buffer.get(size)
            assert batch.actions.tolist() == old.get(size).actions.tolist()
            self.take(batch)

    @rule()
    def compare(self):
        self.look()
        assert self.buffer.num_transitions == len(self.model.items)
        assert len(self.buffer) == len(self.model.items) // self.buffer.num_envs
        assert stored(self.buffer) == [item[0] for item in self.model.items]
        raw = self.buffer.stats_tracker.get_raw_values()
        assert list(zip(raw["rewards"], raw["lengths"], strict=True)) == self.model.episodes
        if self.prioritized:
            assert masses(self.buffer) == pytest.approx([item[1] for item in self.model.items], rel=1e-9)
            assert self.buffer.num_stale_updates == self.model.num_stale


class PrioritizedBufferMachine(BufferMachine):
    prioritized = True


MACHINE_SETTINGS = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTheBufferIsTheListModel = BufferMachine.TestCase
TestTheBufferIsTheListModel.settings = MACHINE_SETTINGS
TestThePrioritizedBufferIsTheListModel = PrioritizedBufferMachine.TestCase
TestThePrioritizedBufferIsTheListModel.settings = MACHINE_SETTINGS


# ---- constructors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 0}, "buffer_size must be an integer >= 1, got 0"),
        ({"buffer_size": 2.5}, "buffer_size must be an integer >= 1, got 2.5"),
        ({"num_envs": 0}, "num_envs must be an integer >= 1, got 0"),
        ({"obs_shape": None}, "expected either obs_shape and action_shape or .*, got action_shape"),
        ({"obs_shape": None, "action_shape": None}, "expected either .*, got none"),
        ({"observation_space": BOX, "action_space": BOX}, "expected either .*, got action_shape and action_space and"),
        ({"obs_shape": (2, -1)}, r"obs_shape is \(2, -1\); expected an int, a tuple of ints >= 1"),
        ({"obs_shape": {}}, "obs_shape is an empty mapping"),
        ({"obs_dtype": "complex64"}, "obs_dtype: dtype 'complex64' cannot be stored"),
        ({"action_dtype": torch.bfloat16}, "action_dtype: dtype torch.bfloat16 cannot be stored"),
        ({"obs_shape": {"a": 1}, "obs_dtype": {"b": "int8"}}, r"obs_dtype has the keys \['b'\], obs_shape has \['a'\]"),
        ({"n_step": 0}, r"n_step must be in \[1, 1024\], got 0"),
        ({"n_step": 2, "gamma": None}, "n_step = 2 and sequence_length = None need gamma="),
        ({"gamma": 1.5}, r"gamma must be in \[0.0, 1.0\], got 1.5"),
        ({"gamma": np.nan}, r"gamma must be in \[0.0, 1.0\], got nan"),
        ({"autoreset": "sometimes"}, "autoreset 'sometimes' is unknown; expected one of"),
        ({"extras": {"goal": 3}}, r"extras\['goal'\]: expected a plain name and a Field, got 3"),
        pytest.param(
            {"stats_tracker": StatsTracker(3), "num_envs": 2},
            "stats_tracker has num_envs 3, the buffer has 2",
            id="stats_tracker of 3",  # the name of an object differs in each process
        ),
        ({"prioritized": True, "alpha": -0.1}, "alpha is -0.1; expected a finite number >= 0"),
        ({"prioritized": True, "alpha": np.nan}, "alpha is nan; expected a finite number >= 0"),
        ({"prioritized": True, "beta": 1.1}, r"beta must be in \[0, 1\], got 1.1"),
        ({"prioritized": True, "beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ({"prioritized": True, "epsilon": 0.0}, "epsilon is 0.0; expected a finite number > 0"),
    ],
    ids=str,
)
def test_a_bad_argument_of_the_constructor_is_refused_by_name(options, message):
    with pytest.raises(rb.InvalidInput, match=message):
        make(**options)


def test_more_than_the_memory_is_refused_with_need_and_have():
    with pytest.raises(rb.NotEnoughMemory, match=r"need \d+\.\d+ GiB, and \d+\.\d+ GiB are available"):
        make(10**9, obs_shape=(84, 84, 4), obs_dtype="uint8")


def test_spaces_may_be_given_instead_of_shapes():
    buffer = ReplayBuffer(5, 2, observation_space=spaces.MultiBinary(3), action_space=spaces.Discrete(4))
    buffer.add(np.ones((2, 3), np.int8), [1, 3], [0, 0], [0, 0], np.zeros((2, 3), np.int8))
    batch = buffer.get(2)
    assert (batch.observations.dtype, batch.actions.dtype) == (torch.int8, torch.int64)
    assert batch.observations.tolist() == [[1, 1, 1]] * 2


def test_discounts_of_a_buffer_without_gamma_are_an_error_that_says_so():
    buffer = make(gamma=None)
    add(buffer, range(3))
    batch = buffer.get(2)
    with pytest.raises(rb.InvalidInput, match="this buffer has no gamma; give it gamma="):
        _ = batch.discounts
    assert batch.rewards.tolist() == batch.actions.tolist()
    other = make(gamma=GAMMA)
    other.extend(batch)
    assert other.get(2).discounts.tolist() == [GAMMA] * 2


def test_metrics_without_a_tracker_are_refused_and_the_step_too():
    buffer = make()
    with pytest.raises(rb.InvalidInput, match="metrics= and done_reasons= need a StatsTracker"):
        add(buffer, [0], metrics={"speed": 1.0})
    assert len(buffer) == 0


# ---- sizes ----------------------------------------------------------------------------------------------------


def test_len_counts_steps_per_environment_and_num_transitions_all():
    buffer = make(10, 3)
    for number in range(12):
        assert (len(buffer), buffer.num_transitions) == (min(number, 10), min(3 * number, 30))
        add(buffer, [number])
    tails = make(10, 2, n_step=2)
    add(tails, [0, 1], done=[True, False])
    # Both steps of environment 0, and the first of environment 1.
    assert (len(tails), tails.num_transitions) == (1, 3)


def test_a_batch_is_at_most_the_contents():
    buffer = make()
    with pytest.raises(rb.InvalidInput, match="batch_size is 1, but the buffer holds 0 transitions"):
        buffer.get(1)
    add(buffer, range(3))
    with pytest.raises(rb.InvalidInput, match="batch_size is 4, but the buffer holds 3 transitions"):
        buffer.get(4)
    assert len(buffer.get(3).actions) == 3


def test_clear_forgets_transitions_and_open_windows_but_not_the_running_return():
    buffer = make(n_step=3, stats_tracker=StatsTracker())
    add(buffer, range(5))
    assert len(buffer) == 3
    buffer.clear()
    assert len(buffer) == 0
    add(buffer, [5, 6])
    add(buffer, [7], done=True)
    assert [row[1:5] for row in stored(buffer)] == [
        (5, 5 + 6 / 2 + 7 / 4, (0, 8), 3),
        (6, 6 + 7 / 2, (0, 8), 2),
        (7, 7, (0, 8), 1),
    ]
    assert buffer.stats_tracker.get_raw_values() == {"rewards": [28.0], "lengths": [8.0]}


def test_after_close_the_tails_are_there_and_nothing_can_be_added():
    buffer = make(n_step=3)
    add(buffer, range(4))
    assert len(buffer) == 2
    buffer.close()
    assert [(row[1], row[4], row[5]) for row in stored(buffer)] == [
        (0, 3, 0.125),
        (1, 3, 0.125),
        (2, 2, 0.25),
        (3, 1, 0.5),
    ]
    with pytest.raises(rb.Closed, match="this buffer was closed"):
        add(buffer, [4])
    buffer.close()
    assert len(buffer) == 4
    assert len(buffer.get(4).actions) == 4


# ---- bare indices ---------------------------------------------------------------------------------------------


def test_indices_alone_name_the_transitions_of_the_batch():
    buffer = make(6, prioritized=True)
    add(buffer, range(6))
    batch = buffer.get(6)
    buffer.update_priorities(batch.indices, batch.actions.double())
    expected = [max(EPSILON, number + EPSILON) ** ALPHA for number in range(6)]
    for number in set(batch.actions.tolist()):
        assert masses(buffer)[number] == pytest.approx(expected[number])
    add(buffer, range(6, 12))
    before = masses(buffer)
    buffer.update_priorities(batch.indices, [1000.0] * 6)
    assert masses(buffer) == before
    assert buffer.num_stale_updates == 6


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1, 0], r"indices must be in \[0, \d+\), got -1..0"),
        ([0, 10**6], r"indices must be in \[0, \d+\), got 0..1000000"),
        ([0.0, 1.0], r"indices must be integers \(B,\), got float64\[2\]"),
        ([[0, 1]], r"indices must be integers \(B,\), got int64\[1, 2\]"),
    ],
)
def test_bad_indices_are_refused_and_change_no_priority(indices, message):
    buffer = make(6, prioritized=True)
    add(buffer, range(6))
    before = masses(buffer)
    with pytest.raises(rb.InvalidInput, match=message):
        buffer.update_priorities(np.array(indices), [5.0, 5.0])
    assert masses(buffer) == before


def test_indices_that_were_drawn_before_a_load_name_what_was_loaded(tmp_path):
    source, buffer = make(6, prioritized=True), make(6, prioritized=True)
    add(buffer, range(6))
    batch = buffer.get(6)
    for number in range(source.table.num_rows + 6):  # a lap of all rows: the same six hold others at its end
        add(source, [number])
        source.flush()
    source.save(tmp_path / "buffer")
    buffer.load(tmp_path / "buffer")
    assert buffer._state.allocator.committed().tolist() == list(range(6))
    buffer.update_priorities(batch.indices, [1000.0] * 6)
    assert buffer.num_stale_updates == 0
    assert max(masses(buffer)) > 100


# ---- files ----------------------------------------------------------------------------------------------------


def filled(**options):
    """A buffer after a lap, with open windows, priorities, stale updates and draws behind it."""
    buffer = make(10, 2, **{"prioritized": True, "n_step": 3, "autoreset": "next_step"} | options)
    for number in range(17):
        add(buffer, [number], done=[number % 5 == 4, False], truncated=[False, number == 9])
        if number == 6 and isinstance(buffer, PrioritizedReplayBuffer):
            early = buffer.get(4)
    if isinstance(buffer, PrioritizedReplayBuffer):
        buffer.update_priorities(early, [9.0] * 4)
        late = buffer.get(4)
        buffer.update_priorities(late, late.actions.double())
    return buffer


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_loaded_buffer_goes_on_as_the_saved_one(tmp_path, prioritized, n_step):
    buffer = filled(prioritized=prioritized, n_step=n_step)
    batch = buffer.get(4)
    stale = buffer.num_stale_updates if prioritized else 0
    buffer.save(tmp_path / "buffer")
    loaded = make(10, 2, prioritized=prioritized, n_step=n_step, autoreset="next_step", seed=5)
    add(loaded, range(3))  # what it held is gone
    loaded.load(str(tmp_path / "buffer"))
    assert snapshot(loaded) == snapshot(buffer)
    assert (len(loaded), loaded.num_transitions) == (len(buffer), buffer.num_transitions)
    assert drawn(loaded) == drawn(buffer)
    for each in (buffer, loaded):
        if prioritized:
            assert each.num_stale_updates == stale > 0
            each.update_priorities(batch, [3.0, 1.0, 4.0, 1.5])
        # The step after an end, in which nothing happened, and the windows that were open.
        add(each, [17], done=[True, True])
        add(each, [18, 19])
    assert snapshot(loaded) == snapshot(buffer)
    assert drawn(loaded) == drawn(buffer)
    for each in (buffer, loaded):
        each.close()
    assert stored(loaded) == stored(buffer)


def test_an_empty_buffer_can_be_saved_and_loaded(tmp_path):
    make().save(tmp_path / "buffer")
    loaded = make()
    add(loaded, range(3))
    loaded.load(tmp_path / "buffer")
    assert len(loaded) == 0
    add(loaded, [7])
    assert loaded.get(1).actions.tolist() == [7]


def test_the_file_is_safetensors_and_holds_no_pickle(tmp_path):
    filled().save(tmp_path / "buffer")
    with safe_open(tmp_path / "buffer", framework="numpy") as file:
        assert file.get_tensor("rows").dtype == np.int64
    assert os.listdir(tmp_path) == ["buffer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prioritized": False}, "was saved with sampler .*'Prioritized'.*, this buffer has .*'Uniform'"),
        ({"n_step": 2}, "was saved with n_step 3, this buffer has 2"),
        ({"gamma": 0.75}, "was saved with gamma 0.5, this buffer has 0.75"),
        ({"buffer_size": 11}, "was saved with capacity 20, this buffer has 22"),
        ({"buffer_size": 20, "num_envs": 1}, "was saved with headroom .*, this buffer has|with num_envs 2, .* has 1"),
        ({"autoreset": "disabled"}, "was saved with autoreset next_step, this buffer has disabled"),
        ({"alpha": 0.5}, "was saved with sampler .*0.7.*, this buffer has .*0.5"),
        ({"obs_dtype": "float16"}, "was saved with spec .*float32.*, this buffer has .*float16"),
        ({"extras": {"goal": rb.Field(())}}, "was saved with spec .*, this buffer has .*goal"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_another_buffer_is_refused_with_both_values(tmp_path, options, message):
    filled().save(tmp_path / "buffer")
    other = make(
        **{"buffer_size": 10, "num_envs": 2, "prioritized": True, "n_step": 3, "autoreset": "next_step"} | options
    )
    extras = {"goal": np.zeros(other.num_envs)} if "extras" in options else None
    add(other, range(4), extras=extras)
    before = snapshot(other)
    with pytest.raises(rb.InvalidInput, match=message):
        other.load(tmp_path / "buffer")
    assert snapshot(other) == before


def test_a_file_without_gamma_is_not_one_with_gamma_1(tmp_path):
    make(gamma=None).save(tmp_path / "buffer")
    with pytest.raises(rb.InvalidInput, match="was saved with gamma_given False, this buffer has True"):
        make(gamma=1.0).load(tmp_path / "buffer")


def test_a_file_whose_leaves_lie_in_another_order_is_refused(tmp_path):
    saved, other = (make(obs_shape=dict.fromkeys(keys, ())) for keys in ("ab", "ba"))
    saved.add({"a": 1.0, "b": 2.0}, 0, 0.0, False, {"a": 3.0, "b": 4.0})
    saved.save(tmp_path / "buffer")
    with pytest.raises(
        rb.InvalidInput,
        match=r"saved with leaves .*'observations/a', 'observations/b'.*, this buffer has .*'observations/b', 'obs",
    ):
        other.load(tmp_path / "buffer")
    assert len(other) == 0


def spoilt(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one byte short":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "a pickle":
        torch.save({"rows": torch.zeros(3)}, path)
    elif how == "other tensors":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(3)}, path)
    else:
        respell(path, how)


def respell(path, how):
    """The same file with one thing changed that its checksum-free format cannot notice."""
    import json

    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["rl_buffer"])
    description.pop("format")
    if how == "no random state":
        del description["table"]["rng"]
    elif how == "no counts":
        description["table"]["counts"] = None
    elif how == "wrong counts":
        description["table"]["counts"]["num_inserts"] += 1
    elif how == "too many steps":
        description["steps"]["num_steps"] = 10**6
    elif how == "no steps":
        del description["steps"]
    elif how == "fewer masses":
        arrays["table/sampler"] = arrays["table/sampler"][:-1]
    elif how == "a row twice":
        arrays["table/committed"][0] = arrays["table/committed"][1]
    elif how == "no rows":
        del arrays["rows"]
    elif how == "wider rows":
        arrays["rows"] = np.concatenate((arrays["rows"], arrays["rows"]), axis=1)
    elif how == "no rewards":
        del arrays["steps/rewards"]
    write_file(path, arrays, description)


SPOILT = ["truncated", "one byte short", "empty", "garbage", "a pickle", "other tensors"]
RESPELT = ["no random state", "no counts", "wrong counts", "too many steps", "no steps", "fewer masses", "a row twice"]
RESPELT += ["no rows", "wider rows", "no rewards"]


@pytest.mark.parametrize("how", SPOILT + RESPELT)
def test_a_spoilt_file_is_refused_and_changes_nothing(tmp_path, how):
    buffer = filled()
    path = tmp_path / "buffer"
    buffer.save(path)
    spoilt(path, how)
    add(buffer, [17])
    before = snapshot(buffer)
    with pytest.raises(rb.InvalidInput, match="buffer"):
        buffer.load(path)
    assert snapshot(buffer) == before


def test_a_missing_file_is_named_and_changes_nothing(tmp_path):
    buffer = filled()
    before = snapshot(buffer)
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        buffer.load(tmp_path / "nothing_here")
    assert snapshot(buffer) == before


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_former_file_and_no_other(tmp_path, monkeypatch, step):
    buffer = filled()
    buffer.save(tmp_path / "buffer")
    former = (tmp_path / "buffer").read_bytes()

    def interrupted(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"safetensors.numpy.{step}" if step == "save_file" else f"os.{step}", interrupted)
    add(buffer, [17])
    with pytest.raises(OSError, match="No space left on device"):
        buffer.save(tmp_path / "buffer")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["buffer"]
    assert (tmp_path / "buffer").read_bytes() == former


def test_a_save_into_a_missing_directory_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        make().save(tmp_path / "nowhere" / "buffer")


# ---- where the rows are ---------------------------------------------------------------------------------------


class _Elsewhere(str):
    """A device that torch takes for the CPU and LocalRows for another one."""

    type = "elsewhere"


def test_rows_of_another_device_are_written_through_the_staging_block():
    layout = RowLayout({"a": rb.Field((3,), "float32"), "b": rb.Field((), "uint8")})
    local = LocalRows(layout, num_rows=7, device=_Elsewhere("cpu"), max_written=4)
    written = {}

    def copy_rows(first):
        def copy(views, rows):
            assert rows.tolist() == list(range(len(rows))), "rows of the staging block"
            views["a"][rows] = first + np.arange(3 * len(rows)).reshape(-1, 3)
            views["b"][rows] = first + np.arange(len(rows))

        return copy

    for first, rows in ((10, [5, 0, 3, 6]), (100, [3, 1])):
        local.write(np.array(rows), copy_rows(first))
        for i, row in enumerate(rows):
            written[row] = ([first + 3 * i + k for k in range(3)], first + i)
    leaves = leaf_views(layout, local.block)
    for row in range(7):
        expected = written.get(row, ([0] * 3, 0))
        assert (leaves["a"][row].tolist(), leaves["b"][row].item()) == expected
    copy = LocalRows(layout, 7, _Elsewhere("cpu"), 4)
    block = local.first(6).copy()
    copy.fill(6, lambda start, stop: block[start:stop])
    assert torch.equal(copy.block[:6], local.block[:6])
    assert not copy.block[6].any()


def test_rows_are_filled_piece_by_piece(monkeypatch):
    monkeypatch.setattr("rl_buffer.local_rows._PIECE_ROWS", 4)
    layout = RowLayout({"a": rb.Field((8,), "int64")})
    local = LocalRows(layout, 10, torch.device("cpu"), 10)
    content = np.arange(80).reshape(10, 8)
    pieces = []

    def read(start, stop):
        pieces.append((start, stop))
        return content[start:stop]

    local.fill(9, read)
    assert pieces == [(0, 4), (4, 8), (8, 9)]
    assert local.first(10).tolist() == [*content[:9].tolist(), [0] * 8]


DEVICES = [("cuda", None), ("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")]


@needs_cuda
@pytest.mark.parametrize(("device", "store_device"), DEVICES)
@pytest.mark.parametrize("as_cuda", [False, True], ids=["from the CPU", "from the GPU"])
def test_rows_on_a_gpu_are_those_that_were_added_lap_after_lap(device, store_device, as_cuda):
    buffer = make(20, 3, n_step=3, prioritized=True, device=device, store_device=store_device)
    on_cpu = make(20, 3, n_step=3, prioritized=True)
    for number in range(70):
        envs = np.arange(3)
        obs = np.stack((envs, np.full(3, number)), axis=1)
        flags = np.array([number % 4 == 3, number % 7 == 6, False])
        step = [obs, number * 3 + envs, envs + number, flags, obs + [0, 1]]
        on_cpu.add(*step)
        buffer.add(*(torch.as_tensor(part).cuda() for part in step) if as_cuda else step)
    assert buffer._rows.block.device.type == (store_device or device)
    assert stored(buffer) == stored(on_cpu)
    for _ in range(5):
        batch, expected = buffer.get(32), on_cpu.get(32)
        for name in ("observations", "actions", "rewards", "next_observations", "discounts", "n_steps", "weights"):
            assert getattr(batch, name).device.type == device
            assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
        assert batch.indices.device.type == batch.generations.device.type == "cpu"
        td_errors = batch.rewards.clone().requires_grad_() - 20
        buffer.update_priorities(batch, td_errors)
        on_cpu.update_priorities(expected, td_errors.cpu())
    assert masses(buffer) == masses(on_cpu)


@needs_cuda
@pytest.mark.parametrize(("device", "store_device"), DEVICES)
def test_a_batch_on_a_gpu_that_is_kept_never_changes(device, store_device):
    buffer = make(64, device=device, store_device=store_device)
    add(buffer, range(64))
    held = [buffer.get(32) for _ in range(8)]
    for _ in range(3):
        add(buffer, range(64, 128))
        buffer.get(32)
    for batch in held:
        assert torch.equal(batch.observations[:, 1].long(), batch.actions)
        assert batch.actions.max() < 64


@needs_cuda
@pytest.mark.parametrize(("device", "store_device"), DEVICES)
def test_a_file_moves_a_buffer_between_cpu_and_gpu(tmp_path, device, store_device):
    on_gpu, on_cpu = make(10, 2, device=device, store_device=store_device), make(10, 2)
    add(on_gpu, range(15))
    on_gpu.save(tmp_path / "buffer")
    on_cpu.load(tmp_path / "buffer")
    assert stored(on_cpu) == stored(on_gpu)
    back = make(10, 2, device=device, store_device=store_device)
    back.load(tmp_path / "buffer")
    assert stored(back) == stored(on_gpu)
    assert drawn(back) == drawn(on_cpu)


@needs_cuda
def test_a_batch_of_a_gpu_can_be_extended_elsewhere():
    on_gpu, on_cpu = make(10, device="cuda"), make(10)
    add(on_gpu, range(10))
    batch = on_gpu.get(10)
    on_cpu.extend(batch)
    assert [row[1] for row in stored(on_cpu)] == batch.actions.tolist()


# ---- how environments reset -----------------------------------------------------------------------------------


def episodes(buffer, *, dummies, num_episodes=3):
    """Episodes of two steps each, with next_step's dummy steps or as a loop that resets by hand."""
    for episode in range(num_episodes):
        for step in range(2):
            obs = [episode, step]
            buffer.add(obs, 0, 1.0, step == 1, [episode, step + 1])
        if dummies:
            buffer.add([episode, 2], 0, 0.0, False, [episode + 1, 0])


@pytest.mark.parametrize(
    ("autoreset", "dummies", "message"),
    [
        (None, True, "a dummy step of environments that reset in next_step mode, stored as a real one"),
        ("next_step", False, "left out as a dummy of next_step mode, but does not begin at the final observation"),
        (None, False, None),
        ("next_step", True, None),
    ],
)
def test_environments_that_reset_in_another_way_are_noticed_once(caplog, autoreset, dummies, message):
    episodes(make(autoreset=autoreset), dummies=dummies)
    said = [record.message for record in caplog.records if record.name == "rl_buffer"]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


@pytest.mark.parametrize(("num_episodes", "num_said"), [(990, 1), (1_000, 0)])
def test_how_environments_reset_is_looked_at_for_the_first_thousand_ends(caplog, num_episodes, num_said):
    buffer = make(autoreset=None)
    episodes(buffer, dummies=False, num_episodes=num_episodes)
    episodes(buffer, dummies=True)
    assert len([record for record in caplog.records if record.name == "rl_buffer"]) == num_said


def test_bfloat16_is_taken_as_the_float_that_it_is():
    buffer = make()
    buffer.add(torch.tensor([1.5, 2.0], dtype=torch.bfloat16), 1, 1.0, False, torch.zeros(2))
    assert buffer.get(1).observations.tolist() == [[1.5, 2.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dones": [1.0], "truncateds": [True]}, "dones and truncateds are both set at 0"),
        ({"dones": [1.0], "terminateds": [False]}, "dones and terminateds differ"),
        ({"dones": [1.0], "timeouts": [True]}, "extend does not know timeouts; it takes actions, discounts, dones"),
    ],
)
def test_offline_flags_that_could_mean_two_things_are_refused(changes, message):
    buffer = make()
    columns = {"observations": [[0.0, 0.0]], "actions": [0], "rewards": [1.0], "next_observations": [[0.0, 0.0]]}
    with pytest.raises(rb.InvalidInput, match=message):
        buffer.extend(columns | changes)
    assert len(buffer) == 0
