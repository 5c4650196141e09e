"""Which numbers of one tensor are kept: the laws, and each shipped selection by numpy."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxray.architecture import TensorSpec
from fxray.errors import SelectionError
from fxray.selections import (
    Histogram,
    Mean,
    NaturalSelection,
    Norm,
    Sample,
    Selection,
    Slice,
    Stats,
    TopK,
    Whole,
    check_selection,
    describe,
    select,
    spec_of,
)
from fxray.selections.sums import numbers_in_one_loop
from fxray.testing import SelectionTests, tensors

SHIPPED: tuple[Selection, ...] = (
    NaturalSelection(),
    NaturalSelection("NCHW", limit=12),
    NaturalSelection("OIHW", limit=9),
    NaturalSelection("NC", limit=3),
    Whole(),
    Slice("..., ::2"),
    TopK(4),
    Sample(5, seed=3),
    Mean(),
    Norm(),
    Stats(),
    Histogram(7),
    Histogram(3, (-1.0, 2.0)),
)


class TestShipped(SelectionTests):
    selections = SHIPPED
    # An index with a slice needs a dim to slice.
    tensors = tensors(shapes=st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=1, max_size=4))


class TestShippedOfScalars(SelectionTests):
    selections = tuple(each for each in SHIPPED if not isinstance(each, Slice))
    tensors = tensors(shapes=st.just([]))


# The conformance class itself: each law fails for what breaks it.


class View:
    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1]


class InPlace:
    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.zero_().clone()


class Liar(Whole):
    def spec(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec((*spec.shape, 1), spec.dtype)


class Noise:
    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(3)


def one_more(k: int) -> int:
    return k + 1


@attrs.frozen
class Forgetful:
    k: int = attrs.field(default=2, converter=one_more)

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.sum()


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (View(), "test_the_result_owns_its_memory"),
        (InPlace(), "test_nothing_is_written_in_place"),
        (Liar(), "test_what_is_promised_comes"),
        (Noise(), "test_the_same_tensor_gives_the_same"),
        (Forgetful(), "test_settings_go_to_json_and_back"),
        (Mean, "test_it_is_a_selection"),
    ],
)
def test_every_law_can_fail(wrong: Selection, law: str) -> None:
    class Tests(SelectionTests):
        selections = (wrong,)
        tensors: ClassVar = tensors(dtypes=(torch.float32,), shapes=st.just([3, 2]))

    with pytest.raises((AssertionError, SelectionError)):
        getattr(Tests(), law)()


def test_an_empty_conformance_class_fails() -> None:
    with pytest.raises(AssertionError, match="name your selections"):
        SelectionTests().test_there_is_something_to_test()


# NaturalSelection


def test_natural_keeps_the_first_samples_spaced_channels_and_strided_space() -> None:
    tensor = torch.arange(64 * 256 * 56 * 56, dtype=torch.int32).view(64, 256, 56, 56)
    kept = NaturalSelection("NCHW").make_selection(tensor)
    assert torch.equal(kept, tensor[:5, ::16, ::4, ::4])
    assert kept.is_contiguous()


def test_natural_keeps_kernels_whole_and_spaces_filters() -> None:
    tensor = torch.arange(512 * 512 * 9).view(512, 512, 3, 3)
    kept = NaturalSelection("OIHW").make_selection(tensor)
    assert torch.equal(kept, tensor[::13, ::13])


def test_natural_keeps_small_tensors_whole() -> None:
    tensor = torch.randn(8, 10)
    assert torch.equal(NaturalSelection("NC").make_selection(tensor), tensor)
    assert torch.equal(NaturalSelection().make_selection(tensor), tensor)


def test_natural_strides_tokens_before_it_drops_channels() -> None:
    kept = spec_of(NaturalSelection("NTC"), TensorSpec((8, 1024, 768), "float32"))
    assert kept == TensorSpec((4, 256, 16), "float32")


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.integers(1, 5000),
    st.sampled_from([None, "NCHW", "NTC", "OIHW", "OI", "NC", "C", "NHWC", "NCDHW", "TNC"]),
)
def test_natural_stays_within_its_limit(shape: list[int], limit: int, axes: str | None) -> None:
    kept = NaturalSelection(axes, limit).spec(TensorSpec(tuple(shape), "float32"))
    assert kept.numel <= limit
    assert len(kept.shape) == len(shape)
    assert all((n == 0) == (m == 0) for n, m in zip(kept.shape, shape, strict=True))


@given(st.integers(1, 40), st.integers(1, 40))
def test_natural_keeps_of_a_sample_what_it_keeps_in_any_batch(one: int, other: int) -> None:
    selection = NaturalSelection("NCHW", limit=200)
    tensor = torch.arange(40 * 24 * 9 * 9).view(40, 24, 9, 9)
    few, many = selection.make_selection(tensor[:one]), selection.make_selection(tensor[:other])
    shared = min(len(few), len(many))
    assert shared > 0
    assert torch.equal(few[:shared], many[:shared])


def test_natural_reckons_once_for_every_batch_size() -> None:
    # Else a compiled graph would be made anew, and a cache filled, by every batch size.
    selection = NaturalSelection("NCHW")
    assert selection._index((8, 3, 40, 40)) is selection._index((9, 3, 40, 40))


def test_natural_of_a_bias_and_of_unknown_dims() -> None:
    selection = NaturalSelection("OIHW", limit=4)
    assert selection.axes_of(4) == "OIHW"
    assert selection.axes_of(1) == "O"
    assert selection.axes_of(3) == ""
    assert NaturalSelection("NCHW").axes_of(1) == ""
    assert torch.equal(selection.make_selection(torch.arange(8)), torch.tensor([0, 2, 4, 6]))


def test_natural_is_bound_once() -> None:
    assert NaturalSelection().bind("NTC") == NaturalSelection("NTC")
    assert NaturalSelection("NCHW").bind("NTC") == NaturalSelection("NCHW")


@pytest.mark.parametrize("axes", ["", "nchw", "N1", 3, "ÄB"])
def test_natural_refuses_axes_that_are_no_letters(axes: object) -> None:
    with pytest.raises(SelectionError, match=r'capital letter per dim; write axes="NCHW"'):
        NaturalSelection(axes)  # type: ignore[arg-type]


# Places


@pytest.mark.parametrize(
    ("index", "text", "want"),
    [
        ("0:4,::8", "0:4, ::8", np.s_[0:4, ::8]),
        ("-1", "-1", np.s_[-1]),
        (" 0 , ... , 2: ", "0, ..., 2:", np.s_[0, ..., 2:]),
        (np.s_[1:3, ..., ::2], "1:3, ..., ::2", np.s_[1:3, ..., ::2]),
        (slice(2), ":2", np.s_[:2]),
        (..., "...", np.s_[...]),
    ],
)
def test_slice_is_numpys_basic_index(index: Any, text: str, want: Any) -> None:
    tensor = torch.arange(4 * 5 * 16).view(4, 5, 16)
    selection = Slice(index)
    assert selection.index == text
    assert np.array_equal(selection.make_selection(tensor).numpy(), tensor.numpy()[want])


@pytest.mark.parametrize("index", ["", "a", "::-1", "::0", "..., ...", "1:2:3:4", "1.5", None])
def test_slice_refuses_what_is_no_index(index: str) -> None:
    with pytest.raises(SelectionError, match=r'write for example Slice\("0:4, ..., ::8"\)'):
        Slice(index)


def test_slice_that_does_not_fit_says_so() -> None:
    with pytest.raises(SelectionError, match=r"Slice\(index='9'\) fails on float32\[2, 3\]: Index"):
        spec_of(Slice("9"), TensorSpec((2, 3), "float32"))


def test_topk_goes_by_magnitude_and_keeps_signs() -> None:
    kept = TopK(2).make_selection(torch.tensor([[1.0, -5.0], [2.0, 0.0]]))
    assert kept["values"].tolist() == [-5.0, 2.0]
    assert kept["indices"].tolist() == [1, 2]


def test_topk_of_a_strided_tensor_counts_in_its_own_order() -> None:
    tensor = torch.arange(6).view(2, 3).t()
    kept = TopK(1).make_selection(tensor)
    assert tensor.reshape(-1)[kept["indices"]].tolist() == kept["values"].tolist() == [5]


@pytest.mark.parametrize("extra", [0, 1, 4095])
def test_topk_of_a_long_tensor_in_two_rounds(extra: int) -> None:
    tensor = torch.randperm(20 * 4096 + extra) - 30_000
    want = tensor.abs().sort(descending=True)
    kept = TopK(9).make_selection(tensor)
    assert kept["values"].abs().tolist() == want.values[:9].tolist()
    assert torch.equal(tensor[kept["indices"]], kept["values"])


def test_topk_puts_nan_first_and_survives_extremes_of_ints() -> None:
    assert TopK(1).make_selection(torch.tensor([9.0, torch.nan]))["values"].isnan().all()
    assert TopK(1).make_selection(torch.tensor([127, -128], dtype=torch.int8))["indices"] == 1


@given(tensors(shapes=st.just([4, 7])), st.integers(1, 40), st.integers(0, 2**63))
def test_sample_keeps_distinct_places_in_order(tensor: torch.Tensor, n: int, seed: int) -> None:
    sample = Sample(n, seed)
    places = sample.positions(tensor.numel())
    assert torch.equal(places, places.unique())
    assert len(places) == min(n, 28)
    assert set(places.tolist()) <= set(range(28))
    want = tensor.reshape(-1).view(torch.uint8).view(28, -1)[places]
    assert torch.equal(sample.make_selection(tensor).view(torch.uint8).view(len(places), -1), want)


def test_sample_is_fixed_by_its_seed_and_covers_the_tensor() -> None:
    places = Sample(100, 1).positions(10_000)
    assert torch.equal(places, Sample(100, 1).positions(10_000))
    assert not torch.equal(places, Sample(100, 2).positions(10_000))
    assert torch.equal(places // 100, torch.arange(100))
    # Spread within their runs: of 100 uniform offsets the mean is 49.5 ± 2.9.
    offsets = torch.stack([Sample(100, s).positions(10_000) % 100 for s in range(50)]).double()
    assert abs(float(offsets.mean()) - 49.5) < 2
    assert float(offsets.std()) == pytest.approx(28.9, abs=1.5)
    assert min(len(row.diff().unique()) for row in offsets) > 50  # and in no pattern


def test_uint16_is_sampled_though_torch_cannot_take_it() -> None:
    tensor = torch.arange(10).to(torch.uint16)
    assert Sample(10).make_selection(tensor).tolist() == list(range(10))


# Numbers, by numpy


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return what the numbers are about, in float64: magnitudes of complex numbers."""
    wide = tensor.to(torch.complex128) if tensor.is_complex() else tensor.to(torch.float64)
    return (wide.abs() if tensor.is_complex() else wide).numpy()


def close(got: torch.Tensor, want: Any) -> None:
    np.testing.assert_allclose(got.double().numpy(), want, rtol=3e-5, atol=3e-6)


@settings(max_examples=300)
@given(tensors())
def test_stats_is_what_numpy_says(tensor: torch.Tensor) -> None:
    got, x = Stats().make_selection(tensor), as_numpy(tensor)
    assert int(got["count"]) == x.size
    assert int(got["nan"]) == np.isnan(x).sum()
    assert int(got["inf"]) == np.isinf(x).sum()
    close(got["norm"], np.linalg.norm(x.ravel()))
    if x.size == 0:
        fields = ("mean", "std", "min", "max", "fraction_zero")
        assert all(bool(got[field].isnan()) for field in fields)
        return
    with np.errstate(invalid="ignore"):
        close(got["mean"], x.mean())
        close(got["std"], x.std())
    close(got["min"], x.min())
    close(got["max"], x.max())
    close(got["fraction_zero"], (x == 0).mean())


def test_stats_does_not_cancel_far_from_zero() -> None:
    tensor = 10_000 + torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    got, x = Stats().make_selection(tensor), tensor.double().numpy()
    assert float(got["std"]) == pytest.approx(x.std(), rel=1e-3)
    assert float(got["norm"]) == pytest.approx(np.linalg.norm(x), rel=1e-5)


def test_stats_of_half_precision_does_not_overflow() -> None:
    got = Stats().make_selection(torch.full((1000,), 60_000.0, dtype=torch.float16))
    assert float(got["norm"]) == pytest.approx(60_000 * math.sqrt(1000), rel=1e-4)
    assert got["mean"].dtype == torch.float32


def test_stats_of_large_ints_are_exact() -> None:
    got = Stats().make_selection(torch.tensor([2**40 + 1, 3]))
    assert float(got["max"]) == 2**40 + 1


@given(tensors())
def test_mean_and_norm_are_what_numpy_says(tensor: torch.Tensor) -> None:
    x = as_numpy(tensor)
    close(Norm().make_selection(tensor), np.linalg.norm(x.ravel()))
    if tensor.numel() and not tensor.is_complex():
        with np.errstate(invalid="ignore"):
            close(Mean().make_selection(tensor), x.mean())
    if tensor.numel() == 0:
        assert bool(Mean().make_selection(tensor).isnan())


def test_the_mean_of_complex_numbers_is_complex() -> None:
    assert complex(Mean().make_selection(torch.tensor([1 + 2j, 3 + 4j]))) == 2 + 3j


@settings(max_examples=300)
@given(tensors(), st.integers(1, 9), st.sampled_from([None, (-1.0, 2.0), (0.0, 0.5)]))
def test_histogram_is_numpys(
    tensor: torch.Tensor, bins: int, ends: tuple[float, float] | None
) -> None:
    got, x = Histogram(bins, ends).make_selection(tensor), as_numpy(tensor)
    finite = x[np.isfinite(x)]
    edges = got["edges"].double().numpy()
    counts, _ = np.histogram(finite, edges)
    want_edges = np.histogram_bin_edges(finite, bins, ends)
    np.testing.assert_allclose(edges, want_edges, rtol=1e-5, atol=1e-6)
    assert got["counts"].sum() <= finite.size
    if ends is None:
        assert got["counts"].sum() == finite.size
    # The edges found may round past the outermost element; only the counts inside must agree.
    assert np.abs(got["counts"].numpy() - counts).sum() <= (2 if ends is None else 0)


def test_histogram_of_extremes_has_finite_edges() -> None:
    top = torch.finfo(torch.float32).max
    got = Histogram(4).make_selection(torch.tensor([-top, top, 0.0]))
    assert got["counts"].tolist() == [1, 0, 1, 1]
    assert bool(got["edges"].isfinite().all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Histogram(0),
        lambda: Histogram(4, (1.0, 1.0)),
        lambda: Histogram(4, (0.0, math.inf)),
        lambda: Histogram(4, (0.0,)),
        lambda: TopK(0),
        lambda: TopK(k=True),
        lambda: TopK(2.0),  # type: ignore[arg-type]
        lambda: Sample(-1),
        lambda: Sample(3, seed=-1),
        lambda: NaturalSelection(limit=0),
    ],
)
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(SelectionError, match="is not"):
        make()  # type: ignore[operator]


# The verbs


@dataclasses.dataclass(frozen=True)
class Row:
    number: int = 1
    places: tuple[int, ...] = (1, 2)

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.number]


@attrs.frozen
class Derived:
    _k: int = 2
    twice: int = attrs.field(init=False, default=4)

    def make_selection(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.sum()


class Plain:
    def __init__(self) -> None:
        self.scale = math.inf
        self.function = object()
        self.table = {1: [torch.float32]}
        self._cache = 3

    def make_selection(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"low": tensor.amin(), "high": tensor.amax()}


def test_describe_reads_attrs_dataclasses_and_plain_objects() -> None:
    assert describe(TopK(8)) == {"name": "fxray.selections.TopK", "settings": {"k": 8}}
    assert describe(Histogram(3, (0, 1)))["settings"] == {"bins": 3, "range": [0, 1]}
    assert describe(Row())["settings"] == {"number": 1, "places": [1, 2]}
    assert describe(Row())["name"] == f"{__name__}.Row"
    assert describe(Derived())["settings"] == {"k": 2}
    plain = describe(Plain())["settings"]
    assert plain == {
        "scale": "inf",
        "function": "<object object>",
        "table": {"1": ["torch.float32"]},
    }
    json.dumps(plain, allow_nan=False)


def test_a_users_class_needs_make_selection_only() -> None:
    check_selection(Row())
    assert spec_of(Row(), TensorSpec((3, 4), "bfloat16")) == TensorSpec((4,), "bfloat16")
    assert spec_of(Plain(), TensorSpec((3,), "int64")) == {
        "low": TensorSpec((), "int64"),
        "high": TensorSpec((), "int64"),
    }


def test_a_view_is_copied_by_select() -> None:
    tensor = torch.arange(6.0).view(2, 3).requires_grad_()
    kept = select(Row(), tensor)[""]
    with torch.no_grad():
        tensor.zero_()
    assert kept.tolist() == [3.0, 4.0, 5.0]
    assert not kept.requires_grad
    own = torch.zeros(3)
    assert select(Returns(own), torch.ones(2))[""].data_ptr() == own.data_ptr()


def test_sparse_tensors_are_made_dense() -> None:
    tensor = torch.eye(3).to_sparse()
    for selection in (Whole(), Returns(tensor), NaturalSelection()):
        assert torch.equal(select(selection, tensor)[""], torch.eye(3))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (TopK, r"TopK is a class, not a selection; give an instance: TopK\(\.\.\.\)"),
        (torch.mean, r"has no method make_selection\(tensor\).*Whole\(\)"),
        ("mean", r"'mean' is no selection: str has no method"),
    ],
)
def test_what_is_no_selection_is_refused(wrong: object, text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        check_selection(wrong)


@attrs.frozen(eq=False)
class Returns:
    result: object

    def make_selection(self, tensor: torch.Tensor) -> Any:
        return self.result


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (1.5, "returned float, not a tensor or a mapping.*not tensor.mean().item()"),
        ({}, "returned an empty mapping"),
        ([torch.ones(1)], "returned list"),
        ({"a.b": torch.ones(1)}, "names a field 'a.b'; a field is named like a python variable"),
        ({1: torch.ones(1)}, "names a field 1"),
        ({"a": 2}, "field 'a' is int, not Tensor"),
    ],
)
def test_a_wrong_result_is_refused(result: object, text: str) -> None:
    with pytest.raises(SelectionError, match=text.replace("()", r"\(\)")):
        select(Returns(result), torch.ones(2))
    with pytest.raises(SelectionError, match=text.replace("()", r"\(\)")):
        spec_of(Returns(result), TensorSpec((2,), "float32"))


class WrongSpec(Whole):
    def spec(self, spec: TensorSpec) -> TensorSpec:
        return (3, 4)  # type: ignore[return-value]


def test_a_wrong_spec_is_refused() -> None:
    with pytest.raises(SelectionError, match="spec returned tuple, not a TensorSpec"):
        spec_of(WrongSpec(), TensorSpec((3,), "float32"))


# Compiled


@pytest.mark.parametrize("selection", SHIPPED, ids=repr)
def test_it_compiles_into_one_graph_for_any_batch(selection: Selection) -> None:
    torch._dynamo.reset()

    def run(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return select(selection, tensor.detach())

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 6):
        tensor = torch.randn(batch, 3, 5, 4)
        got, want = compiled(tensor), run(tensor)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], equal_nan=True)


# Stats: one reading, however it is reckoned


def spread_out(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    made = torch.randn(size, generator=generator).relu_().sub_(0.2)
    made[::3] = 0
    return made.to(dtype)


def same_as_numpy(got: dict[str, torch.Tensor], tensor: torch.Tensor) -> None:
    """Check the nine numbers, of which some may be NaN, against numpy in float64."""
    x = as_numpy(tensor)
    want = {
        "count": x.size,
        "nan": np.isnan(x).sum(),
        "inf": np.isinf(x).sum(),
        "min": x.min(),
        "max": x.max(),
        "norm": np.linalg.norm(x.ravel()),
        "fraction_zero": (x == 0).mean(),
    }
    with np.errstate(invalid="ignore"):
        want |= {"mean": x.mean(), "std": x.std()}
    promised = Stats().spec(TensorSpec.of(tensor))
    assert {name: TensorSpec.of(number) for name, number in got.items()} == promised
    for name, number in want.items():
        np.testing.assert_allclose(
            got[name].double().numpy(), number, rtol=1e-5, atol=1e-6, err_msg=name
        )


LONG = {
    "even": lambda: spread_out(1 << 20),
    "with a rest": lambda: spread_out((1 << 19) + 12_345),
    "bfloat16": lambda: spread_out(600_001, torch.bfloat16),
    "float64": lambda: spread_out(400_001, torch.float64) * 1e150,
    "ints": lambda: torch.arange(-300_000, 300_000),
    "complex": lambda: torch.complex(spread_out(300_000), spread_out(300_000)),
    "transposed": lambda: spread_out(1 << 20).view(512, 2048).t(),
    "channels last": lambda: spread_out(1 << 19).view(8, 64, 32, 32).transpose(1, 3),
    "every other": lambda: spread_out(1 << 20).view(4, 2, -1)[:, :, ::2],
    "expanded": lambda: torch.tensor([1.0, 3.0]).view(2, 1).expand(2, 300_000),
    "wide rows": lambda: spread_out(1 << 20).view(2, -1)[:, 1:],
}


@pytest.mark.parametrize("name", LONG)
def test_stats_of_a_long_tensor_are_what_numpy_says(name: str) -> None:
    tensor = LONG[name]()
    same_as_numpy(Stats().make_selection(tensor), tensor)


@pytest.mark.parametrize("size", [100, 300_000, 600_000])
@pytest.mark.parametrize(
    "values",
    [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf], [torch.nan, torch.inf]],
)
def test_a_single_odd_element_is_told_wherever_it_stands(size: int, values: list[float]) -> None:
    tensor = spread_out(size)
    for place in (0, size // 2, size - len(values)):
        odd = tensor.clone()
        odd[place : place + len(values)] = torch.tensor(values)
        same_as_numpy(Stats().make_selection(odd), odd)


@pytest.mark.parametrize("size", [100, 700_000])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.1, -3e38, 3e38, 1e-30, 1e-42])
def test_stats_of_a_constant_have_no_spread(size: int, value: float) -> None:
    tensor = torch.full((size,), value)
    got = Stats().make_selection(tensor)
    assert float(got["std"]) == 0
    assert float(got["mean"]) == float(got["min"]) == float(got["max"]) == float(tensor[0])
    norm = np.linalg.norm(tensor.double().numpy())
    norm = math.inf if norm > torch.finfo(torch.float32).max else norm
    assert float(got["norm"]) == pytest.approx(norm, rel=1e-6)
    assert float(got["fraction_zero"]) == (value == 0)


@pytest.mark.parametrize("size", [100, 700_000])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25])
def test_squares_that_float32_cannot_hold_are_held(size: int, scale: float) -> None:
    tensor = spread_out(size) * scale
    got, x = Stats().make_selection(tensor), tensor.double().numpy()
    assert float(got["std"]) == pytest.approx(x.std(), rel=1e-5, abs=0)
    assert float(got["norm"]) == pytest.approx(np.linalg.norm(x), rel=1e-5, abs=0)
    assert float(got["mean"]) == pytest.approx(x.mean(), rel=1e-4, abs=0)


@pytest.mark.parametrize("size", [100, 300_000])
@pytest.mark.parametrize("value", [1e200, torch.nan, -torch.inf])
def test_float64_beyond_its_squares_is_told_too(size: int, value: float) -> None:
    tensor = spread_out(size, torch.float64)
    tensor[size // 3] = value
    got = Stats().make_selection(tensor)
    assert not bool(got["std"].isfinite())
    assert not bool(got["norm"].isfinite())
    assert float(got["mean"]) == pytest.approx(float(tensor.mean()), nan_ok=True)
    assert float(got["max"]) == pytest.approx(float(tensor.max()), nan_ok=True)


@pytest.mark.parametrize("size", [100, 100_000, 700_000])
def test_neither_a_distant_mean_nor_an_outlier_costs_digits(size: int) -> None:
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    outlier = noise * 1e-2
    outlier[0] = 1e4
    steps = torch.arange(size) // (size // 4) * 1000.0 + noise * 1e-2
    for tensor in (10_000 + noise * 1e-2, outlier, steps, -3 + noise * 1e-4):
        got, x = Stats().make_selection(tensor), tensor.double().numpy()
        assert float(got["std"]) == pytest.approx(x.std(), rel=1e-5)
        assert float(got["norm"]) == pytest.approx(np.linalg.norm(x), rel=1e-5)
        assert float(got["mean"]) == pytest.approx(x.mean(), rel=1e-5, abs=1e-6 * x.std())


def test_a_read_of_more_threads_says_the_same() -> None:
    tensor = spread_out(1_500_001)
    torch.set_num_threads(2)  # which the fixture takes back
    same_as_numpy(Stats().make_selection(tensor), tensor)


# Compiled


def strided() -> torch.Tensor:
    return torch.randn(6, 4, 10, generator=torch.Generator().manual_seed(2)).transpose(0, 2)[:, 1:]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("selection", SHIPPED, ids=repr)
def test_every_shipped_selection_traces_whole(
    selection: Selection, *, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    take = torch.compile(
        selection.make_selection, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for tensor in (strided().contiguous(), strided(), strided().bfloat16(), strided() > 0):
        with torch.no_grad():
            got, want = take(tensor), selection.make_selection(tensor)
        got, want = ({"": it} if isinstance(it, torch.Tensor) else it for it in (got, want))
        assert got.keys() == want.keys()
        for name, number in want.items():
            torch.testing.assert_close(got[name], number, msg=lambda said, n=name: f"{n}: {said}")
    if isinstance(selection, Stats):
        same_as_numpy(got, tensor)


def test_a_compiled_sample_and_a_compiled_natural_part_are_where_they_say() -> None:
    torch._dynamo.reset()
    tensor, sample = strided(), Sample(5, seed=3)
    take = torch.compile(sample.make_selection, fullgraph=True, backend="aot_eager")
    want = tensor.numpy().ravel()[sample.positions(tensor.numel()).numpy()]
    assert take(tensor).tolist() == want.tolist()
    part = torch.compile(
        NaturalSelection("NCHW", limit=12).make_selection, fullgraph=True, backend="aot_eager"
    )
    images = torch.arange(3.0 * 4 * 5 * 5).view(3, 4, 5, 5)
    natural = NaturalSelection("NCHW", limit=12)._index(images.shape)
    assert part(images).tolist() == images.numpy()[natural].tolist()


def test_the_traced_numbers_are_what_numpy_says_of_odd_elements_too() -> None:
    torch._dynamo.reset()
    take = torch.compile(Stats().make_selection, fullgraph=True, backend="aot_eager")
    for first in (0.3, torch.nan, torch.inf):
        for last in (0.5, torch.nan, torch.inf, -torch.inf):
            tensor = spread_out(50)
            tensor[0], tensor[-1] = first, last
            same_as_numpy(take(tensor), tensor)
    same_as_numpy(take(10_000 + spread_out(50)), 10_000 + spread_out(50))
    empty = take(torch.zeros(0, 2))
    assert [float(empty["norm"]), bool(empty["mean"].isnan())] == [0, True]


@settings(max_examples=300)
@given(tensors())
def test_what_is_traced_reckons_as_numpy_does(tensor: torch.Tensor) -> None:
    if tensor.numel():
        got = numbers_in_one_loop(tensor)
        same_as_numpy(got, tensor)
        assert len({number.data_ptr() for number in got.values()}) == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.int64])
def test_stats_elsewhere_promise_the_same(dtype: torch.dtype) -> None:
    got = Stats().make_selection(torch.empty(2, 3, dtype=dtype, device="meta"))
    promised = Stats().spec(TensorSpec((2, 3), str(dtype).removeprefix("torch.")))
    assert {name: TensorSpec.of(number) for name, number in got.items()} == promised


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
@pytest.mark.parametrize("name", LONG)
def test_stats_on_an_accelerator_are_what_numpy_says(name: str) -> None:
    tensor = LONG[name]()
    got = Stats().make_selection(tensor.to(torch.accelerator.current_accelerator()))
    same_as_numpy({field: number.cpu() for field, number in got.items()}, tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_inductor_reads_a_tensor_once_for_all_nine_numbers() -> None:
    torch._dynamo.reset()
    from torch._inductor.utils import run_and_get_code

    tensor = 10_000 + 1e-2 * spread_out(20_000)
    take = torch.compile(Stats().make_selection, fullgraph=True, dynamic=True)
    got, (code, *_) = run_and_get_code(take, tensor)
    same_as_numpy(got, tensor)
    assert float(got["std"]) == pytest.approx(tensor.double().numpy().std(), rel=1e-5)
    assert code.count("for(") == 1
    odd = spread_out(777)
    odd[5] = torch.nan
    same_as_numpy(take(odd), odd)
