"""Tables out of files: the same values as in Python, or an error that names what is wrong."""

import json
import tomllib

import pytest

import rl_buffer as rb
from rl_buffer.table_file import EXAMPLE, read_tables

SPEC = rb.TransitionSpec(obs=rb.Field((4,)), action=rb.Field((), "int64"))


def written(tmp_path, text, name="tables.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_the_example_is_the_table_that_its_words_say(tmp_path):
    table = rb.ReplayTable(SPEC, 100_000, rb.Prioritized(alpha=0.6), rb.MinSize(1_000), n_step=3, gamma=0.99)
    assert read_tables(written(tmp_path, EXAMPLE)) == {"replay": table}
    as_json = json.dumps(tomllib.loads(EXAMPLE))
    assert read_tables(written(tmp_path, as_json, "tables.json")) == {"replay": table}


def test_dictionary_observations_extras_and_rollouts_can_be_said(tmp_path):
    text = """
[frames]
type = "ReplayTable"
capacity = 10
rate_limiter = { type = "SampleToInsertRatio", samples_per_insert = 2.0, min_size_to_sample = 4, error_buffer = [0, 9] }
[frames.spec]
action = { shape = 2 }
extras = { speed = { shape = [] } }
[frames.spec.obs]
camera = { shape = [8, 8], dtype = "uint8" }
shape = { shape = [3] }

[rollout]
type = "RolloutTable"
num_steps = 16
num_envs = 2
spec = { obs = { shape = [4] }, action = { shape = [], dtype = "int64" } }
"""
    obs = {"camera": rb.Field((8, 8), "uint8"), "shape": rb.Field((3,))}
    spec = rb.TransitionSpec(obs=obs, action=rb.Field((2,)), extras={"speed": rb.Field(())})
    assert read_tables(written(tmp_path, text)) == {
        "frames": rb.ReplayTable(spec, 10, rate_limiter=rb.SampleToInsertRatio(2.0, 4, (0.0, 9.0))),
        "rollout": rb.RolloutTable(SPEC, num_steps=16, num_envs=2),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("capacity =", "capcity ="), r"table 'replay' has no capcity; there are .*capacity.*"),
        (('"ReplayTable"', '"Replay"'), r"table 'replay' needs type = \"ReplayTable\" or \"RolloutTable\""),
        (("alpha =", "alhpa ="), r"table 'replay': sampler has no alhpa; there are alpha, epsilon"),
        (('"Prioritized"', '"Priority"'), r"table 'replay': Invalid value 'Priority' - at `\$\.sampler\.type`"),
        (("100_000", "0"), r"ReplayTable capacity must be in \[1, "),
        (("100_000", '"many"'), r"table 'replay': Expected `int`, got `str` - at `\$\.capacity`"),
        (("[replay.spec.action]", "[replay.spec.actions]"), r"table 'replay': spec has no actions; there are action, "),
        (("float32", "complex64"), r"dtype 'complex64' cannot be stored"),
        ((EXAMPLE, ""), "has no tables; `rl-buffer serve --help` shows an example"),
        ((EXAMPLE, "[replay"), "tables.toml is not TOML: "),
        ((EXAMPLE, "replay = 1"), "table 'replay' needs type"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changed, message):
    text = EXAMPLE.replace(*changed)
    assert text != EXAMPLE
    with pytest.raises(rb.InvalidInput, match=message):
        read_tables(written(tmp_path, text))
