"""Xray: the user's one interface over tracing, draft, rewriting and pictures."""

from __future__ import annotations

import datetime as dt
import enum
import json
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from fxray.capture.recorder import Recorder
from fxray.capture.rewrite import RewrittenModule, rewrite
from fxray.draft import DEFAULTS, DefaultTable, Draft, Estimate, MarkWords
from fxray.errors import FxrayError, FxrayWarning, RecordError
from fxray.look import render
from fxray.run import Run
from fxray.store import open_store
from fxray.tracing.ladder import Traced, trace_model
from fxray.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from fxray.architecture import Architecture
    from fxray.tracing.report import Report

__all__ = ["Xray", "record", "trace"]

_TABLE_STEPS = 10_000
"""Over how many steps the table's bytes per step are averaged: schedules are spaced."""


def trace(model: nn.Module, /, *args: Any, **kwargs: Any) -> Xray:
    """Trace `model` as it runs on `model(*args, **kwargs)`; without them, symbolically.

    Every argument after the model is the model's own; options are on `Xray`. The model
    is left as it was: parameters, buffers, random state and mode.

    Raises:
        TraceError: the model cannot be traced, or the input does not fit; names the line.
        TypeError: `model` is no `nn.Module`.

    >>> import torch, fxray
    >>> from torch import nn
    >>> xray = fxray.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(2, 4))
    >>> list(xray.architecture)
    ['input', '0', '1']
    """
    return Xray(model, args=args, kwargs=kwargs)


class Xray:
    """A model, an input, and what will be kept of it; change any of them at any time.

    Args:
        model: the model to see into; never changed.
        args: positional arguments of an example call.
        kwargs: keyword arguments of it.
        frontend: `"execution"`, `"symbolic"` or `"interposed"` forces a way of tracing; None
            takes execution where there is an input, and runs the model itself, interposed,
            in a mode that no graph can hold.
        sizes: by argument, the dims whose size is to be shown free before anything runs:
            `{"input_ids": (0, 1)}`. Dim 0 is, where the inputs share it, of every argument
            not named here; any other size is freed by the calls that come.
        examples: further calls to take, at other sizes or laid out otherwise, each as
            `inputs` takes them; what they need is traced at once, in both modes.
        gradients: whether the graphs are verified by their gradients too, not by their
            outputs alone.
        strict: whether every one of `report.reservations` is an error.
        defaults: what the draft keeps by type of op, unless told otherwise.

    Raises:
        TraceError: the model cannot be traced, or the input does not fit; with `strict`,
            also what is less than a graph for every call, bit-equal to the model.
        TypeError: `model` is no `nn.Module`.
    """

    def __init__(  # noqa: PLR0913 - the options, each by its name
        self,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        frontend: str | None = None,
        sizes: Mapping[str, Sequence[int] | int] | None = None,
        examples: Sequence[Any] = (),
        gradients: bool = True,
        strict: bool = False,
        defaults: DefaultTable = DEFAULTS,
    ) -> None:
        self._args = _positional(args)
        self._kwargs = dict(kwargs or {})
        self._defaults = defaults
        self._options: dict[str, Any] = {
            "frontend": frontend,
            "sizes": sizes,
            "examples": [_call_of(example) for example in _positional(examples)],
            "gradients": gradients,
            "strict": strict,
        }
        self._traced = trace_model(model, self._args, self._kwargs, **self._options)
        self._draft = Draft(self.architecture, model, defaults)

    # ------------------------------------------------------------------ model and input

    @property
    def model(self) -> nn.Module:
        """The model; setting another (or the same, changed) traces it and keeps the marks.

        Marks on ops that the new model does not have are dropped, each named in a warning.
        """
        return self._traced.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._retrace(trace_model(model, self._args, self._kwargs, **self._options))

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call, `(args, kwargs)`; setting another traces again.

        Takes one tensor, a tuple of positional arguments, a dict of keyword arguments, or
        `(args, kwargs)`.
        """
        return self._args, dict(self._kwargs)

    @inputs.setter
    def inputs(self, inputs: Any) -> None:
        args, kwargs = _call_of(inputs)
        self._retrace(trace_model(self.model, args, kwargs, **self._options))
        self._args, self._kwargs = args, kwargs

    def _retrace(self, traced: Traced) -> None:
        before, old = self._draft, self.architecture
        draft = Draft(traced.architecture, traced.model, self._defaults)
        there = traced.architecture.graph
        lost = [f"{c.op} {c.kind}" for c in before.captures() if c.op not in there]
        draft.replace({path: dict(before[path]) for path in old if path in there})
        self._traced, self._draft = traced, draft
        if lost:
            warnings.warn(
                f"marks dropped, for {traced.architecture.model} has no such op: {', '.join(lost)}",
                FxrayWarning,
                stacklevel=3,
            )

    # ------------------------------------------------------------------ what was traced

    @property
    def architecture(self) -> Architecture:
        """Every op of the model, by path; also by type key or fx name.

        It grows with ops that a later call was the first to run: another branch, a layer
        that is skipped at random.
        """
        return self._traced.architecture

    @property
    def report(self) -> Report:
        """How the model was traced, what was fixed, how far it was verified, what came since.

        Prints as a block of lines; `report.to_dict()` is plain data.
        """
        return self._traced.report

    @property
    def graph_module(self) -> fx.GraphModule:
        """The traced model as a `torch.fx.GraphModule`, nothing captured."""
        return self._traced.module

    @property
    def graph(self) -> fx.Graph:
        """The fx graph of the model's current mode."""
        return self._traced.module.graph

    # ------------------------------------------------------------------ what will be kept

    @property
    def draft(self) -> Draft:
        """What will be kept of every op, to edit; setting a dict replaces what it names."""
        self._draft.extend(self.architecture)
        return self._draft

    @draft.setter
    def draft(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        if entries is self._draft:
            return
        self._draft.replace(entries)

    def mark(self, what: Any, **words: Unpack[MarkWords]) -> tuple[str, ...]:
        """Keep, with True, or no longer, with False, kinds of what `what` means.

        `what` and `words` are those of `Draft.mark`: a path or pattern, a module, a
        parameter, a class of modules, a function, a predicate of an `Op`, or a list of
        those; `output, grad, weight, weight_grad, input`, `selection`, `every`, `steps`,
        `start`, `stop`.

        Returns:
            Paths of the ops marked, in graph order.
        """
        return self.draft.mark(what, **words)

    def unmark(self, what: Any, *kinds: str) -> tuple[str, ...]:
        """Keep `kinds` (all unless given) of what `what` means no longer, as in `mark`."""
        return self.draft.unmark(what, *kinds)

    def estimate(self, steps: int) -> Estimate:
        """Return what recording `steps` training steps will cost, roughly; runs nothing."""
        return self.draft.estimate(steps)

    def rewrite(self) -> RewrittenModule:
        """Return the model as a `torch.fx.GraphModule` with capture nodes, to train.

        It runs over the model's own parameters, and follows this Xray: a mark made later
        takes effect at its next forward.
        """
        return rewrite(self._traced.module, self.draft)

    # ------------------------------------------------------------------ to look at

    def render(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        depth: int | None = None,
        title: str = "",
    ) -> Any:
        """Draw the graph, with a badge for all that will be kept.

        Args:
            path: file to write (`.svg`, `.png`, `.pdf`, `.dot`); None only returns it.
            depth: how many levels of modules are drawn open; chosen when None.
            title: heading; the model's class name when empty.

        Returns:
            The path written, or, without one, a `graphviz.Digraph`, which shows itself in
            a notebook.

        Raises:
            MissingExtraError: there is no Graphviz; the DOT text is left beside `path`.
        """
        badges: dict[str, dict[str, str]] = {}
        for capture in self._draft.captures():
            badges.setdefault(capture.op, {})[capture.kind] = ""
        dot = render.to_dot(self.architecture, badges, title=title, depth=depth)
        return dot if path is None else render.save(dot, path)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        shown = {"text/plain": str(self)}
        try:
            shown["image/svg+xml"] = render.svg(self.render())
        except FxrayError as error:
            shown["text/plain"] += f"\n(no picture: {error})"
        return shown

    def __str__(self) -> str:
        costs = {(row.op, row.kind): row.nbytes for row in self.estimate(_TABLE_STEPS).rows}
        rows = [("op", "key", "settings", "output", "parameters", "kept", "bytes/step")]
        for op in self.architecture.values():
            kept = [capture for capture in self._draft.captures() if capture.op == op.path]
            nbytes = sum(costs[c.op, c.kind] or 0 for c in kept)
            rows.append(
                (
                    op.path,
                    op.key,
                    op.settings if len(op.settings) <= 40 else f"{op.settings[:37]}...",
                    ", ".join(map(str, op.outputs)),
                    f"{op.parameter_count:,}" if op.parameters else "",
                    ", ".join(f"{c.kind} {c.schedule}" for c in kept),
                    f"{nbytes / _TABLE_STEPS:,.0f}" if nbytes else "",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join([repr(self), str(self.report), "", *(line.rstrip() for line in lines)])

    def __repr__(self) -> str:
        count = len(self._draft.captures())
        return (
            f"<Xray of {self.architecture.model}: {len(self.architecture)} ops, {count} captures>"
        )


def _positional(given: Any) -> tuple[Any, ...]:
    """Return what was given in a row; one tensor is one thing, not a row of its rows."""
    return (given,) if isinstance(given, torch.Tensor) else tuple(given)


def _call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        pair = len(inputs) == 2
        if pair and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return inputs[0], dict(inputs[1])
        return inputs, {}
    return (inputs,), {}


def record(
    net: nn.Module | Mapping[str, nn.Module],
    place: str | os.PathLike[str] | None = None,
    *,
    name: str = "",
    tags: Mapping[str, Any] | None = None,
    commit_every: float = 5.0,
) -> Recorder:
    """Begin a run: record what `net` captures until the recorder is closed.

    Several modules are recorded in one run by name, `record({"generator": g,
    "discriminator": d}, …)`; the names are the first parts of their paths:
    `run["generator.conv1"]`. They share the count of steps: without help each outermost
    forward in training mode, of whichever module, is one step. Where a step of the training
    runs several, as in a GAN, put it in `with recorder.step():`.

    Args:
        net: what `Xray.rewrite` gave, or a module that wraps it (`torch.compile`, DDP);
            several of those by name.
        place: a path, `file://…`, `memory://…`; None records in memory, for a first look.
        name: of the run, for people; ids are unique by themselves.
        tags: JSON-ready values of your own that the run carries.
        commit_every: seconds between commits; a crash loses at most what came after one.

    Raises:
        RecordError: `net` is not rewritten, or is being recorded already; a name that no
            path can begin with, or one module under two; a tag that JSON does not hold.
        StoreError: `place` cannot be written.
    """
    told = _plain_tags(tags or {})
    store = open_store(place)

    def read(run_id: str) -> Run:
        return Run(store.run(run_id))

    return Recorder(
        _rewritten_by_name(net),
        store,
        name=name,
        tags=told,
        versions={"fxray": VERSION},
        commit_every=commit_every,
        read=read,
    )


def _plain_tags(tags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tags as JSON holds them: what an argument parser gives, in short."""

    def plainly(value: Any) -> Any:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            return value.item()
        if isinstance(value, (os.PathLike, torch.device, torch.dtype, dt.date, enum.Enum)):
            return str(value)
        msg = f"a {type(value).__qualname__}"
        raise TypeError(msg)

    plain = {}
    for name, value in tags.items():
        try:
            plain[str(name)] = json.loads(json.dumps(value, default=plainly))
        except (TypeError, ValueError) as error:
            msg = f"tag {name!r} is no JSON ({error}); give numbers, texts, lists or dicts of them"
            raise RecordError(msg) from None
    return plain


def _rewritten_by_name(net: object) -> dict[str, RewrittenModule]:
    """Return the rewritten modules to record by name, a single one as `""`."""
    if not isinstance(net, Mapping):
        return {"": _rewritten_in(net)}
    if not net:
        msg = "fxray.record was given no module: the dict is empty"
        raise RecordError(msg)
    found: dict[str, RewrittenModule] = {}
    for name, module in net.items():
        if not isinstance(name, str) or not name.isidentifier():
            msg = (
                f"{name!r} is no name for a module: paths begin with it, so it is to be one word "
                "of letters, digits and underscores, such as 'generator'"
            )
            raise RecordError(msg)
        try:
            rewritten = _rewritten_in(module)
        except RecordError as error:
            msg = f"{name!r}: {error}"
            raise RecordError(msg) from None
        same = next((other for other, known in found.items() if known is rewritten), None)
        if same is not None:
            msg = f"{same!r} and {name!r} are one module; give it once"
            raise RecordError(msg)
        found[name] = rewritten
    return found


def _rewritten_in(net: object) -> RewrittenModule:
    if isinstance(net, RewrittenModule):
        return net
    if not isinstance(net, nn.Module):
        msg = f"fxray.record takes the module that xray.rewrite() gives, not a {type(net).__name__}"
        raise RecordError(msg)
    found = [module for module in net.modules() if isinstance(module, RewrittenModule)]
    if len(found) == 1:
        return found[0]
    if found:
        msg = (
            f"{type(net).__name__} holds {len(found)} rewritten modules; give one of them, or "
            'several by name: fxray.record({"generator": g, "discriminator": d}, …)'
        )
    else:
        msg = (
            f"{type(net).__name__} holds no capture nodes; record what xray.rewrite() gives: "
            "net = fxray.trace(model, x).rewrite()"
        )
    raise RecordError(msg)
