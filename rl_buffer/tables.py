"""What a table is made of and what it gives: values that users write and that travel between processes.

Plain values only. The bookkeeping that they describe is in `replay_table`.
"""

import operator
from typing import Annotated, Any, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.rate_limiters import LimiterConfig, MinSize, Queue, SampleToInsertRatio, Stack
from rl_buffer.samplers import Fifo, Lifo, SamplerConfig, Uniform
from rl_buffer.spec import Field, RowLayout, TransitionSpec

_MAX_ROWS = 2**40  # 2^40 rows of one cache line are 64 TiB; also keeps row numbers exact in float64
_MAX_SEQUENCE_STEPS = 2**16
_MAX_FRAGMENTS = 2**16
_DEFAULT_HEADROOM_SHARE = 16
_DEFAULT_HEADROOM_MAX_MIN_ROWS = 4096  # of small rows: 30 writers with chunks of 64
_DEFAULT_HEADROOM_MIN_NBYTES = 64 << 20  # of large ones


_KINDS: dict[str, tuple[type, ...]] = {
    "spec": (TransitionSpec,),
    "sampler": get_args(SamplerConfig),
    "rate_limiter": get_args(LimiterConfig),
}


class ReplayTable(msgspec.Struct, frozen=True, tag=True):
    """A ring of transitions, or of sequences of steps.

    A sequence is an item of T = burn_in + sequence_length + n_step steps of one episode (Kapturowski et al. 2019,
    "Recurrent Experience Replay in Distributed Reinforcement Learning"): see `batches.SequenceBatch`.

    Args:
        spec: what one transition holds.
        capacity: committed items that the table keeps once full; the oldest commit is evicted first.
        sampler: `Uniform()`, `Prioritized(alpha, epsilon)`, or with `max_times_sampled` also `Fifo()` and `Lifo()`.
        rate_limiter: `MinSize(m)`, `SampleToInsertRatio(...)`, `Queue(k)` or `Stack(k)`; see `queue` and `stack`.
        n_step: reward steps per transition, >= 1; all writers of the table follow it.
        gamma: discount factor in [0, 1].
        seed: of the sampler; None draws one.
        headroom: extra rows that writers may hold uncommitted, all together. None: a sixteenth of `capacity`,
            but at least 64 MiB or 4096 rows, whichever is less. A writer holds at most two chunks.
        sequence_length: trained steps per sequence; None stores single transitions, and the rest is not used.
        burn_in: steps before the trained ones, from which a recurrent state is brought up to date.
        overlap: steps that a sequence's trained part shares with the one before, < sequence_length.
        pad_short_episodes: keep episodes shorter than `sequence_length`, padded; else they are dropped.
        eta: a sequence's TD error is eta * max |TD| + (1 - eta) * mean |TD| over its trained steps.
        max_times_sampled: an item leaves the table with its last use; 0: it stays until it is evicted. A batch of such
            a table holds different items, and nobody else gets one of them before the learner has copied the batch.
            `Uniform()` and `Prioritized()` then draw without replacement. A served table only.

    Raises:
        InvalidInput: a value is out of range.
    """

    spec: TransitionSpec
    capacity: int
    sampler: SamplerConfig = Uniform()
    rate_limiter: LimiterConfig = MinSize(1)
    n_step: int = 1
    gamma: float = 0.99
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    headroom: int | None = None
    sequence_length: int | None = None
    burn_in: int = 0
    overlap: int = 0
    pad_short_episodes: bool = True
    eta: float = 0.9
    max_times_sampled: int = 0

    @classmethod
    def queue(cls, spec: TransitionSpec, capacity: int, **options: Any) -> "ReplayTable":
        """Items are handed out once each, the oldest first; writers wait while `capacity` of them wait.

        Args:
            spec: what one transition holds.
            capacity: of items that wait; those that learners hold are not counted.
            options: of `ReplayTable`, apart from sampler, limiter and `max_times_sampled`.
        """
        return cls(spec, capacity, sampler=Fifo(), rate_limiter=Queue(capacity), max_times_sampled=1, **options)

    @classmethod
    def stack(cls, spec: TransitionSpec, capacity: int, **options: Any) -> "ReplayTable":
        """Items are handed out once each, the newest first; otherwise as `queue`."""
        return cls(spec, capacity, sampler=Lifo(), rate_limiter=Stack(capacity), max_times_sampled=1, **options)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            _require_kind("ReplayTable", name, getattr(self, name), kinds)
        integers = (
            "capacity",
            "n_step",
            "seed",
            "headroom",
            "sequence_length",
            "burn_in",
            "overlap",
            "max_times_sampled",
        )
        _make_integers("ReplayTable", self, integers)
        longest_overlap = (self.sequence_length or 1) - 1
        for name, low, high in (
            ("capacity", 1, _MAX_ROWS),
            ("n_step", 1, 1024),
            ("gamma", 0.0, 1.0),
            ("seed", 0, 2**64 - 1),
            ("sequence_length", 1, _MAX_SEQUENCE_STEPS),
            ("burn_in", 0, _MAX_SEQUENCE_STEPS if self.sequence_length else 0),
            ("overlap", 0, longest_overlap),
            ("eta", 0.0, 1.0),
            ("max_times_sampled", 0, 2**31),
        ):
            without = name in ("burn_in", "overlap") and not self.sequence_length
            of = " without sequence_length" if without else ""
            _require_range("ReplayTable", name, getattr(self, name), low, high, of)
        if self.spec.recurrent_state is not None and self.sequence_length is None:
            raise InvalidInput("the spec has a recurrent_state, which only sequences keep; give sequence_length too")
        if isinstance(self.sampler, Fifo | Lifo) and not self.max_times_sampled:
            raise InvalidInput(
                f"{self.sampler} would give out the same item for ever; give max_times_sampled= too, 1 for once each"
            )
        self.check_limiter(self.rate_limiter)
        if self.headroom is None:
            fitting = max(1, _DEFAULT_HEADROOM_MIN_NBYTES // self.layout.stride_nbytes)
            least = min(fitting, _DEFAULT_HEADROOM_MAX_MIN_ROWS)
            msgspec.structs.force_setattr(self, "headroom", max(self.capacity // _DEFAULT_HEADROOM_SHARE, least))
        elif not 1 <= self.headroom <= _MAX_ROWS:
            raise InvalidInput(f"ReplayTable headroom must be in [1, {_MAX_ROWS}] rows or None, got {self.headroom!r}")

    def check_limiter(self, limiter: LimiterConfig) -> None:
        """Refuse a rate limiter under which somebody would wait for ever.

        Raises:
            InvalidInput: it does.
        """
        if limiter.min_size_to_sample > self.capacity:
            raise InvalidInput(
                f"the rate limiter waits for {limiter.min_size_to_sample} transitions, but capacity is "
                f"{self.capacity}: sampling could never start"
            )
        if isinstance(limiter, Queue | Stack):
            name, order = type(limiter).__name__, Fifo() if isinstance(limiter, Queue) else Lifo()
            if self.max_times_sampled != 1 or self.sampler != order:
                raise InvalidInput(
                    f"{name}({limiter.capacity}) needs sampler={order} and max_times_sampled=1, as "
                    f"ReplayTable.{name.lower()}(...) has them; this table has sampler={self.sampler} and "
                    f"max_times_sampled={self.max_times_sampled}"
                )
            if limiter.capacity > self.capacity:
                raise InvalidInput(
                    f"{name}({limiter.capacity}) lets more items wait than the table's capacity of {self.capacity}"
                )
        elif isinstance(limiter, SampleToInsertRatio) and 0 < self.max_times_sampled < limiter.samples_per_insert:
            raise InvalidInput(
                f"the rate limiter waits for {limiter.samples_per_insert} samples of each item, which can be sampled "
                f"{self.max_times_sampled} times (max_times_sampled): writers would wait for ever"
            )

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch of more items than there can be, where they must be different ones.

        Raises:
            InvalidInput: it is one.
        """
        if self.max_times_sampled and batch_size > self.capacity:
            raise InvalidInput(
                f"a batch holds different items of this table, and {batch_size} never wait in it: its capacity is "
                f"{self.capacity}"
            )

    @property
    def layout(self) -> RowLayout:
        """How one item lies in its row."""
        if self.sequence_length is None:
            return RowLayout(self.spec.transition_fields())
        return RowLayout(self.spec.sequence_fields(self.num_sequence_steps))

    @property
    def num_sequence_steps(self) -> int:
        """Steps T of a sequence, burn-in and lookahead included."""
        assert self.sequence_length is not None
        return self.burn_in + self.sequence_length + self.n_step

    @property
    def num_rows(self) -> int:
        """Physical rows: capacity and headroom."""
        assert self.headroom is not None
        return self.capacity + self.headroom

    @property
    def rows_nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.layout.stride_nbytes


class RolloutTable(msgspec.Struct, frozen=True, tag=True):
    """Rollout fragments [num_steps, num_envs] on their way from the actors to a learner, each handed out once.

    Lag is counted in published versions of `parameters`: the newest at hand-out, less the oldest that a step of the
    fragment was made with.

    Args:
        spec: what one step holds; without extras and recurrent state.
        num_steps: steps per environment and fragment, T.
        num_envs: environments of one writer, E.
        num_fragments: fragments that exist, those being written and read included. A writer holds one.
        gamma: discount factor in [0, 1].
        gae_lambda: of generalized advantage estimation, in [0, 1].
        max_version_lag: no fragment with more is handed out; None hands out all.
        when_late: "drop" frees fragments with too much lag instead of handing them out, and counts them. "wait" never
            lets one become so: at most (max_version_lag + 1) * fragments_per_update are written, finished or read at a
            time, and they are handed out in the order in which they were begun, so the slowest writer sets the pace.
            With max_version_lag = 0 that is synchronous training: nobody begins before the learner, which publishes
            first, has released what it read.
            Late all the same, and dropped and counted, is what a writer made without fetching the parameters that were
            there when it began, or what is left of a learner that published and died before its release.
        fragments_per_update: that the learner takes and releases together.
        parameters: name of the parameter set whose versions count.

    Raises:
        InvalidInput: a value is out of range.
    """

    spec: TransitionSpec
    num_steps: int
    num_envs: int
    num_fragments: int = 16
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_version_lag: int | None = None
    when_late: str = "drop"
    fragments_per_update: int = 1
    parameters: str = "policy"

    def __post_init__(self) -> None:
        _require_kind("RolloutTable", "spec", self.spec, (TransitionSpec,))
        counts = ("num_steps", "num_envs", "num_fragments", "fragments_per_update")
        _make_integers("RolloutTable", self, (*counts, "max_version_lag"))
        for name, low, high in (
            *((name, 1, _MAX_FRAGMENTS) for name in counts),
            ("max_version_lag", 0, _MAX_FRAGMENTS),
            ("gamma", 0.0, 1.0),
            ("gae_lambda", 0.0, 1.0),
        ):
            _require_range("RolloutTable", name, getattr(self, name), low, high)
        if self.when_late not in ("drop", "wait"):
            raise InvalidInput(f"RolloutTable when_late must be 'drop' or 'wait', got {self.when_late!r}")
        if self.when_late == "wait" and self.max_version_lag is None:
            raise InvalidInput("RolloutTable when_late='wait' needs max_version_lag=")
        if self.num_fragments < self.fragments_per_update:
            raise InvalidInput(
                f"RolloutTable has {self.num_fragments} fragments, fewer than the {self.fragments_per_update} that an "
                "update takes; raise num_fragments"
            )

    @property
    def layout(self) -> RowLayout:
        """How one fragment lies in its row: the leaves of a rollout, and who made it with which parameters."""
        versions = {"versions": Field((self.num_steps,), "int64"), "writer": Field((), "int64")}
        return RowLayout(self.spec.rollout_fields(self.num_steps, self.num_envs) | versions)

    @property
    def num_rows(self) -> int:
        """Fragments: one row each."""
        return self.num_fragments

    @property
    def rows_nbytes(self) -> int:
        """Bytes of all fragments."""
        return self.num_rows * self.layout.stride_nbytes


def _require_kind(table: str, name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds):
        expected = " or ".join(f"{kind.__name__}(...)" for kind in kinds)
        raise InvalidInput(f"{table} {name} must be {expected}, got {value!r}")


def _make_integers(table: str, config: msgspec.Struct, names: tuple[str, ...]) -> None:
    """Plain integers of NumPy's."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            try:
                msgspec.structs.force_setattr(config, name, operator.index(value))
            except TypeError:
                raise InvalidInput(f"{table} {name} must be an integer, got {value!r}") from None


def _require_range(table: str, name: str, value: Any, low: float, high: float, of: str = "") -> None:
    if value is not None and not low <= value <= high:
        raise InvalidInput(f"{table} {name} must be in [{low}, {high}]{of}, got {value!r}")


class StatsConfig(msgspec.Struct, frozen=True):
    """The StatsTracker that the server merges all writers' episodes into, and that every writer keeps of its own."""

    window: int = 100  # episodes that means look back on
    category: str = "train"
    extra_metrics_keys: tuple[str, ...] = ()
    done_reason_keys: tuple[str, ...] = ()


class TableCut(NamedTuple):
    """What a checkpoint takes of one table, all of one moment; the views are read before anything else happens."""

    rows: list[NDArray[np.int64]]  # views of the row numbers, one behind the other in the order to restore them in
    masses: NDArray[np.float64] | None  # view [num_rows] of every row's, if they differ
    values: dict[str, Any]  # counters and random state, as JSON has them


class CheckpointReport(msgspec.Struct, frozen=True, tag=True):
    """What `client.checkpoint` saved, and what that cost the others."""

    path: str
    nbytes: int  # of the file
    num_items: dict[str, int]  # transitions, sequences or rollout fragments of each table
    duration_s: float  # from the request until the file was on the disk
    pause_ms: float  # of this, the server answered nobody
    writers_waited_ms: float  # of this, a writer waited for rows that had to be copied first


class Sample(NamedTuple):
    """Drawn rows with what is needed to check them and to weigh them, all of one moment."""

    rows: NDArray[np.int64]  # [B + spares]; the spares replace rows that are overtaken before they are gathered
    generations: NDArray[np.int64]  # [B + spares]
    masses: NDArray[np.float64]  # [B + spares] (|TD| + epsilon)^alpha, or ones
    total_mass: float
    num_items: int
