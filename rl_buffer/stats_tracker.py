"""Episode statistics of a vector of environments, and their merge over many actors.

A tracker follows the running episodes of its own environments (`update`) or collects those that others
finished (`record`, on the server). One thread at a time. Its state is bounded: the last `window` episodes,
lifetime moments, and what is not drained yet. No clock, no sockets, no torch.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_buffer.errors import InvalidInput

# Per step. Squares of 1e300 are infinite: one client that sends it would spoil the lifetime moments of all.
LARGEST = 1e100
# Steps between two calls of `drain` that lose nothing: an environment ends at most one episode a step.
UNDRAINED_STEPS = 1024

_NO_REASONS: frozenset[str] = frozenset()


class Episode(msgspec.Struct, frozen=True, array_like=True, gc=False):  # in no cycle: it holds numbers and strings
    """One finished episode, as a writer sends it with its commit."""

    sequence: int  # episodes that the tracker had seen before this one
    reward: float  # undiscounted sum over the steps
    length: int  # steps, without autoreset dummies
    metrics: dict[str, float] = {}  # mean over the steps that gave the metric; absent where none did
    done_reasons: frozenset[str] = frozenset()  # those that held at the last step


@dataclass(slots=True)
class Moments:
    """Count, mean, spread and range of a stream of numbers."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0  # sum of (x - mean)^2
    minimum: float = math.inf
    maximum: float = -math.inf

    def add(self, number: float) -> None:
        """Add one number: to the bit what `merge` makes of it."""
        before, self.count = self.count, self.count + 1
        delta = number - self.mean
        self.mean += delta / self.count
        self.m2 += delta * delta * before / self.count
        if number < self.minimum:
            self.minimum = number
        if number > self.maximum:
            self.maximum = number

    def merge(self, other: "Moments") -> None:
        """Add another stream (Chan et al. 1979), to 1e-9 of the largest |x| for up to a million numbers."""
        if other.count:
            count, delta = self.count + other.count, other.mean - self.mean
            self.mean += delta * other.count / count
            self.m2 += other.m2 + delta * delta * self.count * other.count / count
            self.count = count
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)


class StatsTracker:
    """Rewards, lengths and metrics of the last `window` episodes, and moments of all rewards.

    `update` sees `num_envs` environments (E) at once. Only the metrics and done reasons that are named here
    are accepted; every key of the statistics begins with `category`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        window: int = 100,
        category: str = "train",
        extra_metrics_keys: Sequence[str] = (),
        done_reason_keys: Sequence[str] = (),
    ) -> None:
        if num_envs < 1 or window < 1:
            raise InvalidInput(f"num_envs and window must be at least 1, not {num_envs} and {window}")
        done_keys = [f"Done/{reason}" for reason in done_reason_keys]
        keys = ["rewards", "lengths", "lifetime_rewards", *extra_metrics_keys, *done_keys]
        if len(set(keys)) != len(keys):
            raise InvalidInput(f"a key must differ from all others and from the built-in ones: {keys}")
        self.num_envs, self.window, self.category = num_envs, window, category
        self.extra_metrics_keys = tuple(extra_metrics_keys)
        self.done_reason_keys = tuple(done_reason_keys)
        # Of the running episodes. A length is the difference of two times, of which one step changes but one.
        self._num_steps = 0
        self._begins = np.zeros(num_envs, np.int64)  # number of the first step, and one more for each that was masked
        self._rewards = np.zeros(num_envs)
        self._sums = np.zeros((len(extra_metrics_keys), 2, num_envs))  # of each metric, and the steps that gave it
        self._metrics = dict(zip(extra_metrics_keys, self._sums, strict=True))
        self._everywhere = np.ones(num_envs, np.bool_)
        self._episodes: deque[Episode] = deque(maxlen=window)
        self._undrained: deque[Episode] = deque(maxlen=UNDRAINED_STEPS * num_envs)
        self._lifetime = Moments()

    def update(
        self,
        rewards: ArrayLike,
        dones: ArrayLike,
        truncateds: ArrayLike | None = None,
        *,
        metrics: Mapping[str, ArrayLike] | None = None,
        done_reasons: Mapping[str, ArrayLike] | None = None,
        mask: ArrayLike | None = None,
    ) -> None:
        """Take one step of all environments; an episode ends where dones | truncateds.

        Leave out `mask` and the mappings where there is nothing to say: that is the fast path of E = 1. All
        are (E,) or (E, 1), arrays or tensors on any device; for E = 1 scalars too.

        Args:
            rewards: float, undiscounted.
            dones: bool or 0/1.
            truncateds: bool or 0/1; both flags at once end one episode.
            metrics: key -> float; an episode's metric is the mean over those of its steps that gave it.
            done_reasons: key -> bool, read only where the episode ends.
            mask: False where no step happened (an autoreset dummy); the other values are ignored there.

        Raises:
            InvalidInput: wrong shape, unknown key, NaN or a number beyond 1e100. Nothing has changed.
        """
        if self.num_envs == 1 and metrics is None and done_reasons is None and mask is None:
            # 0.5 us with Python numbers, 1.1 us with arrays of one element; the general path takes 3 us:
            # python -m timeit -s "import rl_buffer.stats_tracker as s; t = s.StatsTracker()" "t.update(1.0, False)"
            reward, done = self._scalar("rewards", rewards), self._scalar("dones", dones)
            truncated = truncateds is not None and self._scalar("truncateds", truncateds)
            _require_within("rewards[0]", reward, LARGEST)
            self._rewards[0] += reward
            self._num_steps += 1
            if done or truncated:
                self._finish(self._everywhere, {})
            return

        _require_known("metrics", metrics, self.extra_metrics_keys)
        _require_known("done_reasons", done_reasons, self.done_reason_keys)
        happened = self._everywhere if mask is None else self._vector("mask", mask, np.bool_)
        reward_vector = self._numbers("rewards", rewards, happened)
        ended = self._vector("dones", dones, np.bool_)
        if truncateds is not None:
            ended = ended | self._vector("truncateds", truncateds, np.bool_)
        metric_vectors = {k: self._numbers(k, values, happened) for k, values in (metrics or {}).items()}
        reasons = {k: self._vector(k, values, np.bool_) for k, values in (done_reasons or {}).items()}

        for key, vector in metric_vectors.items():
            self._metrics[key][0] += vector
            self._metrics[key][1] += happened
        if mask is not None:
            self._begins += ~happened
            ended = ended & happened
        self.take(reward_vector, ended, reasons)

    def take(
        self,
        rewards: NDArray[np.float64],
        ended: NDArray[np.bool_] | None,
        reasons: Mapping[str, NDArray[np.bool_]] = MappingProxyType({}),
    ) -> None:
        """As `update`, of arrays [E] that were checked before: a third of the time. Without `ended` nothing ends."""
        self._rewards += rewards
        self._num_steps += 1
        if ended is not None:
            self._finish(ended, reasons)

    def discard(self, mask: ArrayLike) -> None:
        """Drop the running episodes where `mask`, (E,) or (E, 1) bool: those were reset by hand."""
        self._forget(self._vector("mask", mask, np.bool_))

    def drain(self) -> list[Episode]:
        """Return the episodes that `update` finished since the last call; the statistics keep them.

        Where nobody drains for more than `UNDRAINED_STEPS` steps the oldest may be gone, from here only.
        """
        episodes = list(self._undrained)
        self._undrained.clear()
        return episodes

    def record(self, episodes: Sequence[Episode]) -> None:
        """Add episodes that other trackers finished, numbered anew in the order in which they come.

        Raises:
            InvalidInput: as `check`. None of them is added.
        """
        self.check(episodes)
        for episode in episodes:
            self._append(msgspec.structs.replace(episode, sequence=self._lifetime.count))

    def check(self, episodes: Sequence[Episode]) -> None:
        """Refuse episodes that `record` would refuse, for those that are recorded later.

        Raises:
            InvalidInput: a number is not finite or out of range, or a key is unknown.
        """
        for i, episode in enumerate(episodes):
            name = f"episodes[{i}]"
            if not 1 <= episode.length <= 2**53:
                raise InvalidInput(f"{name}.length is {episode.length}; it must be 1..2**53 steps")
            _require_known(f"{name}.metrics", episode.metrics, self.extra_metrics_keys)
            _require_known(f"{name}.done_reasons", episode.done_reasons, self.done_reason_keys)
            for field, number in {"reward": episode.reward, **episode.metrics}.items():
                _require_within(f"{name}.{field}", number, LARGEST * episode.length)

    def get_statistics(self) -> dict[str, float]:
        """Flat statistics, the category before each key; {} until an episode ends. O(window).

        Over the window: `_mean`, `_std` (population), `_min` and `_max` of rewards, lengths and each metric
        that was given, `Done/{reason}_rate`, and `reward_per_step`, sum of rewards / sum of lengths. Over all
        episodes: `num_episodes` and the four of `lifetime_rewards`.
        """
        if not self._episodes:
            return {}
        series = {key: np.array(values) for key, values in self.get_raw_values().items()}
        life = self._lifetime
        stats = {
            "reward_per_step": series["rewards"].sum() / series["lengths"].sum(),
            "num_episodes": life.count,
            "lifetime_rewards_mean": life.mean,
            "lifetime_rewards_std": math.sqrt(life.m2 / life.count),
            "lifetime_rewards_min": life.minimum,
            "lifetime_rewards_max": life.maximum,
        }
        stats |= {f"Done/{key}_rate": series.pop(f"Done/{key}").mean() for key in self.done_reason_keys}
        for key, values in series.items():
            given = values[~np.isnan(values)]
            if len(given):
                stats |= {f"{key}_{name}": getattr(given, name)() for name in ("mean", "std", "min", "max")}
        return {f"{self.category}/{key}": float(value) for key, value in stats.items()}

    def get_raw_values(self) -> dict[str, list[float]]:
        """The window, oldest first: rewards, lengths, metrics (NaN where none) and Done/{reason} (0 or 1)."""
        episodes = self._episodes
        series = {"rewards": [e.reward for e in episodes], "lengths": [float(e.length) for e in episodes]}
        series |= {k: [e.metrics.get(k, math.nan) for e in episodes] for k in self.extra_metrics_keys}
        for key in self.done_reason_keys:
            series[f"Done/{key}"] = [float(key in e.done_reasons) for e in episodes]
        return series

    @property
    def lifetime(self) -> Moments:
        """The rewards of all episodes; not to be changed."""
        return self._lifetime

    def state(self) -> dict[str, Any]:
        """The window and the moments of all rewards, as JSON has them; running and undrained episodes are not in it."""
        lifetime = {name: getattr(self._lifetime, name) for name in Moments.__slots__}
        return {"episodes": msgspec.to_builtins(list(self._episodes)), "lifetime": lifetime}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; of a larger window the newest episodes.

        Raises:
            InvalidInput: there are other keys in it, or it contradicts itself. Nothing has changed.
        """
        try:
            episodes = msgspec.convert(state["episodes"], list[Episode])
            lifetime = msgspec.convert(state["lifetime"], Moments)
        except (LookupError, msgspec.ValidationError) as error:
            raise InvalidInput(f"this is not the state of a StatsTracker: {error!r}") from error
        self.check(episodes)
        sequences = [episode.sequence for episode in episodes]
        if sequences != list(range(lifetime.count - len(episodes), lifetime.count)):
            raise InvalidInput(f"episodes {sequences} are not the last of {lifetime.count}")
        self._episodes = deque(episodes, maxlen=self.window)
        self._lifetime = lifetime

    @classmethod
    def merge(cls, trackers: Sequence["StatsTracker"]) -> "StatsTracker":
        """Make one tracker as if it had recorded the episodes of all in order of their sequence numbers.

        Of equal numbers that of the later tracker comes later. For the lifetime see `Moments.merge`. Running
        and undrained episodes stay with their trackers, which do not change.

        Raises:
            InvalidInput: no trackers, or they differ in window, category or keys.
        """
        settings = [(t.window, t.category, t.extra_metrics_keys, t.done_reason_keys) for t in trackers]
        if len(set(settings)) != 1:
            raise InvalidInput(f"merge needs trackers of one window, category and keys, not {settings}")
        merged = cls(sum(tracker.num_envs for tracker in trackers), *settings[0])
        episodes = (episode for tracker in trackers for episode in tracker._episodes)
        merged._episodes.extend(sorted(episodes, key=lambda episode: episode.sequence))
        for tracker in trackers:
            merged._lifetime.merge(tracker._lifetime)
        return merged

    def _finish(self, ended: NDArray[np.bool_], reasons: Mapping[str, NDArray[np.bool_]]) -> None:
        # One by one, as there are few.
        for env in ended.nonzero()[0].tolist():
            metrics, held = {}, _NO_REASONS
            if self.extra_metrics_keys:
                sums = zip(self.extra_metrics_keys, self._sums[..., env].tolist(), strict=True)
                metrics = {key: total / n for key, (total, n) in sums if n}
            if reasons:
                held = frozenset(key for key, values in reasons.items() if values[env])
            length = self._num_steps - self._begins.item(env)
            episode = Episode(self._lifetime.count, self._rewards.item(env), length, metrics, held)
            self._append(episode)
            self._undrained.append(episode)
            self._forget(env)

    def _forget(self, which: int | NDArray[np.bool_]) -> None:
        """Begin anew in these environments."""
        self._rewards[which] = 0
        self._begins[which] = self._num_steps
        if self.extra_metrics_keys:
            self._sums[..., which] = 0

    def _append(self, episode: Episode) -> None:
        self._episodes.append(episode)
        self._lifetime.add(episode.reward)

    def _scalar(self, name: str, value: Any) -> Any:
        if value.__class__ in (float, bool, int):
            return value
        is_one = getattr(value, "shape", None) in ((), (1,), (1, 1))
        return (value if is_one else self._vector(name, value, np.float64)).item()

    def _vector(self, name: str, value: Any, dtype: type[np.generic]) -> NDArray[Any]:
        if hasattr(value, "detach"):  # a tensor, which may require grad or live on a GPU
            value = value.detach().cpu()
        vector, num_envs = np.asarray(value, dtype), self.num_envs
        if vector.shape == (num_envs,):
            return vector
        if vector.shape == (num_envs, 1) or (num_envs == 1 and vector.shape == ()):
            return vector.reshape(num_envs)
        raise InvalidInput(f"{name} has shape {vector.shape}; expected ({num_envs},) or ({num_envs}, 1)")

    def _numbers(self, name: str, value: Any, happened: NDArray[np.bool_]) -> NDArray[np.float64]:
        numbers = self._vector(name, value, np.float64)
        if happened is not self._everywhere:
            numbers = np.where(happened, numbers, 0.0)
        if not np.vdot(numbers, numbers) <= LARGEST**2:  # NaN fails too
            for env, number in enumerate(numbers.tolist()):
                _require_within(f"{name}[{env}]", number, LARGEST)
        return numbers


def _require_known(name: str, keys: Iterable[str] | None, known: Sequence[str]) -> None:
    if keys and not set(keys).issubset(known):
        raise InvalidInput(f"{name} has keys {sorted(keys)}; the tracker was made with {list(known)}")


def _require_within(name: str, number: float, limit: float) -> None:
    if not -limit <= number <= limit:  # NaN fails both comparisons
        raise InvalidInput(f"{name} is {number}; it must be finite and within +-{limit}")
