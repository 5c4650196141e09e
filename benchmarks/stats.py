"""The time of `Stats`, as a ratio to reading the tensor once.

    python -m benchmarks.stats [--compile] [--rounds 60] [--threads 1] [--sizes 256,65536]

Of each tensor five things are made, one after the other in an order drawn anew every round: its
sum, which is the cost of reading it once; a copy; the nine numbers by `Stats`; the same by the
formula `Stats` had before, one pass over the tensor for each; the same as plain torch would write
them in a hook. With `--compile` the last three are compiled, the first two stay eager. The table
gives the median of the ratio of `Stats` to each of the others and, by bootstrap over the rounds,
the bounds it lies in with 95 % confidence.
"""

from __future__ import annotations

import argparse
import math
import platform
from typing import TYPE_CHECKING

import numpy as np
import torch

import fxray
from benchmarks.step_time import interval, measure, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CASES", "RIVALS", "WAYS", "in_passes", "plain", "steps"]

Numbers = dict[str, torch.Tensor]

CASES = ((256, "float32"), (2**16, "float32"), (2**20, "float32"), (2**24, "float32"))
"""How many elements, and of what dtype; the benchmark adds a bfloat16 one of 2**20."""

RIVALS = ("sum", "copy", "in passes", "plain")
WAYS = (*RIVALS, "Stats")


def in_passes(tensor: torch.Tensor) -> Numbers:
    """Return the nine numbers by the formula that `Stats` had before."""
    real, size = tensor.to(torch.float32), tensor.numel()
    mean = real.mean()
    low, high = torch.aminmax(real)
    nan = torch.count_nonzero(real.isnan())
    return {
        "count": torch.full((), size),
        "nan": nan,
        "inf": torch.count_nonzero(real - real) - nan,
        "mean": mean,
        "std": torch.linalg.vector_norm(real - mean) / math.sqrt(size),
        "min": low,
        "max": high,
        "norm": torch.linalg.vector_norm(real),
        "fraction_zero": (size - torch.count_nonzero(real)).to(real.dtype) / size,
    }


def plain(tensor: torch.Tensor) -> Numbers:
    """Return the nine numbers as anyone would write them in a hook."""
    real = tensor.float()
    return {
        "count": torch.tensor(real.numel()),
        "nan": real.isnan().sum(),
        "inf": real.isinf().sum(),
        "mean": real.mean(),
        "std": real.std(correction=0),
        "min": real.min(),
        "max": real.max(),
        "norm": real.norm(),
        "fraction_zero": (real == 0).float().mean(),
    }


def steps(tensor: torch.Tensor, *, compiled: bool = False) -> dict[str, Callable[[], object]]:
    """Return what is made of `tensor`, by its name in `WAYS`."""
    formulas: list[Callable[[torch.Tensor], Numbers]] = [
        in_passes,
        plain,
        fxray.Stats().make_selection,
    ]
    if compiled:
        formulas = [torch.compile(each, fullgraph=True, dynamic=False) for each in formulas]
    passes, simple, stats = formulas
    return {
        "sum": tensor.sum,
        "copy": tensor.clone,
        "in passes": lambda: passes(tensor),
        "plain": lambda: simple(tensor),
        "Stats": lambda: stats(tensor),
    }


def _often(step: Callable[[], object], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def _line(size: int, dtype: str, rounds: int, *, compiled: bool) -> list[str]:
    made = torch.randn(size, generator=torch.Generator().manual_seed(0)).relu_().sub_(0.1)
    tensor = made.to(getattr(torch, dtype))
    times = max(1, 2**18 // size)
    ways = steps(tensor, compiled=compiled)
    seconds = measure([_often(ways[way], times) for way in WAYS], rounds, warm_up=3)
    shares = seconds[:, -1:] / seconds[:, :-1]
    return [
        f"{size:,}",
        dtype,
        f"{float(np.median(seconds[:, -1])) / times * 1e6:.1f}",
        *(str(interval(shares[:, [c]], lambda m: m[:, 0])) for c in range(len(RIVALS))),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stats", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--compile", action="store_true", help="compile what makes nine numbers")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of each tensor (60)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--sizes", help="numbers of elements of float32, joined by commas")
    given = parser.parse_args(arguments)

    torch.set_num_threads(given.threads)
    cases = [*CASES, (2**20, "bfloat16")]
    if given.sizes:
        cases = [(int(size), "float32") for size in given.sizes.split(",")]
    lines = [["elements", "dtype", "Stats µs", *(f"of {rival}" for rival in RIVALS)]]
    with torch.no_grad():
        lines += [_line(*case, given.rounds, compiled=given.compile) for case in cases]
    print(
        f"Stats{', compiled,' if given.compile else ''} as a ratio to what else is made of the "
        f"same tensor: median of {given.rounds} rounds [95 % bounds].\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}\n"
    )
    print(table(lines))


if __name__ == "__main__":
    main()
