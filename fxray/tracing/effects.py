"""What a forward leaves in lists, dicts and objects of its modules: its graph does it again."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxray.errors import NoGraphError
from fxray.tracing import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import fx, nn

    from fxray.tracing.execution import GraphWriter
    from fxray.tracing.state import Held, ModelState
    from fxray.tracing.written import WrittenGraph

__all__ = ["write_effects"]

_PLAIN = (bool, int, float, str, type(None))


def write_effects(
    writer: GraphWriter,
    written: WrittenGraph,
    state: ModelState,
    run_again: Callable[[], ModelState],
) -> tuple[str, ...]:
    """Write at the end of a graph what its forward left behind; return notes.

    A second run tells what is set at each call (the losses of the layers, to be summed up
    later) from a cache, which is filled once and which a graph need not fill.

    Args:
        writer: has written the graph.
        written: the graph.
        state: of the model as it was before.
        run_again: runs the model once more; returns its state as it was between the two.

    Raises:
        NoGraphError: the forward leaves what grows from call to call, or what a graph
            cannot make.
    """
    filled = state.filled()
    if not filled:
        return ()
    between = run_again()
    growing = {id(held.content): held for held in between.filled()}
    read = {id(value) for value in written.constants.values()}
    notes = []
    for held in filled:
        now = growing.get(id(held.content))
        if now is None:
            new = _new(held.content, held.before)
            if new is None:
                raise _refused(writer.model)
            if not _all_plain(new.values()):
                notes.append("a Python cache on a module was filled")
                continue
            _write(writer, written, held, new)
            continue
        # `now.before` is what the traced run left; it must be all there is, and all new.
        new = _new(now.before, held.before)
        kept = {id(item) for item in _items(held.before)}
        if new is None or not kept.isdisjoint(read) or not _alike(new, now.before, now.content):
            raise _refused(writer.model)
        _write(writer, written, held, new)
    return tuple(dict.fromkeys(notes))


def _write(writer: GraphWriter, written: WrittenGraph, held: Held, new: Mapping[Any, Any]) -> None:
    nodes, graph = writer.nodes, written.graph
    if any(isinstance(v, torch.Tensor) and nodes.node_of(v) is None for v in new.values()):
        raise _refused(writer.model)
    with graph.inserting_before(graph.output_node()):
        owner = _found(writer, written, held.owner)
        values = {key: nodes.result(value) for key, value in new.items()}
        if isinstance(held.content, dict):
            graph.call_function(runtime.put, (owner, values))
        else:
            graph.call_function(runtime.refill, (owner, [*values.values()]))


def _found(writer: GraphWriter, written: WrittenGraph, owner: Any) -> fx.Node:
    """Return the node that looks the owner up where a module has it: it may be another by then."""
    graph = written.graph
    for path, module in writer.model.named_modules():
        for name, value in vars(module).items():
            if value is owner:
                holder = graph.get_attr(path) if path else writer.nodes.constant(module)
                if not path:
                    written.constants[str(holder.target)] = module
                return graph.call_function(getattr, (holder, name))
    raise _refused(writer.model)


def _refused(model: nn.Module) -> NoGraphError:
    return NoGraphError(
        f"the forward of {type(model).__name__} fills a list, a dict or an object of its own with "
        "more at each call, which a graph does not; return it instead"
    )


def _pairs(content: Any) -> Mapping[Any, Any]:
    return content if isinstance(content, Mapping) else dict(enumerate(content))


def _items(content: Any) -> Iterable[Any]:
    return _pairs(content).values()


def _new(now: Any, before: Any) -> dict[Any, Any] | None:
    """Return what is new in a container, by key or place; None where it cannot be told."""
    if not isinstance(now, (dict, list, collections.deque)):
        return None
    old, current = _pairs(before), _pairs(now)
    if isinstance(now, dict):
        gone = [key for key in old if key not in current]
        return None if gone else {k: v for k, v in current.items() if old.get(k, old) is not v}
    known = {id(item) for item in old.values() if not isinstance(item, _PLAIN)}
    return None if any(id(item) in known for item in current.values()) else {**current}


def _all_plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, _PLAIN) for value in values)


def _alike(new: Mapping[Any, Any], first: Any, second: Any) -> bool:
    """Return whether two calls left the same but for tensors, of which none stayed."""
    one, other = _pairs(first), _pairs(second)
    if one.keys() != other.keys():
        return False
    return all(
        _another(one[key], other[key]) if key in new else one[key] is other[key] for key in one
    )


def _another(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a is not b
    return type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b)
