"""Episode statistics on the server: of all clients together, and of each by its name.

One thread. Bounded: beyond `MAX_CLIENTS` names the one whose last episode is longest ago is forgotten; its episodes
stay in the figures of all together, and are counted as those of others.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from rl_buffer.errors import InvalidInput
from rl_buffer.stats_tracker import Episode, Moments, StatsTracker

MAX_CLIENTS = 1024  # names; as many as can be attached at once
MAX_CLIENT_WINDOW = 100  # episodes of each that are kept, whatever the window of all together is
MAX_NAME_LENGTH = 100  # characters


class ClientRecord(msgspec.Struct, eq=False):
    """The episodes of one name, whichever processes had it."""

    slot: int  # 0 <= slot < MAX_CLIENTS; no two names have the same
    name: str
    rewards: deque[float]  # of its last episodes, oldest first
    lengths: deque[float]  # steps of each
    lifetime: Moments  # of all its rewards
    last: int = 0  # episodes of all clients, up to the last of its

    @property
    def is_consistent(self) -> bool:
        """Whether it can be what `ServerStats.state` said."""
        life = self.lifetime
        return (
            len(self.rewards) == len(self.lengths) <= life.count <= self.last
            and life.count > 0
            and all(map(math.isfinite, (*self.rewards, life.mean, life.m2, life.minimum, life.maximum)))
        )


def client_window(window: int) -> int:
    """Episodes of one client that are kept, where the window of all together is `window`."""
    return min(window, MAX_CLIENT_WINDOW)


class ServerStats(StatsTracker):
    """What all writers' episodes come together in, with a record per client name.

    Invariant: the episodes of all records and those of `num_of_others` are those of `lifetime`.
    """

    def __init__(
        self,
        window: int = 100,
        category: str = "train",
        extra_metrics_keys: Sequence[str] = (),
        done_reason_keys: Sequence[str] = (),
    ) -> None:
        super().__init__(1, window, category, extra_metrics_keys, done_reason_keys)
        self._clients: dict[str, ClientRecord] = {}  # the one whose last episode is longest ago comes first
        self._free_slots = list(range(MAX_CLIENTS - 1, -1, -1))

    def record_of(self, name: str, episodes: Sequence[Episode]) -> ClientRecord:
        """Add episodes that `check` took, of the client `name`; return its record, which is not to be changed.

        A new record's slot may have been that of a name which is forgotten for it.
        """
        record = self._clients.pop(name, None) or self._new_record(name)
        self._clients[name] = record  # the most recent
        everybody, own = self._lifetime, record.lifetime
        for episode in episodes:
            reward = episode.reward
            self._episodes.append(msgspec.structs.replace(episode, sequence=everybody.count))
            everybody.add(reward)
            own.add(reward)
            record.rewards.append(reward)
            record.lengths.append(episode.length)
        record.last = everybody.count
        return record

    @property
    def clients(self) -> Mapping[str, ClientRecord]:
        """The records by name, the one whose last episode is longest ago first; not to be changed."""
        return self._clients

    @property
    def num_of_others(self) -> int:
        """Episodes of names that are forgotten."""
        return self._lifetime.count - sum(record.lifetime.count for record in self._clients.values())

    def by_client(self) -> dict[str, float]:
        """Flat figures of each client, `{category}/clients/{name}/` before each key. O(clients * their windows).

        `num_episodes`; over the last episodes of this client (the window, but at most 100) `rewards_mean` and
        `lengths_mean`; over all of them `lifetime_rewards_mean`, `_std`, `_min` and `_max`. Where names were forgotten,
        `{category}/other_clients/num_episodes` has how many episodes those had.
        """
        figures: dict[str, float] = {}
        for name, record in self._clients.items():
            life, num_kept = record.lifetime, len(record.rewards)
            prefix = f"{self.category}/clients/{name}/"
            figures[prefix + "num_episodes"] = float(life.count)
            figures[prefix + "rewards_mean"] = sum(record.rewards) / num_kept
            figures[prefix + "lengths_mean"] = sum(record.lengths) / num_kept
            figures[prefix + "lifetime_rewards_mean"] = life.mean
            figures[prefix + "lifetime_rewards_std"] = math.sqrt(life.m2 / life.count)
            figures[prefix + "lifetime_rewards_min"] = life.minimum
            figures[prefix + "lifetime_rewards_max"] = life.maximum
        if num_others := self.num_of_others:
            figures[f"{self.category}/other_clients/num_episodes"] = float(num_others)
        return figures

    def state(self) -> dict[str, Any]:
        """As that of a `StatsTracker`, and the records."""
        return super().state() | {"clients": msgspec.to_builtins(list(self._clients.values()), enc_hook=_to_list)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, or that of a `StatsTracker`, whose episodes are those of others.

        Raises:
            InvalidInput: it contradicts itself. Nothing has changed.
        """
        try:
            clients = msgspec.convert(state.get("clients", []), list[ClientRecord], dec_hook=_to_deque)
            total = int(state["lifetime"]["count"])
        except (LookupError, TypeError, ValueError) as error:
            raise InvalidInput(f"these are not the statistics of a server: {error!r}") from error
        kept = client_window(self.window)
        for record in clients:
            record.rewards, record.lengths = deque(record.rewards, kept), deque(record.lengths, kept)
        clients.sort(key=lambda record: record.last)
        names, slots = ({getattr(record, key) for record in clients} for key in ("name", "slot"))
        count = sum(record.lifetime.count for record in clients)
        if (
            not len(names) == len(slots) == len(clients)
            or not slots <= set(range(MAX_CLIENTS))
            or not all(record.is_consistent for record in clients)
            or count > total
        ):
            raise InvalidInput(f"the statistics of {len(clients)} clients contradict those of all, {total} episodes")
        super().restore(state)
        self._clients = {record.name: record for record in clients}
        self._free_slots = [slot for slot in range(MAX_CLIENTS - 1, -1, -1) if slot not in slots]

    def _new_record(self, name: str) -> ClientRecord:
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._clients.pop(next(iter(self._clients))).slot
        kept = client_window(self.window)
        return ClientRecord(slot, name, deque(maxlen=kept), deque(maxlen=kept), Moments())


def _to_list(numbers: Any) -> list[float]:
    return list(numbers)


def _to_deque(_: type, value: Any) -> deque[float]:
    return deque(msgspec.convert(value, list[float]))
