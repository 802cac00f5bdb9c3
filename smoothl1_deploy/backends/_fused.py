"""The loss in one pass over input and target, as kernels of OpenAI's Triton, the compiler.

Each input is read once and each output written once. The elements have the form of
`graph/_functions.SmoothL1LossTerms`. A reduction is seen as rows to be added up, a full one as a
single row. What is added up in which format:

1. float32: each loss in float64, exact to 2^-29 for 2^24 of them, and no mean overflows on the way.
   A GPU for games adds 2 float64 numbers a clock and multiprocessor, 1/64 of its float32: a
   conversion and an addition an element take 32 % (L4) to 84 % (RTX 3090) of that rate where memory
   gives its utmost, by the data sheets. So memory stays the limit.
2. float16, bfloat16: elements come twice as fast, beyond that rate. Four losses at a time are
   added in float32, 2^-22 at worst where the result holds 2^-9, then in float64. Those of bfloat16
   are quartered before, so that no four of them overflow.
3. float64: two numbers a sum, which hold what each addition rounds away (Knuth's TwoSum), because
   the result must be as exact as the sum. There memory is the limit on data center cards alone.

Sums are in an order that depends on shapes alone, without atomics: the same bits every time. Only
their last step differs under the interpreter, which takes a millisecond an element of `tl.reduce`.

bfloat16 is read and written as its bits, int16: the interpreter of Triton 3.9 truncates to bfloat16
and spoils its subnormals. On a GPU it is a shift in and four operations out.

A division an element costs float16 sums a fifth of their time on an H200: where beta is a power of
two, which it mostly is, the product with its inverse is the same number, and cheap.

The sizes below were the fastest on an H200, or within 2 % of it; see `bench/fused_sizes.py`.
"""

# Triton reads the source of these functions, and their annotations as objects.
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = (1024, 4)  # elements of a tile of `none`, and the warps on it
_TILE = (2048, 8)  # and of a reduction
_PROGRAMS = 4096  # the most that a reduction is cut into; each leaves one partial sum
_COMBINED = 128  # partial sums a warp
_LARGEST_POWER = 2.0**127  # the largest power of two that is a float32
_AS_WRITTEN = {"enable_fp_fusion": False}  # a product and a sum are two roundings, as interpreted


@triton.jit
def _widened(values):
    """Narrower numbers as float32, float64 as it is."""
    if values.dtype == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@triton.jit
def _rounded(values, TYPE: tl.constexpr):
    """Numbers >= 0 and NaN, rounded once to TYPE, to nearest even."""
    if TYPE == tl.float64 or TYPE == values.dtype:
        return values.to(TYPE)
    elif TYPE == tl.float32:
        return values.to(tl.float32)
    else:
        narrow = values.to(tl.float32)
        if values.dtype == tl.float64:
            # To odd, not to nearest: rounded to nearest twice, a number may miss its nearest.
            back = narrow.to(tl.float64)
            bits = narrow.to(tl.int32, bitcast=True)
            odd = tl.where(back > values, bits - 1, bits) | 1
            exact = (back == values) | (values != values)
            narrow = tl.where(exact, bits, odd).to(tl.float32, bitcast=True)
        if TYPE == tl.int16:
            bits = narrow.to(tl.int32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where(narrow != narrow, 0x7FC0, nearest).to(tl.int16)
        else:
            return narrow.to(TYPE)


@triton.jit
def _losses(input, target, beta, inverse, BETA: tl.constexpr):
    """The loss of each element, in float32 or float64.

    BETA: 0 where `beta` may be anything, and makes NaN where it is no beta; 1 where it is positive;
    2 where it is 0, infinite or a power of two, and its division the product with `inverse`.
    """
    difference = _widened(input) - _widened(target)
    threshold = beta.to(difference.dtype)
    core = tl.minimum(tl.maximum(difference, -threshold), threshold)
    if BETA == 2:
        slope = core * inverse
    else:
        divisor = threshold
        if BETA == 0:
            divisor = tl.where(threshold == 0, 1.0, float("nan")).to(difference.dtype)
            divisor = tl.where(threshold > 0, threshold, divisor)
        if difference.dtype == tl.float64:
            slope = core / divisor
        else:
            slope = tl.div_rn(core, divisor)  # `/` is an approximation, 2 ULP off
    return tl.abs(difference - core) + (core * 0.5) * slope


@triton.jit
def _two_sum(a, b):
    """The sum, and exactly what its rounding lost."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _add_exactly(high_a, low_a, high_b, low_b):
    total, lost = _two_sum(high_a, high_b)
    return total, low_a + low_b + lost


@triton.jit
def _total(high, low, EXACT: tl.constexpr, UNROLLED: tl.constexpr):
    """The sum of each row of [rows, a power of two], as [rows]."""
    if UNROLLED:
        # This is of no use to a GPU, where every thread would add up everything.
        while high.shape[1] > 1:
            shape: tl.constexpr = (high.shape[0], high.shape[1] // 2, 2)
            left, right = tl.split(tl.reshape(high, shape))
            low_left, low_right = tl.split(tl.reshape(low, shape))
            if EXACT:
                high, low = _add_exactly(left, low_left, right, low_right)
            else:
                high, low = left + right, low_left + low_right
        high, low = tl.reshape(high, (high.shape[0],)), tl.reshape(low, (low.shape[0],))
    elif EXACT:
        high, low = tl.reduce((high, low), 1, _add_exactly)
    else:
        high = tl.reduce(high, 1, _add)
        low = tl.full(high.shape, 0.0, tl.float64)
    return high, low


@triton.jit
def _finish(high, low, columns, MEAN: tl.constexpr, SCALE: tl.constexpr, TYPE: tl.constexpr):
    # What an infinite sum lost is NaN.
    total = tl.where(low == low, high + low, high) * SCALE
    if MEAN:
        total = total / columns
    return _rounded(total, TYPE)


@triton.jit
def _threshold(beta, BETA: tl.constexpr):
    """The threshold: beta, a number or, where it may be anything, loaded from the device."""
    if BETA == 0:
        return tl.load(beta)
    else:
        return beta


@triton.jit
def _write_losses(
    input, target, loss, beta, inverse, count, BETA: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    threshold = _threshold(beta, BETA)
    if EVEN:
        left = tl.load(input + start + index)
        right = tl.load(target + start + index)
        losses = _losses(left, right, threshold, inverse, BETA)
        tl.store(loss + start + index, _rounded(losses, loss.dtype.element_ty))
    else:
        here = index < tl.minimum(count - start, BLOCK).to(tl.int32)
        left = tl.load(input + start + index, mask=here, other=0)
        right = tl.load(target + start + index, mask=here, other=0)
        losses = _losses(left, right, threshold, inverse, BETA)
        tl.store(loss + start + index, _rounded(losses, loss.dtype.element_ty), mask=here)


@triton.jit
def _in_fours(losses, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """Sums of four neighbours in float64; see the module for what is added in which format."""
    if TYPE == tl.float32:
        losses = losses.to(tl.float64)
    elif TYPE == tl.int16:
        losses *= 0.25
    one, two = tl.split(tl.reshape(losses, (ROWS, COLUMNS // 2, 2)))
    one, two = tl.split(tl.reshape(one + two, (ROWS, COLUMNS // 4, 2)))
    return (one + two).to(tl.float64)


@triton.jit
def _sum_rows(
    input, target, output, beta, inverse, rows, columns, tiles, parts, BETA: tl.constexpr,
    EVEN: tl.constexpr, FINAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr, MEAN: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    """Add up `tiles` tiles of ROWS rows; write the loss (FINAL), or a float64 partial sum.

    Partial sums are in `output` as [rows, parts], and what they lost (EXACT) as much again. EVEN:
    no tile reaches beyond its rows. RUN: 4 to add four neighbours at a time, or 1.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    part = tl.program_id(1).to(tl.int64)
    start = part * tiles * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    some = row < tl.minimum(rows - first, ROWS).to(tl.int32)
    offset = row[:, None] * columns + column[None, :]
    threshold = _threshold(beta, BETA)
    high = tl.full((ROWS, COLUMNS // RUN), 0.0, tl.float64)
    low = tl.full((ROWS, COLUMNS // RUN), 0.0, tl.float64)
    for _ in range(0, tiles):
        base = first * columns + start
        if EVEN:
            left = tl.load(input + base + offset)
            right = tl.load(target + base + offset)
        else:
            more = column < tl.minimum(tl.maximum(columns - start, 0), COLUMNS).to(tl.int32)
            here = some[:, None] & more[None, :]
            left = tl.load(input + base + offset, mask=here, other=0)
            right = tl.load(target + base + offset, mask=here, other=0)
        losses = _losses(left, right, threshold, inverse, BETA)
        if EXACT:
            high, lost = _two_sum(high, losses)
            low += lost
        elif RUN == 4:
            high += _in_fours(losses, ROWS, COLUMNS, input.dtype.element_ty)
        else:
            high += losses.to(tl.float64)
        start += COLUMNS
    high, low = _total(high, low, EXACT, UNROLLED)
    index = first + row
    if FINAL:
        value = _finish(high, low, columns, MEAN, SCALE, output.dtype.element_ty)
        tl.store(output + index, value, mask=some)
    else:
        tl.store(output + index * parts + part, high, mask=some)
        if EXACT:
            tl.store(output + (rows + index) * parts + part, low, mask=some)


@triton.jit
def _combine(
    partial, loss, rows, columns, parts, SIZE: tl.constexpr, MEAN: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of a row; SIZE is at least `parts`."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)[None, :]
    here = part < parts
    high = tl.load(partial + row * parts + part, mask=here, other=0.0)
    low = tl.full((1, SIZE), 0.0, tl.float64)
    if EXACT:
        low = tl.load(partial + (rows + row) * parts + part, mask=here, other=0.0)
    high, low = _total(high, low, EXACT, UNROLLED)
    value = _finish(high, low, columns, MEAN, SCALE, loss.dtype.element_ty)
    tl.store(loss + row + tl.arange(0, 1), value)


#: Whether TRITON_INTERPRET was set when Python came here; it is too late afterwards.
INTERPRETED = not isinstance(_write_losses, triton.JITFunction)


@dataclass(frozen=True, slots=True)
class Plan:
    """How `rows` rows of `columns` elements are added up; it depends on nothing else.

    Attributes:
        tile: rows and columns that a program reads at a time, powers of two.
        tiles: how many a program reads one after the other, along a row.
        warps: how many a program has.
        programs: over the rows, and along a row. Where a row takes more than one, each leaves a
            partial sum, and a second launch adds them up.
    """

    rows: int
    columns: int
    tile: tuple[int, int]
    warps: int
    tiles: int
    programs: tuple[int, int]

    @property
    def scratch(self) -> int:
        """float64 numbers that the partial sums take, with what they lost; 0 for one launch."""
        return 2 * self.rows * self.programs[1] if self.programs[1] > 1 else 0


def plan(rows: int, columns: int) -> Plan:
    """The plan: one launch for rows of one tile and for many rows; two for others."""
    size, warps = _TILE
    width = min(max(_power(columns), 16), size)
    height = min(_power(rows), size // width)
    across, down = -(-columns // width), -(-rows // height)
    parts = max(1, min(across, _PROGRAMS // max(down, 1)))
    tiles = -(-across // parts)
    programs = down, max(1, -(-across // max(tiles, 1)))
    return Plan(rows, columns, (height, width), warps, tiles, programs)


def _power(number: int) -> int:
    """The smallest power of two that is at least the number."""
    return 1 << max(number - 1, 0).bit_length()


def _inverse(beta: float) -> float | None:
    """1 / beta where the product with it is the division, in float32: its rounding is the same.

    1 for a beta of 0, which divides nothing; None where the inverse is no float32 or is rounded.
    """
    if beta in (0.0, math.inf):
        return 1.0 if beta == 0 else 0.0
    inverse = 1 / beta
    return inverse if math.frexp(beta)[0] == 0.5 and inverse <= _LARGEST_POWER else None


class Launch:
    """A kernel on a grid, with its numbers; after the first call without Triton's own preparation.

    To find a compiled kernel by its arguments takes Triton longer than PyTorch takes for a small
    loss altogether. What decides which it is, the caller holds still.

    Args:
        kernel: takes tensors, then `numbers`, then `constants`, in this order.
        grid: programs along each axis.
        numbers: integers, and floats that are float32.
        constants: by name, in the order of the kernel's parameters.
        warps: a program's.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...],
        constants: dict[str, Any], warps: int,
    ) -> None:  # fmt: skip
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._numbers, self._constants, self._warps = numbers, constants, warps
        self._rest = (*numbers, *constants.values())
        self._compiled: Callable[..., object] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch it on tensors, of one set of dtypes and of divisors (16) of their addresses."""
        if self._compiled is not None:
            # An address is taken as it is; of a tensor the driver is asked where it lies.
            self._compiled(*[tensor.data_ptr() for tensor in tensors], *self._rest)
            return
        compiled = self._kernel[self._grid](
            *map(_as_bits, tensors), *self._numbers, **self._constants, num_warps=self._warps,
            **_AS_WRITTEN,
        )  # fmt: skip
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled = compiled[self._grid]


def _as_bits(tensor: Any) -> Any:
    """The tensor as the kernels take it."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class _Beta:
    """How kernels get beta: as a number, with its inverse, or from the device.

    A number is float32; at run time and for float64 it is a tensor of rank 0, so that no call waits
    for it.
    """

    def __init__(self, beta: float | None, dtype: str) -> None:
        self.fixed = beta is not None and dtype != "float64"
        self.numbers: tuple[float, ...] = (0.0,)
        self.form = {"BETA": 0}
        if beta is not None and self.fixed:
            inverse = _inverse(beta)
            self.numbers = beta, 0.0 if inverse is None else inverse
            self.form = {"BETA": 1 if inverse is None else 2}


class Losses:
    """The kernel of `none`: the losses of `count` elements.

    Args:
        count: how many elements input, target and loss have.
        dtype: their format.
        beta: where it is known.
    """

    scratch = 0

    def __init__(self, count: int, dtype: str, beta: float | None) -> None:
        self._beta = _Beta(beta, dtype)
        block, warps = _BLOCK
        constants = {**self._beta.form, "EVEN": count % block == 0, "BLOCK": block}
        numbers = *self._beta.numbers, count
        grid = (-(-count // block),)
        self._launch = Launch(_write_losses, grid, numbers, constants, warps) if count else None

    def __call__(self, input: Any, target: Any, beta: Any, loss: Any, partial: Any) -> None:
        """Launch it on contiguous tensors of one dtype; `beta` of rank 0; `partial` is not used."""
        if self._launch is not None:
            self._launch(input, target, loss, *(() if self._beta.fixed else (beta,)))


class Rows:
    """The kernels of sums, or means, of rows: one number a row.

    Args:
        how: `plan(rows, columns)`.
        dtype: the format of input, target and loss.
        beta: where it is known.
        mean: divide by `how.columns`; the mean of nothing is NaN.

    Attributes:
        scratch: float64 numbers that `partial` has to hold.
    """

    def __init__(self, how: Plan, dtype: str, beta: float | None, *, mean: bool) -> None:
        self.scratch = how.scratch
        self._beta = _Beta(beta, dtype)
        self._first: Launch | None = None
        self._second: Launch | None = None
        if not how.rows:
            return
        height, width = how.tile
        down, parts = how.programs
        # Neighbours in memory are neighbours in a thread, where rows begin at a multiple of four.
        fours = dtype != "float64" and (how.rows == 1 or how.columns % 4 == 0)
        form: dict[str, Any] = {
            "MEAN": mean, "SCALE": 4 if fours and dtype == "bfloat16" else 1,
            "EXACT": dtype == "float64", "UNROLLED": INTERPRETED,
        }  # fmt: skip
        constants = {
            **self._beta.form,
            "EVEN": how.rows % height == 0 and how.columns == parts * how.tiles * width,
            "FINAL": parts == 1, "ROWS": height, "COLUMNS": width, "RUN": 4 if fours else 1, **form,
        }  # fmt: skip
        numbers = *self._beta.numbers, how.rows, how.columns, how.tiles, parts
        self._first = Launch(_sum_rows, (down, parts), numbers, constants, how.warps)
        if parts > 1:
            size = _power(parts)
            self._second = Launch(
                _combine, (how.rows,), (how.rows, how.columns, parts), {"SIZE": size, **form},
                max(1, min(size // _COMBINED, 8)),
            )  # fmt: skip

    def __call__(self, input: Any, target: Any, beta: Any, loss: Any, partial: Any) -> None:
        """Launch it on contiguous tensors; `beta` of rank 0, `partial` float64."""
        if self._first is None:
            return
        given = () if self._beta.fixed else (beta,)
        if self._second is None:
            self._first(input, target, loss, *given)
        else:
            self._first(input, target, partial, *given)
            self._second(partial, loss)
