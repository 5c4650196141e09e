"""Which ops of an architecture share a box of its picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from fxray.architecture import Op

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fxray.architecture import Architecture

__all__ = ["READABLE", "Box", "Fold", "chain", "fold", "module_path"]

READABLE = 60
"""Boxes that a person still takes in; more, and the automatic depth folds deeper."""

_CALL = re.compile(r"@\d+")


@attrs.frozen
class Box:
    """One box of a picture: an op, a folded module, or a run of ops.

    Attributes:
        ops: what stands in the box, in the order it runs.
        chain: the module calls drawn open around the box, outermost first.
        call: the module call that is folded into the box, empty for an op or a run.
    """

    ops: tuple[Op, ...]
    chain: tuple[str, ...]
    call: str = ""

    @property
    def folded(self) -> bool:
        """Whether the box stands for more than the one op it is named by."""
        return len(self.ops) > 1


@attrs.frozen
class Fold:
    """Every box of a picture, and the box that each op stands in.

    Attributes:
        boxes: in the order in which their first op runs.
        places: index of a box by op path.
        depth: how many levels of modules are drawn open.
    """

    boxes: tuple[Box, ...]
    places: Mapping[str, int] = attrs.field(hash=False)
    depth: int


def module_path(call: str) -> str:
    """Return the path of the module that `call` calls.

    >>> module_path("layer1.0@1")
    'layer1.0'
    """
    return _CALL.sub("", call)


def chain(op: Op) -> tuple[str, ...]:
    """Return the modules `op` stands in, containers that are never called included.

    A `ModuleList` has no call of its own, yet it is what folds a stack of a hundred
    blocks into one box, so it is put back between a call and the call around it.

    >>> op = Op("blocks.0.fc", "linear-0", "linear", "module", "Linear", scope=("blocks.0",))
    >>> chain(op)
    ('blocks', 'blocks.0')
    """
    calls: list[str] = []
    around = ""
    for call in op.scope:
        path = module_path(call)
        if not around or path.startswith(f"{around}."):
            parts = path.split(".")
            first = around.count(".") + 2 if around else 1
            calls.extend(".".join(parts[:n]) for n in range(first, len(parts)))
        calls.append(call)
        around = path
    return tuple(calls)


def fold(architecture: Architecture, depth: int | None = None) -> Fold:
    """Return the boxes of a picture with `depth` levels of modules drawn open.

    With `depth=None` it is the deepest at which at most `READABLE` boxes are left; where
    even 0 leaves more, ops that follow each other share a box, so that a picture of
    thousands of ops without a single module has tens of boxes too.
    """
    chains = {op.path: chain(op) for op in architecture.values()}
    if depth is not None:
        return _at_depth(architecture, chains, depth)
    deepest = max(map(len, chains.values()), default=0)
    for level in range(deepest, -1, -1):
        if len({_group(path, calls, level) for path, calls in chains.items()}) <= READABLE:
            return _at_depth(architecture, chains, level)
    return _in_runs(_at_depth(architecture, chains, 0))


def _group(path: str, calls: tuple[str, ...], depth: int) -> tuple[str, ...]:
    """Return what names the box of an op; a lone path cannot equal a chain with a call."""
    return calls[: depth + 1] if len(calls) > depth else (*calls, "", path)


def _at_depth(
    architecture: Architecture, chains: Mapping[str, tuple[str, ...]], depth: int
) -> Fold:
    groups: dict[tuple[str, ...], list[Op]] = {}
    for op in architecture.values():
        groups.setdefault(_group(op.path, chains[op.path], depth), []).append(op)
    boxes = []
    for ops in groups.values():
        calls = chains[ops[0].path]
        call = calls[depth] if len(calls) > depth and len(ops) > 1 else ""
        boxes.append(Box(tuple(ops), calls[:depth], call))
    return _numbered(boxes, depth)


def _in_runs(whole: Fold) -> Fold:
    """Return `whole` with boxes that follow each other joined into `READABLE // 2`."""
    size = math.ceil(len(whole.boxes) / (READABLE // 2))
    runs = [whole.boxes[n : n + size] for n in range(0, len(whole.boxes), size)]
    return _numbered((Box(tuple(op for box in run for op in box.ops), ()) for run in runs), depth=0)


def _numbered(boxes: Iterable[Box], depth: int) -> Fold:
    kept = tuple(boxes)
    return Fold(kept, {op.path: n for n, box in enumerate(kept) for op in box.ops}, depth)
