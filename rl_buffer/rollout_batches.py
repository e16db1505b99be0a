"""Epochs of minibatches over a computed rollout, whether it was made in this process or taken from a served table."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer.batches import TensorTree
from rl_buffer.errors import InvalidInput
from rl_buffer.inputs import as_count
from rl_buffer.spec import unflatten

_SCALARS = ("values", "log_probs", "advantages", "returns", "mask")
_STD_EPSILON = 1e-8


def is_handed_out(path: str) -> bool:
    """Whether this leaf of a rollout is part of a batch."""
    return path in _SCALARS or path.startswith(("observations", "actions"))


@dataclass(slots=True)
class RolloutBatch:
    """B steps of a rollout. The tensors are the caller's own.

    observations: (B, *obs_shape), or nested dicts of such.
    actions: (B, *action_shape).
    values, log_probs: (B,) float32, of the policy that acted.
    advantages: (B,) float32, by GAE.
    returns: (B,) float32, advantages + values, before advantages were normalised.
    mask: (B,) bool. Always True here: only steps that happened are handed out.
    """

    observations: TensorTree
    actions: TensorTree
    values: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mask: torch.Tensor


class RolloutRows:
    """The steps of one computed rollout, as rows of its leaves."""

    def __init__(
        self,
        leaves: Mapping[str, torch.Tensor],
        happened: NDArray[np.int64],
        device: torch.device,
        is_unchanged: Callable[[], bool] = lambda: True,
    ) -> None:
        """Take what is to be handed out.

        Args:
            leaves: path -> (N, *shape), on one device.
            happened: rows of steps that happened.
            device: of the batches.
            is_unchanged: False once the leaves hold something else; asked before each minibatch.
        """
        self._leaves = leaves
        self._happened = happened
        self._device = device
        self._is_unchanged = is_unchanged

    def epoch(
        self, batch_size: int | None, generator: np.random.Generator | None, normalize: bool
    ) -> Iterator[RolloutBatch]:
        """Hand out every step that happened once, in a random order if there is a generator.

        Raises:
            InvalidInput: nothing happened or batch_size is out of range, at the call; or the rollout changed, later.
        """
        num_rows = len(self._happened)
        if not num_rows:
            raise InvalidInput("no step of this rollout happened: all are dummies or masked out")
        batch_size = num_rows if batch_size is None else as_count("batch_size", batch_size)
        if batch_size > num_rows:
            raise InvalidInput(f"batch_size is {batch_size}, but the rollout has {num_rows} steps that happened")
        rows = self._happened if generator is None else generator.permutation(self._happened)
        return self._minibatches(torch.from_numpy(rows), batch_size, normalize)

    def _minibatches(self, rows: torch.Tensor, batch_size: int, normalize: bool) -> Iterator[RolloutBatch]:
        rows = rows.to(self._leaves["values"].device)
        for start in range(0, len(rows), batch_size):
            if not self._is_unchanged():
                raise InvalidInput("the rollout has changed since get() was called; finish an epoch before add()")
            chosen = rows[start : start + batch_size]
            leaves = {path: leaf.index_select(0, chosen).to(self._device) for path, leaf in self._leaves.items()}
            if normalize:
                leaves["advantages"] = _normalized(leaves["advantages"])
            yield RolloutBatch(
                observations=unflatten("observations", leaves),
                actions=unflatten("actions", leaves),
                **{name: leaves[name] for name in _SCALARS},
            )


def _normalized(advantages: torch.Tensor) -> torch.Tensor:
    # float64: the rounding of a float32 mean, divided by the std of equal advantages, would be of the order of 1.
    centred = advantages.double() - advantages.double().mean()
    if len(centred) > 1:
        centred /= centred.std() + _STD_EPSILON
    return centred.to(advantages.dtype)
