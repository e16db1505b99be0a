"""When everybody has left: all that is finished was handed out, nobody holds anything, and all counts are exact."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import rl_buffer as rb
from scripts.soaking import audit
from scripts.soaking.clients import ROLLOUTS, RolloutReader
from scripts.soaking.scoreboard import Scoreboard

_FORGOTTEN_WITHIN_S = 5.0
_DRAIN_STEP_S = 0.05


def drain_fragments(client: rb.Client, address: str, board: Scoreboard, number: int) -> None:
    """Take what is finished, as the client with this number."""
    reader = RolloutReader(address, str(board.directory), number)
    while client.info()["tables"][ROLLOUTS]["size"]:
        reader.take(reader.reader.take_all(within_s=_DRAIN_STEP_S))
    reader.leave()
    reader.client.close()


def compare_at_rest(
    client: rb.Client, board: Scoreboard, dead: Mapping[int, Any], *, all_epochs: bool
) -> dict[str, Any]:
    """Report what is held by nobody, lost, or counted wrongly; return `client.info()`.

    Args:
        client: the only one that is left.
        board: of all that were.
        dead: numbers of those that did not leave in order.
        all_epochs: the server has everything that its predecessors acknowledged.
    """
    deadline_s = time.monotonic() + _FORGOTTEN_WITHIN_S
    while len((info := client.info())["clients"]) > 1 and time.monotonic() < deadline_s:
        time.sleep(_DRAIN_STEP_S)
    if len(info["clients"]) > 1:
        board.report("leaked", f"still attached: {[session['name'] for session in info['clients']]}")
    bounds = np.zeros(2, np.int64)
    for name, config in client.tables.items():
        table = info["tables"][name]
        if table["reserved_rows"] or table.get("reading"):
            board.report("leaked", f"table {name}: {table['reserved_rows']} rows are reserved by nobody")
        if isinstance(config, rb.ReplayTable):
            if table["size"] != min(table["inserts"], table["capacity"]):
                board.report("lost", f"table {name} has {table['size']} rows of {table['inserts']} inserts")
            if len(audit.committed(client, name)["rewards"]) != table["size"]:
                board.report("torn", f"table {name} has other generations than rows")
        bounds += audit.compare_counts(board, name, config, table["inserts"], all_epochs=all_epochs)
    num_episodes = int(client.stats().get("train/num_episodes", 0))
    if not bounds[0] <= num_episodes <= bounds[1]:
        board.report("lost", f"{num_episodes} episodes are counted, of {bounds} acknowledged and sent")
    audit.compare_fragments(board, board.takes(), dead, all_epochs=all_epochs)
    return info
