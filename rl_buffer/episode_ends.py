"""Where episodes end in a vector of environments, and what was really observed there.

Gymnasium's autoreset modes (https://gymnasium.farama.org/api/vector/) differ in what `step` returns at an end:

    mode        next_obs at an end     the true final observation      the step after
    next_step   the final observation  next_obs                        a dummy: action ignored, reward 0
    same_step   the reset observation  infos["final_obs"][i]           a real first step
    disabled    the final observation  next_obs                        the caller resets
    None        whatever the caller passes is stored as it is
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from rl_buffer.errors import InvalidInput

Autoreset: TypeAlias = Literal["next_step", "same_step", "disabled"]


def autoreset_mode(autoreset: Any) -> Autoreset | None:
    """Normalise "next_step", "NextStep" or a Gymnasium AutoresetMode.

    Raises:
        InvalidInput: unknown.
    """
    if autoreset is None:
        return None
    word = str(getattr(autoreset, "value", autoreset)).lower().replace("_", "")
    for mode in get_args(Autoreset):
        if word == mode.replace("_", ""):
            return mode  # type: ignore[no-any-return]
    raise InvalidInput(f"autoreset {autoreset!r} is unknown; expected one of {get_args(Autoreset)} or None")


def num_envs_of(envs: Any) -> int | None:
    """How many environments are stepped at once; None for a single one, without environment dimension."""
    if hasattr(envs, "num_envs"):
        return int(envs.num_envs)
    return len(envs) if hasattr(envs, "__len__") else None  # EnvPool before 1.0


def stated_autoreset(envs: Any) -> Autoreset | None:
    """What a vector environment says of itself; a single environment is one that its caller resets (None).

    Raises:
        InvalidInput: a vector environment without `metadata["autoreset_mode"]`; guessing would store wrong rows.
    """
    if num_envs_of(envs) is None:
        return None
    metadata = getattr(envs, "metadata", None)
    if not isinstance(metadata, Mapping) or metadata.get("autoreset_mode") is None:
        raise InvalidInput(
            f"{type(envs).__name__} does not say how it resets (metadata['autoreset_mode']); pass "
            "autoreset='next_step', 'same_step' or 'disabled'"
        )
    return autoreset_mode(metadata["autoreset_mode"])


def final_observation(infos: Any, env: int, path: str) -> Any:
    """Leaf `path` ("" or "camera/rgb") of the true final observation of `env` in SAME_STEP mode.

    Raises:
        InvalidInput: infos lack it.
    """
    if (
        not isinstance(infos, Mapping)
        or not {"final_obs", "_final_obs"} <= infos.keys()
        or not infos["_final_obs"][env]
    ):
        raise InvalidInput(
            f"environment {env} ended in same_step mode, but infos hold no final_obs for it; pass the infos that "
            "step() returned: add(..., infos=infos)"
        )
    observation = infos["final_obs"][env]
    for key in path.split("/") if path else ():
        observation = observation[key]
    return observation
