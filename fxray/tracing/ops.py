"""From the nodes of fx graphs to the ops of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import fx, nn

from fxray.architecture import Role, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "NodeInfo",
    "info_of",
    "module_fields",
    "op_fields",
    "path_of",
    "producers",
    "set_info",
    "set_path",
    "sources",
]

_INFO, _PATH = "fxray_info", "fxray_path"


@attrs.frozen
class NodeInfo:
    """What the tracer saw of an op; `Op` without its names.

    Attributes:
        call: for a module, its call (`"conv1"`, `"conv1@1"`); for an input or a
            parameter, its path; for the rest the module call it stands in.
        name: for a function or method, what it is called in a path; else empty.
    """

    role: Role
    call: str
    name: str
    type: str
    target: str
    scope: tuple[str, ...] = ()
    module: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    items: tuple[str, ...] = ("",)
    parameters: Mapping[str, TensorSpec] = attrs.field(factory=dict)
    settings: str = ""
    where: str = ""


def info_of(node: fx.Node) -> NodeInfo | None:
    """Return what the tracer saw of `node`, None if it is no op."""
    return node.meta.get(_INFO)


def set_info(node: fx.Node, info: NodeInfo) -> None:
    """Make an op of `node`."""
    node.meta[_INFO] = info


def path_of(node: fx.Node) -> str | None:
    """Return the canonical path of the op that `node` is, None if it is no op."""
    return node.meta.get(_PATH)


def set_path(node: fx.Node, path: str) -> None:
    """Give the op that `node` is its canonical path."""
    node.meta[_PATH] = path


def module_fields(module: nn.Module) -> dict[str, Any]:
    """Return the `NodeInfo` fields that a leaf module decides by itself."""
    cls = type(module)
    return {
        "target": f"{cls.__module__}.{cls.__qualname__}",
        "parameters": {name: TensorSpec.of(p) for name, p in module.named_parameters()},
        "settings": module.extra_repr(),
    }


def op_fields(info: NodeInfo) -> dict[str, Any]:
    """Return the fields of `Op` that `info` holds."""
    fields = attrs.asdict(info, recurse=False)
    del fields["call"], fields["name"]
    return fields


def sources(node: fx.Node) -> Iterator[tuple[str, str]]:
    """Yield (path of an op, slot) for every tensor that `node` is given."""
    for slot, argument in _nodes_in((*node.args,), dict(node.kwargs)):
        for source in producers(argument):
            yield source, slot


def _nodes_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    """Yield (slot, node) for every node in the arguments, nested ones as `"0.1"`."""
    for i, argument in enumerate(args):
        yield from _in_argument(argument, str(i))
    for name, argument in kwargs.items():
        yield from _in_argument(argument, name)


def _in_argument(value: Any, slot: str) -> Iterator[tuple[str, fx.Node]]:
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, fx.Node):
        yield slot, value
    elif isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (tuple, list)):
        parts = enumerate(value)
    elif isinstance(value, slice):
        parts = ((part, getattr(value, part)) for part in ("start", "stop", "step"))
    for key, inner in parts:
        yield from _in_argument(inner, f"{slot}.{key}")


def producers(node: fx.Node) -> tuple[str, ...]:
    """Return the paths of the ops whose tensor `node` is or holds."""
    path = path_of(node)
    if path is not None:
        return (path,)
    if node.op == "call_function" and node.meta.get("fxray_passes"):
        found = (p for _, a in _nodes_in(node.args, dict(node.kwargs)) for p in producers(a))
        return tuple(dict.fromkeys(found))
    return ()
