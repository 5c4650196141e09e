"""A traced model: graphs by mode that run over the model's own parameters."""

from __future__ import annotations

import copy
import importlib
import inspect
import linecache
import pickle
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import fx, nn

from fxray.errors import SpecialisationError
from fxray.tracing.attributes import Expected, Read
from fxray.tracing.call import CallSpec, OpenCall, bind
from fxray.tracing.runtime import as_before, run_object, switches_modes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MODES",
    "Program",
    "TracedModule",
    "autocast_state",
    "compile_graph",
    "copy_graph",
    "mode_name",
]

MODES = ("train", "eval")

_SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def mode_name(*, training: bool) -> str:
    """Return `"train"` or `"eval"`."""
    return MODES[0] if training else MODES[1]


@attrs.frozen(eq=False)
class Program:
    """One graph and all it takes to run it.

    Attributes:
        graph: the fx graph; its placeholders are the tensor leaves of `call`.
        call: how the arguments were laid out, and which sizes are free.
        constants: attributes the graph reads that the model does not hold.
        attributes: what the forward read of its modules, which every call must find so.
        autocast: whether autocast was on, by device type, if the forward looked at a dtype.
    """

    graph: fx.Graph
    call: CallSpec | OpenCall
    constants: Mapping[str, Any] = attrs.field(factory=dict)
    attributes: tuple[Read, ...] = ()
    autocast: Mapping[str, bool] = attrs.field(factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        graph, renamed = _with_importable_targets(self.graph)
        rest = (self.call, self.constants, self.attributes, self.autocast)
        return _unpack_program, (graph, renamed, *rest)


class TracedModule(fx.GraphModule):
    """Runs the graph of the current mode over the original model's own state.

    `_modules`, `_parameters` and `_buffers` are the original's dicts, and `training`
    is the original's flag: state_dict keys are equal, optimizers made before stay
    valid, tied weights stay tied, and `.to()` or `.eval()` on either moves both.
    Attributes it does not have are the original's.
    """

    _original: nn.Module
    _programs: dict[str, Program]

    def __init__(self, original: nn.Module, programs: Mapping[str, Program]) -> None:
        super().__init__(nn.Module(), fx.Graph(), type(original).__name__)
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        self.__dict__["_original"] = original
        self.__dict__["_programs"] = dict(programs)
        self.__dict__["_signature"] = inspect.signature(original.forward)
        for program in programs.values():
            self.__dict__.update(program.constants)
        self.__dict__["_expected"] = {
            mode: Expected(original, program.attributes) for mode, program in programs.items()
        }
        self.recompile()

    @property
    def original(self) -> nn.Module:
        """The model that was traced."""
        model: nn.Module = self.__dict__["_original"]
        return model

    @property
    def programs(self) -> Mapping[str, Program]:
        """The graph of each mode and all it takes to run it."""
        return dict(self.__dict__["_programs"])

    # ------------------------------------------------------------------ running

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph of the current mode on the arguments of one call.

        Raises:
            SpecialisationError: the call is not one the graph was traced for.
        """
        mode = mode_name(training=self.training)
        return self._run(self._forwards, mode, self._inputs(mode, args, kwargs))

    def _run(self, forwards: Mapping[str, Callable[..., Any]], mode: str, inputs: Any) -> Any:
        if mode not in self._switching:
            return forwards[mode](self._names(mode), *inputs)
        with as_before():
            return forwards[mode](self._names(mode), *inputs)

    def _names(self, mode: str) -> Any:
        """Return what the code of a graph calls `self`: the model, whose own names win."""
        constants = self._programs[mode].constants
        return _Names(self._original, constants) if constants else self._original

    def _inputs(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._programs[mode]
        self._expected[mode].check()
        if program.autocast:
            _check_autocast(program.autocast)
        plain = self._plain_leaves[mode]
        if plain is not None and not kwargs and len(args) == len(plain):
            for leaf, value in zip(plain, args, strict=True):
                leaf.check(value)
            return args
        return program.call.flatten(bind(self._signature, args, kwargs))

    # ------------------------------------------------------------------ torch.fx's own interface

    @property
    def graph(self) -> fx.Graph:
        """The fx graph of the current mode."""
        if "_programs" not in self.__dict__:
            return fx.Graph()
        return self.graphs[mode_name(training=self.training)]

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if "_programs" not in self.__dict__:  # GraphModule.__init__, before there are modes
            # Dynamo asks every GraphModule where its lines came from.
            self._lineno_map, self._prologue_start = {}, None
            return
        mode = mode_name(training=self.training)
        self._programs[mode] = attrs.evolve(self._programs[mode], graph=graph)
        self.recompile()

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The fx graph by mode."""
        return {mode: program.graph for mode, program in self._programs.items()}

    @property
    def code(self) -> str:
        """The Python code of the current mode's graph."""
        return str(self._codes[mode_name(training=self.training)])

    @property
    def _code(self) -> str:
        # What GraphModule's own __str__ and print_readable read.
        return self.code

    @property
    def _graph(self) -> fx.Graph:  # type: ignore[override]
        return self.graph

    def recompile(self) -> Any:
        """Make the code of the graphs anew, after one was edited."""
        if "_programs" not in self.__dict__:
            return super().recompile()
        compiled = {mode: compile_graph(p.graph) for mode, p in self._programs.items()}
        self.__dict__["_forwards"] = {mode: run for mode, (run, _) in compiled.items()}
        self.__dict__["_codes"] = {mode: code for mode, (_, code) in compiled.items()}
        self.__dict__["_switching"] = {
            mode for mode, program in self._programs.items() if switches_modes(program.graph)
        }
        self.__dict__["_plain_leaves"] = {
            mode: program.call.leaves if program.call.all_plain_tensors else None
            for mode, program in self._programs.items()
        }
        # fx gives every GraphModule a class of its own, to which its forward belongs.
        type(self).forward = _forward_like(self._signature)
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
        for mode, program in self._programs.items():
            moved = {name: _moved(value, fn) for name, value in program.constants.items()}
            self.__dict__.update(moved)
            self._programs[mode] = attrs.evolve(program, constants=moved)
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
        return TracedModule, (self._original, self._programs)

    def __reduce_package__(self, exporter: Any) -> Any:
        msg = f"{type(self).__name__} cannot go into a torch.package; save its state_dict"
        raise NotImplementedError(msg)


def _moved(value: Any, fn: Callable[..., Any]) -> Any:
    """Return a constant on the device that `fn` moves to; its dtype is its own."""
    if isinstance(value, nn.Parameter) or not isinstance(value, torch.Tensor):
        return value
    return fn(value).to(value.dtype)


def autocast_state() -> dict[str, bool]:
    """Return whether autocast is on, by device type."""
    return {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}


def _check_autocast(traced: Mapping[str, bool]) -> None:
    if autocast_state() != traced:
        was = "on" if any(traced.values()) else "off"
        msg = (
            f"autocast was {was} when the model was traced and is not now, and its forward looks "
            "at the dtype of a tensor. Trace it as you train it: inside torch.autocast, or outside"
        )
        raise SpecialisationError(msg)


class _Names:
    """The model and the constants of one graph, under one roof for its code."""

    __slots__ = ("_constants", "_model")

    def __init__(self, model: nn.Module, constants: Mapping[str, Any]) -> None:
        self._model, self._constants = model, constants

    def __getattr__(self, name: str) -> Any:
        constants = self._constants
        return constants[name] if name in constants else getattr(self._model, name)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` with nodes of its own, their metadata with them."""
    copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    result = copied.graph_copy(graph, nodes)
    copied.output(result, type_expr=graph.output_node().type)
    return copied


def _with_importable_targets(graph: fx.Graph) -> tuple[fx.Graph, dict[str, tuple[str, str]]]:
    """Return a copy that pickles, and where to find the functions left out of it.

    `F.max_pool2d` and its like are made inside another function: they have a name in their
    module, but not the one that pickle looks for.
    """
    copied, nodes, renamed = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, tuple[str, str]]()
    # Node by node: a target replaced later stays behind in the graph's table of targets.
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function" and "<locals>" in getattr(target, "__qualname__", ""):
            renamed[node.name] = _place_of(node)
            target = run_object
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), nodes.__getitem__)
        made = copied.create_node(node.op, target, args, kwargs, node.name, node.type)
        made.meta, nodes[node] = dict(node.meta), made
    return copied, renamed


def _place_of(node: fx.Node) -> tuple[str, str]:
    function: Any = node.target
    module, name = function.__module__, function.__name__
    if getattr(sys.modules.get(module), name, None) is not function:
        what = f"node {node.name!r} calls {function.__qualname__}"
        msg = f"{what}, a function that cannot be imported; the graph cannot be pickled"
        raise pickle.PicklingError(msg)
    return module, name


def _unpack_program(
    graph: fx.Graph, renamed: Mapping[str, tuple[str, str]], *fields: Any
) -> Program:
    for node in graph.nodes:
        if node.name in renamed:
            module, name = renamed[node.name]
            node.target = getattr(importlib.import_module(module), name)
    return Program(graph, *fields)


def compile_graph(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """Return the function that runs `graph` on a module and its inputs, and its code."""
    python_code = graph.python_code(root_module="self")
    namespace = dict(python_code.globals)
    file = f"<fxray graph {id(graph):x}>"
    # So that a traceback through the graph shows its lines.
    lines = python_code.src.splitlines(keepends=True)
    linecache.cache[file] = (len(python_code.src), None, lines, file)
    exec(compile(python_code.src, file, "exec"), namespace)  # noqa: S102 - how fx runs graphs
    return namespace["forward"], python_code.src


def _forward_like(signature: inspect.Signature) -> Callable[..., Any]:
    """Return a forward that shows `signature`: trainers read it to know what to pass."""

    def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [own, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward
