"""What is drawn for what: the data of the artists, not their pixels."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import StepPatch

from fxray.errors import MissingExtraError, NotSavedError, PictureError
from fxray.look.canvas import Scale
from fxray.look.plot import PlotData, plot, rule_for

STEPS = list(range(0, 60, 10))


def data(kind: str, records: Any, *, axes: str = "", **rest: Any) -> PlotData:
    fields = records if isinstance(records, dict) else {"": records}
    rows = len(next(iter(fields.values())))
    rest = {"epochs": [n // 2 for n in range(rows)], "phase": "train", **rest}
    return PlotData("layer1.0.conv1", kind, fields, STEPS[:rows], axes=axes, **rest)


def random(*shape: int, rows: int = len(STEPS)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32))


def images(figure: Figure) -> list[np.ndarray]:
    """Return what is drawn as images, colour bars left out."""
    return [
        np.ma.filled(child.get_array(), np.nan)  # type: ignore[arg-type]
        for axes in figure.axes
        for child in axes.get_children()
        if isinstance(child, AxesImage)
    ]


def words(figure: Figure) -> str:
    return f"{figure.get_suptitle()} {figure.get_supxlabel()}"


STATS = {
    name: [np.float32(n + row) for row in range(len(STEPS))]
    for n, name in enumerate(("mean", "std", "min", "max", "norm", "fraction_zero"))
} | {name: [np.int64(0)] * len(STEPS) for name in ("count", "nan", "inf")}


# Which rule


@pytest.mark.parametrize(
    ("kind", "shape", "axes", "name"),
    [
        ("weight", (8, 3, 5, 5), "OIHW", "filters"),
        ("weight_grad", (8, 3, 5, 5), "", "filters"),
        ("weight", (8, 3, 5), "OIL", "filters"),
        ("weight", (3, 8, 5, 5), "IOHW", "filters"),
        ("weight", (8, 3, 5, 5, 5), "OIDHW", "filters"),
        ("weight", (10, 4), "OI", "matrix"),
        ("weight", (10,), "O", "vectors"),
        ("output", (2, 8, 6, 6), "NCHW", "feature maps"),
        ("grad", (2, 8, 6, 6), "", "feature maps"),
        ("output", (2, 6, 6, 8), "NHWC", "feature maps"),
        ("output", (2, 7, 8), "NTC", "sequences"),
        ("input", (2, 8, 7), "NCL", "sequences"),
        ("output", (2, 8), "NC", "vectors"),
        ("output", (5, 5), "HW", "matrix"),
        ("grad", (8,), "C", "vectors"),
        ("output", (), "", "statistics"),
        ("output", (1,), "C", "statistics"),
        ("output", (2, 2, 4, 5, 6), "NCDHW", "feature maps"),
        ("output", (2, 2, 2, 2, 2), "", "elements"),
        ("output", (2, 2, 2), "CHW", "elements"),
        ("output", (1, 2, 3), "SNC", "elements"),
    ],
)
def test_each_shape_has_its_drawing(kind: str, shape: tuple, axes: str, name: str) -> None:
    given = data(kind, random(*shape), axes=axes)
    assert rule_for(given).name == name
    for figure in (plot(given), plot(given, step=20), plot(given, steps=STEPS)):
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"values": (4,), "indices": (4,)}, "ranks"),
        ({"counts": (8,), "edges": (9,)}, "histograms"),
        ({"mean": (), "std": ()}, "statistics"),
        ({"a": (3,), "b": (2, 2)}, "elements"),
    ],
)
def test_each_selection_of_several_fields_has_its_drawing(fields: dict, name: str) -> None:
    records = {
        field: np.abs(random(*shape)).cumsum(-1) if shape else random()
        for field, shape in fields.items()
    }
    given = data("output", {field: list(rows) for field, rows in records.items()})
    assert rule_for(given).name == name
    for figure in (plot(given), plot(given, step=20)):
        figure.draw_without_rendering()


def test_records_of_changing_rank_are_drawn_as_elements() -> None:
    given = data("output", [np.ones((2, 3)), np.ones(4)])
    assert rule_for(given).name == "elements"
    plot(given).draw_without_rendering()


# Images


def test_filters_are_drawn_as_they_are_around_zero() -> None:
    weights = random(8, 3, 5, 5)
    figure = plot(data("weight", weights, axes="OIHW"))
    drawn = images(figure)
    assert len(drawn) == 24
    expected = [weights[-1][o, i] for i in range(3) for o in range(8)]
    np.testing.assert_array_equal(drawn, np.asarray(expected, dtype=float))
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high
    assert high == np.abs(weights[-1]).max()
    assert figure.axes[0].images[0].get_cmap().name == "RdBu_r"
    assert len(figure.axes) == 2  # the grid and its colour bar


def test_filters_over_steps_are_one_row_each() -> None:
    weights = random(8, 3, 5, 5)
    figure = plot(data("weight", weights, axes="OIHW"), steps=[0, 50])
    drawn = images(figure)
    assert len(drawn) == 2 * 16
    np.testing.assert_array_equal(drawn[16], weights[5][0, 0])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "50"]
    assert "16 of 24 filters" in words(figure)


def test_feature_maps_are_samples_by_channels() -> None:
    maps = [np.abs(a) for a in random(2, 6, 4, 5)]
    figure = plot(data("output", maps, axes="NCHW"), step=10)
    np.testing.assert_array_equal(images(figure), maps[1].reshape(12, 4, 5))
    assert figure.axes[0].images[0].get_cmap().name == "viridis"
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "1"]


def test_a_single_channel_over_steps_is_a_row_of_samples_each() -> None:
    maps = random(3, 1, 4, 4)
    figure = plot(data("input", maps, axes="NCHW"), steps=STEPS)
    np.testing.assert_array_equal(images(figure), np.stack(maps).reshape(18, 4, 4))
    assert figure.axes[0].get_xlabel() == "sample"


def test_what_is_not_among_the_tiles_is_said() -> None:
    said = words(plot(data("output", random(16, 20, 3, 3), axes="NCHW")))
    assert "12 of 16 samples, 16 of 20 channels" in said
    assert "192 of 200 channels" in words(plot(data("output", random(1, 200, 3, 3), axes="NCHW")))
    assert "16 of 32 samples" in words(
        plot(data("output", random(32, 1, 3, 3), axes="NCHW"), steps=STEPS)
    )
    many = PlotData("a", "weight", {"": random(3, 3, rows=9)}, range(9), axes="OI")
    assert "4 of 9 records" in words(plot(many, steps=range(9)))
    assert "records" not in words(plot(many))


def test_channels_that_were_chosen_are_not_numbered_as_the_tensors_own() -> None:
    figure = plot(data("output", random(2, 4, 3, 3), axes="NCHW", sizes=[(2, 64, 3, 3)] * 6))
    assert figure.axes[0].get_xlabel() == "kept channel"


@pytest.mark.parametrize(("shape", "axes"), [((2, 4, 5, 5), "NCHW"), ((2, 4, 5, 5), ""),
                                             ((3, 5, 5), "NTC"), ((3, 5, 5), "")])  # fmt: skip
def test_weights_of_attention_are_a_map_of_queries_by_keys_for_each_head(
    shape: tuple, axes: str
) -> None:
    shares = [np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in random(*shape)]
    given = data("output", shares, axes=axes)
    assert rule_for(given).name == "attention"
    figure = plot(given)
    np.testing.assert_array_equal(images(figure), shares[-1].reshape(-1, 5, 5))
    assert figure.axes[0].get_xlabel() == ("head" if len(shape) == 4 else "")
    assert "queries down, keys across" in words(figure)
    assert len(images(plot(given, steps=STEPS))) == 6 * (4 if len(shape) == 4 else 3)


def test_axes_in_another_order_are_drawn_alike() -> None:
    maps = random(2, 6, 4, 5)
    other = [a.transpose(0, 2, 3, 1) for a in maps]
    first = images(plot(data("output", maps, axes="NCHW")))
    np.testing.assert_array_equal(first, images(plot(data("output", other, axes="NHWC"))))


def test_of_a_volume_the_middle_slice_is_drawn() -> None:
    volumes = random(1, 2, 4, 5, 6)
    figure = plot(data("output", volumes, axes="NCDHW"))
    np.testing.assert_array_equal(images(figure), volumes[-1][0, :, 2])
    assert "middle slice" in words(figure)


def test_sequences_are_tokens_by_channels_of_the_first_sample() -> None:
    tokens = random(2, 7, 8)
    (drawn,) = images(plot(data("output", tokens, axes="NTC")))
    np.testing.assert_array_equal(drawn, tokens[-1][0].T)
    assert len(images(plot(data("output", tokens, axes="NTC"), steps=STEPS))) == 4


def test_a_matrix_is_drawn_as_it_is() -> None:
    weights = random(10, 4)
    (drawn,) = images(plot(data("weight", weights, axes="OI")))
    np.testing.assert_array_equal(drawn, weights[-1])


def test_vectors_are_columns_over_steps() -> None:
    rows = random(2, 8)
    figure = plot(data("output", rows, axes="NC"))
    np.testing.assert_array_equal(images(figure)[1], np.stack([a[1] for a in rows], axis=1))
    assert [a.get_title(loc="left") for a in figure.axes[:2]] == ["sample 0", "sample 1"]
    (single,) = images(plot(data("output", [a[0] for a in rows], axes="C")))
    np.testing.assert_array_equal(single, np.stack([a[0] for a in rows], axis=1))


def test_a_shorter_record_leaves_its_place_empty() -> None:
    figure = plot(data("output", [np.ones(2), np.ones(4)]))
    image = figure.axes[0].images[0]
    np.testing.assert_array_equal(np.asarray(image.get_alpha()), [[1, 1], [1, 1], [0, 1], [0, 1]])


def test_more_elements_than_can_be_seen_are_cut_and_said() -> None:
    figure = plot(data("output", random(5, 10, 10, 10, 2)))
    assert images(figure)[0].shape == (4096, len(STEPS))
    assert "first 4,096 of 10,000 elements" in words(figure)


def test_empty_records_are_drawn_as_nothing() -> None:
    for shape, axes in (((0, 3, 4, 4), "NCHW"), ((2, 0), "NC"), ((0,), "C"), ((0, 3, 4), "NTC")):
        plot(data("output", random(*shape), axes=axes)).draw_without_rendering()


# What is not finite


def test_nan_and_infinity_are_seen_and_move_no_limit() -> None:
    weights = random(10, 4)
    weights[-1][0, 0], weights[-1][1, 1] = np.nan, np.inf
    figure = plot(data("weight", weights, axes="OI"))
    image = figure.axes[0].images[0]
    assert image.get_clim()[1] == np.abs(weights[-1][np.isfinite(weights[-1])]).max()
    mask = np.ma.getmaskarray(image.get_array())  # type: ignore[arg-type]
    np.testing.assert_array_equal(mask, ~np.isfinite(weights[-1]))
    assert tuple(image.get_cmap().get_bad()[:3]) != (0, 0, 0)
    assert "1 NaN, 1 infinite (in yellow)" in words(figure)


def test_nothing_finite_at_all_is_drawn() -> None:
    for shape, axes in (((4, 4), "OI"), ((2, 2, 3, 3), "OIHW")):
        plot(data("weight", [np.full(shape, np.nan)], axes=axes)).draw_without_rendering()
    plot(data("output", [np.float32("nan")] * 3)).draw_without_rendering()


def test_an_outlier_does_not_wash_out_the_rest() -> None:
    values = np.linspace(0, 1, 1000)
    values[0] = 1e6
    scale = Scale.of([values], signed=False)
    assert scale.high < 1.1
    assert scale.beyond == "max"
    assert Scale.of([-values], signed=True).beyond == "min"
    assert Scale.of([np.linspace(0, 1, 1000)], signed=False).beyond == "neither"


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, np.int64, np.bool_, np.complex64]
)
def test_every_dtype_is_drawn(dtype: type) -> None:
    arrays: list[Any] = [a.astype(dtype) for a in random(4, 4)]
    (drawn,) = images(plot(data("weight", arrays, axes="OI")))
    wide = np.abs(arrays[-1]) if dtype is np.complex64 else arrays[-1]
    np.testing.assert_array_equal(drawn, wide.astype(float))


# Curves


def test_statistics_are_lines_with_a_band_around_the_mean() -> None:
    figure = plot(data("grad", STATS))
    mean, norm, zero = figure.axes
    assert [line.get_label() for line in mean.lines] == ["mean", "max", "min"]
    np.testing.assert_array_equal(mean.lines[0].get_ydata(), STATS["mean"])
    np.testing.assert_array_equal(mean.lines[0].get_xdata(), STEPS)
    (band,) = (c for c in mean.collections if isinstance(c, PolyCollection))
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert heights.min() == -1.0  # mean 0 less std 1
    assert heights.max() == 11.0  # mean 5 and std 6
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), STATS["norm"])
    assert zero.get_title(loc="left") == "fraction zero"


def test_statistics_of_one_step_are_all_seen() -> None:
    mean = plot(data("grad", STATS), step=20).axes[0]
    assert {"mean", "± std", "min", "max"} == set(mean.get_legend_handles_labels()[1])
    assert all(
        line.get_marker() == "o" for line in mean.lines if line.get_label() in ("min", "max")
    )


def test_faults_get_a_panel_only_when_there_are_any() -> None:
    faulty = STATS | {
        "nan": [np.int64(n) for n in range(6)],
        "mean": [*STATS["mean"][:5], np.float32("nan")],
    }
    figure = plot(data("grad", faulty))
    assert len(figure.axes) == 4
    cross = figure.axes[0].lines[-1]
    assert cross.get_label() == "not finite"
    np.testing.assert_array_equal(cross.get_xdata(), [50])


def test_the_loss_is_drawn_beneath() -> None:
    figure = plot(data("grad", random()), loss=([0, 1, 2], [3.0, 2.0, 1.0]))
    assert len(figure.axes) == 2
    assert figure.axes[1].get_title(loc="left") == "loss"
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [3.0, 2.0, 1.0])


def test_histograms_are_a_ridge_of_one_shape_per_step() -> None:
    records = {"counts": [np.arange(8)] * 6, "edges": [np.linspace(-1, n + 1, 9) for n in range(6)]}
    figure = plot(data("output", records))
    shapes = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    assert len(shapes) == 6
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [str(s) for s in STEPS]
    (bars,) = plot(data("output", records), step=20).axes[0].patches
    assert isinstance(bars, StepPatch)
    np.testing.assert_array_equal(bars.get_data()[0], np.arange(8))


def test_ranks_follow_an_index_over_steps() -> None:
    records = {
        "indices": [np.array([7, 3]), np.array([3, 7]), np.array([3, 5])],
        "values": [np.array([2.0, 1.0])] * 3,
    }
    figure = plot(data("output", records))
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["3"], [2, 1, 1])
    np.testing.assert_array_equal(lines["7"], [1, 2, np.nan])


def test_one_field_can_be_drawn_alone() -> None:
    figure = plot(data("grad", STATS), field="norm")
    assert len(figure.axes) == 1
    assert "norm" in figure.get_suptitle()
    with pytest.raises(NotSavedError, match="no field 'median'; it has 'mean', 'std'"):
        plot(data("grad", STATS), field="median")


# Words, errors, surroundings


def test_a_figure_says_what_it_shows() -> None:
    sizes = [(64, 16, 9, 9)] * 6
    given = data("grad", random(2, 4, 3, 3), axes="NCHW", sizes=sizes, selection="NaturalSelection")
    said = words(plot(given, step=30))
    for word in ("layer1.0.conv1 · grad", "step 30", "epoch 1", "train", "NaturalSelection"):
        assert word in said
    assert "shape 2×4×3×3 of 64×16×9×9" in said


def test_names_are_not_read_as_formulas() -> None:
    given = PlotData("$\\frac{$", "output", {"": random(3)}, STEPS, selection="$x^$")
    plot(given).draw_without_rendering()


def test_a_step_that_was_not_kept_names_the_nearest() -> None:
    with pytest.raises(NotSavedError, match="not kept at step 33; the nearest is 30"):
        plot(data("grad", random(3)), step=33)
    with pytest.raises(PictureError, match="both step= and steps="):
        plot(data("grad", random(3)), step=0, steps=[0])


def test_several_rows_of_one_step_are_all_drawn() -> None:
    given = PlotData("head", "weight", {"": random(4, 4, rows=3)}, [0, 0, 1], axes="OI")
    assert len(images(plot(given, step=0))) == 2


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(PictureError, match="steps 2, records"):
        PlotData("a", "output", {"": random(3, rows=3)}, [0, 1])
    with pytest.raises(NotSavedError, match="no records of a · output"):
        PlotData("a", "output", {"": []}, [])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fxray.look.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxray\[plot\]'"):
        plot(data("grad", random(3)))


def test_a_figure_shows_itself_in_a_notebook_without_pyplot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plot(data("grad", random(3)))._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
