"""The loss in one pass over input and target, as kernels of OpenAI's Triton, the compiler.

Each input is read once and each output written once. The elements have the form of
`graph.functions.SmoothL1LossTerms`. A reduction is seen as rows to be added up, a full one as a
single row. What is added up in which format:

1. float32: each loss in float64, exact to 2^-29 for 2^24 of them, and no mean overflows on the way.
   A GPU for games adds 2 float64 numbers a clock and multiprocessor, 1/64 of its float32: a
   conversion and an addition an element take 32 % (L4) to 84 % (RTX 3090) of that rate where memory
   gives its utmost, by the data sheets. So memory stays the limit.
2. float16, bfloat16: elements come twice as fast, beyond that rate. Four losses at a time are
   added in float32, 2^-22 at worst where the result holds 2^-9, then in float64. Each is
   quartered before, so that no four of them overflow.
3. float64: two numbers a sum, which hold what each addition rounds away (Knuth's TwoSum), because
   the result must be as exact as the sum. There memory is the limit on data center cards alone.

Sums are in an order that depends on shapes alone, without atomics: the same bits every time. Only
their last step differs under the interpreter, which takes a millisecond an element of `tl.reduce`.

bfloat16 is read and written as its bits, int16: the interpreter of Triton 3.9 truncates to bfloat16
and spoils its subnormals. On a GPU it is a shift in and four operations out.

The sizes below are an estimate; no GPU has run this module yet.
"""

# Triton reads the source of these functions, and their annotations as objects.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "Launch", "Losses", "Plan", "Rows", "plan"]

_BLOCK, _BLOCK_WARPS = 2048, 4  # elements of a tile of `none`, and the warps on it
_TILE, _TILE_WARPS = 4096, 8  # and of a reduction
_FEW = 4  # tiles of a row that one program adds up alone: one launch
_PROGRAMS = 2048  # in which a reduction is cut at most; each leaves one partial sum
_AS_WRITTEN = {"enable_fp_fusion": False}  # a product and a sum are two roundings, as interpreted


@triton.jit
def _widened(values):
    """float32 of narrower numbers, float64 as it is."""
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
def _losses(input, target, beta):
    """Of each element, in float32 or float64; NaN for a beta that is none."""
    difference = _widened(input) - _widened(target)
    threshold = beta.to(difference.dtype)
    divisor = tl.where(threshold == 0, 1.0, float("nan")).to(difference.dtype)
    divisor = tl.where(threshold > 0, threshold, divisor)
    core = tl.minimum(tl.maximum(difference, -threshold), threshold)
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
        # Of no use to a GPU: every thread would add up everything.
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
def _finish(high, low, columns, MEAN: tl.constexpr, RUN: tl.constexpr, TYPE: tl.constexpr):
    # What an infinite sum lost is NaN.
    total = tl.where(low == low, high + low, high) * RUN
    if MEAN:
        total = total / columns
    return _rounded(total, TYPE)


@triton.jit
def _write_losses(input, target, beta, loss, count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    here = index < tl.minimum(count - start, BLOCK).to(tl.int32)
    left = tl.load(input + start + index, mask=here, other=0)
    right = tl.load(target + start + index, mask=here, other=0)
    losses = _losses(left, right, tl.load(beta))
    tl.store(loss + start + index, _rounded(losses, loss.dtype.element_ty), mask=here)


@triton.jit
def _sum_rows(
    input, target, beta, output, rows, columns, tiles, parts, MEAN: tl.constexpr,
    FINAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    EXACT: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Add up `tiles` tiles of ROWS rows; write the loss (FINAL), or a float64 partial sum.

    Partial sums are in `output` as [rows, parts], and what they lost (EXACT) as much again.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    part = tl.program_id(1).to(tl.int64)
    start = part * tiles * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    some = row < tl.minimum(rows - first, ROWS).to(tl.int32)
    offset = row[:, None] * columns + column[None, :]
    threshold = tl.load(beta)
    high = tl.full((ROWS, COLUMNS // RUN), 0.0, tl.float64)
    low = tl.full((ROWS, COLUMNS // RUN), 0.0, tl.float64)
    for _ in range(0, tiles):
        base = first * columns + start
        more = column < tl.minimum(tl.maximum(columns - start, 0), COLUMNS).to(tl.int32)
        here = some[:, None] & more[None, :]
        left = tl.load(input + base + offset, mask=here, other=0)
        right = tl.load(target + base + offset, mask=here, other=0)
        losses = _losses(left, right, threshold)
        if EXACT:
            high, lost = _two_sum(high, losses)
            low += lost
        else:
            if RUN == 4:
                losses *= 0.25
                one, two = tl.split(tl.reshape(losses, (ROWS, COLUMNS // 2, 2)))
                one, two = tl.split(tl.reshape(one + two, (ROWS, COLUMNS // 4, 2)))
                losses = one + two
            high += losses.to(tl.float64)
        start += COLUMNS
    high, low = _total(high, low, EXACT, UNROLLED)
    index = first + row
    if FINAL:
        value = _finish(high, low, columns, MEAN, RUN, output.dtype.element_ty)
        tl.store(output + index, value, mask=some)
    else:
        tl.store(output + index * parts + part, high, mask=some)
        if EXACT:
            tl.store(output + (rows + index) * parts + part, low, mask=some)


@triton.jit
def _combine(
    partial, loss, rows, columns, parts, MEAN: tl.constexpr, SIZE: tl.constexpr,
    RUN: tl.constexpr, EXACT: tl.constexpr, UNROLLED: tl.constexpr,
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
    value = _finish(high, low, columns, MEAN, RUN, loss.dtype.element_ty)
    tl.store(loss + row + tl.arange(0, 1), value)


#: Whether TRITON_INTERPRET was set when Python came here; it is too late afterwards.
INTERPRETED = not isinstance(_write_losses, triton.JITFunction)


@dataclass(frozen=True, slots=True)
class Plan:
    """How `rows` rows of `columns` elements are added up; it depends on nothing else.

    Attributes:
        tile: rows and columns that a program reads at a time, powers of two.
        tiles: that a program reads one after the other, along a row.
        programs: over the rows, and along a row. Where a row takes more than one, each leaves a
            partial sum, and a second launch adds them up.
    """

    rows: int
    columns: int
    tile: tuple[int, int]
    tiles: int
    programs: tuple[int, int]

    @property
    def scratch(self) -> int:
        """float64 numbers that the partial sums take, with what they lost; 0 for one launch."""
        return 2 * self.rows * self.programs[1] if self.programs[1] > 1 else 0


def plan(rows: int, columns: int, *, one_launch: bool = False) -> Plan:
    """One launch for short rows or many, or where it is asked for; two for others."""
    width = min(max(_power(columns), 16), _TILE)
    height = min(_power(rows), _TILE // width)
    across, down = -(-columns // width), -(-rows // height)
    parts = 1 if one_launch or across <= _FEW else max(1, min(across, _PROGRAMS // max(down, 1)))
    tiles = -(-across // parts)
    return Plan(rows, columns, (height, width), tiles, (down, max(1, -(-across // max(tiles, 1)))))


def _power(number: int) -> int:
    """The smallest power of two that is at least the number."""
    return 1 << max(number - 1, 0).bit_length()


class Launch:
    """A kernel on a grid, with its numbers; after the first call without Triton's own preparation.

    To find a compiled kernel by its arguments takes Triton longer than PyTorch takes for a small
    loss altogether. What decides which it is, the caller holds still.

    Args:
        kernel: takes tensors, then `numbers`, then `constants`, in this order.
        grid: programs along each axis.
        numbers: integers.
        constants: by name, in the order of the kernel's parameters.
        warps: a program's.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...],
        constants: dict[str, Any], warps: int,
    ) -> None:  # fmt: skip
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._numbers, self._constants, self._warps = numbers, constants, warps
        self._rest = (*numbers, *constants.values())
        self._compiled: Callable[..., object] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch it on tensors, of one set of dtypes and of divisors (16) of their addresses."""
        if self._compiled is not None:
            self._compiled(*tensors, *self._rest)
            return
        compiled = self._kernel[self._grid](
            *tensors, *self._numbers, **self._constants, num_warps=self._warps, **_AS_WRITTEN
        )
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled = compiled[self._grid]


class Losses:
    """`none`: the losses of `count` elements."""

    scratch = 0

    def __init__(self, count: int) -> None:
        grid = (-(-count // _BLOCK),)
        constants = {"BLOCK": _BLOCK}
        self._launch = (
            Launch(_write_losses, grid, (count,), constants, _BLOCK_WARPS) if count else None
        )

    def __call__(self, input: Any, target: Any, beta: Any, loss: Any, partial: Any) -> None:
        """Launch it on contiguous tensors of one dtype, bfloat16 as int16.

        beta has rank 0 and lies on the device, so that no call waits for it. `partial` is not used.
        """
        if self._launch is not None:
            self._launch(input, target, beta, loss)


class Rows:
    """The sums, or means, of rows: one number a row.

    Args:
        how: `plan(rows, columns)`.
        item: bytes of an element of the input.
        mean: divide by `how.columns`; the mean of nothing is NaN.

    Attributes:
        scratch: float64 numbers that `partial` has to hold.
    """

    def __init__(self, how: Plan, item: int, *, mean: bool) -> None:
        self.scratch = how.scratch
        self._first: Launch | None = None
        self._second: Launch | None = None
        if not how.rows:
            return
        height, width = how.tile
        down, parts = how.programs
        numbers = how.rows, how.columns, how.tiles, parts
        form: dict[str, Any] = {"RUN": 4 if item == 2 else 1, "EXACT": item == 8,
                                "UNROLLED": INTERPRETED}  # fmt: skip
        constants = {"MEAN": mean, "FINAL": parts == 1, "ROWS": height, "COLUMNS": width, **form}
        self._first = Launch(_sum_rows, (down, parts), numbers, constants, _TILE_WARPS)
        if parts > 1:
            constants = {"MEAN": mean, "SIZE": _power(parts), **form}
            self._second = Launch(
                _combine, (how.rows,), (how.rows, how.columns, parts), constants, _TILE_WARPS
            )

    def __call__(self, input: Any, target: Any, beta: Any, loss: Any, partial: Any) -> None:
        """Launch it on contiguous tensors, bfloat16 as int16; `partial` is float64."""
        if self._first is None:
            return
        if self._second is None:
            self._first(input, target, beta, loss)
        else:
            self._first(input, target, beta, partial)
            self._second(partial, loss)
