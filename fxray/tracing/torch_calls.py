"""What a writer must know of torch's calls: which compute, which only tell, which write."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import nn

__all__ = [
    "ANSWERS",
    "DRAWS",
    "EXACT",
    "METHOD_TYPES",
    "NUMBERS",
    "OUT_OF_SIGHT",
    "PYTHON_METHODS",
    "READS",
    "SIZES",
    "TENSOR_PROPERTIES",
    "TORCH_CONSTANTS",
    "UNGUARDED",
    "grad_mode_owner",
    "is_leaf",
    "qualified_name",
    "writes_in_place",
]

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)

PYTHON_METHODS = {
    id(method): name
    for name in dir(torch.Tensor)
    if isinstance(method := getattr(torch.Tensor, name, None), types.FunctionType)
}
"""Tensor methods written in Python, whose `__name__` is often another than their own."""

METHOD_TYPES = (types.MethodDescriptorType, types.WrapperDescriptorType)

READS = frozenset(
    [
        *("data_ptr", "dim", "ndimension", "element_size", "is_contiguous"),
        *("get_device", "has_names", "untyped_storage"),
        *("__hash__", "__repr__", "__format__", "__deepcopy__", "__dir__"),
    ]
)
"""Methods that tell about a tensor and compute nothing."""

UNGUARDED = frozenset(["grad", "is_leaf", "_version"])
"""Properties that hang on what happened before the call, and by which a forward may branch."""

SIZES = frozenset(["size", "numel", "nelement", "__len__", "stride", "storage_offset"])

ANSWERS = frozenset(["__bool__", "__contains__", "is_nonzero", "equal", "allclose"])
"""Questions about a tensor's numbers that Python gets a yes or no to, to branch on."""

NUMBERS = frozenset(["__int__", "__float__", "__index__", "item", "tolist"])
"""Ways for a tensor's numbers to reach Python as Python's own."""

OUT_OF_SIGHT = frozenset(["__array__", "__complex__", "numpy"])
"""Ways for them to leave for where a trace sees nothing of what becomes of them."""

DRAWS = frozenset(
    [
        *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"),
        *("rand_like", "randn_like", "randint_like", "poisson"),
        *("uniform_", "normal_", "bernoulli_", "random_", "exponential_"),
    ]
)
"""What draws random numbers."""

TENSOR_PROPERTIES = frozenset(["data", "T", "mT", "H", "mH", "real", "imag"])

EXACT = (int, float, complex, bool, str, type(None), type(Ellipsis))
TORCH_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def is_leaf(module: nn.Module) -> bool:
    """Return whether `module` stays one op: torch's own layers, scripted modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, _CONTAINERS):
        return False
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))


def writes_in_place(name: str) -> bool:
    """Return whether the tensor method called `name` writes the tensor it is called on."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def qualified_name(func: Any, name: str, *, method: bool) -> str:
    """Return the qualified name of a function or tensor method, for people."""
    if method:
        return f"torch.Tensor.{name}"
    module = getattr(func, "__module__", None) or "torch"
    module = "torch.nn.functional" if module == "torch._C._nn" else module
    return f"{module.removeprefix('_')}.{name}"


def grad_mode_owner() -> tuple[int, str]:
    """Return the id of the context object torch is entering or leaving, and the method."""
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001
    owner, method = 0, ""
    while frame is not None:
        if frame.f_code.co_filename.endswith("grad_mode.py"):
            owner, method = id(frame.f_locals.get("self")), frame.f_code.co_name
        elif owner:
            break
        frame = frame.f_back
    return owner, method
