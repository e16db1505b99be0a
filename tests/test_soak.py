"""The soak for some seconds, and that it sees what is torn, lost, phantom, or hangs when there is something to see."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import rl_buffer as rb
from scripts.soak import PROBLEMS, Soak, main, report
from scripts.soaking import audit, rows
from scripts.soaking.coordinator import CREW, Totals
from scripts.soaking.faults import PER_MINUTE, plan_faults
from scripts.soaking.scoreboard import KINDS, Scoreboard, Take

pytestmark = pytest.mark.timeout(400)

DEADLINE_S = 300.0  # of what takes less than 20 s where nothing else runs
ROOT = Path(__file__).resolve().parent.parent
TABLE = rb.ReplayTable(rows.SPEC, capacity=40, gamma=rows.GAMMA)
ROLLOUTS = rb.RolloutTable(rows.ROLLOUT_SPEC, num_steps=rows.EPISODE_LENGTH, num_envs=2)
ROLES = {name: role for name, (role, _) in CREW.items()}


@contextlib.contextmanager
def run_soak(*options):
    command = [sys.executable, ROOT / "scripts" / "soak.py", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as soak:
        try:
            yield soak
        finally:
            soak.kill()


def test_ten_seconds_of_all_faults_lose_and_tear_nothing_and_nobody_hangs():
    with run_soak("--minutes", "0.17", "--seed", "5") as soak:
        output, _ = soak.communicate(timeout=DEADLINE_S)
    assert soak.returncode == 0, output
    assert "seed 5\n" in output
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(r"(\w+) ([\d,]+)", output)}
    assert counts["sent"] >= counts["acknowledged"] > 1000
    assert counts["sampled"] >= counts["verified"] > 1000
    assert {kind: counts[kind] > 0 for kind in PER_MINUTE} == dict.fromkeys(PER_MINUTE, True)
    assert {problem: counts[problem] for problem in PROBLEMS} == dict.fromkeys(PROBLEMS, 0)


def test_a_client_that_hangs_is_found_and_fails_the_soak():
    with run_soak("--minutes", "10", "--faults", "none", "--hang-s", "4") as soak:
        address = next(line for line in soak.stdout if line.startswith("server at ")).split()[-1]
        with rb.connect(address, DEADLINE_S) as client:
            deadline_s = time.monotonic() + DEADLINE_S

            def learners():
                assert time.monotonic() < deadline_s
                return [session["pid"] for session in client.info()["clients"] if session["name"].startswith("learner")]

            while not learners():
                pass
            hanging = learners()[0]
            os.kill(hanging, signal.SIGSTOP)
            while hanging in learners():  # found hanging, it is killed, and another takes its place
                pass
        soak.send_signal(signal.SIGINT)
        output, _ = soak.communicate(timeout=DEADLINE_S)
    assert re.search(r"hung: learner-\d \(number \d+\) for 4 s", output), output
    assert soak.returncode == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faults": ("kil",)}, r"--faults takes kill, die_at, .* or none, not kil"),
        ({"minutes": 0.0}, r"--minutes must be above 0, got 0"),
    ],
)
def test_a_mistake_in_the_options_is_named(options, message):
    with pytest.raises(rb.InvalidInput, match=message):
        main(Soak(**options))


def test_problems_are_printed_and_make_the_exit_status(capsys):
    assert report(Totals()) == 0
    assert report(Totals(problems=[("torn", "a row")])) == 1
    assert "torn: a row" in capsys.readouterr().out


# ---- the plan ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_faults_and_another_one_others():
    plans = [plan_faults(seed, 300.0, PER_MINUTE, ROLES) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert {fault.kind for fault in plans[0]} == set(PER_MINUTE)
    assert all(0 < fault.at_s < 300 for fault in plans[0])


def test_leaving_out_a_kind_of_fault_changes_no_other():
    every, some = (plan_faults(1, 300.0, kinds, ROLES) for kinds in (PER_MINUTE, ["kill", "stop"]))
    assert some == [fault for fault in every if fault.kind in ("kill", "stop")]


def test_the_shortest_run_has_every_kind_of_fault():
    assert {fault.kind for fault in plan_faults(3, 1.0, PER_MINUTE, ROLES)} == set(PER_MINUTE)


# ---- rows --------------------------------------------------------------------------------------------------------


def transitions(writer, num_envs, num_steps, n_step=1):
    """The leaves of a table with all transitions of a writer, in their order, as the library makes them."""
    buffer = rb.ReplayBuffer(
        num_steps,
        num_envs,
        obs_shape=(rows.WIDTH,),
        obs_dtype="int64",
        action_shape=(),
        action_dtype="int64",
        extras=rows.SPEC.extras,
        n_step=n_step,
        gamma=rows.GAMMA,
        seed=0,
    )
    for step in range(num_steps):
        buffer.add(**rows.step_arguments(writer, num_envs, step))
    num_rows = rows.num_complete(num_steps, n_step) * num_envs
    assert buffer.num_transitions == num_rows
    batches = [rows.leaves_of(buffer.get(num_rows)) for _ in range(20)]  # each of them, almost surely
    leaves = {path: np.concatenate([batch[path] for batch in batches]) for path in batches[0]}
    places, first = np.unique(rows.places(leaves, np.full(20 * num_rows, num_envs)), return_index=True)
    assert places.tolist() == list(range(num_rows))
    return {path: leaf[first] for path, leaf in leaves.items()}


@pytest.mark.parametrize("n_step", [1, 3])
def test_rows_as_the_library_makes_them_are_intact_and_any_change_is_seen(n_step):
    leaves = transitions(writer=7, num_envs=2, num_steps=45, n_step=n_step)
    assert rows.intact(leaves, n_step).all()
    for path, leaf in leaves.items():
        changed = leaves | {path: leaf.copy()}
        last_number = changed[path].reshape(len(leaf), -1)[3:4, -1]
        last_number[...] = ~last_number if leaf.dtype == np.bool_ else last_number + 1
        assert np.flatnonzero(~rows.intact(changed, n_step)).tolist() == [3], path


def test_a_row_that_is_made_of_two_is_torn():
    leaves, others = transitions(1, 1, 20), transitions(2, 1, 20)
    for path in ("observations", "next_observations"):
        mixed = leaves | {path: leaves[path].copy()}
        mixed[path][5, rows.WIDTH // 2 :] = others[path][5, rows.WIDTH // 2 :]
        assert np.flatnonzero(~rows.intact(mixed, 1)).tolist() == [5]


def fragments(*written):
    """(writers, observations, actions) of fragments (writer, fragment, step at which it begins) side by side."""
    num_steps, num_envs = ROLLOUTS.num_steps, ROLLOUTS.num_envs
    obs = np.stack(
        [
            np.concatenate([rows.observations(writer, num_envs, first + step) for writer, first in written])
            for step in range(num_steps)
        ]
    )
    return np.array([writer for writer, _ in written]), obs, np.stack([rows.actions_of(step) for step in obs])


def test_fragments_are_intact_or_torn_and_say_which_they_are():
    num_steps = ROLLOUTS.num_steps
    writers, obs, actions = fragments((3, 0), (4, 5 * num_steps), (9, num_steps))
    intact, numbers = rows.intact_fragments(writers, obs, actions)
    assert (intact.tolist(), numbers.tolist()) == ([True] * 3, [0, 5, 1])
    obs[7, 3] = obs[7, 0]  # a step of another writer in the second environment of the second fragment
    assert rows.intact_fragments(writers, obs, actions)[0].tolist() == [True, False, True]
    writers, obs, actions = fragments((3, 2))  # not at the start of a fragment
    assert rows.intact_fragments(writers, obs, actions)[0].tolist() == [False]


# ---- the audit ---------------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path):
    return Scoreboard(tmp_path)


def enter(board, writer, *, kind="fresh", num_envs=1, **counts):
    slot = board.slot(writer)
    slot["kind"], slot["num_envs"] = KINDS.index(kind), num_envs
    for name, count in counts.items():
        slot[name] = count


def problems(board):
    return [problem for problem, _ in board.problems()]


def look(board, leaves, num_inserts, *, before=(), all_epochs=True):
    """What an audit finds in rows; `before`: (moment, inserts) that were counted earlier."""
    table_audit = audit.TableAudit(board, "fresh", TABLE.capacity, 1)
    for moment_ns, count in before:
        table_audit.note_inserts(moment_ns, count)
    table_audit.compare(leaves, table_audit.acknowledged(), num_inserts, all_epochs=all_epochs)
    return problems(board)


def subset(leaves, places):
    return {path: leaf[places] for path, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("places", "found"),
    [
        (range(20), []),
        (range(15), []),  # the last five were sent, and need not have arrived
        (range(14), ["lost"]),
        (range(5, 20), []),  # evicted, the oldest first
        ([*range(5), *range(6, 20)], ["lost"]),
        ([*range(20), 3], ["torn"]),
    ],
)
def test_a_table_must_hold_one_range_of_each_writer_with_all_that_was_acknowledged_last(board, places, found):
    enter(board, 1, sent=20, acknowledged=15)
    assert look(board, subset(transitions(1, 1, 20), list(places)), num_inserts=20) == found


def test_rows_that_were_never_sent_are_phantoms_and_rows_of_nobody_too(board):
    leaves = transitions(1, 1, 20)
    enter(board, 1, sent=18, acknowledged=10)
    assert look(board, leaves, num_inserts=20) == ["phantom", "phantom"]
    assert "phantom" in look(board, transitions(5, 1, 20), num_inserts=40)


def test_torn_rows_of_a_table_are_reported(board):
    leaves = transitions(1, 1, 20)
    leaves["rewards"][4] += 1
    enter(board, 1, sent=20, acknowledged=20)
    assert look(board, leaves, num_inserts=20) == ["torn"]


@pytest.mark.parametrize(("num_inserts", "found"), [(39 + 20, ["lost"]), (40 + 20, [])])
def test_a_writer_may_be_gone_only_if_a_whole_table_came_after_it(board, num_inserts, found):
    enter(board, 1, sent=20, acknowledged=20, published_ns=1000)
    enter(board, 2, sent=20, acknowledged=20)
    before = [(500, 10), (900, 20), (1500, 55)]  # at 1000 there were 20 or more
    assert look(board, transitions(2, 1, 20), num_inserts, before=before) == found


def test_what_an_earlier_server_acknowledged_may_be_gone_with_it(board):
    nothing = subset(transitions(1, 1, 20), [])
    enter(board, 1, sent=20, acknowledged=20)
    board.next_epoch()
    assert look(board, nothing, num_inserts=0, all_epochs=False) == []
    enter(board, 1, base=20, epoch=1)
    assert look(board, nothing, num_inserts=0, all_epochs=False) == []
    enter(board, 1, acknowledged=21)
    assert look(board, nothing, num_inserts=1, all_epochs=False) == ["lost"]


def take(writer, fragment, reader=9, epoch=0):
    first = Take(reader, writer, fragment, epoch, is_release=0)
    return [first, first._replace(is_release=1)]


@pytest.mark.parametrize(
    ("takes", "dead", "found"),
    [
        ([*take(1, 0), *take(1, 1)], {}, []),
        (take(1, 0), {}, ["lost"]),
        ([*take(1, 0), *take(1, 1)[:1]], {}, ["lost"]),  # its reader died, and nobody got it after that
        ([*take(1, 0), *take(1, 1), *take(1, 1, reader=8)], {}, ["torn"]),
        ([*take(1, 0), *take(1, 1), *take(1, 1, reader=8)], {9: 0.0}, []),
        ([*take(1, 0), *take(1, 1), *take(1, 1, epoch=1)], {}, []),  # its server was killed
    ],
)
def test_a_fragment_is_handed_out_once_and_again_only_if_its_reader_died(board, takes, dead, found):
    enter(board, 1, kind="rollout_writer", sent=3, acknowledged=2)
    board.log_take(*takes)
    audit.compare_fragments(board, board.takes(), dead, all_epochs=True)
    assert problems(board) == found


def test_counts_lie_between_what_was_acknowledged_and_what_was_sent(board):
    enter(board, 1, num_envs=2, sent=85, acknowledged=79)  # of 20 steps each, one episode or two of both environments
    enter(board, 2, num_envs=1, sent=20, acknowledged=20)
    assert audit.compare_counts(board, "fresh", TABLE, 99, all_epochs=True) == (2 + 1, 4 + 1)
    assert audit.compare_counts(board, "fresh", TABLE, 105, all_epochs=True) == (3, 5)
    assert problems(board) == []
    for num_inserts in (98, 106):
        audit.compare_counts(board, "fresh", TABLE, num_inserts, all_epochs=True)
    assert problems(board) == ["lost"] * 2


def test_counts_of_a_server_without_a_past_leave_out_what_others_counted(board):
    board.next_epoch()
    enter(board, 1, sent=45, acknowledged=45, base=30, epoch=1)
    enter(board, 2, sent=45, acknowledged=45)  # was never attached to the present one
    assert audit.compare_counts(board, "fresh", TABLE, 15, all_epochs=False) == (1, 1)
    enter(board, 3, kind="rollout_writer", num_envs=2, sent=4, acknowledged=3, base=1, epoch=1)
    assert audit.compare_counts(board, "rollouts", ROLLOUTS, 3, all_epochs=False) == (4, 6)
    assert problems(board) == []
