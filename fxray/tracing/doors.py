"""What stands before each module of a model while its forward is looked into.

`nn.Module.__call__` stays as it is: to set a name of a class takes Python the longer the
more sub-classes it has, 0.05 ms with torch alone and 0.7 ms with many models of
transformers, for every forward; and every other model of the process would pay at each
call. What `Module.compile` sets on one module, torch asks for at every call of that module
alone; it is set for the length of a forward, and nothing copies or pickles it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fxray.torch_private import COMPILED_CALL
from fxray.tracing.results import tensor_items
from fxray.tracing.torch_calls import is_leaf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxray.tracing.survey import Survey

__all__ = ["Layout", "Onlooker", "layout_of", "lookers", "looking"]

_LOCK = threading.RLock()


class _Asked(Protocol):
    """Who is asked before a module runs."""

    def knows(self, module: nn.Module) -> bool:
        """Return whether calls of `module` are to come here now."""
        ...

    def call_module(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Run a module: `original(module, *args, **kwargs)`, and whatever else."""
        ...


class Onlooker(_Asked, Protocol):
    """Who looks on a thread, and in whose place another is asked as long as there is one."""

    @property
    def forward(self) -> _Asked | None:
        """The other."""
        ...


class _Lookers(threading.local):
    """Those of each thread, innermost first."""

    all: tuple[Onlooker, ...] = ()


_LOOKERS = _Lookers()


class _Door:
    """Asks who looks on this thread, then lets the call through."""

    __slots__ = ("before", "module", "users")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before: Any = None
        self.users = 0

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        present = _LOOKERS.all
        run: Any = self.pass_through
        if len(present) == 1:
            asked = present[0].forward or present[0]
            if asked.knows(self.module):
                return asked.call_module(self.module, run, args, kwargs)
            return run(self.module, *args, **kwargs)
        for looker in reversed(present):
            asked = looker.forward or looker
            if asked.knows(self.module):
                run = functools.partial(_call_module, asked, run)
        return run(self.module, *args, **kwargs)

    def pass_through(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Do what torch would have done."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return module._call_impl(*args, **kwargs)  # noqa: SLF001 - what Module.__call__ calls

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _call_module(asked: _Asked, run: Any, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return asked.call_module(module, run, args, kwargs)


def _nothing() -> None:
    """Stand for a door in a copy."""


def _put(fields: dict[str, Any], door: _Door) -> None:
    there = fields.get(COMPILED_CALL)
    if type(there) is _Door:
        there.users += 1
    else:
        door.users, door.before = 1, there
        fields[COMPILED_CALL] = door


def _take_away(fields: dict[str, Any]) -> None:
    door = fields.get(COMPILED_CALL)
    if type(door) is not _Door:
        return
    door.users -= 1
    if door.users:
        return
    if door.before is None:
        del fields[COMPILED_CALL]
    else:
        fields[COMPILED_CALL] = door.before


def lookers() -> tuple[Onlooker, ...]:
    """Return who looks on this thread, innermost first."""
    return _LOOKERS.all


@contextlib.contextmanager
def looking(looker: Onlooker, model: nn.Module) -> Iterator[None]:
    """Ask `looker` on this thread, at first about calls of `model` alone."""
    fields = vars(model)
    with _LOCK:
        _put(fields, _Door(model))
    around = _LOOKERS.all
    _LOOKERS.all = (looker, *around)
    try:
        yield
    finally:
        _LOOKERS.all = around
        with _LOCK:
            _take_away(fields)


class Layout:
    """Where the modules and parameters of a model stand.

    Attributes:
        model: the model.
        paths: path by module.
        leaves: the modules that are one op.
        held: paths of the modules' calls, inputs and parameters known so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = [*model.named_modules()]
        self.paths = {module: path for path, module in named}
        self.leaves = {module for path, module in named if path and is_leaf(module)}
        self.held: dict[tuple[str, str, str], str] = {}
        # Its replicas copy the fields of the modules, and would go in by the original's door.
        closed = tuple(f"{p}." if p else "" for p, m in named if isinstance(m, nn.DataParallel))
        self._doors = [
            (vars(module), _Door(module))
            for path, module in named
            if path and not (closed and path.startswith(closed))
        ]
        inner = [m for m in self.paths if m not in self.leaves or m._modules]  # noqa: SLF001
        self._children = [(m._modules, [*m._modules.values()]) for m in inner]  # noqa: SLF001
        self._parameters: dict[int, tuple[Any, str]] = {}
        self._foreign: set[int] = set()
        self._set_names()

    def _set_names(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters.values()
        kinds = inspect.Parameter
        positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        self._names = [p.name for p in parameters if p.kind in positional]
        self._known = {p.name for p in parameters}
        self._rest = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), "")
        self._more = next((p.name for p in parameters if p.kind is kinds.VAR_KEYWORD), "")

    @property
    def current(self) -> bool:
        """Whether the model has the modules that it had."""
        return all([*modules.values()] == before for modules, before in self._children)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Put a door before every module but the root, which `looking` gave one."""
        with _LOCK:
            for fields, door in self._doors:
                _put(fields, door)
        try:
            yield
        finally:
            with _LOCK:
                for fields, _ in self._doors:
                    _take_away(fields)

    def inputs(self, args: Any, kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (path, tensor) for the arguments of one call, named as a graph names them."""
        names = self._names
        for name, value in zip(names, args, strict=False):
            yield from tensor_items(value, name)
        for place, value in enumerate(args[len(names) :]):
            yield from tensor_items(value, f"{self._rest}.{place}")
        for name, value in kwargs.items():
            yield from tensor_items(value, name if name in self._known else f"{self._more}.{name}")

    def parameter(self, parameter: nn.Parameter) -> str | None:
        """Return where the model holds `parameter`, None if it does not."""
        found = self._parameters.get(id(parameter))
        if (found is None or found[0]() is not parameter) and id(parameter) not in self._foreign:
            self._find_parameters()
            found = self._parameters.get(id(parameter))
            if found is None:
                self._foreign.add(id(parameter))
        return found[1] if found is not None and found[0]() is parameter else None

    def _find_parameters(self) -> None:
        self._parameters.clear()
        # The first path of what stands in several places, as in a graph.
        for module, path in reversed([*self.paths.items()]):
            for name, value in module.named_parameters("", recurse=False, remove_duplicate=False):
                held = f"{path}.{name}" if path else name
                self._parameters[id(value)] = weakref.ref(value), held


def layout_of(model: nn.Module, survey: Survey) -> Layout:
    """Return where things stand in `model`, found once and kept with the survey."""
    layout: Layout | None = survey.at_hand.get("layout")
    if layout is None or layout.model is not model or not layout.current:
        layout = survey.at_hand["layout"] = Layout(model)
    return layout
