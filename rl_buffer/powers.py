"""Powers of positive numbers, several at a time: straight-line arithmetic that a compiler makes vectors of.

    b^e = 2^(e log2 b), with b = 2^k m and sqrt(1/2) <= m < sqrt(2):

    log2 m = (2 / ln 2) (s + s^3/3 + s^5/5 + ...)     s = (m - 1) / (m + 1), |s| < 0.172
    2^y    = 2^n (1 + f + f^2/2! + ...)                n the nearest integer to y, f = (y - n) ln 2, |f| < 0.347

256 of them take 0.6 us, where a call of the C library for each takes 2.6.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rl_buffer.kernels import compiled

_MANTISSA_BITS = 52
_SQRT_HALF_BITS = int(np.float64(math.sqrt(0.5)).view(np.int64))
_LN_2 = math.log(2.0)
_FEWEST, _MOST = -1022.0, 1023.0  # exponents of 2 that a float64 has in full precision
# Of the highest power first.
_LOG_TERMS = tuple(1.0 / odd for odd in range(21, 0, -2))
_EXP_TERMS = tuple(1.0 / math.factorial(n) for n in range(12, -1, -1))


def _bits_of(typing_context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


def _of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


bits_of = cast(Callable[[float], int], intrinsic(_bits_of))
of_bits = cast(Callable[[int], float], intrinsic(_of_bits))


@compiled()
def _series(x: float, terms: Any) -> float:
    result = 0.0
    for term in terms:
        result = result * x + term
    return result


@compiled()
def power(base: float, exponent: float) -> float:
    """`base ** exponent` within a few 1e-16 of it, for results of 2^±n within n times as much.

    Exactly 1.0 where the base is 1 or the exponent 0. What lies outside of 2^-1022 ... 2^1023 becomes the nearest end.

    Args:
        base: finite and at least 2^-1022; smaller ones, 0 too, count as about that.
        exponent: finite.
    """
    bits = bits_of(base)
    k = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    m = of_bits(bits - (k << _MANTISSA_BITS))
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    log = (2.0 / _LN_2) * s * _series(q, _LOG_TERMS)
    # By way of 32 bits, because most processors have no vectors of conversions between float64 and int64.
    y: Any = exponent * (np.float64(np.int32(k)) + log)
    y = min(max(y, _FEWEST), _MOST)
    n = np.floor(y + 0.5)
    f = (y - n) * _LN_2
    fraction = _series(f, _EXP_TERMS)
    return of_bits(bits_of(fraction) + int(np.int64(np.int32(n)) << _MANTISSA_BITS))
