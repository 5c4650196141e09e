"""What a forward reads of Python and does to it: followed, or refused, never silent."""

# mypy: ignore-errors
# Small models in many odd shapes say more without annotations.

from __future__ import annotations

import collections
import copy
import math
import threading

import pytest
import torch
from torch import nn

import fxray
from tests.twins import Twins, assert_agree, records

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
    for rows in (16, 5, 16, 8, 12, 1, 40):
        many = torch.randn(rows, 8)
        assert torch.equal(net(many), model(many))


class Annealed(Base):
    def __init__(self):
        super().__init__()
        self.tau = 1.0

    def forward(self, x):
        return self.l(x) / self.tau


@pytest.mark.parametrize("inputs", [(X,), ()], ids=["execution", "symbolic"])
def test_an_attribute_that_changes_after_the_trace_is_traced_once_more(inputs):
    model = Annealed()
    twin = copy.deepcopy(model)
    xray = fxray.trace(model, *inputs)
    net = xray.rewrite()
    for tau in (1.0, 0.5, 1.0, 0.25, 0.5, 1):
        model.tau = twin.tau = tau
        for training in (True, False):
            model.train(training)
            twin.train(training)
            assert_agree([twin, net], X)
    names = [program.name for program in net.family.programs]
    assert names == ["train", "train.1", "train.2", "train.3", "eval", "eval.1", "eval.2", "eval.3"]
    assert xray.report.since == ()
    xray.model = model  # traced anew, at the attribute as it is
    again = xray.rewrite()
    assert torch.equal(again(X), twin(X))
    assert len(again.family.of("eval")) == 1


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
    twins = Twins(OnlyTraining(), X)
    with twins:
        for training in (True, False, True, False):
            for module in twins.both:
                module.sub.train(training)
            twins.call(X)
    assert twins.graphs == {"train": 2, "eval": 1}
    one, other, *_ = twins.outputs
    assert not torch.equal(one[""], other[""])


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


def test_an_object_of_the_user_s_own_is_made_anew_by_each_call():
    model = ReturnsAnObject()
    net = fxray.trace(model, X).rewrite()
    assert net.family.of("train")
    held = []
    for x in (X, X + 1, X[:2]):
        (out, holder), (theirs, expected) = net(x), model(x)
        assert type(holder) is Holder
        assert torch.equal(out, theirs)
        assert torch.equal(holder.tensor, expected.tensor)
        assert holder.tensor.requires_grad
        held.append(holder)
    assert len({id(holder) for holder in held}) == 3


class Hoards(Base):
    def __init__(self):
        super().__init__()
        self.aux = []

    def forward(self, x):
        h = self.l(x)
        self.aux.append(h.pow(2).mean())
        return h * len(self.aux)


@pytest.mark.parametrize("make", [KeepsALoss, Hoards])
def test_a_list_that_a_forward_fills_holds_what_the_model_itself_would_put_there(make):
    model = make()
    twins = Twins(model, X)
    assert model.aux == []
    if make is Hoards:
        assert "fills a list" in twins.xray.report.interposed["train"]
        with pytest.raises(fxray.TraceError, match="Hoards fills a list"):
            fxray.Xray(model, (X,), frontend="execution")
        assert model.aux == []
    with twins:
        for n in range(3):
            twins.call_both(X + n)
            assert len(twins.model.aux) == len(twins.twin.aux) > 0
            for ours, theirs in zip(twins.model.aux, twins.twin.aux, strict=True):
                assert torch.equal(ours, theirs)
                assert ours.requires_grad
    assert len(records(twins.recorder.run["mean"].output)) == 6
    # And the gradient of the kept loss goes where it should.
    for module in (twins.net, twins.twin):
        module.aux.clear()
        module.zero_grad()
        out = module(X)
        (out.mean() + module.aux[-1]).backward()
    assert torch.equal(twins.model.l.weight.grad, twins.twin.l.weight.grad)
    for module in (twins.model, twins.twin):
        module.aux = []  # another list than the one that was traced
        module(X)
    twins.net(X)
    twins.twin(X)
    assert len(twins.model.aux) == len(twins.twin.aux)
    assert torch.equal(twins.model.aux[-1], twins.twin.aux[-1])


class Looks(Base):
    def forward(self, x):
        q = self.l(x)
        return torch.softmax(q, -1, dtype=torch.float32).to(q.dtype)


def test_a_forward_that_looks_at_dtypes_has_a_graph_for_each_it_is_trained_under():
    twins = Twins(Looks(), X)
    twins.xray.draft.clear()
    twins.xray.mark("*", grad=True, output=True, selection=fxray.Mean())
    twins.xray.unmark("x", "grad")
    with fxray.record(twins.net) as recorder:
        for _ in range(2):
            twins.call_both(X)
            with torch.autocast("cpu", torch.bfloat16):
                twins.call_both(X)
                assert twins.net(X).dtype == torch.bfloat16
            with torch.autocast("cpu", torch.float16):
                assert twins.net(X).dtype == torch.float16
    assert twins.graphs == {"train": 3, "eval": 2}
    assert {len(recorder.run[path].output) for path in ("x", "l", "softmax")} == {12}
    with torch.autocast("cpu", torch.bfloat16):
        net = fxray.trace(Looks(), X).rewrite()
        assert net(X).dtype == torch.bfloat16
    assert net(X).dtype == torch.float32


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


class Notes:
    """A plain object on a module."""

    def __init__(self):
        self.last, self.calls = None, 0


class InAList(Base):
    def __init__(self):
        super().__init__()
        self.kept = []

    def keep(self, h):
        self.kept.append(h.detach().mean())
        return sum(self.kept[-3:])

    def forward(self, x):
        h = self.l(x)
        h = h + self.keep(h)
        return torch.tanh(h) if x.sum() > 0 else torch.sigmoid(h)


class InADeque(InAList):
    def __init__(self):
        super().__init__()
        self.kept = collections.deque(maxlen=2)

    def keep(self, h):
        self.kept.append(h.detach().mean())
        return sum(self.kept)


class InADict(InAList):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def keep(self, h):
        before = self.kept.get("last", 0.0)
        self.kept["last"] = h.detach().mean()
        self.kept["calls"] = self.kept.get("calls", 0) + 1
        return before * self.kept["calls"]


class OnAnObject(InAList):
    def __init__(self):
        super().__init__()
        self.kept = Notes()

    def keep(self, h):
        before = 0.0 if self.kept.last is None else self.kept.last
        self.kept.last = h.detach().mean()
        self.kept.calls += 1
        return before * self.kept.calls


class OnlyWrites(InAList):
    def keep(self, h):
        self.kept.clear()
        self.kept.append(h.detach().mean())
        return 1.0


def contents(value):
    value = vars(value) if isinstance(value, Notes) else value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(k, v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in items]


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
@pytest.mark.parametrize("make", [InAList, InADeque, InADict, OnAnObject, OnlyWrites])
def test_what_a_forward_keeps_is_the_model_s_own_though_its_branch_flips(make):
    model = make()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, X.abs()).rewrite()
    assert contents(model.kept) == contents(twin.kept)
    for sign in (1, -1, -1, 1, -1):
        for training in (True, False):
            net.train(training)
            twin.train(training)
            assert_agree([twin, net], sign * X.abs())
            assert contents(model.kept) == contents(twin.kept)


class CountsByHalves(Base):
    """What it does hangs on how often it was called, by numbers that Python makes of that."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.l(x) * (self.calls >> 1)
        for n in range(self.calls % 3):
            h = h + n
        return h / int(self.calls / 2 + 1)


class CountsUp(Base):
    def __init__(self):
        super().__init__()
        self.calls, self.warm = 0, 4

    def forward(self, x):
        self.calls += 1
        return self.l(x) * min(1.0, self.calls / self.warm) + int(self.calls) ** 2


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
@pytest.mark.parametrize("make", [CountsByHalves, CountsUp])
def test_a_counter_that_python_makes_other_numbers_of_counts_as_the_model_does(make):
    model = make()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, X).rewrite()
    assert model.calls == 0
    for n in range(14):
        assert_agree([twin, net], X[: 2 + n % 3])
        assert model.calls == twin.calls == n + 1
    model.calls = twin.calls = 2  # a training begun again
    for _ in range(3):
        assert_agree([twin, net], X)
    assert model.calls == twin.calls


def test_an_attribute_set_on_what_rewrite_gives_reaches_the_model():
    model = Annealed()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, X).rewrite()
    for tau in (1.0, 0.5, 1.0):
        net.tau = twin.tau = tau
        assert model.tau == net.tau == tau
        assert_agree([twin, net, model], X)
    assert "tau" not in vars(net)


class WithDefaults(Base):
    tau = 2.0

    def __init__(self):
        super().__init__()
        self.tau, self.shift = 1.0, 3.0
        self.part = nn.Linear(8, 8)

    def forward(self, x):
        return self.part(self.l(x)) / self.tau + self.shift


def test_an_attribute_deleted_after_the_trace_is_missed_as_the_model_misses_it():
    model = WithDefaults()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, X).rewrite()
    for module in (model, twin):
        del module.tau  # there is that of the class
    assert_agree([twin, net], X)
    for name in ("shift", "part"):
        changed = copy.deepcopy(twin)
        given = fxray.trace(copy.deepcopy(twin), X).rewrite()
        for module in (changed, given.original):
            delattr(module, name)
        for module in (changed, given):
            with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
                module(X)
        setattr(given.original, name, getattr(twin, name))
        assert_agree([twin, given], X)
