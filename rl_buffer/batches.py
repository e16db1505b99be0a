"""What sampling hands out: batches of torch tensors, as views of one block of rows, and what comes back for them."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.samplers import Prioritized, require_masses
from rl_buffer.sequence_history import sequence_td_errors
from rl_buffer.spec import RowLayout, leaves_below, unflatten
from rl_buffer.tables import ReplayTable

TensorTree = Any  # a tensor, or a nested dict of tensors where the space is a Dict

_TORCH_DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NUMPY_FLOATS = (torch.float32, torch.float64)
_SURELY_FINE = 1e300  # sum of the squares of TD errors: none is above 1e150, whose mass is allowed up to alpha 1


class _Field:
    """See the class."""

    # Becomes a tensor when it is first looked at, and stays it: making and dropping one takes 1 us; of a get() of 256
    # transitions twelve of them were a third. No data descriptor: what the batch has in its own dict is found first.

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, batch: Any, owner: type | None = None) -> Any:
        if batch is None:
            return self
        own, name = batch.__dict__, self._name
        leaf = own["_leaves"].get(name)
        # A tensor of the batch's own: of those that it is given more batches are made.
        value = _tensors(own["_leaves"], own["_drawn"], name) if leaf is None else leaf.data
        own[name] = value
        return value


def _tensors(leaves: dict[str, torch.Tensor], drawn: dict[str, Any], name: str) -> Any:
    if name in drawn:
        own = drawn[name]
        return torch.from_numpy(own) if own.__class__ is np.ndarray else own  # as_tensor takes 8 us
    if name == "discounts":
        raise InvalidInput(
            "discounts are gamma^n_steps * (1 - terminated), but this buffer has no gamma; give it gamma="
        )
    if name in ("weights", "indices", "generations"):
        return None
    return unflatten(name, {f"{name}/{path}": leaf.data for path, leaf in leaves_below(name, leaves).items()})


class _Batch:
    """What batches share."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def of(cls, leaves: dict[str, torch.Tensor], drawn: dict[str, Any]) -> Self:
        """A batch over these leaves by path, and what else it has by name, arrays or tensors; it keeps both dicts."""
        batch = cls.__new__(cls)
        own = batch.__dict__
        own["_leaves"], own["_drawn"] = leaves, drawn
        return batch

    def fields(self) -> dict[str, Any]:
        """Every field that there is, by name."""
        leaves = self.__dict__.get("_leaves")
        hidden = {"discounts"} if leaves is not None and "discounts" not in leaves else set()
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in hidden}

    def __repr__(self) -> str:
        """Shapes and types instead of numbers, which nobody reads."""
        return f"{type(self).__name__}({', '.join(f'{k}={_described(v)}' for k, v in self.fields().items())})"


def _described(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {_described(branch)}" for key, branch in tree.items()) + "}"
    return (
        f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}" if isinstance(tree, torch.Tensor) else repr(tree)
    )


@dataclass(repr=False, eq=False)
class ReplayBatch(_Batch):
    """B transitions. The tensors are the caller's: nothing overwrites them as long as one of them is kept.

    observations, next_observations: (B, *obs_shape), or nested dicts of such; the latter lie n_steps later.
    actions: (B, *action_shape).
    rewards: (B,) float32, discounted sums of n_steps rewards.
    dones: (B,) float32, 1 only where terminated, so that `1 - dones` masks the bootstrap. (In `add`, `done` says that
        the episode ended for whatever reason.)
    terminateds, truncateds: (B,) bool.
    discounts: (B,) float32, gamma^n_steps * (1 - terminated); the target is rewards + discounts * V(next_observations).
        Of a buffer without gamma they raise InvalidInput.
    n_steps: (B,) int32, reward steps actually summed.
    extras: name -> (B, *shape).
    weights: (B,) float32, importance weights over the largest of the batch; prioritized tables only, as are
    indices, generations: (B,) int64 on the CPU, the rows and which item they held.
    """

    observations: TensorTree
    actions: TensorTree
    rewards: torch.Tensor
    dones: torch.Tensor
    truncateds: torch.Tensor
    terminateds: torch.Tensor
    next_observations: TensorTree
    discounts: torch.Tensor
    n_steps: torch.Tensor
    extras: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    generations: torch.Tensor | None = None


@dataclass(repr=False, eq=False)
class SequenceBatch(_Batch):
    """B sequences of T = burn_in + sequence_length + n_step steps, for recurrent policies (R2D2).

    Index 0 is always a real step, and `recurrent_states` is the state that the policy carried into it: run the network
    from there over all T observations, and train where `train_mask` holds. The steps before those bring the state up
    to date; at the start of an episode, where the stored state is exact, there are fewer of them or none. Behind the
    end of an episode comes its final observation, then zeros. The target of step t is

        rewards[:, t] + discounts[:, t] * V(observations[:, bootstrap_steps[:, t]])

    observations: (B, T, *obs_shape), or nested dicts of such. actions: (B, T, *action_shape).
    rewards, n_steps, dones, terminateds, truncateds, discounts: (B, T), of the n-step window that begins at the step;
        as in `ReplayBatch`.
    step_rewards: (B, T) float32, the reward of the single step, which recurrent policies are often fed.
    mask: (B, T) bool, where a step happened. train_mask: (B, T) bool, the trained ones.
    recurrent_states: (B, *shape) or a dict of such; {} where the spec has none.
    extras: name -> (B, T, *shape).
    weights, indices, generations: (B,), as in `ReplayBatch`.
    """

    observations: TensorTree
    actions: TensorTree
    rewards: torch.Tensor
    step_rewards: torch.Tensor
    dones: torch.Tensor
    truncateds: torch.Tensor
    terminateds: torch.Tensor
    discounts: torch.Tensor
    n_steps: torch.Tensor
    mask: torch.Tensor
    train_mask: torch.Tensor
    recurrent_states: TensorTree
    extras: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    generations: torch.Tensor | None = None

    @property
    def bootstrap_steps(self) -> torch.Tensor:
        """(B, T) int64: where along T the observation lies whose value the step's target takes."""
        num_steps = self.rewards.shape[1]
        steps = torch.arange(num_steps, device=self.rewards.device) + self.n_steps
        return steps.clamp_(max=num_steps - 1)


for _kind in (ReplayBatch, SequenceBatch):
    for _name in _kind.__dataclass_fields__:  # not in the class: there a dataclass takes a descriptor for a default
        setattr(_kind, _name, _Field(_name))

# ReplayBatch or SequenceBatch, as the table is. Not their union, of which a type checker would ask at every use which.
Batch: TypeAlias = Any


def leaf_views(layout: RowLayout, block: torch.Tensor, hidden: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Views (B, *shape) of every leaf but the hidden in a block (B, stride / 8) of int64 on any device, of one storage.

    Nothing is copied.
    """
    views: dict[str, torch.Tensor] = {}
    typed = {dtype: block.view(_TORCH_DTYPES[dtype]) for dtype in {field.dtype for field in layout.fields.values()}}
    for path, column in layout.columns.items():
        if path not in hidden:
            rows = typed[column.field.dtype]
            itemsize = rows.element_size()
            strides = [layout.stride_nbytes // itemsize]
            strides += [math.prod(column.field.shape[axis + 1 :]) for axis in range(len(column.field.shape))]
            views[path] = rows.as_strided((len(block), *column.field.shape), strides, column.offset // itemsize)
    return views


def drawn_rows(batch: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """`indices` and `generations` of a batch, (B,) each; None where it was not drawn by priority."""
    own = batch.__dict__ if isinstance(batch, _Batch) else {}
    drawn = own.get("_drawn", {})
    if "indices" in drawn and not ("indices" in own or "generations" in own):  # arrays that nobody made tensors of
        return drawn["indices"], drawn["generations"]
    if getattr(batch, "generations", None) is None:
        return None
    return batch.indices.numpy(), batch.generations.numpy()


def as_td_errors(table: ReplayTable, batch: Any, num_rows: int, td_errors: Any) -> NDArray[np.float64]:
    """What `update_priorities` was given for N rows as [N] float64 on the CPU, a copy.

    Args:
        table: its sequences take the mix of largest and mean.
        batch: the SequenceBatch, if there is one, that tells trained steps.
        num_rows: N.
        td_errors: (N,) or (N, 1), signed or not; for a SequenceBatch also (N, T); on any device, may require grad.

    Raises:
        InvalidInput: wrong shape, NaN or infinity, or a mass that would be too large.
    """
    if td_errors.__class__ is torch.Tensor and td_errors.is_cpu and td_errors.dtype in _NUMPY_FLOATS:
        errors = td_errors.detach().numpy().astype(np.float64)  # 2 us less than a conversion by torch
    else:
        # A copy in any case: it may be sent later, and the caller goes on with his.
        errors = torch.as_tensor(td_errors).detach().to("cpu", torch.float64).numpy().copy()
    mixed = isinstance(batch, SequenceBatch) and errors.shape == tuple(batch.train_mask.shape)
    if mixed:
        train_mask = batch.train_mask.cpu().numpy()
        errors = np.where(train_mask, errors, 0.0)
    elif errors.shape not in ((num_rows,), (num_rows, 1)):
        also = f" or {tuple(batch.train_mask.shape)}" if isinstance(batch, SequenceBatch) else ""
        raise InvalidInput(f"td_errors has shape {errors.shape}, expected ({num_rows},) or ({num_rows}, 1){also}")
    # A sum of squares is small unless an error is huge or not finite: a tenth of the time of a look at each.
    are_fine = np.vdot(errors, errors) < _SURELY_FINE
    if not are_fine and not np.isfinite(errors).all():
        bad = tuple(np.argwhere(~np.isfinite(errors))[0].tolist())
        raise InvalidInput(f"td_errors[{', '.join(map(str, bad))}] is {errors[bad]}, expected finite numbers")
    errors = sequence_td_errors(errors, train_mask, table.eta) if mixed else errors.reshape(num_rows)
    if not are_fine or (isinstance(table.sampler, Prioritized) and table.sampler.alpha > 1.0):
        require_masses(table.sampler, errors)
    return errors
