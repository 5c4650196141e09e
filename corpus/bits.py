"""Any value as it is now, to the bit, and the first place where two of them differ."""

from __future__ import annotations

import collections
import enum
import types
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

__all__ = ["UNINITIALIZED", "Frozen", "differs", "frozen", "same_numbers", "tensors_in"]

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), enum.Enum, type, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
UNINITIALIZED = (nn.UninitializedParameter, nn.UninitializedBuffer)

_CLOSED = (nn.Module, types.ModuleType)
"""Their parts are theirs: a module's are looked at where it stands."""

_MOST = 80
_BUILT_IN = (dict, list, tuple, set, frozenset, collections.deque)


@attrs.frozen(eq=False)
class Frozen:
    """A value as it was: its class, what it says of itself, and its parts by name."""

    kind: type
    says: Any = None
    numbers: torch.Tensor | None = None
    parts: tuple[tuple[str, Frozen], ...] = ()
    own: int | None = None


def frozen(value: Any, *, identity: bool = False) -> Frozen:
    """Return `value` as it is now; nothing of it is shared.

    Args:
        value: anything.
        identity: tell tensors and objects of one content apart; not `value` itself.
    """
    return _Freezing(identity=identity).frozen(value, top=True)


class _Freezing:
    """One value being frozen: what it holds twice is frozen once."""

    def __init__(self, *, identity: bool) -> None:
        self.identity = identity
        self.met: dict[int, int] = {}

    def frozen(self, value: Any, *, top: bool = False) -> Frozen:
        own = id(value) if self.identity and not top else None
        plain = self._plain(value, own)
        if plain is not None:
            return plain
        if id(value) in self.met:
            return Frozen(type(value), f"the {self.met[id(value)]}. again", own=own)
        self.met[id(value)] = len(self.met)
        parts = tuple((name, self.frozen(part)) for name, part in _parts(value))
        return Frozen(type(value), parts=parts, own=own)

    def _plain(self, value: Any, own: int | None) -> Frozen | None:
        """Return a value that has no parts to be looked at, or None."""
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return _tensor(value, own)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            says = (value.dtype.str, value.shape)
            return Frozen(kind, says, torch.from_numpy(value.copy()), own=own)
        if isinstance(value, torch.Generator):
            return Frozen(kind, None, value.get_state(), own=own)
        if isinstance(value, _PLAIN):
            return Frozen(kind, repr(value))
        return Frozen(kind, own=own) if callable(value) or isinstance(value, _CLOSED) else None


def _tensor(value: torch.Tensor, own: int | None) -> Frozen:
    kind = type(value)
    if isinstance(value, UNINITIALIZED):
        return Frozen(kind, own=own)
    dense = value.detach()
    strided = dense.layout is torch.strided
    dense = dense.clone() if strided else dense.to_dense()
    says = {
        "layout": str(value.layout),
        "dtype": str(value.dtype),
        "shape": tuple(value.shape),
        "strides": tuple(value.stride()) if strided else None,
        "requires_grad": value.requires_grad,
    }
    return Frozen(kind, says, dense, own=own)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a container or an object; a set by the text of its items."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{item}}}", None) for item in sorted(map(repr, value)))
    elif isinstance(value, (tuple, list, collections.deque)):
        yield from ((f"[{place}]", part) for place, part in enumerate(value))
    if type(value) not in _BUILT_IN:
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
        slots = getattr(type(value), "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and not name.startswith("__"):
                yield f".{name}", getattr(value, name)


def differs(ours: Frozen, theirs: Frozen, name: str = "") -> str:
    """Say in words where two values first differ; the empty text if they do not."""
    apart = _differs_itself(ours, theirs)
    if apart:
        return f"{name or 'it'} {apart}"
    pairs = zip(ours.parts, theirs.parts, strict=True)
    found = (differs(mine, other, name + part) for (part, mine), (_, other) in pairs)
    return next(filter(None, found), "")


def _differs_itself(ours: Frozen, theirs: Frozen) -> str:
    """Say where two values differ before their parts are looked at."""
    if ours.kind is not theirs.kind:
        return f"is a {ours.kind.__name__}, not a {theirs.kind.__name__}"
    if [n for n, _ in ours.parts] != [n for n, _ in theirs.parts]:
        odd = {n for n, _ in ours.parts} ^ {n for n, _ in theirs.parts}
        return f"has other parts: {', '.join(sorted(odd)[:4]) or 'another order'}"
    if ours.says != theirs.says:
        return f"is {_short(ours, theirs)}, not {_short(theirs, ours)}"
    if ours.numbers is not None and theirs.numbers is not None:
        apart = _apart(ours.numbers, theirs.numbers)
        if apart:
            return apart
    return "" if ours.own == theirs.own else "is another object"


def _short(ours: Frozen, theirs: Frozen) -> str:
    says = ours.says
    if isinstance(says, dict) and isinstance(theirs.says, dict):
        says = {key: value for key, value in says.items() if theirs.says.get(key) != value}
    text = str(says)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits, any NaN being as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    gone, lost = a.isnan(), b.isnan()
    return torch.equal(gone, lost) and torch.equal(a[~gone], b[~lost])


def _apart(a: torch.Tensor, b: torch.Tensor) -> str:
    if same_numbers(a, b):
        return ""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    far = (a.double() - b.double()).abs()
    return f"differs in {int((far != 0).sum())} of {far.numel()} numbers, by {float(far.max()):.3g}"


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor inside a container, a dataclass or an object, in order, once."""
    yield from _tensors_in(value, {})


def _tensors_in(value: Any, met: dict[int, Any]) -> Iterator[torch.Tensor]:
    if isinstance(value, (*_PLAIN, *_CLOSED)) or id(value) in met:
        return
    met[id(value)] = value
    if isinstance(value, torch.Tensor):
        yield value
    elif not callable(value):
        for _, part in _parts(value):
            yield from _tensors_in(part, met)
