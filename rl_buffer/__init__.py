"""A shared-memory experience server for reinforcement learning in PyTorch.

`import rl_buffer` loads neither torch nor Numba: each name below is imported when it is first used.

    layer       modules
    pure        errors, failpoints, spec, allocator, huge_pages, kernels, cache_lines, powers, uniforms, importance,
                row_copies, overtaken_rows, sum_tree, priority_updates, row_set, batch_draws, samplers, rate_limiters,
                waits, n_step, stats_tracker, server_stats, diagnostics, tables, inputs, step_leaves, episode_ends,
                step_history, transition_history, sequence_history, offline, replay_input, replay_table,
                consumed_table, rollout_table, table_states, parameter_slots, address, buffer_arguments, gae,
                rollout_fragment
    memory      storage, peers, descriptors, directory, local_rows, buffer_files, checkpoint_file, checkpoint
    buffers     batches, gather, replay_buffer, prioritized_replay_buffer, rollout_batches, rollout_buffer
    protocol    frames, messages
    processes   sessions, ledger, wait_facts, server_info, checkpoint_request, grants, server_core, mapped_ledger,
                recovery, table_memory, checkpoint_process, checkpointer, server_loop, server (the server)
                connection, parameters, outbox, writer, sampler, served_buffer, rollout_writer, rollout_reader,
                client                                                          (its clients)
                launch, preload                                      (child processes of a trainer)
    face        table_file, doctor, prometheus_metrics, top_screen, top, cli    (the command rl-buffer)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_buffer.batches import ReplayBatch as ReplayBatch
    from rl_buffer.batches import SequenceBatch as SequenceBatch
    from rl_buffer.client import Client as Client
    from rl_buffer.client import connect as connect
    from rl_buffer.errors import AddressInUse as AddressInUse
    from rl_buffer.errors import Closed as Closed
    from rl_buffer.errors import ConnectionRefused as ConnectionRefused
    from rl_buffer.errors import DeadlineExceeded as DeadlineExceeded
    from rl_buffer.errors import ForkedClient as ForkedClient
    from rl_buffer.errors import InvalidInput as InvalidInput
    from rl_buffer.errors import NotEnoughMemory as NotEnoughMemory
    from rl_buffer.errors import RequestRefused as RequestRefused
    from rl_buffer.errors import RLBufferError as RLBufferError
    from rl_buffer.errors import ServerLost as ServerLost
    from rl_buffer.prioritized_replay_buffer import PrioritizedReplayBuffer as PrioritizedReplayBuffer
    from rl_buffer.rate_limiters import MinSize as MinSize
    from rl_buffer.rate_limiters import Queue as Queue
    from rl_buffer.rate_limiters import SampleToInsertRatio as SampleToInsertRatio
    from rl_buffer.rate_limiters import Stack as Stack
    from rl_buffer.replay_buffer import ReplayBuffer as ReplayBuffer
    from rl_buffer.rollout_batches import RolloutBatch as RolloutBatch
    from rl_buffer.rollout_buffer import RolloutBuffer as RolloutBuffer
    from rl_buffer.rollout_reader import RolloutReader as RolloutReader
    from rl_buffer.rollout_reader import Rollouts as Rollouts
    from rl_buffer.rollout_writer import RolloutWriter as RolloutWriter
    from rl_buffer.sampler import ReplaySampler as ReplaySampler
    from rl_buffer.samplers import Fifo as Fifo
    from rl_buffer.samplers import Lifo as Lifo
    from rl_buffer.samplers import Prioritized as Prioritized
    from rl_buffer.samplers import Uniform as Uniform
    from rl_buffer.server import BufferServer as BufferServer
    from rl_buffer.spec import Field as Field
    from rl_buffer.spec import TransitionSpec as TransitionSpec
    from rl_buffer.stats_tracker import StatsTracker as StatsTracker
    from rl_buffer.tables import ReplayTable as ReplayTable
    from rl_buffer.tables import RolloutTable as RolloutTable
    from rl_buffer.writer import ReplayWriter as ReplayWriter

_MODULES = {
    "AddressInUse": "errors",
    "BufferServer": "server",
    "Client": "client",
    "Closed": "errors",
    "ConnectionRefused": "errors",
    "DeadlineExceeded": "errors",
    "Field": "spec",
    "Fifo": "samplers",
    "ForkedClient": "errors",
    "InvalidInput": "errors",
    "Lifo": "samplers",
    "MinSize": "rate_limiters",
    "NotEnoughMemory": "errors",
    "Prioritized": "samplers",
    "PrioritizedReplayBuffer": "prioritized_replay_buffer",
    "Queue": "rate_limiters",
    "RLBufferError": "errors",
    "ReplayBatch": "batches",
    "ReplayBuffer": "replay_buffer",
    "ReplaySampler": "sampler",
    "ReplayTable": "tables",
    "ReplayWriter": "writer",
    "RequestRefused": "errors",
    "RolloutBatch": "rollout_batches",
    "RolloutBuffer": "rollout_buffer",
    "RolloutReader": "rollout_reader",
    "RolloutTable": "tables",
    "RolloutWriter": "rollout_writer",
    "Rollouts": "rollout_reader",
    "SampleToInsertRatio": "rate_limiters",
    "SequenceBatch": "batches",
    "ServerLost": "errors",
    "Stack": "rate_limiters",
    "StatsTracker": "stats_tracker",
    "TransitionSpec": "spec",
    "Uniform": "samplers",
    "connect": "client",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rl_buffer' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"rl_buffer.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
