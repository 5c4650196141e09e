"""What a forward reads of Python and does to it: followed, or refused, never silent."""

# mypy: ignore-errors
# Small models in many odd shapes say more without annotations.

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import nn

import fxray

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.l = nn.Linear(8, 8)


class TakesAQuarter(Base):
    def forward(self, x):
        return self.l(x)[: int(x.size(0) * 0.25)]


class Shifts(Base):
    def forward(self, x):
        return self.l(x)[: max(x.size(0) >> 2, 1)]


class Ceils(Base):
    def forward(self, x):
        return self.l(x) * math.ceil(x.size(0) / 8)


@pytest.mark.parametrize("make", [TakesAQuarter, Shifts, Ceils])
def test_a_number_that_two_neighbouring_batches_share_does_not_free_the_batch(make):
    model = make()
    net = fxray.trace(model, X).rewrite()
    assert torch.equal(net(X), model(X))
    many = torch.randn(16, 8)
    try:
        out = net(many)
    except fxray.SpecialisationError:
        return
    assert torch.equal(out, model(many))


class Annealed(Base):
    def __init__(self):
        super().__init__()
        self.tau = 1.0

    def forward(self, x):
        return self.l(x) / self.tau


@pytest.mark.parametrize("inputs", [(X,), ()], ids=["execution", "symbolic"])
def test_an_attribute_that_changes_after_the_trace_is_refused_by_name(inputs):
    model = Annealed()
    xray = fxray.trace(model, *inputs)
    net = xray.rewrite()
    net(X)
    model.tau = 0.5
    with pytest.raises(fxray.SpecialisationError, match=r"'tau' was 1.0 .* is 0.5 now"):
        net(X)
    xray.model = model
    assert torch.equal(xray.rewrite()(X), model(X))


class Unread(Base):
    def __init__(self):
        super().__init__()
        self.steps_done = 0

    def forward(self, x):
        return self.l(x)


def test_an_attribute_that_no_forward_reads_may_change():
    model = Unread()
    net = fxray.trace(model, X).rewrite()
    model.steps_done = 7
    assert torch.equal(net(X), model(X))


class OnlyTraining(Base):
    def __init__(self):
        super().__init__()
        self.sub = Choosing()

    def forward(self, x):
        return self.sub(self.l(x))


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Linear(8, 8)

    def forward(self, x):
        h = self.p(x)
        return h if self.training else x


def test_a_part_whose_mode_only_steers_what_is_returned_is_noticed():
    model = OnlyTraining()
    net = fxray.trace(model, X).rewrite()
    model.sub.eval()
    with pytest.raises(fxray.SpecialisationError, match="'sub'"):
        net(X)


class FrozenNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.bn(self.l(x))


def test_train_of_the_module_is_the_model_s_own():
    model = FrozenNorm().train()
    net = fxray.trace(model, X).rewrite()
    net.train()
    before = model.bn.running_mean.clone()
    net(X)
    assert not model.bn.training
    assert torch.equal(model.bn.running_mean, before)


class Merging(nn.Module):
    """A low-rank adapter that merges itself into the weights in eval mode."""

    def __init__(self):
        super().__init__()
        self.l, self.b = nn.Linear(8, 8), nn.Parameter(torch.ones(8, 8))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.l.weight.data += self.b if not mode else -self.b
            self.merged = not mode
        return self

    def forward(self, x):
        return self.l(x)


def test_tracing_does_not_call_a_train_that_writes_weights():
    model = Merging()
    before = model.l.weight.detach().clone()
    fxray.trace(model, X)
    assert torch.equal(model.l.weight, before)
    assert not model.merged


class Casts(Base):
    def forward(self, x):
        return self.l(x.float()).type_as(x)


class Doubles(Base):
    def forward(self, x):
        y = x.contiguous()
        y.mul_(2)
        return self.l(x)


def test_an_op_that_returns_its_own_argument_does_not_take_its_name():
    model = Casts()
    net = fxray.trace(model, X).rewrite()
    assert net(X.double()).dtype == model(X.double()).dtype == torch.float64
    twice = Doubles()
    net = fxray.trace(twice, torch.randn(8, 8)).rewrite()
    square = torch.randn(8, 8)
    assert torch.equal(net(square.clone().t()), twice(square.clone().t()))


class NoGradThenFails(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l = nn.Embedding(4, 8), nn.Linear(8, 8)

    def forward(self, ids):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            h = self.e(ids)
        return self.l(h)


def test_an_exception_half_way_leaves_autograd_and_autocast_as_they_were():
    net = fxray.trace(NoGradThenFails(), torch.tensor([0, 1, 2])).rewrite()
    with pytest.raises(IndexError):
        net(torch.tensor([0, 1, 9]))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    # A level left open would keep casts of the weights over the next optimizer steps.
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


class ReturnsAnObject(Base):
    def forward(self, x):
        return self.l(x), Holder(self.l(x))


class KeepsALoss(Base):
    def __init__(self):
        super().__init__()
        self.aux = []

    def forward(self, x):
        h = self.l(x)
        self.aux.clear()
        self.aux.append(h.pow(2).mean())
        return h


@pytest.mark.parametrize(("make", "words"), [(ReturnsAnObject, "Holder"), (KeepsALoss, "list")])
def test_what_a_graph_would_freeze_is_refused(make, words):
    model = make()
    with pytest.raises(fxray.TraceError, match=words):
        fxray.trace(model, X)
    assert not getattr(model, "aux", [])


class Looks(Base):
    def forward(self, x):
        q = self.l(x)
        return torch.softmax(q, -1, dtype=torch.float32).to(q.dtype)


def test_a_forward_that_looks_at_dtypes_is_traced_as_it_is_trained():
    model = Looks()
    net = fxray.trace(model, X).rewrite()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(fxray.SpecialisationError, match="autocast"),
    ):
        net(X)
    with torch.autocast("cpu", torch.bfloat16):
        net = fxray.trace(model, X).rewrite()
        assert net(X).dtype == model(X).dtype == torch.bfloat16


class Accumulates(Base):
    def forward(self, x):
        h = torch.zeros(8)
        h.add_(self.l(x).sum(0))
        return h * 1


def test_a_tensor_made_and_written_in_a_forward_needs_an_input():
    with pytest.raises(fxray.TraceError, match="Give an input"):
        fxray.trace(Accumulates())
    model = Accumulates()
    net = fxray.trace(model, X).rewrite()
    net(X)
    assert torch.equal(net(X), model(X))


# ------------------------------------------------------------------ records


def recorded(model, *marks, place, **words):
    xray = fxray.trace(model, X)
    xray.draft.clear()
    xray.mark(*marks, selection=fxray.Whole(), **words)
    return xray.rewrite(), place


def test_weights_and_biases_may_have_optimizers_of_their_own():
    net, place = recorded(Base2(), "l", place="memory://two-optimizers", weight_grad=True)
    first = torch.optim.SGD([p for p in net.parameters() if p.dim() == 2], lr=0.1)
    second = torch.optim.Adam([p for p in net.parameters() if p.dim() == 1], lr=0.1)
    used = []
    with fxray.record(net, place):
        for _ in range(3):
            net(X).square().mean().backward()
            used.append((net.l.weight.grad.clone(), net.l.bias.grad.clone()))
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    kept = fxray.open(place)["l"]
    for step, (weight, bias) in enumerate(used):
        assert torch.equal(torch.from_numpy(kept.weight_grad[step]), weight)
        assert torch.equal(torch.from_numpy(kept.parameter_grad("bias")[step]), bias)


class Base2(Base):
    def forward(self, x):
        return self.l(x)


def test_a_thread_that_fails_holds_nobody_up():
    net, place = recorded(Base2(), "l", place="memory://failing-thread", output=True)
    net.eval()
    with fxray.record(net, place) as recorder:

        def fail():
            with pytest.raises((RuntimeError, fxray.SpecialisationError)):
                net(torch.randn(4, 9))

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        for _ in range(5):
            net(X)
        recorder.flush()
        assert len(recorder.run["l"].output) == 5


def test_one_backward_over_the_forwards_of_an_open_step_keeps_every_gradient():
    net, place = recorded(Base2(), "l", place="memory://triplet", grad=True)
    with fxray.record(net, place) as recorder:
        for _ in range(2):
            with recorder.step():
                outs = [net(X + n) for n in range(3)]
                sum(out.square().mean() for out in outs).backward()
    series = fxray.open(place)["l"].grad
    assert [(r.step, r.call) for r in map(series.row, range(len(series)))] == [
        (step, call) for step in range(2) for call in range(3)
    ]
