"""What `rl-buffer top` shows: one answer of `client.info()`, and of `stats()`, as lines that fit a terminal's size.

Only text is made here; `top` asks the server and owns the terminal. Columns have fixed widths and rows a fixed order:
nothing jumps from one look to the next.
"""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from rl_buffer.samplers import Uniform
from rl_buffer.tables import ReplayTable, RolloutTable

WATCHER = "rl-buffer "  # how the names of those begin who only look: they are counted and not listed
_HISTORY = 60  # looks
_BARS = " ▁▂▃▄▅▆▇█"
_MAX_WAITS = 3
_MIN_CLIENT_LINES = 4  # that tables leave
_CLIENT_WIDTH = 79
_DIM, _HEAD, _BAD, _GOOD, _FIGURE = "dim", "bold cyan", "bold red", "green", "bold"

Config = ReplayTable | RolloutTable


def short(number: float, unit: str = "") -> str:
    """At most five characters and the unit: 0, 7.25, 12.3, 123, 1.23k, 12.3k, 123k, 1.23M."""
    if not math.isfinite(number):
        return "-"
    sign, number = "-" if number < 0 else "", abs(number)
    for suffix in ("", "k", "M", "G", "T"):
        if number < 999.5 or suffix == "T":
            break
        number /= 1000
    is_whole = not suffix and number == int(number)
    digits = 0 if is_whole or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{sign}{number:.{digits}f}{suffix}{unit}"


def duration(seconds: float) -> str:
    """At most six characters: 0.12s, 12.3s, 4m05s, 3h12m, 5d07h."""
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if hours == 0:
        return f"{minutes}m{int(seconds) % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if days == 0 else f"{days}d{hours % 24:02d}h"


def bar(share: float, width: int) -> str:
    """A filled part of `width` characters."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values, from 0 to the largest of them; shorter histories are at the right."""
    shown = list(values)[-width:]
    largest = max(shown, default=0.0)
    marks = [_BARS[0 if value <= 0 else max(1, round(8 * value / largest))] for value in shown]
    return "".join(marks).rjust(width)


def gauge(cursor: float, low: float, high: float, width: int) -> str:
    """Where the cursor is between two bounds."""
    share = (cursor - low) / (high - low) if high > low else 0.5
    place = round(min(1.0, max(0.0, share)) * (width - 3))
    return f"├{'─' * place}●{'─' * (width - 3 - place)}┤"


class Screen:
    """Remembers rates for the sparklines, and lays the lines out."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._rates: dict[tuple[str, str], deque[float]] = {}
        self._info: Mapping[str, Any] | None = None
        self._tables: Mapping[str, Config] = {}
        self._stats: Mapping[str, float] = {}

    def update(self, info: Mapping[str, Any], tables: Mapping[str, Config], stats: Mapping[str, float]) -> None:
        """Take an answer of the server, its tables' configurations, and the statistics of all episodes, per client."""
        self._info, self._tables, self._stats = info, tables, stats
        for name, table in info["tables"].items():
            for rate in ("inserts_per_s", "samples_per_s"):
                self._rates.setdefault((name, rate), deque(maxlen=_HISTORY)).append(table[rate])

    def lines(self, width: int, height: int, trouble: str = "", page: int = 0) -> list[Text]:
        """At most `height` lines of at most `width` columns.

        Args:
            width: columns.
            height: lines.
            trouble: why the server does not answer; the last answer is shown then.
            page: of the clients, if they do not fit; one that is not there starts from the front again.
        """
        info = self._info
        lines = [self._title(width, trouble)]
        if info is None:
            lines.append(Text("waiting for a server", style=_DIM))
        else:
            tables = info["tables"].items()
            waits = [Text(f"stuck  {name}: {table['stuck']}", style=_BAD) for name, table in tables if table["stuck"]]
            for name, table in tables:
                waits += [Text(f"waits  {name}: {sentence}", style="yellow") for sentence in table["waits"]]
            num_waits = min(len(info["tables"]) + 1, _MAX_WAITS if height >= 20 else 1)
            clients = self._listed(info)
            # Title, episodes, heading and keys.
            num_lines = height - 4 - num_waits - min(_MIN_CLIENT_LINES, max(0, height - 16))
            num_shown, each = _room(len(info["tables"]), num_lines)
            lines.append(_episodes(self._stats))
            lines.append(_columns(_TABLE_COLUMNS, [heading for heading, _, _ in _TABLE_COLUMNS], width, _HEAD))
            for name in list(info["tables"])[:num_shown]:
                lines += self._table(name, info["tables"][name], width)[:each]
            if num_shown < len(info["tables"]):
                lines.append(Text(f"and {len(info['tables']) - num_shown} more tables", style=_DIM))
            lines += _waits(waits, num_waits)
            lines += self._clients(clients, width, height - len(lines) - 1, page)
            lines += [Text()] * (height - 1 - len(lines))
        lines.append(Text("q ends, space shows more clients · rates are of the last 5 s", style=_DIM))
        for line in lines:
            line.truncate(width, overflow="ellipsis")
            if trouble and line is not lines[0]:
                line.stylize(_DIM)
        return lines[:height]

    def _title(self, width: int, trouble: str) -> Text:
        title = Text("rl_buffer ", style="bold")
        title.append(f"{self._address} ", style="cyan")
        if trouble:
            title.append(trouble, style=_BAD)
        elif self._info is not None:
            clients = [client for client in self._info["clients"] if client["connected"]]
            watching = sum(client["name"].startswith(WATCHER) for client in clients)
            title.append(f"· {len(clients) - watching} clients")
            title.append(f" · {short(self._info['num_messages'])} messages, {short(self._info['num_refused'])} refused")
            if self._info["checkpoint"] is not None:
                title.append(f" · checkpoint {duration(self._info['checkpoint']['running_s'])}", style=_GOOD)
        if len(title) > width:  # the address is what gives way
            room = max(8, len(self._address) - (len(title) - width))
            title = Text.assemble(
                ("rl_buffer ", "bold"), (f"…{self._address[-room + 1 :]} ", "cyan"), title[len(self._address) + 11 :]
            )
        return title

    # ---- tables --------------------------------------------------------------------------------------------

    def _table(self, name: str, table: Mapping[str, Any], width: int) -> list[Text]:
        items = table["sampled_items"]
        age, lag, uses = items["age_s"], items["version_lag"], items["times_sampled"]
        cells = [
            name,
            f"{bar(table['size'] / table['capacity'], 8)} {short(table['size']):>5}",
            short(table["inserts_per_s"]),
            short(table["samples_per_s"]),
            short(table["samples_per_insert"]),
            "-" if age is None else duration(age["p50"]),
            "-" if lag is None else short(lag["p50"]),
            "-" if uses is None else short(uses["p50"]),
        ]
        lines = [_columns(_TABLE_COLUMNS, cells, width, "", {0: _FIGURE, 1: _GOOD})]
        lines.append(self._limiter(name, table, width))
        lines.append(self._sparklines(name, width))
        lines += self._priorities(name, table)
        return lines

    def _limiter(self, name: str, table: Mapping[str, Any], width: int) -> Text:
        config = self._tables.get(name)
        if isinstance(config, RolloutTable):
            words = f"{table['reserved_rows']} being written, {table['size']} finished, {table['reading']} being read"
            return Text(f"  fragments  {words}, {short(table['deletes'])} dropped for lag", style=_DIM)
        limiter = table["limiter"]
        kind, cursor, low, high = (limiter[key] for key in ("kind", "cursor", "min_diff", "max_diff"))
        size, min_size = table["size"], limiter["min_size"]
        if size < min_size:
            words = f"{bar(size / min_size, 16)} {short(size)} of {short(min_size)} items until sampling starts"
        elif low is None or high is None:
            words = f"{kind}: open, nobody waits for it"
        else:
            bounds = f"{short(cursor)} in {short(low)}..{short(high)}"
            words = f"samples wait {gauge(cursor, low, high, 16 if width < 120 else 40)} inserts wait  {bounds}"
            if width >= 120:
                words += f"  {kind}"
        return Text(f"  limiter    {words}")

    def _sparklines(self, name: str, width: int) -> Text:
        line, cells = Text("  "), min(_HISTORY, max(8, (width - 50) // 2))
        for rate, word in (("inserts_per_s", "inserts/s"), ("samples_per_s", "samples/s")):
            values = self._rates.get((name, rate), deque())
            line.append(f"{word}  ", style=_DIM)
            line.append(sparkline(values, cells), style=_GOOD)
            line.append(f" max {short(max(list(values)[-cells:], default=0.0)):5}  ", style=_DIM)
        return line

    def _priorities(self, name: str, table: Mapping[str, Any]) -> list[Text]:
        config, priorities = self._tables.get(name), table["priorities"]
        if isinstance(config, RolloutTable):
            return []
        if config is not None and isinstance(config.sampler, Uniform):
            words = "sampled uniformly"
        elif priorities is None:
            words = "priorities of nothing yet"
        else:
            share = f"top 1 % has {100 * priorities['top_1_percent_share']:.0f} %"
            words = f"priorities p50 {short(priorities['p50'])} p99 {short(priorities['p99'])}, {share}"
        worn = f"stale {100 * table['stale_update_share']:.1f} %, overtaken {100 * table['overtaken_share']:.1f} %"
        return [Text(f"  {words} · {worn}", style=_DIM)]

    # ---- clients -------------------------------------------------------------------------------------------

    def _listed(self, info: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        clients = [client for client in info["clients"] if not client["name"].startswith(WATCHER)]
        return sorted(clients, key=lambda client: (_natural(client["name"]), client["pid"], -client["attached_s"]))

    def _return_of(self, client: Mapping[str, Any]) -> float:
        """The mean of its last episodes, by its name; NaN while there is none."""
        category = next(iter(self._stats), "").partition("/")[0]  # before each key
        return self._stats.get(f"{category}/clients/{client['name']}/rewards_mean", math.nan)

    def _clients(self, clients: list[Mapping[str, Any]], width: int, height: int, page: int) -> list[Text]:
        """As many side by side as the width takes."""
        if height < 1:
            return []
        if not clients:
            return [Text("no clients are attached", style=_DIM)]
        if height < 3:
            return [_sum_of(clients)]
        num_blocks = min(max(1, (width + 2) // (_CLIENT_WIDTH + 2)), -(-len(clients) // 8))
        block_width = min(width, (width - 2 * (num_blocks - 1)) // num_blocks)
        num_rows = height - 1
        if num_rows * num_blocks < len(clients):
            num_rows -= 1  # the line that says how many more there are
        per_page = max(1, num_rows * num_blocks)
        first = page % -(-len(clients) // per_page) * per_page
        shown = clients[first : first + per_page]
        num_rows = min(num_rows, -(-len(shown) // num_blocks))
        heading = _columns(_CLIENT_COLUMNS, [heading for heading, _, _ in _CLIENT_COLUMNS], block_width, _HEAD)
        lines = [Text("  ").join([heading] * num_blocks)]
        for row in range(num_rows):
            cells = [_client(client, self._return_of(client), block_width) for client in shown[row::num_rows]]
            lines.append(Text("  ").join(cells))
        if len(shown) < len(clients):
            lines.append(Text("and ", style=_DIM) + _sum_of(clients[:first] + clients[first + per_page :]))
        return lines


# (heading, width, is right-aligned); a width counts the space behind it. The first column takes what is left.
_TABLE_COLUMNS = (
    ("TABLE", 13, False),
    ("ITEMS", 15, False),
    ("INSERTS/s", 10, True),
    ("SAMPLES/s", 10, True),
    ("SMP/INS", 9, True),
    ("AGE", 7, True),
    ("LAG", 6, True),
    ("USES", 6, True),
)
_CLIENT_COLUMNS = (
    ("CLIENT", 14, False),
    ("PID", 9, True),
    ("DOES", 7, True),
    ("INSERTS/s", 10, True),
    ("SAMPLES/s", 10, True),
    ("HOLDS", 7, True),
    ("RETURN", 8, True),
    ("SILENT", 8, True),
    ("", 5, False),
)


def _columns(
    columns: Sequence[tuple[str, int, bool]],
    cells: Sequence[str],
    width: int,
    style: str,
    styles: Mapping[int, str] | None = None,
) -> Text:
    """One row; what is wider than its column ends in an ellipsis."""
    spare = min(width - sum(column[1] for column in columns), 24)
    line = Text(style=style)
    for number, (cell, (_, column_width, is_right)) in enumerate(zip(cells, columns, strict=True)):
        room = column_width - 1 + (max(0, spare) if number == 0 else 0)
        text = cell if len(cell) <= room else cell[: room - 1] + "…"
        line.append(text.rjust(room) if is_right else text.ljust(room), style=(styles or {}).get(number, ""))
        line.append(" ")
    line.rstrip()
    return line


def _client(client: Mapping[str, Any], mean_return: float, width: int) -> Text:
    does = " ".join(f"{client[key]}{letter}" for key, letter in (("writers", "w"), ("samplers", "s")) if client[key])
    cells = [
        client["name"],
        str(client["pid"] or "?"),
        does or "-",
        short(client["inserts_per_s"]),
        short(client["samples_per_s"]),
        short(client["reserved_rows"] + client["reading"]),
        short(mean_return),
        duration(client["last_message_s"]),
        "" if client["connected"] else "gone",
    ]
    line = _columns(_CLIENT_COLUMNS, cells, width, "" if client["connected"] else _BAD)
    line.pad_right(max(0, width - line.cell_len))
    return line


def _sum_of(clients: list[Mapping[str, Any]]) -> Text:
    inserts, samples = (sum(client[rate] for client in clients) for rate in ("inserts_per_s", "samples_per_s"))
    return Text(f"{len(clients)} more clients: {short(inserts)} inserts/s, {short(samples)} samples/s", style=_DIM)


def _episodes(stats: Mapping[str, float]) -> Text:
    """Those of all clients, over the window: returns, lengths, and what `client.stats()` has besides."""
    figures = {key.partition("/")[2]: value for key, value in stats.items() if "/clients/" not in key}
    if not figures:
        return Text("no episode has ended yet", style=_DIM)
    line = Text(f"{short(figures['num_episodes'])} episodes · return ")
    line.append(short(figures["rewards_mean"]), style=_FIGURE)
    line.append(f" ({short(figures['rewards_min'])}..{short(figures['rewards_max'])})")
    line.append(f" · length {short(figures['lengths_mean'])}")
    for key, value in figures.items():
        if key.startswith("Done/"):
            line.append(f" · {key.removeprefix('Done/').removesuffix('_rate')} {100 * value:.0f} %")
        elif key.endswith("_mean") and key not in ("rewards_mean", "lengths_mean", "lifetime_rewards_mean"):
            line.append(f" · {key.removesuffix('_mean')} {short(value)}")
    return line


def _waits(waits: list[Text], num_lines: int) -> list[Text]:
    """As many lines whoever waits: what is below would jump."""
    if not waits:
        waits = [Text("nobody waits", style=_DIM)]
    if len(waits) > num_lines:
        last = Text.assemble((f"+{len(waits) - num_lines} ", _FIGURE), waits[num_lines - 1])
        waits = [*waits[: num_lines - 1], last]
    return waits + [Text()] * (num_lines - len(waits))


def _room(num_tables: int, num_lines: int) -> tuple[int, int]:
    """How many tables are shown, and in how many lines each: as many tables as can be, then as many lines."""
    for each in (4, 3, 2, 1):
        if num_tables * each <= num_lines:
            return num_tables, each
    return max(1, num_lines - 1), 1


def _natural(name: str) -> list[tuple[int, str]]:
    """actor-2 before actor-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
