"""What every traced model must hold to, checked against a twin that nobody touched."""

from __future__ import annotations

import collections
import contextlib
import copy
import math
import pickle
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

import fxray
from corpus.activations import canonical, count_activations, is_activation
from corpus.bits import UNINITIALIZED, Frozen, differs, frozen
from corpus.leaks import World
from corpus.running import Result, Step, backward, base, plan, run, seed_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from corpus.case import Case

__all__ = ["Outcome", "check"]

_MODEL_SEED, _TRACE_SEED = 11, 12
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
"""Registries, which are compared elsewhere, and hooks, whose ids are never the same."""

_STEPS = 3
_WATCHED = 4
"""How many leaf modules a capture is compared with plain hooks for."""


@attrs.frozen
class Outcome:
    """What came of checking one case.

    Attributes:
        name: of the case.
        frontend: that the trace obtained, `"refused"` where it raised.
        ops: number of ops by mode.
        trace_seconds: of the one call of `trace`.
        step_seconds: of the fastest forward and backward of the eager twin.
        failures: short sentences; none where all holds.
        wrong: those of them that are other numbers without an exception.
        notes: what a reader of the table may want to know.
    """

    name: str
    frontend: str
    ops: Mapping[str, int] = attrs.field(factory=dict)
    trace_seconds: float = math.nan
    step_seconds: float = math.nan
    failures: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check(
    case: Case,
    trace: Callable[..., Any] = fxray.trace,
    record: Callable[[Any], Any] = fxray.record,
) -> Outcome:
    """Trace the model of `case` once and compare all that can be compared.

    Args:
        case: the model and its calls.
        trace: gives what is checked; another one checks the checks.
        record: records what it captures.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Checking(case, trace, record).outcome()
    finally:
        torch.set_num_threads(threads)


class _Checking:
    """One case on its way; `failures` fills."""

    def __init__(self, case: Case, trace: Callable[..., Any], record: Callable[[Any], Any]) -> None:
        self.case, self.trace, self.record = case, trace, record
        self.failures: list[str] = []
        self.wrong: list[str] = []
        self.notes: list[str] = []

    def build(self) -> nn.Module:
        seed_all(_MODEL_SEED)
        return self.case.build()

    def outcome(self) -> Outcome:
        """Check everything, in an order in which one failure hides no other."""
        case = self.case
        case.reset()
        twin, steps = self.build(), plan(case)
        # All of the reference before the trace: what a trace leaves in a cache that all
        # models share must not reach it.
        expected = [run(twin, case, step) for step in steps]
        seconds = min((r.seconds for r in expected if r.error is None), default=math.nan)
        if expected[0].error is not None:
            self.failures.append(f"the model itself does not run: {_told(expected[0].error)}")
            return Outcome(case.name, "not traced", failures=tuple(self.failures))
        case.reset()
        model = self.build()
        model.train(case.training)
        xray, traced_in = self._traced(model)
        if xray is None:
            return Outcome(case.name, "refused", {}, traced_in, seconds, tuple(self.failures))
        net = xray.rewrite()
        self._attempt("state_dict", self._state_dict, net)
        self._attempt("activations", self._activations, xray)
        refused = self._numbers(net, steps, expected)
        self._attempt("attributes", self._attributes, model, twin)
        self._attempt("poisoned", self._poisoned, steps, expected)
        _carry_on(model, dict(twin.named_parameters()), dict(twin.named_buffers()))
        if not refused:
            self._attempt("copies", self._copies, net, twin)
            if case.training:
                self._attempt("captured", self._captured, xray, net, twin)
        return Outcome(
            case.name,
            str(xray.report.frontend),
            dict(xray.report.ops),
            traced_in,
            seconds,
            tuple(self.failures),
            tuple(self.wrong),
            tuple(self.notes),
        )

    def _attempt(self, what: str, verify: Callable[..., None], *args: Any) -> None:
        try:
            verify(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
            self.failures.append(f"{what}: {_told(error)}")

    def _traced(self, model: nn.Module) -> tuple[Any, float]:
        args, kwargs = self.case.call(base(self.case))
        given = frozen((args, kwargs), identity=True)
        # A gradient that was there before the trace must be there after it.
        for parameter in list(model.parameters())[::2]:
            if not isinstance(parameter, UNINITIALIZED):
                parameter.grad = torch.ones_like(parameter)
        seed_all(_TRACE_SEED)
        before = World.around(model)
        xray, begun = None, time.perf_counter()
        try:
            xray = self.trace(model, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a tracer may raise anything
            self.failures.append(f"refused: {_told(error)}")
        seconds = time.perf_counter() - begun
        self.failures += before.leaked(model)
        changed = differs(frozen((args, kwargs), identity=True), given, "the input")
        self.failures += [f"leaked by the trace: {changed}"] if changed else []
        return xray, seconds

    # ------------------------------------------------------------------ the same numbers

    def _numbers(self, net: nn.Module, steps: list[Step], expected: list[Result]) -> bool:
        """Compare every call; return whether the first was refused."""
        said: collections.Counter[str] = collections.Counter()
        for step, theirs in zip(steps, expected, strict=True):
            ours = run(net, self.case, step)
            if ours.error is not None and theirs.error is None:
                text = _told(ours.error)
                self._say(said, f"{step}: {text}", kind=text, wrong=False)
                _carry_on(net, {}, theirs.buffers)
            elif theirs.error is not None and ours.error is None:
                # A cache of the model's own that its second call stumbles over, say.
                self.notes.append(f"{step}: runs, the model itself does not")
                _carry_on(net, {}, theirs.buffers)
            elif ours.error is None:
                for text in ours.differs(theirs):
                    self._say(said, f"{step}: {text}", kind=f"{step.mode} {text[:12]}", wrong=True)
                if said:
                    _carry_on(net, {}, theirs.buffers)
            elif type(ours.error) is not type(theirs.error):
                self.notes.append(f"{step}: raises {_told(ours.error)}")
        more = sum(count - 1 for count in said.values())
        if more:
            self.notes.append(f"{more} more failures of the same kinds")
        return bool(expected) and expected[0].error is None and self._first_refused(steps)

    def _first_refused(self, steps: list[Step]) -> bool:
        first = str(steps[0])
        return any(f.startswith(f"{first}: ") and f not in self.wrong for f in self.failures)

    def _say(self, said: collections.Counter[str], text: str, *, kind: str, wrong: bool) -> None:
        kind = re.sub(r"[\d ,()]+", " ", kind)[:60]  # the same refusal at other sizes
        said[kind] += 1
        if said[kind] == 1:
            self.failures.append(text)
            if wrong:
                self.wrong.append(text)

    def _attributes(self, model: nn.Module, twin: nn.Module) -> None:
        for (path, ours), theirs in zip(model.named_modules(), twin.modules(), strict=True):
            found = differs(self._held(ours), self._held(theirs), path or "the model")
            if found:
                text = f"attributes afterwards: {found}"
                self.failures.append(text)
                self.wrong.append(text)
        pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
        for (name, own), other in pairs:
            found = differs(frozen(own), frozen(other), f"parameter {name} afterwards")
            if found:
                self.failures.append(found)
                self.wrong.append(found)

    def _held(self, module: nn.Module) -> Frozen:
        # A scripted module holds its fields in C++.
        held = {} if isinstance(module, torch.jit.ScriptModule) else vars(module)
        skipped = {*_TORCHS_OWN, *self.case.scratch}
        return frozen({name: value for name, value in held.items() if name not in skipped})

    def _poisoned(self, steps: list[Step], expected: list[Result]) -> None:
        """Run a new model once more, with all that the trace left in shared caches."""
        again = run(self.build(), self.case, steps[0])
        if again.error is not None and expected[0].error is None:
            self.failures.append(f"a new model breaks after the trace: {_told(again.error)}")
        elif again.error is None:
            self.failures += [
                f"a new model differs after the trace: {t}" for t in again.differs(expected[0])
            ]

    # ------------------------------------------------------------------ the same names

    def _state_dict(self, net: nn.Module) -> None:
        fresh = self.build()
        if any(isinstance(p, UNINITIALIZED) for p in _tensors_of(fresh)):
            return
        ours, theirs = net.state_dict(), fresh.state_dict()
        if list(ours) != list(theirs):
            odd = sorted(set(ours) ^ set(theirs))[:4]
            self.failures.append(f"state_dict has other keys: {odd or 'another order'}")
            return
        for name, state in theirs.items():
            found = differs(frozen(ours[name]), frozen(state), f"state_dict {name}")
            self.failures += [found] if found else []
        fresh.load_state_dict(ours, strict=True)
        net.load_state_dict(theirs, strict=True)

    def _activations(self, xray: Any) -> None:
        """Compare what the model runs with what the architecture shows."""
        for mode in ("train", "eval") if self.case.training else ("eval",):
            model = self.build()
            model.train(mode == "train")
            args, kwargs = self.case.call(base(self.case))
            seed_all(_TRACE_SEED)
            eager = count_activations(model, args, kwargs)
            for kind in self.case.hidden:
                del eager[kind]
            shown: collections.Counter[str] = collections.Counter(
                canonical(op.type)
                for op in xray.architecture.values()
                if is_activation(op.type) and (not op.nodes or mode in op.nodes)
            )
            if self.case.graph:
                hidden = {kind: n for kind, n in eager.items() if shown[kind] != n}
            else:  # how often is drawn anew at every call
                hidden = {kind: n for kind, n in eager.items() if not shown[kind]}
            if hidden:
                told = ", ".join(f"{shown[kind]} of {n} {kind}" for kind, n in hidden.items())
                self.failures.append(f"activations shown in {mode}: {told}")

    # ------------------------------------------------------------------ copies

    def _copies(self, net: nn.Module, twin: nn.Module) -> None:
        step = Step("eval", base(self.case, seed=1), 900)
        for how, copied in (("deepcopy", copy.deepcopy), ("pickle", _pickled)):
            try:
                expected = run(copied(twin), self.case, step)
            except Exception:  # noqa: BLE001 - what the model cannot, its product need not
                self.notes.append(f"the model itself has no {how}")
                continue
            try:
                ours = copied(net)
            except Exception as error:  # noqa: BLE001
                self.failures.append(f"{how}: {_told(error)}")
                continue
            shared = {id(t) for t in _tensors_of(net)} & {id(t) for t in _tensors_of(ours)}
            self.failures += [f"{how}: shares {len(shared)} tensors"] if shared else []
            result = run(ours, self.case, step)
            if result.error and not expected.error:
                self.failures.append(f"{how}: {_told(result.error)}")
            elif not result.error and not expected.error:
                self.failures += [f"{how}: {text}" for text in result.differs(expected)]

    # ------------------------------------------------------------------ captured and trained

    def _captured(self, xray: Any, net: nn.Module, twin: nn.Module) -> None:
        for path in xray.architecture:
            for kinds in ({"output": True, "grad": True}, {"output": True}):
                with contextlib.suppress(fxray.DraftError):  # this op has no gradient
                    xray.mark(path, **kinds, selection=fxray.Mean())
                    break
        watched = _Watched(twin, xray.architecture)
        raised = self._train(twin, watched)
        if raised:
            self.notes.append(f"the model itself does not train: {_told(raised)}")
            return
        with self.record(net) as recorder:
            error = self._train(net)
            if error:
                raise error
        for name, ours in net.named_parameters():
            theirs = twin.get_parameter(name)
            found = differs(frozen(ours), frozen(theirs), f"parameter {name}")
            self.failures += [f"trained with captures: {found}"] if found else []
        kept = recorder.run
        for path, means in watched.means.items():
            if not means:  # a layer that was skipped at random in every step
                continue
            series = kept[path].output
            got = [float(series.record(at)) for at in range(len(series))]
            close = len(got) == len(means) and all(
                math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) or (a != a and b != b)  # noqa: PLR0124 - NaN
                for a, b in zip(got, means, strict=True)
            )
            if not close:
                self.failures.append(f"captured of {path}: {got}, hooks saw {means}")

    def _train(self, module: nn.Module, watched: _Watched | None = None) -> Exception | None:
        module.train()
        weights = [p for p in module.parameters() if p.requires_grad]
        if not weights:
            return None
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        for at in range(_STEPS):
            args, kwargs = self.case.call(base(self.case, seed=at))
            seed_all(500 + at)
            try:
                with watched or contextlib.nullcontext():  # a checkpoint runs it again, later
                    out = module(*args, **kwargs)
                optimizer.zero_grad()
                backward(out, 500 + at)
                optimizer.step()
            except Exception as error:  # noqa: BLE001 - a model may raise anything
                return error
        return None


class _Watched:
    """Means of what a few leaf modules of the twin put out, by plain hooks."""

    def __init__(self, twin: nn.Module, architecture: Mapping[str, Any]) -> None:
        self.twin = twin
        self.means: dict[str, list[float]] = {}
        once = [
            path
            for path, op in architecture.items()
            if op.module == path
            and op.items == ("",)
            and f"{path}@1" not in architecture
            # Scripted and compiled modules call no hooks.
            and "_orig_mod" not in path
            and not isinstance(twin.get_submodule(path), torch.jit.ScriptModule)
        ]
        # The first, the last and some between: what is wrong at one end may be right at the other.
        every = max(1, len(once) // _WATCHED)
        self.paths = once[::every][:_WATCHED]

    def __enter__(self) -> None:
        self.hooks = []
        for path in self.paths:
            seen = self.means.setdefault(path, [])

            def hook(_: nn.Module, __: Any, out: Any, seen: list[float] = seen) -> None:
                mean = out.detach().to_dense().double().mean() if out.numel() else math.nan
                seen.append(float(mean))

            with contextlib.suppress(AttributeError, RuntimeError):
                self.hooks.append(self.twin.get_submodule(path).register_forward_hook(hook))

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _pickled(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))  # noqa: S301 - its own bytes
    return copied


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _carry_on(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> None:
    """Put the reference's numbers into `module`, so that one failure is told once."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in {**parameters, **buffers}.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)


def _told(error: Exception | None) -> str:
    """Return an error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:199] + '…'}"
