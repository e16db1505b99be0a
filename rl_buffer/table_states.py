"""The changing part of a table of any kind."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.tables import ReplayTable, RolloutTable

TableState: TypeAlias = ReplayTableState | ConsumedTableState | RolloutTableState


def new_state(config: ReplayTable | RolloutTable, generations: NDArray[np.int64]) -> TableState:
    """Of an empty table; `generations` are int64 [num_rows], even."""
    if isinstance(config, RolloutTable):
        return RolloutTableState(config, generations)
    return (ConsumedTableState if config.max_times_sampled else ReplayTableState)(config, generations)
