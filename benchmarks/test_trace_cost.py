"""The numbers of `trace_cost` are there and can be; nothing here looks at the clock."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks import trace_cost
from benchmarks.trace_cost import MODELS, LiveBytes


@pytest.mark.parametrize("name", ["mlp", "lstm", "tiny gpt2"])
def test_every_cost_is_a_number(name: str) -> None:
    why = trace_cost.missing(name)
    if why:
        pytest.skip(why)
    found = trace_cost.cost(name, pairs=4, traces=1, forwards=2)
    assert found.forward > 0
    assert min(found.trace, found.without) > found.forward
    assert math.isfinite(found.forwards(found.trace))
    assert found.memory > 0
    assert 0 < found.trained < found.memory
    assert found.step.low <= found.step.middle <= found.step.high


def test_live_bytes_are_those_alive_at_once() -> None:
    model = nn.Linear(4, 4, bias=False)
    with LiveBytes(model) as live:
        kept = torch.zeros(100)
        for _ in range(3):
            torch.zeros(1000)
        view = kept[:50]
    assert live.peak == 4 * (16 + 100 + 1000)
    assert live.now == 4 * (16 + 100)
    del kept
    assert live.now == 4 * (16 + 100)
    del view
    assert live.now == 4 * 16


def test_the_table_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_cost, "missing", lambda name: "why not" * (name != "mlp"))
    trace_cost.main(["--pairs", "3", "--traces", "1", "--models", "mlp,bert"])
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("mlp ")
    assert said[-1] == "bert: skipped, why not"


def test_every_model_can_be_called() -> None:
    for name, make in MODELS.items():
        if not trace_cost.missing(name):
            model, args, kwargs = make()
            with torch.no_grad():
                model(*args, **kwargs)
