"""`connect` and `Client`: everything that a process does with a server."""

import contextlib
import functools
import operator
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rl_buffer import frames, messages
from rl_buffer.address import Address
from rl_buffer.connection import Channel, Connection
from rl_buffer.episode_ends import autoreset_mode, stated_autoreset
from rl_buffer.errors import DeadlineExceeded, InvalidInput, RequestRefused, RLBufferError
from rl_buffer.parameters import ParameterSet, as_arrays
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.tables import ReplayTable, RolloutTable
from rl_buffer.writer import ReplayWriter

if TYPE_CHECKING:
    import torch

    from rl_buffer.rollout_reader import RolloutReader
    from rl_buffer.rollout_writer import RolloutWriter
    from rl_buffer.sampler import ReplaySampler
    from rl_buffer.served_buffer import ServedReplayBuffer

_EXPLAIN_TIMEOUT_S = 1.0
_POLICY = "policy"  # the parameters that writers report their version of
_UNSTATED: Any = object()  # None is a statement: rows are stored as given


def connect(address: str, timeout_s: float = 10.0, name: str = "") -> "Client":
    """Attach this process to the server at `address`, waiting until `timeout_s` for it to come up.

    Args:
        address: `server.address`, `ipc:///some/directory`.
        timeout_s: deadline in seconds, also the default deadline of the client's calls.
        name: shown in `info()`, e.g. "actor-3".

    Raises:
        DeadlineExceeded: no server came up in time.
        ConnectionRefused: other user, other version of rl_buffer, or too many clients.
    """
    return Client(Connection(Address(address), name, timeout_s), timeout_s)


class Client:
    """One process's access to a server. Any thread may call it; a writer or sampler belongs to one."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.parameter_versions: dict[str, int] = {}  # the newest of each set that this client got or published
        self._connection = connection
        self._control = connection.channel()
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._num_requests = 0
        self._parameter_sets: dict[str, ParameterSet] = {}

    @property
    def tables(self) -> dict[str, ReplayTable | RolloutTable]:
        """Every table's configuration by name: spec, capacity, n_step, gamma, ..."""
        return {name: info.config for name, info in self._connection.tables.items()}

    # ---- writing and sampling ------------------------------------------------------------------------------

    def writer(
        self,
        table: str,
        *,
        envs: Any = None,
        num_envs: int | None = None,
        autoreset: Any = _UNSTATED,
        chunk_size: int = 64,
        timeout_s: float | None = None,
    ) -> ReplayWriter:
        """A writer for one actor.

        Args:
            table: its name.
            envs: a Gymnasium environment or vector environment: number, autoreset mode and spaces are taken from it.
            num_envs: instead of `envs`.
            autoreset: "next_step", "same_step", "disabled", or None: rows are stored as given. Overrides `envs`; with
                `num_envs` above 1 it must be said, because a dummy step of next_step mode looks like any other.
            chunk_size: transitions per message; less for a table that is smaller. Smaller is fresher, larger is
                cheaper; `flush` sends at once.
            timeout_s: deadline of `add` when the table takes no rows, by default the client's.

        Raises:
            InvalidInput: unknown table, spaces that do not match its spec, or an environment that does not say
                how it resets.
            RequestRefused: chunks that the headroom or the rate limiter could never take.
        """
        config = self._replay_table(table)
        if (envs is None) == (num_envs is None):
            raise InvalidInput("writer needs envs= or num_envs=, and not both")
        if envs is not None:
            _check_spaces(table, config.spec, envs)
            num_envs = int(getattr(envs, "num_envs", 1))
            mode = stated_autoreset(envs) if autoreset is _UNSTATED else autoreset_mode(autoreset)
        else:
            assert num_envs is not None
            num_envs = operator.index(num_envs)
            if autoreset is _UNSTATED and num_envs > 1:
                raise InvalidInput(
                    f"num_envs={num_envs} needs autoreset='next_step', 'same_step' or 'disabled' as in "
                    "envs.metadata['autoreset_mode'], or None to store every row as given; or pass envs="
                )
            mode = None if autoreset is _UNSTATED else autoreset_mode(autoreset)
        rows, _ = self._connection.segments[table]
        with self._new_channel() as channel:
            return ReplayWriter(
                channel,
                self._caller(channel),
                table,
                config,
                config.layout.view(rows.buffer, config.num_rows),
                self._connection.stats_config,
                num_envs=num_envs,
                autoreset=mode,
                chunk_size=chunk_size,
                timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                explain=self._explainer(table),
                parameter_version=lambda: self.parameter_versions.get(_POLICY, 0),
            )

    def sampler(
        self,
        table: str,
        batch_size: int,
        *,
        beta: float = 0.4,
        prefetch: int = 4,
        device: "str | torch.device" = "cpu",
        contiguous: bool = False,
        timeout_s: float | None = None,
    ) -> "ReplaySampler":
        """A stream of batches for one learner.

        Args:
            table: its name.
            batch_size: transitions per batch, drawn with replacement.
            beta: exponent of the importance weights in [0, 1]; the attribute can be set later.
            prefetch: index sets that the server draws ahead; 0 draws when asked. Priorities and the rate limiter see
                them when they are drawn.
            device: where batches go; to a CUDA device in one copy from pinned memory.
            contiguous: copy each field out of the row block instead of handing out strided views.
            timeout_s: default deadline of `sample`, by default the client's.

        Raises:
            InvalidInput: unknown table or a value out of range.
            RequestRefused: batches that the rate limiter could never give.
        """
        from rl_buffer.sampler import ReplaySampler  # imports torch

        config = self._replay_table(table)
        rows, generations = self._connection.segments[table]
        with self._new_channel() as channel:
            return ReplaySampler(
                channel,
                self._caller(channel),
                table,
                config,
                rows,
                generations,
                batch_size=operator.index(batch_size),
                beta=beta,
                prefetch=prefetch,
                device=device,
                contiguous=contiguous,
                timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                explain=self._explainer(table),
            )

    def replay_buffer(
        self, table: str, num_envs: int = 1, *, autoreset: Any = None, **options: Any
    ) -> "ServedReplayBuffer":
        """The in-process interface (add, get, update_priorities, len) on the served table.

        Args:
            table: its name.
            num_envs: environments per `add`.
            autoreset: as for `writer`; by default every row is stored as given, the dummy steps of next_step
                environments too.
            options: `chunk_size` and `timeout_s` of `writer`, and `beta`, `device`.
        """
        from rl_buffer.served_buffer import ServedReplayBuffer  # imports torch

        return ServedReplayBuffer(self, table, num_envs, autoreset=autoreset, **options)

    def rollout_writer(
        self,
        table: str,
        *,
        envs: Any = None,
        autoreset: Any = _UNSTATED,
        number: int = 0,
        timeout_s: float | None = None,
    ) -> "RolloutWriter":
        """A writer of rollouts for one actor.

        Args:
            table: its name.
            envs: a Gymnasium vector environment of the table's `num_envs`; autoreset mode and spaces are taken from it.
            autoreset: "next_step", "same_step", "disabled" or None; overrides `envs`, without which it must be said.
            number: of this actor; the learner sees fragments in the order of these numbers.
            timeout_s: deadline of `begin`, by default the client's.

        Raises:
            InvalidInput: unknown table, or environments that do not fit it.
        """
        from rl_buffer.rollout_writer import RolloutWriter  # imports Numba

        config = self._rollout_table(table)
        if envs is None and autoreset is _UNSTATED:
            raise InvalidInput("rollout_writer needs envs=, or autoreset= as in envs.metadata['autoreset_mode']")
        if envs is not None:
            _check_spaces(table, config.spec, envs)
            num_envs = int(getattr(envs, "num_envs", 1))
            if num_envs != config.num_envs:
                raise InvalidInput(f"envs has {num_envs} environments, but table {table!r} is for {config.num_envs}")
        mode = stated_autoreset(envs) if autoreset is _UNSTATED else autoreset_mode(autoreset)
        rows, _ = self._connection.segments[table]
        with self._new_channel() as channel:
            return RolloutWriter(
                channel,
                self._caller(channel),
                table,
                config,
                config.layout.view(rows.buffer, config.num_rows),
                self._connection.stats_config,
                number=operator.index(number),
                autoreset=mode,
                timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                explain=self._explainer(table),
                parameter_version=lambda: self.parameter_versions.get(config.parameters, 0),
            )

    def rollouts(
        self,
        table: str,
        *,
        device: "str | torch.device" = "cpu",
        seed: int | None = None,
        timeout_s: float | None = None,
    ) -> "RolloutReader":
        """A reader of finished rollouts for one learner.

        Args:
            table: its name.
            device: where minibatches go.
            seed: of their order.
            timeout_s: default deadline of `take`, by default the client's.

        Raises:
            InvalidInput: unknown table.
        """
        from rl_buffer.rollout_reader import RolloutReader  # imports torch

        config = self._rollout_table(table)
        rows, _ = self._connection.segments[table]
        with self._new_channel() as channel:
            return RolloutReader(
                channel,
                self._caller(channel),
                table,
                config,
                rows,
                device=device,
                seed=seed,
                timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                explain=self._explainer(table),
                newest_version=lambda: self.parameter_versions.get(config.parameters, 0),
            )

    # ---- parameters ----------------------------------------------------------------------------------------

    def publish_parameters(
        self, state_dict: Mapping[str, Any], name: str = _POLICY, timeout_s: float | None = None
    ) -> int:
        """Make a state dict the newest version of `name`; return its version, 1, 2, ...

        Two small messages and one copy; readers are not waited for.

        Args:
            state_dict: tensors on any device, or arrays; keys, shapes and dtypes stay those of the first call.
            name: of the set. One process at a time publishes it.
            timeout_s: deadline in seconds, by default the client's.

        Raises:
            InvalidInput: an entry cannot be stored.
            RequestRefused: other tensors than before, or another process is publishing.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if not isinstance(state_dict, Mapping):
            raise InvalidInput(
                f"publish_parameters takes a mapping such as module.state_dict(), got {type(state_dict).__name__}"
            )
        arrays = as_arrays(state_dict)
        fields = {key: Field(array.shape, array.dtype) for key, array in arrays.items()}
        parameters = self._parameter_sets.get(name)
        if parameters is None or parameters.fields != fields:
            parameters = ParameterSet(self._connection, name, fields, timeout_s)
            self._parameter_sets[name] = parameters
        with self._publishing:  # the server grants a slot to the process, not to the thread
            slot = self._call(messages.ReserveParameters(name), timeout_s)
            assert isinstance(slot, messages.Slot)
            parameters.write(slot.slot, arrays)
            published = self._call(messages.PublishParameters(name, slot.slot), timeout_s)
            assert isinstance(published, messages.Slot)
        self.parameter_versions[name] = published.version
        return published.version

    def parameters(
        self, name: str = _POLICY, newer_than: int = 0, timeout_s: float = 0.0, as_numpy: bool = False
    ) -> tuple[int, dict[str, Any] | None]:
        """The newest version of a published state dict, as a copy.

        Once there is one, looking costs no message, so an actor may look at every step.

        Args:
            name: of the set.
            newer_than: the version that the caller has; 0 for none.
            timeout_s: how long to wait for a newer one; 0 only looks.
            as_numpy: arrays instead of tensors, without importing torch.

        Returns:
            (version, state dict), or (newer_than, None) if there is none newer.
        """
        self._connection.check()
        deadline_s = time.monotonic() + timeout_s
        parameters = self._parameter_sets.get(name)
        while parameters is None:
            try:
                wait_s = max(_EXPLAIN_TIMEOUT_S, deadline_s - time.monotonic())
                parameters = ParameterSet(self._connection, name, None, wait_s)
            except KeyError:
                if time.monotonic() >= deadline_s:
                    return newer_than, None
                self._connection.pause(0.01)
            else:
                self._parameter_sets[name] = parameters
        if not parameters.wait_for_newer(newer_than, deadline_s):
            return newer_than, None
        version, arrays = parameters.read(self.timeout_s)
        self.parameter_versions[name] = version
        if as_numpy:
            return version, arrays
        import torch

        return version, {key: torch.from_numpy(array) for key, array in arrays.items()}

    # ---- asking --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Episode statistics over all actors, with the keys of `StatsTracker.get_statistics`; {} before the first."""
        return dict(self._value(messages.GetStats()))

    def info(self) -> dict[str, Any]:
        """Tables, clients, parameter versions, and who waits for what, in plain values."""
        return dict(self._value(messages.GetInfo()))

    def size(self, table: str) -> int:
        """Transitions that can be sampled now."""
        return int(self._value(messages.GetSize(table)))

    def clear(self, table: str) -> None:
        """Forget all transitions of a table. Limiter counts and what writers hold uncommitted stay."""
        self._call(messages.Clear(table))

    def close(self) -> None:
        """Detach. Rows that writers of this client still hold come back when the process ends; close them first."""
        self._control.close()
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _replay_table(self, name: str) -> ReplayTable:
        table = self._table(name)
        if not isinstance(table, ReplayTable):
            raise InvalidInput(f"table {name!r} holds rollouts; use client.rollout_writer and client.rollouts")
        return table

    def _rollout_table(self, name: str) -> RolloutTable:
        table = self._table(name)
        if not isinstance(table, RolloutTable):
            raise InvalidInput(f"table {name!r} holds transitions; use client.writer and client.sampler")
        return table

    def _table(self, name: str) -> ReplayTable | RolloutTable:
        if name not in self._connection.tables:
            raise InvalidInput(f"no table is called {name!r}; this server has {sorted(self._connection.tables)}")
        return self._connection.tables[name].config

    def _value(self, request: messages.Request) -> Any:
        reply = self._call(request)
        assert isinstance(reply, messages.Value)
        return reply.value

    @contextlib.contextmanager
    def _new_channel(self) -> Iterator[Channel]:
        """A channel for the writer or sampler that the block makes; closed again if it cannot be made."""
        channel = self._connection.channel()
        try:
            yield channel
        except BaseException:
            channel.close()
            raise

    def _caller(self, channel: Channel) -> Callable[[messages.Request], messages.Reply]:
        """How a writer or sampler asks: on its own channel, in order with everything else that it sends.

        On the control channel OpenWriter overtook the handshake of the new channel's socket, and the server dropped
        the Grant that it could not route yet (4 of 10 on an idle machine); a CloseChannel could overtake the last
        priorities.
        """
        return functools.partial(self._call, channel=channel)

    def _call(
        self, request: messages.Request, timeout_s: float | None = None, channel: Channel | None = None
    ) -> messages.Reply:
        """One request, one reply."""
        self._connection.check()
        channel = self._control if channel is None else channel
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._num_requests += 1
            envelope = messages.Envelope(self._num_requests, self._connection.epoch, request)
            channel.send(messages.encode_control(envelope))
            while True:
                frame = channel.receive(max(0.0, deadline_s - time.monotonic()))
                if frame is None:
                    raise DeadlineExceeded(
                        f"{type(request).__name__}: the server at {self._connection.address} did not answer within "
                        f"{timeout_s} s; it is stopped or overloaded"
                    )
                if frames.kind_of(frame) != frames.CONTROL:
                    continue  # a grant or batch that nobody will look at any more: this is CloseChannel
                answer = messages.decode_control_reply(frame)
                if answer.request_id == self._num_requests:  # else one that came after its deadline
                    break
        if isinstance(answer.reply, messages.Refused):
            raise RequestRefused(answer.reply.reason)
        return answer.reply

    def _explainer(self, table: str) -> Callable[[], str]:
        """A function that says in one sentence what `table` waits for, for the text of a deadline error."""

        def explain() -> str:
            try:
                reply = self._call(messages.GetInfo(), _EXPLAIN_TIMEOUT_S)
            except RLBufferError as error:
                return str(error)
            assert isinstance(reply, messages.Value)
            info = reply.value["tables"][table]
            waits = "; ".join(info["waits"]) or "nobody waits there now"
            return f"{waits} ({info['size']} of {info['capacity']} items, {len(reply.value['clients'])} clients)"

        return explain


def _check_spaces(table: str, spec: TransitionSpec, envs: Any) -> None:
    """Refuse environments whose observations or actions have other shapes than the table's."""
    observation_space = getattr(envs, "single_observation_space", None) or envs.observation_space
    action_space = getattr(envs, "single_action_space", None) or envs.action_space
    theirs = TransitionSpec.from_spaces(observation_space, action_space).transition_fields()
    ours = {path: field for path, field in spec.transition_fields().items() if not path.startswith("extras/")}
    for path in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(path), theirs.get(path)
        if mine is None or other is None or mine.shape != other.shape:
            raise InvalidInput(f"table {table!r} stores {path} as {mine}, but the environment has {other}")
