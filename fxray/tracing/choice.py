"""What a compiler takes of a traced module: the graphs that hold now, as code it can trace.

No Python of ours runs between two calls of compiled code, but for what a compiler asks
before each: whether that code still holds. `Choice` answers, by the same checks that a
call in eager mode makes; what the answer rests on is no guard of the compiler's own. The
layout and the sizes of the arguments are: code that it traces looks at them.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import torch
from torch import fx

from fxray.torch_private import (
    COMPILED_FROM,
    AskedBeforeCalls,
    ask_before_calls,
    trace_anew,
    trace_now,
)
from fxray.tracing.codegen import compile_graph, copy_graph
from fxray.tracing.runtime import guard, guard_value
from fxray.tracing.takes import Take

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from fxray.tracing.takes import Bind

__all__ = [
    "Choice",
    "Compilable",
    "Offer",
    "dispatcher",
    "earlier_calls",
    "looks_at_data",
    "traceable",
]


class Compilable(Protocol):
    """A module that a compiler may trace through.

    Attributes:
        refused: the sizes at which a graph, by name, is not to be traced.
    """

    refused: dict[str, list[tuple[int, ...]]]

    def standing(self) -> list[Any]:
        """Return what compiled code rests on: it holds while this is equal."""
        ...

    def code_now(self) -> Callable[..., Any]:
        """Return the function to be traced: it takes the module, args and kwargs."""
        ...


class Choice(AskedBeforeCalls):
    """Answers for one module, which it does not keep alive."""

    def __init__(self, net: Compilable) -> None:
        self._net = weakref.ref(net)

    def standing(self) -> list[Any]:
        """Return what code that was compiled rests on."""
        net = self._net()
        return [] if net is None else net.standing()

    def code_now(self) -> Callable[..., Any]:
        """Return the function to be traced now."""
        net = self._net()
        if net is None:
            msg = "the module is gone"
            raise ReferenceError(msg)
        return net.code_now()

    def refuse(self, name: str, sizes: tuple[int, ...]) -> None:
        """Let a call be traced from its beginning, and at these sizes without the graph `name`.

        What was traced of it so far would run as well, twice in all: a forward counted, a
        buffer written.
        """
        net = self._net()
        if net is not None:
            net.refused.setdefault(name, []).append(sizes)
        trace_anew(f"a size decides otherwise than when {name} was traced")


ask_before_calls(Choice, Choice.standing, at_trace=("code_now", "refuse"))


@attrs.frozen(eq=False)
class Offer:
    """A graph for a compiler to trace.

    Attributes:
        name: of the graph.
        take: returns the inputs of a call that fits.
        run: runs them.
        refused: at which sizes of the inputs a size in the graph decides otherwise.
        ticketed: whether it takes the module's next ticket after its inputs.
    """

    name: str
    take: Take
    run: Callable[..., Any]
    refused: tuple[tuple[int, ...], ...] = ()
    ticketed: bool = False


def _sizes(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(n for value in inputs if isinstance(value, torch.Tensor) for n in value.shape)


def _decides(held: Any, expected: Any, choice: Choice, name: str, *inputs: Any) -> None:
    """Stand where a size decides: the compiler compares it, and remembers what came out."""
    if isinstance(expected, bool):
        as_before = expected if held else not expected  # a symbol of sympy's is no bool to compare
    else:
        as_before = held == expected
    if not as_before:
        choice.refuse(name, _sizes(inputs))


def dispatcher(bind: Bind, offers: Sequence[Offer], earlier: int) -> Callable[..., Any]:
    """Return the function that runs a call by the first of the offers that takes it.

    It returns whether one did, and what came of it.

    Args:
        bind: returns the arguments by name.
        offers: the graphs that hold now.
        earlier: how many calls of the module came before in the code that is traced.
    """
    known = [(o.name, o.take, o.run, o.refused, o.ticketed) for o in offers]

    def dispatch(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        given = bind(*args, **kwargs)
        for name, take, run, refused, ticketed in known:
            inputs = take(given)
            if inputs is not None and not (refused and _sizes(inputs) in refused):
                ticket = (net.tickets.next,) if ticketed else ()
                if ticketed and earlier:
                    ticket = (net.tickets.next + earlier,)
                rest = net.constants_of[name]
                return True, run(net.original, *inputs, *ticket, *rest, net.choice)
        return False, None

    return dispatch


def traceable(graph: fx.Graph, name: str, constants: Collection[str]) -> Callable[..., Any]:
    """Return the function of a graph as a compiler can trace it.

    It takes the model, the graph's inputs, its constants and the `Choice`.

    Args:
        graph: the graph; guards on data in it are no code a compiler could trace.
        name: of the graph.
        constants: names of the attributes it reads that are not the model's.
    """
    whole = copy_graph(graph)
    inputs = [node for node in whole.nodes if node.op == "placeholder"]
    last = inputs[-1] if inputs else None
    with whole.inserting_after(last) if last is not None else whole.inserting_before():
        choice = whole.placeholder("choice")
    for path in constants:
        with whole.inserting_before(choice):
            given = whole.placeholder(f"constant_{path}")
        for node in [n for n in whole.nodes if n.op == "get_attr" and n.target == path]:
            node.replace_all_uses_with(given)
            whole.erase_node(node)
    for node in [*whole.nodes]:
        if node.op in ("call_module", "get_attr"):
            # What is compiled already, Dynamo shows as the module that it was compiled from.
            parts = str(node.target).split(".")
            node.target = ".".join(part for part in parts if part != COMPILED_FROM)
        if node.target in (guard, guard_value):
            with whole.inserting_before(node):
                whole.call_function(_decides, (*node.args[:2], choice, name, *inputs))
            whole.erase_node(node)
    return compile_graph(whole)[0]


_CALLS: weakref.WeakKeyDictionary[Any, collections.Counter[int]] = weakref.WeakKeyDictionary()


def earlier_calls(net: object) -> int:
    """Return how many calls of a module the code has that a compiler traces, and note one more."""
    trace = trace_now()
    if trace is None:
        return 0
    counts = _CALLS.setdefault(trace, collections.Counter())
    counts[id(net)] += 1
    return counts[id(net)] - 1


def looks_at_data(graph: fx.Graph) -> bool:
    """Return whether numbers of a tensor decide something in a graph, which no compiler holds."""
    return any("fxray_branch" in node.meta for node in graph.nodes)
