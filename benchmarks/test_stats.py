"""The ways of `stats` agree in their numbers; with `--benchmark-enable` they are timed too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fxray
from benchmarks import stats
from benchmarks.stats import WAYS, in_passes, plain, steps

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("size", [256, 2**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_formula_gives_the_same_numbers(size: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).relu_().to(dtype)
    ours = fxray.Stats().make_selection(tensor)
    for formula in (plain, in_passes):
        theirs = formula(tensor)
        assert theirs.keys() == ours.keys()
        for name, number in ours.items():
            # Each sums in its own order, in float32.
            torch.testing.assert_close(number, theirs[name], rtol=3e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_way(way: str, benchmark: BenchmarkFixture) -> None:
    assert benchmark(steps(torch.ones(2**16))[way]) is not None


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    stats.main(["--rounds", "3", "--sizes", "256,70000"])
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "of plain" in said
    assert said.splitlines()[-1].startswith("70,000 ")
