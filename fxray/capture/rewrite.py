"""From a traced module and captures to a module with capture nodes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxray.capture.compiled import Tickets, compilable_graph
from fxray.capture.interpose import method_of, run_interposed
from fxray.capture.node import capture, new_handle, receiver_of
from fxray.torch_private import function_level, pending_writes
from fxray.tracing.alone import is_alone
from fxray.tracing.codegen import compile_graph, copy_graph
from fxray.tracing.module import TracedModule
from fxray.tracing.ops import path_of
from fxray.tracing.program import MODES, Runner, mode_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fxray.architecture import Architecture
    from fxray.draft import Capture, Draft
    from fxray.tracing.family import Family
    from fxray.tracing.survey import Survey

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
        self, family: Family, captures: tuple[Capture, ...], draft: Draft | None = None
    ) -> None:
        super().__init__(family)
        handle = self.__dict__["_handle"] = new_handle()
        self.__dict__["tickets"] = Tickets(handle)
        self.__dict__["_stamps"] = {}
        self.__dict__["_stamped"] = (None, {})
        self.__dict__["_captures"] = captures
        self.__dict__["_draft"] = draft
        self.__dict__["_draft_version"] = draft.version if draft is not None else 0
        self.__dict__["_instrumented"] = {}

    @property
    def handle(self) -> int:
        """What its capture nodes ask a recorder with."""
        return int(self.__dict__["_handle"])

    @property
    def survey(self) -> Survey:
        """Every op seen so far, in graphs and in interposed calls."""
        return self.family.survey

    @property
    def architecture(self) -> Architecture:
        """Every op of the model."""
        return self.family.architecture

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What is captured, as the draft stands now."""
        self._follow_draft()
        found: tuple[Capture, ...] = self.__dict__["_captures"]
        return found

    def _handed_out(self, mode: str) -> tuple[fx.Graph, str]:
        self._follow_draft()
        graph, _, code = self._instrument(self._first(mode))
        self.__dict__["_handed"] = (mode, graph, code, tuple(node.target for node in graph.nodes))
        return graph, code

    def _edit(self, mode: str, graph: fx.Graph) -> None:
        super()._edit(mode, erase_captures(graph))
        self.__dict__["_instrumented"] = {}

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """Every fx graph: by name with captures, and `"train.bare"`, `"eval.bare"` without."""
        bare = super().graphs
        if "_instrumented" not in self.__dict__:
            return bare
        self._follow_draft()
        runners = [runner for mode in MODES for runner in self.family.of(mode)]
        graphs = {runner.program.name: self._instrument(runner)[0] for runner in runners}
        named = {f"{name}.bare": graph for name, graph in bare.items()}
        return {**{name: graphs[name] for name in bare}, **named}

    def _instrument(self, runner: Runner) -> _Instrumented:
        """Return the graph of a runner with captures, its function and its code."""
        made: dict[str, tuple[fx.Graph, _Instrumented]] = self.__dict__["_instrumented"]
        bare, name = runner.program.graph, runner.program.name
        held, found = made.get(name, (None, None))
        if found is None or held is not bare:
            graph = insert_captures(bare, self.__dict__["_captures"], self.handle)
            found = (graph, *compile_graph(graph))
            made[name] = (bare, found)
        return found

    def _follow_draft(self) -> None:
        draft = self.__dict__["_draft"]
        if draft is not None and draft.version != self.__dict__["_draft_version"]:
            self.__dict__["_captures"] = draft.captures()
            self.__dict__["_draft_version"] = draft.version
            self.__dict__["_instrumented"] = {}

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return method_of(self, name, found) if "_handle" in self.__dict__ else found

    # ------------------------------------------------------------------ running

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = mode_name(training=self.training)
        # A trace of what holds this module runs it too, and is no step of the training.
        receiver = None if is_alone() else receiver_of(self.handle)
        if receiver is None:
            return super()._run(args, kwargs)
        self._follow_draft()
        due: bool | None = None

        def record(runner: Runner, inputs: Sequence[Any]) -> Any:
            nonlocal due
            if due is None:
                due = receiver.begin(training=self.training)
            elif due:
                receiver.begin_again()
            return runner.run(inputs, self._instrument(runner)[1] if due else None)

        try:
            found, out = self._run_graph(mode, args, kwargs, record)
            if found:
                return out
            return run_interposed(self, lambda: self._original(*args, **kwargs), begun=due)
        finally:
            if due:
                receiver.finish()

    # ------------------------------------------------------------------ running compiled

    def standing(self) -> list[Any]:
        """Return what compiled code rests on: the graphs that hold, the draft, what is due."""
        return [*super().standing(), *self._recorded()]

    def _recorded(self) -> tuple[Any, ...]:
        """Return what is due next and a stamp of what that is; (None,) without a recorder."""
        receiver = receiver_of(self.handle)
        if receiver is None:
            return (None,)
        if function_level() is not None:
            receiver.transformed()
            return (None,)
        due = receiver.due_next(training=self.training)
        return due, self._stamp(due)

    def _stamp(self, due: str) -> int:
        """Return what stands for the captures in a set: marks that come back get it again."""
        captures = self.captures
        held, found = self.__dict__["_stamped"]
        if held is not captures:
            found = {}
            self.__dict__["_stamped"] = captures, found
        if due not in found:  # a compiler asks before each call
            key = tuple((c.op, c.kind, id(c.selection)) for c in self._due_captures(due))
            stamps: dict[Any, tuple[int, Any]] = self.__dict__["_stamps"]
            # Its selections are held, so that no other gets their place in memory.
            found[due] = stamps.setdefault(key, (len(stamps), captures))[0]
        stamp: int = found[due]
        return stamp

    def _due_captures(self, due: str) -> list[Capture]:
        receiver = receiver_of(self.handle)
        if not due or receiver is None:
            return []
        wanted = receiver.captures_due(due)
        return [chosen for chosen in self.captures if (chosen.op, chosen.kind) in wanted]

    def _offered_for(self) -> Any:
        return self.training, *self._recorded(), self._has_its_parameters()

    def _has_its_parameters(self) -> bool:
        """Return whether the code that is traced put no others in their place beforehand.

        As torch.func.functional_call does; of the module they would be read as they were.
        """
        own = {id(module) for module in self._original.modules()}
        return not any(
            name == "_parameters" or (id(written) in own and name in written._parameters)  # noqa: SLF001
            for written, name in pending_writes()
        )

    def _graph_to_compile(self, runner: Runner) -> tuple[fx.Graph, bool]:
        due, *stamp = self._recorded()
        if not stamp:
            return super()._graph_to_compile(runner)
        captures = self._due_captures(due)
        graph = compilable_graph(
            insert_captures(runner.program.graph, captures, self.handle),
            self.handle,
            {(chosen.op, chosen.kind): chosen.selection for chosen in captures},
            training=self.training,
            weights=self._has_its_parameters(),
            due=due,
        )
        return graph, True

    def __reduce__(self) -> tuple[Any, ...]:
        return RewrittenModule, (self.family, self.captures)


_Instrumented = tuple[fx.Graph, "Callable[..., Any]", str]


def rewrite(module: TracedModule, draft: Draft) -> RewrittenModule:
    """Return a module that runs as `module` and captures what `draft` says."""
    return RewrittenModule(module.family, draft.captures(), draft)
