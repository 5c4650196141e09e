"""What there is to know of a function of torch when it is called in a running model."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch

from fxray.tracing.names import op_name_of, type_of_function
from fxray.tracing.patches import SKIPPED_FILES
from fxray.tracing.results import tensor_items
from fxray.tracing.torch_calls import (
    METHOD_TYPES,
    PYTHON_METHODS,
    READS,
    SIZES,
    TENSOR_PROPERTIES,
    qualified_name,
)

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

    from fxray.tracing.survey import Spot

__all__ = [
    "CALLS",
    "NUMBERS",
    "PLAIN",
    "Call",
    "Given",
    "Line",
    "call_of",
    "call_of_object",
    "slots",
    "user_place",
]

Given = tuple[Any, Any]
"""The arguments of a call, positional and by name."""


class Call:
    """What there is to know of a function of torch that may be an op."""

    __slots__ = ("method", "name", "op", "pure", "target", "type")

    def __init__(self, func: Any, name: str, *, method: bool, pure: bool = False) -> None:
        self.name, self.method, self.pure = name, method, pure
        self.op, self.type = op_name_of(name), type_of_function(name)
        self.target = qualified_name(func, name, method=method)


NUMBERS = frozenset([int, float, bool, complex, str, type(None), torch.Size])
"""What gives these is no op."""

PLAIN = NUMBERS | {torch.dtype, torch.device, slice}
"""Arguments of these kinds are no parameters."""

CALLS: dict[Any, Call | None] = {}
"""By function; None for what computes nothing."""

_OBJECTS: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
"""By autograd.Function or scripted function; a forward may make a new one at each call."""


def call_of(func: Any) -> Call | None:
    """Find out what there is to know of `func`, and keep it in `CALLS` if it stays."""
    name = getattr(func, "__name__", "")
    found: Call | None
    if name in READS or name in SIZES or name == "__set__":
        found = None
    elif name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        known = name in TENSOR_PROPERTIES
        found = Call(func, name, method=True, pure=True) if known else None
    else:
        name = str(PYTHON_METHODS.get(id(func)) or name)
        method = isinstance(func, METHOD_TYPES) or id(func) in PYTHON_METHODS
        pure = method and name == "__getitem__"
        # It gives no tensor that was not there: as in a graph, no op.
        found = Call(func, name, method=method, pure=pure) if name != "__setitem__" else None
    if "<locals>" not in getattr(func, "__qualname__", ""):  # one made at each call stays not
        CALLS[func] = found
    return found


def call_of_object(target: Any, name: str) -> Call:
    """Return what there is to know of an autograd.Function or a scripted function."""
    found = _OBJECTS.get(target)
    if found is None:
        found = _OBJECTS[target] = Call(target, name, method=False)
        found.target = name
    return found


class Line:
    """One spot in one mode: the paths of what runs there, in order."""

    __slots__ = ("code", "paths", "spot")

    def __init__(self, spot: Spot, paths: list[str | None], code: Any) -> None:
        self.spot, self.paths = spot, paths
        self.code = code  # kept: its id is what the line is found by


_SKIPPED: dict[str, bool] = {}
_NO_LINE: tuple[Any, int] = (None, 0)


def user_place() -> tuple[Any, int]:
    """Return the code and the instruction of the innermost frame that is the user's."""
    # Not the line: to find it takes Python the longer the longer the function is.
    frame: types.FrameType | None = sys._getframe(2)  # noqa: SLF001
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        skipped = _SKIPPED.get(file)
        if skipped is None:
            skipped = _SKIPPED[file] = file.startswith(SKIPPED_FILES)
        if not skipped:
            return code, frame.f_lasti
        frame = frame.f_back
    return _NO_LINE


def slots(args: Any, kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (slot, tensor) for every tensor in the arguments, as the edges of graphs have them."""
    for place, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, slice):
            parts: Any = (("start", value.start), ("stop", value.stop), ("step", value.step))
            for part, inner in parts:
                yield from tensor_items(inner, f"{place}.{part}")
        else:
            yield from tensor_items(value, str(place))
