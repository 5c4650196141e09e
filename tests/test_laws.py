"""The laws: a rewritten model computes what the model computes, and its records are what plain
PyTorch hooks see."""

# To mypy a module's attribute is Tensor | Module, and wrong types are given here on purpose.
# mypy: ignore-errors

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fxray
from fxray.capture.rewrite import erase_captures
from tests.models import CASES, LEAVES, Case, Witness, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, BATCH = 20, 4
EVERYTHING = {"output": True, "grad": True, "input": True, "weight": True, "weight_grad": True}

over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
over_frontends = pytest.mark.parametrize("frontend", ["execution", "symbolic"])
_places = (f"memory://laws-{count}" for count in itertools.count())

# Every kind of every op is marked, and an input, say, has no gradient: the recorder says so.
pytestmark = pytest.mark.filterwarnings("ignore:nothing was kept:fxray.errors.FxrayWarning")


def make(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return case.make()


def xray_of(case: Case, frontend: str, model: nn.Module) -> fxray.Xray:
    return fxray.trace(model, *case.batch(BATCH)) if frontend == "execution" else fxray.trace(model)


def rewritten(case: Case, frontend: str, *, marked: bool = True, model: Any = None) -> Any:
    """Return the case's model rewritten, with everything or nothing marked."""
    xray = xray_of(case, frontend, make(case) if model is None else model)
    xray.draft.clear()
    if marked:
        xray.mark("*", **EVERYTHING, selection=fxray.Whole())
    return xray.rewrite()


class Trained(NamedTuple):
    outputs: list[torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]
    state: dict[str, torch.Tensor]
    optimizer: Any
    rng: torch.Tensor


def train(
    case: Case,
    net: nn.Module,
    steps: int = STEPS,
    before: Callable[[], None] = lambda: None,
) -> Trained:
    """Train in eval and train mode turn about; return everything that could differ."""
    optimizer = case.optimizer(net.parameters())
    outputs, gradients = [], []
    torch.manual_seed(2)
    for step in range(steps):
        net.train()
        before()
        out = net(*case.batch(BATCH, step))
        optimizer.zero_grad()
        case.loss(out).backward()
        gradients.append(
            {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
        )
        optimizer.step()
        outputs += [t.detach().clone() for _, t in tensors_in(out)]
    net.eval()
    before()
    with torch.no_grad():
        outputs += [t.clone() for _, t in tensors_in(net(*case.batch(3, 99)))]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    return Trained(
        outputs, gradients, state, optimizer.state_dict()["state"], torch.get_rng_state()
    )


def assert_same(one: Any, other: Any) -> None:
    """Fail unless two nests of tensors are equal to the bit."""
    ours, theirs = dict(tensors_in(_plain(one))), dict(tensors_in(_plain(other)))
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def _plain(nest: Any) -> Any:
    return tuple(nest) if isinstance(nest, Trained) else nest


# ---------------------------------------------------------------- it computes what the model computes


@over_frontends
@over_cases
def test_training_is_bit_equal_untouched_unmarked_and_with_everything_recorded(
    case: Case, frontend: str
) -> None:
    untouched = train(case, make(case))
    assert_same(train(case, rewritten(case, frontend, marked=False)), untouched)
    net = rewritten(case, frontend)
    assert_same(train(case, net), untouched)  # marked, nobody recording
    net = rewritten(case, frontend)
    place = next(_places)
    with fxray.record(net, place):
        recorded = train(case, net)
    assert_same(recorded, untouched)
    run = fxray.open(place)
    assert run[case.paths[0]].output.in_phase("train").steps.tolist() == list(range(STEPS))


@over_cases
def test_a_draft_of_defaults_changes_nothing(case: Case) -> None:
    net = fxray.trace(make(case), *case.batch(BATCH)).rewrite()
    with fxray.record(net, next(_places)):
        recorded = train(case, net)
    assert_same(recorded, train(case, make(case)))


@over_frontends
@over_cases
def test_other_batch_sizes_are_bit_equal_in_both_modes_after_one_trace(
    case: Case, frontend: str
) -> None:
    model, twin = make(case), make(case)
    net = rewritten(case, frontend, model=model)
    with fxray.record(net, next(_places)):
        for training, size in itertools.product((True, False), (1, 3, 7)):
            net.train(training)
            twin.train(training)
            assert model.training is training
            torch.manual_seed(5)
            ours = net(*case.batch(size, size))
            torch.manual_seed(5)
            assert_same(ours, twin(*case.batch(size, size)))


@over_cases
def test_the_model_itself_may_be_trained_between(case: Case) -> None:
    model = make(case)
    net = rewritten(case, "execution", model=model)
    model.eval()
    assert not net.training
    net.train()
    assert model.training
    assert_same(train(case, model), train(case, make(case)))
    model.eval()
    assert_same(net(*case.batch(3)), model(*case.batch(3)))


@over_frontends
@over_cases
def test_moving_to_float64_moves_both_and_stays_equal(case: Case, frontend: str) -> None:
    model, twin = make(case), make(case).to(torch.float64)
    net = rewritten(case, frontend, model=model)
    assert net.to(torch.float64) is net
    for p, q in zip(model.parameters(), net.parameters(), strict=True):
        assert p is q
        assert p.dtype == torch.float64
    batch = [t.double() if t.is_floating_point() else t for t in case.batch(BATCH)]
    net.eval()
    twin.eval()
    with fxray.record(net, next(_places)):
        assert_same(net(*batch), twin(*batch))


# ---------------------------------------------------------------- it records what hooks see


def witnessed(case: Case, steps: int) -> tuple[Witness, list[dict[str, torch.Tensor]], Trained]:
    """Train the model under plain hooks, and its twin; return all that they saw."""
    torch.manual_seed(1)
    hooked, twin = case.make(), case.twin()
    twin.load_state_dict(hooked.state_dict())
    by_hooks = Witness()
    by_hooks.hook(hooked, LEAVES)
    twin.witness = Witness()
    weights: list[dict[str, torch.Tensor]] = []

    def begin_hooked() -> None:
        by_hooks.begin()
        weights.append({k: p.detach().clone() for k, p in hooked.named_parameters()})

    trained = train(case, hooked, steps, begin_hooked)
    by_hand = train(case, twin, steps, twin.witness.begin)
    assert_same(trained, by_hand)  # the twin is the model
    for key, tensors in twin.witness.seen.items():
        by_hooks.seen.setdefault(key, tensors)
    return by_hooks, weights, trained


def value(series: Any, step: int, item: str) -> np.ndarray:
    found = series[step]
    return found[item] if series.has_fields else found


@over_frontends
@over_cases
def test_what_is_recorded_is_what_hooks_on_the_model_saw(case: Case, frontend: str) -> None:
    steps, place = 3, next(_places)
    witness, weights, trained = witnessed(case, steps)
    net = rewritten(case, frontend)
    with fxray.record(net, place):
        recorded = train(case, net, steps)
    assert_same(recorded, trained)
    run, missing = fxray.open(place), []
    for (op, kind, item), tensors in witness.seen.items():
        assert len(tensors) in (0, steps, steps + 1), (op, kind, item)  # outputs: and the eval pass
        if not tensors:
            continue  # nothing came back through it: the cell state that nobody used
        if op not in net.architecture:
            missing.append(op)
            continue
        series = getattr(run[op], kind)
        for step in range(steps):
            kept = value(series, step, item)
            assert kept.shape == tuple(tensors[step].shape), (op, kind, item, step)
            assert np.array_equal(kept, tensors[step].numpy()), (op, kind, item, step)
    assert missing == []
    seen = {op for op, kind, _ in witness.seen if kind == "output"}
    unseen = {op.path for op in net.architecture.values() if op.role not in ("input", "parameter")}
    assert unseen <= seen  # every op was compared
    for op in net.architecture.values():
        for name in op.parameters:
            path = op.parameter_path(name)
            series, grads = run[op.path].parameter(name), run[op.path].parameter_grad(name)
            for step in range(steps):
                assert np.array_equal(series[step], weights[step][path].numpy()), path
                assert np.array_equal(grads[step], trained.gradients[step][path].numpy()), path


@over_cases
def test_inputs_and_bare_parameters_are_recorded(case: Case) -> None:
    net, place = rewritten(case, "execution"), next(_places)
    with fxray.record(net, place):
        train(case, net, 2)
    run = fxray.open(place)
    inputs = [op.path for op in net.architecture.values() if op.role == "input"]
    for path, tensor in zip(inputs, case.batch(BATCH, 1), strict=True):
        assert np.array_equal(run[path].output[1], tensor.numpy())


def test_a_captured_convolution_keeps_its_negatives_under_an_in_place_relu() -> None:
    case, place = CASES[1], next(_places)
    net = rewritten(case, "execution")
    with fxray.record(net, place):
        train(case, net, 1)
    run = fxray.open(place)
    for path in ("stem.1", "block.bn1", "block.bn1@1"):
        assert (run[path].output[0] < 0).any(), path
    assert (run["block.relu"].input[0]["0"] < 0).any()
    assert (run["block.relu"].output[0] >= 0).all()


def test_a_module_called_twice_keeps_two_records_of_one_step() -> None:
    case, place = CASES[1], next(_places)
    net = rewritten(case, "execution")
    with fxray.record(net, place):
        train(case, net, 1)
    run = fxray.open(place)
    assert not np.array_equal(run["block.conv1"].output[0], run["block.conv1@1"].output[0])
    assert not np.array_equal(run["block.conv1"].grad[0], run["block.conv1@1"].grad[0])
    assert np.array_equal(run["block.conv1"].weight[0], run["block.conv1@1"].weight[0])


# ---------------------------------------------------------------- it stays the model


@over_frontends
@over_cases
def test_state_dicts_fit_both_ways(case: Case, frontend: str) -> None:
    model = make(case)
    net = rewritten(case, frontend, model=model)
    assert list(net.state_dict()) == list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in net.named_parameters()] == names
    assert [name for name, _ in net.named_buffers()] == [name for name, _ in model.named_buffers()]
    other = case.make()
    for a, b in ((net, other), (other, net)):
        b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, strict=True)
        net.eval()
        other.eval()
        assert_same(net(*case.batch(2)), other(*case.batch(2)))
        with torch.no_grad():
            for p in b.parameters():
                p.add_(1)


def _through_pickle(net: Any) -> Any:
    return pickle.loads(pickle.dumps(net))


def _through_a_file(net: Any) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_a_file])
@over_frontends
@over_cases
def test_copies_compute_the_same_and_are_inert(
    case: Case, frontend: str, copied: Callable[[Any], Any]
) -> None:
    net, place = rewritten(case, frontend), next(_places)
    with fxray.record(net, place):
        net(*case.batch(BATCH))
        twin = copied(net)
        twin.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, strict=True)
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            assert p is not q
            assert p.data_ptr() != q.data_ptr()
        twin.eval()
        net.eval()
        ours = twin(*case.batch(BATCH))
        assert_same(ours, net(*case.batch(BATCH)))
        twin.train()
        assert not net.training
        for _ in range(3):
            twin(*case.batch(BATCH))
    run = fxray.open(place)
    assert len(run[case.paths[0]].output) == 2  # what the copy ran was not recorded
    place = next(_places)
    with fxray.record(twin, place):
        twin(*case.batch(BATCH)[: len(case.batch(BATCH))])
    assert fxray.open(place)[case.paths[-1]].output.steps.tolist() == [0]


def test_a_copy_of_a_tied_model_stays_tied() -> None:
    net = copy.deepcopy(rewritten(CASES[5], "execution"))
    assert net.embedding.weight is net.original.embedding.weight
    before = net(*CASES[5].batch(2))
    with torch.no_grad():
        net.embedding.weight.mul_(2)
    assert not torch.equal(before, net(*CASES[5].batch(2)))
    assert sum(p.numel() for p in net.parameters()) == 11 * 6 + 42


@over_frontends
@over_cases
def test_erasing_the_captures_gives_the_old_graph(case: Case, frontend: str) -> None:
    xray = xray_of(case, frontend, make(case))
    xray.draft.clear()
    xray.mark("*", **EVERYTHING)
    net = xray.rewrite()
    for mode in ("train", "eval"):
        old, new = xray.graph_module.graphs[mode], net.graphs[mode]
        assert len(new.nodes) > len(old.nodes)
        erased = erase_captures(new)
        assert [
            (n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in erased.nodes
        ] == [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in old.nodes]
        assert erased.python_code("self").src == old.python_code("self").src
        stock = torch.fx.GraphModule(net, copy.deepcopy(new))
        stock.graph.eliminate_dead_code()
        kept = sum("capture" in str(n.target) for n in stock.graph.nodes)
        assert kept == sum("capture" in str(n.target) for n in new.nodes) > 0


# ---------------------------------------------------------------- tracing leaves nothing behind


class Snapshot(NamedTuple):
    state: dict[str, torch.Tensor]
    pointers: list[int]
    versions: list[int]
    grads: list[Any]
    flags: list[bool]
    attributes: list[dict[str, Any]]
    torch_rng: torch.Tensor
    python_rng: Any
    numpy_rng: Any
    names: list[int]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        flat = [*model.parameters(), *model.buffers()]
        return cls(
            {k: v.clone() for k, v in model.state_dict().items()},
            [t.data_ptr() for t in flat],
            [p._version for p in model.parameters()],
            [p.grad for p in model.parameters()],
            [m.training for m in model.modules()],
            [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is what may leak
            _torch_names(),
        )


def _torch_names() -> list[int]:
    """Return the identity of every public name that a tracer might replace."""
    autograd = torch.autograd
    owners: list[Any] = [
        torch, torch.nn.functional, torch.Tensor, nn.Module, torch.random,
        autograd.Function, torch.jit.ScriptFunction, torch.amp.autocast_mode.autocast,
        autograd.grad_mode.no_grad, autograd.grad_mode.enable_grad,
        autograd.grad_mode.set_grad_enabled, autograd.grad_mode.inference_mode,
        torch.fx.Tracer, torch.fx.Proxy, __import__("builtins"), __import__("operator"),
        __import__("math"), np, np.random, random,
    ]  # fmt: skip
    return [id(v) for owner in owners for k, v in sorted(vars(owner).items()) if k != "_"]


def assert_untouched(model: nn.Module, before: Snapshot) -> None:
    after = Snapshot.of(model)
    for field in ("pointers", "grads", "flags", "attributes", "names", "python_rng", "numpy_rng"):
        assert getattr(after, field) == getattr(before, field), field
    assert_same(after.state, before.state)
    assert torch.equal(after.torch_rng, before.torch_rng)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@over_frontends
@pytest.mark.parametrize("training", [True, False])
@over_cases
def test_tracing_leaves_nothing_behind(case: Case, frontend: str, training: bool) -> None:
    model = make(case).train(training)
    next(model.children()).train(not training)  # a pattern of flags of its own
    xray_of(case, frontend, model)  # what torch itself sets up at the first time
    before = Snapshot.of(model)
    xray = xray_of(case, frontend, model)
    assert_untouched(model, before)
    assert Snapshot.of(model).versions == before.versions
    xray.rewrite()
    assert_untouched(model, before)


class Raises(nn.Module):
    def __init__(self, case: Case, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.seen = case.make(), how, 0

    def forward(self, *args):
        out = self.inner(*args)
        self.seen += 1
        self.cache = out
        if self.how == "raises":
            msg = "the model's own trouble"
            raise RuntimeError(msg)
        if self.how == "numpy":
            return torch.from_numpy(np.sort(next(t for _, t in tensors_in(out)).detach().numpy()))
        with torch.no_grad():
            torch.manual_seed(7)
        return out


@over_frontends
@pytest.mark.parametrize("how", ["raises", "numpy", "seeds"])
@over_cases
def test_a_trace_that_fails_leaves_nothing_behind(case: Case, frontend: str, how: str) -> None:
    model = Raises(case, how)
    before = Snapshot.of(model)
    args = case.batch(BATCH) if frontend == "execution" else ()
    with pytest.raises(fxray.TraceError):
        fxray.Xray(model, args, frontend=frontend)
    assert_untouched(model, before)


@pytest.mark.parametrize("how", ["numpy", "seeds"])
@over_cases
def test_a_trace_that_finds_no_graph_leaves_nothing_behind(case: Case, how: str) -> None:
    model = Raises(case, how)
    fxray.trace(model, *case.batch(BATCH))  # what torch itself sets up at the first time
    before = Snapshot.of(model)
    xray = fxray.trace(model, *case.batch(BATCH))
    assert xray.report.frontend == "interposed"
    assert_untouched(model, before)
    assert Snapshot.of(model).versions == before.versions
    xray.rewrite()
    assert_untouched(model, before)


@over_cases
def test_a_trace_of_a_model_that_fails_leaves_nothing_behind(case: Case) -> None:
    model = Raises(case, "raises")
    before = Snapshot.of(model)
    with pytest.raises(fxray.TraceError, match="itself fails on this input"):
        fxray.trace(model, *case.batch(BATCH))
    assert_untouched(model, before)


@over_cases
def test_a_call_traced_later_leaves_nothing_behind_but_what_the_call_does(case: Case) -> None:
    model, twin = make(case), make(case)
    net = fxray.trace(model, *case.batch(BATCH)).rewrite()
    for p in (*model.parameters(), *twin.parameters()):
        p.grad = torch.full_like(p, 0.5)
    grads = [p.grad for p in model.parameters()]
    for module in (model, twin):
        module.double()
    batch = [t.double() if t.is_floating_point() else t for t in case.batch(BATCH)]
    for net_ in (net, twin):
        random.seed(1)
        torch.manual_seed(1)
        next(net_.children()).eval()
        net_(*batch)
        assert random.getstate() == random.Random(1).getstate()
        if net_ is net:
            rng, names = torch.get_rng_state(), _torch_names()
    assert torch.equal(torch.get_rng_state(), rng)
    assert _torch_names() == names
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all((grad == 0.5).all() for grad in grads)


def test_a_trace_inside_no_grad_gives_a_model_that_trains() -> None:
    case = CASES[0]
    with torch.no_grad():
        net = rewritten(case, "execution")
        assert not torch.is_grad_enabled()
    assert_same(train(case, net, 2), train(case, make(case), 2))


def test_the_inputs_given_to_trace_are_left_alone() -> None:
    for case in CASES:
        batch = case.batch(BATCH)
        before = [(t.clone(), t._version, t.requires_grad) for t in batch]
        fxray.trace(make(case), *batch)
        for tensor, (values, version, wanted) in zip(batch, before, strict=True):
            assert torch.equal(tensor, values)
            assert (tensor._version, tensor.requires_grad, tensor.grad) == (version, wanted, None)
