"""Which node every tensor, number and constant of a trace came from."""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxray.tracing import runtime
from fxray.tracing.numbers import NumberWriter, TracedFloat, TracedInt, plain
from fxray.tracing.snapshots import is_plain_object
from fxray.tracing.torch_calls import EXACT, TORCH_CONSTANTS

if TYPE_CHECKING:
    from fxray.errors import TraceError

__all__ = ["Provenance"]


_LEAVES = (*EXACT, *TORCH_CONSTANTS, enum.Enum, torch.Tensor)


class _Writer(NumberWriter, Protocol):
    """What is asked of whoever writes the nodes."""

    def scoped(self, node: fx.Node) -> fx.Node:
        """Note on `node` which module calls it stands in."""
        ...

    def describe_parameter(self, node: fx.Node, path: str, parameter: torch.Tensor) -> None:
        """Make the op of a bare parameter of `node`."""
        ...

    def refuse(self, what: str) -> TraceError:
        """Return the error that names the user's line."""
        ...

    def held(self, value: object) -> bool:
        """Return whether the model held `value`, or was given it, before the forward ran."""
        ...


class Provenance:
    """The nodes of a trace by what they stand for; tensors are held weakly, by identity."""

    def __init__(self, graph: fx.Graph, model: nn.Module, writer: _Writer) -> None:
        self.graph, self._writer = graph, writer
        self.constants: dict[str, Any] = {}
        self._node_of: Any = WeakTensorKeyDictionary()
        self._attributes: Any = WeakTensorKeyDictionary()
        self._constant_nodes: dict[int, fx.Node] = {}
        self._object_nodes: dict[int, fx.Node] = {}
        for path, module in reversed([*model.named_modules()]):
            for held in (module._parameters, module._buffers, vars(module)):  # noqa: SLF001
                for name, tensor in held.items():
                    if isinstance(tensor, torch.Tensor):
                        self._attributes[tensor] = f"{path}.{name}" if path else name

    def node_of(self, tensor: torch.Tensor) -> fx.Node | None:
        """Return the node that gave `tensor`, None if the trace did not see it made."""
        node: fx.Node | None = self._node_of.get(tensor)
        return node

    def knows(self, tensor: torch.Tensor) -> bool:
        """Return whether the trace saw `tensor` made, or the model holds it."""
        return tensor in self._node_of or tensor in self._attributes

    def remember(self, value: Any, node: fx.Node) -> Any:  # noqa: C901 - one branch for each kind
        """Let every tensor and number of `value` be found again as `node`."""
        if isinstance(value, torch.Tensor):
            self._node_of[value] = node
        elif isinstance(value, bool):
            pass
        elif isinstance(value, int):
            return TracedInt(value, node, self._writer)
        elif isinstance(value, float):
            return TracedFloat(value, node, self._writer)
        elif isinstance(value, torch.Size):
            return torch.Size([self.remember(n, self._part(node, i)) for i, n in enumerate(value)])
        elif type(value) is tuple and value and all(type(n) in (int, float) for n in value):
            return tuple(self.remember(n, self._part(node, i)) for i, n in enumerate(value))
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                self.remember(inner, self._part(node, i))
        elif isinstance(value, dict):
            for key, inner in value.items():
                self.remember(inner, self._part(node, key))
        return value

    def _part(self, node: fx.Node, key: int | str) -> fx.Node:
        part = self.graph.call_function(operator.getitem, (node, key))
        part.meta["fxray_passes"] = True
        return self._writer.scoped(part)

    def argument(self, value: Any) -> Any:
        """Return `value` as fx takes it: nodes for tensors and traced numbers.

        Raises:
            TraceError: it holds a tensor computed where the trace could not see it.
        """
        if isinstance(value, torch.Tensor):
            return self._tensor_argument(value)
        if isinstance(value, (TracedInt, TracedFloat)):
            # A number of an earlier trace, kept in some cache, is a plain number here.
            return value.node if value.writer is self._writer else plain(value)
        if type(value) in EXACT or isinstance(value, (fx.Node, *TORCH_CONSTANTS)):
            return value
        if isinstance(value, np.generic):
            return value.item()
        for exact in (int, float, str):
            if isinstance(value, exact):
                return exact(value)
        return self._container_argument(value)

    def _container_argument(self, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            node = self.graph.call_function(type(value), tuple(map(self.argument, value)))
            node.meta["fxray_passes"] = True
            return node
        if isinstance(value, tuple):
            return tuple(self.argument(v) for v in value)
        if isinstance(value, (list, range)):
            return [self.argument(v) for v in value]
        if type(value) is dict:
            return {key: self.argument(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        return self.constant(value)

    def _tensor_argument(self, tensor: torch.Tensor) -> fx.Node:
        node = self._node_of.get(tensor)
        if node is None:
            path = self._attributes.get(tensor)
            if path is None:
                return self.constant(tensor)
            node = self._node_of[tensor] = self.graph.get_attr(path)
            if isinstance(tensor, nn.Parameter):
                self._writer.describe_parameter(node, path, tensor)
        found: fx.Node = node
        return found

    def constant(self, value: Any) -> fx.Node:
        """Return the node that reads `value`, kept beside the graph, as an attribute."""
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            what = "the forward uses a tensor that was computed where the trace could not see it"
            raise self._writer.refuse(what)
        if self._made_in_forward(value):
            name = getattr(value, "__name__", type(value).__name__)
            what = (
                f"the forward hands a function or object made in it ({name}) to torch, which may "
                "hold what another call would not give it"
            )
            raise self._writer.refuse(what)
        node = self._constant_nodes.get(id(value))
        if node is None:
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = value
            node = self._constant_nodes[id(value)] = self.graph.get_attr(name)
        return node

    def _made_in_forward(self, value: Any) -> bool:
        if isinstance(value, (types.FunctionType, type)):
            return "<locals>" in value.__qualname__
        made = isinstance(value, functools.partial) or is_plain_object(value)
        return made and not self._writer.held(value)

    def result(self, value: Any) -> Any:
        """Return what the forward gave back as the argument of the output node."""
        if isinstance(value, _LEAVES):
            return self.argument(value)
        if isinstance(value, type):
            return self.constant(value)
        if dataclasses.is_dataclass(value):
            return self._construct(type(value), (), self._dataclass_items(value))
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, (tuple, list)):
            return self._sequence(value)
        if is_plain_object(value) and hasattr(value, "__dict__"):
            return self._object(value)
        what = f"the forward returns a {type(value).__qualname__}, which a graph cannot make anew"
        raise self._writer.refuse(what)

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        items = {key: self.result(inner) for key, inner in value.items()}
        if type(value) is dict:
            return items
        own = {name: self.result(inner) for name, inner in getattr(value, "__dict__", {}).items()}
        made = (self.constant(type(value)), items, *([own] if own else []))
        return self._construct(runtime.build_mapping, made, {})

    def _sequence(self, value: Any) -> Any:
        inner = tuple(map(self.result, value))
        if isinstance(value, torch.Size):
            return self._construct(torch.Size, ([*inner],), {})
        if hasattr(value, "_fields"):
            return self._construct(type(value), inner, {})
        return type(value)(inner)

    def _object(self, value: Any) -> fx.Node:
        """Return the node that makes an object anew: a cache of keys and values, say."""
        node = self._object_nodes.get(id(value))
        if node is None:
            if self._writer.held(value):
                what = (
                    f"the forward returns a {type(value).__qualname__} that it did not make itself"
                )
                raise self._writer.refuse(what)
            fields = {name: self.result(inner) for name, inner in vars(value).items()}
            made = (self.constant(type(value)), fields)
            node = self._object_nodes[id(value)] = self._construct(runtime.build_object, made, {})
        return node

    def _dataclass_items(self, value: Any) -> dict[str, Any]:
        # A ModelOutput of transformers is a dict too, of only those fields that are set.
        names = value if isinstance(value, Mapping) else (f.name for f in dataclasses.fields(value))
        return {name: self.result(getattr(value, name)) for name in names}

    def _construct(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["fxray_passes"] = True
        return node
