"""Shown to matter: what prioritized replay gains on the blind cliffwalk, and that it draws as often as it claims."""

import statistics

import numpy as np
import pytest
import torch
from test_samplers import CRITICAL_99, TD_ERRORS, chi_square_statistic

import rl_buffer as rb
from rl_buffer.row_copies import NO_WORDS, gather_rows

pytestmark = pytest.mark.timeout(60)
torch.set_num_threads(1)

# ---- the blind cliffwalk --------------------------------------------------------------------------------------
#
# Schaul et al. (2016), "Prioritized Experience Replay", section 3.1 and appendix B.1. In each of n states one of two
# actions is right, and which one alternates; a wrong one ends the episode, the last right one gives the only reward.
# The memory holds every transition of all 2^n action sequences, 2^(n+1) - 2 in random order, one of them with reward.
# Tabular Q-learning from replay: step size 1/4, gamma = 1 - 1/n, Q ~ N(0, 0.1) at first, until the mean squared error
# is below 1e-3. A batch of 16 draws is applied one after the other; each draw is an update.

LENGTH = 12
CLIFF_GAMMA = 1 - 1 / LENGTH
STEP_SIZE = 0.25
BATCH_SIZE = 16
MAX_UPDATES = 400_000


def cliffwalk():
    """Columns of all transitions of all action sequences."""
    steps = []
    for sequence in range(2**LENGTH):
        for state in range(LENGTH):
            action = sequence >> state & 1
            right, last = action == state % 2, state == LENGTH - 1
            steps.append((state, action, float(right and last), not right or last, min(state + 1, LENGTH - 1)))
            if not right:
                break
    names = ("observations", "actions", "rewards", "terminateds", "next_observations")
    return dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))


def true_values():
    values = np.zeros((LENGTH, 2))
    states = np.arange(LENGTH)
    values[states, states % 2] = CLIFF_GAMMA ** (LENGTH - 1 - states)
    return values


def updates_until_learned(kind, seed, **options):
    """Updates until the values are right, a multiple of BATCH_SIZE."""
    rng = np.random.default_rng(seed)
    columns = cliffwalk()
    order = rng.permutation(len(columns["actions"]))
    assert len(order) == 2 ** (LENGTH + 1) - 2
    shapes = {"obs_shape": (), "action_shape": (), "obs_dtype": "int64", "action_dtype": "int64"}
    buffer = kind(len(order), gamma=CLIFF_GAMMA, seed=seed, **shapes, **options)
    buffer.extend({name: column[order] for name, column in columns.items()})

    truth, values = true_values(), rng.normal(0.0, 0.1, (LENGTH, 2)).tolist()
    for num_updates in range(BATCH_SIZE, MAX_UPDATES, BATCH_SIZE):
        batch = buffer.get(BATCH_SIZE)
        fields = [batch.observations, batch.actions, batch.rewards, batch.discounts, batch.next_observations]
        weights = torch.ones(BATCH_SIZE) if batch.weights is None else batch.weights
        td_errors = []
        for obs, action, reward, discount, next_obs, weight in zip(
            *(f.tolist() for f in (*fields, weights)), strict=True
        ):
            td_errors.append(reward + discount * max(values[next_obs]) - values[obs][action])
            values[obs][action] += STEP_SIZE * weight * td_errors[-1]
        if batch.weights is not None:
            buffer.update_priorities(batch, td_errors)
        if ((np.array(values) - truth) ** 2).mean() < 1e-3:
            return num_updates
    return MAX_UPDATES


def median_updates(kind, **options):
    return statistics.median(updates_until_learned(kind, seed, **options) for seed in range(5))


@pytest.fixture(scope="module")
def uniform_updates():
    return median_updates(rb.ReplayBuffer)


# Medians of seeds 0-4: uniform 121 k updates, of seeds 0-9 from 92 k to 171 k.


def test_prioritized_replay_walks_the_cliff_with_a_quarter_of_the_updates_of_uniform(uniform_updates):
    # As in section 3.3 of the paper: fully proportional, no importance weights yet. 9.1 k, all seeds below 9.4 k; it
    # takes 8.2 k to see each transition once.
    assert uniform_updates < MAX_UPDATES
    assert median_updates(rb.PrioritizedReplayBuffer, alpha=1.0, beta=0.0) <= uniform_updates / 4


def test_the_defaults_walk_the_cliff_with_half_of_the_updates_of_uniform(uniform_updates):
    # 26 k, all seeds below 27 k: a quarter of the median, but not of every uniform run. (With full correction,
    # beta = 1, the weights hold the rare transitions back: above 200 k.)
    assert median_updates(rb.PrioritizedReplayBuffer, alpha=0.6, beta=0.4) <= uniform_updates / 2


def test_without_priorities_the_same_buffer_gains_nothing(uniform_updates):
    # The control of the tests above: alpha = 0 draws uniformly, in strata. 107 k.
    assert median_updates(rb.PrioritizedReplayBuffer, alpha=0.0, beta=0.0) > uniform_updates / 2


# ---- frequencies ----------------------------------------------------------------------------------------------
#
# Level 0.1 %, seed fixed, 100 transitions. Single draws are independent, so the statistic of 20,000 `get(1)` follows
# the chi-square distribution with 99 degrees of freedom. The draws of one batch are stratified: each transition is
# expected as often, with less variance, so that the statistic is smaller and the same bound has a level below 0.1 %.
# A wrong frequency adds (expected - right)^2 / right all the same, so the test loses no power by it.

ALPHA, EPSILON = 0.6, 0.01
NUM_DRAWS = 20_000
SHUFFLED = np.random.default_rng(1).permutation(TD_ERRORS)  # neighbours differ, so a row off by one shows


def prioritized_buffer(alpha=ALPHA):
    """100 transitions whose action is their number, with the priorities of SHUFFLED."""
    buffer = rb.PrioritizedReplayBuffer(
        100, obs_shape=(), action_shape=(), action_dtype="int64", alpha=alpha, epsilon=EPSILON, seed=0
    )
    zeros = np.zeros(100)
    columns = {"observations": zeros, "rewards": zeros, "dones": zeros, "next_observations": zeros}
    buffer.extend(columns | {"actions": np.arange(100)})
    return buffer


def update_all(buffer):
    """By what batches name, as a learner does."""
    missing = set(range(100))
    while missing:
        batch = buffer.get(50)
        buffer.update_priorities(batch, SHUFFLED[batch.actions.numpy()])
        missing -= set(batch.actions.tolist())


def statistic(buffer, batch_size):
    """Chi-square distance of the drawn frequencies from (|TD| + epsilon)^alpha."""
    masses = (np.abs(SHUFFLED) + EPSILON) ** ALPHA
    actions = np.concatenate([buffer.get(batch_size).actions.numpy() for _ in range(NUM_DRAWS // batch_size)])
    return chi_square_statistic(np.bincount(actions, minlength=100), masses / masses.sum())


@pytest.mark.parametrize("batch_size", [1, 50])
def test_batches_hold_each_transition_as_often_as_its_priority_says(batch_size):
    buffer = prioritized_buffer()
    update_all(buffer)
    assert statistic(buffer, batch_size) < CRITICAL_99


def off_by_one(rows):
    return (rows + 1) % 100


def without_the_last_row(rows):
    return np.where(rows == 99, 0, rows)


def of_the_children_in_the_wrong_order(rows):
    return rows ^ 1


@pytest.mark.parametrize("batch_size", [1, 50])
@pytest.mark.parametrize("wrong", [off_by_one, without_the_last_row, of_the_children_in_the_wrong_order])
def test_the_frequency_test_rejects_wrong_rows(monkeypatch, wrong, batch_size):
    buffer = prioritized_buffer()
    update_all(buffer)
    state = buffer._state
    draw_batch = state.draw_batch

    def draw_wrong_batch(batch_size, beta, source, target):
        rows, _, weights = draw_batch(batch_size, beta, NO_WORDS, NO_WORDS)
        rows = wrong(rows)
        gather_rows(source, rows, target)
        return rows, state.generations[rows], weights

    monkeypatch.setattr(state, "draw_batch", draw_wrong_batch)
    assert statistic(buffer, batch_size) > CRITICAL_99


@pytest.mark.parametrize("batch_size", [1, 50])
@pytest.mark.parametrize("alpha", [0.45, 1.0])
def test_the_frequency_test_rejects_another_alpha(alpha, batch_size):
    buffer = prioritized_buffer(alpha)
    update_all(buffer)
    assert statistic(buffer, batch_size) > CRITICAL_99


@pytest.mark.parametrize("batch_size", [1, 50])
def test_the_frequency_test_rejects_priorities_that_were_never_updated(batch_size):
    assert statistic(prioritized_buffer(), batch_size) > CRITICAL_99
