"""Tracing: what ops are called, what survives, what is followed, what is refused at which line."""

# To mypy a module's attribute is Tensor | Module, and wrong types are given here on purpose.
# mypy: ignore-errors

from __future__ import annotations

import copy
import inspect
import json
import operator
import random
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxray
from fxray.tracing.report import Branch
from tests.models import CASES, Answer, Case, ModelOutput, Pair, Returning, tensors_in
from tests.twins import Twins, assert_agree, records

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 10 - 1

over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
over_frontends = pytest.mark.parametrize("frontend", ["execution", "symbolic"])


def traced(model: nn.Module, frontend: str, *args: Any, **kwargs: Any) -> fxray.Xray:
    return fxray.trace(model, *args, **kwargs) if frontend == "execution" else fxray.trace(model)


def line_of(model: type, text: str) -> int:
    """Return the line of this file at which `model`'s forward says `text`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    start = model.forward.__code__.co_firstlineno
    return next(n for n in range(start, len(lines) + 1) if text in lines[n - 1])


def assert_agrees(model: nn.Module, net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Fail unless both give the same, gradients of every parameter included, in both modes."""
    was = model.training
    for training in (True, False):
        results = []
        for module in (model, net):
            module.train(training)
            torch.manual_seed(4)
            buffers = [b.clone() for b in model.buffers()]
            out = module(*args, **kwargs)
            flat = [(name, t) for name, t in tensors_in(_opened(out))]
            graded = [t.float().square().sum() for _, t in flat if t.requires_grad]
            parameters = [p for p in model.parameters() if p.requires_grad]
            for parameter in parameters:
                parameter.grad = None
            if graded and parameters:
                sum(graded).backward()
            grads = [parameter.grad for parameter in parameters]
            after = [b.clone() for b in model.buffers()]
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            results.append((type(out), flat, grads, after, torch.get_rng_state()))
        (kind, flat, grads, after, rng), theirs = results
        assert kind is theirs[0]
        for (name, ours), (other, theirs_) in zip(flat, theirs[1], strict=True):
            assert name == other
            assert ours.dtype == theirs_.dtype
            assert torch.equal(ours, theirs_), name
            assert ours.requires_grad == theirs_.requires_grad
        for a, b in zip(grads, theirs[2], strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        for a, b in zip(after, theirs[3], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(rng, theirs[4])
    model.train(was)


def _opened(out: Any) -> Any:
    return vars(out) if hasattr(type(out), "__dataclass_fields__") else out


def forced(model: nn.Module, frontend: str, *args: Any, **kwargs: Any) -> fxray.Xray:
    """Trace into graphs by this front end, or raise."""
    if frontend == "execution":
        return fxray.Xray(model, args, kwargs, frontend=frontend)
    return fxray.trace(model)


class Between(nn.Module):
    """A model between two layers that plain hooks see, the first one odd: a(-x) is -a(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(4, 4, bias=False), inner
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.inner(self.a(x)))


# ---------------------------------------------------------------- names


@over_frontends
@over_cases
def test_names_are_pinned(case: Case, frontend: str) -> None:
    xray = traced(case.make(), frontend, *case.batch(4))
    assert tuple(xray.architecture) == case.paths
    assert tuple(xray.draft) == case.keys


@over_cases
def test_both_front_ends_see_the_same_architecture(case: Case) -> None:
    model = case.make()
    ours = fxray.trace(model, *case.batch(4)).architecture
    theirs = fxray.trace(model).architecture
    assert [(op.path, op.key, op.type, op.module, op.scope, op.where) for op in ours.values()] == [
        (op.path, op.key, op.type, op.module, op.scope, op.where) for op in theirs.values()
    ]
    assert list(ours.graph.edges) == list(theirs.graph.edges)
    assert ours.returns == theirs.returns
    assert ours.modules == theirs.modules


@over_frontends
@over_cases
def test_every_way_to_name_an_op_finds_it(case: Case, frontend: str) -> None:
    xray = traced(case.make(), frontend, *case.batch(4))
    nodes = {mode: {node.name for node in graph.nodes}
             for mode, graph in xray.graph_module.graphs.items()}  # fmt: skip
    for path, op in xray.architecture.items():
        assert xray.architecture[op.key] is op
        assert xray.architecture[op.key.upper()] is op
        for mode, name in op.nodes.items():
            assert name in nodes[mode]
            assert xray.architecture[name].path in (path, name)
        assert op.where.startswith("models.py:") or op.role in ("input", "parameter")


@over_cases
def test_shapes_dtypes_and_parameter_counts_are_those_of_the_model(case: Case) -> None:
    model = case.make()
    architecture = fxray.trace(model, *case.batch(4)).architecture
    assert architecture.parameter_count == sum(p.numel() for p in model.parameters())
    seen: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if path in architecture:

            def note(_module: Any, _args: Any, out: Any, path: str = path) -> None:
                seen.setdefault(path, tuple(next(t for _, t in tensors_in(out)).shape))

            module.register_forward_hook(note)
    model(*case.batch(4))
    assert seen
    for path, shape in seen.items():
        assert architecture[path].outputs[0].shape == shape
    for op in architecture.values():
        assert len(op.outputs) == len(op.items) > 0
        if op.module:
            named = dict(model.get_submodule(op.module).named_parameters())
            assert {k: tuple(p.shape) for k, p in named.items()} == {
                k: spec.shape for k, spec in op.parameters.items()
            }
        for source in architecture.graph.predecessors(op.path):
            specs = {(s.shape, s.dtype) for s in architecture[source].outputs}
            assert specs & {(s.shape, s.dtype) for s in op.inputs}


def test_specs_of_a_module_that_returns_a_nest() -> None:
    case = CASES[2]
    lstm = fxray.trace(case.make(), *case.batch(4)).architecture["lstm"]
    assert lstm.items == ("0", "1.0", "1.1")
    assert [spec.shape for spec in lstm.outputs] == [(4, 6, 6), (2, 4, 6), (2, 4, 6)]
    assert lstm.parameters["weight_ih_l0"].shape == (24, 5)
    assert lstm.type == "lstm"


@over_frontends
@over_cases
def test_an_architecture_survives_json(case: Case, frontend: str) -> None:
    architecture = traced(case.make(), frontend, *case.batch(4)).architecture
    back = fxray.Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert list(back) == list(architecture)
    assert list(back.values()) == list(architecture.values())
    assert list(back.graph.edges(data="slots")) == list(architecture.graph.edges(data="slots"))
    assert back.to_dict() == architecture.to_dict()
    assert back.fingerprint == architecture.fingerprint
    assert nx.is_directed_acyclic_graph(architecture.graph)
    with pytest.raises(nx.NetworkXError):
        architecture.graph.add_edge("a", "b")


class Slots(nn.Module):
    def forward(self, x, y):
        z = x + x
        z = torch.cat([z, y, z], dim=1)
        return torch.where(z > 0, z, other=y.repeat(1, 3))


@over_frontends
def test_edges_name_every_argument_a_tensor_is_passed_as(frontend: str) -> None:
    graph = traced(Slots(), frontend, X, X).architecture.graph
    assert graph.edges["x", "add"]["slots"] == ("0", "1")
    assert graph.edges["add", "cat"]["slots"] == ("0.0", "0.2")
    assert graph.edges["y", "cat"]["slots"] == ("0.1",)
    assert graph.edges["gt", "where"]["slots"] == ("0",)
    assert graph.edges["cat", "where"]["slots"] == ("1",)
    assert graph.edges["repeat", "where"]["slots"] == ("other",)


@over_frontends
def test_a_composite_means_what_it_returns(frontend: str) -> None:
    model = CASES[1].make()
    xray = traced(model, frontend, *CASES[1].batch(4))
    returns = xray.architecture.returns
    assert returns["stem"] == ("stem.2",)
    assert returns["block"] == ("block.relu@1",)
    assert returns["block@1"] == ("block.relu@3",)
    assert returns[""] == ("fc",)
    xray.draft.clear()
    assert xray.mark(model.block, output=True) == ("block.relu@1", "block.relu@3")
    assert xray.mark("stem", weight=True) == ("stem.0", "stem.1")
    xray.draft.clear()
    xray.mark("block.*", output=True)
    assert {capture.op for capture in xray.draft.captures()} == {
        path for path in CASES[1].paths if path.startswith("block.")
    }


@pytest.mark.parametrize("cls", [Answer, Pair, ModelOutput, dict])
@over_frontends
def test_an_output_of_any_class_comes_back_as_it_was(frontend: str, cls: Any) -> None:
    case = CASES[4]
    model = Returning(cls)
    xray = traced(model, frontend, *case.batch(4))
    net = xray.rewrite()
    assert_agrees(model, net, *case.batch(4))
    assert_agrees(model, net, *case.batch(3))
    assert xray.architecture.returns[""] == ("head", "mul_1")
    assert type(net(*case.batch(2))) is cls


# ---------------------------------------------------------------- refusals, by file and line


class BranchesOnValues(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


class LoopsOnValues(nn.Module):
    def forward(self, x):
        while x.abs().max() > 0.5:
            x = x / 2
        return x


class TakesItem(nn.Module):
    def forward(self, x):
        scale = x.max().item()
        return x / scale


class TakesFloat(nn.Module):
    def forward(self, x):
        return x * float(x.detach().mean())


class TakesList(nn.Module):
    def forward(self, x):
        return x + sum(x[0].tolist())


class GoesThroughNumpy(nn.Module):
    def forward(self, x):
        y = x.detach().numpy()
        return x + torch.from_numpy(np.sort(y))


class AsksAllclose(nn.Module):
    def forward(self, x):
        return x + torch.allclose(x, x)


class Seeds(nn.Module):
    def forward(self, x):
        torch.manual_seed(0)
        return x + torch.randn(4)


class EntersInference(nn.Module):
    def forward(self, x):
        with torch.inference_mode():
            return x + 1


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        return x * self.seen


class Renames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = "odd"

    def forward(self, x):
        self.phase = "even" if self.phase == "odd" else "odd"
        return x * 2 if self.phase == "even" else x + 2


NO_GRAPH = [
    (GoesThroughNumpy, ".numpy()"),
    (Seeds, "manual_seed"),
    (EntersInference, "inference_mode"),
    (Renames, "def forward"),
]


@pytest.mark.parametrize(("model", "text"), NO_GRAPH)
def test_what_no_graph_can_hold_is_refused_at_its_line_where_a_graph_is_asked_for(
    model: Any, text: str
) -> None:
    line = f"test_tracing.py:{line_of(model, text)}"
    with pytest.raises(fxray.TraceError) as caught:
        fxray.Xray(model(), (X,), frontend="execution")
    assert line in str(caught.value)
    report = fxray.trace(model(), X).report
    assert report.frontend == "interposed"
    assert set(report.interposed) == {"train", "eval"}
    assert all(line in why for why in report.interposed.values())
    assert report.equal
    with pytest.raises(fxray.TraceError) as caught:
        fxray.Xray(model(), (X,), strict=True)
    assert line in str(caught.value)


@pytest.mark.parametrize("model", [GoesThroughNumpy, Seeds, Renames])
def test_what_no_graph_can_hold_runs_as_it_is_and_is_recorded(model: Any) -> None:
    twins = Twins(Between(model()), X)
    assert twins.graphs == {"train": 0, "eval": 0}
    with twins:
        for n in (6, 2, 3):
            twins.call_both(X[:n] * n)
    assert twins.graphs == {"train": 0, "eval": 0}
    assert twins.xray.report.since == ()
    with pytest.raises(fxray.TraceError, match="no graph in train mode"):
        _ = twins.net.graph


def test_a_forward_that_enters_inference_mode_is_run_and_recorded() -> None:
    xray = fxray.trace(EntersInference(), X)
    xray.draft.clear()
    xray.mark("add", output=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net) as recorder:
        outs = [net(X + n) for n in range(2)]
    assert all(out.is_inference() for out in outs)
    for n, kept in enumerate(records(recorder.run["add"].output)):
        assert np.array_equal(kept, (X + n + 1).numpy())


@pytest.mark.parametrize(
    ("model", "text", "was"),
    [
        (BranchesOnValues, "if x.sum()", "True"),
        (LoopsOnValues, "while x.abs()", "True"),
        (TakesItem, "scale = x.max()", "1.29"),
        (TakesFloat, "float(x.detach().mean())", "0.14"),
        (TakesList, "tolist()", "[-1.0"),
        (AsksAllclose, "allclose", "True"),
    ],
)
def test_a_branch_on_data_is_guarded_and_reported_with_its_line(
    model: Any, text: str, was: str
) -> None:
    report = fxray.Xray(model(), (X,), frontend="execution").report
    (branch,) = report.branches
    assert branch.where == f"test_tracing.py:{line_of(model, text)}"
    assert branch.was.startswith(was)
    assert branch.by == "data"
    assert report.equal
    assert branch.where in str(report)
    with pytest.raises(fxray.TraceError, match=f"branch on data at {branch.where}"):
        fxray.Xray(model(), (X,), strict=True)


@pytest.mark.parametrize(
    ("model", "inputs", "graphs"),
    [
        (BranchesOnValues, (X, -X, X * 2, -X, X), 2),
        (LoopsOnValues, (X, X * 9, X * 8, X, X / 9), 3),
        (TakesList, (X, -X, X, -X), 2),
        (AsksAllclose, (X, -X, X * 3), 1),
    ],
)
def test_a_branch_that_goes_another_way_is_traced_once_more_and_recorded(
    model: Any, inputs: Any, graphs: int
) -> None:
    twins = Twins(Between(model()), inputs[0])
    with twins:
        if graphs > 1:
            with pytest.warns(fxray.FxrayWarning, match="Another graph runs the call") as told:
                twins.call_each(inputs)
            (line,) = {line_of(model, text) for text in ("if x", "while x", "tolist")
                       if text in inspect.getsource(model)}  # fmt: skip
            (warned,) = told
            assert f"test_tracing.py:{line}" in str(warned.message)
        for x in inputs:
            twins.call_both(x)
    assert twins.graphs == {"train": graphs, "eval": graphs}
    assert len(twins.xray.report.since) == (graphs > 1)


@pytest.mark.parametrize("model", [TakesItem, TakesFloat])
def test_a_number_that_python_takes_at_every_call_ends_with_the_model_itself(model: Any) -> None:
    twins = Twins(Between(model()), X)
    with twins:
        twins.call_both(X)
        with pytest.warns(fxray.FxrayWarning, match="Another graph|from now on"):
            twins.call_each(X + n for n in range(1, 12))
        before = twins.names()
        for n in range(1, 12):
            twins.call_both(X * n)  # says nothing more, and traces nothing more
    assert twins.names() == before
    assert max(twins.graphs.values()) <= 3
    since = twins.xray.report.since
    assert [told for told in since if "from now on" in told] == [*since[1:]]
    assert len(since) == 3  # the number, and what became of each mode
    assert "Python takes a tensor's value" in since[0]


@pytest.mark.parametrize(
    ("model", "text"), [(BranchesOnValues, "if x.sum()"), (Seeds, "manual_seed")]
)
def test_without_an_input_it_is_refused_at_its_line_too(model: Any, text: str) -> None:
    with pytest.raises(fxray.TraceError) as caught:
        fxray.trace(model())
    assert f"test_tracing.py:{line_of(model, text)}" in str(caught.value)


def test_a_counter_in_forward_counts_what_the_training_called_and_nothing_else() -> None:
    twins = Twins(Between(Counts()), X)
    assert twins.xray.report.frontend == "execution"
    assert twins.model.inner.seen == 0
    with twins:
        for n in range(1, 5):
            twins.call_both(X[:n])
            assert twins.model.inner.seen == twins.twin.inner.seen == 2 * n
    assert twins.graphs == {"train": 1, "eval": 1}
    copied = copy.deepcopy(twins.net)
    copied(X)
    assert (copied.inner.seen, twins.model.inner.seen) == (9, 8)
    for module in twins.both:
        module.inner.seen = 100
    twins.call_both(X)
    assert twins.model.inner.seen == 102


@pytest.mark.parametrize("model", [Counts, Renames])
def test_an_attribute_that_a_forward_sets_needs_an_input_and_is_left_as_it_was(model: Any) -> None:
    module = model()
    before = dict(vars(module))
    with pytest.raises(fxray.TraceError, match="seen" if model is Counts else "phase"):
        fxray.trace(module)
    fxray.trace(module, X)
    assert vars(module) == before
    if model is Renames:
        with pytest.raises(fxray.TraceError, match="phase"):
            fxray.Xray(module, (X,), frontend="execution")
        assert vars(module) == before


class PythonRandom(nn.Module):
    def forward(self, x):
        return x * random.random()


class NumpyRandom(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(np.random.rand(4).astype("float32"))  # noqa: NPY002


class RandomDepth(nn.Module):
    def forward(self, x):
        if random.random() < 0.5:
            x = x + 1
        return x * 2


@pytest.mark.parametrize("model", [PythonRandom, NumpyRandom, RandomDepth])
@over_frontends
def test_random_numbers_of_python_and_numpy_are_refused_by_a_graph(
    model: Any, frontend: str
) -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with pytest.raises(fxray.TraceError, match="random"):
        forced(model(), frontend, X)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


@pytest.mark.parametrize("model", [PythonRandom, NumpyRandom, RandomDepth])
def test_random_numbers_of_python_and_numpy_are_drawn_anew_at_each_call_and_recorded(
    model: Any,
) -> None:
    random.seed(3)
    before = random.getstate()
    twins = Twins(Between(model()), X)
    assert random.getstate() == before
    assert twins.xray.report.frontend == "interposed"
    assert "random" in twins.xray.report.interposed["train"]
    with twins:
        outs = []
        for seed in range(8):
            for training in (True, False):
                for module in twins.both:
                    module.train(training)
                outs.append(twins.call(X, seed=seed)["out"][""])
    assert len({out.detach().numpy().tobytes() for out in outs}) > 1  # not one draw, kept
    assert twins.graphs == {"train": 0, "eval": 0}


class Raises(nn.Module):
    def forward(self, x):
        msg = "the model's own trouble"
        raise ValueError(msg)


def test_an_error_of_the_forward_is_told_as_the_model_s_own() -> None:
    with pytest.raises(
        fxray.TraceError, match=r"Raises itself fails.*the model's own trouble"
    ) as told:
        fxray.trace(Raises(), X)
    assert isinstance(told.value.__cause__, ValueError)


# ---------------------------------------------------------------- what survives


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
            with torch.enable_grad():
                z = self.b(x)
        return self.a(x) + y * 2 + z + self.c(x)

    @torch.no_grad()
    def c(self, x):
        return self.b(x)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                z = self.b(x)
        return self.b(y.float()) + z


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 10


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return Double.apply(self.a(x)) + 1


class AssignsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            self.count += 1
        return y - self.mean


class MakesModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return nn.Softmax(dim=1)(nn.ReLU()(self.a(x)))


@torch.fx.wrap
def wrapped_norm(x):
    return x / x.norm() if float(x.detach().norm()) > 0 else x


class CallsWrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return wrapped_norm(self.a(x)) * 2


class Checkpoints(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

    def forward(self, x):
        y = checkpoint(lambda t: F.relu(self.b(t)), self.a(x), use_reentrant=self.reentrant)
        return y + 1


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        y.add_(5)
        y[:, 0] = 0
        y[:, 1:].mul_(2)
        z = torch.zeros_like(y)
        z[0] = y[0]
        z.data.add_(1)
        return y + z


class Shapes(nn.Module):
    """Sizes in all the ways people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, x):
        y = self.a(x)
        b, c = y.shape
        assert y.size(0) == b
        y = y.view(b, 2, c // 2) + torch.arange(c // 2, device=x.device)
        y = y.reshape(len(y), -1) / b**0.5
        y = y.expand(3, *y.shape).reshape(3 * b, -1)[: y.shape[0]]
        return y + torch.zeros(y.shape) + torch.ones(b, 1) * y.numel()


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 32), nn.Dropout(0.5)

    def forward(self, x):
        y = F.dropout(self.a(x), 0.3, training=self.training)
        y = self.drop(y) + torch.rand_like(y) + torch.randn(y.shape)
        return y if self.training else y * 2


class ParameterBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x, mask=None, flag=True):
        y = self.a(x) if self.a.weight.shape[0] == 4 else x
        if mask is not None:
            y = y * mask
        return y if flag else -y


class Numpy(nn.Module):
    def forward(self, x):
        table = np.tri(4, dtype="float32") * np.float32(2)
        return x @ torch.from_numpy(table) + np.float64(0.5) + float(np.sqrt(2))


SURVIVORS: list[Callable[[], nn.Module]] = [
    NoGrad, Autocast, OwnFunction, AssignsBuffer, MakesModules, CallsWrapped,
    lambda: Checkpoints(reentrant=True), lambda: Checkpoints(reentrant=False), InPlace, Shapes,
    Dropouts, ParameterBranch, Numpy,
    lambda: nn.Linear(4, 3), lambda: nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()),
    lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
]  # fmt: skip
_ids = [
    "no_grad", "autocast", "Function", "buffer", "made modules", "fx.wrap", "checkpoint", "checkpoint-2",
    "in place", "shapes", "dropout", "parameter shape", "numpy", "one linear", "batchnorm", "encoder layer",
    "encoder",
]  # fmt: skip


@pytest.mark.parametrize("make", SURVIVORS, ids=_ids)
def test_what_survives_a_trace(make: Callable[[], nn.Module]) -> None:
    model = make()
    xray = fxray.trace(model, X)
    net = xray.rewrite()
    assert "bit-equal" in str(xray.report)
    assert_agrees(model, net, X)
    for size in (1, 3) if not isinstance(model, nn.Sequential) else (2, 5):
        assert_agrees(model, net, X[:1].repeat(size, 1) + torch.arange(size)[:, None])
    again = copy.deepcopy(net)
    assert_agrees(again.original, again, X)


@pytest.mark.parametrize("make", SURVIVORS, ids=_ids)
def test_what_survives_a_trace_without_an_input_is_right_or_refused(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    try:
        net = fxray.trace(model).rewrite()
    except fxray.TraceError as error:
        assert "Give one: fxray.trace(model, x)" in str(error)  # noqa: PT017
        return
    assert_agrees(model, net, X)
    assert_agrees(model, net, X[:2] * 3)


@pytest.mark.parametrize("make", SURVIVORS, ids=_ids)
def test_what_survives_is_recorded_without_a_change(make: Callable[[], nn.Module]) -> None:
    model = make()
    xray = fxray.trace(model, X)
    xray.draft.clear()
    xray.mark("*", output=True, input=True)
    xray.mark(lambda op: op.role not in {"parameter", "input"}, grad=True)
    net = xray.rewrite()
    recorder = fxray.record(net)
    assert_agrees(model, net, X)
    run = recorder.run
    try:
        recorder.close()
    except fxray.FxrayWarning as told:
        assert "nothing was kept of the" in str(told)  # noqa: PT017
    run = recorder.run
    for path in run.architecture.returns[""]:
        assert set(run[path].output.phases) == {"train", "eval"}
        assert len(run[path].output) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_is_captured_once(reentrant: bool) -> None:
    model = Checkpoints(reentrant=reentrant)
    xray = fxray.trace(model, X)
    assert [op.path for op in xray.architecture.values() if op.type == "relu"] == ["relu"]
    xray.draft.clear()
    xray.mark(["a", "b", "relu"], output=True, grad=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net) as recorder:
        for _ in range(2):
            net(X).sum().backward()
    for path in ("a", "b", "relu"):
        assert recorder.run[path].output.steps.tolist() == [0, 1]
        assert recorder.run[path].grad.steps.tolist() == [0, 1]


class CallsScripted(nn.Module):
    def __init__(self, function: Any, module: Any) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x):
        return self.function(x) + self.module(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_functions_and_modules_stay_one_op() -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    model = CallsScripted(
        torch.jit.script(gate), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    )
    xray = fxray.trace(model, X)
    assert len(xray.architecture) == 4
    assert_agrees(model, xray.rewrite(), X)
    assert_agrees(model, xray.rewrite(), X[:2])


def test_a_model_that_switches_autograd_off_runs_inside_the_user_s_own_no_grad() -> None:
    model = NoGrad()
    net = fxray.trace(model, X).rewrite()
    with torch.no_grad():
        assert not net(X).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- inputs


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, input_ids=None, labels=None, mask=None, scale=1.0, names=("a", "b")):
        y = self.embed(input_ids) * scale * len(names)
        loss = None if labels is None else F.cross_entropy(y.flatten(0, 1), labels.flatten() % 4)
        return {"loss": loss, "y": y if mask is None else y * mask[..., None], "name": names[0]}


IDS = torch.arange(12).reshape(3, 4) % 10


def test_the_same_tensor_given_twice_is_two_inputs() -> None:
    model = Keywords()
    xray = fxray.trace(model, input_ids=IDS, labels=IDS)
    assert [op.path for op in xray.architecture.values() if op.role == "input"] == [
        "input_ids",
        "labels",
    ]
    net = xray.rewrite()
    one = net(input_ids=IDS, labels=IDS.flip(0))
    other = model(input_ids=IDS, labels=IDS.flip(0))
    assert torch.equal(one["loss"], other["loss"])
    assert one["name"] == "a"
    assert not torch.equal(one["loss"], net(input_ids=IDS, labels=IDS)["loss"])


def test_keywords_only_and_none_arguments() -> None:
    model = Keywords()
    net = fxray.trace(model, input_ids=IDS, mask=None).rewrite()
    assert net(IDS)["loss"] is None
    assert torch.equal(net(mask=None, input_ids=IDS[:1])["y"], model(IDS[:1])["y"])


CHANGED = [
    {"scale": 2.0},
    {"mask": torch.arange(12.0).reshape(3, 4)},
    {"names": ("x", "b")},
    {"names": ("x",)},
    {"labels": None},
    {"scale": torch.tensor(3.0)},
    {"scale": True},
]


@pytest.mark.parametrize("changed", CHANGED, ids=lambda changed: str(changed)[:24])
def test_a_constant_argument_that_changes_is_traced_once_more(changed: dict[str, Any]) -> None:
    usual = {"input_ids": IDS, "labels": IDS}
    twins = Twins(Keywords(), **usual)
    with twins:
        for words in (usual, changed, usual, changed):
            twins.call_both(**{**usual, **words})
        twins.call_both(**{**usual, **changed, "input_ids": IDS.flip(0)})
    assert twins.graphs == {"train": 2, "eval": 2}
    assert twins.xray.report.since == ()


def for_each_scale(twins: Twins, usual: dict[str, Any]) -> None:
    for n in range(3, 12):
        twins.call(**usual, scale=float(n))


def test_eight_graphs_of_a_mode_are_kept_and_others_are_run_by_the_model_itself() -> None:
    usual = {"input_ids": IDS, "labels": IDS}
    twins = Twins(Keywords(), **usual)
    with twins:
        for changed in CHANGED:
            twins.call(**{**usual, **changed})
        assert twins.graphs == {"train": 8, "eval": 1}
        words = "from now on .*after 8 traces: argument 'scale' was"
        with pytest.warns(fxray.FxrayWarning, match=words) as told:
            for_each_scale(twins, usual)
        assert len(told) == 1
        for words in ({}, *CHANGED):
            twins.call(**{**usual, **words})
    assert twins.graphs["train"] == 8
    assert "after 8 traces" in twins.xray.report.since[0]


class Masked(nn.Module):
    def forward(self, x, mask=None, flag=True):
        y = x + 1 if mask is None else x * mask
        return y if flag else -y


def test_without_an_input_an_argument_off_its_default_is_traced_by_execution() -> None:
    model = Masked()
    xray = fxray.trace(model)
    net = xray.rewrite()
    mask = torch.arange(24.0).reshape(6, 4)
    for words in ({}, {"mask": None}, {"mask": mask}, {"flag": False}, {"mask": mask + 1}):
        assert_agrees(model, net, X, **words)
    assert [program.name for program in net.family.programs] == [
        "train", "train.1", "train.2", "eval", "eval.1", "eval.2"]  # fmt: skip
    assert {op.type for op in xray.architecture.values()} == {"input", "add", "mul", "neg"}


@pytest.mark.parametrize("size", [(6, 5), (6,), (6, 4, 1)])
def test_a_size_that_the_model_does_not_take_is_told_in_its_own_words(
    size: tuple[int, ...],
) -> None:
    model = InPlace()
    net = fxray.trace(model, X).rewrite()
    with pytest.raises(RuntimeError) as ours:
        net(torch.zeros(size))
    with pytest.raises(RuntimeError) as theirs:
        model(torch.zeros(size))
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    assert len(net.family.programs) == 2
    assert_agrees(model, net, X)


@pytest.mark.parametrize("size", [(2, 3, 4), (2, 1, 1, 4)])
def test_a_rank_that_was_not_seen_is_traced_once_more(size: tuple[int, ...]) -> None:
    twins = Twins(InPlace(), X)
    twins.xray.draft.clear()
    twins.xray.mark("a", output=True, selection=fxray.Mean())
    with fxray.record(twins.net) as recorder:
        for x in (X, torch.randn(size), X, torch.randn(size)):
            twins.call_both(x)
    assert twins.graphs == {"train": 2, "eval": 2}
    means = [out.mean() for out in twins.witness.seen["a", "output", ""]]
    assert np.allclose(records(recorder.run["a"].output), means, rtol=1e-6, atol=1e-7)


def test_a_call_that_fails_in_the_model_leaves_no_row_and_the_next_is_right() -> None:
    xray = fxray.trace(InPlace(), X)
    xray.draft.clear()
    xray.mark(["x", "a"], output=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net) as recorder:
        net(X)
        for _ in range(12):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                net(torch.zeros(6, 9))
        net(X * 2)
    one, other = records(recorder.run["a"].output)
    assert np.array_equal(one, net.original.a(X).detach().numpy())
    assert np.array_equal(other, net.original.a(X * 2).detach().numpy())
    net(X.reshape(2, 3, 4))  # what failed in the model has not used up what may be traced
    assert len(net.family.of("train")) == 2


def test_wrong_arguments_are_told_in_python_s_own_words() -> None:
    net = fxray.trace(InPlace(), X).rewrite()
    with pytest.raises(TypeError, match="x"):
        net()
    with pytest.raises(TypeError, match="nope"):
        net(X, nope=1)


def test_a_batch_of_one_traces_a_model_with_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = fxray.trace(model, X[:1]).rewrite()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert_agrees(model, net, X)
    model.eval()
    assert torch.equal(net(X[:1]), model(X[:1]))


class SpecialAtOne(nn.Module):
    def forward(self, x):
        if x.size(0) == 1:
            return x * 2
        return x + 1


@pytest.mark.parametrize("size", [1, 4])
def test_a_branch_on_the_batch_size_keeps_a_graph_for_each_way(size: int) -> None:
    twins = Twins(Between(SpecialAtOne()), X[:size])
    (branch,) = twins.xray.report.branches
    assert branch == fxray_branch(f"test_tracing.py:{line_of(SpecialAtOne, 'if x.size')}")
    told = pytest.warns(fxray.FxrayWarning, match="the branch at .* Another graph runs the call")
    with twins, told:
        for n in (4, 1, 2, 1, 6):
            twins.call_both(X[:n])
    assert twins.graphs == {"train": 2, "eval": 2}


def fxray_branch(where: str) -> Branch:
    return Branch(where, "False", "size")


class Bilinear(nn.Module):
    def forward(self, x, y):
        return x @ y


def test_inputs_that_share_no_batch_show_their_sizes_by_and_by() -> None:
    model = Bilinear()
    xray = fxray.trace(model, torch.randn(3, 4), torch.randn(4, 5))
    assert any("share no dim 0" in why for why in xray.report.fixed)
    assert xray.report.free == ()
    net = xray.rewrite()
    for rows, columns in ((3, 5), (2, 5), (7, 5), (9, 5), (3, 8), (1, 1)):
        assert_agrees(model, net, torch.randn(rows, 4), torch.randn(4, columns))
    # The sizes matter to nothing: one graph takes them all.
    assert [program.name for program in net.family.programs] == ["train", "eval"]


class LoopsOverBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.a(row) for row in x])


class RangesOverBatch(LoopsOverBatch):
    def forward(self, x):
        return torch.cat([self.a(x[i : i + 1]) for i in range(x.size(0))])


@pytest.mark.parametrize("model", [LoopsOverBatch, RangesOverBatch])
def test_a_loop_over_the_batch_has_a_graph_for_each_size(model: Any) -> None:
    twins = Twins(model(), X)
    xray = twins.xray
    assert xray.report.free == ()
    assert all(why.startswith("batch size fixed in") for why in xray.report.fixed)
    assert len(xray.report.fixed) == 2
    assert [op.path for op in xray.architecture.values() if op.type == "linear"] == [
        "a", *(f"a@{k}" for k in range(1, 6))]  # fmt: skip
    with twins:
        for n in (6, 3, 6, 2, 3):
            twins.call_both(X[:n])
    assert twins.graphs == {"train": 3, "eval": 3}
    twins.call_both(torch.cat([X, X[:1]]))  # one step more than ever before
    assert "a@6" in xray.architecture


def test_a_length_that_the_model_does_not_take_is_told_in_its_own_words() -> None:
    case = CASES[3]
    net = fxray.trace(case.make(), *case.batch(4)).rewrite()
    for length in (3, 6):
        with pytest.raises(RuntimeError, match="must match the size of tensor") as caught:
            net(torch.randn(4, length, 5))
        assert not isinstance(caught.value, fxray.TraceError)


class Steps(nn.Module):
    """A cell called by hand, fifty times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x):
        h = x.new_zeros(x.size(0), 3)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
        return h


def test_a_hand_written_loop_has_a_call_for_each_step() -> None:
    model = Steps()
    x = torch.randn(2, 50, 4)
    xray = fxray.trace(model, x)
    calls = [op.path for op in xray.architecture.values() if op.type == "grucell"]
    assert calls == ["cell", *(f"cell@{k}" for k in range(1, 50))]
    assert xray.architecture.parameter_count == sum(p.numel() for p in model.parameters())
    assert_agrees(model, xray.rewrite(), torch.randn(3, 50, 4))


# ---------------------------------------------------------------- awkward models


class Named(nn.Module):
    """Holds a module and a parameter under names that are given."""

    def __init__(self, module: str, parameter: str) -> None:
        super().__init__()
        self.names = module, parameter
        setattr(self, module, nn.Linear(4, 4))
        setattr(self, parameter, nn.Parameter(torch.randn(4)))

    def forward(self, x):
        module, parameter = self.names
        return getattr(self, module)(x) * getattr(self, parameter)


TAKEN = (
    "graph",
    "code",
    "original",
    "programs",
    "captures",
    "handle",
    "architecture",
    "graphs",
    "_code",
)


@pytest.mark.parametrize("name", TAKEN)
@over_frontends
def test_a_model_s_own_names_win_in_its_graph(frontend: str, name: str) -> None:
    for module, parameter in ((name, "scale"), ("linear", name)):
        model = Named(module, parameter)
        assert_agrees(model, traced(model, frontend, X).rewrite(), X)


class VariableArguments(nn.Module):
    def forward(self, *xs, **more):
        return sum(xs) + sum(more.values())


@over_frontends
def test_variable_arguments_are_traced_with_an_input(frontend: str) -> None:
    model = VariableArguments()
    if frontend == "symbolic":
        with pytest.raises(fxray.TraceError, match="Give one"):
            fxray.trace(model)
        return
    net = fxray.trace(model, X, X + 1, more=X).rewrite()
    for _ in range(2):
        assert_agrees(model, net, X, X + 2, more=X)
        assert_agrees(model, net, X, more=X + 3)
        assert_agrees(model, net, X, X, X, other=X, more=X + 3)
    assert len(net.family.of("train")) == len(net.family.of("eval")) == 3


class KeywordOnly(nn.Module):
    def forward(self, x, *, y, z=2):
        return x + y * z


@over_frontends
def test_keyword_only_arguments(frontend: str) -> None:
    model = KeywordOnly()
    net = traced(model, frontend, X, y=X).rewrite()
    assert_agrees(model, net, y=X + 1, x=X)
    assert len(net.family.of("train")) == 1
    assert_agrees(model, net, X, y=X, z=3)
    assert len(net.family.of("train")) == 2
    assert_agrees(model, net, X, y=X + 1, z=3)
    assert_agrees(model, net, X, y=X + 1)
    assert len(net.family.of("train")) == 2


class OddKeys(nn.Module):
    def forward(self, batch):
        return batch["image-1"] + batch["a.b"] * batch["a"]["b"] - batch["class"] / batch[3]


def test_a_dict_of_inputs_may_have_any_keys() -> None:
    model = OddKeys()
    batch = {"image-1": X, "a.b": X * 2, "a": {"b": X * 3}, "class": X + 1, 3: X + 9}
    xray = fxray.trace(model, batch)
    net = xray.rewrite()
    assert torch.equal(net(batch), model(batch))
    assert sum(op.role == "input" for op in xray.architecture.values()) == 5
    other = {**batch, "a.b": X + 5, "a": {"b": X - 3}}
    assert torch.equal(net(other), model(other))


class Nest(nn.Module):
    def forward(self, xs):
        return [xs[0] + xs[1], (None, 3, "s"), {"k": [xs[1]]}]


@over_frontends
def test_nests_of_anything_come_back_as_they_were(frontend: str) -> None:
    model = Nest()
    net = traced(model, frontend, [X, X]).rewrite()
    ours, theirs = net([X, X + 1]), model([X, X + 1])
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert torch.equal(ours[2]["k"][0], theirs[2]["k"][0])


class Writes(nn.Module):
    def forward(self, x):
        x.add_(1)


@over_frontends
def test_a_forward_that_writes_its_input_and_returns_nothing(frontend: str) -> None:
    x = X.clone()
    net = traced(Writes(), frontend, x).rewrite()
    assert torch.equal(x, X)
    assert net(x) is None
    assert torch.equal(x, X + 1)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ps = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.pd = nn.ParameterDict({"a": torch.randn(4)})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.shared = nn.ModuleList([self.normed, self.normed])

    def forward(self, x):
        return self.shared[1](self.normed(x * self.ps[0] + self.ps[1] * self.pd["a"]))


@over_frontends
def test_parameter_lists_parametrizations_and_shared_modules(frontend: str) -> None:
    model = Lists()
    xray = traced(model, frontend, X)
    assert list(xray.architecture) == [
        "x", "ps.0", "mul", "ps.1", "pd.a", "mul_1", "add", "normed", "normed@1"]  # fmt: skip
    assert_agrees(model, xray.rewrite(), X[:3])
    xray.draft.clear()
    xray.mark("*", weight=True, weight_grad=True, selection=fxray.Whole())
    net = xray.rewrite()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    with fxray.record(net) as recorder:
        optimizer.zero_grad()
        net(X).sum().backward()
        optimizer.step()
    for op in xray.architecture.values():
        for name in op.parameters:
            kept = recorder.run[op.path].parameter(name)[0]
            assert np.array_equal(kept, named[op.parameter_path(name)].numpy())
            assert recorder.run[op.path].parameter_grad(name).steps.tolist() == [0]


class LazyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LazyLinear(3)

    def forward(self, x):
        return self.a(x)


class LazyWithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.d = nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Dropout(0.5)

    def forward(self, x):
        return self.d(self.n(self.a(x)))


@pytest.mark.parametrize("make", [LazyNet, LazyWithNorm])
def test_a_lazy_model_gets_its_shapes_as_by_a_first_call(make: Any) -> None:
    torch.manual_seed(7)
    model = make()
    model.train()
    rng = torch.get_rng_state()
    xray = fxray.trace(model, X)
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    (note,) = xray.report.notes
    assert note.startswith("lazy parameters got their shapes (a.weight, a.bias")
    # Every shape and buffer is what one call in eval mode gives; weights are drawn at random.
    torch.manual_seed(7)
    twin = make().eval()
    with torch.no_grad():
        twin(X)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
    assert xray.architecture["a"].parameters["weight"].shape == (3, 4)
    assert_agrees(model, xray.rewrite(), X)


@pytest.mark.parametrize("bad", [torch.zeros(()), torch.zeros(6, 4, dtype=torch.long)])
def test_a_lazy_model_that_fails_on_its_input_is_as_it_was(bad: torch.Tensor) -> None:
    model = LazyNet()
    with pytest.raises(fxray.TraceError, match=r"'a.weight' has no shape yet, .* fails"):
        fxray.trace(model, bad)
    assert model.training
    assert_agrees(model, fxray.trace(model, X).rewrite(), X)


def test_a_lazy_model_without_an_input_is_refused_until_it_ran() -> None:
    model = LazyNet()
    with pytest.raises(fxray.TraceError, match=r"'a\.weight' has no shape yet.*give an input"):
        fxray.trace(model)
    assert isinstance(model.a.weight, nn.UninitializedParameter)
    model(X)
    assert_agrees(model, fxray.trace(model).rewrite(), X)


def test_a_sparse_gradient_is_kept() -> None:
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True))
    ids = torch.randint(0, 10, (4, 3))
    xray = fxray.trace(model, ids)
    xray.draft.clear()
    xray.mark("0", weight_grad=True, selection=fxray.Whole())
    net = xray.rewrite()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with fxray.record(net) as recorder:
        net(ids).sum().backward()
        optimizer.step()
    truth = model[0].weight.grad
    assert truth.is_sparse
    assert np.array_equal(recorder.run["0"].weight_grad[0], truth.to_dense().numpy())


@over_frontends
def test_a_hook_on_the_root_that_changes_the_output_is_right_or_refused(frontend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda _m, _i, out: out * 2)
    try:
        net = traced(model, frontend, X).rewrite()
    except fxray.TraceError as error:
        assert "hook" in str(error)  # noqa: PT017
        return
    assert torch.equal(net(X), model(X))


# ---------------------------------------------------------------- python state


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Dropouts(), nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


@over_frontends
def test_an_encoder_frozen_after_the_trace_is_traced_once_more(frontend: str) -> None:
    model = Frozen()
    twin = copy.deepcopy(model)
    net = traced(model, frontend, X).rewrite()
    outs = {}
    for _ in range(2):
        for pattern in ("train", "frozen", "eval"):
            for module in (model, twin):
                module.train(pattern != "eval")
                module.encoder.train(pattern == "train")
            assert_agree([twin, net], X)
            torch.manual_seed(4)
            outs[pattern] = net(X)
    assert not torch.equal(outs["train"], outs["frozen"])
    assert [program.name for program in net.family.programs] == ["train", "train.1", "eval"]


def test_an_encoder_frozen_before_the_trace_is_traced_as_it_is_trained() -> None:
    model = Frozen()
    model.encoder.eval()
    twin = copy.deepcopy(model)
    net = fxray.trace(model, X).rewrite()
    assert not model.encoder.training
    assert_agree([twin, net], X)
    for module in (model, twin):
        module.eval()
    assert_agree([twin, net], X)
    for module in (model, twin):
        module.train()  # thawed
    assert_agree([twin, net], X)


# ---------------------------------------------------------------- the Xray itself


def test_a_model_replaced_keeps_the_marks_that_fit_and_names_those_lost() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 2)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    class Other(Wide):
        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    xray = fxray.trace(Wide(), X)
    xray.draft.clear()
    xray.mark("relu", output=True, every=7)
    xray.mark("b", weight=True, selection=fxray.TopK(2))
    net = xray.rewrite()
    other = Other()
    with pytest.warns(fxray.FxrayWarning, match="relu output"):
        xray.model = other
    assert xray.model is other
    assert list(xray.architecture) == ["x", "a", "tanh", "b"]
    (kept,) = (capture for capture in xray.draft.captures() if capture.op != "tanh")
    assert (kept.op, kept.kind, kept.selection) == ("b", "weight", fxray.TopK(2))
    assert net.original is not other  # what was rewritten before stays as it was
    net(X)
    net = xray.rewrite()
    with fxray.record(net) as recorder:
        net(X)
    assert set(recorder.run["b"].weight[0]) == {"values", "indices"}


def test_inputs_replaced_are_traced_again_and_keep_the_marks() -> None:
    xray = fxray.trace(InPlace(), X)
    xray.draft.clear()
    xray.mark("a", output=True, every=7)
    xray.inputs = torch.zeros(2, 3, 4)
    assert xray.architecture["a"].outputs[0].shape == (2, 3, 4)
    (kept,) = xray.draft.captures()
    assert kept.schedule == fxray.Schedule(every=7)
    xray.inputs = {"x": X}
    assert xray.inputs == ((), {"x": X})
    assert xray.architecture["a"].outputs[0].shape == (6, 4)
    with pytest.raises(fxray.TraceError, match="itself fails"):
        xray.inputs = torch.zeros(2, 9)
    assert xray.architecture["a"].outputs[0].shape == (6, 4)
    assert torch.equal(xray.inputs[1]["x"], X)


def test_a_model_that_does_not_fit_leaves_the_xray_as_it_was() -> None:
    model = InPlace()
    xray = fxray.trace(model, X)
    for wrong, error in (
        (nn.Linear(9, 9), fxray.TraceError),
        (3, TypeError),
        (nn.Linear, TypeError),
    ):
        with pytest.raises(error):
            xray.model = wrong
    assert xray.model is model
    xray.rewrite()(X)


@over_frontends
def test_a_graph_module_is_a_model_too(frontend: str) -> None:
    model = CASES[0].make()
    graph_module = torch.fx.symbolic_trace(model)
    xray = traced(graph_module, frontend, *CASES[0].batch(4))
    assert {op.type for op in xray.architecture.values()} == {
        op.type for op in fxray.trace(model, *CASES[0].batch(4)).architecture.values()
    }
    assert_agrees(graph_module, xray.rewrite(), *CASES[0].batch(3))


def test_a_rewritten_module_may_be_traced_again() -> None:
    model = InPlace()
    xray = fxray.trace(model, X)
    again = fxray.trace(xray.rewrite(), X)
    assert_agrees(model, again.rewrite(), X)


def test_a_module_can_be_printed_and_is_what_fx_expects() -> None:
    xray = fxray.trace(CASES[0].make(), *CASES[0].batch(4))
    net = xray.rewrite()
    for module in (xray.graph_module, net):
        assert isinstance(module, torch.fx.GraphModule)
        assert "conv1" in str(module)
        assert "conv1" in repr(module)
        assert "def forward(self, x)" in module.code
        assert "conv1" in module.print_readable(print_output=False)
        module.graph.lint()
    again = torch.fx.Interpreter(xray.graph_module).run(*CASES[0].batch(2))
    assert torch.equal(again, net(*CASES[0].batch(2)))
    assert "conv1" in str(xray)


# ---------------------------------------------------------------- threads


def test_two_threads_may_trace_at_once() -> None:
    barrier, results, errors = threading.Barrier(2), {}, []

    def work(case: Case) -> None:
        try:
            model = case.make()
            barrier.wait()
            for _ in range(3):
                xray = fxray.trace(model, *case.batch(4))
                results[case.name] = tuple(xray.architecture)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in CASES[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results == {case.name: case.paths for case in CASES[:2]}


def test_a_trace_leaves_the_training_of_another_thread_alone() -> None:
    case, stop, errors, ran = CASES[1], threading.Event(), [], []
    twin, model = case.make(), case.make()
    twin.load_state_dict(model.state_dict())
    batches = [case.batch(4, k) for k in range(60)]

    def train(net: nn.Module, until: int) -> int:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for at in range(until):
            optimizer.zero_grad()
            case.loss(net(*batches[at])).backward()
            optimizer.step()
            if stop.is_set():
                return at + 1
        return until

    def work() -> None:
        try:
            ran.append(train(model, 60))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    other = CASES[0].make()
    for _ in range(4):
        fxray.trace(other, *CASES[0].batch(4))
        fxray.trace(other)
    stop.set()
    thread.join()
    assert errors == []
    stop.clear()
    train(twin, ran[0])
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_private_names_of_torch_are_all_there() -> None:
    from fxray import torch_private

    assert torch_private.check() == []
    assert operator.add is sys.modules["operator"].add


# ---------------------------------------------------------------- no numbers


@pytest.mark.parametrize("frontend", ["execution", "interposed"])
def test_a_model_without_numbers_is_not_said_to_be_verified(frontend: str) -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(3, 4)
    report = fxray.Xray(model, (x,), frontend=frontend).report
    assert not report.equal
    assert report.verified == (
        "not verified: tensors on the meta device hold no numbers to compare"
    )
    assert "verified    no: tensors on the meta device" in str(report)
    assert report.verified in report.reservations
    with pytest.raises(fxray.TraceError, match="no numbers to compare"):
        fxray.Xray(model, (x,), frontend=frontend, strict=True)
    out = fxray.Xray(model, (x,), frontend=frontend).rewrite()(torch.zeros(5, 4, device="meta"))
    assert out.shape == (5, 2)
    real = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert fxray.trace(real, torch.zeros(3, 4)).report.equal
