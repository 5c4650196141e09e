"""The tensors in what a module or a function gave back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxray.tracing.snapshots import is_plain_object

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["every_tensor", "fields_of", "tensor_items"]

_DEEPEST = 8


def tensor_items(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (item, tensor) for every tensor in nested tuples, lists and dicts.

    >>> a = torch.zeros(())
    >>> [item for item, _ in tensor_items((a, {"h": a}, [a, None]))]
    ['0', '1.h', '2.0']
    """
    if isinstance(value, torch.Tensor):
        yield prefix, value
        return
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        pairs = enumerate(value)
    else:
        return
    for key, inner in pairs:
        yield from tensor_items(inner, f"{prefix}.{key}" if prefix else str(key))


def fields_of(out: Any) -> Any:
    """Return a dataclass or a mapping as a dict of its fields, anything else as it is.

    A `ModelOutput` of transformers is both; only the fields that are set are in it.
    """
    if isinstance(out, Mapping):
        return {key: fields_of(value) for key, value in out.items()}
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return {f.name: fields_of(getattr(out, f.name)) for f in dataclasses.fields(out)}
    return out


def every_tensor(out: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (item, tensor) for every tensor in `out`, those in objects of its own too."""
    yield from tensor_items(_opened(out, 0))


def _opened(value: Any, depth: int) -> Any:
    if depth > _DEEPEST or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        return {key: _opened(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return [_opened(inner, depth + 1) for inner in value]
    if dataclasses.is_dataclass(value) or is_plain_object(value):
        fields = getattr(value, "__dict__", {})
        return {name: _opened(inner, depth + 1) for name, inner in fields.items()}
    return value
