"""Everything of Python's state that a graph was traced under, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.tracing.attributes import Read
from fxray.tracing.torch_calls import is_leaf

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fxray.tracing.attributes import Reads

__all__ = ["HOOKS", "Change", "Part", "State"]

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
"""What nn.Module calls its hooks, and what people call one of them."""

_WITH_DTYPE = frozenset(["dtype", "itemsize", "nbytes"])
_WITH_GRAD = frozenset(["requires_grad", "is_leaf", "grad_fn", "grad"])


@attrs.frozen
class Change:
    """Something of the Python state that is not as it was.

    Attributes:
        sentence: what, in words, without a capital or a full stop.
        root: whether it was done to the model itself, where no trace can follow it.
    """

    sentence: str
    root: bool = False

    def __str__(self) -> str:
        return self.sentence


@attrs.frozen
class Part:
    """How one module that was traced through was built; for a container, what it held.

    Attributes:
        path: of the module, the root as `""`.
        cls: the qualified name of its class.
        children: (name, qualified class) of the modules it holds.
        called: whether its forward ran, so that the fields below matter.
        forward: whether `forward` was set on the instance.
        hooks: number of hooks by registry, of those that had any.
    """

    path: str
    cls: str
    children: tuple[tuple[str, str], ...]
    called: bool = False
    forward: bool = False
    hooks: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, path: str, module: nn.Module, *, called: bool) -> Part:
        """Return how `module` is built now."""
        if isinstance(module, torch.jit.ScriptModule):
            return cls(path, _class_name(module), ())
        fields = vars(module)
        children = tuple((n, _class_name(m)) for n, m in fields["_modules"].items())
        if not called:
            return cls(path, _class_name(module), children)
        hooks = tuple((name, len(fields[name])) for name in HOOKS if fields.get(name))
        own = "forward" in fields
        return cls(path, _class_name(module), children, called=True, forward=own, hooks=hooks)


@attrs.frozen
class State:
    """Everything of Python's state that a graph was traced under, as plain data.

    Attributes:
        reads: the attributes that the forward read.
        parts: the modules that are no leaves, outermost first.
        ties: groups of paths that name one tensor, where the graph reads it by one of them.
        grad: whether autograd was on, None where the forward never asked.
        inference: whether inference mode was, None where it never asked.
        autocast: the dtype autocast casts to by device type, None where it never asked.
        dtypes: (path, dtype) of parameters and buffers, None where it looked at no dtype.
        devices: (path, device) of them, None where it looked at no device.
        frozen: (path, requires_grad) of the parameters, None where it never looked.
        compiler: whether it asked if a compiler traces it: then it may run otherwise under one.
    """

    reads: tuple[Read, ...] = ()
    parts: tuple[Part, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    grad: bool | None = None
    inference: bool | None = None
    autocast: tuple[tuple[str, torch.dtype | None], ...] | None = None
    dtypes: tuple[tuple[str, Any], ...] | None = None
    devices: tuple[tuple[str, Any], ...] | None = None
    frozen: tuple[tuple[str, Any], ...] | None = None
    compiler: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        reads: Reads,
        *,
        inlined: Iterable[str] = (),
        properties: Iterable[str] = (),
        tensors: Iterable[str] | None = None,
    ) -> State:
        """Return what a trace depended on; to be asked once the model is put back as it was.

        Args:
            model: the model that was traced.
            reads: what `noted_reads` gave.
            inlined: paths of the modules whose forward was traced through.
            properties: the tensor properties that the forward read (`"dtype"`, …).
            tensors: paths of the parameters and buffers that the graph reads itself, None
                for every one.
        """
        looked = frozenset(properties)
        called = {"", *inlined}
        by_grad = bool(looked & _WITH_GRAD)
        by_dtype = bool(looked & _WITH_DTYPE)
        return cls(
            reads.all(),
            tuple(Part.of(path, m, called=path in called) for path, m in _parts(model)),
            _ties(model, tensors),
            reads.grad if by_grad or "grad" in reads.asked else None,
            reads.inference if "inference" in reads.asked else None,
            reads.autocast if by_dtype or "autocast" in reads.asked else None,
            _each(model, "dtype") if by_dtype else None,
            _each(model, "device") if looked & {"device", "is_cuda", "is_meta"} else None,
            _each(model, "requires_grad") if by_grad else None,
            "compiler" in reads.asked,
        )


def _class_name(module: object) -> str:
    return "None" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"


def _parts(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[Any]:
    """Yield (path, module) of all that are traced through; what a leaf holds is its own."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, child in vars(module)["_modules"].items():
        if child is not None and not is_leaf(child):
            yield from _parts(child, f"{path}.{name}" if path else name, seen)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _ties(model: nn.Module, read: Iterable[str] | None) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for path, tensor in _tensors_of(model):
        groups.setdefault(id(tensor), []).append(path)
    wanted = None if read is None else set(read)
    return tuple(
        tuple(paths)
        for paths in groups.values()
        if len(paths) > 1 and (wanted is None or not wanted.isdisjoint(paths))
    )


def _each(model: nn.Module, what: str) -> tuple[tuple[str, Any], ...]:
    tensors = _tensors_of(model) if what != "requires_grad" else model.named_parameters()
    return tuple((path, getattr(tensor, what)) for path, tensor in tensors)
