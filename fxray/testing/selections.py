"""The laws of a selection."""

# ruff: noqa: S101 - asserting is what these classes are for

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxray.architecture import TensorSpec
from fxray.selections import Selection, check_selection, describe, select, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DTYPES", "SelectionTests", "tensors"]

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
"""What models compute in; a selection is given any of them."""


@st.composite
def tensors(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shapes: st.SearchStrategy[list[int]] | None = None,
) -> torch.Tensor:
    """Draw a tensor as a model may give it: 0-dim, empty, strided, with NaN and infinities."""
    if shapes is None:
        shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4)
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensor = torch.randn(shape, generator=generator) * 3
    if draw(st.booleans()) and (dtype.is_floating_point or dtype.is_complex):
        odd = torch.randint(0, 12, shape, generator=generator)
        for code, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0)):
            tensor = tensor.masked_fill(odd == code, value)
    if dtype is torch.uint8:
        tensor = tensor.abs()
    tensor = tensor.to(dtype)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    return tensor


def _bits(tensor: torch.Tensor) -> bytes:
    """Return what a tensor holds, NaN for NaN, which == cannot compare."""
    dense = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(dense.view(torch.uint8).tolist())


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        TensorSpec.of(one[key]) == TensorSpec.of(other[key])
        and _bits(one[key]) == _bits(other[key])
        for key in one
    )


_laws: Callable[[Any], Any] = settings(
    # Every subclass runs the same laws, which is what they are for.
    suppress_health_check=[HealthCheck.differing_executors],
    deadline=None,
)


class SelectionTests:
    """The laws of a selection. Subclass it and give yours, one or several.

    ```python
    class TestMedian(fxray.testing.SelectionTests):
        selections = (Median(), Median(dim=1))
    ```

    Attributes:
        selections: instances to test.
        tensors: what to draw the tensors from, where it is not made for all.
    """

    selections: ClassVar[tuple[Selection, ...]] = ()
    tensors: ClassVar[st.SearchStrategy[torch.Tensor]] = tensors()

    def test_there_is_something_to_test(self) -> None:
        """An empty list of selections would pass every law."""
        assert self.selections, "name your selections: selections = (Mine(),)"

    def test_it_is_a_selection(self) -> None:
        """An instance with a method `make_selection`."""
        for selection in self.selections:
            check_selection(selection)

    @_laws
    @given(data=st.data())
    def test_what_is_promised_comes(self, data: st.DataObject) -> None:
        """`spec` says the fields, shapes and dtypes that `make_selection` returns."""
        tensor = data.draw(self.tensors)
        for selection in self.selections:
            promised = spec_of(selection, TensorSpec.of(tensor))
            kept = select(selection, tensor)
            fields = promised if isinstance(promised, dict) else {"": promised}
            assert fields == {k: TensorSpec.of(t) for k, t in kept.items()}, (
                f"{selection!r} of {TensorSpec.of(tensor)}"
            )

    @_laws
    @given(data=st.data())
    def test_nothing_is_written_in_place(self, data: st.DataObject) -> None:
        """The tensor given is as it was: training goes on with it."""
        tensor = data.draw(self.tensors)
        before = _bits(tensor)
        for selection in self.selections:
            selection.make_selection(tensor)
            assert _bits(tensor) == before, f"{selection!r} wrote into the tensor"

    @_laws
    @given(data=st.data())
    def test_the_result_owns_its_memory(self, data: st.DataObject) -> None:
        """A later in-place op on the tensor does not change what was kept of it."""
        tensor = data.draw(self.tensors)
        for selection in self.selections:
            given_away = tensor.clone()
            result: Any = selection.make_selection(given_away)
            fields = {"": result} if isinstance(result, torch.Tensor) else dict(result)
            kept = {key: _bits(value) for key, value in fields.items()}
            given_away.copy_(~given_away.to(torch.bool))  # every element changes
            after = {key: _bits(value) for key, value in fields.items()}
            assert kept == after, f"{selection!r} returned a view; clone what is kept"

    @_laws
    @given(data=st.data())
    def test_the_same_tensor_gives_the_same(self, data: st.DataObject) -> None:
        """What is kept is a function of the tensor, also where it requires a gradient."""
        tensor = data.draw(self.tensors)
        for selection in self.selections:
            once, again = select(selection, tensor), select(selection, tensor)
            assert _same(once, again), f"{selection!r} gave two things for one tensor"

    def test_settings_go_to_json_and_back(self) -> None:
        """The store writes the name and the settings, which make an equal selection."""
        for selection in self.selections:
            plain = describe(selection)
            assert json.loads(json.dumps(plain, allow_nan=False)) == plain
            twin = type(selection)(**plain["settings"])
            assert describe(twin) == plain, f"{selection!r} is not what its settings make"
