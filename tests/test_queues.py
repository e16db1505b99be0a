"""Queues and stacks between processes: each item once, in order, whoever dies; limiters that change; deadlocks."""

import os
import signal
import threading

import child_processes as child
import numpy as np
import pytest
from child_processes import numbered_row

import rl_buffer as rb

pytestmark = pytest.mark.timeout(90)

SPEC = child.NUMBERED_SPEC
TABLES = {
    "queue": rb.ReplayTable.queue(SPEC, capacity=64),
    "stack": rb.ReplayTable.stack(SPEC, capacity=8),
    "short": rb.ReplayTable.queue(SPEC, capacity=4),
    "twice": rb.ReplayTable(SPEC, 16, sampler=rb.Prioritized(), max_times_sampled=2),
    "limited": rb.ReplayTable(SPEC, 64, rate_limiter=rb.MinSize(32)),
    "a": rb.ReplayTable(SPEC, 64, rate_limiter=rb.SampleToInsertRatio(1.0, 2, (0.0, 4.0))),
    "b": rb.ReplayTable(SPEC, 64, rate_limiter=rb.SampleToInsertRatio(1.0, 2, (0.0, 4.0))),
}


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer(TABLES) as server:
        yield server


def write(client, numbers, table="queue", chunk_size=4):
    with client.writer(table, num_envs=1, autoreset=None, chunk_size=chunk_size) as writer:
        for number in numbers:
            writer.add(**numbered_row(number))


def take(sampler, **options):
    return (sampler.sample(**options).actions // 7).tolist()


def drain(client, table, count):
    with client.sampler(table, 1, prefetch=0) as sampler:
        return [number for _ in range(count) for number in take(sampler)]


def info(client, table="queue"):
    return client.info()["tables"][table]


def test_two_learners_get_every_item_once_and_each_of_them_in_order(server, client, connect):
    count = 400
    learners = [connect(server, name=f"learner-{i}") for i in range(2)]
    samplers = [
        learner.sampler("queue", 4, prefetch=prefetch) for learner, prefetch in zip(learners, (0, 2), strict=True)
    ]
    taken = [[], []]

    def learn(number):
        while sum(map(len, taken)) < count:
            try:
                taken[number] += take(samplers[number], timeout_s=0.5)
            except rb.DeadlineExceeded:
                continue

    threads = [threading.Thread(target=learn, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    write(client, range(count))
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(count))
    assert taken[0] == sorted(taken[0])
    assert taken[1] == sorted(taken[1])
    for sampler in samplers:
        sampler.close()
    assert (info(client)["size"], info(client)["reading"]) == (0, 0)
    assert samplers[0].num_overtaken == samplers[1].num_overtaken == 0


def test_a_stack_gives_the_newest_first_and_a_full_one_makes_writers_wait(client):
    with client.writer("stack", num_envs=1, autoreset=None, chunk_size=1) as writer:
        for number in range(8):
            writer.add(**numbered_row(number))
        writer.flush()
        writer.add(**numbered_row(8))
        with pytest.raises(rb.DeadlineExceeded, match="inserting waits: 8 of 8 items are there and not taken"):
            writer.flush(timeout_s=0.1)
        with client.sampler("stack", 3, prefetch=0) as sampler:
            assert take(sampler) == [7, 6, 5]
            writer.flush()
            assert take(sampler) == [8, 4, 3]
            assert take(sampler) == [2, 1, 0]
            with pytest.raises(rb.DeadlineExceeded, match="sampling waits: 0 of 3 items"):
                take(sampler, timeout_s=0.1)


def test_a_killed_learner_gives_what_it_had_not_taken_back_in_order(
    server, client, children, pipe, receive, eventually
):
    write(client, range(20))
    here, there = pipe()
    children.start("learner", child.prefetch_and_wait, server.address, there, "queue", 4)
    assert receive(here, children) == [0, 1, 2, 3]  # taken; what it has leave for comes ahead
    eventually(lambda: info(client)["reading"] == 12)
    write(client, range(20, 24))
    os.kill(children.pids["learner"], signal.SIGKILL)
    eventually(lambda: info(client)["reading"] == 0)
    with client.sampler("queue", 20, prefetch=0) as sampler:
        assert take(sampler) == list(range(4, 24))


@pytest.mark.parametrize(
    "failpoint", ["sampler.received", "sampler.half_gathered", "consumer.released", "sampler.gathered"]
)
def test_wherever_a_learner_is_killed_no_item_is_taken_twice_and_only_its_last_batch_may_be_gone(
    server, client, children, pipe, receive, eventually, failpoint
):
    write(client, range(20))
    here, there = pipe()
    pid = children.start("victim", child.take_until_killed, server.address, there, "queue", 4, f"{failpoint}:2")
    assert receive(here, children) == [0, 1, 2, 3]
    eventually(lambda: pid not in [session["pid"] for session in client.info()["clients"]])
    # What the victim said that it had copied is its own, whether it could use it or not.
    released = failpoint in ("consumer.released", "sampler.gathered")
    left = 20 - info(client)["size"]
    assert left == 4 or (released and left == 8)
    assert drain(client, "queue", 20 - left) == list(range(left, 20))


def test_a_server_that_is_killed_as_it_changes_a_limiter_has_the_new_one_when_it_goes_on(
    tmp_path, connect, eventually, monkeypatch
):
    tables = {"limited": TABLES["limited"]}
    monkeypatch.setenv("RL_BUFFER_FAILPOINT", "limiter.changed")
    with rb.BufferServer(tables, f"ipc://{tmp_path}/address", directory=tmp_path / "tables") as server:
        client = connect(server)
        with pytest.raises(rb.ServerLost):
            client.set_rate_limiter("limited", rb.MinSize(7))
        eventually(lambda: not server.is_alive())
        monkeypatch.delenv("RL_BUFFER_FAILPOINT")
        server.start()
        client.reconnect()
        assert info(client, "limited")["limiter"]["min_size"] == 7


def test_an_item_leaves_with_its_last_use_and_a_batch_holds_different_ones(client):
    write(client, range(16), "twice")
    with client.sampler("twice", 8, prefetch=0) as sampler:
        taken = []
        for _ in range(2):
            batch = sampler.sample()
            numbers = (batch.actions // 7).tolist()
            assert len(set(numbers)) == 8
            sampler.update_priorities(batch, np.ones(8))
            taken += numbers
    taken += drain(client, "twice", 16)  # one by one: of eight uses that are left two may be of one item
    assert sorted(taken) == sorted([*range(16), *range(16)])
    with (
        client.sampler("twice", 1, prefetch=0) as sampler,
        pytest.raises(rb.DeadlineExceeded, match="sampling waits: 0 of 1 items"),
    ):
        sampler.sample(timeout_s=0.1)


def test_clear_empties_a_queue_and_its_writers_go_on(client):
    write(client, range(4), "short")
    client.clear("short")
    write(client, range(4, 8), "short")
    with client.sampler("short", 4) as sampler:
        assert take(sampler) == [4, 5, 6, 7]


def test_another_limiter_lets_a_waiting_learner_go_on(server, client, connect):
    write(client, range(8), "limited")
    learner, taken = connect(server, name="learner"), []
    with learner.sampler("limited", 4, prefetch=0) as sampler:
        thread = threading.Thread(target=lambda: taken.append(sampler.sample(timeout_s=30.0)))
        thread.start()
        client.set_rate_limiter("limited", rb.MinSize(8))
        thread.join()
        assert len(taken) == 1
        with pytest.raises(rb.RequestRefused, match=r"learner samples table 'limited' now: a batch of 4 draws could"):
            client.set_rate_limiter("limited", rb.SampleToInsertRatio(1.0, 1, 1.0))
    assert info(client, "limited")["limiter"]["parameters"] == {"min_size_to_sample": 8}
    with pytest.raises(rb.InvalidInput, match=r"a rate limiter is MinSize\(...\) or .*, got 8"):
        client.set_rate_limiter("limited", 8)


def test_a_deadlock_over_two_tables_is_named_in_the_error(server, client, connect):
    actor = connect(server, name="actor-0")
    writers = [actor.writer(table, num_envs=1, chunk_size=4) for table in ("a", "b")]
    for number in range(12):
        writers[1].add(**numbered_row(number))
    with pytest.raises(rb.DeadlineExceeded, match="no sampler is connected"):
        writers[1].flush(timeout_s=0.1)
    learner = connect(server, name="learner-0")
    samplers = [learner.sampler(table, 2, prefetch=0) for table in ("a", "b")]
    expected = "nobody can move: learner-0 waits for inserts into 'a', but actor-0 waits for samples from 'b'"
    with pytest.raises(rb.DeadlineExceeded, match=expected):
        samplers[0].sample(timeout_s=2.0)
    for user in samplers:
        user.close()
    client.set_rate_limiter("b", rb.MinSize(1))
    for writer in writers:
        writer.close()


def test_a_killed_server_with_a_directory_gives_each_item_once_more_and_keeps_the_limiter(
    tmp_path, connect, eventually
):
    tables = {name: TABLES[name] for name in ("queue", "twice", "limited")}
    with rb.BufferServer(tables, f"ipc://{tmp_path}/address", directory=tmp_path / "tables") as server:
        client = connect(server)
        write(client, range(20))
        write(client, range(12), "twice")
        client.set_rate_limiter("limited", rb.SampleToInsertRatio(3.0, 5, 40.0))
        sampler, twice = client.sampler("queue", 4, prefetch=2), client.sampler("twice", 4, prefetch=0)
        assert take(sampler) == [0, 1, 2, 3]
        seen = take(twice)
        eventually(lambda: info(client)["reading"] == 8)
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: not server.is_alive())
        server.start()
        client.reconnect()
        assert take(sampler, timeout_s=30.0) == [4, 5, 6, 7], "what was not gathered is there again"
        assert info(client, "limited")["limiter"]["kind"] == "SampleToInsertRatio"
        twice.close()
        seen += drain(client, "twice", 20)
        assert sorted(seen) == sorted([*range(12), *range(12)])


def test_a_checkpoint_of_a_queue_holds_what_learners_have_not_gathered(tmp_path, connect, eventually):
    tables = {name: TABLES[name] for name in ("queue", "twice", "limited")}
    path = tmp_path / "saved.safetensors"
    with rb.BufferServer(tables) as server:
        client = connect(server)
        write(client, range(20))
        write(client, range(12), "twice")
        client.set_rate_limiter("limited", rb.MinSize(7))
        seen = take(client.sampler("twice", 4, prefetch=0))
        assert take(client.sampler("queue", 4, prefetch=2)) == [0, 1, 2, 3]
        eventually(lambda: info(client)["reading"] == 8)
        client.checkpoint(path)
    with rb.BufferServer(tables, restore=path) as server:
        client = connect(server)
        assert take(client.sampler("queue", 16, prefetch=0)) == list(range(4, 20))
        seen += drain(client, "twice", 20)
        assert sorted(seen) == sorted([*range(12), *range(12)])
        assert info(client, "limited")["limiter"]["parameters"] == {"min_size_to_sample": 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": rb.Fifo()}, "would give out the same item for ever; give max_times_sampled="),
        ({"rate_limiter": rb.Queue(4)}, r"Queue\(4\) needs sampler=Fifo\(\) and max_times_sampled=1"),
        (
            {"rate_limiter": rb.Stack(4), "sampler": rb.Fifo(), "max_times_sampled": 1},
            r"Stack\(4\) needs sampler=Lifo\(\)",
        ),
        (
            {"rate_limiter": rb.Queue(9), "sampler": rb.Fifo(), "max_times_sampled": 1},
            r"Queue\(9\) lets more items wait than the table's capacity of 8",
        ),
        (
            {"rate_limiter": rb.SampleToInsertRatio(3.0, 1, 9.0), "max_times_sampled": 2},
            "waits for 3.0 samples of each item, which can be sampled 2 times",
        ),
        ({"max_times_sampled": -1}, r"max_times_sampled must be in \[0, "),
    ],
)
def test_a_table_that_could_not_work_is_refused_with_what_to_do(options, message):
    with pytest.raises(rb.InvalidInput, match=message):
        rb.ReplayTable(SPEC, 8, **options)


def test_a_batch_of_more_items_than_there_can_be_is_refused(client):
    with pytest.raises(rb.RequestRefused, match="5 never wait in it: its capacity is 4"):
        client.sampler("short", 5)
