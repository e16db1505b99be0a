"""`ReplayWriter` against a real server: what is in the table afterwards is what happened in the environments."""

import time

import gymnasium as gym
import numpy as np
import pytest
from episode_envs import GAMMA, SPEC, EpisodeEnv, EpisodeEnvs, committed_leaves, expected_rows, stored_rows

import rl_buffer as rb
from rl_buffer import frames
from rl_buffer.writer import default_chunk_size

pytestmark = pytest.mark.timeout(60)

STATS_WINDOW = 20
DICT_SPEC = rb.TransitionSpec(
    obs={"camera": rb.Field((2, 2), "uint8"), "body": {"speed": rb.Field((), "float32")}},
    action=rb.Field((2,), "float32"),
    extras={"hidden": rb.Field((4,), "float32")},
)
DISCRETE_SPEC = rb.TransitionSpec(obs=rb.Field((), "int64"), action=rb.Field((), "int64"))


def table(spec=SPEC, **options):
    return rb.ReplayTable(spec, **{"capacity": 4096, "gamma": GAMMA, "seed": 0} | options)


@pytest.fixture(scope="module")
def server():
    priorities = rb.Prioritized(alpha=1.0, epsilon=1e-9)  # so that a mass is |TD error|
    tables = {
        "n1": table(),
        "n3": table(n_step=3),
        "prioritized": table(sampler=priorities),
        "prioritized_n2": table(sampler=priorities, n_step=2),
        "dict": table(DICT_SPEC),
        "discrete": table(DISCRETE_SPEC),
        # Two chunks (10 rows) of one writer with chunk_size=4 fit, of two writers they do not.
        "narrow": table(headroom=16),
        "limited": table(rate_limiter=rb.SampleToInsertRatio(1.0, min_size_to_sample=8, error_buffer=16.0)),
    }
    with rb.BufferServer(
        tables, stats_window=STATS_WINDOW, extra_metrics_keys=("speed",), done_reason_keys=("fell",)
    ) as server:
        yield server


def play(envs, writer, num_steps, seed=0):
    """Random actions; every call as a user of that kind of environment would make it."""
    rng = np.random.default_rng(seed)
    single = isinstance(envs, EpisodeEnv)
    disabled = not single and envs.mode == "disabled"
    obs, _ = envs.reset()
    for _ in range(num_steps):
        actions = int(rng.integers(1000)) if single else rng.integers(1000, size=envs.num_envs)
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        done = terminated or truncated if single else terminated | truncated
        writer.add(obs, actions, rewards, done, next_obs, truncated, terminated, infos=infos)
        obs = next_obs
        if single and done:
            obs, _ = envs.reset()
        elif disabled and done.any():
            obs, _ = envs.reset(options={"reset_mask": done})


# ---- what is stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled", "single"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_every_stored_row_happened_once_and_none_is_missing(client, mode, n_step):
    name = f"n{n_step}"
    shapes = [(1, 1), (1, 64)] if mode == "single" else [(1, 1), (1, 64), (3, 1), (3, 8), (3, 500), (8, 24)]
    for seed, (num_envs, chunk_size) in enumerate(shapes):
        client.clear(name)
        envs = EpisodeEnv(seed) if mode == "single" else EpisodeEnvs(num_envs, mode, seed)
        before = client.stats().get("train/num_episodes", 0)
        writer = client.writer(name, envs=envs, chunk_size=chunk_size)
        play(envs, writer, 200, seed)
        writer.close()
        vector = envs.envs if mode == "single" else envs
        assert stored_rows(client, name) == expected_rows(vector.steps, n_step), (num_envs, chunk_size)
        assert client.size(name) == len(expected_rows(vector.steps, n_step))

        returns, lengths = np.array(vector.finished[-STATS_WINDOW:]).T
        stats = client.stats()
        assert stats["train/num_episodes"] == before + len(vector.finished)
        assert stats["train/rewards_mean"] == pytest.approx(returns.mean())
        assert stats["train/rewards_max"] == returns.max()
        assert stats["train/lengths_mean"] == pytest.approx(lengths.mean())
        assert writer.stats_tracker.get_raw_values()["rewards"] == returns.tolist()
        assert writer.stats_tracker.get_raw_values()["lengths"] == lengths.tolist()


def test_a_full_chunk_is_published_without_a_flush(client, eventually):
    with client.writer("n1", num_envs=1, chunk_size=4) as writer:
        for number in range(7):
            add_numbered(writer, number)
        eventually(lambda: client.size("n1") == 4)


@pytest.mark.parametrize(
    ("obs_nbytes", "headroom", "num_envs", "expected"),
    [
        (40, 100_000, 1, 96),
        (40, 100_000, 2, 192),
        (40, 100_000, 64, 6_144),
        (40, 2_000, 64, 250),  # of a small headroom no more than an eighth
        (40, 100, 64, 64),
        (3_900, 100_000, 100, 133),  # rows of 7,872 B, as many as 1 MiB holds
        (28_224, 100_000, 64, 64),
    ],
)
def test_a_chunk_is_96_steps_where_they_are_small(obs_nbytes, headroom, num_envs, expected):
    spec = rb.TransitionSpec(obs=rb.Field((obs_nbytes,), "uint8"), action=rb.Field((), "int64"))
    table = rb.ReplayTable(spec, 1_000_000, headroom=headroom)
    assert default_chunk_size(table, num_envs) == expected


def test_a_writer_of_several_environments_publishes_as_many_steps_at_a_time_as_the_headroom_has_room_for(
    client, eventually
):
    obs, zeros = np.zeros((32, 3), np.float32), np.zeros(32)
    with client.writer("n1", num_envs=32, autoreset=None) as writer:
        assert writer._reserve(32 * 32, time.monotonic() + 10)  # without rows a full chunk waits, and grows
        for _ in range(40):
            writer.add(obs, zeros.astype(np.int64), zeros, zeros, obs, zeros)
        eventually(lambda: client.size("n1") == 32 * 32)


@pytest.mark.parametrize("n_step", [1, 3])
def test_flush_publishes_complete_windows_and_no_open_one(client, n_step):
    envs = EpisodeEnvs(2, "next_step", seed=5)
    with client.writer(f"n{n_step}", envs=envs, chunk_size=64) as writer:
        play(envs, writer, 11)
        writer.flush()
        ended = [row for row in expected_rows(envs.steps, n_step) if row[4] == n_step or row[6] or row[7]]
        assert stored_rows(client, f"n{n_step}") == ended
    assert stored_rows(client, f"n{n_step}") == expected_rows(envs.steps, n_step)


def test_a_truncation_bootstraps_from_the_true_final_observation_in_every_mode(client):
    for mode in ("next_step", "same_step", "disabled"):
        client.clear("n3")
        envs = EpisodeEnvs(4, mode, seed=3)
        with client.writer("n3", envs=envs) as writer:
            play(envs, writer, 60)
        tails = [row for row in stored_rows(client, "n3") if row[7] and not row[6]]
        assert len(tails) > 20
        for _, _, _, next_obs, n_steps, discount, *_ in tails:
            env, episode, step = map(int, next_obs)
            assert step == len(envs.steps[env, episode])  # the state after the last step, not a reset one
            assert discount == GAMMA**n_steps


def test_terminated_is_done_and_not_truncated_unless_it_is_given(client):
    with client.writer("n1", num_envs=3, autoreset=None) as writer:
        obs = np.zeros((3, 3), np.float32)
        writer.add(obs, np.arange(3), np.zeros(3), [True, True, False], obs, truncated=[False, True, True])
        writer.add(obs, np.arange(3, 6), np.zeros(3), [True] * 3, obs, [True] * 3, terminated=[True, False, True])
    leaves = committed_leaves(client, "n1")
    order = leaves["actions"].argsort()
    assert leaves["terminateds"][order].tolist() == [True, False, False, True, False, True]
    assert leaves["truncateds"][order].tolist() == [False, True, True, True, True, True]


def test_a_manual_reset_cuts_windows_and_drops_the_running_return(client):
    before = client.stats().get("train/num_episodes", 0)
    with client.writer("n3", num_envs=2, autoreset=None, chunk_size=64) as writer:

        def step(number, done=False):
            obs = np.array([[env, 0, number] for env in range(2)], np.float32)
            writer.add(obs, [number] * 2, [1.0, 1.0], [done] * 2, obs + [0, 0, 1])

        step(0)
        step(1)
        writer.on_reset(np.array([True, False]))  # environment 0 only
        step(10)
        step(11)
        step(12, done=True)
    ends = {(row[0][0], row[0][2]): (row[3][2], row[4]) for row in stored_rows(client, "n3")}
    assert ends[0, 0] == (2, 2)  # up to the reset
    assert ends[0, 1] == (2, 1)
    assert ends[1, 0] == (11, 3)  # environment 1 was not reset
    assert ends[0, 10] == ends[1, 10] == (13, 3)
    stats = client.stats()
    assert stats["train/num_episodes"] == before + 2
    assert sorted(writer.stats_tracker.get_raw_values()["lengths"]) == [3, 5]


def test_after_a_manual_reset_the_next_step_is_no_dummy(client):
    with client.writer("n1", num_envs=1, autoreset="next_step") as writer:
        obs = np.zeros(3, np.float32)
        writer.add(obs, 1, 0.0, True, obs)
        writer.on_reset()
        writer.add(obs, 2, 0.0, True, obs)
        writer.add(obs, 3, 0.0, False, obs)  # this one is
        writer.add(obs, 4, 0.0, False, obs)
    assert sorted(committed_leaves(client, "n1")["actions"].tolist()) == [1, 2, 4]


def test_dictionary_observations_and_extras_arrive_leaf_by_leaf(client):
    rng = np.random.default_rng(0)
    added = []
    with client.writer("dict", num_envs=2, autoreset=None, chunk_size=6) as writer:
        for _ in range(10):
            obs, next_obs = (
                {
                    "camera": rng.integers(256, size=(2, 2, 2), dtype=np.uint8),
                    "body": {"speed": rng.random((2, 1), np.float32)},  # (E, 1) for (E,)
                }
                for _ in range(2)
            )
            action, hidden = rng.random((2, 2), np.float32), rng.random((2, 4), np.float32)
            writer.add(obs, action, [0.0, 0.0], [False] * 2, next_obs, extras={"hidden": hidden})
            added += [(obs, action, hidden, next_obs, env) for env in range(2)]
    leaves = committed_leaves(client, "dict")
    position = {speed: row for row, speed in enumerate(leaves["observations/body/speed"].tolist())}
    assert len(position) == len(added) == 20
    for obs, action, hidden, next_obs, env in added:
        row = position[obs["body"]["speed"][env].item()]
        assert (leaves["observations/camera"][row] == obs["camera"][env]).all()
        assert leaves["next_observations/body/speed"][row] == next_obs["body"]["speed"][env].item()
        assert (leaves["next_observations/camera"][row] == next_obs["camera"][env]).all()
        assert (leaves["actions"][row] == action[env]).all()
        assert (leaves["extras/hidden"][row] == hidden[env]).all()


class CountingEnv(gym.Env):
    """Counts its steps up to 3; as a number, or in a nested dictionary."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, *, nested):
        self.nested = nested
        number = gym.spaces.Discrete(10)
        self.observation_space = gym.spaces.Dict({"inner": gym.spaces.Dict({"n": number})}) if nested else number

    def observe(self):
        return {"inner": {"n": np.int64(self.n)}} if self.nested else np.int64(self.n)

    def reset(self, *, seed=None, options=None):
        self.n = 0
        return self.observe(), {}

    def step(self, action):
        self.n += 1
        return self.observe(), 1.0, False, self.n == 3, {}


@pytest.mark.parametrize("nested", [False, True])
def test_final_observations_of_gymnasiums_own_same_step_vector_are_stored(serve, connect, nested):
    envs = gym.vector.SyncVectorEnv(
        [lambda: CountingEnv(nested=nested)] * 2, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    spec = rb.TransitionSpec.from_spaces(envs.single_observation_space, envs.single_action_space)
    client = connect(serve(table(spec)))
    with client.writer("replay", envs=envs) as writer:
        obs, _ = envs.reset()
        for _ in range(6):
            actions = np.zeros(2, np.int64)
            next_obs, rewards, terminated, truncated, infos = envs.step(actions)
            writer.add(obs, actions, rewards, terminated | truncated, next_obs, truncated, infos=infos)
            obs = next_obs
    leaves = committed_leaves(client, "replay")
    path = "/inner/n" if nested else ""
    pairs = zip(leaves["observations" + path].tolist(), leaves["next_observations" + path].tolist(), strict=True)
    assert sorted(pairs) == [(0, 1)] * 4 + [(1, 2)] * 4 + [(2, 3)] * 4


def test_tensors_columns_and_plain_numbers_store_the_same_as_arrays(client):
    import torch

    obs = np.arange(6, dtype=np.float32).reshape(2, 3)
    with client.writer("n1", num_envs=2, autoreset=None) as writer:
        writer.add(obs, np.array([1, 2]), np.array([3.0, 4.0]), np.array([True, False]), obs, np.array([False, True]))
        expected = stored_rows_after_flush(client, writer)
        writer.add(
            torch.tensor(obs, requires_grad=True),
            torch.tensor([[1], [2]]),
            torch.tensor([[3.0], [4.0]]),
            torch.tensor([[1], [0]]),
            torch.tensor(obs),
            torch.tensor([[False], [True]]),
        )
    assert stored_rows(client, "n1") == sorted(expected * 2)

    client.clear("n1")
    with client.writer("n1", num_envs=1) as writer:
        writer.add(obs[0], 1, 3.0, True, obs[0], False)
        writer.add(obs[:1], np.array([[1]]), [3], 1, obs[:1], 0)
    assert stored_rows(client, "n1") == expected[:1] * 2


def stored_rows_after_flush(client, writer):
    writer.flush()
    return stored_rows(client, "n1")


# ---- initial priorities --------------------------------------------------------------------------------------


def masses(client, name):
    """obs[2] (a number that the test gave the step) -> mass of its row, from one large draw."""
    with client.sampler(name, batch_size=4096, prefetch=0) as sampler:
        sampler._ask(1)
        sample = frames.decode_batch(sampler._channel.receive(10.0)).sample
    config = client.tables[name]
    views = config.layout.view(client._connection.segments[name][0].buffer, config.num_rows)
    numbers = views["observations"][sample.rows, 2].tolist()
    return dict(zip(map(int, numbers), sample.masses.tolist(), strict=True))


def add_numbered(writer, number, reward=0.0, done=False, truncated=False, **values):
    obs = np.array([0, 0, number], np.float32)
    writer.add(obs, number, reward, done or truncated, obs + 1, truncated, **values)


def test_priorities_of_one_step_are_stored_as_given(client):
    with client.writer("prioritized", num_envs=1) as writer:
        for number in range(1, 5):
            add_numbered(writer, number, priority=float(number))
    assert masses(client, "prioritized") == pytest.approx({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})


def test_priorities_for_n_steps_are_refused_with_the_way_out(client):
    writer = client.writer("prioritized_n2", num_envs=1)
    with pytest.raises(rb.InvalidInput, match=r"n_step = 1, this table has 2; pass q_taken= and state_value="):
        add_numbered(writer, 1, priority=1.0)
    writer.close()
    assert client.size("prioritized_n2") == 0


def test_initial_priorities_are_the_td_errors_of_the_closed_windows(client):
    """n = 2, gamma = 0.5, rewards 4, 8, 16, 32, 64; V = 10, 20, ...; Q = 1, 2, ...; chunks of one step."""
    with client.writer("prioritized_n2", num_envs=1, autoreset="next_step", chunk_size=1) as writer:
        for t in range(5):
            add_numbered(writer, t, 4.0 * 2**t, truncated=t == 4, q_taken=t + 1.0, state_value=10.0 * (t + 1))
        add_numbered(writer, 99, q_taken=77.0, state_value=60.0)  # the dummy step sees the final observation
        add_numbered(writer, 5, 1.0, q_taken=1.0, state_value=1000.0)
        add_numbered(writer, 6, 2.0, done=True, q_taken=2.5, state_value=2000.0)  # terminated: no bootstrap
    assert masses(client, "prioritized_n2") == pytest.approx(
        {
            0: 4 + 0.5 * 8 + 0.25 * 30 - 1,
            1: 8 + 0.5 * 16 + 0.25 * 40 - 2,
            2: 16 + 0.5 * 32 + 0.25 * 50 - 3,
            3: 32 + 0.5 * 64 + 0.25 * 60 - 4,  # truncated: V(final)
            4: 64 + 0.5 * 60 - 5,
            5: 1 + 0.5 * 2 - 1,
            6: abs(2 - 2.5),
        }
    )


def test_final_value_bootstraps_a_truncated_tail_where_no_dummy_step_comes(client):
    for autoreset in ("disabled", "same_step"):
        client.clear("prioritized")
        with client.writer("prioritized", num_envs=1, autoreset=autoreset) as writer:
            infos = {"final_obs": np.array([np.zeros(3, np.float32), None], object)[:1], "_final_obs": [True]}
            add_numbered(writer, 0, 4.0, q_taken=1.0, state_value=0.0, final_value=900.0)  # no end: not looked at
            add_numbered(writer, 1, 8.0, truncated=True, q_taken=1.0, state_value=6.0, final_value=2.0, infos=infos)
            add_numbered(writer, 2, 1.0, done=True, q_taken=1.5, state_value=500.0, infos=infos)
        expected = {0: 4 + 0.5 * 6 - 1, 1: 8 + 0.5 * 2 - 1, 2: 0.5}
        assert masses(client, "prioritized") == pytest.approx(expected)


def test_a_row_without_a_known_priority_gets_the_largest_live_one(client):
    with client.writer("prioritized", num_envs=1) as writer:
        add_numbered(writer, 0, priority=3.0)
        add_numbered(writer, 1, priority=7.0)
        writer.flush()
        add_numbered(writer, 2)
    assert masses(client, "prioritized") == pytest.approx({0: 3.0, 1: 7.0, 2: 7.0})


def test_a_writer_may_change_from_priorities_to_values(client):
    with client.writer("prioritized", num_envs=1) as writer:
        add_numbered(writer, 0, priority=3.0)
        add_numbered(writer, 1, 8.0, done=True, q_taken=3.0, state_value=0.0)
    assert masses(client, "prioritized") == pytest.approx({0: 3.0, 1: 5.0})


# ---- what is refused -----------------------------------------------------------------------------------------

GOOD = {
    "obs": np.zeros((2, 3), np.float32),
    "action": np.array([1, 2]),
    "reward": np.array([1.0, 2.0]),
    "done": np.array([False, True]),
    "next_obs": np.ones((2, 3), np.float32),
    "truncated": np.array([False, False]),
}
NAN, INF = float("nan"), float("inf")
BAD = [
    ({"obs": np.zeros((3, 3), np.float32)}, r"obs has shape \(3, 3\), expected \(2, 3\)"),
    ({"obs": np.zeros((2, 3), np.complex64)}, "obs has dtype complex64, expected float32"),
    ({"obs": np.full((2, 3), NAN, np.float32)}, r"obs is nan at \(0, 0\); expected finite"),
    ({"obs": np.array([[0, 0, 0], [0, INF, -INF]], np.float32)}, r"obs is inf at \(1, 1\); expected finite"),
    ({"next_obs": np.zeros((2, 4), np.float32)}, r"next_obs has shape \(2, 4\), expected \(2, 3\)"),
    ({"next_obs": np.array([["a"] * 3] * 2)}, "next_obs has dtype <U1, expected float32"),
    ({"action": np.array([1.5, 2.5])}, "action has dtype float64, expected int64"),
    ({"action": np.array([1, 2, 3])}, r"action has shape \(3,\), expected \(2,\)"),
    ({"action": np.array([[1, 2]])}, r"action has shape \(1, 2\), expected \(2,\)"),
    ({"reward": np.array([1.0])}, r"reward has shape \(1,\), expected \(2,\)"),
    ({"reward": 1.0}, r"reward has shape \(\), expected \(2,\)"),
    ({"reward": [1.0, NAN]}, r"reward is nan at \(1,\); expected finite"),
    ({"reward": [INF, -INF]}, r"reward is inf at \(0,\); expected finite"),
    ({"reward": [1e39, 0.0]}, r"reward is 1e\+39 at \(0,\); expected .* \+-1e\+34"),
    ({"done": [0.5, 0.0]}, r"done must be bool, 0 or 1, got \[0.5 0. \]"),
    ({"done": [NAN, 0.0]}, r"done must be bool, 0 or 1, got \[nan  0.\]"),
    ({"done": [True]}, r"done has shape \(1,\), expected \(2,\)"),
    ({"truncated": [[True, False]]}, r"truncated has shape \(1, 2\), expected \(2,\)"),
    ({"terminated": [True, False, True]}, r"terminated has shape \(3,\), expected \(2,\)"),
    ({"priority": [1.0, -2.0]}, "priority must be >= 0, got -2.0"),
    ({"priority": [1.0, NAN]}, r"priority is nan at \(1,\)"),
    ({"q_taken": [1.0, INF]}, r"q_taken is inf at \(1,\)"),
    ({"state_value": [1.0]}, r"state_value has shape \(1,\), expected \(2,\)"),
    ({"final_value": [NAN, 1.0]}, r"final_value is nan at \(0,\)"),
    ({"extras": {"hidden": np.zeros(2)}}, r"extras have keys \['hidden'\], the table's are \[\]"),
    ({"metrics": {"height": [1.0, 2.0]}}, r"metrics has keys \['height'\].*\['speed'\]"),
    ({"metrics": {"speed": [1.0, NAN]}}, r"speed\[1\] is nan"),
    ({"metrics": {"speed": [1.0]}}, r"speed has shape \(1,\); expected \(2,\)"),
    ({"done_reasons": {"won": [True, False]}}, r"done_reasons has keys \['won'\].*\['fell'\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_a_refused_add_names_the_argument_and_adds_nothing(client, change, message):
    with client.writer("prioritized", num_envs=2, autoreset=None, chunk_size=2) as writer:
        before = client.stats().get("train/num_episodes", 0)
        with pytest.raises(rb.InvalidInput, match=message):
            writer.add(**GOOD | change)
        writer.add(**GOOD)
        with pytest.raises(rb.InvalidInput, match=message):
            writer.add(**GOOD | change)
    assert stored_rows(client, "prioritized") == [
        ((0, 0, 0), 1, 1.0, (1, 1, 1), 1, GAMMA, False, False, False),
        ((0, 0, 0), 2, 2.0, (1, 1, 1), 1, 0.0, True, False, True),
    ]
    assert client.stats()["train/num_episodes"] == before + 1


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"camera": np.zeros((1, 2, 2), np.uint8)}, r"obs must be a mapping with 'body/speed', got dict"),
        ({"camera": np.zeros((1, 2, 2), np.uint8), "body": 1.0}, r"obs must be a mapping with 'body/speed', got float"),
        (
            {"camera": np.zeros((1, 2, 3), np.uint8), "body": {"speed": 0.0}},
            r"obs\['camera'\] has shape \(1, 2, 3\), expected \(1, 2, 2\)",
        ),
        (
            {"camera": np.zeros((1, 2, 2)), "body": {"speed": 0.0}},
            r"obs\['camera'\] has dtype float64, expected uint8",
        ),
        (np.zeros(3), r"obs must be a mapping with 'camera', got ndarray"),
    ],
)
def test_a_refused_dictionary_observation_names_the_leaf(client, obs, message):
    good = {"camera": np.zeros((1, 2, 2), np.uint8), "body": {"speed": 0.5}}
    rest = {"action": np.zeros(2), "reward": 0.0, "done": False, "next_obs": good, "extras": {"hidden": np.zeros(4)}}
    with client.writer("dict", num_envs=1) as writer:
        with pytest.raises(rb.InvalidInput, match=message):
            writer.add(obs, **rest)
        with pytest.raises(rb.InvalidInput, match=r"extras have keys \[\], the table's are \['hidden'\]"):
            writer.add(good, **rest | {"extras": None})
        writer.add(good, **rest)
    assert client.size("dict") == 1


def test_an_end_without_its_final_observation_is_refused_in_same_step_mode(client):
    bad = [None, {}, {"final_obs": [None, None]}, {"final_obs": [None, None], "_final_obs": [True, False]}]
    infos = {"final_obs": np.array([None, np.full(3, 7, np.float32)], object), "_final_obs": np.array([False, True])}
    with client.writer("n1", num_envs=2, autoreset="same_step") as writer:
        for wrong in bad:
            with pytest.raises(rb.InvalidInput, match=r"environment 1 ended in same_step mode.*infos=infos"):
                writer.add(**GOOD, infos=wrong)
        with pytest.raises(rb.InvalidInput, match=r"infos\['final_obs'\]\[1\] has shape \(4,\), expected \(3,\)"):
            writer.add(**GOOD, infos=infos | {"final_obs": [None, np.zeros(4, np.float32)]})
        writer.add(**GOOD, infos=infos)
    assert [row[3] for row in stored_rows(client, "n1")] == [(1, 1, 1), (7, 7, 7)]


def test_a_final_observation_that_is_a_number_is_checked_as_well(client):
    with client.writer("discrete", num_envs=2, autoreset="same_step") as writer:
        step = {"obs": [0, 0], "action": [0, 0], "reward": [0.0, 0.0], "done": [True, False], "next_obs": [0, 0]}
        with pytest.raises(rb.InvalidInput, match=r"infos\['final_obs'\]\[0\] has shape \(2,\), expected \(\)"):
            writer.add(**step, infos={"final_obs": [np.zeros(2, int), None], "_final_obs": [True, False]})
        writer.add(**step, infos={"final_obs": [np.int64(5), None], "_final_obs": [True, False]})
    assert sorted(committed_leaves(client, "discrete")["next_observations"].tolist()) == [0, 5]


def test_writers_that_could_not_work_are_refused(client):
    class Silent(EpisodeEnvs):
        def __init__(self):
            super().__init__(2, "next_step")
            self.metadata = {}

    for arguments, message in [
        ({"table": "nothing", "num_envs": 1}, r"no table is called 'nothing'; this server has \["),
        ({"table": "n1"}, r"needs envs= or num_envs=, and not both"),
        ({"table": "n1", "num_envs": 0}, r"num_envs and chunk_size must be >= 1, got 0 and 64"),
        ({"table": "n1", "num_envs": 1, "autoreset": "sometimes"}, r"autoreset 'sometimes' is unknown"),
        ({"table": "n1", "envs": Silent()}, r"Silent does not say how it resets.*pass autoreset="),
        ({"table": "discrete", "envs": EpisodeEnvs(1, "next_step")}, r"'discrete' stores .*the environment has"),
    ]:
        with pytest.raises(rb.InvalidInput, match=message):
            client.writer(**arguments)
    with pytest.raises(rb.RequestRefused, match=r"wants to hold \d+ rows, but its headroom is 16; lower chunk_size"):
        client.writer("narrow", num_envs=1, chunk_size=64)
    assert all(table["reserved_rows"] == 0 for table in client.info()["tables"].values())


def test_a_closed_writer_refuses_and_a_writer_of_a_closed_client_too(server):
    client = rb.connect(server.address)
    writer = client.writer("n1", num_envs=1)
    writer.close()
    writer.close()
    with pytest.raises(rb.Closed):
        add_numbered(writer, 0)
    other = client.writer("n1", num_envs=1)
    client.close()
    client.close()
    with pytest.raises(rb.Closed):
        add_numbered(other, 0)
    with pytest.raises(rb.Closed):
        client.info()


def test_an_error_in_the_block_gives_the_rows_back_and_publishes_nothing_more(client):
    def fail():
        with client.writer("narrow", num_envs=1, chunk_size=4) as writer:
            add_numbered(writer, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert client.info()["tables"]["narrow"]["reserved_rows"] == 0
    assert client.size("narrow") == 0


# ---- waiting -------------------------------------------------------------------------------------------------


def add_until_deadline(writer, first):
    """Add numbered steps; return the number of the one that was refused."""
    number = first
    while True:
        try:
            add_numbered(writer, number)
        except rb.DeadlineExceeded as error:
            return number, str(error)
        number += 1
        assert number < first + 1000


def test_an_add_that_the_limiter_holds_back_says_so_and_can_be_repeated(client):
    writer = client.writer("limited", num_envs=1, chunk_size=4, timeout_s=0.2)
    started_s = time.monotonic()
    number, message = add_until_deadline(writer, 0)
    assert time.monotonic() - started_s < 5.0
    assert "add on table 'limited' waited 0.2 s" in message
    assert "inserting waits" in message
    assert "the learner must sample" in message
    with pytest.raises(rb.DeadlineExceeded, match=r"flush on table 'limited' waited 0.1 s"):
        writer.flush(timeout_s=0.1)
    with client.sampler("limited", batch_size=16, prefetch=0) as sampler:
        sampler.sample()
        add_numbered(writer, number)  # the same call
        last, _ = add_until_deadline(writer, number + 1)
        while client.info()["tables"]["limited"]["inserts"] < last:  # by now its own fault
            try:
                writer.close(timeout_s=0.2)
                break
            except rb.DeadlineExceeded:
                sampler.sample()
    assert sorted(committed_leaves(client, "limited")["actions"].tolist()) == list(range(last))


def test_an_add_that_finds_no_rows_says_who_holds_them_and_can_be_repeated(client):
    # The first gets the two chunks that it wants, the second one, and then too few are left for another one.
    holders = [client.writer("narrow", num_envs=1, chunk_size=4) for _ in range(2)]
    writer = client.writer("narrow", num_envs=1, chunk_size=4, timeout_s=0.2)
    number, message = add_until_deadline(writer, 0)
    assert "waits for rows, 15 of 16 are reserved" in message
    for holder in holders:
        holder.close()
    for later in range(number, number + 20):
        add_numbered(writer, later)
    writer.close()
    assert sorted(committed_leaves(client, "narrow")["actions"].tolist()) == list(range(number + 20))


def test_many_writers_of_one_client_get_their_first_rows(client):
    # The grant of a new writer's rows must not overtake the connection that it travels on.
    for number in range(50):
        with client.writer("n1", num_envs=1, chunk_size=1, timeout_s=5.0) as writer:
            add_numbered(writer, number)
    assert client.size("n1") == 50
