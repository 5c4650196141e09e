"""What ops are called by their type."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["op_name_of", "type_keys", "type_of_function", "type_of_module"]

_OPERATORS = {
    "radd": "add",
    "iadd": "add",
    "rsub": "sub",
    "isub": "sub",
    "rmul": "mul",
    "imul": "mul",
    "truediv": "div",
    "rtruediv": "div",
    "itruediv": "div",
    "rdiv": "div",
    "rfloordiv": "floordiv",
    "floor_divide": "floordiv",
    "rpow": "pow",
    "rmatmul": "matmul",
    "rmod": "remainder",
    "mod": "remainder",
    "true_divide": "div",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
}
"""Other spellings of an operator, so that `x + y`, `1 + x` and `x += y` are all `add`."""

_MODULE_TYPES = {
    name.lower(): name.lower()
    for name, value in vars(nn).items()
    if isinstance(value, type) and issubclass(value, nn.Module)
}


def type_of_module(module: nn.Module | type[nn.Module]) -> str:
    """Return the type name of a module.

    >>> type_of_module(nn.Conv2d(1, 8, 3))
    'conv2d'
    """
    cls = module if isinstance(module, type) else type(module)
    return cls.__name__.lower()


def type_of_function(function: Any) -> str:
    """Return the type name of a function, a tensor method or the name of one.

    It is that of the module that does the same, where torch has one.

    >>> import torch
    >>> [type_of_function(f) for f in (torch.relu, torch.Tensor.relu_, "relu")]
    ['relu', 'relu', 'relu']
    >>> type_of_function(nn.functional.max_pool2d), type_of_function("__radd__")
    ('maxpool2d', 'add')
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    name = (name or type(function).__name__).strip("_").lower()
    name = _OPERATORS.get(name, name)
    return _MODULE_TYPES.get(name.replace("_", ""), name)


def op_name_of(function: Any) -> str:
    """Return what an op is called in a path: torch's own spelling, dunders and `_` off.

    >>> op_name_of(nn.functional.max_pool2d), op_name_of("relu_"), op_name_of("__rsub__")
    ('max_pool2d', 'relu', 'sub')
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    name = (name or type(function).__name__).strip("_")
    return _OPERATORS.get(name, name)


def type_keys(types: Iterable[str]) -> list[str]:
    """Return one type key for each type, in order.

    >>> type_keys(["conv2d", "relu", "conv2d"])
    ['conv2d-0', 'relu-0', 'conv2d-1']
    """
    seen: collections.Counter[str] = collections.Counter()
    keys = []
    for kind in types:
        keys.append(f"{kind}-{seen[kind]}")
        seen[kind] += 1
    return keys
