"""What was kept of one op, or of one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs

from fxray.errors import NotSavedError, UnknownNameError, nearest
from fxray.run.series import Series
from fxray.run.sources import LOG, Name
from fxray.run.words import why_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxray.architecture import Architecture

__all__ = ["Log", "OpRecords", "find"]


@attrs.frozen(eq=False, repr=False)
class OpRecords:
    """The series that a run kept of one op, or of the ops that a module answers by.

    Attributes:
        name: path of the op or module.
        returns: paths of the ops whose `output`, `grad` and `input` it answers with.
        parameters: op and name there of every parameter, by its name below `name`.
    """

    name: str
    returns: tuple[str, ...]
    parameters: Mapping[str, tuple[str, str]]
    _series: Callable[[Name], Series | None]
    _kept: tuple[Name, ...]
    _notes: tuple[str, ...] = ()

    @property
    def output(self) -> Series:
        """What it returned. Raises NotSavedError where it was not kept."""
        return self._of_op("output")

    @property
    def grad(self) -> Series:
        """The gradient of its output. Raises NotSavedError where it was not kept."""
        return self._of_op("grad")

    @property
    def input(self) -> Series:
        """What it was given. Raises NotSavedError where it was not kept."""
        return self._of_op("input")

    @property
    def weight(self) -> Series:
        """Its parameter called `weight`, see `parameter`."""
        return self.parameter("weight")

    @property
    def weight_grad(self) -> Series:
        """The gradient of its parameter called `weight`, see `parameter_grad`."""
        return self.parameter_grad("weight")

    def parameter(self, name: str) -> Series:
        """Return the values of the parameter called `name`, as each step's forward used them.

        Raises:
            UnknownNameError: it has no such parameter; names those it has.
            NotSavedError: it was not kept; says what was.
        """
        return self._of_parameter("weight", name)

    def parameter_grad(self, name: str) -> Series:
        """Return the gradient of the parameter called `name`, as the optimizer used it.

        Raises:
            UnknownNameError: it has no such parameter; names those it has.
            NotSavedError: it was not kept; says what was.
        """
        return self._of_parameter("weight_grad", name)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was kept, e.g. `("output", "weight.bias")`."""
        return tuple(self._shown(name) for name in self._kept)

    @property
    def series(self) -> tuple[Series, ...]:
        """Every series that was kept of it."""
        return tuple(s for name in self._kept if (s := self._series(name)) is not None)

    def _of_op(self, kind: str) -> Series:
        if len(self.returns) > 1:
            msg = (
                f"{self.name!r} returns what {len(self.returns)} ops give, "
                f"{', '.join(map(repr, self.returns))}; ask for one of them"
            )
            raise UnknownNameError(msg)
        series = self._series((self.returns[0], kind, "")) if self.returns else None
        if series is None:
            path = self.returns[0] if self.returns else self.name
            raise self._nothing(kind, why_nothing(self._notes, path, kind))
        return series

    def _of_parameter(self, kind: str, name: str) -> Series:
        if name not in self.parameters:
            close = nearest(name, self.parameters) or list(self.parameters)[:3]
            has = f"it has {', '.join(map(repr, close))}" if close else "it has none"
            msg = f"{self.name!r} has no parameter {name!r}; {has}"
            raise UnknownNameError(msg)
        op, parameter = self.parameters[name]
        series = self._series((op, kind, parameter))
        if series is None:
            what = f"{kind}, parameter {name!r},"
            raise self._nothing(what, why_nothing(self._notes, op, kind))
        return series

    def _nothing(self, what: str, why: str) -> NotSavedError:
        kept = ", ".join(self.kinds)
        rest = f"kept of it: {kept}" if kept else "nothing of it was; run.captures() lists all"
        because = f": {why}" if why else ""
        return NotSavedError(f"{what} of {self.name!r} was not kept{because}; {rest}")

    def _shown(self, name: Name) -> str:
        op, kind, parameter = name
        below = "" if op == self.name else op.removeprefix(f"{self.name}.")
        other = parameter if parameter != "weight" else ""
        return ".".join(filter(None, (below, kind, other)))

    def __repr__(self) -> str:
        lines = [f"{self.name}: {'nothing was kept' if not self._kept else ''}".rstrip(": ")]
        return "\n".join([*lines, *(f"  {series!r}" for series in self.series)])


def find(
    architecture: Architecture,
    name: str,
    kept: tuple[Name, ...],
    series: Callable[[Name], Series | None],
    notes: tuple[str, ...] = (),
) -> OpRecords:
    """Return what `kept` holds of the op or module called `name`.

    Args:
        architecture: what was traced.
        name: path, type key or fx name of an op, or path of a module.
        kept: every series there is.
        series: gives one of them.
        notes: what the recorder had to say of the run.

    Raises:
        UnknownNameError: neither op nor module is called that; names the nearest.
    """
    if name in architecture or name in {op for op, _, _ in kept}:
        path = architecture.resolve(name) if name in architecture else name
        parameters = _own_parameters(architecture, path, kept)
        mine = tuple(entry for entry in kept if entry[0] == path)
        return OpRecords(path, (path,), parameters, series, mine, notes)
    module = name.partition("@")[0]
    if name not in architecture.returns and module not in architecture.modules:
        raise architecture.unknown(name)
    inside = set(architecture.beneath(module))
    prefix = f"{module}." if module else ""
    parameters = {}
    for path in architecture.beneath(module):
        op = architecture[path]
        for parameter in op.parameters:
            below = op.parameter_path(parameter).removeprefix(prefix)
            parameters.setdefault(below, (path, parameter))
    mine = tuple(entry for entry in kept if entry[0] in inside)
    returns = tuple(architecture.returns.get(name, ()))
    return OpRecords(name, returns, parameters, series, mine, notes)


def _own_parameters(
    architecture: Architecture, path: str, kept: tuple[Name, ...]
) -> dict[str, tuple[str, str]]:
    names = list(architecture[path].parameters) if path in architecture else []
    names += [parameter for op, _, parameter in kept if op == path and parameter]
    return {name: (path, name) for name in names}


@attrs.frozen(eq=False, repr=False)
class Log(Mapping[str, Series]):
    """The numbers that the user logged, by name."""

    _series: Callable[[Name], Series | None]
    _kept: tuple[Name, ...]

    def __getitem__(self, name: str) -> Series:
        """Return one of them over steps.

        Raises:
            NotSavedError: nothing was logged under that name; names the nearest.
        """
        series = self._series(("", LOG, name))
        if series is None:
            close = nearest(name, self) or list(self)[:3]
            hint = f"logged: {', '.join(map(repr, close))}" if close else "nothing was"
            msg = f"nothing was logged as {name!r}; {hint}"
            raise NotSavedError(msg)
        return series

    def __iter__(self) -> Iterator[str]:
        return (name for _, kind, name in self._kept if kind == LOG)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        if not self:
            return "<Log: nothing was logged>"
        steps = max((int(s.steps[-1]) for s in self.values() if len(s)), default=None)
        return f"<Log: {', '.join(self)}; last at step {steps}>"
