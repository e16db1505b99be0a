"""The replay actor's loop in processes of its own, against every way in which environments reset."""

import numpy as np
import pytest
import torch
from episode_envs import (
    GAMMA,
    KINDS,
    SPEC,
    EpisodeEnvs,
    EpisodePool,
    expected_rows,
    make_envs,
    numbers_of,
    play,
    stored_rows,
    totals,
)

import rl_buffer as rb
from actors.replay import Decision, run_replay_actor

pytestmark = pytest.mark.timeout(120)
torch.set_num_threads(1)

NUM_ACTORS, E, NUM_STEPS = 2, 3, 150
TRUNCATING = ("next_step", "same_step", "disabled", "plain")
OBSERVATIONS = dict.fromkeys(KINDS, SPEC.obs) | {
    "dictionaries": {"place": rb.Field((2,)), "time": {"step": rb.Field(())}}
}


@pytest.fixture(scope="module")
def server():
    tables = {
        f"{kind}_n{n_step}": rb.ReplayTable(
            rb.TransitionSpec(obs=observations, action=SPEC.action), capacity=4096, n_step=n_step, gamma=GAMMA
        )
        for kind, observations in OBSERVATIONS.items()
        for n_step in (1, 3)
    }
    for kind in TRUNCATING:
        tables[f"{kind}_prioritized"] = rb.ReplayTable(
            SPEC, capacity=4096, sampler=rb.Prioritized(alpha=1.0, epsilon=1e-9), n_step=3, gamma=GAMMA
        )
    with rb.BufferServer(tables, stats_window=100_000) as server:
        yield server


class RandomPolicy:
    """Actions of its own generator; after NUM_STEPS it ends the actor."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.steps_left = NUM_STEPS

    def load(self, state_dict):
        pass

    def decide(self, observations):
        if not self.steps_left:
            raise TimeoutError("all steps are played")
        self.steps_left -= 1
        return Decision(self.rng.integers(1000, size=len(numbers_of(observations))))


def complete_rows(envs, n_step):
    """Transitions whose n steps have happened, or whose episode has ended."""
    return [row for row in expected_rows(envs.steps, n_step) if row[4] == n_step or row[6] or row[7]]


def what_happened(kind, actor, n_step, num_rows):
    """The same environments and actions once more, here, until so many transitions were complete."""
    policy = RandomPolicy(actor)
    played = play(kind, E, actor, actor * E, lambda observations: policy.decide(observations).actions)
    return next(envs for envs in played if len(complete_rows(envs, n_step)) >= num_rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_step", [1, 3])
def test_every_transition_that_happened_is_stored_once_and_no_other(server, client, children, eventually, kind, n_step):
    address, table = server.address, f"{kind}_n{n_step}"
    before = totals(client.stats())
    for actor in range(NUM_ACTORS):
        children.start(
            f"actor-{actor}",
            lambda actor=actor: run_replay_actor(
                address,
                lambda: make_envs(kind, E, actor, actor * E),
                lambda envs: RandomPolicy(actor),
                name=f"actor-{actor}",
                table=table,
                autoreset="next_step" if kind == "envpool" else None,
                chunk_size=2 * E,
            ),
        )
    while children.pids:
        for ended in eventually(children.reap):
            assert ended.traceback.endswith("TimeoutError: all steps are played\n")
    eventually(lambda: len(client.info()["clients"]) == 1)  # then nothing of theirs is under way

    rows = stored_rows(client, table)
    finished, flags = [], set()
    for actor in range(NUM_ACTORS):
        own = [row for row in rows if row[0][0] // E == actor]
        truth = what_happened(kind, actor, n_step, len(own))
        assert len(own) > NUM_STEPS * truth.num_envs / 2
        assert own == complete_rows(truth, n_step)
        finished += truth.finished
        flags |= {steps[-1][2:] for steps in truth.steps.values() if len(steps) == n_step}
    assert flags >= {(True, False), (False, True)}  # both ends came exactly with the last step of a window
    assert totals(client.stats()) - before == pytest.approx([len(finished), *np.sum(finished, axis=0)])


class ValuePolicy(RandomPolicy):
    """Knows Q and V, both functions of the observation (env, episode, step)."""

    Q_TAKEN = -100.0

    def values(self, observations):
        return numbers_of(observations) @ np.array([1.0, 0.25, 2.0], np.float32)

    def decide(self, observations):
        actions = super().decide(observations).actions
        return Decision(actions, np.full(len(actions), self.Q_TAKEN, np.float32), self.values(observations))


@pytest.mark.parametrize("kind", TRUNCATING)
def test_every_step_gets_its_td_error_as_priority_those_before_a_truncation_too(
    server, client, children, eventually, kind
):
    address, table = server.address, f"{kind}_prioritized"
    children.start(
        "actor",
        lambda: run_replay_actor(
            address, lambda: make_envs(kind, E, 0), lambda envs: ValuePolicy(0), name="actor", table=table, chunk_size=8
        ),
    )
    (ended,) = eventually(children.reap)
    assert ended.traceback.endswith("TimeoutError: all steps are played\n")
    batch = client.sampler(table, batch_size=4000, beta=1.0, prefetch=0).sample()
    values = torch.from_numpy(ValuePolicy(0).values(batch.next_observations.numpy()))
    td_errors = batch.rewards + batch.discounts * values - ValuePolicy.Q_TAKEN
    assert td_errors.min() > 1
    bootstrapped = batch.truncateds & ~batch.terminateds
    assert bootstrapped.sum() > 100
    # Weights at beta = 1 are the smallest mass over each item's.
    torch.testing.assert_close(batch.weights * td_errors, td_errors.min().expand(4000), rtol=1e-4, atol=1e-4)


class NumberedPolicy:
    """Its action is what the learner published, 0 before."""

    def __init__(self):
        self.number = 0

    def load(self, state_dict):
        self.number = int(state_dict["number"])

    def decide(self, observations):
        return Decision(np.full(len(observations), self.number))


def test_an_actor_acts_before_there_are_parameters_and_then_follows_the_newest(server, client, children, eventually):
    address = server.address
    children.start(
        "actor",
        lambda: run_replay_actor(
            address,
            lambda: EpisodeEnvs(E, "next_step"),
            lambda envs: NumberedPolicy(),
            name="actor",
            table="next_step_n1",
        ),
    )
    for number in range(3):
        if number:
            client.publish_parameters({"number": torch.tensor(number)})
        eventually(lambda number=number: any(row[1] == number for row in stored_rows(client, "next_step_n1")))


def test_a_writer_is_told_how_an_envpool_resets_or_refuses_it(client):
    pool = EpisodePool(E)
    with pytest.raises(rb.InvalidInput, match=r"EpisodePool does not say how it resets.*pass autoreset='next_step'"):
        client.writer("envpool_n1", envs=pool)
    with client.writer("envpool_n1", envs=pool, autoreset="next_step") as writer:
        assert (writer.num_envs, writer.autoreset) == (E, "next_step")


def test_environments_that_do_not_say_how_they_reset_end_the_actor_with_the_way_out(server, children, eventually):
    address = server.address
    children.start(
        "actor",
        lambda: run_replay_actor(
            address, lambda: EpisodePool(E), lambda envs: RandomPolicy(0), name="actor", table="envpool_n1"
        ),
    )
    (ended,) = eventually(children.reap)
    assert "EpisodePool does not say how it resets" in ended.traceback
