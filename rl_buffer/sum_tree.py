"""A sum tree: masses on leaves, their total, their maximum, and the leaf at which a running sum is reached.

The state belongs to one thread at a time: the kernels release the GIL and take no lock. It knows nothing of
priorities or randomness: a caller turns draws into prefix sums. Importing this module compiles the kernels or
loads them from Numba's cache.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer import huge_pages
from rl_buffer.cache_lines import count_sums_up_to, count_up_to, prefetch
from rl_buffer.errors import InvalidInput
from rl_buffer.kernels import FLOATS, FLOATS_2D, FLOATS_IN, INT, INTS, INTS_IN, compiled

# Eight float64 are one cache line; with sixteen, 256 draws from 1 M leaves cost 8 us more. Microseconds with eight:
#
#   leaves                        64 k   1 M   16 M    one of two EPYC cores (Milan), 512 KiB L2
#   t.find(p[i % 512])             6.2    12     16    (without prefetch and vectors 6.9, 15 and 22)
#   t.set(r[i % 512], m)            10    26     49
#   t.set(s[i % 512], m[:64])      1.9   2.1    2.4
#
# python -m timeit -s "import numpy as np; from rl_buffer.sum_tree import SumTree; n = 10**6; i = 0" \
#   -s "g = np.random.default_rng(0); t = SumTree(n, g.random(n)); p = g.random((512, 256)) * t.total" \
#   -s "r = g.integers(n, size=(512, 256)); s = np.arange(64) + g.integers(n - 64, size=(512, 1))" \
#   -s "m = g.random(256)" "i += 1; t.find(p[i % 512])"
_BITS = 3
_FAN_OUT = 1 << _BITS

# Rows of the array of inner nodes. BELOW is the mass of a child's siblings before it, and inf where only children
# without mass remain: so that bisecting it ends, whatever rounding did to the prefix, at a child that has mass.
_SUM, _MAX, _BELOW = 0, 1, 2

# Numba tests every index for being negative, unless the compiler sees that it cannot be: a seventh of a find.
_NOT_NEGATIVE = (1 << 63) - 1


@compiled()
def _sum_leaves(leaves: Any, nodes: Any, node: int) -> None:
    mass, largest = 0.0, 0.0
    for leaf in range(node << _BITS, min((node + 1) << _BITS, leaves.size)):
        mass += leaves[leaf]
        largest = max(largest, leaves[leaf])
    nodes[_SUM, node] = mass
    nodes[_MAX, node] = largest


@compiled()
def _sum_children(nodes: Any, first: int, parent: int) -> None:
    mass, largest = 0.0, 0.0
    for child in range(first, first + _FAN_OUT):
        nodes[_BELOW, child] = mass
        mass += nodes[_SUM, child]
        largest = max(largest, nodes[_MAX, child])
    child = first + _FAN_OUT - 1
    while child > first and nodes[_SUM, child] == 0.0:
        nodes[_BELOW, child] = np.inf
        child -= 1
    nodes[_SUM, parent] = mass
    nodes[_MAX, parent] = largest


@compiled()
def _replace_by_parents(nodes: Any, num_nodes: int, num_parents: int) -> int:
    """Turn the first `num_nodes` node numbers into their parents' and return how many these are."""
    if num_parents <= num_nodes:
        # Scattered leaves meet near the root: all of a level is then less than one node for each leaf.
        for parent in range(num_parents):
            nodes[parent] = parent
        return num_parents
    num_runs = 0
    for i in range(num_nodes):
        parent = nodes[i] >> _BITS
        # Rows that follow each other are the common insert: a run of them shares its parent.
        if num_runs == 0 or nodes[num_runs - 1] != parent:
            nodes[num_runs] = parent
            num_runs += 1
    return num_runs


@compiled(FLOATS, FLOATS_2D, INTS, INTS_IN, FLOATS_IN)
def set_leaves(leaves: Any, nodes: Any, levels: Any, indices: Any, masses: Any) -> int:
    """Write masses, recompute the sums above them, and return the change in the number of live leaves."""
    for leaf in indices:
        if leaf < 0 or leaf >= leaves.size:
            raise IndexError
    change = 0
    for i in range(indices.size):
        change += (masses[i] > 0.0) - (leaves[indices[i]] > 0.0)
        leaves[indices[i]] = masses[i]
    num_nodes = (leaves.size + _FAN_OUT - 1) >> _BITS
    touched = indices.copy()
    num_touched = _replace_by_parents(touched, indices.size, num_nodes)
    for i in range(num_touched):
        _sum_leaves(leaves, nodes, touched[i])
    for level in range(1, levels.size - 1):
        num_nodes = (num_nodes + _FAN_OUT - 1) >> _BITS
        num_touched = _replace_by_parents(touched, num_touched, num_nodes)
        for i in range(num_touched):
            _sum_children(nodes, levels[level - 1] + (touched[i] << _BITS), levels[level] + touched[i])
    return change


@compiled(FLOATS, FLOATS_2D, INTS, FLOATS, INTS, FLOATS)
def _find(leaves: Any, nodes: Any, levels: Any, rest: Any, found: Any, masses: Any) -> None:
    """Write the leaves and masses of the prefixes `rest`, which it uses up.

    Into arrays of the caller: one that is returned costs 0.6 us more.
    """
    found[:] = 0
    below = nodes[_BELOW]
    # The whole batch goes down level by level, and each member asks for its line of the next level ahead: so that their
    # cache misses overlap.
    for level in range(levels.size - 3, -1, -1):
        start = levels[level]
        next_start = levels[level - 1] if level else 0
        for i in range(rest.size):
            first = found[i] << _BITS
            child = first + max(count_up_to(below, start + first, rest[i]), 1) - 1
            rest[i] -= below[(start + child) & _NOT_NEGATIVE]
            found[i] = child
            if level:
                prefetch(below, next_start + (child << _BITS))
            else:
                prefetch(leaves, child << _BITS)
    num_whole = leaves.size >> _BITS
    for i in range(rest.size):
        first = (found[i] << _BITS) & _NOT_NEGATIVE
        if found[i] < num_whole:
            leaf = first + min(count_sums_up_to(leaves, first, rest[i]), _FAN_OUT - 1)
        else:
            leaf, running = first, leaves[first]
            while running <= rest[i] and leaf + 1 < leaves.size:
                leaf += 1
                running += leaves[leaf]
        # Sums that were added up in another order, or a prefix at the very end, may end where no mass is.
        while leaves[leaf] == 0.0:
            leaf -= 1
        found[i] = leaf
        masses[i] = leaves[leaf]


@compiled(FLOATS, FLOATS_2D, INTS, FLOATS, INT, INTS, FLOATS)
def draw_leaves(leaves: Any, nodes: Any, levels: Any, uniforms: Any, num_parts: int, found: Any, masses: Any) -> None:
    """See `SumTree.draw`, for kernels that go on from there; the first three are `SumTree.arrays`."""
    total = nodes[_SUM, levels[levels.size - 2]]
    for i in range(num_parts):
        uniforms[i] = (uniforms[i] + i) / num_parts
    for i in range(uniforms.size):
        uniforms[i] *= total
    _find(leaves, nodes, levels, uniforms, found, masses)


class SumTree:
    """Masses over `num_leaves` leaves; masses are finite and >= 0, which the caller has checked.

    Invariant: every inner node holds the sum and the largest of its children, recomputed from them and never
    patched, so that nothing drifts: the tree is always the one that would be built from its leaves.
    """

    def __init__(self, num_leaves: int, leaves: NDArray[np.float64] | None = None) -> None:
        """Build the tree in O(num_leaves).

        Args:
            num_leaves: at least 1.
            leaves: [num_leaves] float64, contiguous. The tree works in this array and does not copy it, so that
                it can be mapped memory; nobody else may write it. None starts with zeros.

        Raises:
            InvalidInput: `num_leaves` < 1, or `leaves` is of another shape, dtype or layout.
        """
        if num_leaves < 1:
            raise InvalidInput(f"num_leaves is {num_leaves}; a tree needs at least 1")
        if leaves is None:
            leaves = huge_pages.zeros(num_leaves, np.float64)
        if leaves.shape != (num_leaves,) or leaves.dtype != np.float64 or not leaves.flags.carray:
            came = f"{leaves.dtype}{list(leaves.shape)}"
            raise InvalidInput(f"leaves is {came}; expected a contiguous, writable float64[{num_leaves}]")
        self.num_leaves = num_leaves
        self.leaves = leaves
        self.num_live = int(np.count_nonzero(leaves))
        # Where the levels above the leaves start, lowest first, each padded to whole nodes; then the end.
        levels, num_nodes = [0], num_leaves
        while num_nodes > 1 or len(levels) == 1:
            num_nodes = -(-num_nodes // _FAN_OUT)
            levels.append(levels[-1] + -(-num_nodes // _FAN_OUT) * _FAN_OUT)
        self._levels = np.array(levels)
        # From a cache line on, so that no node takes two: 13 us become 10 for a find from 1 M leaves.
        self._nodes = huge_pages.zeros(3 * levels[-1], np.float64).reshape(3, -1)
        self._root = levels[-2]
        self.arrays = (leaves, self._nodes, self._levels)  # what kernels take
        if self.num_live:
            self.set(np.arange(num_leaves), leaves)

    @property
    def total(self) -> float:
        """The mass of all leaves."""
        return float(self._nodes[_SUM, self._root])

    @property
    def max(self) -> float:
        """The largest mass of any leaf now; 0.0 when all are zero."""
        return float(self._nodes[_MAX, self._root])

    def set(self, leaves: NDArray[np.int64], masses: NDArray[np.float64]) -> None:
        """Give leaves new masses; of a leaf named twice the last one counts. O(N log num_leaves).

        Args:
            leaves: [N] int64, contiguous.
            masses: [N] float64, contiguous, finite and >= 0. 0.0 takes a leaf out of every draw.

        Raises:
            InvalidInput: a leaf is out of range, or the lengths differ. Nothing has changed.
        """
        if leaves.shape != masses.shape:
            raise InvalidInput(f"{leaves.size} leaves but {masses.size} masses; expected one for each")
        try:
            self.num_live += set_leaves(*self.arrays, leaves, masses)
        except IndexError:
            raise self._out_of_range(leaves) from None

    def get(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """The masses of `leaves` ([N] int64) as [N] float64.

        Raises:
            InvalidInput: a leaf is out of range.
        """
        # As unsigned numbers negative leaves are too large as well: one comparison for both ends.
        if leaves.size and leaves.view(np.uint64).max() >= self.num_leaves:
            raise self._out_of_range(leaves)
        return self.leaves[leaves]

    def find(self, prefix: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The leaves whose share of the running sum holds each prefix. O(N log num_leaves).

        Leaf i holds prefix p where sum(masses[:i]) <= p < sum(masses[:i + 1]). A leaf of mass 0 holds nothing
        and is never returned; p >= total, which rounding can produce, is the last leaf that has mass.

        Args:
            prefix: [N] float64, contiguous, 0 <= prefix < total.

        Returns:
            Leaves [N] int64 and their masses [N] float64.

        Raises:
            InvalidInput: no leaf has mass.
        """
        if self.num_live == 0:
            raise InvalidInput("no leaf has mass, so there is nothing to find")
        found, masses = np.empty(len(prefix), np.int64), np.empty(len(prefix))
        _find(self.leaves, self._nodes, self._levels, prefix.copy(), found, masses)
        return found, masses

    def draw(self, uniforms: NDArray[np.float64], num_parts: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Leaves drawn in proportion to their masses: `find` at uniform random shares of the total.

        Args:
            uniforms: [N] float64, contiguous, in [0, 1); used up.
            num_parts: the first this many draws fall into one of as many equal parts of the total each.

        Returns:
            Leaves [N] int64 and their masses [N] float64.

        Raises:
            InvalidInput: no leaf has mass.
        """
        if self.num_live == 0:
            raise InvalidInput("no leaf has mass, so there is nothing to draw")
        found, masses = np.empty(len(uniforms), np.int64), np.empty(len(uniforms))
        draw_leaves(*self.arrays, uniforms, num_parts, found, masses)
        return found, masses

    def _out_of_range(self, leaves: NDArray[np.int64]) -> InvalidInput:
        position = int(np.flatnonzero((leaves < 0) | (leaves >= self.num_leaves))[0])
        return InvalidInput(f"leaf {leaves[position]} at position {position}; expected 0 <= leaf < {self.num_leaves}")
