"""Check the corpus under torch.compile from a terminal.

    python -m corpus.compiled [--set traps|transformers|all] [--only NAME …]

Each model that has a graph is trained for some steps, compiled with its captures by
`torch.compile(net, fullgraph=True, backend="aot_eager")`, beside an untouched twin in eager mode
whose modules have plain hooks: outputs, gradients and buffers must agree, and every capture of such
a module must be there once a step, with the mean that the hook saw. Where that raises, the
untouched model says whether torch.compile itself takes it in one piece. The exit status is 1 if any
number is wrong.
"""

from __future__ import annotations

import argparse
import collections
import copy
import sys
import warnings
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch._dynamo

import fxray
from corpus.__main__ import gathered
from corpus.bits import tensors_in
from corpus.running import backward, base, seed_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from corpus.case import Case, Sizes

__all__ = ["CompiledOutcome", "check_compiled"]

STEPS = 3
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
_MOST_TOLD = 150


@attrs.frozen
class CompiledOutcome:
    """What a model gave under a compiler.

    Attributes:
        name: of the case.
        how: `"one graph"`; `"eagerly"` where fxray left the calls to eager mode; `"not by
            torch"` where torch.compile does not take the untouched model in one piece
            either; `"interposed"` where there is no graph to compile.
        captures: how many were compared with hooks.
        failures: every number that is wrong.
        why: the compiler's error, shortened.
    """

    name: str
    how: str
    captures: int = 0
    failures: tuple[str, ...] = ()
    why: str = ""


def check_compiled(case: Case) -> CompiledOutcome:
    """Train a case compiled and its twin in eager mode; return what differs."""
    torch._dynamo.reset()  # noqa: SLF001 - its public name
    case.reset()
    seed_all(0)
    model = case.build().train()
    twin = copy.deepcopy(model)
    args, kwargs = case.call(base(case))
    xray = fxray.Xray(model, args=args, kwargs=kwargs, gradients=False)
    if "train" in xray.report.interposed:
        return CompiledOutcome(case.name, "interposed", why=xray.report.interposed["train"])
    seen = _hooked(twin, _mark(xray))
    net = xray.rewrite()
    call = torch.compile(net, fullgraph=True, backend="aot_eager")
    failures: list[str] = []
    given = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fxray.record(net) as recorder:
            for step in range(STEPS):
                sizes = base(case, seed=step)
                try:
                    ours = _trained(call, model, case, sizes)
                except Exception as error:  # noqa: BLE001 - Dynamo's and the backend's own
                    return _not_compiled(case, error)
                given.append(ours)
                theirs = _trained(twin, twin, case, sizes)
                failures += [f"step {step}: {text}" for text in _apart(ours, theirs)]
        told, captures = _captures_apart(recorder.run, seen)
    if failures:  # does the compiler round so by itself?
        failures = _apart_from_plain(case, given)
    return CompiledOutcome(case.name, "one graph", captures, tuple(failures + told))


def _apart_from_plain(case: Case, given: Sequence[dict[str, torch.Tensor]]) -> list[str]:
    """Compare what a compiled module gave with what the untouched model gives, compiled."""
    torch._dynamo.reset()  # noqa: SLF001 - its public name
    case.reset()
    seed_all(0)
    model = case.build().train()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    return [
        f"step {step}: {text}"
        for step, ours in enumerate(given)
        for text in _apart(ours, _trained(call, model, case, base(case, seed=step)))
    ]


def _mark(xray: fxray.Xray) -> list[str]:
    """Keep the mean of every float output and its gradient; return the modules among them."""
    xray.draft.clear()
    modules = []
    for path, op in xray.architecture.items():
        floats = op.outputs and all(spec.dtype == "float32" for spec in op.outputs)
        if floats and op.role not in {"input", "parameter"}:
            xray.mark(path, output=True, grad=True, selection=fxray.Mean())
            if op.role == "module" and len(op.outputs) == 1 and "@" not in path:
                modules.append(path)
    return modules


_Seen = dict[tuple[str, str], list[float]]


def _hooked(model: nn.Module, paths: Sequence[str]) -> _Seen:
    """Note by plain hooks the mean of what these modules put out, and of its gradient."""
    seen: _Seen = collections.defaultdict(list)

    def noting(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor):
                seen[path, "output"].append(out.detach().mean().item())
                if out.requires_grad:
                    out.register_hook(lambda grad: _take(grad.mean().item()))

        def _take(mean: float) -> None:
            seen[path, "grad"].append(mean)

        return note

    for path in paths:
        model.get_submodule(path).register_forward_hook(noting(path))
    return seen


def _trained(call: Callable[..., Any], model: nn.Module, case: Case, sizes: Sizes) -> Any:
    model.zero_grad()
    args, kwargs = case.call(sizes)
    seed_all(7)
    out = call(*args, **kwargs)
    backward(out, seed=1)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    outs = {f"output {at}": t.detach() for at, t in enumerate(tensors_in(out))}
    return {**outs, **{f"grad of {k}": g for k, g in grads.items()}, **buffers}


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    found = [f"{name} is missing" for name in theirs if name not in ours]
    for name, expected in theirs.items():
        given = ours.get(name)
        if given is not None and not torch.allclose(
            given.to_dense().float(), expected.to_dense().float(), equal_nan=True, **CLOSE
        ):
            found.append(f"{name} differs")
    return found


def _captures_apart(run: fxray.Run, seen: _Seen) -> tuple[list[str], int]:
    """Compare what modules called once a step kept with what their hooks saw."""
    found, compared = [], 0
    for (path, kind), means in seen.items():
        if len(means) != STEPS:
            continue  # called more than once, or without a gradient: which is which is not known
        series = getattr(run[path], kind)
        kept = [float(series[step]) for step in series.steps]
        compared += 1
        if not torch.allclose(torch.tensor(kept), torch.tensor(means), equal_nan=True, **CLOSE):
            found.append(f"the {kind} of {path} was kept as {kept}, hooks saw {means}")
    return found, compared


def _not_compiled(case: Case, error: Exception) -> CompiledOutcome:
    text = " ".join(str(error).split())
    ours = "fxray has no graph" in text
    torch._dynamo.reset()  # noqa: SLF001 - its public name
    seed_all(0)
    model = case.build().train()
    try:
        _trained(torch.compile(model, fullgraph=True, backend="aot_eager"), model, case, base(case))
    except Exception:  # noqa: BLE001 - Dynamo's and the backend's own
        return CompiledOutcome(case.name, "not by torch", why=text)
    failed = () if ours else (f"{type(error).__name__} where torch.compile takes the model",)
    return CompiledOutcome(case.name, "eagerly", failures=failed, why=text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m corpus.compiled", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--set", choices=("traps", "transformers", "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    given = parser.parse_args(arguments)
    cases = [
        case
        for case in gathered(given.set).values()
        if case.training and (not given.only or case.name in given.only)
    ]
    hows: collections.Counter[str] = collections.Counter()
    wrong = []
    for case in cases:
        try:
            outcome = check_compiled(case)
        except Exception as error:  # noqa: BLE001 - one case must not end the others
            outcome = CompiledOutcome(case.name, "not run", why=repr(error))
        hows[outcome.how] += 1
        if outcome.failures:
            wrong.append(case.name)
        told = " | ".join(outcome.failures) or outcome.why or f"{outcome.captures} as hooks saw"
        print(f"{case.name:<32} {outcome.how:<12} {told[:_MOST_TOLD]}", flush=True)
    print(f"\n{len(cases)} models: {', '.join(f'{n} {how}' for how, n in hows.most_common())}")
    print(f"{len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
