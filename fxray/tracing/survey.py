"""The ops that were seen of a model that runs by itself, and the path of each.

A graph knows all its ops before it runs. Of a model that is run as it is, one knows
those that some call reached: the survey grows, and gives the same op the same path at
every call. An op is told by its module call, its name, the user's line and how many of
these ran before it in the forward.
"""

from __future__ import annotations

import collections
import re
import threading
from typing import TYPE_CHECKING, Any

import attrs

from fxray.architecture import Architecture, Op
from fxray.tracing.names import type_keys
from fxray.tracing.ops import NodeInfo, info_of, op_fields, path_of, producers, set_path, sources
from fxray.tracing.torch_calls import is_leaf

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from torch import fx, nn

    from fxray.tracing.written import WrittenGraph

__all__ = ["SURVEYING", "Seen", "Spot", "Survey"]

SURVEYING = threading.RLock()
"""Held by whoever adds to a survey: forwards of one model may run on several threads."""


@attrs.frozen
class Spot:
    """Where in a forward an op is called.

    Attributes:
        call: the module call it stands in.
        name: what it is called in a path.
        where: the user's `file.py:line`.
    """

    call: str
    name: str
    where: str


@attrs.define(eq=False)
class Seen:
    """One op as one forward ran it, to be named when that has ended.

    Attributes:
        info: what was seen of it.
        number: how many of its spot ran before it in the forward.
        given: the ops whose tensors it was given, and as which argument.
        uses: how often what it gave was passed on.
        pure: whether it is no op when nobody uses it.
        path: what it is called, once named.
    """

    info: NodeInfo
    number: int = 0
    given: tuple[tuple[Seen, str], ...] = ()
    uses: int = 0
    pure: bool = False
    path: str = ""

    @property
    def spot(self) -> Spot:
        """Where it was called."""
        return Spot(self.info.call, self.info.name, self.info.where)


class Survey:
    """Facts only, no module and no tensor: it may be copied and pickled with a model.

    Attributes:
        version: grows whenever an op is seen for the first time.
        returns: paths of the ops whose tensors a module call returned, by call.
        at_hand: what an interposer keeps from one forward to the next; copied with nothing.
    """

    def __init__(self, model: str, modules: Mapping[str, str], leaves: Iterable[str]) -> None:
        self.version = 0
        self.returns: dict[str, tuple[str, ...]] = {}
        self._model, self._modules = model, dict(modules)
        self._leaves = frozenset(leaves)
        self._kept: set[str] = set()
        self._infos: dict[str, NodeInfo] = {}
        self._nodes: dict[str, dict[str, str]] = {}
        self._edges: dict[tuple[str, str, str], None] = {}
        self._spots: dict[str, dict[Spot, list[str | None]]] = {}
        self._numbers: collections.Counter[tuple[str, str]] = collections.Counter()
        self._held: dict[tuple[str, str], str] = {}
        self._architecture: Architecture | None = None
        self.at_hand: dict[str, Any] = {}

    @classmethod
    def empty(cls, model: nn.Module) -> Survey:
        """Return a survey of `model` that has seen nothing."""
        named = dict(model.named_modules())
        leaves = [path for path, module in named.items() if path and is_leaf(module)]
        modules = {path: type(module).__name__ for path, module in named.items()}
        return cls(type(model).__name__, modules, leaves)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        graphs: Mapping[str, fx.Graph],
        returns: Mapping[str, Mapping[str, tuple[fx.Node, ...]]] | None = None,
    ) -> Survey:
        """Return a survey of `model` that has seen what its graphs hold.

        Args:
            model: the traced model.
            graphs: the fx graph by mode, train first, their ops named by `name_ops`.
            returns: by mode, the nodes whose tensors each module call returned.
        """
        survey = cls.empty(model)
        for mode, graph in graphs.items():
            survey._learn(graph, mode, (returns or {}).get(mode, {}))  # noqa: SLF001 - its own
        return survey

    def learn(self, written: WrittenGraph, mode: str) -> None:
        """Name the ops of a further graph of the model, and add those that are new.

        What was named before keeps its path.
        """
        self._learn(written.graph, mode, written.returns)

    def _learn(
        self, graph: fx.Graph, mode: str, returns: Mapping[str, tuple[fx.Node, ...]]
    ) -> None:
        for node, info, spot, number in _ops_of(graph):
            if info.name:
                stem = info.call, info.name
                path = path_of(node) or self.known(mode, spot, number)
                path = path or self.name(mode, info, number)
                self._place(mode, spot, number, path)
                self._numbers[stem] = max(self._numbers[stem], _number(path, stem) + 1)
                set_path(node, path)
        for node, info, _, _ in _ops_of(graph):
            if not info.name:
                path = path_of(node) or self.hold(info)
                self._held[info.role, info.call] = path
                set_path(node, path)
            if info.role == "module" and info.module not in self._leaves:
                self._kept.add(info.call)  # what torch.fx could not follow
        for node, info, _, _ in _ops_of(graph):
            path = path_of(node) or ""
            self._add(path, info, mode, node.name)
            self.join(path, sources(node))
        for (call, name, where), number in graph.output_node().meta.get("fxray_erased", ()):
            self._place(mode, Spot(call, name, where), number, "")
        for call, nodes in returns.items():
            if call not in self.returns:
                self.note_returned(call, (path for node in nodes for path in producers(node)))

    # ------------------------------------------------------------------ what is asked

    @property
    def counts(self) -> dict[str, int]:
        """How many ops were seen in each mode."""
        found: collections.Counter[str] = collections.Counter()
        for path, modes in self._nodes.items():
            if self._infos[path].role != "input":
                found.update(modes.keys())
        return dict(found)

    @property
    def architecture(self) -> Architecture:
        """Everything seen so far: ops in the order in which they were first seen."""
        if self._architecture is None:
            infos = [*self._infos.items()]  # another thread may be adding to them
            keys = type_keys(info.type for _, info in infos)
            ops = [
                Op(path=path, key=key, nodes=dict(self._nodes[path]), **op_fields(info))
                for key, (path, info) in zip(keys, infos, strict=True)
            ]
            edges = [edge for edge in [*self._edges] if not {*edge[:2]} - {*dict(infos)}]
            self._architecture = Architecture.build(
                self._model, ops, edges, self._modules, dict(self.returns)
            )
        return self._architecture

    def info(self, path: str) -> NodeInfo | None:
        """Return what was seen of the op at `path`, None if it never was."""
        return self._infos.get(path)

    def is_leaf_call(self, call: str) -> bool:
        """Return whether a graph has this module call as one op, though its module is no leaf."""
        return call in self._kept

    def known(self, mode: str, spot: Spot, number: int) -> str | None:
        """Return the path of the op that runs at `spot` as its `number`-th.

        None where it was never seen in this mode, `""` where it is no op.
        """
        paths = self.paths(mode, spot)
        return paths[number] if number < len(paths) else None

    def paths(self, mode: str, spot: Spot) -> list[str | None]:
        """Return the paths of what runs at `spot`, in order; the list grows with the survey."""
        return self._spots.setdefault(mode, {}).setdefault(spot, [])

    # ------------------------------------------------------------------ what is seen

    def name(self, mode: str, info: NodeInfo, number: int) -> str:
        """Return the path of a function or method seen in this mode for the first time.

        It is that of the other mode where that has run it; else the next free number of
        its module call and name. Nothing is added.
        """
        spot = Spot(info.call, info.name, info.where)
        for other in [*self._spots]:
            path = self.known(other, spot, number)
            if path and other != mode:
                return path
        stem = info.call, info.name
        path = ".".join(filter(None, stem))
        count = self._numbers[stem]
        self._numbers[stem] += 1
        numbered = f"{path}_{count}" if count else path
        numbered = f"{numbered}@op" if numbered in self._leaves else numbered
        while numbered in self._infos:
            numbered += "@op"
        return numbered

    def _without_unused(self, mode: str, seen: Sequence[Seen]) -> list[Seen]:
        kept = []
        for op in reversed(seen):
            if op.uses or not op.pure:
                kept.append(op)
                continue
            for source, _ in op.given:
                source.uses -= 1
            if op.info.name:
                self._place(mode, op.spot, op.number, "")
        return kept[::-1]

    def hold(self, info: NodeInfo, taken: Container[str] = ()) -> str:
        """Return the path of a leaf module's call, an input or a parameter.

        Args:
            info: what was seen of it.
            taken: paths that functions have, beside those that were added.
        """
        path = self._held.get((info.role, info.call))
        if path is not None:
            return path
        if info.role == "module":
            return info.call
        clash = info.call in self._leaves or info.call in self._infos or info.call in taken
        return f"{info.call}@{info.role}" if clash else info.call

    def add(self, path: str, info: NodeInfo, mode: str, *, number: int = 0) -> None:
        """Add an op: the `number`-th of its spot, if it is a function or a method."""
        if info.name:
            self._place(mode, Spot(info.call, info.name, info.where), number, path)
        else:
            self._held[info.role, info.call] = path
        self._add(path, info, mode, re.sub(r"\W", "_", path))

    def join(self, path: str, given: Iterable[tuple[str, str]]) -> None:
        """Join the op at `path` to each (path, slot) it was given a tensor of."""
        for source, slot in given:
            if (source, path, slot) not in self._edges:
                self._edges[source, path, slot] = None
                self._architecture = None

    def note_returned(self, call: str, paths: Iterable[str]) -> None:
        """Note the ops whose tensors a module call returned."""
        self.returns[call] = tuple(dict.fromkeys(paths))
        self._architecture = None

    def take(self, mode: str, seen: Sequence[Seen], returned: Mapping[str, Sequence[Seen]]) -> None:
        """Add what one forward ran, named as `name_ops` names the ops of a graph.

        Args:
            mode: the forward's.
            seen: all of it, in order.
            returned: the ops whose tensors each module call returned.
        """
        kept = self._without_unused(mode, seen)
        for op in kept:
            if op.info.name:
                known = self.known(mode, op.spot, op.number)
                op.path = known or self.name(mode, op.info, op.number)
                # At once: the next of its stem is to have the next number.
                self._place(mode, op.spot, op.number, op.path)
        functions = {op.path for op in kept}
        for op in kept:
            if not op.info.name:
                op.path = self.hold(op.info, functions)
            self.add(op.path, op.info, mode, number=op.number)
            self.join(op.path, ((source.path, slot) for source, slot in op.given if source.path))
        for call, ops in returned.items():
            if call not in self.returns:
                self.note_returned(call, (op.path for op in ops if op.path))

    def _add(self, path: str, info: NodeInfo, mode: str, node: str) -> None:
        if path not in self._infos:
            self.version += 1
        elif mode in self._nodes[path]:
            return
        self._nodes.setdefault(path, {}).setdefault(mode, node)
        self._infos.setdefault(path, info)
        self._architecture = None

    def _place(self, mode: str, spot: Spot, number: int, path: str) -> None:
        paths = self.paths(mode, spot)
        paths.extend(None for _ in range(number + 1 - len(paths)))
        paths[number] = paths[number] or path

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        # What runs keep here for the next one belongs to the model, and to this process.
        return {**self.__dict__, "at_hand": {}}


def _ops_of(graph: fx.Graph) -> Iterator[tuple[fx.Node, NodeInfo, Spot, int]]:
    """Yield every op of a graph, where it is called and how many of the spot ran before."""
    seen: collections.Counter[Spot] = collections.Counter()
    for node in graph.nodes:
        info = info_of(node)
        if info is not None:
            spot = Spot(info.call, info.name, info.where)
            number = node.meta.get("fxray_occurrence", seen[spot])
            seen[spot] = number + 1
            yield node, info, spot, number


def _number(path: str, stem: tuple[str, str]) -> int:
    """Return the number that `path` has among those of its module call and name."""
    rest = path.removeprefix(".".join(filter(None, stem))).partition("@")[0]
    return int(rest[1:]) if rest[1:].isdigit() else 0
