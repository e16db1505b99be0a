import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.row_set import RowSet


def ints(*values):
    return np.array(values, np.int64)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=12)), max_size=20))
def test_it_holds_what_a_set_holds_and_every_row_once(steps):
    rows, model = RowSet(10), set()
    for inserts, batch in steps:
        if inserts:
            rows.insert(ints(*batch))
            model |= set(batch)
        else:
            rows.remove(ints(*batch))
            model -= set(batch)
        assert len(rows) == len(model)
        assert sorted(rows.members.tolist()) == sorted(model)


@pytest.mark.parametrize("row", [-1, 10, 2**62])
def test_a_row_out_of_range_is_refused_and_changes_nothing(row):
    rows = RowSet(10)
    rows.insert(ints(3))
    for change in (rows.insert, rows.remove):
        with pytest.raises(InvalidInput, match=rf"row {row} at position 1; expected 0 <= row < 10"):
            change(ints(3, row))
        assert rows.members.tolist() == [3]
