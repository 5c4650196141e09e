"""`fxray demo`: what it writes and says, and what a kill leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fxray
from fxray import demo
from fxray.cli import main

pytestmark = pytest.mark.dot
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give what one epoch of the demo writes; what it says is in `said.txt`."""
    folder = tmp_path_factory.mktemp("demo") / "fxray-demo"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert main(["demo", "--epochs", "1", "--out", str(folder)]) == 0
    (folder / "said.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_it_writes_the_pictures_that_it_names(folder: Path) -> None:
    said = (folder / "said.txt").read_text(encoding="utf-8")
    for picture in demo.PICTURES:
        assert (folder / picture.file).read_bytes().startswith(b"\x89PNG")
        assert f"{picture.file} " in said
        assert picture.words in said
    for name in ("graph", "saved"):
        assert "<svg" in (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "×50" in (folder / "saved.svg").read_text(encoding="utf-8")
    assert "×" in (folder / "graph.svg").read_text(encoding="utf-8")


def test_the_run_has_what_the_pictures_show(folder: Path) -> None:
    run = fxray.open(folder / "runs")
    assert run["relu"].output.sel(epoch=0, batch=40).shape == (16, 16, 8, 8)
    assert run["relu"].output[40].min() == 0
    assert run["relu"].output.in_phase("valid").steps.tolist() == [50]
    assert run["relu_2"].grad.fields[0] == "count"
    assert len(run["relu_2"].grad) == 50
    assert run["conv1"].weight.steps.tolist() == [0, 10, 20, 30, 40, 50]
    assert len(run["conv2"].weight_grad) == 50
    assert int(run["head"].output[40]["counts"].sum()) == 320
    assert len(run.log["loss"]) == len(run.log["accuracy"]) == 50
    assert not run.notes


def test_the_commands_that_it_names_work(folder: Path, tmp_path: Path) -> None:
    said = (folder / "said.txt").read_text(encoding="utf-8")
    lines = (line.split() for line in said.splitlines() if line.startswith("  "))
    commands = [words[1:] for words in lines if words and Path(words[0]).name == "fxray"]
    assert {words[0] for words in commands} == {"runs", "show", "plot", "render"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert [main(words) for words in commands] == [0] * len(commands)
    example = said[said.index("  import fxray") :].replace("\n  ", "\n").strip()
    names: dict[str, object] = {}
    exec(example, names)
    assert isinstance(names["run"], fxray.Run)


def test_a_second_run_is_added(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is the same to the last bit: the demo is reproducible."""
    monkeypatch.setattr(demo, "PICTURES", demo.PICTURES[:1])
    before = [run.id for run in fxray.runs(folder / "runs")]
    run = demo.demo(folder, epochs=1)
    assert [run.id for run in fxray.runs(folder / "runs")] == [*before, run.id]
    assert f"{folder / 'runs'} has 1 run already" in capsys.readouterr().out
    first = fxray.open(folder / "runs", before[0])
    np.testing.assert_array_equal(first["conv2"].weight[40], run["conv2"].weight[40])
    np.testing.assert_array_equal(first.log["loss"].to_numpy(), run.log["loss"].to_numpy())


def test_what_is_missing_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "fxray: the demo needs scikit-learn, matplotlib and Graphviz, not installed: "
        "pip install 'fxray[demo]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_kill_leaves_all_up_to_the_last_commit(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxray", "demo", "--epochs", "1000", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            _wait_for_steps(tmp_path / "runs", 60)
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    run = fxray.open(tmp_path / "runs")
    assert run.summary.finished is None
    every = {series.title: series for row in run.captures() for series in run[row.op].series}
    assert len(every) > 10
    for series in every.values():
        for _, value in series:  # each record that is there can be read
            arrays = value.values() if isinstance(value, dict) else [value]
            assert all(np.isfinite(array).all() for array in arrays)
    steps = run["relu"].output.in_phase("train").steps
    assert steps.tolist() == list(range(0, int(steps[-1]) + 1, 10))
    whole = fxray.open(folder / "runs")
    np.testing.assert_array_equal(run["conv2"].weight[40], whole["conv2"].weight[40])


def _wait_for_steps(place: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if fxray.open(place)["relu"].output.steps[-1] >= steps:
                return
        except (fxray.FxrayError, IndexError):
            pass  # it has not begun yet
        time.sleep(0.1)
    pytest.fail(f"no {steps} steps in {place}")
