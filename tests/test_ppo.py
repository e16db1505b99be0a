"""PPO's losses by hand, and that its updates, files and actors do what they say."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import rl_buffer as rb
from actors.crew import CrewOptions
from learner.actor_critic import ActorCritic, SamplingPolicy
from learner.networks import ActionScale
from learner.ppo import (
    PPO,
    LearnerOptions,
    TableOptions,
    clipped_policy_loss,
    ppo_table,
    value_loss,
    vector_inputs_and_actions,
)

torch.set_num_threads(1)


def test_the_policy_loss_stops_counting_where_the_ratio_has_gone_far_enough_in_the_right_direction():
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    # min(r A, clip(r) A): 1.2, -1.5, 0.5, -0.8
    loss = clipped_policy_loss(ratios.log(), advantages, clip_range=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)


@pytest.mark.parametrize(("clip_range", "expected"), [(None, 0.5 * 1.0), (0.5, 0.5 * 1.5**2)])
def test_a_value_that_ran_away_from_the_old_one_is_judged_by_the_worse_of_both(clip_range, expected):
    values, old_values, returns = torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([4.0])
    assert value_loss(values, old_values, returns, clip_range).item() == pytest.approx(expected)


PENDULUM = ActionScale(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))


@pytest.mark.parametrize("actions", [3, PENDULUM])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_network_is_known_by_its_parameters(actions, normalize):
    network = ActorCritic(4, actions, (8, 5), normalize_observations=normalize, normalize_rewards=normalize)
    network.count(torch.randn(20, 4) * 3 + 1, torch.randn(20) * 5)
    twin = ActorCritic.from_parameters(network.state_dict())
    observations, generators = torch.rand(7, 4), [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(network.greedy(observations), twin.greedy(observations))
    for one, other in zip(
        network.sample(observations, generators[0]), twin.sample(observations, generators[1]), strict=True
    ):
        assert torch.equal(one, other)


def test_the_greedy_action_is_the_likeliest():
    network, observations = ActorCritic(4, 3, (8, 5)), torch.rand(7, 4)
    assert torch.equal(network.greedy(observations), network(observations)[0].probs.argmax(1))
    network = ActorCritic(4, PENDULUM, (8, 5))
    assert torch.equal(network.greedy(observations), network.to_environment(network(observations)[0].mean))


def test_normalized_observations_and_values_are_those_of_the_same_network_in_other_units():
    plain, normalized = (
        ActorCritic(2, 3, (8,)),
        ActorCritic(2, 3, (8,), normalize_observations=True, normalize_rewards=True),
    )
    normalized.load_state_dict(plain.state_dict(), strict=False)
    observations, returns = torch.randn(50, 2) * torch.tensor([3.0, 0.1]) + 7, torch.randn(50) * 20
    normalized.count(observations, returns)
    standardized = (observations - observations.mean(0)) / observations.std(0, correction=0)
    distribution, values = normalized(observations)
    expected, expected_values = plain(standardized)
    assert torch.allclose(distribution.logits, expected.logits, atol=1e-4)
    assert torch.allclose(values, expected_values * returns.std(correction=0), rtol=1e-4, atol=1e-3)


def test_continuous_actions_are_normal_and_what_the_environment_gets_is_cut_off_and_scaled():
    network = ActorCritic(1, PENDULUM, (4,))
    with torch.no_grad():
        network.actor[-1].weight.zero_()
        network.actor[-1].bias.copy_(torch.tensor([0.5, -0.25]))
        network.log_std.copy_(torch.tensor([0.5, 2.0]).log())
    policy = SamplingPolicy(seed=0)
    policy.load(network.state_dict())
    num = 20_000
    choice = policy.choose(np.zeros((num, 1), np.float32))
    assert choice.actions.mean(0) == pytest.approx([0.5, -0.25], abs=5 * 2.0 / math.sqrt(num))
    assert choice.actions.std(0) == pytest.approx([0.5, 2.0], rel=5 / math.sqrt(2 * num))
    density = torch.distributions.Normal(torch.tensor([0.5, -0.25]), torch.tensor([0.5, 2.0]))
    assert choice.log_probs == pytest.approx(density.log_prob(torch.from_numpy(choice.actions)).sum(1), abs=1e-4)
    expected = [0.0, 5.0] + np.clip(choice.actions, -1, 1) * [2.0, 5.0]
    assert choice.env_actions == pytest.approx(expected, abs=1e-5)


def test_the_policy_draws_as_often_as_its_probabilities_say_and_tells_their_logarithms():
    network = ActorCritic(1, 3, (4,))
    with torch.no_grad():
        network.actor[-1].weight.zero_()
        network.actor[-1].bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    policy = SamplingPolicy(seed=0)
    policy.load(network.state_dict())
    choice = policy.choose(np.zeros((20_000, 1), np.float32))
    shares = np.bincount(choice.actions, minlength=3) / 20_000
    assert shares == pytest.approx([0.2, 0.3, 0.5], abs=5 * math.sqrt(0.25 / 20_000))
    assert choice.log_probs == pytest.approx(np.log([0.2, 0.3, 0.5])[choice.actions], rel=1e-5)
    assert choice.values == pytest.approx(policy.values(np.zeros((20_000, 1), np.float32)))


class Bandit:
    """A rollout whose action 1 is always better, as `Rollouts` hands it out."""

    num_transitions = 64
    explained_variance = 0.0
    discounted_returns = torch.zeros(64)

    def __init__(self, network):
        self.observations = torch.rand(64, 4)
        with torch.no_grad():
            distribution, self.values = network(self.observations)
        self.actions = torch.arange(64) % 2
        self.log_probs = Categorical(logits=distribution.logits).log_prob(self.actions)

    def get(self, batch_size=64, shuffle=True, normalize_advantages=False):
        advantages = self.actions * 2.0 - 1.0
        mask = torch.ones(64, dtype=torch.bool)
        yield rb.RolloutBatch(
            self.observations, self.actions, self.values, self.log_probs, advantages, self.values + 1, mask
        )


def agent(**options):
    return PPO(LearnerOptions(**options), "CartPole-v1", seed=3)


def test_an_update_makes_better_actions_likelier_and_values_truer():
    ppo = agent(num_epochs=10)
    rollout = Bandit(ppo.policy)
    before = ppo.policy(rollout.observations)
    measured = ppo.update(rollout, rollout.discounted_returns, env_steps=0)
    after = ppo.policy(rollout.observations)
    assert (after[0].probs[:, 1] > before[0].probs[:, 1]).all()
    target = rollout.values + 1
    assert ((after[1] - target) ** 2).mean() < ((before[1] - target) ** 2).mean()
    assert (ppo.updates, ppo.samples) == (1, 64)
    assert set(measured) == set(PPO.measures)


def test_no_step_is_made_at_the_end_of_the_annealing():
    ppo = agent(max_env_steps=100)
    before = {key: value.clone() for key, value in ppo.policy.state_dict().items()}
    ppo.update(Bandit(ppo.policy), torch.zeros(64), env_steps=100)
    assert all(torch.equal(before[key], value) for key, value in ppo.policy.state_dict().items())


def test_a_policy_that_moved_far_enough_ends_its_epochs():
    distances = []
    for target_kl in (1e-9, None):
        ppo = agent(num_epochs=30, target_kl=target_kl)
        rollout = Bandit(ppo.policy)
        before = ppo.policy(rollout.observations)[0].probs
        ppo.update(rollout, rollout.discounted_returns, env_steps=0)
        distances.append((ppo.policy(rollout.observations)[0].probs - before).abs().mean().item())
    assert distances[0] < distances[1] / 3


def test_a_resumed_learner_goes_on_exactly_as_the_first_would_have():
    first = agent(num_epochs=2)
    rollout = Bandit(first.policy)
    first.update(rollout, rollout.discounted_returns, 0)
    resumed = agent(num_epochs=2)
    # Copies, as a file makes them.
    state = {key: value.clone() for key, value in first.state().items()}
    resumed.load(state, first.updates, first.samples)
    for ppo in (first, resumed):
        ppo.update(rollout, rollout.discounted_returns, 0)
    for key, value in first.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[key])


def test_synchronous_actors_have_one_round_of_fragments_and_asynchronous_ones_more():
    spec = rb.TransitionSpec(obs=rb.Field((4,)), action=rb.Field((), "int64"))
    crew = CrewOptions(num_actors=3, envs_per_actor=2)
    table = ppo_table(TableOptions(), crew, spec)
    assert (table.num_envs, table.max_version_lag, table.num_fragments, table.fragments_per_update) == (2, 0, 3, 3)
    assert ppo_table(TableOptions(asynchronous=True), crew, spec).num_fragments == 9


def test_what_no_policy_is_there_for_is_refused():
    with pytest.raises(
        rb.InvalidInput, match="PPO needs Box observations and Discrete or Box actions; FrozenLake-v1 h"
    ):
        vector_inputs_and_actions("FrozenLake-v1")


@pytest.mark.parametrize("num_updates", [1, 3])
def test_every_step_is_counted_once_and_the_first_rollout_before_it_is_learned_from(num_updates):
    ppo = PPO(LearnerOptions(num_epochs=1, normalize_observations=True, normalize_rewards=True), "CartPole-v1", seed=3)
    rollout = Bandit(ppo.policy)
    for _ in range(num_updates):
        ppo.update(rollout, torch.arange(64) * 2.0, env_steps=0)
    moments = ppo.policy.observation_moments
    assert moments.count == 64 * num_updates
    assert torch.allclose(moments.mean.float(), rollout.observations.mean(0), atol=1e-6)
    assert ppo.policy.value_unit.item() == pytest.approx(np.arange(64).std() * 2.0)
