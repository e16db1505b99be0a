"""What one item is made of, and where each part lies in its row of memory.

`Field` and `TransitionSpec` are what users write; `RowLayout` is the arrangement that every process computes
from them, and that the server's hash pins down. Pure NumPy: no torch, no memory, no processes.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from rl_buffer.errors import InvalidInput

ROW_ALIGNMENT_NBYTES = 64  # one cache line: a row never shares one with the row of another writer
PATH_SEPARATOR = "/"
_KINDS_STORED = "biuf"  # bool, signed, unsigned, float: what both NumPy and torch have
# Of any other string NumPy evaluates parts, and raises SyntaxError and worse; a client may have sent it.
_PLAIN_DTYPE_NAME = re.compile(r"[<>=|]?\w+|\?", re.ASCII)

ArrayTree: TypeAlias = Any  # an array, or a mapping from names to ArrayTrees


class Field(msgspec.Struct, frozen=True, array_like=True):
    """One array of an item: its shape without batch or environment dimension, and its dtype.

    Raises:
        InvalidInput: a dimension is not a positive integer, or the dtype is not a plain number.
    """

    shape: tuple[int, ...]
    dtype: Any = "float32"  # a NumPy or torch dtype or its name; kept as NumPy's name

    def __post_init__(self) -> None:
        given: Any = self.shape
        shape = tuple(given) if isinstance(given, Iterable) else (given,)
        if any(not isinstance(n, int | np.integer) or n < 1 for n in shape):
            raise InvalidInput(f"Field shape must hold integers >= 1, got {self.shape!r}")
        msgspec.structs.force_setattr(self, "shape", tuple(int(n) for n in shape))
        msgspec.structs.force_setattr(self, "dtype", dtype_name(self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of one item's array."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


FieldTree: TypeAlias = Any  # a Field, or a mapping from names to FieldTrees (dictionary observations)


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a NumPy or torch dtype, e.g. "float32".

    Raises:
        InvalidInput: not a bool, integer or float type.
    """
    name: Any = dtype if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    try:
        known = np.dtype(name if isinstance(name, type) or _PLAIN_DTYPE_NAME.fullmatch(name) else object)
    except TypeError:
        known = np.dtype(object)
    if known.kind not in _KINDS_STORED or known.itemsize > 8:
        raise InvalidInput(f"dtype {dtype!r} cannot be stored; expected a bool, integer or float of up to 64 bit")
    return known.name


def flatten(name: str, tree: FieldTree) -> Iterator[tuple[str, Field]]:
    """Yield (path, Field) of each leaf, paths as in "observations/camera", in the mapping's order."""
    if isinstance(tree, Field):
        yield name, tree
    elif isinstance(tree, Mapping) and tree:
        for key, branch in tree.items():
            if not isinstance(key, str) or not key or PATH_SEPARATOR in key:
                raise InvalidInput(f"{name}: key {key!r} must be a string without {PATH_SEPARATOR!r}")
            yield from flatten(f"{name}{PATH_SEPARATOR}{key}", branch)
    elif isinstance(tree, list | tuple):  # how msgspec decodes a Field whose type it does not know
        yield name, Field(*tree)
    else:
        raise InvalidInput(f"{name}: expected a Field or a non-empty mapping of Fields, got {tree!r}")


def unflatten(name: str, leaves: Mapping[str, Any]) -> ArrayTree:
    """Invert `flatten`: the leaf called `name`, or the nested dict of all leaves below it."""
    if name in leaves:
        return leaves[name]
    tree: dict[str, Any] = {}
    prefix = name + PATH_SEPARATOR
    for path, leaf in leaves.items():
        if path.startswith(prefix):
            *branches, key = path.removeprefix(prefix).split(PATH_SEPARATOR)
            node = tree
            for branch in branches:
                node = node.setdefault(branch, {})
            node[key] = leaf
    return tree


def leaves_below(name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of the tree called `name` by their paths below it: "" if it is one leaf, else as in "camera/rgb"."""
    return {
        path[len(name) + 1 :]: leaf
        for path, leaf in leaves.items()
        if path == name or path.startswith(name + PATH_SEPARATOR)
    }


# What an n-step transition, or the window that begins at a step of a sequence, came to.
_OUTCOME = {name: Field((), "float32") for name in ("rewards", "dones", "discounts")}
_OUTCOME |= {"n_steps": Field((), "int32"), "terminateds": Field((), "bool"), "truncateds": Field((), "bool")}
ROLLOUT_NUMBERS = ("rewards", "values", "log_probs", "final_values")
ROLLOUT_FLAGS = ("terminateds", "truncateds", "mask")
ROLLOUT_RESULTS = ("advantages", "returns")
_OF_SEQUENCES = {"step_rewards": Field((), "float32"), "mask": Field((), "bool"), "train_mask": Field((), "bool")}


class TransitionSpec(msgspec.Struct, frozen=True):
    """What one transition holds: observation, action, and any extras that travel with them.

    `obs` and `action` are Fields or (nested) mappings of Fields; `extras` maps names to Fields. `recurrent_state`, a
    Field or a mapping of Fields, is what the policy carried into a step, for tables of sequences only. Rewards, flags,
    discounts and n_steps are added by the table. Shapes are of one environment, without batch dimension.
    """

    obs: Any
    action: Any
    extras: dict[str, Field] = {}
    recurrent_state: Any = None

    def __post_init__(self) -> None:
        for name in ("obs", "action", "recurrent_state"):
            if name != "recurrent_state" or self.recurrent_state is not None:
                leaves = dict(flatten(name, getattr(self, name)))
                msgspec.structs.force_setattr(self, name, unflatten(name, leaves))
        for key, extra in self.extras.items():
            if PATH_SEPARATOR in key or not isinstance(extra, Field):
                raise InvalidInput(f"extras[{key!r}]: expected a plain name and a Field, got {extra!r}")

    @classmethod
    def from_spaces(
        cls,
        observation_space: Any,
        action_space: Any,
        *,
        obs_dtype: DTypeLike | None = None,
        action_dtype: DTypeLike | None = None,
        extras: Mapping[str, Field] | None = None,
        recurrent_state: FieldTree = None,
    ) -> "TransitionSpec":
        """Take shapes and dtypes from Gymnasium spaces of ONE environment (`envs.single_observation_space`).

        Box, Discrete, MultiDiscrete, MultiBinary and (nested) Dict spaces are known.

        Args:
            observation_space: of one environment.
            action_space: of one environment.
            obs_dtype: stored instead of the space's own, e.g. "float32" for MuJoCo's float64.
            action_dtype: likewise.
            extras: further Fields of each transition.
            recurrent_state: Field or mapping of Fields of the policy's state, for tables of sequences.

        Raises:
            InvalidInput: a space has no fixed shape (Tuple, Text, Sequence, Graph).
        """
        obs = _field_tree("observation_space", observation_space, obs_dtype)
        action = _field_tree("action_space", action_space, action_dtype)
        return cls(obs=obs, action=action, extras=dict(extras or {}), recurrent_state=recurrent_state)

    def transition_fields(self) -> dict[str, Field]:
        """Every leaf of a stored transition by its path, in the words of the replay batches."""
        return self._inputs() | dict(flatten("next_observations", self.obs)) | _OUTCOME

    def sequence_fields(self, num_steps: int) -> dict[str, Field]:
        """Every leaf of a stored sequence of `num_steps` (T): [T, *shape], but one recurrent state."""
        fields = self._inputs() | _OUTCOME | _OF_SEQUENCES
        fields = {path: Field((num_steps, *field.shape), field.dtype) for path, field in fields.items()}
        return fields | self.recurrent_fields()

    def rollout_fields(self, num_steps: int, num_envs: int) -> dict[str, Field]:
        """Every leaf of a rollout by its path, each [num_steps, num_envs, *shape]: one row of a RowLayout.

        Raises:
            InvalidInput: the spec has extras or a recurrent state, which rollouts do not keep.
        """
        if self.extras or self.recurrent_state is not None:
            raise InvalidInput("a rollout keeps neither extras nor a recurrent_state; use a spec without them")
        fields = self._inputs() | dict.fromkeys((*ROLLOUT_NUMBERS, *ROLLOUT_RESULTS), Field((), "float32"))
        fields |= dict.fromkeys(ROLLOUT_FLAGS, Field((), "bool"))
        return {path: Field((num_steps, num_envs, *field.shape), field.dtype) for path, field in fields.items()}

    def recurrent_fields(self) -> dict[str, Field]:
        """The leaves of the recurrent state by path; empty where there is none."""
        return {} if self.recurrent_state is None else dict(flatten("recurrent_states", self.recurrent_state))

    def _inputs(self) -> dict[str, Field]:
        extras = {f"extras{PATH_SEPARATOR}{key}": extra for key, extra in self.extras.items()}
        return dict(flatten("observations", self.obs)) | dict(flatten("actions", self.action)) | extras


def _field_tree(name: str, space: Any, dtype: DTypeLike | None) -> FieldTree:
    if isinstance(getattr(space, "spaces", None), Mapping):
        return {key: _field_tree(f"{name}[{key!r}]", branch, dtype) for key, branch in space.spaces.items()}
    shape, space_dtype = getattr(space, "shape", None), getattr(space, "dtype", None)
    if shape is None or space_dtype is None:
        raise InvalidInput(
            f"{name}: {space!r} has no fixed shape and dtype; use Box, Discrete, MultiDiscrete, MultiBinary or Dict"
        )
    return Field(tuple(shape), space_dtype if dtype is None else dtype)


@dataclass(frozen=True, slots=True)
class Column:
    """Where one leaf lies in a row."""

    field: Field
    offset: int  # bytes from the start of the row, a multiple of the item size


class RowLayout:
    """Fields at aligned offsets in rows of one stride; the same in every process that knows the fields.

        | 8-byte leaves | 4-byte | 2-byte | 1-byte | padding to 64 |

    One row block means that a sample is one gather and one host-to-device copy.
    """

    def __init__(self, fields: Mapping[str, Field]) -> None:
        if not fields:
            raise InvalidInput("a row needs at least one Field, got none")
        self.columns: dict[str, Column] = {}
        offset = 0
        # Descending item sizes (all powers of two) align every leaf without holes.
        for path, field in sorted(fields.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
            self.columns[path] = Column(field, offset)
            offset += field.nbytes
        self.stride_nbytes = -(-offset // ROW_ALIGNMENT_NBYTES) * ROW_ALIGNMENT_NBYTES

    @property
    def fields(self) -> dict[str, Field]:
        """The leaves by path, in row order."""
        return {path: column.field for path, column in self.columns.items()}

    @property
    def digest(self) -> str:
        """Equal in two processes exactly when they would put the same bytes in the same places."""
        columns = [(path, c.offset, c.field) for path, c in self.columns.items()]
        return hashlib.blake2b(msgspec.json.encode((columns, self.stride_nbytes)), digest_size=16).hexdigest()

    def view(self, buffer: Any, num_rows: int) -> dict[str, NDArray[Any]]:
        """NumPy views [num_rows, *shape] of every leaf in a buffer of rows; nothing is copied."""
        views = {}
        for path, column in self.columns.items():
            dtype = np.dtype(column.field.dtype)
            inner = np.empty(column.field.shape, dtype).strides
            shape = (num_rows, *column.field.shape)
            views[path] = np.ndarray(shape, dtype, buffer, column.offset, (self.stride_nbytes, *inner))
        return views
