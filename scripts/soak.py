"""Run a server and its clients under faults drawn from a seed, and check every row. Nothing may be lost, torn or hung.

uv run scripts/soak.py --minutes 20               everything that can go wrong
uv run scripts/soak.py --minutes 2 --seed 7       the same faults at the same moments, each time
uv run scripts/soak.py --faults kill stop         only some kinds; --faults none for none

Half of the time the tables are in a directory, so that a killed server's successor goes on from them; the other half
in anonymous memory. The exit status is 1 unless nothing is torn, lost, phantom, hung, leaked or failed.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rl_buffer as it is here, whatever is installed

import tyro

import rl_buffer as rb
from scripts.soaking.coordinator import CREW, Coordinator, Totals
from scripts.soaking.faults import PER_MINUTE, plan_faults

PROBLEMS = ("torn", "lost", "phantom", "hung", "leaked", "failed")
_MOST_SHOWN = 20  # problems in the report
_PROGRESS_EVERY_S = 10.0


@dataclass
class Soak:
    """Options of the soak."""

    minutes: float = 1.0
    """How long the clients run, in minutes; starting and ending come on top of it."""
    seed: int | None = None
    """Of the faults; drawn and printed if it is not given."""
    faults: tuple[str, ...] = tuple(PER_MINUTE)
    """Kinds of faults: kill, die_at, stop, close, fork, stall, second_server, kill_server, checkpoint, or none."""
    hang_s: float = 60.0
    """A client that has no success for so many seconds hangs, unless it or the server was stopped meanwhile."""
    show_faults: bool = False
    """Print the plan before it begins."""


def main(options: Soak) -> int:
    """Run, report, and return the exit status."""
    kinds = [] if options.faults == ("none",) else list(options.faults)
    unknown = set(kinds) - set(PER_MINUTE)
    if unknown:
        raise rb.InvalidInput(f"--faults takes {', '.join(PER_MINUTE)} or none, not {', '.join(sorted(unknown))}")
    if not options.minutes > 0:
        raise rb.InvalidInput(f"--minutes must be above 0, got {options.minutes}")
    seed = time.monotonic_ns() % 2**32 if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    totals, duration_s = Totals(), options.minutes * 60 / 2
    for half, warm in enumerate((True, False)):
        plan = plan_faults(seed + half, duration_s, kinds, {name: role for name, (role, _) in CREW.items()})
        print(f"tables in {'a directory' if warm else 'memory'} for {duration_s:.0f} s, {len(plan)} faults", flush=True)
        if options.show_faults:
            print(*plan, sep="\n", flush=True)
        coordinator = Coordinator(plan, duration_s=duration_s, hang_s=options.hang_s, warm=warm, say=_say)
        with _progress(coordinator):
            totals.add(coordinator.run())
        if coordinator.was_interrupted:
            break
    return report(totals)


def _say(line: str) -> None:
    print(line, flush=True)


def report(totals: Totals) -> int:
    """Print what it came to; return the exit status."""
    counts, found = totals.counts, dict.fromkeys(PROBLEMS, 0)
    for problem, _ in totals.problems:
        found[problem] += 1
    print(f"\nsent {counts['sent']:,}, acknowledged {counts['acknowledged']:,} (rows, fragments, versions)")
    print(f"sampled {counts['sampled']:,}, verified {counts['verified']:,}, audited {counts['rows audited']:,}")
    print(
        f"overtaken {counts['overtaken']:,}, stale {counts['stale']:,}, episodes {counts['episodes']:,}, "
        f"deadlines {counts['deadlines']:,}, reconnects {counts['reconnects']:,}, clients {counts['clients']:,}, "
        f"servers killed {counts['servers killed']:,}, checkpoints restored {counts['checkpoints restored']:,}"
    )
    print("faults: " + (", ".join(f"{kind} {count}" for kind, count in sorted(totals.faults.items())) or "none"))
    for problem, text in totals.problems[:_MOST_SHOWN]:
        print(f"{problem}: {text}")
    if len(totals.problems) > _MOST_SHOWN:
        print(f"... and {len(totals.problems) - _MOST_SHOWN} more")
    print(", ".join(f"{problem} {count}" for problem, count in found.items()))
    return int(any(found.values()))


@contextmanager
def _progress(coordinator: Coordinator) -> Iterator[None]:
    """A line every ten seconds, even while the coordinator waits for something."""
    ended = threading.Event()

    def tell() -> None:
        started_s = time.monotonic()
        while not ended.wait(_PROGRESS_EVERY_S):
            print(f"{time.monotonic() - started_s:6.0f} s: {coordinator.progress()}", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Soak, description=__doc__)))
    except KeyboardInterrupt:
        print("stopped")
    except (rb.RLBufferError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
