"""From the command line to a run: the algorithm, options that suit it and the environment, and how a script ends."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import msgspec
import tyro

import rl_buffer as rb
from actors.crew import TooManyFailures
from learner.algorithms import ALGORITHMS
from learner.run_directory import RunDirectory

_Options = TypeVar("_Options")
_GROUPS = ("crew", "table", "learner")


def run_script(main: Callable[[], None]) -> None:
    """Run, and say in one line what a user can mend; a traceback is for our own mistakes."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
    except (rb.RLBufferError, OSError, TooManyFailures, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def options_from_command_line(options_type: type[_Options], description: str | None) -> _Options:
    """Parse the command line; what it leaves open comes from the resumed run, else the preset, else the defaults.

    Args:
        options_type: a dataclass with `algo`, `env`, perhaps `resume`, and some of the groups `crew`, `table` and
            `learner`. The algorithm decides which options a group has.
        description: for --help.
    """
    # These first: they decide which others there are. Whatever is wrong with them is for the real parser to say.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--algo", "--env", "--resume"):
        first.add_argument(name, nargs="?")
    given, _ = first.parse_known_args()
    names = {field.name for field in fields(options_type)}
    stored: dict[str, Any] = {}
    if given.resume and "resume" in names:
        stored = {"algo": "apex"} | RunDirectory(Path(given.resume)).load_config()
        for key in ("algo", "env"):
            if getattr(given, key) not in (None, stored[key]):
                raise rb.InvalidInput(f"{given.resume} is a run of {stored[key]}, not of {getattr(given, key)}")
    name = given.algo or stored.get("algo", "apex")
    algorithm = ALGORITHMS.get(name, ALGORITHMS["apex"])
    groups = {group: getattr(algorithm, group)() for group in _GROUPS if group in names}
    defaults = options_type(algo=name if name in ALGORITHMS else "apex", env=algorithm.env, **groups)
    _set(defaults, stored or algorithm.presets.get(given.env or algorithm.env, {}))
    return tyro.cli(options_type, description=description, default=defaults)


def open_run(options: Any) -> RunDirectory:
    """The directory of the resumed run, or that of a new one, with its configuration in it.

    Raises:
        FileNotFoundError: there is nothing to resume.
        FileExistsError: the new run's name is taken.
    """
    if options.resume is not None:
        run = RunDirectory(options.resume)
        run.load_learner()
        return run
    run = RunDirectory.new(ALGORITHMS[options.algo].agent.name, options.env, options.seed, options.name)
    run.save_config(options)
    return run


def _set(options: Any, values: Any) -> None:
    """Take over the values that `options` has a place for, in groups of options too."""
    for key, value in values.items():
        if not hasattr(options, key):
            continue
        group = getattr(options, key)
        if is_dataclass(group):
            setattr(options, key, msgspec.convert(vars(group) | dict(value), type(group)))
        else:
            setattr(options, key, value)
