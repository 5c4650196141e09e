"""From the layout of a call to code that a compiler can trace: whether it fits, and its tensors."""

from __future__ import annotations

import enum
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.errors import NoGraphError
from fxray.torch_private import pytree
from fxray.tracing.call import CallSpec, OpenCall
from fxray.tracing.leaf import memory_layout

if TYPE_CHECKING:
    from fxray.tracing.leaf import Leaf

__all__ = ["Bind", "Take", "bind_function", "take_function"]

Bind = Callable[..., dict[str, Any]]
"""Takes what a forward takes and returns the arguments by name, as `bind` does."""

Take = Callable[[dict[str, Any]], "tuple[Any, ...] | None"]
"""Takes the arguments by name and returns the inputs of a graph, None where it is for others."""

_EXACT = (str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)


def bind_function(signature: inspect.Signature) -> Bind:
    """Return a function with this signature that returns its arguments by name.

    `inspect.Signature.bind` does the same and cannot be traced.
    """
    namespace: dict[str, Any] = {}
    parameters = []
    for place, parameter in enumerate(signature.parameters.values()):
        plain = parameter.replace(annotation=inspect.Parameter.empty)
        if plain.default is not inspect.Parameter.empty:
            namespace[f"default_{place}"] = plain.default
            plain = plain.replace(default=_Name(f"default_{place}"))
        parameters.append(plain)
    head = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    items = ", ".join(f"{name!r}: {name}" for name in signature.parameters)
    made: Bind = _made(f"def bind{head}:\n    return {{{items}}}\n", "bind", namespace)
    return made


def take_function(call: CallSpec | OpenCall, names: Iterable[str]) -> Take:
    """Return the function that says whether a call is laid out like this, as code.

    Args:
        call: what a graph takes.
        names: of the forward's arguments, in their order.

    Raises:
        NoGraphError: it holds something that only Python can compare.
    """
    writer = _Writer()
    if isinstance(call, OpenCall):
        return writer.open_function(call, [*names])
    leaves = iter(call.leaves)
    for name, layout in call.layout.items():
        writer.value(f"given[{name!r}]", layout, leaves)
    return writer.function()


@attrs.frozen
class _Name:
    """A name of the code, where a value is printed."""

    name: str

    def __repr__(self) -> str:
        return self.name


def _made(source: str, name: str, namespace: dict[str, Any]) -> Any:
    exec(compile(source, f"<fxray {name}>", "exec"), namespace)  # noqa: S102 - as attrs does
    return namespace.pop(name)


def _kind_text(name: str, kind: Any, constant: str) -> str:
    """Return the test for one argument of a kind that a graph without an input was shown."""
    if isinstance(kind, tuple):
        is_tensor = f"isinstance({name}, Tensor) and {name}.dim() == {constant}[0]"
        return f"{is_tensor} and {name}.dtype == {constant}[1]"
    if kind is None or isinstance(kind, bool):
        return f"{name} is {kind}"
    return f"type({name}) is {constant}" if isinstance(kind, type) else f"{name} == {constant}"


class _Writer:
    """Writes the function line by line."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._namespace: dict[str, Any] = {"Tensor": torch.Tensor, "memory_layout": memory_layout}
        self._tensors: list[str] = []
        self._count = itertools.count()

    def function(self) -> Take:
        """Return what was written."""
        self._lines.append(f"return ({''.join(f'{t}, ' for t in self._tensors)})")
        return self._function()

    def _function(self) -> Take:
        body = "\n".join(f"    {line}" for line in self._lines)
        made: Take = _made(f"def take(given):\n{body}\n", "take", self._namespace)
        return made

    def open_function(self, call: OpenCall, names: list[str]) -> Take:
        """Return the function for a graph that was traced without an input."""
        flat = str(pytree.tree_structure(dict.fromkeys(names, 0)))
        for tree, *kinds in {kinds: None for _, kinds in call.shown if kinds[0] == flat}:
            sizes = [s for s, shown in call.shown if shown == (tree, *kinds)]
            required = [names.index(name) for name in call.required]
            tests = [
                _kind_text(f"given[{name!r}]", kind, self._constant(kind))
                for name, kind in zip(names, kinds, strict=True)
            ]
            for name, default in call.defaults.items():
                if not (default is None or isinstance(default, (bool, int, float, str))):
                    msg = f"argument {name!r} is a {type(default).__qualname__}, not compared"
                    raise NoGraphError(msg)
                if not isinstance(kinds[names.index(name)], tuple):
                    tests.append(f"given[{name!r}] == {self._constant(default)}")
            if (tree, *kinds) not in call.free:
                tensors = [n for n, kind in zip(names, kinds, strict=True) if type(kind) is tuple]
                shapes = ", ".join(f"given[{name!r}].shape" for name in tensors)
                known = [tuple(map(tuple, each)) for each in sizes]
                tests.append(f"({shapes},) in {self._constant(known)}")
            taken = ", ".join(f"given[{names[place]!r}]" for place in required)
            self._lines.append(f"if {' and '.join(tests)}:")
            self._lines.append(f"    return ({taken},)")
        self._lines.append("return None")
        return self._function()

    def value(self, text: str, layout: Any, leaves: Iterator[Leaf]) -> None:
        """Write what is required of one value, and of all inside it."""
        name = f"v{next(self._count)}"
        self._lines.append(f"{name} = {text}")
        if isinstance(layout, (dict, list, tuple)):
            self._container(name, layout, leaves)
        elif type(layout) is int:
            self._leaf(name, next(leaves))
        else:
            msg = (
                f"an argument holds a {type(layout).__qualname__}, which no compiler can look into"
            )
            raise NoGraphError(msg)

    def _require(self, condition: str) -> None:
        self._lines.append(f"if not ({condition}):")
        self._lines.append("    return None")

    def _constant(self, value: Any) -> str:
        name = f"c{next(self._count)}"
        self._namespace[name] = value
        return name

    def _container(self, name: str, layout: Any, leaves: Iterator[Leaf]) -> None:
        self._require(f"type({name}) is {self._constant(type(layout))}")
        if isinstance(layout, Mapping):
            keys = [*layout]
            self._require(f"[*{name}.keys()] == {self._constant(keys)}")
            parts = [(f"{name}[{self._constant(key)}]", layout[key]) for key in keys]
        else:
            self._require(f"len({name}) == {len(layout)}")
            parts = [(f"{name}[{place}]", part) for place, part in enumerate(layout)]
        for text, part in parts:
            self.value(text, part, leaves)

    def _leaf(self, name: str, leaf: Leaf) -> None:
        if leaf.spec is not None:
            self._tensor(name, leaf)
        elif leaf.constant is None or isinstance(leaf.constant, bool):
            self._require(f"{name} is {leaf.constant}")
        elif type(leaf.constant) in (int, float):
            kind = type(leaf.constant).__name__
            self._require(f"type({name}) is {kind} and {name} == {self._constant(leaf.constant)}")
        elif isinstance(leaf.constant, _EXACT):
            self._require(f"{name} == {self._constant(leaf.constant)}")
        else:
            what = type(leaf.constant).__qualname__
            msg = f"argument {leaf.path!r} is a {what}, which no compiler can compare"
            raise NoGraphError(msg)

    def _tensor(self, name: str, leaf: Leaf) -> None:
        assert leaf.spec is not None  # noqa: S101 - for the type checker
        self._require(f"isinstance({name}, Tensor) and {name}.dim() == {len(leaf.spec.shape)}")
        for dim, traced in enumerate(leaf.spec.shape):
            if dim in leaf.free:
                continue
            sizes = sorted({traced, *leaf.shown.get(dim, ())})
            equal = [f"{name}.size({dim}) == {size}" for size in sizes]
            if dim in leaf.grown:
                few = [text for text, size in zip(equal, sizes, strict=True) if size < 2]
                equal = [f"{name}.size({dim}) > 1", *few]
            self._require(" or ".join(equal))
        for what in ("dtype", "device", "requires_grad"):
            then = getattr(leaf, what)
            if then is not None:
                self._require(f"{name}.{what} == {self._constant(then)}")
        if leaf.contiguous is not None:
            self._require(f"memory_layout({name}) == {self._constant(leaf.contiguous)}")
        self._tensors.append(name)
