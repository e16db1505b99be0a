"""Files of named arrays: safetensors with a JSON description in its header. No pickle.

A file is written beside its name, synchronised, and then renamed: a kill at any moment leaves the one before.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput

_KEY = "rl_buffer"
_FORMAT = 1


def write_file(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], description: Mapping[str, Any]
) -> None:
    """Write arrays (contiguous ones without a copy) and a description that JSON can hold; replaces `path`.

    Raises:
        OSError: it cannot be written; a file that was there stays.
    """
    from safetensors import SafetensorError  # half of an import of this package, for those who never save
    from safetensors.numpy import save_file

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    header = {_KEY: json.dumps({"format": _FORMAT, **description})}
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished, header)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the renaming
    finally:
        os.close(directory)


class FileReader:
    """One file that `write_file` wrote; arrays are read when they are asked for. Use it in a `with` block.

    Attributes:
        description: as it was given.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it.

        Raises:
            FileNotFoundError: there is none.
            InvalidInput: it is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        self._path = os.fspath(path)
        untyped_open: Any = safe_open
        try:
            self._file = untyped_open(os.fspath(path), framework="numpy")
            self.description: dict[str, Any] = json.loads((self._file.metadata() or {})[_KEY])
            found = self.description.pop("format")
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{os.fspath(path)} is not a file that a buffer saved: {error!r}") from error
        if found != _FORMAT:
            raise InvalidInput(f"{os.fspath(path)} has format {found}, this version reads {_FORMAT}")

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def shape(self, name: str) -> list[int]:
        """The shape of the array called `name`; nothing is read.

        Raises:
            InvalidInput: the file has no such array.
        """
        self._require(name)
        shape: list[int] = self._file.get_slice(name).get_shape()
        return shape

    def require(self, identity: Mapping[str, Any]) -> None:
        """Raise InvalidInput unless the description has these values: what a buffer and its file have in common."""
        for name, own in identity.items():
            if (saved := self.description.get(name)) != own:
                raise InvalidInput(f"{self._path} was saved with {name} {saved}, this buffer has {own}")

    def array(self, name: str, start: int | None = None, stop: int | None = None) -> NDArray[Any]:
        """The array called `name`, or its part [start:stop].

        Raises:
            InvalidInput: the file has no such array.
        """
        self._require(name)
        part: NDArray[Any] = (
            self._file.get_slice(name)[start:stop] if start is not None else self._file.get_tensor(name)
        )
        return part

    def arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """All arrays whose names begin with `prefix`, without it."""
        return {n.removeprefix(prefix): self.array(n) for n in self._file.keys() if n.startswith(prefix)}  # noqa: SIM118

    def _require(self, name: str) -> None:
        # It is no mapping, in spite of its keys().
        if name not in self._file.keys():  # noqa: SIM118
            raise InvalidInput(f"the file has no array {name!r}; it has {sorted(self._file.keys())}")
