"""The algorithms by the names that --algo knows: what each is made of, and what suits an environment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import rl_buffer as rb
from actors.crew import ActorArguments, CrewOptions, MakePolicy, replay_actor, rollout_actor
from learner import apex_dqn, ppo, sac
from learner.actor_critic import ActorCritic, sampling_policies
from learner.agent import Agent, PolicyNetwork
from learner.q_network import QNetwork, epsilon_greedy_policies
from learner.session import Session

AlgorithmName = Literal["apex", "ppo", "sac"]
Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]  # environment -> group of options -> option -> value


@dataclass(frozen=True)
class Algorithm:
    """What the scripts need of an algorithm, in the order in which a run needs it."""

    env: str  # environment that its defaults suit
    crew: Callable[[], CrewOptions]  # groups of options, ...
    table: Callable[[], Any]
    learner: Callable[[], Any]
    check_env: Callable[[str], object]  # raises InvalidInput, before anything is started
    # (table options, crew options, spec, seed)
    make_table: Callable[[Any, CrewOptions, rb.TransitionSpec, int], rb.ReplayTable | rb.RolloutTable]
    run_actor: Callable[[ActorArguments], None]
    make_policies: Callable[[int, int], MakePolicy]  # (actors of the whole run, environments of each)
    agent: type[Agent]  # (learner options, environment, seed)
    train: Callable[[Any, Session], None]
    network: type[PolicyNetwork]
    presets: Presets = field(default_factory=dict)


ALGORITHMS: Mapping[AlgorithmName, Algorithm] = {
    "apex": Algorithm(
        env="CartPole-v1",
        crew=CrewOptions,
        table=apex_dqn.TableOptions,
        learner=apex_dqn.LearnerOptions,
        check_env=apex_dqn.vector_inputs_and_discrete_actions,
        make_table=lambda table, crew, spec, seed: apex_dqn.apex_table(table, spec, seed),
        run_actor=replay_actor,
        make_policies=epsilon_greedy_policies,
        agent=apex_dqn.ApexDQN,
        train=apex_dqn.train,
        network=QNetwork,
        presets={
            "Acrobot-v1": {
                "table": {"min_size": 10_000},
                "learner": {"learning_rate_steps": 100_000, "eval_period": 4_000},
            },
            "LunarLander-v3": {
                "table": {"min_size": 10_000, "capacity": 200_000},
                "learner": {
                    "max_env_steps": 500_000,
                    "learning_rate": 5e-4,
                    "learning_rate_steps": 500_000,
                    "hidden_sizes": (256, 256),
                    "eval_period": 10_000,
                },
            },
        },
    ),
    "ppo": Algorithm(
        env="CartPole-v1",
        crew=CrewOptions,
        table=ppo.TableOptions,
        learner=ppo.LearnerOptions,
        check_env=ppo.vector_inputs_and_actions,
        make_table=lambda table, crew, spec, seed: ppo.ppo_table(table, crew, spec),
        run_actor=rollout_actor,
        make_policies=sampling_policies,
        agent=ppo.PPO,
        train=ppo.train,
        network=ActorCritic,
        presets={
            "Pendulum-v1": {
                "table": {"num_steps": 256, "gamma": 0.9, "gae_lambda": 0.95},
                "learner": {
                    "num_epochs": 10,
                    "normalize_observations": True,
                    "normalize_rewards": True,
                    "eval_period": 20_000,
                },
            },
        },
    ),
    "sac": Algorithm(
        env="Pendulum-v1",
        # One environment, whose every step is sent at once and made with the newest parameters.
        crew=lambda: CrewOptions(num_actors=1, envs_per_actor=1, chunk_size=1, refresh_steps=1),
        table=sac.TableOptions,
        learner=sac.LearnerOptions,
        check_env=sac.vector_inputs_and_bounded_actions,
        make_table=lambda table, crew, spec, seed: sac.sac_table(table, spec, seed),
        run_actor=replay_actor,
        make_policies=sac.sampling_policies,
        agent=sac.SAC,
        train=sac.train,
        network=sac.GaussianActor,
        presets={
            "Pendulum-v1": {
                "table": {"batch_size": 128},
                "learner": {"max_env_steps": 10_000, "learning_rate": 1e-3, "hidden_sizes": (128, 128)},
            },
        },
    ),
}
