"""A traced model as a frozen networkx graph of ops."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import attrs
import networkx as nx
import torch

from fxray.errors import UnknownNameError, nearest

__all__ = ["Architecture", "Op", "Role", "TensorSpec", "within"]

Role = Literal["module", "function", "method", "parameter", "input"]
"""How an op stands in the model: a leaf module called, a function or a tensor
method called, a bare parameter read in a forward, or an input of the model."""


def within(module: str, path: str) -> str:
    """Return what a path inside the module called `module` is called where there are several.

    >>> within("generator", "conv1"), within("generator", ""), within("", "conv1")
    ('generator.conv1', 'generator', 'conv1')
    """
    return ".".join(filter(None, (module, path)))


def _tuple(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(values)


def _dict(items: Mapping[str, Any]) -> dict[str, Any]:
    return dict(items)


@attrs.frozen
class TensorSpec:
    """The shape and dtype of one tensor, without its numbers.

    Attributes:
        shape: sizes as they were when traced, e.g. `(2, 8, 28, 28)`.
        dtype: torch's name without its prefix, e.g. `"float32"`.
    """

    shape: tuple[int, ...] = attrs.field(converter=_tuple)
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the spec of `tensor`.

        >>> TensorSpec.of(torch.zeros(2, 3))
        TensorSpec(shape=(2, 3), dtype='float32')
        """
        return cls(tuple(int(n) for n in tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dim tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, were it dense and contiguous."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own object."""
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            msg = f"torch has no dtype called {self.dtype!r}"
            raise TypeError(msg)
        return dtype

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@attrs.frozen
class Op:
    """One thing the model computes: a node of the graph that a person would name.

    Attributes:
        path: canonical name: module path, then op, e.g. `"layer1.0.relu"`.
        key: type key, e.g. `"relu-3"`.
        type: type in lower case, the same for module, function and method.
        role: how it stands in the model, see `Role`.
        target: qualified name of what is called, e.g. `"torch.nn.functional.relu"`.
        module: path of the leaf module called (a state_dict prefix), else None.
        scope: paths of the module calls it stands in, outermost first, the root left out.
        nodes: name of its fx node by mode, e.g. `{"train": "relu_1", "eval": "relu_1"}`.
        inputs: one spec per tensor argument, in order; empty when traced without an input.
        outputs: one spec per tensor returned, in order; empty when traced without an input.
        items: where each returned tensor stands in what is returned: `("",)` for a
            single tensor, `("0", "1.0", "1.1")` for an LSTM.
        parameters: specs by name below the op, e.g. `{"weight": …, "bias": …}`; a bare
            parameter has one, under the last part of its path.
        settings: what the module prints of itself, e.g. `"1, 8, kernel_size=(3, 3)"`.
        where: the user's `file.py:line` that calls it, empty where unknown.
    """

    path: str
    key: str
    type: str
    role: Role = attrs.field(validator=attrs.validators.in_(get_args(Role)))
    target: str
    module: str | None = None
    scope: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    nodes: Mapping[str, str] = attrs.field(factory=dict, converter=_dict, hash=False)
    inputs: tuple[TensorSpec, ...] = attrs.field(default=(), converter=_tuple)
    outputs: tuple[TensorSpec, ...] = attrs.field(default=(), converter=_tuple)
    items: tuple[str, ...] = attrs.field(default=("",), converter=_tuple)
    parameters: Mapping[str, TensorSpec] = attrs.field(factory=dict, converter=_dict, hash=False)
    settings: str = ""
    where: str = ""

    @property
    def parameter_count(self) -> int:
        """Number of parameter elements of the op."""
        return sum(spec.numel for spec in self.parameters.values())

    def parameter_path(self, name: str) -> str:
        """Return the state_dict path of the parameter called `name` below the op."""
        return self.path if self.role == "parameter" else f"{self.module}.{name}"

    def within(self, module: str) -> Op:
        """Return the op as one of several models', that which is called `module`.

        Whatever it goes by begins with that name: path, key, fx nodes, modules.
        """
        return attrs.evolve(
            self,
            path=within(module, self.path),
            key=within(module, self.key),
            module=None if self.module is None else within(module, self.module),
            scope=(module, *(within(module, call) for call in self.scope)),
            nodes={mode: within(module, node) for mode, node in self.nodes.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the op as JSON-ready plain data."""
        plain: dict[str, Any] = attrs.asdict(self, recurse=False)
        plain["scope"], plain["items"] = list(self.scope), list(self.items)
        plain["nodes"] = dict(self.nodes)
        plain["inputs"] = [_spec_to_json(spec) for spec in self.inputs]
        plain["outputs"] = [_spec_to_json(spec) for spec in self.outputs]
        plain["parameters"] = {name: _spec_to_json(s) for name, s in self.parameters.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Op:
        """Return the op that `to_dict` gave as `plain`."""
        return cls(
            **{
                **plain,
                "inputs": [TensorSpec(**spec) for spec in plain["inputs"]],
                "outputs": [TensorSpec(**spec) for spec in plain["outputs"]],
                "parameters": {name: TensorSpec(**s) for name, s in plain["parameters"].items()},
            }
        )


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"shape": list(spec.shape), "dtype": spec.dtype}


@attrs.frozen(eq=False, repr=False)
class Architecture(Mapping[str, Op]):
    """Every op of a traced model, in the order they run, and how they are joined.

    A mapping from path to `Op`; look-up also takes a type key (`"conv2d-0"`, case
    ignored) or an fx node name. The graph has one node per path (attribute `op`) and
    one edge per pair of joined ops, whose attribute `slots` names every argument the
    tensor is passed as: `x + x` is one edge with `slots == ("0", "1")`.

    Attributes:
        model: class name of the traced model.
        graph: the frozen `networkx.DiGraph`; its nodes in the order the ops run.
        modules: class name of every module of the model by path, the root as `""`; of
            several models there is no common root.
        returns: paths of the ops whose tensors a module call returned, by call
            (`"layer1"`, `"layer1@1"`; the root as `""`).
    """

    model: str
    graph: nx.DiGraph
    modules: Mapping[str, str] = attrs.field(factory=dict, converter=_dict)
    returns: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict, converter=_dict)
    _aliases: Mapping[str, str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        nx.freeze(self.graph)
        aliases: dict[str, str] = {}
        for op in self.values():
            for node in op.nodes.values():
                aliases.setdefault(node.lower(), op.path)
        aliases.update((op.key.lower(), op.path) for op in self.values())
        object.__setattr__(self, "_aliases", aliases)

    @classmethod
    def build(
        cls,
        model: str,
        ops: Iterable[Op],
        edges: Iterable[tuple[str, str, str]],
        modules: Mapping[str, str],
        returns: Mapping[str, tuple[str, ...]],
    ) -> Architecture:
        """Return the architecture of `ops` joined by `edges` of (from, to, slot)."""
        graph: nx.DiGraph = nx.DiGraph()
        for op in ops:
            graph.add_node(op.path, op=op)
        for tail, head, slot in edges:
            slots = graph.edges[tail, head]["slots"] if graph.has_edge(tail, head) else ()
            graph.add_edge(tail, head, slots=(*slots, slot))
        return cls(model, graph, modules, returns)

    @classmethod
    def of_several(cls, parts: Mapping[str, Architecture]) -> Architecture:
        """Return the architectures of several models as one, each under its name."""
        modules: dict[str, str] = {}
        returns: dict[str, tuple[str, ...]] = {}
        for name, part in parts.items():
            modules.update((within(name, path), kind) for path, kind in part.modules.items())
            for call, paths in part.returns.items():
                returns[within(name, call)] = tuple(within(name, path) for path in paths)
        return cls.build(
            ", ".join(f"{name}: {part.model}" for name, part in parts.items()),
            [op.within(name) for name, part in parts.items() for op in part.values()],
            [
                (within(name, tail), within(name, head), slot)
                for name, part in parts.items()
                for tail, head, slots in part.graph.edges(data="slots")
                for slot in slots
            ],
            modules,
            returns,
        )

    def __getitem__(self, name: str) -> Op:
        op: Op = self.graph.nodes[self.resolve(name)]["op"]
        return op

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph.nodes)

    def __len__(self) -> int:
        return len(self.graph)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def _find(self, name: str) -> str | None:
        return name if name in self.graph else self._aliases.get(name.lower())

    def resolve(self, name: str) -> str:
        """Return the path of the op that `name` (path, type key or fx name) means.

        Raises:
            UnknownNameError: no op is called that; names the nearest.
        """
        path = self._find(name) if isinstance(name, str) else None
        if path is None:
            raise self.unknown(str(name))
        return path

    def unknown(self, name: str) -> UnknownNameError:
        """Return the error that says no op is called `name` and names the nearest."""
        known = [*self, *(op.key for op in self.values()), *filter(None, self.modules)]
        close = nearest(name, known)
        hint = f"nearest: {', '.join(map(repr, close))}. " if close else ""
        return UnknownNameError(
            f"no op {name!r} in {self.model}; {hint}it has {len(self)} ops: {self.listing()}"
        )

    def listing(self, most: int = 12) -> str:
        """Return the paths of the ops in a line, those in the middle left out past `most`."""
        paths = list(self)
        if len(paths) > most:
            paths = [*paths[: most // 2], "…", *paths[-most // 2 :]]
        return ", ".join(paths)

    def match(self, pattern: str) -> tuple[str, ...]:
        """Return the paths that the shell-style `pattern` matches, in graph order.

        `*` crosses dots: `"layer1.*"` is every op inside `layer1`.
        """
        return tuple(path for path in self if fnmatch.fnmatchcase(path, pattern))

    def beneath(self, module: str) -> tuple[str, ...]:
        """Return the paths of every op that runs inside the module at path `module`."""

        def inside(call: str) -> bool:
            path = call.partition("@")[0]
            return path == module or path.startswith(f"{module}.")

        return tuple(
            op.path
            for op in self.values()
            if not module
            or any(inside(call) for call in op.scope)
            or (op.module is not None and inside(op.module))
            or (op.role == "parameter" and inside(op.path))
        )

    @property
    def parameter_count(self) -> int:
        """Number of parameter elements, a shared parameter counted once."""
        sizes = {
            op.parameter_path(name): spec.numel
            for op in self.values()
            for name, spec in op.parameters.items()
        }
        return sum(sizes.values())

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when an op, its type or an edge changes."""
        ops = [[op.path, op.type] for op in self.values()]
        text = json.dumps([ops, sorted(map(list, self.graph.edges))])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready plain data: model, ops by path, edges, modules, returns."""
        return {
            "model": self.model,
            "ops": {op.path: op.to_dict() for op in self.values()},
            "edges": [[u, v, list(slots)] for u, v, slots in self.graph.edges(data="slots")],
            "modules": dict(self.modules),
            "returns": {call: list(paths) for call, paths in self.returns.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Architecture:
        """Return the architecture that `to_dict` gave as `plain`."""
        return cls.build(
            plain["model"],
            [Op.from_dict(op) for op in plain["ops"].values()],
            [(u, v, slot) for u, v, slots in plain["edges"] for slot in slots],
            plain["modules"],
            {call: tuple(paths) for call, paths in plain["returns"].items()},
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Architecture:
        return self  # frozen: a copied module may share it

    def __repr__(self) -> str:
        return (
            f"<Architecture of {self.model}: {len(self)} ops, "
            f"{self.graph.number_of_edges()} edges, {self.parameter_count:,} parameters>"
        )
