"""`connect` and `Client`: everything that a process does with a server, and with the next one at its address.

    attached --the server ended--> lost --reconnect--> attached, to a new epoch

While it is lost, calls raise ServerLost. A `Connection` is one epoch; a `Client` has one after the other.
"""

import contextlib
import itertools
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from rl_buffer import frames, messages
from rl_buffer.address import Address
from rl_buffer.connection import Channel, ChannelUser, Connection
from rl_buffer.episode_ends import autoreset_mode, num_envs_of, stated_autoreset
from rl_buffer.errors import DeadlineExceeded, InvalidInput, RequestRefused, RLBufferError
from rl_buffer.failpoints import reached
from rl_buffer.parameters import ParameterSet, as_arrays
from rl_buffer.rate_limiters import LimiterConfig
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.tables import CheckpointReport, ReplayTable, RolloutTable
from rl_buffer.writer import ReplayWriter, default_chunk_size

if TYPE_CHECKING:
    import torch

    from rl_buffer.rollout_reader import RolloutReader
    from rl_buffer.rollout_writer import RolloutWriter
    from rl_buffer.sampler import ReplaySampler
    from rl_buffer.served_buffer import ServedReplayBuffer

_EXPLAIN_TIMEOUT_S = 1.0
_POLICY = "policy"  # the parameters that writers report their version of
_WAY_OUT = "start it with the tables of the one before, or connect again"
_UNSTATED: Any = object()  # None is a statement: rows are stored as given

_User = TypeVar("_User", bound=ChannelUser)


def connect(address: str, timeout_s: float = 10.0, name: str = "", *, server_uid: int | None = None) -> "Client":
    """Attach this process to the server at `address`, waiting until `timeout_s` for it to come up.

    Args:
        address: `server.address`, `ipc:///some/directory`.
        timeout_s: deadline in seconds, also the default deadline of the client's calls.
        name: shown in `info()`, e.g. "actor-3".
        server_uid: the user whose server it is, if that is neither this one nor root: whoever serves can read and
            write all that this process stores.

    Raises:
        DeadlineExceeded: no server came up in time.
        ConnectionRefused: other user, other version of rl_buffer, or too many clients.
    """
    return Client(Connection(Address(address, server_uid), name, timeout_s), timeout_s)


class Client:
    """One process's access to a server. Any thread may call it; a writer or sampler belongs to one."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.parameter_versions: dict[str, int] = {}  # the newest of each set that this client got or published
        self._connection = connection
        self._control = connection.channel()
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._reconnecting = threading.Lock()
        self._request_ids = itertools.count(1)
        self._num_epochs = 1
        self._parameter_sets: dict[str, ParameterSet] = {}
        self._users: weakref.WeakSet[ChannelUser] = weakref.WeakSet()  # those that somebody still has

    @property
    def tables(self) -> dict[str, ReplayTable | RolloutTable]:
        """Every table's configuration by name: spec, capacity, n_step, gamma, ..."""
        return {name: info.config for name, info in self._connection.tables.items()}

    # ---- going on with another server ----------------------------------------------------------------------

    def reconnect(self, timeout_s: float | None = None) -> bool:
        """After `ServerLost`: attach to the server that is now at the address, and go on there with everything open.

        Writers, samplers and readers stay the same objects. A writer sends again what was not acknowledged, before
        anything new, with its next chunk, `flush` or `close`; a rollout writer goes on with its fragment. Batches and
        rollouts that were taken are copies and stay; new priorities and `release` do nothing for what the new server
        does not have. Versions of parameters begin anew when somebody publishes there; one of before counts as 0.

        No other thread may be in a call of a writer, sampler or reader of this client meanwhile: let each of them end,
        by ServerLost, first. When this raises, it can be called again.

        Args:
            timeout_s: how long to wait for a server, by default the client's `timeout_s`.

        Returns:
            False if the server lives, and there was nothing to do.

        Raises:
            DeadlineExceeded: no server came up in time.
            ServerLost: one did, and ended.
            InvalidInput: its tables are not those of the one before; this client goes on with none but the same.
            ConnectionRefused, RequestRefused: it does not let this process in, or not with all that is open.
        """
        with self._reconnecting:
            is_lost = self._connection.is_lost
            if is_lost:
                self._attach_again(self.timeout_s if timeout_s is None else timeout_s)
            # Also those that an earlier call did not come to.
            left = [user for user in self._users if user.is_open and not user.is_on(self._connection)]
            for user in left:
                with self._new_channel() as channel:
                    user._open(channel)
            return is_lost or bool(left)

    def _attach_again(self, timeout_s: float) -> None:
        lost = self._connection
        for user in self._users:
            if user.is_open:
                user._rescue()
        lost.abandon()
        # Only now: the next server, if it has the same memory, lets others write into what this process held.
        connection = Connection(lost.address, lost.name, timeout_s, previous=lost)
        try:
            _check_same_tables(lost, connection)
            control = connection.channel()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._connection, self._control = connection, control
        self._parameter_sets.clear()
        if connection.epoch != lost.epoch:
            self.parameter_versions.clear()
            self._num_epochs += 1
        lost.close()

    # ---- writing and sampling ------------------------------------------------------------------------------

    def writer(
        self,
        table: str,
        *,
        envs: Any = None,
        num_envs: int | None = None,
        autoreset: Any = _UNSTATED,
        chunk_size: int | None = None,
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
                cheaper; `flush` sends at once. None: 96 steps, but above 64 transitions no more than 1 MiB and an
                eighth of the table's headroom.
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
            num_envs = num_envs_of(envs) or 1
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
        with self._new_channel() as channel:
            return self._user(
                ReplayWriter(
                    channel,
                    self._ask,
                    table,
                    config,
                    self._connection.stats_config,
                    num_envs=num_envs,
                    autoreset=mode,
                    chunk_size=default_chunk_size(config, num_envs) if chunk_size is None else chunk_size,
                    timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                    explain=self._explainer(table),
                    parameter_version=lambda: self.parameter_versions.get(_POLICY, 0),
                )
            )

    def sampler(
        self,
        table: str,
        batch_size: int,
        *,
        beta: float = 0.4,
        prefetch: int = 8,
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
                them when they are drawn. New priorities travel with the credits for half as many batches; with 0 each
                update is sent at once.
            device: where batches go; to a CUDA device in one copy from pinned memory.
            contiguous: copy each field out of the row block instead of handing out strided views.
            timeout_s: default deadline of `sample`, by default the client's.

        Raises:
            InvalidInput: unknown table or a value out of range.
            RequestRefused: batches that the rate limiter could never give.
        """
        from rl_buffer.sampler import ReplaySampler  # imports torch

        config = self._replay_table(table)
        with self._new_channel() as channel:
            return self._user(
                ReplaySampler(
                    channel,
                    self._ask,
                    table,
                    config,
                    batch_size=operator.index(batch_size),
                    beta=beta,
                    prefetch=prefetch,
                    device=device,
                    contiguous=contiguous,
                    timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                    explain=self._explainer(table),
                )
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
            num_envs = num_envs_of(envs) or 1
            if num_envs != config.num_envs:
                raise InvalidInput(f"envs has {num_envs} environments, but table {table!r} is for {config.num_envs}")
        mode = stated_autoreset(envs) if autoreset is _UNSTATED else autoreset_mode(autoreset)
        with self._new_channel() as channel:
            return self._user(
                RolloutWriter(
                    channel,
                    self._ask,
                    table,
                    config,
                    self._connection.stats_config,
                    number=operator.index(number),
                    autoreset=mode,
                    timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                    explain=self._explainer(table),
                    parameter_version=lambda: self.parameter_versions.get(config.parameters, 0),
                )
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
        with self._new_channel() as channel:
            return self._user(
                RolloutReader(
                    channel,
                    self._ask,
                    table,
                    config,
                    device=device,
                    seed=seed,
                    timeout_s=self.timeout_s if timeout_s is None else timeout_s,
                    explain=self._explainer(table),
                    newest_version=lambda: self.parameter_versions.get(config.parameters, 0),
                )
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
            reached("publisher.reserved")
            parameters.write(slot.slot, arrays)
            reached("publisher.written")
            published = self._call(messages.PublishParameters(name, slot.slot), timeout_s)
            assert isinstance(published, messages.Slot)
            reached("publisher.published")
        self.parameter_versions[name] = published.version
        return published.version

    def parameters(
        self, name: str = _POLICY, newer_than: int = 0, timeout_s: float = 0.0, as_numpy: bool = False
    ) -> tuple[int, dict[str, Any] | None]:
        """The newest version of a published state dict, as a copy.

        Once there is one, looking costs no message, so an actor may look at every step.

        Args:
            name: of the set.
            newer_than: the version that the caller has; 0 for none. One of an earlier server counts as 0.
            timeout_s: how long to wait for a newer one; 0 only looks.
            as_numpy: arrays instead of tensors, without importing torch.

        Returns:
            (version, state dict), or (newer_than, None) if there is none newer.

        Raises:
            ServerLost: the server ended.
        """
        self._connection.check_server()
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
        is_of_this_epoch = self._num_epochs == 1 or newer_than <= self.parameter_versions.get(name, 0)
        if not parameters.wait_for_newer(newer_than if is_of_this_epoch else 0, deadline_s):
            return newer_than, None
        version, arrays = parameters.read(self.timeout_s)
        self.parameter_versions[name] = version
        if as_numpy:
            return version, arrays
        import torch

        return version, {key: torch.from_numpy(array) for key, array in arrays.items()}

    # ---- asking --------------------------------------------------------------------------------------------

    def stats(self, *, per_client: bool = False) -> dict[str, float]:
        """Episode statistics over all actors, with the keys of `StatsTracker.get_statistics`; {} before the first.

        Args:
            per_client: the breakdown by the clients' names too, of the same moment: `{category}/clients/{name}/` before
                `num_episodes`, `rewards_mean` and `lengths_mean` (of its last episodes: the window, at most 100), and
                `lifetime_rewards_mean`, `_std`, `_min`, `_max`. A process that was started again under the name of
                another goes on with its figures. Beyond 1,024 names the one whose last episode is longest ago is
                forgotten, and counted in `{category}/other_clients/num_episodes`.
        """
        return dict(self._value(messages.GetStats(per_client)))

    def info(self) -> dict[str, Any]:
        """Tables, clients, parameter versions, and who waits for what, in plain values."""
        return dict(self._value(messages.GetInfo()))

    def size(self, table: str) -> int:
        """Transitions that can be sampled now."""
        return int(self._value(messages.GetSize(table)))

    def clear(self, table: str) -> None:
        """Forget all transitions of a table. Limiter counts and what writers hold uncommitted stay."""
        self._call(messages.Clear(table))

    def set_rate_limiter(self, table: str, limiter: LimiterConfig) -> None:
        """Let a table work by another rate limiter from now on; who waited and may go on by it does so at once.

        The cursor begins anew, as if the table had just been filled: at min(size, min_size_to_sample) *
        samples_per_insert. `info()["tables"][table]["limiter"]` shows it. The limiter is kept in a directory and in
        checkpoints; a server that has neither begins with that of its `ReplayTable`.

        Raises:
            InvalidInput: this is no rate limiter, or the table holds rollouts.
            RequestRefused: somebody could wait for ever: with the table's capacity, or with the batch size of a
                sampler that is open. Nothing has changed.
        """
        self._replay_table(table)
        kinds = get_args(LimiterConfig)
        if type(limiter) not in kinds:
            expected = " or ".join(f"{kind.__name__}(...)" for kind in kinds)
            raise InvalidInput(f"a rate limiter is {expected}, got {limiter!r}")
        self._call(messages.SetRateLimiter(table, limiter))

    def checkpoint(self, path: str | os.PathLike[str], timeout_s: float = 600.0) -> CheckpointReport:
        """Write all that the server holds at one moment to one file, while everybody goes on.

        Every committed transition with its priority, finished rollouts, the limiters' counts, statistics and newest
        parameters, of all tables together; `BufferServer(..., restore=path)` begins with it. What was at `path` is
        replaced when the new file is whole and on the disk, whoever is killed meanwhile. The server writes it, as its
        own user, into a directory that is there.

        Args:
            path: of the file; a relative one is this process's.
            timeout_s: deadline in seconds. A checkpoint that was begun and not finished by then goes on: see `info`.

        Returns:
            What was saved, and for how long the server and its writers stood still for it.

        Raises:
            RequestRefused: another checkpoint is being written, or this one cannot be, such as for want of room. What
                was at `path` is as it was.
        """
        request = messages.Checkpoint(os.path.abspath(path))
        with self._new_channel() as channel:  # of its own: other requests need not wait for the answer
            try:
                reply = self._call(request, timeout_s, channel)
            except DeadlineExceeded as error:
                raise DeadlineExceeded(
                    f"the checkpoint {request.path} was not finished within {timeout_s} s; the server may go on with "
                    "it (see info()), or is stopped"
                ) from error
            channel.close()
        assert isinstance(reply, CheckpointReport)
        return reply

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

    def _user(self, user: _User) -> _User:
        """Remember whom `reconnect` brings a new channel."""
        self._users.add(user)
        return user

    def _ask(self, channel: Channel, request: messages.Request) -> messages.Reply:
        """How a writer or sampler asks: on its own channel, in order with everything else that it sends.

        On the control channel OpenWriter overtook the handshake of the new channel's socket, and the server dropped
        the Grant that it could not route yet (4 of 10 on an idle machine); a CloseChannel could overtake the last
        priorities.
        """
        return self._call(request, channel=channel)

    def _call(
        self, request: messages.Request, timeout_s: float | None = None, channel: Channel | None = None
    ) -> messages.Reply:
        """One request, one reply."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        request_id = next(self._request_ids)
        with self._lock if channel is None else contextlib.nullcontext():  # any other belongs to this thread
            channel = self._control if channel is None else channel
            envelope = messages.Envelope(request_id, channel.connection.epoch, request)
            channel.send(messages.encode_control(envelope))
            reached("client.asked")
            while True:
                frame = channel.receive(max(0.0, deadline_s - time.monotonic()))
                if frame is None:
                    raise DeadlineExceeded(
                        f"{type(request).__name__}: the server at {channel.connection.address} did not answer within "
                        f"{timeout_s} s; it is stopped or overloaded"
                    )
                if frames.kind_of(frame) != frames.CONTROL:
                    continue  # a grant or batch that nobody will look at any more: this is CloseChannel
                answer = messages.decode_control_reply(frame)
                if answer.request_id == request_id:  # else one that came after its deadline
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
            waits = "; ".join((*info["waits"], *filter(None, [info["stuck"]]))) or "nobody waits there now"
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


def _check_same_tables(old: Connection, new: Connection) -> None:
    """Refuse a server on which open writers and samplers could not go on as they are."""
    for name, info in old.tables.items():
        other = new.tables.get(name)
        if other is None:
            raise InvalidInput(f"the server that is now at {new.address} has no table {name!r}; {_WAY_OUT}")
        for field in type(info.config).__struct_fields__:
            mine, theirs = getattr(info.config, field), getattr(other.config, field, None)
            if mine != theirs:
                raise InvalidInput(
                    f"table {name!r} of the server that is now at {new.address} has {field} {theirs}, not {mine}; "
                    f"{_WAY_OUT}"
                )
        if info.digest != other.digest:
            raise InvalidInput(f"table {name!r} of the server that is now at {new.address} has other rows; {_WAY_OUT}")
    if old.stats_config != new.stats_config:
        raise InvalidInput(f"the server that is now at {new.address} keeps other statistics; {_WAY_OUT}")
