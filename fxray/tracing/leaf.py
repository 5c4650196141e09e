"""One leaf of a call's arguments: a tensor that varies, a constant that must not."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from fxray.architecture import TensorSpec
from fxray.errors import SpecialisationError
from fxray.tracing.snapshots import is_complete, same, snapshot_with_fields, text_of

__all__ = ["NEVER", "PLAIN", "Leaf", "memory_layout", "same_constant", "short_text"]

_UNSEEN: Any = object()
NEVER = 1 << 62
"""After so many sizes a dim is free: it never is."""

PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
"""Classes of constants that hold no tensor and never change in place."""

_OF_GRAD = frozenset(["requires_grad", "is_leaf", "grad_fn", "grad"])
_OF_LAYOUT = frozenset(
    ["stride", "is_contiguous", "storage_offset", "is_non_overlapping_and_dense"]
)
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


@attrs.frozen
class Leaf:
    """One leaf of the arguments.

    Attributes:
        path: argument name, then the keys that lead to it, e.g. `"batch.image"`.
        spec: shape and dtype when traced, for a tensor; else None.
        constant: the value, for anything that is no tensor.
        free: the dims whose size may differ from call to call, 0 and 1 included.
        grown: the dims that took so many sizes that any of at least 2 is taken to be free.
        shown: the sizes beside the traced one at which a dim gave the same graph.
        fixed: the dims of which a far size gave another graph: never taken to be free.
        dtype: the dtype it must have, None where the forward never looked at one.
        device: the device it must be on, None where the forward never looked at one.
        requires_grad: whether it must, None where the forward never looked.
        contiguous: its `memory_layout`, None where the forward never looked.
        seen: the constant as it was, so that one changed in place is noticed.
    """

    path: str
    spec: TensorSpec | None = None
    constant: Any = None
    free: frozenset[int] = frozenset()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    grown: frozenset[int] = frozenset()
    shown: Mapping[int, frozenset[int]] = attrs.field(factory=dict)
    requires_grad: bool | None = None
    contiguous: tuple[Any, ...] | None = None
    fixed: frozenset[int] = frozenset()
    seen: Any = attrs.field(default=_UNSEEN, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.seen is _UNSEEN:
            plain = self.spec is not None or type(self.constant) in PLAIN
            object.__setattr__(self, "seen", None if plain else snapshot_with_fields(self.constant))

    def accepts(self, dim: int, size: int) -> bool:
        """Return whether a dim may have this size."""
        traced = self.spec is not None and size == self.spec.shape[dim]
        if traced or dim in self.free or size in self.shown.get(dim, ()):
            return True
        return dim in self.grown and size > 1

    def exact(self, tensor: torch.Tensor, reads: frozenset[str]) -> Leaf:
        """Return the leaf with all required of it that the forward looked at in `tensor`.

        Args:
            tensor: what was passed here.
            reads: names of the properties and methods of tensors that the forward read.
        """
        return attrs.evolve(
            self,
            dtype=tensor.dtype if "dtype" in reads else None,
            device=tensor.device if "device" in reads else None,
            requires_grad=tensor.requires_grad if reads & _OF_GRAD else None,
            contiguous=memory_layout(tensor) if reads & _OF_LAYOUT else None,
        )

    def with_shown(self, sizes: Mapping[int, int], free_after: int) -> Leaf:
        """Return the leaf that takes these sizes too, by dim; see `CallSpec.with_shown`."""
        if self.spec is None:
            return self
        shown = {**self.shown}
        for dim, size in sizes.items():
            shown[dim] = shown.get(dim, frozenset()) | {size}
        grown = {d for d, more in shown.items() if len(more | {self.spec.shape[d]}) >= free_after}
        return attrs.evolve(self, shown=shown, grown=(self.grown | grown) - self.fixed)

    def check(self, value: object) -> None:
        """Raise SpecialisationError unless `value` fits what was traced here."""
        if self.spec is None:
            if not same_constant(self.constant, value, self.seen):
                msg = (
                    f"argument {self.path!r} was {self._was(value)} when the model was "
                    f"traced and is {short_text(value)} now; trace again with this value"
                )
                raise SpecialisationError(msg)
            return
        if not isinstance(value, torch.Tensor):
            msg = (
                f"argument {self.path!r} was a tensor {self.spec} when the model was traced "
                f"and is {short_text(value)} now; trace again with this value"
            )
            raise SpecialisationError(msg)
        self._check_shape(value.shape)
        for what in ("dtype", "device", "requires_grad"):
            then, now = getattr(self, what), getattr(value, what)
            if then is not None and then != now:
                msg = (
                    f"{what} of argument {self.path!r} was {then} when the model was traced and is "
                    f"{now} now, and the forward looks at the {what} of a tensor; trace again"
                )
                raise SpecialisationError(msg)
        if self.contiguous is not None and self.contiguous != memory_layout(value):
            msg = (
                f"argument {self.path!r} lies in memory otherwise than when the model was "
                f"traced (its strides are {value.stride()} now), and the forward looks at that; "
                "trace again"
            )
            raise SpecialisationError(msg)

    def _was(self, value: object) -> str:
        changed = self.seen is not None and self.constant is value
        return text_of(self.seen) if changed else short_text(self.constant)

    def _check_shape(self, shape: torch.Size) -> None:
        if self.spec is None:
            return
        traced = self.spec.shape
        if len(shape) != len(traced) or not all(map(self.accepts, range(len(shape)), shape)):
            sizes = ", ".join(self._size_text(dim, size) for dim, size in enumerate(traced))
            msg = (
                f"argument {self.path!r} has shape {tuple(shape)}; the model was traced for "
                f"({sizes}) and no other size was shown to give the same graph. "
                "Trace again with an input of this shape"
            )
            raise SpecialisationError(msg)

    def _size_text(self, dim: int, size: int) -> str:
        if dim in self.free:
            return "any"
        sizes = sorted({size, *self.shown.get(dim, ())})
        if dim in self.grown:
            few = [str(n) for n in sizes if n < 2]
            return " or ".join([*few, "any from 2"])
        return " or ".join(map(str, sizes))


def memory_layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return how a tensor lies in memory: contiguous by which format, else its very strides."""
    formats = []
    for memory_format, dims in zip(_FORMATS, (None, 4, 5), strict=True):
        fits = dims is None or tensor.dim() == dims
        formats.append(fits and tensor.is_contiguous(memory_format=memory_format))
    return tuple(formats) if any(formats) else (*formats, *tensor.stride())


def same_constant(old: object, new: object, seen: object = None) -> bool:
    """Return whether a constant is as it was; `seen` is its snapshot, if it can change in place."""
    if seen is not None:
        now = snapshot_with_fields(new)
        # A config made anew for each call is the same config; an object that hides what it
        # holds is the same only as the very object.
        return same(seen, now) and (
            old is new or is_complete(seen) or (type(old) is type(new) and _equal(old, new))
        )
    return old is new or (not isinstance(new, torch.Tensor) and same(old, new))


def _equal(old: object, new: object) -> bool:
    try:
        return bool(old == new)
    except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything; then they differ
        return False


def short_text(value: object) -> str:
    """Return a value for an error message, a long one cut."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {TensorSpec.of(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
