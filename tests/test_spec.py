import contextlib
import math

import gymnasium
import msgspec
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.spec import Field, RowLayout, TransitionSpec, dtype_name, flatten, unflatten

DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "int64",
    "uint64",
    "float64",
]

fields = st.builds(Field, st.lists(st.integers(1, 5), max_size=3).map(tuple), st.sampled_from(DTYPES))
names = st.text(st.characters(blacklist_characters="/", blacklist_categories=["Cs"]), min_size=1, max_size=4)
field_dicts = st.dictionaries(names, fields, min_size=1, max_size=8)
trees = st.recursive(fields, lambda children: st.dictionaries(names, children, min_size=1, max_size=3), max_leaves=6)
specs = st.builds(TransitionSpec, obs=trees, action=trees, extras=st.dictionaries(names, fields, max_size=2))


# ---- rows --------------------------------------------------------------------------------------------------


@given(field_dicts)
@settings(derandomize=True)
def test_every_leaf_is_aligned_inside_the_row_and_overlaps_no_other(given_fields):
    layout = RowLayout(given_fields)
    assert layout.fields == given_fields
    assert layout.stride_nbytes % 64 == 0
    taken = np.zeros(layout.stride_nbytes, int)
    for column in layout.columns.values():
        assert column.offset % np.dtype(column.field.dtype).itemsize == 0
        assert column.offset + column.field.nbytes <= layout.stride_nbytes
        taken[column.offset : column.offset + column.field.nbytes] += 1
    assert taken.max() == 1
    assert layout.stride_nbytes - taken.sum() < 64, "a row is never a cache line longer than it must be"


@given(field_dicts, st.integers(1, 4), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None)
def test_what_is_written_through_a_view_is_read_back_and_touches_nothing_else(given_fields, num_rows, random):
    layout = RowLayout(given_fields)
    buffer = bytearray(b"\xa5" * (num_rows * layout.stride_nbytes))
    views = layout.view(buffer, num_rows)
    expected = {}
    for path, view in views.items():
        field = given_fields[path]
        assert (view.shape, view.dtype) == ((num_rows, *field.shape), np.dtype(field.dtype))
        assert view.flags.aligned or not num_rows
        values = np.frombuffer(random.randbytes(num_rows * field.nbytes), np.uint8)
        values = values % 2 if field.dtype == "bool" else values
        expected[path] = values.view(field.dtype).reshape(view.shape)
        view[...] = expected[path]
    for path, view in views.items():
        assert view.tobytes() == expected[path].tobytes()
    rows = np.frombuffer(buffer, np.uint8).reshape(num_rows, layout.stride_nbytes)
    used = sum(field.nbytes for field in given_fields.values())
    assert (rows[:, used:] == 0xA5).all(), "padding was written"
    for path, column in layout.columns.items():
        for row in range(num_rows):
            leaf = rows[row, column.offset : column.offset + column.field.nbytes]
            assert leaf.tobytes() == expected[path][row].tobytes()


def test_a_row_without_fields_is_refused():
    with pytest.raises(InvalidInput, match="at least one Field"):
        RowLayout({})


@given(field_dicts, field_dicts)
@settings(derandomize=True)
def test_digests_are_equal_exactly_when_the_rows_are(some, other):
    mine, theirs = RowLayout(some), RowLayout(other)
    same = list(mine.columns.items()) == list(theirs.columns.items())
    assert (mine.digest == theirs.digest) == same
    assert mine.digest == RowLayout(dict(some)).digest


BASE = {"a": Field((2,), "float32"), "b": Field((2,), "float32")}


@pytest.mark.parametrize(
    "other",
    [
        {"a": Field((2,), "float32"), "c": Field((2,), "float32")},
        {"b": Field((2,), "float32"), "a": Field((2,), "float32")},
        {"a": Field((2,), "int32"), "b": Field((2,), "float32")},
        {"a": Field((2, 1), "float32"), "b": Field((2,), "float32")},
        {"a": Field((1,), "float32"), "b": Field((3,), "float32")},
        {"a": Field((2,), "float32")},
    ],
    ids=["name", "order", "dtype", "shape of the same size", "offset", "number"],
)
def test_the_digest_differs_when_anything_differs(other):
    assert RowLayout(BASE).digest != RowLayout(other).digest


# ---- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("f4", "float32"),
        (">f4", "float32"),
        (np.float64, "float64"),
        (np.dtype("int16"), "int16"),
        (float, "float64"),
        (bool, "bool"),
        ("?", "bool"),
        (torch.float32, "float32"),
        (torch.uint8, "uint8"),
        (torch.bool, "bool"),
        (torch.float16, "float16"),
    ],
    ids=str,
)
def test_a_dtype_is_known_by_numpys_name(dtype, name):
    assert dtype_name(dtype) == name


@pytest.mark.parametrize(
    "dtype",
    [
        object,
        "complex64",
        "datetime64[s]",
        "U3",
        "S1",
        str,
        None,
        3,
        torch.bfloat16,
        np.dtype("i4,f4"),
        "no such",
        "2f4",
    ],
    ids=str,
)
def test_a_dtype_that_cannot_be_stored_is_refused(dtype):
    with pytest.raises(InvalidInput, match="cannot be stored; expected a bool, integer or float of up to 64 bit"):
        Field((1,), dtype)


@given(st.one_of(st.text(max_size=12), st.text("f4,()[]{}'<>=|i8:12 \n", max_size=12)))
@settings(derandomize=True, max_examples=100)
def test_any_string_is_a_dtype_or_refused(text):
    with contextlib.suppress(InvalidInput):
        assert dtype_name(text) in DTYPES


@pytest.mark.parametrize("dtype", ["f4,(", "(1,)f4,(", "(" * 1000, "f4\0", "\ud800", "(99999999999999999999,)f4"])
def test_a_string_that_numpy_would_evaluate_is_refused(dtype):
    with pytest.raises(InvalidInput, match="cannot be stored"):
        dtype_name(dtype)


@pytest.mark.parametrize(("given_shape", "shape"), [(3, (3,)), ([2, 3], (2, 3)), ((), ()), (np.int64(4), (4,))])
def test_a_shape_becomes_a_tuple_of_ints(given_shape, shape):
    field = Field(given_shape)
    assert field.shape == shape
    assert all(type(n) is int for n in field.shape)
    assert field.nbytes == 4 * math.prod(shape)


@pytest.mark.parametrize("shape", [0, (2, 0), (-1,), (1.5,), "ab", 2.0, None, ((1,),)])
def test_a_shape_that_is_not_of_positive_integers_is_refused(shape):
    with pytest.raises(InvalidInput, match="Field shape must hold integers >= 1, got"):
        Field(shape)


# ---- specs -------------------------------------------------------------------------------------------------


@given(trees)
@settings(derandomize=True)
def test_unflatten_undoes_flatten(tree):
    leaves = dict(flatten("obs", tree))
    assert unflatten("obs", leaves) == tree
    assert all(isinstance(leaf, Field) for leaf in leaves.values())


@given(specs)
@settings(derandomize=True, deadline=None)
def test_a_spec_of_nested_dicts_survives_msgpack_and_json_with_its_layout(spec):
    for codec in (msgspec.msgpack, msgspec.json):
        copy = codec.decode(codec.encode(spec), type=TransitionSpec)
        assert copy == spec
        assert RowLayout(copy.transition_fields()).digest == RowLayout(spec.transition_fields()).digest
        assert list(copy.transition_fields()) == list(spec.transition_fields())


def test_a_transition_has_the_leaves_of_the_replay_batches():
    spec = TransitionSpec(
        obs={"camera": {"rgb": Field((2, 2), "uint8")}, "speed": Field(())},
        action=Field((), "int64"),
        extras={"log_prob": Field(())},
    )
    leaves = {path: (field.shape, field.dtype) for path, field in spec.transition_fields().items()}
    assert leaves == {
        "observations/camera/rgb": ((2, 2), "uint8"),
        "observations/speed": ((), "float32"),
        "next_observations/camera/rgb": ((2, 2), "uint8"),
        "next_observations/speed": ((), "float32"),
        "actions": ((), "int64"),
        "extras/log_prob": ((), "float32"),
        "rewards": ((), "float32"),
        "dones": ((), "float32"),
        "discounts": ((), "float32"),
        "n_steps": ((), "int32"),
        "terminateds": ((), "bool"),
        "truncateds": ((), "bool"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"obs": {}}, "obs: expected a Field or a non-empty mapping of Fields, got {}"),
        ({"obs": {"a": {}}}, "obs/a: expected a Field"),
        ({"obs": "float32"}, "obs: expected a Field"),
        ({"action": None}, "action: expected a Field"),
        ({"obs": {"a/b": Field(1)}}, "obs: key 'a/b' must be a string without '/'"),
        ({"obs": {"": Field(1)}}, "obs: key '' must be"),
        ({"obs": {3: Field(1)}}, "obs: key 3 must be"),
        ({"extras": {"a/b": Field(1)}}, r"extras\['a/b'\]: expected a plain name"),
        ({"extras": {"a": {"b": Field(1)}}}, r"extras\['a'\]: expected a plain name and a Field"),
    ],
)
def test_a_spec_that_is_no_tree_of_fields_is_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        TransitionSpec(**{"obs": Field(1), "action": Field(1)} | arguments)


SPACES = {
    "Box": (spaces.Box(0, 255, (4, 84, 84), np.uint8), Field((4, 84, 84), "uint8")),
    "Box of float64": (spaces.Box(-np.inf, np.inf, (3,), np.float64), Field((3,), "float64")),
    "scalar Box": (spaces.Box(0.0, 1.0, ()), Field((), "float32")),
    "Discrete": (spaces.Discrete(6, start=-2), Field((), "int64")),
    "MultiDiscrete": (spaces.MultiDiscrete([[2, 3], [4, 5]]), Field((2, 2), "int64")),
    "MultiBinary": (spaces.MultiBinary((2, 5)), Field((2, 5), "int8")),
    "Dict": (
        spaces.Dict({"b": spaces.Dict({"c": spaces.Discrete(2)}), "a": spaces.Box(0, 1, (2,))}),
        {"b": {"c": Field((), "int64")}, "a": Field((2,), "float32")},
    ),
}


@pytest.mark.parametrize(("space", "tree"), SPACES.values(), ids=SPACES)
def test_spaces_become_fields(space, tree):
    spec = TransitionSpec.from_spaces(space, space)
    assert spec == TransitionSpec(obs=tree, action=tree)
    sample = np.asarray(space.sample()) if not isinstance(space, spaces.Dict) else None
    if sample is not None:
        assert (sample.shape, sample.dtype.name) == (spec.obs.shape, spec.obs.dtype)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Box(0, 1, (2,)), None),
        None,
    ],
    ids=lambda space: type(space).__name__,
)
def test_a_space_without_a_fixed_shape_is_refused_by_name(space):
    with pytest.raises(InvalidInput, match=r"action_space: .* has no fixed shape and dtype; use Box, Discrete"):
        TransitionSpec.from_spaces(spaces.Discrete(2), space)


def test_a_bad_space_deep_in_a_dict_is_named_by_its_keys():
    space = spaces.Dict({"a": spaces.Dict({"b": spaces.Text(3)})})
    with pytest.raises(InvalidInput, match=r"observation_space\['a'\]\['b'\]: Text"):
        TransitionSpec.from_spaces(space, spaces.Discrete(2))


def test_dtypes_can_be_chosen_and_extras_added():
    spec = TransitionSpec.from_spaces(
        spaces.Box(0, 1, (3,), np.float64),
        spaces.Discrete(2),
        obs_dtype="float32",
        action_dtype=np.int32,
        extras={"x": Field(2)},
    )
    assert spec == TransitionSpec(obs=Field(3), action=Field((), "int32"), extras={"x": Field(2)})


def test_the_spaces_of_a_vector_environments_members_fit():
    envs = gymnasium.make_vec("CartPole-v1", num_envs=2)
    spec = TransitionSpec.from_spaces(envs.single_observation_space, envs.single_action_space)
    envs.close()
    assert spec == TransitionSpec(obs=Field((4,), "float32"), action=Field((), "int64"))
