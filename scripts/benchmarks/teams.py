"""Teams (`team.py`) as the sections use them: started side by side, measured in turns while the others sleep."""

import json
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import OURS, Options
from benchmarks.team import LEARN, Load

CPPRB, REVERB = "cpprb MP", "Reverb"
_REVERB_PACKAGES = ("dm-reverb[tensorflow]==0.14.0", "tensorflow==2.15.*")
_START_S, _TURN_S = 600.0, 120.0  # deadlines; Reverb's first start downloads TensorFlow

Figures = dict[str, float]


class TeamFailed(Exception):
    """A team could not be started, or ended; the text says why, in a few words."""


class Team:
    """One store with its writers and its learner."""

    def __init__(self, store: str, load: Load, options: Options) -> None:
        """Start it and wait until its table is filled.

        Raises:
            TeamFailed: it could not be.
        """
        command = [*_interpreter(store, options), str(Path(__file__).with_name("team.py")), store]
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(load))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            bufsize=1,
        )
        try:
            self._answer(_START_S)
        except BaseException:
            self.stop()
            raise

    def turn(
        self,
        num_writers: int,
        seconds: float,
        task: str = LEARN,
        inserts_per_s: float | None = None,
        batches_per_s: float | None = None,
    ) -> Figures:
        """Let writers and the learner work, and return what `team.take_turn` counted.

        Args:
            num_writers: that write; the others sleep.
            seconds: that are counted.
            task: of the learner.
            inserts_per_s: of all writers together; None: as fast as they can.
            batches_per_s: of the learner, likewise.

        Raises:
            TeamFailed: it did not answer.
        """
        assert self._process.stdin is not None
        turn = {
            "num_writers": num_writers,
            "seconds": seconds,
            "task": task,
            "inserts_per_s": inserts_per_s,
            "batches_per_s": batches_per_s,
        }
        print(json.dumps(turn), file=self._process.stdin)
        figures: Figures = json.loads(self._answer(seconds + _TURN_S))
        return figures

    def _answer(self, timeout_s: float) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise TeamFailed(f"no answer in {timeout_s:.0f} s")
        line: str = stdout.readline()
        if not line:
            _, errors = self._process.communicate(timeout=_TURN_S)
            last = (errors.strip().splitlines() or ["ended"])[-1]
            raise TeamFailed("not installed" if last.startswith("ModuleNotFoundError") else last[:80])
        return line

    def stop(self) -> None:
        """End it, with all of its processes."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_TURN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def teams(stores: Sequence[str], load: Load, options: Options) -> Iterator[dict[str, Team | str]]:
    """All of them by name, or why there is none."""
    with ExitStack() as stack:
        started: dict[str, Team | str] = {}
        for store in stores:
            try:
                team = Team(store, load, options)
                stack.callback(team.stop)
                started[store] = team
            except TeamFailed as error:
                if store == OURS:
                    raise
                started[store] = str(error)
        yield started


def _interpreter(store: str, options: Options) -> list[str]:
    if store != REVERB:
        return [sys.executable]
    if options.reverb_python is not None:
        return [str(options.reverb_python)]
    uv = shutil.which("uv")
    if not options.install_reverb or uv is None:
        raise TeamFailed("not asked for")
    packages = [word for package in _REVERB_PACKAGES for word in ("--with", package)]
    return [uv, "run", "--isolated", "--no-project", "--python", "3.11", *packages, "python"]
