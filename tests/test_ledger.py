"""A server that is killed at any store: its successor has the state before or after what was under way, never a mix."""

import contextlib
from collections import Counter

import numpy as np
import pytest
from core_driver import EPOCH as CLIENT_EPOCH
from core_driver import Client
from ledger_driver import (
    CAPACITY,
    EPOCH,
    EPSILON,
    LEARNER,
    SPEC,
    STATS,
    Fuse,
    Killed,
    Mapped,
    Model,
    Play,
    World,
    patch_stores,
)

from rl_buffer import mapped_ledger, messages
from rl_buffer.errors import InvalidInput, RLBufferError
from rl_buffer.frames import Grant
from rl_buffer.mapped_ledger import CLEARED, PUBLISHED, MappedLedger, ledger_arrays, ledger_fields, ledger_nbytes
from rl_buffer.messages import Envelope
from rl_buffer.peers import UNKNOWN_PROCESS
from rl_buffer.rate_limiters import MinSize, SampleToInsertRatio
from rl_buffer.recovery import resume, resumed_table
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.samplers import Fifo, Prioritized, Uniform
from rl_buffer.server_core import ServerCore
from rl_buffer.sessions import WriterProgress
from rl_buffer.spec import Field
from rl_buffer.tables import ReplayTable

PRIORITIZED = Prioritized(alpha=1.0, epsilon=EPSILON)
SCENARIOS = {
    "prioritized, late fragments dropped": (MinSize(1), PRIORITIZED, {"max_version_lag": 1}),
    "prioritized, commits in parts": (SampleToInsertRatio(1.0, 2, (0.0, 4.0)), PRIORITIZED, {}),
    "uniform, writers wait": (
        SampleToInsertRatio(1.0, 2, (0.0, 4.0)),
        Uniform(),
        {"max_version_lag": 1, "when_late": "wait", "fragments_per_update": 2},
    ),
}

NUM_STEPS = 30


def difference(world, core, model):
    """What of a server's state is not as the model says, or None."""
    replay, rollout = (core.tables[name].state for name in ("replay", "rollout"))
    contents, limiter, committed = world.contents["replay"], replay.limiter, replay.allocator.committed()
    fragments = [*rollout._finished, *rollout._reading.values()]
    stats, window = core.stats, model.rewards[-STATS.window :]
    alive = [writer.writer_id for key, writer in world.writers.items() if key[:-4] in world.tokens.values()]
    seen_and_expected = {
        "committed": ([contents[row] for row in committed], model.committed),
        "inserts": (limiter.num_inserts, model.num_inserts),
        "size": (limiter.size, len(committed)),
        "samples": (limiter.num_samples, model.num_samples),
        "fragments": ({world.contents["rollout"][f.row]: (f.number, f.version) for f in fragments}, model.fragments),
        "fragment commits": (rollout.num_commits, model.num_commits),
        "episodes": (stats.lifetime.count, len(model.rewards)),
        "window": (stats.get_raw_values()["rewards"], window),
        "mean reward": (stats.lifetime.mean, pytest.approx(np.mean(model.rewards or [0.0]))),
        "episodes of clients": (
            {name: (client.lifetime.count, list(client.rewards)) for name, client in stats.clients.items()},
            {name: (len(own), own[-STATS.window :]) for name, own in model.client_rewards.items()},
        ),
        "mean rewards of clients": (
            {name: client.lifetime.mean for name, client in stats.clients.items()},
            {name: pytest.approx(np.mean(own)) for name, own in model.client_rewards.items()},
        ),
        "progress": (
            [core.known_writers.get(writer_id, (0, 0)) for writer_id in alive],
            [model.progress.get(writer_id, (0, 0)) for writer_id in alive],
        ),
    }
    if isinstance(replay.config.sampler, Prioritized):
        masses = zip(contents, replay._sampler.masses_of(np.arange(len(contents))).tolist(), strict=True)
        seen_and_expected["masses"] = ({item: mass for item, mass in masses if mass}, pytest.approx(model.masses))
    else:
        seen_and_expected["live"] = (sorted(replay._sampler.state()), sorted(committed))
    differences = (f"{what} {seen}, not {right}" for what, (seen, right) in seen_and_expected.items() if seen != right)
    return next(differences, None)


def happened(world, core):
    """The log up to the kill: with its last event or without; of new priorities the first ones may have arrived."""
    *before, (kind, *what) = world.log or [("update", [])]
    possible = [world.log, before]
    if kind == "update":
        possible += [[*before, (kind, what[0][:number])] for number in range(1, len(what[0]))]
    differences = []
    for events in possible:
        differences.append(difference(world, core, Model(events)))
        if differences[-1] is None:
            return events
    return pytest.fail(f"after {world.log[-3:]}: {differences}")


def check_rows(world, core, model):
    """Every row is in one place, and none that a living process may write into or read is free or taken."""
    for name, table in core.tables.items():
        state, parity = table.state, np.asarray(world.generations[name]) % 2
        channels = [channel for session in core.sessions.values() for channel in session.channels.values()]
        held = [set(channel.rows) for channel in channels if channel.table is table]
        if name == "replay":
            used = state.allocator.committed().tolist()
            free = state.allocator.free().tolist()
            assert sum(map(len, held)) == state.allocator.num_reserved
            everything = [*used, *free, *(row for rows in held for row in rows)]
        else:
            used = [fragment.row for fragment in (*state._finished, *state._reading.values())]
            free = state._free.peek(state.num_free).tolist()
            everything = [*used, *free, *state._writing]
            assert set().union(*held) == {*state._reading, *state._writing}
        assert sorted(everything) == list(range(state.config.num_rows))
        assert np.flatnonzero(parity).tolist() == sorted(used)
    for number, token in world.tokens.items():
        quarantined = {"replay": set(), "rollout": set()}
        for channel in core.sessions[token].channels.values() if token in core.sessions else ():
            quarantined[channel.table.name].update(np.array(sorted(channel.rows)).tolist())
        for writer in (world.writers.get(token + bytes([channel, 0, 0, 0])) for channel in (1, 2)):
            if writer is not None:
                unpublished = {row for row, item in writer.sent.items() if item not in model.published}
                assert {*writer.rows} | unpublished <= quarantined[writer.table]
                assert model.progress.get(writer.writer_id, (0, 0))[0] >= writer.acknowledged
        if number == LEARNER:
            assert set(world.fragments) <= quarantined["rollout"]


def recovered(world, fuse, rng):
    """The successor of a killed server; sometimes the first to try is killed as well."""
    before = {name: np.array(generations) for name, generations in world.generations.items()}
    fuse.last = fuse.num_stores + int(rng.integers(200))
    with contextlib.suppress(Killed):
        world.start()
    fuse.last = None
    core = world.start()
    world.log[:] = happened(world, core)
    for name, generations in world.generations.items():
        assert (np.asarray(generations) >= before[name]).all()
    check_rows(world, core, Model(world.log))
    return core


@pytest.fixture
def fuse(monkeypatch):
    fuse = Fuse()
    patch_stores(monkeypatch, fuse)
    return fuse


def play(world, core, seed, num_steps):
    """Whether it was killed."""
    try:
        run = Play(world, core, seed)
        for _ in range(num_steps):
            run.step()
    except Killed:
        return True
    return False


def kinds_of(log):
    """What happened in a play, in words."""
    for kind, *what in log:
        if kind in ("clear", "sample"):
            yield f"{kind} {what[0]}"
        elif kind == "publish":
            yield f"publish {what[0]}"
            if what[3]["progress"].num_published:
                yield "publish a part"
        elif kind == "update" or what[0]:
            yield kind


def die_and_go_on(fuse, scenario, seed, kill_at):
    """Play the same every time, but die at another store; then the successor plays, and dies at any."""
    rng = np.random.default_rng(kill_at)
    fuse.last = None
    world = World(fuse, *SCENARIOS[scenario])
    core = world.start()
    fuse.last = fuse.num_stores + kill_at
    assert play(world, core, seed, NUM_STEPS)
    core = recovered(world, fuse, rng)
    fuse.last = fuse.num_stores + int(rng.integers(400))
    play(world, core, int(rng.integers(2**32)), NUM_STEPS)
    recovered(world, fuse, rng)


# Seeds in whose plays everything happens; if the protocol changes, choose others.
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("scenario", "seed"), [*zip(SCENARIOS, (165, 42, 91), strict=True)])
def test_a_kill_at_any_store_leaves_what_was_under_way_done_or_not_begun(fuse, scenario, seed):
    world = World(fuse, *SCENARIOS[scenario])
    core = world.start()
    num_stores = -fuse.num_stores
    assert not play(world, core, seed, NUM_STEPS)
    num_stores += fuse.num_stores
    expected = {"publish replay", "publish rollout", "clear replay", "clear rollout", "sample replay", "empty"}
    expected |= {"publish a part"} if "parts" in scenario else {"update"} if "prioritized" in scenario else set()
    assert expected <= {*kinds_of(world.log)}
    assert core.tables["rollout"].state.num_dropped or "dropped" not in scenario
    for kill_at in range(num_stores):
        die_and_go_on(fuse, scenario, seed, kill_at)


# ---- one by one ----------------------------------------------------------------------------------------------------


def replay_only(arrays=None, sampler=PRIORITIZED, generations=None):
    """A core with one table and its ledger's memory, which another call goes on with."""
    tables = {"replay": ReplayTable(SPEC, CAPACITY, sampler, headroom=9, seed=3)}
    if arrays is None:
        fields = ledger_fields(tables, STATS)
        arrays = ledger_arrays(fields, bytearray(ledger_nbytes(fields)))
    generations = np.zeros(tables["replay"].num_rows, np.int64) if generations is None else generations
    ledger = MappedLedger(arrays, tables, STATS)
    core = ServerCore(EPOCH, {"replay": resumed_table(ledger, "replay", generations)}, STATS, ledger)
    resume(core, ledger, (), 0.0)
    return core, arrays


def fill(core, num_rows):
    """Commit rows from outside of any session."""
    state = core.tables["replay"].state
    for _ in range(num_rows):
        rows = state.reserve(1)
        core._ledger.begin("replay", rows)
        state.commit(rows, None)
        core._ledger.end()
    return state


def test_arrays_start_with_a_cache_line_and_do_not_overlap():
    tables = {"a": ReplayTable(SPEC, 5, PRIORITIZED, headroom=2), "b": ReplayTable(SPEC, 3, headroom=1)}
    fields = ledger_fields(tables, STATS)
    assert ("a/masses" in fields, "b/masses" in fields) == (True, False)
    buffer = np.zeros(ledger_nbytes(fields) + 64, np.uint8)
    buffer = buffer[-buffer.ctypes.data % 64 :]
    arrays = ledger_arrays(fields, buffer)
    for number, array in enumerate(arrays.values()):
        assert array.ctypes.data % 64 == 0
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays.values()))


def test_the_first_server_of_a_seed_draws_as_one_without_a_directory_and_each_later_one_in_its_own_way():
    def draws(core):
        return core.tables["replay"].state.draw(20, 0).rows.tolist()

    seen = []
    for _ in range(2):
        core, arrays = replay_only(sampler=Uniform())
        state = fill(core, CAPACITY)
        first = draws(core)
        later = [draws(replay_only(arrays, Uniform(), generations=state.generations)[0]) for _ in range(2)]
        seen.append([first, *later])
    ordinary = ReplayTableState(state.config, np.zeros(state.config.num_rows, np.int64))
    ordinary.commit(ordinary.reserve(CAPACITY), None)
    assert seen[0] == seen[1]
    assert seen[0][0] == ordinary.draw(20, 0).rows.tolist()
    assert len({tuple(drawn) for drawn in seen[0]}) == 3


@pytest.mark.parametrize("count", [2**31, 2**53, 2**62])
def test_commits_are_counted_beyond_any_number_that_a_table_reaches(count):
    _, arrays = replay_only()
    arrays["replay/counts"][[PUBLISHED, CLEARED]] = count
    state = fill(replay_only(arrays)[0], 8)
    committed = state.allocator.committed().tolist()
    again = replay_only(arrays, generations=state.generations)[0].tables["replay"].state
    assert again.allocator.committed().tolist() == committed
    assert (again.limiter.num_inserts, again.limiter.size) == (count + 8, CAPACITY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replay/claims", 0),
        ("replay/claims", 1),
        ("replay/claims", 99),
        ("replay/masses", np.nan),
        ("replay/masses", -1.0),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_table_and_what_to_do(name, value):
    core, arrays = replay_only()
    state = fill(core, 3)
    arrays[name][state.allocator.committed()[1]] = value
    with pytest.raises(RLBufferError, match=r"table 'replay' contradicts itself: .*Delete the directory"):
        replay_only(arrays, generations=state.generations)


def test_more_clients_or_writers_than_there_is_room_for_are_refused_until_one_left(monkeypatch):
    monkeypatch.setattr(mapped_ledger, "MAX_CLIENTS", 3)
    monkeypatch.setattr(mapped_ledger, "MAX_WRITERS", 2)
    kept = replay_only()[0]._ledger
    clients = [kept.attached(bytes([number]) * 16, UNKNOWN_PROCESS) for number in range(2)]
    assert sorted(clients) == [1, 2]  # 0 is nobody
    with pytest.raises(InvalidInput, match="3 clients are attached or quarantined, which is the limit"):
        kept.attached(b"3" * 16, UNKNOWN_PROCESS)
    kept.left(clients[0])
    assert kept.attached(b"3" * 16, UNKNOWN_PROCESS) == clients[0]
    for number in range(2):
        kept.writer_opened(bytes([number]) * 16, WriterProgress(0, 0))
    with pytest.raises(InvalidInput, match="2 writers are open or may come back, which is the limit"):
        kept.writer_opened(b"3" * 16, WriterProgress(0, 0))
    with pytest.raises(InvalidInput, match="is open in another session"):
        kept.writer_opened(bytes(16), WriterProgress(0, 0))
    kept.writer_left(bytes(16), comes_back=False)
    assert kept.writer_opened(b"3" * 16, WriterProgress(0, 0)) == 0


def test_the_longest_free_rows_are_reserved_first_after_a_restart_too():
    core, arrays = replay_only()
    state = fill(core, 2 * CAPACITY)
    oldest = state.allocator.free()
    again = replay_only(arrays, generations=state.generations)[0].tables["replay"].state
    evicted = oldest[-CAPACITY:]
    assert again.allocator.free()[-CAPACITY:].tolist() == evicted.tolist()


def test_a_writer_that_may_come_back_goes_on_where_it_was_after_two_restarts():
    core, arrays = replay_only()
    core._ledger.writer_opened(b"w" * 16, WriterProgress(3, 1))
    for _ in range(2):
        core, arrays = replay_only(arrays)
        assert core.resume_point(b"w" * 16, 0) == (3, 1)


LIMITERS = [
    SampleToInsertRatio(0.3, 3, 2.5),
    SampleToInsertRatio(1.0, 2, (-5.5, 2.0)),
    MinSize(4),
    SampleToInsertRatio(7.0, 5, (0.0, 1e9)),
]


def test_a_kill_at_any_store_leaves_the_limiter_that_was_set_or_the_one_before(fuse):
    world = World(fuse, MinSize(1), PRIORITIZED, {})
    for limiter in LIMITERS:
        for kill_at in range(24):
            fuse.last = None
            core = world.start()
            before = core.tables["replay"].state.limiter.config
            fuse.last = fuse.num_stores + kill_at
            message = messages.encode_control(Envelope(1, EPOCH, messages.SetRateLimiter("replay", limiter)))
            try:
                core.attach(b"client of limits", "", 1, 0.0)
                core.handle(b"client of limits" + bytes(4), message, 0.0)
            except Killed:
                expected = before, limiter
            else:
                expected = (limiter,)
            fuse.last = None
            after = world.start().tables["replay"].state.limiter
            assert after.config in expected
        assert after.config == limiter, "it was never set"


def test_a_restarted_limiter_counts_on_from_where_it_was_set():
    core, arrays = replay_only()
    state = fill(core, 4)
    state.limiter.sampled(100)
    core._ledger.sampled("replay", 100)
    state.limiter.set(SampleToInsertRatio(2.0, 3, 20.0))
    core._ledger.limited("replay", state.limiter)
    fill(core, 2)
    again = replay_only(arrays, generations=state.generations)[0].tables["replay"].state.limiter
    assert again.cursor == state.limiter.cursor == 10.0  # (3 + 2) * 2
    assert again.state() == state.limiter.state()


# ---- items that leave with their last use --------------------------------------------------------------------------


def items_core(arrays, tables, generations):
    """The next server on this memory; nobody of before is there any more."""
    ledger = MappedLedger(arrays, tables, STATS)
    ledger.disown(list(ledger.clients()))
    core = ServerCore(CLIENT_EPOCH, {"items": resumed_table(ledger, "items", generations)}, STATS, ledger)
    resume(core, ledger, (), 0.0)
    return core


def play_items(core, contents, finished, announced):
    """Write seven items and read them, some not to the end; tell in `announced` what is about to be finished."""
    client, state = Client(core), core.tables["items"].state
    client.open_writer(1, "items", max_commit_rows=2, num_wanted=4)
    client.open_sampler(2, "items", batch_size=2)
    for number in range(5):
        num_rows = 2 if number < 2 else 1
        rows = client.rows[1][:num_rows]
        client.rows[1] = client.rows[1][num_rows:]
        for row in rows:
            contents[row] = len(contents["all"])
            contents["all"].append(row)
        events = client.commit(1, num_rows) + client.credit(2)
        for _, event in events:
            if isinstance(event, Grant):
                client.rows[1] += event.rows.tolist()
            elif number != 3:
                sample = event.sample
                items = [contents[row] for row in sample.rows.tolist()]
                announced[:] = items
                client.credit(2, 0, sample.rows, sample.generations, np.full(2, np.nan))
                finished.update(items)
                announced.clear()
    return state


@pytest.mark.parametrize("sampler", [Fifo(), PRIORITIZED])
@pytest.mark.parametrize("times", [1, 2])
def test_a_kill_at_any_store_loses_no_item_and_hands_none_out_too_often(fuse, sampler, times):
    tables = {"items": ReplayTable(SPEC, 9, sampler, headroom=5, seed=3, max_times_sampled=times)}
    kill_at, has_ended = 0, False
    while not has_ended:
        fuse.last = None
        arrays = {name: Mapped(field, fuse) for name, field in ledger_fields(tables, STATS).items()}
        generations = Mapped(Field((tables["items"].num_rows,), "int64"), fuse)
        contents, finished, announced = {"all": []}, Counter(), []
        core = items_core(arrays, tables, generations)
        fuse.last = fuse.num_stores + kill_at
        try:
            play_items(core, contents, finished, announced)
            has_ended = True
        except Killed:
            pass
        fuse.last = None
        state = items_core(arrays, tables, generations).tables["items"].state
        assert state.num_reading == state.num_reserved == 0
        waiting = {contents[row]: int(state.uses[row]) for row in state._waiting.rows().tolist()}
        assert list(waiting) == sorted(waiting), "they are in another order"
        published = state.limiter.num_inserts
        for item in range(published):
            uses = waiting.get(item, times)
            # What was just being finished may be so already, and need not.
            assert finished[item] <= uses <= finished[item] + (item in announced), f"item {item}, killed at {kill_at}"
        assert set(waiting) <= set(range(published))
        assert np.flatnonzero(np.asarray(generations) % 2).tolist() == sorted(state._waiting.rows().tolist())
        kill_at += 1
    assert kill_at > 100
