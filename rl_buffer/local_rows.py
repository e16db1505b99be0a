"""The rows of an in-process buffer: ordinary memory, or a GPU's with a page-locked block to write through.

Knows how rows are laid out, not what is in them or which are in use.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer import huge_pages
from rl_buffer.replay_input import CopyRows
from rl_buffer.spec import RowLayout
from rl_buffer.storage import check_memory

_PIECE_ROWS = 1 << 16


class LocalRows:
    """`num_rows` rows of one layout.

    Attributes:
        block: (num_rows, stride / 8) int64, on the device: what batches are gathered from.
    """

    def __init__(self, layout: RowLayout, num_rows: int, device: torch.device, max_written: int) -> None:
        """Reserve the memory; pages are first touched when they are written.

        Args:
            layout: of one row.
            num_rows: rows in all.
            device: where they lie.
            max_written: the most rows that `write` is called with.

        Raises:
            NotEnoughMemory: the machine or its container cannot hold them.
        """
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            nbytes = num_rows * layout.stride_nbytes
            check_memory(nbytes)
            # From a page on, so no row takes a cache line more than it must.
            words = huge_pages.zeros(nbytes // 8, np.int64)
            self.block = torch.from_numpy(words).view(num_rows, -1)
            self._views = layout.view(words, num_rows)
        else:
            row_words = layout.stride_nbytes // 8
            self.block = torch.zeros(num_rows, row_words, dtype=torch.int64, device=device)
            self._staged = torch.zeros(max_written, row_words, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._views = layout.view(self._staged.numpy(), max_written)

    def write(self, rows: NDArray[np.int64], copy_rows: CopyRows) -> None:
        """Let `copy_rows` write into rows ([N] int64)."""
        if self._on_cpu:
            copy_rows(self._views, rows)
            return
        num_rows = len(rows)
        copy_rows(self._views, np.arange(num_rows))
        # Not asynchronous: the next write reuses the staging block.
        staged = self._staged[:num_rows].to(self.block.device)
        self.block.index_copy_(0, torch.from_numpy(rows).to(self.block.device), staged)

    def first(self, num_rows: int) -> NDArray[np.int64]:
        """The first `num_rows` rows, [num_rows, stride / 8]; on the CPU without a copy."""
        return self.block[:num_rows].cpu().numpy()

    def fill(self, num_rows: int, read: Callable[[int, int], NDArray[np.int64]]) -> None:
        """Overwrite the first `num_rows` rows with what `read(start, stop)` returns, piece by piece."""
        for start in range(0, num_rows, _PIECE_ROWS):
            stop = min(num_rows, start + _PIECE_ROWS)
            self.block[start:stop] = torch.from_numpy(read(start, stop)).to(self.block.device)
