"""The learner's arithmetic by hand; whole runs are in test_scripts."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import rl_buffer as rb
from learner.apex_dqn import ApexDQN, Calibration, LearnerOptions, double_q_td_errors
from learner.evaluation import evaluate
from learner.q_network import EpsilonGreedyPolicy, QNetwork, apex_epsilons
from learner.rates import Rates
from learner.run_directory import RunDirectory


def batch_of(**fields) -> rb.ReplayBatch:
    size = len(fields["rewards"])
    nothing = torch.zeros(size)
    defaults = {
        "observations": torch.zeros(size, 4),
        "next_observations": torch.zeros(size, 4),
        "actions": torch.zeros(size, dtype=torch.int64),
        "dones": nothing,
        "truncateds": nothing.bool(),
        "terminateds": nothing.bool(),
        "discounts": torch.full((size,), 0.9),
        "n_steps": torch.ones(size, dtype=torch.int32),
        "extras": {},
        "weights": torch.ones(size),
    }
    return rb.ReplayBatch(**defaults | fields)


class Fixed(torch.nn.Module):
    """Q-values that do not depend on the observation."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, observations):
        return self.values.expand(len(observations), -1)


def test_epsilons_span_the_papers_range_over_all_environments():
    assert apex_epsilons(3) == pytest.approx([0.4**1, 0.4**4.5, 0.4**8])
    assert apex_epsilons(1) == pytest.approx([0.4])


def test_double_q_lets_the_online_network_choose_and_the_target_network_judge():
    batch = batch_of(rewards=torch.tensor([1.0, 1.0]), discounts=torch.tensor([0.5, 0.0]), actions=torch.tensor([0, 1]))
    # Online prefers action 1, whose value is 7 by the target, although the target prefers action 0.
    td_errors = double_q_td_errors(Fixed(2.0, 3.0), Fixed(10.0, 7.0), batch)
    assert td_errors.tolist() == [1.0 + 0.5 * 7.0 - 2.0, 1.0 - 3.0]


@pytest.mark.parametrize("dueling", [False, True])
def test_a_network_is_rebuilt_from_its_parameters_alone(dueling):
    network = QNetwork(4, 2, (16, 8), dueling)
    network.calibrate(torch.randn(100, 4) * 3 + 1, mean_reward=1.0, gamma=0.99)
    again = QNetwork.from_parameters(network.state_dict())
    observations = torch.randn(5, 4)
    assert torch.equal(network(observations), again(observations))


@pytest.mark.parametrize("dueling", [False, True])
def test_calibration_centres_inputs_and_starts_q_at_the_value_of_the_mean_reward(dueling):
    torch.manual_seed(0)
    network = QNetwork(4, 2, (64, 64), dueling)
    observations = torch.randn(1000, 4) * torch.tensor([0.1, 1.0, 10.0, 100.0]) + 50
    network.calibrate(observations, mean_reward=0.5, gamma=0.9)
    inputs = (observations - network.observation_mean) * network.observation_scale
    assert inputs.mean(0).abs().max() < 1e-3
    assert (inputs.std(0) - 1).abs().max() < 1e-3
    assert network(observations).mean().item() == pytest.approx(0.5 / 0.1, abs=0.3)


def test_calibration_finds_the_reward_of_a_step_in_n_step_sums():
    agent = ApexDQN(LearnerOptions(hidden_sizes=(8,)), "CartPole-v1", seed=0)
    calibration = Calibration(agent, gamma=0.9)
    n_steps = torch.tensor([1, 2, 3], dtype=torch.int32)
    rewards = 4.0 * torch.tensor([1.0, 1.9, 2.71])  # a reward of 4 per step
    taken = [calibration.take(batch_of(rewards=rewards, n_steps=n_steps)) for _ in range(16)]
    assert taken == [False] * 15 + [True]
    assert agent.online.advantage.bias.tolist() == pytest.approx([40.0, 40.0], rel=1e-5)
    assert torch.equal(agent.online.advantage.bias, agent.target.advantage.bias)


def test_an_update_follows_the_weights_and_the_target_is_copied_hard():
    options = LearnerOptions(hidden_sizes=(8,), target_period=2)
    agent = ApexDQN(options, "CartPole-v1", seed=0)
    before = [parameter.clone() for parameter in agent.online.parameters()]
    agent.update(batch_of(rewards=torch.ones(6), weights=torch.zeros(6)), env_steps=0)
    assert all(map(torch.equal, before, agent.online.parameters())), "weight 0 must not move the network"
    td_errors, loss = agent.update(batch_of(rewards=torch.ones(6)), env_steps=0)
    assert td_errors.shape == (6,)
    assert loss > 0
    assert not all(map(torch.equal, before, agent.online.parameters()))
    assert all(map(torch.equal, agent.online.state_dict().values(), agent.target.state_dict().values()))


def test_a_resumed_learner_goes_on_exactly_as_the_first_would_have():
    options = LearnerOptions(hidden_sizes=(8,), target_period=3)
    batches = [batch_of(rewards=torch.randn(6), observations=torch.randn(6, 4)) for _ in range(8)]
    first = ApexDQN(options, "CartPole-v1", seed=0)
    for batch in batches[:4]:
        first.update(batch, env_steps=100)
    second = ApexDQN(options, "CartPole-v1", seed=1)
    second.load({key: tensor.clone() for key, tensor in first.state().items()}, first.updates, first.samples)
    for batch in batches[4:]:
        first.update(batch, env_steps=100)
        second.update(batch, env_steps=100)
    assert (second.updates, second.samples) == (8, 48)
    for key, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[key]), key


def test_a_policy_is_random_before_its_first_parameters_and_then_explores_by_epsilon():
    envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    policy = EpsilonGreedyPolicy(envs, np.array([0.0, 1.0]), seed=0)
    observations = np.ones((2, 4), np.float32)
    decisions = [policy.decide(observations) for _ in range(100)]
    assert all(decision.q_taken is None for decision in decisions)
    assert 60 < sum(decision.actions.sum() for decision in decisions) < 140
    network = QNetwork(4, 2, (8,), dueling=False)
    policy.load(network.state_dict())
    best = int(network(torch.ones(1, 4)).argmax())
    decisions = [policy.decide(observations) for _ in range(100)]
    assert all(decision.actions[0] == best for decision in decisions)
    assert {int(decision.actions[1]) for decision in decisions} == {0, 1}
    for decision in decisions:
        q_values = network(torch.ones(2, 4)).detach().numpy()
        assert decision.q_taken == pytest.approx(q_values[[0, 1], decision.actions])
        assert decision.state_values == pytest.approx(q_values.max(1))
    envs.close()


def test_evaluation_plays_whole_episodes_one_per_seed_whatever_the_group():
    def act(observations):
        return (observations[:, 2] > 0).long()  # push towards the side to which the pole leans

    together = evaluate(act, "CartPole-v1", range(30))
    alone = np.concatenate([evaluate(act, "CartPole-v1", [seed]) for seed in (0, 27, 29)])
    assert together.shape == (30,)
    assert together[[0, 27, 29]].tolist() == alone.tolist()
    assert len(set(together.tolist())) > 5


def test_rates_are_of_the_last_seconds():
    rates = Rates()
    for wall_s in range(20):
        count = 10 * wall_s if wall_s < 10 else 100 * wall_s
        result = rates.update(
            {"wall_s": wall_s, "env_steps": count, "updates": 0, "inserts": count, "samples": 2 * count}
        )
    expected = {"env_steps_per_s": 100.0, "updates_per_s": 0.0, "inserts_per_s": 100.0, "samples_per_s": 200.0}
    assert result == expected


def test_metrics_keep_gaps_as_nan(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_metrics({"env_steps": 1.0, "mean_return": 2.0})
    run.append_metrics({"env_steps": 2.0, "eval_return": 3.0})
    first, second = run.metrics()
    assert (first["env_steps"], first["mean_return"]) == (1.0, 2.0)
    assert math.isnan(first["eval_return"])
    assert second["eval_return"] == 3.0
