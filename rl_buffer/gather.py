"""Rows of a table gathered into one block, and the batch that views it.

Used by the learners' sampler over shared rows and by the in-process buffers over their own.
"""

import itertools
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer.batches import Batch, ReplayBatch, SequenceBatch, leaf_views
from rl_buffer.row_copies import NO_WORDS, gather_rows, replace_rows
from rl_buffer.spec import RowLayout
from rl_buffer.tables import ReplayTable

_NOTHING = torch.empty(0)
_NUM_BLOCKS = 2  # the batch that is held, or on its way to a GPU, while the next one is gathered; and that one
_LONG_ROW_WORDS = 512  # a page
# How many tensors share the storage at an address. Of a torch that does not tell no count is like the one before, and
# each batch gets a new block.
_serial = itertools.count()
_num_storage_users = getattr(torch._C, "_storage_Use_Count", lambda _: next(_serial))


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
        self._leaves_cpu = device.type != "cpu"  # asking the device each time costs 0.4 us
        self._contiguous = contiguous
        self._blocks: _Blocks | _PinnedBlocks | None = None
        if rows.device.type == "cpu":
            self._blocks = _PinnedBlocks(rows, device) if device.type == "cuda" else _Blocks(rows, table.layout, hidden)
        self._gathered = _NOTHING

    def gather(self, indices: NDArray[np.int64], asked: NDArray[np.int64] = NO_WORDS) -> None:
        """Copy rows ([B] int64) into the block that `hand_out` will give away; `asked` as in `gather_rows`."""
        if self._blocks is not None:
            self._blocks.gather(indices, asked)
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

    def source_and_target(self, num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """For who copies the rows himself, instead of `gather`: all rows and a block's, as words, flat.

        None where only `gather` can do it.
        """
        return self._blocks.source_and_target(num_rows) if isinstance(self._blocks, _Blocks) else None

    def hand_out(self, drawn: dict[str, Any]) -> Batch:
        """The gathered rows as a batch on the device.

        Args:
            drawn: arrays that the batch has of its rows: `weights`, which go to the device, `indices`, `generations`.
        """
        leaves: dict[str, Any]
        if isinstance(self._blocks, _Blocks):
            leaves = self._blocks.hand_out()
            if self._leaves_cpu:
                leaves = {path: leaf.to(self._device) for path, leaf in leaves.items()}
        else:
            rows = self._gathered.to(self._device) if self._blocks is None else self._blocks.hand_out()
            leaves = leaf_views(self._layout, rows, self._hidden)
        if self._contiguous:
            leaves = {path: leaf.contiguous() for path, leaf in leaves.items()}
        if drawn and self._leaves_cpu:
            drawn["weights"] = torch.from_numpy(drawn["weights"]).to(self._device, non_blocking=True)
        return self._kind.of(leaves, drawn)


class _Blocks:
    """Blocks of ordinary memory that are filled in turn, each of them again when nothing looks at it any more."""

    def __init__(self, rows: torch.Tensor, layout: RowLayout, hidden: tuple[str, ...]) -> None:
        self._rows = rows
        self._words = rows.numpy().reshape(-1)
        self._row_words = rows.shape[1]
        self._layout = layout
        self._hidden = hidden
        self._blocks: list[_Block] = []
        self._filled: _Block | None = None

    def gather(self, indices: NDArray[np.int64], asked: NDArray[np.int64]) -> None:
        """Copy the rows into a block that nobody looks at."""
        block = self._idle_block(len(indices))
        self._filled = block
        if self._row_words < _LONG_ROW_WORDS:
            gather_rows(self._words, indices, block.words, asked)
        else:  # torch divides the copy among its threads
            torch.index_select(self._rows, 0, torch.from_numpy(indices.copy()), out=block.rows)

    def replace(self, places: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Copy rows over some of the block that was filled."""
        assert self._filled is not None
        replace_rows(self._words, indices, self._filled.words, places, self._row_words)

    def source_and_target(self, num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """See `Gatherer.source_and_target`."""
        if self._row_words >= _LONG_ROW_WORDS:
            return None
        self._filled = block = self._idle_block(num_rows)
        return self._words, block.words

    def hand_out(self) -> dict[str, torch.Tensor]:
        """The leaves of the block that was filled. Who holds this dict keeps the block from being filled again."""
        assert self._filled is not None
        return self._filled.leaves

    def _idle_block(self, num_rows: int) -> "_Block":
        for block in self._blocks:
            if block.num_rows != num_rows:
                self._blocks = []
                break
            if not block.is_looked_at():
                return block
        block = _Block(torch.empty(num_rows, self._row_words, dtype=torch.int64), self._layout, self._hidden)
        # The oldest goes: who holds it may do so for ever.
        self._blocks = [*self._blocks[1 - _NUM_BLOCKS :], block]
        return block


class _Block:
    """Memory of one batch, and the tensors over it, which are made once.

    A batch holds the dict of them, and hands out tensors of its own over the same storage: these, and whatever is
    derived from them, a view, an array, what autograd saved, are users of the storage. So two counts tell whether
    somebody looks. (A tensor from a tensor's `.data` takes 0.3 us, one from an array 0.8.)
    """

    def __init__(self, rows: torch.Tensor, layout: RowLayout, hidden: tuple[str, ...]) -> None:
        self.rows = rows
        self.num_rows = len(rows)
        self.words = rows.numpy().reshape(-1)
        self.leaves = leaf_views(layout, rows, hidden)
        self._storage = rows.untyped_storage()._cdata
        self._idle = self._num_holders()

    def is_looked_at(self) -> bool:
        """Whether a batch of this block, or a tensor of one, or anything made from that, is still there."""
        return self._num_holders() != self._idle

    def _num_holders(self) -> tuple[int, int]:
        return sys.getrefcount(self.leaves), _num_storage_users(self._storage)


class _PinnedBlocks:
    """Page-locked blocks on the way to a GPU; one is filled while the copy of the other is still under way."""

    def __init__(self, rows: torch.Tensor, device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_BLOCKS
        self._turn = 0

    def gather(self, indices: NDArray[np.int64], asked: NDArray[np.int64]) -> None:
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
