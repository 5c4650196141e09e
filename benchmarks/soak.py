"""Whether memory stays flat however long is recorded, and nothing is left behind.

    python -m benchmarks.soak [--steps 10000] [--captures 50] [--compiled]

A small model is trained with captures at every step into a run folder. Memory is looked at from
the end of a warm-up on; after the recorder is closed, what is left of open files, threads and of
the model itself. Prints each figure with the most it may be; exits with 1 if one is more.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fxray

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Figure", "Memory", "grown", "soak", "told"]

_SAMPLES = 12
_WARM_UP = 0.5
"""The share of the steps after which memory is to be flat."""

_FORWARDS, _OF_A_FORWARD = 4096, 4.0
"""So many compiled forwards are remembered by number, with so many blocks of Python's each.

Until that is full, a step adds one; of ten thousand steps, half fill it.
"""

_RESIDENT, _RESIDENT_AT_ONCE = 256.0, 8 * 2**20
_OBJECTS, _OBJECTS_AT_ONCE = 0.2, 500.0
"""What memory may grow by at every step, and besides in the whole time: bytes, objects.

A number that is forgotten at every step is an object and a block or two of Python's; one at every
capture is fifty times that.
"""


_PATIENCE = 1.0
"""Seconds in which what is being closed is closed."""


@attrs.frozen
class Figure:
    """What was found, and the most it may be.

    Attributes:
        named: what was counted, by name.
    """

    what: str
    value: float
    most: float
    named: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether it is no more than that."""
        return self.value <= self.most

    def __str__(self) -> str:
        verdict = "" if self.holds else " ".join(["  TOO MUCH", *self.named])
        return f"{self.what:42}{self.value:12,.2f}   at most {self.most:,.2f}{verdict}"


# Memory


@attrs.frozen
class Memory:
    """What the process holds after a step.

    Attributes:
        step: how many were trained.
        resident: bytes of the process in main memory.
        blocks: that Python has allocated and not freed.
        objects: that the collector knows of.
    """

    step: int
    resident: int
    blocks: int
    objects: int

    @classmethod
    def now(cls, step: int) -> Memory:
        """Return what it is, garbage collected."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        return cls(step, resident, sys.getallocatedblocks(), len(gc.get_objects()))


def grown(samples: Sequence[Memory], what: str) -> float:
    """Return by how much a step adds to a field of `samples`: the slope of a line through them.

    >>> grown([Memory(step, 4096 + 10 * step, 0, 0) for step in range(5)], "resident")
    10.0
    """
    steps = np.array([sample.step for sample in samples], float)
    values = np.array([getattr(sample, what) for sample in samples], float)
    return round(float(np.polyfit(steps, values, 1)[0]), 6)


# What is left


def _open_files() -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        # The folder that is being listed is gone by the time it is asked for.
        with contextlib.suppress(OSError):
            found[str(entry.readlink()).partition(":[")[0]] += 1
    return found


@contextlib.contextmanager
def _left_behind(figures: list[Figure]) -> Iterator[None]:
    """Note how many files and threads are open after what is inside that were not before."""
    files, threads = _open_files(), set(threading.enumerate())
    yield
    gc.collect()
    # TensorStore's threads close a file that was replaced a moment after they say it is.
    end = time.monotonic() + _PATIENCE
    while (left := _open_files() - files) and time.monotonic() < end:
        time.sleep(0.01)
    started = set(threading.enumerate()) - threads
    figures.append(Figure("open files left", left.total(), 0, [*left]))
    figures.append(Figure("threads left", len(started), 0, [thread.name for thread in started]))


@contextlib.contextmanager
def _collected_quickly() -> Iterator[None]:
    """Let collections inside pass over what is there already: half a million objects of torch's."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# Training


def _model(captures: int) -> tuple[nn.Module, torch.Tensor]:
    # Output and gradient of each op: two captures.
    ops = (op for _ in range(-(-captures // 4)) for op in (nn.Linear(16, 16), nn.Tanh()))
    return nn.Sequential(*ops), torch.randn(16, 16)


def _train(
    place: Path, steps: int, captures: int, backend: str
) -> tuple[list[Memory], list[weakref.ref[Any]]]:
    """Train and record; return what memory was on the way, and references to what it took."""
    model, x = _model(captures)
    y = torch.randint(0, 16, (len(x),))
    xray = fxray.trace(model, x)
    xray.draft.clear()
    chosen = [(path, kind) for path in xray.architecture if path != "input" for kind in _KINDS]
    for path, kind in chosen[:captures]:
        # Only what is named: a False would take back what was marked before.
        wanted: dict[str, Any] = {kind: True}
        xray.mark(path, **wanted, selection=fxray.Mean())
    net = xray.rewrite()
    forward = torch.compile(net, fullgraph=True, backend=backend) if backend else net
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    samples, apart = [], max(1, round((1 - _WARM_UP) * steps / _SAMPLES))
    with fxray.record(net, place) as recorder:
        for step in range(1, steps + 1):
            loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            if step >= _WARM_UP * steps and (steps - step) % apart == 0:
                samples.append(Memory.now(step))
    return samples, [weakref.ref(thing) for thing in (model, net, xray, recorder)]


_KINDS = ("output", "grad")


def soak(steps: int, captures: int, backend: str = "") -> list[Figure]:
    """Train with captures into a run folder; return what is to be flat, and what is left.

    Args:
        steps: how many.
        captures: how many tensors have their mean kept at every step.
        backend: of `torch.compile`; empty for eager.
    """
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        # What is loaded once and stays is there before anything is counted.
        with _collected_quickly():
            _train(Path(folder) / "first", 20, captures, backend)
            torch.compiler.reset()
        with _collected_quickly(), _left_behind(found):
            samples, things = _train(Path(folder) / "run", steps, captures, backend)
            torch.compiler.reset()
            gc.collect()
            alive = sum(thing() is not None for thing in things)
        found.append(Figure("alive of what was recorded", alive, 0))
        found.append(
            Figure("rows missing on disk", _missing(Path(folder) / "run", steps, captures), 0)
        )
    span = samples[-1].step - samples[0].step
    objects = _OBJECTS + _OBJECTS_AT_ONCE / span
    if backend and samples[0].step < _FORWARDS:
        objects += _OF_A_FORWARD
    print(f"resident memory at the end: {samples[-1].resident / 2**20:.0f} MiB")
    return [
        Figure(
            "resident memory: bytes more at each step",
            grown(samples, "resident"),
            _RESIDENT + _RESIDENT_AT_ONCE / span,
        ),
        Figure("blocks of Python's: more at each step", grown(samples, "blocks"), objects),
        Figure("objects: more at each step", grown(samples, "objects"), objects),
        *found,
    ]


def _missing(place: Path, steps: int, captures: int) -> int:
    run = fxray.open(place)
    rows = [
        len(getattr(run[path], kind).steps)
        for path, kind in {(row.op, row.kind) for row in run.captures()}
    ]
    return steps * captures - sum(rows)


def told(figures: Sequence[Figure]) -> int:
    """Print the figures; return 1 if one of them is more than it may be, else 0."""
    for figure in figures:
        print(figure)
    return int(not all(figure.holds for figure in figures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the figures and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--captures", type=int, default=50, help="at every step (50)")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return told(soak(given.steps, given.captures, given.backend if given.compiled else ""))


if __name__ == "__main__":
    sys.exit(main())
