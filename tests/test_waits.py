"""Who waits for whom, put into words; no sockets, no clock."""

import pytest

from rl_buffer import waits
from rl_buffer.waits import FOR_INSERTS, FOR_ROWS, FOR_SAMPLES, THE_SERVER, Client, Wait

NAMES = {0: "learner", 1: "actor-1", 2: "actor-2", 3: "actor-3", 4: "actor-4"}


def clients(stopped=(), gone=(), busy=(), number=3):
    return {n: Client(NAMES[n], n not in gone, n in stopped, idle_s=0.1 if n in busy else 60.0) for n in range(number)}


def wait(client, what, helpers, table="replay", waited_s=12.0):
    return Wait(client, table, what, waited_s, frozenset(helpers))


def test_a_sentence_says_who_waits_for_what_on_whom_and_for_how_long():
    others = waits.count(3, "writer") + " connected", waits.last("insert", 41.2)
    assert waits.sentence("learner", "sampling waits: 812 of 1000 items", 3.14, others) == (
        "learner: sampling waits: 812 of 1000 items, 3 writers connected, last insert 41 s ago, for 3.1 s now"
    )
    assert waits.sentence("actor-1", "waits for rows", 100.0, num_more=2) == (
        "actor-1: waits for rows, for 100 s now, 2 more wait behind it"
    )
    assert (waits.count(1, "writer"), waits.last("insert", None)) == ("1 writer", "no insert yet")


def test_who_waits_for_somebody_who_can_move_is_not_stuck():
    assert waits.stuck([wait(0, FOR_INSERTS, [1, 2])], clients()) == {}
    assert waits.stuck([wait(0, FOR_INSERTS, [1, 2])], clients(stopped=[1])) == {}
    assert waits.stuck([wait(1, FOR_ROWS, [THE_SERVER])], clients()) == {}


@pytest.mark.parametrize(
    ("what", "noun"),
    [(FOR_INSERTS, "writer"), (FOR_SAMPLES, "sampler"), (FOR_ROWS, "client that could give some back")],
)
def test_who_waits_for_nobody_is_named_at_once(what, noun):
    assert waits.stuck([wait(0, what, [], waited_s=0.0)], clients()) == {
        "replay": f"nobody can move: learner waits for {what} 'replay', and no {noun} is connected"
    }


def test_a_circle_of_waits_over_two_tables_is_named():
    """The learner wants samples of a, the actor waits for samples of b, which only the learner would take."""
    circle = [wait(0, FOR_INSERTS, [1], "a"), wait(1, FOR_SAMPLES, [0], "b", waited_s=5.0)]
    assert waits.stuck(circle, clients()) == {
        "a": "nobody can move: learner waits for inserts into 'a', but actor-1 waits for samples from 'b'",
        "b": "nobody can move: actor-1 waits for samples from 'b', but learner waits for inserts into 'a'",
    }


def test_a_circle_that_somebody_outside_can_open_is_none():
    circle = [wait(0, FOR_INSERTS, [1], "a"), wait(1, FOR_SAMPLES, [0, 2], "b")]
    assert waits.stuck(circle, clients()) == {}


def test_a_circle_is_not_certain_while_one_of_it_does_something_else():
    circle = [wait(0, FOR_INSERTS, [1], "a"), wait(1, FOR_SAMPLES, [0], "b")]
    assert waits.stuck(circle, clients(busy=[1])) == {}
    fresh = [circle[0], wait(1, FOR_SAMPLES, [0], "b", waited_s=0.5)]
    assert waits.stuck(fresh, clients()) == {}


def test_a_client_with_two_waits_moves_again_only_when_both_can_end():
    both = [wait(1, FOR_SAMPLES, [2], "a"), wait(1, FOR_SAMPLES, [], "b"), wait(0, FOR_INSERTS, [1], "c")]
    assert set(waits.stuck(both, clients())) == {"b", "c"}


def test_a_chain_of_waits_ends_with_the_one_who_can_move():
    chain = [wait(0, FOR_INSERTS, [1], "a"), wait(1, FOR_SAMPLES, [2], "b"), wait(2, FOR_ROWS, [3], "c")]
    assert waits.stuck(chain, clients(number=4)) == {}
    assert set(waits.stuck(chain, clients(number=4, stopped=[3]))) == {"a", "b", "c"}


def test_rows_that_stopped_and_vanished_clients_hold_are_named_with_their_holders():
    held = [wait(0, FOR_ROWS, [1, 2])]
    assert waits.stuck(held, clients(stopped=[1], gone=[2])) == {
        "replay": "nobody can move: learner waits for rows of 'replay', but actor-1 is stopped (SIGCONT lets it go "
        "on), actor-2 closed its connection and holds rows as long as its process lives"
    }


def test_who_waits_for_itself_is_told_so():
    assert waits.stuck([wait(1, FOR_SAMPLES, [1])], clients()) == {
        "replay": "nobody can move: actor-1 waits for samples from 'replay', but nobody but itself could end that"
    }


def test_three_are_named_and_the_others_counted():
    (text,) = waits.stuck([wait(0, FOR_ROWS, [1, 2, 3, 4])], clients(stopped=[1, 2, 3, 4], number=5)).values()
    assert "actor-3 is stopped" in text
    assert text.endswith("and 1 more likewise")
