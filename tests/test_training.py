"""What people do in a training loop, recorded as plain hooks on the untouched model see it.

Most of it runs eagerly and under `torch.compile(fullgraph=True)`: eager bit for bit, compiled
as close as a compiled model is to itself.
"""

# To mypy a module's attribute is Tensor | Module, and a loop takes whatever can be called.
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxray
from fxray import Stats, Whole
from tests.loops import (
    Loop,
    Net,
    Noisy,
    Witness,
    assert_as_seen,
    assert_equal,
    assert_trained_alike,
    batch,
    called,
    check,
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


# ---------------------------------------------------------------- accumulation, clipping


def test_three_accumulated_forwards_are_three_steps_and_one_weight_gradient_at_the_last(way):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(6):
            (it.call(batch(step)).square().mean() / 3).backward()
            if step % 3 == 2:
                it.optimizer_uses()
                optimizer.step()
                optimizer.zero_grad()

    run, _ = check(loop, way)
    assert run["act"].output.steps.tolist() == [*range(6)]
    assert run["hidden"].weight_grad.steps.tolist() == [2, 5]


def test_micro_batches_in_a_step_are_its_calls_and_share_one_weight_gradient(way):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(2):
            with it.step():
                optimizer.zero_grad()
                for k in range(3):
                    it.call(batch(3 * step + k)).square().mean().backward()
                it.optimizer_uses()
                optimizer.step()

    run, _ = check(loop, way)
    rows = [(row.step, row.call) for row, _ in run["act"].grad]
    assert rows == [(step, call) for step in range(2) for call in range(3)]
    assert run["hidden"].weight_grad.steps.tolist() == [0, 1]


def test_every_tenth_step_with_accumulation_of_four(way):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(24):
            (it.call(batch(step)).square().mean() / 4).backward()
            if step % 4 == 3:
                it.optimizer_uses()
                optimizer.step()
                optimizer.zero_grad()

    run, witness = check(loop, way, every=10)
    assert run["act"].output.steps.tolist() == [0, 10, 20]
    assert run["act"].grad.steps.tolist() == [0, 10, 20]
    for step in (0, 10, 20):
        assert_equal(run["act"].grad[step], witness.seen["act", "grad"][step], way)
    # Due at 0, 10 and 20; of the optimizer's steps, the first one after each.
    assert run["hidden"].weight_grad.steps.tolist() == [3, 11, 23]
    for step in (3, 11, 23):
        used = witness.used["hidden.weight"][step // 4]
        assert_equal(run["hidden"].weight_grad[step], used, way)


def test_a_clipped_gradient_with_momentum_and_weight_decay_is_the_clipped_one(way):
    def loop(it):
        optimizer = sgd(it.model, momentum=0.9, weight_decay=0.1, nesterov=True)
        for step in range(3):
            it.call(batch(step)).square().sum().backward()
            norm = nn.utils.clip_grad_norm_(it.model.parameters(), 0.5)
            assert norm > 0.5
            it.optimizer_uses()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    check(loop, way)


# ---------------------------------------------------------------- mixed precision

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_a_grad_scaler_the_weight_gradient_is_unscaled_and_none_of_a_skipped_step(
    way, optimizer
):
    scale, by_hand = 1024.0, []

    def loop(it):
        made = OPTIMIZERS[optimizer](it.model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(4):
            loss = it.call(batch(step)).square().mean()
            if it.call is it.model and step != 1:  # before the step, with no scaler about
                gradients = torch.autograd.grad(loss, [*it.model.parameters()], retain_graph=True)
                by_hand.append(gradients[0])
            made.zero_grad()
            scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            scaler.step(made)
            scaler.update()

    model = Net()
    twin = copy.deepcopy(model)
    net = marked(model, kinds=("weight_grad",)).rewrite()
    with fxray.record(net) as recorder:
        loop(Loop(called(net, way), model, None, None))
    loop(Loop(twin, twin, None, None))
    kept = recorder.run["hidden"].weight_grad
    assert kept.steps.tolist() == [0, 2, 3]
    for step, gradient in zip((0, 2, 3), by_hand, strict=True):
        assert_equal(kept[step], gradient, way)
    assert_trained_alike(model, twin, way)


def test_gradients_unscaled_to_be_clipped_are_kept_clipped(way):
    def loop(it):
        optimizer, scaler = sgd(it.model), torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(it.call(batch(step)).square().sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(it.model.parameters(), 0.5)
            it.optimizer_uses()
            scaler.step(optimizer)
            scaler.update()

    check(loop, way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast_every_tensor_is_kept_in_the_dtype_it_has(dtype, way):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(3):
            with torch.autocast("cpu", dtype):
                loss = it.call(batch(step)).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model = Net()
    twin = copy.deepcopy(model)
    net = marked(model).rewrite()
    with fxray.record(net) as recorder:
        loop(Loop(called(net, way), model, None, None))
    witness = Witness(twin)
    loop(Loop(twin, twin, None, None))
    name = str(dtype).removeprefix("torch.")
    for path in ("hidden", "act", "head"):
        for kind in ("output", "grad"):
            series = getattr(recorder.run[path], kind)
            assert series.steps.tolist() == [0, 1, 2]
            for step, seen in enumerate(witness.seen[path, kind]):
                assert seen.dtype == dtype
                assert series[step].dtype.name == name
                kept = torch.from_numpy(series[step].astype("float32"))
                if way == "eager":
                    assert torch.equal(kept, seen.float())
                else:  # as far apart as two orders of rounding to the dtype
                    torch.testing.assert_close(kept, seen.float(), rtol=0.02, atol=0.01)
    assert recorder.run["hidden"].weight_grad[0].dtype.name == "float32"


# ---------------------------------------------------------------- several models, several calls


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, z):
        return self.out(torch.tanh(self.up(z)))


def noise(seed):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(100 + seed))


def test_a_gan_records_each_of_its_models_with_its_own_calls_and_gradients(way):
    """A discriminator's gradients flow through the generator, which runs twice a step."""

    def train(calls, models, steps, uses):
        generate, judge = calls
        of_generator, of_judge = (torch.optim.Adam(m.parameters(), lr=0.01) for m in models)
        for step in range(3):
            with steps[0](), steps[1]():
                of_judge.zero_grad()
                fake = generate(noise(2 * step)).detach()
                real = judge(batch(step))
                loss = F.softplus(-real).mean() + F.softplus(judge(fake)).mean()
                loss.backward()
                uses[1]()
                of_judge.step()
                of_generator.zero_grad()
                F.softplus(-judge(generate(noise(2 * step + 1)))).mean().backward()
                uses[0]()
                of_generator.step()

    models = Generator(), Net()
    twins = copy.deepcopy(models)
    nets = marked(models[0], noise(0)).rewrite(), marked(models[1]).rewrite()
    calls = [called(net, way) for net in nets]
    with fxray.record(nets[0]) as first, fxray.record(nets[1]) as second:
        train(calls, nets, (first.step, second.step), (lambda: None,) * 2)
    witnesses = [Witness(twin) for twin in twins]
    uses = [witness.optimizer_uses for witness in witnesses]
    train(twins, twins, (contextlib.nullcontext,) * 2, uses)
    for model, twin in zip(models, twins, strict=True):
        assert_trained_alike(model, twin, way)
    # The call whose output was detached has no gradient, and no row of one.
    assert [(r.step, r.call) for r, _ in first.run["out"].grad] == [(0, 1), (1, 1), (2, 1)]
    assert [(r.step, r.call) for r, _ in first.run["out"].output] == [
        (step, call) for step in range(3) for call in range(2)
    ]
    assert [(r.step, r.call) for r, _ in second.run["head"].grad] == [
        (step, call) for step in range(3) for call in range(3)
    ]
    assert_as_seen(first.run, witnesses[0], way)
    assert_as_seen(second.run, witnesses[1], way)


def test_a_module_called_twice_before_one_backward_fills_two_rows_without_a_step(way):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(3):
            one, two = it.call(batch(step)), it.call(batch(step + 50))
            optimizer.zero_grad()
            (one.square().mean() + 3 * two.square().mean() + (one * two).mean()).backward()
            it.optimizer_uses()
            optimizer.step()

    run, _ = check(loop, way)
    assert run["act"].grad.steps.tolist() == [*range(6)]
    assert run["hidden"].weight_grad.steps.tolist() == [1, 3, 5]


def test_two_optimizers_with_their_own_rhythm_keep_what_each_used(way):
    def train(call, model, used):
        one = torch.optim.SGD(model.hidden.parameters(), lr=0.1)
        two = torch.optim.Adam(model.head.parameters(), lr=0.01)
        for step in range(4):
            call(batch(step)).square().mean().backward()
            used.setdefault("hidden", []).append(model.hidden.weight.grad.clone())
            one.step()
            one.zero_grad()
            if step % 2:
                used.setdefault("head", []).append(model.head.weight.grad.clone())
                two.step()
                two.zero_grad()

    model, used = Net(), {}
    twin = copy.deepcopy(model)
    net = marked(model, kinds=("weight_grad",)).rewrite()
    with fxray.record(net) as recorder:
        train(called(net, way), net, {})
    train(twin, twin, used)
    assert_trained_alike(model, twin, way)
    for path, steps in (("hidden", [0, 1, 2, 3]), ("head", [1, 3])):
        kept = recorder.run[path].weight_grad
        assert kept.steps.tolist() == steps
        for step, gradient in zip(steps, used[path], strict=True):
            assert_equal(kept[step], gradient, way)


# ---------------------------------------------------------------- frozen parts, eval passes


def test_parameters_unfrozen_in_the_middle_have_gradients_from_then_on(way):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(6):
            it.model.hidden.requires_grad_(2 <= step < 4)
            optimizer.zero_grad()
            it.call(batch(step)).square().mean().backward()
            it.optimizer_uses()
            optimizer.step()

    run, witness = check(loop, way)
    assert run["hidden"].output.steps.tolist() == [*range(6)]
    assert run["hidden"].grad.steps.tolist() == [2, 3]
    assert run["hidden"].weight_grad.steps.tolist() == [2, 3]
    assert run["head"].weight_grad.steps.tolist() == [*range(6)]
    assert [g is None for g in witness.used["hidden.weight"]] == [True] * 2 + [False] * 2 + [
        True
    ] * 2


def test_an_eval_pass_between_training_steps_has_its_own_rows_and_the_models_own_numbers(way):
    def train(call, model, seen):
        optimizer = sgd(model)
        for step in range(4):
            model.train()
            optimizer.zero_grad()
            call(batch(step)).square().mean().backward()
            optimizer.step()
            if step % 2:
                model.eval()
                with torch.no_grad():
                    for k in range(2):
                        seen.append(call(batch(10 * step + k, rows=3)).clone())

    model, ours, theirs = Noisy(), [], []
    twin = copy.deepcopy(model)
    net = marked(model, kinds=("output",)).rewrite()
    torch.manual_seed(3)
    with fxray.record(net) as recorder:
        train(called(net, way), net, ours)
    torch.manual_seed(3)
    train(twin, twin, theirs)
    assert_trained_alike(model, twin, way)
    head = recorder.run["head"].output
    assert head.in_phase("train").steps.tolist() == [0, 1, 2, 3]
    passed = [(row.step, row.call) for row, _ in head.in_phase("eval")]
    assert passed == [(2, 0), (2, 1), (4, 0), (4, 1)]
    for (_, kept), out, expected in zip(head.in_phase("eval"), ours, theirs, strict=True):
        assert_equal(out, expected, way)
        assert_equal(kept, expected, way)


def test_recording_with_no_training_at_all_counts_forwards_and_needs_no_optimizer(way):
    model = Noisy().eval()
    net = marked(model, kinds=("output",)).rewrite()
    call = called(net, way)
    with fxray.record(net) as recorder, torch.no_grad():
        for k in range(3):
            call(batch(k))
    for k in range(3):
        assert_equal(recorder.run["hidden"].output[k], model.hidden(batch(k)).detach(), way)
        assert_equal(recorder.run["head"].output[k], model(batch(k)).detach(), way)
    assert recorder.run.notes == ()


# ---------------------------------------------------------------- optimizers that call back


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_keeps_the_gradient_that_its_last_closure_left(way, line_search):
    """Every evaluation is a forward and so a step; after `step` the gradients are the last one's.

    That is where torch leaves them, and not always where the last update was made: without
    a line search LBFGS does not evaluate again after its last move, and with one the last
    point that was tried need not be the one taken.
    """
    evaluations = []

    def loop(it):
        optimizer = torch.optim.LBFGS(
            it.model.parameters(), lr=0.5, max_iter=3, line_search_fn=line_search
        )
        witness = it.call is it.model

        def closure():
            optimizer.zero_grad()
            loss = it.call(batch()).square().mean()
            loss.backward()
            if witness:
                evaluations[-1] += 1
            return loss

        for _ in range(3):
            if witness:
                evaluations.append(0)
            optimizer.step(closure)
            it.optimizer_uses()

    model = Net()
    twin = copy.deepcopy(model)
    net = marked(model).rewrite()
    with fxray.record(net) as recorder:
        loop(Loop(called(net, way), model, None, lambda: None))
    witness = Witness(twin)
    loop(Loop(twin, twin, None, witness.optimizer_uses))
    last = [sum(evaluations[: k + 1]) - 1 for k in range(3)]
    assert min(evaluations) > 1
    assert recorder.run["hidden"].weight_grad.steps.tolist() == last
    if way == "compiled":  # a line search is not stable under the rounding of a compiler
        return
    assert_trained_alike(model, twin, way)
    assert_as_seen(recorder.run, witness, way)


def test_sharpness_aware_steps_keep_the_second_gradient_the_one_that_was_used(way):
    first = []

    def loop(it):
        optimizer = sgd(it.model)
        for step in range(3):
            with it.step():
                it.call(batch(step)).square().mean().backward()
                if it.call is it.model:
                    first.append(it.model.hidden.weight.grad.clone())
                with torch.no_grad():
                    moves = [0.05 * p.grad / p.grad.norm() for p in it.model.parameters()]
                    for p, move in zip(it.model.parameters(), moves, strict=True):
                        p.add_(move)
                optimizer.zero_grad()
                it.call(batch(step)).square().mean().backward()
                with torch.no_grad():
                    for p, move in zip(it.model.parameters(), moves, strict=True):
                        p.sub_(move)
                it.optimizer_uses()
                optimizer.step()
                optimizer.zero_grad()

    run, _ = check(loop, way)
    assert [(r.step, r.call) for r, _ in run["act"].grad] == [
        (step, call) for step in range(3) for call in range(2)
    ]
    for step in range(3):
        assert not np.allclose(run["hidden"].weight_grad[step], first[step].numpy(), atol=1e-6)


# ---------------------------------------------------------------- to the bit


def all_marked(model, selection):
    """Keep whatever there is of every op; weights every third step."""
    xray = fxray.trace(model, batch())
    xray.draft.clear()
    for path, op in xray.architecture.items():
        if op.role != "input":
            xray.mark(path, output=True, grad=True, input=True, selection=selection)
    for path in ("hidden", "norm", "head"):
        xray.mark(path, weight=True, weight_grad=True, selection=selection, every=3)
    return xray.rewrite()


def trained(call, model, note=lambda **_: None):
    """Return the loss curve, what AdamW remembers, the random state, and the final weights."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    curve = []
    for step in range(20):
        loss = call(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note(loss=loss)
        curve.append(loss.detach())
    moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
    return [torch.stack(curve), *moments, torch.get_rng_state(), *model.state_dict().values()]


@pytest.mark.parametrize("selection", [Whole(), Stats()], ids=["Whole", "Stats"])
def test_twenty_steps_with_dropout_are_the_same_recorded_or_not(way, selection):
    """Eager: to the bit, as the untouched model's; compiled: as the same net's, not recorded."""
    model, bare, twin = Noisy(), Noisy(), Noisy()
    for other in (bare, twin):
        other.load_state_dict(model.state_dict())
    net = all_marked(model, selection)
    with fxray.record(net) as recorder:
        ours = trained(called(net, way), net, recorder.log)
    untouched = trained(twin, twin)
    theirs, apart = untouched, 0.0
    if way == "compiled":
        net, apart = all_marked(bare, selection), 1e-6
        theirs = trained(called(net, way), net)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=apart)
    torch.testing.assert_close(ours[0], untouched[0], rtol=1e-4, atol=1e-5)
    assert recorder.run["drop"].grad.steps.tolist() == [*range(20)]
    assert recorder.run["head"].weight_grad.steps.tolist() == [*range(0, 20, 3)]
    curve = [float(value) for _, value in recorder.run.log["loss"]]
    assert curve == pytest.approx(ours[0].tolist())


def test_the_autograd_graph_is_no_larger_while_recording():
    def nodes(loss):
        found, rest = set(), [loss.grad_fn]
        while rest:
            node = rest.pop()
            if node is not None and node not in found:
                found.add(node)
                rest += [following for following, _ in node.next_functions]
        return len(found)

    model = Noisy()
    net = marked(copy.deepcopy(model)).rewrite()
    with fxray.record(net):
        assert nodes(net(batch()).sum()) == nodes(model(batch()).sum())
        net(batch()).sum().backward()
        sgd(net).step()


# ---------------------------------------------------------------- shared weights, checkpoints


class Tied(nn.Module):
    """One weight, used three times, twice of them inside a region that is computed again."""

    def __init__(self, reentrant):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)
        self.second = nn.Linear(5, 5)
        self.last.weight, self.second.weight = self.embed.weight, self.first.weight
        self.reentrant = reentrant

    def region(self, h):
        return self.second(torch.tanh(self.first(h)))

    def forward(self, ids):
        h = self.embed(ids)
        if self.reentrant is not None:
            h = checkpoint(self.region, h, use_reentrant=self.reentrant)
        return self.last(h if self.reentrant is not None else self.region(h))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_a_weight_used_twice_in_a_checkpoint_has_one_gradient_a_step(way, reentrant):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(3):
            ids = torch.arange(6).reshape(2, 3) % (4 + step)
            optimizer.zero_grad()
            it.call(ids).square().mean().backward()
            it.optimizer_uses()
            optimizer.step()

    model, twin = Tied(reentrant), Tied(None)
    twin.load_state_dict(model.state_dict())
    net = marked(model, torch.zeros(2, 3, dtype=torch.long)).rewrite()
    with fxray.record(net) as recorder:
        loop(Loop(called(net, way), model, None, lambda: None))
    witness = Witness(twin)
    loop(Loop(twin, twin, None, witness.optimizer_uses))
    assert_trained_alike(model, twin, way)
    assert_as_seen(recorder.run, witness, way)
    for path, name in (("last", "embed"), ("second", "first")):  # the same gradient, by both names
        series = recorder.run[path].weight_grad
        assert series.steps.tolist() == [0, 1, 2]
        for step in range(3):
            assert_equal(series[step], witness.used[f"{name}.weight"][step], way)


# ---------------------------------------------------------------- what never came


class Forks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.sigmoid(self.a(x)) if self.training else torch.tanh(self.b(x))


def test_what_never_came_is_named_at_close_with_the_reason(way):
    xray = fxray.trace(Forks(), batch())
    xray.draft.clear()
    xray.mark("a", output=True, selection=Whole())
    xray.mark("a", weight_grad=True)
    xray.mark("b", output=True)
    xray.mark("sigmoid", output=True, steps=[100])
    xray.mark("sigmoid", grad=True)
    net = xray.rewrite()
    call = called(net, way)

    def recorded():
        with fxray.record(net) as recorder, torch.no_grad():
            call(batch())
            call(batch(1))
        return recorder

    with pytest.warns(fxray.FxrayWarning) as told:
        recorder = recorded()
    texts = [str(w.message) for w in told if issubclass(w.category, fxray.FxrayWarning)]
    assert len(texts) == 1
    for reason in (
        "output of b: not reached (it stands in the graph of eval mode)",
        "output of sigmoid: never due",
        "grad of sigmoid: no gradient came",
        "weight_grad of a: no optimizer",
    ):
        assert reason in texts[0]
        assert any(reason in note for note in recorder.run.notes)
    assert recorder.run["a"].output.steps.tolist() == [0, 1]


# ---------------------------------------------------------------- what ends half-way


class Trap(torch.autograd.Function):
    """Raises in the forward or in the backward, when it is set."""

    raises = {}  # noqa: RUF012 - set by the tests

    @staticmethod
    def forward(ctx, x):
        Trap.spring("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Trap.spring("backward")
        return gradient

    @staticmethod
    def spring(where):
        error = Trap.raises.pop(where, None)
        if error is not None:
            raise error


class OnTheWayError(Exception):
    pass


@torch.library.custom_op("fxray_tests::trap", mutates_args=())
def trap(x: torch.Tensor, where: str) -> torch.Tensor:
    """Do nothing, or raise; an op of its own, for a compiler runs no Python of a model's."""
    Trap.spring(where)
    return x.clone()


trap.register_fake(lambda x, where: x.clone())
trap.register_autograd(lambda _, gradient: (trap(gradient, "backward"), None))


class Trapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        h = self.act(self.hidden(x))
        h = trap(h, "forward") if torch.compiler.is_compiling() else Trap.apply(h)
        return self.head(h)


@pytest.mark.parametrize("error", [OnTheWayError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_ends_a_step_half_way_leaves_the_next_ones_and_the_training_in_order(
    way, where, error
):
    def loop(it):
        optimizer = sgd(it.model)
        for step in range(6):
            if step in (1, 4):
                Trap.raises[where] = error("on the way")
            try:
                loss = it.call(batch(step)).square().mean()
                optimizer.zero_grad()
                loss.backward()
            except error:
                assert step in (1, 4)
                continue
            it.optimizer_uses()
            optimizer.step()
        assert not Trap.raises

    model = Trapped()
    twin = copy.deepcopy(model)
    net = marked(model).rewrite()
    with fxray.record(net) as recorder:
        loop(Loop(called(net, way), model, None, lambda: None))
    witness = Witness(twin)
    loop(Loop(twin, twin, None, witness.optimizer_uses))
    assert_trained_alike(model, twin, way)
    run = recorder.run
    whole = [0, 2, 3, 5]
    assert run["hidden"].weight_grad.steps.tolist() == whole
    assert run["head"].output.steps.tolist() == (whole if where == "forward" else [*range(6)])
    assert run["hidden"].grad.steps.tolist() == whole
    for (path, kind), seen in witness.seen.items():
        # The hooks of what comes after the trap never met the forwards that it ended.
        steps = whole if len(seen) == len(whole) else range(6)
        expected = dict(zip(steps, seen, strict=True))
        rows = {row.step: value for row, value in getattr(run[path], kind)}
        assert {*whole} <= rows.keys() <= expected.keys()
        for step, value in rows.items():  # of the others, what was there before they ended
            assert_equal(value, expected[step], way, (path, kind, step))


class Interrupted:
    """A selection in which somebody presses Ctrl-C, at its third tensor."""

    def __init__(self):
        self.calls = 0

    def make_selection(self, tensor):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return tensor.mean()


def test_an_interrupt_in_a_selection_reaches_the_loop_and_recording_goes_on():
    model = Net()
    xray = marked(model, kinds=("output",))
    xray.mark("act", output=True, selection=Interrupted())
    net = xray.rewrite()
    optimizer, whole = sgd(net), []
    with fxray.record(net) as recorder:
        for step in range(5):
            try:
                loss = net(batch(step)).square().mean()
            except KeyboardInterrupt:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            whole.append(step)
    assert whole == [0, 1, 3, 4]
    assert recorder.run["head"].output.steps.tolist() == whole
    assert recorder.run["act"].output.steps.tolist() == whole
