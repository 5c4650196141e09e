"""Captures in compiled models: each once a step, the right row, the numbers of eager mode."""

from __future__ import annotations

import copy
import gc
import random
import subprocess
import sys
import threading
import warnings
import weakref
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fxray
from fxray import Mean, Norm, Stats, TopK, Whole
from fxray.capture.numbered import NumberedIntake
from fxray.tracing.alone import uncompiled

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Let no test find what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A bit of what people build: a functional activation, a norm, a shortcut, several outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 6)
        self.tau = 1.0

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        h = (h + h.mean((2, 3), keepdim=True)).mean((2, 3))
        left, right = self.head(h).chunk(2, 1)
        return left * right / self.tau


def images(batch=4, seed=0):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def marked(model, x, *, selection=None, **options):
    """Trace, and keep the output and the gradient of every op."""
    xray = fxray.trace(model, x)
    xray.draft.clear()
    for path, op in xray.architecture.items():
        if op.role not in ("input", "parameter") and op.outputs[0].dtype == "float32":
            xray.mark(path, output=True, grad=True, selection=selection or Mean(), **options)
    return xray


def compiled(net, backend="aot_eager", **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(net, backend=counter, fullgraph=True, **options), counter


def train(call, model, recorder, *, steps=4, batches=(4,), rate=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(steps):
        loss = call(images(batches[step % len(batches)], step)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.log(loss=loss)


def hooked(model, paths, seen):
    """Note by plain hooks the mean of what these modules put out, and of its gradient."""

    def note(path):
        def keep(_module, _args, out):
            seen.setdefault((path, "output"), []).append(out.detach().mean())
            if out.requires_grad:
                out.register_hook(lambda g: seen.setdefault((path, "grad"), []).append(g.mean()))

        return keep

    for path in paths:
        model.get_submodule(path).register_forward_hook(note(path))


def series(run, path, kind):
    found = getattr(run[path], kind)
    return np.stack([found[int(step)] for step in found.steps])


# ---------------------------------------------------------------------- once a step, the right row


def test_a_step_is_one_graph_and_every_capture_comes_once_as_hooks_see_it():
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    net = marked(model, images()).rewrite()
    call, counter = compiled(net)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=5)
    seen = {}
    hooked(reference, ["conv", "norm", "head"], seen)
    with fxray.record(fxray.trace(nn.Identity(), images()).rewrite()) as other:
        train(reference, reference, other, steps=5)
    assert counter.frame_count == 1
    for (path, kind), means in seen.items():
        kept = series(recorder.run, path, kind)
        np.testing.assert_allclose(kept, np.stack(means), rtol=1e-5, atol=1e-7)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_other_batch_sizes_compile_once_more_and_keep_true_sizes():
    model = Net()
    net = marked(model, images(), selection=Whole()).rewrite()
    call, counter = compiled(net)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=8, batches=(4, 4, 6, 3, 5))
    assert counter.frame_count <= 2
    shapes = [recorder.run["conv"].output[step].shape[0] for step in range(8)]
    assert shapes == [4, 4, 6, 3, 5, 4, 4, 6]
    assert recorder.run["conv"].grad[2].shape == (6, 4, 6, 6)


def test_no_grad_and_inference_mode_keep_outputs():
    model = Net().eval()
    net = marked(model, images()).rewrite()
    call, _ = compiled(net)
    x = images()
    with fxray.record(net) as recorder, warnings.catch_warnings():
        with torch.no_grad():
            call(x)
        with torch.inference_mode():
            call(x)
        warnings.simplefilter("ignore")
        recorder.close()
    expected = model.conv(x).mean().item()
    kept = recorder.run["conv"].output
    assert [*kept.steps] == [0, 1]
    assert kept.sel(step=0, phase="eval") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), None], ids=["first", "last", "together"])
def test_a_gradient_finds_its_forward_in_whatever_order_backwards_come(order):
    model = Net()
    net = marked(model, images()).rewrite()
    call, _ = compiled(net)
    call(images())
    scales = (1.0, 100.0)
    with fxray.record(net) as recorder:
        losses = [call(images(seed=seed)).sum() * scale for seed, scale in enumerate(scales)]
        if order is None:
            sum(losses).backward()
        else:
            for which in order:
                losses[which].backward()
    twin = copy.deepcopy(model).train()
    for step, scale in enumerate(scales):
        seen = {}
        probe = copy.deepcopy(twin)
        hooked(probe, ["head"], seen)
        (probe(images(seed=step)).sum() * scale).backward()
        assert recorder.run["head"].grad[step] == pytest.approx(
            seen["head", "grad"][0].item(), rel=1e-3
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_hands_over_once(reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            def inner(h):
                return self.last(F.gelu(self.first(h)))

            return checkpoint(inner, x * 1.0, use_reentrant=reentrant) + x

    model = Block()
    x = torch.randn(3, 4, requires_grad=True)
    net = marked(model, x).rewrite()
    call, _ = compiled(net)
    with fxray.record(net) as recorder:
        for _ in range(3):
            call(x).square().sum().backward()
    seen = {}
    reference = copy.deepcopy(model)
    hooked(reference, ["first", "last"], seen)
    h = reference.last(F.gelu(reference.first(x))) + x
    h.square().sum().backward()
    for path in ("first", "last"):
        for kind in ("output", "grad"):
            kept = getattr(recorder.run[path], kind)
            assert [*kept.steps] == [0, 1, 2]
            assert kept[2] == pytest.approx(seen[path, kind][0].item(), rel=1e-4)


def test_a_partitioner_that_recomputes_everything_captures_once():
    model = Net()
    net = marked(model, images()).rewrite()
    call, _ = compiled(net, "aot_eager_decomp_partition")
    with (
        torch._functorch.config.patch(activation_memory_budget=0.0),
        fxray.record(net) as recorder,
    ):
        train(call, model, recorder, steps=3)
    for path in ("conv", "relu", "head", "div"):
        for kind in ("output", "grad"):
            found = getattr(recorder.run[path], kind)
            assert [*found.steps] == [0, 1, 2], (path, kind)


# ---------------------------------------------------------------------- what is due


def test_schedules_compile_once_for_each_set_that_is_due():
    model = Net()
    xray = fxray.trace(model, images())
    xray.draft.clear()
    xray.mark("conv", output=True, every=2, selection=Whole())
    xray.mark("head", grad=True, every=3, selection=Mean())
    net = xray.rewrite()
    call, counter = compiled(net)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=13)
    assert [*recorder.run["conv"].output.steps] == [0, 2, 4, 6, 8, 10, 12]
    assert [*recorder.run["head"].grad.steps] == [0, 3, 6, 9, 12]
    assert counter.frame_count == 3  # both, neither, one; the other goes with both


def test_phases_and_epochs_are_told_apart_without_a_compilation_more():
    model = Net()
    net = marked(model, images()).rewrite()
    call, counter = compiled(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fxray.record(net) as recorder:
        for _ in range(2):
            for x in recorder.epoch([images(seed=k) for k in range(3)]):
                call(x).sum().backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for x in recorder.phase("valid", [images(seed=9)]):
                    call(x)
            model.train()
    trained = recorder.run.where(phase="train")["relu"].output
    assert [*trained.steps] == [*range(6)]
    assert trained.sel(epoch=1, batch=2) == trained[5]
    assert [*recorder.run.where(phase="valid")["relu"].output.steps] == [3, 6]
    assert counter.frame_count == 2


def test_marking_after_compiling_takes_effect_at_the_next_step():
    model = Net()
    xray = fxray.trace(model, images())
    xray.draft.clear()
    xray.mark("conv", output=True)
    net = xray.rewrite()
    call, counter = compiled(net)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=2)
        xray.mark("head", output=True, selection=Mean())
        xray.unmark("conv")
        train(call, model, recorder, steps=2)
    assert [*recorder.run["conv"].output.steps] == [0, 1]
    assert [*recorder.run["head"].output.steps] == [2, 3]
    assert counter.frame_count == 2


def test_without_a_recorder_the_graph_is_the_models_own():
    model = Net()
    net = marked(model, images()).rewrite()
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(net, backend=keep, fullgraph=True)(images())
    assert len(graphs) == 1
    assert "fxray" not in graphs[0].code


# ---------------------------------------------------------------------- calls no graph is there for


class Attends(nn.Module):
    """Its graph holds for one length, until it was called with others."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        return h @ h.transpose(1, 2) if x.shape[1] < 8 else h.mean(1)


def test_an_unseen_size_asks_for_one_eager_call_and_then_compiles():
    model = Attends()
    net = marked(model, torch.randn(2, 5, 4)).rewrite()
    call, _ = compiled(net)
    short, long = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    torch.testing.assert_close(call(short), model(short))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"once\s+eagerly"):
        call(long)
    net(long)
    with fxray.record(net) as recorder:
        for x in (long, short):
            out = call(x)
            torch.testing.assert_close(out, model(x))
            out.sum().backward()
    assert [*recorder.run["a"].output.steps] == [0, 1]


def test_without_fullgraph_an_unseen_size_runs_eagerly_and_is_captured():
    model = Attends()
    net = marked(model, torch.randn(2, 5, 4)).rewrite()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(net, backend=counter)
    with fxray.record(net) as recorder:
        for length in (5, 9, 9, 5):
            x = torch.randn(2, length, 4)
            out = call(x)
            torch.testing.assert_close(out, model(x))
            out.sum().backward()
    assert [*recorder.run["a"].output.steps] == [0, 1, 2, 3]
    assert [*recorder.run["a"].grad.steps] == [0, 1, 2, 3]
    assert counter.frame_count >= 2  # 5 before, 9 after it was seen once


def test_a_changed_attribute_is_never_the_old_number():
    model = Net().eval()
    net = fxray.trace(model, images()).rewrite()
    call = torch.compile(net, backend="aot_eager")
    for tau in (1.0, 0.5, 0.5, 0.25):
        model.tau = tau
        torch.testing.assert_close(call(images()), model(images()))


def test_a_module_replaced_or_hooked_is_never_the_old_one():
    model = Net().eval()
    net = fxray.trace(model, images()).rewrite()
    call = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(call(images()), model(images()))
    model.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).eval()
    torch.testing.assert_close(call(images()), model(images()))
    model.head.register_forward_hook(lambda _m, _a, out: out * 2)
    torch.testing.assert_close(call(images()), model(images()))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        return F.relu(h) if x.mean() > 0 else h


def test_a_branch_on_data_works_without_fullgraph_and_is_named_in_the_report():
    model = Branches()
    xray = marked(model, torch.ones(2, 4))
    xray.unmark("mean")
    assert "fullgraph" in str(xray.report)
    net = xray.rewrite()
    call = torch.compile(net, backend="aot_eager")
    with fxray.record(net) as recorder:
        for sign in (1, -1, 1, -1):
            x = sign * torch.ones(2, 4)
            out = call(x)
            torch.testing.assert_close(out, model(x))
            out.sum().backward()
    assert [*recorder.run["a"].grad.steps] == [0, 1, 2, 3]


def test_what_a_model_leaves_to_eager_mode_is_left_out_of_the_compiled_graph():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, mask):
            if not torch.compiler.is_compiling() and mask.all():
                return self.a(x)
            return self.a(x) * mask

    model = Masked()
    net = fxray.trace(model, torch.randn(2, 4), torch.ones(2, 1)).rewrite()
    call, counter = compiled(net)
    x = torch.randn(5, 4)
    for mask in (torch.ones(5, 1), torch.tensor([[1.0], [0], [1], [0], [1]])):
        torch.testing.assert_close(call(x, mask), model(x, mask))
    assert counter.frame_count == 1


# ---------------------------------------------------------------------- around it


def test_a_whole_step_compiles_with_the_module_inside():
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    net = marked(model, images()).rewrite()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(x):
        return net(x).square().sum() * 2

    seen = {}
    hooked(reference, ["head"], seen)
    with fxray.record(net) as recorder:
        for step in range(3):
            loss_of(images(seed=step)).backward()
            (reference(images(seed=step)).square().sum() * 2).backward()
    np.testing.assert_allclose(
        series(recorder.run, "head", "grad"), np.stack(seen["head", "grad"]), rtol=1e-4, atol=1e-6
    )


def test_a_module_called_twice_in_one_compiled_step_fills_two_rows():
    model = Net()
    net = marked(model, images()).rewrite()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x, y):
        return net(x).sum() + net(y).sum()

    with fxray.record(net) as recorder:
        for step in range(3):
            with recorder.step():
                both(images(seed=step), images(seed=step + 50)).backward()
    for kind in ("output", "grad"):
        kept = getattr(recorder.run["conv"], kind)
        assert [*kept.steps] == [0, 0, 1, 1, 2, 2]
    x = images(seed=51)
    assert recorder.run["conv"].output.sel(step=1, call=1) == pytest.approx(
        model.conv(x).mean().item(), rel=1e-4
    )


def test_a_module_compiled_in_place_is_captured():
    model = Net()
    net = marked(model, images()).rewrite()
    net.compile(backend="aot_eager", fullgraph=True)
    with fxray.record(net) as recorder:
        train(net, model, recorder, steps=3)
    assert [*recorder.run["relu"].grad.steps] == [0, 1, 2]


def test_two_compiled_modules_are_recorded_each_in_its_run():
    nets = [marked(Net(), images()).rewrite() for _ in range(2)]
    calls = [compiled(net)[0] for net in nets]
    with fxray.record(nets[0]) as one, fxray.record(nets[1]) as two:
        for step in range(3):
            sum(call(images(seed=step)).sum() for call in calls).backward()
    for recorder, net in ((one, nets[0]), (two, nets[1])):
        expected = net.original.conv(images(seed=2)).mean().item()
        assert recorder.run["conv"].output[2] == pytest.approx(expected, rel=1e-4)


def test_a_second_backward_through_one_forward_keeps_the_first():
    model = Net()
    net = marked(model, images()).rewrite()
    call, _ = compiled(net)
    with fxray.record(net) as recorder:
        out = call(images()).sum()
        out.backward(retain_graph=True)
        with pytest.warns(fxray.FxrayWarning, match="second backward"):
            (out * 3).backward()
    twin, seen = copy.deepcopy(model), {}
    hooked(twin, ["conv"], seen)
    twin(images()).sum().backward()
    kept = recorder.run["conv"].grad
    assert [*kept.steps] == [0]
    assert kept[0] == pytest.approx(seen["conv", "grad"][0].item(), rel=1e-4, abs=1e-7)


def test_under_autocast_the_captured_dtype_is_the_tensors_own():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net = marked(model, torch.randn(3, 4), selection=Whole()).rewrite()
    call, _ = compiled(net)
    with fxray.record(net) as recorder:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = call(torch.randn(3, 4)).float().sum()
            loss.backward()
    assert recorder.run["0"].output[1].dtype.name == "bfloat16"
    assert recorder.run["0"].grad[1].dtype.name == "bfloat16"


def test_weights_and_their_gradients_come_beside_a_compiled_step():
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    xray = fxray.trace(model, images())
    xray.draft.clear()
    xray.mark("conv", weight=True, weight_grad=True, selection=Whole())
    net = xray.rewrite()
    call, counter = compiled(net)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=3)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        np.testing.assert_allclose(
            recorder.run["conv"].weight[step], reference.conv.weight.detach(), rtol=1e-4, atol=1e-6
        )
        optimizer.zero_grad()
        reference(images(4, step)).square().sum().backward()
        np.testing.assert_allclose(
            recorder.run["conv"].weight_grad[step], reference.conv.weight.grad, rtol=1e-3, atol=1e-5
        )
        optimizer.step()
    assert counter.frame_count == 1


# ---------------------------------------------------------------------- selections of the user's


@attrs.frozen
class Doubled:
    """Traced into the graph: torch ops alone."""

    def make_selection(self, tensor):
        return {"twice": tensor.mean() * 2, "top": tensor.amax()}


class Looks:
    """Cannot be traced: Python looks at the numbers."""

    def make_selection(self, tensor):
        return tensor.flatten()[: 1 + int(tensor.sum().item() > 0)]


class Counts:
    """Cannot be traced: it remembers."""

    def __init__(self):
        self.calls = 0

    def make_selection(self, tensor):
        self.calls += 1
        return tensor.new_full((), self.calls)


class Fails:
    def make_selection(self, tensor):
        if tensor.sum() < 1e9:
            msg = "no such numbers"
            raise ValueError(msg)
        return tensor


def with_selection(selection, steps=3, **kinds):
    model = Net()
    xray = fxray.trace(model, images())
    xray.draft.clear()
    xray.mark("conv", selection=selection, **(kinds or {"output": True, "grad": True}))
    net = xray.rewrite()
    call, counter = compiled(net)
    before = copy.deepcopy(model)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=steps, rate=0.0)
    assert counter.frame_count == 1
    return recorder.run, before


def test_a_selection_of_torch_ops_is_traced_with_its_fields():
    run, model = with_selection(Doubled())
    expected = model.conv(images(seed=1)).detach()
    kept = run["conv"].output[1]
    assert kept["twice"] == pytest.approx(2 * expected.mean().item(), rel=1e-4)
    assert kept["top"] == pytest.approx(expected.amax().item(), rel=1e-5)


def test_a_selection_that_looks_at_numbers_runs_as_it_is():
    run, model = with_selection(Looks())
    for step in range(3):
        expected = Looks().make_selection(model.conv(images(seed=step)).detach())
        np.testing.assert_allclose(run["conv"].output[step], expected, rtol=1e-4, atol=1e-6)


def test_a_selection_that_remembers_is_asked_every_step():
    run, _ = with_selection(Counts(), output=True)
    assert [float(run["conv"].output[step]) for step in range(3)] == sorted(
        float(run["conv"].output[step]) for step in range(3)
    )
    assert run["conv"].output[2] == run["conv"].output[0] + 2


def test_a_selection_that_fails_is_named_and_training_goes_on():
    model = Net()
    xray = fxray.trace(model, images())
    xray.draft.clear()
    xray.mark("conv", output=True, selection=Fails())
    xray.mark("head", output=True, selection=Mean())
    net = xray.rewrite()
    call, _ = compiled(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorder = fxray.record(net)
        train(call, model, recorder, steps=3)
        recorder.close()
    assert any("Fails failed on the output of 'conv'" in str(w.message) for w in told)
    assert [*recorder.run["head"].output.steps] == [0, 1, 2]
    assert any("failed 3 times" in note for note in recorder.run.notes)


@pytest.mark.parametrize(
    "selection", [Stats(), TopK(3), Norm(), Whole(), fxray.Sample(5)], ids=repr
)
def test_a_selection_keeps_under_a_compiler_what_it_keeps_in_eager_mode(selection):
    run, model = with_selection(selection)
    expected = selection.make_selection(model.conv(images(seed=2)).detach())
    kept = run["conv"].output[2]
    fields = expected if isinstance(expected, dict) else {"": expected}
    for name, value in fields.items():
        got = kept[name] if name else kept
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-5)


SHIPPED = [
    *(Mean(), Norm(), Stats(), TopK(3), Whole(), fxray.Sample(5), fxray.Histogram(4)),
    *(fxray.Slice((0,)), fxray.NaturalSelection()),
]


@pytest.mark.parametrize("selection", [*SHIPPED, Doubled()], ids=repr)
def test_a_selection_that_can_be_traced_is_and_is_not_run_beside_the_graph(selection, monkeypatch):
    beside = []
    monkeypatch.setattr(NumberedIntake, "take_whole", lambda *_args, **words: beside.append(words))
    run, _ = with_selection(selection)
    assert beside == []
    assert [*run["conv"].output.steps] == [0, 1, 2]
    assert [*run["conv"].grad.steps] == [0, 1, 2]


# ---------------------------------------------------------------------- nothing is kept alive


def test_nothing_of_a_compiled_module_stays_when_it_is_gone():
    model = Net()
    net = marked(model, images()).rewrite()
    call, _ = compiled(net)
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=2)
    gone = weakref.ref(model), weakref.ref(net)
    del model, net, call, recorder
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# ---------------------------------------------------------------------- Inductor itself


@pytest.mark.slow
def test_inductor_uses_memory_again_and_captures_stay_right():
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    net = marked(model, images(), selection=Whole()).rewrite()
    call, counter = compiled(net, "inductor")
    outs: dict[Any, Any] = {}

    def keep(path):
        def hook(_module, _args, out):
            outs[path, "output"] = out.detach().clone()
            out.register_hook(lambda g: outs.__setitem__((path, "grad"), g.clone()))

        return hook

    for path in ("conv", "norm", "head"):
        reference.get_submodule(path).register_forward_hook(keep(path))
    with fxray.record(net) as recorder:
        train(call, model, recorder, steps=3)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        reference(images(4, step)).square().sum().backward()
        for (path, kind), expected in outs.items():
            kept = getattr(recorder.run[path], kind)[step]
            np.testing.assert_allclose(
                kept, expected, rtol=1e-3, atol=1e-4, err_msg=f"{path} {kind}"
            )
        optimizer.step()
    assert counter.frame_count == 1


# ---------------------------------------------------------------------- what surrounds a call


def test_what_the_compiled_function_sets_before_is_seen():
    model, reference = Net().eval(), Net().eval()
    reference.load_state_dict(model.state_dict())
    net = fxray.trace(model, images()).rewrite()

    def warmer(module, x):
        module.tau = 4.0
        out = module(x)
        module.tau = 1.0
        return out

    expected = warmer(reference, images())
    torch.testing.assert_close(torch.compile(warmer, backend="aot_eager")(net, images()), expected)


def test_a_compiled_function_may_break_off_after_the_module():
    model = Net()
    net = marked(model, images()).rewrite()
    seen = []

    @torch.compile(backend="aot_eager")
    def step(x):
        loss = net(x).square().sum()
        seen.append(loss.item())
        loss.backward()
        return loss

    with fxray.record(net) as recorder:
        for _ in range(3):
            step(images())
    assert len(seen) == 3
    assert [*recorder.run["conv"].grad.steps] == [0, 1, 2]


def test_a_late_backward_of_an_earlier_recorders_forward_goes_nowhere():
    model = Net()
    net = marked(model, images()).rewrite()
    call, _ = compiled(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxray.FxrayWarning)
        with fxray.record(net):
            late = call(images()).sum()
    with fxray.record(net) as recorder:
        now = call(images(seed=1)).sum()
        (late * 1000).backward()
        now.backward()
    seen, twin = {}, copy.deepcopy(model)
    hooked(twin, ["head"], seen)
    twin(images(seed=1)).sum().backward()
    expected = seen["head", "grad"][0].item()
    assert recorder.run["head"].grad[0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


class First:
    """Gives a view, as its docs allow."""

    def make_selection(self, tensor):
        return tensor[:2]


@pytest.mark.parametrize("selection", [First(), fxray.Slice((0,)), Whole()], ids=repr)
def test_what_is_written_in_place_afterwards_is_not_kept(selection):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(4, 4)
    xray = fxray.trace(model, x)
    xray.draft.clear()
    xray.mark("0", output=True, selection=selection)
    net = xray.rewrite()
    call, _ = compiled(net)
    with fxray.record(net) as recorder:
        call(x).sum().backward()
    expected = selection.make_selection(model[0](x)).detach()
    np.testing.assert_allclose(recorder.run["0"].output[0], expected, rtol=1e-5, atol=1e-6)


class Remembers:
    def __init__(self):
        self.mean = None

    def make_selection(self, tensor):
        now = tensor.mean()
        self.mean = now if self.mean is None else 0.5 * self.mean + 0.5 * now
        return self.mean.clone()


class Draws:
    def make_selection(self, tensor):
        return tensor.mean() * 0 + random.random()


class Inverts:
    """Fails on some numbers, in a graph with the training."""

    def make_selection(self, tensor):
        return torch.linalg.cholesky(tensor.flatten()[:4].reshape(2, 2))


def test_a_selection_that_remembers_a_tensor_is_not_spoilt_by_the_trace():
    run, model = with_selection(Remembers(), output=True)
    means = [model.conv(images(seed=k)).mean().item() for k in range(3)]
    expected = [means[0], (means[0] + means[1]) / 2, (means[0] + means[1]) / 4 + means[2] / 2]
    np.testing.assert_allclose(series(run, "conv", "output"), expected, rtol=1e-4)


def test_a_selection_that_draws_random_numbers_draws_anew_each_step():
    run, _ = with_selection(Draws(), output=True)
    assert len({float(value) for value in series(run, "conv", "output")}) == 3


def test_a_selection_that_fails_on_some_numbers_never_ends_a_step():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxray.FxrayWarning)
        run, _ = with_selection(Inverts(), output=True)
    assert any("cholesky" in note for note in run.notes)


def test_a_model_without_a_graph_runs_eagerly_under_a_compiler():
    class Hooks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            if h.requires_grad:
                h.register_hook(lambda g: g * 2)
            return h * 2

    model = Hooks()
    x = torch.randn(2, 4)
    xray = fxray.trace(model, x)
    assert xray.report.interposed
    net = xray.rewrite()
    call = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(call(x), model(x))


def test_no_compiler_is_imported_until_there_is_one():
    code = "import sys, fxray, torch; from torch import nn; x = torch.randn(2, 4); "
    code += "net = fxray.trace(nn.Linear(4, 4), x).rewrite(); r = fxray.record(net); "
    code += "net(x).sum().backward(); r.close(); print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_threads_that_want_nothing_compiled_leave_the_compiler_as_it_was():
    entered, left = threading.Event(), threading.Event()

    def first():
        with uncompiled():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=first)
    with uncompiled():
        thread.start()
        entered.wait(10)
    left.set()
    thread.join()
    counter = CompileCounterWithBackend("eager")
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1
