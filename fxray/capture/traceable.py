"""Selections run while a graph is traced: as ops of it, where that is safe."""

from __future__ import annotations

import builtins
import copy
import dis
import math
import types
from typing import TYPE_CHECKING, Any

import torch

from fxray.selections import Histogram, Mean, Norm, Stats, TopK, select
from fxray.torch_private import TorchDispatchMode
from fxray.tracing.snapshots import same, snapshot_with_fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fxray.selections import Selection

__all__ = ["traced"]

_OWN = (Mean, Norm, Stats, Histogram, TopK)
"""Selections whose results are new tensors; what any other gives may be a view of what it got."""

_SAFE = frozenset(
    "sum mean amax amin max min aminmax std var var_mean std_mean prod norm linalg_vector_norm "
    "any all count_nonzero argmax argmin topk sort argsort cumsum median nanmedian kthvalue "
    "view _unsafe_view reshape slice select narrow unsqueeze squeeze permute transpose t expand "
    "clone _to_copy to detach alias cat stack split chunk unbind diagonal tril triu flip roll "
    "repeat pad constant_pad_nd unfold avg_pool1d avg_pool2d _softmax _log_softmax mm bmm addmm "
    "baddbmm mv dot full full_like zeros zeros_like ones ones_like empty_like arange "
    "scalar_tensor new_full new_zeros new_ones new_empty lift_fresh lift_fresh_copy view_as_real "
    "linspace device sym_size sym_stride sym_numel sym_storage_offset".split()
)
"""Ops that take any numbers; beside them what works element by element."""

_BUILTINS = frozenset(
    "len range min max int float bool abs sum round tuple list dict isinstance zip enumerate "
    "slice sorted reversed all any".split()
)
_WRITES = frozenset(["STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"])


class _NotTracedError(Exception):
    """A selection does what must not become a part of the model's graph."""


class _Careful(TorchDispatchMode):
    """Ends a selection that looks at numbers, or that some numbers could make fail."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if torch.Tag.pointwise not in func.tags and name not in _SAFE:
            raise _NotTracedError(name)
        return func(*args, **(kwargs or {}))


def traced(
    selection: Selection, tensor: torch.Tensor, *, known: bool = False
) -> dict[str, torch.Tensor]:
    """Return what `selection` keeps of a tensor that is being traced, by field.

    Empty where it must not be a part of a graph: one of the user's that looks at numbers,
    remembers something, uses more of Python than torch, or may fail.

    Args:
        selection: shipped or the user's.
        tensor: as the trace has it.
        known: whether it was seen to be safe on this tensor before.
    """
    if known or type(selection).__module__ == Mean.__module__:
        kept = select(selection, tensor)
        return kept if isinstance(selection, _OWN) else _copied(kept)
    if not _is_of_torch_alone(type(selection)):
        return {}
    try:
        # On a copy: what it remembers of tensors without numbers must not be found later.
        mine = copy.deepcopy(selection)
        before = snapshot_with_fields(mine)
        with _Careful():  # type: ignore[no-untyped-call] # torch's __init__ has no types
            kept = _copied(select(mine, tensor))
        return kept if same(before, snapshot_with_fields(mine)) else {}
    except Exception:  # noqa: BLE001 - whatever it is, it will be told when it runs for real
        return {}


def _copied(kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # An op that writes in place may come after; where none does, the compiler copies nothing.
    return {name: value.clone() for name, value in kept.items()}


def _is_of_torch_alone(cls: type) -> bool:
    """Return whether a class selects by torch and plain Python alone, as far as its code shows.

    A clock, a file, a random number, a counter elsewhere would be what it was when traced.
    """
    method = getattr(cls, "make_selection", None)
    if not isinstance(method, types.FunctionType) or method.__closure__:
        return False
    return all(_is_plain(cls, method, code) for code in _codes(method.__code__))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_plain(cls: type, method: types.FunctionType, code: types.CodeType) -> bool:
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in _WRITES:
            return False
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not _is_known(method, name):
            return False
        # Another method of its own may do anything.
        if instruction.opname in ("LOAD_METHOD", "LOAD_ATTR") and callable(
            getattr(cls, str(name), None)
        ):
            return False
    return True


def _is_known(method: types.FunctionType, name: str) -> bool:
    if name not in method.__globals__:
        return name in _BUILTINS and hasattr(builtins, name)
    value = method.__globals__[name]
    if isinstance(value, types.ModuleType):
        return value is math or value.__name__.partition(".")[0] == "torch"
    return isinstance(value, (bool, int, float, str, tuple, torch.dtype, type(None)))
