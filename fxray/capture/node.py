"""The capture node: a call in the graph that hands a tensor to whoever records."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping, Sequence

__all__ = ["Receiver", "capture", "connect", "disconnect", "new_handle", "receiver_of"]


class Receiver(Protocol):
    """Who takes what the capture nodes of one module hand over."""

    def begin(self, *, training: bool) -> bool:
        """Count a forward that begins; return whether anything is due in it."""
        ...

    def begin_again(self) -> None:
        """Forget what the forward begun last has handed over: it ended half-way, begins anew."""
        ...

    def receive(self, path: str, kinds: tuple[str, ...], value: Any) -> None:
        """Take what the op at `path` was given or gave."""
        ...

    def group(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose forwards are one step; one that is open already goes on."""
        ...

    def finish(self) -> None:
        """Note that the forward begun last has returned, or was ended by an exception."""
        ...

    # What compiled code calls, from the ops in its graph.

    def due_next(self, *, training: bool) -> str:
        """Return the name of the set of captures due in the next forward, `""` for none."""
        ...

    def captures_due(self, name: str) -> frozenset[tuple[str, str]]:
        """Return path and kind of the captures in the set of that name."""
        ...

    def begin_numbered(self, *, training: bool, weights: bool, due: str) -> int:
        """Count a forward that begins and captures the set `due`; return its number."""
        ...

    def take(  # noqa: PLR0913 - what a record is
        self,
        number: int,
        path: str,
        kind: str,
        *,
        item: str,
        fields: Mapping[str, torch.Tensor],
        size: tuple[int, ...],
    ) -> None:
        """Take what was selected of a tensor in the forward of that number."""
        ...

    def take_whole(
        self, number: int, path: str, kind: str, *, item: str, tensor: torch.Tensor
    ) -> None:
        """Take a tensor of which nothing was selected yet."""
        ...

    def await_gradients(self, number: int, awaited: Sequence[tuple[str, str]]) -> None:
        """Note (path, item) of gradients that may come for the forward of that number."""
        ...

    def transformed(self) -> None:
        """Note that forwards inside a torch.func transform are compiled, and not captured."""
        ...

    def returned(self, number: int) -> None:
        """Note that the forward of that number has handed over all but its gradients."""
        ...


_HANDLES = itertools.count()
# Weak: a graph holds an int, never a recorder, so that nothing recorded keeps a model
# alive, and a copy of a module (an EMA twin, an unpickled one) is inert by itself.
_RECEIVERS: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()


def new_handle() -> int:
    """Return a handle that no other module of this process has."""
    return next(_HANDLES)


def connect(handle: int, receiver: Receiver) -> None:
    """Let `receiver` take what the capture nodes with this handle hand over."""
    _RECEIVERS[handle] = receiver


def disconnect(handle: int) -> None:
    """Let the capture nodes with this handle rest."""
    _RECEIVERS.pop(handle, None)


def receiver_of(handle: int) -> Receiver | None:
    """Return who takes what this handle's nodes hand over, if anyone does."""
    return _RECEIVERS.get(handle)


@fx.wrap  # a symbolic trace over a rewritten module keeps it as one node
def capture(value: Any, handle: int, path: str, kinds: tuple[str, ...]) -> None:
    """Hand `value` to the receiver of `handle`; stands in the graph after an op.

    Args:
        value: what the op gave (for `"output"` and `"grad"`) or its arguments (for
            `"input"`), tensors or nests of them.
        handle: says who records, if anyone.
        path: the op's path.
        kinds: what is captured there.
    """
    receiver = _RECEIVERS.get(handle)
    if receiver is not None:
        receiver.receive(path, kinds, value)


# Nobody uses its result, and dead-code elimination must not take it.
torch.fx.node.has_side_effect(capture)
