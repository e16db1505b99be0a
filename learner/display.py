"""One live display of a run, and plain lines where there is no terminal."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_LINE_EVERY_S = 5.0
_NEWS_KEPT = 4
_LINES_OF_THE_REST = 2 + 2 + 1 + 1 + _NEWS_KEPT + 1  # border, empty lines, heading of the actors, waits, news, cursor


class Display:
    """Shows figures as they are handed in; computes none. A context manager."""

    def __init__(self, title: str, measures: Sequence[str] = ()) -> None:
        """`measures`: names of the algorithm's own figures in each row."""
        self.console = Console()
        self._title = title
        self._measures = measures
        self._live = Live(console=self.console, auto_refresh=False, transient=False) if self._is_live else None
        self._news: deque[str] = deque(maxlen=_NEWS_KEPT)
        self._last_line_s = -_LINE_EVERY_S

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal

    def say(self, news: Sequence[str]) -> None:
        """Keep messages in view: an actor ended, an evaluation was made."""
        for line in news:
            if self._live is None:
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            else:
                self._news.extend(line.splitlines()[:1])

    def update(self, row: Mapping[str, float], actors: Sequence[Mapping[str, Any]], waits: Sequence[str]) -> None:
        """Show one row of metrics, the actors, and who waits.

        Args:
            row: figures by name.
            actors: of `client.info()["clients"]`, each with its `version_lag` in parameter versions and, if it has
                finished any, `num_episodes` and their `rewards_mean`.
            waits: sentences.
        """
        if self._live is not None:
            self._live.update(self._panel(row, actors, waits), refresh=True)
        elif time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self.console.print(
                f"{row['env_steps']:>9,.0f} env steps  {row['env_steps_per_s']:>7,.0f}/s  "
                f"{row['updates']:>8,.0f} updates  {row['updates_per_s']:>6,.0f}/s  "
                f"return {_shown(row['mean_return'], '.1f'):>8}  {row['samples_per_insert']:.2f} samples/insert",
                highlight=False,
                soft_wrap=True,
            )

    def _panel(self, row: Mapping[str, float], actors: Sequence[Mapping[str, Any]], waits: Sequence[str]) -> Panel:
        figures = Table.grid(padding=(0, 2))
        for _ in range(3):
            figures.add_column(style="cyan")
            figures.add_column(justify="right")
        cells = (
            ("env steps", f"{row['env_steps']:,.0f}"),
            ("updates", f"{row['updates']:,.0f}"),
            ("mean return", _shown(row["mean_return"], ".1f")),
            ("env steps/s", f"{row['env_steps_per_s']:,.0f}"),
            ("updates/s", f"{row['updates_per_s']:,.0f}"),
            ("eval return", _shown(row["eval_return"], ".1f")),
            ("inserts/s", f"{row['inserts_per_s']:,.0f}"),
            ("samples/s", f"{row['samples_per_s']:,.0f}"),
            ("samples/insert", f"{row['samples_per_insert']:.2f}"),
            ("buffer fill", f"{100 * row['buffer_fill']:.1f} %"),
            ("stale updates", f"{row['stale_updates']:,.0f}"),
            ("overtaken rows", f"{row['overtaken_rows']:,.0f}"),
            ("version lag", f"{row['version_lag']:,.0f}"),
            ("wall time", f"{row['wall_s']:.0f} s"),
            *((name.replace("_", " "), _shown(row[name], ".4g")) for name in self._measures),
        )
        for start in range(0, len(cells), 3):
            figures.add_row(*(text for cell in cells[start : start + 3] for text in cell))
        crew = Table(box=None, padding=(0, 2), pad_edge=False)
        for heading in ("actor", "pid", "inserts", "held", "lag", "episodes", "return"):
            crew.add_column(heading, justify="left" if heading == "actor" else "right", style="dim", no_wrap=True)
        # What does not fit the terminal would push the figures above out of it.
        room = max(1, self.console.height - _LINES_OF_THE_REST - -(-len(cells) // 3))
        shown = actors if len(actors) <= room else actors[: room - 1]
        for actor in shown:
            crew.add_row(
                actor["name"] if actor["connected"] else f"{actor['name']} (gone)",
                str(actor["pid"]),
                f"{actor['inserts']:,}",
                str(actor["reserved_rows"]),
                str(actor["version_lag"]),
                f"{actor.get('num_episodes', 0):,.0f}",
                f"{actor['rewards_mean']:.1f}" if "rewards_mean" in actor else "-",
            )
        if len(shown) < len(actors):
            crew.add_row(f"and {len(actors) - len(shown):,} more")
        # One line each and always as many, so that the panel keeps its height.
        lines = [waits[0] if waits else "nobody waits for the rate limiter", *self._news]
        notes = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
        return Panel(Group(figures, "", crew, "", *notes), title=self._title, border_style="blue")

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)


def _shown(number: float, form: str) -> str:
    """A figure, or a dash while there is none."""
    return "-" if number != number else format(number, form)
