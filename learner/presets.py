"""Options that suit an environment, where they are not the defaults (which suit CartPole-v1)."""

from collections.abc import Mapping
from typing import Any, TypeVar

import tyro

from learner.run_directory import RunDirectory

_Options = TypeVar("_Options")

# Environment -> group of options -> option -> value.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "Acrobot-v1": {
        "table": {"min_size": 10_000},
        "learner": {"learning_rate_steps": 100_000, "eval_period": 4_000},
    },
    "LunarLander-v3": {
        "table": {"min_size": 10_000, "capacity": 200_000},
        "learner": {
            "max_env_steps": 500_000,
            "learning_rate": 5e-4,
            "learning_rate_steps": 500_000,
            "hidden_sizes": (256, 256),
            "eval_period": 10_000,
        },
    },
}


def options_from_command_line(options_type: type[_Options], description: str | None) -> _Options:
    """Parse the command line; what it leaves open comes from the resumed run, else the preset, else the defaults."""
    given = tyro.cli(options_type, description=description)
    resume = getattr(given, "resume", None)
    if resume is not None:
        return tyro.cli(options_type, description=description, default=RunDirectory(resume).load_config(options_type))
    preset = PRESETS.get(given.env)  # type: ignore[attr-defined]
    if preset is None:
        return given
    defaults = options_type()
    for group, values in preset.items():
        if hasattr(defaults, group):
            vars(getattr(defaults, group)).update(values)
    return tyro.cli(options_type, description=description, default=defaults)
