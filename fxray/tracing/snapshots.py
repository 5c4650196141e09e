"""What a Python value was, as plain data to compare with what it is later."""

from __future__ import annotations

import collections
import enum
import functools
import sys
import types
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

__all__ = [
    "ABSENT",
    "TENSOR",
    "UNKNOWN",
    "Contents",
    "Kind",
    "is_complete",
    "is_plain_object",
    "same",
    "snapshot",
    "snapshot_with_fields",
    "text_of",
]

_VALUES = frozenset(
    [
        *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    ]
)
_CONTAINERS = frozenset(
    [
        *(list, tuple, set, frozenset, dict),
        *(collections.OrderedDict, collections.defaultdict, collections.deque),
    ]
)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, type)
_NOT_PLAIN = sys.stdlib_module_names | {"torch", "numpy"}
_MANY = 1000
_PYTHON_CLASS = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: the class was made by a class statement."""


@attrs.frozen
class Kind:
    """What stands for an object that is no value: its class, or the name it has.

    Attributes:
        name: as a user would say it, e.g. `"torch.nn.functional.gelu"`.
    """

    name: str

    @property
    def is_local(self) -> bool:
        """Whether the name does not say which one it is: a lambda, a function in a function."""
        return "<" in self.name


@attrs.frozen
class Contents:
    """What a container or an object held.

    Attributes:
        kind: the name of its class.
        items: its items as snapshots; of a mapping or an object, (key, snapshot) pairs.
    """

    kind: str
    items: tuple[Any, ...]


ABSENT = Kind("absent")
TENSOR = Kind("a tensor")
UNKNOWN = Kind("")
"""What cannot be compared later, and so is not noted."""


def snapshot(value: Any, depth: int = 3) -> Any:
    """Return what `value` is as plain data: itself, `Contents` or `Kind`; else UNKNOWN."""
    cls = type(value)
    if cls in _VALUES or isinstance(value, enum.Enum):
        return value
    if isinstance(value, torch.Tensor):
        return TENSOR
    named = isinstance(value, tuple) and hasattr(cls, "_fields")
    if depth and (named or cls in _CONTAINERS or cls is types.SimpleNamespace):
        return _contents(value, depth - 1)
    if depth and isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return _known("functools.partial", tuple(snapshot(part, depth - 1) for part in parts))
    return _kind(value)


def _kind(value: Any) -> Kind:
    cls = type(value)
    if isinstance(value, _FUNCTIONS):
        module = getattr(value, "__module__", None)
        # Many of torch's functions are methods of a nameless table.
        name = value.__qualname__.replace("_VariableFunctionsClass.", "")
        return Kind(f"{module}.{name}" if module else name)
    if isinstance(value, nn.Module) or is_plain_object(value):
        return Kind(f"a {cls.__module__}.{cls.__qualname__}")
    return UNKNOWN


def _contents(value: Any, depth: int) -> Any:
    value = vars(value) if isinstance(value, types.SimpleNamespace) else value
    kind = type(value).__qualname__
    if len(value) > _MANY:
        return UNKNOWN
    if isinstance(value, (set, frozenset)):
        return Contents(kind, (frozenset(value),)) if _hold_values(value) else UNKNOWN
    if isinstance(value, dict):
        if not _hold_values(value):
            return UNKNOWN
        return _known(kind, tuple((key, snapshot(item, depth)) for key, item in value.items()))
    return _known(kind, tuple(snapshot(item, depth) for item in value))


def _hold_values(keys: Any) -> bool:
    return all(type(key) in _VALUES or isinstance(key, enum.Enum) for key in keys)


def _known(kind: str, items: tuple[Any, ...]) -> Any:
    inner = [item[1] if type(item) is tuple else item for item in items]
    # A tensor in a list has its place in the graph or none; that it is one says nothing.
    return UNKNOWN if UNKNOWN in inner or TENSOR in inner else Contents(kind, items)


def snapshot_with_fields(value: Any) -> Any:
    """Return `snapshot(value)`, an object of the user's own by its fields, an array by bytes."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return Contents("ndarray", (str(value.dtype), value.shape, value.tobytes()))
    if not is_plain_object(value):
        return snapshot(value)
    fields = {**_slots(value), **getattr(value, "__dict__", {})}
    if len(fields) > _MANY:
        return snapshot(value)
    items = tuple((name, _field(item)) for name, item in fields.items())
    return Contents(type(value).__qualname__, items)


def _field(value: Any) -> Any:
    if not is_plain_object(value):
        return snapshot(value)
    items = ((name, snapshot(item)) for name, item in getattr(value, "__dict__", {}).items())
    return Contents(type(value).__qualname__, tuple(items))


def _slots(value: Any) -> dict[str, Any]:
    names = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def is_plain_object(value: Any) -> bool:
    """Return whether `value` is an object of a class of the user's: a config, a context."""
    cls = type(value)
    if cls.__module__.partition(".")[0] in _NOT_PLAIN or not cls.__flags__ & _PYTHON_CLASS:
        return cls.__module__ == "__main__" and bool(cls.__flags__ & _PYTHON_CLASS)
    return not isinstance(value, (nn.Module, torch.Tensor, type, enum.Enum, np.ndarray))


def same(old: Any, new: Any) -> bool:
    """Return whether two snapshots are alike: `1`, `1.0` and `True` are not, NaN and NaN are."""
    if old is new or type(old) is not type(new):
        return old is new
    if isinstance(old, Contents):
        return old.kind == new.kind and same(old.items, new.items)
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, float) and old != old:  # noqa: PLR0124 - NaN
        return bool(new != new)  # noqa: PLR0124
    try:
        return bool(old == new)
    except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything; then they differ
        return False


def is_complete(seen: Any) -> bool:
    """Return whether a snapshot says all: an equal one is as good as the same object."""
    if isinstance(seen, Contents):
        return is_complete(seen.items)
    if isinstance(seen, tuple):
        return all(map(is_complete, seen))
    return not isinstance(seen, Kind)


def text_of(seen: Any) -> str:
    """Return a snapshot for people, one line of at most 60 characters."""
    text = _text(seen)
    return text if len(text) <= 60 else f"{text[:57]}..."


_BRACKETS = {"list": "[]", "set": "{}", "dict": "{}", "OrderedDict": "{}", "defaultdict": "{}"}


def _text(seen: Any) -> str:
    if isinstance(seen, Kind):
        return seen.name or "another object"
    if not isinstance(seen, Contents):
        return repr(seen)
    items = [*seen.items[0]] if seen.kind in ("set", "frozenset") else [*seen.items]
    if seen.items and all(type(item) is tuple for item in items):
        words = [f"{key!r}: {_text(item)}" for key, item in items]
    else:
        words = [_text(item) for item in items]
    brackets = _BRACKETS.get(seen.kind, "()")
    name = "" if seen.kind in (*_BRACKETS, "tuple") else seen.kind
    return f"{name}{brackets[0]}{', '.join(words)}{brackets[1]}"
