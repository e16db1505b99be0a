"""`Crew`: what goes wrong in an actor reaches the trainer, is mended for a while, and then ends the run."""

import re
import time

import numpy as np
import pytest
import torch

import rl_buffer as rb
from actors.crew import TABLE, Crew, CrewOptions, _environment_module, replay_actor, rollout_actor
from actors.replay import Decision
from actors.rollout import Choice
from learner.script import run_script

pytestmark = pytest.mark.timeout(120)
torch.set_num_threads(1)

SPEC = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64"))
TABLES = {
    replay_actor: rb.ReplayTable(SPEC, capacity=1000),
    rollout_actor: rb.RolloutTable(SPEC, num_steps=4, num_envs=2, num_fragments=8),
}


class IdlePolicy:
    """Does nothing, of either kind."""

    def load(self, state_dict):
        pass

    def decide(self, observations):
        return Decision(np.zeros(len(observations), int))

    def choose(self, observations):
        zeros = self.values(observations)
        return Choice(zeros.astype(int), zeros, zeros)

    def values(self, observations):
        return np.zeros(len(observations), np.float32)


def idle_policy(envs, number, seed):
    return IdlePolicy()


@pytest.fixture
def crew_of(serve, connect):
    """A crew of this kind on a server of its own, with parameters published; returns both."""

    def make(run_actor, env_id, **options):
        server = serve({TABLE: TABLES[run_actor]})
        connect(server).publish_parameters({"weights": np.zeros(1)})
        options = CrewOptions(**{"num_actors": 1, "envs_per_actor": 2, "chunk_size": 1} | options)
        return Crew(server.address, env_id, options, idle_policy, run_actor), server

    return make


@pytest.mark.parametrize("run_actor", [replay_actor, rollout_actor])
def test_an_error_of_an_environment_is_told_with_its_traceback_and_too_many_end_the_run(crew_of, eventually, run_actor):
    news = []
    crew, _ = crew_of(run_actor, "crew_envs:Fails-v0", max_failures=3)

    def tend():
        before_s, lines, after_s = time.monotonic(), crew.tend(), time.monotonic()
        news.extend((before_s, after_s, line) for line in lines)

    with crew:
        crew.start()
        with pytest.raises(SystemExit) as end:
            run_script(lambda: eventually(tend, timeout_s=100.0))  # with the imports of the first start
    before_s, after_s, lines = zip(*news, strict=True)
    assert len(news) == 4  # failed, started again, failed, started again
    assert re.match(r"actor-0 \(pid \d+\) ended with exit code 1\nTraceback", lines[0])
    for text in (lines[0], lines[2], end.value.code):
        assert 'crew_envs.py", line' in text
        assert "OSError: the arm is stuck" in text
    assert lines[0].endswith("a new one starts in 0.5 s")
    assert lines[2].endswith("a new one starts in 1.0 s")
    for failed, started in ((0, 1), (2, 3)):
        assert re.fullmatch(r"actor-0 started again as pid \d+", lines[started])
        assert after_s[started] - before_s[failed] >= (0.5, 1.0)[failed // 2]
    assert end.value.code.startswith("TooManyFailures: actor-0 (pid ")
    assert end.value.code.endswith("This was failure 3 in a row; the run ends.")


def test_an_actor_that_lived_long_before_it_failed_starts_over_with_the_first_backoff(crew_of, eventually, monkeypatch):
    monkeypatch.setattr("actors.crew._HEALTHY_S", 0.0)
    monkeypatch.setattr("actors.crew._FIRST_BACKOFF_S", 0.1)
    news = []
    crew, _ = crew_of(replay_actor, "crew_envs:Fails-v0", max_failures=2)

    def failed_thrice():
        news.extend(crew.tend())
        return sum(line.endswith("a new one starts in 0.1 s") for line in news) == 3

    with crew:
        crew.start()
        eventually(failed_thrice)


@pytest.mark.parametrize("run_actor", [replay_actor, rollout_actor])
def test_actors_whose_server_is_gone_end_without_an_error_and_are_not_started_again(crew_of, eventually, run_actor):
    news = []
    crew, server = crew_of(run_actor, "crew_envs:Works-v0", num_actors=2)

    def both_write():
        assert crew.tend() == []
        return sum(one["writers"] for one in client.info()["clients"]) == 2

    def everybody_left():
        news.extend(crew.tend())
        return not crew.is_at_work

    with crew, rb.connect(server.address) as client:
        crew.start()
        eventually(both_write)
        server.stop()
        eventually(everybody_left)
    assert sorted(news) == [f"actor-{number} ended: the server is gone" for number in range(2)]


@pytest.mark.parametrize(
    ("env_id", "module"),
    [
        ("CartPole-v1", "gymnasium.envs.classic_control.cartpole"),  # "module:Class"
        ("crew_envs:Works-v0", "crew_envs"),  # the class itself
    ],
)
def test_the_module_that_defines_the_environment_is_what_a_crew_preloads_for_it(env_id, module):
    assert _environment_module(env_id) == module
