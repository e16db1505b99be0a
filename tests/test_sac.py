"""The learner's arithmetic by hand and by integration; whole runs are in test_scripts."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import rl_buffer as rb
from learner.networks import ActionScale
from learner.run_directory import COLUMNS, RunDirectory
from learner.sac import (
    SAC,
    GaussianActor,
    LearnerOptions,
    SamplingPolicy,
    TableOptions,
    TwinCritics,
    num_updates_until,
    polyak,
    sac_table,
    soft_targets,
    squashed_log_probs,
    vector_inputs_and_bounded_actions,
)
from rl_buffer.rate_limiters import RateLimiter

PENDULUM = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((1,)))
LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])


def make_agent(seed=0, **options) -> SAC:
    return SAC(LearnerOptions(hidden_sizes=(16,), **options), "Pendulum-v1", seed)


def batch_of(size: int, **fields) -> rb.ReplayBatch:
    nothing = torch.zeros(size)
    defaults = {
        "observations": torch.zeros(size, 3),
        "next_observations": torch.zeros(size, 3),
        "actions": torch.zeros(size, 1),
        "rewards": nothing,
        "dones": nothing,
        "truncateds": nothing.bool(),
        "terminateds": nothing.bool(),
        "discounts": torch.full((size,), 0.9),
        "n_steps": torch.ones(size, dtype=torch.int32),
        "extras": {},
    }
    return rb.ReplayBatch(**defaults | fields)


# ---- the policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-2.0, 2.0)])
def test_the_density_of_squashed_actions_integrates_to_one(mean, std):
    # Over a = tanh(u) from -1 to 1, on a grid that is fine where the mass is: da = (1 - a^2) du.
    unsquashed = torch.linspace(mean - 10 * std, mean + 10 * std, 20_001, dtype=torch.float64)[:, None]
    log_std = torch.full_like(unsquashed, math.log(std))
    densities = squashed_log_probs((unsquashed - mean) / std, log_std, unsquashed).exp()
    assert torch.trapezoid(densities, torch.tanh(unsquashed)[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


def test_log_probabilities_are_those_of_torchs_transformed_normal():
    torch.manual_seed(0)
    actor = GaussianActor(3, (8,), ActionScale(LOW, HIGH))
    observations = torch.randn(50, 3)
    actions, log_probs = actor.sample(observations)
    mean, log_std = actor(observations)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    assert torch.allclose(log_probs, squashed.log_prob(actions).sum(1), atol=1e-3)


def test_log_probabilities_stay_finite_where_tanh_rounds_to_one():
    log_prob = squashed_log_probs(torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), 30.0))
    # log(1 - tanh(u)^2) tends to 2 log 2 - 2 u.
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - (2 * math.log(2) - 60.0))


def test_the_noise_of_a_sample_reaches_the_gradient_of_mean_and_deviation():
    actor = GaussianActor(3, (8,), ActionScale(LOW, HIGH))
    actions, log_probs = actor.sample(torch.randn(20, 3))
    (actions.sum() + log_probs.sum()).backward()
    assert (actor.head.weight.grad.abs().sum(1) > 0).all()


def test_actions_span_the_bounds_of_the_space_and_scaling_is_inverted():
    actor = GaussianActor(3, (8,), ActionScale(LOW, HIGH))
    corners = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])
    assert torch.equal(actor.scale(corners), torch.tensor([[-2.0, 0.0], [0.0, 5.0], [2.0, 10.0]]))
    assert torch.allclose(actor.scale.inverse(actor.scale(corners)), corners)


@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_a_network_is_rebuilt_from_its_parameters_alone(shape):
    actor = GaussianActor(3, (16, 8), ActionScale(torch.full(shape, -3.0), torch.full(shape, 1.0)))
    again = GaussianActor.from_parameters(actor.state_dict())
    observations = torch.randn(5, 3)
    assert torch.equal(actor.greedy(observations), again.greedy(observations))
    assert again.greedy(observations).shape == (5, *shape)


def test_actors_act_uniformly_before_the_first_parameters_and_then_by_the_policy():
    envs = gym.make_vec("Pendulum-v1", num_envs=100, vectorization_mode="sync")
    policy = SamplingPolicy(envs, seed=0)
    observations = np.zeros((100, 3), np.float32)
    actions = np.concatenate([policy.decide(observations).actions for _ in range(20)])
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 2
    # Of 2,000 uniform draws of a variance of 4^2 / 12: mean and variance within five standard errors.
    assert abs(actions.mean()) < 5 * (16 / 12 / 2_000) ** 0.5
    assert actions.var() == pytest.approx(16 / 12, abs=5 * 16 * (1 / 180 / 2_000) ** 0.5)

    network = GaussianActor(3, (8,), ActionScale(torch.tensor([-2.0]), torch.tensor([2.0])))
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([0.5, -1.0]))
    policy.load(network.state_dict())
    policy.load(network.state_dict())  # newer ones
    mean, log_std = (tensor.item() for tensor in network(torch.zeros(1, 3)))
    actions = np.concatenate([policy.decide(observations).actions for _ in range(20)])
    drawn = np.arctanh(actions / 2)
    assert drawn.mean() == pytest.approx(mean, abs=5 * math.exp(log_std) / 2_000**0.5)
    assert drawn.std() == pytest.approx(math.exp(log_std), rel=5 / 4_000**0.5)
    envs.close()


class Unbounded(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


def test_environments_without_bounded_box_actions_are_refused():
    gym.register("Unbounded-v0", Unbounded)
    try:
        with pytest.raises(rb.InvalidInput, match="policies scale their actions to the bounds of their space"):
            vector_inputs_and_bounded_actions("Unbounded-v0")
    finally:
        del gym.registry["Unbounded-v0"]
    with pytest.raises(rb.InvalidInput, match=r"SAC needs Box observations and Box actions; CartPole-v1 has"):
        vector_inputs_and_bounded_actions("CartPole-v1")


# ---- one update per step ---------------------------------------------------------------------------------------


def test_the_limiter_holds_learner_and_actors_together_and_ends_with_exactly_the_wanted_steps():
    options = TableOptions(min_size=50, batch_size=32, lead=4)
    table = sac_table(options, PENDULUM, seed=0)
    num_updates = num_updates_until(300, table, samples_before=0)
    assert num_updates == 250
    rng = np.random.default_rng(0)
    for eagerness in (0.1, 0.5, 0.9):  # of the actors
        limiter, updates = RateLimiter(table.rate_limiter), 0
        limiter.check_sample_possible(32)
        for _ in range(20_000):
            if rng.random() < eagerness:
                limiter.inserted(limiter.num_insertable(int(rng.integers(1, 9))))
            elif updates < num_updates and limiter.can_sample(32):
                limiter.sampled(32)
                updates += 1
            if updates:
                assert 50 + updates - 4 <= limiter.num_inserts <= 50 + updates
        assert (updates, limiter.num_inserts) == (250, 300)


def test_a_lead_at_which_both_could_wait_is_refused():
    with pytest.raises(rb.InvalidInput, match="--lead must be at least 2"):
        sac_table(TableOptions(lead=1), PENDULUM, seed=0)


# ---- the losses ------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    batch = batch_of(2, rewards=torch.tensor([1.0, 2.0]), discounts=torch.tensor([0.5, 0.0]))
    next_values = torch.tensor([[10.0, 3.0], [8.0, 4.0]])
    targets = soft_targets(batch, next_values, torch.tensor([-1.0, -2.0]), torch.tensor(0.25))
    assert targets.tolist() == [1.0 + 0.5 * (8.0 + 0.25 * 1.0), 2.0]


def test_a_truncated_step_is_bootstrapped_and_a_terminated_one_is_not():
    buffer = rb.ReplayBuffer(buffer_size=120, obs_shape=(3,), action_shape=(1,), gamma=0.9, n_step=2, seed=0)
    zeros = np.zeros(3, np.float32)
    for reward, truncated, terminated in ((1.0, False, False), (2.0, True, False), (4.0, False, True)) * 40:
        buffer.add(zeros, np.zeros(1, np.float32), reward, truncated or terminated, zeros, truncated)
    batch = buffer.get(batch_size=100)
    targets = soft_targets(batch, torch.full((2, 100), 10.0), torch.full((100,), -2.0), torch.tensor(0.5))
    # The value behind is 10 + 0.5 * 2 = 11; two steps from the first, one from the second.
    by_hand = {1.0 + 0.9 * 2.0 + 0.9**2 * 11.0, 2.0 + 0.9 * 11.0, 4.0}
    assert {round(target, 4) for target in targets.tolist()} == {round(target, 4) for target in by_hand}


def test_targets_follow_the_critics_by_polyak_averages():
    online, target = TwinCritics(3, 1, (8,)), TwinCritics(3, 1, (8,))
    before = [parameter.detach().clone() for parameter in target.parameters()]
    polyak(target, online, 0.25)
    for old, new, mean in zip(before, online.parameters(), target.parameters(), strict=True):
        assert torch.allclose(mean, 0.75 * old + 0.25 * new, atol=1e-6)


def test_an_update_moves_each_part_and_the_targets_a_little():
    agent = make_agent(tau=0.01)
    before = {key: tensor.clone() for key, tensor in agent.state().items() if "optimizer" not in key}
    td_errors, measured = agent.update(batch_of(32, rewards=torch.ones(32)))
    assert td_errors.shape == (32,)
    assert tuple(measured) == agent.measures
    assert not any(value.requires_grad for value in measured.values())
    assert (agent.updates, agent.samples) == (1, 32)
    after = agent.state()
    for part in ("policy/head.weight", "critics/critics.0.1.weight", "critics/critics.1.1.weight"):
        assert not torch.equal(before[part], after[part]), part
    change = after["targets/critics.0.1.weight"] - before["targets/critics.0.1.weight"]
    whole = after["critics/critics.0.1.weight"] - before["targets/critics.0.1.weight"]
    assert torch.allclose(change, 0.01 * whole, atol=1e-6)


def test_importance_weights_of_zero_leave_the_critics_alone():
    agent = make_agent()
    before = [parameter.clone() for parameter in agent.critics.parameters()]
    agent.update(batch_of(8, rewards=torch.ones(8), weights=torch.zeros(8)))
    assert all(map(torch.equal, before, agent.critics.parameters()))


@pytest.mark.parametrize(("target_entropy", "rises"), [(-20.0, False), (20.0, True)])
def test_the_temperature_rises_exactly_where_the_entropy_is_too_small(target_entropy, rises):
    agent = make_agent(target_entropy=target_entropy)
    before = agent.temperature().item()
    agent.update(batch_of(64))
    assert (agent.temperature().item() > before) is rises


@pytest.mark.timeout(60)
def test_a_few_hundred_updates_find_the_best_action_of_a_one_step_problem():
    agent = make_agent(learning_rate=3e-3, initial_temperature=0.1)
    rng = torch.Generator().manual_seed(0)
    for _ in range(400):
        observations = 2 * torch.rand((64, 3), generator=rng) - 1
        actions = 4 * torch.rand((64, 1), generator=rng) - 2
        rewards = -((actions[:, 0] - observations[:, 0]) ** 2)  # best: the first observation itself
        agent.update(
            batch_of(64, observations=observations, actions=actions, rewards=rewards, discounts=torch.zeros(64))
        )
    observations = torch.linspace(-0.8, 0.8, 9)[:, None].expand(-1, 3)
    errors = agent.act(observations)[:, 0] - observations[:, 0]
    assert errors.abs().max() < 0.35  # of actions in [-2, 2]; before learning it is 0.8 and more
    assert agent.temperature().item() < 0.1


def test_a_resumed_learner_goes_on_exactly_as_the_first_would_have():
    first = make_agent()
    batches = [batch_of(8, rewards=torch.randn(8), observations=torch.randn(8, 3)) for _ in range(8)]
    for batch in batches[:4]:
        first.update(batch)
    stored = {key: tensor.clone() for key, tensor in first.state().items()}
    for batch in batches[4:]:
        first.update(batch)
    second = make_agent(seed=1)
    second.load(stored, updates=4, samples=32)
    for batch in batches[4:]:
        second.update(batch)
    assert (second.updates, second.samples) == (8, 64)
    expected = first.state()
    assert second.state().keys() == expected.keys()
    for key, tensor in second.state().items():
        assert torch.equal(tensor, expected[key]), key


def test_metrics_have_a_column_for_each_of_the_algorithms_measures(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_metrics({"env_steps": 1.0, "temperature": 0.5})
    run.append_metrics({"env_steps": 2.0})
    run.append_metrics({"env_steps": 3.0, "temperature": 0.25})
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == ",".join((*COLUMNS, "temperature"))
    assert [row["temperature"] for row in run.metrics()] == pytest.approx([0.5, math.nan, 0.25], nan_ok=True)
