"""Which front end traces a model, and what the caller gets of it."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.architecture import Architecture
from fxray.errors import SpecialisationError, TraceError, first_line
from fxray.torch_private import has_forward_hooks
from fxray.tracing.batch import difference, drop_settled_guards, far_from
from fxray.tracing.example import Example, with_exact, with_free_batch
from fxray.tracing.execution import GraphWriter, WrittenGraph
from fxray.tracing.module import MODES, Program, TracedModule, autocast_state, mode_name
from fxray.tracing.ops import architecture_of
from fxray.tracing.patches import refused_randomness
from fxray.tracing.paths import name_ops
from fxray.tracing.report import Report, baked_values, count_ops, guards_in
from fxray.tracing.state import ModelState, preserved_rng, training_flags
from fxray.tracing.symbolic import open_call, write_symbolically
from fxray.tracing.verify import compare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FRONTENDS", "Traced", "trace_model"]

FRONTENDS = ("execution", "symbolic")

_LOCK = threading.RLock()
"""Tracing replaces names of torch for the whole process: one trace at a time."""


@attrs.frozen(eq=False)
class Traced:
    """A model and what tracing it gave.

    Attributes:
        model: the user's model, untouched.
        module: runs the graphs over the model's own parameters.
        architecture: every op of both modes.
        report: what was obtained, fixed and verified.
    """

    model: nn.Module
    module: TracedModule
    architecture: Architecture
    report: Report


def trace_model(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    frontend: str | None = None,
) -> Traced:
    """Trace `model` as it runs on `model(*args, **kwargs)`, in train and in eval mode.

    Without arguments the model is traced symbolically, by torch.fx. Nothing is left
    behind: parameters, buffers, random state and flags are as before, also on error.

    Raises:
        TraceError: the model cannot be traced, or the input does not fit it.
        TypeError: the model is no `nn.Module`.
    """
    _check_model(model)
    if frontend is not None and frontend not in FRONTENDS:
        msg = f"no front end {frontend!r}; there are {', '.join(map(repr, FRONTENDS))}"
        raise ValueError(msg)
    given = bool(args or kwargs)
    if frontend == "execution" and not given and inspect.signature(model.forward).parameters:
        msg = "tracing by execution runs the model, so it needs an input: fxray.trace(model, x)"
        raise TraceError(msg)
    with _LOCK:
        if frontend == "symbolic" or (frontend is None and not given):
            return _trace_symbolically(model, args, kwargs or {})
        return _trace_by_execution(model, args, kwargs or {})


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = f"a {type(model).__qualname__}"
        if isinstance(model, type):
            what = f"the class {model.__qualname__}; pass an instance: {model.__qualname__}(…)"
        msg = f"fxray traces a torch.nn.Module, and this is {what}"
        raise TypeError(msg)
    if getattr(model, "_orig_mod", None) is not None:
        msg = "this model is compiled; trace the model itself, then compile what rewrite() gives"
        raise TraceError(msg)
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        msg = f"{lazy[0]!r} has no shape yet, for the model is lazy; run it once first: model(x)"
        raise TraceError(msg)


# ---------------------------------------------------------------------- by execution


def _trace_by_execution(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, free_batch: bool = True
) -> Traced:
    example = Example.of(model, args, kwargs, free_batch=free_batch)
    written: dict[str, WrittenGraph] = {}
    fixed: list[str] = []
    batch_is_free = example.batch is not None
    for mode in MODES:
        first, reason = _write_mode(model, example, training=mode == MODES[0])
        written[mode] = first
        if reason is not None:
            batch_is_free = False
            fixed.append(f"batch size fixed in {mode} mode ({reason})")
    if example.batch is None:
        why = "the inputs share no dim 0" if free_batch else "a batch of 1 takes other branches"
        fixed.append(f"batch size fixed ({why})")
    graphs = {mode: w.graph for mode, w in written.items()}
    name_ops(graphs)
    call = with_free_batch(example.call, example.batch) if batch_is_free else example.call
    call = with_exact(call, example.tensors, written)
    autocast = autocast_state() if any("dtype" in w.reads for w in written.values()) else {}
    programs = {
        mode: Program(w.graph, call, _renamed(w, mode), w.attributes, autocast)
        for mode, w in written.items()
    }
    module = TracedModule(model, programs)
    verified = _verify(model, module, example, example.base if batch_is_free else example.batch)
    if batch_is_free and example.batch != example.base and not _runs(model, module, example):
        return _trace_by_execution(model, args, kwargs, free_batch=False)
    report = Report(
        "execution",
        {mode: count_ops(graph) for mode, graph in graphs.items()},
        ("batch size",) if batch_is_free else (),
        tuple(fixed),
        tuple(dict.fromkeys(guards_in(graphs))),
        sum(baked_values(w.constants) for w in written.values()),
        verified,
        tuple(dict.fromkeys(note for w in written.values() for note in _notes(model, w))),
    )
    returns = {mode: w.returns for mode, w in written.items()}
    return Traced(model, module, architecture_of(model, graphs, returns), report)


def _write_mode(
    model: nn.Module, example: Example, *, training: bool
) -> tuple[WrittenGraph, str | None]:
    """Return the graph of one mode and why the batch is not free in it, if it is not.

    Two more traces, at the next batch size and at a far one and with other random numbers,
    show what follows the batch. Where the two differ, another at the first size tells a batch
    that matters from a forward that draws its own random numbers in Python.
    """
    batch, base = example.batch, example.base
    first = _write(model, example, base, seed=0, training=training)
    if batch is None or base is None:
        return first, None
    try:
        second = _write(model, example, base + 1, seed=1, training=training)
        apart = difference(first, second)
        if apart is None:
            # `int(n / 4)` is the same number for neighbours.
            third = _write(model, example, far_from(base), seed=2, training=training)
            apart = difference(first, third)
    except Exception as error:  # noqa: BLE001 - whatever the model raises at another batch size
        apart = f"with another number of rows: {first_line(error)}"
    if apart is None:
        drop_settled_guards(first, second)
        return first, None
    own = first if base == batch else _write(model, example, batch, seed=0, training=training)
    again = _write(model, example, batch, seed=1, training=training)
    random = difference(own, again)
    if random is not None:
        raise refused_randomness(model, random)
    return own, apart


def _verify(model: nn.Module, module: nn.Module, example: Example, size: int | None) -> str:
    """Return how the traced module compares with the model, in words.

    Raises:
        TraceError: it computes something else.
    """

    def call(which: nn.Module) -> Any:
        _, args, kwargs = example.sized(size)
        return which(*args, **kwargs)

    found = []
    for mode in MODES:
        training = mode == MODES[0]
        against = compare(model, module, call, training=training, protect=example.written)
        if against.wrong:
            itself = compare(model, model, call, training=training, protect=example.written)
            if not itself.wrong:
                msg = (
                    f"{type(model).__name__} was traced, but in {mode} mode the graph computes "
                    f"something else than the model ({against}); it is not used"
                )
                raise TraceError(msg)
            return "not verified: the model gives other numbers each time, for one input and seed"
        found.append(against)
    return str(next((c for c in found if not c.equal), found[0]))


def _runs(model: nn.Module, module: nn.Module, example: Example) -> bool:
    """Return whether the module takes the example as it was given: one row, not two."""

    def call(which: nn.Module) -> Any:
        _, args, kwargs = example.sized(None)
        return which(*args, **kwargs)

    for mode in MODES:
        training = mode == MODES[0]
        try:
            compare(model, model, call, training=training, protect=example.written)
        except Exception:  # noqa: BLE001, S112 - BatchNorm, say: nothing to agree with
            continue
        try:
            found = compare(model, module, call, training=training, protect=example.written)
        except SpecialisationError:
            return False
        if found.wrong:
            return False
    return True


def _write(
    model: nn.Module, example: Example, size: int | None, *, seed: int, training: bool
) -> WrittenGraph:
    state = ModelState(model)
    tensors, args, kwargs = example.sized(size)
    try:
        with preserved_rng(seed), training_flags(model, training=training), torch.enable_grad():
            writer = GraphWriter(model, state)
            return writer.write_call(example.call, tensors, lambda: model(*args, **kwargs))
    except TraceError:
        raise
    except Exception as error:
        mode = mode_name(training=training)
        shapes = ", ".join(f"{leaf.path} {leaf.spec}" for leaf in example.call.tensor_leaves)
        shapes = shapes or "which holds no tensor"
        what = f"{type(model).__name__} itself fails on this input in {mode} mode ({shapes})"
        msg = f"{what}: {first_line(error)}"
        raise TraceError(msg) from error
    finally:
        example.written.extend(state.protected())
        state.restore()


def _renamed(written: WrittenGraph, mode: str) -> dict[str, Any]:
    """Return the constants under names of the mode's own: both modes share one module."""
    renamed = {}
    for node in written.graph.nodes:
        if node.op == "get_attr" and node.target in written.constants:
            name = f"_{mode}{node.target}"
            renamed[name] = written.constants[node.target]
            node.target = name
    return renamed


def _notes(model: nn.Module, written: WrittenGraph) -> list[str]:
    notes = [*written.notes]
    fused = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    if any(isinstance(model.get_submodule(path), fused) for path in written.inlined):
        # As with hooks on its parts, for which torch itself leaves the fused kernel out.
        notes.append("nn.TransformerEncoder runs op by op, in inference too (no fused kernel)")
    hooked = [path or "the model" for path in written.inlined if _hooked(model, path)]
    if hooked:
        notes.append(
            f"forward hooks of {', '.join(hooked)} are in the graph as far as they compute with "
            "torch; what else they do is not repeated"
        )
    return notes


def _hooked(model: nn.Module, path: str) -> bool:
    return has_forward_hooks(model.get_submodule(path))


# ---------------------------------------------------------------------- by torch.fx


def _trace_symbolically(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
    written = write_symbolically(model)
    graphs = {mode: w.graph for mode, w in written.items()}
    name_ops(graphs)
    programs = {
        mode: Program(w.graph, open_call(model), _renamed(w, mode), w.attributes)
        for mode, w in written.items()
    }
    module = TracedModule(model, programs)
    verified = Report("symbolic", {}).verified
    if args or kwargs:
        example = Example.of(model, args, kwargs)
        verified = _verify(model, module, example, example.base)
    counts = {mode: count_ops(graph) for mode, graph in graphs.items()}
    notes = tuple(dict.fromkeys(note for w in written.values() for note in w.notes))
    constants = sum(baked_values(w.constants) for w in written.values())
    report = Report("symbolic", counts, constants=constants, verified=verified, notes=notes)
    returns = {mode: w.returns for mode, w in written.items()}
    return Traced(model, module, architecture_of(model, graphs, returns), report)
