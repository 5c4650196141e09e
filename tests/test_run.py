"""The read side, over runs that are written by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from fxray.architecture import Architecture, Op, TensorSpec
from fxray.errors import (
    MissingExtraError,
    NotARunError,
    NotSavedError,
    StoreError,
    UnknownNameError,
)
from fxray.run import Run, Series, open_run, runs
from fxray.store import ArrayInfo, Record, Row, ZarrStore, open_store

if TYPE_CHECKING:
    from collections.abc import Callable

SECOND = 1_000_000_000
NATURAL = {"name": "fxray.selections.NaturalSelection", "settings": {"limit": 16384}}


def make_architecture() -> Architecture:
    spec = TensorSpec((2, 3), "float32")
    return Architecture.build(
        "Net",
        [
            Op("x", "x-0", "x", "input", "x", outputs=[spec]),
            Op("layer1.conv1", "conv2d-0", "conv2d", "module", "torch.nn.Conv2d",
               module="layer1.conv1", scope=["layer1"], nodes={"train": "layer1_conv1"},
               parameters={"weight": TensorSpec((2,), "float32"),
                           "bias": TensorSpec((1,), "float32")}),
            Op("layer1.relu", "relu-0", "relu", "function", "torch.nn.functional.relu",
               scope=["layer1"], nodes={"train": "relu_1"}),
            Op("lstm", "lstm-0", "lstm", "module", "torch.nn.LSTM", module="lstm",
               items=["0", "1.0", "1.1"]),
            Op("head", "linear-0", "linear", "module", "torch.nn.Linear", module="head"),
        ],
        [("x", "layer1.conv1", "0"), ("layer1.conv1", "layer1.relu", "0"),
         ("layer1.relu", "lstm", "0"), ("lstm", "head", "0")],
        {"": "Net", "layer1": "Sequential", "layer1.conv1": "Conv2d", "lstm": "LSTM",
         "head": "Linear"},
        {"": ("head",), "layer1": ("layer1.relu",)},
    )  # fmt: skip


def info(
    op: str, kind: str, shape: tuple[int, ...], dtype: str = "float32", **more: Any
) -> ArrayInfo:
    given = {"parameter": "", "item": "", "field": "", "size": list(shape), "axes": "",
             "selection": NATURAL, "type": op.rpartition(".")[2], **more}  # fmt: skip
    parts = (op, kind, given["parameter"], given["item"], given["field"], given.pop("as_", ""))
    return ArrayInfo(".".join(filter(None, parts)), dtype, shape, {"op": op, "kind": kind, **given})


def full(
    value: float, *shape: int, dtype: str = "float32", size: tuple[int, ...] | None = None
) -> Record:
    values = np.full(shape, value, dtype)
    return Record(values, tuple(shape) if size is None else size)


OUTPUT = info("layer1.relu", "output", (2, 3), axes="NC", size=[8, 3])
WEIGHT = info("layer1.conv1", "weight", (2,), parameter="weight", type="conv2d")
BIAS = info("layer1.conv1", "weight", (1,), parameter="bias", type="conv2d")
BIAS_GRAD = info("layer1.conv1", "weight_grad", (1,), "bfloat16", parameter="bias")
MEAN, COUNT = (info("head", "output", (), dtype, field=field, selection={"name": "Stats"})
               for field, dtype in (("mean", "float32"), ("count", "int64")))  # fmt: skip
ITEMS = [info("lstm", "output", shape, item=item)
         for item, shape in (("0", (2, 4)), ("1.0", (4,)), ("1.1", (4,)))]  # fmt: skip
FORWARD = [OUTPUT, WEIGHT, BIAS, MEAN, COUNT, *ITEMS]
ATTRIBUTES = {
    "id": "8f3a01", "name": "baseline", "started": "2026-01-01T00:00:00+00:00", "finished": None,
    "tags": {"lr": 0.1}, "model": {"class": "Net", "parameters": 3, "fingerprint": "ab"},
    "notes": ["head grad: no gradient"],
}  # fmt: skip


def forward(step: int, call: int = 0) -> dict[str, Record]:
    value = step + call / 10
    return {
        OUTPUT.name: full(value, 2, 3, size=(8, 3)),
        WEIGHT.name: full(value, 2),
        BIAS.name: full(value, 1),
        MEAN.name: full(value),
        COUNT.name: full(step, dtype="int64"),
        **{one.name: full(value + i, *one.shape) for i, one in enumerate(ITEMS)},
    }


def write_run(store: ZarrStore, run_id: str = "8f3a01", **attributes: Any) -> str:
    """Steps 0, 10, … 90 in training (step 50 with three calls), four valid rows, a log."""
    graph = make_architecture().to_dict()
    store.begin_run(run_id, {**ATTRIBUTES, "id": run_id, **attributes}, graph)
    about = {"phase": "train", "moment": "forward", "schedule": {"every": 10}, "rank": 0}
    train = store.writer(run_id, "train.forward.every10.r0", about)
    optimizer = store.writer(run_id, "train.optimizer.every10.r0", {**about, "moment": "optimizer"})
    valid = store.writer(run_id, "valid.forward.every10.r0", {**about, "phase": "valid"})
    log = store.writer(run_id, "log.r0", {"moment": "log", "rank": 0})
    for one in FORWARD:
        train.declare(one)
        valid.declare(one)
    optimizer.declare(BIAS_GRAD)
    log.declare(ArrayInfo("loss", "float64", ()))
    log.declare(ArrayInfo("acc", "float64", ()))
    for step in range(0, 100, 10):
        epoch, batch = step // 50, step % 50 // 10
        for call in range(3 if step == 50 else 1):
            row = Row(step, epoch, batch, call, "train", (step * 10 + call) * SECOND)
            train.append(row, forward(step, call))
        row = Row(step, epoch, batch, 0, "train", (step * 10 + 5) * SECOND)
        bits = np.full(1, step, ml_dtypes.bfloat16).view("uint16")
        optimizer.append(row, {BIAS_GRAD.name: Record(bits, (1,))})
        logged = {"loss": full(1 / (1 + step), dtype="float64")}
        logged |= {"acc": full(step, dtype="float64")} if step % 20 == 0 else {}
        log.append(row, logged)
        if step % 50 == 40:
            for batch in range(2):
                row = Row(step + 1, epoch, batch, batch, "valid", (step * 10 + 6) * SECOND)
                valid.append(row, forward(-step - batch))
    for writer in (train, optimizer, valid, log):
        writer.close()
    return run_id


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("runs")
    write_run(open_store(where))
    return where


@pytest.fixture
def run(place: Path) -> Run:
    return open_run(place)


# One record.


def test_a_step_is_its_training_record_with_true_shape_and_dtype(run: Run) -> None:
    record = run["layer1.relu"].output[20]
    assert record.shape == (2, 3)
    assert record.dtype == np.float32
    assert (record == 20).all()


@pytest.mark.parametrize("name", ["layer1.relu", "relu-0", "ReLU-0", "relu_1", "layer1"])
def test_an_op_is_found_by_path_type_key_fx_name_and_module(run: Run, name: str) -> None:
    assert (run[name].output[20] == 20).all()


def test_the_root_answers_with_what_the_model_returns(run: Run) -> None:
    assert run[""].output.op == "head"


def test_parameters_are_found_by_name_and_weight_is_a_shorthand(run: Run) -> None:
    conv = run["conv2d-0"]
    assert conv.weight.parameter == "weight"
    assert conv.parameter("weight")[30].shape == (2,)
    assert (conv.parameter("bias")[30] == [30]).all()
    assert run["layer1"].parameter("conv1.bias")[30] == 30


def test_bfloat16_is_read_as_itself_and_widened_for_xarray(run: Run) -> None:
    series = run["layer1.conv1"].parameter_grad("bias")
    assert series[90].dtype == ml_dtypes.bfloat16
    assert series.dtype == ml_dtypes.bfloat16
    widened: Any = series.to_xarray()
    assert widened.dtype == np.float32
    assert widened.values[:, 0].tolist() == list(range(0, 100, 10))


def test_several_calls_of_a_step_are_an_error_that_names_the_repaired_call(run: Run) -> None:
    series = run["layer1.relu"].output
    with pytest.raises(NotSavedError, match=r"3 records with step=50, of call 0, 1, 2") as caught:
        series[50]
    found = re.search(r"\.sel\((.*)\)", str(caught.value))
    repaired = found[1] if found else ""
    assert repaired == "step=50, call=0"
    assert (series.sel(step=50, call=2) == np.float32(50.2)).all()


def test_an_unknown_step_names_the_nearest_that_were_kept(run: Run) -> None:
    with pytest.raises(NotSavedError, match=r"at step 43; nearest: 40, 50") as caught:
        run["layer1.relu"].output[43]
    assert "10 of them" in str(caught.value)


def test_what_stands_in_another_epoch_is_told_from_what_was_never_kept(run: Run) -> None:
    series = run["layer1.relu"].output
    assert (series.sel(epoch=1, batch=3) == 80).all()
    with pytest.raises(NotSavedError, match=r"no record with epoch=7; there are: epoch 0, 1"):
        series.sel(epoch=7)
    with pytest.raises(NotSavedError, match=r"records with epoch=0, of batch 0, 1"):
        series.sel(epoch=0)


def test_another_phase_is_named(run: Run) -> None:
    series = run["layer1.relu"].output
    assert (series.sel(step=41, batch=1, phase="valid") == -41).all()
    with pytest.raises(NotSavedError, match="only in 'train', 'valid'"):
        series.sel(step=41, phase="eval")


def test_without_training_the_only_phase_is_meant_and_of_two_one_must_be_named(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)
    store.begin_run("a1", {"id": "a1"}, make_architecture().to_dict())
    for phase in ("eval", "test"):
        writer = store.writer("a1", f"{phase}.forward.always.r0", {"phase": phase, "rank": 0})
        writer.declare(OUTPUT)
        writer.append(Row(0, phase=phase), {OUTPUT.name: full(1, 2, 3)})
        writer.close()
        series = open_run(tmp_path)["relu-0"].output
        if phase == "eval":
            assert (series[0] == 1).all()
    with pytest.raises(NotSavedError, match=r"phases 'eval', 'test'; say which: phase='eval'"):
        series[0]


def test_series_take_steps_only(run: Run) -> None:
    with pytest.raises(TypeError, match="a step or a slice"):
        run["layer1.relu"].output["mean"]


# Series.


def test_a_series_has_its_coordinates_in_the_order_of_steps(run: Run) -> None:
    series = run["layer1.relu"].output
    train = series.in_phase("train")
    assert train.steps.tolist() == [0, 10, 20, 30, 40, 50, 50, 50, 60, 70, 80, 90]
    assert train.calls.tolist() == [0] * 6 + [1, 2] + [0] * 4
    assert train.epochs.tolist() == [0] * 5 + [1] * 7
    assert train.batches.tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 3, 4]
    assert set(train.phases) == {"train"}
    assert train.times[1] == np.datetime64(100, "s")
    assert len(series) == 16
    assert (np.diff(series.steps) >= 0).all()


def test_a_slice_of_steps_excludes_its_stop(run: Run) -> None:
    series = run["layer1.relu"].output
    assert series[10:30].steps.tolist() == [10, 20]
    assert series[:30:20].steps.tolist() == [0, 20]
    assert series[30:].in_phase("valid").steps.tolist() == [41, 41, 91, 91]


def test_iteration_gives_rows_and_records(run: Run) -> None:
    pairs = list(run["layer1.relu"].output[0:30])
    assert pairs[1][0] == Row(10, 0, 1, 0, "train", 100 * SECOND)
    assert [record[0, 0] for _, record in pairs] == [0, 10, 20]


def test_statistics_have_fields_and_a_record_is_a_dict(run: Run) -> None:
    series = run["head"].output
    assert series.fields == ("mean", "count")
    assert series[20] == {"mean": 20.0, "count": 20}
    assert series.field("mean")[20] == 20.0
    assert series.field("count").dtype == np.int64
    assert series.shape == {"mean": (), "count": ()}
    with pytest.raises(UnknownNameError, match=r"no field 'means'; nearest: 'mean'"):
        series.field("means")


def test_several_tensors_of_one_op_are_fields_too(run: Run) -> None:
    series = run["lstm"].output
    assert series.fields == ("0", "1.0", "1.1")
    assert series[20]["1.1"].tolist() == [22] * 4
    assert series.field("1.0").to_numpy().shape == (16, 4)


def test_what_a_series_is_for_a_plot(run: Run) -> None:
    series = run["layer1.relu"].output
    assert (series.op, series.kind, series.axes) == ("layer1.relu", "output", "NC")
    assert series.selection == NATURAL
    assert series.original_size(20) == (8, 3)
    assert series.type == "relu"


def test_to_numpy_stacks_in_the_order_of_the_series(run: Run) -> None:
    series = run["layer1.relu"].output
    expected = np.stack([record for _, record in series])
    stacked = series.to_numpy()
    assert stacked.dtype == np.float32
    assert np.array_equal(stacked, expected)
    with pytest.raises(NotSavedError, match=r"\.field\('mean'\)\.to_numpy\(\)"):
        run["head"].output.to_numpy()


# Missing, ragged, changed.


def write_small(
    store: ZarrStore,
    stream: str,
    declared: list[ArrayInfo],
    rows: list[tuple[Row, dict[str, Record]]],
    **attributes: Any,
) -> None:
    writer = store.writer("a1", stream, {"phase": "train", "rank": 0, **attributes})
    for one in declared:
        writer.declare(one)
    for row, records in rows:
        writer.append(row, records)
    writer.close()


@pytest.fixture
def small(tmp_path: Path) -> ZarrStore:
    store = open_store(tmp_path)
    store.begin_run("a1", {"id": "a1"}, make_architecture().to_dict())
    return store


def test_records_of_different_shape_come_back_as_they_were_and_are_padded_for_xarray(
    small: ZarrStore,
) -> None:
    ints = info("head", "output", (2,), "int32")
    rows = [(Row(i), {OUTPUT.name: full(i, 2, 2 + i, size=(i, 9)),
                      ints.name: full(i, i + 1, dtype="int32")}) for i in range(3)]  # fmt: skip
    write_small(small, "train.forward.always.r0", [OUTPUT, ints], rows)
    series = open_run(small.place.name)["relu-0"].output
    assert [record.shape for _, record in series] == [(2, 2), (2, 3), (2, 4)]
    assert series.original_size(2) == (2, 9)
    with pytest.raises(NotSavedError, match="differ in shape"):
        series.to_numpy()
    array: Any = series.to_xarray()
    assert array.dims == ("row", "N", "C")
    assert array.values[0, 0, :4].tolist()[:2] == [0, 0]
    assert np.isnan(array.values[0, :, 2:]).all()
    padded: Any = open_run(small.place.name)["head"].output.to_xarray()
    assert padded.dtype == np.float64
    assert np.isnan(padded.values[0, 1:]).all()
    assert padded.values[2, :3].tolist() == [2, 2, 2]


def test_rows_without_a_record_are_not_in_the_series(small: ZarrStore) -> None:
    rows = [(Row(i), {OUTPUT.name: full(i, 2, 3)} if i % 2 else {}) for i in range(6)]
    write_small(small, "train.forward.always.r0", [OUTPUT, MEAN], rows)
    run = open_run(small.place.name)
    assert run["relu-0"].output.steps.tolist() == [1, 3, 5]
    assert run["head"].output.steps.tolist() == []
    with pytest.raises(NotSavedError, match="step 2; nearest: 1, 3"):
        run["relu-0"].output[2]
    with pytest.raises(NotSavedError):
        run["head"].output[0]
    assert len(run["head"].output.to_xarray()["mean"]) == 0
    assert run["relu-0"].output.to_numpy()[:, 0, 0].tolist() == [1, 3, 5]


def test_a_series_spans_the_streams_of_a_changed_schedule(small: ZarrStore) -> None:
    every = [(Row(i, time=i), {OUTPUT.name: full(i, 2, 3)}) for i in range(3)]
    tens = [(Row(i, time=i), {OUTPUT.name: full(i, 2, 3)}) for i in range(10, 40, 10)]
    write_small(small, "train.forward.every10.r0", [OUTPUT], tens)
    write_small(small, "train.forward.always.r0", [OUTPUT], every)
    series = open_run(small.place.name)["relu-0"].output
    assert series.steps.tolist() == [0, 1, 2, 10, 20, 30]
    assert series.to_numpy()[:, 0, 0].tolist() == [0, 1, 2, 10, 20, 30]
    array: Any = series.to_xarray()
    assert array[4].values[0, 0] == 20


def test_a_changed_selection_is_one_series_with_different_dims(small: ZarrStore) -> None:
    scalar = info("layer1.relu", "output", (), as_="2", selection={"name": "Mean"})
    rows = [(Row(0), {OUTPUT.name: full(0, 2, 3)}), (Row(1), {scalar.name: full(1)})]
    write_small(small, "train.forward.always.r0", [OUTPUT, scalar], rows)
    series = open_run(small.place.name)["relu-0"].output
    assert series[0].shape == (2, 3)
    assert series[1].shape == ()
    with pytest.raises(NotSavedError, match=r"selection of layer1\.relu\.output was changed"):
        series.to_xarray()


def test_each_rank_is_a_series_of_its_own(small: ZarrStore) -> None:
    for rank in (0, 1):
        rows = [(Row(5), {OUTPUT.name: full(rank, 2, 3)})]
        write_small(small, f"train.forward.always.r{rank}", [OUTPUT], rows, rank=rank)
    series = open_run(small.place.name)["relu-0"].output
    assert series.ranks == (0, 1)
    assert series[5][0, 0] == 0
    assert series.rank(1)[5][0, 0] == 1
    with pytest.raises(NotSavedError, match="rank 7 kept no"):
        series.rank(7)


# Names and what was not kept.


def test_an_unknown_op_names_the_nearest(run: Run) -> None:
    with pytest.raises(
        UnknownNameError, match=r"no op 'layer1\.rel' in Net; nearest: 'layer1\.relu'"
    ):
        run["layer1.rel"]


def test_what_was_not_kept_says_what_was(run: Run) -> None:
    with pytest.raises(NotSavedError, match=r"grad of 'layer1\.relu' was not kept; kept of it: ou"):
        _ = run["layer1.relu"].grad
    with pytest.raises(NotSavedError, match=r"nothing of it was; run\.captures\(\) lists all"):
        _ = run["x"].output
    with pytest.raises(UnknownNameError, match=r"no parameter 'wight'; it has 'weight'"):
        run["layer1.conv1"].parameter("wight")
    with pytest.raises(NotSavedError, match=r"weight_grad, parameter 'weight', of 'layer1\.conv1'"):
        _ = run["layer1.conv1"].weight_grad


@pytest.mark.parametrize(("op", "ask"), [
    ("layer1.relu", lambda kept: kept.grad), ("head", lambda kept: kept.grad),
    ("layer1", lambda kept: kept.grad),
    ("layer1.conv1", lambda kept: kept.parameter_grad("weight")),
])  # fmt: skip
def test_what_kept_nothing_quotes_the_reason_that_was_noted(
    tmp_path: Path, op: str, ask: Callable[[Any], Any]
) -> None:
    notes = ["2 rows were dropped",
             "nothing was kept of the grad of head, layer1.relu: no gradient came (frozen)",
             "nothing was kept of the weight_grad of layer1.conv1: no optimizer stepped"]  # fmt: skip
    write_run(open_store(tmp_path), notes=notes)
    why = "no optimizer stepped; kept" if op == "layer1.conv1" else r"no gradient came \(frozen\); "
    with pytest.raises(NotSavedError, match=f"was not kept: {why}"):
        ask(open_run(tmp_path)[op])


def test_a_module_that_returns_several_ops_names_them(small: ZarrStore) -> None:
    plain = make_architecture().to_dict()
    plain["returns"]["layer1"] = ["layer1.conv1", "layer1.relu"]
    small.begin_run("b1", {"id": "b1"}, plain)
    with pytest.raises(UnknownNameError, match=r"'layer1\.conv1', 'layer1\.relu'; ask for one"):
        _ = open_run(small.place.name, "b1")["layer1"].output


# Runs.


def test_everything_at_one_step_by_op_and_kind(run: Run) -> None:
    everything = run.at(step=30)
    assert list(everything) == ["layer1.conv1", "layer1.relu", "lstm", "head"]
    assert set(everything["layer1.conv1"]) == {"weight", "weight.bias", "weight_grad.bias"}
    assert everything["head"]["output"] == {"mean": 30.0, "count": 30}
    with pytest.raises(NotSavedError, match=r"at step 35; nearest: 30, 40"):
        run.at(step=35)
    with pytest.raises(NotSavedError, match=r"\.sel\(step=50, call=0\)"):
        run.at(step=50)
    assert run.at(step=50, call=1)["head"]["output"]["mean"] == np.float32(50.1)


def test_a_narrower_run_keeps_to_steps_phases_and_ops(run: Run) -> None:
    narrow = run.where(step=slice(20, 50), op="layer1.*")
    assert narrow["layer1.relu"].output.in_phase("train").steps.tolist() == [20, 30, 40]
    assert {row.op for row in narrow.captures()} == {"layer1.conv1", "layer1.relu"}
    with pytest.raises(NotSavedError):
        _ = narrow["head"].output
    assert set(run.where(phase="valid").steps) == {41, 91}
    assert {row.op for row in run.where(op="layer1").captures()} == {"layer1.conv1", "layer1.relu"}
    assert run.where(op="relu-0", epoch=1).steps.tolist() == [50, 60, 70, 80, 90, 91]
    assert len(narrow.where(op="head").captures()) == 0
    with pytest.raises(UnknownNameError, match="no op 'layer9"):
        run.where(op="layer9.*")


def test_captures_are_rows_with_counts_and_bytes(run: Run) -> None:
    table = run.captures()
    (relu,) = [row for row in table if row.op == "layer1.relu"]
    assert relu.records == 16
    assert (relu.first_step, relu.last_step) == (0, 91)
    assert (relu.shape, relu.dtype, relu.nbytes) == ((2, 3), "float32", 16 * 24)
    assert relu.phases == ("train", "valid")
    assert relu.selection == "NaturalSelection"
    frame = table.to_pandas()
    assert frame.query("field == 'mean'").records.tolist() == [16]
    assert len(frame) == len(table)


def test_the_summary_says_layers_steps_batches_phases_and_size(run: Run) -> None:
    text = str(run)
    for part in ("run 8f3a01 'baseline'", "model Net, 3 parameters", "tags lr=0.1", "not finished",
                 "steps 0–91 (12 kept)", "epochs 0–1", "batches 0–4", "phases train, valid",
                 "logged: loss, acc", "note: head grad: no gradient"):  # fmt: skip
        assert part in text, part
    assert re.search(r"^layer1\.relu +output +NaturalSelection +train, valid +16 +0–91 +2×3 +float32"
                     r" +384 B$", text, re.MULTILINE)  # fmt: skip


def test_fields_and_tensors_of_one_selection_are_one_row_of_the_summary(run: Run) -> None:
    text = str(run)
    for row in (r"head +output +Stats \(2 fields\) +train, valid +16 +0–91 +scalar +float32, int64",
                r"lstm +output +NaturalSelection \(3 tensors\) +train, valid +16 +0–91 +2×4, 4 ",
                r"layer1\.conv1 +weight +Nat", r"layer1\.conv1 +weight\.bias +Nat"):  # fmt: skip
        assert len(re.findall(f"^{row}", text, re.MULTILINE)) == 1, row
    every = repr(run.captures())
    for name in ("output.mean", "output.count", "output.1.0", "weight.bias"):
        assert re.search(rf" {name} ", every), name
    assert len(run.captures()) == len(FORWARD) + 1


def test_a_long_summary_says_where_the_rest_is(small: ZarrStore) -> None:
    ops = [info(f"op{n}", "output", (2,)) for n in range(45)]
    write_small(small, "train.forward.always.r0", ops, [(Row(0), {})])
    lines = str(open_run(small.place.name)).splitlines()
    assert lines[-1] == (
        "… and 5 more. Of one layer: run['op40'] in Python, fxray show PLACE op40 in a shell; "
        "of all: run.captures()"
    )


@pytest.fixture
def remarked(small: ZarrStore) -> Run:
    """Steps 0 to 3 kept by one selection, 4 to 6 by another, under another name."""
    stats = [info("head", "output", (), field=f, selection={"name": "x.Stats"}) for f in "ab"]
    whole = info("head", "output", (2, 3), as_="", selection={"name": "x.Whole"}, size=[2, 3])
    again = attrs.evolve(whole, name=f"{whole.name}#2")
    rows = [(Row(n), {one.name: full(n) for one in stats}) for n in range(4)]
    rows += [(Row(n), {again.name: full(n, 2, 3)}) for n in range(4, 7)]
    write_small(small, "train.forward.always.r0", [*stats, again], rows)
    return open_run(small.place.name)


def test_what_was_marked_anew_has_a_row_for_each_selection(remarked: Run) -> None:
    text = str(remarked)
    assert re.search(
        r"^head +output +Stats \(2 fields\) +train +4 +0–3 +scalar", text, re.MULTILINE
    )
    assert re.search(r"^head +output +Whole +train +3 +4–6 +2×3", text, re.MULTILINE)
    assert [(row.field, row.records) for row in remarked.captures()] == [
        ("a", 4),
        ("b", 4),
        ("", 3),
    ]
    assert remarked.badges() == {"head": {"output": "×7"}}


def test_logged_numbers_are_series_over_steps(run: Run) -> None:
    assert list(run.log) == ["loss", "acc"]
    assert run.log["loss"].steps.tolist() == list(range(0, 100, 10))
    assert run.log["loss"][10] == pytest.approx(1 / 11)
    assert run.log["acc"].steps.tolist() == list(range(0, 100, 20))
    assert "loss" not in {row.op for row in run.captures()}
    with pytest.raises(NotSavedError, match="nothing was logged as 'los'; logged: 'loss'"):
        run.log["los"]
    assert "loss" in run.log
    assert "los" not in run.log
    assert run.log.get("los") is None


def test_refresh_shows_what_was_committed_meanwhile(small: ZarrStore) -> None:
    writer = small.writer("a1", "train.forward.always.r0", {"phase": "train", "rank": 0})
    run = open_run(small.place.name)
    assert "nothing was kept yet" in str(run)
    writer.declare(OUTPUT)
    writer.append(Row(0), {OUTPUT.name: full(0, 2, 3)})
    assert run.refresh().steps.tolist() == []
    writer.commit()
    assert run.steps.tolist() == []
    assert run.refresh().steps.tolist() == [0]
    writer.append(Row(1), {OUTPUT.name: full(1, 2, 3)})
    small.update_run("a1", {"finished": "2026-01-02"})
    small.writer("a1", "log.r0", {"moment": "log", "rank": 0}).close()
    writer.close()
    before = run["relu-0"].output
    assert run.refresh()["relu-0"].output.steps.tolist() == [0, 1]
    assert run.summary.finished == "2026-01-02"
    assert before.steps.tolist() in ([0], [0, 1])


# Finding runs.


@pytest.fixture
def many(tmp_path: Path) -> Path:
    store = open_store(tmp_path)
    for run_id, name, started in [("ab01", "first", "2026-01-01"), ("ab02", "twice", "2026-01-03"),
                                  ("cd01", "twice", "2026-01-02")]:  # fmt: skip
        store.begin_run(run_id, {"id": run_id, "name": name, "started": started}, {})
    return tmp_path


@pytest.mark.parametrize(("asked", "found"), [
    (None, "ab02"), ("ab01", "ab01"), ("c", "cd01"), ("first", "ab01"), ("twice", "ab02"),
])  # fmt: skip
def test_a_run_is_the_latest_or_found_by_id_prefix_or_name(
    many: Path, asked: str | None, found: str
) -> None:
    assert open_run(many, asked).id == found


def test_a_run_that_cannot_be_meant_names_those_that_can(many: Path) -> None:
    with pytest.raises(NotARunError, match="begin with 'ab': ab01, ab02"):
        open_run(many, "ab")
    with pytest.raises(NotARunError, match="no run 'frist'; nearest: 'first'"):
        open_run(many, "frist")


def test_runs_are_listed_oldest_first_and_print_as_a_table(many: Path) -> None:
    listed = runs(many)
    assert [summary.id for summary in listed] == ["ab01", "cd01", "ab02"]
    assert str(listed).splitlines()[1].split()[:2] == ["ab01", "first"]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        listed[0].id = "zz"  # type: ignore[misc]


def test_a_folder_without_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotARunError, match="holds no fxray runs"):
        open_run(tmp_path)
    with pytest.raises(NotARunError):
        runs(tmp_path / "nothing")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(NotARunError):
        runs(tmp_path / "other")


def test_a_damaged_graph_is_named(small: ZarrStore) -> None:
    small.begin_run("b1", {"id": "b1", "started": "3"}, {"ops": {"x": 1}})
    with pytest.raises(StoreError, match="graph of run b1 is damaged"):
        open_run(small.place.name)["x"]


# Elsewhere.


def test_a_series_is_labelled_and_lazy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    array = run["layer1.relu"].output.to_xarray()
    assert isinstance(array, xr.DataArray)
    assert array.name == "layer1.relu.output"
    assert set(array.coords) == {"step", "epoch", "batch", "call", "phase", "time"}
    assert array.step.dims == ("row",)
    assert array.time.dtype == "datetime64[ns]"
    assert not array.variable._in_memory
    chosen = array.isel(row=(array.step == 50).values & (array.call == 1).values)
    assert not chosen.variable._in_memory
    assert (chosen.values == np.float32(50.1)).all()
    mean = array.groupby("epoch").mean()
    assert mean.sizes["epoch"] == 2


def test_fields_make_a_dataset(run: Run) -> None:
    dataset = run["head"].output.to_xarray()
    assert isinstance(dataset, xr.Dataset)
    assert dataset["mean"].values[0] == 0
    assert dataset["count"].dtype == np.int64


def test_statistics_make_a_table_over_steps(run: Run) -> None:
    frame = run["head"].output.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame.index.name == "step"
    assert frame[frame.phase == "train"]["mean"].loc[20] == 20
    assert run.log["loss"].to_pandas()["loss"].iloc[0] == 1
    with pytest.raises(NotSavedError, match=r"\.to_xarray\(\)"):
        run["layer1.relu"].output.to_pandas()


def test_the_whole_run_is_a_tree_with_a_node_for_each_stream(run: Run) -> None:
    assert isinstance(run.to_xarray(), xr.DataTree)
    tree: Any = run.to_xarray()
    assert set(tree.children) == {"train.forward.every10.r0", "train.optimizer.every10.r0",
                                  "valid.forward.every10.r0", "log.r0"}  # fmt: skip
    node: Any = tree["train.forward.every10.r0"]
    assert node["layer1.relu.output"].sel(row=node.step.values == 20).values.max() == 20
    assert not node["layer1.relu.output"].variable._in_memory
    assert np.isnan(tree["log.r0"]["acc"].values[1])
    narrow: Any = run.where(step=slice(20, 40)).to_xarray()["train.forward.every10.r0"]
    assert narrow.step.values.tolist() == [20, 30]
    assert (narrow["layer1.relu.output"].values[:, 0, 0] == [20, 30]).all()


def test_zarr_and_xarray_read_the_same_numbers_without_fxray(run: Run, place: Path) -> None:
    stream = place / "8f3a01" / "train.forward.every10.r0"
    plain: Any = zarr.open_group(stream, mode="r")
    opened: Any = xr.open_zarr(stream)
    expected = run["layer1.relu"].output.in_phase("train").to_numpy()
    assert np.array_equal(plain["layer1.relu.output"][:], expected)
    assert np.array_equal(opened["layer1.relu.output"].values, expected)
    assert opened.step.values.tolist() == plain["step"][:].tolist()


@pytest.mark.parametrize(("library", "ask"), [
    ("xarray", lambda run: run["layer1.relu"].output.to_xarray()),
    ("xarray", lambda run: run.to_xarray()),
    ("pandas", lambda run: run["head"].output.to_pandas()),
])  # fmt: skip
def test_without_the_extra_the_error_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, library: str, ask: Callable[[Run], Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'fxray[xarray]'")):
        ask(run)


def test_reading_imports_no_xarray_pandas_or_matplotlib(place: Path) -> None:
    code = (
        "import sys; from fxray.run import open_run; "
        f"run = open_run({str(place)!r}); run['relu-0'].output[20]; str(run); "
        "print(sorted({'xarray', 'pandas', 'matplotlib', 'zarr'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Pictures.


def test_badges_say_how_often_each_kind_was_kept(run: Run, tmp_path: Path) -> None:
    assert run.badges()["layer1.relu"] == {"output": "×16"}
    written = run.render(tmp_path / "net.dot")
    text = Path(written).read_text("utf-8")
    assert "×16" in text
    assert "baseline" in text


def test_a_series_plots_itself(run: Run) -> None:
    for series in (run["layer1.relu"].output, run["layer1.conv1"].weight, run["head"].output,
                   run["lstm"].output, run.log["loss"],
                   run["layer1.conv1"].parameter_grad("bias")):  # fmt: skip
        figure = series.plot()
        assert figure.get_axes(), series
    assert run["head"].output.plot(field="mean", loss=run.log["loss"]).get_axes()
    assert run["lstm"].output.plot(field="1.0").get_axes()
    with pytest.raises(NotSavedError):
        run["layer1.relu"].output.plot(step=33)


def drawn(figure: Any) -> str:
    return f"{figure.get_suptitle()} {figure.get_supxlabel()}"


def test_a_picture_names_what_it_is_of(run: Run) -> None:
    assert drawn(run.log["loss"].plot()).startswith("loss train")
    assert "scalar" not in drawn(run.log["loss"].plot())
    said = drawn(run["layer1.relu"].output.plot())
    assert "shape 2×3 of 8×3" in said
    narrowed = run["head"].output.field("mean")
    assert drawn(narrowed.plot()) == drawn(run["head"].output.plot(field="mean"))
    assert "head · output · mean" in drawn(narrowed.plot())


def test_a_loss_is_drawn_by_its_name_and_in_the_phase_it_was_logged_in(run: Run) -> None:
    figure = run["head"].output.plot(phase="valid", loss=run.log["acc"])
    axes = figure.get_axes()[-1]
    assert axes.get_title(loc="left") == "acc"
    assert axes.lines[0].get_xdata().tolist() == list(range(0, 100, 20))  # type: ignore[union-attr]


def test_of_what_was_marked_anew_the_last_selection_is_drawn_or_that_of_the_steps(
    remarked: Run,
) -> None:
    series = remarked["head"].output
    assert "Whole" in drawn(series.plot())
    assert "Stats" in drawn(series.plot(steps=[1, 2]))
    assert "Stats" in drawn(series.plot(field="a"))


def test_a_step_that_was_not_kept_is_named_beside_one_that_was(run: Run) -> None:
    with pytest.raises(NotSavedError, match=r"kept at step 33; nearest: 30, 40"):
        run["layer1.relu"].output.plot(steps=[0, 33])


def test_no_record_is_read_that_is_not_drawn(
    small: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = info("head", "weight", (4, 3), parameter="weight", axes="OI")
    rows = [(Row(n), {weight.name: full(n, 4, 3)}) for n in range(300)]
    write_small(small, "train.forward.always.r0", [weight], rows)
    series = open_run(small.place.name)["head"].weight
    (reader,) = {type(source.reader) for source in series.sources}
    reads: list[int] = []
    monkeypatch.setattr(
        reader, "read", lambda self, name, row: reads.append(row) or np.ones((4, 3))
    )
    series.plot()
    assert reads == [299]
    reads.clear()
    assert "4 of 300 records" in drawn(series.plot(steps=range(300)))
    assert set(reads) == {0, 100, 199, 299}


def test_a_series_shows_what_it_is(run: Run) -> None:
    assert repr(run["layer1.relu"].output).startswith(
        "<Series layer1.relu.output: 16 records, steps"
    )
    assert "fields mean, count" in repr(run["head"].output)
    assert "nothing was kept" in repr(run["x"])
    assert isinstance(run["layer1"].series[0], Series)
