"""What training loops do with a compiled module: marks that change, graph breaks, transforms."""

# To mypy a module's attribute is Tensor | Module, and a loop takes whatever can be called.
# mypy: ignore-errors

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fxray
from fxray import Mean, Whole
from tests.loops import (
    Loop,
    Net,
    Witness,
    assert_as_seen,
    assert_equal,
    assert_trained_alike,
    batch,
    called,
    marked,
    sgd,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Let no test find what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------- marks, methods


def test_marks_of_a_compiled_module_change_by_draft_by_unmark_and_down_to_none():
    model = Net()
    xray = marked(model, kinds=("output",))
    net = xray.rewrite()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(net, backend=counter, fullgraph=True)
    optimizer, seen = sgd(net), []
    changes = {
        2: lambda: xray.unmark("hidden"),
        3: lambda: setattr(xray, "draft", {"hidden": {"grad": True, "every": 2}}),
        6: xray.draft.clear,
        8: lambda: xray.mark("act", output=True, weight=False, selection=Mean()),
        9: lambda: xray.mark("head", weight_grad=True, selection=Whole()),
    }
    with fxray.record(net) as recorder:
        for step in range(11):
            changes.get(step, lambda: None)()
            seen.append(copy.deepcopy(model))
            optimizer.zero_grad()
            call(batch(step)).square().mean().backward()
            optimizer.step()
    run = recorder.run
    assert run["hidden"].output.steps.tolist() == [0, 1]
    assert run["hidden"].grad.steps.tolist() == [4]
    assert run["head"].output.steps.tolist() == [*range(6)]
    assert run["act"].output.steps.tolist() == [*range(6), 8, 9, 10]
    assert run["head"].weight_grad.steps.tolist() == [9, 10]
    for step in (8, 10):
        expected = F.relu(seen[step].hidden(batch(step))).mean().item()
        kept = run["act"].output[step]
        kept = kept["mean"] if isinstance(kept, dict) and "mean" in kept else kept
        kept = kept[""] if isinstance(kept, dict) else kept
        assert float(kept) == pytest.approx(expected, rel=1e-5)
    twin = seen[10]
    twin.zero_grad()
    twin(batch(10)).square().mean().backward()
    assert_equal(run["head"].weight_grad[10], twin.head.weight.grad, "compiled")
    # One before, one for each change, one more for the two sets that a schedule makes of step 3's.
    assert counter.frame_count <= len(changes) + 2


def test_marks_of_a_compiled_module_may_change_more_often_than_a_compiler_keeps_graphs():
    model = Net()
    xray = fxray.trace(model, batch())
    xray.draft.clear()
    xray.mark("head", output=True, selection=Whole())
    net = xray.rewrite()
    call = called(net, "compiled")
    with fxray.record(net) as recorder:
        for step in range(12):
            if step % 2:
                xray.mark("hidden", output=True, selection=Whole())
            else:
                xray.unmark("hidden")
            call(batch(step)).square().mean().backward()
    assert recorder.run["head"].output.steps.tolist() == [*range(12)]
    assert recorder.run["hidden"].output.steps.tolist() == [*range(1, 12, 2)]


class Repeats(Net):
    def forward(self, x):
        return torch.tanh(self.hidden(x))[:, :4]

    def repeated(self, x, times=2):
        for _ in range(times):
            x = self(x)
        return x


def test_a_method_of_a_compiled_module_runs_the_model_and_is_captured_as_one_step():
    model = Repeats()
    xray = fxray.trace(model, batch())
    xray.draft.clear()
    xray.mark("hidden", output=True, selection=Whole())
    net = xray.rewrite()
    call = called(net, "compiled")
    with fxray.record(net) as recorder, torch.no_grad():
        call(batch())
        out = call.repeated(batch(1))
        call(batch(2))
    rows = {(row.step, row.call): value for row, value in recorder.run["hidden"].output}
    assert [*rows] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert_equal(out, model(model(batch(1))).detach(), "eager")
    assert_equal(rows[1, 1], model.hidden(model(batch(1))).detach(), "eager")
    assert_equal(rows[2, 0], model.hidden(batch(2)).detach(), "compiled")


# ---------------------------------------------------------------- a second derivative


def test_a_compiler_refuses_a_gradient_penalty_by_itself_and_recording_survives():
    """That torch cannot differentiate compiled code twice is said by torch, of the bare model too."""

    def penalised(call, x):
        x = x.clone().requires_grad_()
        out = call(x).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        (out + slope.square().sum()).backward()

    words = "does not currently support double backward"
    model = Net()
    with pytest.raises(RuntimeError, match=words):
        penalised(called(copy.deepcopy(model), "compiled"), batch())
    torch._dynamo.reset()
    net, twin = marked(model, kinds=("output", "grad")).rewrite(), copy.deepcopy(model)
    call, witness = called(net, "compiled"), Witness(twin)
    with fxray.record(net) as recorder:
        for step in range(5):
            if step in (1, 3):
                with pytest.raises(RuntimeError, match=words):
                    penalised(call, batch(step))
                torch.autograd.grad(twin(batch(step)).square().sum(), [*twin.parameters()])
            else:
                call(batch(step)).sum().backward()
                twin(batch(step)).sum().backward()
    assert_as_seen(recorder.run, witness, "compiled")
    assert recorder.run["head"].grad.steps.tolist() == [0, 1, 2, 3, 4]
    assert recorder.run.notes == ()


# ---------------------------------------------------------------- more than the module compiled


def test_a_compiled_step_may_break_off_after_the_module_as_at_its_backward():
    def loop(it):
        optimizer = sgd(it.model)

        def run(x):
            loss = it.call(x).square().mean()
            loss.backward()
            return loss

        train_step = run if it.call is it.model else torch.compile(run, backend="aot_eager")
        for step in range(3):
            optimizer.zero_grad()
            train_step(batch(step))
            it.optimizer_uses()
            optimizer.step()

    model = Net()
    twin = copy.deepcopy(model)
    net = marked(model).rewrite()
    with fxray.record(net) as recorder:
        loop(Loop(net, model, None, lambda: None))
    witness = Witness(twin)
    loop(Loop(twin, twin, None, witness.optimizer_uses))
    assert_trained_alike(model, twin, "compiled")
    assert_as_seen(recorder.run, witness, "compiled")


def test_an_optimizer_whose_step_is_compiled_keeps_its_weight_gradients():
    def loop(it, compile_step):
        optimizer = sgd(it.model)
        take_step = compile_step(optimizer.step)
        for step in range(3):
            optimizer.zero_grad()
            it.call(batch(step)).square().mean().backward()
            it.optimizer_uses()
            take_step()

    model = Net()
    twin = copy.deepcopy(model)
    net = marked(model).rewrite()
    with fxray.record(net) as recorder:
        loop(
            Loop(net, model, None, lambda: None),
            lambda step: torch.compile(step, backend="aot_eager"),
        )
    witness = Witness(twin)
    loop(Loop(twin, twin, None, witness.optimizer_uses), lambda step: step)
    assert_trained_alike(model, twin, "compiled")
    assert_as_seen(recorder.run, witness, "compiled")


# ---------------------------------------------------------------- torch.func


def test_transforms_of_torch_func_are_told_as_not_captured_when_compiled_too():
    model = Net()
    net = marked(model, kinds=("output",)).rewrite()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().mean()

    slope = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fxray.record(net):
            found = slope(state, batch())
    expected = torch.autograd.grad(model(batch()).square().mean(), [*model.parameters()])
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any("torch.func" in str(w.message) for w in told)


def test_the_weight_of_a_compiled_functional_call_is_not_the_modules_own():
    model = Net()
    net = marked(model, kinds=("output", "weight")).rewrite()
    given = {name: p.detach() * 2 for name, p in model.named_parameters()}

    @torch.compile(backend="aot_eager", fullgraph=True)
    def functional(parameters, x):
        return torch.func.functional_call(net, parameters, (x,))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxray.FxrayWarning)
        with fxray.record(net) as recorder:
            functional(given, batch())
    hidden = F.linear(batch(), given["hidden.weight"], given["hidden.bias"])
    assert_equal(recorder.run["hidden"].output[0], hidden, "compiled")
    with pytest.raises(fxray.FxrayError):
        _ = recorder.run["hidden"].weight[0]
    assert any("functional_call" in note for note in recorder.run.notes)
