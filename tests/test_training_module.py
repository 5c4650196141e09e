"""The module that is trained: copied, saved, transformed, shared by threads, marked anew."""

# To mypy a module's attribute is Tensor | Module, and a loop takes whatever can be called.
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import warnings

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import fxray
from fxray import Whole
from tests.loops import (
    Net,
    Noisy,
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


@pytest.fixture(params=["eager", "compiled"])
def way(request):
    """Let no test find what another one compiled."""
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


# ---------------------------------------------------------------- copies


class Buffered(nn.Module):
    """What a state_dict may hold: a buffer, one that is not kept, a tied weight, an unused part."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.tied, self.unused = nn.Linear(4, 4), nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.tied.weight = self.hidden.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.config = {"width": 4}

    def forward(self, x, scale=1.0, *, bias: float | None = None):
        h = self.tied(F.relu(self.norm(self.hidden(x)))) * scale
        return h if bias is None else h + bias

    def describe(self):
        return f"width {self.config['width']}"


def test_a_state_dict_loads_strictly_both_ways_with_unused_parts_and_tied_weights(way):
    model, other = Buffered(), Buffered()
    net = marked(model, kinds=("output",)).rewrite()
    call = called(net, way)
    with fxray.record(net):
        optimizer = sgd(net)
        for step in range(2):
            optimizer.zero_grad()
            call(batch(step)).sum().backward()
            optimizer.step()
        state = {name: value.clone() for name, value in net.state_dict().items()}
        assert list(state) == list(other.state_dict())
        for wrapped in {id(m): m for m in (net, call)}.values():
            prefix = "" if wrapped is net else "_orig_mod."
            assert list(wrapped.state_dict()) == [f"{prefix}{name}" for name in state]
        other.load_state_dict(state, strict=True)
        other.eval()
        net.eval()
        assert_equal(call(batch()), other(batch()), way)
        fresh = Buffered().eval()
        net.load_state_dict(fresh.state_dict(), strict=True)
        assert_equal(call(batch()), fresh(batch()), way)
    assert net.tied.weight is net.hidden.weight is model.hidden.weight


def test_a_copy_an_average_and_a_file_record_nothing_and_compute_the_same(tmp_path):
    model = Noisy()
    twin = copy.deepcopy(model)
    xray = marked(model)
    net = xray.rewrite()

    def train(module, average, steps):
        optimizer = sgd(module)
        for step in steps:
            optimizer.zero_grad()
            module(batch(step)).square().mean().backward()
            optimizer.step()
            average.update_parameters(module)
            average(batch(step))  # whose norm counts this batch too

    def averaged(module):
        rate = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        return torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=rate, use_buffers=True)

    torch.manual_seed(1)
    with fxray.record(net) as recorder:
        ours = averaged(net)
        train(net, ours, range(3))
        copied = copy.deepcopy(net)
        torch.save(net, tmp_path / "net.pt")
        loaded = torch.load(tmp_path / "net.pt", weights_only=False)
        for other in (copied, loaded):
            other(batch(9)).sum().backward()
            sgd(other).step()
        train(net, ours, range(3, 5))
    torch.manual_seed(1)
    theirs = averaged(twin)
    train(twin, theirs, range(3))
    after = copy.deepcopy(twin)
    for _ in range(2):
        copy.deepcopy(after)(batch(9))
    train(twin, theirs, range(3, 5))
    assert_trained_alike(net, twin, "eager")
    assert_trained_alike(ours, theirs, "eager")
    assert_equal(ours.eval()(batch(2)), theirs.eval()(batch(2)), "eager")
    assert recorder.run["head"].output.steps.tolist() == [*range(5)]
    assert recorder.run["head"].weight_grad.steps.tolist() == [*range(5)]
    assert recorder.run.notes == ()
    # Neither is bound to what it was made from, and each can be recorded by itself.
    for other in (copied, loaded):
        other.load_state_dict(twin.state_dict())
        other.eval()
        xray.unmark("hidden")  # a copy follows no draft
        with fxray.record(other) as its, warnings.catch_warnings():
            warnings.simplefilter("ignore", fxray.FxrayWarning)
            assert torch.equal(other(batch(4)), twin.eval()(batch(4)))
            its.close()
        assert_equal(its.run["hidden"].output[0], twin.hidden(batch(4)).detach(), "eager")
        assert its.run["head"].output.steps.tolist() == [0]


def test_a_module_without_marks_or_recorder_is_copied_and_saved_too(tmp_path):
    model = Buffered()
    xray = marked(model)
    net = xray.rewrite()
    with fxray.record(net, tmp_path / "runs"):
        net(batch()).sum().backward()
        sgd(net).step()
    torch.save(net, tmp_path / "closed.pt")
    xray.draft.clear()
    torch.save(net, tmp_path / "bare.pt")
    model.eval()
    for name in ("closed.pt", "bare.pt"):
        loaded = torch.load(tmp_path / name, weights_only=False).eval()
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert torch.equal(loaded(batch()), model(batch()))
        assert loaded.tied.weight is loaded.hidden.weight
        assert loaded.config == {"width": 4}


# ---------------------------------------------------------------- what else calls the module


def test_functional_call_runs_on_the_parameters_given_and_is_captured_with_them(way):
    model = Net()
    net = marked(model, kinds=("output", "grad", "weight")).rewrite()
    call = called(net, way)
    given = {name: (p * 2).detach().requires_grad_() for name, p in model.named_parameters()}

    def functional(parameters, x):
        return torch.func.functional_call(net, parameters, (x,))

    if way == "compiled":
        functional = torch.compile(functional, backend="aot_eager", fullgraph=True)
    with fxray.record(net) as recorder:
        out = functional(given, batch())
        out.square().sum().backward()
        call(batch()).square().sum().backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(given[name])
    witness = Witness(twin)
    twin(batch()).square().sum().backward()
    for path in ("hidden", "act", "head"):
        for kind in ("output", "grad"):
            kept = getattr(recorder.run[path], kind)
            assert kept.steps.tolist() == [0, 1]
            assert_equal(kept[0], witness.seen[path, kind][0], way)
    if way == "eager":
        assert_equal(recorder.run["hidden"].weight[0], given["hidden.weight"].detach(), way)
    assert_equal(recorder.run["hidden"].weight[1], model.hidden.weight.detach(), way)
    for name, p in twin.named_parameters():
        assert_equal(given[name].grad, p.grad, "compiled", name)


def test_transforms_of_torch_func_give_their_numbers_and_are_told_once_as_not_captured():
    model = Net()
    twin = copy.deepcopy(model)
    net = marked(model).rewrite()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def transforms(module):
        def loss(parameters, x):
            out = torch.func.functional_call(module, parameters, (x,))
            return out.square().mean()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        yield torch.func.grad(loss)(state, batch())["hidden.weight"]
        yield per_sample(state, batch().unsqueeze(1))["head.weight"]
        yield torch.func.vmap(module)(batch().unsqueeze(1))
        yield torch.func.jacrev(module)(batch())
        yield torch.func.jvp(module, (batch(),), (torch.ones(6, 4),))[1]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fxray.record(net) as recorder:
            net(batch()).square().mean().backward()
            sgd(net).step()
            with torch.no_grad():
                for p, before in zip(model.parameters(), state.values(), strict=True):
                    p.copy_(before)
            ours = [*transforms(net)]
            net(batch(1)).square().mean().backward()
    for one, two in zip(ours, transforms(twin), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    texts = [str(w.message) for w in told if issubclass(w.category, fxray.FxrayWarning)]
    assert len(texts) == 1
    assert "torch.func" in texts[0]
    assert any("torch.func" in note for note in recorder.run.notes)
    kept = recorder.run["hidden"].output
    assert len(kept) == 2
    assert_equal(kept[int(kept.steps[-1])], twin.hidden(batch(1)).detach(), "eager")


# ---------------------------------------------------------------- several threads


def _numbers(run):
    """Return {(step, call): first number} of the model's input, for every row."""
    return {(row.step, row.call): float(value[0, 0]) for row, value in run["x"].output}


def _assert_rows_belong_together(run, model, way):
    """Fail unless what each row holds is what the model computes of that row's input."""
    given = _numbers(run)
    for path, kind in (("hidden", "output"), ("head", "output"), ("hidden", "grad")):
        for row, value in getattr(run[path], kind):
            x = torch.full((6, 4), given[row.step, row.call])
            hidden = model.hidden(x)
            head = model.head(model.act(hidden))
            (slope,) = torch.autograd.grad(head.square().sum(), hidden)
            seen = {"output": head if path == "head" else hidden, "grad": slope}[kind]
            torch.testing.assert_close(torch.from_numpy(value), seen.detach(), msg=f"{path} {kind}")


def _on_input_too(model):
    xray = marked(model, kinds=("output", "grad"))
    xray.mark("x", output=True, selection=Whole())
    return xray.rewrite()


def test_two_threads_that_train_at_once_get_their_own_rows_and_gradients(way):
    """They meet before each forward and each backward; compiled, one forward follows the other."""
    model, errors = Net(), []
    net = _on_input_too(model)
    call = called(net, way)
    call(torch.zeros(6, 4)).square().sum().backward()
    meet, turn = threading.Barrier(2), threading.Lock()

    def work(thread):
        try:
            for at in range(20):
                x = torch.full((6, 4), (100.0 * thread + at) / 50)
                meet.wait(30)
                with turn if way == "compiled" else contextlib.nullcontext():
                    out = call(x)
                meet.wait(30)
                torch.testing.assert_close(out, model(x))
                out.square().sum().backward()
        except BaseException as error:
            errors.append(error)
            meet.abort()
            raise

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    with fxray.record(net) as recorder:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    run = recorder.run
    assert sorted(_numbers(run).values()) == pytest.approx(
        sorted((100.0 * k + at) / 50 for k in range(2) for at in range(20))
    )
    for path in ("hidden", "act", "head"):
        assert run[path].output.steps.tolist() == [*range(40)]
        assert run[path].grad.steps.tolist() == [*range(40)]
    _assert_rows_belong_together(run, model, way)
    assert run.notes == ()


def test_threads_that_run_freely_never_mix_their_rows(way):
    """What is lost then (a gradient after the second next forward) is counted, never misplaced."""
    model, wrong = Net(), []
    net = _on_input_too(model)
    call = called(net, way)
    call(torch.zeros(6, 4)).square().sum().backward()

    def work(thread):
        for at in range(25):
            x = torch.full((6, 4), (100.0 * thread + at) / 50)
            out = call(x)
            if not torch.allclose(out, model(x), atol=1e-5):
                wrong.append((thread, at))
            out.square().sum().backward()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxray.FxrayWarning)
        with fxray.record(net) as recorder:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            model.zero_grad()
            call(torch.full((6, 4), -1.0)).square().sum().backward()
    assert not wrong
    run = recorder.run
    _assert_rows_belong_together(run, model, way)
    assert min(_numbers(run).values()) == -1.0
    last = run["hidden"].grad
    assert _numbers(run)[int(last.steps[-1]), 0] == -1.0


def test_data_parallel_without_devices_just_calls_the_module():
    model = Net()
    net, twin = marked(model, kinds=("output", "grad")).rewrite(), copy.deepcopy(model)
    parallel, witness = nn.DataParallel(net), Witness(twin)
    with fxray.record(parallel) as recorder:
        for step in range(2):
            parallel(batch(step)).square().sum().backward()
            twin(batch(step)).square().sum().backward()
    assert_as_seen(recorder.run, witness, "eager")
    assert list(parallel.state_dict()) == [f"module.{name}" for name in model.state_dict()]


class Scaled(Net):
    """Has a parameter and a buffer of its own, beside its sub-modules."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 2.0))
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return super().forward(x) * self.scale + self.shift


def test_replicas_for_several_devices_leave_the_module_as_it_was(monkeypatch):
    """What `nn.DataParallel` does on two GPUs, with copies on the CPU in place of theirs."""
    replicate = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    model = Scaled()
    net = marked(model, kinds=("output",)).rewrite()
    children, own = dict(model._modules), dict(model._parameters)
    x = batch()
    with fxray.record(net) as recorder:
        replicas = replicate.replicate(net, [0, 1])
        outs = [replica(x) for replica in replicas]
        outs[1].square().sum().backward()
        net(x)
    expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    assert dict(model._modules) == children
    assert dict(model._parameters) == own
    for out in outs:
        assert torch.equal(out, model(x))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    assert len(recorder.run["hidden"].output) == 1


# ---------------------------------------------------------------- linked to the draft and the model


def test_the_rewritten_module_shows_the_models_own_signature_and_attributes(way):
    model = Buffered()
    net = marked(model, kinds=("output",)).rewrite()
    call = called(net, way)
    with fxray.record(net) as recorder:
        assert inspect.signature(net.forward) == inspect.signature(model.forward)
        assert inspect.signature(net) == inspect.signature(model)
        assert [*inspect.signature(net.forward).parameters] == ["x", "scale", "bias"]
        for shown in (net, call):
            assert shown.config is model.config
            assert shown.describe() == "width 4"
            assert shown.seen is model.seen
            assert not hasattr(shown, "nothing_of_the_kind")
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            net.nothing_of_the_kind  # noqa: B018
        model.eval()
        out = call(batch(), 2.0, bias=0.5) if way == "eager" else call(batch())
        expected = model(batch(), 2.0, bias=0.5) if way == "eager" else model(batch())
        assert_equal(out, expected.detach(), way)
    assert recorder.run["hidden"].output.steps.tolist() == [0]


def test_a_step_left_by_an_exception_is_over(way):
    model = Net()
    net, twin = marked(model, kinds=("output", "grad")).rewrite(), copy.deepcopy(model)
    call, witness = called(net, way), Witness(twin)

    def train(run, step):
        for k in range(3):
            with contextlib.suppress(ZeroDivisionError), step():
                run(batch(2 * k)).square().sum().backward()
                if k == 1:
                    1 / 0  # noqa: B018
                run(batch(2 * k + 1)).square().sum().backward()

    with fxray.record(net) as recorder:
        train(call, recorder.step)
    train(twin, contextlib.nullcontext)
    rows = [(row.step, row.call) for row, _ in recorder.run["act"].grad]
    assert rows == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert_as_seen(recorder.run, witness, way)
