"""Uniform random numbers made inside kernels, from a seed that the table's generator gives for each batch.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16). Its numbers do not
depend on each other, so that a compiler makes vectors of them: 256 take 0.1 us, where `Generator.random` takes 1.2. The
table's generator stays what is saved and restored.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.kernels import compiled

_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ONE_BIT = np.uint64(1)


@compiled()
def fill_uniforms(seed: int, uniforms: Any) -> None:
    """Write numbers from [0, 1), multiples of 2^-53, that follow from the seed."""
    for i in range(uniforms.size):
        bits = np.uint64(seed) + np.uint64(i + 1) * _GOLDEN
        bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
        bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
        bits ^= bits >> np.uint64(31)
        # By way of a signed number, for which processors have a conversion.
        uniforms[i] = np.float64(np.int64(bits >> np.uint64(11))) * 2.0**-53


def new_seed(rng: np.random.Generator) -> int:
    """A seed of 63 bits, as a kernel takes one."""
    return rng.bit_generator.random_raw() >> 1


def new_seeds(rng: np.random.Generator, num_seeds: int) -> NDArray[np.int64]:
    """[num_seeds] int64, the same as of as many calls of `new_seed`."""
    raw: NDArray[np.uint64] = rng.bit_generator.random_raw(num_seeds)
    return (raw >> _ONE_BIT).view(np.int64)
