"""Checkpoints of a server at work: complete, consistent, and never half of one, whoever is killed when."""

import concurrent.futures
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import child_processes as child
import msgspec
import numpy as np
import pytest
from child_processes import NUMBERED_SPEC, numbered_row
from episode_envs import committed_leaves

import rl_buffer as rb
from rl_buffer import messages
from rl_buffer.checkpoint import read_contents
from rl_buffer.checkpoint_file import CheckpointReader, CheckpointWriter, unfinished_path
from rl_buffer.failpoints import FAILPOINTS

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
PRIORITIZED = rb.ReplayTable(NUMBERED_SPEC, capacity=200, headroom=64, sampler=rb.Prioritized(alpha=0.7), seed=0)
UNIFORM = rb.ReplayTable(NUMBERED_SPEC, capacity=100, headroom=64)
# 33 MiB, which take a while to copy.
LARGE = rb.ReplayTable(NUMBERED_SPEC, capacity=8192, headroom=256, sampler=rb.Prioritized(), seed=0)
ROLLOUT = rb.RolloutTable(rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64")), 4, 2, num_fragments=6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


def add_numbers(client, numbers, table="replay"):
    with client.writer(table, num_envs=1, autoreset=None, chunk_size=8) as writer:
        for number in numbers:
            writer.add(**numbered_row(number))


def numbers_in(client, table="replay"):
    """Of all committed rows, which are whole, in the order of memory: after `restore` that of their commits."""
    leaves = committed_leaves(client, table)
    numbers = leaves["actions"] // 7
    assert (leaves["observations"] == numbers[:, None]).all()
    assert (leaves["next_observations"] == numbers[:, None] + 1).all()
    assert (leaves["extras/checksum"] == child.checksum(numbers)).all()
    return numbers.tolist()


def saved_numbers(path, config, table="replay"):
    """The same of a file, every part of which is compared with its checksum."""
    with CheckpointReader(path) as reader:
        parts = {name: reader.array(name) for name in reader.parts}
    rows = parts[f"rows:{table}"]
    leaves = config.layout.view(rows, len(rows))
    numbers = leaves["actions"] // 7
    assert (leaves["observations"] == numbers[:, None]).all()
    assert (leaves["next_observations"] == numbers[:, None] + 1).all()
    assert (leaves["extras/checksum"] == child.checksum(numbers)).all()
    return numbers.tolist()


def contents_of(path):
    """Description and every part, for comparison."""
    with CheckpointReader(path) as reader:
        return reader.description, {name: reader.array(name).tobytes() for name in reader.parts}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint.safetensors"
    with rb.BufferServer({"replay": PRIORITIZED}) as server, rb.connect(server.address) as client:
        add_numbers(client, range(20))
        client.publish_parameters({"w": np.zeros(3)})
        client.checkpoint(path)
    return path


# ---- the process that writes -----------------------------------------------------------------------------------


def writing_process(server):
    """Process id of the one that writes a checkpoint now, or None."""
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"rl_buffer.checkpoint_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    return None


def state_of(pid):
    """The letter that /proc has for it: T stopped, Z ended and not reaped; Z too if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def unfinished_nbytes(path):
    try:
        return unfinished_path(path).stat().st_size
    except OSError:
        return -1


@pytest.fixture
def begin(eventually):
    """Ask for a checkpoint in another thread: a future of the report, and the id of the process if it is seen."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:

        def start(server, client, path):
            eventually(lambda: not writing_process(server))  # the last one may be about to end
            report = pool.submit(client.checkpoint, path)
            eventually(lambda: writing_process(server) or report.done())
            return report, writing_process(server)

        yield start


@pytest.fixture
def stop_half_way(begin, eventually):
    """Begin a checkpoint and stop its process between the first row and the last; (process id, future of the call)."""
    stopped = []

    def stop(server, client, path):
        while not (half := begin_and_stop(begin(server, client, path), path, eventually)):
            pass  # it was faster
        stopped.append(half[0])
        return half

    yield stop
    for pid in stopped:
        send_signal(pid, signal.SIGCONT)


def begin_and_stop(begun, path, eventually):
    report, pid = begun
    eventually(lambda: unfinished_nbytes(path) > MIB or report.done())
    if pid and not report.done():
        send_signal(pid, signal.SIGSTOP)
        eventually(lambda: state_of(pid) in "TZ")
        if unfinished_nbytes(path) > MIB and state_of(pid) == "T":
            return pid, report
        send_signal(pid, signal.SIGCONT)
    report.result()
    return None


def send_signal(pid, number):
    """To a process that may have ended, or was not seen."""
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)


# ---- what is in it ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_server_at_work_is_one_moment_of_it(
    serve, connect, children, pipe, receive, eventually, path
):
    # So large that a writer which gets no time for a while still has rows there.
    capacities = {"first": 2000, "second": 1000}
    tables = {
        name: msgspec.structs.replace(config, capacity=capacities[name])
        for name, config in (("first", PRIORITIZED), ("second", UNIFORM))
    }
    server = serve(tables)
    client = connect(server)
    starts = (0, 10**9)
    for start in starts:
        here, there = pipe()
        children.start(f"writer-{start}", child.write_pairs, server.address, there, start, list(tables))
        assert receive(here, children) == "writing"
    eventually(lambda: all(client.size(name) == capacity for name, capacity in capacities.items()))
    sampler = client.sampler("first", batch_size=32)
    reports = []
    for _ in range(2):
        taking = threading.Thread(target=lambda: reports.append(client.checkpoint(path)))
        taking.start()
        while taking.is_alive():
            batch = sampler.sample()
            sampler.update_priorities(batch, batch.rewards - 500)
    assert len(reports) == 2
    assert reports[-1].num_items == capacities

    restored = connect(serve(tables, restore=path))
    info, statistics = restored.info(), restored.stats(per_client=True)
    newest = {}
    for table, config in tables.items():
        numbers = numbers_in(restored, table)
        assert len(numbers) == config.capacity
        for start in starts:
            own = [number for number in numbers if start <= number < start + 10**9]
            assert own == list(range(own[0], own[-1] + 1)), "a writer's rows have a hole or another order"
            newest[table, start] = own[-1] - start
        assert info["tables"][table]["inserts"] == sum(newest[table, start] + 1 for start in starts)
        assert info["tables"][table]["size"] == config.capacity
    for start in starts:
        assert newest["second", start] <= newest["first", start] <= newest["second", start] + 8
    # Each row was an episode: exactly those of the rows that were ever committed are in the statistics.
    assert statistics["train/num_episodes"] == sum(number + 1 for number in newest.values())
    rewards = sum(sum(i % 1000 for i in range(number + 1)) for number in newest.values())
    mean = statistics["train/lifetime_rewards_mean"]
    assert mean * statistics["train/num_episodes"] == pytest.approx(rewards, rel=1e-9)


def test_a_restored_server_is_the_one_that_was_saved(serve, connect, path, tmp_path):
    limiter = rb.SampleToInsertRatio(32.0, min_size_to_sample=100, error_buffer=10_000.0)
    tables = {
        "replay": msgspec.structs.replace(PRIORITIZED, rate_limiter=limiter),
        "uniform": UNIFORM,
        "empty": UNIFORM,
        "rollout": ROLLOUT,
    }
    client = connect(serve(tables, extra_metrics_keys=["speed"], done_reason_keys=["fell"]))
    with client.writer("replay", num_envs=1, autoreset=None, chunk_size=8) as writer:
        for number in range(250):
            done = {"done": np.array([number % 10 == 9])}
            reasons = {"fell": np.array([number % 20 == 9])}
            speed = {"speed": np.array([number / 7])}
            writer.add(**numbered_row(number) | done, metrics=speed, done_reasons=reasons)
    add_numbers(client, range(30), "uniform")
    client.publish_parameters({"w": np.zeros(3), "b": np.full(2, 7, "int64")})
    client.publish_parameters({"w": np.arange(3.0), "b": np.full(2, 8, "int64")})
    sampler = client.sampler("replay", batch_size=64, prefetch=0)
    for _ in range(40):
        batch = sampler.sample()
        sampler.update_priorities(batch, batch.actions / 7 + 0.5)
    sampler.close()
    info, statistics = client.info(), client.stats(per_client=True)
    report = client.checkpoint(path)
    assert report.path == str(path)
    assert report.nbytes == path.stat().st_size
    assert report.num_items == {"replay": 200, "uniform": 30, "empty": 0, "rollout": 0}
    assert 0 < report.pause_ms < report.duration_s * 1e3
    assert report.writers_waited_ms == 0

    # Every row was drawn at least once, or the largest mass at the time of its commit, 1.0, is left.
    with CheckpointReader(path) as reader:
        masses = reader.array("masses:replay")
    expected = np.abs(np.array(saved_numbers(path, tables["replay"])) + 0.5) + PRIORITIZED.sampler.epsilon
    was_drawn = masses != 1.0
    np.testing.assert_allclose(masses[was_drawn], (expected**0.7)[was_drawn], rtol=1e-12)
    assert was_drawn.sum() > 100

    other = connect(serve(tables, restore=path, extra_metrics_keys=["speed"], done_reason_keys=["fell"]))
    assert other.stats(per_client=True) == statistics
    assert numbers_in(other) == list(range(50, 250))
    assert numbers_in(other, "uniform") == list(range(30))
    for name, table in other.info()["tables"].items():
        same = ("size", "capacity", "inserts", "samples", "deletes")
        assert {key: table[key] for key in same} == {key: info["tables"][name][key] for key in same}
    version, parameters = other.parameters(as_numpy=True)
    assert (version, parameters["w"].tolist(), parameters["b"].tolist()) == (2, [0.0, 1.0, 2.0], [8, 8])
    again = tmp_path / "again"
    other.checkpoint(again)
    assert contents_of(again) == contents_of(path)
    # And it works on: the oldest go first, new parameters are newer.
    add_numbers(other, range(250, 260))
    assert sorted(numbers_in(other)) == list(range(60, 260))
    assert other.publish_parameters({"w": np.zeros(3), "b": np.zeros(2, "int64")}) == 3
    assert set((other.sampler("replay", batch_size=256).sample().actions // 7).tolist()) <= set(range(60, 260))


def test_a_server_with_more_room_takes_it_over_and_one_with_less_does_not(serve, connect, path):
    client = connect(serve(UNIFORM))
    add_numbers(client, range(90))
    client.checkpoint(path)
    larger = msgspec.structs.replace(UNIFORM, capacity=120, headroom=19, seed=5)
    other = connect(serve(larger, restore=path))
    add_numbers(other, range(90, 160))
    assert sorted(numbers_in(other)) == list(range(40, 160))
    smaller = msgspec.structs.replace(UNIFORM, capacity=89)
    with pytest.raises(rb.InvalidInput, match="saved with 90 items, this server has room for 89"):
        rb.BufferServer({"replay": smaller}, restore=path).start()


def test_finished_rollouts_and_those_being_read_are_in_it_in_order(serve, connect, path):
    client = connect(serve({"rollout": ROLLOUT}))
    writer, reader = client.rollout_writer("rollout", autoreset=None), client.rollouts("rollout")
    numbers = iter(range(10))

    def write():
        number = next(numbers)
        for _ in range(4):
            zeros = [0.0] * 2
            writer.add(np.full((2, 3), number), [0] * 2, [number] * 2, [False] * 2, zeros, zeros)
        writer.commit([0.0] * 2)

    for _ in range(2):
        write()
    reader.take(1, timeout_s=10.0).release()  # 0 is gone
    held = reader.take(1, timeout_s=10.0)  # 1 is being read
    client.publish_parameters({"w": np.zeros(1)})
    client.parameters()
    write()
    write()
    writer.begin(timeout_s=10.0)  # 4 is not finished
    assert client.checkpoint(path).num_items == {"rollout": 3}
    held.release()

    other = connect(serve({"rollout": ROLLOUT}, restore=path))
    rollouts = other.rollouts("rollout").take(3, timeout_s=10.0)
    batch = next(rollouts.get(shuffle=False))
    assert batch.observations[:6:2, 0].tolist() == [1.0, 2.0, 3.0]
    assert rollouts.versions[0].tolist() == [0, 1, 1]
    rollouts.release()
    table = other.info()["tables"]["rollout"]
    assert (table["inserts"], table["samples"], table["size"], table["reading"]) == (4, 5, 0, 0)
    with other.rollout_writer("rollout", autoreset=None) as writer:
        for _ in range(6):  # every fragment can be written again
            write()


def test_a_writer_that_goes_on_with_a_restored_server_is_told_what_was_published(serve, connect, path):
    server = serve(UNIFORM)
    client = connect(server)
    with client.writer("replay", num_envs=1, chunk_size=8) as writer:
        for number in range(24):
            writer.add(**numbered_row(number))
        writer.flush()
        writer_id = writer._outbox._writer_id
        client.checkpoint(path)
    other = connect(serve(UNIFORM, restore=path))
    with other._new_channel() as channel:
        request = messages.OpenWriter(channel.number, "replay", 8, 16, writer_id, acknowledged=1)
        assert other._call(request, channel=channel) == messages.Opened(3, 0)


def test_a_writer_goes_on_with_a_restored_server_and_only_what_came_after_the_checkpoint_is_lost(
    connect, path, tmp_path_factory
):
    address = f"ipc://{tmp_path_factory.mktemp('address')}/server"
    with rb.BufferServer({"replay": UNIFORM}, address) as server:
        client = connect(server)
        writer = client.writer("replay", num_envs=1, autoreset=None, chunk_size=8)
        sampler = client.sampler("replay", batch_size=8)
        for number in range(24):
            writer.add(**numbered_row(number))
        writer.flush()
        client.checkpoint(path)
        for number in range(24, 40):
            writer.add(**numbered_row(number))
        writer.flush()
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(rb.ServerLost):
            client.size("replay")
    with rb.BufferServer({"replay": UNIFORM}, address, restore=path):
        client.reconnect()
        for number in range(40, 48):
            writer.add(**numbered_row(number))
        writer.close()
        assert numbers_in(client) == [*range(24), *range(40, 48)]
        assert sampler.sample().actions.max() <= 7 * 47


# ---- others go on ----------------------------------------------------------------------------------------------


def add_until_deadline(writer, number):
    """Add rows `number`, ... until one waits too long: that one, and why."""
    while True:
        try:
            writer.add(**numbered_row(number))
        except rb.DeadlineExceeded as error:
            return number, str(error)
        number += 1


def test_writers_go_on_in_the_headroom_and_wait_only_for_rows_that_are_not_copied(serve, connect, stop_half_way, path):
    server = serve(LARGE)
    client = connect(server)
    add_numbers(client, range(LARGE.capacity))
    pid, report = stop_half_way(server, client, path)
    writer = client.writer("replay", num_envs=1, autoreset=None, chunk_size=8, timeout_s=0.3)
    number, waits = add_until_deadline(writer, LARGE.capacity)
    assert "must be copied to a checkpoint first" in waits
    assert number >= LARGE.capacity + LARGE.headroom - 16, "the headroom was not used"
    assert client.sampler("replay", batch_size=64).sample().actions.max() >= 7 * LARGE.capacity
    with pytest.raises(rb.RequestRefused, match=f"has a checkpoint written to {path} already; one at a time"):
        client.checkpoint(path.with_name("other"))
    assert client.info()["checkpoint"]["path"] == str(path)
    send_signal(pid, signal.SIGCONT)
    writer.timeout_s = 30.0
    for _ in range(2 * LARGE.capacity):
        writer.add(**numbered_row(number))
        number += 1
    writer.close()
    report = report.result(timeout=30.0)
    assert report.writers_waited_ms >= 300
    assert saved_numbers(path, LARGE) == list(range(LARGE.capacity)), "a row of the cut was overwritten"
    assert sorted(numbers_in(client)) == list(range(number - LARGE.capacity, number))
    assert client.info()["checkpoint"] is None
    assert not unfinished_path(path).exists()


def test_the_next_one_may_be_asked_for_at_once(serve, connect, path):
    client = connect(serve(UNIFORM))
    for number in range(5):
        add_numbers(client, [number])
        client.checkpoint(path)
        assert saved_numbers(path, UNIFORM) == list(range(number + 1))


def test_a_client_that_does_not_wait_for_it_gets_its_checkpoint_all_the_same(
    serve, connect, stop_half_way, eventually, path
):
    server = serve(LARGE)
    client = connect(server)
    add_numbers(client, range(LARGE.capacity))
    asker = rb.connect(server.address)
    pid, _ = stop_half_way(server, asker, path)
    asker.close()
    with pytest.raises(rb.RequestRefused, match="one at a time"):
        client.checkpoint(path)
    eventually(lambda: len(client.info()["clients"]) == 1)
    send_signal(pid, signal.SIGCONT)
    eventually(path.exists)
    eventually(lambda: client.info()["checkpoint"] is None)
    assert saved_numbers(path, LARGE) == list(range(LARGE.capacity))


# ---- kills -----------------------------------------------------------------------------------------------------


def wait_for_a_random_moment(report, path, rng, eventually):
    """Until the process has begun, or its file exists, or has so many bytes."""
    nbytes = rng.choice([-1, 0, rng.randrange(LARGE.rows_nbytes), LARGE.rows_nbytes])
    eventually(lambda: unfinished_nbytes(path) >= nbytes or report.done())


def last_of(number):
    """What a full LARGE table holds of the numbers 0, 1, ..., `number`."""
    return list(range(number + 1 - LARGE.capacity, number + 1))


def test_a_killed_process_leaves_the_last_checkpoint_and_the_server_as_they_were(
    serve, connect, begin, eventually, path
):
    server = serve(LARGE)
    client = connect(server)
    add_numbers(client, range(LARGE.capacity))
    client.checkpoint(path)
    saved, rng, num_killed = last_of(LARGE.capacity - 1), random.Random(0), 0
    for number in range(LARGE.capacity, LARGE.capacity + 10):
        add_numbers(client, [number])
        report, pid = begin(server, client, path)
        wait_for_a_random_moment(report, path, rng, eventually)
        send_signal(pid, signal.SIGKILL)
        possible, error = [last_of(number)], report.exception(timeout=30.0)
        if error is not None:
            assert str(error) == "the process that wrote it was killed by SIGKILL"
            num_killed += 1
            possible.append(saved)
        assert os.listdir(path.parent) == [path.name]
        saved = saved_numbers(path, LARGE)
        assert saved in possible
        assert sorted(numbers_in(client)) == last_of(number)
    assert num_killed > 3
    with client.writer("replay", num_envs=1, autoreset=None, chunk_size=LARGE.headroom // 2 - 8) as writer:
        for number in range(3 * LARGE.headroom):  # all of the headroom is there
            writer.add(**numbered_row(number))


def test_a_killed_server_leaves_the_last_checkpoint_and_the_next_one_goes_on_from_it(connect, begin, eventually, path):
    saved, rng = [], random.Random(0)
    for i in range(6):
        with rb.BufferServer({"replay": LARGE}, restore=path if saved else None) as server:
            client = connect(server)
            assert numbers_in(client) == saved
            if not saved:
                add_numbers(client, range(LARGE.capacity))
                client.checkpoint(path)
                saved = last_of(LARGE.capacity - 1)
            number = saved[-1] + 1
            add_numbers(client, [number])
            report, pid = begin(server, client, path)
            wait_for_a_random_moment(report, path, rng, eventually)
            os.kill(server.pid, signal.SIGKILL)
            with contextlib.suppress(rb.ServerLost):
                report.result(timeout=30.0)
            eventually(lambda pid=pid: pid is None or state_of(pid) == "Z")
            assert os.listdir(path.parent) == [path.name]
            before, saved = saved, saved_numbers(path, LARGE)
            assert saved in (before, last_of(number)), i
    with rb.BufferServer({"replay": LARGE}, restore=path) as server:
        connect(server).checkpoint(path)
    assert os.listdir(path.parent) == [path.name]
    assert saved_numbers(path, LARGE) == saved


@pytest.mark.parametrize("failpoint", [name for name in FAILPOINTS if name.startswith("checkpoint.")])
def test_a_kill_at_any_step_leaves_a_whole_checkpoint_from_which_a_server_goes_on(saved, path, monkeypatch, failpoint):
    shutil.copyfile(saved, path)
    monkeypatch.setenv("RL_BUFFER_FAILPOINT", failpoint + ":2" if failpoint.endswith(".copied") else failpoint)
    with rb.BufferServer({"replay": PRIORITIZED}, restore=path) as server, rb.connect(server.address, 30.0) as client:
        add_numbers(client, range(20, 300))
        killed = r"the server at .* ended|the process that wrote it was killed by SIGKILL"
        with pytest.raises((rb.ServerLost, rb.RequestRefused), match=killed):
            client.checkpoint(path)
    monkeypatch.delenv("RL_BUFFER_FAILPOINT")
    old, new = list(range(20)), list(range(100, 300))
    there = saved_numbers(path, PRIORITIZED)
    if failpoint in ("checkpoint.renamed", "checkpoint.finished"):
        assert there == new
    elif failpoint == "checkpoint.handed_over":
        assert there in (old, new), "the process may have written all before it could see that the server is gone"
    else:
        assert there == old
    with rb.BufferServer({"replay": PRIORITIZED}, restore=path) as server, rb.connect(server.address) as client:
        # The one that was handed over may be finished only now.
        assert numbers_in(client) in ((old, new) if failpoint == "checkpoint.handed_over" else (there,))
        client.checkpoint(path)
        assert os.listdir(path.parent) == [path.name]


def test_a_server_that_is_stopped_leaves_no_process_and_nothing_unfinished(serve, connect, stop_half_way, path):
    server = serve(LARGE)
    client = connect(server)
    add_numbers(client, range(LARGE.capacity))
    client.checkpoint(path)
    add_numbers(client, [LARGE.capacity])
    pid, report = stop_half_way(server, client, path)
    server.stop()
    assert state_of(pid) == "Z"
    with pytest.raises(rb.ServerLost):
        report.result(timeout=30.0)
    assert os.listdir(path.parent) == [path.name]
    assert saved_numbers(path, LARGE)[-1] in (LARGE.capacity - 1, LARGE.capacity)


# ---- refusals --------------------------------------------------------------------------------------------------


def test_where_there_is_no_room_the_last_checkpoint_stays_and_everybody_goes_on(serve, connect, path):
    server = serve(LARGE)
    client = connect(server)
    add_numbers(client, range(100))
    client.checkpoint(path)
    add_numbers(client, range(100, 1000))
    unlimited = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (MIB, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(
        rb.RequestRefused, match=r"File too large after [\d,]+ of the 4,\d+,\d+ bytes of the checkpoint"
    ):
        client.checkpoint(path)
    assert os.listdir(path.parent) == [path.name]
    assert saved_numbers(path, LARGE) == list(range(100))
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, unlimited)
    client.checkpoint(path)
    assert saved_numbers(path, LARGE) == list(range(1000))


def test_a_place_that_a_checkpoint_cannot_have_is_refused(serve, connect, path, monkeypatch):
    client = connect(serve(UNIFORM))
    with pytest.raises(rb.RequestRefused, match=f"there is no directory {path} for a checkpoint; make it first"):
        client.checkpoint(path / "file")
    with pytest.raises(rb.RequestRefused, match=f"{path.parent} is a directory; a checkpoint is one file"):
        client.checkpoint(path.parent)
    with pytest.raises(rb.RequestRefused, match="path of a checkpoint must be absolute, got 'here'"):
        client._call(messages.Checkpoint("here"))
    monkeypatch.chdir(path.parent)
    assert client.checkpoint("here").path == str(path.parent / "here")


def test_a_deadline_that_is_reached_says_that_the_server_may_go_on(serve, connect, eventually, path):
    server = serve(UNIFORM)
    client = connect(server)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(rb.DeadlineExceeded, match=rf"{path} was not finished within 0\.2 s; the server may go on"):
            client.checkpoint(path, timeout_s=0.2)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    eventually(lambda: client.info()["checkpoint"] is None)


def test_another_writer_of_the_same_file_is_refused_and_the_first_finishes(serve, connect, stop_half_way, path):
    server = serve(LARGE)
    client, other = connect(server), connect(serve(UNIFORM))
    add_numbers(client, range(LARGE.capacity))
    pid, report = stop_half_way(server, client, path)
    with pytest.raises(rb.RequestRefused, match=f"another process is writing a checkpoint to {path}"):
        other.checkpoint(path)
    send_signal(pid, signal.SIGCONT)
    assert report.result(timeout=30.0).num_items == {"replay": LARGE.capacity}
    assert saved_numbers(path, LARGE) == list(range(LARGE.capacity))


@pytest.mark.parametrize("part", ["header", "parameters:policy", "masses:replay", "rows:replay", "checksums"])
def test_a_damaged_checkpoint_is_refused_whichever_part_it_is(saved, path, part):
    data = bytearray(saved.read_bytes())
    with CheckpointReader(saved) as reader:
        position = {"header": 20, "checksums": len(data) - 3, **reader._offsets}[part]
    data[position] ^= 4
    path.write_bytes(data)
    named = (
        f"part '{part}' of {path} is damaged" if ":" in part else f"{path} is no checkpoint, or its header is damaged"
    )
    with pytest.raises(rb.InvalidInput, match=named):
        rb.BufferServer({"replay": PRIORITIZED}, restore=path).start()


OTHER_SPEC = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64"))
MISMATCHES = {
    "n_step": ({"n_step": 3}, "was saved with n_step 1, this server has 3"),
    "gamma": ({"gamma": 0.5}, r"was saved with gamma 0\.99, this server has 0\.5"),
    "sampler": ({"sampler": rb.Uniform()}, r"was saved with sampler Prioritized\(.*, this server has Uniform\("),
    "limiter": ({"rate_limiter": rb.MinSize(2)}, "was saved with rate_limiter MinSize"),
    "spec": ({"spec": OTHER_SPEC}, "was saved with spec TransitionSpec"),
}


@pytest.mark.parametrize("difference", MISMATCHES)
def test_a_checkpoint_of_other_tables_is_refused_and_the_difference_is_named(saved, difference):
    changes, message = MISMATCHES[difference]
    tables = {"replay": msgspec.structs.replace(PRIORITIZED, **changes)}
    refusal = pytest.raises(rb.InvalidInput, match=f"table 'replay' of {saved} {message}")
    with CheckpointReader(saved) as reader, refusal:
        read_contents(reader, tables)


def test_a_checkpoint_of_tables_with_other_names_or_none_at_all_is_refused(saved, path):
    with pytest.raises(rb.InvalidInput, match=r"has tables \['replay'\], this server has \['other', 'replay'\]"):
        rb.BufferServer({"replay": PRIORITIZED, "other": UNIFORM}, restore=saved).start()
    with pytest.raises(rb.InvalidInput, match="saved with ReplayTable, this server has RolloutTable"):
        rb.BufferServer({"replay": ROLLOUT}, restore=saved).start()
    with pytest.raises(rb.InvalidInput, match=f"there is no checkpoint at {path}"):
        rb.BufferServer({"replay": PRIORITIZED}, restore=path).start()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "was written by another version of rl_buffer: .*missing required field"),
        ({"tables": {"replay": {"config": {"type": "OtherTable"}}}}, "was written by another version of rl_buffer"),
        (
            {"format": 2, "tables": {}, "parameters": {}, "stats": {}, "writers": {}},
            "has format 2, this version reads 1",
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(path, description, message):
    with CheckpointWriter(path) as file:
        file.begin(json.dumps(description), {})
        file.finish()
    with CheckpointReader(path) as reader, pytest.raises(rb.InvalidInput, match=f"{path} {message}"):
        read_contents(reader, {})


def test_rows_with_their_fields_in_another_order_are_refused(serve, connect, path):
    fields = {"left": rb.Field((2,)), "right": rb.Field((2,))}
    action = rb.Field((), "int64")
    tables = [
        rb.ReplayTable(rb.TransitionSpec(obs=dict(order), action=action), capacity=10)
        for order in (fields.items(), reversed(fields.items()))
    ]
    connect(serve(tables[0])).checkpoint(path)
    with pytest.raises(rb.InvalidInput, match="was saved with another order of fields"):
        rb.BufferServer({"replay": tables[1]}, restore=path).start()


# ---- the script ------------------------------------------------------------------------------------------------


def test_the_serve_script_begins_with_a_checkpoint(path, connect):
    command = [
        sys.executable,
        ROOT / "scripts" / "serve.py",
        "--env",
        "CartPole-v1",
        "--address",
        f"ipc://{path.parent}/server",
    ]
    for options, before in ((), 0), (("--restore", path), 5):
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True) as script:
            try:
                assert any("serving CartPole-v1" in line for line in script.stdout)
                client = connect(f"ipc://{path.parent}/server")
                (table,) = client.tables
                assert client.size(table) == before
                with client.writer(table, num_envs=1, autoreset=None) as writer:
                    for _ in range(5):
                        zeros = np.zeros(4)
                        writer.add(zeros, 0, 0.0, True, zeros)
                client.checkpoint(path)
            finally:
                script.send_signal(signal.SIGINT)
