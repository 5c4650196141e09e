"""Recording: which rows there are, what is in them, and that nothing of it disturbs training."""

# To mypy a module's attribute is Tensor | Module, and wrong types are given here on purpose.
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxray
from fxray.capture.node import receiver_of
from fxray.store.writer import ZarrWriter
from fxray.tracing.program import Runner

X = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 10 - 1
_numbers = itertools.count()


@pytest.fixture
def place() -> str:
    return f"memory://capture-{next(_numbers)}"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.hidden(x)))


def xray_of(model: nn.Module | None = None, *args: Any, **marks: Any) -> fxray.Xray:
    """Return an Xray with only `marks` (kind=True, schedules) on every op, kept whole."""
    xray = fxray.trace(model or Net(), *(args or (X,)))
    xray.draft.clear()
    if marks:
        xray.mark("*", selection=fxray.Whole(), **marks)
    for op in xray.architecture.values():
        if op.role == "input" and not any(arg.requires_grad for arg in args):
            xray.unmark(op.path, "grad")  # which nothing would come of, and close would say so
    return xray


def rewritten(*args: Any, **marks: Any) -> Any:
    return xray_of(*args, **(marks or {"output": True})).rewrite()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def train_step(net: nn.Module, optimizer: Any, x: torch.Tensor = X) -> torch.Tensor:
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def coordinates(series: Any) -> list[tuple[int, int, int, int, str]]:
    """Return (step, epoch, batch, call, phase) of every record."""
    rows = (row for row, _ in series)
    return [(row.step, row.epoch, row.batch, row.call, row.phase) for row in rows]


def assert_unique(run: Any) -> None:
    """Fail unless (phase, step, call) names one record of every series, steps ascending."""
    for path in run.architecture:
        for kind in ("output", "grad"):
            with contextlib.suppress(fxray.NotSavedError):
                rows = coordinates(getattr(run[path], kind))
                keys = [(phase, step, call) for step, _, _, call, phase in rows]
                assert len(set(keys)) == len(keys), (path, kind, keys)


# ---------------------------------------------------------------- steps


def test_without_help_a_forward_in_training_mode_is_a_step(place: str) -> None:
    net = rewritten(output=True, grad=True, weight=True, weight_grad=True)
    optimizer = sgd(net)
    with fxray.record(net, place):
        for _ in range(3):
            train_step(net, optimizer)
    run = fxray.open(place)
    expected = [(step, 0, step, 0, "train") for step in range(3)]
    for series in (
        run["relu"].output,
        run["relu"].grad,
        run["head"].weight,
        run["head"].weight_grad,
    ):
        assert coordinates(series) == expected


def test_prompts_alone_count_forwards(place: str) -> None:
    net = rewritten().eval()
    with fxray.record(net, place), torch.no_grad():
        for k in range(3):
            net(X + k)
    run = fxray.open(place)
    assert [row[0] for row in coordinates(run["x"].output)] == [0, 1, 2]
    assert set(run["x"].output.phases) == {"eval"}
    assert np.array_equal(run["x"].output[2], (X + 2).numpy())


def test_an_interleaved_eval_pass_carries_the_training_step_and_overwrites_nothing(
    place: str,
) -> None:
    net = rewritten()
    optimizer = sgd(net)
    with fxray.record(net, place):
        for k in range(2):
            net.train()
            train_step(net, optimizer)
            train_step(net, optimizer)
            net.eval()
            with torch.no_grad():
                net(X + k)
                net(X - k)
    run = fxray.open(place)
    series = run["x"].output
    assert series.in_phase("train").steps.tolist() == [0, 1, 2, 3]
    assert [(s, c) for s, _, _, c, p in coordinates(series) if p == "eval"] == [
        (2, 0), (2, 1), (4, 0), (4, 1)]  # fmt: skip
    assert np.array_equal(series.sel(phase="eval", step=4, call=1), (X - 1).numpy())
    assert np.array_equal(series[3], X.numpy())
    assert_unique(run)


def test_a_sanity_check_before_training_does_not_repeat_a_coordinate(place: str) -> None:
    net = rewritten()
    optimizer = sgd(net)
    with fxray.record(net, place):
        net.eval()
        with torch.no_grad():
            for _ in range(3):
                net(X)
        for _ in range(2):
            net.train()
            train_step(net, optimizer)
            net.eval()
            net(X)
    run = fxray.open(place)
    assert len(run["x"].output) == 7
    assert_unique(run)
    steps = [s for s, *_, phase in coordinates(run["x"].output) if phase == "eval"]
    times = run["x"].output.in_phase("eval").times
    assert steps == sorted(steps)
    assert times.tolist() == sorted(times.tolist())  # in the order of steps is in that of time


def test_epochs_and_batches_are_numbered(place: str) -> None:
    net = rewritten()
    optimizer = sgd(net)
    loader = [X, X + 1, X + 2]
    with fxray.record(net, place) as recorder:
        for _ in range(2):
            for x in recorder.epoch(loader):
                train_step(net, optimizer, x)
            for x in recorder.phase("valid", loader[:2]):
                net(x)
    run = fxray.open(place)
    series = run["x"].output
    assert [row for row in coordinates(series) if row[4] == "train"] == [
        (0, 0, 0, 0, "train"), (1, 0, 1, 0, "train"), (2, 0, 2, 0, "train"),
        (3, 1, 0, 0, "train"), (4, 1, 1, 0, "train"), (5, 1, 2, 0, "train")]  # fmt: skip
    assert [row for row in coordinates(series) if row[4] == "valid"] == [
        (3, 0, 0, 0, "valid"), (3, 0, 1, 1, "valid"),
        (6, 1, 0, 0, "valid"), (6, 1, 1, 1, "valid")]  # fmt: skip
    assert np.array_equal(series.sel(epoch=1, batch=2), (X + 2).numpy())
    assert np.array_equal(series.sel(phase="valid", epoch=1, batch=1), (X + 1).numpy())


def test_a_validation_in_the_middle_of_an_epoch_leaves_its_batches_as_they_are(place: str) -> None:
    net = rewritten()
    optimizer = sgd(net)
    with fxray.record(net, place) as recorder:
        for at, x in enumerate(recorder.epoch([X, X + 1, X + 2])):
            if at == 1:
                with recorder.phase("probe"):
                    net(x)
            train_step(net, optimizer, x)
    series = fxray.open(place)["x"].output
    assert [row[:3] for row in coordinates(series.in_phase("train"))] == [
        (0, 0, 0), (1, 0, 1), (2, 0, 2)]  # fmt: skip
    assert coordinates(series.in_phase("probe")) == [(1, 0, 0, 0, "probe")]


def test_an_epoch_left_early_ends_there(place: str) -> None:
    net = rewritten()
    optimizer = sgd(net)
    with fxray.record(net, place) as recorder:
        for x in recorder.epoch([X, X, X]):
            train_step(net, optimizer, x)
            break
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the loop is what raises
            for x in recorder.phase("valid", [X, X]):
                net(x)
                1 / 0  # noqa: B018
        for x in recorder.epoch([X, X]):
            train_step(net, optimizer, x)
    assert [row[:3] + row[4:] for row in coordinates(fxray.open(place)["x"].output)] == [
        (0, 0, 0, "train"), (1, 0, 0, "valid"), (1, 1, 0, "train"), (2, 1, 1, "train")]  # fmt: skip


def test_a_step_groups_micro_batches_into_calls(place: str) -> None:
    net = rewritten(output=True, grad=True, weight_grad=True)
    optimizer, used = sgd(net), []
    with fxray.record(net, place) as recorder:
        for _ in range(2):
            with recorder.step():
                optimizer.zero_grad()
                for k in range(3):
                    net(X + k).square().mean().backward()
                used.append(net.head.weight.grad.clone())
                optimizer.step()
    run = fxray.open(place)
    expected = [(step, 0, step, call, "train") for step in range(2) for call in range(3)]
    assert coordinates(run["x"].output) == expected
    assert coordinates(run["relu"].grad) == expected
    assert np.array_equal(run["x"].output.sel(step=1, call=2), (X + 2).numpy())
    with pytest.raises(fxray.NotSavedError, match="call=0"):
        run["x"].output[1]
    assert run["head"].weight_grad.steps.tolist() == [0, 1]
    for step in range(2):
        assert np.array_equal(run["head"].weight_grad[step], used[step].numpy())


def test_a_step_may_begin_with_a_forward_in_eval_mode(place: str) -> None:
    net = rewritten()
    optimizer = sgd(net)
    with fxray.record(net, place) as recorder:
        for _ in range(2):
            with recorder.step():
                net.eval()
                net(X)
                net.train()
                train_step(net, optimizer)
                train_step(net, optimizer)
    run = fxray.open(place)
    rows = coordinates(run["x"].output)
    assert [(s, c) for s, _, _, c, p in rows if p == "train"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert min(row[0] for row in rows) == 0
    assert len([row for row in rows if row[4] == "eval"]) == 2
    assert_unique(run)


def test_two_optimizer_steps_in_one_step_are_told_apart(place: str) -> None:
    net = rewritten(weight_grad=True)
    optimizer = sgd(net)
    with fxray.record(net, place) as recorder:
        for _ in range(2):
            with recorder.step():
                train_step(net, optimizer)
                train_step(net, optimizer, X + 1)
    series = fxray.open(place)["head"].weight_grad
    keys = [(step, call) for step, _, _, call, _ in coordinates(series)]
    assert len(keys) == len(set(keys)), keys


def test_what_makes_no_sense_is_refused_by_name(place: str) -> None:
    net = rewritten()
    with fxray.record(net, place) as recorder:
        with recorder.step(), pytest.raises(fxray.RecordError, match=r"step\(\)"), recorder.step():
            pass
        with (
            recorder.phase("valid"),
            pytest.raises(fxray.RecordError, match="'other' inside phase 'valid'"),
            recorder.phase("other"),
        ):
            pass
        for name in ("train", ""):
            with pytest.raises(fxray.RecordError, match="valid"), recorder.phase(name):
                pass
        with pytest.raises(fxray.RecordError, match="loop over"):
            list(recorder.phase("valid"))
        with recorder.phase("valid"), pytest.raises(fxray.RecordError, match="leave the phase"):
            next(iter(recorder.epoch([X])))
        net(X)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ({"every": 3}, [0, 3, 6, 9]),
        ({"every": 3, "start": 2}, [2, 5, 8]),
        ({"every": 2, "start": 1, "stop": 6}, [1, 3, 5]),
        ({"steps": [1, 4, 40]}, [1, 4]),
        ({"stop": 2}, [0, 1]),
    ],
)
def test_a_schedule_keeps_its_steps_for_every_kind(
    place: str, words: dict[str, Any], steps: list[int]
) -> None:
    kinds = ("output", "grad", "input", "weight", "weight_grad")
    net = rewritten(**dict.fromkeys(kinds, True), **words)
    optimizer = sgd(net)
    with fxray.record(net, place):
        for _ in range(10):
            train_step(net, optimizer)
    run = fxray.open(place)
    for kind in kinds:
        assert getattr(run["head"], kind).steps.tolist() == steps, kind


def test_each_phase_counts_its_own_steps(place: str) -> None:
    net = rewritten(output=True, every=2)
    optimizer = sgd(net)
    with fxray.record(net, place) as recorder:
        for _ in range(3):
            train_step(net, optimizer)
        for x in recorder.phase("valid", [X, X + 1, X + 2]):
            net(x)
    series = fxray.open(place)["x"].output
    assert series.in_phase("train").steps.tolist() == [0, 2]
    assert [row[2] for row in coordinates(series.in_phase("valid"))] == [0, 2]


def test_a_step_with_nothing_due_runs_the_bare_graph(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = rewritten(output=True, every=4)
    instrumented: list[bool] = []
    run = Runner.run

    def noted(self: Runner, inputs: Any, forward: Any = None) -> Any:
        instrumented.append(forward is not None)
        return run(self, inputs, forward)

    monkeypatch.setattr(Runner, "run", noted)
    with fxray.record(net, place):
        for _ in range(9):
            net(X)
    assert instrumented == [True, False, False, False, True, False, False, False, True]
    instrumented.clear()
    for _ in range(4):
        net(X)
    assert instrumented == [False] * 4  # closed: bare
    assert fxray.open(place)["relu"].output.steps.tolist() == [0, 4, 8]


def test_different_schedules_live_side_by_side(place: str) -> None:
    xray = xray_of()
    xray.mark("relu", output=True, every=2, selection=fxray.Whole())
    xray.mark("relu", grad=True, every=3, selection=fxray.Whole())
    xray.mark("head", output=True, steps=[1], selection=fxray.Whole())
    xray.mark("hidden", weight_grad=True, every=4, start=1)
    net = xray.rewrite()
    optimizer = sgd(net)
    with fxray.record(net, place):
        for _ in range(7):
            train_step(net, optimizer)
    run = fxray.open(place)
    assert run["relu"].output.steps.tolist() == [0, 2, 4, 6]
    assert run["relu"].grad.steps.tolist() == [0, 3, 6]
    assert run["head"].output.steps.tolist() == [1]
    assert run["hidden"].weight_grad.steps.tolist() == [1, 5]


# ---------------------------------------------------------------- gradients and optimizers


def test_an_accumulated_gradient_is_kept_at_the_first_optimizer_step_after_it_was_due(
    place: str,
) -> None:
    net = rewritten(weight_grad=True, grad=True, every=10)
    optimizer, used = sgd(net), {}
    with fxray.record(net, place):
        for step in range(12):
            net(X + step).square().mean().backward()
            if step % 4 == 3:
                used[step] = net.head.weight.grad.clone()
                optimizer.step()
                optimizer.zero_grad()
    run = fxray.open(place)
    assert run["relu"].grad.steps.tolist() == [0, 10]
    assert run["head"].weight_grad.steps.tolist() == [3, 11]
    for step in (3, 11):
        assert np.array_equal(run["head"].weight_grad[step], used[step].numpy())


def test_a_step_that_a_grad_scaler_skips_keeps_no_weight_gradient(place: str) -> None:
    net = rewritten(weight_grad=True)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=4.0)
    used = {}
    with fxray.record(net, place):
        for step in range(3):
            loss = net(X).square().mean() * (float("inf") if step == 1 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            used[step] = net.head.weight.grad.clone()  # unscaled in place by step
    series = fxray.open(place)["head"].weight_grad
    assert series.steps.tolist() == [0, 2]
    for step in (0, 2):
        assert np.array_equal(series[step], used[step].numpy())


def test_a_fused_optimizer_that_found_an_inf_keeps_no_weight_gradient(place: str) -> None:
    net = rewritten(weight_grad=True)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    with fxray.record(net, place):
        for step in range(3):
            optimizer.grad_scale = torch.tensor(1.0)
            optimizer.found_inf = torch.tensor(float(step == 1))
            train_step(net, optimizer)
    assert fxray.open(place)["head"].weight_grad.steps.tolist() == [0, 2]


def test_a_closure_s_own_gradient_is_the_one_kept(place: str) -> None:
    net = rewritten(weight_grad=True)
    optimizer, used = sgd(net), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(X).square().mean()
        loss.backward()
        used.append(net.head.weight.grad.clone())
        return loss

    with fxray.record(net, place):
        for _ in range(3):
            optimizer.step(closure)
    series = fxray.open(place)["head"].weight_grad
    assert series.steps.tolist() == [0, 1, 2]
    for step in range(3):
        assert np.array_equal(series[step], used[step].numpy())


def test_a_clipped_gradient_is_kept_as_the_optimizer_used_it(place: str) -> None:
    net = rewritten(weight_grad=True)
    optimizer = sgd(net)
    with fxray.record(net, place):
        net(X).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        used = net.head.weight.grad.clone()
        optimizer.step()
    assert np.array_equal(fxray.open(place)["head"].weight_grad[0], used.numpy())


def test_another_model_s_optimizer_is_none_of_ours(place: str) -> None:
    net, other = rewritten(weight_grad=True), Net()
    ours, theirs = sgd(net), sgd(other)
    with fxray.record(net, place):
        net(X).square().mean().backward()
        train_step(other, theirs)
        ours.step()
    run = fxray.open(place)
    assert np.array_equal(run["head"].weight_grad[0], net.head.weight.grad.numpy())


def test_two_optimizers_keep_what_each_of_them_used(place: str) -> None:
    net = rewritten(weight_grad=True)
    one = torch.optim.SGD(net.hidden.parameters(), lr=0.1)
    two = torch.optim.Adam(net.head.parameters(), lr=0.1)
    with fxray.record(net, place):
        for _ in range(2):
            net.zero_grad()
            net(X).square().mean().backward()
            one.step()
            two.step()
    run = fxray.open(place)
    for op in ("hidden", "head"):
        assert run[op].weight_grad.steps.tolist() == [0, 1]
        grad = net.get_submodule(op).weight.grad
        assert np.array_equal(run[op].weight_grad[1], grad.numpy())


def test_frozen_parameters_are_named_at_close_and_kept_once_unfrozen(place: str) -> None:
    model = Net()
    model.hidden.requires_grad_(requires_grad=False)
    net = rewritten(model, weight=True, weight_grad=True)
    optimizer = sgd(net)
    with pytest.warns(fxray.FxrayWarning, match="weight_grad of hidden: no optimizer"):  # noqa: SIM117
        with fxray.record(net, place):
            train_step(net, optimizer)
    run = fxray.open(place)
    assert run["hidden"].weight.steps.tolist() == [0]
    assert run["head"].weight_grad.steps.tolist() == [0]
    place += "-unfrozen"
    with fxray.record(net, place):
        for step in range(4):
            model.hidden.requires_grad_(step >= 2)
            train_step(net, optimizer)
    assert fxray.open(place)["hidden"].weight_grad.steps.tolist() == [2, 3]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_and_then_their_backwards_in_either_order(
    place: str, order: tuple[int, int]
) -> None:
    net = rewritten(grad=True)
    expected = []
    for k in range(2):
        hidden = F.relu(net.original.hidden(X + k))
        hidden.retain_grad()
        net.original.head(hidden).square().mean().backward()
        expected.append(hidden.grad)
    with fxray.record(net, place):
        losses = [net(X + k).square().mean() for k in range(2)]
        for k in order:
            losses[k].backward()
    series = fxray.open(place)["relu"].grad
    assert series.steps.tolist() == [0, 1]
    for k in range(2):
        assert np.array_equal(series[k], expected[k].numpy())


def test_one_backward_over_two_forwards(place: str) -> None:
    net = rewritten(grad=True)
    with fxray.record(net, place):
        for _ in range(2):
            (net(X).sum() + 2 * net(X).sum()).backward()
    series = fxray.open(place)["head"].grad
    assert series.steps.tolist() == [0, 1, 2, 3]
    assert [float(series[k][0, 0]) for k in range(4)] == [1.0, 2.0, 1.0, 2.0]


def test_a_second_backward_through_one_forward_keeps_the_first_and_is_told_once(place: str) -> None:
    net = rewritten(grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fxray.record(net, place):
            for _ in range(3):
                loss = net(X).sum()
                loss.backward(retain_graph=True)
                (5 * loss).backward()
    told = [w for w in told if issubclass(w.category, fxray.FxrayWarning)]
    assert len(told) == 1
    assert "second backward" in str(told[0].message)
    run = fxray.open(place)
    assert [float(run["head"].grad[k][0, 0]) for k in range(3)] == [1.0, 1.0, 1.0]
    assert any("gradient" in note for note in run.notes)


def test_a_gradient_penalty_trains_as_without_fxray(place: str) -> None:
    def train(net: nn.Module) -> dict[str, torch.Tensor]:
        optimizer = sgd(net)
        for _ in range(3):
            x = X.clone().requires_grad_()
            out = net(x).square().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            optimizer.zero_grad()
            (out + slope.square().sum()).backward()
            optimizer.step()
        return {k: v.clone() for k, v in net.state_dict().items()}

    model = Net()
    twin = copy.deepcopy(model)
    net = rewritten(model, X.clone().requires_grad_(), grad=True, output=True, weight_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxray.FxrayWarning)
        with fxray.record(net, place):
            ours = train(net)
    for name, value in train(twin).items():
        assert torch.equal(value, ours[name])
    assert fxray.open(place)["relu"].grad.steps.tolist() == [0, 1, 2]


def test_the_gradient_of_an_input_that_is_reused_is_kept_and_nothing_piles_up(place: str) -> None:
    x = X.clone().requires_grad_()
    net = rewritten(Net(), x, grad=True)
    with fxray.record(net, place):
        for step in range(5):
            x.grad = None
            (net(x).sum() * (step + 1)).backward()
            last = x.grad.clone()
            assert len(x._backward_hooks or ()) <= 2
    run = fxray.open(place)
    assert run["x"].grad.steps.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(run["x"].grad[4], last.numpy())
    assert run.notes == ()
    assert not x._backward_hooks


# ---------------------------------------------------------------- what goes wrong on the user's side


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.head = nn.Linear(4, 4), nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, x, ids):
        return self.head(F.relu(self.first(x)) + self.table(ids))


def test_a_forward_that_raises_in_the_middle_leaves_the_rest_in_order(place: str) -> None:
    good, bad = torch.zeros(6, dtype=torch.long), torch.full((6,), 9)
    net = rewritten(Lookup(), X, good, output=True, grad=True, weight=True, weight_grad=True)
    optimizer = sgd(net)
    with fxray.record(net, place):
        for ids in (good, bad, good, good):
            try:
                loss = net(X, ids).square().mean()
            except IndexError:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    run = fxray.open(place)
    assert run["head"].output.steps.tolist() == [0, 2, 3]
    assert run["head"].grad.steps.tolist() == [0, 2, 3]
    assert run["head"].weight_grad.steps.tolist() == [0, 2, 3]
    assert run["first"].output.steps.tolist()[-1] == 3
    assert run.notes == ()


class Fails:
    """A selection that nobody registered, which fails."""

    def make_selection(self, tensor):
        msg = "no such thing"
        raise ValueError(msg)


def test_a_selection_that_fails_is_told_once_and_training_goes_on(place: str) -> None:
    model, xray = Net(), None
    twin = copy.deepcopy(model)
    xray = xray_of(model, X, output=True)
    xray.mark("relu", output=True, grad=True, selection=Fails())
    net = xray.rewrite()
    optimizer, other = sgd(net), sgd(twin)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fxray.record(net, place):
            for _ in range(3):
                train_step(net, optimizer)
                train_step(twin, other)
    texts = [str(w.message) for w in told if issubclass(w.category, fxray.FxrayWarning)]
    assert sum("failed on the output of 'relu'" in text for text in texts) == 1
    assert "Fails" in texts[0]
    assert "no such thing" in texts[0]
    assert torch.equal(net.head.weight, twin.head.weight)
    run = fxray.open(place)
    assert run["head"].output.steps.tolist() == [0, 1, 2]
    assert any("relu output failed 3 times" in note for note in run.notes)


@attrs.frozen
class Extremes:
    """A selection that returns several tensors, one of them of varying length."""

    above: float = 0.0

    def make_selection(self, tensor):
        return {"least": tensor.min(), "above": tensor[tensor > self.above]}


def test_a_selection_of_one_s_own_may_return_several_tensors(place: str) -> None:
    xray = xray_of()
    xray.mark("relu", output=True, grad=True, selection=Extremes(0.1))
    net = xray.rewrite()
    with fxray.record(net, place):
        for k in range(3):
            net(X + k).sum().backward()
    run = fxray.open(place)
    for k in range(3):
        truth = F.relu(net.original.hidden(X + k)).detach()
        kept = run["relu"].output[k]
        assert set(kept) == {"least", "above"}
        assert np.array_equal(kept["least"], truth.min().numpy())
        assert np.array_equal(kept["above"], truth[truth > 0.1].numpy())
        assert run["relu"].output.field("above")[k].shape == kept["above"].shape
    assert run["relu"].grad.field("least").steps.tolist() == [0, 1, 2]
    described = run["relu"].output.selection
    assert described["name"].endswith("Extremes")
    assert described["settings"] == {"above": 0.1}


SHIPPED = (
    fxray.NaturalSelection(),
    fxray.Whole(),
    fxray.TopK(3),
    fxray.Sample(5, seed=1),
    fxray.Mean(),
    fxray.Norm(),
    fxray.Stats(),
    fxray.Histogram(),
)


@pytest.mark.parametrize("selection", SHIPPED, ids=lambda s: type(s).__name__)
def test_no_shipped_selection_touches_the_training(place: str, selection: Any) -> None:
    def train(net: nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        optimizer = sgd(net)
        for _ in range(3):
            train_step(net, optimizer, torch.randn(6, 4))
        return [p.detach().clone() for p in net.parameters()], torch.get_rng_state()

    model = Net()
    twin = copy.deepcopy(model)
    xray = xray_of(model)
    kinds = ("output", "grad", "input", "weight", "weight_grad")
    xray.mark("*", **dict.fromkeys(kinds, True), selection=selection)
    xray.unmark("x", "grad")
    net = xray.rewrite()
    with fxray.record(net, place):
        ours, our_rng = train(net)
    theirs, their_rng = train(twin)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(our_rng, their_rng)
    assert fxray.open(place)["relu"].grad.steps.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- marks that change


def test_a_mark_made_after_the_rewrite_takes_effect_at_the_next_forward(place: str) -> None:
    xray = xray_of()
    net = xray.rewrite()
    optimizer = sgd(net)
    xray.mark("head", output=True, selection=fxray.Whole())
    with fxray.record(net, place):
        train_step(net, optimizer)
        xray.mark("relu", output=True, grad=True, weight=False, selection=fxray.Whole())
        xray.mark("hidden", weight_grad=True)
        train_step(net, optimizer)
        xray.unmark("head")
        train_step(net, optimizer)
        xray.draft = {"linear-1": {"output": True, "selection": fxray.Whole(), "every": 2}}
        for _ in range(3):
            train_step(net, optimizer)
    run = fxray.open(place)
    assert run["relu"].output.steps.tolist() == [1, 2, 3, 4, 5]
    assert run["relu"].grad.steps.tolist() == [1, 2, 3, 4, 5]
    assert run["hidden"].weight_grad.steps.tolist() == [1, 2, 3, 4, 5]
    assert run["head"].output.steps.tolist() == [0, 1, 4]


def test_another_selection_in_an_open_run_starts_its_own_array(place: str) -> None:
    xray = xray_of()
    xray.mark("relu", output=True, selection=fxray.Whole())
    xray.mark("head", output=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net, place):
        net(X)
        xray.mark("relu", output=True, selection=fxray.Mean())
        net(X)
        xray.mark("relu", output=True, selection=fxray.Stats())
        net(X)
        xray.mark("relu", output=True, selection=fxray.Whole())
        net(X)
    run = fxray.open(place)
    assert run["head"].output.steps.tolist() == [0, 1, 2, 3]
    assert run["relu"].output.steps.tolist() == [0, 1, 2, 3]
    relu = F.relu(net.original.hidden(X)).detach().numpy()
    for step in (0, 3):
        kept = run["relu"].output[step]
        kept = kept[""] if isinstance(kept, dict) else kept
        assert np.array_equal(kept, relu)


def test_marks_may_change_between_a_forward_and_its_optimizer_step(place: str) -> None:
    xray = xray_of(weight_grad=True)
    net = xray.rewrite()
    optimizer = sgd(net)
    with fxray.record(net, place):
        for step in range(4):
            loss = net(X).square().mean()
            if step == 1:
                xray.draft.clear()
                xray.mark("head", weight_grad=True, every=2, selection=fxray.Whole())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    run = fxray.open(place)
    assert run["head"].weight_grad.steps.tolist() in ([0, 2], [0, 1, 2])
    assert run["hidden"].weight_grad.steps.tolist() in ([0], [0, 1])
    assert run.notes == ()


def test_the_graph_follows_the_marks_and_a_bare_draft_gives_a_bare_graph() -> None:
    xray = xray_of(output=True)
    net = xray.rewrite()
    count = sum("capture" in str(node.target) for node in net.graph.nodes)
    assert count == 4
    xray.unmark("relu")
    assert sum("capture" in str(node.target) for node in net.graph.nodes) == 3
    xray.draft.clear()
    assert net.code == xray.graph_module.code


# ---------------------------------------------------------------- the life of a recorder


def test_a_closed_recorder_leaves_the_module_bare(place: str) -> None:
    net = rewritten()
    recorder = fxray.record(net, place)
    net(X)
    recorder.close()
    recorder.close()
    net(X)
    assert fxray.open(place)["x"].output.steps.tolist() == [0]
    with fxray.record(net, place):
        net(X)
    assert len(fxray.runs(place)) == 2


def test_two_recorders_on_one_module_are_refused(place: str) -> None:
    net = rewritten()
    with fxray.record(net, place):
        with pytest.raises(fxray.RecordError, match="recorded already"):
            fxray.record(net, place)
        net(X)
    assert len(fxray.runs(place)) == 1


def test_an_error_in_training_closes_the_run_and_is_the_one_that_shows(place: str) -> None:
    net = rewritten()
    with pytest.raises(ZeroDivisionError), fxray.record(net, place):  # noqa: PT012
        net(X)
        1 / 0  # noqa: B018
    run = fxray.open(place)
    assert run["x"].output.steps.tolist() == [0]
    assert run.attributes["finished"] is not None


def test_what_wraps_a_rewritten_module_is_recorded(place: str) -> None:
    net = rewritten()
    outer = nn.Sequential(net, nn.Linear(2, 1))
    with fxray.record(outer, place):
        outer(X).sum().backward()
    assert fxray.open(place)["x"].output.steps.tolist() == [0]
    for wrong, words in (
        (Net(), "rewrite"),
        (3, "int"),
        (nn.Sequential(net, rewritten()), "2 rewritten"),
    ):
        with pytest.raises(fxray.RecordError, match=words):
            fxray.record(wrong, place)


def test_the_living_run_is_readable_after_a_flush(place: str) -> None:
    net = rewritten()
    with fxray.record(net, place, name="living", tags={"lr": 0.1}) as recorder:
        for step in range(3):
            net(X + step)
        recorder.flush()
        assert recorder.run["x"].output.steps.tolist() == [0, 1, 2]
        assert recorder.run.attributes["finished"] is None
        net(X)
    run = fxray.open(place)
    assert (run.name, run.tags, run.id) == ("living", {"lr": 0.1}, recorder.id)
    assert run["x"].output.steps.tolist() == [0, 1, 2, 3]


def test_commits_in_the_background_disturb_nothing(place: str) -> None:
    net = rewritten(output=True, grad=True)
    with fxray.record(net, place, commit_every=0.001) as recorder:
        seen = 0
        for step in range(200):
            net(X + step).sum().backward()
            if step % 20 == 19:
                with contextlib.suppress(fxray.NotSavedError):
                    steps = recorder.run["x"].output.steps.tolist()
                    assert steps == list(range(len(steps)))
                    assert len(steps) >= seen
                    seen = len(steps)
    run = fxray.open(place)
    assert run["x"].output.steps.tolist() == list(range(200))
    assert np.array_equal(run["x"].output[150], (X + 150).numpy())
    assert run["head"].grad.steps.tolist() == list(range(200))


def test_a_process_that_never_closes_leaves_a_complete_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch, fxray
            from torch import nn
            torch.manual_seed(0)
            xray = fxray.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(2, 4))
            xray.draft.clear()
            xray.mark("1", output=True, grad=True)
            net = xray.rewrite()
            fxray.record(net, sys.argv[1], name="left open", commit_every=1000)
            for _ in range(5):
                net(torch.randn(2, 4)).sum().backward()
            if len(sys.argv) > 2:
                raise SystemExit(int(sys.argv[2]))
            """
        )
    )
    for at, extra in enumerate(([], ["3"])):
        command = [sys.executable, "-W", "error", str(script), str(tmp_path / f"runs{at}"), *extra]
        root = str(Path(fxray.__file__).parents[1])
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert done.returncode == (3 if extra else 0), done.stderr
        assert done.stderr == ""
        run = fxray.open(tmp_path / f"runs{at}")
        assert run["1"].output.steps.tolist() == [0, 1, 2, 3, 4]
        assert run["1"].grad.steps.tolist() == [0, 1, 2, 3, 4]
        assert run.attributes["finished"] is not None


def test_numbers_of_one_s_own_stand_beside_the_step(place: str) -> None:
    net = rewritten()
    optimizer = sgd(net)
    losses = []
    with fxray.record(net, place) as recorder:
        recorder.log(seed=7)
        for epoch in range(2):
            for x in recorder.epoch([X, X + 1]):
                loss = train_step(net, optimizer, x)
                recorder.log(loss=loss, lr=0.1, epoch=epoch)
                losses.append(loss.item())
        with pytest.raises(fxray.RecordError, match="2 elements"):
            recorder.log(bad=torch.zeros(2))
        with pytest.raises(fxray.RecordError, match="bad"):
            recorder.log(bad="words")
        recorder.log(nan=float("nan"), **{"train/f1 ∆": np.float32(0.5)})
    run = fxray.open(place)
    assert run.log["loss"].steps.tolist() == [0, 1, 2, 3]
    assert [float(run.log["loss"][k]) for k in range(4)] == losses
    assert float(run.log["epoch"].sel(epoch=1, batch=1)) == 1
    assert float(run.log["seed"][0]) == 7
    assert float(run.log["train/f1 ∆"][3]) == 0.5
    assert np.isnan(run.log["nan"][3])


def test_a_number_logged_twice_in_a_step_keeps_both(place: str) -> None:
    net = rewritten()
    with fxray.record(net, place) as recorder:
        net(X)
        recorder.log(loss=1.0)
        recorder.log(loss=2.0)
        net(X)
        recorder.log(loss=3.0)
    series = fxray.open(place).log["loss"]
    assert [float(values) for _, values in series] == [1.0, 2.0, 3.0]
    keys = [(row.step, row.call) for row, _ in series]
    assert len(set(keys)) == 3, keys


# ---------------------------------------------------------------- all sorts of tensors


class Sorts(nn.Module):
    """Gives a tensor of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = x * self.scale
        return {
            "bf16": y.to(torch.bfloat16),
            "fp16": y.half(),
            "fp8": y.to(torch.float8_e4m3fn),
            "int64": y.long(),
            "int8": y.to(torch.int8),
            "bool": y > 0,
            "complex": torch.complex(y, -y),
            "conj": torch.complex(y, -y).conj(),
            "scalar": y.sum(),
            "empty": y[:, :0],
            "strided": y.t(),
            "expanded": y[:, :1].expand(-1, 3),
            "nan": y / 0,
        }


def test_tensors_of_every_sort_come_back_to_the_bit(place: str) -> None:
    net = rewritten(Sorts(), X, output=True)
    with fxray.record(net, place):
        for k in range(3):
            out = net(X - k)
    run = fxray.open(place)
    for name, tensor in out.items():
        (path,) = run.architecture.returns[""][list(out).index(name) :][:1]
        kept = run[path].output[2]
        assert kept.shape == tuple(tensor.shape), name
        assert str(kept.dtype) == str(tensor.dtype).removeprefix("torch."), name
        bits = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        assert kept.tobytes() == bits.numpy().tobytes(), name


def test_gradients_in_bf16_and_complex_are_kept(place: str) -> None:
    xray = xray_of(Sorts())
    xray.mark(["to-0", "complex-0", "sum-0"], grad=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net, place):
        out = net(X)
        (out["bf16"].float().sum() + out["complex"].abs().sum() + out["scalar"]).backward()
    run = fxray.open(place)
    assert str(run["to"].grad[0].dtype) == "bfloat16"
    assert run["complex"].grad[0].dtype == np.complex64
    assert run["sum"].grad[0].shape == ()


def test_the_last_small_batch_keeps_its_true_shape(place: str) -> None:
    net = rewritten(output=True, grad=True, input=True)
    optimizer = sgd(net)
    with fxray.record(net, place):
        for size in (6, 6, 2, 6, 1):
            train_step(net, optimizer, X[:size])
    run = fxray.open(place)
    for step, size in enumerate((6, 6, 2, 6, 1)):
        assert run["relu"].output[step].shape == (size, 8)
        assert run["relu"].grad[step].shape == (size, 8)
        assert run["head"].input[step]["0"].shape == (size, 8)


def test_a_dtype_that_changes_in_an_open_run_is_told_and_does_not_end_the_recording(
    place: str,
) -> None:
    net = rewritten(output=True, weight=True)
    with pytest.warns(fxray.FxrayWarning, match="float32.*float64"):  # noqa: SIM117,PT031
        with fxray.record(net, place):
            net(X)
            net.double()
            net(X.double())
            net.float()
            net(X)
    run = fxray.open(place)
    for series in (run["x"].output, run["head"].output, run["head"].weight):
        assert {0, 2} <= set(series.steps.tolist())
        assert series[2].dtype == np.float32


def test_inference_mode_and_no_grad_are_recorded(place: str) -> None:
    net = rewritten()
    with fxray.record(net, place):
        with torch.inference_mode():
            assert net(X).is_inference()
        with torch.no_grad():
            net(X)
    assert fxray.open(place)["head"].output.steps.tolist() == [0, 1]


def test_a_captured_tensor_changed_afterwards_keeps_its_old_numbers(place: str) -> None:
    net = rewritten(output=True, weight=True, weight_grad=True)
    optimizer = sgd(net)
    with fxray.record(net, place, commit_every=1000):
        x = X.clone()
        train_step(net, optimizer, x)
        with torch.no_grad():
            used = net.head.weight.grad.clone()
            x.zero_()
            net.head.weight.grad.zero_()
            net.head.weight.zero_()
    run = fxray.open(place)
    assert np.array_equal(run["x"].output[0], X.numpy())
    assert np.array_equal(run["head"].weight_grad[0], used.numpy())
    assert run["head"].weight[0].any()


class Slow(nn.Module):
    def forward(self, x):
        y = x
        for _ in range(20):
            y = torch.sin(y)
        return x + 1


def test_forwards_on_two_threads_do_not_mix(place: str) -> None:
    xray = xray_of(Slow(), torch.zeros(2, 3))
    xray.mark(["x", "add"], output=True, selection=fxray.Whole())
    net = xray.rewrite().eval()

    def work(thread: int) -> None:
        with torch.no_grad():
            for at in range(50):
                net(torch.full((2, 3), float(thread * 1000 + at)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    with fxray.record(net, place):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run = fxray.open(place)
    given = {(row.step, row.call): values[0, 0] for row, values in run["x"].output}
    gave = {(row.step, row.call): values[0, 0] for row, values in run["add"].output}
    assert gave.keys() <= given.keys()
    assert all(gave[key] == given[key] + 1 for key in gave)
    assert len(given) == 100 or run.notes


# ---------------------------------------------------------------- numbers that wait for their row


@attrs.frozen
class Odd:
    """Returns one of the odd things that a selection may be written to return."""

    what: str

    def make_selection(self, tensor):
        return {
            "view": lambda: tensor[0, 0],
            "views": lambda: {"first": tensor[0, 0], "row": tensor[1]},
            "itself": lambda: tensor,
            "conj": lambda: torch.complex(tensor, -tensor).sum().conj(),
            "negated": lambda: torch.complex(tensor, -tensor).conj().imag,
            "bf16": lambda: tensor.sum().bfloat16(),
            "sparse": lambda: tensor.relu().to_sparse(),
            "leaf": lambda: nn.Parameter(tensor.sum()),
            "with grad": lambda: tensor.sum() * torch.ones((), requires_grad=True),
            "number": lambda: tensor.sum().item(),
            "nothing": dict,
            "bad name": lambda: {"a.b": tensor.sum()},
            "no name": lambda: {"": tensor.sum()},
            "no tensor": lambda: {"sum": tensor.sum(), "text": "text"},
            "no numbers": lambda: torch.empty((), device="meta"),
            "quantized": lambda: torch.quantize_per_tensor(tensor, 1.0, 0, torch.quint8),
        }[self.what]()


@pytest.mark.parametrize(
    "what", ["view", "views", "itself", "conj", "negated", "bf16", "sparse", "leaf", "with grad"]
)
def test_whatever_a_selection_returns_is_kept_as_it_was(place: str, what: str) -> None:
    xray = xray_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True)), X)
    xray.mark("0", output=True, selection=Odd(what))
    xray.mark("0", grad=True, selection=fxray.Mean())
    net = xray.rewrite()
    with fxray.record(net, place):
        for k in range(3):
            net(X + k).sum().backward()
    run = fxray.open(place)
    for k in range(3):
        given = nn.functional.linear(X + k, net.original[0].weight, net.original[0].bias).detach()
        truth = Odd(what).make_selection(given)
        kept = run["0"].output[k]
        for field, tensor in (truth if isinstance(truth, dict) else {"": truth}).items():
            values = kept[field] if field else kept
            dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
            assert str(values.dtype) == str(dense.dtype).removeprefix("torch.")
            assert values.shape == tuple(dense.shape)
            bits = dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            assert values.tobytes() == bits.numpy().tobytes()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("number", "returned float"),
        ("nothing", "empty mapping"),
        ("bad name", "'a.b'"),
        ("no name", "''"),
        ("no tensor", "'text' is str"),
        ("no numbers", "meta"),
        ("quantized", "ScalarType|scalar type|quint8|dtype"),
    ],
)
def test_what_cannot_be_kept_is_told_once_and_beside_it_all_is_kept(
    place: str, what: str, words: str
) -> None:
    xray = xray_of()
    xray.mark(["hidden", "head"], output=True, selection=fxray.Mean())
    xray.mark("relu", output=True, grad=True, selection=Odd(what))
    net = xray.rewrite()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fxray.record(net, place):
            for k in range(3):
                net(X + k).sum().backward()
    texts = [str(w.message) for w in told if issubclass(w.category, fxray.FxrayWarning)]
    for kind in ("output", "grad"):
        (text,) = [text for text in texts if f"failed on the {kind} of 'relu'" in text]
        assert "Odd" in text
        assert re.search(words, text), text
    run = fxray.open(place)
    assert any("relu output failed 3 times" in note for note in run.notes)
    assert any("relu grad failed 3 times" in note for note in run.notes)
    for path in ("hidden", "head"):
        assert run[path].output.steps.tolist() == [0, 1, 2]
    with pytest.raises(fxray.NotSavedError):
        run["relu"].output  # noqa: B018


def test_a_selection_may_fail_now_and_then(place: str) -> None:
    class Sometimes:
        def make_selection(self, tensor):
            return tensor.mean() if tensor.sum() > 0 else torch.empty((), device="meta")

    xray = xray_of()
    xray.mark("x", output=True, selection=Sometimes())
    net = xray.rewrite()
    xs = [X - 5, X + 5, X - 5, X + 6]
    with pytest.warns(fxray.FxrayWarning, match="Sometimes failed"):  # noqa: SIM117,PT031
        with fxray.record(net, place):
            for x in xs:
                net(x)
    series = fxray.open(place)["x"].output
    assert series.steps.tolist() == [1, 3]
    assert [float(series[k]) for k in (1, 3)] == [float(xs[k].mean()) for k in (1, 3)]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.a(x), self.b(x)


def test_a_row_that_never_gets_complete_is_written_at_close(place: str) -> None:
    net = rewritten(Heads(), X, grad=True)
    with pytest.warns(fxray.FxrayWarning, match=r"grad of b: no gradient") as told:  # noqa: SIM117
        with fxray.record(net, place):
            net(X)[0].sum().backward()
    assert len(told) == 1
    run = fxray.open(place)
    assert np.array_equal(run["a"].grad[0], np.ones((6, 2), np.float32))
    assert len(run.notes) == 1


# ---------------------------------------------------------------- forwards that go by number


KINDS = ("output", "grad", "input", "weight", "weight_grad")


def train_by_number(net: Any, optimizer: Any, x: torch.Tensor, *, due: str | None = None) -> int:
    """Train a step of Net; hand over what it computes as the ops of compiled code do."""
    intake, model = receiver_of(net.handle), net.original
    due = intake.due_next(training=net.training) if due is None else due
    number = intake.begin_numbered(training=net.training, due=due)
    hidden = model.hidden(x)
    relu = F.relu(hidden)
    head = model.head(relu)
    given = {"hidden": x, "relu": hidden, "head": relu}
    gave = {"x": x, "hidden": hidden, "relu": relu, "head": head}
    fields = {path: {"": t.detach().clone()} for path, t in gave.items()}
    for path, tensor in gave.items():
        words = {"item": "", "fields": fields[path], "size": tuple(tensor.shape)}
        intake.take(number, path, "output", **words)
        if path in given:
            intake.take_whole(number, path, "input", item="0", tensor=given[path])
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(_hand_over, intake, number, path))
    intake.await_gradients(number, [(p, "") for p, t in gave.items() if t.requires_grad])
    intake.returned(number)
    if net.training:
        optimizer.zero_grad()
        head.square().mean().backward()
        optimizer.step()
    return number


def _hand_over(intake: Any, number: int, path: str, gradient: torch.Tensor) -> None:
    kept = {"": gradient.detach().clone()}
    intake.take(number, path, "grad", item="", fields=kept, size=tuple(gradient.shape))


def records(run: fxray.Run) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """Return of every series where each record stands, its sort, shape and bits."""
    found = {}
    for path in run.architecture:
        for kind in KINDS:
            with contextlib.suppress(fxray.NotSavedError, fxray.UnknownNameError):
                series = getattr(run[path], kind)
                found[path, kind] = [
                    (row.step, row.epoch, row.batch, row.call, row.phase, item, array.tobytes())
                    for row, values in series
                    for item, array in (
                        values if isinstance(values, dict) else {"": values}
                    ).items()
                ]
    return found


def scheduled(model: nn.Module) -> Any:
    """Return Net rewritten, its captures under four schedules."""
    xray = xray_of(model)
    xray.mark("*", output=True, selection=fxray.Whole())
    xray.mark(["relu", "head"], grad=True, every=2, selection=fxray.Whole())
    xray.mark(["relu", "head"], input=True, steps=[1, 4], selection=fxray.Whole())
    xray.mark("*", weight=True, weight_grad=True, every=3, selection=fxray.Whole())
    return xray.rewrite()


def test_forwards_by_number_fill_the_same_run_as_in_eager_mode(place: str) -> None:
    def train(net: Any, step: Any, where: str) -> fxray.Run:
        optimizer = sgd(net)
        with fxray.record(net, where) as recorder:
            for _ in range(2):
                for x in recorder.epoch([X, X + 1, X[:2]]):
                    step(net, optimizer, x)
                net.eval()
                for x in recorder.phase("valid", [X - 1, X - 2]):
                    step(net, optimizer, x) if step is train_by_number else net(x)
                net.train()
        return fxray.open(where)

    model = Net()
    ours = train(scheduled(copy.deepcopy(model)), train_by_number, f"{place}-numbered")
    eager = train(scheduled(model), train_step, place)
    assert records(ours) == records(eager)
    assert {kind for _, kind in records(eager)} == set(KINDS)
    assert ours.notes == eager.notes
    assert_unique(ours)


def test_what_is_due_next_is_told_before_it_is_counted(place: str) -> None:
    xray = xray_of()
    xray.mark("relu", output=True, every=2, selection=fxray.Whole())
    xray.mark("relu", grad=True, every=3, selection=fxray.Whole())
    xray.mark("head", weight=True)
    net = xray.rewrite()
    output, grad = ("relu", "output"), ("relu", "grad")
    expected = [{output, grad}, set(), {output}, {grad}, {output}, set(), {output, grad}]
    optimizer = sgd(net)
    with fxray.record(net, place) as recorder:
        intake = receiver_of(net.handle)
        names = []
        for due in expected:
            names.append(intake.due_next(training=True))
            assert intake.due_next(training=True) == names[-1]
            assert intake.captures_due(names[-1]) >= due
            train_step(net, optimizer)
        assert names == ["all", "", "every2", "all", "every2", "", "all"]
        # Each phase counts its own steps; the forwards of one step count once.
        assert intake.captures_due(intake.due_next(training=True)) == set()  # the eighth
        with recorder.phase("valid"):
            assert intake.captures_due(intake.due_next(training=True)) == {output, grad}
            assert intake.captures_due(intake.due_next(training=False)) == {output, grad}
        assert intake.captures_due(intake.due_next(training=False)) == {output, grad}
        train_step(net, optimizer)
        with recorder.step():  # the ninth
            for _ in range(3):
                assert intake.captures_due(intake.due_next(training=True)) == {output}
                train_step(net, optimizer)
        assert intake.captures_due(intake.due_next(training=True)) >= {grad}
        xray.mark("head", output=True, every=9, selection=fxray.Whole())
        assert intake.captures_due(intake.due_next(training=True)) == {grad, ("head", "output")}
        train_step(net, optimizer)
    assert intake.due_next(training=True) == ""
    run = fxray.open(place)
    assert coordinates(run["relu"].output)[-3:] == [(8, 0, 8, call, "train") for call in range(3)]


def test_after_one_set_of_captures_due_the_next_is_all_of_them(place: str) -> None:
    xray = xray_of()
    for every, path in ((2, "x"), (3, "hidden"), (5, "relu"), (7, "head")):
        xray.mark(path, output=True, every=every, selection=fxray.Whole())
    net = xray.rewrite()
    names, numbers = [], []
    with fxray.record(net, place):
        intake = receiver_of(net.handle)
        for _ in range(60):
            names.append(intake.due_next(training=True))
            due = {row[0] for row in intake.captures_due(names[-1])}
            numbers.append((len(names) - 1, due))
            train_by_number(net, sgd(net), X)
    truth = {
        p: set(range(0, 60, e)) for p, e in (("x", 2), ("hidden", 3), ("relu", 5), ("head", 7))
    }
    for step, due in numbers:
        assert due >= {path for path, steps in truth.items() if step in steps}
    assert set(names) == {"", "every2", "all"}
    run = fxray.open(place)
    for path, steps in truth.items():
        assert set(run[path].output.steps.tolist()) == steps
    assert run.notes == ()


def test_a_forward_that_was_compiled_for_less_is_counted(place: str) -> None:
    net = scheduled(Net())
    with pytest.warns(fxray.FxrayWarning, match="compiled function") as told:  # noqa: SIM117,PT031
        with fxray.record(net, place):
            for due in ("all", "", "always"):
                train_by_number(net, sgd(net), X, due=due)
    assert sum("compiled function" in str(w.message) for w in told) == 1
    (note,) = [note for note in fxray.open(place).notes if "compiled for other" in note]
    assert note.startswith("2 forwards")


def test_what_goes_wrong_by_number_is_absorbed_as_in_eager_mode(place: str) -> None:
    xray = xray_of(output=True, grad=True)
    xray.mark("relu", output=True, selection=Fails())
    net = xray.rewrite()
    told: Any
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fxray.record(net, place):
            intake = receiver_of(net.handle)
            words = {"item": "", "size": (2,)}
            one = {"": torch.ones(2)}
            for nowhere in (-1, 99):  # of no forward: nothing
                intake.take(nowhere, "head", "output", fields=one, **words)
                intake.take_whole(nowhere, "head", "output", item="", tensor=torch.ones(2))
                intake.await_gradients(nowhere, [("head", "")])
                intake.returned(nowhere)
            for number in range(3):
                assert intake.begin_numbered(training=True, due="all") == number
                fields = {"": torch.ones(2).double()} if number == 1 else one
                intake.take(number, "head", "output", fields=fields, **words)
                if number != 1:
                    intake.take_whole(number, "relu", "output", item="", tensor=torch.ones(2))
                intake.take(number, "nowhere", "output", fields=one, **words)
                intake.take(number, "head", "weight", fields=one, **words)
                intake.await_gradients(number, [("head", ""), ("nowhere", "")])
                intake.returned(number)
            for _ in range(2):  # the second time, one backward too many
                intake.take(2, "head", "grad", fields=one, **words)
            for _ in range(2):
                intake.begin_numbered(training=True, due="all")
            intake.take(1, "head", "grad", fields=one, **words)  # too late
    texts = [str(w.message) for w in told if issubclass(w.category, fxray.FxrayWarning)]
    assert sum("Fails failed on the output of 'relu'" in text for text in texts) == 1
    assert sum("float32[2] before and float64[2] now" in text for text in texts) == 1
    run = fxray.open(place)
    assert run["head"].output.steps.tolist() == [0, 2]
    assert run["head"].grad.steps.tolist() == [2]
    assert sorted(note[:9] for note in run.notes if "gradients" in note) == [
        "1 further",
        "1 gradien",
    ]
    assert any("relu output failed 2 times" in note for note in run.notes)


def test_a_forward_by_number_that_ends_half_way_holds_nobody_up(place: str) -> None:
    xray = xray_of(weight=True)
    xray.mark("x", output=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net, place) as recorder:
        intake = receiver_of(net.handle)
        for step in range(4):
            number = intake.begin_numbered(training=True, due="all")
            kept = {"": torch.full((2,), float(step))}
            intake.take(number, "x", "output", item="", fields=kept, size=(2,))
            if step != 1:
                intake.returned(number)
        recorder.flush()
        assert recorder.run["x"].output.steps.tolist() == [0, 1, 2, 3]
        assert recorder.run["head"].weight.steps.tolist() == [0, 1, 2, 3]


def test_by_number_too_nothing_is_taken_where_nobody_records(place: str) -> None:
    net = rewritten(output=True)
    with fxray.record(net, place):
        net(X)
        intake = receiver_of(net.handle)
        answers = []
        x = torch.ones((), requires_grad=True)
        y = x * 2
        y.register_hook(lambda _: answers.append(intake.begin_numbered(training=True, due="all")))
        y.register_hook(lambda _: answers.append(intake.due_next(training=True)))
        y.backward()
        assert answers == [-1, ""]  # a recomputation
        assert intake.begin_numbered(training=True, due="all") == 0
    assert intake.begin_numbered(training=True, due="all") == -1
    intake.take(0, "x", "output", item="", fields={"": torch.ones(2)}, size=(2,))


def test_by_number_too_a_store_that_fails_stops_the_recording_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    twin = copy.deepcopy(model)

    def failing(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ZarrWriter, "append", failing)
    net = scheduled(model)
    optimizer = sgd(net)
    with pytest.warns(fxray.FxrayWarning, match="No space left"):  # noqa: PT031
        recorder = fxray.record(net, tmp_path / "runs")
        intake = receiver_of(net.handle)
        for _ in range(3):
            if receiver_of(net.handle) is None:
                assert intake.begin_numbered(training=True, due="all") == -1
                train_step(net, optimizer)
            else:
                train_by_number(net, optimizer, X)
        with pytest.raises(fxray.StoreError, match="No space left"):
            recorder.close()
    other = sgd(twin)
    for _ in range(3):
        train_step(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


# ---------------------------------------------------------------- nothing is kept alive


def test_a_recorder_that_was_closed_keeps_no_model_alive(place: str) -> None:
    model = Net()
    xray = xray_of(model, X, output=True, grad=True, weight=True, weight_grad=True)
    net = xray.rewrite()
    recorder = fxray.record(net, place)
    optimizer = sgd(net)
    for _ in range(3):
        train_step(net, optimizer)
    recorder.close()
    alive = [weakref.ref(thing) for thing in (model, net, recorder, net.head.weight)]
    del model, net, xray, recorder, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_recorded_forward_holds_no_autograd_graph(place: str) -> None:
    net = rewritten(output=True, grad=True, input=True)
    with fxray.record(net, place):
        out = net(X)
        node = weakref.ref(out)
        del out
        gc.collect()
        assert node() is None
        net(X).sum().backward()
    run = fxray.open(place)
    assert run["x"].output.steps.tolist() == [0, 1]
    assert run["head"].grad.steps.tolist() == [1]


def test_captures_that_kept_nothing_are_named_at_close_with_the_reason(place: str) -> None:
    xray = xray_of()
    xray.mark("relu", output=True, steps=[100])
    xray.mark("head", grad=True)
    xray.mark("hidden", weight_grad=True)
    xray.mark("hidden", output=True)
    net = xray.rewrite()
    with pytest.warns(fxray.FxrayWarning) as told:  # noqa: SIM117
        with fxray.record(net, place), torch.no_grad():
            net(X)
    assert len(told) == 1
    text = str(told[0].message)
    assert "the output of relu: never due" in text
    assert "the grad of head: no gradient" in text
    assert "the weight_grad of hidden: no optimizer" in text
    assert "output of hidden" not in text
    notes = fxray.open(place).notes
    assert len(notes) == 3
    with pytest.warns(fxray.FxrayWarning, match="never called"):
        fxray.record(net, place).close()


class Forks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.sigmoid(self.a(x)) if self.training else torch.tanh(self.b(x))


def test_an_op_of_the_other_mode_is_named_as_not_reached(place: str) -> None:
    net = rewritten(Forks(), X, output=True)
    with pytest.warns(fxray.FxrayWarning, match="output of b, tanh: not reached.*eval"):  # noqa: SIM117
        with fxray.record(net, place):
            net(X)


# ---------------------------------------------------------------- what goes wrong on the disk


def trained(net: nn.Module, steps: int) -> list[torch.Tensor]:
    optimizer = sgd(net)
    for _ in range(steps):
        train_step(net, optimizer)
    return [p.detach().clone() for p in net.parameters()]


def test_a_store_that_fails_stops_the_recording_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    net = rewritten(model, X, output=True, grad=True)
    append, rows = ZarrWriter.append, itertools.count()

    def failing(self: Any, *args: Any) -> None:
        row = next(rows)  # two streams: ten rows are five steps
        if row == 10:
            recorder.flush()
        if row >= 20:
            msg = "No space left on device"
            raise OSError(28, msg)
        append(self, *args)

    monkeypatch.setattr(ZarrWriter, "append", failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorder = fxray.record(net, tmp_path / "runs")
        ours = trained(net, 12)
        with pytest.raises(fxray.StoreError, match="No space left"):
            recorder.close()
    assert len([w for w in told if issubclass(w.category, fxray.FxrayWarning)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours, trained(twin, 12), strict=True))
    recorder.close()  # told once
    monkeypatch.undo()
    run = fxray.open(tmp_path / "runs")
    assert run["x"].output.steps.tolist() == [0, 1, 2, 3, 4]
    with fxray.record(net, tmp_path / "runs"):  # the module is free again
        net(X).sum().backward()


def test_a_run_folder_that_becomes_a_file_stops_the_recording_and_not_the_training(
    tmp_path: Path,
) -> None:
    place = tmp_path / "runs"
    model = Net()
    twin = copy.deepcopy(model)
    net = rewritten(model, X, output=True, grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorder = fxray.record(net, place, commit_every=0.01)
        optimizer = sgd(net)
        for step in range(20):
            if step == 5:
                place.rename(tmp_path / "elsewhere")
                place.write_text("in the way")
            train_step(net, optimizer)
            if step in (5, 10):
                recorder.flush()
        with pytest.raises(fxray.StoreError):
            recorder.close()
    assert len([w for w in told if issubclass(w.category, fxray.FxrayWarning)]) == 1
    ours = [p.detach().clone() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours, trained(twin, 20), strict=True))


def test_an_error_on_closing_does_not_hide_the_training_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = rewritten()

    def failing(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ZarrWriter, "append", failing)

    def train() -> None:
        with fxray.record(net, tmp_path / "runs"):
            net(X)
            1 / 0  # noqa: B018

    with pytest.warns(fxray.FxrayWarning), pytest.raises(ZeroDivisionError):
        train()


def _child(net: Any, recorder: Any, answers: Any) -> None:
    out = net(X)
    out.sum().backward()
    recorder.log(loss=1.0)
    recorder.flush()
    recorder.close()
    answers.put(out.detach().numpy().tolist())


def test_a_forked_child_computes_and_records_nothing(tmp_path: Path) -> None:
    net = rewritten(output=True, grad=True)
    with fxray.record(net, tmp_path / "runs", commit_every=0.01) as recorder:
        net(X).sum().backward()
        recorder.flush()
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_child, args=(net, recorder, answers))
        child.start()
        answer = answers.get(timeout=30)
        child.join(30)
        assert child.exitcode == 0
        assert answer == net.original(X).tolist()
        net(X).sum().backward()
    run = fxray.open(tmp_path / "runs")
    assert run["x"].output.steps.tolist() == [0, 1]
    assert run.attributes["finished"] is not None


def test_loader_workers_may_fork_while_recording(tmp_path: Path) -> None:
    net = rewritten(output=True, grad=True)
    loader = torch.utils.data.DataLoader(
        X, batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    with fxray.record(net, tmp_path / "runs", commit_every=0.01) as recorder:
        for _ in range(2):
            for x in recorder.epoch(loader):
                net(x).sum().backward()
    assert fxray.open(tmp_path / "runs")["x"].output.steps.tolist() == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------- bad input, before anything runs


def test_an_unknown_layer_names_the_nearest() -> None:
    xray = xray_of()
    with pytest.raises(fxray.UnknownNameError, match="'hidden'"):
        xray.mark("hiden", output=True)
    with pytest.raises(fxray.UnknownNameError, match="'relu'"):
        xray.draft["relux"]["output"] = True
    with pytest.raises(fxray.UnknownNameError, match="relu-0"):
        xray.draft = {"relu-1": {"output": True}}
    with pytest.raises(fxray.UnknownNameError, match="Conv2d"):
        xray.mark(nn.Conv2d, output=True)
    assert xray.draft.captures() == ()


def test_a_flag_that_is_no_bool_is_refused() -> None:
    xray = xray_of()
    for flag in (1, "yes", None, 0.5):
        with pytest.raises(fxray.DraftError, match="relu"):
            xray.draft["relu"]["output"] = flag
    with pytest.raises(fxray.DraftError, match="not a flag"):
        xray.mark("relu", output="yes")
    with pytest.raises(fxray.DraftError, match="relu"):
        xray.draft = {"relu-0": {"output": "yes"}}
    assert xray.draft.captures() == ()


def test_a_selection_without_make_selection_is_refused() -> None:
    xray = xray_of()
    for wrong in (3, object(), "TopK", lambda t: t):
        with pytest.raises(fxray.SelectionError, match="make_selection"):
            xray.mark("relu", output=True, selection=wrong)
    with pytest.raises(fxray.SelectionError, match=r"TopK\("):
        xray.mark("relu", output=True, selection=fxray.TopK)
    with pytest.raises(fxray.SelectionError, match="make_selection"):
        xray.draft["relu"]["selection"] = 3
    assert xray.draft.captures() == ()


@pytest.mark.parametrize("wrong", [None, 3, "model", F.relu, lambda x: x, Net])
def test_a_model_that_is_no_module_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"Net\(" if wrong is Net else "Module"):
        fxray.trace(wrong, X)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((torch.zeros(2, 5),), {}, r"fails on this input.*x float32\[2, 5\].*mat1"),
        ((X, X), {}, "does not fit Net.forward"),
        ((), {"y": X}, "does not fit Net.forward"),
        (("text",), {}, "itself fails"),
        ((X.long(),), {}, "itself fails.*int64"),
    ],
)
def test_an_input_that_does_not_fit_is_told_in_the_model_s_words(
    args: tuple[Any, ...], kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(fxray.TraceError, match=words):
        fxray.trace(Net(), *args, **kwargs)


def test_a_folder_that_holds_no_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "file").write_text("a")
    for wrong in ("nowhere", "notes", "file"):
        with pytest.raises(fxray.NotARunError, match=wrong):
            fxray.open(tmp_path / wrong)
        with pytest.raises(fxray.NotARunError, match=wrong):
            fxray.runs(tmp_path / wrong)
    net = rewritten()
    with fxray.record(net, tmp_path / "runs", name="baseline"):
        net(X)
    with pytest.raises(fxray.NotARunError, match="baseline"):
        fxray.open(tmp_path / "runs", "basline")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    net = rewritten()
    (tmp_path / "file").write_text("a")
    for wrong in (tmp_path / "file", tmp_path / "file" / "runs", "/proc/nowhere/runs"):
        with pytest.raises(fxray.StoreError, match=str(wrong)):
            fxray.record(net, wrong)
    with fxray.record(net, tmp_path / "runs"):  # the module is still free
        net(X)


def test_tags_that_are_no_json_are_refused_before_anything_runs(tmp_path: Path) -> None:
    net = rewritten()
    with pytest.raises((fxray.FxrayError, TypeError), match=r"tags|JSON"):
        fxray.record(net, tmp_path / "runs", tags={"model": net})
    with fxray.record(net, tmp_path / "runs"):
        net(X)


def test_a_step_that_was_not_saved_names_the_nearest(place: str) -> None:
    net = rewritten(output=True, every=10)
    with fxray.record(net, place):
        for _ in range(31):
            net(X)
    run = fxray.open(place)
    with pytest.raises(fxray.NotSavedError, match=r"10.*20"):
        run["relu"].output[14]
    with pytest.raises(fxray.NotSavedError, match="30"):
        run["relu"].output[1000]
    with pytest.raises(fxray.NotSavedError, match="output"):
        run["relu"].grad  # noqa: B018
    with pytest.raises(fxray.UnknownNameError, match="relu"):
        run["rellu"]
