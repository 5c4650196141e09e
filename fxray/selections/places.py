"""Selections that keep elements as they are, by where they stand."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from fxray.architecture import TensorSpec
from fxray.errors import SelectionError
from fxray.selections.dtypes import as_real
from fxray.selections.protocol import at_least

__all__ = ["Sample", "Slice", "TopK", "Whole"]


@attrs.frozen
class Whole:
    """Every element, in its shape and dtype."""

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of `tensor`."""
        return tensor.clone(memory_format=torch.contiguous_format)

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return `spec` itself."""
        return spec


def _index_text(index: object) -> str:
    """Return an index as canonical text, from text, slices, ints or `...`."""
    if isinstance(index, str):
        return ", ".join(part.replace(" ", "") for part in index.split(","))
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_part_text(part) for part in parts)


def _part_text(part: object) -> str:
    if part is Ellipsis:
        return "..."
    if isinstance(part, slice):
        ends = ("" if end is None else str(end) for end in (part.start, part.stop))
        step = "" if part.step is None else f":{part.step}"
        return ":".join(ends) + step
    return str(part)


def _parse_part(part: str) -> Any:
    if part == "...":
        return Ellipsis
    ends = [int(end) if end else None for end in part.split(":")]
    if len(ends) == 1 and ends[0] is not None:
        return ends[0]
    if len(ends) in {2, 3} and (len(ends) == 2 or ends[2] is None or ends[2] > 0):
        return slice(*ends)
    raise ValueError(part)


@attrs.frozen
class Slice:
    """The part that a basic index picks: `Slice("0:4, ::8")` is `tensor[0:4, ::8]`.

    Attributes:
        index: the index as text: slices with a step of at least 1, ints (which drop
            their dim) and `...`, separated by commas. Slices, ints and tuples of them
            are taken too: `Slice((slice(0, 4), slice(None, None, 8)))`.
    """

    index: str = attrs.field(converter=_index_text)

    @index.validator
    def _check(self, _: object, index: str) -> None:
        try:
            parts = self._parts()
        except ValueError:
            parts = (Ellipsis, Ellipsis)
        if sum(part is Ellipsis for part in parts) > 1:
            msg = (
                f"Slice({index!r}): not a list of slices (step 1 or more), ints and one '...'; "
                f'write for example Slice("0:4, ..., ::8")'
            )
            raise SelectionError(msg)

    def _parts(self) -> tuple[Any, ...]:
        return tuple(_parse_part(part) for part in self.index.split(", "))

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of the part."""
        return tensor[self._parts()].clone(memory_format=torch.contiguous_format)

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of the part; raises IndexError where it does not fit."""
        return TensorSpec.of(
            torch.empty(spec.shape, dtype=spec.torch_dtype, device="meta")[self._parts()]
        )


def _take(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the elements at flat `positions`, without flattening a strided tensor."""
    # torch.take lacks float8 and wide unsigned ints; their bits can be taken as ints.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    taken = torch.take(tensor.view(bits[tensor.itemsize]), positions) if _rare(tensor) else None
    return torch.take(tensor, positions) if taken is None else taken.view(tensor.dtype)


def _rare(tensor: torch.Tensor) -> bool:
    dtype = tensor.dtype
    unsigned = dtype in {torch.uint16, torch.uint32, torch.uint64}
    return unsigned or (dtype.is_floating_point and dtype.itemsize == 1)


def _largest(flat: torch.Tensor, k: int, row: int = 4096) -> torch.Tensor:
    """Return the places of the `k` largest, largest first."""
    rows = flat.numel() // row
    if rows < 16 or k > row // 16:
        return torch.topk(flat, k).indices
    # On a CPU one topk over all is five times slower than the best of each row, then of those.
    best = torch.topk(flat[: rows * row].view(rows, row), k).indices
    best = best + row * torch.arange(rows, device=flat.device).unsqueeze(1)
    rest = torch.arange(rows * row, flat.numel(), device=flat.device)
    places = torch.cat([best.reshape(-1), rest])
    return places[torch.topk(flat[places], k).indices]


@attrs.frozen
class TopK:
    """The `k` elements that are largest in magnitude, with their places.

    Signs are kept: of `[1, -5, 2]` the first is -5. NaN counts as largest, so it comes
    first. A tensor of fewer than `k` elements keeps them all.

    Fields: `values` (k,) in the tensor's dtype, largest magnitude first; `indices` (k,)
    int64, places in the flattened tensor.
    """

    k: int = attrs.field()

    @k.validator
    def _check(self, _: object, k: object) -> None:
        at_least("k", k, 1)

    def make_selection(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `values` and `indices`."""
        magnitude = as_real(tensor).abs().reshape(-1)
        indices = _largest(magnitude, min(self.k, tensor.numel()))
        return {"values": _take(tensor, indices), "indices": indices}

    def spec(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Return the specs of `values` and `indices`."""
        shape = (min(self.k, spec.numel),)
        return {"values": TensorSpec(shape, spec.dtype), "indices": TensorSpec(shape, "int64")}


@attrs.frozen
class Sample:
    """`n` elements at random places, the same at every step for the same shape.

    The flattened tensor is cut into `n` equal runs and one place is drawn in each, so
    the places are distinct, in natural order, and cover all of it. They are a function
    of `n`, `seed` and the number of elements alone, computed where the tensor is.

    Attributes:
        n: how many; a tensor of fewer elements keeps them all.
        seed: another seed gives other places.
    """

    n: int = attrs.field()
    seed: int = attrs.field(default=0)

    @n.validator
    def _check_n(self, _: object, n: object) -> None:
        at_least("n", n, 1)

    @seed.validator
    def _check_seed(self, _: object, seed: object) -> None:
        at_least("seed", seed, 0)

    def positions(self, numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the places (min(n, numel),) int64 in a flattened tensor, ascending."""
        n = min(self.n, numel)
        run = torch.arange(n, device=device)
        # A generator cannot be traced and lives on one device; a hash (31 bits, so that no
        # product overflows) needs neither and is the same everywhere.
        mixed = run + (self.seed * 0x9E3779B1) % 0x7FFFFFFF
        for _ in range(3):
            mixed = (((mixed >> 15) ^ mixed) * 0x45D9F3B) & 0x7FFFFFFF
        first = run * numel // max(n, 1)
        width = (run + 1) * numel // max(n, 1) - first
        return first + mixed % width

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements (n,) in the tensor's dtype."""
        return _take(tensor, self.positions(tensor.numel(), tensor.device))

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of the elements."""
        return TensorSpec((min(self.n, spec.numel),), spec.dtype)
