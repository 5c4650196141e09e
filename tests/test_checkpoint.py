"""Activation checkpointing: what is computed again stays so, bit for bit, and nothing twice."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import linecache
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxray
from fxray.tracing.regions import count_regions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WIDTH = 16
MODES = [True, False]
"""Reentrant, and not; `None` among the settings of a model is no checkpoint at all."""

both = pytest.mark.parametrize("reentrant", MODES, ids=["reentrant", "not"])


def calls(function: Any, *args: Any, reentrant: bool | None) -> Any:
    return (
        function(*args)
        if reentrant is None
        else checkpoint(function, *args, use_reentrant=reentrant)
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.b(F.gelu(self.a(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, reentrant: bool | None, depth: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = calls(block, x, reentrant=self.reentrant)
        return self.last(x)


class Nested(Stack):
    """A region in a region, of both kinds in turn."""

    def pair(self, x):
        for block in self.blocks[:2]:
            x = calls(block, x, reentrant=None if self.reentrant is None else not self.reentrant)
        return self.blocks[2](calls(self.blocks[0], x, reentrant=self.reentrant))

    def forward(self, x):
        return self.last(calls(self.pair, self.first(x), reentrant=self.reentrant))


class Sequential(Stack):
    def forward(self, x):
        x = self.first(x)
        parts = [*self.blocks, nn.Identity()]  # torch runs the last one as it is
        return self.last(checkpoint_sequential(parts, 4, x, use_reentrant=self.reentrant))


class Layer(Block):
    """As transformers does it: what is checkpointed is the layer's own call."""

    checkpoint: Any = None

    def __call__(self, *args, **kwargs):
        if self.checkpoint is not None and self.training:
            return self.checkpoint(functools.partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Layers(Stack):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__(reentrant)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        for layer in self.blocks:
            layer.checkpoint = functools.partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)


class Borders(Stack):
    """Sizes, tuples and a shared weight cross the border; modes are switched inside."""

    def region(self, x, rows):
        with torch.no_grad():
            mean = x.mean()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.blocks[0].a(x)
        y = torch.tanh(y.float()).view(rows, 4, -1)
        if y.shape[0] > 1:
            y = y * 2
        y = y + F.linear(x, self.blocks[1].a.weight).view(y.shape)
        return torch.stack([y, y.exp()]).unbind(), y.shape[-1], y.sum(-1), mean

    def forward(self, x):
        x = self.first(x)
        pair, width, total, mean = calls(self.region, x, x.shape[0], reentrant=self.reentrant)
        y = (pair[0] + pair[1]).reshape(-1, 4 * width) + total.mean() + mean
        return self.last(F.linear(y, self.blocks[1].a.weight.T))


class Closure(Stack):
    """What the region uses beside its arguments has a gradient only where torch gives one."""

    def forward(self, x):
        y = self.first(x)
        z = calls(
            lambda a: torch.sin(a) * y.detach() + self.blocks[0].a.bias[0],
            y,
            reentrant=self.reentrant,
        )
        return self.last(z) + y.sum()


class Data(Stack):
    """The region is given nothing that needs a gradient."""

    def forward(self, x):
        y = calls(self.first, x, reentrant=self.reentrant)
        return self.last(y)


class Chosen(Stack):
    """The model's own contexts: the products are kept, the rest is computed again."""

    def forward(self, x):
        products = [torch.ops.aten.addmm.default]
        contexts = functools.partial(
            torch_checkpoint.create_selective_checkpoint_contexts, products
        )
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts, early_stop=False)
        return self.last(x)


CASES = [Stack, Nested, Sequential, Layers, Borders, Closure, Data]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


def trained(module: nn.Module, steps: int = 5) -> list[Any]:
    """Train and return all there is to compare: losses, gradients, weights, random numbers."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    seen: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = module(X[: 6 - step % 2]).square().mean()
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), torch.rand(2)]
        seen += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return seen + [p.detach().clone() for p in module.parameters()]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), place
        if a is not None:
            assert torch.equal(a, b), place


def twins(model: nn.Module) -> tuple[nn.Module, fxray.Xray]:
    return model, fxray.trace(copy.deepcopy(model), X)


# The same numbers


@both
def test_training_is_the_models_own(case: Callable[..., nn.Module], reentrant: bool) -> None:
    model, xray = twins(case(reentrant))
    assert count_regions(xray.graph_module.graph) > 0
    assert_same(trained(xray.rewrite()), trained(model))


@both
def test_and_so_it_is_when_everything_is_captured(
    case: Callable[..., nn.Module], reentrant: bool
) -> None:
    model, xray = twins(case(reentrant))
    xray.mark(lambda op: op.role != "input", output=True, grad=True, input=True, every=2)
    net = xray.rewrite()
    with contextlib.suppress(fxray.FxrayWarning), fxray.record(net) as recorder:
        ours = trained(net)
    assert_same(ours, trained(model))
    run = recorder.run
    for path in run.architecture.returns[""]:
        assert run[path].output.steps.tolist() == [0, 2, 4]


@both
def test_evaluation_is_the_models_own(case: Callable[..., nn.Module], reentrant: bool) -> None:
    model, xray = twins(case(reentrant))
    net = xray.rewrite()
    for module in (model, net):
        module.eval()
    with torch.no_grad():
        assert torch.equal(net(X), model(X))
    assert torch.equal(net(X), model(X))


def test_a_reentrant_region_without_inputs_that_need_a_gradient_gives_none() -> None:
    _, xray = twins(Data(reentrant=True))
    net = xray.rewrite()
    net(X).sum().backward()
    assert net.first.weight.grad is None
    assert net.last.weight.grad is not None


def test_contexts_of_the_models_own_are_kept() -> None:
    model, xray = twins(Chosen(reentrant=False))
    net = xray.rewrite()
    assert_same(trained(net), trained(model))
    assert_same(trained(copy.deepcopy(net)), trained(copy.deepcopy(model)))


@both
def test_copies_keep_their_regions(reentrant: bool) -> None:
    model, xray = twins(Nested(reentrant))
    net = xray.rewrite()
    expected = trained(model)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert count_regions(again.graph) == count_regions(net.graph) == 4
        assert "region_1_1" in again.code
        assert_same(trained(again), expected)


@both
def test_a_backward_after_other_forwards(reentrant: bool) -> None:
    model, xray = twins(Stack(reentrant))
    net = xray.rewrite()
    for module in (model, net):
        torch.manual_seed(5)
        losses = [module(x).sum() for x in (X, X[:2], X[:5])]
        for loss in reversed(losses):
            loss.backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in model.parameters()])


def test_modes_are_as_before_when_a_recomputation_ends_half_way() -> None:
    class Ends(Stack):
        def region(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.blocks[0].a(x)  # the last that backward asks for

        def forward(self, x):
            return calls(self.region, self.first(x), reentrant=self.reentrant)

    _, xray = twins(Ends(reentrant=False))
    net = xray.rewrite()
    net(X).sum().backward()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


class Leaves(Stack):
    """A reentrant region whose results leave it otherwise than as returned tensors."""

    def region(self, x):
        y = self.blocks[0](x)
        return {"y": y, "rows": y.shape[0]}

    def forward(self, x):
        x = self.first(x)
        found = calls(self.region, x, reentrant=self.reentrant)
        return self.last(found["y"] * found["rows"] + x)


@both
def test_what_is_returned_in_a_dict_has_a_gradient_where_the_models_has(reentrant: bool) -> None:
    model, xray = twins(Leaves(reentrant))
    net = xray.rewrite()
    assert_same(trained(net), trained(model))
    assert (net.blocks[0].a.weight.grad is None) == reentrant


# The graph


@both
def test_the_ops_of_a_region_are_ops_like_all_others(reentrant: bool) -> None:
    model, plain = Stack(reentrant), Stack(None)
    xray, without = fxray.trace(model, X), fxray.trace(plain, X)
    assert list(xray.architecture) == list(without.architecture)
    assert {"blocks.0.a", "blocks.0.gelu", "blocks.0.add"} <= set(xray.architecture)
    assert set(xray.architecture.graph.edges) == set(without.architecture.graph.edges)
    assert "bit-equal, gradients equal" in str(xray.report)
    assert count_regions(xray.graph_module.graph) == 3
    code = xray.rewrite().code
    assert code.count("checkpointed(region_") == 3


def test_nothing_of_torch_stays_replaced() -> None:
    before = vars(torch_checkpoint).copy()
    fxray.trace(Stack(reentrant=False), X)

    class Fails(Stack):
        def region(self, x):
            msg = "mine"
            raise ValueError(msg)

        def forward(self, x):
            return calls(self.region, x, reentrant=self.reentrant)

    for reentrant in MODES:
        with pytest.raises(fxray.TraceError, match="mine"):
            fxray.trace(Fails(reentrant), X)
    assert vars(torch_checkpoint) == before


def test_an_error_inside_a_region_that_the_model_catches() -> None:
    class Tries(Stack):
        def region(self, x):
            y = self.blocks[0](x)
            raise ArithmeticError(y.shape[0])

        def forward(self, x):
            x = self.first(x)
            try:
                return self.last(calls(self.region, x, reentrant=self.reentrant))
            except ArithmeticError:
                return self.last(calls(self.blocks[1], x, reentrant=self.reentrant))

    for reentrant in MODES:
        model, xray = twins(Tries(reentrant))
        assert_same(trained(xray.rewrite()), trained(model))


def test_the_lines_of_graphs_nobody_holds_are_forgotten() -> None:
    def lines() -> int:
        gc.collect()
        return sum(name.startswith("<fxray graph") for name in linecache.cache)

    xray = fxray.trace(Nested(reentrant=False), X)
    net = xray.rewrite()
    before = lines()
    for every in range(1, 6):
        xray.mark("last", output=True, every=every)
        net(X)
        xray.rewrite()
    assert lines() == before
    del net, xray
    assert lines() < before


@both
def test_a_symbolic_trace_keeps_regions_too(reentrant: bool) -> None:
    model = Stack(reentrant)
    xray = fxray.trace(copy.deepcopy(model))
    assert count_regions(xray.graph_module.graph) == 3
    assert_same(trained(xray.rewrite()), trained(model))


# Captures


@both
@pytest.mark.parametrize("make", [Stack, Nested], ids=["one level", "nested"])
def test_captures_are_what_hooks_see_without_checkpoints_once_a_step(
    make: Callable[..., nn.Module], reentrant: bool
) -> None:
    model = make(reentrant)
    plain = copy.deepcopy(model)
    plain.reentrant = None
    seen: dict[str, list[Any]] = {}
    names = [f"blocks.{n}.{part}" for n in (1, 2) for part in ("norm", "a", "b", "drop")]
    for name in names:

        def note(_: Any, __: Any, out: torch.Tensor, name: str = name) -> None:
            seen.setdefault(name, []).append(out.detach().clone())
            out.register_hook(lambda g: seen.setdefault(f"{name}.grad", []).append(g.clone()))

        plain.get_submodule(name).register_forward_hook(note)
    trained(plain, 3)

    xray = fxray.trace(model, X)
    xray.draft.clear()
    xray.mark(names, output=True, grad=True, selection=fxray.Whole())
    net = xray.rewrite()
    with fxray.record(net) as recorder:
        trained(net, 3)
    for name in names:
        kept = recorder.run[name]
        for series, hooked in ((kept.output, seen[name]), (kept.grad, seen[f"{name}.grad"])):
            assert series.steps.tolist() == [0, 1, 2]
            for (_, ours), theirs in zip(series, hooked, strict=True):
                assert torch.equal(torch.as_tensor(ours), theirs), name


# Memory


class Live(TorchDispatchMode):
    """Counts the bytes of what ops made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._made = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


def memory(module: nn.Module) -> Iterator[int]:
    """Yield the bytes kept from forward to backward, and the most at any time of the two."""
    x = X.repeat(64, 1)
    # Gradients are there before and after: a second step holds what all later ones do.
    module(x).sum().backward()
    with Live() as live:
        loss = module(x).square().mean()
        yield live.now
        loss.backward()
        yield live.peak


@both
@pytest.mark.parametrize("make", [Stack, Sequential, Layers, Nested])
def test_memory_is_the_models_own(make: Callable[..., nn.Module], reentrant: bool) -> None:
    model, xray = twins(make(reentrant))
    net = xray.rewrite()
    plain = copy.deepcopy(model) if make is not Sequential else Stack(None)
    plain.reentrant = None
    for layer in plain.modules():
        if isinstance(layer, Layer):
            layer.checkpoint = None
    (ours, our_peak), (theirs, their_peak), (most, highest) = map(memory, (net, model, plain))
    assert ours <= 1.2 * theirs
    assert our_peak <= 1.2 * their_peak
    assert ours < 0.5 * most
    assert our_peak < 0.9 * highest


# Other people's models


@pytest.mark.filterwarnings("ignore::FutureWarning")
@both
def test_transformers(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers.models.llama")
    try:
        causal = transformers.LlamaForCausalLM
    except ImportError as error:  # it imports torchvision, which may not fit this torch
        pytest.skip(str(error))
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, max_position_embeddings=16, use_cache=False,
        attention_dropout=0.1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = causal(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.randint(0, 32, (2, 8))
    twin = copy.deepcopy(model)
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    net = fxray.trace(twin, **given).rewrite()
    assert count_regions(net.graph) == 2
    for module in (model, net):
        torch.manual_seed(7)
        module(**given).loss.backward()
    assert_same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
