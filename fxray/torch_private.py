"""Every private name of torch's modules that fxray touches.

Nothing else in the package may import or look up a name of a torch module that begins
with an underscore. What torch keeps on its own objects (`autocast._enabled`, the
`_code` of a GraphModule, `Module._apply`) is named where it is overridden or read.
`check()` says which of the names this torch lacks: the first thing to look at on a version
that was not tried.
"""

from __future__ import annotations

import collections
import importlib
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch._guards
from torch._library.effects import EffectType
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "CHECKPOINT_GENERATOR",
    "COMPILED_CALL",
    "COMPILED_FROM",
    "AskedBeforeCalls",
    "FakeTensor",
    "TorchDispatchMode",
    "acts_on_gradients",
    "ask_before_calls",
    "assertion",
    "backward_is_running",
    "check",
    "current_function_mode",
    "enter_autocast",
    "exit_autocast",
    "function_level",
    "has_backward_hooks",
    "has_forward_hooks",
    "hook_gradient",
    "keep_in_order",
    "pending_writes",
    "pytree",
    "saves_tensors_elsewhere",
    "set_grad_enabled",
    "trace_anew",
    "trace_now",
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
    "torch.Tensor._backward_hooks",
    "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
    "torch.library._register_effectful_op",
    "torch._library.effects.EffectType",
    "torch._library.opaque_object.register_opaque_type",
    "torch._opaque_base.OpaqueBase",
    "torch._guards.TracingContext.try_get",
    "torch._subclasses.FakeTensor",
    "torch.utils._python_dispatch.TorchDispatchMode",
)

COMPILED_CALL = "_compiled_call_impl"
"""Where a module keeps what `Module.compile` made; asked for at its every call."""

COMPILED_FROM = "_orig_mod"
"""Where what `torch.compile` gives for a module keeps that module."""

CHECKPOINT_GENERATOR = "_checkpoint_without_reentrant_generator"
"""What `torch.utils.checkpoint.checkpoint` looks up and runs around a region."""

current_function_mode: Any = torch.overrides._get_current_function_mode
"""Returns the innermost `TorchFunctionMode` of this thread, None where there is none."""

assertion: Any = torch._assert
set_grad_enabled: Any = torch._C._set_grad_enabled
enter_autocast: Any = torch.amp.autocast_mode._enter_autocast
exit_autocast: Any = torch.amp.autocast_mode._exit_autocast


class AskedBeforeCalls(OpaqueBase):
    """An object that compiled code asks before each call whether it still holds."""


def ask_before_calls(
    cls: type, question: Callable[[Any], list[Any]], *, at_trace: tuple[str, ...]
) -> None:
    """Let compiled code that uses an object of `cls` be asked before each call.

    A compiler guards on what it sees being read; this asks in Python instead, of whatever the
    object looks at, and is documented with torch's "opaque objects" (their `guard_fn`).

    Args:
        cls: a subclass of `AskedBeforeCalls`.
        question: code is as good as it was while this gives an equal list.
        at_trace: methods that are run while code is traced; their results are constants.
    """
    members = dict.fromkeys(at_trace, MemberType.USE_REAL)
    register_opaque_type(cls, typ="reference", guard_fn=question, members=members)


def keep_in_order(op: Any) -> None:
    """Let no compiler leave out an op that returns nothing, run it twice or out of order."""
    torch.library._register_effectful_op(op, EffectType.ORDERED)


def trace_anew(reason: str) -> NoReturn:
    """Let Dynamo trace the code it is in the midst of from its beginning."""
    module = importlib.import_module("torch._dynamo.exc")
    raise module.UnspecializeRestartAnalysis(restart_reason=reason)


def trace_now() -> Any:
    """Return what stands for the code that a compiler is in the midst of tracing, None outside."""
    return torch._guards.TracingContext.try_get()


def pending_writes() -> Iterator[tuple[Any, str]]:
    """Yield what the code that a compiler traces has set, so far on paper only.

    Each as the object and the name of the attribute; where parameters were put into a module
    (`torch.func.functional_call`), as None and `"_parameters"`.
    """
    module = importlib.import_module("torch._dynamo.symbolic_convert")
    trace = getattr(module.tls, "current_tx", None)
    if trace is None:
        return
    effects = trace.output.side_effects
    for variable, written in effects.store_attr_mutations.items():
        for name in written:
            yield getattr(variable, "value", None), name
    for variable in effects.id_to_variable.values():
        source = getattr(variable, "source", None)
        if source is not None and effects.is_modified(variable):
            name = source.name() if callable(source.name) else source.name
            if name.endswith("_parameters"):
                yield None, "_parameters"


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


def hook_gradient(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> Any:
    """Let `hook` see the gradient of `tensor`, as `tensor.register_hook` does.

    Returns:
        What takes the hook off again; None for a tensor that is no leaf and had no hooks,
        which goes with its graph.
    """
    node: Any = tensor.grad_fn
    if node is None or tensor._backward_hooks is not None:
        return tensor.register_hook(hook)
    # `register_hook` does just this, and makes a handle, which takes as long again and longer.
    hooks: dict[Any, Any] = collections.OrderedDict()
    tensor._backward_hooks = hooks
    node._register_hook_dict(tensor)
    hooks["fxray"] = hook  # torch's own keys are numbers
    return None


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
