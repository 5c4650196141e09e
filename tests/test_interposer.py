"""Models that run as they are: every op named as in a graph, and no number changed."""

# To mypy a module's attribute is Tensor | Module, and wrong types are given here on purpose.
# mypy: ignore-errors

from __future__ import annotations

import builtins
import collections
import copy
import gc
import pickle
import random
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxray
from fxray.tracing.alone import preserved_rng, training_flags
from fxray.tracing.interposer import interposed
from fxray.tracing.learner import survey_call
from fxray.tracing.ops import path_of
from fxray.tracing.patches import interposing, patched, patched_contexts
from fxray.tracing.state import ModelState
from fxray.tracing.survey import Survey
from tests.models import CASES, LEAVES, Case, Witness

X = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 10 - 1
DOOR = "_compiled_call_impl"


class Visitor:
    """Keeps a copy of all it is shown, in order, and every gradient."""

    def __init__(self, wants=(), wants_input=(), due=True) -> None:
        self.wants, self.wants_input, self.due = frozenset(wants), frozenset(wants_input), due
        self.given, self.seen, self.begun, self.finished = [], [], [], 0
        self.grads = collections.defaultdict(list)

    @property
    def paths(self):
        return [path for path, _ in self.seen]

    def begin(self, *, training):
        self.begun.append(training)
        return self.due

    def before(self, path, args, kwargs):
        self.given.append((path, len(args), tuple(kwargs)))

    def after(self, path, out):
        if not isinstance(out, torch.Tensor):
            self.seen.append((path, out))
            return
        self.seen.append((path, out.detach().clone()))
        if out.requires_grad and not out.is_leaf:
            out.register_hook(lambda grad: self.grads[path].append(grad.clone()))

    def finish(self):
        self.finished += 1


class Everything(collections.abc.Collection):
    """A set that holds every path."""

    def __contains__(self, path):
        return bool(path)

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 1


def learnt(model, *args, modes=(True, False), **kwargs) -> Survey:
    """Return a survey of a dry run in each mode."""
    survey = Survey.empty(model)
    for training in modes:
        state = ModelState(model)
        with preserved_rng(0), training_flags(model, training=training):
            survey_call(
                model, survey, lambda: model(*args, **kwargs), training=training,
                protect=state.protect,
            )  # fmt: skip
        state.restore()
    return survey


def seen_by(model, survey, *args, wants=None, **kwargs):
    """Return the output of one interposed call and what was seen of it."""
    visitor = Visitor()
    visitor.wants = wants or Everything()
    with interposed(model, survey, visitor):
        out = model(*args, **kwargs)
    return out, visitor


def assert_untouched(model) -> None:
    assert not any(DOOR in vars(module) for module in model.modules())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.hidden(x)))


# ---------------------------------------------------------------- the same names as a graph


def tiny_transformers():
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(1, 15).reshape(2, 7)
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertConfig(**small, intermediate_size=32, max_position_embeddings=32)
    yield transformers.BertForSequenceClassification(bert), {"input_ids": ids}
    gpt2 = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    yield transformers.GPT2LMHeadModel(gpt2), {"input_ids": ids}
    t5 = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    both = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    yield transformers.T5ForConditionalGeneration(t5), both


def assert_same_names(model, args, kwargs) -> None:
    xray = fxray.trace(model, *args, **kwargs)
    assert xray.report.frontend == "execution"
    architecture = xray.architecture
    graphs = {m: g for m, g in xray.graph_module.graphs.items() if m in ("train", "eval")}
    survey = Survey.of(model, graphs)
    version = survey.version
    for mode, graph in graphs.items():
        model.train(mode == "train")
        _, visitor = seen_by(model, survey, *args, **kwargs)
        assert visitor.paths == [path for node in graph.nodes if (path := path_of(node))]
    assert survey.version == version  # nothing was new
    assert list(survey.architecture) == list(architecture)
    # And without the graphs.
    own = learnt(model, *args, **kwargs).architecture
    assert list(own) == list(architecture)
    for op, other in zip(own.values(), architecture.values(), strict=True):
        for fact in ("key", "type", "role", "target", "module", "scope", "parameters", "where"):
            assert getattr(op, fact) == getattr(other, fact), (op.path, fact)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_paths_are_those_of_the_graph(case: Case) -> None:
    assert_same_names(case.make(), case.batch(3), {})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_architecture_is_that_of_the_graph(case: Case) -> None:
    model, batch = case.make(), case.batch(3)
    graph, own = fxray.trace(model, *batch).architecture, learnt(model, *batch).architecture
    assert dict(own.returns) == dict(graph.returns)
    assert dict(own.modules) == dict(graph.modules)
    edges = {(u, v, slot) for u, v, slots in graph.graph.edges(data="slots") for slot in slots}
    assert {(u, v, s) for u, v, slots in own.graph.edges(data="slots") for s in slots} == edges
    for op, other in zip(own.values(), graph.values(), strict=True):
        assert (op.inputs, op.outputs, op.items) == (other.inputs, other.outputs, other.items)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2], ids=["bert", "gpt2", "t5"])
def test_paths_of_transformers(which: int) -> None:
    try:
        model, kwargs = [*tiny_transformers()][which]
    except RuntimeError as error:  # beside a torchvision that does not fit torch
        pytest.skip(str(error).splitlines()[0])
    assert_same_names(model, (), kwargs)


def test_a_survey_is_copied_and_pickled() -> None:
    model = Net()
    survey = learnt(model, X)
    for twin in (copy.deepcopy(survey), pickle.loads(pickle.dumps(survey))):
        assert twin.architecture.to_dict() == survey.architecture.to_dict()
        assert twin.version == survey.version
        _, visitor = seen_by(copy.deepcopy(model), twin, X)
        assert visitor.paths == ["x", "hidden", "relu", "head"]
        assert twin.version == survey.version


def test_what_is_unused_is_no_op_and_moves_no_number() -> None:
    class Unpacks(nn.Module):
        def forward(self, x):
            _, b, c = x[0], x[1], x[2]
            return b + c

    model = Unpacks()
    survey = Survey.of(model, {"train": fxray.trace(model, X).graph_module.graphs["train"]})
    _, visitor = seen_by(model, survey, X)
    seen = dict(visitor.seen)
    assert visitor.paths == ["x", "getitem", "getitem_1", "add"]
    assert torch.equal(seen["getitem"], X[1])
    assert list(learnt(model, X).architecture) == ["x", "getitem", "getitem_1", "add"]


def test_the_same_line_keeps_its_path_when_another_runs_first() -> None:
    class Sometimes(nn.Module):
        extra = True

        def forward(self, x):
            if self.extra:
                x = x.mul(2)
            x = x.mul(3)
            return x.mul(4)

    model = Sometimes()
    survey = learnt(model, X)
    model.extra = False
    _, visitor = seen_by(model, survey, X)
    assert visitor.paths == ["x", "mul_1", "mul_2"]


# ---------------------------------------------------------------- what no graph can hold


class LayerDrop(nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or self.draw() > 0.5:
                x = torch.tanh(layer(x))
        return x


class WhileOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        while x.abs().sum() < 100:
            x = x + self.linear(x).abs() + 1
        return x


class Counter(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class TakesItems(nn.Module):
    def forward(self, x):
        return x * x.sum().item() + (1 if bool((x > 0).any()) else 0)


class NumpyDetour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return y + torch.from_numpy(np.sort(y.detach().numpy(), axis=1))


MODELS = {
    "layerdrop-torch": lambda: LayerDrop(lambda: torch.rand(()).item()),
    "layerdrop-python": lambda: LayerDrop(random.random),
    "while": WhileOnData,
    "counter": Counter,
    "items": TakesItems,
    "numpy": NumpyDetour,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_it_computes_what_the_model_computes(name: str, training: bool) -> None:
    model = MODELS[name]().train(training)
    twin = copy.deepcopy(model)
    survey = learnt(model, X)
    for seed in range(5):
        outs = []
        for which in (twin, model):
            torch.manual_seed(seed)
            random.seed(seed)
            visitor = Visitor()
            visitor.wants = Everything()
            if which is model:
                with interposed(model, survey, visitor):
                    outs.append(model(X + seed))
            else:
                outs.append(twin(X + seed))
            outs.append(torch.rand(()))  # no random number was drawn beside the model's
            if outs[-2].requires_grad:
                outs[-2].sum().backward()
        assert torch.equal(outs[0], outs[2])
        assert torch.equal(outs[1], outs[3])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        assert all(path in survey.architecture for path in visitor.paths)
    assert_untouched(model)


def test_a_survey_grows_with_what_is_seen_first() -> None:
    model = WhileOnData()
    x = torch.full((1, 4), 24.0)
    survey = learnt(model, x)
    version, before = survey.version, [*survey.architecture]
    _, visitor = seen_by(model, survey, torch.ones(1, 4))
    assert survey.version > version
    assert [*survey.architecture][: len(before)] == before  # type keys stay what they were
    again = survey.version
    with torch.no_grad():
        assert seen_by(model, survey, torch.ones(1, 4))[1].paths == visitor.paths
    assert survey.version == again
    assert "linear@1" in survey.architecture


# ---------------------------------------------------------------- against plain hooks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_those_of_plain_hooks_and_of_a_twin(case: Case) -> None:
    model, hooked, twin = case.make(), case.make(), case.twin()
    hooked.load_state_dict(model.state_dict())
    twin.load_state_dict(model.state_dict())
    survey = learnt(model, *case.batch(2))
    witness = Witness()
    witness.hook(hooked, LEAVES)
    twin.witness = Witness()
    seen = Visitor()
    seen.wants = Everything()
    for which in (model, hooked, twin):
        torch.manual_seed(1)
        with interposed(model, survey, seen):
            case.loss(which(*case.batch(5))).backward()
    outputs = collections.defaultdict(list)
    for path, out in seen.seen:
        outputs[path].append(out)
    compared = 0
    for who in (witness, twin.witness):
        for (op, kind, item), tensors in who.seen.items():
            if item or op not in survey.architecture or kind == "input":
                continue
            ours = seen.grads[op] if kind == "grad" else outputs[op]
            assert len(ours) == len(tensors), (op, kind)
            for a, b in zip(ours, tensors, strict=True):
                assert torch.equal(a, b), (op, kind)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twenty_training_steps_are_bit_equal_with_everything_looked_at(case: Case) -> None:
    model, twin = case.make(), case.make()
    twin.load_state_dict(model.state_dict())
    survey, visitor = learnt(model, *case.batch(2)), Visitor()
    visitor.wants = visitor.wants_input = Everything()
    for which in (twin, model):
        torch.manual_seed(0)
        optimizer = case.optimizer(which.parameters())
        for step in range(20):
            optimizer.zero_grad()
            with interposed(model, survey, visitor):
                loss = case.loss(which(*case.batch(4, step)))
            loss.backward()
            optimizer.step()
    for (name, p), (_, q) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert torch.equal(p, q), name
    assert (visitor.begun, visitor.finished) == ([True] * 20, 20)


def test_the_output_of_a_leaf_is_what_its_own_hooks_made_of_it() -> None:
    model = Net()
    model.hidden.register_forward_hook(lambda _m, _a, out: out * 2)
    _, visitor = seen_by(model, learnt(model, X), X)
    assert torch.equal(dict(visitor.seen)["hidden"], F.linear(X, *model.hidden.parameters()) * 2)
    assert visitor.paths == ["x", "hidden", "relu", "head"]


def test_arguments_are_shown_before_the_op_and_only_where_wanted() -> None:
    model = Net()
    survey, visitor = learnt(model, X), Visitor(["relu"], ["relu", "head"])
    with interposed(model, survey, visitor):
        model(X)
    assert [given[:2] for given in visitor.given] == [("relu", 1), ("head", 1)]
    assert visitor.paths == ["relu"]


# ---------------------------------------------------------------- torch's own ways


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


class Special(nn.Module):
    """A custom Function, no_grad, autocast, a buffer written, and a scripted function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return Doubled.apply(y.float() * self.scale) + self.mean


def test_functions_modes_buffers_and_bare_parameters() -> None:
    model, twin = Special(), Special()
    twin.load_state_dict(model.state_dict())
    survey = learnt(model, X)
    assert not model.mean.any()
    out, visitor = seen_by(model, survey, X)
    expected = twin(X)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(model.mean, twin.mean)
    assert "Doubled" in visitor.paths
    assert "scale" in visitor.paths
    assert list(survey.architecture) == list(fxray.trace(twin, X).architecture)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_a_checkpoint_runs_and_its_recomputation_is_not_seen(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout())

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=reentrant)

    model = Checkpointed()
    twin = copy.deepcopy(model)
    survey, visitor = learnt(model, X), Visitor()
    visitor.wants = Everything()
    for which in (model, twin):
        torch.manual_seed(3)
        with interposed(model, survey, visitor):
            which(X).sum().backward()  # backward too: nothing of it is a forward
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert visitor.paths == ["x", "first", "block.0", "block.1"]
    assert visitor.begun == [True]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_it_works_without_autograd(around) -> None:
    model = Net()
    survey = learnt(model, X)
    with around():
        out, visitor = seen_by(model, survey, X)
        assert torch.equal(out, model(X))
    assert visitor.paths == ["x", "hidden", "relu", "head"]


def test_in_place_module_compile_still_has_its_way() -> None:
    model = Net()
    called = []
    model.hidden._compiled_call_impl = lambda x: called.append(1) or model.hidden._call_impl(x)
    before = model.hidden._compiled_call_impl
    _, visitor = seen_by(model, learnt(model, X), X)
    assert called == [1, 1, 1]  # the survey ran twice
    assert visitor.paths == ["x", "hidden", "relu", "head"]
    assert vars(model.hidden)[DOOR] is before


def test_a_copy_made_inside_the_forward_is_the_model_alone() -> None:
    class Copies(Net):
        def forward(self, x):
            self.twin_of_head = [copy.deepcopy(self.head), pickle.loads(pickle.dumps(self.head))]
            return super().forward(x)

    model = Copies()
    seen_by(model, Survey.empty(model), X)
    assert all(DOOR not in vars(twin) for twin in model.twin_of_head)


def test_a_replaced_module_is_seen_at_the_next_call() -> None:
    model = Net()
    survey = learnt(model, X)
    model.hidden = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    _, visitor = seen_by(model, survey, X)
    assert visitor.paths == ["x", "hidden.0", "hidden.1", "relu", "head"]
    assert "hidden.0" in survey.architecture


# ---------------------------------------------------------------- nothing is left behind

PATCHED = (
    (nn.Module, "__call__"),
    (torch.autograd.Function, "apply"),
    (torch.jit.ScriptFunction, "__call__"),
    (builtins, "len"),
    (torch.amp.autocast_mode.autocast, "__enter__"),
    (torch.amp.autocast_mode.autocast, "__exit__"),
    (torch.autograd.grad_mode.no_grad, "__enter__"),
    (torch.autograd.grad_mode.inference_mode, "__enter__"),
    (torch, "manual_seed"),
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
)


def names_of_torch():
    return [vars(owner)[name] for owner, name in PATCHED]


def quiet():
    """Return a writer that takes nothing."""
    return SimpleNamespace(writing=False)


def test_patches_nest_in_any_order_and_leave_torch_as_it_was() -> None:
    before = names_of_torch()
    contexts = [patched(quiet()), patched_contexts(quiet()), interposing(quiet()), patched(quiet())]
    for context in contexts:
        context.__enter__()
    assert names_of_torch() != before
    for place in (1, 3, 0, 2):
        contexts[place].__exit__(None, None, None)
    assert all(a is b for a, b in zip(names_of_torch(), before, strict=True))


def test_a_foreign_patch_over_ours_is_left_alone_and_ours_goes_in_the_end() -> None:
    before = names_of_torch()
    context = patched(quiet())
    context.__enter__()
    ours = nn.Module.__call__

    def foreign(module, *args, **kwargs):
        return ours(module, *args, **kwargs)

    nn.Module.__call__ = foreign
    context.__exit__(None, None, None)
    assert nn.Module.__call__ is foreign
    nn.Module.__call__ = ours  # as a library does that puts back what it found
    assert torch.equal(nn.Identity()(X), X)
    with patched(quiet()):
        assert nn.Module.__call__ is ours  # once, not twice
    assert all(a is b for a, b in zip(names_of_torch(), before, strict=True))


class Fails(Net):
    def forward(self, x):
        y = super().forward(x)
        if len(x) > 6:
            raise KeyError("of the user")  # noqa: EM101, TRY003
        return y


def test_an_exception_of_the_model_passes_and_everything_is_put_back() -> None:
    before, model = names_of_torch(), Fails()
    survey, visitor = learnt(model, X), Visitor(["head"])
    with pytest.raises(KeyError, match="of the user"), interposed(model, survey, visitor):
        model(torch.cat([X, X]))
    assert (visitor.begun, visitor.finished) == ([True], 1)
    assert all(a is b for a, b in zip(names_of_torch(), before, strict=True))
    assert_untouched(model)
    assert torch.overrides._get_current_function_mode() is None
    assert seen_by(model, survey, X)[1].paths == ["x", "hidden", "relu", "head"]
    with pytest.raises(RuntimeError), interposed(model, survey, visitor):
        model(X[:, :2])  # inside a leaf
    assert torch.overrides._get_current_function_mode() is None
    assert_untouched(model)


def test_a_forward_that_is_not_due_is_not_looked_into() -> None:
    model = Net()
    visitor = Visitor(["relu"], due=False)
    with interposed(model, learnt(model, X), visitor):
        model(X)
        assert [m for m in model.modules() if DOOR in vars(m)] == [model]
    assert (visitor.begun, visitor.seen, visitor.finished) == ([True], [], 0)


def test_interposed_inside_interposed_each_sees_its_own() -> None:
    inner, outer = Net(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    mine = learnt(inner, X)

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner, self.seen = outer, inner, []

        def forward(self, x):
            x = self.outer(x)
            visitor = Visitor()
            visitor.wants = Everything()
            with interposed(self.inner, mine, visitor):
                x = self.inner(x)
            self.seen.append(visitor.paths)
            return x + 1

    model = Holds()
    _, visitor = seen_by(model, learnt(model, X), X)
    assert model.seen[-1] == ["x", "hidden", "relu", "head"]
    ours = ["x", "outer.0", "outer.1", "inner.hidden", "inner.relu", "inner.head", "add"]
    assert visitor.paths == ours


def test_two_threads_interpose_one_model_while_a_third_traces_another() -> None:
    before, model, failures = names_of_torch(), Net(), []
    survey, expected = learnt(model, X), Net()
    expected.load_state_dict(model.state_dict())
    start = threading.Barrier(3)

    def interpose(shift: float) -> None:
        try:
            start.wait()
            for k in range(60):
                x = X + shift + k
                with torch.no_grad():
                    out, visitor = seen_by(model, survey, x)
                    assert torch.equal(out, expected(x))
                    assert visitor.paths == ["x", "hidden", "relu", "head"]
                    assert torch.equal(visitor.seen[0][1], x)  # this thread's, not the other's
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    def trace() -> None:
        try:
            start.wait()
            for _ in range(6):
                assert list(fxray.trace(Net(), X).architecture) == ["x", "hidden", "relu", "head"]
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=interpose, args=(shift,)) for shift in (0.0, 0.5)]
    threads.append(threading.Thread(target=trace))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert all(a is b for a, b in zip(names_of_torch(), before, strict=True))
    assert_untouched(model)


# ---------------------------------------------------------------- recorded


def recorded_net(model, *args, every=True, **kwargs):
    """Return an Xray of `model`, interposed, that keeps every output whole, and its net."""
    xray = fxray.Xray(model, args=args, kwargs=kwargs, frontend="interposed")
    assert xray.report.frontend == "interposed"
    xray.draft.clear()
    if every:
        xray.mark("*", output=True, selection=fxray.Whole())
    return xray, xray.rewrite()


def test_a_recording_of_what_has_no_graph() -> None:
    model, x = LayerDrop(random.random), X.clone().requires_grad_()
    xray, net = recorded_net(model, x, every=False)
    xray.mark("layers.*", output=True, grad=True, selection=fxray.Whole())
    twin, seen = copy.deepcopy(model), collections.defaultdict(list)

    def keep(path):
        def hook(_module, _args, out):
            seen[path, "output"].append(out.detach().clone())
            out.register_hook(lambda grad: seen[path, "grad"].append(grad.clone()))

        return hook

    for index, layer in twin.layers.named_children():
        layer.register_forward_hook(keep(f"layers.{index}"))

    def train(which) -> None:
        random.seed(1)
        optimizer = torch.optim.SGD(which.parameters(), lr=0.1)
        for step in range(20):
            optimizer.zero_grad()
            which(x + step).square().mean().backward()
            optimizer.step()

    train(twin)
    with fxray.record(net) as recorder:
        train(net)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(seen) == 12
    for (path, kind), theirs in seen.items():
        kept = [values for _, values in getattr(recorder.run[path], kind)]
        assert len(kept) == len(theirs) < 20
        for ours, other in zip(kept, theirs, strict=True):
            assert np.array_equal(ours, other.numpy())
    assert_untouched(model)


class Encoder(nn.Module):
    """Its own methods call it once or twice, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.linear(x))

    def twice(self, x, *, times=2):
        for _ in range(times):
            x = self(x)
        return x

    def size(self):
        return 4


def test_a_method_of_the_model_is_one_step_of_several_calls() -> None:
    model = Encoder()
    _, net = recorded_net(model, X)
    net.eval()
    assert torch.equal(net.twice(X), model.twice(X))  # nobody records
    with fxray.record(net) as recorder, torch.no_grad():
        assert net.size() == 4
        assert torch.equal(net.twice(X), model.twice(X))
        net(X)
        with recorder.step():
            assert torch.equal(net.twice(X, times=3), model.twice(X, times=3))
    rows = [(row.step, row.call) for row, _ in recorder.run["tanh"].output]
    assert rows == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert np.array_equal(
        recorder.run["linear"].output.sel(step=0, call=1), model.linear(model(X)).detach().numpy()
    )
    assert net.twice.__self__ is model
    assert net.train is not model.train  # nn.Module's own stay as they are
    assert_untouched(model)


def test_a_capture_whose_op_was_never_reached_is_named() -> None:
    model = WhileOnData()
    _, net = recorded_net(model, torch.ones(1, 4))
    with pytest.warns(fxray.FxrayWarning, match=r"nothing was kept of the output of .*linear@1"):  # noqa: SIM117
        with fxray.record(net):
            net(torch.full((1, 4), 24.0))


@pytest.mark.slow
def test_generate_is_captured_token_by_token() -> None:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except (ImportError, RuntimeError) as error:  # beside a torchvision that does not fit torch
        pytest.skip(str(error).splitlines()[0])
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[3, 14, 15, 9]])
    xray = fxray.trace(model, input_ids=ids)
    xray.draft.clear()
    blocks = {"attn": model.transformer.h[0].attn, "mlp": model.transformer.h[1].mlp}
    (attention,) = xray.mark(blocks["attn"], output=True, selection=fxray.Whole())
    (mlp,) = xray.mark(blocks["mlp"], output=True, selection=fxray.Whole())
    net = xray.rewrite()
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    hooked = collections.defaultdict(list)

    def keep(name):
        def hook(_module, _args, out):
            first = out[0] if isinstance(out, tuple) else out
            hooked[name].append(first.clone().numpy())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in blocks.items()]
    expected = model.generate(ids, **greedy)
    for handle in handles:
        handle.remove()
    assert torch.equal(net.generate(ids, **greedy), expected)  # nobody records
    with fxray.record(net) as recorder:
        assert torch.equal(net.generate(ids, **greedy), expected)
    for path, name in ((attention, "attn"), (mlp, "mlp")):
        kept = [(row.step, row.call, values) for row, values in recorder.run[path].output]
        assert [(step, call) for step, call, _ in kept] == [(0, call) for call in range(5)]
        assert [values.shape for _, _, values in kept] == [(1, 4, 16)] + [(1, 1, 16)] * 4
        for (_, _, ours), theirs in zip(kept, hooked[name], strict=True):
            assert np.array_equal(ours, theirs)
    assert_untouched(model)


def test_a_trace_does_not_take_the_doors_of_another_thread_for_what_the_forward_writes() -> None:
    model, failures, traced = Net(), [], threading.Event()
    survey = learnt(model, X)

    def interpose() -> None:
        try:
            while not traced.is_set():
                assert seen_by(model, survey, X)[1].paths == ["x", "hidden", "relu", "head"]
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=interpose)
    thread.start()
    try:
        for _ in range(5):
            assert fxray.trace(model, X).report.frontend == "execution"
    finally:
        traced.set()
        thread.join()
    assert not failures, failures
    assert_untouched(model)


def test_a_function_made_anew_at_each_call_is_forgotten_with_what_it_closes_over() -> None:
    closed = []

    class Closes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x)
            scale = h.detach() * 2
            closed.append(weakref.ref(scale))

            class Scales(torch.autograd.Function):
                @staticmethod
                def forward(ctx, given):
                    return given * scale

                @staticmethod
                def backward(ctx, grad):
                    return grad * scale

            return Scales.apply(h)

    model = Closes()
    twin = copy.deepcopy(model)
    xray, net = recorded_net(model, X)
    assert any(path.startswith("Scales") for path in xray.architecture)
    with fxray.record(net) as recorder:
        for _ in range(20):
            for module in (net, twin):
                module(X).sum().backward()
    assert torch.equal(model.linear.weight.grad, twin.linear.weight.grad)
    path = next(path for path in xray.architecture if path.startswith("Scales"))
    assert len(recorder.run[path].output) == 20
    gc.collect()
    assert len(closed) > 40
    assert not [ref for ref in closed if ref() is not None]
