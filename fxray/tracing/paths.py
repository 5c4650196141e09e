"""One path for every op, the same in every mode where the op is the same."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from fxray.tracing.ops import NodeInfo, info_of, set_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

__all__ = ["name_ops"]


def name_ops(graphs: Mapping[str, fx.Graph]) -> None:
    """Give every op of the graphs of one model, train first, its path.

    A function or method is its module call, its name and a counter that runs per module
    call and name, so that a further op elsewhere renumbers nothing. Where the modes
    differ (an average kept in training only), ops are told apart by the line that calls
    them, and those of the other mode alone are counted after those of the first.
    """
    ops = {
        mode: [(n, i) for n in graph.nodes if (i := info_of(n))] for mode, graph in graphs.items()
    }
    taken = {info.call for found in ops.values() for _, info in found if info.role == "module"}
    functions: set[str] = set()
    for stem, modes in _by_stem(ops).items():
        path = ".".join(filter(None, stem))
        for number, nodes in enumerate(_aligned(modes)):
            numbered = f"{path}_{number}" if number else path
            numbered = f"{numbered}@op" if numbered in taken else numbered
            functions.add(numbered)
            for node in nodes:
                set_path(node, numbered)
    for found in ops.values():
        for node, info in found:
            if not info.name:
                # An argument may be called as a module or an op is: model(conv1=…).
                named = info.role in ("input", "parameter")
                clash = named and info.call in taken | functions
                set_path(node, f"{info.call}@{info.role}" if clash else info.call)


_Found = list[tuple["fx.Node", NodeInfo]]


def _by_stem(ops: Mapping[str, _Found]) -> dict[tuple[str, str], dict[str, _Found]]:
    stems: dict[tuple[str, str], dict[str, _Found]] = {}
    for mode, found in ops.items():
        for node, info in found:
            if info.name:
                modes = stems.setdefault((info.call, info.name), {})
                modes.setdefault(mode, []).append((node, info))
    return stems


def _aligned(modes: Mapping[str, _Found]) -> list[list[fx.Node]]:
    """Return the nodes of each op, in the order of their numbers."""
    first, *others = modes.values()
    numbers = [[node] for node, _ in first]
    keys = [_key(info) for _, info in first]
    for other in others:
        matcher = difflib.SequenceMatcher(None, keys, [_key(i) for _, i in other], autojunk=False)
        matched: set[int] = set()
        for ours, theirs, size in matcher.get_matching_blocks():
            for k in range(size):
                numbers[ours + k].append(other[theirs + k][0])
                matched.add(theirs + k)
        numbers += [[node] for k, (node, _) in enumerate(other) if k not in matched]
    return numbers


def _key(info: NodeInfo) -> tuple[object, ...]:
    return info.where, info.target, tuple(len(spec.shape) for spec in info.outputs)
