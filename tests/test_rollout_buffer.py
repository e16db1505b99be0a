"""The rollout buffer: epochs of minibatches over what was added, and what is refused without a trace."""

import itertools
import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

import rl_buffer
from rl_buffer.errors import InvalidInput
from rl_buffer.rollout_buffer import RolloutBatch, RolloutBuffer
from rl_buffer.stats_tracker import StatsTracker

DEVICE = "cpu"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


def make(buffer_size=5, num_envs=3, obs_shape=(2,), action_shape=(), **options):
    return RolloutBuffer(buffer_size, num_envs, obs_shape, action_shape, **{"action_dtype": "int64"} | options)


def step_of(number, num_envs=3, **changes):
    """A good step whose action says which step of which environment it is."""
    envs = np.arange(num_envs)
    step = {
        "obs": np.stack([np.full(num_envs, number), envs], axis=1),
        "action": number * num_envs + envs,
        "reward": np.sin(number + 0.5 * envs),
        "done": np.zeros(num_envs, np.bool_),
        "value": np.cos(number - 0.5 * envs),
        "log_prob": -0.25 * number - envs,
    }
    return step | changes


def fill(buffer, steps=None, **changes):
    """Add steps up to the end, or as many as told."""
    for number in range(buffer.buffer_size if steps is None else steps):
        buffer.add(**step_of(number, buffer.num_envs, **changes))
    return buffer


def filled(*args, **options):
    buffer = fill(make(*args, **options))
    buffer.compute_returns_and_advantages(np.ones(buffer.num_envs), np.zeros(buffer.num_envs))
    return buffer


def actions_of(batches):
    return [batch.actions.tolist() for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def assert_same_batches(some, other):
    for mine, theirs in zip(some, other, strict=True):
        for name in RolloutBatch.__slots__:
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


# The examples that must run as they stand.


def test_the_example_of_the_readme_hands_out_every_step_in_every_epoch():
    stats_tracker = StatsTracker(num_envs=4)
    obs, action = np.zeros((4, 16), np.float32), torch.zeros(4, 1)
    reward, done = np.ones(4, np.float32), np.zeros(4, np.bool_)
    value, log_prob = torch.zeros(4, 1, requires_grad=True), torch.zeros(4, requires_grad=True)
    last_values, last_dones = torch.zeros(4, 1), torch.zeros(4)
    sizes = []

    rollout_buffer = RolloutBuffer(
        buffer_size=256, num_envs=4, obs_shape=(16,), action_shape=(1,), stats_tracker=stats_tracker, device=DEVICE
    )
    for _ in range(256):
        rollout_buffer.add(obs, action, reward, done, value, log_prob)
    rollout_buffer.compute_returns_and_advantages(last_values, last_dones)
    for epoch in range(4):
        for batch in rollout_buffer.get(batch_size=64):
            sizes.append((epoch, batch.observations.shape, batch.actions.shape, batch.advantages.shape))

    assert sizes == [(epoch, (64, 16), (64, 1), (64,)) for epoch in range(4) for _ in range(16)]


def test_buffer_and_batch_are_public_names():
    assert rl_buffer.RolloutBuffer is RolloutBuffer
    assert rl_buffer.RolloutBatch is RolloutBatch


# Batches.


def test_in_order_a_batch_is_the_steps_as_they_were_added():
    buffer = filled(2, 2)
    (batch,) = buffer.get(shuffle=False)
    assert batch.observations.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert batch.actions.tolist() == [0, 1, 2, 3]
    assert batch.log_probs.tolist() == [0, -1, -0.25, -1.25]
    np.testing.assert_allclose(batch.values, np.cos([0, -0.5, 1, 0.5]), rtol=1e-6)
    assert batch.mask.tolist() == [True] * 4
    dtypes = {name: str(getattr(batch, name).dtype) for name in RolloutBatch.__slots__}
    scalars = ("values", "log_probs", "advantages", "returns", "observations")
    assert dtypes == dict.fromkeys(scalars, "torch.float32") | {"actions": "torch.int64", "mask": "torch.bool"}


def test_advantages_and_returns_are_those_of_gae_by_hand():
    buffer = make(2, 2, gamma=0.5, gae_lambda=0.5)
    buffer.add(**step_of(0, 2, reward=[1, 1], value=[2, 2], done=[0, 1]))
    buffer.add(**step_of(1, 2, reward=[2, 2], value=[4, 4]))
    buffer.compute_returns_and_advantages([8, 8])
    (batch,) = buffer.get(shuffle=False)
    # deltas: 1 + 4/2 - 2 = 1 or, terminated, 1 - 2 = -1; then 2 + 8/2 - 4 = 2. In order of (step, environment):
    assert batch.advantages.tolist() == [1 + 2 / 4, -1, 2, 2]
    assert batch.returns.tolist() == [3.5, 1, 6, 6]


def test_a_done_counts_at_its_own_step_not_at_the_next():
    buffer = make(3, 1, gamma=1.0, gae_lambda=1.0)
    for number, (reward, done) in enumerate([(1, 0), (10, 1), (100, 0)]):
        buffer.add(**step_of(number, 1, reward=[reward], done=[done], value=[0]))
    buffer.compute_returns_and_advantages([1000], [0])
    (batch,) = buffer.get(shuffle=False)
    assert batch.returns.tolist() == [11, 10, 1100]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 14, 15, None])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_step_comes_exactly_once_an_epoch_and_only_the_last_minibatch_may_be_smaller(batch_size, shuffle):
    buffer = filled()
    for _ in range(2):
        batches = actions_of(buffer.get(batch_size, shuffle))
        assert sorted(flat(batches)) == list(range(15))
        full = batch_size or 15
        assert [len(batch) for batch in batches] == [full] * (15 // full) + [15 % full] * (15 % full > 0)
        assert shuffle or flat(batches) == list(range(15))


def test_the_leaves_of_a_shuffled_batch_belong_to_the_same_step():
    for batch in filled().get(4):
        step, env = batch.observations.unbind(1)
        assert batch.actions.tolist() == (step * 3 + env).tolist()
        assert batch.log_probs.tolist() == (-0.25 * step - env).tolist()
        torch.testing.assert_close(batch.values, torch.cos(step - 0.5 * env))
        torch.testing.assert_close(batch.returns, batch.advantages + batch.values)


def test_epochs_differ_and_the_same_seed_draws_the_same_ones():
    first, second = filled(seed=7), filled(seed=7)
    epochs = [actions_of(first.get(4)) for _ in range(3)]
    assert epochs == [actions_of(second.get(4)) for _ in range(3)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != actions_of(filled(seed=8).get(4))
    assert actions_of(filled().get()) != actions_of(filled().get())  # 1 / 15!


def test_neither_torchs_nor_numpys_own_generator_is_touched():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    list(filled(seed=7).get(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_a_batch_is_the_callers_own():
    buffer = filled()
    expected = list(buffer.get(4, shuffle=False))
    for batch in buffer.get(4, shuffle=False):
        batch.observations.zero_()
        batch.advantages.zero_()
    assert_same_batches(buffer.get(4, shuffle=False), expected)


# Rows that did not happen.


def test_dummies_are_not_handed_out_even_as_row_0_of_the_next_rollout():
    buffer = make(2, 3, autoreset="next_step")
    buffer.add(**step_of(0, done=[1, 0, 0]))
    buffer.add(**step_of(1, truncated=[0, 1, 0]))
    buffer.compute_returns_and_advantages(np.ones(3), [0, 0, 0])
    assert sorted(flat(actions_of(buffer.get(2)))) == [0, 1, 2, 4, 5]
    buffer.reset()
    fill(buffer)
    buffer.compute_returns_and_advantages(np.ones(3))
    assert sorted(flat(actions_of(buffer.get(2)))) == [0, 2, 3, 4, 5]
    assert (len(buffer), buffer.num_transitions) == (2, 5)


def test_the_mode_may_be_gymnasiums_own():
    buffer = make(2, 1, autoreset=AutoresetMode.NEXT_STEP)
    buffer.add(**step_of(0, 1, done=[1]))
    buffer.add(**step_of(1, 1))
    assert buffer.num_transitions == 1


def test_a_mask_keeps_rows_out_of_batches_normalisation_and_explained_variance():
    mask = np.array([True, True, False])
    masked, narrow = make(), make(5, 2)
    for number in range(5):
        masked.add(**step_of(number, mask=mask, value=np.array([np.cos(number), np.cos(number - 0.5), 1e6])))
        narrow.add(**step_of(number, 2))
    masked.compute_returns_and_advantages(np.ones(3))
    narrow.compute_returns_and_advantages(np.ones(2))
    assert masked.explained_variance == pytest.approx(narrow.explained_variance)
    for mine, theirs in zip(
        masked.get(4, shuffle=False, normalize_advantages=True),
        narrow.get(4, shuffle=False, normalize_advantages=True),
        strict=True,
    ):
        np.testing.assert_allclose(mine.advantages, theirs.advantages, rtol=1e-5)
        assert mine.mask.all()


def test_a_rollout_in_which_nothing_happened_has_no_epoch():
    buffer = fill(make(), mask=[False] * 3)
    buffer.compute_returns_and_advantages(np.ones(3))
    with pytest.raises(InvalidInput, match="no step of this rollout happened"):
        buffer.get()
    assert np.isnan(buffer.explained_variance)


def test_a_rollout_may_be_computed_before_it_is_full():
    buffer = fill(make(), steps=2)
    buffer.compute_returns_and_advantages(np.ones(3))
    short = filled(2)
    assert_same_batches(buffer.get(4, shuffle=False), short.get(4, shuffle=False))
    assert (len(buffer), buffer.num_transitions, buffer.is_full) == (2, 6, False)


# Normalisation.


def test_advantages_are_normalised_over_each_minibatch():
    buffer = filled()
    for raw, batch in zip(buffer.get(4, shuffle=False), buffer.get(4, False, True), strict=True):
        expected = (raw.advantages - raw.advantages.mean()) / (raw.advantages.std() + 1e-8)
        torch.testing.assert_close(batch.advantages, expected)
        assert torch.equal(batch.returns, raw.returns)


def test_a_minibatch_of_one_has_the_advantage_0_and_never_nan():
    buffer = filled(normalize_advantages=True)
    sizes = {len(batch.advantages): batch.advantages for batch in buffer.get(7)}
    assert sizes[1].tolist() == [0.0]
    assert flat(batch.advantages.tolist() for batch in buffer.get(1)) == [0.0] * 15


def test_equal_advantages_become_0_and_not_their_rounding_errors():
    buffer = make(50, 3, gae_lambda=0.0, gamma=0.0)
    fill(buffer, reward=[0.1, 0.1, 0.1], value=[0, 0, 0])
    buffer.compute_returns_and_advantages(np.ones(3))
    for batch in buffer.get(7, normalize_advantages=True):
        np.testing.assert_allclose(batch.advantages, 0.0, atol=1e-6)


def test_the_constructor_says_whether_to_normalise_and_get_may_say_otherwise():
    plain, normalizing = filled(), filled(normalize_advantages=True)
    assert_same_batches(plain.get(4, False), normalizing.get(4, False, normalize_advantages=False))
    assert_same_batches(plain.get(4, False, True), normalizing.get(4, False))
    assert not torch.equal(next(plain.get(4, False)).advantages, next(normalizing.get(4, False)).advantages)


# What is added.


def test_dictionary_observations_come_back_nested_with_the_dtype_of_each_leaf():
    shapes = {"camera": {"rgb": (2, 2)}, "speed": ()}
    buffer = make(
        3, 2, shapes, {"wheel": 1}, obs_dtype={"camera": {"rgb": "uint8"}, "speed": "float64"}, action_dtype=None
    )
    for number in range(3):
        obs = {"camera": {"rgb": np.full((2, 2, 2), 200 + number, np.uint8)}, "speed": np.array([number, 0.1])}
        buffer.add(**step_of(number, 2, obs=obs, action={"wheel": torch.full((2, 1), number)}))
    buffer.compute_returns_and_advantages([1, 1])
    for batch in buffer.get(4):
        assert set(batch.observations) == {"camera", "speed"}
        rgb, speed, wheel = batch.observations["camera"]["rgb"], batch.observations["speed"], batch.actions["wheel"]
        assert (rgb.dtype, speed.dtype, wheel.dtype) == (torch.uint8, torch.float64, torch.float32)
        assert (rgb[:, 1, 1] - 200 == wheel[:, 0]).all()
        assert ((speed == 0.1) | (speed == wheel[:, 0])).all()


def test_images_stay_uint8():
    buffer = make(2, 2, (4, 8, 8), obs_dtype=torch.uint8)
    images = np.random.default_rng(0).integers(256, size=(2, 2, 4, 8, 8), dtype=np.uint8)
    for number in range(2):
        buffer.add(**step_of(number, 2, obs=images[number]))
    buffer.compute_returns_and_advantages([1, 1])
    (batch,) = buffer.get(shuffle=False)
    assert batch.observations.dtype == torch.uint8
    np.testing.assert_array_equal(batch.observations, images.reshape(4, 4, 8, 8))


def test_spaces_say_shapes_and_dtypes():
    image = spaces.Box(0, 255, (2, 2), np.uint8)
    buffer = RolloutBuffer(2, 1, observation_space=image, action_space=spaces.Discrete(3))
    fill(buffer, obs=np.full((1, 2, 2), 255, np.uint8), action=np.array([2]))
    buffer.compute_returns_and_advantages(0.0)
    (batch,) = buffer.get()
    assert (batch.observations.dtype, batch.actions.dtype) == (torch.uint8, torch.int64)
    assert batch.observations.shape == (2, 2, 2)
    assert batch.actions.tolist() == [2, 2]


def test_one_environment_may_come_as_scalars():
    scalars, vectors = make(3, 1), make(3, 1)
    for number in range(3):
        vectors.add(**step_of(number, 1))
        scalars.add(**{name: value[0] for name, value in step_of(number, 1).items()})
    vectors.compute_returns_and_advantages([1.0], [False])
    scalars.compute_returns_and_advantages(torch.tensor(1.0), False)
    assert_same_batches(scalars.get(2, False), vectors.get(2, False))


def test_arrays_and_tensors_with_or_without_grad_as_rows_or_columns_are_the_same():
    arrays, tensors = make(), make()
    for number in range(5):
        step = step_of(number)
        arrays.add(**step)
        columns = {name: torch.as_tensor(step[name])[:, None] for name in ("action", "reward", "done")}
        graded = {name: torch.tensor(step[name], requires_grad=True)[:, None] for name in ("value", "log_prob")}
        tensors.add(torch.as_tensor(step["obs"]), **columns, **graded)
    arrays.compute_returns_and_advantages(np.ones(3), np.zeros(3))
    tensors.compute_returns_and_advantages(torch.ones(3, 1, requires_grad=True), torch.zeros(3, 1))
    assert_same_batches(tensors.get(4, False), arrays.get(4, False))
    assert not any(batch.values.requires_grad for batch in tensors.get(4))


def test_what_was_given_is_copied():
    buffer, expected = make(), filled()
    for number in range(5):
        step = step_of(number)
        buffer.add(**step)
        for array in step.values():
            array[...] = 1 - array
    last_values = np.ones(3)
    buffer.compute_returns_and_advantages(last_values)
    last_values[:] = 99
    assert_same_batches(buffer.get(4, False), expected.get(4, False))


# Statistics.


def test_statistics_are_those_of_a_tracker_that_is_driven_directly():
    options = {"num_envs": 3, "window": 20, "extra_metrics_keys": ["x"], "done_reason_keys": ["fell"]}
    mine, direct = StatsTracker(**options), StatsTracker(**options)
    buffer = make(7, stats_tracker=mine, autoreset="next_step", restart_when_full=True)
    rng = np.random.default_rng(0)
    ended = np.zeros(3, np.bool_)
    for number in range(60):
        dones, truncateds = rng.random((2, 3)) < 0.15
        asked = rng.random(3) < 0.9
        reward = rng.normal(size=3)
        extra = {"metrics": {"x": rng.normal(size=3)}, "done_reasons": {"fell": dones}}
        step = step_of(number, reward=reward, done=dones, truncated=truncateds, mask=asked)
        buffer.add(**step, **extra)
        happened = asked & ~ended
        direct.update(reward, dones, truncateds, mask=happened, **extra)
        ended = (dones | truncateds) & happened
    assert mine.get_statistics() == direct.get_statistics()
    assert mine.get_statistics()["train/num_episodes"] > 20


def test_an_end_by_terminated_alone_ends_the_episode_in_the_statistics():
    tracker = StatsTracker(1)
    buffer = make(3, 1, stats_tracker=tracker)
    buffer.add(**step_of(0, 1, reward=[5], terminated=[True]))
    assert tracker.get_raw_values()["rewards"] == [5.0]


# Computing.


def test_last_dones_that_differ_are_warned_of_at_the_callers_line_and_the_stored_flags_win():
    buffer = fill(make(), done=[1, 0, 0])
    with pytest.warns(UserWarning, match=r"last_dones\[1\].*done stored before the step\?") as warned:
        buffer.compute_returns_and_advantages(np.ones(3), [1, 1, 0])
    assert warned[0].filename == __file__
    expected = fill(make(), done=[1, 0, 0])
    expected.compute_returns_and_advantages(np.ones(3))
    assert_same_batches(buffer.get(4, False), expected.get(4, False))


def test_a_truncated_last_step_needs_its_final_value_unless_the_mode_makes_last_values_final():
    def compute(autoreset, final_values=None):
        buffer = make(1, 1, gamma=0.5, autoreset=autoreset)
        buffer.add(**step_of(0, 1, reward=[1], value=[2], truncated=[True], final_values=final_values))
        buffer.compute_returns_and_advantages([8])
        return next(buffer.get()).advantages.item()

    for autoreset in ("next_step", "disabled"):
        assert compute(autoreset) == 1 + 8 / 2 - 2
    for autoreset in (None, "same_step"):
        with pytest.raises(InvalidInput, match="step 0 of environment 0 was truncated"):
            compute(autoreset)
    for autoreset in ("next_step", "disabled", "same_step", None):
        assert compute(autoreset, [4]) == 1 + 4 / 2 - 2


def test_explained_variance_is_that_of_the_rollout():
    buffer = filled()
    (batch,) = buffer.get(shuffle=False)
    returns, values = batch.returns.double().numpy(), batch.values.double().numpy()
    assert isinstance(buffer.explained_variance, float)
    assert buffer.explained_variance == pytest.approx(1 - np.var(returns - values) / np.var(returns))


# States.


def test_length_counts_steps_per_environment_and_num_transitions_all():
    buffer = make()
    assert (len(buffer), buffer.num_transitions, buffer.is_full) == (0, 0, False)
    fill(buffer, steps=2)
    assert (len(buffer), buffer.num_transitions, buffer.is_full) == (2, 6, False)
    for number in range(3):
        buffer.add(**step_of(number))
    assert (len(buffer), buffer.num_transitions, buffer.is_full) == (5, 15, True)
    buffer.reset()
    assert (len(buffer), buffer.num_transitions, buffer.is_full) == (0, 0, False)


def test_get_refuses_at_the_call_until_all_that_was_added_is_computed():
    buffer = make()
    for look in (buffer.get, lambda: buffer.explained_variance):
        with pytest.raises(InvalidInput, match=r"needs compute_returns_and_advantages\(\)"):
            look()
    fill(buffer, steps=2)
    buffer.compute_returns_and_advantages(np.ones(3))
    assert len(list(buffer.get(3))) == 2
    buffer.add(**step_of(2))
    for look in (buffer.get, lambda: buffer.explained_variance):
        with pytest.raises(InvalidInput, match=r"needs compute_returns_and_advantages\(\)"):
            look()
    buffer.compute_returns_and_advantages(np.ones(3))
    assert len(list(buffer.get(3))) == 3
    buffer.reset()
    with pytest.raises(InvalidInput, match=r"needs compute_returns_and_advantages\(\)"):
        buffer.get()
    with pytest.raises(InvalidInput, match="no step"):
        buffer.compute_returns_and_advantages(np.ones(3))


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (0, "batch_size must be an integer >= 1, got 0"),
        (-1, "batch_size must be an integer >= 1, got -1"),
        (2.0, "batch_size must be an integer >= 1, got 2.0"),
        (16, "batch_size is 16, but the rollout has 15 steps"),
    ],
)
def test_a_wrong_batch_size_is_refused_at_the_call(batch_size, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        filled().get(batch_size)


@pytest.mark.parametrize("started", [True, False])
def test_an_epoch_does_not_go_on_over_another_rollout(started):
    buffer = filled()
    epoch = buffer.get(4)
    if started:
        next(epoch)
    buffer.reset()
    fill(buffer)
    buffer.compute_returns_and_advantages(np.ones(3))
    with pytest.raises(InvalidInput, match=r"has changed since get\(\)"):
        next(epoch)


def test_a_full_rollout_takes_no_step_and_says_what_to_do():
    buffer = filled()
    expected = list(buffer.get(4, False))
    with pytest.raises(
        InvalidInput, match=r"compute_returns_and_advantages\(\), get\(\), then reset\(\).*restart_when"
    ):
        buffer.add(**step_of(5))
    assert len(buffer) == 5
    assert_same_batches(buffer.get(4, False), expected)


def test_after_a_reset_the_next_rollout_owes_nothing_to_the_last():
    buffer = fill(make(), done=[1, 1, 1])
    buffer.compute_returns_and_advantages(np.ones(3))
    buffer.reset()
    fill(buffer)
    buffer.compute_returns_and_advantages(np.ones(3))
    assert_same_batches(buffer.get(4, False), filled().get(4, False))


def test_with_restart_when_full_the_next_step_begins_another_rollout():
    buffer = filled(restart_when_full=True, autoreset="next_step")
    for number in range(4):
        buffer.add(**step_of(number, done=[number == 3] * 3))
    assert len(buffer) == 4
    buffer.add(**step_of(4))  # dummies
    assert buffer.num_transitions == 12
    buffer.add(**step_of(0))
    assert (len(buffer), buffer.num_transitions) == (1, 3)
    buffer.compute_returns_and_advantages(np.ones(3))
    assert actions_of(buffer.get(shuffle=False)) == [[0, 1, 2]]


BAD_STEPS = [
    ({"obs": np.zeros((3, 3))}, "obs has shape"),
    ({"obs": np.full((3, 2), np.nan)}, "obs is nan"),
    ({"action": np.zeros(2, int)}, "action has shape"),
    ({"action": np.zeros(3)}, "action has dtype float64"),
    ({"reward": [0, 0]}, "reward has shape"),
    ({"reward": [0, np.inf, 0]}, "reward is inf"),
    ({"done": [2, 0, 0]}, "done must be"),
    ({"value": np.zeros((3, 2))}, "value has shape"),
    ({"value": [np.nan, 0, 0]}, "value is nan"),
    ({"log_prob": 0.0}, "log_prob has shape"),
    ({"log_prob": [0, 0, np.nan]}, "log_prob is nan"),
    ({"truncated": [1, 0]}, "truncated has shape"),
    ({"terminated": [1, 0]}, "terminated has shape"),
    ({"final_values": [0, 0]}, "final_values has shape"),
    ({"mask": [[1, 0, 0]]}, "mask has shape"),
    ({"metrics": {"y": [0, 0, 0]}}, "metrics has keys ['y']"),
    ({"metrics": {"x": [0, np.nan, 0]}}, "x[1] is nan"),
    ({"done_reasons": {"fell": [0, 0]}}, "fell has shape"),
]


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("changes", "message"), BAD_STEPS, ids=[message for _, message in BAD_STEPS])
def test_a_bad_step_is_refused_by_name_and_nothing_has_changed(changes, message, restarts):
    tracker = StatsTracker(3, extra_metrics_keys=["x"], done_reason_keys=["fell"])
    buffer = make(stats_tracker=tracker, restart_when_full=True, autoreset="next_step", gamma=0.9)
    fill(buffer, steps=5 if restarts else 2)
    buffer.compute_returns_and_advantages(np.ones(3))
    before, expected = (len(buffer), buffer.num_transitions, buffer.is_full), list(buffer.get(4, False))
    bad = step_of(50, done=[1, 1, 1], reward=[9, 9, 9]) | changes
    with pytest.raises(InvalidInput, match=re.escape(message)):
        buffer.add(**bad)
    assert (len(buffer), buffer.num_transitions, buffer.is_full) == before
    assert_same_batches(buffer.get(4, False), expected)
    assert tracker.get_statistics() == {}
    buffer.add(**step_of(5, done=[1, 1, 1], reward=[0, 0, 0]))
    assert buffer.num_transitions == (3 if restarts else 9)  # no end was remembered, so these are no dummies
    num_steps = 6 if restarts else 3
    assert tracker.get_raw_values()["lengths"] == [num_steps] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1],), "last_values has shape (2,), expected (3,)"),
        (([1, np.nan, 1],), "last_values is nan"),
        (([1, 1, 1], [0]), "last_dones has shape (1,), expected (3,)"),
        (([1, 1, 1], [0, 0, 5]), "last_dones must be bool, 0 or 1"),
    ],
)
def test_bad_arguments_of_compute_are_refused_by_name_and_nothing_has_changed(arguments, message):
    buffer = filled()
    expected = list(buffer.get(4, False))
    with pytest.raises(InvalidInput, match=re.escape(message)):
        buffer.compute_returns_and_advantages(*arguments)
    assert_same_batches(buffer.get(4, False), expected)


def test_metrics_without_a_tracker_are_refused():
    for extra in ({"metrics": {"x": [0, 0, 0]}}, {"done_reasons": {"fell": [0, 0, 0]}}):
        buffer = make()
        with pytest.raises(InvalidInput, match="need a stats_tracker"):
            buffer.add(**step_of(0), **extra)
        assert len(buffer) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 0}, "buffer_size must be an integer >= 1, got 0"),
        ({"num_envs": 0}, "num_envs must be an integer >= 1, got 0"),
        ({"obs_shape": None}, "expected either obs_shape and action_shape or"),
        ({"observation_space": spaces.Discrete(2)}, "expected either obs_shape and action_shape or"),
        ({"obs_shape": (0,)}, "obs_shape is (0,)"),
        ({"obs_dtype": "complex64"}, "obs_dtype: dtype 'complex64'"),
        ({"gamma": 1.5}, "gamma must be in 0..1, got 1.5"),
        ({"gae_lambda": -1}, "gae_lambda must be in 0..1, got -1"),
        ({"stats_tracker": StatsTracker(2)}, "stats_tracker is for 2 environments, not for 3"),
        ({"seed": -1}, "seed must be an integer >= 0 or None, got -1"),
        ({"seed": "x"}, "seed must be an integer >= 0 or None, got 'x'"),
        ({"autoreset": "sometimes"}, "autoreset 'sometimes' is unknown"),
    ],
)
def test_a_wrong_argument_of_the_constructor_is_refused_by_name(options, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        make(**options)


# Files.


def test_a_loaded_rollout_goes_on_where_the_saved_one_stopped(tmp_path):
    options = {"seed": 4, "autoreset": "next_step"}
    saved, loaded = make(**options), make(**options | {"seed": 5})
    fill(saved, 3, done=[False, True, False], truncated=[False, True, False])
    saved.save(tmp_path / "rollout")
    loaded.load(tmp_path / "rollout")
    assert (len(saved), saved.num_transitions) == (len(loaded), loaded.num_transitions)
    for buffer in (saved, loaded):
        for number in (3, 4):
            buffer.add(**step_of(number))
        buffer.compute_returns_and_advantages(np.ones(3))
    for _ in range(2):  # the permutations too
        assert_same_batches(saved.get(4), loaded.get(4))


def test_a_computed_rollout_is_loaded_as_a_computed_one(tmp_path):
    saved, loaded = filled(seed=4), make(seed=5)
    saved.save(tmp_path / "rollout")
    loaded.load(tmp_path / "rollout")
    assert loaded.is_full
    assert loaded.explained_variance == saved.explained_variance
    assert_same_batches(saved.get(4), loaded.get(4))
    fill(make()).save(tmp_path / "rollout")
    loaded.load(tmp_path / "rollout")
    with pytest.raises(InvalidInput, match="compute_returns_and_advantages"):
        loaded.get(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.5}, "was saved with gamma 0.99, this buffer has 0.5"),
        ({"num_envs": 2}, "was saved with rollout_layout"),
        ({"autoreset": "next_step"}, "was saved with autoreset None, this buffer has next_step"),
    ],
)
def test_a_file_of_another_rollout_is_refused_and_changes_nothing(tmp_path, options, message):
    filled().save(tmp_path / "rollout")
    buffer = make(**options)
    fill(buffer, 2)
    with pytest.raises(InvalidInput, match=message):
        buffer.load(tmp_path / "rollout")
    (tmp_path / "garbage").write_bytes(b"no file of ours")
    with pytest.raises(InvalidInput, match="is not a file that a buffer saved"):
        buffer.load(tmp_path / "garbage")
    assert len(buffer) == 2


# GPUs.


@needs_cuda
@pytest.mark.parametrize("store_device", [None, "cpu", "cuda"])
def test_on_a_gpu_the_batches_are_those_of_the_cpu(store_device):
    expected = filled(seed=3, normalize_advantages=True)
    buffer = filled(seed=3, normalize_advantages=True, device="cuda", store_device=store_device)
    for mine, theirs in zip(buffer.get(4), expected.get(4), strict=True):
        for name in RolloutBatch.__slots__:
            assert getattr(mine, name).device.type == "cuda"
            torch.testing.assert_close(getattr(mine, name).cpu(), getattr(theirs, name))


@needs_cuda
def test_the_next_rollout_may_be_written_while_batches_of_a_gpu_store_are_still_used():
    buffer = filled(device="cuda")
    batches = list(buffer.get(4, False))
    buffer.reset()
    fill(buffer, reward=[99, 99, 99])
    assert_same_batches(
        [RolloutBatch(*(getattr(b, n).cpu() for n in RolloutBatch.__slots__)) for b in batches], filled().get(4, False)
    )


@needs_cuda
def test_tensors_on_a_gpu_are_taken_as_inputs():
    buffer = make()
    for number in range(5):
        buffer.add(**{name: torch.as_tensor(value).cuda() for name, value in step_of(number).items()})
    buffer.compute_returns_and_advantages(torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"))
    assert_same_batches(buffer.get(4, False), filled().get(4, False))
