"""The original forward, every call, under a mode that names each op as the graphs do.

For what no graph can hold: loops over data, random numbers of Python's, counters, and
methods other than forward. Nothing is replaced or copied on its way, so that it computes
what the model computes; whoever visits may look at what an op is given and gives.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxray.architecture import TensorSpec
from fxray.torch_private import backward_is_running, current_function_mode
from fxray.tracing.alone import uncompiled
from fxray.tracing.called import (
    CALLS,
    NUMBERS,
    PLAIN,
    Call,
    Given,
    Line,
    call_of,
    call_of_object,
    slots,
    user_place,
)
from fxray.tracing.doors import Layout, layout_of, lookers, looking
from fxray.tracing.names import type_of_module
from fxray.tracing.ops import NodeInfo, module_fields
from fxray.tracing.patches import interposing, short_line
from fxray.tracing.results import fields_of, tensor_items
from fxray.tracing.survey import SURVEYING, Spot, Survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxray.tracing.visitor import Visitor

__all__ = ["Interposer", "Looker", "interposed"]


class Interposer(TorchFunctionMode):
    """One forward of a model as it runs; tells a visitor what each op is given and gives."""

    unrolls = False

    def __init__(self, layout: Layout, survey: Survey, visitor: Visitor, *, mode: str) -> None:
        super().__init__()
        self._layout, self._survey, self._visitor, self._mode = layout, survey, visitor, mode
        self._wants, self._wants_input = visitor.wants, visitor.wants_input
        self._lines: dict[Any, Line] = survey.at_hand.setdefault(mode, {})
        self._ran: dict[Line, int] = {}
        self._calls: dict[str, int] = {}
        self._stack: list[str] = []
        self._call = ""
        # By id, and not weakly: of a tensor that is gone, the next one with its id takes the
        # place. What it is for, the edges of an op never seen before, bears a slip.
        self._makers: dict[int, Any] = {}
        self._paused = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Look at all that is called inside the context."""
        with interposing(self), self._layout.open(), self:
            yield

    def finish(self) -> None:
        """Note that the forward has returned."""

    # ------------------------------------------------------------------ what is called

    @property
    def writing(self) -> bool:
        """Whether what is called now is looked at: not inside an op."""
        return not self._paused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        try:
            call = CALLS[func]
        except KeyError:
            call = call_of(func)
        except TypeError:  # an unhashable callable
            call = None
        if call is None:
            return func(*args, **(kwargs or {}))
        return self._run(call, func, args, kwargs or {}, args)

    def _run(self, call: Call, func: Any, args: Any, kwargs: Any, given: Any) -> Any:
        """Run one function; `given` are its arguments as they are counted for edges."""
        self._meet_all(args, kwargs)
        line = self._line(call)
        number = self._ran.get(line, 0)
        path = self._known(line, number)
        if path in self._wants_input:
            _look(self._visitor.before, path, given, kwargs)
        self._paused += 1
        try:
            out = func(*args, **kwargs)
        finally:
            self._paused -= 1
        kind = type(out)
        if kind in NUMBERS:
            return out
        items = None if kind is torch.Tensor else tuple(tensor_items(out))
        if items == ():
            return out
        self._ran[line] = number + 1
        if path is None:
            path = self._saw(call, line, number, (given, kwargs), out)
        self._made(path, out, items)
        if path in self._wants:
            _look(self._visitor.after, path, out)
        return out

    def _line(self, call: Call) -> Line:
        code, place = user_place()
        key = self._call, call.op, id(code), place
        line = self._lines.get(key)
        return line if line is not None else self._new_line(key, call, code)

    def _new_line(self, key: Any, call: Call, code: Any) -> Line:
        with SURVEYING:
            spot = Spot(self._call, call.op, short_line())
            shared = self._lines.get(spot)
            if shared is None:
                # Several instructions of one line count together.
                paths = self._survey.paths(self._mode, spot)
                shared = self._lines[spot] = Line(spot, paths, [])
            shared.code.append(code)
            self._lines[key] = shared
            return shared

    def pause(self) -> None:
        """Look at nothing until `go_on`."""
        self._paused += 1

    def go_on(self) -> None:
        """Look on, as before `pause`."""
        self._paused -= 1

    def _made(self, path: Any, out: Any, items: Any) -> None:
        if items is None:
            self._makers[id(out)] = path
        else:
            for _, tensor in items:
                self._makers[id(tensor)] = path

    def call_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function of the user's that is to be one op (`torch.fx.wrap`)."""
        call = CALLS.get(func) or call_of(func)
        return func(*args, **kwargs) if call is None else self._run(call, func, args, kwargs, args)

    def call_object(
        self, target: Any, name: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run an autograd.Function or a scripted function as one op."""
        return self._run(call_of_object(target, name), run, args, kwargs, (None, *args))

    # ------------------------------------------------------------------ modules

    def knows(self, module: nn.Module) -> bool:
        """Return whether calls of `module` are to come here now."""
        return not self._paused and module in self._layout.paths and not backward_is_running()

    def call_module(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Run a module: a leaf as one op, another by looking into it."""
        path = self._layout.paths[module]
        count = self._calls.get(path, 0)
        self._calls[path] = count + 1
        call = f"{path}@{count}" if count else path
        if path and (module in self._layout.leaves or self._survey.is_leaf_call(call)):
            return self._call_leaf(module, call, original, args, kwargs)
        if not call:
            out = original(module, *args, **kwargs)
        else:
            around = self._call
            self._stack.append(call)
            self._call = call
            try:
                out = original(module, *args, **kwargs)
            finally:
                self._stack.pop()
                self._call = around
        if call not in self._survey.returns:
            self._returned(call, out)
        return out

    def _call_leaf(
        self, module: nn.Module, call: str, original: Any, args: Any, kwargs: Any
    ) -> Any:
        self._meet_all(args, kwargs)
        if call in self._wants_input:
            _look(self._visitor.before, call, args, kwargs)
        # What runs inside is spared the way through the mode, unless the user's stands on ours.
        ours = current_function_mode() is self
        if ours:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._paused += 1
        try:
            out = original(module, *args, **kwargs)
        finally:
            self._paused -= 1
            if ours:
                self.__enter__()  # type: ignore[no-untyped-call]
        items = None if isinstance(out, torch.Tensor) else tuple(tensor_items(out))
        if items == ():
            return out
        path: Any = call
        if self._new(call):
            path = self._saw_leaf(module, call, (args, kwargs), out)
        self._made(path, out, items)
        if call in self._wants:
            _look(self._visitor.after, call, out)
        return out

    # ------------------------------------------------------------------ inputs and parameters

    def take_inputs(self, args: Any, kwargs: Any) -> None:
        """Note the tensors that the forward is given."""
        for name, tensor in self._layout.inputs(args, kwargs):
            self._hold("input", name, tensor)

    def _meet_all(self, args: Any, kwargs: Any) -> None:
        """Note the bare parameters among arguments where they are first used."""
        for value in args:
            kind = type(value)
            if kind is not torch.Tensor and kind not in PLAIN:
                self._meet(kind, value)
        for value in kwargs.values():
            kind = type(value)
            if kind is not torch.Tensor and kind not in PLAIN:
                self._meet(kind, value)

    def _meet(self, kind: type, value: Any) -> None:
        if kind is tuple or kind is list:
            self._meet_all(value, {})
        elif kind is nn.Parameter or (
            issubclass(kind, torch.Tensor) and isinstance(value, nn.Parameter)
        ):
            name = None if id(value) in self._makers else self._layout.parameter(value)
            if name is not None:
                self._hold("parameter", name, value)

    def _hold(self, role: Any, name: str, tensor: torch.Tensor) -> None:
        path: Any = self._layout.held.get((self._mode, role, name))
        if path is None:
            path = self._saw_held(role, name, tensor)
        self._makers[id(tensor)] = path
        if path in self._wants:
            _look(self._visitor.after, path, tensor)

    # ------------------------------------------------------------------ what is new

    def _known(self, line: Line, number: int) -> Any:
        return line.paths[number] if number < len(line.paths) else None

    def _new(self, call: str) -> bool:
        return (self._mode, "module", call) not in self._layout.held

    def _saw(self, call: Call, line: Line, number: int, given: Given, out: Any) -> Any:
        with SURVEYING:
            if number < len(line.paths) and line.paths[number] is not None:
                return line.paths[number]  # another thread was first
            info = self._describe(call, line.spot, given, out)
            path = self._survey.name(self._mode, info, number)
            self._survey.add(path, info, self._mode, number=number)
            self._survey.join(path, self._given(given))
            return path

    def _saw_leaf(self, module: nn.Module, call: str, given: Given, out: Any) -> Any:
        info = self._describe_leaf(module, call, given, out)
        with SURVEYING:
            self._survey.add(call, info, self._mode)
            self._survey.join(call, self._given(given))
            if call not in self._survey.returns:
                self._survey.note_returned(call, (call,))
            self._layout.held[self._mode, "module", call] = call
        return call

    def _saw_held(self, role: Any, name: str, tensor: torch.Tensor) -> Any:
        info = self._describe_held(role, name, tensor)
        with SURVEYING:
            path = self._survey.hold(info)
            self._survey.add(path, info, self._mode)
            self._layout.held[self._mode, role, name] = path
        return path

    def _returned(self, call: str, out: Any) -> None:
        with SURVEYING:
            self._survey.note_returned(call, filter(None, self._makers_in(out)))

    def _makers_in(self, out: Any) -> list[Any]:
        found = (self._makers.get(id(t)) for _, t in tensor_items(fields_of(out)))
        return [maker for maker in found if maker is not None]

    def _given(self, given: Given) -> tuple[tuple[Any, str], ...]:
        found = ((self._makers.get(id(t)), slot) for slot, t in slots(*given))
        return tuple((maker, slot) for maker, slot in found if maker)

    def _describe(self, call: Call, spot: Spot, given: Given, out: Any) -> NodeInfo:
        items = tuple(tensor_items(out))
        return NodeInfo(
            "method" if call.method else "function",
            spot.call,
            spot.name,
            call.type,
            call.target,
            scope=tuple(self._stack),
            inputs=self._input_specs(given),
            outputs=self._specs(tensor for _, tensor in items),
            items=tuple(item for item, _ in items),
            where=spot.where,
        )

    def _describe_leaf(self, module: nn.Module, call: str, given: Given, out: Any) -> NodeInfo:
        items = tuple(tensor_items(out))
        self._paused += 1
        try:
            fields = module_fields(module)
        finally:
            self._paused -= 1
        return NodeInfo(
            "module",
            call,
            "",
            type_of_module(module),
            scope=tuple(self._stack),
            module=self._layout.paths[module],
            inputs=self._input_specs(given),
            outputs=self._specs(tensor for _, tensor in items),
            items=tuple(item for item, _ in items),
            where=short_line(),
            **fields,
        )

    def _describe_held(self, role: Any, name: str, tensor: torch.Tensor) -> NodeInfo:
        (spec,) = self._specs((tensor,))
        scope: tuple[str, ...] = ()
        own: dict[str, TensorSpec] = {}
        if role == "parameter":
            scope, own = tuple(self._stack), {name.rpartition(".")[2]: spec}
        return NodeInfo(role, name, "", role, role, scope, outputs=(spec,), parameters=own)

    def _input_specs(self, given: Given) -> tuple[TensorSpec, ...]:
        found = {id(t): t for _, t in slots(*given) if self._makers.get(id(t))}
        return self._specs(found.values())

    def _specs(self, tensors: Any) -> tuple[TensorSpec, ...]:
        self._paused += 1
        try:
            return tuple(map(TensorSpec.of, tensors))
        finally:
            self._paused -= 1


def _look(look: Callable[..., Any], *what: Any, **words: Any) -> Any:
    """Let a visitor look; what it computes with torch is no op of any forward."""
    forwards = [looker.forward for looker in lookers() if isinstance(looker, Looker)]
    for forward in forwards:
        if forward is not None:
            forward.pause()
    try:
        return look(*what, **words)
    finally:
        for forward in forwards:
            if forward is not None:
                forward.go_on()


class Looker:
    """Waits for the model to be called; looks into each outermost forward.

    Attributes:
        forward: the one that runs now, which is asked about every module meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        visitor: Visitor,
        interposer: Callable[[Any], Interposer],
    ) -> None:
        self._model, self._visitor, self._interposer = model, visitor, interposer
        self.forward: Interposer | None = None
        self._asleep = False

    def knows(self, module: nn.Module) -> bool:
        """Return whether calls of `module` are to come here now."""
        return module is self._model and not self._asleep and not backward_is_running()

    def call_module(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Run the model."""
        if not _look(self._visitor.begin, training=module.training):
            self._asleep = True
            try:
                return original(module, *args, **kwargs)
            finally:
                self._asleep = False
        try:
            self.forward = forward = self._interposer(module.training)
            with forward.at_work():
                forward.take_inputs(args, kwargs)
                out = forward.call_module(module, original, args, kwargs)
            forward.finish()
            return out
        finally:
            self.forward = None
            _look(self._visitor.finish)


@contextlib.contextmanager
def interposed(model: nn.Module, survey: Survey, visitor: Visitor) -> Iterator[None]:
    """Show `visitor` every forward that `model` runs on this thread inside the context.

    A call of the model is one forward; what it calls of itself inside belongs to it.
    """

    def interposer(training: bool) -> Interposer:
        mode = "train" if training else "eval"
        return Interposer(layout_of(model, survey), survey, visitor, mode=mode)

    with uncompiled(), looking(Looker(model, visitor, interposer), model):
        yield
