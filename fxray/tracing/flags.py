"""Which `training` flags of sub-modules the traced graphs depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxray.tracing.module import MODES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from fxray.tracing.execution import WrittenGraph

__all__ = ["flags_that_matter"]


def flags_that_matter(
    model: nn.Module, written: Mapping[str, WrittenGraph]
) -> dict[str, dict[str, bool]]:
    """Return, by mode, the `training` flags of inlined modules on which their ops depend."""
    lines = {mode: _lines_by_module(w.graph) for mode, w in written.items()}
    paths = dict.fromkeys(path for w in written.values() for path in w.inlined if path)
    matter = [path for path in paths if lines["train"].get(path) != lines["eval"].get(path)]
    flags = {}
    for mode in MODES:
        training = mode == MODES[0]
        keeps = model.training == training
        flags[mode] = {
            path: model.get_submodule(path).training if keeps else training for path in matter
        }
    return flags


def _lines_by_module(graph: Any) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        own = next((path for path, _ in reversed(stack.values())), "")
        constants = [a for a in (*node.args, *node.kwargs.values()) if not hasattr(a, "op")]
        lines.setdefault(own, []).append(f"{node.op} {node.target} {constants}")
    return lines
