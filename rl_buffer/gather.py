"""Rows of a table gathered into one block, and the batch that views it.

Used by the learners' sampler over shared rows and by the in-process buffers over their own.
"""

import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer.batches import Batch, ReplayBatch, SequenceBatch, leaf_views
from rl_buffer.spec import RowLayout
from rl_buffer.tables import ReplayTable

_NOTHING = torch.empty(0)
_NUM_BLOCKS = 2  # the batch that is held, or on its way to a GPU, while the next one is gathered; and that one
_LONG_ROW_WORDS = 512  # a page


class Gatherer:
    """Copies rows of one table into batches on a device, one batch at a time.

    gather -> (look whether the rows are still the drawn ones, perhaps replace some) -> hand_out

    On the CPU a block of memory is used again when nothing looks at it any more: large batches then do not pay for new
    pages each time, and nobody finds a batch that he kept changed. To a GPU a batch goes as one copy of one block.
    """

    def __init__(
        self,
        table: ReplayTable,
        rows: torch.Tensor,
        device: torch.device,
        *,
        contiguous: bool = False,
        hidden: tuple[str, ...] = (),
    ) -> None:
        """Gather from `rows`, (num_rows, stride / 8) int64 on any device, to batches on `device`.

        Args:
            table: what the rows hold.
            rows: on the CPU or a GPU.
            device: of the batches.
            contiguous: copy each leaf out of the block, which its views are strided over.
            hidden: leaves that batches do not show.
        """
        self._kind = ReplayBatch if table.sequence_length is None else SequenceBatch
        self._layout = table.layout
        self._hidden = hidden
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

    def replace(self, places: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Copy other rows, [N] by number, over those at these places, [N], of the gathered ones."""
        if self._blocks is not None:
            self._blocks.replace(places, indices)
        else:
            device = self._rows.device
            rows = self._rows.index_select(0, torch.from_numpy(indices).to(device))
            self._gathered[torch.from_numpy(places).to(device)] = rows

    def hand_out(self, drawn: dict[str, NDArray[Any]]) -> Batch:
        """The gathered rows as a batch on the device.

        Args:
            drawn: what else the batch has of its rows: `weights`, which go to the device, `indices`, `generations`.
        """
        leaves: dict[str, Any]
        if isinstance(self._blocks, _Blocks):
            leaves = self._blocks.hand_out()
            if self._device.type != "cpu":
                leaves = {path: torch.from_numpy(leaf).to(self._device) for path, leaf in leaves.items()}
        else:
            block = self._gathered.to(self._device) if self._blocks is None else self._blocks.hand_out()
            leaves = leaf_views(self._layout, block)
        for name in self._hidden:
            del leaves[name]
        if self._contiguous:
            leaves = {path: torch.as_tensor(leaf).contiguous() for path, leaf in leaves.items()}
        leaves |= drawn
        if drawn and self._device.type != "cpu":
            leaves["weights"] = torch.from_numpy(drawn["weights"]).to(self._device, non_blocking=True)
        return self._kind.of(leaves)


class _Blocks:
    """Blocks of ordinary memory with NumPy views of their leaves, which batches make tensors from.

    A batch, such a tensor, and whatever is derived from it keep a reference to the view: that is how it is known
    whether somebody still looks. It also takes 0.5 us, where a tensor sliced from a tensor takes 2.
    """

    def __init__(self, rows: torch.Tensor, layout: RowLayout) -> None:
        self._rows = rows
        self._words = rows.numpy()
        self._layout = layout
        self._paths = list(layout.columns)
        self._free: list[_Block] = []
        self._views: list[NDArray[Any]] = []
        self._filled = self._words[:0]

    def gather(self, indices: NDArray[np.int64]) -> None:
        """Copy the rows into a block that nobody looks at."""
        words, self._views = self._free_block((len(indices), self._rows.shape[1]))
        self._filled = words
        if words.shape[1] < _LONG_ROW_WORDS:
            # 9 us where torch takes 12, for 256 rows of 192 B from 1 M. ("clip" because "raise" copies twice.)
            self._words.take(indices, axis=0, out=words, mode="clip")
        else:  # torch divides the copy among its threads
            torch.index_select(self._rows, 0, torch.from_numpy(indices.copy()), out=torch.from_numpy(words))

    def replace(self, places: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Copy rows over some of the block that was filled."""
        self._filled[places] = self._words[indices]

    def hand_out(self) -> dict[str, NDArray[Any]]:
        """The leaves of the block that was filled."""
        views, self._views = self._views, []
        return dict(zip(self._paths, views, strict=True))

    def _free_block(self, shape: tuple[int, int]) -> "_Block":
        if self._free and self._free[0].words.shape != shape:
            self._free = []
        for block in self._free:
            if not _is_looked_at(block.views):
                return block
        words = np.empty(shape, np.int64)
        block = _Block(words, list(self._layout.view(words, len(words)).values()))
        if len(self._free) < _NUM_BLOCKS:
            self._free.append(block)
        return block


class _Block(NamedTuple):
    words: NDArray[np.int64]
    views: list[NDArray[Any]]  # of the leaves, in their order


def _is_looked_at(views: list[NDArray[Any]]) -> bool:
    # A loop, and not any(): three times as fast, and it is plain who holds which reference.
    for view in views:  # noqa: SIM110
        if sys.getrefcount(view) > 3:  # of the list, of the loop's variable, and of the call itself
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

    def replace(self, places: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Copy rows over some of that block."""
        self._blocks[self._turn].numpy()[places] = self._rows.numpy()[indices]

    def hand_out(self) -> torch.Tensor:
        """Start the copy of that block to the device, into memory of its own."""
        target = self._blocks[self._turn].to(self._device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied[self._turn] = event
        self._turn = (self._turn + 1) % _NUM_BLOCKS
        return target
