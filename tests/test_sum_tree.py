import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.sum_tree import SumTree

# One node, just below, at and above a full node of 8 and of 64, and five levels.
SIZES = [1, 7, 8, 9, 63, 64, 65, 4097]

# Whole numbers add without rounding, so that the tree must agree with a running sum exactly.
whole_masses = st.integers(0, 5).map(float)


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float64)


def rebuilt(tree):
    return SumTree(tree.num_leaves, tree.leaves.copy())


@st.composite
def leaves_and_updates(draw):
    num_leaves = draw(st.sampled_from(SIZES))
    update = st.tuples(st.integers(0, num_leaves - 1), whole_masses)
    return num_leaves, draw(st.lists(st.lists(update, max_size=40), max_size=6))


@given(leaves_and_updates())
def test_total_max_and_live_count_are_those_of_a_plain_list_after_every_update(case):
    num_leaves, batches = case
    tree, model = SumTree(num_leaves), [0.0] * num_leaves
    for batch in batches:
        tree.set(ints(*(leaf for leaf, _ in batch)), floats(*(mass for _, mass in batch)))
        for leaf, mass in batch:  # in order, so that the last of a duplicate wins
            model[leaf] = mass
        assert tree.get(np.arange(num_leaves)).tolist() == model
        assert tree.total == sum(model)
        assert tree.max == max(model)
        assert tree.num_live == sum(mass > 0 for mass in model)


@given(leaves_and_updates(), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_find_agrees_with_a_search_in_the_running_sum(case, fractions):
    num_leaves, batches = case
    tree = SumTree(num_leaves)
    for batch in batches:
        tree.set(ints(*(leaf for leaf, _ in batch)), floats(*(mass for _, mass in batch)))
    if tree.total == 0.0:
        with pytest.raises(InvalidInput, match="no leaf has mass"):
            tree.find(floats(0.0))
        return
    running = np.cumsum(tree.leaves)
    # At the edges between leaves as well as inside them.
    prefix = np.concatenate((np.array(fractions) * tree.total, running[running < tree.total][:50]))
    leaves, masses = tree.find(prefix)
    assert leaves.tolist() == np.searchsorted(running, prefix, side="right").tolist()
    assert masses.tolist() == tree.leaves[leaves].tolist()


@pytest.mark.parametrize("num_leaves", SIZES)
def test_masses_that_round_move_an_edge_by_no_more_than_rounding(num_leaves):
    rng = np.random.default_rng(num_leaves)
    tree = SumTree(num_leaves, 10.0 ** rng.uniform(-12, 6, num_leaves) * (rng.random(num_leaves) < 0.7) + 1e-9)
    running = np.concatenate(([0.0], np.cumsum(tree.leaves)))
    prefix = np.concatenate((rng.random(2_000) * tree.total, running[:-1], np.nextafter(running[1:], 0.0)))
    leaves, masses = tree.find(prefix)
    slack = 1e-13 * tree.total
    assert (running[leaves] <= prefix + slack).all()
    assert (prefix < running[leaves + 1] + slack).all()
    assert masses.tolist() == tree.leaves[leaves].tolist()


@pytest.mark.parametrize("num_leaves", SIZES)
def test_find_reaches_every_leaf(num_leaves):
    tree = SumTree(num_leaves, np.ones(num_leaves))
    leaves, _ = tree.find(np.arange(num_leaves) + 0.5)
    assert leaves.tolist() == list(range(num_leaves))


@given(
    st.sampled_from([1, 8, 9, 65, 600]).flatmap(
        lambda size: st.lists(st.one_of(st.just(0.0), st.floats(1e-200, 1e200)), min_size=size, max_size=size).filter(
            any
        )
    ),
    st.lists(st.floats(0, 1), min_size=1),
)
def test_a_leaf_without_mass_is_never_found_whatever_rounding_does(masses, fractions):
    tree = SumTree(len(masses), floats(*masses))
    edges = np.cumsum(tree.leaves)
    just_below = np.nextafter(edges, 0.0)
    prefix = np.concatenate((floats(*fractions) * tree.total, edges, just_below, floats(tree.total)))
    leaves, found_masses = tree.find(prefix)
    assert (found_masses > 0).all()
    assert found_masses.tolist() == tree.leaves[leaves].tolist()


def test_a_prefix_at_the_total_is_the_last_leaf_with_mass():
    tree = SumTree(600)
    tree.set(ints(3, 70), floats(0.1, 0.2))
    assert tree.find(floats(tree.total, 2 * tree.total))[0].tolist() == [70, 70]


def test_the_last_write_of_a_duplicate_wins():
    tree = SumTree(100)
    tree.set(ints(50, 3, 50, 50), floats(9.0, 1.0, 8.0, 2.0))
    assert tree.get(ints(50, 3)).tolist() == [2.0, 1.0]
    assert (tree.total, tree.max, tree.num_live) == (3.0, 2.0, 2)


def test_the_max_forgets_an_outlier_that_is_gone():
    tree = SumTree(1000)
    tree.set(np.arange(1000), np.ones(1000))
    tree.set(ints(500), floats(1e9))
    assert tree.max == 1e9
    tree.set(ints(500), floats(0.0))
    assert (tree.max, tree.total) == (1.0, 999.0)


def test_nothing_drifts_in_a_million_updates():
    rng = np.random.default_rng(0)
    tree = SumTree(4097)
    for _ in range(2_000):
        # Over 12 orders of magnitude: sums patched by differences lose the small masses here.
        tree.set(rng.integers(4097, size=500), 10.0 ** rng.uniform(-6, 6, 500))
    tree.set(np.arange(4000), np.zeros(4000))
    assert (tree.total, tree.max) == (rebuilt(tree).total, tree.leaves.max())
    assert tree.total == pytest.approx(math.fsum(tree.leaves), rel=1e-14)


def test_sums_patched_by_differences_would_drift():
    rng = np.random.default_rng(0)
    masses, total = np.zeros(4097), 0.0
    for _ in range(10_000):
        leaf, mass = rng.integers(4097), 10.0 ** rng.uniform(-6, 6)
        total += mass - masses[leaf]
        masses[leaf] = mass
    total -= masses[:4000].sum()
    assert total != pytest.approx(math.fsum(masses[4000:]), rel=1e-14)


@pytest.mark.parametrize("size", [1, 64, 5000])
@pytest.mark.parametrize("num_leaves", SIZES)
def test_updates_of_any_size_leave_the_tree_as_if_built_anew(num_leaves, size):
    rng = np.random.default_rng(size)
    tree = SumTree(num_leaves, rng.random(num_leaves))
    for leaves in (rng.integers(num_leaves, size=size), np.arange(size) % num_leaves):
        tree.set(leaves, rng.random(size))
    again = rebuilt(tree)
    assert (tree.total, tree.max, tree.num_live) == (again.total, again.max, again.num_live)
    prefix = rng.random(500) * tree.total
    assert tree.find(prefix)[0].tolist() == again.find(prefix)[0].tolist()


@pytest.mark.parametrize("leaf", [-1, 9, 2**62, -(2**63)])
def test_a_leaf_out_of_range_is_refused_and_changes_nothing(leaf):
    tree = SumTree(9, np.arange(9.0))
    with pytest.raises(InvalidInput, match=rf"leaf {leaf} at position 1; expected 0 <= leaf < 9"):
        tree.set(ints(0, leaf), floats(5.0, 5.0))
    with pytest.raises(InvalidInput, match=rf"leaf {leaf} at position 1"):
        tree.get(ints(0, leaf))
    assert (tree.leaves.tolist(), tree.total) == (list(range(9)), 36.0)


def test_a_mass_too_few_is_refused_and_changes_nothing():
    tree = SumTree(9)
    with pytest.raises(InvalidInput, match="2 leaves but 1 masses"):
        tree.set(ints(0, 1), floats(5.0))
    assert tree.total == 0.0


def test_the_caller_keeps_the_leaf_array():
    leaves = np.arange(10.0)
    tree = SumTree(10, leaves)
    assert (tree.total, tree.max, tree.num_live) == (45.0, 9.0, 9)
    tree.set(ints(0), floats(5.0))
    assert leaves[0] == 5.0


@pytest.mark.parametrize("leaves", [np.zeros(9), np.zeros(10, np.float32), np.zeros(20)[::2], np.frombuffer(bytes(80))])
def test_a_leaf_array_that_does_not_fit_is_refused(leaves):
    with pytest.raises(InvalidInput, match=r"expected a contiguous, writable float64\[10\]"):
        SumTree(10, leaves)


def test_a_tree_without_leaves_is_refused():
    with pytest.raises(InvalidInput, match="num_leaves is 0"):
        SumTree(0)


def test_arguments_may_be_read_only_views_of_a_message():
    tree = SumTree(10)
    tree.set(np.frombuffer(ints(3, 4).tobytes(), np.int64), np.frombuffer(floats(1.0, 2.0).tobytes()))
    assert tree.find(np.frombuffer(floats(0.5, 1.5).tobytes()))[0].tolist() == [3, 4]


def test_empty_calls_change_nothing():
    tree = SumTree(10, np.ones(10))
    tree.set(ints(), floats())
    assert tree.total == 10.0
    assert tree.get(ints()).size == tree.find(floats())[0].size == 0
