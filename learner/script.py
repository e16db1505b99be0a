"""From the command line to a run: options that suit an environment, and how a script ends.

The defaults suit CartPole-v1.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import gymnasium as gym
import tyro

import rl_buffer as rb
from actors.crew import TooManyFailures
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


def run_script(main: Callable[[_Options], None], options_type: type[_Options], description: str | None) -> None:
    """Parse, run, and say in one line what a user can mend; a traceback is for our own mistakes."""
    try:
        main(options_from_command_line(options_type, description))
    except KeyboardInterrupt:
        print("stopped")
    except (rb.RLBufferError, OSError, TooManyFailures, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def options_from_command_line(options_type: type[_Options], description: str | None) -> _Options:
    """Parse the command line; what it leaves open comes from the resumed run, else the preset, else the defaults."""
    given = tyro.cli(options_type, description=description)
    resume = getattr(given, "resume", None)
    if resume is not None:
        stored = RunDirectory(resume).load_config(options_type)
        options = tyro.cli(options_type, description=description, default=stored)
        if options.env != stored.env:
            raise rb.InvalidInput(f"{resume} is a run of {stored.env}, not of {options.env}")
        return options
    preset = PRESETS.get(getattr(given, "env", ""))
    if preset is None:
        return given
    defaults = options_type()
    for group, values in preset.items():
        if hasattr(defaults, group):
            vars(getattr(defaults, group)).update(values)
    return tyro.cli(options_type, description=description, default=defaults)
