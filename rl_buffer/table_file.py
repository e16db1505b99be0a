"""Tables from a TOML or JSON file: what `rl-buffer serve` is given.

Its words are those of the classes: each table of the file is a `ReplayTable` or a `RolloutTable` (`type`), its values
are their arguments. `EXAMPLE` is one.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from rl_buffer.errors import InvalidInput
from rl_buffer.tables import ReplayTable, RolloutTable

EXAMPLE = """\
[replay]                       # the name that writers and samplers use
type = "ReplayTable"           # or "RolloutTable", with num_steps, num_envs, num_fragments, ...
capacity = 100_000             # transitions
n_step = 3
gamma = 0.99
sampler = { type = "Prioritized", alpha = 0.6 }
rate_limiter = { type = "MinSize", min_size_to_sample = 1_000 }

[replay.spec.obs]              # of one environment; for dictionary observations [replay.spec.obs.camera] and so on
shape = [4]
dtype = "float32"

[replay.spec.action]
shape = []
dtype = "int64"
"""
_TYPES = {"ReplayTable": ReplayTable, "RolloutTable": RolloutTable}
_FIELD_KEYS = {"shape", "dtype"}


def read_tables(path: Path) -> dict[str, ReplayTable | RolloutTable]:
    """The tables of a file by name; JSON if its name ends so, else TOML.

    Raises:
        OSError: it cannot be read.
        InvalidInput: it is no such file, or a value is wrong; the message says which.
    """
    text = path.read_bytes()
    try:
        sections = json.loads(text) if path.suffix == ".json" else tomllib.loads(text.decode())
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise InvalidInput(f"{path} is not {kind}: {error}") from error
    if not isinstance(sections, dict) or not sections:
        raise InvalidInput(f"{path} has no tables; `rl-buffer serve --help` shows an example")
    try:
        return {name: _table(name, section) for name, section in sections.items()}
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _table(name: str, section: Any) -> ReplayTable | RolloutTable:
    kind = _TYPES.get(str(section.get("type"))) if isinstance(section, dict) else None
    if kind is None:
        raise InvalidInput(f'table {name!r} needs type = "ReplayTable" or "RolloutTable"')
    values = {key: value for key, value in section.items() if key != "type"}
    _require_known(f"table {name!r}", values, kind)
    spec = values.get("spec")
    if not isinstance(spec, dict):
        raise InvalidInput(
            f"table {name!r} needs a spec, with obs and action; `rl-buffer serve --help` shows an example"
        )
    _require_known(f"table {name!r}: spec", spec, "TransitionSpec")
    values["spec"] = {key: _fields(branch) for key, branch in spec.items()}
    for key in ("sampler", "rate_limiter"):
        value = values.get(key)
        if isinstance(value, dict):
            _require_known(f"table {name!r}: {key}", value, value.get("type"))
    try:
        return msgspec.convert(values | {"type": kind.__name__}, ReplayTable | RolloutTable)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"table {name!r}: {error}") from error


def _fields(tree: Any) -> Any:
    """{shape, dtype} as the pair that a `Field` is in a message; below other keys likewise."""
    if not isinstance(tree, dict):
        return tree
    if isinstance(tree.get("shape"), list | int) and tree.keys() <= _FIELD_KEYS:
        shape = tree["shape"]
        return [shape if isinstance(shape, list) else [shape], tree.get("dtype", "float32")]
    return {key: _fields(branch) for key, branch in tree.items()}


def _require_known(what: str, values: dict[str, Any], kind: Any) -> None:
    """Refuse keys that the class does not have, which msgspec would pass over: they are misspelt."""
    from rl_buffer import rate_limiters, samplers, spec

    if isinstance(kind, str):
        kind = next((vars(module)[kind] for module in (spec, samplers, rate_limiters) if kind in vars(module)), None)
    known = set(getattr(kind, "__struct_fields__", ()))
    unknown = sorted(values.keys() - known - {"type"})
    if unknown and known:
        raise InvalidInput(f"{what} has no {', '.join(unknown)}; there are {', '.join(sorted(known))}")
