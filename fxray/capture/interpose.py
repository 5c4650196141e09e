"""From forwards that run as they are to whoever records.

A module without a graph hands over what the interposer sees. So do the model's methods
other than forward: what `net.generate(…)` runs of the model is captured call by call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from torch import nn

from fxray.capture.node import receiver_of
from fxray.draft import Capture
from fxray.tracing.interposer import interposed

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxray.capture.node import Receiver
    from fxray.tracing.survey import Survey

__all__ = ["Net", "method_of", "run_interposed"]


class Net(Protocol):
    """What is asked of a rewritten module."""

    @property
    def handle(self) -> int:
        """What a recorder is found with."""
        ...

    @property
    def original(self) -> nn.Module:
        """The model."""
        ...

    @property
    def survey(self) -> Survey:
        """Every op seen so far."""
        ...

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What is captured now; the same tuple as long as it is the same."""
        ...


@attrs.frozen(eq=False)
class _Kinds:
    """What is captured where: the kinds of a module's captures by path of the op."""

    captures: tuple[Capture, ...]
    after: Mapping[str, tuple[str, ...]]
    before: frozenset[str]

    @classmethod
    def of(cls, net: Net) -> _Kinds:
        """Return those of `net` as its draft stands now."""
        captures, at_hand = net.captures, net.survey.at_hand
        found: _Kinds | None = at_hand.get("kinds")
        if found is None or found.captures is not captures:
            after: dict[str, tuple[str, ...]] = {}
            for chosen in captures:
                if chosen.kind in ("output", "grad"):
                    after[chosen.op] = (*after.get(chosen.op, ()), chosen.kind)
            before = frozenset(chosen.op for chosen in captures if chosen.kind == "input")
            found = at_hand["kinds"] = cls(captures, after, before)
        return found


class _Captures:
    """The visitor that hands what is captured to the receiver of a module."""

    def __init__(self, net: Net, receiver: Receiver, *, begun: bool) -> None:
        self._net, self._receiver, self._begun = net, receiver, begun
        self._kinds = _Kinds.of(net)

    @property
    def wants(self) -> Mapping[str, tuple[str, ...]]:
        """Paths of the ops whose output or gradient is captured."""
        return self._kinds.after

    @property
    def wants_input(self) -> frozenset[str]:
        """Paths of the ops whose input is captured."""
        return self._kinds.before

    def begin(self, *, training: bool) -> bool:
        """Count a forward that begins; return whether anything is due in it."""
        if self._begun:
            self._receiver.begin_again()
            return True
        self._kinds = _Kinds.of(self._net)
        return self._receiver.begin(training=training)

    def before(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hand over what an op is given."""
        given = {str(place): arg for place, arg in enumerate(args)} | dict(kwargs)
        self._receiver.receive(path, ("input",), given)

    def after(self, path: str, out: Any) -> None:
        """Hand over what an op gave."""
        self._receiver.receive(path, self._kinds.after[path], out)

    def finish(self) -> None:
        """Note that the forward has ended, unless whoever began it does."""
        if not self._begun:
            self._receiver.finish()


def run_interposed(net: Net, call: Callable[[], Any], *, begun: bool | None = None) -> Any:
    """Run `call`, which calls the original of `net` once, and capture what `net` captures.

    Args:
        net: the rewritten module.
        call: runs its original.
        begun: what the receiver answered, if this forward was begun before (a graph ran
            half-way); then whoever began it also finishes it.
    """
    receiver = receiver_of(net.handle)
    if receiver is None or begun is False:
        return call()
    visitor = _Captures(net, receiver, begun=bool(begun))
    with interposed(net.original, net.survey, visitor):
        return call()


def method_of(net: Net, name: str, value: Any) -> Any:
    """Return an attribute of the original as `net` shows it.

    A method of the model's own (`generate`) comes as one that captures, while someone
    records, every forward it runs: together one step, each of them a call of it.

    Args:
        net: the rewritten module.
        name: of the attribute.
        value: what the original has under that name.
    """
    own = isinstance(value, types.MethodType) and value.__self__ is net.original
    if not own or hasattr(nn.Module, name):
        return value

    @functools.wraps(value.__func__)
    def method(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        receiver = receiver_of(net.handle)
        if receiver is None:
            return value.__func__(model, *args, **kwargs)
        visitor = _Captures(net, receiver, begun=False)
        with receiver.group(), interposed(model, net.survey, visitor):
            return value.__func__(model, *args, **kwargs)

    # Bound to the original: who pickles it or asks whose it is finds the model's own.
    return types.MethodType(method, net.original)
