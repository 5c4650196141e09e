"""What a trace must leave as it was: the model, random numbers, torch itself."""

from __future__ import annotations

import builtins
import inspect
import random
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from corpus.bits import UNINITIALIZED, Frozen, differs, frozen

__all__ = ["World", "random_state"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")

_PATCHED: tuple[tuple[Any, str], ...] = (
    *((builtins, name) for name in ("len", "range", "isinstance", "int", "float", "bool", "sum")),
    *((nn.Module, name) for name in ("__call__", "_call_impl", "__getattr__", "__setattr__")),
    *((nn.Module, name) for name in ("register_buffer", "register_parameter", "train")),
    (nn.ModuleList, "__len__"),
    (torch.autograd.Function, "apply"),
    *((torch.Tensor, name) for name in ("__bool__", "__len__", "item", "tolist", "numpy")),
    *((torch.Tensor, name) for name in ("backward", "register_hook", "__torch_function__")),
    *((torch, name) for name in ("manual_seed", "is_grad_enabled", "is_autocast_enabled")),
    *((torch, name) for name in ("tensor", "as_tensor", "from_numpy", "finfo", "Size", "vmap")),
    *((torch, name) for name in ("get_default_dtype", "relu", "cat", "arange", "zeros")),
    *((torch.func, name) for name in ("vmap", "grad", "functional_call")),
    (torch.utils.checkpoint, "checkpoint"),
    (torch.utils.checkpoint.CheckpointFunction, "apply"),
    (torch.jit.ScriptFunction, "__call__"),
    (torch.jit.ScriptModule, "__call__"),
    *((torch.amp.autocast_mode.autocast, name) for name in ("__enter__", "__exit__")),
    *((torch.no_grad, name) for name in ("__enter__", "__exit__")),
    *((torch.enable_grad, name) for name in ("__enter__", "__exit__")),
    *((torch.set_grad_enabled, name) for name in ("__init__", "__enter__", "__exit__")),
    *((torch.inference_mode, name) for name in ("__enter__", "__exit__")),
    *((F, name) for name in ("relu", "dropout", "linear", "softmax", "interpolate")),
    *((random, name) for name in ("random", "randint", "seed", "uniform", "choice")),
    *((np.random, name) for name in ("rand", "randint", "seed", "random", "uniform")),
    (torch.compiler, "is_compiling"),
)
"""Names that a tracer is tempted to replace."""


def random_state() -> Frozen:
    """Return the state of the generators that models draw from."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - what models draw from
    return Frozen(
        dict,
        parts=(
            ("torch's random state", Frozen(torch.Tensor, None, torch.get_rng_state())),
            ("python's random state", frozen(random.getstate())),
            ("numpy's random state", frozen([kind, keys, *rest])),
        ),
    )


def _names() -> dict[str, Any]:
    return {
        f"{getattr(owner, '__name__', owner)}.{name}": inspect.getattr_static(owner, name, None)
        for owner, name in _PATCHED
    }


def _switches() -> Frozen:
    return frozen(
        {
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "autocast cache": torch.is_autocast_cache_enabled(),
            "default dtype": torch.get_default_dtype(),
            "is_compiling": torch.compiler.is_compiling(),
            "anomaly mode": torch.is_anomaly_enabled(),
            "function modes": torch._C._len_torch_function_stack(),  # noqa: SLF001 - no public way
        }
    )


def _fields(module: nn.Module) -> Frozen:
    """Return all that a module holds in Python, its tensors to the bit."""
    # A scripted module keeps its fields in C++, where Python cannot add any.
    fields = {} if isinstance(module, torch.jit.ScriptModule) else dict(vars(module))
    for name in _REGISTRIES:
        fields[name] = getattr(module, name)
    fields["class"] = type(module)
    return frozen(fields, identity=True)


def _is_lazy(module: nn.Module) -> bool:
    return any(
        isinstance(tensor, UNINITIALIZED)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )


@attrs.frozen(eq=False)
class World:
    """A model and all around it, at one moment."""

    names: dict[str, Any]
    switches: Frozen
    random: Frozen
    modules: dict[str, Frozen]
    grads: Frozen

    @classmethod
    def around(cls, model: nn.Module) -> World:
        """Return what is now; what holds a lazy module is left out, which a first call changes."""
        return cls(
            _names(),
            _switches(),
            random_state(),
            {
                path: _fields(module)
                for path, module in model.named_modules()
                if not any(map(_is_lazy, module.modules()))
            },
            frozen({name: p.grad for name, p in model.named_parameters()}, identity=True),
        )

    def leaked(self, model: nn.Module) -> list[str]:
        """Say all that is no longer as it was."""
        now = World.around(model)
        found = [
            f"{name} is still replaced"
            for name in self.names
            if self.names[name] is not now.names[name]
        ]
        found += [differs(now.switches, self.switches, "torch's switches")]
        found += [differs(now.random, self.random)]
        found += [differs(now.grads, self.grads, "the gradients")]
        for path, was in self.modules.items():
            there = now.modules.get(path)
            name = path or "the model"
            found += [differs(there, was, name) if there else f"{name} is gone"]
        return [f"leaked by the trace: {text}" for text in found if text]
