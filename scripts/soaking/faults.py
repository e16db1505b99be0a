"""What goes wrong in a soak, when, and to whom: drawn from a seed before it begins, so that it can be repeated."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rl_buffer.failpoints import FAILPOINTS

# What happens, and how often in a minute; at least once in any run.
PER_MINUTE = {
    "kill": 12.0,  # SIGKILL of a client at any moment
    "die_at": 24.0,  # SIGKILL of a client at a failpoint
    "stop": 10.0,  # SIGSTOP of a client, SIGCONT some seconds later
    "close": 4.0,  # a client closes its sockets and writes on into the rows that it holds
    "fork": 4.0,  # a forked child tries to use its parent's client
    "stall": 8.0,  # a client does nothing for some seconds: it reads no answers either
    "second_server": 0.5,  # another server wants the address
    "kill_server": 2.0,  # SIGKILL of the server at any moment or at a failpoint, and the next one at the address
    "checkpoint": 2.0,  # written under load, then restored by another server and compared
}
_LONGEST_S = 6.0  # of a stop or stall; the rings go round several times in a second or two
_MOST_PASSAGES = 60
_FIRST_STEPS = ("attach.connected", "attach.welcomed", "attach.mapped", "client.asked")
_PREFIXES = {
    "writer": "writer.",
    "learner": "sampler.",
    "rollout_writer": "rollout_writer.",
    "rollout_reader": "rollout_reader.",
    "publisher": "publisher.",
    "follower": "parameters.",
    "vandal": "attach.",
}
_AT_BIRTH = ("attach.", "client.", "server.")
_LAST_STEPS = ("mapped", "opened")  # these too come only once in a client's life
_HOLDING = ("writer", "rollout_writer")  # may write on with closed sockets
_MAY_FORK = ("writer", "learner", "rollout_writer", "rollout_reader", "publisher", "follower")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    at_s: float  # from the beginning
    kind: str
    victim: str = ""  # name of a client's place in the crew
    seconds: float = 0.0
    failpoint: str = ""  # NAME:COUNT

    @property
    def at_birth(self) -> bool:
        """Whether the failpoint comes only once in a client's life, so that it must be armed before that begins."""
        name = self.failpoint.partition(":")[0]
        return name.startswith(_AT_BIRTH) or name.endswith(_LAST_STEPS)

    def __str__(self) -> str:
        words = (f"{self.at_s:7.2f} s", self.kind, self.victim, self.failpoint)
        return " ".join(word for word in words if word) + (f" {self.seconds:.2f} s" if self.seconds else "")


def plan_faults(seed: int, duration_s: float, kinds: Collection[str], crew: dict[str, str]) -> list[Fault]:
    """All faults of a run, in order. The same arguments give the same plan.

    Args:
        seed: of everything that is drawn.
        duration_s: of the run, in seconds; nothing goes wrong in its last tenth.
        kinds: of PER_MINUTE.
        crew: name of a place -> role of the client there.
    """
    rng = np.random.default_rng(seed)
    faults = []
    for kind, per_minute in PER_MINUTE.items():
        num_faults = max(1, rng.poisson(per_minute * duration_s / 60))
        drawn = [_draw(rng, kind, at_s, crew) for at_s in rng.uniform(0.05, 0.9, num_faults) * duration_s]
        faults += drawn if kind in kinds else []  # drawn all the same: leaving one kind out changes no other
    return sorted(faults, key=lambda fault: fault.at_s)


def _draw(rng: np.random.Generator, kind: str, at_s: float, crew: dict[str, str]) -> Fault:
    seconds = float(rng.exponential(1.0)) % _LONGEST_S + 0.05 if kind in ("stop", "stall", "close") else 0.0
    count = int(_MOST_PASSAGES ** rng.uniform())
    among = {"close": _HOLDING, "fork": _MAY_FORK}.get(kind, tuple(_PREFIXES))
    victims = [name for name, role in crew.items() if role in among]
    victim = victims[rng.integers(len(victims))]
    if kind == "kill_server":
        # Half of them at a failpoint that the server was started with, at the latest when this moment comes.
        names = [name for name in FAILPOINTS if name.startswith("server.")]
        name, count = names[rng.integers(len(names))], int(10_000 ** rng.uniform())
        return Fault(at_s, kind, failpoint=f"{name}:{count}" if rng.uniform() < 0.5 else "")
    if kind in ("second_server", "checkpoint"):
        return Fault(at_s, kind)
    if kind == "die_at":
        prefix = _PREFIXES[crew[victim]]
        names = [name for name in FAILPOINTS if name.startswith(prefix)] + list(_FIRST_STEPS)
        fault = Fault(at_s, kind, victim, failpoint=f"{names[rng.integers(len(names))]}:{count}")
        if fault.at_birth:
            fault = Fault(at_s, kind, victim, failpoint=fault.failpoint.partition(":")[0])
        return fault
    return Fault(at_s, kind, victim, seconds)
