"""What Numba lacks for work on whole cache lines: ask for one ahead, copy one, and compare one with a number.

A line is eight numbers of 8 bytes. Each function takes a one-dimensional array and a position in it, and checks neither
that it is one nor that a line lies there: that is the calling kernel's. Compiled for the processor at hand; without
vector instructions they become loops.
"""

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LINE = 8  # numbers

_INT32 = ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()


def _address(context: Any, builder: Any, array_type: Any, array: Any, position: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [position])


def _vectors(number: Any) -> Any:
    return ir.VectorType(number, LINE).as_pointer()


def _prefetch(typing_context: Any, array: Any, position: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        prefetch_type = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
        llvm_prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTES], prefetch_type)
        to_read, to_all_caches, of_data = _INT32(0), _INT32(3), _INT32(1)
        builder.call(llvm_prefetch, [builder.bitcast(address, _BYTES), to_read, to_all_caches, of_data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _copy_line(typing_context: Any, target: Any, target_position: Any, source: Any, source_position: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _vectors(ir.IntType(64))
        write = builder.bitcast(_address(context, builder, signature.args[0], *arguments[:2]), pointer)
        read = builder.bitcast(_address(context, builder, signature.args[2], *arguments[2:]), pointer)
        builder.store(builder.load(read, align=8), write, align=8)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), generate


def _floats(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    address = _address(context, builder, signature.args[0], *arguments[:2])
    return builder.load(builder.bitcast(address, _vectors(ir.DoubleType())), align=8)


def _picked(builder: Any, first: Any, second: Any, places: list[int]) -> Any:
    """A line of the numbers at these places of two lines, one behind the other."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, LINE), places))


def _num_up_to(builder: Any, line: Any, limit: Any) -> Any:
    unset = ir.Constant(line.type, ir.Undefined)
    limits = _picked(builder, builder.insert_element(unset, limit, _INT32(0)), unset, [0] * LINE)
    holds = builder.bitcast(builder.fcmp_ordered("<=", line, limits), ir.IntType(LINE))
    return builder.ctpop(builder.zext(holds, ir.IntType(64)))


def _count_up_to(typing_context: Any, array: Any, position: Any, limit: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _num_up_to(builder, _floats(context, builder, signature, arguments), arguments[2])

    return types.int64(array, types.intp, types.float64), generate


def _count_sums_up_to(typing_context: Any, array: Any, position: Any, limit: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums = _floats(context, builder, signature, arguments)
        zeros = ir.Constant(sums.type, [0.0] * LINE)
        distance = 1
        while distance < LINE:  # each number becomes the sum of twice as many up to it
            places = [LINE if place < distance else place - distance for place in range(LINE)]
            sums = builder.fadd(sums, _picked(builder, sums, zeros, places))
            distance *= 2
        return _num_up_to(builder, sums, arguments[2])

    return types.int64(array, types.intp, types.float64), generate


# prefetch(array, position): start to load the line there, and go on.
prefetch = cast(Callable[[Any, Any], None], intrinsic(_prefetch))
# copy_line(target, target_position, source, source_position): of int64 arrays that do not overlap.
copy_line = cast(Callable[[Any, Any, Any, Any], None], intrinsic(_copy_line))
# count_up_to(array, position, limit): how many of the eight float64 there are <= limit, without a branch.
count_up_to = cast(Callable[[Any, Any, Any], int], intrinsic(_count_up_to))
# count_sums_up_to(array, position, limit): how many of the eight running sums there are <= limit, but for rounding.
count_sums_up_to = cast(Callable[[Any, Any, Any], int], intrinsic(_count_sums_up_to))
