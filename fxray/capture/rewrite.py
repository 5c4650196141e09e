"""From a traced module and captures to a module with capture nodes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxray.capture.node import capture, new_handle, receiver_of
from fxray.tracing.module import Program, TracedModule, compile_graph, copy_graph, mode_name
from fxray.tracing.ops import path_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fxray.architecture import Architecture
    from fxray.draft import Capture, Draft

__all__ = ["RewrittenModule", "erase_captures", "insert_captures", "rewrite"]

_AFTER = ("output", "grad")
"""The kinds that need a node of their own; weights are read from the module."""


def insert_captures(graph: fx.Graph, captures: Iterable[Capture], handle: int) -> fx.Graph:
    """Return a copy of `graph` with a capture node after (or before) each chosen op."""
    kinds: dict[str, list[str]] = {}
    for chosen in captures:
        kinds.setdefault(chosen.op, []).append(chosen.kind)
    rewritten = copy_graph(graph)
    placeholders = [node for node in rewritten.nodes if node.op == "placeholder"]
    for node in [*rewritten.nodes]:
        wanted = kinds.get(path_of(node) or "", [])
        if "input" in wanted:
            given = {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
            with rewritten.inserting_before(node):
                _insert(rewritten, node, given, handle, ("input",))
        after = tuple(kind for kind in _AFTER if kind in wanted)
        if after:
            # A placeholder must stay among the placeholders: fx prints them as arguments.
            anchor = placeholders[-1] if node.op == "placeholder" else node
            with rewritten.inserting_after(anchor):
                _insert(rewritten, node, node, handle, after)
    rewritten.lint()
    return rewritten


def _insert(
    graph: fx.Graph, op: fx.Node, value: Any, handle: int, kinds: tuple[str, ...]
) -> fx.Node:
    node = graph.call_function(capture, (value, handle, path_of(op), kinds))
    stack = op.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = stack
    return node


def erase_captures(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` without its capture nodes: the graph as it was traced."""
    plain = copy_graph(graph)
    for node in reversed(plain.nodes):
        if node.op == "call_function" and node.target is capture:
            plain.erase_node(node)
    plain.lint()
    return plain


class RewrittenModule(TracedModule):
    """The traced module with capture nodes; what the user trains.

    With nobody recording, or nothing due in a step, the bare graph runs. It follows
    the draft it was made from: a later mark takes effect at the next forward. A copy
    or an unpickled one keeps its captures, follows no draft and records nowhere until
    it is given to `fxray.record`.
    """

    def __init__(
        self,
        original: nn.Module,
        programs: Mapping[str, Program],
        architecture: Architecture,
        captures: tuple[Capture, ...],
        draft: Draft | None = None,
    ) -> None:
        self.__dict__["_handle"] = new_handle()
        self.__dict__["_architecture"] = architecture
        self.__dict__["_captures"] = captures
        self.__dict__["_draft"] = draft
        self.__dict__["_draft_version"] = draft.version if draft is not None else 0
        super().__init__(original, programs)

    @property
    def handle(self) -> int:
        """What its capture nodes ask a recorder with."""
        return int(self.__dict__["_handle"])

    @property
    def architecture(self) -> Architecture:
        """Every op of the model."""
        found: Architecture = self.__dict__["_architecture"]
        return found

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What is captured, as the draft stands now."""
        self._follow_draft()
        found: tuple[Capture, ...] = self.__dict__["_captures"]
        return found

    @property
    def graph(self) -> fx.Graph:
        """The fx graph of the current mode, capture nodes and all."""
        if "_instrumented" not in self.__dict__:
            return super().graph
        self._follow_draft()
        return self.graphs[mode_name(training=self.training)]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        begun = "_programs" in self.__dict__  # else GraphModule.__init__ sets an empty one
        bare = erase_captures(graph) if begun else graph
        TracedModule.graph.fset(self, bare)  # type: ignore[attr-defined]

    @property
    def code(self) -> str:
        """The Python code of the current mode's graph, capture nodes and all."""
        self._follow_draft()
        return super().code

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """Every fx graph: by mode with captures, and `"train.bare"`, `"eval.bare"` without."""
        bare = super().graphs
        if "_instrumented" not in self.__dict__:
            return bare
        self._follow_draft()
        named = {f"{mode}.bare": graph for mode, graph in bare.items()}
        return {**self.__dict__["_instrumented"], **named}

    def recompile(self) -> Any:
        """Make the code of both the bare and the instrumented graphs anew."""
        result = super().recompile()
        if "_programs" in self.__dict__:
            self._instrument()
        return result

    def _instrument(self) -> None:
        captures, handle = self.__dict__["_captures"], self.handle
        bare = {mode: program.graph for mode, program in self.programs.items()}
        graphs = {m: insert_captures(g, captures, handle) for m, g in bare.items()}
        compiled = {mode: compile_graph(graph) for mode, graph in graphs.items()}
        self.__dict__["_instrumented"] = graphs
        self.__dict__["_recording_forwards"] = {m: run for m, (run, _) in compiled.items()}
        self.__dict__["_codes"] = {m: code for m, (_, code) in compiled.items()}

    def _follow_draft(self) -> None:
        draft = self.__dict__["_draft"]
        if draft is not None and draft.version != self.__dict__["_draft_version"]:
            self.__dict__["_captures"] = draft.captures()
            self.__dict__["_draft_version"] = draft.version
            self._instrument()

    # Under torch.compile no Python of ours would run between compiled steps, and nothing would
    # be counted or captured, in silence. Until captures are compiled too, this stays eager:
    # right numbers, every capture, and with fullgraph=True an error that says so.
    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="fxray records in eager mode; compile the model without it"
    )
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = mode_name(training=self.training)
        inputs = self._inputs(mode, args, kwargs)
        receiver = receiver_of(self.handle)
        if receiver is None:
            return self._run(self._forwards, mode, inputs)
        self._follow_draft()
        if not receiver.begin(training=self.training):
            return self._run(self._forwards, mode, inputs)
        try:
            return self._run(self._recording_forwards, mode, inputs)
        finally:
            receiver.finish()

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self._original, self._programs, self.architecture, self.captures)
        return RewrittenModule, state


def rewrite(module: TracedModule, architecture: Architecture, draft: Draft) -> RewrittenModule:
    """Return a module that runs as `module` and captures what `draft` says."""
    programs = module.programs
    return RewrittenModule(module.original, programs, architecture, draft.captures(), draft)
