"""What a capture keeps of one tensor, and the arrays that this fills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.architecture import Op, TensorSpec, within
from fxray.capture.values import dtype_name
from fxray.draft import Capture
from fxray.errors import SelectionError
from fxray.selections import Mean, NaturalSelection, Norm, Selection, Whole, describe, select
from fxray.store import ArrayInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Field", "Kept", "Site", "Spot", "array_name"]

_LARGE = 1 << 16
"""Elements from which on what a device keeps comes over at once, and not with its row."""


_OWNING = (Mean, Norm, Whole)
"""Selections that never return a part of what they are given: nobody need look."""


def array_name(path: str, kind: str, *rest: str) -> str:
    """Return the name of an array in its stream.

    >>> array_name("lstm", "output", "", "1.0", "mean")
    'lstm.output.1.0.mean'
    """
    return ".".join(part for part in (path, kind, *rest) if part)


@attrs.define(eq=False)
class Field:
    """One array that a capture fills.

    Attributes:
        spot: what of.
        key: name of the field among those the selection keeps; `""` where it keeps one.
        info: what the array is.
        dtype: of its records.
        dims: of a record.
        filled: whether a record of it was ever written.
    """

    spot: Spot
    key: str
    info: ArrayInfo
    dtype: torch.dtype
    dims: int
    filled: bool = False

    def forget(self) -> None:
        """Let the array be what the next record makes it, if it has none."""
        if not self.filled:
            self.spot.fields.pop(self.key, None)


Kept = dict[Field, tuple[torch.Tensor, tuple[int, ...]]]
"""What was kept, each with the size of the tensor that it was selected of."""


@attrs.frozen(eq=False)
class Site:
    """One capture, and the op it is of.

    Attributes:
        lane: index of its lane among those of the module.
        module: name of the module, `""` where a run records only one.
        key: path and kind, which name a capture of the module.
        name: path and kind, which name a capture of the run.
        is_gradient: whether its kind is that of output gradients.
        spots: of every tensor it was taken of, by item or parameter.
    """

    capture: Capture
    op: Op
    lane: int
    module: str = ""
    key: tuple[str, str] = attrs.field(init=False)
    name: tuple[str, str] = attrs.field(init=False)
    is_gradient: bool = attrs.field(init=False)
    spots: dict[str, Spot] = attrs.field(factory=dict, init=False)

    @key.default
    def _key(self) -> tuple[str, str]:
        return self.capture.op, self.capture.kind

    @name.default
    def _name(self) -> tuple[str, str]:
        return within(self.module, self.capture.op), self.capture.kind

    @is_gradient.default
    def _is_gradient(self) -> bool:
        return self.capture.kind == "grad"

    def spot(self, item: str) -> Spot:
        """Return the spot of one item of what the op gave, or of one parameter."""
        found = self.spots.get(item)
        if found is None:
            found = self.spots[item] = Spot(self, item)
        return found


class Spot:
    """One tensor of a capture: what is kept of it."""

    __slots__ = ("fields", "item", "owns", "selection", "site")

    def __init__(self, site: Site, item: str) -> None:
        self.site, self.item = site, item
        self.selection: Selection = site.capture.selection
        self.owns = type(self.selection) in _OWNING
        self.fields: dict[str, Field] = {}

    def take(self, kept: Kept, tensor: torch.Tensor) -> None:
        """Put into `kept` what the selection keeps of `tensor`; raises what that raises."""
        given = tensor.detach()
        if given.layout is not torch.strided:
            self.put(kept, select(self.selection, given), tensor.shape)
            return
        result: Any = self.selection.make_selection(given)
        # Most keep one plain tensor, as they did before.
        field = self.fields.get("")
        if (
            field is not None
            and type(result) is torch.Tensor
            and result.dtype is field.dtype
            and result.dim() == field.dims
            and (field.dims == 0 or result.is_cpu)
            and (self.owns or _are_own((result,), given))
        ):
            kept[field] = (result, tensor.shape)
            return
        fields = _own_fields(result, given)
        if fields is None:
            fields = select(_Made(self.selection, result), given)
        self.put(kept, fields, tensor.shape)

    def put(self, kept: Kept, fields: Mapping[str, torch.Tensor], size: tuple[int, ...]) -> None:
        """Put what a selection kept of a tensor of that size into `kept`.

        Raises:
            SelectionError: a field is of another dtype, or has other dims, than before.
        """
        for key, tensor in fields.items():
            field = self.fields.get(key)
            if field is None:
                field = self.fields[key] = self._field(key, tensor, size)
            elif tensor.dtype is not field.dtype or tensor.dim() != field.dims:
                was = TensorSpec(field.info.shape, field.info.dtype)
                msg = (
                    f"it kept {was} before and {TensorSpec.of(tensor)} now; an array has one "
                    "dtype and as many dims"
                )
                raise SelectionError(msg)
            if not tensor.is_cpu and tensor.numel() > _LARGE:
                tensor = tensor.cpu()  # noqa: PLW2901 - rows wait, and would fill the device
            kept[field] = (tensor, size)

    def _field(self, key: str, tensor: torch.Tensor, size: tuple[int, ...]) -> Field:
        site = self.site
        of_parameter = site.capture.kind in ("weight", "weight_grad")
        told = {
            "op": within(site.module, site.op.path),
            "type": site.op.type,
            "kind": site.capture.kind,
            "parameter": self.item if of_parameter else "",
            "item": "" if of_parameter else self.item,
            "field": key,
            "selection": describe(self.selection),
            "size": list(size),
            # A selection that keeps every dim keeps what they mean.
            "axes": NaturalSelection(site.capture.axes or None).axes_of(tensor.dim()),
        }
        name = array_name(*site.name, self.item, key)
        info = ArrayInfo(name, dtype_name(tensor), tuple(tensor.shape), told)
        return Field(self, key, info, tensor.dtype, tensor.dim())


def _own_fields(result: Any, given: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
    """Return by field what most selections return: plain tensors that own their memory.

    None where `select` must look, which does the same for anything, and costs more.
    """
    if type(result) is torch.Tensor:
        fields = {"": result}
    elif type(result) is dict and result and all(map(_is_name, result)):
        fields = result
    else:
        return None
    return fields if _are_own(fields.values(), given) else None


def _are_own(tensors: Iterable[Any], given: torch.Tensor) -> bool:
    """Return whether all are plain tensors with another storage than `given`."""
    try:
        there = given.untyped_storage().data_ptr()
        for tensor in tensors:
            if (
                type(tensor) is not torch.Tensor
                or tensor.layout is not torch.strided
                or tensor.requires_grad
                or tensor.untyped_storage().data_ptr() == there
            ):
                return False
    except (RuntimeError, NotImplementedError):  # a tensor class without storage
        return False
    return True


def _is_name(key: Any) -> bool:
    return type(key) is str and key.isidentifier()


@attrs.frozen(eq=False, repr=False)
class _Made:
    """A selection that was made already, of the one tensor it is asked about."""

    selection: Selection
    result: Any

    def make_selection(self, _tensor: torch.Tensor) -> Any:
        return self.result

    def __repr__(self) -> str:
        return repr(self.selection)
