"""Sentences: who waits at a table, for what, for how long, and whether anybody can end it.

Pure: names, numbers and durations come in as arguments. What is known of clients is what they send, so a wait counts as
one that somebody can end unless the contrary is certain, or has been so for a second.

    a wait can be ended   by a client that could insert, sample or give rows back, and can move
    a client can move     if it is connected, not stopped, and each wait of its own can be ended

What is left, when nothing more follows of these two, is stuck.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

SETTLED_S = 1.0  # a client that has waited and sent nothing for so long does nothing else meanwhile
THE_SERVER = -1  # as a helper: what waits for it ends by itself
_MOST_NAMED = 3

FOR_INSERTS, FOR_SAMPLES, FOR_ROWS = "inserts into", "samples from", "rows of"
_WHO_HELPS = {FOR_INSERTS: "writer", FOR_SAMPLES: "sampler", FOR_ROWS: "client that could give some back"}


class Client(NamedTuple):
    """One client, as far as it matters to those who wait for it."""

    name: str
    is_connected: bool  # False: it closed its connection, and its process lives on
    is_stopped: bool  # by a signal
    idle_s: float  # since its last commit or credit


class Wait(NamedTuple):
    """One client's wait at one table."""

    client: int
    table: str
    what: str  # FOR_INSERTS, FOR_SAMPLES or FOR_ROWS
    waited_s: float
    helpers: frozenset[int]  # clients of whom any could end it

    def __str__(self) -> str:
        return f"waits for {self.what} {self.table!r}"


def seconds(duration_s: float) -> str:
    """In as many digits as matter."""
    return f"{duration_s:.0f} s" if duration_s >= 10 else f"{duration_s:.1f} s"


def count(number: int, noun: str) -> str:
    """With its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def last(event: str, age_s: float | None) -> str:
    """When it happened, if it did."""
    return f"no {event} yet" if age_s is None else f"last {event} {seconds(age_s)} ago"


def sentence(name: str, reason: str, waited_s: float, others: Sequence[str] = (), num_more: int = 0) -> str:
    """`name` waits for `reason`, and what the others do of whom it depends; `num_more` wait behind it."""
    behind = [f"{num_more} more wait behind it"] if num_more else []
    return ", ".join((f"{name}: {reason}", *others, f"for {seconds(waited_s)} now", *behind))


def stuck(waits: Collection[Wait], clients: Mapping[int, Client]) -> dict[str, str]:
    """A sentence for each table where somebody waits whom nobody can help, by the table's name."""
    settled: dict[int, list[Wait]] = {}
    for wait in waits:
        if wait.waited_s >= SETTLED_S and clients[wait.client].idle_s >= SETTLED_S:
            settled.setdefault(wait.client, []).append(wait)
    able = {number for number, client in clients.items() if client.is_connected and not client.is_stopped}
    moving = (able - settled.keys()) | {THE_SERVER}
    open_waits = list(waits)
    while True:
        left = [wait for wait in open_waits if not wait.helpers & moving]
        freed = {number for number in able & settled.keys() if not any(wait in left for wait in settled[number])}
        if len(left) == len(open_waits) and freed <= moving:
            break
        open_waits, moving = left, moving | freed
    sentences: dict[str, str] = {}
    for wait in sorted(open_waits, key=lambda wait: -wait.waited_s):  # the longest tells most
        sentences.setdefault(wait.table, _stuck_sentence(wait, clients, settled))
    return sentences


def _stuck_sentence(wait: Wait, clients: Mapping[int, Client], settled: Mapping[int, Sequence[Wait]]) -> str:
    who = f"{clients[wait.client].name} {wait}"
    if not wait.helpers:
        return f"nobody can move: {who}, and no {_WHO_HELPS[wait.what]} is connected"
    named = sorted(wait.helpers)[:_MOST_NAMED]
    reasons = [_why_not(clients[number], settled.get(number, ()), is_itself=number == wait.client) for number in named]
    more = len(wait.helpers) - len(named)
    return f"nobody can move: {who}, but {', '.join(reasons)}{f' and {more} more likewise' if more else ''}"


def _why_not(helper: Client, waits: Sequence[Wait], *, is_itself: bool) -> str:
    if is_itself:
        return "nobody but itself could end that"
    if not helper.is_connected:
        return f"{helper.name} closed its connection and holds rows as long as its process lives"
    if helper.is_stopped:
        return f"{helper.name} is stopped (SIGCONT lets it go on)"
    return f"{helper.name} {waits[0]}"
