"""What the constructors of the in-process buffers are given, as a TransitionSpec: shapes with dtypes, or spaces.

Pure: a torch dtype is known by its name, a Gymnasium space by its face.
"""

from collections.abc import Mapping
from typing import Any

from rl_buffer.errors import InvalidInput
from rl_buffer.spec import Field, FieldTree, TransitionSpec, dtype_name

_DEFAULT_DTYPE = "float32"  # with shapes; a space has its own


def spec_from_arguments(
    obs_shape: Any,
    action_shape: Any,
    observation_space: Any,
    action_space: Any,
    obs_dtype: Any = None,
    action_dtype: Any = None,
    extras: Mapping[str, Field] | None = None,
) -> TransitionSpec:
    """Describe one transition of ONE environment by shapes or by spaces.

    Args:
        obs_shape: without environment dimension: an int n for (n,), a tuple, () for a scalar, or for dictionary
            observations a (nested) mapping of names to such. None where spaces are given.
        action_shape: likewise.
        observation_space: a Gymnasium space of one environment (`envs.single_observation_space`), or None.
        action_space: likewise.
        obs_dtype: a NumPy or torch dtype or its name; with a mapping of shapes also a mapping of the same keys. None
            is float32 with shapes, and the space's own with spaces.
        action_dtype: likewise.
        extras: further Fields of each transition.

    Raises:
        InvalidInput: neither or both of shapes and spaces, or a shape, space or dtype that cannot be stored.
    """
    shapes = {"obs_shape": obs_shape, "action_shape": action_shape}
    spaces = {"observation_space": observation_space, "action_space": action_space}
    given = {name for name, value in (shapes | spaces).items() if value is not None}
    if given == set(shapes):
        return TransitionSpec(
            obs=_fields("obs_shape", obs_shape, "obs_dtype", obs_dtype),
            action=_fields("action_shape", action_shape, "action_dtype", action_dtype),
            extras=dict(extras or {}),
        )
    if given == set(spaces):
        for name, dtype in (("obs_dtype", obs_dtype), ("action_dtype", action_dtype)):
            if dtype is not None:
                _dtype(name, dtype)
        return TransitionSpec.from_spaces(
            observation_space, action_space, obs_dtype=obs_dtype, action_dtype=action_dtype, extras=extras
        )
    raise InvalidInput(
        f"expected either {' and '.join(shapes)} or {' and '.join(spaces)}, got {' and '.join(sorted(given)) or 'none'}"
    )


def _fields(argument: str, shape: Any, dtype_argument: str, dtype: Any) -> FieldTree:
    if isinstance(shape, Mapping):
        if not shape:
            raise InvalidInput(f"{argument} is an empty mapping; expected a shape for each name")
        dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shape, dtype)
        if dtypes.keys() != shape.keys():
            raise InvalidInput(f"{dtype_argument} has the keys {list(dtypes)}, {argument} has {list(shape)}")
        return {
            key: _fields(f"{argument}[{key!r}]", branch, f"{dtype_argument}[{key!r}]", dtypes[key])
            for key, branch in shape.items()
        }
    stored_dtype = _dtype(dtype_argument, _DEFAULT_DTYPE if dtype is None else dtype)
    try:
        return Field(shape, stored_dtype)
    except InvalidInput:
        raise InvalidInput(
            f"{argument} is {shape!r}; expected an int, a tuple of ints >= 1, or a mapping of names to such"
        ) from None


def _dtype(argument: str, dtype: Any) -> str:
    try:
        return dtype_name(dtype)
    except InvalidInput as error:
        raise InvalidInput(f"{argument}: {error}") from None
