"""What a replay buffer promises, in process and served: every test here runs against both.

A table is described once, as a ReplayTable; `implementation.make` builds it as a ReplayBuffer or
PrioritizedReplayBuffer, or opens it on the module's server by `client.replay_buffer`.
"""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from episode_envs import GAMMA, SPEC, EpisodeEnv, EpisodeEnvs, expected_rows
from gymnasium import spaces
from test_writer import play

import rl_buffer as rb

pytestmark = pytest.mark.timeout(60)
torch.set_num_threads(1)

ALPHA, EPSILON = 0.7, 0.01
PRIORITIZED = rb.Prioritized(ALPHA, EPSILON)
LEARNING_GAMMA = 0.9
DICT_SPEC = rb.TransitionSpec(
    obs={
        "camera": rb.Field((2, 2), "uint8"),
        "body": {"speed": rb.Field((), "float64"), "legs": rb.Field((2,), "int16")},
    },
    action={"move": rb.Field((2,), "float32"), "jump": rb.Field((), "bool")},
    extras={"hidden": rb.Field((4,), "float16"), "level": rb.Field((), "int32")},
)
IMAGES = rb.TransitionSpec(obs=rb.Field((2, 3, 3), "uint8"), action=rb.Field((), "int64"))
SPACES = {
    "box": (spaces.Box(-1.0, 1.0, (2, 3), np.float64), spaces.Box(-1.0, 1.0, (2,), np.float32)),
    "discrete": (spaces.Discrete(50), spaces.Discrete(5, start=-2)),
    "multi discrete": (spaces.MultiDiscrete([3, 4]), spaces.MultiDiscrete([[2, 5], [6, 7]])),
    "multi binary": (spaces.MultiBinary(5), spaces.MultiBinary((2, 2))),
    "dict space": (
        spaces.Dict(
            {"image": spaces.Box(0, 255, (3, 3, 1), np.uint8), "goal": spaces.Dict({"room": spaces.Discrete(9)})}
        ),
        spaces.Discrete(5),
    ),
}


def table(spec=SPEC, **options):
    return rb.ReplayTable(spec, **{"capacity": 3000, "gamma": GAMMA, "seed": 0, "headroom": 1024} | options)


TABLES = {
    "uniform": table(),
    "uniform n3": table(n_step=3),
    "prioritized": table(sampler=PRIORITIZED),
    "prioritized n3": table(sampler=PRIORITIZED, n_step=3),
    "small": table(capacity=12),
    # Of few rows, so that they soon hold other transitions.
    "small prioritized": table(capacity=12, sampler=PRIORITIZED, headroom=32),
    "small n3": table(capacity=12, n_step=3),
    "dict": table(DICT_SPEC),
    "images": table(IMAGES),
    "value n1": table(gamma=LEARNING_GAMMA),
    "value n3": table(gamma=LEARNING_GAMMA, n_step=3),
}
TABLES |= {f"{which} seeded {kind}": TABLES[kind] for kind in ("uniform", "prioritized") for which in ("once", "again")}
TABLES |= {name: table(rb.TransitionSpec.from_spaces(*pair)) for name, pair in SPACES.items()}
TRACKER_KEYS = {"extra_metrics_keys": ("speed",), "done_reason_keys": ("fell",)}
TRACKER = {"window": 1000, **TRACKER_KEYS}


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer(TABLES, stats_window=TRACKER["window"], **TRACKER_KEYS) as server:
        yield server


class InProcess:
    """Buffers of this process."""

    def make(self, name, num_envs=1, **options):
        config = TABLES[name]
        kind = rb.ReplayBuffer
        if isinstance(config.sampler, rb.Prioritized):
            kind = rb.PrioritizedReplayBuffer
            options |= {"alpha": config.sampler.alpha, "epsilon": config.sampler.epsilon}
        if name in SPACES:
            options |= dict(zip(("observation_space", "action_space"), SPACES[name], strict=True))
        else:
            options |= {f"{key}_shape": leaves(getattr(config.spec, key), "shape") for key in ("obs", "action")}
            options |= {f"{key}_dtype": leaves(getattr(config.spec, key), "dtype") for key in ("obs", "action")}
        return kind(
            config.capacity // num_envs,
            num_envs,
            n_step=config.n_step,
            gamma=config.gamma,
            seed=config.seed,
            extras=config.spec.extras,
            stats_tracker=rb.StatsTracker(num_envs, **TRACKER),
            **options,
        )

    def reader(self, buffer):
        """Where to look after `close`."""
        return buffer

    def num_transitions(self, buffer):
        assert len(buffer) == buffer.num_transitions // buffer.num_envs, "len is in steps per environment"
        return buffer.num_transitions

    def tracker(self, buffer):
        return buffer.stats_tracker

    def num_stale_updates(self, buffer):
        return buffer.num_stale_updates


class Served:
    """Tables of a server, through the same interface."""

    def __init__(self, client):
        self.client = client
        self.made = []  # a writer's rows come back when it is closed

    def make(self, name, num_envs=1, **options):
        buffer = self.client.replay_buffer(name, num_envs, **options)
        buffer.table_name = name
        self.made.append(buffer)
        return buffer

    def reader(self, buffer):
        return self.make(buffer.table_name)

    def num_transitions(self, buffer):
        return len(buffer)

    def tracker(self, buffer):
        return buffer.writer.stats_tracker

    def num_stale_updates(self, buffer):
        buffer.get(1)  # an answer to what came after the update
        return self.client.info()["tables"][buffer.table_name]["stale_updates"]


@pytest.fixture(params=["in process", "served"])
def implementation(request):
    if request.param == "in process":
        yield InProcess()
        return
    served = Served(request.getfixturevalue("client"))
    yield served
    for buffer in served.made:
        buffer.close()


def with_nan(shape, place):
    array = np.zeros(shape)
    array[place] = math.nan
    return array


def leaves(tree, attribute):
    if isinstance(tree, rb.Field):
        return getattr(tree, attribute)
    return {key: leaves(branch, attribute) for key, branch in tree.items()}


def draw_all(buffer, num_rows):
    """So many batches that one of `num_rows` equally likely rows is missing with probability exp(-15) = 3e-7."""
    num_draws = math.ceil(num_rows * (math.log(num_rows) + 15)) if num_rows else 0
    return [buffer.get(num_rows) for _ in range(-(-num_draws // max(1, num_rows)))]


def rows_of(batch):
    """Rows as `episode_envs.expected_rows` makes them."""
    observations, next_observations = (
        [tuple(obs) for obs in field.tolist()] for field in (batch.observations, batch.next_observations)
    )
    columns = (batch.rewards, batch.n_steps, batch.discounts, batch.terminateds, batch.truncateds)
    rewards, n_steps, discounts, terminateds, truncateds = (column.tolist() for column in columns)
    dones = map(bool, batch.dones.tolist())
    return list(
        zip(
            observations,
            batch.actions.tolist(),
            rewards,
            next_observations,
            n_steps,
            discounts,
            terminateds,
            truncateds,
            dones,
            strict=True,
        )
    )


def all_rows(implementation, buffer):
    """Every row that the buffer gives, once, sorted."""
    batches = draw_all(buffer, implementation.num_transitions(buffer))
    return sorted({row for batch in batches for row in rows_of(batch)})


def add(buffer, numbers, **options):
    """Steps of one environment whose action, reward and observations say their number."""
    for number in numbers:
        obs = np.array([0, 0, number], np.float32)
        buffer.add(obs, number, number, False, obs + 1, **options)


def actions_in(implementation, buffer):
    batches = draw_all(buffer, implementation.num_transitions(buffer))
    return sorted({action for batch in batches for action in batch.actions.tolist()})


def mass(td_error):
    return (np.abs(td_error) + EPSILON) ** ALPHA


def masses_by_action(buffer, num_rows):
    """action -> mass in proportion to the largest, told from the importance weights: with beta = 1 a weight is
    const / mass within its batch."""
    masses = {}
    for _ in range(1000):
        batch = buffer.get(num_rows, beta=1.0)
        found = dict(zip(batch.actions.tolist(), (1 / batch.weights.double()).tolist(), strict=True))
        common = next((action for action in found if action in masses), None)
        scale = 1.0 if common is None else masses[common] / found[common]
        if common is not None or not masses:
            masses |= {action: scale * mass for action, mass in found.items()}
        if len(masses) == num_rows:
            return {action: masses[action] / max(masses.values()) for action in sorted(masses)}
    raise AssertionError(f"only {sorted(masses)} were ever drawn")


def in_proportion(td_errors):
    """What `masses_by_action` should find, for the actions 0, 1, ..."""
    masses = mass(np.array(td_errors, np.float64))
    return {action: pytest.approx(share, rel=1e-5) for action, share in enumerate((masses / masses.max()).tolist())}


# ---- what is sampled is what happened -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "uniform n3", "prioritized n3"])
@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled", "single"])
def test_every_sampled_row_happened_and_every_step_can_be_sampled(implementation, kind, mode):
    n_step = TABLES[kind].n_step
    for num_envs in (1,) if mode == "single" else (1, 3):
        buffer = implementation.make(kind, num_envs, autoreset=None if mode == "single" else mode)
        before = implementation.num_transitions(buffer)
        assert before == 0
        envs = EpisodeEnv(seed=4) if mode == "single" else EpisodeEnvs(num_envs, mode, seed=4)
        play(envs, buffer, 75)
        happened = (envs.envs if mode == "single" else envs).steps
        complete = [row for row in expected_rows(happened, n_step) if row[4] == n_step or row[6] or row[7]]
        assert implementation.num_transitions(buffer) == len(complete)
        assert all_rows(implementation, buffer) == complete
        buffer.close()
        reader = implementation.reader(buffer)
        assert all_rows(implementation, reader) == expected_rows(happened, n_step), "close stores the tails"
        assert any(row[7] and not row[6] and row[5] > 0 for row in complete), "no truncation was tested"
        if isinstance(implementation, Served):
            implementation.client.clear(kind)


@pytest.mark.parametrize("kind", ["uniform", "small n3"])
def test_add_after_close_is_refused(implementation, kind):
    buffer = implementation.make(kind)
    add(buffer, range(2))
    buffer.close()
    with pytest.raises(rb.Closed, match="was closed"):
        add(buffer, [2])
    buffer.close()  # twice is fine
    assert implementation.num_transitions(implementation.reader(buffer)) == 2


def test_the_fields_of_a_batch_have_the_promised_shapes_and_dtypes(implementation):
    buffer = implementation.make("prioritized", 3)
    for _ in range(4):
        buffer.add(np.ones((3, 3)), np.arange(3), np.ones(3), np.zeros(3), np.ones((3, 3)))
    batch = buffer.get(7)
    assert isinstance(batch, rb.ReplayBatch)
    promised = {
        "observations": ((7, 3), torch.float32),
        "next_observations": ((7, 3), torch.float32),
        "actions": ((7,), torch.int64),
        "rewards": ((7,), torch.float32),
        "dones": ((7,), torch.float32),
        "discounts": ((7,), torch.float32),
        "terminateds": ((7,), torch.bool),
        "truncateds": ((7,), torch.bool),
        "n_steps": ((7,), torch.int32),
        "weights": ((7,), torch.float32),
        "indices": ((7,), torch.int64),
        "generations": ((7,), torch.int64),
    }
    fields = {name: getattr(batch, name) for name in promised}
    assert {name: (tuple(field.shape), field.dtype) for name, field in fields.items()} == promised
    assert batch.extras == {}
    assert {field.device.type for field in fields.values()} == {"cpu"}
    assert not any(field.requires_grad for field in fields.values())
    assert (1 - batch.dones).tolist() == [1.0] * 7


def test_a_uniform_batch_has_neither_weights_nor_indices(implementation):
    buffer = implementation.make("uniform")
    add(buffer, range(3))
    batch = buffer.get(2)
    assert (batch.weights, batch.indices, batch.generations) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # done, truncated, terminated (None: left out) -> terminated, truncated
        ((False, None, None), (False, False)),
        ((True, None, None), (True, False)),
        ((True, False, None), (True, False)),
        ((True, True, None), (False, True)),
        ((False, True, None), (False, True)),
        ((True, True, True), (True, True)),
        ((False, False, True), (True, False)),
        ((True, False, False), (False, True)),  # it ended, and did not terminate
    ],
)
@pytest.mark.parametrize("as_type", [bool, float, torch.tensor], ids=["bool", "float", "tensor"])
def test_dones_and_discounts_mask_termination_alone(implementation, flags, expected, as_type):
    buffer = implementation.make("uniform")
    flags = [flag if flag is None else as_type(flag) for flag in flags]
    done, truncated, terminated = flags
    buffer.add(np.zeros(3), 0, 1.0, done, np.ones(3), truncated, terminated)
    batch = buffer.get(1)
    assert (bool(batch.terminateds), bool(batch.truncateds)) == expected
    assert batch.dones.tolist() == [float(expected[0])]
    assert batch.discounts.tolist() == [0.0 if expected[0] else GAMMA]


def test_images_stay_uint8_in_both_observations(implementation):
    rng = np.random.default_rng(0)
    buffer = implementation.make("images", 2)
    images = rng.integers(256, size=(10, 2, 2, 3, 3), dtype=np.uint8)
    for step in range(9):
        buffer.add(images[step], np.array([2 * step, 2 * step + 1]), np.zeros(2), np.zeros(2), images[step + 1])
    for batch in draw_all(buffer, 18):
        assert batch.observations.dtype == batch.next_observations.dtype == torch.uint8
        step, env = batch.actions.numpy() // 2, batch.actions.numpy() % 2
        assert np.array_equal(batch.observations.numpy(), images[step, env])
        assert np.array_equal(batch.next_observations.numpy(), images[step + 1, env])


def test_nested_dictionaries_come_back_nested_with_a_dtype_for_each_key(implementation):
    rng = np.random.default_rng(0)
    buffer = implementation.make("dict", 3)

    def observation():
        return {
            "camera": rng.integers(256, size=(3, 2, 2), dtype=np.uint8),
            "body": {"speed": rng.random(3), "legs": rng.integers(-9, 9, (3, 2), np.int16)},
            "ignored": "what the spec does not name",
        }

    steps = []
    for number in range(5):
        action = {"move": rng.random((3, 2), np.float32), "jump": rng.random(3) < 0.5}
        extras = {"hidden": rng.random((3, 4)).astype(np.float16), "level": np.arange(3, dtype=np.int32) + 3 * number}
        steps.append((observation(), action, observation(), extras))
        obs, action, next_obs, extras = steps[-1]
        buffer.add(obs, action, np.zeros(3), np.zeros(3), next_obs, extras=extras)
    seen = set()
    for batch in draw_all(buffer, 15):
        assert set(batch.observations) == set(batch.next_observations) == {"camera", "body"}
        assert set(batch.observations["body"]) == {"speed", "legs"}
        assert batch.observations["body"]["speed"].dtype == torch.float64
        assert batch.observations["body"]["legs"].dtype == torch.int16
        assert batch.next_observations["camera"].dtype == torch.uint8
        assert batch.actions["jump"].dtype == torch.bool
        assert batch.extras["hidden"].dtype == torch.float16
        for place, level in enumerate(batch.extras["level"].tolist()):
            obs, action, next_obs, extras = steps[level // 3]
            env = level % 3
            for got, given in (
                (batch.observations["camera"], obs["camera"]),
                (batch.observations["body"]["speed"], obs["body"]["speed"]),
                (batch.observations["body"]["legs"], obs["body"]["legs"]),
                (batch.next_observations["camera"], next_obs["camera"]),
                (batch.next_observations["body"]["speed"], next_obs["body"]["speed"]),
                (batch.actions["move"], action["move"]),
                (batch.actions["jump"], action["jump"]),
                (batch.extras["hidden"], extras["hidden"]),
            ):
                assert np.array_equal(got[place].numpy(), given[env])
            seen.add(level)
    assert seen == set(range(15))


def stacked(samples):
    if isinstance(samples[0], dict):
        return {key: stacked([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def assert_is_member(tree, place, sample, space):
    """Row `place` of a batch's tree is `sample`, which `space` gave."""
    if isinstance(sample, dict):
        for key, branch in sample.items():
            assert_is_member(tree[key], place, branch, space[key])
        return
    row = tree[place].numpy()
    assert row.dtype == space.dtype
    assert np.array_equal(row, sample)


@pytest.mark.parametrize("name", SPACES)
def test_samples_of_a_space_come_back_as_they_were(implementation, name):
    observation_space, action_space = SPACES[name]
    observation_space.seed(0)
    action_space.seed(0)
    buffer = implementation.make(name, 2)
    steps = []
    for number in range(4):
        obs, action, next_obs = (
            [space.sample() for _ in range(2)] for space in (observation_space, action_space, observation_space)
        )
        steps.append((obs, action, next_obs))
        rewards = [2.0 * number, 2.0 * number + 1]  # say which row it is
        buffer.add(stacked(obs), stacked(action), rewards, np.zeros(2), stacked(next_obs))
    for batch in draw_all(buffer, 8):
        for place, number in enumerate(batch.rewards.int().tolist()):
            obs, action, next_obs = (samples[number % 2] for samples in steps[number // 2])
            assert_is_member(batch.observations, place, obs, observation_space)
            assert_is_member(batch.actions, place, action, action_space)
            assert_is_member(batch.next_observations, place, next_obs, observation_space)


# ---- how it may be given --------------------------------------------------------------------------------------

FORMS = {
    "lists": lambda values, dtype: np.asarray(values, dtype).tolist(),
    "NumPy": np.asarray,
    "wider NumPy": lambda values, dtype: np.asarray(values, np.float64 if dtype == np.float32 else dtype),
    "strided NumPy": lambda values, dtype: np.repeat(np.asarray(values, dtype), 2, axis=0)[::2],
    "tensors": lambda values, dtype: torch.as_tensor(np.asarray(values, dtype)),
    "tensors with a gradient": lambda values, dtype: torch.as_tensor(np.asarray(values, dtype)).requires_grad_(
        dtype == np.float32
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_column", [False, True], ids=["(E,)", "(E, 1)"])
def test_arrays_lists_and_tensors_are_stored_alike(implementation, form, as_column):
    make = FORMS[form]
    if as_column:
        scalars = lambda values, dtype: make(np.reshape(values, (3, 1)), dtype)  # noqa: E731
    else:
        scalars = make
    buffer = implementation.make("uniform", 3)
    obs = np.array([[env, 0, 0] for env in range(3)])
    flags = {"truncated": scalars([0, 1, 1], np.bool_), "terminated": scalars([0, 0, 1], np.float32)}
    done = scalars([False, True, True], np.bool_)
    buffer.add(make(obs, np.float32), scalars([5, 6, 7], np.int64), scalars([1, 2, 4], np.float32), done,
               make(obs + 1, np.float32), **flags)  # fmt: skip
    assert all_rows(implementation, buffer) == [
        ((0.0, 0.0, 0.0), 5, 1.0, (1.0, 1.0, 1.0), 1, 0.5, False, False, False),
        ((1.0, 0.0, 0.0), 6, 2.0, (2.0, 1.0, 1.0), 1, 0.5, False, True, False),
        ((2.0, 0.0, 0.0), 7, 4.0, (3.0, 1.0, 1.0), 1, 0.0, True, True, True),
    ]


ONE = {
    "numbers": lambda value: value,
    "NumPy scalars": lambda value: np.asarray(value)[()],
    "NumPy (1,)": lambda value: np.array([value]),
    "NumPy (1, 1)": lambda value: np.array([[value]]),
    "tensors ()": torch.tensor,
    "tensors (1, 1)": lambda value: torch.tensor([[value]]),
}


@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize("with_dimension", [False, True], ids=["[3]", "[1, 3]"])
def test_one_environment_may_leave_its_dimension_out(implementation, form, with_dimension):
    one = ONE[form]
    obs = np.array([1, 2, 3], np.float32)
    obs = obs[None] if with_dimension else obs
    buffer = implementation.make("uniform")
    buffer.add(obs, one(9), one(2.5), one(True), obs + 1, one(False))
    expected = ((1.0, 2.0, 3.0), 9, 2.5, (2.0, 3.0, 4.0), 1, 0.0, True, False, True)
    assert all_rows(implementation, buffer) == [expected]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["NumPy", "tensors"])
@pytest.mark.parametrize("kind", ["uniform", "uniform n3"])
def test_inputs_may_be_overwritten_as_soon_as_add_returned(implementation, kind, as_tensor):
    buffer = implementation.make(kind, 2)
    arrays = [np.zeros((2, 3), np.float32), np.zeros(2, np.int64), np.zeros(2, np.float32), np.zeros(2, np.bool_)]
    arrays += [np.zeros((2, 3), np.float32), np.zeros(2, np.bool_), np.zeros(2, np.bool_)]
    obs, action, reward, done, next_obs, truncated, terminated = arrays
    given = [torch.from_numpy(array) for array in arrays] if as_tensor else arrays
    for step in range(4):
        obs[:], next_obs[:] = [[0, 0, step], [1, 0, step]], [[0, 0, step + 1], [1, 0, step + 1]]
        action[:], reward[:] = step, 1.0
        truncated[:] = step == 3
        terminated[:] = done[:] = False
        buffer.add(*given)
        for array in arrays:
            array[...] = 77
    history = [(step, 1.0, False, step == 3) for step in range(4)]
    expected = expected_rows({(0, 0): history, (1, 0): history}, TABLES[kind].n_step)
    assert all_rows(implementation, buffer) == expected


# ---- the ring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "small prioritized"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_oldest_steps_go_for_the_newest_lap_after_lap(implementation, kind, num_envs):
    buffer = implementation.make(kind, num_envs)
    capacity = TABLES[kind].capacity
    for step in range(3 * capacity // num_envs):
        numbers = step * num_envs + np.arange(num_envs)
        obs = np.stack((np.arange(num_envs), numbers, 7 * numbers), axis=1)
        buffer.add(obs, numbers, numbers, np.zeros(num_envs), obs + 1)
        newest = (step + 1) * num_envs
        assert implementation.num_transitions(buffer) == min(newest, capacity)
        live = range(max(0, newest - capacity), newest)
        drawn = set()
        for _ in range(3):
            batch = buffer.get(len(live))
            drawn |= set(batch.actions.tolist())
            for obs, action, reward, next_obs, *_ in rows_of(batch):
                assert obs == (action % num_envs, action, 7 * action), "a torn row"
                assert next_obs == tuple(value + 1 for value in obs)
                assert reward == action
        assert drawn <= set(live)
        if step % 5 == 0:
            assert actions_in(implementation, buffer) == list(live)


@pytest.mark.parametrize("numbers", [range(40), range(200)])
def test_many_steps_between_two_looks_leave_the_newest(implementation, numbers):
    buffer = implementation.make("small n3")
    add(buffer, numbers)
    assert implementation.num_transitions(buffer) == 12
    # The last two windows are still open.
    assert actions_in(implementation, buffer) == list(numbers)[-14:-2]


def test_a_manual_reset_joins_nothing_and_drops_the_running_return(implementation):
    buffer = implementation.make("uniform n3", 2)

    def step(number, done=False):
        obs = np.array([[0, 0, number], [1, 0, number]])
        buffer.add(obs, [number] * 2, [1.0, 2.0], [done] * 2, obs + 1)

    step(0)
    step(1)
    assert implementation.num_transitions(buffer) == 0
    buffer.on_reset([True, False])
    assert implementation.num_transitions(buffer) == 2, "what ended is complete, whether or not somebody looked before"
    step(2, done=True)
    expected = sorted(
        [
            ((0, 0, 0), 0, 1.5, (1, 1, 2), 2, 0.25, False, False, False),
            ((0, 0, 1), 1, 1.0, (1, 1, 2), 1, 0.5, False, False, False),
            ((0, 0, 2), 2, 1.0, (1, 1, 3), 1, 0.0, True, False, True),
            ((1, 0, 0), 0, 3.5, (2, 1, 3), 3, 0.0, True, False, True),
            ((1, 0, 1), 1, 3.0, (2, 1, 3), 2, 0.0, True, False, True),
            ((1, 0, 2), 2, 2.0, (2, 1, 3), 1, 0.0, True, False, True),
        ]
    )
    assert all_rows(implementation, buffer) == expected
    raw = implementation.tracker(buffer).get_raw_values()
    assert (raw["rewards"], raw["lengths"]) == ([1.0, 6.0], [1.0, 3.0])


# ---- batches --------------------------------------------------------------------------------------------------


def test_a_batch_that_is_kept_never_changes(implementation):
    buffer = implementation.make("small")
    add(buffer, range(12))
    held = [buffer.get(8) for _ in range(4)]
    views = [held[0].observations[3:5], held[1].actions.numpy()[2:], held[2].rewards.view(2, 4).T]
    copies = [[field.clone() for field in fields(batch)] for batch in held]
    view_copies = [torch.as_tensor(view).clone() for view in views]
    for lap in range(1, 4):
        add(buffer, range(12 * lap, 12 * lap + 12))
        for _ in range(5):
            buffer.get(8)
    for batch, copied in zip(held, copies, strict=True):
        assert all(map(torch.equal, fields(batch), copied))
    del held, batch
    for _ in range(5):
        assert min(buffer.get(8).actions.tolist()) >= 36
    assert all(map(torch.equal, map(torch.as_tensor, views), view_copies))


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[2:5],
        lambda tensor: tensor.detach().unsqueeze(0),
        lambda tensor: tensor.numpy()[1:],
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.from_dlpack(tensor),
        torch.inference_mode()(lambda tensor: tensor[1:]),
    ],
    ids=["itself", "slice", "view", "NumPy", "memoryview", "DLPack", "without autograd"],
)
def test_one_field_that_is_kept_never_changes(implementation, derive):
    buffer = implementation.make("small n3")
    rng = np.random.default_rng(0)

    def fill():
        flags = {name: rng.random(12) < 0.5 for name in ("terminateds", "truncateds")}
        numbers = {"n_steps": rng.integers(1, 4, 12), "discounts": rng.random(12), "rewards": rng.random(12)}
        numbers |= {"observations": rng.random((12, 3)), "next_observations": rng.random((12, 3))}
        buffer.extend(transitions(12, dones=None, **flags, **numbers, actions=rng.integers(10**6, size=12)))

    fill()
    names = ("observations", "next_observations", "actions", "rewards", "discounts", "n_steps", "dones", "truncateds")
    for name in (*names, "terminateds"):
        kept = derive(getattr(buffer.get(12), name))
        copied = np.array(kept if isinstance(kept, memoryview) else torch.as_tensor(kept).numpy())
        held = []  # so that none of them frees its memory for the next
        for _ in range(4):
            fill()
            held.append(buffer.get(12))
        now = np.asarray(kept) if isinstance(kept, memoryview) else torch.as_tensor(kept).numpy()
        assert np.array_equal(now, copied), name
        del kept, now, held


def test_what_autograd_saved_of_a_batch_never_changes(implementation):
    buffer = implementation.make("small")
    add(buffer, range(12))
    scale = torch.ones((), requires_grad=True)
    loss = (scale * buffer.get(12).rewards).sum()
    add(buffer, range(1000, 1012))
    for _ in range(4):
        buffer.get(12)
    loss.backward()
    assert scale.grad == loss


def test_a_batch_that_nobody_looked_at_before_shows_what_was_drawn(implementation):
    buffer = implementation.make("small")
    add(buffer, range(12))
    batch = buffer.get(12)
    add(buffer, range(1000, 1012))
    for _ in range(4):
        buffer.get(12)
    assert max(batch.actions.tolist()) < 12


def fields(batch):
    return [batch.observations, batch.actions, batch.rewards, batch.next_observations, batch.discounts]


@pytest.mark.parametrize("kind", ["uniform", "prioritized"])
def test_equal_seeds_draw_equal_rows_and_sample_is_get(implementation, kind):
    draws = []
    for which, method in (("once", "get"), ("again", "sample")):
        buffer = implementation.make(f"{which} seeded {kind}")
        add(buffer, range(50))
        batches = [getattr(buffer, method)(size) for size in (16, 16, 5)]
        if kind == "prioritized":
            buffer.update_priorities(batches[0], np.arange(16.0))
            batches.append(getattr(buffer, method)(32))
            batches.append(getattr(buffer, method)(32, beta=0.9))
        draws.append([batch.actions.tolist() for batch in batches])
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


def test_uniform_draws_are_equally_frequent(implementation):
    buffer = implementation.make("uniform")
    add(buffer, range(20))
    counts = np.bincount(np.concatenate([buffer.get(20).actions.numpy() for _ in range(400)]), minlength=20)
    assert counts.sum() == 8000
    # Binomial with mean 400: 20 counts within 5 standard deviations, but for one run in 80,000.
    assert np.abs(counts - 400).max() < 5 * math.sqrt(400 * 0.95)


# ---- priorities -----------------------------------------------------------------------------------------------

TD_ERRORS = [0.0, -1.0, 2.0, -4.0, 8.0, 0.5]


def set_priorities(buffer, td_errors, form=np.asarray):
    """Give action i the TD error i, whatever the batches hold."""
    missing = set(range(len(td_errors)))
    while missing:
        batch = buffer.get(len(td_errors))
        errors = np.array([td_errors[action] for action in batch.actions.tolist()])
        missing -= set(batch.actions.tolist())
        buffer.update_priorities(batch, form(errors))


def prioritized(implementation, td_errors=TD_ERRORS, **options):
    buffer = implementation.make("small prioritized", **options)
    add(buffer, range(len(td_errors)))
    set_priorities(buffer, td_errors)
    return buffer


@pytest.mark.parametrize(
    "form",
    [
        np.asarray,
        lambda errors: errors[:, None],
        lambda errors: errors.astype(np.float32),
        torch.from_numpy,
        lambda errors: torch.from_numpy(errors)[:, None],
        lambda errors: torch.from_numpy(errors).requires_grad_() * 1.0,
        list,
    ],
    ids=["(B,)", "(B, 1)", "float32", "tensor (B,)", "tensor (B, 1)", "tensor with a gradient", "list"],
)
def test_priorities_are_the_sizes_of_signed_td_errors(implementation, form):
    buffer = implementation.make("small prioritized")
    add(buffer, range(6))
    assert masses_by_action(buffer, 6) == in_proportion([1.0] * 6)
    set_priorities(buffer, TD_ERRORS, form)
    assert masses_by_action(buffer, 6) == in_proportion(TD_ERRORS)


def test_updated_priorities_shift_the_frequencies(implementation):
    buffer = prioritized(implementation)
    counts = np.bincount(np.concatenate([buffer.get(6).actions.numpy() for _ in range(1500)]), minlength=6)
    shares = mass(np.array(TD_ERRORS)) / mass(np.array(TD_ERRORS)).sum()
    # Stratified draws vary less than binomial ones, of which six are within 5 standard deviations but for 3 in 10^6.
    assert (np.abs(counts - 9000 * shares) < 5 * np.sqrt(9000 * shares)).all()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_n_times_p_to_the_minus_beta_over_their_largest(implementation, beta):
    buffer = prioritized(implementation, beta=beta)
    probabilities = mass(np.array(TD_ERRORS)) / mass(np.array(TD_ERRORS)).sum()
    for batch in [buffer.get(6) for _ in range(20)] + [buffer.get(3, beta=beta) for _ in range(20)]:
        unscaled = (6 * probabilities[batch.actions.numpy()]) ** -beta
        assert batch.weights.numpy() == pytest.approx(unscaled / unscaled.max(), rel=1e-5)
        assert batch.weights.max() == 1.0


def test_beta_can_be_set_for_all_batches_or_for_one(implementation):
    buffer = prioritized(implementation, beta=0.0)

    def spread(**options):
        return min(buffer.get(6, **options).weights.min().item() for _ in range(20))

    assert spread() == 1.0
    assert spread(beta=1.0) < 0.5
    assert spread() == 1.0
    buffer.beta = 1.0
    assert spread() < 0.5
    assert spread(beta=0.0) == 1.0


def test_of_a_transition_named_twice_the_last_td_error_counts(implementation):
    buffer = prioritized(implementation, [1.0, 1.0, 1.0])
    batch = buffer.get(3)
    while len(set(batch.actions.tolist())) < 3:
        batch = buffer.get(3)
    order = torch.argsort(batch.actions)
    twice = order[[0, 1, 2, 0, 1, 0]]
    named = dataclasses.replace(batch, indices=batch.indices[twice], generations=batch.generations[twice])
    buffer.update_priorities(named, [9.0, 9.0, 2.0, 9.0, 3.0, 4.0])
    assert masses_by_action(buffer, 3) == in_proportion([4.0, 3.0, 2.0])


def test_updates_of_overwritten_transitions_are_dropped_and_counted(implementation):
    buffer = implementation.make("small prioritized")
    add(buffer, range(12))
    batch = buffer.get(12)
    add(buffer, range(12, 18))
    assert implementation.num_transitions(buffer) == 12
    before = implementation.num_stale_updates(buffer)
    buffer.update_priorities(batch, np.full(12, 50.0))
    overwritten = int((batch.actions < 6).sum())
    assert 0 < overwritten < 12
    assert implementation.num_stale_updates(buffer) - before == overwritten
    updated = set(batch.actions.tolist()) - set(range(6))
    masses = masses_by_action(buffer, 12)
    assert {action for action, share in masses.items() if share > 0.99} == updated
    for lap in range(1, 10):
        add(buffer, range(12 * lap + 6, 12 * lap + 18))
        assert implementation.num_transitions(buffer) == 12
        buffer.update_priorities(batch, np.full(12, 1e6))  # in some lap the batch's own rows are live again
        assert implementation.num_stale_updates(buffer) - before == overwritten + 12 * lap
        assert len(set(masses_by_action(buffer, 12).values())) == 1


def test_a_batch_can_be_updated_after_batches_of_another_size(implementation):
    buffer = implementation.make("small prioritized")
    add(buffer, range(4))
    batch = buffer.get(4)
    while len(set(batch.actions.tolist())) < 4:
        batch = buffer.get(4)
    buffer.get(2)
    buffer.update_priorities(batch, [TD_ERRORS[action] for action in batch.actions.tolist()])
    buffer.get(3)
    assert masses_by_action(buffer, 4) == in_proportion(TD_ERRORS[:4])


def test_new_transitions_get_the_largest_priority_among_the_live(implementation):
    buffer = prioritized(implementation, [1.0, 30.0, 2.0])
    add(buffer, [3])
    assert masses_by_action(buffer, 4) == in_proportion([1.0, 30.0, 2.0, 30.0])
    set_priorities(buffer, [1.0, 3.0, 2.0, 1.0])  # 30 is the largest ever, but no longer among the live
    add(buffer, [4])
    assert masses_by_action(buffer, 5) == in_proportion([1.0, 3.0, 2.0, 1.0, 3.0])


def test_add_may_bring_the_priority_itself(implementation):
    buffer = implementation.make("small prioritized", 3)
    obs = np.zeros((3, 3))
    buffer.add(obs, [0, 1, 2], np.zeros(3), np.zeros(3), obs, priority=[5.0, 0.0, 1.0])
    assert masses_by_action(buffer, 3) == in_proportion([5.0, 0.0, 1.0])


def test_initial_priorities_are_computed_from_the_values_that_the_actor_had(implementation):
    buffer = implementation.make("prioritized n3")
    q_taken, values, rewards = [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 80.0], [1.0, 2.0, 4.0, 8.0]
    for step in range(4):
        obs = np.array([0, 0, step])
        buffer.add(obs, step, rewards[step], step == 3, obs + 1, q_taken=q_taken[step], state_value=values[step])
    # R + gamma^3 V(s_3) - Q for the first; the others end with the episode.
    errors = [1 + 1 + 1 + 80 / 8 - 1, 2 + 2 + 2 - 2, 4 + 4 - 3, 8 - 4]
    assert masses_by_action(buffer, 4) == in_proportion(errors)


# ---- many at once ---------------------------------------------------------------------------------------------


def transitions(num_rows=4, **change):
    """What `extend` takes, of rows whose observations, actions and rewards say their number."""
    numbers = np.arange(num_rows)
    observations = np.stack((0 * numbers, 0 * numbers, numbers), axis=1).astype(np.float32)
    columns = {"observations": observations, "actions": numbers, "rewards": numbers.astype(np.float32)}
    columns |= {"next_observations": observations + 1, "dones": numbers % 3 == 0} | change
    return {name: column for name, column in columns.items() if column is not None}


def transition(number):
    """The row that `transitions` makes of a number."""
    done = number % 3 == 0
    discount = 0.0 if done else GAMMA
    return ((0, 0, number), number, number, (1, 1, number + 1), 1, discount, done, False, done)


@pytest.mark.parametrize("kind", ["uniform n3", "prioritized n3"])
def test_a_batch_of_another_buffer_is_added_as_it_is(implementation, kind):
    source = InProcess().make(kind, 3, autoreset="disabled")
    envs = EpisodeEnvs(3, "disabled", seed=1)
    play(envs, source, 30)
    batches = draw_all(source, source.num_transitions)[:3]
    buffer = implementation.make(kind)
    add(buffer, [900])  # of which no transition can be made yet
    for batch in batches:
        buffer.extend(batch)
    assert implementation.num_transitions(buffer) == sum(len(batch.actions) for batch in batches)
    assert all_rows(implementation, buffer) == sorted({row for batch in batches for row in rows_of(batch)})
    assert implementation.tracker(buffer).get_statistics() == {}
    add(buffer, [901, 902])
    assert 900 in actions_in(implementation, buffer), "the open window goes on"


@pytest.mark.parametrize("form", ["NumPy", "tensors", "lists", "columns", "terminateds"])
def test_a_mapping_of_arrays_is_added_with_what_follows_from_it(implementation, form):
    columns = transitions(20)
    if form == "tensors":
        columns = {name: torch.as_tensor(column) for name, column in columns.items()}
        columns["rewards"].requires_grad_()
    elif form == "lists":
        columns = {name: column.tolist() for name, column in columns.items()}
    elif form == "columns":
        columns |= {name: columns[name][:, None] for name in ("actions", "rewards", "dones")}
    elif form == "terminateds":
        columns["terminateds"] = columns.pop("dones").astype(np.float64)
    buffer = implementation.make("uniform")
    buffer.extend(columns)
    assert implementation.num_transitions(buffer) == 20
    assert all_rows(implementation, buffer) == [transition(number) for number in range(20)]


def test_truncations_n_steps_and_discounts_are_taken_as_given(implementation):
    buffer = implementation.make("uniform n3")
    given = {"truncateds": [False, True, True, False], "n_steps": [3, 2, 1, 3], "discounts": [0.5, 0.25, 0.75, 0.0]}
    buffer.extend(transitions(**given))
    columns = [[row[place] for row in all_rows(implementation, buffer)] for place in (7, 4, 5)]
    assert columns == list(given.values())


@pytest.mark.parametrize("num_rows", [12, 13, 100])
def test_of_more_transitions_than_the_ring_holds_the_last_ones_stay(implementation, num_rows):
    buffer = implementation.make("small", 3)
    buffer.extend(transitions(5))
    buffer.extend(transitions(num_rows))
    assert implementation.num_transitions(buffer) == 12
    assert all_rows(implementation, buffer) == [transition(number) for number in range(num_rows - 12, num_rows)]


@pytest.mark.parametrize("form", [list, torch.tensor, lambda errors: torch.tensor(errors)[:, None].requires_grad_()])
def test_td_errors_of_transitions_that_come_at_once_are_their_priorities(implementation, form):
    buffer = implementation.make("small prioritized")
    buffer.extend(transitions(6), td_errors=form(TD_ERRORS))
    assert masses_by_action(buffer, 6) == in_proportion(TD_ERRORS)
    buffer.extend({name: column[6:] for name, column in transitions(8).items()})
    assert masses_by_action(buffer, 8) == in_proportion([*TD_ERRORS, 8.0, 8.0])


BAD_TRANSITIONS = [
    ("prioritized", {"observations": None}, "extend needs observations; it was given"),
    ("prioritized", {"dones": None}, "extend needs discounts, dones, terminateds; it was given"),
    ("prioritized", {"rewards": None, "actions": None}, "extend needs actions, rewards; it was given"),
    ("prioritized n3", {}, "extend needs discounts, n_steps; it was given"),
    ("prioritized", {"observations": np.zeros((4, 2))}, r"observations has shape \(4, 2\), expected \(4, 3\)"),
    ("prioritized", {"next_observations": np.zeros((3, 3))}, r"next_observations has shape \(3, 3\), expected"),
    ("prioritized", {"rewards": np.zeros((1, 4))}, r"rewards has shape \(1, 4\), expected \(4,\)"),
    ("prioritized", {"rewards": [0, 0, math.nan, 0]}, r"rewards is nan at \(2,\); expected finite"),
    ("prioritized", {"rewards": [0, 0, 1e300, 0]}, r"rewards is inf at \(2,\); expected finite"),
    ("prioritized", {"next_observations": with_nan((4, 3), (1, 2))}, r"next_observations is nan at \(1, 2\); expected"),
    ("prioritized", {"actions": np.zeros(4)}, "actions has dtype float64, expected int64"),
    ("prioritized", {"dones": [0, 0.25, 0, 1]}, "dones must hold bools, 0 or 1, got 0.25"),
    ("prioritized", {"terminateds": [0, 2, 0, 1]}, "terminateds must hold bools, 0 or 1, got 2"),
    ("prioritized", {"truncateds": [0, 0, -1, 1]}, "truncateds must hold bools, 0 or 1, got -1"),
    ("prioritized", {"n_steps": [1, 1, 2**40, 1]}, "n_steps has values from 1 to 1099511627776, which"),
    ("prioritized", {"td_errors": [1.0, 2.0, 3.0]}, r"td_errors has shape \(3,\), expected \(4,\)"),
    ("prioritized", {"td_errors": [1.0, 2.0, 3.0, math.nan]}, r"td_errors is nan at \(3,\); expected finite"),
    ("prioritized", {"td_errors": [1.0, math.inf, 3.0, 4.0]}, r"td_errors is inf at \(1,\); expected finite"),
    ("uniform", {"td_errors": [1.0, 2.0, 3.0, 4.0]}, "td_errors= was given, but the table is sampled uniformly"),
    ("dict", {}, r"observations/body/legs|extend needs actions/jump"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "message"), BAD_TRANSITIONS, ids=[f"{i}" for i in range(len(BAD_TRANSITIONS))]
)
def test_bad_transitions_are_refused_by_name_and_none_is_added(implementation, kind, change, message):
    buffer = implementation.make(kind)
    if kind != "dict":
        good = transitions(8, n_steps=[1] * 8) if kind == "prioritized n3" else transitions(8)
        buffer.extend(good)
        before = all_rows(implementation, buffer)
    change = dict(change)
    td_errors = change.pop("td_errors", None)
    with pytest.raises(rb.InvalidInput, match=message):
        buffer.extend(transitions(**change), td_errors)
    assert implementation.num_transitions(buffer) == (0 if kind == "dict" else 8)
    if kind != "dict":
        assert all_rows(implementation, buffer) == before


@pytest.mark.parametrize("what", [None, 3, [1, 2]])
def test_what_holds_no_transitions_is_refused(implementation, what):
    buffer = implementation.make("uniform")
    with pytest.raises(rb.InvalidInput, match="extend needs a batch or a mapping with observations, actions, "):
        buffer.extend(what)
    assert implementation.num_transitions(buffer) == 0


# ---- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_add_alone_keeps_the_statistics(implementation, mode):
    envs = EpisodeEnvs(3, mode, seed=2)
    buffer = implementation.make("uniform n3", 3, autoreset=mode)
    play(envs, buffer, 60)
    tracker = implementation.tracker(buffer)
    returns, lengths = zip(*envs.finished, strict=True)
    raw = tracker.get_raw_values()
    assert (raw["rewards"], raw["lengths"]) == (list(returns), list(lengths))
    stats = tracker.get_statistics()
    assert stats["train/num_episodes"] == len(returns)
    assert stats["train/rewards_mean"] == pytest.approx(np.mean(returns))


def test_metrics_and_done_reasons_reach_the_statistics(implementation):
    buffer = implementation.make("uniform", 2)
    obs = np.zeros((2, 3))
    for done in (False, True):
        metrics, reasons = {"speed": [1.0 + done, 3.0]}, {"fell": [done, False]}
        buffer.add(obs, [0, 0], [1.0, 1.0], [done, done], obs, metrics=metrics, done_reasons=reasons)
    stats = implementation.tracker(buffer).get_statistics()
    assert stats["train/speed_mean"] == pytest.approx((1.5 + 3.0) / 2)
    assert stats["train/Done/fell_rate"] == 0.5


# ---- bad input ------------------------------------------------------------------------------------------------

BAD_STEPS = [
    ("obs", np.zeros((3, 2)), r"obs has shape \(3, 2\), expected \(3, 3\)"),
    ("obs", np.zeros((2, 3)), r"obs has shape \(2, 3\), expected \(3, 3\)"),
    ("obs", np.zeros(3), r"obs has shape \(3,\), expected \(3, 3\)"),
    ("obs", with_nan((3, 3), (1, 2)), r"obs is nan at \(1, 2\); expected finite"),
    ("obs", torch.full((3, 3), math.inf), r"obs is inf at \(0, 0\); expected finite"),
    ("obs", np.full((3, 3), "a"), "obs has dtype <U1, expected float32"),
    ("obs", np.zeros((3, 3), complex), "obs has dtype complex128, expected float32"),
    ("obs", None, r"obs has shape \(\), expected \(3, 3\)"),
    ("next_obs", np.zeros((3, 4)), r"next_obs has shape \(3, 4\), expected \(3, 3\)"),
    ("next_obs", with_nan((3, 3), (2, 0)), r"next_obs is nan at \(2, 0\); expected finite"),
    ("action", np.zeros(3), "action has dtype float64, expected int64"),
    ("action", [1, 2], r"action has shape \(2,\), expected \(3,\)"),
    ("action", [[1, 2, 3]], r"action has shape \(1, 3\), expected \(3,\)"),
    ("reward", [1.0, 2.0], r"reward has shape \(2,\), expected \(3,\)"),
    ("reward", [1.0, math.nan, 2.0], r"reward is nan at \(1,\); expected finite"),
    ("reward", [1.0, 2.0, -math.inf], r"reward is -inf at \(2,\); expected finite"),
    ("reward", [1e35, 2.0, 3.0], r"reward is 1e\+35 at \(0,\); expected finite numbers within \+-1e\+34"),
    ("reward", 1.0, r"reward has shape \(\), expected \(3,\)"),
    ("done", [0, 1], r"done has shape \(2,\), expected \(3,\)"),
    ("done", [0, 1, 2], "done must be bool, 0 or 1, got .*2"),
    ("done", [0, 1, math.nan], "done must be bool, 0 or 1, got .*nan"),
    ("truncated", [0.5, 0, 1], "truncated must be bool, 0 or 1, got .*0.5"),
    ("truncated", [True], r"truncated has shape \(1,\), expected \(3,\)"),
    ("terminated", [-1, 0, 1], "terminated must be bool, 0 or 1, got .*-1"),
    ("terminated", np.zeros((3, 2)), r"terminated has shape \(3, 2\), expected \(3,\)"),
    ("priority", [1.0, -2.0, 3.0], r"priority must be >= 0, got -2"),
    ("priority", [1.0, math.nan, 3.0], r"priority is nan at \(1,\); expected finite"),
    ("priority", [1.0, 2.0], r"priority has shape \(2,\), expected \(3,\)"),
    ("q_taken", [1.0, math.inf, 3.0], r"q_taken is inf at \(1,\); expected finite"),
    ("state_value", [1.0], r"state_value has shape \(1,\), expected \(3,\)"),
    ("final_value", np.zeros((3, 3)), r"final_value has shape \(3, 3\), expected \(3,\)"),
    ("extras", {"hidden": np.zeros(3)}, r"extras have keys \['hidden'\], the table's are \[\]"),
    ("recurrent_state", np.zeros(3), "recurrent_state= was given, but the spec has none"),
    ("metrics", {"height": np.zeros(3)}, r"metrics has keys \['height'\]; the tracker was made with \['speed'\]"),
    ("metrics", {"speed": np.zeros(2)}, r"speed has shape \(2,\); expected \(3,\)"),
    ("metrics", {"speed": [0.0, math.nan, 0.0]}, r"speed\[1\] is nan; it must be finite"),
    ("done_reasons", {"won": np.zeros(3)}, r"done_reasons has keys \['won'\]; the tracker was made with \['fell'\]"),
]


@pytest.mark.parametrize(
    ("argument", "value", "message"), BAD_STEPS, ids=[f"{case[0]} {i}" for i, case in enumerate(BAD_STEPS)]
)
def test_a_bad_step_is_refused_by_name_and_changes_nothing(implementation, argument, value, message):
    buffer = implementation.make("prioritized", 3)
    steps = {(env, 0): [(step, 1.0, step == 3, False) for step in range(4)] for env in range(3)}
    for step in range(4):
        obs = np.array([[env, 0, step] for env in range(3)])
        good = {
            "obs": obs,
            "action": [step] * 3,
            "reward": np.ones(3),
            "done": [step == 3] * 3,
            "next_obs": obs + [0, 0, 1],
        }
        if step == 2:
            before = all_rows(implementation, buffer), implementation.tracker(buffer).get_raw_values()
            with pytest.raises(rb.InvalidInput, match=message):
                buffer.add(**good | {argument: value})
            after = all_rows(implementation, buffer), implementation.tracker(buffer).get_raw_values()
            assert after == before
        buffer.add(**good)
    assert all_rows(implementation, buffer) == expected_rows(steps, 1)
    raw = implementation.tracker(buffer).get_raw_values()
    assert (raw["rewards"], raw["lengths"]) == ([4.0] * 3, [4.0] * 3)
    if argument != "metrics":
        assert math.isnan(raw["speed"][0])


@pytest.mark.parametrize(
    ("kind", "options", "change", "message"),
    [
        ("uniform n3", {}, {"priority": [1.0]}, "priority= was given, but the table is sampled uniformly"),
        ("prioritized n3", {}, {"priority": [1.0]}, "priority= is for n_step = 1, this table has 3"),
        ("uniform n3", {"autoreset": "same_step"}, {"done": True}, "environment 0 ended in same_step mode"),
        (
            "uniform n3",
            {"autoreset": "same_step"},
            {"done": True, "infos": {"final_obs": np.zeros((1, 2)), "_final_obs": np.ones(1, bool)}},
            r"infos\['final_obs'\]\[0\] has shape \(2,\), expected \(3,\)",
        ),
        (
            "uniform n3",
            {"autoreset": "same_step"},
            {"truncated": True, "infos": {"final_obs": np.full((1, 3), np.nan), "_final_obs": np.ones(1, bool)}},
            r"infos\['final_obs'\]\[0\] is nan at \(0,\)",
        ),
    ],
)
def test_a_bad_step_leaves_open_windows_as_they_were(implementation, kind, options, change, message):
    buffer = implementation.make(kind, **options)
    add(buffer, range(2))
    obs = np.array([0, 0, 2])
    good = {"obs": obs, "action": 2, "reward": 2.0, "done": False, "next_obs": obs + 1}
    with pytest.raises(rb.InvalidInput, match=message):
        buffer.add(**good | change)
    assert implementation.num_transitions(buffer) == 0
    assert implementation.tracker(buffer).get_statistics() == {}
    buffer.add(**good)
    (row,) = all_rows(implementation, buffer)
    assert row == ((0, 0, 0), 0, 0 + 0.5 * 1 + 0.25 * 2, (1, 1, 3), 3, 0.125, False, False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": np.zeros(3)}, "obs must be a mapping with 'camera', got ndarray"),
        ({"obs": {"camera": np.zeros((2, 2), np.uint8)}}, "obs must be a mapping with 'body/speed', got dict"),
        ({"next_obs": {"camera": np.zeros((2, 2))}}, r"next_obs\['camera'\] has dtype float64, expected uint8"),
        ({"obs": {"camera": np.full((2, 2), 300), "body": {}}}, r"obs\['camera'\] has dtype int64, expected uint8"),
        ({"action": {"move": np.zeros(2)}}, "action must be a mapping with 'jump'"),
        ({"action": {"move": np.zeros(3), "jump": True}}, r"action\['move'\] has shape \(3,\), expected \(1, 2\)"),
        ({"extras": None}, r"extras have keys \[\], the table's are \['hidden', 'level'\]"),
        ({"extras": {"hidden": np.zeros(4)}}, r"extras have keys \['hidden'\], the table's are \['hidden', 'level'\]"),
        ({"extras": {"hidden": np.zeros(5), "level": 1}}, r"extras\['hidden'\] has shape \(5,\), expected \(1, 4\)"),
        (
            {"extras": {"hidden": np.zeros(4), "level": 2**40}},
            rf"extras\['level'\] has values from {2**40} to {2**40}, which int32 cannot hold",
        ),
    ],
)  # fmt: skip
def test_a_bad_leaf_of_a_dictionary_is_refused_by_its_path(implementation, change, message):
    buffer = implementation.make("dict")
    obs = {"camera": np.zeros((2, 2), np.uint8), "body": {"speed": 1.0, "legs": np.zeros(2, np.int16)}}
    action, extras = {"move": np.zeros(2), "jump": True}, {"hidden": np.zeros(4), "level": 1}
    good = {"obs": obs, "action": action, "reward": 1.0, "done": False, "next_obs": obs, "extras": extras}
    buffer.add(**good)
    with pytest.raises(rb.InvalidInput, match=message):
        buffer.add(**good | change)
    assert implementation.num_transitions(buffer) == 1
    buffer.add(**good)
    assert implementation.num_transitions(buffer) == 2


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "4", None, [4]])
def test_a_batch_size_that_is_no_count_is_refused_and_the_next_batch_comes(implementation, batch_size):
    buffer = implementation.make("prioritized")
    add(buffer, range(4))
    assert len(buffer.get(4).actions) == 4
    with pytest.raises(rb.InvalidInput, match=re.escape(f"batch_size must be an integer >= 1, got {batch_size!r}")):
        buffer.get(batch_size)
    assert len(buffer.get(4).actions) == 4
    assert implementation.num_transitions(buffer) == 4


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_beta_out_of_range_is_refused_and_the_next_batch_is_the_same(implementation, beta):
    buffer = prioritized(implementation)
    with pytest.raises(rb.InvalidInput, match=rf"beta must be in \[0, 1\], got {beta}"):
        buffer.get(4, beta=beta)
    assert masses_by_action(buffer, 6) == in_proportion(TD_ERRORS)


@pytest.mark.parametrize("kind", ["uniform", "prioritized n3"])
def test_an_empty_buffer_has_no_batch(implementation, kind):
    buffer = implementation.make(kind)
    if isinstance(implementation, Served):  # others may be about to add, so it waits
        with pytest.raises(rb.DeadlineExceeded, match=rf"sample from table '{kind}' waited 0.05 s.*0 of 1 items"):
            buffer.get(4, timeout_s=0.05)
    else:
        with pytest.raises(rb.InvalidInput, match="batch_size is 4, but the buffer holds 0 transitions"):
            buffer.get(4)
    add(buffer, range(6))
    assert len(buffer.get(4).actions) == 4


@pytest.mark.parametrize(
    ("td_errors", "message"),
    [
        ([1.0, 2.0, 3.0], r"td_errors has shape \(3,\), expected \(4,\) or \(4, 1\)"),
        ([1.0] * 5, r"td_errors has shape \(5,\), expected \(4,\)"),
        (1.0, r"td_errors has shape \(\), expected \(4,\)"),
        (np.zeros((1, 4)), r"td_errors has shape \(1, 4\), expected \(4,\)"),
        (np.zeros((4, 2)), r"td_errors has shape \(4, 2\), expected \(4,\)"),
        ([1.0, 2.0, math.nan, 3.0], r"td_errors\[2\] is nan, expected finite"),
        (torch.tensor([1.0, -math.inf, 2.0, 3.0]), r"td_errors\[1\] is -inf, expected finite"),
    ],
)
def test_bad_td_errors_are_refused_and_change_no_priority(implementation, td_errors, message):
    buffer = prioritized(implementation)
    batch = buffer.get(4)
    stale = implementation.num_stale_updates(buffer)
    with pytest.raises(rb.InvalidInput, match=message):
        buffer.update_priorities(batch, td_errors)
    assert masses_by_action(buffer, 6) == in_proportion(TD_ERRORS)
    assert implementation.num_stale_updates(buffer) == stale


@pytest.mark.parametrize("what", [None, "batch", 3.5])
def test_what_is_no_batch_is_refused_and_changes_no_priority(implementation, what):
    buffer = prioritized(implementation)
    buffer.get(4)
    with pytest.raises(rb.InvalidInput, match=r"update_priorities needs a batch|indices must be integers"):
        buffer.update_priorities(what, [1.0] * 4)
    assert masses_by_action(buffer, 6) == in_proportion(TD_ERRORS)


# ---- truncation is not termination ----------------------------------------------------------------------------


def learned_value(buffer, *, as_termination):
    """V <- mean(rewards + discounts * V) over batches, for reward 1 a step and a time limit of 5 steps."""
    obs = np.zeros((2, 3))
    for step in range(100):
        ends = np.array([step % 5 == 4, step % 5 == 1])
        flags = {"truncated": None, "done": ends} if as_termination else {"truncated": ends, "done": ends}
        buffer.add(obs, [0, 0], [1.0, 1.0], next_obs=obs, **flags)
    value = 0.0
    for _ in range(120):
        batch = buffer.get(64)
        value = float((batch.rewards + batch.discounts * value).mean())
    return value


@pytest.mark.parametrize("n_step", [1, 3])
def test_the_value_of_a_truncated_episode_converges_to_that_of_an_endless_one(implementation, n_step):
    value = learned_value(implementation.make(f"value n{n_step}", 2), as_termination=False)
    # 120 contractions by 0.9 leave 3e-5 of 10.
    assert value == pytest.approx(1 / (1 - LEARNING_GAMMA), abs=1e-3)


@pytest.mark.parametrize("n_step", [1, 3])
def test_truncation_taken_for_termination_converges_elsewhere(implementation, n_step):
    value = learned_value(implementation.make(f"value n{n_step}", 2), as_termination=True)
    # One window in five is cut (n = 1), or three (n = 3): at 1 / (1 - 0.9 * 4 / 5) = 3.6 and below 4.
    assert 2.0 < value < 5.0
