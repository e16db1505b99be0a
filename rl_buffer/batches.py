"""What sampling hands out: rows of a table gathered into one block, and batches of torch tensors that view it.

Used by the learners' sampler over shared rows and by the in-process buffers over their own.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.sequence_history import sequence_td_errors
from rl_buffer.spec import RowLayout, unflatten
from rl_buffer.tables import ReplayTable

TensorTree = Any  # a tensor, or a nested dict of tensors where the space is a Dict

_NOTHING = torch.empty(0)
_NUM_BLOCKS = 2  # the batch that is held, or on its way to a GPU, while the next one is gathered; and that one
_LONG_ROW_WORDS = 512  # a page
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


class _Discounts:
    """A field that says why it is missing."""

    def __get__(self, batch: Any, owner: type | None = None) -> torch.Tensor:
        discounts: torch.Tensor | None = vars(batch)["discounts"]
        if discounts is None:
            raise InvalidInput(
                "discounts are gamma^n_steps * (1 - terminated), but this buffer has no gamma; give it gamma="
            )
        return discounts

    def __set__(self, batch: Any, discounts: torch.Tensor | None) -> None:
        vars(batch)["discounts"] = discounts


class _Described:
    """Shapes and types instead of numbers, which nobody reads."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={_described(v)}' for k, v in vars(self).items())})"


def _described(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {_described(branch)}" for key, branch in tree.items()) + "}"
    return (
        f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}" if isinstance(tree, torch.Tensor) else repr(tree)
    )


@dataclass(repr=False, eq=False)
class ReplayBatch(_Described):
    """B transitions. The tensors are the caller's: nothing overwrites them as long as one of them is kept.

    observations, next_observations: (B, *obs_shape), or nested dicts of such; the latter lie n_steps later.
    actions: (B, *action_shape).
    rewards: (B,) float32, discounted sums of n_steps rewards.
    dones: (B,) float32, 1 only where terminated, so that `1 - dones` masks the bootstrap. (In `add`, `done` says that
        the episode ended for whatever reason.)
    terminateds, truncateds: (B,) bool.
    discounts: (B,) float32, gamma^n_steps * (1 - terminated); the target is rewards + discounts * V(next_observations).
        Of a buffer without gamma they raise InvalidInput.
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


@dataclass(repr=False, eq=False)
class SequenceBatch(_Described):
    """B sequences of T = burn_in + sequence_length + n_step steps, for recurrent policies (R2D2).

    Index 0 is always a real step, and `recurrent_states` is the state that the policy carried into it: run the network
    from there over all T observations, and train where `train_mask` holds. The steps before those bring the state up
    to date; at the start of an episode, where the stored state is exact, there are fewer of them or none. Behind the
    end of an episode comes its final observation, then zeros. The target of step t is

        rewards[:, t] + discounts[:, t] * V(observations[:, bootstrap_steps[:, t]])

    observations: (B, T, *obs_shape), or nested dicts of such. actions: (B, T, *action_shape).
    rewards, n_steps, dones, terminateds, truncateds, discounts: (B, T), of the n-step window that begins at the step;
        as in `ReplayBatch`.
    step_rewards: (B, T) float32, the reward of the single step, which recurrent policies are often fed.
    mask: (B, T) bool, where a step happened. train_mask: (B, T) bool, the trained ones.
    recurrent_states: (B, *shape) or a dict of such; {} where the spec has none.
    extras: name -> (B, T, *shape).
    weights, indices, generations: (B,), as in `ReplayBatch`.
    """

    observations: TensorTree
    actions: TensorTree
    rewards: torch.Tensor
    step_rewards: torch.Tensor
    dones: torch.Tensor
    truncateds: torch.Tensor
    terminateds: torch.Tensor
    discounts: torch.Tensor
    n_steps: torch.Tensor
    mask: torch.Tensor
    train_mask: torch.Tensor
    recurrent_states: TensorTree
    extras: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    generations: torch.Tensor | None = None

    @property
    def bootstrap_steps(self) -> torch.Tensor:
        """(B, T) int64: where along T the observation lies whose value the step's target takes."""
        num_steps = self.rewards.shape[1]
        steps = torch.arange(num_steps, device=self.rewards.device) + self.n_steps
        return steps.clamp_(max=num_steps - 1)


# Not in the classes: there a dataclass would take the descriptor for a default value.
ReplayBatch.discounts = _Discounts()  # type: ignore[assignment]
SequenceBatch.discounts = _Discounts()  # type: ignore[assignment]

# ReplayBatch or SequenceBatch, as the table is. Not their union, of which a type checker would ask at every use which.
Batch: TypeAlias = Any


def leaf_views(layout: RowLayout, block: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views (B, *shape) of every leaf in a block (B, stride / 8) of int64 on any device; nothing is copied."""
    if block.device.type == "cpu":
        return {path: torch.from_numpy(leaf) for path, leaf in layout.view(block.numpy(), len(block)).items()}
    views = {}
    for path, column in layout.columns.items():
        typed = block.view(_TORCH_DTYPES[column.field.dtype])
        itemsize = typed.element_size()
        inner = torch.empty(column.field.shape, device="meta").stride()
        shape, strides = (len(block), *column.field.shape), (layout.stride_nbytes // itemsize, *inner)
        views[path] = typed.as_strided(shape, strides, column.offset // itemsize)
    return views


def name_leaves(table: ReplayTable, leaves: Mapping[str, torch.Tensor]) -> Batch:
    """The batch of a table of transitions or of sequences."""
    names = ["rewards", "dones", "truncateds", "terminateds", "discounts", "n_steps"]
    common: dict[str, Any] = {
        "observations": unflatten("observations", leaves),
        "actions": unflatten("actions", leaves),
        "extras": unflatten("extras", leaves),
    }
    if table.sequence_length is None:
        flat: dict[str, Any] = {name: leaves[name] for name in names}
        return ReplayBatch(**flat, **common, next_observations=unflatten("next_observations", leaves))
    flat = {name: leaves[name] for name in (*names, "step_rewards", "mask", "train_mask")}
    return SequenceBatch(**flat, **common, recurrent_states=unflatten("recurrent_states", leaves))


def as_td_errors(table: ReplayTable, batch: Any, num_rows: int, td_errors: Any) -> NDArray[np.float64]:
    """What `update_priorities` was given for N rows as [N] float64 on the CPU.

    Args:
        table: its sequences take the mix of largest and mean.
        batch: the SequenceBatch, if there is one, that tells trained steps.
        num_rows: N.
        td_errors: (N,) or (N, 1), signed or not; for a SequenceBatch also (N, T); on any device, may require grad.

    Raises:
        InvalidInput: wrong shape, NaN or infinity.
    """
    errors = torch.as_tensor(td_errors).detach().to("cpu", torch.float64).numpy()
    mixed = isinstance(batch, SequenceBatch) and errors.shape == tuple(batch.train_mask.shape)
    if mixed:
        train_mask = batch.train_mask.cpu().numpy()
        errors = np.where(train_mask, errors, 0.0)
    elif errors.shape not in ((num_rows,), (num_rows, 1)):
        also = f" or {tuple(batch.train_mask.shape)}" if isinstance(batch, SequenceBatch) else ""
        raise InvalidInput(f"td_errors has shape {errors.shape}, expected ({num_rows},) or ({num_rows}, 1){also}")
    if not np.isfinite(errors).all():
        bad = tuple(np.argwhere(~np.isfinite(errors))[0].tolist())
        raise InvalidInput(f"td_errors[{', '.join(map(str, bad))}] is {errors[bad]}, expected finite numbers")
    return sequence_td_errors(errors, train_mask, table.eta) if mixed else errors.reshape(num_rows)


class Gatherer:
    """Copies rows of one table into batches on a device, one batch at a time.

    gather -> (look whether the rows are still the drawn ones, perhaps gather again) -> hand_out

    On the CPU a block of memory is used again when nothing looks at it any more: large batches then do not pay for new
    pages each time, and nobody finds a batch that he kept changed. To a GPU a batch goes as one copy of one block.
    """

    def __init__(self, table: ReplayTable, rows: torch.Tensor, device: torch.device, *, contiguous: bool) -> None:
        """Gather from `rows`, (num_rows, stride / 8) int64 on any device, to batches on `device`."""
        self._table = table
        self._layout = table.layout
        self._rows = rows
        self._device = device
        self._contiguous = contiguous
        self._blocks: _Blocks | _PinnedBlocks | None = None
        if rows.device.type == "cpu":
            self._blocks = _PinnedBlocks(rows, device) if device.type == "cuda" else _Blocks(rows, self._layout)
        self._gathered = _NOTHING

    def gather(self, indices: NDArray[np.int64]) -> None:
        """Copy rows ([B] int64) into the block that `hand_out` will give away."""
        if self._blocks is not None:
            self._blocks.gather(indices)
        else:
            self._gathered = self._rows.index_select(0, torch.from_numpy(indices).to(self._rows.device))

    def hand_out(self) -> Batch:
        """The gathered rows as a batch on the device."""
        if isinstance(self._blocks, _Blocks):
            leaves = self._blocks.hand_out()
            if self._device.type != "cpu":
                leaves = {path: leaf.to(self._device) for path, leaf in leaves.items()}
        else:
            block = self._gathered.to(self._device) if self._blocks is None else self._blocks.hand_out()
            leaves = leaf_views(self._layout, block)
        if self._contiguous:
            leaves = {path: leaf.contiguous() for path, leaf in leaves.items()}
        return name_leaves(self._table, leaves)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor where the batch is."""
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


class _Blocks:
    """Blocks of ordinary memory with NumPy views of their leaves, which tensors are made from for each batch.

    Such a tensor, and whatever is derived from it, keeps one reference to its view: that is how it is known whether
    somebody still looks. It also takes 0.5 us, where a tensor sliced from a tensor takes 2.
    """

    def __init__(self, rows: torch.Tensor, layout: RowLayout) -> None:
        self._rows = rows
        self._layout = layout
        self._free: list[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]] = []
        self._leaves: dict[str, NDArray[Any]] = {}

    def gather(self, indices: NDArray[np.int64]) -> None:
        """Copy the rows into a block that nobody looks at."""
        words, self._leaves = self._free_block((len(indices), self._rows.shape[1]))
        if words.shape[1] < _LONG_ROW_WORDS:
            # 9 us where torch takes 12, for 256 rows of 192 B from 1 M. ("clip" because "raise" copies twice.)
            np.take(self._rows.numpy(), indices, axis=0, out=words, mode="clip")
        else:  # torch divides the copy among its threads
            torch.index_select(self._rows, 0, torch.from_numpy(indices.copy()), out=torch.from_numpy(words))

    def hand_out(self) -> dict[str, torch.Tensor]:
        """The leaves of the block that was filled."""
        leaves, self._leaves = self._leaves, {}
        return {path: torch.from_numpy(leaf) for path, leaf in leaves.items()}

    def _free_block(self, shape: tuple[int, int]) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        if self._free and self._free[0][0].shape != shape:
            self._free = []
        for block in self._free:
            if not _is_looked_at(block[1]):
                return block
        words = np.empty(shape, np.int64)
        block = (words, self._layout.view(words, len(words)))
        if len(self._free) < _NUM_BLOCKS:
            self._free.append(block)
        return block


def _is_looked_at(leaves: dict[str, NDArray[Any]]) -> bool:
    # A loop, and not any(): three times as fast, and it is plain who holds which reference.
    for leaf in leaves.values():  # noqa: SIM110
        if sys.getrefcount(leaf) > 3:  # of the dict, of the loop's variable, and of the call itself
            return True
    return False


class _PinnedBlocks:
    """Page-locked blocks on the way to a GPU; one is filled while the copy of the other is still under way."""

    def __init__(self, rows: torch.Tensor, device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_BLOCKS
        self._turn = 0

    def gather(self, indices: NDArray[np.int64]) -> None:
        """Copy the rows into the block whose turn it is, once its last copy to the device has ended."""
        shape = (len(indices), self._rows.shape[1])
        if not self._blocks or self._blocks[0].shape != shape:
            self._blocks = [torch.empty(shape, dtype=torch.int64, pin_memory=True) for _ in self._copied]
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        torch.index_select(self._rows, 0, torch.from_numpy(indices.copy()), out=self._blocks[self._turn])

    def hand_out(self) -> torch.Tensor:
        """Start the copy of that block to the device, into memory of its own."""
        target = self._blocks[self._turn].to(self._device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied[self._turn] = event
        self._turn = (self._turn + 1) % _NUM_BLOCKS
        return target
