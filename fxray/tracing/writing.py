"""One call of a model, run without side effects, becomes a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from torch import nn

from fxray.errors import NoGraphError, TraceError, first_line
from fxray.torch_private import pytree
from fxray.tracing.alone import How, alone, python_rng
from fxray.tracing.assignments import ChangedAttributesError
from fxray.tracing.batch import difference
from fxray.tracing.conditions import Watch
from fxray.tracing.effects import write_effects
from fxray.tracing.example import Example, Size
from fxray.tracing.execution import GraphWriter
from fxray.tracing.grounds import State
from fxray.tracing.patches import refused_randomness
from fxray.tracing.program import branches, can_be_put_back, mode_name
from fxray.tracing.state import ModelState

if TYPE_CHECKING:
    from fxray.tracing.attributes import Reads
    from fxray.tracing.written import WrittenGraph

__all__ = ["run_alone", "write"]

_SHIFTS = (1, 37)
"""What is added to a counter to see whether its graph follows it."""


def write(model: nn.Module, example: Example, sizes: Mapping[Size, int], how: How) -> WrittenGraph:
    """Return the graph of the example's call at these sizes, in one mode.

    Raises:
        NoGraphError: the forward does what no graph can hold; names file and line.
        TraceError: the model itself fails on this input.
    """
    one = _Try(model, example, sizes, how)
    while True:
        try:
            written = one.write()
            for shift in _SHIFTS if one.live else ():
                # As with sizes: what has lost its node is the same number whatever it came from.
                apart = difference(written, attrs.evolve(one, shift=shift).write())
                if apart is not None and not apart.by_guard:
                    where = ", ".join(f"{path}.{name}".strip(".") for path, name in one.live)
                    msg = f"a graph does not follow {where}, which the forward counts on: {apart}"
                    raise NoGraphError(msg)
            return written  # noqa: TRY300 - the loop ends here or tries again
        except ChangedAttributesError as change:
            new = change.numbers - one.live
            if not new and one.settled:
                raise
            # Numbers are read and set by the graph; what stays as it is after a first call
            # (a flag, hooks hung on once) is looked at as it is then.
            one = attrs.evolve(one, live=one.live | new, settled=one.settled or not new)


@attrs.frozen(eq=False)
class _Try:
    """One try at writing one call.

    Attributes:
        model: the model.
        example: the call.
        sizes: those of the input.
        how: the mode, autograd, random numbers.
        live: (path, name) of the numbers on modules that the graph reads and sets.
        settled: whether the model runs once before.
        shift: by how much those numbers are other than they are.
    """

    model: nn.Module
    example: Example
    sizes: Mapping[Size, int]
    how: How
    live: frozenset[tuple[str, str]] = frozenset()
    settled: bool = False
    shift: int = 0

    def write(self) -> WrittenGraph:
        """Return the graph, and all that is noted beside it."""
        model = self.model
        try:
            with alone(model, self.how) as state:
                written, reads = self._written(state)
        except TraceError:
            raise
        except Exception as error:
            run_alone(model, self.example, self.sizes, self.how)
            what = f"{type(model).__name__} runs by itself and fails while it is traced"
            msg = f"{what}: {type(error).__name__}: {first_line(error)}"
            raise NoGraphError(msg) from error
        held = {str(n.target) for n in written.graph.nodes if n.op == "get_attr"}
        under = State.of(
            model, reads, inlined=written.inlined, properties=written.reads, tensors=held
        )
        return attrs.evolve(written, state=_as_it_is(model, under) if self.settled else under)

    def _written(self, state: ModelState) -> tuple[WrittenGraph, Reads]:
        for tensor in self.example.written:
            state.protect(tensor)
        now = state
        if self.settled:
            self._settle(state)
            now = ModelState(self.model)
        self._shift()
        tensors, args, kwargs = self.example.sized(self.sizes)
        given = pytree.tree_flatten((args, kwargs))
        writer = GraphWriter(self.model, now, self.live)
        drawn = python_rng()
        try:
            written, reads = writer.write_call(
                self.example.call, tensors, lambda: self.model(*args, **kwargs)
            )
        finally:
            self.example.written.extend(now.protected())
        if python_rng() != drawn:
            raise refused_randomness(self.model, "Python's or numpy's random state moved on")
        if not _alike(given, pytree.tree_flatten((args, kwargs))):
            what = f"the forward of {type(self.model).__name__} changes a list or dict it is given"
            msg = f"{what}, which a graph does not"
            raise NoGraphError(msg)
        writes = tuple(now.changed_tensors())
        if not can_be_put_back(self.model, now, writes) and branches(written.graph):
            what = f"{type(self.model).__name__} branches, and draws from a generator of its own"
            msg = f"{what} or writes tensors in a container: a call could not begin again"
            raise NoGraphError(msg)
        notes = write_effects(writer, written, state, self._run_again)
        return attrs.evolve(written, writes=writes, notes=notes), reads

    def _shift(self) -> None:
        """Let the numbers that the graph reads of modules be others than they are."""
        for path, name in self.live:
            fields = vars(self.model.get_submodule(path))
            fields[name] = fields[name] + self.shift

    def _run_again(self) -> ModelState:
        """Run the model once more; return its state before that."""
        between = ModelState(self.model)
        _, args, kwargs = self.example.sized(self.sizes)
        self.model(*args, **kwargs)
        return between

    def _settle(self, state: ModelState) -> None:
        """Run the model once, so that what a first call does is done.

        Raises:
            NoGraphError: a first call writes tensors that the next one does not.
        """
        self._run_again()
        first = set(state.changed_tensors())
        between = self._run_again()
        if state.keeps_tensors() or not first <= set(between.changed_tensors()):
            what = f"the first forward of {type(self.model).__name__} writes tensors that the next"
            msg = f"{what} does not; run the model once before it is traced"
            raise NoGraphError(msg)


def _hint(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return what else the input may have been meant as, for the end of an error."""
    flat, _ = pytree.tree_flatten((args, dict(kwargs)))
    if any(isinstance(value, np.ndarray) for value in flat):
        return ". A numpy array is no tensor: torch.from_numpy(x)"
    if len(args) == 1 and not kwargs and isinstance(args[0], (tuple, list)):
        return ". Was each item meant as an argument? fxray.trace(model, *x)"
    if len(args) == 1 and not kwargs and isinstance(args[0], dict):
        return ". Was each item meant as an argument? fxray.trace(model, **x)"
    return ""


def _alike(before: tuple[list[Any], Any], after: tuple[list[Any], Any]) -> bool:
    return before[1] == after[1] and all(a is b for a, b in zip(before[0], after[0], strict=True))


def _as_it_is(model: nn.Module, state: State) -> State:
    """Return the state without what only a first call sets: it holds before and after."""
    held = [read for read in state.reads if Watch(model, State((read,))).changed() is None]
    return attrs.evolve(state, reads=tuple(held))


def run_alone(model: nn.Module, example: Example, sizes: Mapping[Size, int], how: How) -> None:
    """Run the model by itself.

    Raises:
        TraceError: it fails on this input, by itself.
    """
    _, args, kwargs = example.sized(sizes)
    with alone(model, how) as state:
        for tensor in example.written:
            state.protect(tensor)
        try:
            model(*args, **kwargs)
        except Exception as error:
            mode = mode_name(training=how.training)
            shapes = ", ".join(f"{leaf.path} {leaf.spec}" for leaf in example.call.tensor_leaves)
            shapes = shapes or "which holds no tensor"
            what = f"{type(model).__name__} itself fails on this input in {mode} mode ({shapes})"
            msg = f"{what}: {first_line(error)}{_hint(args, kwargs)}"
            raise TraceError(msg) from error
