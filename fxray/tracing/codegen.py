"""From an fx graph to the function that runs it, and to what pickles; and copies of it."""

from __future__ import annotations

import functools
import importlib
import itertools
import keyword
import linecache
import operator
import pickle
import re
import sys
import weakref
from typing import TYPE_CHECKING, Any

import attrs
from torch import fx

from fxray.tracing.regions import begin_checkpoint, checkpointed, end_checkpoint
from fxray.tracing.runtime import as_before, switches_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["compile_graph", "copy_graph", "packed_graph", "unpacked_graph"]

_FILES = itertools.count()


def compile_graph(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """Return the function that runs `graph` on a module and its inputs, and its code.

    Every checkpointed region is a function of its own there; `graph` itself stays flat.
    """
    return _compile(graph, "forward")


def _compile(graph: fx.Graph, name: str) -> tuple[Callable[..., Any], str]:
    outer, regions = _carved(graph, name)
    python_code = outer.python_code(root_module="self")
    namespace, codes = dict(python_code.globals), []
    for inner, region in regions.items():
        function, code = _compile(region, inner)
        # A recomputation ends half-way, once it has all that backward asked for.
        namespace[inner] = _restoring(function) if switches_modes(region) else function
        codes.append(code)
    source = _named(python_code.src).replace("def forward(", f"def {name}(", 1)
    file = f"<fxray graph {next(_FILES)} {name}>"
    exec(compile(source, file, "exec"), namespace)  # noqa: S102 - how fx runs graphs
    # Out of its own globals, so that it goes, and its lines with it, when nobody holds it.
    function = namespace.pop(name)
    # So that a traceback through the graph shows its lines.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    weakref.finalize(function, linecache.cache.pop, file, None).atexit = False
    return function, "".join([*codes, source])


def _named(source: str) -> str:
    """Return the code with attributes that are words of Python's looked up by their names.

    fx writes `self.heads.class` for what a ModuleDict calls `"class"`.
    """

    def looked_up(found: re.Match[str]) -> str:
        parts = found[0].split(".")
        if not any(keyword.iskeyword(part) for part in parts):
            return found[0]
        return functools.reduce(lambda whole, part: f"getattr({whole}, {part!r})", parts)

    return re.sub(r"\bself(\.\w+)+", looked_up, source)


def _restoring(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with as_before():
            return function(*args)

    return run


# ---------------------------------------------------------------------- checkpointed regions


@attrs.frozen
class _Name:
    """A name of the code, where a node stands in other arguments."""

    name: str

    def __repr__(self) -> str:
        return self.name


@attrs.frozen(eq=False)
class _Region:
    """The nodes between two marks, those of regions inside it with them."""

    begin: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    def outputs(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes that are used outside: with a gradient, and as they are.

        A reentrant region has gradients only for what the model returned from it, each a
        tensor; what left it otherwise had none and has none here. Attributes are read anew.
        """
        inside = {*self.nodes, self.end}
        made = [node for node in self.nodes if node.op != "get_attr"]
        used = [node for node in made if any(user not in inside for user in node.users)]
        if not self.begin.kwargs.get("use_reentrant"):
            return used, []
        returned: Any = self.end.args[1] if len(self.end.args) > 1 else ()
        tensors = [node for node in dict.fromkeys(returned) if node in made]
        return tensors, [node for node in used if node not in tensors]

    def others(self) -> list[fx.Node]:
        """Return the nodes outside that are used inside, beside the inputs."""
        known = {*self.nodes, *self.begin.all_input_nodes}
        used = (source for node in self.nodes for source in node.all_input_nodes)
        return [node for node in dict.fromkeys(used) if node not in known]


def _outermost(graph: fx.Graph) -> dict[fx.Node, _Region]:
    """Return the regions that are in no other, by the node that begins each."""
    found, opened = dict[fx.Node, _Region](), list[tuple[fx.Node, int]]()
    nodes = [*graph.nodes]
    ends = {n.args[0] for n in nodes if n.target is end_checkpoint}
    for place, node in enumerate(nodes):
        # One without an end was edited away by hand: its nodes run as any others.
        if node.target is begin_checkpoint and node in ends:
            opened.append((node, place))
        elif node.target is end_checkpoint and opened and node.args[0] is opened[-1][0]:
            begin, start = opened.pop()
            if not opened:
                found[begin] = _Region(begin, node, tuple(nodes[start + 1 : place]))
    return found


def _carved(graph: fx.Graph, name: str) -> tuple[fx.Graph, dict[str, fx.Graph]]:
    """Return a graph that calls its regions by a name, and the graph of each."""
    regions = _outermost(graph)
    if not regions:
        return graph, {}
    taken = {node.name for node in graph.nodes}
    stem = "region" if name == "forward" else name
    names = (f"{stem}_{n}" for n in itertools.count(1))
    free = (inner for inner in names if inner not in taken)
    outer, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    carved: dict[str, fx.Graph] = {}
    skipped: set[fx.Node] = set()
    for node in graph.nodes:
        region = regions.get(node)
        if region is not None:
            skipped.update(region.nodes, [region.end])
            inner = next(free)
            carved[inner] = _inside(region)
            _call_region(outer, region, inner, nodes)
        elif node not in skipped:
            nodes[node] = outer.node_copy(node, nodes.__getitem__)
    return outer, carved


def _inside(region: _Region) -> fx.Graph:
    """Return the graph of a region: its inputs, then the others, to its outputs."""
    inner, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*_inputs(region), *region.others()):
        given = inner.placeholder(node.name if isinstance(node, fx.Node) else "unused")
        if isinstance(node, fx.Node):
            nodes.setdefault(node, given)
    for node in region.nodes:
        nodes[node] = inner.node_copy(node, nodes.__getitem__)
    tensors, rest = ([nodes[node] for node in part] for part in region.outputs())
    # What an autograd.Function is given inside a tuple, it leaves as it is.
    inner.output((*tensors, tuple(rest)) if rest or not tensors else tuple(tensors))
    return inner


def _inputs(region: _Region) -> tuple[Any, ...]:
    given: Any = region.begin.args[0]
    return tuple(given)


def _call_region(
    outer: fx.Graph, region: _Region, name: str, nodes: dict[fx.Node, fx.Node]
) -> None:
    """Write the call of a region, and let its outputs be found as what is taken of it."""
    settings = fx.node.map_arg(dict(region.begin.kwargs), nodes.__getitem__)
    inputs = fx.node.map_arg(_inputs(region), nodes.__getitem__)
    others = tuple(nodes[node] for node in region.others())
    own: Iterable[Any] = (_Name(name), _Name("self"))
    call = outer.call_function(checkpointed, (*own, inputs, others), settings)
    tensors, rest = region.outputs()
    for place, node in enumerate(tensors):
        nodes[node] = _part(outer, call, place, node.name)
    if rest:
        whole = _part(outer, call, len(tensors), "rest")
        for place, node in enumerate(rest):
            nodes[node] = _part(outer, whole, place, node.name)
    for node in region.nodes:
        if node.op == "get_attr" and any(user not in region.nodes for user in node.users):
            nodes[node] = outer.node_copy(node)


def _part(graph: fx.Graph, whole: fx.Node, place: int, name: str) -> fx.Node:
    return graph.create_node("call_function", operator.getitem, (whole, place), name=name)


# ---------------------------------------------------------------------- copies


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` with nodes of its own, their metadata with them."""
    copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    result = copied.graph_copy(graph, nodes)
    copied.output(result, type_expr=graph.output_node().type)
    return copied


@attrs.frozen
class _Ref:
    """A node among the arguments of another, by its place in the graph."""

    place: int


@attrs.frozen
class _Function:
    """A function by the place it is imported from.

    `F.max_pool2d` and its like are made inside another function: they have a name in their
    module, but not the one that pickle looks for.
    """

    module: str
    name: str

    @classmethod
    def of(cls, node: fx.Node) -> Any:
        """Return what stands for the target of `node`, the target itself where it pickles."""
        target: Any = node.target
        if node.op != "call_function" or "<locals>" not in getattr(target, "__qualname__", ""):
            return target
        module, name = target.__module__, target.__name__
        if getattr(sys.modules.get(module), name, None) is not target:
            what = f"node {node.name!r} calls {target.__qualname__}"
            msg = f"{what}, a function that cannot be imported; the graph cannot be pickled"
            raise pickle.PicklingError(msg)
        return cls(module, name)

    def found(self) -> Any:
        """Return the function."""
        return getattr(importlib.import_module(self.module), self.name)


Packed = list[tuple[Any, ...]]


def packed_graph(graph: fx.Graph) -> Packed:
    """Return the nodes of a graph one after another, as plain data.

    The nodes themselves hold one another: to pickle a long graph of them goes too deep.
    """
    places: dict[fx.Node, Any] = {node: _Ref(place) for place, node in enumerate(graph.nodes)}
    packed = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), places.__getitem__)
        meta = dict(node.meta)
        packed.append((node.op, _Function.of(node), args, kwargs, node.name, node.type, meta))
    return packed


def unpacked_graph(packed: Packed) -> fx.Graph:
    """Return the graph that `packed_graph` gave as `packed`."""
    graph, nodes = fx.Graph(), list[fx.Node]()

    def node_of(value: Any) -> Any:
        return nodes[value.place] if isinstance(value, _Ref) else value

    for op, target, args, kwargs, name, kind, meta in packed:
        found = target.found() if isinstance(target, _Function) else target
        given: Any = fx.node.map_aggregate((args, kwargs), node_of)
        node = graph.create_node(op, found, given[0], dict(given[1]), name, kind)
        node.meta = dict(meta)
        nodes.append(node)
    return graph
