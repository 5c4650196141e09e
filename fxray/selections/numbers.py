"""Selections that boil a tensor down to numbers about it."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch

from fxray.architecture import TensorSpec
from fxray.errors import SelectionError
from fxray.selections.dtypes import as_real, scalar, wide_dtype
from fxray.selections.protocol import at_least
from fxray.selections.sums import numbers_in_blocks, numbers_in_one_loop, reads_values

__all__ = ["Histogram", "Mean", "Norm", "Stats"]


@attrs.frozen
class Mean:
    """The mean of all elements: 0-dim; NaN for an empty tensor.

    In float32, or the tensor's own dtype where that is wider (float64 for 32- and 64-bit
    ints); complex for complex tensors.
    """

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean, 0-dim."""
        wide = wide_dtype(tensor.dtype)
        # To name the dtype that it has costs half as much again, and compiled several times.
        return tensor.mean() if tensor.dtype is wide else tensor.mean(dtype=wide)

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of the mean."""
        return scalar(wide_dtype(spec.torch_dtype))


@attrs.frozen
class Norm:
    """The Euclidean norm of all elements: 0-dim float32 or float64; 0 when empty."""

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the norm, 0-dim."""
        wide = wide_dtype(tensor.dtype)
        # Even a `to` that changes nothing costs as much as the norm of a small tensor.
        norm: torch.Tensor = torch.linalg.vector_norm(
            tensor if tensor.dtype is wide else tensor.to(wide)
        )
        return norm

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of the norm."""
        return scalar(wide_dtype(spec.torch_dtype).to_real())


@attrs.frozen
class Stats:
    """What numpy would say about all elements, each a field of 0 dims.

    `count`, `nan`, `inf` int64: how many elements, NaNs, infinities; `mean`, `std` (of the
    population, divided by count), `min`, `max`, `norm` (Euclidean), `fraction_zero`
    float32, or float64 for tensors of float64, complex128 and 32- or 64-bit ints. As in
    numpy a NaN makes all but `fraction_zero` NaN; `nan` and `inf` say why. A complex
    tensor is summed up by its magnitudes. An empty one has norm 0 and no other numbers
    (NaN).
    """

    def make_selection(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the nine fields."""
        if tensor.numel() == 0:
            return _numbers_of_nothing(tensor)
        return (numbers_in_blocks if reads_values(tensor) else numbers_in_one_loop)(tensor)

    def spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Return the specs of the nine fields."""
        real = wide_dtype(spec.torch_dtype).to_real()
        counts = dict.fromkeys(("count", "nan", "inf"), scalar(torch.int64))
        fields = ("mean", "std", "min", "max", "norm", "fraction_zero")
        return counts | dict.fromkeys(fields, scalar(real))


def _numbers_of_nothing(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    dtype = as_real(tensor).dtype
    counts = {key: tensor.new_zeros((), dtype=torch.int64) for key in ("count", "nan", "inf")}
    rest = {
        key: tensor.new_full((), 0.0 if key == "norm" else math.nan, dtype=dtype)
        for key in ("mean", "std", "min", "max", "norm", "fraction_zero")
    }
    return counts | rest


def _pair(ends: Any) -> Any:
    """Return a list, which JSON gives back, as a tuple."""
    return tuple(ends) if isinstance(ends, list) else ends


@attrs.frozen
class Histogram:
    """How many elements fall into each of `bins` equal intervals.

    Fields: `counts` (bins,) int64; `edges` (bins + 1,) float32 or float64. As in numpy an
    interval holds its left edge, the last one both. NaN and infinities are not counted,
    nor is what lies outside a given range. A complex tensor is counted by magnitude.

    Attributes:
        bins: how many intervals.
        range: the lowest and the highest edge; None for those of the finite elements,
            anew at every step (0 and 1 when there are none).
    """

    bins: int = attrs.field(default=64)
    range: tuple[float, float] | None = attrs.field(default=None, converter=_pair)

    @bins.validator
    def _check_bins(self, _: object, bins: object) -> None:
        at_least("bins", bins, 1)

    @range.validator  # noqa: A003 - the field, named as numpy's
    def _check_range(self, _: object, ends: object) -> None:
        pair = ends if isinstance(ends, tuple) and len(ends) == 2 else (1, 0)
        numbers = all(isinstance(end, (int, float)) for end in pair)
        if ends is not None and not (numbers and -math.inf < pair[0] < pair[1] < math.inf):
            msg = f"range={ends!r} is not (lowest, highest), finite; write range=(-1.0, 1.0)"
            raise SelectionError(msg)

    def make_selection(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `counts` and `edges`."""
        real = as_real(tensor).reshape(-1)
        finite = real.isfinite()
        if self.range is None:
            low, high = _finite_ends(real, finite)
            inside = finite
        else:
            low, high = (real.new_full((), end) for end in self.range)
            inside = finite & (real >= low) & (real <= high)
        share = torch.arange(self.bins + 1, dtype=real.dtype, device=real.device) / self.bins
        # high - low can overflow; half of it cannot.
        edges = torch.lerp(low / 2, high / 2, share) * 2
        # Reckoning the place is no faster: rounding must then be undone beside every edge.
        place = torch.bucketize(real, edges, right=True).sub(1).clamp(0, self.bins - 1)
        counts = torch.zeros(self.bins, dtype=torch.int64, device=real.device)
        return {"counts": counts.scatter_add(0, place, inside.to(torch.int64)), "edges": edges}

    def spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Return the specs of `counts` and `edges`."""
        real = scalar(wide_dtype(spec.torch_dtype).to_real()).dtype
        counts = TensorSpec((self.bins,), "int64")
        return {"counts": counts, "edges": TensorSpec((self.bins + 1,), real)}


def _finite_ends(real: torch.Tensor, finite: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and highest finite value, apart, as 0-dim tensors."""
    if real.numel() == 0:
        return real.new_zeros(()), real.new_ones(())
    low = real.masked_fill(~finite, math.inf).amin()
    high = real.masked_fill(~finite, -math.inf).amax()
    none, same = low > high, low == high
    low = torch.where(none, 0.0, torch.where(same, low - 0.5, low)).to(real.dtype)
    high = torch.where(none, 1.0, torch.where(same, high + 0.5, high)).to(real.dtype)
    return low, high
