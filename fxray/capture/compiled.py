"""Captures that a compiler sees through: ops it may not move, and the graph they stand in.

Compiled code runs no Python of ours. In it a forward begins with the op `begin`, which
counts it; what was selected of outputs, as ops that the compiler may fuse with the model's,
is handed over by `emit`: all of a forward at once at its end, each gradient from a hook on
its tensor. The forward's ticket goes with them, so that a gradient finds its forward in
whatever order backwards come.

The ticket is an input of the graph, not an output of `begin`: a partitioner that is to
save inputs alone (`activation_memory_budget=0`) would run `begin` again in the backward.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.capture.node import capture, receiver_of
from fxray.capture.traceable import traced
from fxray.errors import FxrayWarning
from fxray.torch_private import FakeTensor, keep_in_order
from fxray.tracing.codegen import copy_graph
from fxray.tracing.results import tensor_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import fx

    from fxray.capture.node import Receiver
    from fxray.selections import Selection

__all__ = ["Tickets", "compilable_graph"]

UNIT, RECORD = "\x1f", "\x1e"
"""What ASCII has for text inside text: between the parts of a line, between lines."""

_LIBRARY = torch.library.Library("fxray", "DEF")
_NOT_IN_A_CUDA_GRAPH = (torch.Tag.cudagraph_unsafe,)


def _define(schema: str, run: Callable[..., Any], pretend: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_NOT_IN_A_CUDA_GRAPH)
    # Not torch.library.custom_op, which costs three times as much a call.
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxray::{name}", pretend, lib=_LIBRARY)
    op = getattr(torch.ops.fxray, name).default
    # Else it is left out, for nothing uses what it returns, or run again in a recomputation.
    keep_in_order(op)
    return op


class Tickets:
    """The tickets of one module's compiled forwards, and which forward each of them is.

    Attributes:
        next: the ticket of the next forward, 0-dim int64; a new tensor each time, for those
            before are saved for their backwards.
    """

    def __init__(self, handle: int) -> None:
        self.next = torch.tensor(0)
        self._forwards: dict[int, tuple[int, weakref.ref[Receiver] | None]] = {}
        _TICKETS[handle] = self

    def give(self, ticket: int, number: int, receiver: Receiver | None) -> None:
        """Let a ticket stand for the forward of that number of a receiver."""
        if ticket in self._forwards:
            number = _NOBODY
            text = "a compiled module ran on two threads at once; such forwards are not captured"
            with contextlib.suppress(FxrayWarning):
                warnings.warn(text, FxrayWarning, stacklevel=2)
        self._forwards[ticket] = number, None if receiver is None else weakref.ref(receiver)
        if len(self._forwards) > _REMEMBERED:
            del self._forwards[next(iter(self._forwards))]
        self.next = torch.tensor(ticket + 1)

    def number(self, ticket: int, receiver: Receiver) -> int:
        """Return the number of the receiver's forward, -1 where it is none of its own."""
        number, whose = self._forwards.get(ticket, (_NOBODY, None))
        return number if whose is not None and whose() is receiver else _NOBODY


_TICKETS: weakref.WeakValueDictionary[int, Tickets] = weakref.WeakValueDictionary()
_NOBODY = -1
_REMEMBERED = 4096
"""So many forwards back a backward still finds its own."""


def _begin(ticket: torch.Tensor, handle: int, training: bool, weights: bool, due: str) -> None:
    receiver, tickets = receiver_of(handle), _TICKETS.get(handle)
    if tickets is not None:
        number = _NOBODY
        if receiver is not None:
            number = receiver.begin_numbered(training=training, weights=weights, due=due)
        tickets.give(int(ticket), number, receiver)


def _emit(
    kept: Sequence[torch.Tensor],
    ticket: torch.Tensor,
    sizes: Sequence[int],
    handle: int,
    layout: str,
) -> None:
    receiver, tickets = receiver_of(handle), _TICKETS.get(handle)
    if receiver is None or tickets is None:
        return
    number = tickets.number(int(ticket), receiver)
    if number == _NOBODY:
        return
    lines, awaited, returned = _parsed(layout)
    at = place = 0
    for line in lines:
        size = tuple(sizes[place : place + line.dims])
        place += line.dims
        if not line.fields:
            receiver.take_whole(number, line.path, line.kind, item=line.item, tensor=kept[at])
            at += 1
            continue
        # Copies: the compiler uses the memory of what it gave us again.
        fields = {name: kept[at + k].clone() for k, name in enumerate(line.fields)}
        at += len(line.fields)
        receiver.take(number, line.path, line.kind, item=line.item, fields=fields, size=size)
    if awaited:
        receiver.await_gradients(number, awaited)
    if returned:
        receiver.returned(number)


begin = _define(
    "begin(Tensor ticket, int handle, bool training, bool weights, str due) -> ()",
    _begin,
    lambda *_: None,
)
emit = _define(
    "emit(Tensor[] kept, Tensor ticket, SymInt[] sizes, int handle, str layout) -> ()",
    _emit,
    lambda *_: None,
)


# ---------------------------------------------------------------------- what is handed over


@attrs.frozen
class _Line:
    """What one tensor of an op handed over.

    Attributes:
        path: of the op.
        kind: of the capture.
        item: which of the op's tensors.
        dims: how many numbers its size is.
        fields: names of what was selected of it; none where the selection is yet to run.
    """

    path: str
    kind: str
    item: str
    dims: int
    fields: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _parsed(layout: str) -> tuple[tuple[_Line, ...], tuple[tuple[str, str], ...], bool]:
    """Return the lines of a layout, (path, item) of awaited gradients, and whether it ends."""
    lines: list[_Line] = []
    awaited: list[tuple[str, str]] = []
    returned = False
    for text in layout.split(RECORD):
        path, kind, item, dims, *fields = text.split(UNIT)
        if kind == "awaited":
            awaited.append((path, item))
        elif kind == "returned":
            returned = True
        else:
            lines.append(_Line(path, kind, item, int(dims), tuple(fields)))
    return tuple(lines), tuple(awaited), returned


def _line(path: str, kind: str, item: str, dims: int, fields: Iterable[str]) -> str:
    return UNIT.join([path, kind, item, str(dims), *fields])


# ---------------------------------------------------------------------- what a compiler traces


class _Taking:
    """What the capture nodes of one graph become, in functions that Dynamo does not look into.

    They run when the graph they stand in is traced to ops, once or several times, on
    tensors without numbers; what they note is the same each time. So a selection is plain
    Python at work, and one that fails there is not traced but run inside the op `emit`.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._lines: dict[str, tuple[list[str], list[int]]] = {}
        self._awaited: dict[str, list[str]] = {}

    def keeper(self, path: str, kind: str, selection: Selection) -> Callable[..., Any]:
        """Return the function that selects what is kept at a node; it returns tensors."""
        key = _line(path, kind, "", 0, ())
        safe: dict[str, bool] = {}

        def keep(value: Any, ticket: torch.Tensor) -> tuple[torch.Tensor, ...]:
            lines, sizes, kept = list[str](), list[int](), list[torch.Tensor]()
            for item, tensor in tensor_items(value):
                held = tensor.detach()
                # Dynamo asks first, for the shapes; what it was given then it must get again.
                asked = isinstance(held, FakeTensor) or item not in safe
                fields = traced(selection, held, known=not asked) if asked or safe[item] else {}
                safe[item] = bool(fields)
                line = _line(path, kind, item, held.dim(), fields)
                if fields:
                    kept += fields.values()
                    lines.append(line)
                    sizes += held.shape
                else:
                    # Now: at the end of the forward the whole tensor would have to be there still.
                    emit([held], ticket, [*held.shape], self._handle, line)
            self._lines[key] = lines, sizes
            return tuple(kept)

        return _opaque(keep)

    def watcher(self, path: str, selection: Selection) -> Callable[..., Any]:
        """Return the function that hooks what has a gradient at a node."""

        def watch(value: Any, ticket: torch.Tensor) -> torch.Tensor:
            self._awaited[path] = []
            for item, tensor in tensor_items(value):
                if tensor.requires_grad:
                    self._hook(tensor, ticket, path, item, selection)
                    self._awaited[path].append(_line(path, "awaited", item, 0, ()))
            return ticket

        return _opaque(watch)

    def _hook(
        self, tensor: torch.Tensor, ticket: torch.Tensor, path: str, item: str, selection: Selection
    ) -> None:
        def arrived(gradient: torch.Tensor | None) -> None:
            # None came of a branch that has no gradient.
            if gradient is not None:
                fields = traced(selection, gradient)
                line = _line(path, "grad", item, gradient.dim(), fields)
                kept = [*fields.values()] or [gradient]
                emit(kept, ticket, [*gradient.shape], self._handle, line)

        tensor.register_hook(arrived)

    def ender(self) -> Callable[..., Any]:
        """Return the function that hands over what a forward kept."""

        def hand_over(ticket: torch.Tensor, *kept: tuple[torch.Tensor, ...]) -> torch.Tensor:
            lines = [line for noted, _ in self._lines.values() for line in noted]
            sizes = [size for _, noted in self._lines.values() for size in noted]
            lines += [line for noted in self._awaited.values() for line in noted]
            lines.append(_line("", "returned", "", 0, ()))
            tensors = [tensor for part in kept for tensor in part]
            emit(tensors, ticket, sizes, self._handle, RECORD.join(lines))
            return ticket

        return _opaque(hand_over)


def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let Dynamo put calls of a function into its graph as they are."""
    torch.fx.node.has_side_effect(function)
    allowed: Callable[..., Any] = torch.compiler.allow_in_graph(function)
    return allowed


# ---------------------------------------------------------------------- the graph


def compilable_graph(  # noqa: PLR0913 - what a graph is made for, each by its name
    graph: fx.Graph,
    handle: int,
    selections: Mapping[tuple[str, str], Selection],
    *,
    training: bool,
    weights: bool,
    due: str,
) -> fx.Graph:
    """Return a graph with capture nodes as one whose captures a compiler sees through.

    Args:
        graph: as `insert_captures` gave it.
        handle: of the module.
        selections: what is captured, by path and kind.
        training: the mode of the graph.
        weights: whether the parameters are the module's own, so that they can be read of it.
        due: the name of what is captured, for the recorder to compare with what is due.

    Returns:
        A graph whose last placeholder is the ticket.
    """
    whole = copy_graph(graph)
    nodes = [*whole.nodes]
    last = next((n for n in reversed(nodes) if n.op == "placeholder"), None)
    with whole.inserting_after(last) if last is not None else whole.inserting_before():
        ticket = whole.placeholder("ticket")
    with whole.inserting_after(ticket):
        whole.call_function(begin, (ticket, handle, training, weights, due))
    taking, kept = _Taking(handle), list[Any]()
    for node in nodes:
        if node.op != "call_function" or node.target is not capture:
            continue
        value, _, path, kinds = node.args
        with whole.inserting_before(node):
            for kind in kinds:
                chosen = selections[path, kind]
                if kind == "grad":
                    whole.call_function(taking.watcher(path, chosen), (value, ticket))
                else:
                    keep = taking.keeper(path, kind, chosen)
                    kept.append(whole.call_function(keep, (value, ticket)))
        whole.erase_node(node)
    if selections:
        with whole.inserting_before(whole.output_node()):
            whole.call_function(taking.ender(), (ticket, *kept))
    whole.lint()
    return whole
