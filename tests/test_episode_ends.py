import gymnasium
import numpy as np
import pytest
from episode_envs import EpisodePool
from gymnasium.vector import AutoresetMode

from rl_buffer.episode_ends import autoreset_mode, final_observation, num_envs_of, stated_autoreset
from rl_buffer.errors import InvalidInput


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (None, None),
        ("next_step", "next_step"),
        ("NextStep", "next_step"),
        ("SAME_STEP", "same_step"),
        ("Disabled", "disabled"),
        (AutoresetMode.NEXT_STEP, "next_step"),
        (AutoresetMode.SAME_STEP, "same_step"),
        (AutoresetMode.DISABLED, "disabled"),
    ],
)
def test_a_mode_is_known_by_its_word_or_gymnasiums_constant(given, mode):
    assert autoreset_mode(given) == mode


@pytest.mark.parametrize("given", ["", "nextstep2", "none", True, 3])
def test_an_unknown_mode_is_refused(given):
    with pytest.raises(InvalidInput, match=r"expected one of .'next_step', 'same_step', 'disabled'. or None"):
        autoreset_mode(given)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_environment_says_its_number_and_mode(mode):
    envs = gymnasium.make_vec("CartPole-v1", 3, "sync", vector_kwargs={"autoreset_mode": mode})
    assert num_envs_of(envs) == 3
    assert stated_autoreset(envs) == autoreset_mode(mode)
    envs.close()


def test_a_single_environment_is_one_that_its_caller_resets():
    env = gymnasium.make("CartPole-v1")
    assert num_envs_of(env) is None
    assert stated_autoreset(env) is None
    env.close()


@pytest.mark.parametrize("metadata", [{}, None, {"render_modes": []}, ["autoreset_mode"], {"autoreset_mode": None}])
def test_a_vector_environment_that_does_not_say_how_it_resets_is_refused(metadata):
    class Envs:
        num_envs = 4

    envs = Envs()
    envs.metadata = metadata
    with pytest.raises(InvalidInput, match=r"Envs does not say how it resets .* pass autoreset='next_step', "):
        stated_autoreset(envs)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_an_envpool_that_only_knows_its_length_is_a_vector_too(num_envs):
    pool = EpisodePool(num_envs)
    assert num_envs_of(pool) == num_envs
    with pytest.raises(InvalidInput, match="EpisodePool does not say how it resets"):
        stated_autoreset(pool)


class Episodes(gymnasium.Env):
    """Observes its step number; ends after `length` steps."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length, nested):
        number = gymnasium.spaces.Box(-1, 100, (1,))
        self.nested, self.length = nested, length
        self.observation_space = (
            gymnasium.spaces.Dict({"a": gymnasium.spaces.Dict({"b": number})}) if nested else number
        )

    def observe(self):
        number = np.array([self.step_number], np.float32)
        return {"a": {"b": number}} if self.nested else number

    def reset(self, *, seed=None, options=None):
        self.step_number = 0
        return self.observe(), {}

    def step(self, action):
        self.step_number += 1
        return self.observe(), 0.0, self.step_number == self.length, False, {}


@pytest.mark.parametrize(("nested", "path"), [(False, ""), (True, "a/b")])
def test_the_final_observation_of_same_step_environments_is_the_one_before_the_reset(nested, path):
    makers = [lambda: Episodes(2, nested), lambda: Episodes(3, nested)]
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset()
    envs.step(np.zeros(2, int))
    next_obs, _, ended, _, infos = envs.step(np.zeros(2, int))
    assert ended.tolist() == [True, False]
    returned = next_obs["a"]["b"] if nested else next_obs
    assert returned[0] == 0.0, "the reset observation"
    assert final_observation(infos, 0, path) == 2.0
    with pytest.raises(InvalidInput, match="environment 1 ended in same_step mode, but infos hold no final_obs"):
        final_observation(infos, 1, path)
    envs.close()


@pytest.mark.parametrize("infos", [None, {}, [], {"final_observation": [1]}, {"final_obs": [1]}])
def test_infos_without_final_observations_are_refused(infos):
    with pytest.raises(InvalidInput, match=r"pass the infos that step\(\) returned"):
        final_observation(infos, 0, "")
