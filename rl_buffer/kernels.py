"""How Numba kernels are declared here: typed for mypy, cached, without the GIL, compiled at import."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit, types

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

FLOATS = types.Array(types.float64, 1, "C")
FLOATS32 = types.Array(types.float32, 1, "C")
FLOATS_2D = types.Array(types.float64, 2, "C")
INTS = types.Array(types.int64, 1, "C")
INTS_2D = types.Array(types.int64, 2, "C")
UINTS32 = types.Array(types.uint32, 1, "C")
UINTS32_2D = types.Array(types.uint32, 2, "C")
INT = types.int64
FLOAT = types.float64
BOOL = types.boolean
FLOATS32_2D = types.Array(types.float32, 2, "C")
# Inputs that a kernel only reads also come as views of a message, which NumPy marks read-only.
FLOATS_IN = types.Array(types.float64, 1, "C", readonly=True)
INTS_IN = types.Array(types.int64, 1, "C", readonly=True)
FLOATS32_2D_IN = types.Array(types.float32, 2, "C", readonly=True)
BOOLS_2D_IN = types.Array(types.boolean, 2, "C", readonly=True)


def compiled(*argument_types: Any) -> Callable[[_Kernel], _Kernel]:
    """`numba.njit` that keeps the function's type.

    With argument types the kernel is compiled (or loaded from Numba's cache) when its module is imported, so that
    no first call is slow. Without any it is compiled into the kernels that call it, and not cached by itself: from the
    cache it would come as a finished function, which cannot become part of a loop over vectors.

    Division by zero gives what NumPy gives: a test for it in a loop keeps the compiler from making vectors too.
    """
    is_entry = bool(argument_types)
    signatures = [argument_types] if is_entry else None
    return cast(Callable[[_Kernel], _Kernel], njit(signatures, cache=is_entry, nogil=True, error_model="numpy"))
