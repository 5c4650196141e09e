"""Every private name of torch's modules that fxray touches.

Nothing else in the package may import or look up a name of a torch module that begins
with an underscore. What torch keeps on its own objects (`autocast._enabled`, the
`_code` of a GraphModule, `Module._apply`) is named where it is overridden or read.
`check()` says which of the names this torch lacks: the first thing to look at on a version
that was not tried.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = [
    "CHECKPOINT_GENERATOR",
    "COMPILED_CALL",
    "acts_on_gradients",
    "assertion",
    "backward_is_running",
    "check",
    "current_function_mode",
    "enter_autocast",
    "exit_autocast",
    "function_level",
    "has_backward_hooks",
    "has_forward_hooks",
    "pytree",
    "saves_tensors_elsewhere",
    "set_grad_enabled",
    "wrapped_functions",
]

_NAMES = (
    "torch.utils._pytree.tree_flatten_with_path",
    "torch._assert",
    "torch._C._set_grad_enabled",
    "torch._C._current_graph_task_id",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._functorch.maybe_current_level",
    "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
    "torch.fx._symbolic_trace._wrapped_fns_to_patch",
    "torch.overrides._get_current_function_mode",
    "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
)

COMPILED_CALL = "_compiled_call_impl"
"""Where a module keeps what `Module.compile` made; asked for at its every call."""

CHECKPOINT_GENERATOR = "_checkpoint_without_reentrant_generator"
"""What `torch.utils.checkpoint.checkpoint` looks up and runs around a region."""

current_function_mode: Any = torch.overrides._get_current_function_mode
"""Returns the innermost `TorchFunctionMode` of this thread, None where there is none."""

assertion: Any = torch._assert
set_grad_enabled: Any = torch._C._set_grad_enabled
enter_autocast: Any = torch.amp.autocast_mode._enter_autocast
exit_autocast: Any = torch.amp.autocast_mode._exit_autocast


def backward_is_running() -> bool:
    """Return whether this thread is inside a backward pass.

    A forward that runs then is a recomputation (activation checkpointing).
    """
    return bool(torch._C._current_graph_task_id() != -1)


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Return whether anyone registered a forward hook or pre-hook on `module` itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def saves_tensors_elsewhere() -> bool:
    """Return whether hooks take what is saved for backward: a checkpoint around this call."""
    ignore_tracing = True
    return torch._C._autograd._top_saved_tensors_default_hooks(ignore_tracing) is not None


def acts_on_gradients(parameter: torch.Tensor) -> bool:
    """Return whether a hook acts as soon as a gradient of `parameter` is accumulated."""
    return bool(parameter._post_accumulate_grad_hooks)


def has_backward_hooks(module: torch.nn.Module) -> bool:
    """Return whether anyone registered a backward hook or pre-hook on `module` itself."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def function_level() -> int | None:
    """Return the nesting level of `torch.func` transforms, None outside of them."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level


def wrapped_functions() -> dict[tuple[int, str], dict[str, Any]]:
    """Return what `torch.fx.wrap` registered: (id of the globals, name) -> the globals."""
    module = importlib.import_module("torch.fx._symbolic_trace")
    registered: dict[tuple[int, str], dict[str, Any]] = module._wrapped_fns_to_patch
    return registered


def check() -> list[str]:
    """Return the private names that this torch lacks; empty when all are there."""
    missing = []
    for name in _NAMES:
        module, _, attribute = name.rpartition(".")
        parts: list[str] = []
        while True:
            try:
                found: Any = importlib.import_module(module)
                break
            except ImportError:
                module, _, last = module.rpartition(".")
                parts.insert(0, last)
        for part in (*parts, attribute):
            found = getattr(found, part, None)
        if found is None:
            missing.append(name)
    return missing
