"""What a selection is, and the few verbs that deal with any of them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import torch

from fxray.architecture import TensorSpec
from fxray.errors import SelectionError

__all__ = ["Selection", "at_least", "check_selection", "describe", "select", "spec_of"]


class Selection(Protocol):
    """Whatever says which numbers of one tensor are kept.

    One method is needed. A class may also have `spec(TensorSpec)`, the shape and dtype
    of what it returns (without it fxray runs it once on zeros), and `bind(axes)`, which
    returns the selection told what the dims mean. Its attrs or dataclass fields, or
    plain attributes, are what the store writes about it.

    >>> import attrs
    >>> @attrs.frozen
    ... class Median:
    ...     def make_selection(self, tensor):
    ...         return tensor.median()
    >>> spec_of(Median(), TensorSpec((2, 3), "float32"))
    TensorSpec(shape=(), dtype='float32')
    """

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Return what to keep of `tensor`, in torch ops, written to nowhere in place.

        Called under `no_grad` with a detached tensor of any shape, dtype and device.
        Named tensors become fields of one series. Where no python branches on values and
        nothing calls `.item()`, `torch.compile` takes it into the model's graph.
        """
        ...


def at_least(name: str, value: object, least: int) -> None:
    """Raise SelectionError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name}={value!r} is not a whole number of at least {least}"
        raise SelectionError(msg)


def check_selection(obj: object) -> None:
    """Check that `obj` can serve as a selection.

    Raises:
        SelectionError: it is a class, or has no method `make_selection`.
    """
    if isinstance(obj, type) and hasattr(obj, "make_selection"):
        msg = f"{obj.__name__} is a class, not a selection; give an instance: {obj.__name__}(...)"
        raise SelectionError(msg)
    if not callable(getattr(obj, "make_selection", None)):
        msg = (
            f"{obj!r} is no selection: {type(obj).__name__} has no method make_selection(tensor) "
            "that returns a tensor or a mapping of tensors; take one of fxray.selections, e.g. "
            "Whole(), or write a class with that method"
        )
        raise SelectionError(msg)


def describe(selection: Selection) -> dict[str, Any]:
    """Return what the store writes about `selection`: its name and settings, JSON-ready.

    >>> from fxray.selections import TopK
    >>> describe(TopK(8))
    {'name': 'fxray.selections.TopK', 'settings': {'k': 8}}
    """
    kind = type(selection)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return {"name": name, "settings": {k: _plain(v) for k, v in _settings(selection).items()}}


def _settings(obj: Any) -> dict[str, Any]:
    if attrs.has(type(obj)):
        fields = attrs.fields(type(obj))
        return {f.alias or f.name: getattr(obj, f.name) for f in fields if f.init}
    if dataclasses.is_dataclass(obj):
        return {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}
    return {k: v for k, v in getattr(obj, "__dict__", {}).items() if not k.startswith("_")}


def _plain(value: Any) -> Any:
    """Return `value` as what JSON holds, and as its repr where it holds nothing like it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        # An address differs from run to run, and would make equal settings differ.
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))[:200]


def spec_of(selection: Selection, spec: TensorSpec) -> TensorSpec | dict[str, TensorSpec]:
    """Return the spec of what `selection` keeps of a tensor of `spec`.

    Asks its method `spec` where it has one; else runs it on zeros on the CPU.

    Raises:
        SelectionError: it fails on such a tensor, or returns something else.
    """
    ask = getattr(selection, "spec", None)
    try:
        if callable(ask):
            return _checked_spec(selection, ask(spec))
        with torch.no_grad():
            zeros = torch.zeros(spec.shape, dtype=spec.torch_dtype)
            kept = {key: TensorSpec.of(t) for key, t in select(selection, zeros).items()}
    except SelectionError:
        raise
    except Exception as error:
        msg = f"{selection!r} fails on {spec}: {type(error).__name__}: {error}"
        raise SelectionError(msg) from error
    return kept.get("", kept)


def _checked_spec(selection: Selection, result: object) -> TensorSpec | dict[str, TensorSpec]:
    if isinstance(result, TensorSpec):
        return result
    if isinstance(result, Mapping) and result:
        _check_fields(selection, result, TensorSpec)
        return dict(result)
    msg = f"{selection!r}.spec returned {type(result).__name__}, not a TensorSpec or a mapping"
    raise SelectionError(msg)


def select(selection: Selection, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `selection` keeps of `tensor`, by field; a single tensor as field `""`.

    What is returned owns its memory: a result that shares storage with `tensor` is copied.
    A sparse tensor is made dense before, a sparse result after.
    (Not while compiling, where that cannot be seen: there whoever takes it must copy.)

    Raises:
        SelectionError: the result is not a tensor or a mapping of tensors.
    """
    if tensor.layout is not torch.strided:  # a sparse gradient; few ops know those
        tensor = tensor.to_dense()
    result: Any = selection.make_selection(tensor)  # a stranger's: checked below
    if isinstance(result, torch.Tensor):
        return {"": _owned(result, tensor)}
    if not isinstance(result, Mapping) or not result:
        msg = (
            f"{selection!r}.make_selection returned {_name_of(result)}, not a tensor or a mapping "
            "of names to tensors; a number: return tensor.mean(), not tensor.mean().item()"
        )
        raise SelectionError(msg)
    _check_fields(selection, result, torch.Tensor)
    return {key: _owned(value, tensor) for key, value in result.items()}


def _name_of(result: object) -> str:
    return "an empty mapping" if isinstance(result, Mapping) else type(result).__name__


def _check_fields(selection: Selection, result: Mapping[Any, Any], kind: type) -> None:
    for key, value in result.items():
        # Field names become parts of array names, which dots join.
        if not isinstance(key, str) or not key.isidentifier():
            msg = f"{selection!r} names a field {key!r}; a field is named like a python variable"
            raise SelectionError(msg)
        if not isinstance(value, kind):
            msg = f"{selection!r} field {key!r} is {type(value).__name__}, not {kind.__name__}"
            raise SelectionError(msg)


def _owned(result: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return result
    result = result.detach()
    if result.layout is not torch.strided:
        return result.to_dense()
    if _shares(result, tensor):
        result = result.clone(memory_format=torch.contiguous_format)
    return result


def _shares(result: torch.Tensor, tensor: torch.Tensor) -> bool:
    try:
        there = result.untyped_storage().data_ptr()
        return there == tensor.untyped_storage().data_ptr() and there != 0
    except (RuntimeError, NotImplementedError):  # a tensor class without storage
        return True
