"""A call that no graph was traced for: a size shown free, or one more graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.errors import NoGraphError, SpecialisationError, first_line
from fxray.tracing.alone import How
from fxray.tracing.batch import Apart, difference, far_from, tiled
from fxray.tracing.call import CallSpec, OpenCall
from fxray.tracing.example import Example, Size
from fxray.tracing.program import MODES, Runner
from fxray.tracing.showing import program_of, show, takes, verify
from fxray.tracing.verify import Trial
from fxray.tracing.writing import run_alone, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fxray.tracing.family import Family
    from fxray.tracing.written import WrittenGraph

__all__ = ["SHOWN", "grow"]

SHOWN = 3
"""At how many sizes a graph must be the same for the size to be free."""


def grow(family: Family, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Runner:
    """Trace a call once more and return what runs it, by a graph now in the family.

    Raises:
        NoGraphError: no graph can hold it.
        TraceError: the model itself fails on it.
    """
    # Before inference mode is left, for that switches autograd on.
    how = How(training=mode == MODES[0], grad=torch.is_grad_enabled())
    with torch.inference_mode(mode=False):
        example = Example.of(family.model, args, kwargs)
        return (
            _shown_right(family, mode, example, how)
            or _shown_free(family, mode, example, how)
            or _one_more(family, mode, example, how)
        )


def _shown_right(family: Family, mode: str, example: Example, how: How) -> Runner | None:
    """Return the graph that was traced without an input, if it is right for this call.

    One that is not leaves the family.
    """
    for runner in family.of(mode):
        program, call = runner.program, runner.program.call
        if not isinstance(call, OpenCall) or runner.watch.changed() is not None:
            continue
        if call.takes(example.arguments):
            right = attrs.evolve(program, call=call.with_shown(example.arguments, SHOWN))
            runner = family.replace(program, right)  # noqa: PLW2901 - the same, which takes it
            try:
                verify(family.model, _product(runner), example, Trial(how, {}))
            except (NoGraphError, SpecialisationError) as error:
                family.drop(right, f"{first_line(error)}. It was traced without an input")
                continue
            except Exception:  # noqa: BLE001 - a wrong graph may raise anything, so may the model
                family.replace(right, program)
                run_alone(family.model, example, {}, how)
                continue
            return runner
    return None


def _product(runner: Runner) -> Callable[..., Any]:
    def product(*args: Any, **kwargs: Any) -> Any:
        return runner.run(runner.inputs(args, kwargs))

    return product


def _shown_free(family: Family, mode: str, example: Example, how: How) -> Runner | None:
    """Return the graph that the call differs from in sizes alone, if its graph is the same."""
    candidates = [
        (runner.program, call, varying)
        for runner in family.of(mode)
        if isinstance(call := runner.program.call, CallSpec)
        and runner.watch.changed() is None
        and (varying := call.varying(example.arguments))
    ]
    if not candidates:
        return None
    written = write(family.model, example, {}, how)
    for program, call, varying in candidates:
        before = attrs.evolve(written, graph=program.graph, constants=dict(program.constants))
        if difference(before, written) is None:
            taken = call.with_shown(varying, free_after=SHOWN)
            grown = taken.grown_since(call)
            if grown:
                far = _far(example, taken, grown)
                apart = _apart_at(family, example, far, before, how)
                if apart is not None and apart.by_branch:
                    # With slices left out `mask.all()` may come out otherwise; with all, hardly.
                    whole = {size: tiled(size.given) for size in far}
                    apart = _apart_at(family, example, whole, before, how)
                if apart is not None:
                    taken = taken.with_fixed(grown)
            return family.replace(program, attrs.evolve(program, call=taken))
    return None


def _far(example: Example, taken: CallSpec, grown: Sequence[tuple[int, int]]) -> dict[Size, int]:
    """Return a size far from all that calls came with, for each that seems to be free.

    `n // 8` is one number for many neighbours: three sizes that agree show little.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for index, dim in grown:
        places.setdefault(example.tensors[index].shape[dim], []).append((index, dim))
    far = {}
    for n, dims in places.items():
        largest = max(max(taken.tensor_leaves[index].shown[dim]) for index, dim in dims)
        far[Size(f"size {n}", n, tuple(dims))] = far_from(largest)
    return far


def _apart_at(
    family: Family,
    example: Example,
    sizes: Mapping[Size, int],
    before: WrittenGraph,
    how: How,
) -> Apart | None:
    """Return where a graph differs at other sizes of the example's call."""
    try:
        other = write(family.model, example, sizes, attrs.evolve(how, seed=1))
    except Exception as error:  # noqa: BLE001 - whatever the model raises at another size
        return Apart(first_line(error))
    return difference(before, other)


def _one_more(family: Family, mode: str, example: Example, how: How) -> Runner:
    """Return a further graph of the mode, for calls such as this one."""
    model = family.model
    shown = show(model, example, how)
    name = family.new_name(mode)
    family.survey.learn(shown.written, mode)
    program = program_of(name, shown, example)
    runner = Runner(program, model, family.signature)
    product = _product(runner)
    found = verify(model, product, example, Trial(how, example.base, gradients=how.training))
    if found.wrong:
        msg = "the model gives other numbers each time, for one input and seed"
        raise NoGraphError(msg)
    odd = [size for size in shown.free if size.base != size.given]
    if odd and not takes(model, product, example, [mode]):
        return _one_more(family, mode, example.without(odd), how)
    return family.add(program)
