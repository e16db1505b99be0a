"""Transitions that come all at once, checked leaf by leaf before any of them is stored."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.inputs import as_numpy
from rl_buffer.spec import PATH_SEPARATOR, Field
from rl_buffer.tables import ReplayTable

# Of a batch, but not of what it holds; and trees that may be empty.
_IGNORED = {"weights", "indices", "generations", "extras", "recurrent_states"}


def checked_leaves(table: ReplayTable, batch: Any) -> tuple[int, dict[str, NDArray[Any]]]:
    """Every leaf of N items for a table, by path and [N, *shape], and N; nothing is copied that has the right dtype.

    Args:
        table: transitions get what is missing where it follows from the rest; sequences must be complete.
        batch: a batch, or a mapping of its fields.

    Raises:
        InvalidInput: a field is missing, or has another shape, dtype or length, or is not finite.
    """
    if not isinstance(batch, Mapping) and not hasattr(batch, "fields"):
        raise InvalidInput(f"extend needs a batch or a mapping with observations, actions, ..., got {type(batch)}")
    given = {k: v for k, v in (batch if isinstance(batch, Mapping) else batch.fields()).items() if v is not None}
    known = {path.split(PATH_SEPARATOR)[0] for path in table.layout.columns} | _IGNORED
    if unknown := sorted(set(given) - known):
        raise InvalidInput(f"extend does not know {', '.join(unknown)}; it takes {', '.join(sorted(known - _IGNORED))}")
    leaves: dict[str, NDArray[Any]] = {}
    num_items: int | None = None
    fields = table.layout.fields
    for path, field in fields.items():
        value = _find(given, path)
        if value is not None:
            leaves[path] = _checked(path, value, field, num_items)
            num_items = len(leaves[path])
    if num_items is None:
        raise InvalidInput(f"extend needs observations, actions, ...; it was given {', '.join(sorted(given))}")
    if table.sequence_length is None:
        _complete(table, leaves, num_items)
    missing = sorted(set(fields) - set(leaves))
    if missing:
        steps = "; single steps go into an n-step table by add()" if "n_steps" in missing else ""
        raise InvalidInput(f"extend needs {', '.join(missing)}; it was given {', '.join(sorted(given))}{steps}")
    return num_items, leaves


def _find(tree: Any, path: str) -> Any:
    for key in path.split(PATH_SEPARATOR):
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _complete(table: ReplayTable, leaves: dict[str, NDArray[Any]], num_items: int) -> None:
    """Add what follows from the rest."""
    if "terminateds" in leaves:
        terminateds = leaves["terminateds"]
        if "dones" in leaves and not np.array_equal(leaves["dones"] != 0, terminateds):
            raise InvalidInput(
                "dones and terminateds differ; in a batch both say where the bootstrap stops, so give one"
            )
        leaves["dones"] = terminateds.astype(np.float32)
    elif "dones" in leaves:
        leaves["terminateds"] = _cast("dones", leaves["dones"], np.dtype(np.bool_))
        both = leaves["terminateds"] & leaves.get("truncateds", np.False_)
        if both.any():
            raise InvalidInput(
                f"dones and truncateds are both set at {int(both.argmax())}: dones of a batch stop the bootstrap, so "
                "it is not clear what is meant; give terminateds instead of dones"
            )
    leaves.setdefault("truncateds", np.zeros(num_items, np.bool_))
    if table.n_step == 1:
        leaves.setdefault("n_steps", np.ones(num_items, np.int32))
    if "terminateds" in leaves and "n_steps" in leaves:
        discounts = np.where(leaves["terminateds"], 0.0, table.gamma ** leaves["n_steps"].astype(np.float64))
        leaves.setdefault("discounts", discounts.astype(np.float32))


def _checked(path: str, value: Any, field: Field, num_items: int | None) -> NDArray[Any]:
    array = as_numpy(value)
    if num_items is None and array.ndim:
        num_items = len(array)
    if num_items is None or array.shape not in ((num_items, *field.shape), (num_items, *(field.shape or (1,)))):
        raise InvalidInput(f"{path} has shape {array.shape}, expected {(num_items or 'N', *field.shape)}")
    return _cast(path, array.reshape(num_items, *field.shape), np.dtype(field.dtype))


def _cast(path: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if array.dtype != dtype:
        if dtype == np.bool_:
            if not (is_flag := np.isin(array, (0, 1))).all():
                raise InvalidInput(f"{path} must hold bools, 0 or 1, got {array[~is_flag].flat[0]}")
        elif not np.can_cast(array.dtype, dtype, "same_kind"):
            raise InvalidInput(
                f"{path} has dtype {array.dtype}, expected {dtype}; cast it, or give its Field another dtype"
            )
        given = array
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            array = array.astype(dtype)
        if dtype.kind in "iu" and not np.array_equal(given, array):
            raise InvalidInput(f"{path} has values from {given.min()} to {given.max()}, which {dtype} cannot hold")
    if dtype.kind == "f" and not np.isfinite(array).all():
        bad = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise InvalidInput(f"{path} is {array[bad]} at {bad}; expected finite numbers")
    return array
