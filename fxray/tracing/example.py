"""The example input of a trace, to be had again at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.errors import TraceError, nearest
from fxray.tracing.batch import batch_size, resize
from fxray.tracing.call import CallSpec, Passed, bind, passed_as

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

__all__ = ["Example", "Size", "SizesArgument", "with_free"]

SizesArgument = Mapping[str, "Sequence[int] | int"]
"""By argument, the dims whose size is to be shown free: `{"input_ids": (0, 1)}`."""


_OPTIONS = ("frontend", "sizes", "examples", "gradients", "strict", "defaults")


@attrs.frozen
class Size:
    """One size of the input that may vary from call to call.

    Attributes:
        what: how to say it: `"batch size"`, `"size 12 (input_ids dim 1)"`.
        given: what it is in the example.
        dims: (tensor, dim) of every place it stands in.
    """

    what: str
    given: int
    dims: tuple[tuple[int, int], ...]

    @property
    def base(self) -> int:
        """The size to look at: one row is special to many models (BatchNorm refuses it)."""
        return max(self.given, 2)


@attrs.frozen(eq=False)
class Example:
    """The example input.

    Attributes:
        passed: how the user passed it.
        arguments: by name, defaults filled in.
        call: how they are laid out.
        tensors: those among them, in the order the graph takes them.
        sizes: those to be shown free: the batch, unless told otherwise.
        written: the parameters that the forward itself was seen to write.
    """

    passed: Passed
    arguments: Mapping[str, Any]
    call: CallSpec
    tensors: tuple[torch.Tensor, ...]
    sizes: tuple[Size, ...] = ()
    written: list[torch.Tensor] = attrs.field(factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        sizes: SizesArgument | None = None,
    ) -> Example:
        """Return the example that `args` and `kwargs` are for `model`.

        Raises:
            TraceError: they do not fit its forward, or `sizes` does not fit them.
        """
        signature = inspect.signature(model.forward)
        try:
            arguments = bind(signature, args, kwargs)
        except TypeError as error:
            msg = f"the input does not fit {type(model).__name__}.forward{signature}: {error}"
            ours = [name for name in _OPTIONS if name in kwargs]
            if ours:
                msg += f"; {ours[0]}= is an option of fxray.Xray(model, args=(…,), {ours[0]}=…)"
            raise TraceError(msg) from error
        call = CallSpec.of(arguments)
        tensors = tuple(call.flatten(arguments))
        passed = passed_as(signature, args, kwargs)
        return cls(passed, arguments, call, tensors, _sizes_of(call, tensors, sizes or {}))

    def without(self, sizes: Iterable[Size]) -> Example:
        """Return the example with these sizes as they are."""
        left = tuple(size for size in self.sizes if size not in set(sizes))
        return attrs.evolve(self, sizes=left)

    @property
    def base(self) -> dict[Size, int]:
        """The sizes to look at first."""
        return {size: size.base for size in self.sizes}

    def sized(
        self, sizes: Mapping[Size, int]
    ) -> tuple[list[torch.Tensor], tuple[Any, ...], dict[str, Any]]:
        """Return fresh copies of the tensors, at these sizes, and the call that passes them."""
        wanted: dict[int, dict[int, int]] = {}
        for size, n in sizes.items():
            for index, dim in size.dims:
                wanted.setdefault(index, {})[dim] = n
        tensors = []
        for index, tensor in enumerate(self.tensors):
            copy = _copied(tensor)
            for dim, n in wanted.get(index, {}).items():
                if n != tensor.shape[dim]:
                    copy = resize(copy, dim, n)
            tensors.append(copy.requires_grad_(tensor.requires_grad))
        arguments = self.call.fill(tensors)
        return tensors, *self.passed.call(arguments)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    # clone() keeps strides (channels_last and the like), which a forward may look at.
    return tensor.detach().clone()


def _sizes_of(
    call: CallSpec, tensors: Sequence[torch.Tensor], asked: SizesArgument
) -> tuple[Size, ...]:
    """Return the sizes to be shown free: those asked for, and the batch of the rest."""
    paths = [leaf.path for leaf in call.tensor_leaves]
    if not hasattr(asked, "items"):
        msg = f"sizes names dims by argument, {{{paths[0]!r}: (0, 1)}}; {asked!r} names none"
        raise TraceError(msg)
    named: dict[int, tuple[int, ...]] = {}
    for name, dims in asked.items():
        indices = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
        if not indices:
            near = nearest(name, paths) or paths
            msg = f"sizes names {name!r}, which is no tensor of the input; {', '.join(near)}"
            raise TraceError(msg)
        for index in indices:
            given = (dims,) if isinstance(dims, int) else tuple(dims)
            named[index] = tuple(_dim(name, dim, tensors[index]) for dim in given)
    found = []
    batch = batch_size(tensors)
    rows = [
        (index, 0)
        for index, tensor in enumerate(tensors)
        if tensor.dim() and tensor.shape[0] == batch and 0 in named.get(index, (0,))
    ]
    if rows and batch is not None:
        found.append(Size("batch size", batch, tuple(rows)))
    by_size: dict[int, list[tuple[int, int]]] = {}
    for index, dims in named.items():
        for dim in dims:
            if (index, dim) not in rows:
                by_size.setdefault(tensors[index].shape[dim], []).append((index, dim))
    for n, places in by_size.items():
        where = ", ".join(f"{paths[index]} dim {dim}" for index, dim in places)
        found.append(Size(f"size {n} ({where})", n, tuple(places)))
    return tuple(found)


def _dim(name: str, dim: int, tensor: torch.Tensor) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        msg = f"sizes names dim {dim} of {name!r}, which has {tensor.dim()} dims"
        raise TraceError(msg)
    return dim % tensor.dim()


def with_free(call: CallSpec, sizes: Iterable[Size]) -> CallSpec:
    """Return the layout with these sizes free."""
    places = {place for size in sizes for place in size.dims}
    leaves, index = [], 0
    for leaf in call.leaves:
        free = set(leaf.free)
        if leaf.spec is not None:
            free |= {dim for i, dim in places if i == index}
            index += 1
        leaves.append(attrs.evolve(leaf, free=frozenset(free)))
    return attrs.evolve(call, leaves=tuple(leaves))
