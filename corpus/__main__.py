"""Check the corpus from a terminal.

    python -m corpus [--set traps|transformers|torchvision|all] [--only NAME …] [--jobs N]

One line for each model: the front end that its trace took, ops in training and in eval, the time
of the trace in eager steps (one forward and backward), and what does not hold. Then the totals.
The exit status is 1 if anything failed, or if a model that must become a graph did not.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import sys
import warnings
from typing import TYPE_CHECKING

import attrs

from corpus import traps
from corpus.checks import Outcome, check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from corpus.case import Case

_SETS = ("traps", "transformers", "torchvision")
_MOST_TOLD = 110


def gathered(which: str) -> dict[str, Case]:
    """Return the cases of a set, by name; those whose library is missing are left out."""
    cases: list[Case] = []
    if which in ("traps", "all"):
        cases += traps.CASES
    if which in ("transformers", "all") and _is_there("transformers", "corpus.architectures"):
        cases += importlib.import_module("corpus.architectures").CASES
    if which in ("torchvision", "all") and _is_there("torchvision", "corpus.torchvision_models"):
        cases += importlib.import_module("corpus.torchvision_models").VISION_CASES
    return {case.name: case for case in cases}


def _is_there(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


@functools.cache
def _everything() -> dict[str, Case]:
    return gathered("all")


def checked(name: str) -> Outcome:
    """Check one case by its name, so that another process can; an error is a failure."""
    case = _everything()[name]
    try:
        outcome = check(case)
    except Exception as error:  # noqa: BLE001 - one case must not end the others
        return Outcome(name, "not traced", failures=(f"the check broke: {error!r}",))
    if case.graph and outcome.frontend == "interposed":
        missed = f"a graph was expected, the trace gave {outcome.frontend}"
        return attrs.evolve(outcome, failures=(missed, *outcome.failures))
    return outcome


def _outcomes(names: Sequence[str], jobs: int) -> Iterator[Outcome]:
    if jobs <= 1:
        yield from map(checked, names)
        return
    # Not forked: torch's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        yield from pool.map(checked, names)


def _row(outcome: Outcome) -> tuple[str, ...]:
    ratio = outcome.trace_seconds / outcome.step_seconds
    ops = "/".join(str(outcome.ops.get(mode, "–")) for mode in ("train", "eval"))
    told = " | ".join(outcome.failures) or "ok"
    return (outcome.name, outcome.frontend, ops, "–" if ratio != ratio else f"{ratio:.0f}×", told)  # noqa: PLR0124 - NaN


def _printer() -> Callable[[str], None]:
    if not (importlib.util.find_spec("rich") and sys.stdout.isatty()):
        return functools.partial(print, flush=True)
    from rich.console import Console

    return functools.partial(Console().print, markup=False, soft_wrap=True)


def _shown(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Print a table, each line as it comes; with rich's colours where there is rich."""
    seen = []
    line = "{:<32} {:<10} {:>9} {:>6}  {}"
    say = _printer()
    say(line.format("model", "front end", "ops", "trace", "checks"))
    for outcome in outcomes:
        seen.append(outcome)
        *rest, told = _row(outcome)
        told = told if len(told) <= _MOST_TOLD else f"{told[: _MOST_TOLD - 1]}…"
        say(line.format(*rest, told))
    return seen


def _totals(outcomes: Sequence[Outcome]) -> list[str]:
    fronts = collections.Counter(outcome.frontend for outcome in outcomes)
    graphs = fronts["execution"] + fronts["symbolic"]
    wrong = [outcome.name for outcome in outcomes if outcome.wrong]
    failed = [outcome for outcome in outcomes if outcome.failures]
    share = f"{100 * graphs / max(1, len(outcomes)):.0f} %"
    others = ", ".join(f"{fronts[front]} {front}" for front in ("interposed", "refused"))
    lost = fronts["not traced"]
    return [
        f"{len(outcomes)} models: {graphs} graphs ({share}), {others}, {lost} not to be run",
        f"{len(wrong)} SILENTLY WRONG{': ' if wrong else ''}{', '.join(wrong)}",
        f"{len(outcomes) - len(failed)} hold to every check, {len(failed)} do not",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=(*_SETS, "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--full", action="store_true", help="tell every failure and note in full")
    given = parser.parse_args(arguments)
    cases = gathered(given.set)
    unknown = sorted(set(given.only or ()) - set(cases))
    if unknown:
        parser.error(f"no model {', '.join(unknown)} in {given.set}; it has {', '.join(cases)}")
    outcomes = _shown(_outcomes(given.only or list(cases), given.jobs))
    if given.full:
        for outcome in outcomes:
            for text in (*outcome.failures, *(f"note: {note}" for note in outcome.notes)):
                print(f"{outcome.name}: {text}")
    print()
    print("\n".join(_totals(outcomes)))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        sys.exit(main())
