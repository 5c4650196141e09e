"""Traces at several sizes, put beside one another: a program, and the calls it is shown for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from fxray.errors import NoGraphError, SpecialisationError, TraceError, first_line
from fxray.torch_private import has_forward_hooks
from fxray.tracing.alone import How
from fxray.tracing.batch import Apart, difference, far_from, mark_live_guards, tiled
from fxray.tracing.example import Example, Size, with_free
from fxray.tracing.patches import refused_randomness
from fxray.tracing.program import MODES, Program, mode_name
from fxray.tracing.verify import Comparison, Trial, compare
from fxray.tracing.writing import run_alone, write
from fxray.tracing.written import WrittenGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["Shown", "notes_on", "program_of", "show", "takes", "verify"]


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


def show(model: nn.Module, example: Example, how: How) -> Shown:
    """Trace one mode, and show which of the example's sizes its graph follows.

    Two more traces for each size, at the next one and at a far one and with other random
    numbers, show what follows it. Where two differ, another at the first sizes tells a
    size that matters from a forward that draws its own random numbers in Python.

    Raises:
        NoGraphError: the forward does what no graph can hold.
    """
    one = _Showing(model, example, how)
    first = one.at(example.base, seed=0)
    if not example.sizes:
        return Shown(one.steady(first), (), ())
    free: list[Size] = []
    fixed: list[str] = []
    for size in example.sizes:
        apart = one.apart(first, size)
        if apart is None:
            free.append(size)
            continue
        if one.steady(first) is not first:  # a cache of Python's was filled: now it is
            return show(model, example, how)
        fixed.append(f"{size.what} fixed in {mode_name(training=how.training)} mode ({apart})")
    odd = [size for size in example.sizes if size not in free and size.base != size.given]
    if odd:
        rest = show(model, example.without(odd), how)
        return attrs.evolve(rest, fixed=(*fixed, *rest.fixed))
    return Shown(first, tuple(free), tuple(fixed))


@attrs.frozen(eq=False)
class _Showing:
    """The traces of one call in one mode, at several sizes."""

    model: nn.Module
    example: Example
    how: How

    def at(self, sizes: Mapping[Size, int], seed: int) -> WrittenGraph:
        """Return the graph at these sizes."""
        return write(self.model, self.example, sizes, attrs.evolve(self.how, seed=seed))

    def beside(self, sizes: Mapping[Size, int], seed: int) -> WrittenGraph:
        """Return the graph at these sizes, which is only compared."""
        with contextlib.suppress(Exception), _saving_nothing() as asked:
            found = self.at(sizes, seed)
            if not asked:
                return found
        return self.at(sizes, seed)  # it takes gradients itself, or fails in any case

    def apart(self, first: WrittenGraph, size: Size) -> Apart | None:
        """Return where another size makes another graph, None where none does.

        Raises:
            NoGraphError: there the forward does what no graph can hold.
        """
        base = size.base
        try:
            # `int(n / 4)` is the same number for neighbours.
            found = self._apart_at(first, size, base + 1)
            found = found or self._apart_at(first, size, far_from(base))
            if found is not None and found.by_branch and far_from(base) < base:
                # With slices left out `mask.all()` may come out otherwise; with all, hardly.
                found = self._apart_at(first, size, tiled(base))
        except NoGraphError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the model raises at another size
            return Apart(f"with another one: {first_line(error)}")
        return found

    def _apart_at(self, first: WrittenGraph, size: Size, n: int) -> Apart | None:
        other = self.beside(self.example.base | {size: n}, seed=1 + n)
        found = difference(first, other)
        if found is None:
            mark_live_guards(first, other)
        return found

    def steady(self, first: WrittenGraph) -> WrittenGraph:
        """Return the trace that other random numbers give again; refuse one that they change.

        The first trace may have filled a cache (`lru_cache`) that the next ones find.
        """
        second = self.at(self.example.base, seed=1)
        if difference(first, second) is None:
            return first
        random = difference(second, self.at(self.example.base, seed=2))
        if random is not None:
            raise refused_randomness(self.model, str(random))
        return second


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
    model: nn.Module, product: Callable[..., Any], example: Example, trial: Trial
) -> Comparison:
    """Return how `product` compares with the model on the example's call.

    Raises:
        NoGraphError: it computes something else.
    """
    found = compare(model, product, example, trial)
    if not found.wrong:
        return found
    itself = compare(model, model, example, trial)
    if itself.wrong:
        return itself
    mode = mode_name(training=trial.how.training)
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
    *,
    or_refuses: bool = False,
) -> bool:
    """Return whether the product is right for the example as it was given: one row, not two.

    With `or_refuses` a guard may also say that it is not: such a call gets its own graph.
    """
    for mode in modes:
        how = How(training=mode == MODES[0])
        try:
            run_alone(model, example, {}, how)
        except TraceError:  # BatchNorm, say: nothing to agree with
            continue
        try:
            verify(model, product, example, Trial(how, {}))
        except SpecialisationError:
            if not or_refuses:
                return False
        except NoGraphError:
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
