"""What is left to do on a graph once it is written."""

from __future__ import annotations

import collections
import operator
from typing import TYPE_CHECKING

import attrs

from fxray.tracing.ops import info_of, set_info
from fxray.tracing.torch_calls import SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from fxray.architecture import TensorSpec

__all__ = ["gather_inputs", "prune"]

_PURE_FUNCTIONS = frozenset(
    getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg")
) | frozenset([getattr, *(getattr(operator, n) for n in ("lt", "le", "gt", "ge", "eq", "ne"))])


def prune(graph: fx.Graph) -> None:
    """Erase what nobody uses and what has no effect. Never stock dead-code elimination.

    That deletes `y.add_(5)` and captures, whose results nobody uses either. Every op keeps
    which of those of its call, name and line it was, the erased ones counted: they still
    run where the model runs by itself.
    """
    seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
    erased = []
    for node in graph.nodes:
        info = info_of(node)
        if info is not None and info.name:
            spot = info.call, info.name, info.where
            node.meta["fxray_occurrence"] = seen[spot]
            seen[spot] += 1
    for node in reversed(graph.nodes):
        if not node.users and (
            (node.op == "call_function" and node.target in _PURE_FUNCTIONS)
            or (node.op == "call_method" and node.target in SIZES)
            or node.op == "get_attr"
        ):
            info = info_of(node)
            if info is not None and info.name:
                spot = info.call, info.name, info.where
                erased.append((spot, node.meta["fxray_occurrence"]))
            graph.erase_node(node)
    graph.output_node().meta["fxray_erased"] = erased


def gather_inputs(graph: fx.Graph) -> None:
    """Fill in the specs of every op's tensor arguments from the ops before it."""
    specs: dict[fx.Node, dict[str, TensorSpec]] = {}
    for node in graph.nodes:
        info = node.meta.get("fxray_info")
        if info is not None:
            specs[node] = dict(zip(info.items, info.outputs, strict=True))
            given = [s for a in node.all_input_nodes for s in _given(a, specs)]
            set_info(node, attrs.evolve(info, inputs=tuple(given)))
        elif node.meta.get("fxray_passes") and node.target is operator.getitem:
            source, key = node.args
            inner = specs.get(source, {})
            specs[node] = {
                item.partition(".")[2]: spec
                for item, spec in inner.items()
                if item.partition(".")[0] == str(key)
            }


def _given(node: fx.Node, specs: dict[fx.Node, dict[str, TensorSpec]]) -> Iterator[TensorSpec]:
    yield from specs.get(node, {}).values()
