"""Sizes as Python numbers that remember the node they came from.

`x.view(x.size(0), -1)` must stay true for another batch size. A symbolic size would
need the model's cooperation at every `isinstance` and every C function; an `int`
subclass needs none: Python and torch see an int, the writer finds the node on it.
Where Python asks for an exact int, or for a key (`int(n)`, a dict's look-up), the graph
holds for that number alone. What C reads past all of that (`range(n)`, an index of a
list) loses the node; the comparison of traces at different sizes finds those (`batch.py`).
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

__all__ = ["NumberWriter", "TracedFloat", "TracedInt"]


class NumberWriter(Protocol):
    """What a traced number asks of the trace it belongs to."""

    @property
    def writing(self) -> bool:
        """Whether the trace still takes nodes, on this thread, here."""
        ...

    def write_number(self, target: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any:
        """Write the node of an arithmetic result; return `value`, remembering it."""
        ...

    def write_comparison(
        self, target: Callable[..., Any], args: tuple[Any, ...], *, held: bool
    ) -> None:
        """Write a guard: the comparison must come out as `held` again."""
        ...


_ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "divmod": divmod,
}
_COMPARISON = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


def plain(value: Any) -> Any:
    """Return `value` as an exact int or float, its node forgotten."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


class _Traced:
    """The part that the traced int and the traced float share."""

    node: fx.Node
    writer: NumberWriter

    def __reduce__(self) -> tuple[Any, ...]:
        return type(plain(self)), (plain(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain(self)

    def __bool__(self) -> bool:
        held = bool(plain(self))
        if self.writer.writing:
            self.writer.write_comparison(operator.ne, (self, 0), held=held)
        return held


class TracedInt(_Traced, int):
    """An int that remembers the node it came from."""

    def __new__(cls, value: int, node: fx.Node, writer: NumberWriter) -> Self:
        """Return `value`, come from `node` of the trace that `writer` writes."""
        self = super().__new__(cls, value)
        self.node, self.writer = node, writer
        return self


class TracedFloat(_Traced, float):
    """A float that remembers the node it came from."""

    def __new__(cls, value: float, node: fx.Node, writer: NumberWriter) -> Self:
        """Return `value`, come from `node` of the trace that `writer` writes."""
        self = super().__new__(cls, value)
        self.node, self.writer = node, writer
        return self


# By the operator, not by `int.__pow__` and its like: those decline a float, and Python then
# asks the float, which knows of no node.


def _arithmetic(target: Callable[..., Any], *, swapped: bool) -> Any:
    def run(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        operands = (other, self) if swapped else (self, other)
        value = target(*map(plain, operands))
        return self.writer.write_number(target, operands, value) if self.writer.writing else value

    return run


def _comparison(target: Callable[..., Any]) -> Any:
    def run(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        held = bool(target(plain(self), plain(other)))
        if self.writer.writing:
            self.writer.write_comparison(target, (self, other), held=held)
        return held

    return run


def _alone(target: Callable[..., Any]) -> Any:
    def run(self: Any, *more: Any) -> Any:
        value = target(plain(self), *more)
        return (
            self.writer.write_number(target, (self, *more), value) if self.writer.writing else value
        )

    return run


def _leaving(original: Callable[..., Any], target: Callable[..., Any] | None = None) -> Any:
    """Return a method after which Python has a number of its own: it must come out so again."""

    def run(self: Any, *more: Any) -> Any:
        value = original(self, *more)
        if self.writer.writing:
            seen = self if target is None else self.writer.write_number(target, (self,), value)
            now = plain(self) if target is None else value
            self.writer.write_comparison(operator.eq, (seen, now), held=True)
        return value

    return run


for _cls, _base in ((TracedInt, int), (TracedFloat, float)):
    for _name, _target in _ARITHMETIC.items():
        for _prefix in ("", "r"):
            setattr(_cls, f"__{_prefix}{_name}__", _arithmetic(_target, swapped=bool(_prefix)))
    for _name, _target in _COMPARISON.items():
        setattr(_cls, f"__{_name}__", _comparison(_target))
    for _method, _value in (
        ("__neg__", _alone(operator.neg)),
        ("__pos__", _alone(operator.pos)),
        ("__abs__", _alone(abs)),
        ("__round__", _alone(round)),
        ("__floor__", _alone(math.floor)),
        ("__ceil__", _alone(math.ceil)),
        ("__trunc__", _alone(math.trunc)),
        ("__repr__", _base.__repr__),
        ("__hash__", _leaving(_base.__hash__)),
        ("__int__", _leaving(_base.__int__, int)),
        ("__float__", _leaving(_base.__float__, float)),
    ):
        setattr(_cls, _method, _value)
TracedInt.__invert__ = _alone(operator.invert)  # type: ignore[method-assign]
for _name in ("__index__", "bit_length"):
    setattr(TracedInt, _name, _leaving(getattr(int, _name)))
TracedFloat.is_integer = _leaving(float.is_integer)  # type: ignore[method-assign]
