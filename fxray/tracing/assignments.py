"""What a forward sets on its modules: written at the end of its graph, and read as it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxray.errors import NoGraphError
from fxray.tracing import runtime
from fxray.tracing.numbers import TracedFloat, TracedInt
from fxray.tracing.patches import refused_change

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxray.tracing.provenance import Provenance
    from fxray.tracing.state import ModelState

__all__ = ["ChangedAttributesError", "read_live", "write_assignments"]

_NUMBERS = (int, float)
_SETTLED = (bool, int, float, str, type(None))


class ChangedAttributesError(NoGraphError):
    """The forward changes attributes that its graph was not written to follow.

    Attributes:
        numbers: (path, name) of the plain numbers among them, which a graph can read and set.
    """

    def __init__(self, message: str, numbers: frozenset[tuple[str, str]]) -> None:
        super().__init__(message)
        self.numbers = numbers


def read_live(nodes: Provenance, module: nn.Module, path: str, name: str, value: Any) -> Any:
    """Return a number of a module as the graph reads it at every call, not as it was."""
    if type(value) not in _NUMBERS:
        return value
    node = nodes.graph.call_function(getattr, (_holder(nodes, module, path), name))
    return nodes.remember(value, node)


def write_assignments(
    nodes: Provenance, state: ModelState, paths: Mapping[nn.Module, str], writer: object
) -> None:
    """Write what the forward assigned to attributes.

    Raises:
        ChangedAttributesError: some of it no graph can follow, or not this one.
    """
    numbers: set[tuple[str, str]] = set()
    others: list[tuple[nn.Module, str]] = [
        (module, f"{paths.get(module, '')}.{name}".removeprefix("."))
        for module, name in state.deleted()
    ]
    made: list[tuple[Any, ...]] = []
    for module, name, old, value in state.assigned():
        path = paths.get(module, "")
        traced = isinstance(value, (TracedInt, TracedFloat)) and value.writer is writer
        if isinstance(value, torch.Tensor) or traced:
            # What is set inside a leaf, it sets again when it runs.
            if traced or nodes.knows(value):
                made.append((_holder(nodes, module, path), name, nodes.argument(value)))
        elif name == "training" or (type(old) is type(value) in _SETTLED and old == value):
            continue
        elif type(old) in _NUMBERS and type(value) in _NUMBERS:
            numbers.add((path, name))
        else:
            others.append((module, f"{path}.{name}" if path else name))
    for arguments in made:  # when all is read: two may have changed places
        nodes.graph.call_function(runtime.assign, arguments)
    if numbers or others:
        by_path = {path: module for module, path in paths.items()}
        named = [(by_path[path], f"{path}.{name}" if path else name) for path, name in numbers]
        refused = refused_change(*[*others, *named][0])
        raise ChangedAttributesError(str(refused), frozenset(numbers))


def _holder(nodes: Provenance, module: nn.Module, path: str) -> fx.Node:
    return nodes.graph.get_attr(path) if path else nodes.constant(module)
