"""The ways to train agree in their numbers; with `--benchmark-enable` they are timed too."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks import capture_cost
from benchmarks.models import MODELS
from benchmarks.peers import PEERS, Remote, facts_of_torch
from benchmarks.sections import Section
from benchmarks.step_time import Clocks
from benchmarks.ways import COMPILED, EAGER, Kept, runners

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

STEPS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let nothing but the code differ: the second core serves other programs too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(kept: Kept) -> dict[tuple[str, str], list[float]]:
    """Return what is one number a step: `unbind` gives three tensors, and has three."""
    return {
        key: [np.asarray(value).item() for value in values]
        for key, values in kept.items()
        if not isinstance(values[0], dict)
    }


def kept_in_three_steps(name: str, way: str, backend: str = "") -> Kept:
    with runners(name, [way], backend) as found:
        runner = found[way]
        runner.warm_up(STEPS)
        if runner.graphs is not None:
            assert (runner.graphs.compiled, runner.graphs.breaks) == (1, 0)
        return runner.kept()


# Training is not changed


@pytest.mark.parametrize("name", MODELS)
def test_every_way_trains_the_same(name: str) -> None:
    with runners(name, [*EAGER]) as found:
        losses = {
            way: [float(runner.step()) for _ in range(STEPS)] for way, runner in found.items()
        }
    assert losses["bare"][0] != losses["bare"][-1]
    for way, own in losses.items():
        assert own == losses["bare"], way


# What is kept is the same


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "fxray: mean") for name in MODELS),
        ("encoder", "fxray: mean, modules alone"),
        ("encoder", "fxray: mean, to disk"),
    ],
)
@pytest.mark.parametrize("rival", ["hooks: mean", "lean hooks: mean", "extraction: mean"])
def test_fxray_keeps_the_means_that_the_others_keep(name: str, way: str, rival: str) -> None:
    own = numbers(kept_in_three_steps(name, way))
    theirs = numbers(kept_in_three_steps(name, rival))
    common = own.keys() & theirs.keys()
    assert common >= {
        (path, kind) for path, kind in numbers(kept_in_three_steps(name, "hooks: mean"))
    }
    for key in common:
        assert len(own[key]) == STEPS
        assert own[key] == theirs[key], key


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_fxray_keeps_the_first_element_that_hooks_keep(name: str) -> None:
    own = numbers(kept_in_three_steps(name, "fxray: first element"))
    theirs = numbers(kept_in_three_steps(name, "hooks: first element"))
    assert theirs.items() <= own.items()


def test_fxray_keeps_the_nine_numbers_that_hooks_keep() -> None:
    own = kept_in_three_steps("encoder", "fxray: stats, modules alone")
    theirs = kept_in_three_steps("encoder", "hooks: stats")
    assert own.keys() == theirs.keys()
    for key, steps in theirs.items():
        for mine, plain in zip(own[key], steps, strict=True):
            assert mine.keys() == plain.keys()
            for field in plain:
                np.testing.assert_allclose(
                    mine[field], plain[field], rtol=1e-5, atol=1e-7, err_msg=f"{key} {field}"
                )


def test_a_way_with_nothing_due_keeps_its_first_step_alone() -> None:
    with runners("mlp", ["fxray: nothing due"]) as found:
        found["fxray: nothing due"].warm_up(STEPS)
        assert {len(values) for values in found["fxray: nothing due"].kept().values()} == {1}


# Compiled


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_compiled_whole_it_keeps_what_it_keeps_in_eager(name: str) -> None:
    eager = numbers(kept_in_three_steps(name, "fxray: mean"))
    compiled = numbers(kept_in_three_steps(name, "fxray: mean", "aot_eager"))
    assert compiled.keys() == eager.keys()
    for key, values in eager.items():
        np.testing.assert_allclose(compiled[key], values, rtol=1e-4, atol=1e-7, err_msg=str(key))


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor's own
def test_compiled_by_inductor_it_keeps_what_it_keeps_in_eager() -> None:
    eager = numbers(kept_in_three_steps("mlp", "fxray: mean"))
    compiled = numbers(kept_in_three_steps("mlp", "fxray: mean", "inductor"))
    assert compiled.keys() == eager.keys()
    for key, values in eager.items():
        np.testing.assert_allclose(compiled[key], values, rtol=1e-4, atol=1e-7, err_msg=str(key))


def test_nothing_due_compiles_two_graphs_and_no_more() -> None:
    with runners("mlp", ["fxray: nothing due", "fxray: unmarked"], "aot_eager") as found:
        for runner in found.values():
            runner.warm_up(2)
            for _ in range(STEPS):
                runner.step()
        counts = {
            way: r.graphs and (r.graphs.settled, r.graphs.recompiled) for way, r in found.items()
        }
    assert counts == {"fxray: nothing due": (2, 0), "fxray: unmarked": (1, 0)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_hooks_and_extraction_lose_compiled() -> None:
    with runners("mlp", ["hooks: mean", "extraction: mean"], "aot_eager") as found:
        for runner in found.values():
            runner.warm_up(STEPS)
        hooks, extraction = found["hooks: mean"], found["extraction: mean"]
        assert hooks.graphs is not None
        assert hooks.graphs.breaks > 0
        came = {kind: 0 for _, kind in extraction.kept()}
        for (_, kind), values in extraction.kept().items():
            came[kind] += len(values)
    assert came == {"output": 5 * STEPS, "grad": STEPS}  # that of what the model returns


# The peers


def test_what_torch_cannot_do_is_its_own_message() -> None:
    said = facts_of_torch(MODELS["mlp"])
    assert all(len(lines) == 1 for lines in said.values())
    assert "Module-level backwards hooks" in said["hooks"][0]
    assert "control flow" in said["extraction"][0]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_keeps_the_means_that_hooks_keep_or_says_why_not(name: str) -> None:
    with Remote(name, "mlp") as peer:
        peer.wait()
        if importlib.util.find_spec(PEERS[name].package) is None:
            assert peer.skipped == f"not installed: pip install {PEERS[name].package}"
            return
        assert not peer.skipped
        assert min(*peer(), *peer.bare()) > 0
        own = peer.kept()
        assert peer.facts()
    with runners("mlp", ["hooks: mean"]) as found:
        # Its process trained so many before it was asked for one more.
        found["hooks: mean"].warm_up(1 + 3 + 1)
        theirs = numbers(found["hooks: mean"].kept())
    for kind in ("output", "grad"):
        mine = [value for (_, k), values in own.items() if k == kind for value in values]
        plain = [values[-1] for (_, k), values in theirs.items() if k == kind]
        np.testing.assert_allclose(sorted(mine), sorted(plain), rtol=1e-5, atol=1e-9)


# The tables


def section(milliseconds: list[float], **told: object) -> Section:
    """Return a section of hand-made seconds, twenty rounds of the same."""
    wall = np.tile(np.array(milliseconds) / 1e3, (20, 1))
    ways = ["bare", "fxray: unmarked", "fxray: mean, modules alone", "hooks: mean"]
    sites = dict(zip(ways, [0, 10, 10, 5], strict=True))
    return Section("mlp", "eager", sites, Clocks(wall, wall), **told)  # type: ignore[arg-type]


def test_figures_of_known_seconds() -> None:
    found = section([10.0, 10.1, 12.0, 15.0])
    assert str(found.ratio("hooks: mean")) == "1.500 [1.500, 1.500]"
    assert found.microseconds("hooks: mean").middle == pytest.approx(1000)
    assert found.microseconds("fxray: mean, modules alone").middle == pytest.approx(200)
    assert found.share("fxray: mean, modules alone", "hooks: mean").middle == pytest.approx(0.4)
    shares = found.share_a_site("fxray: mean, modules alone", "hooks: mean")
    assert shares.middle == pytest.approx(0.2)


def test_what_another_process_ran_is_measured_by_its_own_bare_step() -> None:
    wall = np.tile(np.array([0.010, 0.020, 0.050]), (20, 1))
    sites = {"bare": 0, "other: bare": 0, "other: mean": 10}
    bases = {"other: mean": "other: bare"}
    found = Section("mlp", "peers", sites, Clocks(wall, wall), bases=bases)
    assert found.ratio("other: bare").middle == pytest.approx(2.0)
    assert found.ratio("other: mean").middle == pytest.approx(2.5)
    assert found.microseconds("other: mean").middle == pytest.approx(3000)
    assert [line[1] for line in found.lines()] == ["sites", "", "", "10"]


def test_the_summary_judges_what_has_a_target() -> None:
    def cells(found: Section) -> dict[str, str]:
        return {line[0]: line[2] for line in capture_cost.summary([found])[1:]}

    good, bad = cells(section([10.0, 10.1, 12.0, 15.0])), cells(section([10.0, 10.6, 14.0, 15.0]))
    short = cells(section([1.0, 1.2, 1.2, 1.5]))
    means = "mean of every module: overhead over hooks'"
    assert (good[means][-1], bad[means][-1]) == ("✓", "✗")
    assert good["unmarked, eager"] == "1.010, 10.0 µs a site ✓"
    assert bad["unmarked, eager"] == "1.060, 60.0 µs a site ✗"
    assert short["unmarked, eager"] == "1.200, 20.0 µs a site"  # a bare step of 1 ms


def test_the_tables_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_cost, "PEERS", {})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{capture_cost.BEGIN}\nold\n{capture_cost.END}\nafter\n")
    options = "--pairs 4 --models mlp --ways mean --running eager,peers --write".split()
    capture_cost.main([*options, str(page)])
    said = capsys.readouterr().out
    assert "| mean of every module: overhead over hooks'" in said
    assert "**mlp, peers**" in said
    text = page.read_text()
    assert said.strip() in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="no lines"):
        capture_cost.written("nothing", "text")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", EAGER)
def test_step(name: str, way: str, benchmark: BenchmarkFixture) -> None:
    benchmark.group = name
    with runners(name, [way]) as found:
        assert torch.isfinite(benchmark(found[way].step))


def test_the_bare_way_comes_first() -> None:
    assert COMPILED.keys() <= EAGER.keys()
    assert next(iter(EAGER)) == next(iter(COMPILED)) == "bare"
