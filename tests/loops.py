"""A small model, and what plain hooks see of it in a training loop without fxray."""

# To mypy a module's attribute is Tensor | Module, and a loop takes whatever can be called.
# mypy: ignore-errors

from __future__ import annotations

import contextlib
import copy

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxray
from fxray import Whole

KINDS = ("output", "grad", "weight_grad")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.act(self.hidden(x)))


class Noisy(nn.Module):
    """Dropout and a norm: another function in eval mode."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.hidden(x)))))


def batch(seed=0, rows=6):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def called(net, way):
    if way == "eager":
        return net
    return torch.compile(net, backend="aot_eager", fullgraph=True)


def marked(model, x=None, kinds=KINDS, **options):
    """Trace, and keep `kinds` of every module that a hook can be put on, whole."""
    xray = fxray.trace(model, batch() if x is None else x)
    xray.draft.clear()
    for path, module in model.named_modules():
        if path in xray.architecture:
            has = any(p is not None for p in module._parameters.values())
            for kind in kinds:
                if has or "weight" not in kind:
                    xray.mark(path, **{kind: True}, selection=Whole(), **options)
    return xray


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


class Witness:
    """What plain hooks see of an untouched model, forward by forward.

    Attributes:
        seen: by path and kind, one entry a forward; None where no gradient came.
        used: by path, what the loop said an optimizer used.
    """

    def __init__(self, model):
        self.model, self.seen, self.used = model, {}, {}
        self._hooks = []
        for path, module in model.named_modules():
            if not [*module.children()]:
                self._hooks.append(module.register_forward_hook(self._noting(path)))

    def _noting(self, path):
        def note(_module, _args, out):
            if torch._C._current_graph_task_id() != -1:
                return
            self.seen.setdefault((path, "output"), []).append(out.detach().clone())
            gradients = self.seen.setdefault((path, "grad"), [])
            place = len(gradients)
            gradients.append(None)

            def arrived(gradient):
                if gradients[place] is None:
                    gradients[place] = gradient.detach().clone()

            if out.requires_grad:
                out.register_hook(arrived)

        return note

    def optimizer_uses(self):
        """Note the gradients of every parameter, as they are now."""
        for name, p in self.model.named_parameters():
            self.used.setdefault(name, []).append(None if p.grad is None else p.grad.clone())


def assert_equal(kept, seen, way, what=""):
    kept = kept if isinstance(kept, torch.Tensor) else torch.from_numpy(np.array(kept))
    if way == "eager":
        assert kept.dtype == seen.dtype, what
        assert torch.equal(kept, seen), what
    else:
        torch.testing.assert_close(kept, seen, rtol=1e-5, atol=1e-6, msg=str(what))


def assert_as_seen(run, witness, way, phase="train"):
    """Fail unless the run holds what the hooks saw, all of it, nothing else, in that order."""
    for (path, kind), values in witness.seen.items():
        there = [value for value in values if value is not None]
        if not there:
            with pytest.raises(fxray.NotSavedError):
                getattr(run[path], kind)
            continue
        kept = [value for _, value in getattr(run[path], kind).in_phase(phase)]
        assert len(kept) == len(there), (path, kind)
        for ours, theirs in zip(kept, there, strict=True):
            assert_equal(ours, theirs, way, (path, kind))
    for name, values in witness.used.items():
        path, _, parameter = name.rpartition(".")
        kept = [value for _, value in run[path].parameter_grad(parameter)]
        there = [value for value in values if value is not None]
        assert len(kept) == len(there), name
        for ours, theirs in zip(kept, there, strict=True):
            assert_equal(ours, theirs, way, name)


def assert_trained_alike(one, two, way):
    ours, theirs = one.state_dict(), two.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert_equal(value, theirs[name], way, name)


@attrs.frozen
class Loop:
    """One training, of the recorded model or of the untouched one.

    Attributes:
        call: what the loop calls.
        model: whose parameters it trains.
        step: `recorder.step`, or a context that does nothing.
        optimizer_uses: to be called where the gradients are those that the optimizer uses.
    """

    call: object
    model: nn.Module
    step: object
    optimizer_uses: object


def check(loop, way, model=None, x=None, **options):
    """Run `loop` recorded and untouched; return the run and the witness, already compared."""
    model = model or Net()
    twin = copy.deepcopy(model)
    net = marked(model, x, **options).rewrite()
    state = torch.get_rng_state()
    with fxray.record(net) as recorder:
        loop(Loop(called(net, way), net, recorder.step, lambda: None))
    torch.set_rng_state(state)
    witness = Witness(twin)
    loop(Loop(twin, twin, contextlib.nullcontext, witness.optimizer_uses))
    assert_trained_alike(model, twin, way)
    if not options:
        assert_as_seen(recorder.run, witness, way)
    return recorder.run, witness
