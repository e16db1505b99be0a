"""Which slot holds which version of a published set of parameters; the server's side of the parameter channel.

Parameters are rows like any other: a few slots of one layout, a publisher that writes the slot it was granted, and a
board of versions that only the server writes. A reader copies the newest slot and then looks whether the slot still
holds that version, so it needs no message, holds nothing, and nobody waits for it.

    board, int64:  [ newest version | newest slot | version of slot 0 | ... | version of slot S-1 ]
    slot version:  0 while it is empty or being written
"""

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput

NUM_SLOTS = 4  # newest, being written, and two generations of grace for a reader that is slow to copy
NEWEST_VERSION, NEWEST_SLOT, FIRST_SLOT_VERSION = 0, 1, 2
BOARD_LENGTH = FIRST_SLOT_VERSION + NUM_SLOTS


class ParameterSlots:
    """Versions 1, 2, ... of one parameter set. At most one publisher writes at a time."""

    def __init__(self, board: NDArray[np.int64]) -> None:
        """Take a zeroed board [BOARD_LENGTH] int64."""
        self._board = board
        self._slot_versions = board[FIRST_SLOT_VERSION:]
        self._holder: object | None = None
        self._held_slot = -1
        self._frozen_slot = -1

    @property
    def version(self) -> int:
        """The newest version; 0 before the first."""
        return int(self._board[NEWEST_VERSION])

    def reserve(self, publisher: object) -> int:
        """Grant `publisher` the slot of the oldest version; asking again returns the same slot.

        Raises:
            InvalidInput: another publisher holds a slot.
        """
        if self._holder is not None and self._holder != publisher:
            raise InvalidInput("another client is publishing this parameter set; one publisher at a time")
        if self._holder is None:
            versions = self._slot_versions.copy()
            if self._frozen_slot >= 0:
                versions[self._frozen_slot] = versions.max()
            self._held_slot = int(versions.argmin())  # never the newest: its version is the largest
            self._slot_versions[self._held_slot] = 0  # a reader in the midst of copying it will see this
            self._holder = publisher
        return self._held_slot

    def publish(self, publisher: object, slot: int) -> int:
        """Make the written slot the newest; return its version.

        Raises:
            InvalidInput: the publisher does not hold that slot. Nothing changes.
        """
        if self._holder != publisher or slot != self._held_slot:
            raise InvalidInput(f"slot {slot} of this parameter set is not reserved by this client")
        version = self.version + 1
        # A reader takes the newest slot first and that slot's version second, so the version must be there first.
        self._slot_versions[slot] = version
        self._board[NEWEST_SLOT] = slot
        self._board[NEWEST_VERSION] = version
        self._holder = None
        return version

    def freeze(self) -> int:
        """The newest slot; it stays as it is until it is `copied`."""
        self._frozen_slot = int(self._board[NEWEST_SLOT])
        return self._frozen_slot

    def copied(self, num_slots: int) -> None:
        """`num_slots` of the one that was frozen have been copied or need not be."""
        if num_slots:
            self._frozen_slot = -1

    def restore(self, version: int) -> None:
        """Make slot 0, which was filled, the newest of a new set.

        Raises:
            InvalidInput: there is no such version.
        """
        if not 1 <= version < 2**63:
            raise InvalidInput(f"version {version} of parameters; expected 1..2^63 - 1")
        self._slot_versions[0] = self._board[NEWEST_VERSION] = version
        self._board[NEWEST_SLOT] = 0

    def is_held_by(self, publisher: object) -> bool:
        """Whether `publisher` reserved a slot and has not published it yet."""
        return self._holder == publisher

    def release(self, publisher: object) -> None:
        """Forget a publisher that died; what it wrote stays invalid."""
        if self._holder == publisher:
            self._holder = None
