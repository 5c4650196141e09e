"""What a Python value was, as plain data to compare with what it is later."""

from __future__ import annotations

import argparse
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
    "Identities",
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
_BASES = (int, float, complex, str, bytes)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, type)
_NOT_PLAIN = sys.stdlib_module_names | {"torch", "numpy"}
_MANY = 1000
_MOST = 10_000
_MANY_BYTES = 1 << 16
_PYTHON_CLASS = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: the class was made by a class statement."""


@attrs.frozen
class Kind:
    """What stands for an object that is no value: its class, or the name it has.

    Attributes:
        name: as a user would say it, e.g. `"torch.nn.functional.gelu"`.
        itself: whether only the object itself is as good; its name says next to nothing.
    """

    name: str
    itself: bool = False

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
"""What the forward made itself, and so is not noted."""


def snapshot(value: Any, depth: int = 6) -> Any:
    """Return what `value` is as plain data: itself, `Contents` or `Kind`."""
    return _snapshot(value, depth, [_MOST])


def _snapshot(value: Any, depth: int, budget: list[int]) -> Any:  # noqa: PLR0911
    cls = type(value)
    if cls in _VALUES or isinstance(value, enum.Enum):
        return value
    if isinstance(value, torch.Tensor):
        return TENSOR
    if isinstance(value, np.generic):
        return value if value.dtype.kind in "biufcSUmM" else _itself(value)
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= _MANY_BYTES:
        return Contents("ndarray", (str(value.dtype), value.shape, value.tobytes()))
    for base in _BASES:
        if isinstance(value, base):
            return Contents(cls.__qualname__, (_base_value(base, value),))
    parts = _parts(value)
    if parts is None:
        return _kind(value)
    budget[0] -= len(parts)
    if not depth or len(parts) > _MANY or budget[0] < 0:
        return _itself(value, f" of {len(parts)} items")
    return _contents(value, parts, depth - 1, budget)


def _base_value(base: type, value: Any) -> Any:
    # Not by what the subclass makes of it: its own __int__ or __str__ may say anything.
    made = base.__getnewargs__(value)  # type: ignore[attr-defined]
    return made[0] if base is not complex else complex(*made)


def _contents(value: Any, parts: Any, depth: int, budget: list[int]) -> Any:
    kind = type(parts if isinstance(value, types.SimpleNamespace) else value).__qualname__
    if isinstance(value, functools.partial):
        kind = "functools.partial"
    if isinstance(parts, dict):
        pairs = tuple((_key(key), _item(item, depth, budget)) for key, item in dict.items(parts))
        return Contents(kind, pairs)
    if isinstance(parts, (set, frozenset)):
        return Contents(kind, (frozenset(parts),)) if _hold_values(parts) else _itself(value)
    return Contents(kind, tuple(_item(item, depth, budget) for item in parts))


def _key(key: Any) -> Any:
    return key if _hold_values((key,)) else _itself(key)


def _item(value: Any, depth: int, budget: list[int]) -> Any:
    seen = _snapshot(value, depth, budget)
    if isinstance(seen, Kind) and is_plain_object(value):
        fields = getattr(value, "__dict__", {})
        budget[0] -= len(fields)
        if depth and len(fields) <= _MANY and budget[0] >= 0:
            items = ((key, _item(item, depth - 1, budget)) for key, item in fields.items())
            return Contents(type(value).__qualname__, tuple(items))
    return seen


def _parts(value: Any) -> Any:
    """Return what holds the items of a container, None where `value` is none."""
    if isinstance(value, types.SimpleNamespace):
        return vars(value)
    if isinstance(value, (collections.UserDict, collections.UserList)):
        return value.data
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return (
        value if isinstance(value, (list, tuple, dict, set, frozenset, collections.deque)) else None
    )


def _itself(value: Any, more: str = "") -> Kind:
    return Kind(f"a {type(value).__module__}.{type(value).__qualname__}{more}", itself=True)


def _kind(value: Any) -> Kind:
    cls = type(value)
    if isinstance(value, _FUNCTIONS):
        module = getattr(value, "__module__", None)
        # Many of torch's functions are methods of a nameless table.
        name = value.__qualname__.replace("_VariableFunctionsClass.", "")
        return Kind(f"{module}.{name}" if module else name)
    if isinstance(value, nn.Module) or is_plain_object(value):
        return Kind(f"a {cls.__module__}.{cls.__qualname__}")
    return _itself(value)


def _hold_values(keys: Any) -> bool:
    return all(type(key) in _VALUES or isinstance(key, enum.Enum) for key in keys)


class Identities:
    """The objects that a value holds, to ask at each call whether they are the very ones.

    Attributes:
        objects: the value itself, then its items, and theirs.
        live: what to go through again; gives `objects` without the value itself.
        long: the containers too long for that, of which only the length counts.
        arrays: the arrays small enough to compare by what they hold.
    """

    def __init__(self, value: Any) -> None:
        self.objects: list[Any] = [value]
        self.live: list[Any] = []
        self.long: list[Any] = []
        self.arrays: list[Any] = []
        self._seen: set[int] = set()
        self._left = _MOST
        self._walk(value, 6, top=True)

    def _walk(self, value: Any, depth: int, *, top: bool = False) -> None:
        if isinstance(value, np.ndarray):
            if value.dtype != object and value.nbytes <= _MANY_BYTES:
                self.arrays.append(value)
            return
        parts = _parts(value)
        if parts is None and not top and is_plain_object(value):
            parts = getattr(value, "__dict__", None)
        if parts is None or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._left -= len(parts)
        if not depth or len(parts) > _MANY or self._left < 0:
            self.long.append(parts)
            return
        views: list[Any] = [parts.keys(), parts.values()] if isinstance(parts, dict) else [parts]
        inner: list[Any] = []
        for view in views:
            self.live.append(view)
            inner = [*view]
            self.objects += inner
        for item in inner:
            self._walk(item, depth - 1)

    def are(self, other: Identities) -> bool:
        """Return whether both hold the same objects; equal plain values are the same."""
        one, two = self.objects, other.objects
        return len(one) == len(two) and all(map(_alike, one, two))


def _alike(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new) or (_parts(old) is None and is_plain_object(old)):
        return False
    if _parts(old) is not None and len(_parts(old)) <= _MANY:
        return True  # its items follow
    seen = snapshot(old)
    return is_complete(seen) and same(seen, snapshot(new))


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
    if isinstance(value, argparse.Namespace):
        return True
    if cls.__module__.partition(".")[0] in _NOT_PLAIN or not cls.__flags__ & _PYTHON_CLASS:
        return cls.__module__ == "__main__" and bool(cls.__flags__ & _PYTHON_CLASS)
    return not isinstance(value, (nn.Module, torch.Tensor, type, enum.Enum, np.ndarray))


def same(old: Any, new: Any) -> bool:  # noqa: PLR0911
    """Return whether two snapshots are alike: `1`, `1.0` and `True` are not, NaN and NaN are."""
    if old is new or type(old) is not type(new):
        return old is new
    if isinstance(old, Contents):
        return old.kind == new.kind and same(old.items, new.items)
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, (float, complex, np.inexact)):
        if old != old:  # noqa: PLR0124 - NaN
            return bool(new != new)  # noqa: PLR0124
        return bool(old == new and repr(old) == repr(new))  # 0.0 is not -0.0
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
