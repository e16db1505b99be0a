"""`ActorEnvs`: what was acted on, what came of it, and what is acted on next, for every kind of environment."""

import gymnasium as gym
import numpy as np
import pytest
from episode_envs import KINDS, EpisodeEnv, EpisodeEnvs, EpisodePool, make_envs, numbers_of
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rl_buffer as rb
from actors.environments import ActorEnvs

MODES = ("next_step", "same_step", "disabled")
E = 3
MODE_OF = {mode: mode for mode in MODES} | {"dictionaries": "same_step", "plain": "disabled", "envpool": "next_step"}


def actor_envs(kind):
    return ActorEnvs(make_envs(kind, E, seed=5), "next_step" if kind == "envpool" else None)


def gymnasium_envs(mode, **options):
    """Gymnasium's own vector of plain environments."""
    makers = [lambda env=env: EpisodeEnv(seed=env, first_env=env, **options) for env in range(E)]
    return SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode[mode.upper()])


@pytest.mark.parametrize("kind", KINDS)
def test_writers_and_policies_find_what_they_ask_a_vector_environment_for(kind):
    with actor_envs(kind) as envs:
        assert envs.num_envs == (1 if kind == "plain" else E)
        assert envs.autoreset == envs.metadata["autoreset_mode"] == MODE_OF[kind]
        assert envs.single_action_space == gym.spaces.Discrete(1000)
        is_dictionary = isinstance(envs.single_observation_space, gym.spaces.Dict)
        assert is_dictionary == (kind == "dictionaries")


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_goes_on_from_the_last_one_or_begins_an_episode(kind):
    num_truncated = 0
    with actor_envs(kind) as envs:
        envs.reset()
        ended_before = np.zeros(envs.num_envs, bool)
        for _ in range(50):
            step = envs.step(np.zeros(envs.num_envs, int))
            acted_on, came, follows = map(
                numbers_of, (step.observations, envs.final_observations(step), envs.observations)
            )
            ended = step.terminated | step.truncated
            assert np.array_equal(step.ended, ended)
            is_known = ~ended | step.truncated | (envs.autoreset != "same_step")  # else it is a reset observation
            happened = ~ended_before | (envs.autoreset != "next_step")
            assert np.array_equal(came[happened & is_known], (acted_on + [0, 0, 1])[happened & is_known])
            assert np.array_equal(follows[~ended], came[~ended])
            if envs.autoreset != "next_step":
                assert np.array_equal(follows[ended], (acted_on * [1, 1, 0] + [0, 1, 0])[ended])
            ended_before = ended
            num_truncated += np.count_nonzero(step.truncated)
    assert num_truncated > 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dictionaries", [False, True])
def test_a_step_stays_as_it_was_where_environments_hand_out_one_buffer_again_and_again(mode, dictionaries):
    with ActorEnvs(gymnasium_envs(mode, dictionaries=dictionaries)) as envs:
        envs.reset(seed=0)
        before, steps = [], []
        for _ in range(30):
            acted_on = numbers_of(envs.observations).copy()
            steps.append(envs.step(np.zeros(E, int)))
            before.append((acted_on, *map(np.copy, map(numbers_of, steps[-1][1:-1]))))
            finals = numbers_of(envs.final_observations(steps[-1]))
            if mode != "next_step":
                is_known = steps[-1].truncated | ~steps[-1].ended | (mode == "disabled")
                assert np.array_equal(finals[is_known], (acted_on + [0, 0, 1])[is_known])
    for then, step in zip(before, steps, strict=True):
        for was, now in zip(then, step[:-1], strict=True):
            assert np.array_equal(was, numbers_of(now))


def test_a_reset_that_clears_the_flags_which_the_environments_handed_out_does_not_clear_those_of_the_step():
    class Clearing(EpisodeEnvs):
        def step(self, actions):
            self.handed_out = super().step(actions)
            return self.handed_out

        def reset(self, **given):
            for array in getattr(self, "handed_out", ())[1:4]:
                array[:] = 0
            return super().reset(**given)

    with ActorEnvs(Clearing(E, "disabled")) as envs:
        envs.reset()
        for _ in range(30):
            step = envs.step(np.zeros(E, int))
            histories = [envs.envs.steps[env, episode] for env, episode, _ in step.observations.astype(int).tolist()]
            told = zip(*(history[-1][1:] for history in histories), strict=True)
            for expected, column in zip(told, (step.rewards, step.terminated, step.truncated), strict=True):
                assert column.tolist() == list(expected)


def test_what_is_given_counts_more_than_what_environments_say_of_themselves():
    envs = EpisodeEnvs(E, "same_step")
    envs.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with ActorEnvs(envs, AutoresetMode.SAME_STEP) as actor:
        assert actor.autoreset == "same_step"
    with ActorEnvs(EpisodeEnv(), "next_step") as actor:  # then its vector of one resets so
        actor.reset()
        steps = [actor.step(np.zeros(1, int)) for _ in range(20)]
    ends = [i for i, step in enumerate(steps[:-1]) if step.ended]
    assert ends
    for i in ends:
        assert numbers_of(steps[i + 1].observations)[0, 2] > 0
        assert numbers_of(steps[i + 1].next_observations)[0, 2] == 0


def test_a_vector_that_does_not_say_how_it_resets_is_refused():
    with pytest.raises(rb.InvalidInput, match=r"EpisodePool does not say how it resets.*pass autoreset='next_step'"):
        ActorEnvs(EpisodePool(E))


def test_a_seed_reaches_the_environments_and_without_one_they_get_no_argument():
    class Seeded(EpisodeEnvs):
        def reset(self, **given):
            self.given = given
            return super().reset()

    with ActorEnvs(Seeded(E, "next_step")) as envs:
        envs.reset(seed=7)
        assert envs.envs.given == {"seed": 7}
        envs.reset()
        assert envs.envs.given == {}


def test_environments_are_closed_however_the_block_ends():
    class Closing(EpisodeEnvs):
        def close(self):
            self.is_closed = True

    envs = Closing(E, "next_step")
    with pytest.raises(KeyError), ActorEnvs(envs):
        raise KeyError
    assert envs.is_closed
