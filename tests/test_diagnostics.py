"""Rates, ages, uses, lags and priorities, by a clock that the test turns."""

import numpy as np
import pytest
from core_driver import Client, make_core, rollout_table

from rl_buffer.diagnostics import WINDOW_S, ItemWatch, RateWindow, TableDiagnostics, describe_priorities
from rl_buffer.samplers import Prioritized


def rows(*numbers):
    return np.array(numbers, np.int64)


# ---- rates ---------------------------------------------------------------------------------------------------


def noted(*notes):
    window = RateWindow()
    for now_s, count in notes:
        window.note(now_s, {"table": (count,)})
    return window


def test_a_rate_is_of_the_last_seconds_and_not_of_all_time():
    window = noted(*((t, 100 * t) for t in range(100)))
    elapsed_s, (grown,) = window.changes("table", (100 * 99 + 50,), 99.5)
    assert WINDOW_S <= elapsed_s <= WINDOW_S + 1.0
    assert grown / elapsed_s == pytest.approx(100.0)


def test_a_burst_that_is_long_past_counts_nothing_even_if_nobody_looked_since():
    window = noted((0.0, 0), (0.5, 1_000), (1.0, 2_000))
    window.note(60.0, {"table": (2_010,)})
    elapsed_s, (grown,) = window.changes("table", (2_010,), 60.0)
    assert grown / elapsed_s == pytest.approx(10 / 59)


def test_no_more_notes_are_kept_than_the_window_needs():
    window = noted(*((t / 2, t) for t in range(1000)))
    assert len(window._notes) <= WINDOW_S / 0.5 + 2


def test_who_came_within_the_window_counts_from_then():
    window = noted((0.0, 0), (0.5, 0))
    assert window.changes("client", (300,), 3.0, since_s=1.0) == (2.0, (300,))


def test_a_rate_right_after_the_start_is_not_enormous():
    assert noted((0.0, 0)).changes("table", (64,), 0.001) == (0.5, (64,))


# ---- drawn items ---------------------------------------------------------------------------------------------


def test_a_drawn_item_has_its_age_in_items_and_seconds_its_uses_and_its_lag():
    watch, odd = ItemWatch(8), rows(1, 1)
    watch.committed(rows(3, 5), odd, 2, now_s=10.0, version=4)  # items 0 and 1
    watch.drawn(rows(3, 3), odd, 2, 10.0, 4)
    watch.drawn(rows(5, 6), odd, 12, 13.5, 9)  # ten more came; nothing is known of row 6
    figures = watch.describe()
    assert figures["draws_looked_at"] == 3
    assert figures["age_steps"] == {"mean": 4.0, "p50": 1.0, "p90": 10.0, "max": 10.0}
    assert figures["age_s"] == {"mean": pytest.approx(3.5 / 3), "p50": 0.0, "p90": 3.5, "max": 3.5}
    assert figures["times_sampled"] == {"mean": pytest.approx(4 / 3), "p50": 1.0, "p90": 2.0, "max": 2.0}
    assert figures["version_lag"] == {"mean": pytest.approx(5 / 3), "p50": 0.0, "p90": 5.0, "max": 5.0}


def test_what_a_row_held_before_is_not_taken_for_what_it_holds_now():
    watch = ItemWatch(300)
    watch.committed(rows(200), rows(1), 1, 0.0, 1)
    watch.drawn(rows(200), rows(3), 300, 9.0, 1)  # committed again, and that was not watched
    assert watch.describe()["draws_looked_at"] == 0
    watch.committed(rows(200), rows(5), 301, 9.0, 1)
    watch.drawn(rows(200), rows(5), 301, 9.0, 1)
    assert watch.describe()["times_sampled"]["max"] == 1.0


def test_every_row_of_a_table_can_be_watched_and_none_is_taken_for_another():
    num_rows = 1000
    watch, every = ItemWatch(num_rows), np.arange(1000)
    odd = np.ones(num_rows, np.int64)
    watch.committed(every, odd, num_rows, 0.0, 1)
    for row in range(num_rows):
        watch.drawn(rows(*[row] * (row % 3)), odd, num_rows, 0.0, 1)
    looks = watch.describe()
    assert looks["draws_looked_at"] == sum(row % 3 for row in range(num_rows))
    assert looks["age_steps"]["max"] == num_rows - 1 - 1
    assert looks["times_sampled"]["max"] == 2.0


def test_a_lag_that_nobody_knows_is_left_out():
    watch = ItemWatch(4)
    watch.committed(rows(0), rows(1), 1, 0.0, version=0)
    watch.committed(rows(1), rows(1), 2, 0.0, version=7)  # of an earlier server
    watch.drawn(rows(0, 1), rows(1, 1), 2, 0.0, 3)
    assert watch.describe()["draws_looked_at"] == 2
    assert watch.describe()["version_lag"] is None


def test_only_the_last_draws_are_looked_back_on():
    watch = ItemWatch(2)
    watch.committed(rows(0), rows(1), 1, 0.0, 1)
    for _ in range(5000):
        watch.drawn(rows(0), rows(1), 1, 0.0, 1)
    figures = watch.describe()
    assert figures["draws_looked_at"] == 2048
    assert figures["times_sampled"]["max"] == 5000.0
    assert figures["times_sampled"]["mean"] == 5000 - 2047 / 2


def test_a_commit_is_watched_again_after_a_fiftieth_of_a_second():
    watch = ItemWatch(4)
    watch.committed(rows(0), rows(1), 1, 3.0, 1)
    assert watch.next_commit_s == pytest.approx(3.02)


# ---- priorities ----------------------------------------------------------------------------------------------


def test_priorities_are_described_by_quantiles_and_by_what_the_top_hundredth_has():
    figures = describe_priorities(np.r_[np.full(990, 1.0), np.full(10, 99.0)])
    assert figures["min"] == figures["p50"] == figures["p99"] == 1.0
    assert figures["max"] == 99.0
    assert figures["top_1_percent_share"] == pytest.approx(0.5)
    assert describe_priorities(np.ones(1000))["top_1_percent_share"] == pytest.approx(0.01)
    assert describe_priorities(np.zeros(0)) is None


def test_the_largest_masses_are_no_overflow():
    assert describe_priorities(np.full(1000, 1e306))["top_1_percent_share"] == pytest.approx(0.01)


def test_of_a_large_table_a_bounded_part_is_looked_at_from_both_ends_of_the_ring():
    diagnostics = TableDiagnostics(100_000)
    masses = np.arange(1.0, 100_001.0)
    ring = [np.arange(60_000, 100_000), np.arange(60_000)]
    figures = diagnostics.describe(ring, masses, 0.0)["priorities"]
    assert figures["items_looked_at"] == 4096
    assert figures["p50"] == pytest.approx(50_000, rel=0.05)  # three times the sample's deviation
    assert figures["top_1_percent_share"] == pytest.approx(0.02, rel=0.1)


def test_what_was_described_is_given_again_within_half_a_second():
    diagnostics, masses = TableDiagnostics(2), np.ones(2)
    first = diagnostics.describe([np.arange(2)], masses, 1.0)
    masses[0] = 5.0
    assert diagnostics.describe([np.arange(2)], masses, 1.4)["priorities"] == first["priorities"]
    assert diagnostics.describe([np.arange(2)], masses, 1.5)["priorities"]["max"] == 5.0


# ---- in `info` -----------------------------------------------------------------------------------------------


class Clock(Client):
    """A client whose messages come at `now_s`."""

    now_s = 0.0

    def __init__(self, core, number=0):
        handle = core.handle
        core.handle = lambda channel, frame, _: handle(channel, frame, self.now_s)
        super().__init__(core, number)


def test_info_has_rates_and_diagnostics_of_a_table_and_of_its_clients():
    core = make_core(replay={"capacity": 64, "headroom": 64, "sampler": Prioritized()})
    client = Clock(core)
    client.open_writer(1, max_commit_rows=8, num_wanted=16)
    client.open_sampler(2, batch_size=4)
    client.publish()
    for second in range(1, 11):
        client.now_s = float(second)
        client.commit(1, 8, parameter_version=1)
        ((_, batch),) = client.credit(2, 1)
        sample = batch.sample
    client.credit(2, 0, sample.rows[:4], sample.generations[:4] - [0, 2, 2, 2], np.ones(4), num_overtaken=1)
    client.publish()
    client.now_s = 11.0
    ((_, batch),) = client.credit(2, 1)
    info = core.info(11.0)
    table, (session,) = info["tables"]["replay"], info["clients"]
    assert table["inserts_per_s"] == pytest.approx(8 * 5 / 5)
    assert table["samples_per_s"] == pytest.approx(4 * 6 / 5)
    assert table["samples_per_insert"] == pytest.approx(44 / 80)
    assert table["samples_per_insert_now"] == pytest.approx(24 / 40)
    assert table["stale_update_share"] == pytest.approx(3 / 4)
    assert table["overtaken_share"] == pytest.approx(1 / 24)
    items = table["sampled_items"]
    assert items["draws_looked_at"] == 44
    assert 0 <= items["age_steps"]["max"] < 64
    assert items["age_s"]["max"] <= 8.0
    assert items["version_lag"] == {"mean": pytest.approx(4 / 44), "p50": 0.0, "p90": 0.0, "max": 1.0}
    assert table["priorities"]["items_looked_at"] == 64
    assert (session["inserts_per_s"], session["samples_per_s"]) == (table["inserts_per_s"], table["samples_per_s"])
    assert (session["inserts"], session["samples"], session["last_message_s"]) == (80, 44, 0.0)
    assert core.info(14.5)["clients"][0]["last_message_s"] == pytest.approx(3.5)


def test_a_clients_counts_include_what_it_has_closed():
    core = make_core()
    client = Client(core)
    client.open_writer(1)
    client.commit(1, 2)
    core._close(core.sessions[client.id(0)[:16]].channels[client.id(1)])
    (session,) = core.info(0.0)["clients"]
    assert (session["writers"], session["inserts"]) == (0, 2)


def test_info_has_age_and_lag_of_rollouts_and_who_reads_how_many():
    core = make_core(rollout=rollout_table())
    client = Clock(core)
    client.open_rollout_writer(1)
    client.open_reader(2)
    client.publish()
    client.commit(1, 1, parameter_version=1)
    client.publish()
    client.now_s = 2.0
    client.credit(2, 1)
    info = core.info(2.0)
    items = info["tables"]["rollout"]["sampled_items"]
    assert items["age_s"]["max"] == 2.0
    assert items["version_lag"]["max"] == 1.0
    assert info["tables"]["rollout"]["priorities"] is None
    assert info["clients"][0]["reading"] == 1
