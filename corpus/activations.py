"""The activations that a model runs, counted without fxray."""

from __future__ import annotations

import collections
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["canonical", "count_activations", "is_activation"]

_ACTIVATIONS = frozenset(
    "relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu mish softplus softsign tanh sigmoid "
    "logsigmoid hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink threshold glu "
    "softmax logsoftmax softmin gumbelsoftmax scaleddotproductattention".split()
)
_SPELLINGS = {"softmax2d": "softmax", "expit": "sigmoid"}
_COMPOSITE = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)


def canonical(name: str) -> str:
    """Return one spelling for a module's, a function's and a method's name.

    >>> [canonical(name) for name in ("LogSoftmax", "log_softmax", "relu_")]
    ['logsoftmax', 'logsoftmax', 'relu']
    """
    plain = name.replace("_", "").lower()
    return _SPELLINGS.get(plain, plain)


def is_activation(name: str) -> bool:
    """Return whether a module, function or method of that name is an activation."""
    return canonical(name) in _ACTIVATIONS


def _is_leaf(module: nn.Module) -> bool:
    """Return whether a module is torch's own, or scripted: nobody reads its inside."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, _COMPOSITE)


class _Counter(TorchFunctionMode):
    """Counts the functions that a model calls itself, and the leaf modules."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()
        self.inside: list[nn.Module] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if is_activation(name) and not self.inside and not _in_custom_function():
            self.seen[canonical(name)] += 1
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, _: Any) -> None:
        """Go into a module; what is inside a leaf is its own affair."""
        if _is_leaf(module):
            if not self.inside and is_activation(type(module).__name__):
                self.seen[canonical(type(module).__name__)] += 1
            self.inside.append(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Come out of a module."""
        if self.inside and self.inside[-1] is module:
            self.inside.pop()


def _in_custom_function() -> bool:
    """Return whether somebody's `autograd.Function` is being applied."""
    frame: Any = sys._getframe(2)  # noqa: SLF001 - the public way reads source files
    while frame is not None:
        if frame.f_code.co_name == "apply" and "cls" in frame.f_locals:
            function = frame.f_locals["cls"]
            # The reentrant checkpoint is a Function too, and what it runs is the model.
            if isinstance(function, type) and issubclass(function, torch.autograd.Function):
                return function is not CheckpointFunction
        frame = frame.f_back
    return False


def count_activations(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> collections.Counter[str]:
    """Return how often `model` runs each activation in one call, in its present mode."""
    counter = _Counter()
    # Hooks of every module there is, so that none is put on the model.
    hooks = [
        register_module_forward_pre_hook(counter.enter),
        register_module_forward_hook(counter.leave, always_call=True),
    ]
    try:
        with counter:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.seen
