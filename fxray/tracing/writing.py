"""One call of a model, run once or a few times without side effects, becomes a program."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.errors import NoGraphError, SpecialisationError, TraceError, first_line
from fxray.torch_private import has_forward_hooks
from fxray.tracing.assignments import ChangedAttributesError
from fxray.tracing.batch import difference, far_from, mark_live_guards
from fxray.tracing.conditions import Watch
from fxray.tracing.effects import write_effects
from fxray.tracing.example import with_free
from fxray.tracing.execution import GraphWriter
from fxray.tracing.grounds import State
from fxray.tracing.patches import refused_randomness
from fxray.tracing.program import MODES, Program, mode_name
from fxray.tracing.state import ModelState, alone, python_rng
from fxray.tracing.verify import Comparison, compare
from fxray.tracing.written import WrittenGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from fxray.tracing.example import Example, Size

__all__ = ["Shown", "notes_on", "program_of", "run_alone", "show", "takes", "verify", "write"]


@attrs.frozen(eq=False)
class Shown:
    """What tracing one mode at several sizes gave.

    Attributes:
        written: the graph, at the base sizes.
        free: the sizes that it follows.
        fixed: why the others are not free, one sentence each.
    """

    written: WrittenGraph
    free: tuple[Size, ...]
    fixed: tuple[str, ...]


def write(
    model: nn.Module,
    example: Example,
    sizes: Mapping[Size, int],
    *,
    seed: int,
    training: bool,
    grad: bool = True,
) -> WrittenGraph:
    """Return the graph of the example's call at these sizes, in one mode.

    Raises:
        NoGraphError: the forward does what no graph can hold; names file and line.
        TraceError: the model itself fails on this input.
    """
    how = _How(sizes, seed, training, grad)
    while True:
        try:
            return _write(model, example, how)
        except ChangedAttributesError as change:
            new = change.numbers - how.live
            if not new and how.settled:
                raise
            # Numbers are read and set by the graph; what stays as it is after a first call
            # (a flag, hooks hung on once) is looked at as it is then.
            how = attrs.evolve(how, live=how.live | new, settled=how.settled or not new)


@attrs.frozen
class _How:
    """How one call is run to be written.

    Attributes:
        sizes: those of the input.
        seed: of the random numbers.
        training: the mode.
        grad: whether autograd is on.
        live: (path, name) of the numbers on modules that the graph reads and sets.
        settled: whether the model runs once before.
    """

    sizes: Mapping[Size, int]
    seed: int
    training: bool
    grad: bool
    live: frozenset[tuple[str, str]] = frozenset()
    settled: bool = False


def _write(model: nn.Module, example: Example, how: _How) -> WrittenGraph:
    tensors, args, kwargs = example.sized(how.sizes)
    seed, training, grad = how.seed, how.training, how.grad
    with alone(model, seed=seed, training=training) as state, torch.set_grad_enabled(grad):
        try:
            if how.settled:
                _settle(model, example, how, state)
                state = ModelState(model)  # noqa: PLW2901 - the first one puts all back
            writer = GraphWriter(model, state, how.live)
            drawn = python_rng()
            written = writer.write_call(example.call, tensors, lambda: model(*args, **kwargs))
            if python_rng() != drawn:
                raise refused_randomness(model, "Python's or numpy's random state moved on")
            writes = tuple(state.changed_tensors())

            def run_again() -> ModelState:
                between = ModelState(model)
                _, more, named = example.sized(how.sizes)
                model(*more, **named)
                return between

            notes = write_effects(writer, written, state, run_again)
            written = attrs.evolve(written, writes=writes, notes=notes)
            reason = None
        except TraceError:
            raise
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            reason = error
        finally:
            example.written.extend(state.protected())
    if reason is None and writer.noted is not None:
        held = {str(n.target) for n in written.graph.nodes if n.op == "get_attr"}
        state_now = State.of(
            model, writer.noted, inlined=written.inlined, properties=written.reads, tensors=held
        )
        if how.settled:
            state_now = _as_it_is(model, state_now)
        return attrs.evolve(written, state=state_now)
    run_alone(model, example, how.sizes, seed=seed, training=training, grad=grad)
    what = f"{type(model).__name__} runs by itself and fails while it is traced"
    msg = f"{what}: {type(reason).__name__}: {first_line(reason)}" if reason else what
    raise NoGraphError(msg) from reason


def _settle(model: nn.Module, example: Example, how: _How, state: ModelState) -> None:
    """Run the model once, so that what a first call does is done.

    Raises:
        NoGraphError: a first call writes tensors that the next one does not.
    """
    _, args, kwargs = example.sized(how.sizes)
    model(*args, **kwargs)
    first = set(state.changed_tensors())
    again = ModelState(model)
    _, args, kwargs = example.sized(how.sizes)
    model(*args, **kwargs)
    if state.keeps_tensors() or not first <= set(again.changed_tensors()):
        what = f"the first forward of {type(model).__name__} writes tensors that the next does not"
        msg = f"{what}; run the model once before it is traced"
        raise NoGraphError(msg)


def _as_it_is(model: nn.Module, state: State) -> State:
    """Return the state without what only a first call sets: it holds before and after."""
    held = [read for read in state.reads if Watch(model, State((read,))).changed() is None]
    return attrs.evolve(state, reads=tuple(held))


def run_alone(
    model: nn.Module,
    example: Example,
    sizes: Mapping[Size, int],
    *,
    seed: int,
    training: bool,
    grad: bool = True,
) -> None:
    """Run the model by itself.

    Raises:
        TraceError: it fails on this input, by itself.
    """
    _, args, kwargs = example.sized(sizes)
    with alone(model, seed=seed, training=training) as state, torch.set_grad_enabled(grad):
        for tensor in example.written:
            state.protect(tensor)
        try:
            model(*args, **kwargs)
        except Exception as error:
            mode = mode_name(training=training)
            shapes = ", ".join(f"{leaf.path} {leaf.spec}" for leaf in example.call.tensor_leaves)
            shapes = shapes or "which holds no tensor"
            what = f"{type(model).__name__} itself fails on this input in {mode} mode ({shapes})"
            msg = f"{what}: {first_line(error)}"
            raise TraceError(msg) from error


def show(model: nn.Module, example: Example, *, training: bool, grad: bool = True) -> Shown:
    """Trace one mode, and show which of the example's sizes its graph follows.

    Two more traces for each size, at the next one and at a far one and with other random
    numbers, show what follows it. Where two differ, another at the first sizes tells a
    size that matters from a forward that draws its own random numbers in Python.

    Raises:
        NoGraphError: the forward does what no graph can hold.
    """

    def at(sizes: Mapping[Size, int], seed: int) -> WrittenGraph:
        return write(model, example, sizes, seed=seed, training=training, grad=grad)

    def beside(sizes: Mapping[Size, int], seed: int) -> WrittenGraph:
        with contextlib.suppress(Exception), _saving_nothing() as asked:
            found = at(sizes, seed)
            if not asked:
                return found
        return at(sizes, seed)  # it takes gradients itself, or fails in any case

    base = example.base
    first = at(base, seed=0)
    if not example.sizes:
        return Shown(_steady(model, first, lambda seed: at(base, seed)), (), ())
    free: list[Size] = []
    fixed: list[str] = []
    for size in example.sizes:
        apart = None
        try:
            # `int(n / 4)` is the same number for neighbours.
            for seed, n in enumerate((size.base + 1, far_from(size.base)), start=1):
                other = beside(base | {size: n}, seed)
                apart = difference(first, other)
                if apart is not None:
                    break
                mark_live_guards(first, other)
        except NoGraphError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the model raises at another size
            apart = f"with another one: {first_line(error)}"
        if apart is None:
            free.append(size)
            continue
        steady = _steady(model, first, lambda seed: at(base, seed))
        if steady is not first:  # a cache of Python's was filled: now it is
            return show(model, example, training=training, grad=grad)
        fixed.append(f"{size.what} fixed in {mode_name(training=training)} mode ({apart})")
    odd = [size for size in example.sizes if size not in free and size.base != size.given]
    if odd:
        rest = show(model, example.without(odd), training=training, grad=grad)
        return attrs.evolve(rest, fixed=(*fixed, *rest.fixed))
    return Shown(first, tuple(free), tuple(fixed))


@contextlib.contextmanager
def _saving_nothing() -> Iterator[list[Any]]:
    """Let ops save nothing for backward: a trace that is only compared never gets there.

    At the far size it would be more than a training step holds. Yields what was asked for
    all the same.
    """
    asked: list[Any] = []

    def refuse(saved: Any) -> torch.Tensor:
        asked.append(saved)
        msg = "nothing was saved for backward"
        raise RuntimeError(msg)

    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, refuse):
        yield asked


def _steady(
    model: nn.Module, first: WrittenGraph, again: Callable[[int], WrittenGraph]
) -> WrittenGraph:
    """Return the trace that other random numbers give again; refuse one that they change.

    The first trace may have filled a cache (`lru_cache`) that the next ones find.
    """
    second = again(1)
    if difference(first, second) is None:
        return first
    third = again(2)
    random = difference(second, third)
    if random is not None:
        raise refused_randomness(model, random)
    return second


def program_of(
    name: str, shown: Shown, example: Example, *, free: tuple[Size, ...] | None = None
) -> Program:
    """Return the program of what was shown.

    Args:
        name: of the program, which its constants are named by: all share one module.
        shown: what tracing gave.
        example: the call it was traced for.
        free: the sizes to leave free; all that were shown, unless given.
    """
    written = shown.written
    call = with_free(example.call, shown.free if free is None else free)
    call = call.exact(example.tensors, written.reads)
    return Program(
        name,
        written.graph,
        call,
        written.named_for(name),
        written.state,
        written.writes,
        written.inputs,
    )


def verify(
    model: nn.Module,
    product: Callable[..., Any],
    example: Example,
    sizes: Mapping[Size, int],
    *,
    training: bool,
    grad: bool = True,
    gradients: bool = True,
) -> Comparison:
    """Return how `product` compares with the model on the example's call.

    Raises:
        NoGraphError: it computes something else.
    """

    def call(which: Callable[..., Any]) -> Any:
        _, args, kwargs = example.sized(sizes)
        return which(*args, **kwargs)

    def against(other: Callable[..., Any]) -> Comparison:
        with torch.set_grad_enabled(grad):
            return compare(
                model,
                other,
                call,
                training=training,
                protect=example.written,
                gradients=grad and gradients,
            )

    found = against(product)
    if not found.wrong:
        return found
    itself = against(model)
    if itself.wrong:
        return itself
    mode = mode_name(training=training)
    msg = (
        f"{type(model).__name__} was traced, but in {mode} mode the graph computes "
        f"something else than the model ({found}); it is not used"
    )
    raise NoGraphError(msg)


def takes(
    model: nn.Module,
    product: Callable[..., Any],
    example: Example,
    modes: Iterable[str] = MODES,
) -> bool:
    """Return whether the product takes the example as it was given: one row, not two."""
    for mode in modes:
        training = mode == MODES[0]
        try:
            run_alone(model, example, {}, seed=0, training=training)
        except TraceError:  # BatchNorm, say: nothing to agree with
            continue
        try:
            verify(model, product, example, {}, training=training)
        except (SpecialisationError, NoGraphError):
            return False
    return True


def notes_on(model: nn.Module, written: WrittenGraph) -> list[str]:
    """Return what a user must know of a graph, as sentences without a capital."""
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
