"""The example input of a trace, to be had again at any batch size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.errors import TraceError
from fxray.tracing.batch import batch_size, resize
from fxray.tracing.call import CallSpec, bind, call_with

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from fxray.tracing.execution import WrittenGraph

__all__ = ["Example", "with_exact", "with_free_batch"]


@attrs.frozen(eq=False)
class Example:
    """The example input.

    Attributes:
        signature: of the model's forward.
        arguments: by name, defaults filled in.
        call: how they are laid out.
        tensors: those among them, in the order the graph takes them.
        batch: the size that dim 0 of the tensors shares, None if they share none.
        written: the parameters that the forward itself was seen to write.
    """

    signature: inspect.Signature
    arguments: Mapping[str, Any]
    call: CallSpec
    tensors: tuple[torch.Tensor, ...]
    batch: int | None
    written: list[torch.Tensor] = attrs.field(factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        free_batch: bool = True,
    ) -> Example:
        """Return the example that `args` and `kwargs` are for `model`.

        Raises:
            TraceError: they do not fit its forward.
        """
        signature = inspect.signature(model.forward)
        try:
            arguments = bind(signature, args, kwargs)
        except TypeError as error:
            msg = f"the input does not fit {type(model).__name__}.forward{signature}: {error}"
            raise TraceError(msg) from error
        call = CallSpec.of(arguments)
        tensors = tuple(call.flatten(arguments))
        batch = batch_size(tensors) if free_batch else None
        return cls(signature, arguments, call, tensors, batch)

    def sized(self, size: int | None) -> tuple[list[torch.Tensor], tuple[Any, ...], dict[str, Any]]:
        """Return fresh copies of the tensors, at batch `size`, and the call that passes them."""
        tensors = []
        for tensor in self.tensors:
            same = size is None or not tensor.dim() or size == self.batch
            copy = tensor.detach().clone() if same else resize(tensor, int(size or 0))
            tensors.append(copy.requires_grad_(tensor.requires_grad))
        arguments = self.call.fill(tensors)
        return tensors, *call_with(self.signature, arguments)

    @property
    def base(self) -> int | None:
        """The batch size to look at: one row is special to many models (BatchNorm refuses it)."""
        return None if self.batch is None else max(self.batch, 2)


def with_free_batch(call: CallSpec, batch: int | None) -> CallSpec:
    """Return the layout with dim 0 free wherever it is the batch."""
    leaves = [
        attrs.evolve(leaf, free=frozenset([0]))
        if leaf.spec is not None and leaf.spec.shape and leaf.spec.shape[0] == batch
        else leaf
        for leaf in call.leaves
    ]
    return attrs.evolve(call, leaves=tuple(leaves))


def with_exact(
    call: CallSpec, tensors: Sequence[torch.Tensor], written: Mapping[str, WrittenGraph]
) -> CallSpec:
    """Return the layout that requires the traced dtype or device, if a forward looked at one."""
    reads = frozenset().union(*(w.reads for w in written.values()))
    given = iter(tensors)
    leaves = []
    for leaf in call.leaves:
        if leaf.spec is not None:
            tensor = next(given)
            leaf = attrs.evolve(  # noqa: PLW2901
                leaf,
                dtype=tensor.dtype if "dtype" in reads else None,
                device=tensor.device if "device" in reads else None,
            )
        leaves.append(leaf)
    return attrs.evolve(call, leaves=tuple(leaves))
