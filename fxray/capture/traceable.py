"""Selections run while a graph is traced: as ops of it, where that is safe."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxray.selections import select
from fxray.torch_private import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxray.selections import Selection

__all__ = ["traced"]

_LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MAY_FAIL = frozenset(
    "index index_select index_put index_add index_copy index_fill gather take embedding scatter "
    "scatter_add scatter_reduce put masked_scatter one_hot bincount multinomial".split()
)
"""Ops that fail on some numbers, or take what lies beyond: inside a graph, with the training."""


class _NotTracedError(Exception):
    """A selection does what must not become a part of the model's graph."""


class _Careful(TorchDispatchMode):
    """Ends a selection that looks at numbers, or that some numbers could make fail."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2].partition(".")[0].rstrip("_")
        if name in _MAY_FAIL or any(tag in func.tags for tag in _LOOKS):
            raise _NotTracedError(name)
        return func(*args, **(kwargs or {}))


def traced(selection: Selection, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `selection` keeps of a tensor that is being traced, by field.

    Empty where it cannot be a part of a graph, because it looks at numbers, remembers
    something from call to call, draws from Python's or numpy's random numbers, or may fail.
    """
    if type(selection).__module__.startswith("fxray.selections."):
        return select(selection, tensor)
    try:
        before = _state(selection)
        with _Careful():  # type: ignore[no-untyped-call] # torch's __init__ has no types
            kept = select(selection, tensor)
        return kept if _same(before, _state(selection)) else {}
    except Exception:  # noqa: BLE001 - whatever it is, it will be told when it runs for real
        return {}


def _state(selection: Selection) -> tuple[Any, ...]:
    numbers: Any = np.random.get_state()  # noqa: NPY002 - the one that selections share
    fields = copy.deepcopy(getattr(selection, "__dict__", {}))
    return random.getstate(), numbers[1].tobytes(), numbers[2], fields


def _same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return bool(before == after)
