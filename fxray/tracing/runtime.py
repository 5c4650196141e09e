"""The few functions that traced graphs call beside torch's own.

Plain functions at the top of a module, so that a graph that names them pickles.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from fxray.errors import SpecialisationError
from fxray.torch_private import enter_autocast, set_grad_enabled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

__all__ = [
    "as_before",
    "assign",
    "build_mapping",
    "enter_grad_mode",
    "exit_grad_mode",
    "guard",
    "run_object",
    "switches_modes",
]


def guard(held: Any, expected: bool, where: str) -> None:
    """Raise SpecialisationError unless a comparison comes out as when traced."""
    if bool(held) is not expected:
        msg = (
            f"the branch at {where} went the {expected} way when the model was traced and goes "
            f"the {not expected} way now; trace again with an input like this one"
        )
        raise SpecialisationError(msg)


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


def run_object(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call something that is no plain function: a scripted function, an autograd.Function."""
    call: Any = getattr(target, "apply", target)  # an autograd.Function is a class
    return call(*args, **kwargs)


def build_mapping(cls: Any, items: dict[str, Any]) -> Any:
    """Return an instance of a dict subclass with these items."""
    made = cls.__new__(cls)  # its __init__ may take something else: defaultdict
    made.update(items)
    return made
