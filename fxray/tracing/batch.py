"""Two traces at two batch sizes, compared: what is free, what only looked so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import fx

from fxray.torch_private import assertion
from fxray.tracing.ops import info_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxray.tracing.written import WrittenGraph


__all__ = ["Apart", "batch_size", "difference", "far_from", "mark_live_guards", "resize", "tiled"]


_SHAPED_BY_DATA = frozenset(
    ["nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "where"]
)
"""Functions whose result is as large as the numbers of a tensor say."""


def batch_size(tensors: Sequence[torch.Tensor]) -> int | None:
    """Return the size that dim 0 of the tensors shares, None if they share none."""
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def resize(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return a tensor like `tensor` with `size` slices along `dim`, repeated in turn."""
    if not tensor.shape[dim]:
        return tensor.detach().clone()
    kept = torch.arange(size, device=tensor.device) % tensor.shape[dim]
    made = tensor.detach().index_select(dim, kept)
    if tensor.dim() == 4 and not tensor.is_contiguous():
        # A forward may look at that, and at nothing else of how memory is laid out.
        made = made.contiguous(memory_format=torch.channels_last)
    return made


def tiled(size: int) -> int:
    """Return a size far above `size`, at which a tensor holds each of its slices twice."""
    return 2 * size + 3


def far_from(size: int) -> int:
    """Return a batch size far from `size`: smaller, where that leaves room, to spare memory.

    >>> [far_from(size) for size in (2, 8, 32, 256)]
    [7, 19, 12, 87]
    """
    return size // 3 + 2 if size > 8 else 2 * size + 3


@attrs.frozen
class Apart:
    """Where two traces of one model differ.

    Attributes:
        text: what is different, in words.
        by_branch: whether a branch on data went another way, which other values may undo.
        by_guard: whether it is a branch of either kind, which a guard tells at every call.
    """

    text: str
    by_branch: bool = False
    by_guard: bool = False

    def __str__(self) -> str:
        return self.text


def difference(one: WrittenGraph, other: WrittenGraph) -> Apart | None:
    """Return where two traces of one model differ; None where they are the same.

    Alike means: the same ops on the same values, every size that follows the batch
    written as the node it came from. A number that differs has lost its node
    (`int(n)`, `range(n)`), a constant that differs was computed out of sight.
    """
    ours, theirs = [*one.graph.nodes], [*other.graph.nodes]
    twin = dict(zip(ours, theirs, strict=False))
    for a, b in zip(ours, theirs, strict=False):
        if a.op != b.op or (a.op != "get_attr" and a.target != b.target):
            return Apart(f"it computes something else {_place(a)}")
        if a.op == "get_attr":
            if not _same_attribute(a, b, one.constants, other.constants):
                return Apart(f"a value computed outside torch changed, {_place(a)}")
            continue
        if a.target.__class__ is b.target.__class__ and not _same_arguments(a, b, twin):
            if "fxray_branch" in a.meta:
                where = str(a.args[2]).replace("\\", "/").rpartition("/")[2]
                text = f"Python took another value of a tensor at {where}"
                return Apart(text, by_branch=True, by_guard=True)
            text = f"a number that Python computed changed {_place(a)}"
            return Apart(text, by_guard="fxray_guard" in a.meta)
    if len(ours) != len(theirs):
        return Apart(f"{len(ours)} nodes became {len(theirs)}")
    return None


def mark_live_guards(one: WrittenGraph, other: WrittenGraph) -> None:
    """Mark in `one` the guards that other sizes may fail: what the report tells of.

    A comparison whose numbers are the same in both depends only on sizes that every call
    is checked for; unless some size follows the data.
    """
    by_data = any(map(_shaped_by_data, one.graph.nodes))
    for a, b in zip(one.graph.nodes, other.graph.nodes, strict=True):
        if "fxray_guard" in a.meta and (by_data or a.meta["fxray_guard"] != b.meta["fxray_guard"]):
            a.meta["fxray_live"] = True


def _shaped_by_data(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    if name in _SHAPED_BY_DATA:
        return True
    indices = node.all_input_nodes[1:] if name == "getitem" else []
    infos = filter(None, map(info_of, indices))
    return any(spec.dtype == "bool" for info in infos for spec in info.outputs)


def _same_arguments(a: fx.Node, b: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> bool:
    if a.target is assertion:  # what torchvision asserts sizes by; its message names one
        return _same_argument(a.args[0], b.args[0], twin)
    return _same_argument(a.args, b.args, twin) and _same_argument(a.kwargs, b.kwargs, twin)


def _same_argument(x: Any, y: Any, twin: Mapping[fx.Node, fx.Node]) -> bool:
    if isinstance(x, fx.Node):
        return twin.get(x) is y
    if type(x) is not type(y):
        return False
    if isinstance(x, slice):
        x, y = (x.start, x.stop, x.step), (y.start, y.stop, y.step)
    if isinstance(x, dict):
        if [*x] != [*y]:
            return False
        x, y = [*x.values()], [*y.values()]
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(
            _same_argument(v, w, twin) for v, w in zip(x, y, strict=True)
        )
    both_nan = isinstance(x, float) and math.isnan(x) and math.isnan(y)
    return both_nan or bool(x == y)


def _same_attribute(
    a: fx.Node, b: fx.Node, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> bool:
    one, other = str(a.target), str(b.target)
    if one not in ours or other not in theirs:
        return one == other
    return _same_constant(ours[one], theirs[other])


def _same_constant(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return bool(_bits(x) == _bits(y))
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return bool(x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes())
    # An object without an equality of its own was made anew by each forward: nothing to compare.
    own_equality = "__eq__" in {name for cls in type(x).__mro__[:-1] for name in vars(cls)}
    if type(x) is not type(y) or x is y or not own_equality:
        return type(x) is type(y)
    try:
        return bool(x == y)
    except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything; then they differ
        return False


def _bits(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous()
    return flat.shape, flat.dtype, flat.reshape(-1).view(torch.uint8).numpy().tobytes()


def _place(node: fx.Node) -> str:
    """Return where a node stands: at the user's line, or after the last op that has one."""
    word, at = "at", node
    while at.op != "root":
        info = info_of(at)
        if info is not None and info.where:
            return f"{word} {info.where}"
        word, at = "after", at.prev
    return "at its beginning"
