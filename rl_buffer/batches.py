"""What sampling hands out: batches of torch tensors, as views of one block of rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rl_buffer.spec import RowLayout, unflatten

TensorTree = Any  # a tensor, or a nested dict of tensors where the space is a Dict

_TORCH_DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(slots=True)
class ReplayBatch:
    """B transitions. The tensors are the caller's until the next `sample()` overwrites them; `clone()` what is kept.

    observations, next_observations: (B, *obs_shape), or nested dicts of such; the latter lie n_steps later.
    actions: (B, *action_shape).
    rewards: (B,) float32, discounted sums of n_steps rewards.
    dones: (B,) float32, 1 only where terminated, so that `1 - dones` masks the bootstrap. (In `add`, `done` says that
        the episode ended for whatever reason.)
    terminateds, truncateds: (B,) bool.
    discounts: (B,) float32, gamma^n_steps * (1 - terminated); the target is rewards + discounts * V(next_observations).
    n_steps: (B,) int32, reward steps actually summed.
    extras: name -> (B, *shape).
    weights: (B,) float32, importance weights, at most 1; prioritized tables only, as are
    indices, generations: (B,) int64 on the CPU, the rows and which item they held.
    """

    observations: TensorTree
    actions: TensorTree
    rewards: torch.Tensor
    dones: torch.Tensor
    truncateds: torch.Tensor
    terminateds: torch.Tensor
    next_observations: TensorTree
    discounts: torch.Tensor
    n_steps: torch.Tensor
    extras: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    generations: torch.Tensor | None = None


def leaf_views(layout: RowLayout, block: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views (B, *shape) of every leaf in a block (B, stride / 8) of int64; nothing is copied."""
    num_rows = block.shape[0]
    block_bytes = block.view(torch.uint8)
    views = {}
    for path, column in layout.columns.items():
        stop = column.offset + column.field.nbytes
        leaf = block_bytes[:, column.offset : stop].view(_TORCH_DTYPES[column.field.dtype])
        views[path] = leaf.view(num_rows, *column.field.shape)
    return views


def replay_batch(leaves: Mapping[str, torch.Tensor]) -> ReplayBatch:
    """Name the leaves of a transition table."""
    flat = {name: leaves[name] for name in ("rewards", "dones", "truncateds", "terminateds", "discounts", "n_steps")}
    return ReplayBatch(
        observations=unflatten("observations", leaves),
        actions=unflatten("actions", leaves),
        next_observations=unflatten("next_observations", leaves),
        extras=unflatten("extras", leaves),
        **flat,
    )
