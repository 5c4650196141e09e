"""The default selection: what a person can look at and follow over steps."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import attrs
import torch

from fxray.architecture import TensorSpec
from fxray.errors import SelectionError
from fxray.selections.protocol import at_least

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NaturalSelection"]


@attrs.frozen
class NaturalSelection:
    """A part of the tensor that a person can look at and follow over steps.

    The first samples, evenly spaced channels, strided space and time, in their natural
    order; of weights evenly spaced filters with their kernels whole. What is kept of
    one sample does not depend on how many samples there are, so a smaller last batch
    keeps the same channels and pixels.

    Attributes:
        axes: one letter per dim: `N` samples, `C` channels, `T` time or tokens,
            `D H W L` space, `O I` what a weight gives and takes, e.g. `"NCHW"`, `"NTC"`,
            `"OIHW"`. None where unknown: all dims are then strided alike. The draft
            binds it by kind and type; a tensor alone cannot say which dim is the batch.
        limit: at most this many elements.
    """

    axes: str | None = attrs.field(default=None)
    limit: int = attrs.field(default=16384)

    @axes.validator
    def _check_axes(self, _: object, axes: object) -> None:
        letters = isinstance(axes, str) and axes.isascii() and axes.isalpha() and axes.isupper()
        if not (axes is None or letters) or axes == "":
            msg = f'axes={axes!r} is not one capital letter per dim; write axes="NCHW" or None'
            raise SelectionError(msg)

    @limit.validator
    def _check_limit(self, _: object, limit: object) -> None:
        at_least("limit", limit, 1)

    def bind(self, axes: str) -> NaturalSelection:
        """Return the selection for `axes`; one that already has axes stays as it is."""
        return self if self.axes else attrs.evolve(self, axes=axes)

    def axes_of(self, ndim: int) -> str:
        """Return the letters of a tensor of `ndim` dims, empty where unknown.

        A vector beside weights (a bias) is `"O"`; otherwise a tensor whose number of
        dims is not that of `axes` is unknown.

        >>> NaturalSelection("OIHW").axes_of(1), NaturalSelection("NCHW").axes_of(3)
        ('O', '')
        """
        axes = self.axes or ""
        if ndim == 1 and axes[:2] in {"O", "OI", "IO"}:
            return "O"
        return axes if len(axes) == ndim else ""

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the kept part, as many dims as `tensor`, contiguous."""
        return tensor[self._index(tensor.shape)].clone(memory_format=torch.contiguous_format)

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of the kept part."""
        kept = [
            len(range(*part.indices(size)))
            for part, size in zip(self._index(spec.shape), spec.shape, strict=True)
        ]
        return TensorSpec(tuple(kept), spec.dtype)

    def _index(self, shape: Sequence[int]) -> tuple[slice, ...]:
        axes = self.axes_of(len(shape)) or "?" * len(shape)
        # Dynamo warns about lru_cache; traced once, it needs none.
        cut = _natural_index if torch.compiler.is_compiling() else _cached_natural_index
        # The batch is hidden: a new batch size must neither miss the cache nor recompile.
        batch = axes.find("N")
        rest = tuple(0 if dim == batch else size for dim, size in enumerate(shape))
        return cut(axes, rest, self.limit)


def _natural_index(axes: str, shape: tuple[int, ...], limit: int) -> tuple[slice, ...]:
    """Return one slice per dim that together keep at most `limit` elements."""
    # The products are of lists: Dynamo cannot trace one of a generator.
    batch = axes.find("N")
    share = limit if batch < 0 else max(1, limit // 4)  # room for the first four samples
    weights = "O" in axes
    coarse = [i for i, axis in enumerate(axes) if axis in ("OI" if weights else "C")]
    fine = [i for i in range(len(axes)) if i not in coarse and i != batch]
    sizes = [shape[i] for i in fine]
    # Kernels stay whole while a single one fits; of feature maps at least 16 channels.
    wish = share // max(1, math.prod(sizes))
    step = _step([shape[i] for i in coarse], min(share, max(wish, 1 if weights else 16)))
    steps = dict.fromkeys(coarse, step)
    used = math.prod([_count(shape[i], step) for i in coarse])
    steps.update(dict.fromkeys(fine, _step(sizes, max(1, share // max(1, used)))))
    kept = math.prod([_count(shape[i], n) for i, n in steps.items()])
    first = max(1, limit // max(1, kept))
    return tuple(
        slice(None, first) if i == batch else slice(None, None, steps[i]) for i in range(len(axes))
    )


_cached_natural_index = lru_cache(maxsize=4096)(_natural_index)


def _count(size: int, step: int) -> int:
    return -(-size // step)


def _step(sizes: Sequence[int], budget: int) -> int:
    """Return the smallest step that, taken along every size, leaves at most `budget`."""
    low, high = 1, max([1, *sizes])
    while low < high:
        middle = (low + high) // 2
        if math.prod([_count(size, middle) for size in sizes]) <= budget:
            high = middle
        else:
            low = middle + 1
    return low
