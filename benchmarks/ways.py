"""The ways to train one model: plain, recorded by fxray, and watched with what torch has."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.utils import counters  # what graph breaks are counted in

import fxray
from benchmarks.models import MODELS
from benchmarks.stats import plain as nine_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "COMPILED",
    "EAGER",
    "Extraction",
    "First",
    "Graphs",
    "Kept",
    "Make",
    "ModuleHooks",
    "Runner",
    "Task",
    "runners",
    "task",
    "train",
]

Kept = dict[tuple[str, str], list[Any]]
"""By path and kind (output or grad) what was kept, step by step."""

Keep = Callable[[torch.Tensor], Any]


@attrs.frozen
class First:
    """The first element: so little that what is left to measure is the way there."""

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of it, of shape (1,)."""
        return tensor.as_strided((1,), (1,)).clone()


@attrs.define(eq=False)
class Graphs:
    """A backend of `torch.compile` that counts.

    Attributes:
        backend: who does the work.
        compiled: how many graphs it was given.
        breaks: how often a graph was broken off.
        settled: how many graphs there were once warmed up.
        seconds: how long the first step took.
    """

    backend: str
    compiled: int = 0
    breaks: int = 0
    settled: int = 0
    seconds: float = 0.0

    def __call__(self, graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        """Return what runs `graph`, as torch asks of a backend."""
        self.compiled += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)  # noqa: SLF001 - no other

    @property
    def recompiled(self) -> int:
        """How many graphs came after the warm-up."""
        return self.compiled - self.settled


@attrs.frozen(eq=False)
class Runner:
    """One way to train one model.

    Attributes:
        way: which.
        step: trains one step and returns its loss.
        sites: how many places keep an output and a gradient, or would if anything were due.
        kept: returns what was kept so far.
        graphs: what was compiled; None in eager.
    """

    way: str
    step: Callable[[], torch.Tensor]
    sites: int = 0
    kept: Callable[[], Kept] = dict
    graphs: Graphs | None = None

    def warm_up(self, steps: int = 10) -> None:
        """Train some steps that are not timed, and count what is compiled in them."""
        breaks, start = sum(counters["graph_break"].values()), time.perf_counter()
        for done in range(steps):
            self.step()
            if self.graphs is not None and not done:
                self.graphs.seconds = time.perf_counter() - start
        if self.graphs is not None:
            self.graphs.breaks = sum(counters["graph_break"].values()) - breaks
            self.graphs.settled = self.graphs.compiled


@attrs.frozen(eq=False)
class Task:
    """What a way is given: a model of its own, the batch, and where to say what it ends with."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    stack: contextlib.ExitStack
    backend: str = ""

    def runner(
        self,
        way: str,
        net: nn.Module,
        *,
        fullgraph: bool = True,
        backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
        **told: Any,
    ) -> Runner:
        """Return the runner that trains `net`, compiled if the task says so."""
        graphs: Graphs | None = None
        forward: Callable[..., Any] = net
        if self.backend:
            graphs = Graphs(self.backend)
            forward = torch.compile(net, fullgraph=fullgraph, backend=graphs)
        step = train(forward, net, self.x, self.y, backward)
        return Runner(way, step, graphs=graphs, **told)


def train(
    forward: Callable[..., Any],
    net: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> Callable[[], torch.Tensor]:
    """Return what trains `net` one step by `forward` and returns the loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> torch.Tensor:
        loss = F.cross_entropy(forward(x), y)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        return loss.detach()

    return step


# Recorded by fxray


def _fxray(  # noqa: PLR0913 - what a mark may say
    task: Task,
    way: str,
    selection: fxray.Selection | None,
    *,
    every: int = 1,
    modules: bool = False,
    on_disk: bool = False,
) -> Runner:
    xray = fxray.trace(task.model, task.x)
    xray.draft.clear()
    roles = {"module"} if modules else {"module", "function", "method"}
    sites = [
        path
        for path, op in xray.architecture.items()
        if op.role in roles and all(spec.dtype == "float32" for spec in op.outputs)
    ]
    marked = {} if selection is None else dict.fromkeys(sites, selection)
    for path, chosen in marked.items():
        xray.mark(path, output=True, grad=True, selection=chosen, every=every)
    net = xray.rewrite()
    place = task.stack.enter_context(tempfile.TemporaryDirectory()) if on_disk else None
    recorder = task.stack.enter_context(fxray.record(net, place))

    def kept() -> Kept:
        recorder.flush()
        run = recorder.run
        found: Kept = {}
        for path in marked:
            for kind in ("output", "grad"):
                series = getattr(run[path], kind)
                found[path, kind] = [series[step] for step in series.steps]
        return found

    return task.runner(way, net, sites=len(sites), kept=kept)


# Watched with what torch has


class ModuleHooks:
    """Plain PyTorch hooks that keep something of the output and of its gradient, every call.

    Hooks see modules alone: a functional activation, an addition or a reshape has none.

    Attributes:
        kept: by path and kind, as numbers.
        sites: how many modules are hooked.
    """

    def __init__(self, model: nn.Module, keep: Keep | None, *, lean: bool = False) -> None:
        """Hook every module that has none inside.

        Args:
            model: whose modules.
            keep: what of a tensor; None for hooks that do nothing.
            lean: with a forward hook alone, which hooks the tensor that it is shown.
        """
        self.kept: Kept = {}
        self._slots: dict[tuple[str, str], list[Any]] = {}
        self.sites = 0
        for path, module in model.named_modules():
            if any(module.children()):
                continue
            self.sites += 1
            if keep is None:
                module.register_forward_hook(_nothing)
                module.register_full_backward_hook(_nothing)
                continue
            outputs = self._slots[path, "output"] = [None]
            grads = self._slots[path, "grad"] = [None]
            if lean:
                module.register_forward_hook(_lean_hook(keep, outputs, grads))
            else:
                module.register_forward_hook(_forward_hook(keep, outputs))
                module.register_full_backward_hook(_backward_hook(keep, grads))

    def settle(self) -> None:
        """Keep what a step gave as numbers, and make room for the next.

        Small tensors that are kept from step to step lie among the large ones that are freed,
        and cost more in memory that cannot be used again than it takes to read them.
        """
        for key, slot in self._slots.items():
            if slot[0] is not None:
                self.kept.setdefault(key, []).append(_number(slot[0]))
                slot[0] = None


def _number(value: torch.Tensor | dict[str, torch.Tensor]) -> Any:
    return {k: v.item() for k, v in value.items()} if isinstance(value, dict) else value.item()


def _nothing(_module: nn.Module, _given: Any, _gave: Any) -> None:
    pass


def _forward_hook(keep: Keep, outputs: list[Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        outputs[0] = keep(output.detach())

    return hook


def _backward_hook(keep: Keep, grads: list[Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, _grad_input: Any, grad_output: Any) -> None:
        grads[0] = keep(grad_output[0])

    return hook


def _lean_hook(keep: Keep, outputs: list[Any], grads: list[Any]) -> Callable[..., None]:
    def hook_grad(grad: torch.Tensor) -> None:
        grads[0] = keep(grad)

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        outputs[0] = keep(output.detach())
        if output.requires_grad:
            output.register_hook(hook_grad)

    return hook


def _hooks(task: Task, way: str, keep: Keep | None, *, lean: bool = False) -> Runner:
    hooks = ModuleHooks(task.model, keep, lean=lean)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        hooks.settle()

    return task.runner(
        way,
        task.model,
        fullgraph=False,
        backward=backward,
        sites=hooks.sites,
        kept=lambda: hooks.kept,
    )


class Extraction(nn.Module):
    """A model whose forward returns what its nodes give too, after torchvision's extractor.

    torchvision's own asks for a torchvision built for the torch that is installed. This is its
    idea, in torch.fx: trace by symbol, and let the graph return the nodes asked for; here all.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.symbolic_trace(model)
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        nodes = {
            str(node.target) if node.op == "call_module" else node.name: node
            for node in self.graph.graph.nodes
            if node.op.startswith("call_")
        }
        output.args = ((output.args[0], nodes),)
        self.graph.recompile()

    def forward(self, x: torch.Tensor) -> Any:
        """Return what the model returns, and what each node gave, by its module's path or name."""
        return self.graph(x)


def _extraction(task: Task, way: str, keep: Keep) -> Runner:
    extraction, kept = Extraction(task.model), Kept()
    graphs = Graphs(task.backend) if task.backend else None
    forward: Callable[..., Any] = extraction
    if graphs is not None:
        forward = torch.compile(extraction, fullgraph=True, backend=graphs)
    features: dict[str, torch.Tensor] = {}

    def extract(x: torch.Tensor) -> Any:
        out, found = forward(x)
        features.update((k, v) for k, v in found.items() if isinstance(v, torch.Tensor))
        for tensor in features.values():
            if tensor.requires_grad:
                tensor.retain_grad()
        return out

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for path, tensor in features.items():
            kept.setdefault((path, "output"), []).append(_number(keep(tensor.detach())))
            grads = kept.setdefault((path, "grad"), [])
            if tensor.grad is not None:
                grads.append(_number(keep(tensor.grad)))
        features.clear()

    step = train(extract, extraction, task.x, task.y, backward)
    with torch.no_grad():
        found = extraction(task.x)[1].values()
    sites = sum(isinstance(value, torch.Tensor) for value in found)
    return Runner(way, step, sites, lambda: kept, graphs)


# Which there are


def _plain(task: Task, way: str) -> Runner:
    return task.runner(way, task.model)


Make = Callable[[Task, str], Runner]
"""Makes the way of that name."""

_MEAN, _STATS = fxray.Mean(), fxray.Stats()
_NEVER = 10**6

EAGER: Mapping[str, Make] = {
    "bare": _plain,
    "fxray: unmarked": functools.partial(_fxray, selection=None),
    "fxray: nothing due": functools.partial(_fxray, selection=_MEAN, every=_NEVER),
    "fxray: first element": functools.partial(_fxray, selection=First()),
    "hooks: first element": functools.partial(_hooks, keep=First().make_selection),
    "hooks: nothing": functools.partial(_hooks, keep=None),
    "fxray: mean": functools.partial(_fxray, selection=_MEAN),
    "fxray: mean, modules alone": functools.partial(_fxray, selection=_MEAN, modules=True),
    "fxray: mean, to disk": functools.partial(_fxray, selection=_MEAN, on_disk=True),
    "hooks: mean": functools.partial(_hooks, keep=torch.mean),
    "lean hooks: mean": functools.partial(_hooks, keep=torch.mean, lean=True),
    "extraction: mean": functools.partial(_extraction, keep=torch.mean),
    "fxray: stats": functools.partial(_fxray, selection=_STATS),
    "fxray: stats, modules alone": functools.partial(_fxray, selection=_STATS, modules=True),
    "hooks: stats": functools.partial(_hooks, keep=nine_numbers),
}
"""Makers of the ways in eager PyTorch, the first being what the others are measured by."""

COMPILED: Mapping[str, Make] = {
    way: EAGER[way]
    for way in (
        "bare",
        "fxray: unmarked",
        "fxray: nothing due",
        "fxray: mean",
        "fxray: stats",
        "hooks: mean",
        "extraction: mean",
    )
}
"""Those that are measured under `torch.compile` too."""


def task(name: str, stack: contextlib.ExitStack, backend: str = "") -> Task:
    """Return the model called `name` and its batch, each time with the same numbers."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.train()
    return Task(model, x, torch.randint(0, 10, (x.shape[0],)), stack, backend)


@contextlib.contextmanager
def runners(
    name: str, ways: Sequence[str], backend: str = "", makers: Mapping[str, Make] = EAGER
) -> Iterator[dict[str, Runner]]:
    """Yield the `ways` to train the model called `name`, all from the same weights.

    Args:
        name: one of `MODELS`.
        ways: names in `makers`.
        backend: of `torch.compile`; empty for eager.
        makers: what makes each.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # The first layer's input needs no gradient, which torch tells whoever hooks it.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        if backend:
            torch.compiler.reset()
            stack.callback(torch.compiler.reset)
        yield {way: makers[way](task(name, stack, backend), way) for way in ways}
