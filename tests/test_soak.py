"""A short soak: memory flat, and no file, thread or model left, eager and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak import Figure, Memory, grown

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")


def test_three_hundred_steps_leave_nothing():
    figures = soak.soak(300, 50)
    assert all(figure.holds for figure in figures), "\n".join(map(str, figures))


def test_a_compiled_model_is_let_go_too():
    figures = soak.soak(300, 12, "aot_eager")
    assert all(figure.holds for figure in figures), "\n".join(map(str, figures))


def test_what_is_forgotten_at_every_step_is_found(monkeypatch):
    forgotten = []
    log = soak.fxray.Recorder.log

    def forgets(self, **values):
        forgotten.append([object() for _ in range(50)])
        log(self, **values)

    monkeypatch.setattr(soak.fxray.Recorder, "log", forgets)
    broken = {figure.what for figure in soak.soak(60, 8) if not figure.holds}
    assert "blocks of Python's: more at each step" in broken


def test_what_is_left_is_found(tmp_path):
    figures: list[Figure] = []
    with soak._left_behind(figures):
        left = (tmp_path / "left").open("w")
    left.close()
    assert [figure.holds for figure in figures] == [False, True]


def test_growth_is_the_slope():
    flat = [Memory(step, 10**9, 500 + (-1) ** step, 7) for step in range(100)]
    assert grown(flat, "resident") == 0
    assert abs(grown(flat, "blocks")) < 0.01
    assert grown([Memory(step, 0, 3 * step, 0) for step in range(100)], "blocks") == 3


def test_one_broken_bound_is_told(capsys):
    assert soak.told([Figure("files", 0, 0), Figure("threads", 1, 0)]) == 1
    assert "TOO MUCH" in capsys.readouterr().out.splitlines()[1]
    assert soak.told([Figure("files", 0, 0)]) == 0


@pytest.mark.parametrize(("captures", "ops"), [(50, 26), (4, 2)])
def test_the_model_has_ops_enough(captures, ops):
    model, x = soak._model(captures)
    assert len(model) == ops
    assert model(x).shape == x.shape
