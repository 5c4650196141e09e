"""Tracing without an input, by torch.fx's own symbolic tracer."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import threading
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx, nn

from fxray.architecture import TensorSpec
from fxray.errors import NoGraphError, TraceError
from fxray.torch_private import has_forward_hooks
from fxray.tracing import runtime
from fxray.tracing.alone import preserved_rng, training_flags
from fxray.tracing.attributes import noted_reads
from fxray.tracing.batch import difference
from fxray.tracing.call import OpenCall
from fxray.tracing.grounds import State
from fxray.tracing.names import op_name_of, type_of_function, type_of_module
from fxray.tracing.ops import NodeInfo, info_of, module_fields, set_info
from fxray.tracing.patches import (
    SKIPPED_FILES,
    patched_contexts,
    refused_change,
    refused_randomness,
    short_line,
)
from fxray.tracing.program import MODES
from fxray.tracing.results import fields_of
from fxray.tracing.state import ModelState
from fxray.tracing.torch_calls import is_leaf, writes_in_place
from fxray.tracing.written import WrittenGraph

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["open_call", "write_symbolically"]

_NUMBER_METHODS = frozenset(
    ["size", "dim", "ndimension", "numel", "nelement", "element_size", "stride"]
)
_NUMBER_PROPERTIES = frozenset(["shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"])
_SEVERAL = frozenset(
    [
        *("lstm", "gru", "rnn", "multiheadattention"),
        *("chunk", "split", "unbind", "tensor_split", "hsplit", "vsplit", "meshgrid"),
        *("topk", "sort", "max", "min", "median", "mode", "unique", "svd", "qr", "eigh"),
    ]
)
"""Types that return several tensors: an integer index of theirs unpacks, it does not compute."""


def open_call(model: nn.Module) -> OpenCall:
    """Return what a graph traced without an input takes."""
    required: list[str] = []
    defaults: dict[str, Any] = {}
    for p in inspect.signature(model.forward).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            defaults[p.name] = () if p.kind == p.VAR_POSITIONAL else {}
        elif p.default is p.empty:
            required.append(p.name)
        else:
            defaults[p.name] = p.default
    return OpenCall(tuple(required), defaults)


def write_symbolically(model: nn.Module) -> dict[str, WrittenGraph]:
    """Return the graph of each mode.

    A module whose forward fx cannot follow is kept as one op, its class with it.

    Raises:
        TraceError: the model's own forward cannot be followed; names file and line.
    """
    why = ""
    if has_forward_hooks(model):
        why = "has forward hooks, which torch.fx leaves out of the model that it traces"
    elif any(
        p.kind == p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values()
    ):
        why = "takes any number of arguments, and without an input there is no telling how many"
    if why:
        msg = f"{type(model).__name__} {why}. Give one: fxray.trace(model, x)"
        raise TraceError(msg)
    leaves: dict[type[nn.Module], str] = {}
    while True:
        try:
            return {m: _write_twice(model, leaves, training=m == MODES[0]) for m in MODES}
        except _Unfollowed as failure:
            if failure.module is None or type(failure.module) in leaves:
                where = f"{failure.where}: " if failure.where else ""
                msg = (
                    f"{where}torch.fx cannot follow the forward without an input: "
                    f"{failure.reason}. Give one: fxray.trace(model, x)"
                )
                raise TraceError(msg) from failure.__cause__
            leaves[type(failure.module)] = failure.where


class _Unfollowed(Exception):  # noqa: N818 - caught by the one who raises it
    """The innermost module that fx failed in, None for the root, and where."""

    def __init__(self, module: nn.Module | None, where: str, reason: str) -> None:
        super().__init__(reason)
        self.module, self.where, self.reason = module, where, reason


def _write_twice(
    model: nn.Module, leaves: dict[type[nn.Module], str], *, training: bool
) -> WrittenGraph:
    """Return the graph of one mode; refuse one that other random numbers would change."""
    first = _write(model, leaves, training=training, seed=0)
    apart = difference(first, _write(model, leaves, training=training, seed=1))
    if apart is not None:
        raise refused_randomness(model, str(apart))
    return first


def _write(
    model: nn.Module, leaves: dict[type[nn.Module], str], *, training: bool, seed: int
) -> WrittenGraph:
    state = ModelState(model)
    tracer = _Tracer(model, frozenset(leaves))
    try:
        with (
            preserved_rng(seed),
            training_flags(model, training=training),
            noted_reads(model, tracer) as reads,
            patched_contexts(tracer),
        ):
            graph = tracer.trace(model)
            tracer.keep_constants(graph)
            tracer.keep_assignments(graph, state)
    except TraceError:
        raise
    except Exception as error:
        inner = tracer.stack[-1].partition("@")[0] if tracer.stack else ""
        module = model.get_submodule(inner) if inner else None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _Unfollowed(module, _user_frame(error), reason) from error
    finally:
        tracer.writing = False
        state.restore()
    _drop_numbers(graph)
    graph.lint()
    notes = [
        f"{cls.__name__} kept as one op" + (f" ({where})" if where else "")
        for cls, where in leaves.items()
    ]
    inlined = tuple(dict.fromkeys(c.partition("@")[0] for c in tracer.returns))
    return WrittenGraph(
        graph,
        tracer.constants,
        tracer.returns,
        inlined,
        state=State.of(model, reads, inlined=inlined),
        notes=tuple(notes),
    )


def _user_frame(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not f.filename.startswith(SKIPPED_FILES)]
    return f"{ours[-1].filename}:{ours[-1].lineno}" if ours else ""


class _Tracer(fx.Tracer):
    """fx's tracer, which also notes what every node is and where it stands."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, leaves: frozenset[type[nn.Module]]) -> None:
        super().__init__()
        self._model, self._leaves = model, leaves
        self.stack: list[str] = []
        self.returns: dict[str, tuple[fx.Node, ...]] = {}
        self.constants: dict[str, Any] = {}
        self.writing = True
        self._thread = threading.get_ident()
        self._calls: collections.Counter[str] = collections.Counter()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    # ------------------------------------------------------------------ fx's interface

    def create_args_for_root(
        self,
        root_fn: Any,
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:
        """Make a proxy of each argument without a default; Python fills in the rest.

        A proxy for `mask=None` would take the branch of a mask that was given.
        """
        names = open_call(self._model).required
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def run(root: nn.Module, *given: Any) -> Any:
            out = root_fn(root, **dict(zip(names, given, strict=True)))
            self._note_returned("", out)
            return out

        return run, [self._model, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Return whether `m` stays one op."""
        return is_leaf(m) or type(m) in self._leaves

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy for a parameter that the traced forward reads, as fx does."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Return `a` as fx takes it, mappings of a class of their own kept as such."""
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, dict) and type(a) is not dict:
            return self._create_mapping(a)
        return super().create_arg(a)

    def _create_mapping(self, mapping: Any) -> fx.Node:
        items = {key: self.create_arg(value) for key, value in mapping.items()}
        if dataclasses.is_dataclass(mapping):
            node = self.create_node("call_function", type(mapping), (), items)
        else:
            held = self._constant(type(mapping)).node
            node = self.create_node("call_function", runtime.build_mapping, (held, items), {})
        node.meta.pop("fxray_info", None)
        node.meta["fxray_passes"] = True
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Note the call, then do as fx does.

        fx replaces `Module.__call__` for every thread; another one's modules run as ever.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        count = self._calls[path]
        self._calls[path] += 1
        call = f"{path}@{count}" if count else path
        if self.is_leaf_module(m, path):
            out = super().call_module(m, forward, args, kwargs)
            self._describe_module(out.node, m, path, call)
        else:
            self.stack.append(call)
            out = super().call_module(m, forward, args, kwargs)
            self.stack.pop()  # not in a finally: what failed is then still on top
        self._note_returned(call, out)
        return out

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Make the node and note what it is."""
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "placeholder":
            set_info(node, NodeInfo("input", str(target), "", "input", "input"))
        elif kind == "get_attr" and target in self._parameters:
            spec = TensorSpec.of(self._parameters[target])
            own = {target.rpartition(".")[2]: spec}
            info = NodeInfo(
                "parameter", target, "", "parameter", "parameter", tuple(self.stack),
                outputs=(spec,), parameters=own,
            )  # fmt: skip
            set_info(node, info)
        elif kind in ("call_function", "call_method"):
            self._describe_call(node, kind, target)
        return node

    # ------------------------------------------------------------------ what patches write

    def write(self, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Write a `call_function` node that is no op."""
        proxy = self.create_proxy("call_function", target, args, kwargs or {})
        proxy.node.meta.pop("fxray_info", None)
        return proxy

    def call_object(
        self, target: Any, name: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Write something that is no plain function as one node."""
        if not any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
            return run(*args, **kwargs)
        held = self._constant(target)
        proxy = self.create_proxy("call_function", runtime.run_object, (held, *args), kwargs)
        self._describe_call(proxy.node, "call_function", name)
        return proxy

    def _constant(self, value: Any) -> Any:
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = value
        return self.create_proxy("get_attr", name, (), {})

    def keep_constants(self, graph: fx.Graph) -> None:
        """Keep what fx left on the user's model: tensors that the forward made.

        Raises:
            TraceError: the forward writes into one, which would be the same at every call.
        """
        for node in graph.nodes:
            source = node.args[0] if node.args else None
            name = getattr(node.target, "__name__", str(node.target))
            made = isinstance(source, fx.Node) and str(source.target).startswith("_tensor_constant")
            if made and (writes_in_place(name) or name in ("setitem", "iadd", "imul", "isub")):
                msg = (
                    f"the forward of {type(self._model).__name__} writes into a tensor that it "
                    f"makes ({node.name}), which torch.fx makes once for all calls. Give an input: "
                    "fxray.trace(model, x)"
                )
                raise TraceError(msg)
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
                name = f"_constant_{len(self.constants)}"
                self.constants[name] = getattr(self._model, node.target)
                node.target = name

    def keep_assignments(self, graph: fx.Graph, state: ModelState) -> None:
        """Write what the forward assigned to attributes, which fx loses in silence."""
        if state.filled():
            what = f"the forward of {type(self._model).__name__} fills a list or dict of its own"
            msg = f"{what}, which torch.fx loses. Give an input: fxray.trace(model, x)"
            raise NoGraphError(msg)
        before_end = graph.output_node()
        for module, name, _, value in state.assigned():
            path = self.path_of_module(module) if module is not self._model else ""
            if isinstance(value, fx.Proxy):
                with graph.inserting_before(before_end):
                    holder = graph.get_attr(path) if path else self._constant(module).node
                    graph.call_function(runtime.assign, (holder, name, value.node))
            elif name != "training" and not name.startswith("_tensor_constant"):
                raise refused_change(module, f"{path}.{name}" if path else name)

    # ------------------------------------------------------------------ notes

    def _describe_module(self, node: fx.Node, m: nn.Module, path: str, call: str) -> None:
        info = NodeInfo(
            "module",
            call,
            "",
            type_of_module(m),
            scope=tuple(self.stack),
            module=path,
            where=short_line(),
            **module_fields(m),
        )
        set_info(node, info)

    def _describe_call(self, node: fx.Node, kind: str, target: Any) -> None:
        if _is_number(node):
            node.meta["fxray_number"] = True
            return
        if _unpacks(node):
            node.meta["fxray_passes"] = True
            return
        method = kind == "call_method"
        module = "torch.Tensor" if method else getattr(target, "__module__", None) or "torch"
        name = target if isinstance(target, str) else getattr(target, "__name__", "op")
        if target is getattr:
            name = str(node.args[1])
        info = NodeInfo(
            "method" if method else "function",
            self.stack[-1] if self.stack else "",
            op_name_of(name),
            type_of_function(name),
            f"{module.removeprefix('_')}.{name}",
            scope=tuple(self.stack),
            where=short_line(),
        )
        set_info(node, info)

    def _note_returned(self, call: str, out: Any) -> None:
        found: list[fx.Node] = []
        fx.node.map_aggregate(
            fields_of(out),
            lambda value: found.append(value.node) if isinstance(value, fx.Proxy) else None,
        )
        self.returns[call] = tuple(found)


def _is_number(node: fx.Node) -> bool:
    """Return whether `node` is a size or arithmetic on sizes: no tensor, as far as one can tell."""
    if node.op == "call_method":
        return node.target in _NUMBER_METHODS
    if node.target is getattr:
        return node.args[1] in _NUMBER_PROPERTIES
    sources = node.all_input_nodes
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    return arithmetic and bool(sources) and all(s.meta.get("fxray_number") for s in sources)


def _unpacks(node: fx.Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return False
    source, key = node.args
    if not isinstance(source, fx.Node) or not isinstance(key, (int, str)):
        return False
    info = info_of(source)
    if info is not None:
        return info.type in _SEVERAL
    # Only an LSTM nests: (output, (h, c)). What is taken of h or c itself is computed.
    whole = source.args[0] if source.meta.get("fxray_passes") else None
    if not isinstance(whole, fx.Node):
        return False
    found, nested = info_of(whole), source.args[1]
    return found is not None and found.type == "lstm" and bool(nested == 1)


def _drop_numbers(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.meta.get("fxray_number") or node.op == "get_attr"):
            graph.erase_node(node)
