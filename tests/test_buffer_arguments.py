"""The constructor arguments of the in-process buffers, as a TransitionSpec."""

import re

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rl_buffer.buffer_arguments import spec_from_arguments
from rl_buffer.errors import InvalidInput
from rl_buffer.spec import Field, TransitionSpec

BOX = spaces.Box(-1.0, 1.0, (3,), np.float64)


def from_shapes(obs_shape, action_shape=(1,), **options):
    return spec_from_arguments(obs_shape, action_shape, None, None, **options)


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        (4, Field((4,))),
        (np.int64(4), Field((4,))),
        ((), Field(())),
        ((2, 3), Field((2, 3))),
        ([2, 3], Field((2, 3))),
        (torch.Size([2, 3]), Field((2, 3))),
        ({"a": 2, "b": {"c": ()}}, {"a": Field((2,)), "b": {"c": Field(())}}),
    ],
    ids=str,
)
def test_a_shape_is_an_int_a_tuple_or_a_mapping_of_such_and_float32_unless_told(shape, field):
    assert from_shapes(shape) == TransitionSpec(obs=field, action=Field((1,), "float32"))
    assert spec_from_arguments((1,), shape, None, None) == TransitionSpec(obs=Field((1,)), action=field)


@pytest.mark.parametrize("dtype", ["uint8", np.uint8, np.dtype("uint8"), torch.uint8], ids=repr)
def test_a_dtype_may_be_numpys_torchs_or_a_name(dtype):
    spec = from_shapes((2,), obs_dtype=dtype, action_dtype=torch.int64)
    assert spec == TransitionSpec(obs=Field((2,), "uint8"), action=Field((1,), "int64"))


def test_one_dtype_serves_every_name_and_a_mapping_gives_each_its_own():
    shapes = {"image": (2, 2), "state": {"position": 3, "contact": ()}}
    spec = from_shapes(shapes, obs_dtype="float64")
    assert spec.obs["image"] == Field((2, 2), "float64")
    assert spec.obs["state"]["contact"] == Field((), "float64")
    dtypes = {"image": "uint8", "state": {"position": None, "contact": bool}}
    spec = from_shapes(shapes, obs_dtype=dtypes)
    position = Field((3,), "float32")
    assert spec.obs == {"image": Field((2, 2), "uint8"), "state": {"position": position, "contact": Field((), "bool")}}


def test_spaces_bring_their_own_dtypes_unless_told():
    space = spaces.Dict({"image": spaces.Box(0, 255, (2, 2), np.uint8), "state": BOX})
    spec = spec_from_arguments(None, None, space, spaces.Discrete(4))
    assert spec == TransitionSpec.from_spaces(space, spaces.Discrete(4))
    assert spec.obs["state"].dtype == "float64"
    assert spec.action == Field((), "int64")
    spec = spec_from_arguments(None, None, BOX, BOX, obs_dtype="float32", action_dtype=torch.float16)
    assert (spec.obs.dtype, spec.action.dtype) == ("float32", "float16")


def test_extras_travel_along_with_either():
    extras = {"goal": Field((2,))}
    assert from_shapes(3, extras=extras).extras == extras
    assert spec_from_arguments(None, None, BOX, BOX, extras=extras).extras == extras


@pytest.mark.parametrize(
    ("arguments", "came"),
    [
        ((None, None, None, None), "none"),
        ((3, None, None, None), "obs_shape"),
        ((3, None, None, BOX), "action_space and obs_shape"),
        ((3, 1, BOX, None), "action_shape and obs_shape and observation_space"),
        ((3, 1, BOX, BOX), "action_shape and action_space and obs_shape and observation_space"),
    ],
)
def test_neither_both_or_a_mixture_of_shapes_and_spaces_is_refused_with_what_came(arguments, came):
    with pytest.raises(InvalidInput, match=f"expected either obs_shape and action_shape or .*, got {came}$"):
        spec_from_arguments(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,), 1), "obs_shape is (0,); expected an int"),
        (((2, -1), 1), "obs_shape is (2, -1); expected an int"),
        ((2.5, 1), "obs_shape is 2.5; expected an int"),
        (("ab", 1), "obs_shape is 'ab'; expected an int"),
        ((BOX, 1), "obs_shape is Box("),
        ((1, (1.0,)), "action_shape is (1.0,); expected an int"),
        (({}, 1), "obs_shape is an empty mapping"),
        (({"a": {"b": 0}}, 1), "obs_shape['a']['b'] is 0; expected an int"),
        (({"a/b": 1}, 1), "key 'a/b' must be a string without '/'"),
    ],
)
def test_a_wrong_shape_is_refused_by_name_with_what_came(arguments, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        from_shapes(*arguments)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (1, {"obs_dtype": "complex64"}, "obs_dtype: dtype 'complex64' cannot be stored"),
        (1, {"obs_dtype": torch.bfloat16}, "obs_dtype: dtype torch.bfloat16 cannot be stored"),
        (1, {"action_dtype": "no_such"}, "action_dtype: dtype 'no_such' cannot be stored"),
        (1, {"obs_dtype": {"a": "uint8"}}, "obs_dtype: dtype {'a': 'uint8'} cannot be stored"),
        ({"a": 1}, {"obs_dtype": {"b": "uint8"}}, "obs_dtype has the keys ['b'], obs_shape has ['a']"),
        ({"a": 1, "b": 1}, {"obs_dtype": {"a": "uint8"}}, "obs_dtype has the keys ['a'], obs_shape has ['a', 'b']"),
        ({"a": 1}, {"obs_dtype": {"a": object}}, "obs_dtype['a']: dtype"),
    ],
)
def test_a_wrong_dtype_is_refused_by_name_with_what_came(shape, options, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        from_shapes(shape, **options)


def test_a_wrong_dtype_or_space_is_refused_with_spaces_too():
    with pytest.raises(InvalidInput, match="obs_dtype: dtype 'complex64' cannot be stored"):
        spec_from_arguments(None, None, BOX, BOX, obs_dtype="complex64")
    with pytest.raises(InvalidInput, match=r"action_space: .* has no fixed shape"):
        spec_from_arguments(None, None, BOX, spaces.Text(3))
