"""The few functions that traced graphs call beside torch's own.

Plain functions at the top of a module, so that a graph that names them pickles.
"""

from __future__ import annotations

from typing import Any

import torch

from fxray.errors import SpecialisationError
from fxray.torch_private import set_grad_enabled

__all__ = ["assign", "build_mapping", "enter_grad_mode", "exit_grad_mode", "guard", "run_object"]


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


def assign(module: torch.nn.Module, name: str, value: Any) -> None:
    """Set an attribute of the model, as its forward does."""
    setattr(module, name, value)


def run_object(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call something that is no plain function: a scripted function, an autograd.Function."""
    call: Any = getattr(target, "apply", target)  # an autograd.Function is a class
    return call(*args, **kwargs)


def build_mapping(cls: Any, items: dict[str, Any]) -> Any:
    """Return an instance of a dict subclass with these items."""
    return cls(items)
