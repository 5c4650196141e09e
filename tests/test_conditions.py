"""The Python state a graph was traced under: noted, asked for before each call, put back."""

# mypy: ignore-errors
# Small models in many odd shapes say more without annotations.

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import operator
import pickle
import random
import re
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fxray
from fxray.tracing.attributes import noted_reads
from fxray.tracing.call import CallSpec
from fxray.tracing.conditions import State, Watch
from fxray.tracing.leaf import memory_layout
from fxray.tracing.state import ModelState

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Writer:
    def __init__(self):
        self.thread = threading.get_ident()

    @property
    def writing(self):
        return threading.get_ident() == self.thread


def state_of(model, *args, inlined=(), properties=(), tensors=None):
    with noted_reads(model, Writer()) as reads:
        model(*args or (X,))
    return State.of(model, reads, inlined=inlined, properties=properties, tensors=tensors)


def watch(model, *args, **words):
    found = Watch(model, pickle.loads(pickle.dumps(state_of(model, *args, **words))))
    assert found.changed() is None
    assert found.changed() is None
    return found


def said(found):
    change = found.changed()
    return "" if change is None else str(change)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Config:
    def __init__(self):
        self.scale, self.depth = 1.0, types.SimpleNamespace(n=2)
        self.inner = Inner()
        self.unread = 0

    @property
    def double(self):
        return self.scale * 2


class Inner:
    def __init__(self):
        self.p = 0.5


class Mapped:
    """Names that are other names, as in transformers' configs."""

    def __init__(self):
        self.n_embd = 8

    def __getattribute__(self, name):
        return super().__getattribute__("n_embd" if name == "hidden_size" else name)


class Found:
    """Names that only __getattr__ knows, as in OmegaConf."""

    def __init__(self):
        self.content = {"scale": 1.0}

    def __getattr__(self, name):
        if name != "scale":
            raise AttributeError(name)
        return self.content[name]


class Slotted:
    __slots__ = ("x",)


def local():
    return lambda h: h


class Many(nn.Module):
    of_class = 1

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.tau, self.nan, self.color = 1.0, float("nan"), Color.RED
        self.names, self.sizes = {"a": 1, "b": [1, 2]}, [1, 2]
        self.act, self.local = torch.relu, local()
        self.config, self.mapped, self.found = Config(), Mapped(), Found()
        self.plain, self.gone = torch.ones(8), None
        self.p = nn.Dropout(0.1)

    def forward(self, x):
        h = self.act(self.l(x)) * self.tau * self.of_class
        h = self.local(h) + self.sizes[0] + self.names["b"][0] + self.nan
        h = h + self.config.double + self.config.depth.n + self.config.inner.p
        h = h * self.mapped.hidden_size * self.found.scale + self.plain
        if self.color is Color.RED and self.gone is None and not hasattr(self, "late"):
            h = h + 1
        return h + self.p.p


CHANGES = {
    "'tau' was 1.0 .* is 0.5 now": lambda m: setattr(m, "tau", 0.5),
    "'tau' was 1.0 .* is 1 now": lambda m: setattr(m, "tau", 1),
    "'nan' was nan": lambda m: setattr(m, "nan", 0.0),
    "'color' was .*RED": lambda m: setattr(m, "color", Color.BLUE),
    r"'sizes' was \[1, 2\] .* is \[1, 2, 3\] now": lambda m: m.sizes.append(3),
    r"'names' was \{'a': 1, 'b': \[1, 2\]\}": lambda m: m.names["b"].append(3),
    "'act' was torch.relu .* is torch.tanh": lambda m: setattr(m, "act", torch.tanh),
    "'local' was .*<lambda> .* is another": lambda m: setattr(m, "local", local()),
    "'config.scale' was 1.0 .* is 2.0": lambda m: setattr(m.config, "scale", 2.0),
    "'config.depth' was": lambda m: setattr(m.config.depth, "n", 3),
    "'config.inner.p' was 0.5": lambda m: setattr(m.config.inner, "p", 0.1),
    "'mapped.hidden_size' was 8": lambda m: setattr(m.mapped, "n_embd", 9),
    r"'found.content' was \{'scale': 1.0\}": lambda m: m.found.content.update(scale=2.0),
    "'of_class' was 1 ": lambda m: setattr(m, "of_class", 2),
    "'plain' was a tensor": lambda m: setattr(m, "plain", None),
    "'gone' was None": lambda m: setattr(m, "gone", 1),
    "'late' was absent": lambda m: setattr(m, "late", True),
    "'p.p' was 0.1": lambda m: setattr(m.p, "p", 0.2),
    "'p' is a Identity now and was a Dropout": lambda m: setattr(m, "p", nn.Identity()),
    "'late' was added": lambda m: m.add_module("late", nn.Identity()),
    "'p' was there": lambda m: delattr(m, "p"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_what_a_forward_read_is_noticed_when_it_changes(words):
    model = Many()
    found = watch(model)
    CHANGES[words](model)
    change = found.changed()
    assert change is not None
    assert not change.root
    if "late" not in words:
        assert re.search(words, change.sentence)
    assert said(found) == change.sentence
    if "lambda" not in words:  # to one who did not see the first, it is the same
        assert said(Watch(model, found.state))


def test_what_is_put_back_or_was_never_read_is_no_change():
    model = Many()
    found = watch(model)
    before = found.state
    model.config.unread = 7
    model.tau = float("1.0")
    model.sizes = [1, 2]
    model.plain = torch.zeros(8)
    model.l = nn.Linear(8, 8)
    model.config = copy.deepcopy(model.config)
    assert said(found) == ""
    model.config.scale = 3.0
    assert "config.scale" in said(found)
    model.config.scale = 1.0
    assert said(found) == ""
    assert said(Watch(copy.deepcopy(model), before)) == ""


def test_classes_and_torch_s_names_are_as_before_also_after_an_error():
    model = Many()
    names = ("is_grad_enabled", "is_autocast_enabled", "get_autocast_dtype")
    originals = [getattr(torch, name) for name in names]
    with pytest.raises(RuntimeError), noted_reads(model, Writer()):
        model(model(X)[:, :4])
    for cls in (Many, nn.Linear, nn.Dropout, Config, Inner, Found):
        assert "__getattribute__" not in vars(cls)
    assert "__getattribute__" in vars(Mapped)
    assert Mapped().hidden_size == 8
    assert [getattr(torch, name) for name in names] == originals


def test_another_thread_notes_nothing():
    model, other = Many(), Many()
    with noted_reads(model, Writer()) as reads:
        thread = threading.Thread(target=lambda: (model(X), other(X)))
        thread.start()
        thread.join()
    assert reads.all() == ()


class SetsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n = 3
        return x * self.n


def test_what_a_forward_sets_before_it_reads_is_its_own():
    assert "n" not in {read.name for read in state_of(SetsFirst()).reads}


def test_how_a_module_is_called_is_no_state_of_its_forward():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    (inner,) = model
    # What Module.compile sets, and what stands there while another thread is interposed.
    inner._compiled_call_impl = inner._call_impl
    reads = state_of(model, torch.zeros(2, 4)).reads
    assert "_compiled_call_impl" not in {read.name for read in reads}


class Degrees(float):
    pass


class Reading(nn.Module):
    def __init__(self, value, read):
        super().__init__()
        self.v, self.read = value, read

    def forward(self, x):
        return x * self.read(self.v)


def settings(kind=types.SimpleNamespace, **fields):
    return kind(**{"scale": 2.0, **fields})


def first(v):
    return v[0]


def scaled(v):
    return v.scale


def by_s(v):
    return v["s"]


def called(v):
    return v["f"](1.0)


def deep(n):
    return 2.0 if n == 0 else {"s": deep(n - 1)}


def deepest(v, n):
    return v if n == 0 else deepest(v["s"], n - 1)


def set_deepest(v, n):
    v.update(s=3.0) if n == 1 else set_deepest(v["s"], n - 1)


def in_list(kind):
    return [settings(kind)]


ONE = torch.ones(1)
KEPT = {
    "numpy scalar": (lambda: np.float64(2), lambda v: v, lambda m: setattr(m, "v", np.float64(3))),
    "float32": (lambda: np.float32(2), float, lambda m: setattr(m, "v", np.float32(3))),
    "subclass of float": (lambda: Degrees(2), float, lambda m: setattr(m, "v", Degrees(3))),
    "array anew": (lambda: np.ones(2), first, lambda m: setattr(m, "v", np.zeros(2))),
    "array in place": (lambda: np.ones(2), first, lambda m: m.v.fill(0)),
    "large array anew": (
        lambda: np.ones(20_000),
        first,
        lambda m: setattr(m, "v", np.zeros(20_000)),
    ),
    "array of objects": (
        lambda: np.array([1, None]),
        first,
        lambda m: setattr(m, "v", np.array([2, None])),
    ),
    "argparse": (
        lambda: settings(argparse.Namespace),
        scaled,
        lambda m: setattr(m.v, "scale", 3.0),
    ),
    "namespace with a tensor": (
        lambda: settings(t=ONE),
        scaled,
        lambda m: setattr(m.v, "scale", 3.0),
    ),
    "tensor in a list": (lambda: [ONE], first, lambda m: m.v.__setitem__(0, torch.zeros(1))),
    "tensors in a tuple": (
        lambda: (ONE, ONE),
        first,
        lambda m: setattr(m, "v", (torch.zeros(1), ONE)),
    ),
    "tensor on an object": (
        Config,
        lambda v: v.__dict__.setdefault("mask", ONE) * v.mask,
        lambda m: setattr(m.v, "mask", torch.zeros(1)),
    ),
    "beside a tensor": (lambda: {"s": 2.0, "t": ONE}, by_s, lambda m: m.v.update(s=3.0)),
    "counter": (lambda: collections.Counter(s=2), by_s, lambda m: m.v.update(s=3)),
    "UserDict": (lambda: collections.UserDict(s=2), by_s, lambda m: m.v.update(s=3)),
    "object in a list": (
        lambda: [Config()],
        lambda v: v[0].scale,
        lambda m: m.v.__setitem__(0, Inner()),
    ),
    "field of an object in a list": (
        lambda: [Config()],
        lambda v: v[0].scale,
        lambda m: setattr(m.v[0], "scale", 3.0),
    ),
    "function in a list": (lambda: [abs], lambda v: v[0](1.0), lambda m: m.v.__setitem__(0, float)),
    "lambda in a dict": (
        lambda: {"f": lambda x: x},
        called,
        lambda m: m.v.update(f=lambda x: x + 1),
    ),
    "long list anew": (lambda: [1.0] * 2000, first, lambda m: setattr(m, "v", [2.0] * 2000)),
    "long list grown": (lambda: [1.0] * 2000, len, lambda m: m.v.append(1.0)),
    "4 deep": (lambda: deep(4), lambda v: deepest(v, 4), lambda m: set_deepest(m.v, 4)),
    "5 deep": (lambda: deep(5), lambda v: deepest(v, 5), lambda m: set_deepest(m.v, 5)),
    "0.0 and -0.0": (lambda: 0.0, lambda v: v, lambda m: setattr(m, "v", -0.0)),
    "0.0 and -0.0 in a list": (lambda: [0.0], first, lambda m: m.v.__setitem__(0, -0.0)),
    "1 and True in a list": (lambda: [1], first, lambda m: operator.setitem(m.v, 0, *[True])),
}


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("what", KEPT)
def test_what_is_no_plain_value_is_known_by_identity(what, linked):
    make, read, change = KEPT[what]
    model = Reading(make(), read)
    model(X)
    state = pickle.loads(pickle.dumps(state_of(model)))
    copied = copy.deepcopy(model) if "lambda" not in what else model
    found = Watch(model, state)
    if linked:
        assert said(found) == ""
        assert said(found) == ""
    change(model)
    assert "attribute 'v" in said(found)
    if copied is not model:
        own = Watch(copied, state)
        assert said(own) == ""
        change(copied)
        assert said(own)


class Sets(nn.Module):
    """What a forward makes anew or changes at each call is no setting."""

    def __init__(self):
        super().__init__()
        self.state, self.cfg, self.counts = (ONE, ONE), Config(), collections.Counter()
        self.cfg.mask, self.arr, self.held = ONE, np.zeros(2), [ONE]

    def forward(self, x):
        h = x * self.state[0] * self.cfg.mask * self.held[0]
        self.state = (h, h)
        self.cfg.mask = h
        self.counts["n"] += 1
        self.arr[0] += 1
        self.held[0] = h
        return h


def test_what_a_forward_sets_at_each_call_is_not_watched():
    model = Sets()
    names = {read.name for read in state_of(model).reads}
    assert names.isdisjoint({"state", "cfg.mask", "counts", "arr", "held"})
    assert "cfg" in names


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = Sub()

    def forward(self, x):
        return self.enc(x)


class Sub(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            x = x * 1
        return self.l(x) if self.training else x


class Asks(Sub):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            x = x * 1
        return self.l(x) if torch.is_grad_enabled() else x


def test_modes_are_noticed_if_they_were_read():
    model = Modes()
    found = watch(model, inlined=["enc"])
    model.enc.eval()
    assert said(found).startswith(
        "module 'enc' was in train mode when traced and is in eval mode now"
    )
    model.enc.train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert said(found) == ""
    found = watch(Asks())
    with torch.no_grad():
        assert said(found) == "autograd was on when the model was traced and is off now"
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast was off" in said(found)
        assert "bfloat16 on cpu" in said(found)
    assert said(found) == ""


def test_dtypes_and_what_trains_are_noticed_if_they_were_read():
    for properties, change, words in (
        (["dtype"], lambda m: m.double(), "dtype of 'enc.l.weight' was torch.float32"),
        (["device"], lambda m: m.to("meta"), "device of 'enc.l.weight' was cpu"),
        (
            ["requires_grad"],
            lambda m: m.requires_grad_(requires_grad=False),
            "requires_grad of 'enc.l.w",
        ),
    ):
        model = Modes()
        found, unread = watch(model, properties=properties), watch(model)
        change(model)
        assert words in said(found)
        assert said(unread) == ""


class Replaced(Sub):
    pass


def test_structure_of_what_was_traced_through():
    model = Modes()
    found = watch(model, inlined=["enc"])
    handle = model.enc.l.register_forward_hook(lambda *_: None)  # of a leaf, which runs it
    assert said(found) == ""
    handle.remove()
    handle = model.enc.register_forward_hook(lambda *_: None)
    assert said(found) == "a forward hook was added to 'enc' after the trace"
    handle.remove()
    assert said(found) == ""
    model.enc.forward = lambda x: x
    assert "a forward of its own was set on module 'enc'" in said(found)
    del model.enc.forward
    old, model.enc = model.enc, Replaced()
    assert said(found).startswith("module 'enc' is a Replaced now and was a Sub")
    model.enc = old
    parametrize.register_parametrization(model.enc.l, "weight", nn.Identity())
    assert "'enc.l' is a ParametrizedLinear now" in said(found)
    parametrize.remove_parametrizations(model.enc.l, "weight")
    assert said(found) == ""
    model.enc = Sub()
    assert said(found) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: parametrize.register_parametrization(m, "w", nn.Identity()),
    ],
)
def test_what_is_done_to_the_root_is_told_apart(change):
    model = Sub()
    model.w = nn.Parameter(torch.ones(1))
    found = watch(model)
    change(model)
    assert found.changed().root


class Hooked(Sub):
    def __init__(self):
        super().__init__()
        self.handle = self.register_forward_hook(lambda *_: None)


def test_a_hook_of_before_that_is_taken_off_is_a_change():
    model = Hooked()
    found = watch(model)
    model.register_forward_hook(lambda *_: None)
    assert "a forward hook was added" in said(found)
    model = Hooked()
    found = watch(model)
    model.handle.remove()
    assert said(found) == "a forward hook was taken off the model after the trace"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.d = nn.Linear(8, 8), nn.Linear(8, 8)
        self.d.weight = self.e.weight

    def forward(self, x):
        return nn.functional.linear(self.e(x), self.d.weight)


def test_untying_is_noticed_where_the_graph_reads_through_the_other_name():
    model = Tied()
    found, unread = watch(model, tensors=["e.weight"]), watch(model, tensors=[])
    torch.func.functional_call(model, {"e.weight": torch.ones(8, 8)}, (X,))
    assert said(found) == ""
    model.d.weight = nn.Parameter(torch.ones(8, 8))
    assert "'d.weight' was tied to 'e.weight'" in said(found)
    assert said(unread) == ""
    assert said(Watch(copy.deepcopy(Tied()), found.state)) == ""


def test_functional_call_changes_nothing():
    model = Modes()
    answers, found = [], []
    model.enc.register_forward_hook(lambda *_: answers.extend(map(said, found)))
    found.append(watch(model, inlined=["enc"], properties=["dtype"]))
    swapped = {name: p.detach() * 2 for name, p in model.named_parameters()}
    torch.func.functional_call(model, swapped, (X,))
    assert answers == [""]


# ---------------------------------------------------------------------- put back


class Leaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.g = torch.Generator().manual_seed(1)
        self.draws = {"np": np.random.default_rng(0), "py": [random.Random(0)]}
        self.old = np.random.RandomState(0)
        self.many = collections.OrderedDict(a=[1], b=collections.deque([2]))
        self.counts = collections.defaultdict(list)
        self.ctx = Config()
        self.cache = {"k": torch.zeros(2)}
        self.seen = torch.zeros(1)

    def forward(self, x):
        self.drawn = [
            torch.rand(1, generator=self.g),
            self.draws["np"].random(),
            self.draws["py"][0].random(),
            self.old.rand(),
        ]
        self.many["a"].append(1)
        self.many["b"].append(1)
        self.many["c"] = 3
        self.counts["x"].append(1)
        self.ctx.scale = 5.0
        self.cache["k"] += 1
        self.seen += 1
        self.l.weight.grad = torch.ones(8, 8)
        return self.bn(self.l(x))


def test_nothing_that_a_forward_does_to_a_model_stays():
    model = Leaks()
    many, deque, ctx, cache = model.many, model.many["b"], model.ctx, model.cache["k"]
    drawn = []
    for _ in range(2):
        state = ModelState(model)
        model(X)
        drawn.append([float(value) for value in model.drawn])
        assert state.filled()
        assert not state.keeps_tensors()
        changed = set(state.changed_tensors())
        state.restore()
        assert changed == {
            *("seen", "cache.k", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
        }
        assert not state.filled()
        assert state.changed_tensors() == [] or changed
    assert drawn[0] == drawn[1]
    assert not hasattr(model, "drawn")
    assert model.many is many
    assert model.many["b"] is deque
    assert model.many == {"a": [1], "b": collections.deque([2])}
    assert model.counts == {}
    assert model.ctx is ctx
    assert model.ctx.scale == 1.0
    assert model.cache["k"] is cache
    assert torch.equal(cache, torch.zeros(2))
    assert model.l.weight.grad is None


@pytest.mark.parametrize(
    "keep",
    [
        lambda m, h: setattr(m.ctx, "loss", h),
        lambda m, h: m.many["b"].append(h),
        lambda m, h: m.counts["x"].append(h),
        lambda m, h: m.many.update(c={"loss": h}),
        lambda m, h: setattr(m.ctx, "losses", [h]),
    ],
)
def test_a_tensor_left_on_a_model_is_seen_wherever_it_lies(keep):
    model = Leaks()
    state = ModelState(model)
    keep(model, torch.ones(1))
    assert state.keeps_tensors()
    state.restore()
    assert not state.keeps_tensors()
    state = ModelState(model)
    model.many["c"] = model.l.weight
    assert not state.keeps_tensors()


def test_a_written_parameter_is_named_and_put_back_if_it_was_protected():
    model = Sub()
    before = model.l.weight.detach().clone()
    state = ModelState(model)
    state.protect(model.l.weight)
    with torch.no_grad():
        model.l.weight.mul_(2)
    model.l.bias.data.add_(0)
    assert state.changed_tensors() == ["l.weight"]
    state.restore()
    assert torch.equal(model.l.weight, before)
    state = ModelState(model)
    model.l.bias = nn.Parameter(torch.ones(8))
    assert state.changed_tensors() == ["l.bias"]


# ---------------------------------------------------------------------- calls


@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    names: list = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("value", "change", "words"),
    [
        (Settings(), lambda s: setattr(s, "scale", 2.0), "Settings"),
        (Settings(), lambda s: s.names.append(1), "Settings"),
        (Config(), lambda s: setattr(s, "scale", 2.0), "Config"),
        ({1, 2}, lambda s: s.add(3), r"\{1, 2\} .* \{1, 2, 3\}"),
        (np.zeros(2), lambda s: s.fill(1), "array"),
    ],
)
def test_a_constant_argument_changed_in_place_is_refused(value, change, words):
    arguments = {"x": X, "cfg": value}
    call = CallSpec.of(arguments)
    call = pickle.loads(pickle.dumps(call))
    assert len(call.flatten(arguments)) == 1
    assert len(call.flatten({"x": X, "cfg": copy.deepcopy(value)})) == 1
    change(value)
    with pytest.raises(fxray.SpecialisationError, match=f"'cfg' was .*{words}"):
        call.flatten(arguments)
    assert call.varying(arguments) is None


def test_what_a_forward_looked_at_of_a_tensor_is_required():
    square = torch.randn(8, 8)
    call = CallSpec.of({"x": square}).exact([square], frozenset(["requires_grad", "stride"]))
    call.flatten({"x": torch.randn(8, 8)})
    with pytest.raises(fxray.SpecialisationError, match="requires_grad of argument 'x' was False"):
        call.flatten({"x": torch.randn(8, 8, requires_grad=True)})
    with pytest.raises(fxray.SpecialisationError, match="lies in memory otherwise"):
        call.flatten({"x": square.t()})
    image = torch.randn(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    assert memory_layout(image) == (True, False, False)
    assert memory_layout(last) == (False, True, False)
    assert memory_layout(image.transpose(1, 2)) != memory_layout(image.transpose(2, 3))


def test_sizes_shown_to_be_the_same_are_accepted_and_in_the_end_free():
    call = CallSpec.of({"ids": torch.zeros(2, 5), "mask": torch.zeros(2, 5), "k": 3})
    longer = {"ids": torch.zeros(2, 7), "mask": torch.zeros(2, 7), "k": 3}
    assert call.varying({"ids": torch.zeros(2, 5), "mask": torch.zeros(2, 5), "k": 3}) == ()
    varying = call.varying(longer)
    assert len(varying) == 2
    assert {size for _, _, size in varying} == {7}
    assert call.varying({**longer, "k": 4}) is None
    assert call.varying({**longer, "mask": None}) is None
    assert call.varying({**longer, "mask": torch.zeros(7)}) is None
    shown = call.with_shown(varying)
    shown = pickle.loads(pickle.dumps(shown))
    assert shown.varying(longer) == ()
    shown.flatten(longer)
    with pytest.raises(fxray.SpecialisationError, match=r"\(2, 5 or 7\)"):
        shown.flatten({**longer, "ids": torch.zeros(2, 6)})
    third = {**longer, "ids": torch.zeros(2, 9), "mask": torch.zeros(2, 9)}
    free = shown.with_shown(shown.varying(third))
    free.flatten({**longer, "ids": torch.zeros(2, 30), "mask": torch.zeros(2, 30)})
    with pytest.raises(fxray.SpecialisationError, match=r"\(2, any from 2\)"):
        free.flatten({**longer, "ids": torch.zeros(2, 1)})
    one = {**longer, "ids": torch.zeros(2, 1), "mask": torch.zeros(2, 1)}
    free.with_shown(free.varying(one)).flatten(one)
