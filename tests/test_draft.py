"""What will be kept: every way to mark, every word of an entry, every refusal."""

from __future__ import annotations

import itertools
import json
import operator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxray.architecture import Architecture, Op, TensorSpec
from fxray.draft import DEFAULTS, KINDS, Capture, DefaultTable, Draft, Entry, Schedule
from fxray.errors import DraftError, SelectionError, UnknownNameError
from fxray.selections import Mean, NaturalSelection, Stats, TopK, Whole


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(shape, dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.act(self.conv(x)) * self.gain
        return out


class OwnLinear(nn.Linear):
    """A subclass, which the table should know as a linear layer."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = OwnLinear(4, 10)
        self.attention = nn.MultiheadAttention(4, 2)
        self.unused = nn.GRU(2, 2)


IMAGE = spec(8, 4, 28, 28)
CONV = {"weight": spec(4, 4, 3, 3), "bias": spec(4)}
ATTENTION = {"in_proj_weight": spec(12, 4), "out_proj.weight": spec(4, 4)}


def of_module(path: str, key: str, target: str, **more: Any) -> Op:
    kind = key.rpartition("-")[0]
    node = {"train": path.replace(".", "_")}
    return Op(path, key, kind, "module", target, module=path, nodes=node, **more)


def of_function(path: str, key: str, target: str, *inputs: TensorSpec, **more: Any) -> Op:
    kind, role = key.rpartition("-")[0], more.pop("role", "function")
    more = {"outputs": inputs[:1], **more}
    return Op(path, key, kind, role, target, inputs=inputs, **more)


def block(number: int) -> list[Op]:
    path, scope = f"blocks.{number}", (f"blocks.{number}",)
    io = {"inputs": [IMAGE], "outputs": [IMAGE], "scope": scope}
    gain = {f"{path}.gain": spec(4, 1, 1)}
    return [
        of_module(f"{path}.conv", f"conv2d-{number + 1}", "Conv2d", parameters=CONV, **io),
        of_module(f"{path}.act", f"relu-{number}", "ReLU", **io),
        Op(
            f"{path}.gain",
            f"parameter-{number}",
            "parameter",
            "parameter",
            f"{path}.gain",
            outputs=[spec(4, 1, 1)],
            parameters={"gain": gain[f"{path}.gain"]},
        ),
        of_function(f"{path}.mul", f"mul-{number}", "operator.mul", IMAGE, scope=scope),
    ]


def build() -> Architecture:
    small, flat = spec(8, 4, 1, 1), spec(8, 4)
    stem = {"weight": spec(4, 1, 3, 3), "bias": spec(4)}
    head = {"weight": spec(10, 4), "bias": spec(10)}
    functional = "torch.nn.functional.relu"
    ops = [
        Op("x", "input-0", "input", "input", "x", outputs=[spec(8, 1, 28, 28)]),
        of_module("stem", "conv2d-0", "Conv2d", inputs=[spec(8, 1, 28, 28)], outputs=[IMAGE],
                  parameters=stem),
        *block(0),
        *block(1),
        of_function("relu", "relu-2", functional, IMAGE, nodes={"train": "relu_7"}),
        of_function("relu_1", "relu-3", "relu_", IMAGE, role="method"),
        of_function("add", "add-0", "_operator.add", IMAGE, IMAGE),
        of_module("pool", "adaptiveavgpool2d-0", "Pool", inputs=[IMAGE], outputs=[small]),
        of_function("flatten", "flatten-0", "torch.flatten", small, outputs=[flat]),
        of_module("attention", "multiheadattention-0", "MultiheadAttention", inputs=[flat],
                  outputs=[flat, spec(8, 8)], items=("0", "1"), parameters=ATTENTION),
        of_module("head", "ownlinear-0", "OwnLinear", inputs=[flat], outputs=[spec(8, 10)],
                  parameters=head),
        of_function("log_softmax", "logsoftmax-0", "torch.log_softmax", spec(8, 10)),
        of_function("argmax", "argmax-0", "torch.argmax", spec(8, 10),
                    outputs=[spec(8, dtype="int64")]),
        of_function("scale", "scale-0", f"{__name__}.scale", spec(8, 10)),
    ]  # fmt: skip
    chain = [op.path for op in ops if op.role != "parameter"]
    edges = [(tail, head, "0") for tail, head in itertools.pairwise(chain)]
    edges += [("blocks.0.gain", "blocks.0.mul", "1"), ("blocks.1.gain", "blocks.1.mul", "1")]
    modules = {name: type(module).__name__ for name, module in Net().named_modules()}
    returns = {"": ("argmax",), "blocks.0": ("blocks.0.mul",), "blocks.1": ("blocks.1.mul",)}
    return Architecture.build("Net", ops, edges, modules, returns)


def scale(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.fixture
def model() -> Net:
    return Net()


@pytest.fixture
def empty(model: Net) -> Draft:
    return Draft(build(), model, DefaultTable())


@pytest.fixture
def draft(model: Net) -> Draft:
    return Draft(build(), model)


def kept(draft: Draft) -> dict[str, list[str]]:
    """Return the paths kept by kind."""
    found: dict[str, list[str]] = {}
    for row in draft.captures():
        found.setdefault(row.kind, []).append(row.op)
    return found


RELUS = ["blocks.0.act", "blocks.1.act", "relu", "relu_1"]
CONVS = ["stem", "blocks.0.conv", "blocks.1.conv"]
WITH_PARAMETERS = ["blocks.0.conv", "blocks.0.gain"]


# Defaults


def test_defaults_go_by_type_with_their_own_pace(draft: Draft) -> None:
    assert kept(draft) == {"weight": [*CONVS, "head"], "output": [*RELUS, "log_softmax"]}
    assert {row.schedule.every for row in draft.captures() if row.kind == "weight"} == {100}
    assert {row.schedule.every for row in draft.captures() if row.kind == "output"} == {10}


def test_what_a_user_turns_on_is_not_spaced(draft: Draft) -> None:
    draft["relu-2"]["grad"] = True
    assert draft["relu-2"]["every"] == {"output": 10, "grad": 1}
    draft.mark("relu-2", output=True)
    assert draft["relu-2"]["every"] == 1


def test_a_subclass_counts_as_its_type_where_the_model_is_known() -> None:
    assert "head" not in kept(Draft(build()))["weight"]


def test_a_table_of_ones_own(model: Net) -> None:
    table = DefaultTable({"ReLU": {"grad": True, "weight": True, "selection": Mean()}})
    draft = Draft(build(), model, table)
    assert kept(draft) == {"grad": RELUS}  # a relu has no weight to keep
    assert draft["relu-0"]["selection"] == Mean()
    assert "relu" in DEFAULTS.replace({"add": {"output": True}}).entries


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], r"is not a table; write DefaultTable\("),
        ({"relu": True}, "'relu': True is no row"),
        ({"relu": {"ouput": True}}, r"has no flag 'ouput'; nearest: 'output'"),
        ({"relu": {"output": 1}}, "output=1 is not a flag"),
    ],
)
def test_a_wrong_table_is_refused(entries: Any, text: str) -> None:
    with pytest.raises(DraftError, match=text):
        Draft(build(), None, DefaultTable(entries))


# As a dict


def test_keys_are_type_keys_in_graph_order(draft: Draft) -> None:
    keys = list(dict(draft))
    assert keys[:3] == ["input-0", "conv2d-0", "conv2d-1"]
    assert len(draft) == len(keys) == 20
    assert all(isinstance(entry, Entry) for entry in draft.values())


@pytest.mark.parametrize("name", ["relu-2", "ReLU-2", "relu", "relu_7"])
def test_look_up_by_key_path_and_node(draft: Draft, name: str) -> None:
    assert draft[name] is draft["relu-2"]
    assert name in draft


def test_an_entry_is_a_dict_that_takes_effect(draft: Draft) -> None:
    version = draft.version
    draft["relu-2"]["output"] = False
    assert draft.version > version
    assert "relu" not in kept(draft)["output"]
    entry = draft["relu-0"]
    assert dict(entry) == {
        "output": True, "grad": False, "weight": False, "weight_grad": False, "input": False,
        "selection": NaturalSelection(), "every": 10,
    }  # fmt: skip
    assert len(entry) == 7
    assert repr(entry) == repr(dict(entry))
    entry.update(input=True, selection={"input": Mean()}, every=3, start=6, stop=9)
    assert [row for row in draft.captures() if row.op == "blocks.0.act"] == [
        Capture(
            "blocks.0.act", "output", NaturalSelection("NCHW"), Schedule(3, start=6, stop=9), "NCHW"
        ),
        Capture("blocks.0.act", "input", Mean(), Schedule(3, start=6, stop=9), "NCHW"),
    ]
    assert (entry["start"], entry["stop"]) == (6, 9)
    assert list(entry)[-2:] == ["start", "stop"]


def test_deleting_a_key_puts_it_back(draft: Draft) -> None:
    entry = draft["relu-0"]
    entry.update(selection=Mean(), start=4)
    for key in ("output", "selection", "every", "start"):
        del entry[key]
    assert (entry["output"], entry["every"], entry["start"]) == (False, 1, 0)
    assert entry["selection"] == NaturalSelection()


def test_steps_and_every_push_each_other_out(draft: Draft) -> None:
    entry = draft["relu-0"]
    entry["steps"] = [7, 0, 5, 5]
    assert (entry["steps"], entry["every"]) == ((0, 5, 7), 1)
    entry["every"] = 4
    assert (entry["steps"], entry["every"]) == (None, 4)


def test_a_partial_dict_replaces_the_named_entries_only(draft: Draft) -> None:
    others = {key: dict(entry) for key, entry in draft.items() if key != "conv2d-0"}
    draft.replace({"conv2d-0": {"weight_grad": True, "output": False}})
    assert [row.kind for row in draft.captures() if row.op == "stem"] == ["weight_grad"]
    assert draft["stem"]["every"] == 1
    assert {key: dict(entry) for key, entry in draft.items() if key != "conv2d-0"} == others


def test_setting_an_entry_replaces_it(draft: Draft) -> None:
    held = draft["relu-0"]
    draft["relu-0"] = {"grad": True}
    assert (held["output"], held["grad"]) == (False, True)


def test_a_draft_goes_into_a_draft(draft: Draft, empty: Draft) -> None:
    draft.mark("relu-0", output=True, grad=True, every={"grad": 5}, selection={"output": Mean()})
    draft.mark("relu-1", output=True, steps=[0, 5])
    draft["relu-1"]["grad"] = True
    empty.replace(dict(draft))
    assert empty.captures() == draft.captures()


@pytest.mark.parametrize(
    ("entries", "error", "text"),
    [
        ({"relu-9": {}}, UnknownNameError, "no op 'relu-9' in Net; nearest: 'relu-"),
        ({"relu-0": {"ouput": True}}, DraftError, r"relu-0 \(blocks.0.act\) has no flag 'ouput'"),
        ({"relu-0": {"output": 1}}, DraftError, r"relu-0 \(.*\): output=1 is not a flag; give True"),
        ({"relu-0": {"output": "yes"}}, DraftError, "output='yes' is not a flag"),
        ({"relu-0": {"weight": True}}, DraftError, "no weight can be kept, it has no parameters"),
        ({"parameter-0": {"output": True}}, DraftError, 'keep its "weight" or "weight_grad"'),
        ({"input-0": {"input": True}}, DraftError, 'is an input of the model: keep its "output"'),
        ({"argmax-0": {"grad": True}}, DraftError, "it gives int64, which has no gradient"),
        ({"relu-0": {"every": 0}}, DraftError, r"relu-0 \(.*\): every=0 is not a whole number of"),
        ({"relu-0": {"every": 1.5}}, DraftError, "every=1.5 is not a whole number of at least 1"),
        ({"relu-0": {"every": {"ouput": 2}}}, DraftError, "every for 'ouput', which is none of"),
        ({"relu-0": {"steps": []}}, DraftError, r"steps=\(\) is not a list of steps"),
        ({"relu-0": {"steps": [1], "every": 2}}, DraftError, "steps= says all"),
        ({"relu-0": {"start": 5, "stop": 5}}, DraftError, "stop=5 is not a step after start=5"),
        ({"relu-0": {"selection": Mean}}, SelectionError, r"relu-0 \(.*\), selection of its output"),
        ({"relu-0": {"selection": "mean"}}, SelectionError, "'mean' is no selection"),
        ({"relu-0": True}, DraftError, r'True is not a dict of flags; write for example \{"output"'),
        ({"relu-2": {}, "relu": {}}, DraftError, "'relu' names 'relu', which the draft names twice"),
        ([("relu-0", {})], DraftError, "is no draft; write for example"),
    ],
)  # fmt: skip
def test_nothing_changes_when_anything_is_wrong(
    draft: Draft, entries: Any, error: type[Exception], text: str
) -> None:
    before, version = draft.captures(), draft.version
    good = {"conv2d-0": {"output": True}}
    both = {**good, **entries} if isinstance(entries, dict) else entries
    with pytest.raises(error, match=text):
        draft.replace(both)
    assert draft.captures() == before
    assert draft.version == version


def test_clear_keeps_nothing_and_delete_nothing_of_one(draft: Draft) -> None:
    del draft["relu-0"]
    assert kept(draft)["output"] == [*RELUS[1:], "log_softmax"]
    draft.clear()
    assert draft.captures() == ()
    assert len(draft) == 20
    assert "0 captures of 0 of 20 ops" in repr(draft)


def test_update_is_all_or_nothing(draft: Draft) -> None:
    with pytest.raises(UnknownNameError):
        draft.update({"relu-0": {"grad": True}, "nothing-0": {}})
    assert not draft["relu-0"]["grad"]
    draft.update({"relu-0": {"grad": True}})
    assert draft["relu-0"]["grad"]


def test_the_printed_draft_says_what_is_kept(draft: Draft) -> None:
    lines = str(draft).splitlines()
    assert lines[0] == "<Draft for Net: 9 captures of 9 of 20 ops>"
    assert lines[1].split() == ["key", "op", "kind", "selection", "when"]
    assert lines[2].split()[:3] == ["conv2d-0", "stem", "weight"]
    assert lines[2].endswith("every 100")


# What a mark means


@pytest.mark.parametrize(
    ("what", "paths"),
    [
        ("stem", ["stem"]),
        ("relu", RELUS),
        ("ReLU", RELUS),
        ("conv2d", CONVS),
        ("log_softmax", ["log_softmax"]),
        ("logsoftmax", ["log_softmax"]),
        ("relu-2", ["relu"]),
        ("RELU-2", ["relu"]),
        ("relu_7", ["relu"]),
        ("relu_1", ["relu_1"]),
        ("blocks.0", ["blocks.0.mul"]),
        ("blocks.0.act", ["blocks.0.act"]),
        ("blocks.0.*", ["blocks.0.conv", "blocks.0.act", "blocks.0.mul"]),
        ("*.act", RELUS[:2]),
        ("x", ["x"]),
        (F.relu, RELUS[2:]),
        (torch.relu, RELUS[2:]),
        (torch.relu_, RELUS[2:]),
        (torch.Tensor.relu, RELUS[2:]),
        (operator.add, ["add"]),
        (torch.add, ["add"]),
        (torch.Tensor.__add__, ["add"]),
        (F.log_softmax, ["log_softmax"]),
        (scale, ["scale"]),
        (nn.ReLU, RELUS[:2]),
        (nn.Conv2d, CONVS),
        (nn.Linear, ["head"]),
        (Block, ["blocks.0.mul", "blocks.1.mul"]),
        (lambda op: op.type == "relu" and op.role != "module", RELUS[2:]),
        (["relu-2", nn.Linear, F.relu], ["relu", "relu_1", "head"]),
        ({"stem"}, ["stem"]),
        (("stem", ["head"]), ["stem", "head"]),
    ],
)
def test_what_a_mark_means(empty: Draft, what: Any, paths: list[str]) -> None:
    assert empty.mark(what, output=True) == tuple(paths)
    assert kept(empty) == {"output": paths}


def test_a_module_object_is_its_path(empty: Draft, model: Net) -> None:
    assert empty.mark(model.stem, output=True) == ("stem",)
    assert empty.mark(model.blocks[1], grad=True) == ("blocks.1.mul",)
    assert empty.mark(model.blocks[0], weight_grad=True) == tuple(WITH_PARAMETERS)
    assert empty.mark(model, output=True, weight=True)[-1] == "argmax"


def test_the_weights_of_a_composite_are_all_beneath(empty: Draft, model: Net) -> None:
    empty.mark(model.blocks, weight=True)
    assert kept(empty)["weight"] == [*WITH_PARAMETERS, "blocks.1.conv", "blocks.1.gain"]
    empty.mark("blocks.0", weight_grad=True, output=True)
    assert kept(empty)["weight_grad"] == WITH_PARAMETERS
    assert kept(empty)["output"] == ["blocks.0.mul"]


def test_a_parameter_means_the_op_that_owns_it(empty: Draft, model: Net) -> None:
    assert empty.mark(model.stem.bias, weight=True) == ("stem",)
    assert empty.mark(model.blocks[1].gain, weight_grad=True) == ("blocks.1.gain",)
    assert empty.mark(model.attention.out_proj.weight, weight=True) == ("attention",)


def test_an_op_itself(empty: Draft) -> None:
    assert empty.mark(build()["relu-2"], output=True) == ("relu",)


def test_a_shared_module_has_every_path_of_it() -> None:
    model = Net()
    model.blocks[1].act = model.blocks[0].act
    draft = Draft(build(), model, DefaultTable())
    assert draft.mark(model.blocks[0].act, output=True) == tuple(RELUS[:2])


def test_every_call_of_a_module_and_one() -> None:
    twice = [
        of_module("act", "relu-0", "ReLU", outputs=[spec(2, 3)], scope=("b",)),
        attrs.evolve(of_module("act", "relu-1", "ReLU", outputs=[spec(2, 3)]), path="act@1"),
    ]
    returns = {"b": ("act",), "b@1": ("act@1",)}
    draft = Draft(
        Architecture.build("Twice", twice, [], {"": "Twice", "b": "B", "act": "ReLU"}, returns)
    )
    draft.clear()
    assert draft.mark("act", output=True) == ("act", "act@1")
    assert draft.mark("b", grad=True) == ("act", "act@1")
    assert draft.mark("b@1", input=None, grad=False) == ("act@1",)
    assert kept(draft) == {"output": ["act", "act@1"], "grad": ["act"]}


def test_a_class_of_modules_without_the_model_goes_by_name() -> None:
    draft = Draft(build(), None, DefaultTable())
    assert draft.mark(nn.Conv2d, weight=True) == tuple(CONVS)


def test_kinds_that_only_some_can_have_are_kept_where_they_can(empty: Draft) -> None:
    empty.mark("blocks.0.*", output=True, weight=True, input=True, grad=True)
    some = ["blocks.0.conv", "blocks.0.act", "blocks.0.mul"]
    assert kept(empty) == {
        "output": some, "grad": some, "input": some, "weight": WITH_PARAMETERS,
    }  # fmt: skip


def test_false_unmarks_and_leaves_the_rest(draft: Draft) -> None:
    draft.mark("relu", grad=True, output=False)
    assert kept(draft)["grad"] == RELUS
    assert kept(draft)["output"] == ["log_softmax"]


def test_unmark_takes_the_same_names(draft: Draft, model: Net) -> None:
    draft.mark("relu", grad=True)
    assert draft.unmark(F.relu, "output") == tuple(RELUS[2:])
    assert kept(draft)["output"] == [*RELUS[:2], "log_softmax"]
    assert kept(draft)["grad"] == RELUS
    draft.unmark("blocks.*")
    assert kept(draft)["grad"] == RELUS[2:]
    draft.unmark(model)
    assert "weight" not in kept(draft)
    with pytest.raises(DraftError, match=r"no kind 'outptu'; nearest: 'output'\. There are output"):
        draft.unmark("relu", "outptu")


def test_settings_go_to_the_kinds_of_the_mark(draft: Draft) -> None:
    draft.mark("relu-0", grad=True, selection=TopK(3), every=7, start=2, stop=90)
    rows = {row.kind: row for row in draft.captures() if row.op == "blocks.0.act"}
    assert rows["grad"].selection == TopK(3)
    assert rows["grad"].schedule == Schedule(7, start=2, stop=90)
    assert rows["output"].selection == NaturalSelection("NCHW")
    assert rows["output"].schedule == Schedule(10)


def test_settings_by_kind(empty: Draft) -> None:
    empty.mark("stem", output=True, weight=True, selection={"weight": Whole()}, every={"output": 5})
    rows = {row.kind: row for row in empty.captures()}
    assert rows["weight"].selection == Whole()
    assert rows["output"].selection == NaturalSelection("NCHW")
    assert (rows["output"].schedule.every, rows["weight"].schedule.every) == (5, 1)


def test_a_mark_begins_anew(empty: Draft) -> None:
    empty.mark("stem", output=True, selection=Mean(), every=5)
    empty.mark("stem", output=True)
    assert empty.captures() == (
        Capture("stem", "output", NaturalSelection("NCHW"), Schedule(), "NCHW"),
    )


# What a mark refuses


def two(op: Op, other: Op) -> bool:
    return op is other


def broken(op: Op) -> bool:
    raise KeyError(op.key)


@pytest.mark.parametrize(
    ("what", "words", "error", "text"),
    [
        ("stem", {}, DraftError, r"mark\('stem'\): say what to keep of it, e.g. output=True"),
        ("stem", {"output": 1}, DraftError, r"mark\('stem'\): output=1 is not a flag; give True"),
        ("stem", {"output": np.bool_(1)}, DraftError, "is not a flag"),
        ("stm", {"output": True}, UnknownNameError, "no op 'stm' in Net; nearest: 'stem'"),
        ("", {"output": True}, UnknownNameError, "no op '' in Net"),
        ("layer1.*", {"output": True}, UnknownNameError, r"no op's path matches 'layer1.\*' in Net"),
        ("block.*", {"output": True}, UnknownNameError, "nearest: 'blocks'"),
        ("blocks", {"output": True}, DraftError, "'blocks': no output can be kept, the module is "),
        ("blocks.0", {"input": True}, DraftError, "no input can be kept of a module made of several"),
        ("unused", {"output": True}, UnknownNameError, r"'unused' \(GRU\) has no op; no forward"),
        ("attention.out_proj", {"weight": True}, UnknownNameError, "it is part of 'attention', wh"),
        ("relu", {"weight": True}, DraftError, r"none of 4 ops can \(blocks.0.act has no parameters"),
        ("relu-0", {"weight": True}, DraftError, "no weight can be kept, it has no parameters"),
        ("blocks.0.gain", {"output": True}, DraftError, 'it is a bare parameter: keep its "weight"'),
        ("argmax", {"grad": True}, DraftError, "it gives int64, which has no gradient"),
        ("x", {"input": True}, DraftError, 'it is an input of the model: keep its "output"'),
        (nn.GRU, {"output": True}, UnknownNameError, "no GRU in Net: none was called"),
        (nn.Conv1d, {"output": True}, UnknownNameError, "no Conv1d in Net: it has Conv2d"),
        (F.gelu, {"output": True}, UnknownNameError, "Net calls no function or method 'gelu'"),
        (F.adaptive_avg_pool2d, {"output": True}, UnknownNameError,
         r"1 of that type are modules: mark\('adaptiveavgpool2d'\) takes those"),
        (two, {"output": True}, DraftError, "two is no function of this graph, and no predicate"),
        (broken, {"output": True}, DraftError, "predicate broken fails on 'x': KeyError"),
        (lambda op: op.type, {"output": True}, DraftError, "gave 'input' for 'x', not True or False"),
        (lambda op: False, {"output": True}, UnknownNameError, "holds for none of the 20 ops"),
        (nn.Linear(2, 2), {"output": True}, UnknownNameError, "this Linear is not a module of Net"),
        (nn.Conv2d(1, 1, 1), {"output": True}, UnknownNameError, "of its class there are 'stem', "),
        (torch.ones(2), {"weight": True}, UnknownNameError, r"Tensor of shape \(2,\) is not a param"),
        (3, {"output": True}, DraftError, r"cannot mark 3 \(int\); give a path"),
        (int, {"output": True}, DraftError, "cannot mark <class 'int'>"),
        ([], {"output": True}, DraftError, r"\[\] holds nothing to mark"),
        ("stem", {"output": True, "every": 0}, DraftError, r"conv2d-0 \(stem\): every=0 is not"),
        ("stem", {"output": True, "every": True}, DraftError, "every=True is not"),
        ("stem", {"output": True, "steps": "12"}, DraftError, "steps='12' is not a list of steps"),
        ("stem", {"output": True, "steps": [-1]}, DraftError, r"steps=\(-1,\) is not a list"),
        ("stem", {"output": True, "start": -1}, DraftError, "start=-1 is not a step"),
        ("stem", {"output": True, "steps": [1], "every": 5}, DraftError, "steps= says all"),
        ("stem", {"output": True, "every": {"grad": 5}}, DraftError, "every= is for 'grad', which t"),
        ("stem", {"output": False, "every": 5}, DraftError, "every= is for nothing, which this mark"),
        ("stem", {"output": True, "selection": TopK}, SelectionError, r"give an instance: TopK\("),
        ("stem", {"output": True, "selection": {"output": 3}}, SelectionError, "3 is no selection"),
    ],
)  # fmt: skip
def test_a_wrong_mark_says_what_is_right(
    draft: Draft, what: Any, words: dict[str, Any], error: type[Exception], text: str
) -> None:
    before, version = draft.captures(), draft.version
    with pytest.raises(error, match=text):
        draft.mark(what, **words)
    assert draft.captures() == before
    assert draft.version == version


def test_a_parameter_takes_weights_only(empty: Draft, model: Net) -> None:
    with pytest.raises(DraftError, match=r"'stem.weight': no output can be kept, a parameter has"):
        empty.mark(model.stem.weight, output=True)
    with pytest.raises(UnknownNameError, match=r"is 'unused.weight_hh_l0', which no forward"):
        empty.mark(model.unused.weight_hh_l0, weight=True)


def test_objects_need_the_model(model: Net) -> None:
    draft = Draft(build())
    with pytest.raises(DraftError, match="this draft has no model to find Conv2d in; mark it by"):
        draft.mark(model.stem, output=True)


# Captures


def test_axes_follow_kinds_and_types(empty: Draft) -> None:
    empty.mark(lambda op: op.role != "parameter", output=True, grad=True)
    empty.mark(lambda op: op.role != "input", weight=True)
    empty.mark(["stem", "head", "add"], input=True)
    axes = {}
    for row in empty.captures():
        assert isinstance(row.selection, NaturalSelection)
        axes[row.op, row.kind] = row.selection.axes
    assert axes["x", "output"] == axes["stem", "output"] == axes["stem", "input"] == "NCHW"
    assert (
        axes["blocks.1.act", "output"] == axes["relu_1", "grad"] == axes["add", "input"] == "NCHW"
    )
    assert (
        axes["flatten", "output"] == axes["head", "output"] == axes["log_softmax", "grad"] == "NC"
    )
    assert axes["head", "input"] == "NC"
    assert (axes["stem", "weight"], axes["head", "weight"]) == ("OIHW", "OI")
    assert axes["blocks.0.gain", "weight"] is None
    assert axes["argmax", "output"] is None


@pytest.mark.parametrize(
    ("kind", "shape", "axes"),
    [
        ("linear", (2, 3), "NC"),
        ("linear", (2, 7, 3), "NTC"),
        ("linear", (2, 7, 7, 3), "NHWC"),
        ("conv1d", (2, 3, 9), "NCL"),
        ("conv2d", (3, 9, 9), "CHW"),
        ("conv3d", (2, 3, 9, 9, 9), "NCDHW"),
        ("conv_transpose2d", (2, 3, 9, 9), "NCHW"),
        ("max_pool2d", (2, 3, 9, 9), "NCHW"),
        ("batchnorm1d", (2, 3), "NC"),
        ("batchnorm1d", (2, 3, 4), "NCL"),
        ("layernorm", (2, 7, 3), "NTC"),
        ("groupnorm", (2, 3, 4, 4), "NCHW"),
        ("embedding", (2, 7, 3), "NTC"),
        ("lstm", (7, 2, 3), "TNC"),
        ("gelu", (2, 7, 3), "NTC"),
        ("relu", (2, 3, 9, 9), "NCHW"),
        ("permute", (2, 3, 9, 9), None),
        ("einsum", (2, 3), None),
        ("relu", (), None),
    ],
)
def test_axes_by_type(kind: str, shape: tuple[int, ...], axes: str | None) -> None:
    op = of_function("op", f"{kind}-0", kind, spec(*shape))
    draft = Draft(Architecture.build("One", [op], [], {}, {}), None, DefaultTable())
    draft.mark("op", output=True)
    assert draft.captures() == (
        Capture("op", "output", NaturalSelection(axes), Schedule(), axes or ""),
    )


@pytest.mark.parametrize(
    ("kind", "shape", "axes"),
    [
        ("conv1d", (4, 3, 9), "OIL"),
        ("convtranspose2d", (3, 4, 9, 9), "IOHW"),
        ("embedding", (100, 8), "OI"),
        ("layernorm", (8,), "O"),
        ("bilinear", (4, 3, 2), None),
    ],
)
def test_axes_of_weights(kind: str, shape: tuple[int, ...], axes: str | None) -> None:
    parameters = {"weight": spec(*shape), "bias": spec(4)}
    op = of_module("op", f"{kind}-0", kind, parameters=parameters)
    draft = Draft(Architecture.build("One", [op], [], {}, {}), None, DefaultTable())
    draft.mark("op", weight=True, weight_grad=True)
    assert {row.selection for row in draft.captures()} == {NaturalSelection(axes)}


def test_a_bare_parameter_has_the_axes_of_its_use() -> None:
    weight = Op("w", "parameter-0", "parameter", "parameter", "w", parameters={"w": spec(4, 3, 5)})
    conv = of_function("conv1d", "conv1d-0", "torch.conv1d", spec(2, 3, 9))
    draft = Draft(Architecture.build("One", [weight, conv], [("w", "conv1d", "1")], {}, {}))
    draft.mark("w", weight=True)
    assert draft.captures() == (Capture("w", "weight", NaturalSelection("OIL"), Schedule(), "OIL"),)


def test_dims_that_moved_are_not_guessed() -> None:
    square = spec(2, 7, 7)
    ops = [
        of_function("linear", "linear-0", "linear", square),
        of_function("transpose", "transpose-0", "transpose", square),
        of_function("add", "add-0", "add", square),
    ]
    edges = [("linear", "transpose", "0"), ("transpose", "add", "0")]
    draft = Draft(Architecture.build("Moved", ops, edges, {}, {}), None, DefaultTable())
    draft.mark("*", output=True)
    assert [row.selection.axes for row in draft.captures()] == ["NTC", None, None]  # type: ignore[attr-defined]


def test_axes_the_user_gave_stay(empty: Draft) -> None:
    mine = NaturalSelection("NTC", limit=9)
    empty.mark("stem", output=True, selection=mine)
    assert empty.captures()[0].selection == mine


def test_captures_are_in_graph_order_with_kinds_in_theirs(empty: Draft) -> None:
    empty.mark(["head", "stem"], output=True, weight=True, grad=True, input=True, weight_grad=True)
    assert [(row.op, row.kind) for row in empty.captures()] == [
        (path, kind) for path in ("stem", "head") for kind in KINDS
    ]
    assert empty.captures() is empty.captures()


def test_rows_go_to_json(empty: Draft) -> None:
    empty.mark("stem", output=True, selection=TopK(3), steps=[5, 1])
    plain = empty.to_dict()
    assert json.loads(json.dumps(plain)) == plain == [
        {
            "op": "stem",
            "kind": "output",
            "selection": {"name": "fxray.selections.TopK", "settings": {"k": 3}},
            "schedule": {"every": 1, "steps": [1, 5], "start": 0, "stop": None},
        }
    ]  # fmt: skip


# Schedules


schedules = st.one_of(
    st.builds(Schedule, steps=st.lists(st.integers(0, 60), min_size=1, max_size=5)),
    st.builds(
        lambda every, start, more: Schedule(
            every, start=start, stop=None if more is None else start + more
        ),
        st.integers(1, 20),
        st.integers(0, 50),
        st.none() | st.integers(1, 60),
    ),
)


@given(schedules, st.integers(0, 120))
def test_count_is_how_often_it_is_due(schedule: Schedule, steps: int) -> None:
    assert schedule.count(steps) == sum(map(schedule.due, range(steps)))
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@given(schedules, schedules)
def test_names_tell_schedules_apart(one: Schedule, other: Schedule) -> None:
    assert (one.name == other.name) == (one == other)
    assert len(one.name) < 40
    assert one.name.replace("-", "").isalnum()


@pytest.mark.parametrize(
    ("schedule", "name", "text"),
    [
        (Schedule(), "always", "every step"),
        (Schedule(10), "every10", "every 10"),
        (Schedule(1, start=4), "every1from4", "every step from 4"),
        (Schedule(10, start=5), "every10from5", "every 10 from 5"),
        (Schedule(10, start=5, stop=50), "every10from5to50", "every 10 from 5 to 50"),
        (Schedule(steps=(7, 0, 5)), "steps-0-5-7", "steps 0, 5, 7"),
    ],
)
def test_names_of_schedules(schedule: Schedule, name: str, text: str) -> None:
    assert (schedule.name, str(schedule)) == (name, text)


def test_many_steps_have_a_short_name() -> None:
    for many in (20, 1000):
        assert len(Schedule(steps=range(many)).name) == len("steps-") + 8


# Estimates


def test_an_estimate_adds_up(empty: Draft) -> None:
    empty.mark("stem", weight=True, selection=Whole(), every=10)
    empty.mark("relu-2", output=True, selection=Stats())
    cost = empty.estimate(steps=1000)
    stem, relu = cost.rows
    assert (stem.due, stem.records, stem.nbytes) == (100, 200, 100 * 4 * (36 + 4))
    assert (relu.due, relu.records, relu.nbytes) == (1000, 9000, 1000 * (3 * 8 + 6 * 4))
    assert cost.bytes == 16_000 + 48_000
    assert cost.records == 9200
    assert (stem.chunks, relu.chunks) == (2, 9)
    assert cost.seconds > 0
    assert str(cost).splitlines()[-1].startswith("1,000 steps: 62.5 KiB, 9,200")


def test_an_estimate_of_an_input_goes_by_the_input(empty: Draft) -> None:
    empty.mark("pool", input=True, output=True, selection=Whole())
    output, given = empty.estimate(steps=1).rows
    assert (output.nbytes, given.nbytes) == (8 * 4 * 4, 8 * 4 * 28 * 28 * 4)


def test_larger_records_fill_more_chunks(empty: Draft) -> None:
    empty.mark("stem", output=True, selection=Whole())
    assert empty.estimate(steps=10).rows[0].nbytes == 10 * 8 * 4 * 28 * 28 * 4
    assert empty.estimate(steps=10).chunks == 2  # 98 KiB each: 8 to the MiB


def test_what_has_no_shape_is_unknown_and_said() -> None:
    ops = [of_module("act", "relu-0", "ReLU"), of_function("add", "add-0", "add", spec(2, 2))]
    draft = Draft(Architecture.build("Net", ops, [], {}, {}))
    draft.mark("add", output=True)
    cost = draft.estimate(steps=10)
    assert [row.op for row in cost.unknown] == ["act"]
    assert cost.bytes == 10 * 16
    assert "not counted, size unknown: act output (traced without an input" in str(cost)


class Failing:
    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        raise ValueError("too small")  # noqa: EM101, TRY003

    def __repr__(self) -> str:
        return "Failing()"


def test_a_selection_that_fails_makes_the_cost_unknown(empty: Draft) -> None:
    empty.mark("stem", output=True, selection=Failing())
    assert "Failing() fails on float32[8, 4, 28, 28]: ValueError: too small" in str(
        empty.estimate(steps=1)
    )


def test_an_estimate_of_nothing(empty: Draft) -> None:
    assert str(empty.estimate(steps=0)).startswith("0 steps: 0 B, 0 records")
    for steps in (-1, 1.5, True):
        with pytest.raises(DraftError, match="give a whole number of training steps"):
            empty.estimate(steps)  # type: ignore[arg-type]
