"""A server keeps its tables in a directory, is killed, and another one goes on with them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import child_processes as child
import msgspec
import numpy as np
import pytest
from child_processes import NUMBERED_SPEC, numbered_row
from episode_envs import committed_leaves

import rl_buffer as rb

pytestmark = pytest.mark.timeout(240)  # a few seconds on a machine of its own

SERVE = Path(__file__).parent.parent / "scripts" / "serve.py"
CAPACITY = 64
REPLAY = rb.ReplayTable(NUMBERED_SPEC, CAPACITY, rb.Prioritized(alpha=1.0, epsilon=1e-9), headroom=64, seed=0)
ROLLOUT_SPEC = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64"))
ROLLOUTS = rb.RolloutTable(ROLLOUT_SPEC, num_steps=1, num_envs=1, num_fragments=6)


@pytest.fixture
def make_server(tmp_path, serve):
    """A server, not started, of these tables in the directory `tables`, at the same address each time."""

    def make(tables=REPLAY, directory=tmp_path / "tables", **options):
        tables = tables if isinstance(tables, dict) else {"replay": tables}
        return rb.BufferServer(tables, f"ipc://{tmp_path}/server", directory=directory, **options)

    return make


@pytest.fixture
def server(make_server):
    with make_server() as server:
        yield server


def kill(server):
    """SIGKILL, and wait until the process is gone."""
    os.kill(server.pid, signal.SIGKILL)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


def restart(server):
    kill(server)
    server.start()


def add_numbers(client, numbers):
    with client.writer("replay", num_envs=1, chunk_size=8) as writer:
        for number in numbers:
            writer.add(**numbered_row(number))


def numbers(client):
    """The numbers of all committed rows, each of which is whole."""
    leaves = committed_leaves(client, "replay")
    found = leaves["actions"] // 7
    assert (leaves["observations"] == found[:, None]).all()
    assert (leaves["extras/checksum"] == child.checksum(found)).all()
    return sorted(found.tolist())


def replay_info(client):
    return client.info()["tables"]["replay"]


def weights(sampler):
    """number -> importance weight, which is the smallest mass over its mass at beta = 1."""
    batch = sampler.sample(beta=1.0)
    return dict(zip((batch.actions // 7).tolist(), batch.weights.tolist(), strict=True))


def contents_of(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(directory).iterdir()}


# ---- what is there again -----------------------------------------------------------------------------------------


def test_contents_priorities_statistics_and_counts_are_those_of_the_killed_server(server, connect):
    before = connect(server)
    with before.writer("replay", num_envs=1, autoreset=None, chunk_size=8) as writer:
        for number in range(100):
            writer.add(**numbered_row(number) | {"done": np.array([number % 3 == 0])})
    sampler = before.sampler("replay", batch_size=1000, prefetch=0)
    batch = sampler.sample()
    sampler.update_priorities(batch, 1.0 + batch.actions / 7)
    drawn = weights(sampler)
    assert drawn == {number: pytest.approx((1 + 36) / (1 + number)) for number in range(36, 100)}
    info, stats = replay_info(before), before.stats()
    assert (info["inserts"], info["deletes"], info["samples"], stats["train/num_episodes"]) == (100, 36, 2000, 34)
    restart(server)
    after = connect(server)
    assert numbers(after) == list(range(36, 100))
    assert after.stats() == stats
    # What was looked at in the last seconds is not kept, nor how many priorities came.
    recent = {"inserts_per_s", "samples_per_s", "samples_per_insert_now", "sampled_items", "updates"}
    assert {name: value for name, value in replay_info(after).items() if name not in recent} == {
        name: value for name, value in info.items() if name not in recent
    }
    assert weights(after.sampler("replay", batch_size=1000, prefetch=0)) == drawn
    add_numbers(after, range(100, 110))
    assert numbers(after) == list(range(46, 110))


def test_writers_and_a_learner_go_on_through_kills_and_nothing_is_lost_or_twice(
    make_server, connect, children, pipe, receive
):
    table = rb.ReplayTable(NUMBERED_SPEC, 1 << 17, rb.Prioritized(), headroom=64, seed=0)
    with make_server(table) as server:
        ends = []
        for number in range(2):
            here, there = pipe()
            children.start(f"writer-{number}", child.write_through_kills, server.address, there, number * 10**6)
            ends.append(here)
        client = connect(server)
        sampler = client.sampler("replay", batch_size=32)
        acknowledged = [0, 0]
        for _ in range(4):
            for number, here in enumerate(ends):
                target = acknowledged[number] + 200
                while acknowledged[number] < target:
                    acknowledged[number] = receive(here, children)
                    batch = sampler.sample()
                    assert (batch.extras["checksum"] == child.checksum(batch.actions // 7)).all()
                    sampler.update_priorities(batch, np.ones(32))
            restart(server)
            for number, here in enumerate(ends):
                while here.poll():
                    acknowledged[number] = here.recv()
            assert client.reconnect()
            there = set(numbers(client))
            for number in range(2):
                assert there.issuperset(range(number * 10**6, number * 10**6 + acknowledged[number]))
        written = []
        for number, here in enumerate(ends):
            here.send("stop")
            while not isinstance(message := receive(here, children), tuple):
                pass
            written += range(number * 10**6, number * 10**6 + message[1])
        assert numbers(client) == written
        assert replay_info(client)["inserts"] == client.stats()["train/num_episodes"] == len(written)
        assert replay_info(client)["reserved_rows"] == 0


def test_what_was_cleared_stays_away(server, connect):
    client = connect(server)
    add_numbers(client, range(10))
    client.clear("replay")
    add_numbers(client, range(10, 13))
    restart(server)
    client = connect(server)
    assert numbers(client) == [10, 11, 12]
    assert (replay_info(client)["inserts"], client.size("replay")) == (13, 3)


def test_priorities_for_a_batch_of_the_killed_server_reach_the_rows_that_are_still_there(server, connect):
    client = connect(server)
    add_numbers(client, range(CAPACITY))
    sampler = client.sampler("replay", batch_size=1000, prefetch=0)
    batch = sampler.sample()
    restart(server)
    assert client.reconnect()
    add_numbers(client, range(CAPACITY, CAPACITY + 10))
    td_errors = 1.0 + batch.actions / 7
    sampler.update_priorities(batch, td_errors)
    drawn = weights(sampler)
    assert replay_info(client)["stale_updates"] == int((td_errors <= 10).sum())
    assert all(drawn[number] / drawn[10] == pytest.approx(11 / (1 + number)) for number in range(11, CAPACITY))


def test_rollouts_that_were_finished_or_read_are_handed_out_in_their_order(
    make_server, connect, children, pipe, receive, eventually
):
    def write(client, first):
        with client.rollout_writer("rollout", autoreset=None) as writer:
            for number in range(first, first + 2):
                writer.add([[number] * 3], [number], [0.0], [False], [0.0], [0.0])
                writer.commit([0.0])

    with make_server({"rollout": ROLLOUTS}) as server:
        write(connect(server), 0)
        here, there = pipe()
        reader = children.start("reader", child.hold_rollouts, server.address, there, "rollout", 1)
        assert receive(here, children) == 1
        write(connect(server), 2)
        restart(server)
        client = connect(server)
        assert client.info()["tables"]["rollout"]["reading"] == 1  # its reader lives
        os.kill(reader, signal.SIGKILL)
        eventually(lambda: client.info()["tables"]["rollout"]["reading"] == 0)  # else it comes last
        rollouts = client.rollouts("rollout").take(4)
        assert rollouts.num_fragments == 4
        (batch,) = rollouts.get(shuffle=False)
        assert batch.actions.tolist() == [0, 1, 2, 3]
        rollouts.release()
        eventually(lambda: client.info()["tables"]["rollout"]["reading"] == 0)
        restart(server)
        info = connect(server).info()["tables"]["rollout"]
        assert (info["size"], info["inserts"], info["reading"]) == (0, 4, 0)


def test_a_commit_that_was_published_in_part_is_whole_once_and_not_twice(make_server, connect):
    limiter = rb.SampleToInsertRatio(1.0, min_size_to_sample=8, error_buffer=13.0)  # takes 21, then one for each sample
    table = rb.ReplayTable(NUMBERED_SPEC, 256, rate_limiter=limiter)
    with make_server(table) as server:
        client = connect(server)
        writer = client.writer("replay", num_envs=1, chunk_size=8)
        for number in range(24):
            writer.add(**numbered_row(number) | {"done": np.ones(1)})
        with pytest.raises(rb.DeadlineExceeded, match="inserting waits"):
            writer.flush(timeout_s=0.1)
        for _ in range(2):
            assert client.size("replay") == 21
            assert client.stats()["train/num_episodes"] < 21  # of whole commits
            restart(server)
            assert client.reconnect()
        sampler = client.sampler("replay", batch_size=4, prefetch=0)
        sampler.sample()
        writer.flush()
        assert numbers(client) == list(range(24))
        assert client.stats()["train/num_episodes"] == replay_info(client)["inserts"] == 24


# ---- who may still write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["goes on", "is killed"])
def test_no_row_that_a_stopped_writer_may_write_into_is_given_to_others(
    server, connect, children, pipe, receive, eventually, ending
):
    here, there = pipe()
    stopped = children.start("half", child.write_half_of_a_chunk, server.address, there, 1000)
    assert receive(here, children) == "half"
    os.kill(stopped, signal.SIGSTOP)
    held = replay_info(connect(server))["reserved_rows"]
    restart(server)
    client = connect(server)
    assert replay_info(client)["reserved_rows"] == held >= 8
    (quarantined,) = (session for session in client.info()["clients"] if not session["connected"])
    assert (quarantined["pid"], quarantined["reserved_rows"]) == (stopped, held)
    last = 3 * REPLAY.num_rows
    add_numbers(client, range(last))
    newest = list(range(last - CAPACITY, last))
    assert numbers(client) == newest
    if ending == "goes on":
        os.kill(stopped, signal.SIGCONT)
        here.send("go on")
        assert receive(here, children) == "done"
        assert numbers(client) == [*newest[8:], *range(1000, 1008)]
    else:
        os.kill(stopped, signal.SIGKILL)
    eventually(lambda: replay_info(client)["reserved_rows"] == 0, timeout_s=2.0)
    eventually(lambda: all(session["connected"] for session in client.info()["clients"]), timeout_s=2.0)


def test_rows_of_a_writer_that_died_with_its_server_are_free(server, connect, children, pipe, receive, eventually):
    here, there = pipe()
    address = server.address
    holder = children.start("holder", lambda: child.hold_rows(address, there, close_socket=False))
    assert receive(here, children) == "holding"
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(holder, signal.SIGKILL)
    eventually(children.reap)
    restart(server)
    client = connect(server)
    assert replay_info(client)["reserved_rows"] == 0
    assert len(client.info()["clients"]) == 1


# ---- directories -------------------------------------------------------------------------------------------------


def test_a_stopped_server_leaves_its_tables_and_a_deleted_directory_is_an_empty_table(make_server, connect, tmp_path):
    with make_server() as server:
        add_numbers(connect(server), range(5))
    with make_server() as server:
        assert numbers(connect(server)) == [0, 1, 2, 3, 4]
    shutil.rmtree(tmp_path / "tables")
    with make_server() as server:
        assert connect(server).size("replay") == 0


def test_another_seed_is_no_other_table(make_server, connect):
    with make_server() as server:
        add_numbers(connect(server), range(5))
    with make_server(msgspec.structs.replace(REPLAY, seed=7)) as server:
        assert connect(server).size("replay") == 5


OTHERS = {
    "capacity": (
        {"replay": msgspec.structs.replace(REPLAY, capacity=65)},
        {},
        "tables.replay.capacity was 64, and is 65",
    ),
    "alpha": (
        {"replay": msgspec.structs.replace(REPLAY, sampler=rb.Prioritized())},
        {},
        "tables.replay.sampler.alpha was 1.0, and is 0.6",
    ),
    "one more": ({"replay": REPLAY, "second": ROLLOUTS}, {}, "tables.second was not there, and is {"),
    "window": ({"replay": REPLAY}, {"stats_window": 7}, "stats.window was 100, and is 7"),
}


@pytest.mark.parametrize(("tables", "options", "difference"), OTHERS.values(), ids=OTHERS)
def test_other_tables_are_refused_with_the_first_difference_and_nothing_is_touched(
    make_server, connect, tmp_path, tables, options, difference
):
    with make_server() as server:
        add_numbers(connect(server), range(5))
    before = contents_of(tmp_path / "tables")
    with pytest.raises(rb.InvalidInput) as raised:
        make_server(tables, **options).start()
    assert difference in str(raised.value)
    assert "or delete this one" in str(raised.value)
    assert contents_of(tmp_path / "tables") == before
    with make_server() as server:
        assert connect(server).size("replay") == 5


def test_a_second_server_on_a_directory_is_refused_and_the_first_goes_on(server, connect, tmp_path):
    client = connect(server)
    second = rb.BufferServer({"replay": REPLAY}, directory=tmp_path / "tables")
    with pytest.raises(rb.AddressInUse, match=f"another server keeps its tables in {tmp_path}/tables"):
        second.start()
    add_numbers(client, range(5))
    assert numbers(client) == [0, 1, 2, 3, 4]


def test_a_directory_that_others_may_enter_is_refused(make_server, tmp_path):
    (tmp_path / "tables").mkdir(mode=0o755)
    with pytest.raises(rb.ConnectionRefused, match=r"tables has owner \d+ and mode 0755.*nobody else can change"):
        make_server().start()


def test_files_are_private(server, tmp_path):
    assert (tmp_path / "tables").stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "tables").iterdir()}
    assert modes == dict.fromkeys(("0.generations", "0.rows", "directory.lock", "ledger", "tables.json"), 0o600)


@pytest.mark.parametrize("name", ["0.rows", "0.generations", "ledger"])
def test_a_file_that_was_cut_short_is_refused(make_server, tmp_path, name):
    with make_server():
        pass
    nbytes = (tmp_path / "tables" / name).stat().st_size
    os.truncate(tmp_path / "tables" / name, nbytes - 8)
    with pytest.raises(rb.RLBufferError, match=f"has {nbytes - 8} bytes, the server promised {nbytes}"):
        make_server().start()


def test_a_directory_whose_server_was_killed_before_it_was_complete_is_begun_again(make_server, connect, tmp_path):
    with make_server() as server:
        add_numbers(connect(server), range(5))
    (tmp_path / "tables/tables.json").unlink()  # which is written last
    os.truncate(tmp_path / "tables/0.rows", 4096)
    with make_server() as server:
        assert connect(server).size("replay") == 0


def test_a_configuration_that_cannot_be_read_is_refused(make_server, tmp_path):
    with make_server():
        pass
    (tmp_path / "tables/tables.json").write_text(json.dumps({"format": 1})[:-1])
    with pytest.raises(rb.InvalidInput, match=r"tables\.json cannot be read"):
        make_server().start()


# ---- room --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_file_system(tmp_path):
    """A tmpfs of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small tmpfs: {error}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_file_system_without_room_is_refused_with_need_and_have_and_left_as_it_was(make_server, small_file_system):
    message = r"need \d+\.\d\d GiB in .*/small/tables, and its file system has 0\.00 GiB left; lower"
    with pytest.raises(rb.NotEnoughMemory, match=message):
        make_server(directory=small_file_system / "tables").start()
    assert list(small_file_system.iterdir()) == []


def test_tables_that_no_file_system_holds_are_refused_and_nothing_is_left(make_server, tmp_path):
    with pytest.raises(rb.NotEnoughMemory, match=r"need \d+\.\d\d GiB"):
        make_server(rb.ReplayTable(NUMBERED_SPEC, capacity=10**12)).start()
    assert not (tmp_path / "tables").exists()


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_restored_into_a_new_directory_and_not_into_one_with_tables(make_server, connect, tmp_path):
    with make_server(directory=None) as server:
        client = connect(server)
        add_numbers(client, range(70))
        client.checkpoint(tmp_path / "checkpoint")
        stats, info = client.stats(), replay_info(client)
    server = make_server(restore=tmp_path / "checkpoint")
    with server:
        client = connect(server)
        assert numbers(client) == list(range(6, 70))
        add_numbers(client, range(70, 72))
        client.checkpoint(tmp_path / "another")  # out of files, too
        kill(server)
        with pytest.raises(rb.InvalidInput, match=r"holds tables, which .*/checkpoint would replace"):
            server.start()
    with make_server() as server:
        client = connect(server)
        assert numbers(client) == list(range(8, 72))
        assert client.stats() == stats
        assert replay_info(client)["inserts"] == info["inserts"] + 2


# ---- scripts -----------------------------------------------------------------------------------------------------


def test_serve_keeps_its_table_in_the_directory_that_it_is_given(connect, tmp_path):
    address = f"ipc://{tmp_path}/server"
    command = [sys.executable, SERVE, "--env", "CartPole-v1", "--address", address, "--directory", tmp_path / "tables"]
    sizes = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
            try:
                assert any("serving CartPole-v1" in line for line in iter(script.stdout.readline, ""))
                client = connect(address)
                sizes.append(client.size("replay"))
                if len(sizes) == 1:
                    with client.writer("replay", num_envs=1) as writer:
                        for _ in range(10):
                            writer.add(np.zeros(4), 0, 1.0, False, np.zeros(4))
            finally:
                script.kill()  # its server ends with it
        with pytest.raises(rb.ServerLost):
            client.parameters("none", timeout_s=30.0)
    assert sizes[0] == 0 < sizes[1] <= 10
