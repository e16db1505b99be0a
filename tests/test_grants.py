"""Who gets rows, when there are not enough for all: nobody is starved, and nobody waits for one who waits for him."""

import numpy as np
import pytest
from core_driver import RATIO, Client, acknowledged, check_tables, make_core

from rl_buffer.frames import Grant

CHUNK = 4


def writers(num_writers, headroom, capacity=64, **table):
    """Writers with two chunks each where there is enough, on a table whose other side never waits."""
    core = make_core(replay={"capacity": capacity, "headroom": headroom} | table)
    clients = [Client(core, number) for number in range(num_writers)]
    for client in clients:
        client.open_writer(max_commit_rows=CHUNK, num_wanted=2 * CHUNK)
    return core, clients


def granted(events):
    """[(client's number, rows)] of the grants that are not only acknowledgements, in their order."""
    return [
        (receiver[0] - 1, len(event.rows)) for receiver, event in events if isinstance(event, Grant) and len(event.rows)
    ]


def held(core, client):
    return core.sessions[client.id(1)[:16]].channels[client.id(1)].num_unsent


def test_a_stopped_writer_with_two_chunks_starves_nobody_while_one_chunk_is_free():
    core, (stopped, other, third) = writers(3, headroom=3 * CHUNK)
    assert [held(core, client) for client in (stopped, other, third)] == [2 * CHUNK, CHUNK, 0]
    assert granted(other.commit(num_rows=CHUNK)) == [(1, CHUNK)], "it waited for this one before the third came"
    for _ in range(30):  # both share the one chunk that is left, in turns
        assert granted(other.commit(num_rows=CHUNK)) == [(2, CHUNK)]
        assert granted(third.commit(num_rows=CHUNK)) == [(1, CHUNK)]
    assert held(core, stopped) == 2 * CHUNK
    assert core.tables["replay"].state.limiter.num_inserts == 61 * CHUNK
    check_tables(core)


def test_a_writer_gets_one_chunk_as_soon_as_it_is_there_and_the_second_when_nobody_lacks_the_first():
    core, (first, _, third) = writers(3, headroom=3 * CHUNK)
    assert granted(first.commit(num_rows=CHUNK)) == [(2, CHUNK)]
    core.disconnected(third.id(1)[:16])
    assert core.tables["replay"].state.num_reservable == 0
    assert granted(third.commit(num_rows=CHUNK, num_wanted=0)) == [(2, CHUNK)], "its own second chunk: it lacks rows"
    assert granted(third.commit(num_rows=CHUNK, num_wanted=0)) == [(1, CHUNK)], "nobody lacks rows any more"


def test_where_there_is_enough_a_commit_costs_one_message_and_gets_all_that_it_wants():
    core, clients = writers(2, headroom=6 * CHUNK)
    clients.append(Client(core, 2))
    assert granted(clients[2].open_writer(max_commit_rows=CHUNK, num_wanted=2 * CHUNK)) == [(2, 2 * CHUNK)]
    for turn in range(30):
        client = clients[turn % 3]
        events = client.commit(num_rows=1 + turn % CHUNK)
        assert acknowledged(events) == [(client.id(1), 1 + turn // 3)]
        assert granted(events) == [(turn % 3, 1 + turn % CHUNK)]
        assert held(core, client) == 2 * CHUNK


def test_the_chunk_that_was_waited_for_longest_is_granted_first():
    core, clients = writers(5, headroom=2 * CHUNK)
    order = []
    busy = [0]  # the first took both chunks
    for _ in range(40):
        events = clients[busy[0]].commit(num_rows=CHUNK)
        if held(core, clients[busy[0]]) < CHUNK:
            busy.pop(0)
        order += [number for number, _ in granted(events)]
        busy += [number for number, _ in granted(events)]
    assert order[:40] == (order[:5] * 8), "in turns"
    assert sorted(order[:5]) == [0, 1, 2, 3, 4]


def test_writers_of_smaller_commits_do_not_keep_a_larger_one_waiting_for_ever():
    core = make_core(replay={"capacity": 64, "headroom": 8})
    small, other, large = (Client(core, number) for number in range(3))
    for client in (small, other):
        client.open_writer(max_commit_rows=1, num_wanted=2)
    holder = Client(core, 3)
    holder.open_writer(max_commit_rows=2, num_wanted=4)
    assert large.open_writer(max_commit_rows=6, num_wanted=6) == []
    assert granted(small.commit(num_rows=1)) == [], "it keeps one row, and the other goes to who was first"
    assert granted(small.commit(num_rows=1)) == []
    assert granted(other.commit(num_rows=1)) == []
    assert granted(other.commit(num_rows=1)) == []
    assert granted(holder.commit(num_rows=2)) == [(2, 6)]
    check_tables(core)


def test_nobody_waits_for_ever_when_every_writer_holds_a_part_of_a_chunk():
    core, clients = writers(4, headroom=2 * CHUNK)
    a, b = clients[0], clients[1]
    assert granted(a.commit(num_rows=CHUNK)) == [(1, CHUNK)]
    assert granted(a.commit(num_rows=1)) == [(0, 1)], "one is too few for those who hold nothing; it completes a chunk"
    assert granted(b.commit(num_rows=3)) == [(1, 3)]
    assert granted(b.commit(num_rows=CHUNK)) == [(2, CHUNK)], "a whole chunk goes to who waited longest"
    check_tables(core)


@pytest.mark.parametrize("table", [{}, RATIO], ids=["no limiter", "limiter"])
@pytest.mark.parametrize("num_writers", [2, 3, 7])
def test_over_any_schedule_of_commits_somebody_can_always_make_a_full_one(num_writers, table):
    """Writers that flush parts of chunks at random, while a learner samples all the time."""
    rng = np.random.default_rng(num_writers)
    for _ in range(20):
        core, clients = writers(num_writers, headroom=2 * CHUNK, capacity=16, **table)
        learner = Client(core, num_writers)
        learner.open_sampler(channel=2, batch_size=1)
        for _ in range(200):
            if core.sessions[learner.id(2)[:16]].channels[learner.id(2)].num_credits < 8:
                learner.credit(channel=2, num_credits=8)
            ready = [number for number, client in enumerate(clients) if held(core, client) >= CHUNK]
            assert ready, "all hold parts, and wait for each other"
            number = int(rng.choice(ready))
            clients[number].commit(num_rows=int(rng.integers(1, CHUNK + 1)))
        check_tables(core)


def test_a_writer_that_wants_less_than_it_lacks_gets_that():
    core, (client,) = writers(1, headroom=2 * CHUNK)
    client.commit(num_rows=CHUNK, num_wanted=0)
    assert granted(client.commit(num_rows=CHUNK, num_wanted=1)) == [(0, 1)]
    assert held(core, client) == 1
