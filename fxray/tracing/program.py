"""One graph, all it takes to run it, and the calls it holds for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import fx, nn

from fxray.errors import SpecialisationError
from fxray.tracing.alone import rng_states, set_rng_states
from fxray.tracing.call import CallSpec, OpenCall, bind
from fxray.tracing.codegen import compile_graph, packed_graph, unpacked_graph
from fxray.tracing.conditions import Watch
from fxray.tracing.grounds import State
from fxray.tracing.runtime import as_before, guard, guard_value, switches_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxray.tracing.state import ModelState

__all__ = [
    "MODES",
    "Before",
    "Program",
    "Runner",
    "branches",
    "can_be_put_back",
    "mode_name",
]

MODES = ("train", "eval")


def mode_name(*, training: bool) -> str:
    """Return `"train"` or `"eval"`."""
    return MODES[0] if training else MODES[1]


@attrs.frozen(eq=False)
class Program:
    """One graph and all it takes to run it.

    Attributes:
        name: `"train"`, `"eval"`; further graphs of a mode `"train.1"`, `"train.2"`, ….
        graph: the fx graph; its placeholders are the tensor leaves of `call`.
        call: how the arguments were laid out, and which sizes are free.
        constants: attributes the graph reads that the model does not hold.
        state: what of Python's and torch's state it was traced under.
        writes: paths of the buffers and parameters that the forward was seen to write.
        inputs: places of the inputs that it was seen to write.
    """

    name: str
    graph: fx.Graph
    call: CallSpec | OpenCall
    constants: Mapping[str, Any] = attrs.field(factory=dict)
    state: State = attrs.field(factory=State)
    writes: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()

    @property
    def mode(self) -> str:
        """The mode it was traced in: `"train"` or `"eval"`."""
        return self.name.partition(".")[0]

    @property
    def branches(self) -> bool:
        """Whether some guard in it may fail half-way."""
        return branches(self.graph)

    def __reduce__(self) -> tuple[Any, ...]:
        constants = {name: _Imported.of(value) for name, value in self.constants.items()}
        rest = (self.name, self.call, constants, self.state, self.writes, self.inputs)
        return _unpack_program, (packed_graph(self.graph), *rest)


class Runner:
    """A program, made ready to run over one model."""

    def __init__(self, program: Program, model: nn.Module, signature: inspect.Signature) -> None:
        self.program, self.model, self._signature = program, model, signature
        self.watch = Watch(model, program.state)
        self.forward, self.code = compile_graph(program.graph)
        self.branches = program.branches
        self._switches = switches_modes(program.graph)
        self._plain = program.call.leaves if program.call.all_plain_tensors else None

    def evolved(self, program: Program) -> Runner:
        """Return the runner of a program that differs in the calls it takes alone."""
        made: Runner = object.__new__(Runner)
        made.__dict__.update(self.__dict__)
        made.program = program
        made._plain = program.call.leaves if program.call.all_plain_tensors else None
        return made

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """Return the tensors of a call, in the order of the placeholders.

        Raises:
            SpecialisationError: the graph was not traced for such a call, or not under
                the state the model is in.
        """
        change = self.watch.changed()
        if change is not None:
            msg = (
                f"{change.sentence}, and the graph was traced under that. Trace again "
                "(xray.model = model) and take xray.rewrite() anew"
            )
            raise SpecialisationError(msg)
        plain = self._plain
        if plain is not None and not kwargs and len(args) == len(plain):
            for leaf, value in zip(plain, args, strict=True):
                leaf.check(value)
            return args
        return self.program.call.flatten(bind(self._signature, args, kwargs))

    def can_begin_again(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Return whether what the graph writes of its inputs could be put back."""
        written = (inputs[place] for place in self.program.inputs)
        return all(tensor.is_leaf for tensor in written)

    def run(self, inputs: Sequence[Any], forward: Callable[..., Any] | None = None) -> Any:
        """Run the graph, or `forward`, compiled from the graph with captures in it."""
        forward = forward or self.forward
        if not self._switches:
            return forward(self.names, *inputs)
        with as_before():
            return forward(self.names, *inputs)

    @property
    def names(self) -> Any:
        """What the code of a graph calls `self`: the model, whose own names win."""
        constants = self.program.constants
        return _Names(self.model, constants) if constants else self.model


class _Names:
    """The model and the constants of one graph, under one roof for its code."""

    __slots__ = ("_constants", "_model")

    def __init__(self, model: nn.Module, constants: Mapping[str, Any]) -> None:
        self._model, self._constants = model, constants

    def __getattr__(self, name: str) -> Any:
        constants = self._constants
        return constants[name] if name in constants else getattr(self._model, name)


def branches(graph: fx.Graph) -> bool:
    """Return whether some guard in a graph may fail half-way."""
    return any(node.target in (guard, guard_value) for node in graph.nodes)


def can_be_put_back(model: nn.Module, state: ModelState, writes: Sequence[str]) -> bool:
    """Return whether `Before` reaches all that a forward writes or draws from."""
    return not state.holds_generators and all(
        _tensor_at(model, path) is not None for path in writes
    )


def _tensor_at(model: nn.Module, path: str) -> torch.Tensor | None:
    owner, _, name = path.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), name)
    except AttributeError:  # in a container, or replaced since, by LoRA say
        return None
    return found if isinstance(found, torch.Tensor) else None


class Before:
    """Random state and written tensors as they were before a graph that may end half-way."""

    def __init__(self, runner: Runner, inputs: Sequence[torch.Tensor]) -> None:
        self._rng = rng_states()
        written = [inputs[place] for place in runner.program.inputs]
        self._copies = [(tensor, tensor.detach().clone()) for tensor in written]
        for path in runner.program.writes:
            tensor = _tensor_at(runner.model, path)
            if tensor is not None:
                self._copies.append((tensor, tensor.detach().clone()))

    def restore(self) -> None:
        """Put everything back."""
        set_rng_states(self._rng)
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)


@attrs.frozen
class _Imported:
    """A constant that pickles by the name it is imported by: a scripted function."""

    module: str
    name: str

    @classmethod
    def of(cls, value: Any) -> Any:
        """Return what stands for `value`, itself where it pickles."""
        if not isinstance(value, torch.jit.ScriptFunction):
            return value
        original = inspect.unwrap(getattr(value, "_torchdynamo_inline", value))
        made = cls(original.__module__, original.__name__)
        return made if made.found() is value else value

    def found(self) -> Any:
        """Return the constant."""
        return getattr(sys.modules.get(self.module), self.name, None)


def _unpack_program(graph: Any, name: str, call: Any, constants: Any, *rest: Any) -> Program:
    found = {k: v.found() if isinstance(v, _Imported) else v for k, v in constants.items()}
    return Program(name, unpacked_graph(graph), call, found, *rest)
