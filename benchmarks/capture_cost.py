"""What recording costs a training step, beside what else there is.

    python -m benchmarks.capture_cost [--pairs 200] [--models …] [--ways …] [--write PAGE]

Each model is trained in many ways from the same weights on the same batch, in eager PyTorch and
under `torch.compile`; `benchmarks.ways` says which. A round times one step of each, in an order
drawn anew. Ratios are to the bare step of the same round, compiled ones to the compiled bare step:
the median over the rounds and, by bootstrap, the bounds it lies in with 95 % confidence.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch

from benchmarks.models import MODELS
from benchmarks.peers import PEERS, Remote, facts_of_torch
from benchmarks.sections import Section, as_markdown, local, with_peers
from benchmarks.ways import COMPILED, EAGER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Goal", "goals", "summary", "written"]

BEGIN, END = "<!-- the table -->", "<!-- the end of the table -->"
"""Between these two lines of a page the table is written."""

_LONG = 5.0
"""Milliseconds of a bare step from on which a bound on its ratio says something."""


# What is to be reached


@attrs.frozen
class Goal:
    """One figure of each model, and what it is to be.

    Attributes:
        what: is measured.
        target: in words, empty where there is none.
        running: which of a model's sections it is of.
        needs: the ways that it is made of.
        figure: returns its text, and whether it is reached; None where nobody asks.
    """

    what: str
    target: str
    running: str
    needs: tuple[str, ...]
    figure: Callable[[Section], tuple[str, bool | None]]


def _a_share(what: str, way: str, rival: str, most: float | None, *, a_site: bool = False) -> Goal:
    def figure(section: Section) -> tuple[str, bool | None]:
        share = section.share_a_site if a_site else section.share
        found = share(way, rival)
        return str(found), None if most is None else found.middle <= most

    return Goal(what, "" if most is None else f"≤ {most}", "eager", (way, rival), figure)


def _a_ratio(what: str, way: str, running: str, most: float | None) -> Goal:
    def figure(section: Section) -> tuple[str, bool | None]:
        found = section.ratio(way)
        return str(found), None if most is None else found.middle <= most

    return Goal(what, "" if most is None else f"≤ {most}", running, (way,), figure)


def _a_bound(what: str, way: str, running: str, most: float = 1.05) -> Goal:
    def figure(section: Section) -> tuple[str, bool | None]:
        found, each = section.ratio(way), section.microseconds(way)
        text = f"{found.high:.3f}, {each.middle:.1f} µs a site"
        return text, found.high <= most if section.milliseconds >= _LONG else None

    return Goal(what, f"upper bound ≤ {most}", running, (way,), figure)


def _counts(what: str, way: str) -> Goal:
    def figure(section: Section) -> tuple[str, bool | None]:
        graphs = section.graphs[way]
        text = f"{graphs.settled}, {graphs.breaks}, {graphs.recompiled}"
        return text, not graphs.breaks and not graphs.recompiled

    return Goal(what, "breaks 0, recompiled 0", "compiled", (way,), figure)


def _cost(what: str, way: str) -> Goal:
    return Goal(
        what, "", "eager", (way,), lambda section: (f"{section.microseconds(way).middle:.1f}", None)
    )


goals: Sequence[Goal] = (
    _cost("first element: µs a site", "fxray: first element"),
    _cost("… a hook pair that keeps it: µs a site", "hooks: first element"),
    *(
        _a_share(f"… as a share of {said}", "fxray: first element", rival, most, a_site=True)
        for said, rival, most in (
            ("a hook pair that keeps it", "hooks: first element", 0.25),
            ("a hook pair that does nothing", "hooks: nothing", None),
        )
    ),
    _a_share(
        "mean of every module: overhead over hooks'",
        "fxray: mean, modules alone",
        "hooks: mean",
        0.5,
    ),
    _a_share("… over lean hooks'", "fxray: mean, modules alone", "lean hooks: mean", None),
    _a_ratio("mean of every op: eager", "fxray: mean", "eager", None),
    _a_ratio("… to disk", "fxray: mean, to disk", "eager", None),
    _a_ratio("… compiled", "fxray: mean", "compiled", 1.2),
    _counts("… compiled: graphs, breaks, recompiled", "fxray: mean"),
    _a_share(
        "stats of every module: overhead over hooks'",
        "fxray: stats, modules alone",
        "hooks: stats",
        1.0,
    ),
    _a_share("stats of every op: overhead over mean's, eager", "fxray: stats", "fxray: mean", None),
    _a_ratio("… compiled", "fxray: stats", "compiled", None),
    _counts("… compiled: graphs, breaks, recompiled", "fxray: stats"),
    _a_bound("unmarked, eager", "fxray: unmarked", "eager"),
    _a_bound("unmarked, compiled", "fxray: unmarked", "compiled"),
    _a_bound("nothing due, eager", "fxray: nothing due", "eager"),
    _a_bound("nothing due, compiled", "fxray: nothing due", "compiled"),
)
"""The figures of the summary, in its order."""


def summary(sections: Iterable[Section]) -> list[list[str]]:
    """Return the table of all goals by model, with its head; ✓ reached, ✗ not reached."""
    by_model: dict[str, dict[str, Section]] = {}
    for section in sections:
        by_model.setdefault(section.model, {})[section.running] = section
    lines = [["", "target", *by_model]]
    for running in ("eager", "compiled"):
        steps = [
            f"{found[running].milliseconds:.2f}" if running in found else ""
            for found in by_model.values()
        ]
        if any(steps):
            lines.append([f"bare step, {running}: ms", "", *steps])
    for goal in goals:
        cells = [_cell(goal, found.get(goal.running)) for found in by_model.values()]
        if any(cells):
            lines.append([goal.what, goal.target, *cells])
    return lines


def _cell(goal: Goal, section: Section | None) -> str:
    if section is None or not all(way in section for way in goal.needs):
        return ""
    text, reached = goal.figure(section)
    return text if reached is None else f"{text} {'✓' if reached else '✗'}"


# What the others cannot do


def _facts(sections: Sequence[Section], told: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the table of peers, with its head, each with what it cannot do."""
    facts = {name: [*lines, *_seen(name, sections)] for name, lines in told.items()}
    return [["peer", "what it cannot do, as this run showed"]] + [
        [name, "; ".join(lines)] for name, lines in facts.items() if lines
    ]


def _seen(name: str, sections: Sequence[Section]) -> Iterable[str]:
    """Yield what the figures of a peer show that it cannot do."""
    ways = [
        (section, way)
        for section in sections
        for way in section.sites
        if way.startswith(f"{name}:")
    ]
    for model, ops, sites in dict.fromkeys(
        (section.model, section.sites["fxray: mean"], section.sites[way])
        for section, way in ways
        if section.running != "compiled" and "fxray: mean" in section
    ):
        if 0 < sites < ops:
            yield f"sees {sites} of the {ops} ops of the {model}"
    compiled = [(section, way, section.graphs[way]) for section, way in ways if section.graphs]
    if any(graphs.breaks for _, _, graphs in compiled):
        yield (
            f"compiled without `fullgraph`: {_span(g.breaks for _, _, g in compiled)} breaks, "
            f"{_span(g.compiled for _, _, g in compiled)} graphs"
        )
    shares = [section.kept[way] for section, way, _ in compiled if way in section.kept]
    if shares and min(shares) < 1:
        yield f"compiled, {_span(round(100 * share) for share in shares)} % of the values came"


def _span(values: Iterable[int]) -> str:
    found = sorted(values)
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


# The command


def _machine(threads: int) -> str:
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)} for torch"
    )


def written(page: str, text: str) -> str:
    """Return `page` with `text` between its two marks, in place of what stood there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        msg = f"the page has no lines {BEGIN!r} and {END!r}, between which the table goes"
        raise ValueError(msg)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _chosen(ways: Iterable[str], words: str) -> list[str]:
    """Return the ways that a word of `words` is in, and the bare one before them."""
    wanted = [word for word in words.split(",") if word]
    return [way for way in ways if way == "bare" or any(word in way for word in wanted or [""])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture_cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=200, help="rounds of each model (200)")
    parser.add_argument("--models", default=",".join(MODELS), help="names, joined by commas")
    parser.add_argument("--ways", default="", help="words of their names, joined by commas (all)")
    parser.add_argument("--running", default="eager,compiled,peers", help="which of these (all)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--write", type=Path, help="a page to write the tables into too")
    return parser


def _sections(given: argparse.Namespace, told: dict[str, list[str]]) -> Iterable[Section]:
    """Yield the sections in the order they are measured; note in `told` what peers cannot do."""
    running = given.running.split(",")
    for model in given.models.split(","):
        if "eager" in running:
            yield local(model, _chosen(EAGER, given.ways), given.pairs)
        if "compiled" in running:
            yield local(model, _chosen(COMPILED, given.ways), given.pairs, given.backend)
        if "peers" in running:
            yield _beside_peers(model, given, told)


def _beside_peers(model: str, given: argparse.Namespace, told: dict[str, list[str]]) -> Section:
    with contextlib.ExitStack() as stack:
        peers = {
            name: stack.enter_context(Remote(name, model))
            for name in PEERS
            if f"{name}: mean" in _chosen((f"{n}: mean" for n in PEERS), given.ways)
        }
        for name, peer in peers.items():
            peer.wait()
            lines = told.setdefault(name, [])
            if peer.skipped:
                lines += {f"{model} skipped, {peer.skipped}"} - {*lines}
        there = {name: peer for name, peer in peers.items() if not peer.skipped}
        section = with_peers(model, ["bare", "fxray: mean", "hooks: mean"], there, given.pairs)
        for name, peer in there.items():
            if not any(line.startswith("version") for line in told[name]):
                told[name] += [f"version {peer.version}", *peer.facts()]
        return section


def _measured(given: argparse.Namespace, told: dict[str, list[str]]) -> Iterable[Section]:
    """Yield the sections, and tell on the way which is done."""
    start = time.perf_counter()
    for section in _sections(given, told):
        seconds = time.perf_counter() - start
        print(f"{seconds:4.0f} s: {section.model}, {section.running}", file=sys.stderr)
        yield section


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables, and write them into a page if one is given."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    # What compiled hooks are told, round after round, is counted in the table.
    logging.getLogger("torch").setLevel(logging.ERROR)
    told: dict[str, list[str]] = {**facts_of_torch(MODELS[given.models.split(",")[-1]])}
    sections = [*_measured(given, told)]
    options = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.capture_cost", *options])
    parts = [
        f"`{command}`: {given.pairs} rounds.",
        f"{_machine(given.threads)}.",
        as_markdown(summary(sections)),
        *(
            f"**{section.model}, {section.running}**, bare step {section.milliseconds:.2f} ms\n\n"
            + as_markdown(section.lines())
            for section in sections
        ),
        as_markdown(_facts(sections, told)),
    ]
    text = "\n\n".join(parts)
    print(text)
    if given.write:
        page = given.write.read_text(encoding="utf-8")
        given.write.write_text(written(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
