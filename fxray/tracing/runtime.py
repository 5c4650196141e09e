"""The few functions that traced graphs call beside torch's own.

Plain functions at the top of a module, so that a graph that names them pickles.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from fxray.errors import BranchError
from fxray.torch_private import enter_autocast, set_grad_enabled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

__all__ = [
    "as_before",
    "assign",
    "build_mapping",
    "build_object",
    "enter_grad_mode",
    "exit_grad_mode",
    "guard",
    "guard_value",
    "put",
    "refill",
    "run_object",
    "switches_modes",
]


def guard(held: Any, expected: bool, where: str) -> None:
    """Raise BranchError unless a comparison comes out as when traced."""
    if bool(held) is not expected:
        msg = (
            f"the branch at {where} went the {expected} way when the model was traced and goes "
            f"the {not expected} way now"
        )
        raise BranchError(msg, where)


def guard_value(value: Any, expected: Any, where: str) -> None:
    """Raise BranchError unless what Python takes of a tensor is what it was when traced."""
    if value != expected and not (value != value and expected != expected):  # noqa: PLR0124 - NaN
        msg = (
            f"Python takes a tensor's value at {where}, which was {_short(expected)} when the "
            f"model was traced and is {_short(value)} now"
        )
        raise BranchError(msg, where, number=isinstance(value, float))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def enter_grad_mode(mode: bool) -> bool:
    """Switch autograd on or off; return what it was."""
    before = torch.is_grad_enabled()
    set_grad_enabled(mode)
    return before


def exit_grad_mode(before: bool) -> None:
    """Put autograd back to what `enter_grad_mode` returned."""
    set_grad_enabled(before)


def switches_modes(graph: fx.Graph) -> bool:
    """Return whether a graph switches autograd or autocast on or off on its way."""
    return any(node.target in (enter_grad_mode, enter_autocast) for node in graph.nodes)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Put autograd and autocast back as they were, also where a graph ends half-way."""
    grad = torch.is_grad_enabled()
    autocast = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    }
    depth = _autocast_depth()
    try:
        yield
    except BaseException:
        set_grad_enabled(grad)
        for _ in range(_autocast_depth() - depth):
            torch.autocast_decrement_nesting()
        if depth == 0:
            # As autocast does on leaving: else weights cast before the next optimizer step
            # would be used after it.
            torch.clear_autocast_cache()
        for device, (enabled, dtype) in autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        raise


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def assign(module: torch.nn.Module, name: str, value: Any) -> None:
    """Set an attribute of the model, as its forward does."""
    setattr(module, name, value)


def put(owner: Any, items: dict[Any, Any]) -> None:
    """Set keys of a dict, or attributes of an object, that a module holds."""
    (owner if isinstance(owner, dict) else vars(owner)).update(items)


def refill(owner: Any, items: list[Any]) -> None:
    """Give a list or a deque that a module holds these items and no others."""
    owner.clear()
    owner.extend(items)


def run_object(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call something that is no plain function: a scripted function, an autograd.Function."""
    if isinstance(target, type):  # an autograd.Function
        target = target.apply  # type: ignore[attr-defined]
    return target(*args, **kwargs)


def build_mapping(cls: Any, items: dict[str, Any], fields: dict[str, Any] | None = None) -> Any:
    """Return an instance of a dict subclass with these items, and attributes of its own."""
    made = cls.__new__(cls)  # its __init__ may take something else: defaultdict
    made.update(items)
    if fields:
        vars(made).update(fields)
    return made


def build_object(cls: Any, fields: dict[str, Any]) -> Any:
    """Return an instance of a class of the user's with these attributes."""
    made = cls.__new__(cls)
    vars(made).update(fields)
    return made
