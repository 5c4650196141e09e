"""A forward run once, without side effects, to learn its ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxray.tracing.called import CALLS, Call, Given, Line, call_of
from fxray.tracing.doors import Layout, layout_of, looking
from fxray.tracing.interposer import Interposer, Looker
from fxray.tracing.survey import SURVEYING, Seen, Survey
from fxray.tracing.torch_calls import READS, writes_in_place

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fxray.tracing.ops import NodeInfo

__all__ = ["survey_call"]


class _Learner(Interposer):
    """A forward run to learn its ops, which are named when it has ended."""

    def __init__(
        self,
        layout: Layout,
        survey: Survey,
        *,
        mode: str,
        protect: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__(layout, survey, _NOBODY, mode=mode)
        self._protect = protect
        self._seen: list[Seen] = []
        self._results: dict[str, list[Seen]] = {}

    def finish(self) -> None:
        """Name what was seen."""
        for maker in self._results.get("", ()):
            maker.uses += 1
        with SURVEYING:
            self._survey.take(self._mode, self._seen, self._results)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._paused:
            name = getattr(func, "__name__", "")
            if name not in READS:
                if name == "__setitem__" or (CALLS[func] if func in CALLS else call_of(func)):
                    self._meet_all(args, kwargs or {})
                self._use((args, kwargs or {}))
            writes = name == "__set__" or writes_in_place(name)
            if self._protect is not None and writes and isinstance(args[0], torch.Tensor):
                self.pause()
                self._protect(args[0])
                self.go_on()
        return super().__torch_function__(func, types, args, kwargs)

    def _use(self, given: Given) -> None:
        for maker, _ in self._given(given):
            maker.uses += 1

    def _add(self, info: NodeInfo, *, number: int = 0, given: Any = (), pure: bool = False) -> Seen:
        seen = Seen(info, number, given, pure=pure)
        self._seen.append(seen)
        return seen

    def _known(self, line: Line, number: int) -> Any:  # noqa: ARG002 - all is new
        return None

    def _new(self, call: str) -> bool:  # noqa: ARG002 - all is new
        return True

    def _saw(self, call: Call, line: Line, number: int, given: Given, out: Any) -> Any:
        info = self._describe(call, line.spot, given, out)
        return self._add(info, number=number, given=self._given(given), pure=call.pure)

    def _saw_leaf(self, module: nn.Module, call: str, given: Given, out: Any) -> Any:
        self._use(given)
        info = self._describe_leaf(module, call, given, out)
        seen = self._add(info, given=self._given(given))
        self._results[call] = [seen]
        return seen

    def _hold(self, role: Any, name: str, tensor: torch.Tensor) -> None:
        info = self._describe_held(role, name, tensor)
        self._makers[id(tensor)] = self._add(info, pure=role == "parameter")

    def _returned(self, call: str, out: Any) -> None:
        self._results[call] = self._makers_in(out)


class _Nobody:
    """Looks at nothing."""

    wants: frozenset[str] = frozenset()
    wants_input: frozenset[str] = frozenset()

    def begin(self, *, training: bool) -> bool:  # noqa: ARG002
        return True

    def before(self, path: str, args: Any, kwargs: Any) -> None:
        """Look at nothing."""

    def after(self, path: str, out: Any) -> None:
        """Look at nothing."""

    def finish(self) -> None:
        """Note nothing."""


_NOBODY = _Nobody()


def survey_call(
    model: nn.Module,
    survey: Survey,
    call: Callable[[], Any],
    *,
    training: bool,
    protect: Callable[[torch.Tensor], None] | None = None,
) -> Any:
    """Run `call`, which calls `model`, and let `survey` learn every op of it.

    Args:
        model: the model.
        survey: learns the ops.
        call: runs the model; returns whatever.
        training: the mode the ops are of.
        protect: is given every tensor that the forward is about to write in place.

    Returns:
        What `call` returned.
    """
    mode = "train" if training else "eval"

    def interposer(_: bool) -> Interposer:
        return _Learner(layout_of(model, survey), survey, mode=mode, protect=protect)

    with looking(Looker(model, _NOBODY, interposer), model):
        return call()
