"""Which rows of a batch were overwritten between their draw and their copy, and which draws take their places.

The owner of the rows raises a generation before it lets a writer at the row. A copy is good if the generation is still
that of the draw after it. It is looked at in a call of its own: x86-64 keeps loads in order, a compiler need not.
"""

from typing import Any

import numpy as np

from rl_buffer.importance import weigh
from rl_buffer.kernels import FLOAT, FLOATS32, FLOATS_IN, INT, INTS, INTS_IN, compiled

NOTHING_LEFT = -1


@compiled()
def _is_intact(generations: Any, rows: Any, drawn: Any, i: int) -> bool:
    # As unsigned numbers negative rows are too large as well.
    return bool(np.uint64(rows[i]) < np.uint64(generations.size) and generations[rows[i]] == drawn[i])


@compiled(INTS_IN, INTS_IN, INTS_IN, INTS, INTS, INT)
def substitute(generations: Any, rows: Any, drawn: Any, kept: Any, places: Any, candidate: int) -> tuple[int, int]:
    """Find other draws for those places of a batch whose row was overtaken.

    Spares come first. Where they run out, draws of the batch serve twice: both follow the same distribution.

    Args:
        generations: of all rows.
        rows: [B + spares], the draws of the batch and the spares.
        drawn: [B + spares], the generations that they had.
        kept: [B], which draw is at each place; changed.
        places: [N], those to look at; begins with those that were changed afterwards.
        candidate: the draw to try first, at first B.

    Returns:
        How many places were changed, and the next candidate. The new rows are intact so far: copy them, and look again.
        NOTHING_LEFT if every single draw was overtaken.
    """
    num_changed, candidate = 0, candidate % rows.size
    for i in range(places.size):
        place = places[i]
        if _is_intact(generations, rows, drawn, kept[place]):
            continue
        num_tried = 0
        while not _is_intact(generations, rows, drawn, candidate):
            candidate = (candidate + 1) % rows.size
            num_tried += 1
            if num_tried == rows.size:
                return NOTHING_LEFT, candidate
        kept[place] = candidate
        candidate = (candidate + 1) % rows.size
        places[num_changed] = place
        num_changed += 1
    return num_changed, candidate


@compiled(INTS_IN, INTS_IN, INTS_IN, INTS, INTS)
def keep_intact(generations: Any, rows: Any, drawn: Any, kept: Any, places: Any) -> tuple[int, int]:
    """Take the first B draws for a batch, and others for those whose row was overtaken; see `substitute`.

    Args:
        generations: of all rows.
        rows: [B + spares], the draws of the batch and the spares.
        drawn: [B + spares], the generations that they had.
        kept: [B], becomes which draw is at each place.
        places: [B], begins with those of other draws afterwards.
    """
    num_lacking = 0
    for place in range(kept.size):
        kept[place] = place
        if not _is_intact(generations, rows, drawn, place):
            places[num_lacking] = place
            num_lacking += 1
    if num_lacking == 0:
        return 0, kept.size
    return substitute(generations, rows, drawn, kept, places[:num_lacking], kept.size)


@compiled(INTS_IN, INTS_IN, FLOATS_IN, INTS, FLOAT, INTS, INTS, FLOATS32)
def describe_kept(
    rows: Any, drawn: Any, masses: Any, kept: Any, beta: float, kept_rows: Any, kept_generations: Any, weights: Any
) -> None:
    """Write rows, generations and importance weights, [B] each, of those draws ([B + spares]) that are `kept`."""
    kept_masses = np.empty(kept.size)
    for place in range(kept.size):
        draw = kept[place]
        kept_rows[place] = rows[draw]
        kept_generations[place] = drawn[draw]
        kept_masses[place] = masses[draw]
    weigh(kept_masses, beta, weights)
