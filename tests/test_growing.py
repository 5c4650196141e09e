"""Calls that no graph was traced for: shown free, traced once more, or run by the model itself."""

# mypy: ignore-errors
# Small models in many odd shapes say more without annotations.

from __future__ import annotations

import collections
import copy
import pickle
import threading
import warnings

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxray
from fxray.tracing import growing
from fxray.tracing.program import Before
from tests.twins import Twins, assert_agree, records

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
OTHER_GRAPH = "Another graph runs the call"
over_frontends = pytest.mark.parametrize("inputs", [(X,), ()], ids=["execution", "symbolic"])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.l = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.l(x))


@pytest.fixture
def traces(monkeypatch):
    """How often a call was written anew, since the test last cleared it."""
    written = []
    write = growing.write

    def noted(model, example, sizes, how):
        written.append([tuple(t.shape) for t in example.tensors])
        return write(model, example, sizes, how)

    grown = []
    show = growing.show
    monkeypatch.setattr(growing, "write", noted)
    monkeypatch.setattr(growing, "show", lambda *a, **k: (grown.append(1), show(*a, **k))[1])
    return written


# ---------------------------------------------------------------- sizes


class Sequence(nn.Module):
    """Its length is passed over by ops that follow it, its batch too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.l = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        h = self.l(x)
        b, n, c = h.shape
        h = h.view(b, n, 2, c // 2).transpose(1, 2) / n**0.5
        if mask is not None:
            h = h * mask[:, None, :, None]
        return h.reshape(b, -1, c).mean(1) + torch.arange(n).sum()


def sequence(batch, length, *, mask=False):
    x = torch.randn(batch, length, 8)
    return (x, torch.ones(batch, length)) if mask else (x,)


@pytest.mark.parametrize("mask", [False, True])
def test_a_size_is_free_after_it_was_shown_at_three(traces, mask):
    twins = Twins(Sequence(), *sequence(2, 5, mask=mask))
    assert twins.xray.report.free == ("batch size",)
    with twins:
        twins.call(*sequence(2, 5, mask=mask))
        assert traces == []
        for length in (7, 6):  # the second and the third
            twins.call(*sequence(3, length, mask=mask))
        assert {shapes[0] for shapes in traces} == {(3, 7, 8), (3, 6, 8)}
        traces.clear()
        for length in (11, 2, 40, 5, 6, 7):
            twins.call(*sequence(4, length, mask=mask))
        assert traces == []
        for module in twins.both:  # eval mode shows its own
            module.eval()
        for length in (9, 8, 17, 30):
            twins.call(*sequence(1, length, mask=mask))
        assert {shapes[0] for shapes in traces} == {(1, 9, 8), (1, 8, 8)}
    assert twins.graphs == {"train": 1, "eval": 1}
    assert twins.xray.report.since == ()


def test_a_size_that_came_once_is_not_traced_again(traces):
    twins = Twins(Sequence(), *sequence(2, 5))
    for length in (7, 7, 5, 7):
        twins.call(*sequence(2, length))
    assert len(traces) == 1


def test_a_size_of_one_is_shown_by_itself(traces):
    twins = Twins(Sequence(), *sequence(2, 5))
    for length in (6, 7, 8):
        twins.call(*sequence(2, length))
    traces.clear()
    twins.call(*sequence(2, 1))
    assert len(traces) == 1
    twins.call(*sequence(2, 1))
    assert len(traces) == 1
    assert twins.graphs == {"train": 1, "eval": 1}


class Eighths(nn.Module):
    """A number that many neighbouring lengths share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.l = nn.Linear(8, 8)

    def forward(self, x):
        h = self.l(x)
        return h * {0: 1.0, 1: 2.0, 2: 3.0}.get(int(x.size(1) / 8), 9.0)


def test_three_neighbours_that_agree_do_not_free_a_size():
    twins = Twins(Eighths(), torch.randn(2, 5, 8))
    with twins:
        for length in (5, 4, 6, 3, 8, 9, 17, 40, 5, 17, 6, 9):
            twins.call(torch.randn(2, length, 8))
    assert twins.graphs["train"] == 4


def test_sizes_named_before_are_shown_before_anything_runs(traces):
    args = sequence(2, 5, mask=True)
    twins = Twins(Sequence(), *args, options={"sizes": {"x": (0, 1), "mask": (0, 1)}})
    free = twins.xray.report.free
    assert free[0] == "batch size"
    assert "x dim 1" in free[1]
    assert "mask dim 1" in free[1]
    with twins:
        for length in (5, 9, 2, 33):
            twins.call_both(*sequence(3, length, mask=True))
    assert traces == []
    assert twins.graphs == {"train": 1, "eval": 1}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"y": 0}, "'y', which is no tensor of the input"), ({"x": 3}, "dim 3 of 'x', which has 3")],
)
def test_sizes_that_name_nothing_are_refused(sizes, words):
    with pytest.raises(fxray.TraceError, match=words):
        fxray.Xray(Sequence(), sequence(2, 5), sizes=sizes)


def test_a_size_named_that_matters_is_reported_with_its_reason():
    report = fxray.Xray(Eighths(), (torch.randn(2, 5, 8),), sizes={"x": (0, 1)}).report
    assert report.free == ("batch size",)
    assert [why.partition(" fixed in ")[0] for why in report.fixed] == ["size 5 (x dim 1)"] * 2


def test_examples_are_taken_before_anything_runs(traces):
    examples = [sequence(2, 7), (sequence(2, 6), {}), {"x": torch.randn(2, 5, 8),
                "mask": torch.ones(2, 5)}]  # fmt: skip
    twins = Twins(Sequence(), *sequence(2, 5), options={"examples": examples})
    assert twins.graphs == {"train": 2, "eval": 2}
    traces.clear()
    with twins:
        for length in (5, 6, 7, 12):
            twins.call_both(*sequence(3, length))
        twins.call_both(*sequence(3, 5, mask=True))
    assert traces == []


def test_strict_makes_an_error_of_every_reservation():
    assert fxray.Xray(Base(), (X,), strict=True).report.reservations == ()
    with pytest.raises(fxray.TraceError, match=r"branch on data at test_growing\.py:\d+"):
        fxray.Xray(Flips(), (X,), strict=True)
    with pytest.raises(fxray.TraceError, match=r"size 5 .* fixed in train mode"):
        fxray.Xray(Eighths(), (torch.randn(2, 5, 8),), sizes={"x": 1}, strict=True)


# ---------------------------------------------------------------- branches, and when they end half-way


class Flips(nn.Module):
    """Everything that a forward may leave behind comes before its branch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.bn, self.drop = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            self.calls += 1
        h = self.drop(self.bn(h)) + torch.rand_like(h)
        if x.sum() > 0:
            return self.up(h)
        return torch.sigmoid(self.down(h))


POSITIVE = X.abs()


def test_a_branch_that_flips_back_and_forth_keeps_two_graphs_and_leaves_no_trace(traces):
    twins = Twins(Flips(), POSITIVE)
    (branch,) = twins.xray.report.branches
    assert branch.by == "data"
    assert branch.was == "True"
    assert "down" not in twins.xray.architecture
    with twins:
        with pytest.warns(fxray.FxrayWarning, match=OTHER_GRAPH) as told:
            twins.call_each((POSITIVE, -POSITIVE, -POSITIVE, POSITIVE, -POSITIVE, POSITIVE[:2]))
        assert len(told) == 1  # once for the line, whichever the mode
        assert branch.where in str(told[0].message)
        traces.clear()
        twins.begin_again()
        for n in range(12):
            twins.call_both(POSITIVE if n % 3 else -POSITIVE)
    assert traces == []
    assert twins.names() == ["train", "train.1", "eval", "eval.1"]
    run = twins.recorder.run
    assert len(run["up"].output) == 16
    assert len(run["down"].output) == len(run["sigmoid"].output) == 8
    assert len(run["a"].output) == len(run["bn"].output) == 24
    assert run["a"].output.in_phase("train").steps.tolist() == list(range(12))
    assert run["up"].output.in_phase("train").steps.tolist() == [n for n in range(12) if n % 3]
    assert run["down"].output.in_phase("train").steps.tolist() == [0, 3, 6, 9]
    assert len(twins.xray.report.since) == 1


def test_an_op_that_only_another_branch_runs_can_be_marked_and_is_captured():
    xray = fxray.trace(Flips(), POSITIVE)
    net = xray.rewrite()
    with pytest.raises(fxray.UnknownNameError):
        xray.mark("down", output=True)
    with pytest.warns(fxray.FxrayWarning, match=OTHER_GRAPH):
        net(-POSITIVE)
    assert {"down", "sigmoid"} <= set(xray.architecture)
    assert set(xray.architecture["down"].nodes) == {"train"}
    assert xray.architecture.graph.has_edge("down", "sigmoid")
    xray.draft.clear()
    assert xray.mark("down", output=True, grad=True, selection=fxray.Whole()) == ("down",)
    outs = []
    net.down.register_forward_hook(lambda _m, _i, out: outs.append(out.detach().clone()))
    with fxray.record(net) as recorder:
        for x in (POSITIVE, -POSITIVE, POSITIVE, -POSITIVE):
            net(x).sum().backward()
    assert recorder.run["down"].output.steps.tolist() == [1, 3]
    assert recorder.run["down"].grad.steps.tolist() == [1, 3]
    for kept, out in zip(records(recorder.run["down"].output), outs, strict=True):
        assert np.array_equal(kept, out.numpy())


def assert_fails(module):
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="too small"):
        module(-POSITIVE * 1000)
    assert torch.is_grad_enabled()


def test_a_forward_that_fails_after_its_branch_flipped_is_the_model_s_own_error():
    class Fails(Flips):
        def forward(self, x):
            out = super().forward(x)
            if x.sum() < -100:
                msg = "too small"
                raise ValueError(msg)
            return out

    model = Fails()
    net = fxray.trace(model, POSITIVE).rewrite()
    twin = copy.deepcopy(model)
    assert_fails(twin)
    with pytest.warns(fxray.FxrayWarning, match=OTHER_GRAPH):
        assert_fails(net)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


class Loops(nn.Module):
    """How often it loops is another number at every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.l, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        h = self.bn(x)
        for _ in range(int(x.abs().max())):
            h = torch.tanh(self.l(h))
        return h


def test_a_loop_of_another_length_at_every_call_ends_with_the_model_itself(traces):
    at_most = X / X.abs().max()
    twins = Twins(Loops(), at_most * 2.5)
    assert twins.graphs == {"train": 1, "eval": 1}
    with twins:
        with pytest.warns(fxray.FxrayWarning, match="from now on|" + OTHER_GRAPH) as told:
            twins.call_each((at_most * (n + 0.5) for n in range(3, 31)), both=False)
        flip, end = [str(w.message) for w in told]
        assert "Python takes a tensor's value" in flip
        assert "from now on" in end
        assert "and so it went on" in end
        traces.clear()
        ran = []
        for runner in twins.net.family.of("train"):
            runner.forward = lambda *a: ran.append(a)
        for n in (35, 3, 2, 16):  # not even begun any more, for they would end half-way
            twins.call(at_most * (n + 0.5))
        assert ran == []
    assert traces == []
    assert twins.graphs["train"] <= 9
    run = twins.recorder.run
    assert len(run["bn"].output) == 32
    assert len(run["l@1"].output) == 32
    assert "l@34" in twins.xray.architecture


# ---------------------------------------------------------------- Python state


class Annealed(Base):
    def __init__(self):
        super().__init__()
        self.tau = 1.0

    def forward(self, x):
        return torch.softmax(self.l(x) / self.tau, -1)


@over_frontends
def test_an_attribute_annealed_each_epoch_is_traced_once_an_epoch(inputs, traces):
    model = Annealed()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, *inputs).rewrite()
    for epoch in range(5):
        model.tau = twin.tau = 0.9**epoch
        for training in (True, True, True, False):
            model.train(training)
            twin.train(training)
            assert_agree([twin, net], X)
    train = [p.name for p in net.family.programs if p.mode == "train"]
    assert train[0] == "train"
    assert len(train) <= 5
    assert net.family.told == [] or "from now on" in net.family.told[0]


def test_an_attribute_annealed_at_every_call_ends_with_the_model_itself():
    twins = Twins(Annealed(), X)

    def anneal():
        for n in range(30):
            for module in twins.both:
                module.tau = 1 / (1 + n)
            yield X

    words = "from now on .*attribute 'tau' was"
    with twins, pytest.warns(fxray.FxrayWarning, match=words) as told:
        twins.call_each(anneal(), both=False)
    assert len(told) == 1
    assert twins.graphs["train"] <= 9
    assert len(twins.recorder.run["softmax"].output) == 30


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.bn, self.p = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        return F.dropout(self.p(self.bn(self.l(x))), 0.3, self.training)


class WithEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.head = Encoder(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


@over_frontends
def test_a_frozen_part_has_a_graph_of_its_own_in_train_mode(inputs):
    twins = Twins(WithEncoder(), *inputs)
    with twins:
        for frozen in (False, True, False, True):
            for module in twins.both:
                module.train()
                module.encoder.train(not frozen)
            twins.call(X)
    assert twins.graphs == {"train": 2, "eval": 1}
    assert twins.xray.report.since == ()


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        torch.manual_seed(2)
        self.base, self.down, self.up = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 8)
        base.requires_grad_(False)  # noqa: FBT003

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrap(model):
    model.encoder.l = LoRA(model.encoder.l)


def insert(model):
    model.head = nn.Sequential(nn.Tanh(), model.head)


def same_class(model):
    torch.manual_seed(9)
    model.head = nn.Linear(8, 3)


@over_frontends
@pytest.mark.parametrize("change", [wrap, insert, same_class])
def test_a_part_replaced_after_the_trace_is_followed(inputs, change):
    model = WithEncoder()
    twin = copy.deepcopy(model)
    xray = fxray.trace(model, *inputs)
    net = xray.rewrite()
    net(X)
    twin(X)
    for module in (model, twin):
        change(module)
    for _ in range(2):
        for training in (True, False):
            model.train(training)
            twin.train(training)
            assert_agree([twin, net], X)
    assert list(net.state_dict()) == list(twin.state_dict())
    grown = [p.name for p in net.family.programs]
    assert grown == (["train", "eval"] if change is same_class else
                     ["train", "train.1", "eval", "eval.1"])  # fmt: skip
    if change is wrap:
        assert {"encoder.l.down", "encoder.l.up", "encoder.l.base"} <= set(xray.architecture)
        xray.draft.clear()
        xray.mark("encoder.l.up", output=True, weight_grad=True, selection=fxray.Whole())
        model.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with fxray.record(net) as recorder:
            net(X).square().sum().backward()
            used = model.encoder.l.up.weight.grad.clone()
            optimizer.step()
        assert np.array_equal(recorder.run["encoder.l.up"].weight_grad[0], used.numpy())
        assert len(recorder.run["encoder.l.up"].output) == 1


class Counter:
    """A hook that a graph cannot repeat: it counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, args, out):
        self.calls += 1


def double(module, args, out):
    return out * 2


@over_frontends
@pytest.mark.parametrize("where", ["", "encoder", "encoder.l", "head"])
def test_a_hook_added_after_the_trace_runs(inputs, where):
    twins = Twins(WithEncoder(), *inputs)
    twins.call_both(X)
    for _ in range(2):
        handles = [m.get_submodule(where).register_forward_hook(double) for m in twins.both]
        twins.call_both(X)
        for module in twins.both:
            module.eval()
        twins.call(X)
        for handle in handles:
            handle.remove()
        twins.call(X)
        for module in twins.both:
            module.train()
        twins.call_both(X)
        *_, hooked, without, _, _ = (out[""] for out in twins.outputs)
        assert not torch.equal(hooked, without)
    several = 1 if where in {"encoder.l", "head"} else 2  # a leaf runs its own hooks
    assert twins.graphs == {"train": several, "eval": several}
    assert twins.xray.report.since == ()


@pytest.mark.parametrize("where", ["encoder.l", "head"])
def test_a_hook_on_a_leaf_runs_once_for_each_call(where):
    model = WithEncoder()
    net = fxray.trace(model, X).rewrite()
    counter = Counter()
    model.get_submodule(where).register_forward_hook(counter)
    for _ in range(3):
        net(X)
    assert counter.calls == 3


class AsksGrad(Base):
    def forward(self, x):
        h = self.l(x)
        return h * 2 if torch.is_grad_enabled() else torch.relu(h)


def test_a_branch_on_grad_mode_has_a_graph_for_each():
    twins = Twins(AsksGrad(), X)
    with twins:
        for _ in range(2):
            twins.call_both(X)
            with torch.no_grad():
                twins.call_both(X)
    assert {"mul", "relu"} <= set(twins.xray.architecture)
    for _ in range(12):
        with torch.inference_mode():
            out = twins.net(X)
            assert out.is_inference()
        assert torch.equal(out, torch.relu(twins.model.l(X)))
    assert twins.graphs == {"train": 2, "eval": 2}


class AsksInference(Base):
    def forward(self, x):
        h = self.l(x)
        return torch.relu(h) if torch.is_inference_mode_enabled() else h * 2


def test_a_model_that_asks_for_inference_mode_is_right_in_it_and_keeps_no_graph_for_it():
    model = AsksInference()
    net = fxray.trace(model, X).rewrite()

    def in_both():
        for _ in range(12):
            with torch.inference_mode():
                assert torch.equal(net(X), torch.relu(model.l(X)))
            assert torch.equal(net(X), model.l(X) * 2)

    with pytest.warns(fxray.FxrayWarning, match="from now on .*inference mode was off"):
        in_both()
    assert len(net.family.of("train")) <= 9


class LooksAtWeights(Base):
    def forward(self, ids):
        return self.l(torch.ones(4, 8, dtype=self.l.weight.dtype) * ids.to(self.l.weight.dtype))


def test_a_net_made_double_after_the_trace_is_traced_once_more():
    ids = torch.arange(32).reshape(4, 8)
    model = LooksAtWeights()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, ids).rewrite()
    assert_agree([twin, net], ids)
    assert net.double() is net
    twin.double()
    for _ in range(2):
        assert_agree([twin, net], ids)
    assert net(ids).dtype == torch.float64
    assert len(net.family.of("train")) == 2
    net.float()
    twin.float()
    assert_agree([twin, net], ids)
    assert len(net.family.of("train")) == 2


class HoldsATable(Base):
    def forward(self, x):
        return self.l(x) + torch.tensor([0.1] * 8) * TABLE


TABLE = torch.arange(8) / 7


def test_a_net_made_double_keeps_the_dtype_of_constants_that_are_the_user_s():
    model = HoldsATable()
    twin = copy.deepcopy(model).double()
    net = fxray.trace(model, X).rewrite().double()
    assert_agree([twin, net], X.double())
    assert TABLE.dtype == torch.float32


# ---------------------------------------------------------------- what is shared, kept, copied


def test_two_nets_of_one_xray_share_what_was_grown(traces):
    xray = fxray.trace(Flips(), POSITIVE)
    one, other = xray.rewrite(), xray.rewrite()
    with pytest.warns(fxray.FxrayWarning, match=OTHER_GRAPH):
        one(-POSITIVE)
    traces.clear()
    twin = copy.deepcopy(one.original)
    assert_agree([twin, other], -POSITIVE)
    assert traces == []
    assert one.family is other.family
    assert len(xray.graph_module.family.of("train")) == 2


def test_marks_follow_into_graphs_that_are_grown_later():
    xray = fxray.trace(Flips(), POSITIVE)
    xray.draft.clear()
    net = xray.rewrite()
    xray.mark(["a", "bn"], output=True, every=2, selection=fxray.Whole())
    twin = copy.deepcopy(net.original)
    seen = []
    twin.bn.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    with fxray.record(net) as recorder:
        for x in (POSITIVE, POSITIVE):
            assert_agree([twin, net], x)
        with pytest.warns(fxray.FxrayWarning, match=OTHER_GRAPH):
            assert_agree([twin, net], -POSITIVE)
        for x in (POSITIVE, -POSITIVE):
            assert_agree([twin, net], x)
    for path in ("a", "bn"):
        assert recorder.run[path].output.steps.tolist() == [0, 2, 4]
    for kept, truth in zip(records(recorder.run["bn"].output), seen[::2], strict=True):
        assert np.array_equal(kept, truth.numpy())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_net_that_has_grown_is_copied_with_all_its_graphs(copied, traces):
    xray = fxray.trace(Flips(), POSITIVE)
    xray.draft.clear()
    net = xray.rewrite()
    with pytest.warns(fxray.FxrayWarning, match=OTHER_GRAPH):
        net(-POSITIVE)
    xray.mark("sigmoid", output=True, selection=fxray.Whole())
    twin = copied(net)
    assert [p.name for p in twin.family.programs] == ["train", "train.1", "eval"]
    assert twin.family.told == net.family.told
    assert twin.original is not net.original
    traces.clear()
    truth = copy.deepcopy(net.original)
    for x in (POSITIVE, -POSITIVE, POSITIVE):
        assert_agree([truth, twin], x)
    assert traces == []
    with fxray.record(twin) as recorder:
        twin(-POSITIVE)
    assert recorder.run["sigmoid"].output.steps.tolist() == [0]
    # It grows on, by itself.
    twin.eval()
    twin(-POSITIVE)
    assert len(twin.family.of("eval")) == 2
    assert len(net.family.of("eval")) == 1


def test_a_graph_edited_in_place_keeps_the_edit():
    xray = fxray.trace(Base(), X)
    net, untouched = xray.rewrite(), xray.rewrite()
    (node,) = (node for node in net.graph.nodes if node.target is torch.tanh)
    node.target = torch.sigmoid
    net.recompile()
    assert torch.equal(net(X), torch.sigmoid(net.l(X)))
    assert torch.equal(net(X[:2]), torch.sigmoid(net.l(X[:2])))
    assert torch.equal(untouched(X), torch.tanh(net.l(X)))
    net.eval()
    assert torch.equal(net(X), torch.tanh(net.l(X)))  # the graph of the other mode
    net.train()
    assert "sigmoid" in net.code
    assert torch.equal(copy.deepcopy(net)(X), torch.sigmoid(net.l(X)))
    # It never becomes the model again in silence.
    with pytest.raises(fxray.SpecialisationError, match="shape"):
        net(X[None])
    assert untouched(X[None]).shape == (1, 4, 8)


# ---------------------------------------------------------------- without an input


def test_a_graph_traced_without_an_input_is_verified_by_its_first_calls(monkeypatch):
    verified = []
    verify = growing.verify
    monkeypatch.setattr(growing, "verify", lambda *a, **k: (verified.append(1), verify(*a, **k))[1])
    model = Base()
    xray = fxray.trace(model)
    net = xray.rewrite()
    assert verified == []
    counts = []
    for n in (4, 4, 3, 3, 2, 1, 4):
        assert_agree([copy.deepcopy(model), net], X[:n])
        counts.append(len(verified))
    assert counts == [1, 1, 2, 2, 3, 3, 3]
    assert xray.report.since == ()
    assert [p.name for p in net.family.programs] == ["train", "eval"]


class AsksIsInstance(Base):
    def forward(self, x):
        return self.l(x) * 2 if isinstance(x, torch.Tensor) else self.l(x)


class AsksIsTensor(Base):
    def forward(self, x):
        return torch.relu(self.l(x)) if torch.is_tensor(x) else self.l(x)


class Accumulates(Base):
    def forward(self, x):
        y = h = self.l(x)
        y += 1
        return h


class WritesASlice(Base):
    def forward(self, x):
        h = self.l(x)
        v = h[:2]
        v *= 2
        return h


class TakesNone(Base):
    def forward(self, x, y):
        return self.l(x) if y is None else self.l(x) + y


@pytest.mark.parametrize("make", [AsksIsInstance, AsksIsTensor, Accumulates, WritesASlice])
def test_a_symbolic_graph_that_is_wrong_is_found_out_at_the_first_call(make):
    twins = Twins(make())
    assert twins.xray.report.frontend == "symbolic"
    with twins:
        with pytest.warns(fxray.FxrayWarning, match="traced without an input") as told:
            twins.call_both(X)
        assert len(told) == 2  # each mode has a graph that is wrong
        for n in (4, 3, 2):
            twins.call_both(X[:n])
    assert twins.graphs == {"train": 1, "eval": 1}
    assert len(twins.xray.report.since) == 2
    assert twins.net.graph.find_nodes(op="placeholder")


def test_a_symbolic_graph_that_took_none_for_a_tensor_is_found_out():
    twins = Twins(TakesNone())
    for n in (4, 3, 2, 4):
        twins.call_both(X[:n], X[:n])
    for y in (None, X, None, X.double()):
        twins.call_both(X, y)
    assert twins.graphs == {"train": 2, "eval": 2}
    assert twins.xray.report.since == ()


class TakesAFlag(Base):
    def forward(self, x, flag):
        h = self.l(x)
        return h * 2 if flag is True else h


def test_a_symbolic_graph_that_took_a_flag_for_a_tensor_is_found_out():
    twins = Twins(TakesAFlag())
    for n in (4, 3, 2, 4):
        twins.call_both(X[:n], flag=False)
    with pytest.warns(fxray.FxrayWarning, match="traced without an input"):
        twins.call_both(X, flag=True)
    for flag in (False, True):
        twins.call_both(X, flag=flag)


@over_frontends
def test_a_first_call_that_the_model_does_not_take_is_told_in_its_own_words(inputs):
    model = Base()
    net = fxray.trace(model, *inputs).rewrite()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        net(torch.zeros(4, 9))
    assert not isinstance(caught.value, fxray.FxrayError)
    assert_agree([copy.deepcopy(model), net], X)
    assert [p.name for p in net.family.programs] == ["train", "eval"]
    assert net.family.told == []


# ---------------------------------------------------------------- what fails


def test_a_model_that_fails_while_it_is_grown_is_told_in_its_own_words_and_left_alone():
    model = WithEncoder()
    net = fxray.trace(model, X).rewrite()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    flags = [m.training for m in model.modules()]
    for _ in range(20):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
            net(torch.zeros(4, 9))
        assert not isinstance(caught.value, fxray.FxrayError)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert net.family.told == []
    assert len(net.family.programs) == 2


def test_wrong_arguments_are_told_in_python_s_own_words_and_traced_for_nothing(traces):
    net = fxray.trace(Base(), X).rewrite()
    with pytest.raises(TypeError, match="x"):
        net()
    with pytest.raises(TypeError, match="nope"):
        net(X, nope=1)
    assert traces == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda xray: pickle.loads(pickle.dumps(xray))])
def test_an_xray_is_copied_with_its_marks(copied) -> None:
    xray = fxray.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(2, 4))
    xray.mark("1", output=True, every=3)
    twin = copied(xray)
    assert twin.draft.captures() == xray.draft.captures()
    assert twin.model is not xray.model
    x = torch.randn(5, 4)
    torch.testing.assert_close(twin.rewrite()(x), xray.model(x), rtol=0, atol=0)
    twin.mark("0", output=True)
    assert len(twin.draft.captures()) == len(xray.draft.captures()) + 1


# ---------------------------------------------------------------- where a call is traced


class Turns(Base):
    """A branch on what it is given, and a size that nothing shows at first."""

    def forward(self, x):
        h = self.l(x)
        if x.sum() > 0:
            return torch.tanh(h) * x.shape[1]
        return torch.sigmoid(h) - h


class SavesItself(Turns):
    """The same within a checkpoint of the model's own."""

    def forward(self, x, reentrant=False):
        return checkpoint(super().forward, x, use_reentrant=reentrant)


def lengths(*many):
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(2, length, 8, generator=generator) for length in many]


def gradients(model, *args, run):
    """Return what a forward and its backward gave: the output and every gradient."""
    model.zero_grad()
    x, *rest = args
    x = x.detach().clone().requires_grad_()
    out = run(model, x, *rest)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [Turns, SavesItself])
def test_a_branch_that_flips_inside_a_checkpoint_has_the_model_s_gradients(make, reentrant):
    def run(model, x):
        if make is SavesItself:
            return model(x, reentrant)
        return checkpoint(model, x, use_reentrant=reentrant)

    model = make()
    twin = copy.deepcopy(model)
    (x,) = lengths(3)
    example = x.clone().requires_grad_()  # else torch warns that a reentrant one gives no gradient
    net = fxray.trace(model, example, *([reentrant] if make is SavesItself else [])).rewrite()
    for given in (x, -x, x, -x, *lengths(5, 4), -x):
        assert_equal(gradients(net, given, run=run), gradients(twin, given, run=run))


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
@pytest.mark.parametrize("flips", [False, True])
def test_a_size_never_seen_inside_of_a_gradient_of_torch_func_is_right(flips):
    model = Turns()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, *lengths(3)).rewrite()
    for x in lengths(3, 5, 4, 6, 9, 3):
        given = -x if flips else x
        ours, theirs = (
            torch.func.grad_and_value(lambda x, module=module: module(x).square().sum())(given)
            for module in (net, twin)
        )
        assert_equal(ours, theirs)
    assert torch.equal(net(given), twin(given))


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
@pytest.mark.parametrize("flips", [False, True])
def test_a_size_never_seen_under_hooks_on_what_is_saved_is_right(flips):
    model = Turns()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, *lengths(3)).rewrite()
    packed = collections.Counter()

    def run(module, x):
        def pack(tensor):
            packed[module] += 1
            return tensor.detach().clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            return module(x)

    for x in lengths(3, 5, 4, 6, 9, 3):
        given = -x if flips else x
        assert_equal(gradients(net, given, run=run), gradients(twin, given, run=run))
        assert packed[net] == packed[twin] > 0  # and what was traced on the way saved nothing


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
def test_two_threads_that_come_with_sizes_never_seen_wait_for_no_one():
    model = Turns()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, *lengths(3)).rewrite()
    start, right = threading.Barrier(2), []

    def work(sign, sizes):
        start.wait()
        right.append([torch.equal(net(sign * x), twin(sign * x)) for x in lengths(*sizes)])

    threads = [
        threading.Thread(target=work, args=(sign, sizes), daemon=True)
        for sign, sizes in ((1, (5, 6, 7, 8)), (-1, (9, 6, 4, 8)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert right == [[True] * 4] * 2


def test_a_graph_that_another_thread_adds_while_one_is_looked_for_stays():
    model = Annealed()
    net = fxray.trace(model, X).rewrite()
    family = net.family
    model.tau = 0.5
    net(X)
    model.tau = 1.0
    last, first = family.of("train")
    third = attrs.evolve(first.program, name="train.7")
    look = first.inputs

    def meanwhile(args, kwargs):
        found = look(args, kwargs)
        family.add(third)
        return found

    first.inputs = meanwhile
    assert torch.equal(net(X), model(X))
    assert {r.program.name for r in family.of("train")} == {"train", "train.1", "train.7"}
    assert family.of("train")[0] is first
    assert last in family.of("train")


def test_warnings_made_errors_do_not_stop_a_training():
    model = Turns()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, *lengths(3)).rewrite()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, twin)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, x in enumerate(lengths(3, 5, 4, 6, 9, 3, *range(10, 20))):
            for module, optimizer in zip((net, twin), optimizers, strict=True):
                optimizer.zero_grad()
                module(x if n % 2 else -x).square().mean().backward()
                optimizer.step()
    assert_equal([*model.parameters()], [*twin.parameters()])
    assert any(OTHER_GRAPH in told for told in net.family.told)


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
def test_a_mode_given_up_for_its_branches_begins_no_graph_that_may_end_half_way(monkeypatch):
    at_most = X / X.abs().max()
    model = Loops()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, at_most * 2.5).rewrite()
    half_way = []
    restore = Before.restore
    monkeypatch.setattr(Before, "restore", lambda self: (half_way.append(1), restore(self)))
    for n in range(3, 31):
        assert torch.equal(net(at_most * (n + 0.5)), twin(at_most * (n + 0.5)))
    assert half_way
    for module in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        half_way.clear()
        other = copy.deepcopy(twin)
        for n in (35, 3, 2, 16):
            assert torch.equal(module(at_most * (n + 0.5)), other(at_most * (n + 0.5)))
        assert half_way == []


class AnnealsAndTurns(Annealed):
    def forward(self, x):
        h = super().forward(x)
        for _ in range(int(x.sum())):
            h = torch.tanh(h)
        return h


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
def test_a_mode_given_up_for_its_state_ends_half_way_but_a_few_times(monkeypatch):
    model = AnnealsAndTurns()
    twin = copy.deepcopy(model)
    one = X.abs() / X.abs().sum()
    net = fxray.trace(model, one * 1.5).rewrite()
    for n in range(12):
        model.tau = twin.tau = 1 / (2 + n)
        assert torch.equal(net(one * 1.5), twin(one * 1.5))
    assert "train" in net.family.without
    model.tau = twin.tau = 1.0
    half_way = []
    restore = Before.restore
    monkeypatch.setattr(Before, "restore", lambda self: (half_way.append(1), restore(self)))
    for n in range(3, 40):
        assert torch.equal(net(one * (n + 0.5)), twin(one * (n + 0.5)))
    ended = len(half_way)
    for n in range(3, 20):
        assert torch.equal(net(one * (n + 0.5)), twin(one * (n + 0.5)))
    assert len(half_way) == ended


# ---------------------------------------------------------------- batches of texts


class Reads(nn.Module):
    """Embeds ids and attends where a mask lets it; a mask that lets all is left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.l = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids, mask):
        h = self.embed(ids)
        scores = h @ self.l(h).transpose(1, 2)
        if not mask.all():
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        h = scores.softmax(-1) @ h
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def padded(*many):
    """Return ids and a mask of texts of these lengths, padded on the right to the longest."""
    longest = max(many)
    mask = torch.arange(longest) < torch.tensor(many)[:, None]
    return torch.arange(len(many) * longest).reshape(-1, longest) % 20 * mask, mask


def test_batches_padded_on_the_right_are_free_after_three(traces):
    twins = Twins(Reads(), *padded(4, 6, 3))
    with twins:
        for texts in ((5, 9, 2), (7, 1, 4), (11, 10, 3)):
            twins.call_both(*padded(*texts))
        traces.clear()
        twins.begin_again()
        for texts in ((8, 3, 13), (2, 5, 4), (21, 1, 1), (6, 30), (17, 2, 9, 5)):
            twins.call_both(*padded(*texts))
    assert traces == []
    assert twins.graphs == {"train": 1, "eval": 1}


# ---------------------------------------------------------------- what is given back


class Cache:
    """What a decoder keeps from call to call, as those of transformers do."""

    def __init__(self):
        self.keys, self.values, self.seen = [], [], 0

    def update(self, key, value):
        if self.keys:
            key = torch.cat([self.keys.pop(), key], 1)
            value = torch.cat([self.values.pop(), value], 1)
        self.keys.append(key)
        self.values.append(value)
        self.seen = key.shape[1]
        return key, value


class Decodes(Base):
    def forward(self, x, cache=None, *, use_cache=True):
        cache = Cache() if cache is None and use_cache else cache
        key, value = self.l(x), torch.tanh(x)
        if cache is not None:
            key, value = cache.update(key, value)
        return (x @ key.transpose(1, 2)).softmax(-1) @ value, cache


@pytest.mark.filterwarnings("ignore::fxray.FxrayWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_cache_that_is_given_back_keeps_what_the_model_keeps(training):
    model = Decodes().train(training)
    twin = copy.deepcopy(model)
    (x,) = lengths(3)
    net = fxray.trace(model, x).rewrite()
    for _ in range(2):
        held = dict.fromkeys((net, twin))
        for given in (x, *lengths(1, 1, 1, 2, 1)):
            outs = []
            for module in (net, twin):
                out, held[module] = module(given, held[module])
                outs.append(out)
            assert torch.equal(*outs)
            ours, theirs = held[net], held[twin]
            assert type(ours) is Cache
            assert ours.seen == theirs.seen == ours.keys[0].shape[1]
            assert_equal(ours.keys + ours.values, theirs.keys + theirs.values)
    out, none = net(x, use_cache=False)
    assert none is None
    assert torch.equal(out, twin(x, use_cache=False)[0])
