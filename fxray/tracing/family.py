"""All graphs of one model, and which of them a call is run by."""

from __future__ import annotations

import collections
import contextlib
import inspect
import re
import threading
import warnings
from typing import TYPE_CHECKING, Any

import attrs
from torch.autograd.graph import saved_tensors_hooks

from fxray.errors import (
    BranchError,
    FxrayWarning,
    NoGraphError,
    SpecialisationError,
    TraceError,
    first_line,
)
from fxray.torch_private import function_level
from fxray.tracing.call import OpenCall
from fxray.tracing.patches import user_line
from fxray.tracing.program import MODES, Program, Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch import nn

    from fxray.architecture import Architecture
    from fxray.tracing.survey import Survey

__all__ = ["ONE_TRACE", "Family", "Fitted"]

ONE_TRACE = threading.RLock()
"""Tracing replaces names of torch for the whole process: one trace at a time."""

GRAPHS = 8
"""How many graphs of one mode are kept, and how many traces a training may ask for at once."""

CALLS_PER_TRACE = 50
"""Every so many calls that a graph served allow one trace more."""

TRIES = 4
"""How many graphs are begun for one call before it runs through the interposer."""

Fitted = tuple[Runner, "Sequence[Any]"]


@attrs.frozen
class _Missed:
    """A call that no graph takes.

    Attributes:
        mode: the mode it came in.
        args: its positional arguments.
        kwargs: its keyword arguments.
        misfit: why the graph used last does not take it, None where none was asked.
        flipped: whether a graph was begun for it, and ended half-way.
    """

    mode: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    misfit: SpecialisationError | None
    flipped: bool


class Family:
    """The graphs of one model; it grows as calls come that none of them was traced for.

    Such a call is traced once more, without side effects: a graph of the same structure
    shows that a size is free, another becomes one more graph, under a bound. What goes
    beyond it, and what no graph can hold, is run by the model itself (`None` where a
    `Fitted` is asked for), which is right by definition.
    """

    def __init__(
        self,
        model: nn.Module,
        programs: Iterable[Program],
        survey: Survey,
        *,
        grow: Callable[[Family, str, Any, Any], Runner] | None,
        without: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.survey = model, survey
        self.signature = inspect.signature(model.forward)
        self.without: dict[str, str] = dict(without or {})
        """Why there is no graph, by mode: the calls of that mode are not traced again."""
        self.told: list[str] = []
        """What happened since the trace, as sentences."""
        self._grow = grow
        # Held while a list is made anew: another thread may have one more graph meanwhile.
        self._ordering = threading.Lock()
        self._runners: dict[str, list[Runner]] = {mode: [] for mode in MODES}
        # Each mode has a budget of its own, as it has graphs of its own.
        self._traces: collections.Counter[str] = collections.Counter()
        self._served: collections.Counter[str] = collections.Counter()
        self._missed: collections.Counter[str] = collections.Counter()
        self._flips: collections.Counter[tuple[str, str]] = collections.Counter()
        self._unsteady: set[str] = set()
        self._numbers = dict.fromkeys(MODES, 0)
        for program in programs:
            self.add(program)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, too, is not to begin graphs that are likely to end half-way.
        rest = (self._grow, self.without, self.told, self._unsteady)
        state = (self.model, self.programs, self.survey, rest)
        return _unpack_family, state

    # ------------------------------------------------------------------ what there is

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every graph there is now, those of training first, the oldest first."""
        found = [runner.program for mode in MODES for runner in self._runners[mode]]
        return tuple(sorted(found, key=lambda p: (MODES.index(p.mode), _number(p))))

    def of(self, mode: str) -> tuple[Runner, ...]:
        """Return the runners of one mode, the last used first."""
        return tuple(self._runners[mode])

    def first(self, mode: str) -> Program | None:
        """Return the graph that the mode was first traced to, None if it has none."""
        named = [runner.program for runner in self._runners[mode]]
        return min(named, key=_number, default=None)

    @property
    def architecture(self) -> Architecture:
        """Every op that a graph holds or an interposed call ran."""
        return self.survey.architecture

    def new_name(self, mode: str) -> str:
        """Return the name of the next graph of a mode."""
        return f"{mode}.{self._numbers[mode]}" if self._numbers[mode] else mode

    # ------------------------------------------------------------------ growing

    def add(self, program: Program) -> Runner:
        """Take one more graph; the one not used for longest leaves, if there are too many."""
        runner = Runner(program, self.model, self.signature)
        self._numbers[program.mode] = max(self._numbers[program.mode], _number(program) + 1)
        with self._ordering:
            runners = [runner, *self._runners[program.mode]]
            if len(runners) > GRAPHS:
                # The first is what people look at.
                oldest = next(r for r in reversed(runners) if "." in r.program.name)
                runners.remove(oldest)
            self._runners[program.mode] = runners
        return runner

    def replace(self, old: Program, new: Program) -> Runner:
        """Put a program in the place of one that has the same name."""
        before = next(runner for runner in self._runners[old.mode] if runner.program is old)
        same_graph = new.graph is old.graph
        runner = before.evolved(new) if same_graph else Runner(new, self.model, self.signature)
        with self._ordering:
            now = self._runners[old.mode]
            self._runners[old.mode] = [runner if r is before else r for r in now]
        return runner

    def frozen(self) -> Family:
        """Return a family of the same graphs that never grows: a call that none fits is refused."""
        return Family(self.model, self.programs, self.survey, grow=None, without=self.without)

    def edited(self, program: Program) -> Family:
        """Return a family of the first graphs alone, one of them put in; it never grows."""
        firsts = [first for mode in MODES if (first := self.first(mode)) is not None]
        programs = [program if first.name == program.name else first for first in firsts]
        return Family(self.model, programs, self.survey, grow=None, without=self.without)

    def drop(self, program: Program, why: str) -> None:
        """Take a graph out that is wrong, and say why."""
        with self._ordering:
            left = [r for r in self._runners[program.mode] if r.program is not program]
            self._runners[program.mode] = left
        self.say(f"graph {program.name}", why)

    # ------------------------------------------------------------------ finding

    def fit(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fitted | None:
        """Return the graph that takes this call and its inputs, None where none can.

        Raises:
            TypeError: the call does not fit the forward's signature.
        """
        return self._fit(mode, args, kwargs, tried=())

    def fit_another(
        self,
        mode: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tried: Sequence[Runner],
        flipped: BranchError,
    ) -> Fitted | None:
        """Return another graph for a call that left those `tried` half-way.

        Raises:
            BranchError: no further one may be traced.
        """
        if self._grow is None:
            raise flipped
        self.say(f"branch {flipped.where}", f"{flipped}. Another graph runs the call")
        self._flips[mode, flipped.where] += 1
        if flipped.number and self._flips[mode, flipped.where] > 1:
            self._give_up(mode, str(flipped), unsteady=True)
        if len(tried) < TRIES:
            found = self._fit(mode, args, kwargs, tried)
            if found is not None and found[0] not in tried:
                return found
            if mode not in self.without:
                return None
        self._missed[mode] += 1
        if self._missed[mode] >= self._allowed(mode):
            self._give_up(mode, f"{flipped}, and so it went on", unsteady=True)
        return None

    def _fit(self, mode: str, args: Any, kwargs: Any, tried: Sequence[Runner]) -> Fitted | None:
        misfit: SpecialisationError | None = None
        for index, runner in enumerate(self._runners[mode]):
            if runner in tried or (runner.branches and mode in self._unsteady):
                continue
            try:
                inputs = runner.inputs(args, kwargs)
            except SpecialisationError as error:
                misfit = misfit or error
                continue
            if index:
                self._put_first(runner)
            self._served[mode] += 1
            return runner, inputs
        return self._further(_Missed(mode, args, kwargs, misfit, bool(tried)))

    def _put_first(self, runner: Runner) -> None:
        mode = runner.program.mode
        with self._ordering:
            # A list anew, not changed in place: another thread may be going through it.
            now = self._runners[mode]
            if runner in now:
                self._runners[mode] = [runner, *(r for r in now if r is not runner)]

    def _further(self, missed: _Missed) -> Fitted | None:
        if missed.mode in self.without:
            return None
        if self._grow is None:
            msg = f"there is no graph for {missed.mode} mode"
            raise missed.misfit or SpecialisationError(msg)
        if function_level() is not None or not ONE_TRACE.acquire(blocking=False):
            # Inside a torch.func transform nothing can be traced, and who waited for a trace
            # that runs this very call would wait for ever. The model itself is right.
            return None
        try:
            # Whatever saves tensors for backward now (a checkpoint) must not see the traces.
            with saved_tensors_hooks(_as_it_is, _as_it_is):
                return self._grown(missed, self._grow)
        finally:
            ONE_TRACE.release()

    def _grown(
        self, missed: _Missed, grow: Callable[[Family, str, Any, Any], Runner]
    ) -> Fitted | None:
        mode = missed.mode
        if self._traces[mode] >= self._allowed(mode):
            because = "a branch on data flips" if missed.flipped else _without_advice(missed.misfit)
            why = f"after {self._traces[mode]} traces: {because}"
            self._give_up(mode, why, unsteady=missed.flipped)
            return None
        self._traces[mode] += 1
        try:
            runner = grow(self, mode, missed.args, missed.kwargs)
        except (NoGraphError, RecursionError) as error:
            self._give_up(mode, first_line(error), unsteady=missed.flipped)
            return None
        except TraceError:
            # The model itself fails on this: it will say so in its own words.
            self._traces[mode] -= 1
            return None
        if isinstance(runner.program.call, OpenCall):  # it was there, and only to be verified
            self._traces[mode] -= 1
        try:
            return runner, runner.inputs(missed.args, missed.kwargs)
        except SpecialisationError:  # a state that no trace is made under: inference mode
            return None

    def _allowed(self, mode: str) -> int:
        """Return how many traces, and how many calls that no graph ends, a mode may ask for."""
        return GRAPHS + self._served[mode] // CALLS_PER_TRACE

    def _give_up(self, mode: str, why: str, *, unsteady: bool) -> None:
        """Trace no more in this mode; nor begin graphs that are likely to end half-way."""
        self.without[mode] = why
        if unsteady:
            self._unsteady.add(mode)
        self.say(
            f"without {mode}",
            f"{type(self.model).__name__} runs through the interposer in {mode} mode from now "
            f"on wherever no graph fits ({why}). Its numbers are right; it is slower",
        )

    def say(self, topic: str, text: str) -> None:
        """Tell the user once for each topic, at their own line, and remember it for the report."""
        if any(told.startswith(f"{topic}:") for told in self.told):
            return
        self.told.append(f"{topic}: {text}")
        file, line = user_line()
        # Where warnings are errors, training goes on all the same.
        with contextlib.suppress(FxrayWarning):
            warnings.warn_explicit(text, FxrayWarning, file or __file__, line or 1)


def _without_advice(misfit: object) -> str:
    """Return what differs, without what to do about it: tracing again is what was done."""
    return re.split(r"[.;] [Tt]race again", str(misfit))[0]


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _number(program: Program) -> int:
    return int(program.name.partition(".")[2] or 0)


def _unpack_family(
    model: nn.Module, programs: Any, survey: Survey, rest: tuple[Any, ...]
) -> Family:
    grow, without, told, unsteady = rest
    family = Family(model, programs, survey, grow=grow, without=without)
    family.told.extend(told)
    family._unsteady.update(unsteady)  # noqa: SLF001 - its own
    return family
