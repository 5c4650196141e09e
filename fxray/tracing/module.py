"""A traced model: its graphs run over the model's own parameters."""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import fx, nn

from fxray.errors import BranchError, NoGraphError, TraceError
from fxray.torch_private import pending_writes, saves_tensors_elsewhere, trace_now
from fxray.tracing.choice import Choice, Offer, dispatcher, earlier_calls, looks_at_data, traceable
from fxray.tracing.codegen import compile_graph
from fxray.tracing.for_compiler import traced_for_compiler
from fxray.tracing.program import Before, Runner, mode_name
from fxray.tracing.takes import bind_function, take_function

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxray.tracing.family import Family

__all__ = ["TracedModule"]

FOR_COMPILER = 8
"""How often one graph is traced again for a compiler, as the model changes."""

_SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class TracedModule(fx.GraphModule):
    """Runs the graph that a call fits over the original model's own state.

    `_modules`, `_parameters` and `_buffers` are the original's dicts, and `training`
    is the original's flag: state_dict keys are equal, optimizers made before stay
    valid, tied weights stay tied, and `.to()` or `.eval()` on either moves both.
    Attributes it does not have are the original's. A call that no graph fits is run by
    the original itself.
    """

    _original: nn.Module
    _family: Family

    def __init__(self, family: Family) -> None:
        original = family.model
        super().__init__(nn.Module(), fx.Graph(), type(original).__name__)
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        self.__dict__["_original"] = original
        self.__dict__["_family"] = family
        self.__dict__["_handed"] = None
        self.__dict__["choice"] = Choice(self)
        self.__dict__["constants_of"] = {}
        self.__dict__["refused"] = {}
        self.__dict__["_for_compiler"] = weakref.WeakKeyDictionary()
        self.__dict__["_tries"] = weakref.WeakKeyDictionary()
        self.__dict__["_compiled"] = itertools.count()
        self.__dict__["_offers"] = weakref.WeakKeyDictionary()
        self.__dict__["_bind"] = bind_function(family.signature)
        # Dynamo asks every GraphModule where its lines came from.
        self._lineno_map, self._prologue_start = {}, None
        # fx gives every GraphModule a class of its own, to which its forward belongs.
        type(self).forward = _forward_like(family.signature)

    @property
    def original(self) -> nn.Module:
        """The model that was traced."""
        model: nn.Module = self.__dict__["_original"]
        return model

    @property
    def family(self) -> Family:
        """Every graph of the model, and which of them a call is run by."""
        found: Family = self.__dict__["_family"]
        return found

    # ------------------------------------------------------------------ running

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph that the call fits, else the model itself."""
        mode = mode_name(training=self.training)
        found, out = self._run_graph(mode, args, kwargs, _bare)
        return out if found else self._original(*args, **kwargs)

    def _run_graph(
        self,
        mode: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[[Runner, Sequence[Any]], Any],
    ) -> tuple[bool, Any]:
        """Return whether a graph took the call, and what it gave.

        Args:
            mode: `"train"` or `"eval"`.
            args: the call's positional arguments.
            kwargs: its keyword arguments.
            run: runs a graph on its inputs; called again, with another, after one that
                ended half-way.
        """
        family = self.family
        fitted = family.fit(mode, args, kwargs)
        tried: list[Runner] = []
        while fitted is not None:
            runner, inputs = fitted
            if not runner.branches:
                return True, run(runner, inputs)
            if saves_tensors_elsewhere() or not runner.can_begin_again(inputs):
                # What a graph that ends half-way has saved could not be taken back.
                return False, None
            before = Before(runner, inputs)
            try:
                return True, run(runner, inputs)
            except BranchError as flipped:
                before.restore()
                tried.append(runner)
                fitted = family.fit_another(mode, args, kwargs, tried, flipped)
        return False, None

    # ------------------------------------------------------------------ running compiled

    def standing(self) -> list[Any]:
        """Return what compiled code rests on: the mode, and the graphs whose state holds."""
        mode = mode_name(training=self.training)
        held = [
            one.program
            for runner in sorted(self.family.of(mode), key=lambda runner: runner.program.name)
            for one in (runner, *self._for_compiler.get(runner.program, ()))
            if one.watch.changed(modes=False) is None
        ]
        return [mode, *map(weakref.ref, held)]

    def code_now(self) -> Callable[..., Any]:
        """Return the function that a compiler is to trace for a call made now."""
        _keep_out_of_compilers()
        if self._is_written_to():
            return dispatcher(self._bind, [], earlier_calls(self))
        offers = [
            offer
            for runner in self.family.of(mode_name(training=self.training))
            if (offer := self._offer(runner)) is not None
        ]
        return dispatcher(self._bind, offers, earlier_calls(self))

    def _is_written_to(self) -> bool:
        """Return whether the code that is traced has set something of the model beforehand.

        It has not happened yet: what is asked of the model is how it was before.
        """
        modules = {id(module) for module in self._original.modules()}
        return any(
            id(written) in modules
            # Tensors are read where the code reads them, as it left them.
            and name not in {**written._parameters, **written._buffers}  # noqa: SLF001
            for written, name in pending_writes()
        )

    def _offer(self, runner: Runner) -> Offer | None:
        """Return a graph as a compiler can trace it, None where it cannot.

        The same code each time: a compiler that begins its analysis again must find it.
        """
        found = self._to_compile(runner)
        if found is None:
            return None
        program = found.program
        key = self._offered_for()
        offers: dict[Any, Offer | None] = self._offers.setdefault(program, {})
        if key not in offers:
            offers[key] = self._new_offer(found)
        offer = offers[key]
        self.constants_of[program.name] = tuple(program.constants.values())
        refused = tuple(self.refused.get(program.name, ()))
        return offer if offer is None else attrs.evolve(offer, refused=refused)

    def _new_offer(self, runner: Runner) -> Offer | None:
        program = runner.program
        try:
            take = take_function(program.call, self.family.signature.parameters)
        except NoGraphError:
            return None
        graph, ticketed = self._graph_to_compile(runner)
        run = traceable(graph, program.name, tuple(program.constants))
        return Offer(program.name, take, run, ticketed=ticketed)

    def _offered_for(self) -> Any:
        """Return what the graph for a compiler depends on, beside the program."""
        return None

    def _to_compile(self, runner: Runner) -> Runner | None:
        """Return what runs the calls of `runner` as the model is now and a compiler can trace."""
        program = runner.program
        as_it_is = not program.state.compiler and not looks_at_data(program.graph)
        if as_it_is and runner.watch.changed() is None:
            return runner
        others: list[Runner] = self._for_compiler.setdefault(program, [])
        for other in others:
            if other.watch.changed() is None:
                return other
        # Those that came to nothing count: a compiler asks again each time it begins anew.
        self._tries[program] = self._tries.get(program, 0) + 1
        if self._tries[program] > FOR_COMPILER:
            return None
        made = traced_for_compiler(self.family, runner, f"{program.mode}.c{next(self._compiled)}")
        if made is None and runner.watch.changed() is None and not looks_at_data(program.graph):
            made = runner  # as it was traced, then
        if made is None or made.watch.changed() is not None:
            return None
        others.append(made)
        return made

    def _graph_to_compile(self, runner: Runner) -> tuple[fx.Graph, bool]:
        """Return a graph for a compiler, and whether it takes a ticket."""
        return runner.program.graph, False

    def run_uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call as in eager mode; where a compiler asks, another graph may come of it."""
        return self._run(args, kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        # A replica that shared our dicts would put its own parameters into the model's.
        return self._original._replicate_for_data_parallel()  # noqa: SLF001

    # ------------------------------------------------------------------ torch.fx's own interface

    @property
    def graph(self) -> fx.Graph:
        """The fx graph of the current mode: the one that it was first traced to.

        Raises:
            TraceError: there is none, for the model runs through the interposer.
        """
        # GraphModule.__init__ asks before there are modes, Dynamo where there is no graph.
        if "_family" not in self.__dict__ or trace_now() is not None:
            return fx.Graph()
        return self._handed_out(mode_name(training=self.training))[0]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if "_family" in self.__dict__:
            self._edit(mode_name(training=self.training), graph)

    def _handed_out(self, mode: str) -> tuple[fx.Graph, str]:
        """Return the first graph of a mode and its code, remembered in case it is edited."""
        runner = self._first(mode)
        graph, code = runner.program.graph, runner.code
        self.__dict__["_handed"] = (mode, graph, code, _targets(graph))
        return graph, code

    def _first(self, mode: str) -> Runner:
        first = self.family.first(mode)
        for runner in self.family.of(mode):
            if runner.program is first:
                return runner
        why = self.family.without.get(mode, "it was not traced")
        msg = (
            f"{type(self._original).__name__} has no graph in {mode} mode: {why}. It runs through "
            "the interposer; its ops are in xray.architecture"
        )
        raise TraceError(msg)

    def _edit(self, mode: str, graph: fx.Graph) -> None:
        """Run an edited graph from now on, in this module alone."""
        program = attrs.evolve(self._first(mode).program, graph=graph)
        self.__dict__["_family"] = self.family.edited(program)
        self.__dict__["_handed"] = None

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """Every fx graph: `"train"`, `"eval"`, and those traced since, `"train.1"`, …."""
        return {program.name: program.graph for program in self.family.programs}

    @property
    def code(self) -> str:
        """The Python code of the current mode's graph."""
        return self._handed_out(mode_name(training=self.training))[1]

    @property
    def _code(self) -> str:
        # What GraphModule's own __str__ and print_readable read.
        return self.code

    @property
    def _graph(self) -> fx.Graph:  # type: ignore[override]
        return self.graph

    def recompile(self) -> Any:
        """Make the code of the graph anew, after the one that `graph` gave was edited."""
        handed = self.__dict__.get("_handed")
        if handed is not None:
            mode, graph, code, targets = handed
            if _targets(graph) != targets or compile_graph(graph)[1] != code:
                self._edit(mode, graph)
        return None

    # ------------------------------------------------------------------ one self with the original

    @property
    def training(self) -> bool:
        """Whether in training mode: the original's own flag."""
        original = self.__dict__.get("_original")
        return True if original is None else bool(original.training)

    @training.setter
    def training(self, mode: bool) -> None:
        original = self.__dict__.get("_original")
        if original is not None:
            original.training = mode

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_original")
        if original is not None and name not in self.__dict__ and _is_of(original, name):
            # What is read from the model is set on the model: `net.tau = 0.5`.
            setattr(original, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original, name)

    def train(self, mode: bool = True) -> Any:
        """Set the mode as the model's own `train` does: it may keep some parts in eval."""
        self._original.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state_dict."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model, as the model itself does."""
        return self._original.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        result: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        family = self.family
        for program in family.programs:
            moved = {name: _moved(value, fn) for name, value in program.constants.items()}
            family.replace(program, attrs.evolve(program, constants=moved))
        return result

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        rebuild, state = self.__reduce__()
        copied: TracedModule = rebuild(*copy.deepcopy(state, memo))
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> TracedModule:
        rebuild, state = self.__reduce__()
        copied: TracedModule = rebuild(*state)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedModule, (self.family,)

    def __reduce_package__(self, exporter: Any) -> Any:
        msg = f"{type(self).__name__} cannot go into a torch.package; save its state_dict"
        raise NotImplementedError(msg)


_REASON = (
    "fxray has no graph for this call that can be compiled: another size, layout or state of the "
    "model than it was traced for, or a branch on data. Call the module once eagerly with such an "
    "input, or give sizes= or examples= to fxray.Xray; without fullgraph=True it runs eagerly"
)


def _keep_out_of_compilers() -> None:
    """Let a compiler not look into calls that it leaves alone.

    Not before there is one: to say so imports it, which takes longer than all of fxray.
    """
    plain = TracedModule.__dict__["run_uncompiled"]
    if not hasattr(plain, "_torchdynamo_disable"):
        TracedModule.run_uncompiled = torch.compiler.disable(plain, reason=_REASON)  # type: ignore[method-assign]


def _is_of(original: nn.Module, name: str) -> bool:
    """Return whether `name` is a plain attribute of the model, and none that every module has."""
    if name in vars(original):
        return True
    return hasattr(type(original), name) and not hasattr(fx.GraphModule, name)


def _targets(graph: fx.Graph) -> tuple[Any, ...]:
    return tuple(node.target for node in graph.nodes)


def _bare(runner: Runner, inputs: Sequence[Any]) -> Any:
    return runner.run(inputs)


def _moved(value: Any, fn: Callable[..., Any]) -> Any:
    """Return a constant on the device that `fn` moves to; its dtype is its own."""
    if isinstance(value, nn.Parameter) or not isinstance(value, torch.Tensor):
        return value
    return fn(value).to(value.dtype)


def _forward_like(signature: inspect.Signature) -> Callable[..., Any]:
    """Return a forward that shows `signature`: trainers read it to know what to pass."""

    def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:
        # Here and not in a function of its own: where a compiler breaks off, it forgets what
        # the functions rest on that it was in the midst of, and would never ask again.
        if torch.compiler.is_compiling():
            taken, out = self.choice.code_now()(self, args, kwargs)
            if taken:
                return out
        return self.run_uncompiled(args, kwargs)

    # A compiler keeps what it made, and how often, with the code: each module has its own.
    forward.__code__ = forward.__code__.replace()
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [own, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward
