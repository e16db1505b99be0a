"""What users hand in, checked and copied: arrays, tensors and scalars for E environments.

Every function either returns with all of `target` written, or raises an InvalidInput that names the argument, what came
and what was expected; `target` then holds nothing of worth. No torch: a tensor is known by its face.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.spec import PATH_SEPARATOR

LARGEST_NUMBER = 1e34  # of rewards and values: the sum of 1024 steps, the most n_step can be, is still a float32

_FLOAT32, _FLOAT64, _BOOL = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.bool_)


def as_count(argument: str, value: Any) -> int:
    """An integer >= 1, NumPy's too."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise InvalidInput(f"{argument} must be an integer >= 1, got {value!r}")
    return count


def as_numpy(value: Any) -> NDArray[Any]:
    """An array of a tensor on any device, a list or a scalar; arrays are passed through."""
    if type(value) is np.ndarray:
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        try:
            value = value.numpy()
        except TypeError:  # bfloat16, which NumPy does not have
            value = value.float().numpy()
    return np.asarray(value)


def copy_array(argument: str, target: NDArray[Any], value: Any) -> None:
    """Copy into `target` [E, *shape]; E = 1 may be left out, (E, 1) serves for (E,), floats must be finite."""
    _copy(argument, target, value)
    require_finite(argument, target)


def require_finite(argument: str, array: NDArray[Any]) -> None:
    """Refuse an array that has NaN or infinity in it; integers have neither."""
    # A sum of squares is finite unless an element is not or is huge; only then look at each one. (A sum of infinities
    # of both signs would warn.)
    if array.dtype.kind == "f" and not math.isfinite(np.vdot(array, array)):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            raise InvalidInput(
                f"{argument} is {array[tuple(bad[0])]} at {tuple(bad[0].tolist())}; expected finite numbers"
            )


def copy_tree(argument: str, leaves: Mapping[str, NDArray[Any]], step: int, tree: Any) -> None:
    """Copy one step of an observation or action into `leaves[path][step]` [E, *shape], as `copy_array` does.

    Args:
        argument: name in messages.
        leaves: path below the argument -> [T, E, *shape]; "" alone for a plain array, "camera/rgb" in dictionaries.
        step: row to write.
        tree: an array, or a (nested) mapping of arrays that has every path; what else it has is ignored.

    Raises:
        InvalidInput: as `copy_array`, or a path is missing.
    """
    for path, leaf in leaves.items():
        if not path:
            copy_array(argument, leaf[step], tree)
            return
        copy_array(f"{argument}[{path!r}]", leaf[step], branch_at(argument, path, tree))


def branch_at(argument: str, path: str, tree: Any) -> Any:
    """What a (nested) mapping has at "camera/rgb", or an InvalidInput."""
    branch = tree
    for key in path.split(PATH_SEPARATOR):
        if not isinstance(branch, Mapping) or key not in branch:
            raise InvalidInput(f"{argument} must be a mapping with {path!r}, got {type(branch).__name__}")
        branch = branch[key]
    return branch


def copy_numbers(argument: str, target: NDArray[np.float64], value: Any, *, nan_is_unknown: bool = False) -> None:
    """Copy rewards or values, (E,) or (E, 1), into `target` [E]; within +-LARGEST_NUMBER, or perhaps NaN."""
    if value.__class__ is float and target.size == 1:
        target[0] = value
        if -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            return
    elif (
        value.__class__ is np.ndarray
        and (value.dtype is _FLOAT32 or value.dtype is _FLOAT64)
        and value.shape == target.shape
    ):
        target[...] = value
    else:
        _copy(argument, target, value)
    try:
        is_small = target.dot(target) <= LARGEST_NUMBER**2  # NaN fails too
    except RuntimeWarning:  # more than 1e154, where warnings are errors
        is_small = False
    if not is_small:
        bad = np.flatnonzero(~(np.abs(target) <= LARGEST_NUMBER) & ~(nan_is_unknown & np.isnan(target)))
        if len(bad):
            raise InvalidInput(
                f"{argument} is {target[bad[0]]} at ({bad[0]},); expected finite numbers within +-{LARGEST_NUMBER:.0e}"
            )


def as_flags(argument: str, value: Any, num_envs: int) -> NDArray[np.bool_]:
    """Bool array [E] of bool or 0/1, (E,) or (E, 1); None is all False. It may be the caller's own: do not keep it."""
    if value is None:
        return np.zeros(num_envs, np.bool_)
    array = as_numpy(value)
    if array.shape != (num_envs,):
        if array.shape not in _same_rows((num_envs,)):
            raise InvalidInput(f"{argument} has shape {array.shape}, expected ({num_envs},)")
        array = array.reshape(num_envs)
    if array.dtype == _BOOL:
        return array
    flags: NDArray[np.bool_] = array != 0
    if not ((array == 1) | ~flags).all():
        raise InvalidInput(f"{argument} must be bool, 0 or 1, got {array}")
    return flags


def none_hold(value: Any, num_envs: int) -> bool:
    """Whether flags as `as_flags` takes them hold nowhere; False also where that takes a closer look."""
    if value is None or (num_envs == 1 and (value is False or value is np.False_)):
        return True
    return (
        value.__class__ is np.ndarray
        and value.dtype is _BOOL
        and value.shape == (num_envs,)
        and not np.count_nonzero(value)
    )


def _copy(argument: str, target: NDArray[Any], value: Any) -> None:
    try:
        array = as_numpy(value)
    except ValueError as error:  # rows of different lengths, for one
        raise InvalidInput(f"{argument} is no array: {error}; expected shape {target.shape}") from error
    if array.shape != target.shape:
        if array.size != target.size or array.shape not in _same_rows(target.shape):
            raise InvalidInput(f"{argument} has shape {array.shape}, expected {target.shape}")
        array = array.reshape(target.shape)
    if array.dtype != target.dtype and not np.can_cast(array.dtype, target.dtype, "same_kind"):
        raise InvalidInput(
            f"{argument} has dtype {array.dtype}, expected {target.dtype}; cast it, or give its Field another dtype"
        )
    if array.dtype.itemsize > target.dtype.itemsize and target.dtype.kind == "f":
        with np.errstate(over="ignore"):  # to infinity, which is looked for
            target[...] = array
        return
    target[...] = array
    # Same kind, but perhaps narrower: integers would wrap without a word.
    if array.dtype.itemsize > target.dtype.itemsize and target.dtype.kind in "iu" and (target != array).any():
        raise InvalidInput(
            f"{argument} has values from {array.min()} to {array.max()}, which {target.dtype} cannot hold; "
            "give its Field a wider dtype"
        )


def _same_rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes that mean the same: (E, 1) for (E,), and without E for one environment."""
    if len(shape) == 1:
        return ((*shape, 1), ()) if shape[0] == 1 else ((*shape, 1),)
    return (shape[1:],) if shape and shape[0] == 1 else ()
