"""`ReplaySampler` against a real server: what a learner gets, in which proportions, and never a torn row."""

import time

import child_processes as child
import numpy as np
import pytest
import torch
from child_processes import NUMBERED_SPEC, numbered_row

import rl_buffer as rb

pytestmark = pytest.mark.timeout(60)

torch.set_num_threads(1)  # the other processes need the cores
GAMMA = 0.5
SPEC = rb.TransitionSpec(
    obs={"camera": rb.Field((2, 3), "uint8"), "speed": rb.Field((), "float32")},
    action=rb.Field((2,), "float32"),
    extras={"hidden": rb.Field((5,), "float16")},
)
PLAIN_SPEC = rb.TransitionSpec(obs=rb.Field((1,), "float32"), action=rb.Field((), "int64"))
PRIORITIES = rb.Prioritized(alpha=1.0, epsilon=1e-9)  # so that a mass is |TD error|


@pytest.fixture(scope="module")
def server():
    tables = {
        "dict": rb.ReplayTable(SPEC, capacity=64, headroom=1024, gamma=GAMMA, seed=0),
        "uniform": rb.ReplayTable(PLAIN_SPEC, capacity=8, headroom=1024, gamma=GAMMA, seed=0),
        "prioritized": rb.ReplayTable(PLAIN_SPEC, capacity=8, headroom=1024, gamma=GAMMA, sampler=PRIORITIES, seed=0),
        "minimum": rb.ReplayTable(PLAIN_SPEC, capacity=8, headroom=1024, rate_limiter=rb.MinSize(4)),
        "limited": rb.ReplayTable(
            PLAIN_SPEC, 8, PRIORITIES, rate_limiter=rb.SampleToInsertRatio(1.0, 8, (0.0, 16.0)), headroom=64
        ),
        "replay": rb.ReplayTable(NUMBERED_SPEC, capacity=64, headroom=64, sampler=PRIORITIES, seed=0),
    }
    with rb.BufferServer(tables) as server:
        yield server


def add(client, name, actions, priorities=None):
    priorities = [None] * len(actions) if priorities is None else priorities
    with client.writer(name, num_envs=1, chunk_size=1) as writer:
        for action, priority in zip(actions, priorities, strict=True):
            obs = np.array([action], np.float32)
            writer.add(obs, action, action, False, obs + 1, priority=priority)


def table_info(client, name):
    return client.info()["tables"][name]


@pytest.mark.parametrize("contiguous", [False, True])
def test_batches_have_the_shapes_dtypes_and_values_of_the_spec(client, contiguous):
    rng = np.random.default_rng(0)
    obs = {"camera": rng.integers(256, size=(3, 2, 3), dtype=np.uint8), "speed": np.arange(3, dtype=np.float32)}
    next_obs = {"camera": 255 - obs["camera"], "speed": obs["speed"] + 1}
    actions, hidden = rng.random((3, 2), np.float32), rng.random((3, 5)).astype(np.float16)
    with client.writer("dict", num_envs=3, autoreset=None, chunk_size=3) as writer:
        done, truncated = [True, True, False], [False, True, False]
        writer.add(obs, actions, [1.0, 2.0, 4.0], done, next_obs, truncated, extras={"hidden": hidden})
    with client.sampler("dict", batch_size=32, contiguous=contiguous) as sampler:
        batch = sampler.sample()
    env = batch.observations["speed"].long()
    assert set(env.tolist()) == {0, 1, 2}
    expected = {
        "camera": (batch.observations["camera"], torch.from_numpy(obs["camera"])[env]),
        "speed": (batch.observations["speed"], env.float()),
        "next camera": (batch.next_observations["camera"], torch.from_numpy(next_obs["camera"])[env]),
        "next speed": (batch.next_observations["speed"], env.float() + 1),
        "actions": (batch.actions, torch.from_numpy(actions)[env]),
        "rewards": (batch.rewards, torch.tensor([1.0, 2.0, 4.0])[env]),
        "dones": (batch.dones, torch.tensor([1.0, 0.0, 0.0])[env]),
        "1 - dones": (1 - batch.dones, torch.tensor([0.0, 1.0, 1.0])[env]),
        "terminateds": (batch.terminateds, torch.tensor([True, False, False])[env]),
        "truncateds": (batch.truncateds, torch.tensor([False, True, False])[env]),
        "discounts": (batch.discounts, torch.tensor([0.0, 0.5, 0.5])[env]),
        "n_steps": (batch.n_steps, torch.ones(32, dtype=torch.int32)),
        "hidden": (batch.extras["hidden"], torch.from_numpy(hidden)[env]),
    }
    for name, (actual, wanted) in expected.items():
        assert actual.dtype == wanted.dtype, name
        assert actual.shape == wanted.shape, name
        assert torch.equal(actual, wanted), name
        assert actual.is_contiguous() or not contiguous, name
    assert not batch.observations["camera"].is_contiguous() or contiguous, "views of one row block"
    assert batch.weights is None
    assert batch.indices is None


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_draws_follow_the_priorities_and_weights_undo_them(client, prefetch):
    priorities = np.array([1.0, 2.0, 4.0, 1.0])
    add(client, "prioritized", np.arange(4), priorities)
    with client.sampler("prioritized", batch_size=800, beta=0.5, prefetch=prefetch) as sampler:
        for beta in (None, 0.0, 1.0):
            batch = sampler.sample(beta=beta)
            # One draw in each of 800 equal parts of the total 8: at most two more or less than expected.
            counts = torch.bincount(batch.actions, minlength=4).numpy()
            assert np.abs(counts - 100 * priorities).max() <= 2
            weights = (4 * priorities / 8) ** -(0.5 if beta is None else beta)
            expected = torch.from_numpy(weights / weights.max()).float()[batch.actions]
            assert batch.weights.dtype == torch.float32
            assert torch.allclose(batch.weights, expected)
        sampler.beta = 1.0
        weights = sampler.sample().weights
        assert weights.min() == pytest.approx(0.25)
        with pytest.raises(rb.InvalidInput, match=r"beta must be in \[0, 1\], got 1.5"):
            sampler.sample(beta=1.5)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda x: torch.tensor(x, requires_grad=True)[:, None]])
def test_updated_priorities_change_what_is_drawn(client, kind):
    add(client, "prioritized", np.arange(4), np.ones(4))
    with client.sampler("prioritized", batch_size=64, prefetch=0) as sampler:
        batch = sampler.sample()
        errors = [-9.0 if action == 2 else 1e-12 for action in batch.actions.tolist()]  # signed
        sampler.update_priorities(batch, kind(errors))
        assert set(sampler.sample().actions.tolist()) == {2}
        assert sampler.sample(beta=1.0).weights.tolist() == [1.0] * 64


def test_updates_of_evicted_rows_are_dropped_and_counted(client):
    add(client, "prioritized", np.arange(8), np.ones(8))
    before = table_info(client, "prioritized")["stale_updates"]
    with client.sampler("prioritized", batch_size=16, prefetch=0) as sampler:
        old = sampler.sample()
        num_evicted = int((old.actions < 4).sum())
        assert num_evicted == 8
        add(client, "prioritized", np.arange(100, 104), np.ones(4))  # evicts 0..3
        sampler.update_priorities(old, torch.full((16,), 1e9))
        counts = torch.bincount(sampler.sample().actions, minlength=104)
        assert counts[4:8].sum() == 16, "only rows that are still there became 250,000 times as likely"
        assert table_info(client, "prioritized")["stale_updates"] == before + num_evicted


def test_new_priorities_travel_with_the_credits_for_half_of_the_prefetched_batches(client, eventually):
    add(client, "prioritized", np.arange(8), np.ones(8))

    def num_updates():
        return table_info(client, "prioritized")["updates"] - before

    before = table_info(client, "prioritized")["updates"]
    with client.sampler("prioritized", batch_size=16, prefetch=6) as sampler:
        for number in range(1, 10):
            sampler.update_priorities(sampler.sample(), torch.full((16,), 1.0 + number))
            eventually(lambda expected=16 * 3 * (number // 3): num_updates() == expected)
        sampler.update_priorities(sampler.sample(), torch.ones(16))
        sampler.flush()
        eventually(lambda: num_updates() == 160)
        sampler.update_priorities(sampler.sample(), torch.ones(16))
    assert num_updates() == 176, "closing sends the rest"


@pytest.mark.parametrize(
    "errors", [np.zeros(16), torch.zeros(16), torch.zeros(16, dtype=torch.float64)], ids=["array", "float32", "float64"]
)
def test_who_reuses_his_array_of_td_errors_changes_nothing_that_was_not_sent_yet(client, errors):
    add(client, "prioritized", np.arange(4), np.ones(4))
    with client.sampler("prioritized", batch_size=16, prefetch=4) as sampler:
        batch = sampler.sample()
        is_two = batch.actions == 2
        errors[:] = is_two.numpy() if isinstance(errors, np.ndarray) else is_two
        sampler.update_priorities(batch, errors)
        errors[:] = 7.0
    with client.sampler("prioritized", batch_size=16, prefetch=0) as sampler:
        assert set(sampler.sample().actions.tolist()) == {2}


def test_priorities_do_not_wait_while_the_learner_does(client, eventually):
    add(client, "limited", np.arange(8))
    before = table_info(client, "limited")["updates"]
    with client.sampler("limited", batch_size=8, prefetch=4, timeout_s=0.2) as sampler:
        sampler.update_priorities(sampler.sample(), torch.ones(8))
        assert table_info(client, "limited")["updates"] == before, "they go with the next message"
        with pytest.raises(rb.DeadlineExceeded):
            sampler.sample()
        assert table_info(client, "limited")["updates"] == before + 8


def test_the_last_update_before_close_counts(client):
    num_refused = client.info()["num_refused"]
    for winner in range(8):
        client.clear("prioritized")
        add(client, "prioritized", np.arange(8), np.ones(8))
        with client.sampler("prioritized", batch_size=64) as sampler:
            batch = sampler.sample()
            sampler.update_priorities(batch, torch.where(batch.actions == winner, 1e9, 1e-9))
        with client.sampler("prioritized", batch_size=64) as sampler:
            assert set(sampler.sample().actions.tolist()) == {winner}
    assert client.info()["num_refused"] == num_refused


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (torch.ones(3), r"td_errors has shape \(3,\), expected \(4,\) or \(4, 1\)"),
        (torch.ones(1, 4), r"td_errors has shape \(1, 4\)"),
        (torch.tensor([1.0, 1.0, float("nan"), 1.0]), r"td_errors\[2\] is nan, expected finite"),
        (np.array([1.0, 1.0, 1.0, np.inf]), r"td_errors\[3\] is inf"),
    ],
)
def test_refused_td_errors_change_nothing(client, errors, message):
    add(client, "prioritized", np.arange(2), np.array([1.0, 3.0]))
    with client.sampler("prioritized", batch_size=4, prefetch=2) as sampler:
        batch = sampler.sample()
        with pytest.raises(rb.InvalidInput, match=message):
            sampler.update_priorities(batch, errors)
        for _ in range(4):
            assert sampler.sample().actions.tolist() == [0, 1, 1, 1]
        sampler.update_priorities(batch, torch.ones(4))


def test_a_uniform_table_has_no_weights_and_refuses_priorities(client):
    add(client, "uniform", np.arange(2))
    with client.sampler("uniform", batch_size=4) as sampler:
        batch = sampler.sample()
        assert batch.weights is None
        with pytest.raises(rb.InvalidInput, match=r"'uniform' is sampled uniformly and has no priorities"):
            sampler.update_priorities(batch, torch.ones(4))


@pytest.mark.parametrize("prefetch", [0, 4])
def test_sampling_too_few_items_ends_in_time_and_says_what_is_missing(client, prefetch):
    add(client, "minimum", np.arange(3))
    with client.sampler("minimum", batch_size=4, prefetch=prefetch, timeout_s=0.2) as sampler:
        for timeout_s, seconds in ((None, 0.2), (0.1, 0.1), (0.0, 0.0)):
            started_s = time.monotonic()
            message = rf"sample from table 'minimum' waited {seconds} s: .*sampling waits: 3 of 4 items.*3 of 8 items"
            with pytest.raises(rb.DeadlineExceeded, match=message):
                sampler.sample(timeout_s)
            assert seconds <= time.monotonic() - started_s < seconds + 5.0
        add(client, "minimum", np.array([3]))
        assert set(sampler.sample(timeout_s=30.0).actions.tolist()) <= {0, 1, 2, 3}


def test_a_batch_is_valid_until_the_next_one(client):
    add(client, "prioritized", np.arange(8), np.ones(8))
    with client.sampler("prioritized", batch_size=8, prefetch=4) as sampler:
        batch = sampler.sample()
        kept = batch.observations.clone()
        add(client, "prioritized", np.arange(100, 108), np.ones(8))  # overwrites every row
        add(client, "prioritized", np.arange(200, 208), np.ones(8))
        assert torch.equal(batch.observations, kept)
        numbers = [sampler.sample().actions.clone() for _ in range(8)]
        assert set(torch.cat(numbers[5:]).tolist()) <= set(range(200, 208))


def test_prefetched_batches_are_counted_when_they_are_drawn(client, eventually):
    add(client, "prioritized", np.arange(8), np.ones(8))
    before = table_info(client, "prioritized")["samples"]
    with client.sampler("prioritized", batch_size=10, prefetch=3) as sampler:
        eventually(lambda: table_info(client, "prioritized")["samples"] == before + 30)
        sampler.sample()
    with client.sampler("prioritized", batch_size=10, prefetch=0) as sampler:
        before = table_info(client, "prioritized")["samples"]
        sampler.sample()
        assert table_info(client, "prioritized")["samples"] == before + 10


def test_samplers_that_could_not_work_are_refused(client):
    for arguments, error, message in [
        ({"table": "nothing", "batch_size": 4}, rb.InvalidInput, r"no table is called 'nothing'"),
        ({"table": "uniform", "batch_size": 0}, rb.RequestRefused, r"batch_size must be in \[1, \d+\], got 0"),
        ({"table": "uniform", "batch_size": 4, "beta": -1}, rb.InvalidInput, r"beta must be in \[0, 1\], got -1"),
        ({"table": "uniform", "batch_size": 4, "prefetch": 65}, rb.InvalidInput, r"prefetch must be in \[0, 64\]"),
    ]:
        with pytest.raises(error, match=message):
            client.sampler(**arguments)


def test_a_closed_sampler_refuses(client):
    add(client, "prioritized", np.arange(8), np.ones(8))
    sampler = client.sampler("prioritized", batch_size=4)
    batch = sampler.sample()
    sampler.close()
    sampler.close()
    with pytest.raises(rb.Closed):
        sampler.sample()
    with pytest.raises(rb.Closed):
        sampler.update_priorities(batch, torch.ones(4))


@pytest.mark.parametrize(("prefetch", "num_batches"), [(0, 50), (8, 3000)])
def test_no_batch_has_a_torn_row_while_a_fast_writer_overwrites_the_table(
    server, client, children, pipe, receive, eventually, prefetch, num_batches
):
    here, there = pipe()
    children.start("writer", child.write_numbers, server.address, there, None)
    assert receive(here, children) == "ready"
    eventually(lambda: client.size("replay") == 64)
    before, last = table_info(client, "replay")["overtaken_rows"], 0
    num_refused = client.info()["num_refused"]
    with client.sampler("replay", batch_size=64, prefetch=prefetch) as sampler:
        while num_batches > 0 or last < 10 * 64:  # and until the writer went round ten times
            num_batches -= 1
            batch = sampler.sample()
            numbers = batch.actions // 7
            sums = batch.observations.sum(1) + batch.next_observations.sum(1) + batch.actions + batch.rewards.long()
            assert torch.equal(sums, batch.extras["checksum"])
            assert (batch.observations == numbers[:, None]).all()
            assert (batch.next_observations == numbers[:, None] + 1).all()
            last = max(last, int(numbers.max()))
        # The generation of a row that was replaced by a spare is that of the spare.
        sampler.update_priorities(batch, torch.ones(64))
        sampler.sample()
        if prefetch:
            assert sampler.num_overtaken > 0, "nothing was overtaken, so nothing was shown"
        sampler.sample()
        assert table_info(client, "replay")["overtaken_rows"] - before <= sampler.num_overtaken
        sampler.update_priorities(batch, torch.ones(64))
        total = sampler.num_overtaken
    assert table_info(client, "replay")["overtaken_rows"] - before == total
    assert client.info()["num_refused"] == num_refused


def test_only_overtaken_rows_are_copied_again_and_the_batch_is_that_of_their_substitutes(client, monkeypatch):
    add(client, "prioritized", np.arange(8), np.ones(8))
    with client.sampler("prioritized", batch_size=16, prefetch=1) as sampler:
        generations = sampler._generations.copy()
        sampler._generations = generations
        gatherer, replaced = sampler._gatherer, []
        gather, replace = gatherer.gather, gatherer.replace

        def overtake(rows, asked):
            gather(rows, asked)
            generations[rows[3]] += 1  # while it was copied; what was drawn twice is overtaken twice

        def note(places, rows):
            replaced.append((places, rows))
            replace(places, rows)

        monkeypatch.setattr(gatherer, "gather", overtake)
        monkeypatch.setattr(gatherer, "replace", note)
        batch = sampler.sample()
        ((places, rows),) = replaced
        assert 3 in places
        assert len(places) < 16
        np.testing.assert_array_equal(batch.indices.numpy()[places], rows)
        assert (generations[batch.indices.numpy()] == batch.generations.numpy()).all()
        block = gatherer._rows.numpy()[batch.indices.numpy()]
        np.testing.assert_array_equal(gatherer._blocks._filled.rows.numpy(), block)


def test_a_row_that_another_writer_holds_is_never_sampled(server, client, children, pipe, receive):
    for number in range(3):  # so that reserved rows hold old contents
        with client.writer("replay", num_envs=1, chunk_size=8) as writer:
            for step in range(64):
                writer.add(**numbered_row(number * 64 + step))
    here, there = pipe()
    children.start("half", child.write_half, server.address, there)
    assert receive(here, children) == "half"
    with client.sampler("replay", batch_size=512) as sampler:
        for _ in range(20):
            numbers = sampler.sample().observations
            assert (numbers >= 128).all()
            assert (numbers < 192).all()
    here.send("go on")
    assert receive(here, children) == "done"
