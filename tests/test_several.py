"""Several modules in one run: a GAN against hooks on its untouched twin, names, errors, the reader."""

# To mypy a module's attribute is Tensor | Module, and wrong types are given here on purpose.
# mypy: ignore-errors

from __future__ import annotations

import collections
import copy
import itertools
import os
import warnings
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import nn

import fxray
import fxray.capture.recorder
from fxray.capture.node import receiver_of
from fxray.cli import main
from fxray.store.rows import MemoryWriter

STEPS = 4
KINDS = ("output", "grad", "weight", "weight_grad")
_numbers = itertools.count()


@pytest.fixture
def place() -> str:
    return f"memory://several-{next(_numbers)}"


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, z):
        return torch.tanh(self.head(F.relu(self.norm(self.conv1(z)))))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2))
        self.conv1 = nn.Linear(8, 1)

    def forward(self, x):
        return self.conv1(self.body(x)).squeeze(1)


@attrs.frozen(eq=False)
class Gan:
    """Both models of a GAN, and an optimizer for each."""

    generator: Any
    discriminator: Any
    generator_step: torch.optim.Optimizer
    discriminator_step: torch.optim.Optimizer

    @classmethod
    def of(cls, generator: Any, discriminator: Any) -> Gan:
        return cls(
            generator,
            discriminator,
            torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9)),
            torch.optim.SGD(discriminator.parameters(), lr=0.05, momentum=0.9),
        )

    def train(self, numbers: torch.Tensor, *, discriminate: bool = True) -> dict[str, Any]:
        """Run one step: the generator twice, the discriminator three times.

        The generator's loss leaves gradients on the discriminator, which its own optimizer
        is not to use; they are zeroed before its next step.
        """
        real, noise, more = numbers[:, :4], numbers[:, 4:7], numbers[:, 7:]
        self.discriminator_step.zero_grad()
        loss = F.softplus(-self.discriminator(real)).mean()
        fake = self.generator(noise)
        loss = loss + F.softplus(self.discriminator(fake.detach())).mean()
        loss.backward()
        if discriminate:
            self.discriminator_step.step()
        self.generator_step.zero_grad()
        fooled = F.softplus(-self.discriminator(self.generator(more))).mean()
        fooled.backward()
        self.generator_step.step()
        return {"real": loss.detach(), "fooled": fooled.detach()}


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(step))


class Hooks:
    """Plain torch hooks on every leaf module of both models: what came in every step and call."""

    def __init__(self, gan: Gan) -> None:
        self.seen: dict[tuple[str, str], dict[tuple[int, int], Any]] = collections.defaultdict(dict)
        self._at = (-1, 0)
        models = {"generator": gan.generator, "discriminator": gan.discriminator}
        for name, model in models.items():
            model.register_forward_pre_hook(self._counted)
            for path, module in model.named_modules():
                if not list(module.children()):
                    module.register_forward_hook(self._forward(f"{name}.{path}"))
        # The discriminator's steps first: what they used is the first of its step.
        for call, name in enumerate(("discriminator", "generator")):
            optimizer = getattr(gan, f"{name}_step")
            optimizer.register_step_pre_hook(self._used(name, models[name], call))

    def begin(self, step: int) -> None:
        self._at = (step, -1)

    def _counted(self, *_: Any) -> None:
        self._at = (self._at[0], self._at[1] + 1)

    def _forward(self, op: str) -> Any:
        def note(module: nn.Module, _given: Any, out: torch.Tensor) -> None:
            at = self._at
            self.seen[op, "output"][at] = out.detach().clone().numpy()
            if hasattr(module, "weight"):
                self.seen[op, "weight"][at] = module.weight.detach().clone().numpy()
            if out.requires_grad:

                def keep(grad: torch.Tensor) -> None:
                    self.seen[op, "grad"][at] = grad.clone().numpy()

                out.register_hook(keep)

        return note

    def _used(self, name: str, model: nn.Module, call: int) -> Any:
        def note(*_: Any) -> None:
            for path, module in model.named_modules():
                if isinstance(getattr(module, "weight", None), nn.Parameter):
                    used = module.weight.grad.clone().numpy()
                    self.seen[f"{name}.{path}", "weight_grad"][self._at[0], call] = used

        return note


def xrays(gan: Gan, **marks: Any) -> tuple[fxray.Xray, fxray.Xray]:
    found = (
        fxray.trace(gan.generator, batch(0)[:, 4:7]),
        fxray.trace(gan.discriminator, batch(0)[:, :4]),
    )
    for xray in found:
        xray.draft.clear()
        words = marks or dict.fromkeys(KINDS, True)
        xray.mark(lambda op: op.role != "input", selection=fxray.Whole(), **words)
    return found


def untrained() -> Gan:
    return Gan.of(Generator(), Discriminator())


def twin_of(gan: Gan) -> Gan:
    return Gan.of(copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator))


def rewritten(gan: Gan, **marks: Any) -> dict[str, Any]:
    names = ("generator", "discriminator")
    return {name: xray.rewrite() for name, xray in zip(names, xrays(gan, **marks), strict=True)}


def kept(run: fxray.Run, op: str, kind: str) -> dict[tuple[int, int], Any]:
    series = getattr(run[op], kind)
    return {(row.step, row.call): record for row, record in series}


def same_parameters(one: Gan, two: Gan) -> bool:
    return all(
        torch.equal(a, b)
        for which in ("generator", "discriminator")
        for a, b in zip(
            getattr(one, which).state_dict().values(),
            getattr(two, which).state_dict().values(),
            strict=True,
        )
    )


def assert_unique(run: fxray.Run) -> None:
    """Fail unless (phase, step, call) names one row of every stream."""
    for name, stream in run._stored.streams.items():
        coords = [stream.coords[key].tolist() for key in ("phase", "step", "call")]
        rows = list(zip(*coords, strict=True))
        assert len(set(rows)) == len(rows), name


# ---------------------------------------------------------------- a GAN


@pytest.mark.parametrize("every", [1, 2])
def test_a_gan_keeps_what_hooks_on_its_twin_see(place: str, every: int) -> None:
    gan = untrained()
    twin = twin_of(gan)
    nets = rewritten(gan, **dict.fromkeys(KINDS, True), every=every)
    ours = Gan.of(**nets)
    with fxray.record(nets, place) as recorder:
        for step in range(STEPS):
            with recorder.step():
                recorder.log(**ours.train(batch(step)))
    hooks = Hooks(twin)
    losses = []
    for step in range(STEPS):
        hooks.begin(step)
        losses.append(twin.train(batch(step))["fooled"].item())
    assert same_parameters(gan, twin)
    run = fxray.open(place)
    assert {op for op, _ in hooks.seen} <= set(run.architecture)
    for (op, kind), seen in hooks.seen.items():
        expected = {at: array for at, array in seen.items() if at[0] % every == 0}
        found = kept(run, op, kind)
        assert found.keys() == expected.keys(), (op, kind)
        for at, array in expected.items():
            assert np.array_equal(found[at], array), (op, kind, at)
    assert_unique(run)
    assert run.log["fooled"].to_numpy().tolist() == losses
    assert run.notes == ()


def test_the_gradients_of_another_s_loss_are_not_those_an_optimizer_used(place: str) -> None:
    gan = untrained()
    twin = twin_of(gan)
    nets = rewritten(gan)
    ours, hooks = Gan.of(**nets), Hooks(twin)
    with fxray.record(nets, place) as recorder:
        for step in range(STEPS):
            with recorder.step():
                ours.train(batch(step), discriminate=step == 2)
            hooks.begin(step)
            twin.train(batch(step), discriminate=step == 2)
    found = kept(fxray.open(place), "discriminator.conv1", "weight_grad")
    assert list(found) == [(2, 0)]
    assert np.array_equal(found[2, 0], hooks.seen["discriminator.conv1", "weight_grad"][2, 0])
    assert len(kept(fxray.open(place), "generator.conv1", "weight_grad")) == STEPS


def test_an_optimizer_that_steps_twice_in_a_step_has_two_rows(place: str) -> None:
    gan = untrained()
    nets = rewritten(gan, weight_grad=True, every=2)
    optimizer, seen = torch.optim.SGD(gan.discriminator.parameters(), lr=0.1), []
    with fxray.record(nets["discriminator"], place) as recorder:
        for step in range(3):
            with recorder.step():
                for part in (0, 3):
                    optimizer.zero_grad()
                    nets["discriminator"](batch(step)[part : part + 3, :4]).sum().backward()
                    seen.append(gan.discriminator.conv1.weight.grad.clone().numpy())
                    optimizer.step()
                nets["discriminator"](batch(step)[:, :4]).mean().backward()
    found = kept(fxray.open(place), "conv1", "weight_grad")
    assert list(found) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for (step, call), record in found.items():
        assert np.array_equal(record, seen[2 * step + call])


def test_a_discriminator_frozen_for_the_generator_s_loss_keeps_its_rows(place: str) -> None:
    gan = untrained()
    nets = rewritten(gan)
    optimizer = torch.optim.SGD(gan.generator.parameters(), lr=0.1)
    gan.discriminator.requires_grad_(False)  # noqa: FBT003 - torch's own word
    seen = []
    recorder = fxray.record(nets, place)
    for step in range(2):
        with recorder.step():
            fake = nets["generator"](batch(step)[:, 4:7])
            fake.register_hook(lambda grad: seen.append(grad.clone().numpy()))
            nets["discriminator"](fake).sum().backward()
            optimizer.step()
    with pytest.warns(fxray.FxrayWarning, match="weight_grad of discriminator"):
        recorder.close()
    run = fxray.open(place)
    for step in range(2):
        assert np.array_equal(run["generator.tanh"].grad[step], seen[step])
        assert np.array_equal(run["discriminator.squeeze"].grad[step], np.ones(6, np.float32))


def test_one_optimizer_over_both_gives_each_module_its_own(place: str) -> None:
    gan = untrained()
    nets = rewritten(gan)
    both = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    optimizer = torch.optim.SGD(both, lr=0.1)
    seen = []
    with fxray.record(nets, place) as recorder:
        for step in range(2):
            with recorder.step():
                nets["discriminator"](nets["generator"](batch(step)[:, 4:7])).sum().backward()
                seen.append(
                    [m.conv1.weight.grad.clone() for m in (gan.generator, gan.discriminator)]
                )
                optimizer.step()
                optimizer.zero_grad()
    run = fxray.open(place)
    for step, (first, second) in enumerate(seen):
        assert np.array_equal(run["generator.conv1"].weight_grad[step], first.numpy())
        assert np.array_equal(run["discriminator.conv1"].weight_grad[step], second.numpy())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*"
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_compiled_gan_keeps_what_hooks_on_its_twin_see(place: str, every: int) -> None:
    torch._dynamo.reset()
    gan = untrained()
    twin = twin_of(gan)
    compiled = {
        name: torch.compile(net, backend="aot_eager", fullgraph=True)
        for name, net in rewritten(gan, **dict.fromkeys(KINDS, True), every=every).items()
    }
    ours, hooks = Gan.of(**compiled), Hooks(twin)
    with fxray.record(compiled, place) as recorder:
        for step in range(STEPS):
            with recorder.step():
                ours.train(batch(step))
            hooks.begin(step)
            twin.train(batch(step))
    run = fxray.open(place)
    for (op, kind), seen in hooks.seen.items():
        expected = {at: array for at, array in seen.items() if at[0] % every == 0}
        found = kept(run, op, kind)
        assert found.keys() == expected.keys(), (op, kind)
        for at, array in expected.items():
            np.testing.assert_allclose(found[at], array, rtol=1e-4, atol=1e-6)
    assert_unique(run)
    assert run.notes == ()
    torch._dynamo.reset()


# ---------------------------------------------------------------- steps


def test_without_help_every_forward_of_either_is_a_step(place: str) -> None:
    gan = untrained()
    ours = Gan.of(**(nets := rewritten(gan, output=True, grad=True)))
    with fxray.record(nets, place):
        for step in range(2):
            ours.train(batch(step))
    run = fxray.open(place)
    assert list(kept(run, "discriminator.conv1", "output")) == [(n, 0) for n in (0, 2, 4, 5, 7, 9)]
    assert list(kept(run, "generator.conv1", "output")) == [(n, 0) for n in (1, 3, 6, 8)]
    assert_unique(run)


def test_a_row_waits_for_its_gradient_while_others_run(place: str) -> None:
    gan = untrained()
    nets = rewritten(gan, output=True, grad=True)
    with fxray.record(nets, place):
        score = nets["discriminator"](batch(0)[:, :4])
        for step in range(5):
            nets["generator"](batch(step)[:, 4:7]).sum().backward()
        (score + 2 * nets["discriminator"](batch(1)[:, :4])).sum().backward()
    run = fxray.open(place)
    assert list(kept(run, "discriminator.squeeze", "grad")) == [(0, 0), (6, 0)]
    assert np.array_equal(run["discriminator.squeeze"].grad[0], np.ones(6, np.float32))
    assert np.array_equal(run["discriminator.squeeze"].grad[6], np.full(6, 2, np.float32))
    assert list(kept(run, "generator.tanh", "grad")) == [(n, 0) for n in range(1, 6)]
    assert run.notes == ()


def test_epochs_phases_and_logs_are_those_of_one_run(place: str) -> None:
    gan = untrained()
    ours = Gan.of(**(nets := rewritten(gan, output=True)))
    with fxray.record(nets, place) as recorder:
        for _ in range(2):
            for numbers in recorder.epoch([batch(0), batch(1)]):
                with recorder.step():
                    recorder.log(**ours.train(numbers))
            with torch.no_grad():
                for numbers in recorder.phase("valid", [batch(2)]):
                    nets["discriminator"](nets["generator"](numbers[:, 4:7]))
    run = fxray.open(place)
    series = run["generator.conv1"].output.in_phase("train")
    assert (series.steps.tolist(), series.epochs.tolist(), series.batches.tolist()) == (
        [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1])  # fmt: skip
    for op in ("generator.conv1", "discriminator.conv1"):
        valid = run[op].output.in_phase("valid")
        assert (valid.steps.tolist(), valid.epochs.tolist()) == ([2, 4], [0, 1])
    assert run.log["real"].steps.tolist() == [0, 1, 2, 3]
    assert_unique(run)


def test_a_module_in_eval_mode_beside_one_that_trains_is_of_another_phase(place: str) -> None:
    nets = rewritten(untrained(), output=True)
    nets["discriminator"].eval()
    with fxray.record(nets, place) as recorder:
        for step in range(3):
            with recorder.step():
                nets["discriminator"](nets["generator"](batch(step)[:, 4:7]))
    run = fxray.open(place)
    assert set(run["generator.conv1"].output.phases) == {"train"}
    assert set(run["discriminator.conv1"].output.phases) == {"eval"}
    assert_unique(run)


# ---------------------------------------------------------------- who records what


def test_a_module_that_was_never_called_is_named_at_close(place: str) -> None:
    nets = rewritten(untrained(), output=True)
    recorder = fxray.record(nets, place)
    nets["discriminator"](batch(0)[:, :4])
    with pytest.warns(fxray.FxrayWarning, match="'generator' was never called while recording"):
        recorder.close()
    run = fxray.open(place)
    (note,) = run.notes
    assert "generator.conv1" in note
    assert "discriminator" not in note
    with pytest.raises(fxray.NotSavedError, match="'generator' was never called"):
        _ = run["generator.conv1"].output


def test_what_is_never_due_between_the_forwards_of_others_says_what_helps(place: str) -> None:
    nets = rewritten(untrained(), output=True, every=2)
    recorder = fxray.record(nets, place)
    for step in range(4):
        nets["discriminator"](nets["generator"](batch(step)[:, 4:7]))
    with pytest.warns(fxray.FxrayWarning, match=r"discriminator\.conv1.*recorder\.step\(\)"):
        recorder.close()
    assert fxray.open(place)["generator.conv1"].output.steps.tolist() == [0, 2, 4, 6]


def test_a_copy_of_one_of_them_records_nothing(place: str) -> None:
    gan = untrained()
    ours = Gan.of(**(nets := rewritten(gan)))
    with fxray.record(nets, place) as recorder:
        average = copy.deepcopy(nets["generator"])
        for step in range(2):
            with recorder.step():
                ours.train(batch(step))
                average(batch(step)[:, 4:7]).sum().backward()
            with torch.no_grad():
                for mean, new in zip(average.parameters(), gan.generator.parameters(), strict=True):
                    mean.lerp_(new, 0.5)
    run = fxray.open(place)
    assert list(kept(run, "generator.conv1", "output")) == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert run.notes == ()


def test_whatever_wraps_a_module_is_found_by_its_name(place: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    nets = rewritten(untrained(), output=True)
    wrapped = {name: Wrapper(net) for name, net in nets.items()}
    with fxray.record(wrapped, place):
        nets["discriminator"](nets["generator"](batch(0)[:, 4:7]))
    assert fxray.open(place)["generator"].output.steps.tolist() == [0]


def test_an_error_of_the_store_stops_the_recording_of_all_and_not_the_training(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gan = untrained()
    twin = twin_of(gan)
    ours = Gan.of(**(nets := rewritten(gan)))
    append, rows = MemoryWriter.append, itertools.count()

    def failing(self: Any, *args: Any) -> None:
        if next(rows) == 12:
            msg = "No space left on device"
            raise OSError(28, msg)
        append(self, *args)

    monkeypatch.setattr(MemoryWriter, "append", failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorder = fxray.record(nets, place)
        for step in range(STEPS):
            with recorder.step():
                ours.train(batch(step))
            twin.train(batch(step))
        assert all(receiver_of(net.handle) is None for net in nets.values())
        with pytest.raises(fxray.StoreError, match="No space left"):
            recorder.close()
    assert len([w for w in told if issubclass(w.category, fxray.FxrayWarning)]) == 1
    assert next(rows) == 13
    assert same_parameters(gan, twin)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name", ["", "a.b", "a/b", "a b", "1st", "..", "generator@1", 0, None], ids=repr
)
def test_a_name_that_no_path_can_begin_with_is_refused(place: str, name: Any) -> None:
    nets = rewritten(untrained(), output=True)
    with pytest.raises(fxray.RecordError, match="no name for a module"):
        fxray.record({name: nets["generator"]}, place)
    assert receiver_of(nets["generator"].handle) is None


def test_no_module_at_all_is_refused(place: str) -> None:
    with pytest.raises(fxray.RecordError, match="the dict is empty"):
        fxray.record({}, place)


def test_what_is_no_rewritten_module_is_named(place: str) -> None:
    nets = rewritten(untrained(), output=True)
    with pytest.raises(fxray.RecordError, match=r"'discriminator': Discriminator holds no capture"):
        fxray.record({**nets, "discriminator": Discriminator()}, place)
    assert receiver_of(nets["generator"].handle) is None


def test_a_module_given_twice_is_refused_wrapped_or_not(place: str) -> None:
    net = rewritten(untrained(), output=True)["generator"]
    for again in (net, nn.ModuleList([net])):
        with pytest.raises(fxray.RecordError, match="'one' and 'two' are one module"):
            fxray.record({"one": net, "two": again}, place)


def test_what_holds_several_says_how_to_name_them(place: str) -> None:
    both = nn.ModuleDict(rewritten(untrained(), output=True))
    with pytest.raises(fxray.RecordError, match=r'fxray\.record\(\{"generator": g'):
        fxray.record(both, place)


def test_two_recorders_on_one_module_are_refused_inside_a_dict_too(place: str) -> None:
    nets = rewritten(untrained(), output=True)
    with fxray.record(nets["discriminator"], place) as first:
        with pytest.raises(fxray.RecordError, match="'discriminator' is being recorded already"):
            fxray.record(nets, place)
        assert receiver_of(nets["generator"].handle) is None
        nets["generator"](batch(0)[:, 4:7])
        nets["discriminator"](batch(0)[:, :4])
    assert [run.id for run in fxray.runs(place)] == [first.id]
    with fxray.record(nets, place):
        for net in nets.values():
            with pytest.raises(fxray.RecordError, match="this module is being recorded already"):
                fxray.record(net, place)
        nets["discriminator"](nets["generator"](batch(0)[:, 4:7]))
    assert all(receiver_of(net.handle) is None for net in nets.values())


def test_an_error_half_way_through_connecting_leaves_all_free(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = rewritten(untrained(), output=True)
    connect = fxray.capture.recorder.connect

    def failing(handle: int, receiver: Any) -> None:
        if handle == nets["discriminator"].handle:
            msg = "not this one"
            raise RuntimeError(msg)
        connect(handle, receiver)

    monkeypatch.setattr(fxray.capture.recorder, "connect", failing)
    with pytest.raises(RuntimeError, match="not this one"):
        fxray.record(nets, place)
    assert all(receiver_of(net.handle) is None for net in nets.values())
    monkeypatch.undo()
    with fxray.record(nets, place):
        nets["discriminator"](nets["generator"](batch(0)[:, 4:7]))


# ---------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return a place on disk, and what the discriminator made of the generator at each step."""
    place = tmp_path_factory.mktemp("several") / "runs"
    torch.manual_seed(0)
    nets, scores = rewritten(untrained()), []
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets.values()]
    with fxray.record(nets, place, name="pair") as recorder:
        for step in range(3):
            with recorder.step():
                score = nets["discriminator"](nets["generator"](batch(step)[:, 4:7]))
                score.sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            scores.append(score.detach().numpy())
            recorder.log(loss=score.sum())
    return place, scores


def test_ops_and_modules_are_found_beneath_the_names(recorded: Any) -> None:
    place, scores = recorded
    run = fxray.open(place)
    for step, score in enumerate(scores):
        assert np.array_equal(run["discriminator"].output[step], score)
        assert np.array_equal(run["discriminator.squeeze-0"].output[step], score)
    assert run["generator.linear-0"].name == "generator.conv1"
    assert run["discriminator.body"].parameter("0.weight").steps.tolist() == [0, 1, 2]
    assert run["generator"].parameter_grad("head.bias").steps.tolist() == [0, 1, 2]
    with pytest.raises(fxray.UnknownNameError, match=r"generator\.conv1', 'discriminator\.conv1"):
        _ = run["conv1"]


def test_the_graph_is_one_of_both_with_no_edge_between(recorded: Any) -> None:
    run = fxray.open(recorded[0])
    both, gan = run.architecture, untrained()
    for name, xray in zip(("generator", "discriminator"), xrays(gan), strict=True):
        alone = xray.architecture
        assert [op for op in both if op.startswith(f"{name}.")] == [f"{name}.{op}" for op in alone]
        assert both.beneath(name) == tuple(f"{name}.{op}" for op in alone)
        assert {(u, v) for u, v in both.graph.edges if u.startswith(f"{name}.")} == {
            (f"{name}.{u}", f"{name}.{v}") for u, v in alone.graph.edges
        }
        assert run.attributes["model"]["modules"][name]["fingerprint"] == alone.fingerprint
    parameters = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    assert both.parameter_count == sum(p.numel() for p in parameters)
    assert len({op.key for op in both.values()}) == len(both)


def test_a_run_of_several_is_narrowed_counted_and_printed(recorded: Any) -> None:
    run = fxray.open(recorded[0])
    for pattern in ("generator.*", "generator"):
        narrow = run.where(op=pattern)
        assert {row.op.partition(".")[0] for row in narrow.captures()} == {"generator"}
    assert {row.op.partition(".")[0] for row in run.captures()} == {"generator", "discriminator"}
    assert {row.records for row in run.captures()} == {3}
    assert "discriminator.body.0" in str(run)
    assert "model generator: Generator, discriminator: Discriminator" in str(run)
    at_step = run.at(1)
    assert np.array_equal(at_step["discriminator.squeeze"]["output"], recorded[1][1])
    assert {"output", "grad", "weight", "weight.bias", "weight_grad"} < set(
        at_step["generator.conv1"]
    )


def test_streams_are_named_after_the_module_and_read_without_fxray(recorded: Any) -> None:
    place, scores = recorded
    group = zarr.open_group(place, mode="r")[fxray.open(place).id]
    stream = group["discriminator.train.forward.always.r0"]
    assert stream.attrs["module"] == "discriminator"
    assert stream["discriminator.squeeze.output"].attrs["op"] == "discriminator.squeeze"
    assert np.array_equal(stream["discriminator.squeeze.output"][:], np.stack(scores))
    tree = fxray.open(place).to_xarray()
    moments = ("forward", "backward", "optimizer")
    names = {f"{m}.train.{t}.always.r0" for m in ("generator", "discriminator") for t in moments}
    assert set(tree.children) == names | {"log.r0"}
    node = tree["discriminator.train.forward.always.r0"]
    assert np.array_equal(node["discriminator.squeeze.output"].values, np.stack(scores))


def test_a_single_module_s_streams_are_named_as_ever(tmp_path: Any) -> None:
    net = rewritten(untrained(), output=True)["generator"]
    with fxray.record(net, tmp_path / "runs") as recorder:
        net(batch(0)[:, 4:7])
    group = zarr.open_group(tmp_path / "runs", mode="r")[recorder.id]
    assert "module" not in group["train.forward.always.r0"].attrs
    assert "modules" not in fxray.open(tmp_path / "runs").attributes["model"]


def test_a_single_module_may_have_a_name_too_and_be_called_log(tmp_path: Any) -> None:
    net = rewritten(untrained(), output=True)["generator"]
    with fxray.record({"log": net}, tmp_path / "runs") as recorder:
        out = net(batch(0)[:, 4:7])
        recorder.log(loss=1.5)
    run = fxray.open(tmp_path / "runs")
    assert np.array_equal(run["log"].output[0], out.detach().numpy())
    assert list(run.log) == ["loss"]


def test_the_command_shows_plots_and_draws_a_run_of_several(
    recorded: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = os.fspath(recorded[0])
    shown = (
        (["show", place], "discriminator.squeeze"),
        (["show", place, "generator.conv1"], "generator.conv1 weight: 3 records"),
        (["show", place, "--step", "1"], "generator.norm"),
        (["show", place, "discriminator.conv1", "--kind", "grad", "--step", "1"], "at step 1"),
        (["runs", place], "generator: Generator, discriminator: Discriminator"),
    )
    for words, expected in shown:
        assert main(words) == 0
        assert expected in capsys.readouterr().out
    picture = tmp_path / "weight.png"
    words = ["plot", place, "generator.conv1", "--kind", "weight", "-o", os.fspath(picture)]
    assert main(words) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["render", place, "-o", os.fspath(tmp_path / "graph.dot")]) == 0
    drawn = (tmp_path / "graph.dot").read_text(encoding="utf-8")
    clusters = [line for line in drawn.splitlines() if "tooltip" in line and "generator · " in line]
    assert any("generator · Generator" in line for line in clusters)
    assert "discriminator · Discriminator" in drawn
    # Each model is drawn in a frame of its own, its input too.
    assert drawn.count("subgraph") == 3


def test_a_model_that_grows_is_told_beside_the_others(place: str) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.more = nn.Linear(3, 3), False

        def forward(self, x):
            return torch.sigmoid(self.fc(x)) if self.more else self.fc(x)

    model = Growing()
    xray = fxray.trace(model, torch.randn(2, 3))
    other = rewritten(untrained(), output=True)["generator"]
    net = xray.rewrite()
    with fxray.record({"growing": net, "generator": other}, place) as recorder:
        for model.more in (False, True):
            with recorder.step():
                net(torch.randn(2, 3))
                other(batch(0)[:, 4:7])
            xray.mark("*", output=True)
            recorder.flush()
    run = fxray.open(place)
    assert "growing.sigmoid" in run.architecture
    assert "generator.tanh" in run.architecture
