"""The nine numbers of `Stats`, from one reading of a tensor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch

from fxray.selections.dtypes import as_real, wide_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["numbers_in_blocks", "numbers_in_one_loop", "reads_values"]

SMALL = 16_384
"""Elements up to which a call into torch costs more than what it reckons."""

BLOCK = 1_048_576
"""Bytes that stay in a core's second-level cache while each reduction passes over them."""

COUNTED = 2**24
"""Elements up to which a float32 counts without rounding."""

SHARE = 1 / 16
"""Below this share of the sum of squares, what the square of the mean leaves has cancelled."""


def reads_values(tensor: torch.Tensor) -> bool:
    """Return whether python may look at the values: eager, and nothing has to be waited for."""
    # A fake or functional tensor says it is on the CPU too; it is of a class of its own.
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return plain and tensor.is_cpu and not torch.compiler.is_compiling()


# Compiled, and eager where a value read would be waited for


def numbers_in_one_loop(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the nine fields, in ops of which Inductor makes one loop over the elements.

    Args:
        tensor: at least one element, any dtype and device.
    """
    real, size = as_real(tensor), tensor.numel()
    # Without a pivot the difference of mean squares cancels, and Welford's mean in float32 stops
    # moving, where the values lie far from zero. An element of the data is one that cannot be so
    # far off that float64 does not bear it: it is one of those whose spread is asked for.
    pivot = real[(0,) * real.dim()]
    if real.is_cpu:
        start = pivot.double()
        away = real.double() - start
        shift = away.mean()
        variance = ((away * away).mean() - shift * shift).clamp_min(0)
        mean = start + shift
    else:  # few accelerators are fast in float64, and Welford's loop is their own
        variance, shift = torch.var_mean(real - pivot, correction=0)
        mean = pivot + shift
    norm = (size * (variance + mean * mean)).sqrt()
    std, low, high = variance.sqrt(), real.amin(), real.amax()
    nan = inf = torch.zeros((), dtype=torch.int64, device=real.device)
    if tensor.is_floating_point() or tensor.is_complex():
        # torch.isnan and torch.isinf: Inductor leaves the vector registers for those.
        nan, inf = _tally(real != real, size), _tally(real.abs() == math.inf, size)  # noqa: PLR0124
        odd = nan + inf > 0
        # What is odd has made the lowest or the highest NaN or infinite, and they say how.
        mean = torch.where(odd, low + high, mean)
        std = torch.where(odd, math.nan, std)
        norm = torch.where(odd, torch.maximum(low.abs(), high.abs()), norm)
    return {
        "count": torch.full((), size, dtype=torch.int64, device=real.device),
        "nan": nan,
        "inf": inf.clone(),
        "mean": mean.to(real.dtype),
        "std": std.to(real.dtype),
        "min": low,
        "max": high,
        "norm": norm.to(real.dtype),
        "fraction_zero": _tally(real == 0, size).to(real.dtype) / size,
    }


def _tally(mask: torch.Tensor, size: int) -> torch.Tensor:
    # An int32 fills as many lanes of a register as the floats beside it.
    narrow = torch.int32 if size < 2**31 else torch.int64
    return mask.sum(dtype=narrow).to(torch.int64)


# Eager on a CPU


@attrs.define
class Sums:
    """What is known of the elements met so far, in python's float64.

    Attributes:
        size, zeros, nan, inf: how many elements; how many of them are so.
        mean: of all.
        spread: the sum of the squared distances from the mean.
        low: the lowest.
        high: the highest.
    """

    size: int = 0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    mean: float = 0.0
    spread: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, other: Sums) -> None:
        """Take in the elements that `other` is about (Chan, Golub and LeVeque's formula)."""
        size, apart = self.size + other.size, other.mean - self.mean
        self.mean += apart * (other.size / size)
        self.spread += other.spread + apart * apart * (self.size * (other.size / size))
        self.size, self.zeros = size, self.zeros + other.zeros
        self.nan, self.inf = self.nan + other.nan, self.inf + other.inf
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


def numbers_in_blocks(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the nine fields, each element fetched from memory once.

    Args:
        tensor: at least one element, any dtype, on the CPU.
    """
    size, dtype = tensor.numel(), wide_dtype(tensor.dtype).to_real()
    fields = _at_once(as_real(tensor), size, dtype) if size <= SMALL else None
    if fields is not None:
        return fields
    block = min(BLOCK * torch.get_num_threads() // dtype.itemsize, COUNTED)
    room = torch.empty(min(block, size), dtype=dtype)  # once, since fresh memory is slow
    sums = Sums()
    for piece in _pieces(_by_stride(tensor), block):
        # Where memory is skipped, a reduction is ten times slower than a copy.
        real = as_real(piece).contiguous().view(-1)
        sums.add(_sums(real, room[: len(real)]))
    return _fields(sums, dtype)


def _at_once(real: torch.Tensor, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Return the fields of few elements in few calls; None where squares do not bear it."""
    # Every call costs more than its loop: what torch returns is kept as it is.
    norm = torch.linalg.vector_norm(real)
    length = norm.item()
    square = length * length  # ** raises where this is infinite
    if not _floor(dtype) < square < math.inf:
        return None
    mean = real.sum().item() / size
    spread = square - mean * mean * size
    if spread < square * SHARE:
        mean, spread = _about_centre(real, mean)
    low, high = torch.aminmax(real)
    zeros = 0
    if low.item() <= 0 <= high.item():
        zeros = size - int(torch.count_nonzero(real).item())
    number = torch.scalar_tensor
    return {
        "count": number(size, dtype=torch.int64),
        "nan": number(0, dtype=torch.int64),
        "inf": number(0, dtype=torch.int64),
        "mean": number(mean, dtype=dtype),
        "std": number(math.sqrt(spread / size), dtype=dtype),
        "min": low,
        "max": high,
        "norm": norm,
        "fraction_zero": number(zeros / size, dtype=dtype),
    }


def _about_centre(
    real: torch.Tensor, mean: float, room: torch.Tensor | None = None
) -> tuple[float, float]:
    """Return mean and spread from the distances to about the mean, which do not cancel."""
    # A centre in the dtype of `real`, so that what it is off by is known.
    centre = torch.scalar_tensor(mean, dtype=real.dtype)
    away = torch.sub(real, centre, out=room)
    off, size = away.sum().item() / real.numel(), real.numel()
    return centre.item() + off, max(away.square_().sum().item() - off * off * size, 0.0)


def _floor(dtype: torch.dtype) -> float:
    """Return a sum of squares below which small squares may have been lost as zeros."""
    return 1e-26 if dtype is torch.float32 else 1e-280


def _by_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with its dims in the order in which memory holds them."""
    strides = tensor.stride()
    order = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
    return tensor.permute(order)


def _pieces(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield parts of `tensor`, each of at most `size` elements, that make up all of it."""
    if tensor.numel() <= size:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(size)
    elif (row := tensor[0].numel()) <= size:
        yield from tensor.split(size // row)
    else:
        for part in tensor.unbind():
            yield from _pieces(part, size)


def _sums(real: torch.Tensor, room: torch.Tensor) -> Sums:
    """Return what is to be known of some elements.

    Args:
        real: (n,) float32 or float64.
        room: of the same shape and dtype, to be written to.
    """
    size, low, high = len(real), real.amin().item(), real.amax().item()
    if low == high and math.isfinite(low):
        return Sums(size, zeros=0 if low else size, mean=low, low=low, high=high)
    zeros = 0
    if not (low > 0 or high < 0):
        # Neither to count what is not zero nor to compare into bools is vectorized.
        zero = torch.zeros((), dtype=real.dtype)
        zeros = int(torch.eq(real, zero, out=room).sum().item())
    # torch.dot and vector_norm take half the time and lose half the digits.
    mean, square = real.sum().item() / size, torch.square(real, out=room).sum().item()
    spread = square - mean * mean * size
    if not _floor(real.dtype) < square < math.inf:
        return _widened(real, Sums(size, zeros, low=low, high=high))
    if spread < square * SHARE:
        mean, spread = _about_centre(real, mean, room)
    return Sums(size, zeros, mean=mean, spread=spread, low=low, high=high)


def _widened(real: torch.Tensor, sums: Sums) -> Sums:
    """Return `sums` with what squares in `real`'s dtype are too large, small or odd for."""
    wide = real.double()
    sums.nan = int(torch.count_nonzero(wide.isnan()).item())
    sums.inf = int(torch.count_nonzero(wide.isinf()).item())
    if not sums.nan + sums.inf:
        sums.mean, sums.spread = _about_centre(wide, wide.mean().item())
    return sums


def _fields(sums: Sums, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    size, mean, low, high = sums.size, sums.mean, sums.low, sums.high
    std = math.sqrt(sums.spread / size) if sums.spread >= 0 else math.nan
    norm = math.sqrt(size * (sums.spread / size + mean * mean)) if sums.spread >= 0 else math.nan
    mean = min(max(mean, low), high)  # rounded, it may lie outside
    if sums.nan or sums.inf:
        low, high = (math.nan, math.nan) if sums.nan else (low, high)
        mean, std, norm = low + high, math.nan, max(abs(low), abs(high))
    numbers = {
        "mean": mean,
        "std": std,
        "min": low,
        "max": high,
        "norm": norm,
        "fraction_zero": sums.zeros / size,
    }
    counts = {"count": size, "nan": sums.nan, "inf": sums.inf}
    largest = torch.finfo(dtype).max
    return {
        name: torch.scalar_tensor(count, dtype=torch.int64) for name, count in counts.items()
    } | {
        # scalar_tensor raises where a cast would give infinity.
        name: torch.scalar_tensor(math.inf if value > largest else value, dtype=dtype)
        for name, value in numbers.items()
    }
