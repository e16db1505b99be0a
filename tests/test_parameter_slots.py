import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_buffer.errors import InvalidInput
from rl_buffer.parameter_slots import (
    BOARD_LENGTH,
    FIRST_SLOT_VERSION,
    NEWEST_SLOT,
    NEWEST_VERSION,
    NUM_SLOTS,
    ParameterSlots,
)

NUM_WORDS = 3  # of a parameter set: its publisher writes them one after the other


class SteppedBoard(np.ndarray):
    """Lets others move after every single write, as another processor would."""

    between = staticmethod(lambda: None)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        SteppedBoard.between()


class World:
    """A board, the slots' memory, and every step of publishers and readers as a call of its own."""

    def __init__(self):
        self.board = np.zeros(BOARD_LENGTH, np.int64).view(SteppedBoard)
        self.memory = np.zeros((NUM_SLOTS, NUM_WORDS), np.int64)
        self.slots = ParameterSlots(self.board)

    def publishing(self, publisher, stop_after=None):
        """The steps of one publication, cut off after `stop_after` words if its process dies there."""
        slot = self.slots.reserve(publisher)
        yield
        version = self.slots.version + 1
        for word in range(NUM_WORDS):
            if word == stop_after:
                self.slots.release(publisher)
                return
            self.memory[slot, word] = version
            yield
        assert self.slots.publish(publisher, slot) == version

    def reading(self, accepted):
        """The steps of `ParameterSet.read`: read slot, read version, copy word by word, check."""
        while True:
            at_least = int(self.board[NEWEST_VERSION])
            slot = int(self.board[NEWEST_SLOT])
            yield
            version = int(self.board[FIRST_SLOT_VERSION + slot])
            yield
            copy = []
            for word in range(NUM_WORDS):
                copy.append(int(self.memory[slot, word]))
                yield
            if version and self.board[FIRST_SLOT_VERSION + slot] == version:
                accepted.append((at_least, version, copy))


@pytest.fixture
def between_writes():
    """Call something after every single write to a board."""

    def call(function):
        SteppedBoard.between = staticmethod(function)

    yield call
    SteppedBoard.between = staticmethod(lambda: None)


@pytest.mark.parametrize("pace", [0.2, 0.35, 0.5, 0.8])
def test_no_reader_accepts_a_torn_copy_however_the_steps_interleave(between_writes, pace):
    """At the slowest pace a copy takes several publications, at the fastest the other way round."""
    world, accepted, rng = World(), [], np.random.default_rng(0)
    readers = [world.reading(accepted) for _ in range(3)]
    num_torn = 0

    def move_readers():
        while rng.random() < pace:
            next(readers[rng.integers(3)])

    between_writes(move_readers)
    for _ in range(2000):
        dies_at = int(rng.integers(NUM_WORDS)) if rng.random() < 0.2 else None
        for _ in world.publishing("publisher", dies_at):
            move_readers()
    for at_least, version, copy in accepted:
        num_torn += copy != [version] * NUM_WORDS
        assert version >= at_least, "a reader went back in time"
    assert num_torn == 0
    assert len(accepted) > 10


def test_whoever_sees_the_newest_slot_sees_its_version(between_writes):
    """Otherwise a reader that was told of a new version, and may not wait, would find a slot without one."""
    world, looks = World(), []

    def look():
        newest, slot = int(world.board[NEWEST_VERSION]), int(world.board[NEWEST_SLOT])
        looks.append((newest, int(world.board[FIRST_SLOT_VERSION + slot])))

    between_writes(look)
    for _ in range(3 * NUM_SLOTS):
        for _ in world.publishing("publisher"):
            pass
    assert [look for look in looks if look[0] > look[1]] == []
    assert looks[-1] == (3 * NUM_SLOTS, 3 * NUM_SLOTS)


def test_a_reader_that_is_lapped_sees_it():
    world, accepted = World(), []
    for _ in world.publishing("p"):
        pass
    reader = world.reading(accepted)
    for _ in range(3):  # slot, version, one word
        next(reader)
    for _ in range(NUM_SLOTS):
        for _ in world.publishing("p"):
            pass
    for _ in range(3):
        next(reader)
    assert accepted == []


def test_a_reader_keeps_its_slot_while_fewer_than_all_others_are_published():
    world, accepted = World(), []
    for _ in world.publishing("p"):
        pass
    reader = world.reading(accepted)
    for _ in range(3):
        next(reader)
    for _ in range(NUM_SLOTS - 1):
        for _ in world.publishing("p"):
            pass
    for _ in range(3):
        next(reader)
    assert accepted == [(1, 1, [1, 1, 1])]


def test_a_frozen_slot_is_not_written_before_it_is_copied():
    slots = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    slots.publish("learner", slots.reserve("learner"))
    frozen = slots.freeze()
    for version in range(2, 10):
        slot = slots.reserve("learner")
        assert slot != frozen
        assert slots.publish("learner", slot) == version
    slots.copied(1)
    assert slots.reserve("learner") == frozen


def test_a_version_that_was_saved_is_the_newest_and_the_next_one_follows():
    board = np.zeros(BOARD_LENGTH, np.int64)
    slots = ParameterSlots(board)
    slots.restore(7)
    assert (slots.version, board[NEWEST_SLOT], board[FIRST_SLOT_VERSION]) == (7, 0, 7)
    slot = slots.reserve("learner")
    assert slot != 0
    assert slots.publish("learner", slot) == 8
    for version in (0, -1, 2**63):
        with pytest.raises(InvalidInput, match=f"version {version} of parameters"):
            slots.restore(version)


def test_one_publisher_at_a_time():
    slots = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    slot = slots.reserve("a")
    assert slots.reserve("a") == slot
    with pytest.raises(InvalidInput, match="one publisher at a time"):
        slots.reserve("b")
    assert slots.publish("a", slot) == 1
    assert slots.reserve("b") != slot


@pytest.mark.parametrize(("publisher", "shift"), [("b", 0), ("a", 1), ("a", -1)])
def test_publishing_what_is_not_held_changes_nothing(publisher, shift):
    board = np.zeros(BOARD_LENGTH, np.int64)
    slots = ParameterSlots(board)
    slots.publish("a", slots.reserve("a"))
    slot = slots.reserve("a")
    before = board.copy()
    with pytest.raises(InvalidInput, match=f"slot {slot + shift} of this parameter set is not reserved"):
        slots.publish(publisher, slot + shift)
    assert (board == before).all()
    assert slots.publish("a", slot) == 2
    with pytest.raises(InvalidInput, match="not reserved"):
        slots.publish("a", slot)


def test_a_dead_publishers_slot_stays_invalid_and_the_next_publisher_goes_on():
    board = np.zeros(BOARD_LENGTH, np.int64)
    slots = ParameterSlots(board)
    slots.publish("a", slots.reserve("a"))
    slot = slots.reserve("a")
    slots.release("b")  # somebody else's death
    assert slots.reserve("a") == slot
    slots.release("a")
    assert board[FIRST_SLOT_VERSION + slot] == 0
    assert slots.version == 1
    assert slots.publish("b", slots.reserve("b")) == 2


class SlotsMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.board = np.zeros(BOARD_LENGTH, np.int64)
        self.slots = ParameterSlots(self.board)
        self.holder, self.slot, self.version = None, None, 0

    @rule(publisher=st.sampled_from("abc"))
    def reserve(self, publisher):
        if self.holder in (None, publisher):
            slot = self.slots.reserve(publisher)
            assert self.holder is None or slot == self.slot
            assert self.version == 0 or slot != self.board[NEWEST_SLOT], "the newest would be overwritten"
            self.holder, self.slot = publisher, slot
        else:
            with pytest.raises(InvalidInput):
                self.slots.reserve(publisher)

    @precondition(lambda self: self.holder is not None)
    @rule()
    def publish_what_is_held(self):
        self.version += 1
        assert self.slots.publish(self.holder, self.slot) == self.version
        self.holder = None

    @rule(publisher=st.sampled_from("abc"), slot=st.integers(-1, NUM_SLOTS))
    def publish(self, publisher, slot):
        if self.holder == publisher and slot == self.slot:
            self.version += 1
            assert self.slots.publish(publisher, slot) == self.version
            self.holder = None
        else:
            with pytest.raises(InvalidInput):
                self.slots.publish(publisher, slot)

    @rule(publisher=st.sampled_from("abc"))
    def die(self, publisher):
        self.slots.release(publisher)
        self.holder = None if self.holder == publisher else self.holder

    @invariant()
    def the_newest_is_whole(self):
        assert self.slots.version == self.version == self.board[NEWEST_VERSION]
        if self.version:
            assert self.board[FIRST_SLOT_VERSION + self.board[NEWEST_SLOT]] == self.version
        if self.holder is not None:
            assert self.board[FIRST_SLOT_VERSION + self.slot] == 0


SlotsMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True)
TestSlots = SlotsMachine.TestCase
