"""The client's side of the parameter channel: publish a state dict, fetch the newest one.

Publishing copies into a slot that the server grants; fetching copies out of the newest slot and then looks at the
board whether it was still the same version. See `parameter_slots` for the board.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer import messages
from rl_buffer.connection import Connection
from rl_buffer.errors import DeadlineExceeded, InvalidInput, RequestRefused
from rl_buffer.failpoints import reached
from rl_buffer.parameter_slots import FIRST_SLOT_VERSION, NEWEST_SLOT, NEWEST_VERSION
from rl_buffer.spec import Field, RowLayout

_POLL_S = 0.002  # between looks at the board while waiting for a newer version


class ParameterSet:
    """The mapped slots and board of one published set of arrays."""

    def __init__(self, connection: Connection, name: str, create: Mapping[str, Field] | None, timeout_s: float) -> None:
        """Map a set, creating it if `create` gives its fields.

        Raises:
            KeyError: nobody has created it yet.
            RequestRefused: it exists with other fields, or is too large.
        """
        self.name = name
        self._connection = connection
        request: messages.AttachRequest = (
            messages.GetParameters(name) if create is None else messages.CreateParameters(name, list(create.items()))
        )
        with connection.request(request, timeout_s) as (reply, segment):
            if isinstance(reply, messages.Refused):
                raise RequestRefused(reply.reason)
            assert isinstance(reply, messages.ParametersInfo)
            if reply.rows is None or reply.board is None:
                raise KeyError(name)
            self.fields = dict(reply.fields)
            layout = RowLayout(self.fields)
            self._slots = layout.view(segment(reply.rows, True).buffer, reply.num_slots)
            self._board = segment(reply.board, False).array("int64")
        reached("parameters.mapped" if create is None else "publisher.mapped")

    @property
    def newest_version(self) -> int:
        """0 before the first; a look at shared memory, no message."""
        return int(self._board[NEWEST_VERSION])

    def wait_for_newer(self, newer_than: int, deadline_s: float) -> bool:
        """Wait until a version above `newer_than` is published; False at the deadline."""
        while self.newest_version <= newer_than:
            if time.monotonic() >= deadline_s:
                return False
            self._connection.pause(_POLL_S)
        return True

    def write(self, slot: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Fill a slot that the server granted."""
        for key, array in arrays.items():
            self._slots[key][slot] = array
            reached("publisher.half_written")

    def read(self, timeout_s: float) -> tuple[int, dict[str, NDArray[Any]]]:
        """Copy out the newest version, again if the publisher laps us.

        Raises:
            DeadlineExceeded: lapped every time: NUM_SLOTS - 1 versions were published during each copy.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            slot = int(self._board[NEWEST_SLOT])
            version = int(self._board[FIRST_SLOT_VERSION + slot])
            arrays = {key: np.array(self._slots[key][slot]) for key in self.fields}  # in the publisher's order
            reached("parameters.half_read")
            if version and self._board[FIRST_SLOT_VERSION + slot] == version:
                reached("parameters.read")
                return version, arrays
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"parameters {self.name!r} change faster than they can be read")


def as_arrays(state_dict: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """NumPy arrays of tensors on any device, or of arrays.

    Raises:
        InvalidInput: there is no entry, or one is neither, or has a dtype that cannot be stored.
    """
    if not state_dict:
        raise InvalidInput("parameters: expected a mapping with at least one tensor or array, got an empty one")
    arrays: dict[str, NDArray[Any]] = {}
    for key, value in state_dict.items():
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                raise InvalidInput(f"parameters[{key!r}] is bfloat16, which NumPy lacks; publish it as float32")
            value = value.numpy()
        if not isinstance(value, np.ndarray | np.generic):
            raise InvalidInput(f"parameters[{key!r}]: expected a tensor or array, got {type(value).__name__}")
        arrays[key] = np.asarray(value)
    return arrays
