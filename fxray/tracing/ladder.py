"""Which front end traces a model, and what the caller gets of it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.errors import NoGraphError, SpecialisationError, TraceError, first_line
from fxray.tracing.alone import How, alone, preserved_rng
from fxray.tracing.example import Example, SizesArgument
from fxray.tracing.family import ONE_TRACE, Family
from fxray.tracing.growing import grow
from fxray.tracing.learner import survey_call
from fxray.tracing.module import TracedModule
from fxray.tracing.paths import name_ops
from fxray.tracing.program import MODES, Program
from fxray.tracing.regions import count_regions
from fxray.tracing.report import Report, baked_values, branches_in, count_ops
from fxray.tracing.showing import Shown, notes_on, program_of, show, takes, verify
from fxray.tracing.survey import Survey
from fxray.tracing.symbolic import open_call, write_symbolically
from fxray.tracing.verify import Comparison, Trial
from fxray.tracing.writing import run_alone

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxray.architecture import Architecture

__all__ = ["FRONTENDS", "Traced", "trace_model"]

FRONTENDS = ("execution", "symbolic", "interposed")

_UNSTEADY = "not verified: the model gives other numbers each time, for one input and seed"


@attrs.frozen(eq=False)
class Traced:
    """A model and what tracing it gave.

    Attributes:
        model: the user's model, untouched.
        module: runs the graphs over the model's own parameters.
    """

    model: nn.Module
    module: TracedModule
    _report: Report

    @property
    def architecture(self) -> Architecture:
        """Every op seen so far, of both modes."""
        return self.module.family.architecture

    @property
    def report(self) -> Report:
        """What was obtained, fixed and verified, and what happened since."""
        return attrs.evolve(self._report, since=tuple(self.module.family.told))


def trace_model(  # noqa: PLR0913 - the options of Xray, each by its name
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    frontend: str | None = None,
    sizes: SizesArgument | None = None,
    examples: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = (),
    gradients: bool = True,
    strict: bool = False,
) -> Traced:
    """Trace `model` as it runs on `model(*args, **kwargs)`, in train and in eval mode.

    Without arguments the model is traced symbolically, by torch.fx. Nothing is left
    behind: parameters, buffers, random state and flags are as before, also on error.

    Args:
        model: the model.
        args: positional arguments of an example call.
        kwargs: keyword arguments of it.
        frontend: one of `FRONTENDS` to force it, None to take the first that can.
        sizes: by argument, the dims whose size is to be shown free.
        examples: further calls to take, at other sizes or laid out otherwise.
        gradients: whether verifying compares gradients too.
        strict: whether a reservation in the report is an error.

    Raises:
        TraceError: the model cannot be traced, or the input does not fit it.
        TypeError: the model is no `nn.Module`.
    """
    _check_model(model)
    if frontend is not None and frontend not in FRONTENDS:
        msg = f"no front end {frontend!r}; there are {', '.join(map(repr, FRONTENDS))}"
        raise ValueError(msg)
    kwargs = dict(kwargs or {})
    given = bool(args or kwargs)
    if frontend not in (None, "symbolic") and not given and _takes_arguments(model):
        msg = f"the front end {frontend!r} runs the model, so it needs an input: fxray.trace(m, x)"
        raise TraceError(msg)
    with ONE_TRACE:
        if frontend == "symbolic" or (frontend is None and not given):
            traced = _symbolically(model, tuple(args), kwargs)
        else:
            with torch.inference_mode(mode=False):
                materialised = _materialise(model, args, kwargs)
                example = Example.of(model, args, kwargs, sizes=sizes)
                build = _Build(model, example, frontend, gradients=gradients)
                traced = build.traced(materialised)
        for more_args, more_kwargs in examples:
            _take(traced, more_args, more_kwargs)
    if strict and traced.report.reservations:
        msg = f"strict=True, and {'; '.join(traced.report.reservations)}"
        raise TraceError(msg)
    return traced


def _takes_arguments(model: nn.Module) -> bool:
    return bool(inspect.signature(model.forward).parameters)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = f"a {type(model).__qualname__}"
        if isinstance(model, type):
            what = f"the class {model.__qualname__}; pass an instance: {model.__qualname__}(…)"
        msg = f"fxray traces a torch.nn.Module, and this is {what}"
        raise TypeError(msg)
    if isinstance(model, nn.DataParallel):
        msg = "nn.DataParallel runs copies of the model; trace the model itself: model.module"
        raise TraceError(msg)
    if getattr(model, "_orig_mod", None) is not None:
        msg = "this model is compiled; trace the model itself, then compile what rewrite() gives"
        raise TraceError(msg)


def _lazy(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]


def _materialise(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Give lazy parameters their shapes, as a first call would; return what to say of it."""
    lazy = _lazy(model)
    if not lazy:
        return ""
    training = {module: module.training for module in model.modules()}
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), preserved_rng():
            model(*args, **kwargs)
    except Exception as error:
        msg = (
            f"{lazy[0]!r} has no shape yet, and the model fails on this input: {first_line(error)}"
        )
        raise TraceError(msg) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    return f"lazy parameters got their shapes ({', '.join(lazy)}), as by a first call"


def _take(traced: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the graphs of both modes take one more call."""
    family = traced.module.family
    for mode in MODES:
        how = How(training=mode == MODES[0])
        with alone(traced.model, how):
            fitted = family.fit(mode, args, kwargs)
        if fitted is None and mode not in family.without:
            run_alone(traced.model, Example.of(traced.model, args, kwargs), {}, how)


# ---------------------------------------------------------------------- by execution


class _Build:
    """One trace by execution: what each mode gave, put together and verified."""

    def __init__(
        self, model: nn.Module, example: Example, frontend: str | None, *, gradients: bool
    ) -> None:
        self.model, self.example, self.gradients = model, example, gradients
        self.forced = frontend == "execution"
        self.shown: dict[str, Shown] = {}
        self.without: dict[str, str] = {}
        self.failed: dict[str, TraceError] = {}
        self.programs: dict[str, Program] = {}
        for mode in MODES:
            if frontend == "interposed":
                self.without[mode] = "as asked for"
            else:
                self._show(mode)
        if len(self.failed) == len(MODES):
            raise self.failed[MODES[0]]

    def _show(self, mode: str) -> None:
        try:
            self.shown[mode] = show(self.model, self.example, How(training=mode == MODES[0]))
        except NoGraphError as error:
            self._refuse(mode, error)
        except TraceError as error:  # the model itself fails in this mode
            self.failed[mode] = error

    def _refuse(self, mode: str, error: TraceError) -> None:
        if self.forced:
            raise error
        self.shown.pop(mode, None)
        self.without[mode] = first_line(error)

    def traced(self, *notes: str) -> Traced:
        """Return the model with all its graphs, verified."""
        while True:
            family, free = self._family()
            # Of these graphs alone: what is verified must not grow on the way.
            module = TracedModule(family.frozen())
            found = self._verified(module, family)
            if found is not None:
                break
        odd = [size for size in free if size.base != size.given]
        if odd and self.shown and not self._takes_given(module):
            rest = self.example.without(odd)
            forced = "execution" if self.forced else None
            again = _Build(self.model, rest, forced, gradients=self.gradients).traced(*notes)
            why = [f"{size.what} fixed (a {size.what} of 1 takes other branches)" for size in odd]
            report = again._report  # noqa: SLF001 - made here
            return attrs.evolve(again, report=attrs.evolve(report, fixed=(*report.fixed, *why)))
        return Traced(self.model, TracedModule(family), self._report(family, found, free, notes))

    def _family(self) -> tuple[Family, list[Any]]:
        graphs = {mode: shown.written.graph for mode, shown in self.shown.items()}
        name_ops(graphs)
        returns = {mode: shown.written.returns for mode, shown in self.shown.items()}
        survey = Survey.of(self.model, graphs, returns)
        free = [
            size
            for size in self.example.sizes
            if self.shown and all(size in shown.free for shown in self.shown.values())
        ]
        for mode, shown in self.shown.items():
            if mode not in self.programs:
                self.programs[mode] = program_of(mode, shown, self.example, free=tuple(free))
        programs = [self.programs[mode] for mode in self.shown]
        family = Family(self.model, programs, survey, grow=grow, without=self.without)
        return family, free

    def _verified(self, module: TracedModule, family: Family) -> list[Comparison] | None:
        """Return how each mode compares with the model; None if one fell back meanwhile."""
        found = []
        for mode in MODES:
            training = mode == MODES[0]
            if mode in self.failed:
                continue
            product: Any = module
            if mode in self.without:
                product = functools.partial(self._interposed, family.survey, training)
            try:
                against = verify(
                    self.model,
                    product,
                    self.example,
                    Trial(
                        How(training=training),
                        self.example.base if mode in self.shown else {},
                        # Those in training speak for both, where there are any.
                        gradients=self.gradients and (training or MODES[0] not in self.shown),
                    ),
                )
            except (NoGraphError, SpecialisationError) as error:
                if mode in self.without:
                    raise
                self._refuse(mode, error)
                return None
            found.append(against)
        return found

    def _takes_given(self, module: TracedModule) -> bool:
        return takes(self.model, module, self.example, self.shown, or_refuses=True)

    def _interposed(self, survey: Survey, training: bool, *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            return self.model(*args, **kwargs)

        return survey_call(self.model, survey, call, training=training)

    def _report(
        self, family: Family, found: list[Comparison], free: list[Any], notes: tuple[str, ...]
    ) -> Report:
        written = [shown.written for shown in self.shown.values()]
        graphs = {mode: shown.written.graph for mode, shown in self.shown.items()}
        fixed = [reason for shown in self.shown.values() for reason in shown.fixed]
        if not self.example.sizes and self.shown:
            fixed.append("batch size fixed (the inputs share no dim 0)")
        worst = next((c for c in found if not c.equal), found[0])
        told = [*notes, *(f"no graph in {mode} mode: {e}" for mode, e in self.failed.items())]
        told += [note for w in written for note in notes_on(self.model, w)]
        ops = {mode: count_ops(graph) for mode, graph in graphs.items()}
        return Report(
            "interposed" if self.without else "execution",
            {mode: n for mode in MODES if (n := ops.get(mode, family.survey.counts.get(mode)))},
            tuple(size.what for size in free),
            tuple(fixed),
            branches_in(graphs),
            constants=sum(baked_values(w.constants) for w in written),
            regions=max((count_regions(graph) for graph in graphs.values()), default=0),
            interposed=self.without,
            verified=_UNSTEADY if worst.wrong else str(worst),
            equal=all(c.equal for c in found),
            notes=tuple(dict.fromkeys(filter(None, told))),
        )


# ---------------------------------------------------------------------- by torch.fx


def _symbolically(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    lazy = _lazy(model)
    if lazy:
        msg = f"{lazy[0]!r} has no shape yet, for the model is lazy; give an input: trace(model, x)"
        raise TraceError(msg)
    written = write_symbolically(model)
    graphs = {mode: w.graph for mode, w in written.items()}
    name_ops(graphs)
    returns = {mode: w.returns for mode, w in written.items()}
    survey = Survey.of(model, graphs, returns)
    programs = [
        Program(mode, w.graph, open_call(model), w.named_for(mode), w.state, w.writes)
        for mode, w in written.items()
    ]
    family = Family(model, programs, survey, grow=grow)
    traced = Traced(model, TracedModule(family), Report("symbolic", {}))
    counts = {mode: count_ops(graph) for mode, graph in graphs.items()}
    notes = tuple(dict.fromkeys(note for w in written.values() for note in w.notes))
    report = attrs.evolve(
        traced.report,
        ops=counts,
        constants=sum(baked_values(w.constants) for w in written.values()),
        regions=max(count_regions(graph) for graph in graphs.values()),
        notes=notes,
    )
    if args or kwargs:
        example = Example.of(model, args, kwargs)
        found = [
            verify(model, traced.module, example, Trial(How(training=mode == MODES[0]), {}))
            for mode in MODES
        ]
        worst = next((c for c in found if not c.equal), found[0])
        text = _UNSTEADY if worst.wrong else str(worst)
        report = attrs.evolve(report, verified=text, equal=all(c.equal for c in found))
    return attrs.evolve(traced, report=report)
