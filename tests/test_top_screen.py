"""What `rl-buffer top` draws: within the terminal, with every table, in places that stay."""

import math
from io import StringIO

import pytest
from rich.console import Console

import rl_buffer as rb
from rl_buffer.top_screen import Screen, bar, duration, gauge, short, sparkline

SPEC = rb.TransitionSpec(obs=rb.Field((4,)), action=rb.Field((), "int64"))
TABLES = {
    "replay": rb.ReplayTable(SPEC, 1_000_000, rb.Prioritized(), rb.SampleToInsertRatio(4.0, 1000, 2000.0)),
    "a table with a very long name": rb.ReplayTable(SPEC, 1_000),
    "rollout": rb.RolloutTable(SPEC, num_steps=2, num_envs=2),
}
ADDRESS = "ipc:///run/user/1000/rl_buffer-0123456789ab"
SIZES = [(80, 24), (200, 50)]


def spread(value):
    return {"mean": value, "p50": value, "p90": value, "max": value}


def table(name, rate=12_345.6, waits=()):
    config = TABLES[name]
    figures = {
        "size": 500,
        "capacity": getattr(config, "capacity", 16),
        "inserts": 123_456_789,
        "samples": 987_654_321,
        "deletes": 1,
        "reserved_rows": 128,
        "inserts_per_s": rate,
        "samples_per_s": 4 * rate,
        "samples_per_insert": 3.98,
        "samples_per_insert_now": 4.02,
        "waits": list(waits),
        "stuck": "",
        "sampled_items": {
            "draws_looked_at": 9,
            **{key: spread(79.96) for key in ("age_steps", "age_s", "times_sampled", "version_lag")},
        },
        "priorities": None,
    }
    if isinstance(config, rb.RolloutTable):
        return figures | {"reading": 2}
    limiter = {"kind": "MinSize", "cursor": 3e3, "min_diff": None, "max_diff": None, "min_size": 1000}
    if name == "replay":
        limiter |= {"kind": "SampleToInsertRatio", "min_diff": 2000.0, "max_diff": 6000.0, "min_size": 1}
        figures["priorities"] = {"p50": 0.0712, "p99": 15.5, "top_1_percent_share": 0.27, "items_looked_at": 4096}
    return figures | {"limiter": limiter, "stale_update_share": 0.012, "overtaken_share": 0.0}


def client(number, name=None, **changes):
    return {
        "name": name or f"actor-{number}",
        "pid": 4_190_000 + number,
        "connected": True,
        "attached_s": 100.0,
        "last_message_s": 0.123,
        "writers": 1,
        "samplers": 0,
        "reserved_rows": 128,
        "reading": 0,
        "inserts_per_s": 99_999.0,
        "samples_per_s": 0.0,
    } | changes


def info(num_clients, waits=(), **changes):
    tables = {name: table(name, waits=waits) for name in TABLES}
    clients = [client(number) for number in reversed(range(num_clients))] + [client(7, "rl-buffer top")]
    return {
        "num_messages": 1_234_567_890,
        "num_refused": 12,
        "checkpoint": None,
        "tables": tables,
        "clients": clients,
    } | changes


def drawn(width, height, answer, trouble="", page=0, looks=1, stats=None):
    """The screen as a terminal of that size gets it, line by line."""
    screen = Screen(ADDRESS)
    for _ in range(looks):
        screen.update(answer, TABLES, stats or {})
    console = Console(width=width, height=height, file=StringIO(), record=True, force_terminal=True)
    for line in screen.lines(width, height, trouble, page):
        console.print(line, no_wrap=True, crop=False, overflow="ignore", highlight=False)
    return console.export_text(styles=False).splitlines()


@pytest.mark.parametrize("num_clients", [0, 3, 100])
@pytest.mark.parametrize(("width", "height"), [*SIZES, (120, 30), (80, 12), (40, 10)])
def test_it_fits_and_shows_the_headings_and_every_table(width, height, num_clients):
    lines = drawn(width, height, info(num_clients, waits=["actor-1: " + "waits for something " * 10]), looks=100)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert lines[2].startswith("TABLE ")
    for name in TABLES:
        assert sum(line.startswith(name[:10]) for line in lines) == 1, name
    assert any("waits  replay: actor-1" in line for line in lines)


def test_the_episodes_of_all_clients_are_those_of_their_statistics():
    assert drawn(80, 24, info(0))[1] == "no episode has ended yet"
    tracker = rb.StatsTracker(1, extra_metrics_keys=("speed",), done_reason_keys=("fell",))
    for reward, fell in ((10.0, True), (30.0, False), (80.0, False), (200.0, False)):
        tracker.update([reward], [True], metrics={"speed": [2.5]}, done_reasons={"fell": [fell]})
    line = drawn(120, 24, info(0), stats=tracker.get_statistics())[1]
    assert line == "4 episodes · return 80 (10..200) · length 1 · fell 25 % · speed 2.50"


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rates_gauges_sparklines_and_clients_are_there(width, height):
    stats = {"train/num_episodes": 3.0, "train/rewards_mean": 5.0, "train/rewards_min": 1.0, "train/rewards_max": 9.0}
    stats |= {"train/lengths_mean": 7.0, "train/clients/actor-1/rewards_mean": 45.25}
    lines = drawn(width, height, info(3), looks=3, stats=stats)
    screen = "\n".join(lines)
    assert "· 3 clients · 1.23G messages, 12 refused" in lines[0]
    assert "12.3k" in lines[3]
    assert "49.4k" in lines[3]
    assert "3.98" in lines[3]
    assert "80.0s" in lines[3]
    assert "samples wait ├" in lines[4]
    assert "3.00k in 2.00k..6.00k" in lines[4]
    assert "███ max 12.3k" in lines[5]
    assert "top 1 % has 27 %" in lines[6]
    assert "stale 1.2 %" in lines[6]
    assert "500 of 1.00k items until sampling starts" in screen
    assert "128 being written, 500 finished, 2 being read" in screen
    rows = [line.split() for line in lines if line.startswith("actor-")]
    assert [row[0] for row in rows] == ["actor-0", "actor-1", "actor-2"]
    assert rows[1][1:] == ["4190001", "1w", "100k", "0", "128", "45.2", "0.12s"]
    assert rows[2][-2:] == ["-", "0.12s"]
    assert "rl-buffer top" not in screen


def test_no_column_of_figures_is_cut_off_at_80_columns():
    lines = drawn(80, 24, info(3), looks=100)
    figures = [line for line in lines[1:] if not line.startswith("a table with")]
    assert not any("…" in line for line in figures)


def test_a_hundred_clients_are_shown_side_by_side_where_there_is_room_and_counted_where_not():
    wide, narrow = drawn(200, 50, info(100)), drawn(80, 24, info(100))
    assert any("actor-0 " in line and "actor-" in line[100:] for line in wide)
    for lines in (wide, narrow):
        text = "\n".join(lines)
        num_shown = text.count("actor-")
        assert f"and {100 - num_shown} more clients: {short((100 - num_shown) * 99_999)} inserts/s, 0 samples/s" in text
    assert "\n".join(wide).count("actor-") > 50


def test_every_client_is_on_one_page():
    seen = set()
    for page in range(40):
        text = "\n".join(drawn(80, 24, info(100), page=page))
        seen |= {word for word in text.split() if word.startswith("actor-")}
    assert seen == {f"actor-{number}" for number in range(100)}


def test_nothing_jumps_when_somebody_begins_to_wait():
    places = []
    for waits in ([], ["learner: sampling waits"]):
        lines = drawn(80, 24, info(3, waits))
        places.append([number for number, line in enumerate(lines) if line.startswith(("actor", "CLIENT", "rollout"))])
    assert places[0] == places[1]


def test_a_state_in_which_nobody_can_move_comes_first():
    answer = info(3, waits=["actor-1: inserting waits"])
    answer["tables"]["rollout"]["stuck"] = "nobody can move: all wait for each other"
    lines = drawn(80, 24, answer)
    waits = [line for line in lines if line.startswith(("stuck", "waits", "+"))]
    assert waits[0].startswith("stuck  rollout: nobody can move")
    assert waits[1].startswith("waits  replay: actor-1")
    assert waits[2] == "+1 waits  a table with a very long name: actor-1: inserting waits"
    assert len(waits) == 3


def test_a_lost_server_is_said_and_the_last_picture_stays():
    lines = drawn(80, 24, info(3), trouble="no server for 12.0s (ServerLost); looking for one")
    assert "no server for 12.0s" in lines[0]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("actor-2") for line in lines)


def test_before_the_first_answer_it_says_that_it_waits():
    lines = [line.plain for line in Screen(ADDRESS).lines(80, 24, "no server")]
    assert lines[1] == "waiting for a server"


def test_a_client_that_closed_its_connection_and_lives_is_marked():
    lines = drawn(80, 24, info(0, clients=[client(0, connected=False, pid=0)]))
    (line,) = (line for line in lines if line.startswith("actor-0"))
    assert line.split()[1] == "?"
    assert line.rstrip().endswith("gone")


def test_more_tables_than_lines_are_counted():
    tables = {f"table-{number:02d}": table("replay") for number in range(60)}
    lines = drawn(80, 24, info(3, tables=tables))
    num_shown = sum(line.startswith("table-") for line in lines)
    assert num_shown > 5
    assert f"and {60 - num_shown} more tables" in "\n".join(lines)
    assert len(lines) == 24


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (7.254, "7.25"),
        (12.34, "12.3"),
        (123.4, "123"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (1234, "1.23k"),
        (99_999, "100k"),
        (999_900, "1.00M"),
        (12_345_678, "12.3M"),
        (-2500, "-2.50k"),
        (math.inf, "-"),
    ],
)
def test_numbers_are_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12s"),
        (9.996, "10.0s"),
        (99.4, "99.4s"),
        (245, "4m05s"),
        (11_520, "3h12m"),
        (5 * 86400 + 26_000, "5d07h"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_bars_gauges_and_sparklines_go_from_one_end_to_the_other():
    assert (bar(0, 4), bar(0.5, 4), bar(2, 4)) == ("░░░░", "██░░", "████")
    assert (gauge(0, 0, 10, 6), gauge(10, 0, 10, 6), gauge(99, 0, 10, 6)) == ("├●───┤", "├───●┤", "├───●┤")
    assert sparkline([1, 0, 4, 8], 6) == "  ▁ ▄█"
    assert sparkline(range(100), 3)[-1] == "█"
    assert sparkline([], 3) == "   "
