"""The ways of `step_time` agree in their numbers; with `--benchmark-enable` they are timed too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks import step_time
from benchmarks.step_time import MODELS, WAYS, Way, runners

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let nothing but the code differ: the second core serves other programs too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_trains_the_same(name: str) -> None:
    with runners(name) as ways:
        losses = {way: [float(ways[way].step()) for _ in range(4)] for way in WAYS}
    assert losses["plain"][0] != losses["plain"][-1]
    for way in WAYS:
        assert losses[way] == losses["plain"], way


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rival", ["hooks", "lean hooks"])
def test_fxray_keeps_what_hooks_keep(name: str, rival: Way) -> None:
    steps = 3
    with runners(name, ["marked", rival]) as ways:
        for _ in range(steps):
            ways["marked"].step()
            ways[rival].step()
        recorder, means = ways["marked"].recorder, ways[rival].means
        assert recorder is not None
        assert means is not None
    by_hooks: dict[tuple[str, str], list[float]] = {}
    for path, kind, mean in means.kept:
        by_hooks.setdefault((path, kind), []).append(float(mean))
    assert len(by_hooks) == 2 * means.sites
    for (path, kind), values in by_hooks.items():
        series = getattr(recorder.run[path], kind)
        assert list(series.steps) == list(range(steps)), (path, kind)
        assert [float(series[step]) for step in range(steps)] == values, (path, kind)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_step(name: str, way: Way, benchmark: BenchmarkFixture) -> None:
    benchmark.group = name
    with runners(name, [way]) as ways:
        loss = benchmark(ways[way].step)
    assert torch.isfinite(loss)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    step_time.main(["--pairs", "4", "--models", "mlp"])
    said = capsys.readouterr().out
    assert "of lean hooks" in said
    assert said.splitlines()[-1].startswith("mlp ")


def test_a_bootstrap_holds_the_median() -> None:
    rows = np.random.default_rng(1).normal(2.0, 0.1, (400, 1))
    found = step_time.interval(rows, lambda medians: medians[:, 0])
    assert found.low < 2.0 < found.high
    assert found.high - found.low < 0.05
