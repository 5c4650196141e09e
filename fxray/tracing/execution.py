"""Tracing by execution: the model runs once, for real, and a mode writes the graph.

Nothing is a proxy, so `isinstance`, `len`, C functions and a model's own Python need
not cooperate. Tensors find their node by identity, sizes are ints that remember it
(`numbers.py`), and what does not reach a `TorchFunctionMode` is replaced for the
length of the trace (`patches.py`).
"""

from __future__ import annotations

import collections
import operator
import re
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxray.architecture import Role, TensorSpec
from fxray.errors import NoGraphError
from fxray.torch_private import has_backward_hooks, set_grad_enabled
from fxray.tracing import runtime
from fxray.tracing.assignments import read_live, write_assignments
from fxray.tracing.attributes import Reads, noted_reads
from fxray.tracing.names import op_name_of, type_of_function, type_of_module
from fxray.tracing.numbers import plain
from fxray.tracing.ops import NodeInfo, info_of, module_fields, set_info
from fxray.tracing.patches import patched, short_line, user_line
from fxray.tracing.provenance import Provenance
from fxray.tracing.results import fields_of, tensor_items
from fxray.tracing.state import version_of
from fxray.tracing.tidy import gather_inputs, prune
from fxray.tracing.torch_calls import (
    ANSWERS,
    DRAWS,
    METHOD_TYPES,
    NUMBERS,
    OUT_OF_SIGHT,
    PYTHON_METHODS,
    READS,
    TENSOR_PROPERTIES,
    UNGUARDED,
    grad_mode_owner,
    is_leaf,
    qualified_name,
    writes_in_place,
)
from fxray.tracing.written import WrittenGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxray.tracing.call import CallSpec
    from fxray.tracing.state import ModelState

__all__ = ["GraphWriter"]

_LISTED = 256
"""The longest list of a tensor's numbers that is guarded, number by number."""


class GraphWriter(TorchFunctionMode):
    """Writes the graph of the one call that `write_call` makes."""

    def __init__(
        self, model: nn.Module, state: ModelState, live: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        super().__init__()
        self.model, self.state, self.live = model, state, live
        self.graph = fx.Graph()
        self.nodes = Provenance(self.graph, model, self)
        self.returns: dict[str, tuple[fx.Node, ...]] = {}
        self.reads: set[str] = set()
        self._paths = {module: path for path, module in reversed([*model.named_modules()])}
        self._calls: collections.Counter[str] = collections.Counter()
        self._stack: dict[str, tuple[str, str]] = {}  # by call: path and class
        self._inlined: dict[str, None] = {}
        self._grad_modes: dict[int, fx.Node] = {}
        self._thread = threading.get_ident()
        self._refused: NoGraphError | None = None
        self._given: set[int] = set()
        self._paused = 0
        self._open = False

    # ---------------------------------------------------------------- the one call

    @property
    def writing(self) -> bool:
        """Whether the trace takes nodes: begun, on its own thread, not inside an op."""
        return self._open and not self._paused and threading.get_ident() == self._thread

    def write_call(
        self, spec: CallSpec, tensors: list[torch.Tensor], call: Callable[[], Any]
    ) -> tuple[WrittenGraph, Reads]:
        """Run `call`, which passes `tensors` to the model; return its graph and what it read.

        Raises:
            TraceError: the forward does what no graph can hold; names file and line.
        """
        for leaf, tensor in zip(spec.tensor_leaves, tensors, strict=True):
            node = self.graph.placeholder(self._argument_name(leaf.path))
            self.nodes.remember(tensor, node)
            specs = (TensorSpec.of(tensor),)
            info = NodeInfo("input", leaf.path, "", "input", "input", outputs=specs)
            set_info(node, info)
        self._given = {id(leaf.constant) for leaf in spec.leaves if leaf.spec is None}
        versions = [version_of(tensor) for tensor in tensors]
        self._open = True
        try:
            with noted_reads(self.model, self) as noted, patched(self), self:
                out = call()
                if self._refused is not None:
                    raise self._refused
                write_assignments(self.nodes, self.state, self._paths, self)
                self.graph.output(self.nodes.result(out))
        finally:
            self._open = False
        written = [n for n, t in enumerate(tensors) if version_of(t) != versions[n]]
        prune(self.graph)
        gather_inputs(self.graph)
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.graph.lint()
        graph = WrittenGraph(
            self.graph,
            {name: value for name, value in self.nodes.constants.items() if name in used},
            self.returns,
            tuple(self._inlined),
            frozenset(self.reads),
            inputs=tuple(written),
        )
        return graph, noted

    def _argument_name(self, path: str) -> str:
        """Return a Python name for an argument that no other placeholder has."""
        name = re.sub(r"\W", "_", path)
        taken = {node.target for node in self.graph.nodes}
        while name in taken:
            name += "_"
        return name

    def read(self, module: Any, name: str, value: Any) -> Any:
        """Return a number that the forward changes, read by the graph too; else None."""
        path = self._paths.get(module)
        if path is None or (path, name) not in self.live:
            return None
        return read_live(self.nodes, module, path, name, value)

    def held(self, value: object) -> bool:
        """Return whether the model held `value`, or was given it, before the forward ran."""
        return id(value) in self._given or self.state.holds(value)

    def refuse(self, what: str) -> NoGraphError:
        """Return the error that names the user's line and says what it does there."""
        file, line = user_line()
        error = NoGraphError(f"{file}:{line}: {what}")
        # The user's own `except` may swallow it, and the graph would be of that branch.
        self._refused = self._refused or error
        return error

    # ---------------------------------------------------------------- nodes

    def write(self, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> fx.Node:
        """Write a `call_function` node that is no op."""
        node = self.graph.call_function(
            target, self.nodes.argument(args), self.nodes.argument(kwargs or {})
        )
        return self.scoped(node)

    def write_number(self, target: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any:
        """Write the node of an arithmetic result; return `value`, remembering it."""
        return self.nodes.remember(value, self.write(target, args))

    def write_comparison(
        self, target: Callable[..., Any], args: tuple[Any, ...], *, held: bool
    ) -> None:
        """Write a guard: the comparison must come out as `held` again."""
        file, line = user_line()
        guard = self.write(runtime.guard, (self.write(target, args), held, f"{file}:{line}"))
        # The comparison of two traces drops the guards on what both have alike.
        guard.meta["fxray_guard"] = tuple(plain(a) for a in args)

    def scoped(self, node: fx.Node) -> fx.Node:
        """Note on `node` which module calls it stands in."""
        if self._stack:
            node.meta["nn_module_stack"] = dict(self._stack)
        return node

    # ---------------------------------------------------------------- what is called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.writing:
            return func(*args, **kwargs)
        if name in READS:
            self.reads.add(name)
            return func(*args, **kwargs)
        if name in ("__get__", "__set__"):
            return self._property(func, name, args)
        if func is set_grad_enabled:
            return self._grad_mode(*args)
        if name in ANSWERS or name in NUMBERS:
            return self._value(func, name, args, kwargs)
        if name in OUT_OF_SIGHT:
            what = (
                f"the forward hands a tensor's numbers to numpy or Python ({name.strip('_')}), "
                "where a trace does not see what becomes of them"
            )
            raise self.refuse(what)
        return self.call_function(func, args, kwargs)

    def _value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run what takes a tensor's numbers into Python; write the guard that they come again.

        The number itself is what the graph goes on with: Python may have used it for a loop,
        a key or a text, which leave no trace of where it came from.
        """
        node_args, node_kwargs = self._arguments(args, kwargs)
        value = self._run(func, args, kwargs)
        if name == "tolist" and args[0].numel() > _LISTED:
            what = f"the forward makes a Python list of {args[0].numel()} numbers of a tensor"
            raise self.refuse(what)
        if isinstance(func, METHOD_TYPES) or id(func) in PYTHON_METHODS:
            node = self.graph.call_method(name, node_args, node_kwargs)
        else:
            node = self.graph.call_function(func, node_args, node_kwargs)
        if _drawn(node):
            what = f"the forward branches on a random number ({name.strip('_')})"
            raise self.refuse(what)
        file, line = user_line()
        guard = self.write(runtime.guard_value, (self.scoped(node), value, f"{file}:{line}"))
        guard.meta["fxray_guard"] = guard.meta["fxray_branch"] = name.strip("_")
        return value

    def call_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run `func` and write it as one node."""
        name = str(PYTHON_METHODS.get(id(func)) or getattr(func, "__name__", ""))
        method = isinstance(func, METHOD_TYPES) or id(func) in PYTHON_METHODS
        if args and isinstance(args[0], torch.Tensor) and writes_in_place(name):
            self.state.protect(args[0])
        # Before the call: it may change a list it was given.
        node_args, node_kwargs = self._arguments(args, kwargs)
        out = self._run(func, args, kwargs)
        if out is NotImplemented:
            return out
        if method and name == "__setitem__":
            self.scoped(self.graph.call_function(operator.setitem, node_args, node_kwargs))
            return out
        if method and name == "__getitem__":
            node = self.graph.call_function(operator.getitem, node_args, node_kwargs)
        elif method:
            node = self.graph.call_method(name, node_args, node_kwargs)
        else:
            node = self.graph.call_function(func, node_args, node_kwargs)
        if isinstance(out, torch.Tensor) and not writes_in_place(name):
            out = self._run(_apart_from, (out, args), {})
        return self._finish(self.scoped(node), func, name, method=method, out=out)

    def _finish(self, node: fx.Node, func: Any, name: str, *, method: bool, out: Any) -> Any:
        if isinstance(out, float):
            what = f"the forward takes the value of a tensor into Python ({name})"
            raise self.refuse(what)
        role: Role = "method" if method else "function"
        self._describe(node, role, name, qualified_name(func, name, method=method), out)
        return self.nodes.remember(out, node)

    def call_object(
        self, target: Any, name: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run something that is no plain function and write it as one node."""
        node_args, node_kwargs = self._arguments(args, kwargs)
        out = self._run(run, args, kwargs)
        all_args = (self.nodes.constant(target), *node_args)
        node = self.scoped(self.graph.call_function(runtime.run_object, all_args, node_kwargs))
        self._describe(node, "function", name, name, out)
        return self.nodes.remember(out, node)

    def call_module(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Run a module: a leaf as one node, another by tracing through it."""
        path = self._paths.get(module)
        if path is None:  # made inside the forward, or hidden: no part of the model
            if any(map(self.state.knows, (*module.parameters(), *module.buffers()))):
                what = (
                    f"the forward calls a {type(module).__name__} that the model does not register"
                )
                raise self.refuse(what)
            return original(module, *args, **kwargs)
        call = self._next_call(path)
        if has_backward_hooks(module) and not (path and is_leaf(module)):
            what = f"a backward hook hangs on {path or 'the model'}, which a graph does not call"
            raise self.refuse(what)
        # One whose parameters were swapped (functional_call) computes with those.
        if path and is_leaf(module) and not self.state.swapped(module):
            return self._call_leaf(module, call, original, args, kwargs)
        self._inlined[path] = None
        if call:
            self._stack[call] = path, type(module).__name__
        try:
            out = original(module, *args, **kwargs)
        finally:
            if call:
                self._stack.popitem()
        self._note_returned(call, out)
        return out

    def _next_call(self, path: str) -> str:
        count = self._calls[path]
        self._calls[path] += 1
        return f"{path}@{count}" if count else path

    def _call_leaf(
        self, module: nn.Module, call: str, original: Any, args: Any, kwargs: Any
    ) -> Any:
        path = self._paths[module]
        node_args, node_kwargs = self._arguments(args, kwargs)
        out = self._run(original, (module, *args), kwargs)
        node = self.scoped(self.graph.call_module(path, node_args, node_kwargs))
        items = tuple(tensor_items(out))
        if not items:
            what = f"module {path!r} returned {type(out).__qualname__}, not tensors"
            raise self.refuse(what)
        info = NodeInfo(
            "module",
            call,
            "",
            type_of_module(module),
            scope=tuple(self._stack),
            module=path,
            outputs=self._specs(items),
            items=tuple(item for item, _ in items),
            where=short_line(),
            **self._run(module_fields, (module,), {}),
        )
        set_info(node, info)
        self.nodes.remember(out, node)
        self._note_returned(call, out)
        return out

    def _arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self.nodes.argument(tuple(args)), self.nodes.argument(dict(kwargs))

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._paused += 1
        try:
            return func(*args, **kwargs)
        finally:
            self._paused -= 1

    def _specs(self, items: Sequence[tuple[str, torch.Tensor]]) -> tuple[TensorSpec, ...]:
        # Paused: to ask a tensor's shape is an access that the mode would write.
        return tuple(self._run(TensorSpec.of, (tensor,), {}) for _, tensor in items)

    def _describe(self, node: fx.Node, role: Role, name: str, target: str, out: Any) -> None:
        """Make an op of `node` if it gave tensors."""
        items = tuple(tensor_items(out))
        if not items:
            return
        info = NodeInfo(
            role,
            next(reversed(self._stack), ""),
            op_name_of(name),
            type_of_function(name),
            target,
            scope=tuple(self._stack),
            outputs=self._specs(items),
            items=tuple(item for item, _ in items),
            where=short_line(),
        )
        set_info(node, info)

    def describe_parameter(self, node: fx.Node, path: str, parameter: torch.Tensor) -> None:
        """Make the op of a bare parameter of `node`."""
        (spec,) = self._specs([("", parameter)])
        own = {path.rpartition(".")[2]: spec}
        info = NodeInfo(
            "parameter",
            path,
            "",
            "parameter",
            "parameter",
            tuple(self._stack),
            outputs=(spec,),
            parameters=own,
        )
        set_info(node, info)

    def _note_returned(self, call: str, out: Any) -> None:
        tensors = (self.nodes.node_of(t) for _, t in tensor_items(fields_of(out)))
        self.returns[call] = tuple(node for node in tensors if node is not None)

    # ---------------------------------------------------------------- special cases

    def _property(self, func: Any, access: str, args: Any) -> Any:
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if access == "__set__":
            if name == "data":
                self.state.protect(args[0])
                self.write(setattr, (args[0], name, args[1]))
            return func(*args)
        out = func(*args)
        self.reads.add(name)
        if name in UNGUARDED:
            what = f"the forward looks at {name} of a tensor, which no graph is checked for"
            raise self.refuse(what)
        if name not in TENSOR_PROPERTIES and name != "shape":
            return out
        node = self.scoped(self.graph.call_function(getattr, (self.nodes.argument(args[0]), name)))
        self._describe(node, "method", name, f"torch.Tensor.{name}", out)
        return self.nodes.remember(out, node)

    def _grad_mode(self, mode: bool) -> Any:
        """Write a switch of autograd so that leaving puts back what was before.

        A raw `_set_grad_enabled(True)` on leaving `no_grad` would switch autograd on
        inside the user's own `no_grad` around the whole model; so entering and leaving
        are told apart by the context object that torch's frames belong to.
        """
        owner, method = grad_mode_owner()
        if method == "__exit__" and owner in self._grad_modes:
            self.write(runtime.exit_grad_mode, (self._grad_modes.pop(owner),))
        elif owner not in self._grad_modes:
            self._grad_modes[owner] = self.write(runtime.enter_grad_mode, (mode,))
        return set_grad_enabled(mode)


def _drawn(node: fx.Node) -> bool:
    """Return whether a value comes from random numbers alone, and from no input."""
    seen: set[fx.Node] = set()
    todo, random = [node], False
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder" or (one.op == "get_attr" and info_of(one) is not None):
            return False
        random = random or getattr(one.target, "__name__", one.target) in DRAWS
        todo += one.all_input_nodes
    return random


def _apart_from(out: torch.Tensor, args: Any) -> torch.Tensor:
    """Return `out`, as another object where it is one of `args` itself.

    `x.float()` of a float32 tensor is `x`; with another input it is not, and what the
    forward does with `x` afterwards must not be taken for what it does with the result.
    """
    return out.view_as(out) if any(out is arg for arg in args) else out
