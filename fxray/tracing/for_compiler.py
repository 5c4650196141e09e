"""A graph of the model as it runs under a compiler, where libraries leave out what none can hold.

`if not torch.compiler.is_compiling() and mask.all(): …`, models say. A graph that was
traced in eager mode branches there on data; traced again with the other answer, it does not.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch

from fxray.tracing.alone import How
from fxray.tracing.attributes import autocast_now
from fxray.tracing.call import CallSpec, Passed
from fxray.tracing.choice import looks_at_data
from fxray.tracing.example import Example
from fxray.tracing.family import ONE_TRACE
from fxray.tracing.program import MODES, Runner
from fxray.tracing.replaced import Replaced, asked
from fxray.tracing.showing import program_of, show, verify
from fxray.tracing.verify import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fxray.tracing.family import Family
    from fxray.tracing.leaf import Leaf
    from fxray.tracing.replaced import OfThread, Patch

__all__ = ["traced_for_compiler"]


def traced_for_compiler(family: Family, runner: Runner, name: str) -> Runner | None:
    """Return what runs the calls of `runner` under a compiler, with the model as it is now.

    None where that branches on data too, or the model cannot be traced now. To be called
    while a compiler traces: what is traced here runs on a thread of its own, where nothing
    is that the compiler has set up.

    Args:
        family: of the model.
        runner: what runs them in eager mode, or did before the model changed.
        name: of the new graph.
    """
    call, found = runner.program.call, list[Runner]()
    if not isinstance(call, CallSpec):
        return None
    modes, grad = autocast_now(), torch.is_grad_enabled()

    def trace() -> None:
        # Whatever it raises: the call runs eagerly then, and the model says it in its own words.
        with contextlib.suppress(Exception), ONE_TRACE, contextlib.ExitStack() as entered:
            for device, dtype in modes:
                if dtype is not None:
                    entered.enter_context(torch.autocast(device, dtype))
            entered.enter_context(torch.set_grad_enabled(grad))
            found.append(_traced(family, runner, call, name))

    thread = threading.Thread(target=trace, name="fxray-trace")
    thread.start()
    thread.join()
    return found[0] if found and not looks_at_data(found[0].program.graph) else None


def _traced(family: Family, runner: Runner, call: CallSpec, name: str) -> Runner:
    model, program = family.model, runner.program
    how = How(training=program.mode == MODES[0], grad=torch.is_grad_enabled())
    args, kwargs = _made_up(call, family)
    # Those that came at several sizes, too: here they may be shown free at once.
    sizes = {
        leaf.path: dims
        for leaf in call.tensor_leaves
        if (dims := sorted({*leaf.free, *leaf.grown, *leaf.shown}))
    }
    example = Example.of(model, args, kwargs, sizes=sizes)
    with asked(None, (_COMPILING,)):
        shown = show(model, example, how)
    family.survey.learn(shown.written, program.mode)
    made = Runner(program_of(name, shown, example), model, family.signature)

    def product(*args: Any, **kwargs: Any) -> Any:
        return made.run(made.inputs(args, kwargs))

    verify(model, product, example, Trial(how, example.base, gradients=how.training))
    return made


# ---------------------------------------------------------------------- the call


def _made_up(call: CallSpec, family: Family) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call of this layout; without branches on data its numbers do not matter."""
    device = next((p.device for p in family.model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = [_tensor(leaf, leaf.device or device, generator) for leaf in call.tensor_leaves]
    return _passed(family.signature, call.fill(tensors))


def _tensor(leaf: Leaf, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    assert leaf.spec is not None  # noqa: S101 - for the type checker
    dtype = leaf.spec.torch_dtype
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(leaf.spec.shape, generator=generator).to(device, dtype)
    else:  # a token, a class, a mask that hides nothing
        made = torch.ones(leaf.spec.shape, dtype=dtype, device=device)
    return made.requires_grad_(bool(leaf.requires_grad))


def _passed(
    signature: inspect.Signature, arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = {name: signature.parameters[name].kind for name in arguments}
    rest = [name for name, kind in kinds.items() if kind == inspect.Parameter.VAR_POSITIONAL]
    # By keyword where it can be, and what is left at its default not at all: as most calls are.
    ordered: set[Any] = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    if any(arguments[name] for name in rest):
        ordered.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords: list[str] = []
    for name, value in arguments.items():
        if kinds[name] == inspect.Parameter.VAR_KEYWORD:
            keywords += value
        elif kinds[name] not in ordered and value is not signature.parameters[name].default:
            keywords.append(name)
    positional = tuple(name for name, kind in kinds.items() if kind in ordered)
    return Passed(signature, positional, tuple(keywords)).call(arguments)


# ---------------------------------------------------------------------- the answer


def _answers(threads: OfThread) -> Iterator[Patch]:
    def yes(original: Callable[[], bool]) -> Callable[[], bool]:
        def is_compiling() -> bool:
            return bool(threads.present) or original()

        return is_compiling

    for name in ("is_compiling", "is_dynamo_compiling"):
        yield torch.compiler, name, yes(getattr(torch.compiler, name))


_COMPILING = Replaced(_answers)
