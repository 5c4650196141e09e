"""The corpus: every model traced holds to every check, and every check can fail."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from corpus import traps
from corpus.activations import count_activations
from corpus.checks import check
from fxray.architecture import Architecture, Op

TRAPS = {case.name: case for case in traps.CASES}

ARCHITECTURES = (
    *("bert", "gpt2", "llama", "t5", "bart", "mixtral", "mamba"),
    *("vit", "swin", "clip", "wav2vec2", "whisper"),
)
"""By name, a dozen of those that people train most; `python -m corpus` takes all."""


# ---------------------------------------------------------------- fxray holds to them


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_traced_right(name: str) -> None:
    case = TRAPS[name]
    if name == "ops_of_torchvision" and not importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is not installed")
    outcome = check(case)
    assert outcome.failures == ()
    if case.graph:
        assert outcome.frontend == "execution"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_traced_right(name: str) -> None:
    pytest.importorskip("transformers")
    from corpus.architectures import CASES  # it needs nothing, its models need transformers

    case = next(case for case in CASES if case.name == name)
    outcome = check(case)
    assert outcome.failures == ()
    if case.graph:
        assert outcome.frontend == "execution"


# ---------------------------------------------------------------- the checks themselves


class Eager:
    """What a perfect tracer would give: the model itself, and a list of what it runs."""

    def __init__(self, model: nn.Module, *args: object, **kwargs: object) -> None:
        self.net = self.model = model
        self.report = types.SimpleNamespace(frontend="eager", ops={})
        ops = []
        for mode in ("train", "eval"):
            with _random_left_alone():
                copied = copy.deepcopy(model).train(mode == "train")
                try:
                    counted = count_activations(copied, args, kwargs)
                except ValueError:  # BatchNorm does not train with one sample
                    continue
            for kind, times in counted.items():
                for time in range(times):
                    path = f"{mode}.{kind}_{time}"
                    ops.append(Op(path, path, kind, "function", kind, nodes={mode: path}))
        for path, module in model.named_modules():
            if type(module) in (nn.Linear, nn.Conv2d):
                kind = type(module).__name__.lower()
                ops.append(Op(path, path, kind, "module", kind, module=path))
        self.architecture = Architecture.build("Eager", ops, (), {}, {})

    def rewrite(self) -> nn.Module:
        return self.net

    def mark(self, what: str, **words: object) -> None:
        """Mark nothing: the recorder of these tests keeps all."""


@contextlib.contextmanager
def _random_left_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - what models draw from
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


class Recorded:
    """Keeps the mean of what every linear and convolution puts out, by plain hooks."""

    def __init__(self, net: nn.Module, wrong: float = 0.0) -> None:
        self.net, self.wrong, self.run, self.hooks = net, wrong, {}, []

    def __enter__(self):
        for path, module in self.net.named_modules():
            if type(module) in (nn.Linear, nn.Conv2d):
                series = Kept()
                self.run[path] = types.SimpleNamespace(output=series)
                self.hooks.append(
                    module.register_forward_hook(
                        lambda _, __, out, series=series: series.append(
                            float(out.double().mean()) + self.wrong
                        )
                    )
                )
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


class Kept(list):
    def record(self, at: int) -> float:
        return self[at]


def broken(failing: object) -> object:
    """Return a tracer that is right but for what `failing` does to its product."""

    def trace(model: nn.Module, *args: object, **kwargs: object) -> Eager:
        xray = Eager(model, *args, **kwargs)
        failing(xray)
        return xray

    return trace


# What CANNOT be held against a model that is its own product.
PERFECT = sorted(set(TRAPS) - {"lazy_norm", "norms_by_hooks", "ops_of_torchvision"})


@pytest.mark.parametrize("name", PERFECT[::12])
def test_the_model_itself_passes_every_check(name: str) -> None:
    assert check(TRAPS[name], Eager, Recorded).failures == ()


class Wrapped(nn.Module):
    """A product that can be made wrong on the way in, on the way out and in its state."""

    def __init__(self, inner: nn.Module, change: object) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["change"] = inner, change
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = inner.__dict__[name]

    def train(self, mode=True):
        self.inner.train(mode)
        return self

    def forward(self, *args, **kwargs):
        return self.change(self.inner, *args, **kwargs)


def only_with(condition, wrong):
    def change(model, x):
        return wrong(model(x)) if condition(model, x) else model(x)

    return change


def draws_more(model, x):
    torch.rand(1)
    return model(x)


def raises(model, x):
    raise RuntimeError("no such size") if len(x) == 3 else ValueError("no")


def detaches_weight(model, x):
    with torch.no_grad():
        y = model(x)
    return y + 0 * model.a.bias.sum()


def writes_input(model, x):
    y = model(x)
    x.data.add_(1)
    return y


@pytest.mark.parametrize(
    ("change", "text", "silent"),
    [
        (only_with(lambda m, x: True, lambda y: y + 1e-6), "train, batch 2", True),
        (only_with(lambda m, x: not m.training, lambda y: -y), "eval, batch 2", True),
        (only_with(lambda m, x: len(x) == 3, lambda y: y * 2), "batch 3", True),
        (only_with(lambda m, x: x.mean() < 0, torch.Tensor.double), "values 1", True),
        (
            only_with(lambda m, x: not torch.is_grad_enabled(), lambda y: y + 1),
            "without grad",
            True,
        ),
        (only_with(lambda m, x: True, lambda y: (y,)), "is a tuple", True),
        (draws_more, "torch's random state", True),
        (detaches_weight, "grad of", True),
        (writes_input, "the input afterwards", True),
        (raises, "no such size", False),
    ],
)
def test_other_numbers_are_found(change: object, text: str, silent: bool) -> None:
    def failing(xray: Eager) -> None:
        xray.net = Wrapped(xray.model, change)

    outcome = check(TRAPS["functional_relu_twice"], broken(failing), Recorded)
    assert any(text in failure for failure in outcome.failures), outcome.failures
    assert bool(outcome.wrong) == silent


@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("fc['_parameters']['bias']", lambda m: m.fc.bias.data.add_(1)),
        ("the gradients", lambda m: setattr(m.fc.weight, "grad", None)),
        ("the gradients", lambda m: m.fc.weight.grad.add_(1)),
        ("the model['training']", lambda m: m.eval()),
        ("torch's random state", lambda m: torch.rand(1)),
        ("python's random state", lambda m: random.random()),
        ("numpy's random state", lambda m: np.random.rand()),  # noqa: NPY002
        ("the model has other parts", lambda m: setattr(m, "cache", 3)),
        ("the model['masks'] has other parts", lambda m: m.masks.update({1: 2})),
        ("torch's switches['default dtype']", lambda m: torch.set_default_dtype(torch.float64)),
        ("torch.relu is still replaced", lambda m: setattr(torch, "relu", lambda x: x)),
        ("fc['_forward_hooks']", lambda m: m.fc.register_forward_hook(lambda *_: None)),
    ],
)
def test_what_a_trace_leaves_behind_is_found(text: str, leak: object) -> None:
    relu = torch.relu
    try:
        trace = broken(lambda xray: leak(xray.model))
        outcome = check(TRAPS["causal_mask_cached_on_module"], trace, Recorded)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.relu = relu
    leaked = [failure for failure in outcome.failures if failure.startswith("leaked")]
    assert any(text in failure for failure in leaked), outcome.failures


def test_a_poisoned_cache_that_models_share_is_found() -> None:
    def poison(xray: Eager) -> None:
        traps._table(6, 8).add_(1.0)

    outcome = check(TRAPS["table_from_lru_cache"], broken(poison), Recorded)
    assert any("a new model differs after the trace" in text for text in outcome.failures)


def test_a_counter_that_stands_still_is_found() -> None:
    def failing(xray: Eager) -> None:
        xray.net = Wrapped(xray.model, lambda model, x: model.fc(x))

    outcome = check(TRAPS["counter_that_nothing_reads"], broken(failing), Recorded)
    assert any("attributes afterwards" in text for text in outcome.wrong)


def test_a_hidden_activation_is_found() -> None:
    def hide(xray: Eager) -> None:
        ops = [op for op in xray.architecture.values() if op.path != "train.relu_1"]
        xray.architecture = Architecture.build("Eager", ops, (), {}, {})

    outcome = check(TRAPS["functional_relu_twice"], broken(hide), Recorded)
    assert outcome.failures == ("activations shown in train: 1 of 2 relu",)


def test_other_keys_are_found() -> None:
    def prefix(xray: Eager) -> None:
        xray.net = nn.Sequential(xray.model)

    outcome = check(TRAPS["functional_relu_twice"], broken(prefix), Recorded)
    assert any("state_dict has other keys" in text for text in outcome.failures)


def test_a_copy_that_is_none_is_found() -> None:
    def shared(xray: Eager) -> None:
        xray.net = Shared(xray.model)

    outcome = check(TRAPS["functional_relu_twice"], broken(shared), Recorded)
    assert any(text.startswith("deepcopy: shares 4 tensors") for text in outcome.failures)
    assert any(text.startswith("pickle: ") for text in outcome.failures)


class Shared(Wrapped):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner, lambda model, x: model(x))

    def __deepcopy__(self, memo):
        return self


def test_other_captures_are_found() -> None:
    outcome = check(TRAPS["functional_relu_twice"], Eager, lambda net: Recorded(net, wrong=0.1))
    assert [text.split(":")[0] for text in outcome.failures] == ["captured of a", "captured of b"]


def test_captures_that_disturb_the_training_are_found() -> None:
    class Disturbing(Recorded):
        def __enter__(self):
            self.net.a.weight.data.add_(1e-3)
            return super().__enter__()

    outcome = check(TRAPS["functional_relu_twice"], Eager, Disturbing)
    assert any("trained with captures: parameter a.weight" in t for t in outcome.failures)


def test_every_trap_has_a_name_and_says_why() -> None:
    assert len(TRAPS) == len(traps.CASES) >= 100
    assert all(case.why.endswith(".") for case in traps.CASES)
