"""One call of a model as named leaves: tensors that vary, constants that must not."""

from __future__ import annotations

import enum
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fxray.architecture import TensorSpec
from fxray.errors import SpecialisationError, TraceError
from fxray.torch_private import pytree

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CallSpec", "Leaf", "bind"]

_PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


@attrs.frozen
class Leaf:
    """One leaf of the arguments.

    Attributes:
        path: argument name, then the keys that lead to it, e.g. `"batch.image"`.
        spec: shape and dtype when traced, for a tensor; else None.
        constant: the value, for anything that is no tensor.
        free: the dims whose size may differ from call to call.
        dtype: the dtype it must have, None where the forward never looked at one.
        device: the device it must be on, None where the forward never looked at one.
    """

    path: str
    spec: TensorSpec | None = None
    constant: Any = None
    free: frozenset[int] = frozenset()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def check(self, value: object) -> None:
        """Raise SpecialisationError unless `value` fits what was traced here."""
        if self.spec is None:
            if not _same(self.constant, value):
                msg = (
                    f"argument {self.path!r} was {_short(self.constant)} when the model was "
                    f"traced and is {_short(value)} now; trace again with this value"
                )
                raise SpecialisationError(msg)
            return
        if not isinstance(value, torch.Tensor):
            msg = (
                f"argument {self.path!r} was a tensor {self.spec} when the model was traced "
                f"and is {_short(value)} now; trace again with this value"
            )
            raise SpecialisationError(msg)
        self._check_shape(value.shape)
        for what in ("dtype", "device"):
            then, now = getattr(self, what), getattr(value, what)
            if then is not None and then != now:
                msg = (
                    f"{what} of argument {self.path!r} was {then} when the model was traced and is "
                    f"{now} now, and the forward looks at the {what} of a tensor; trace again"
                )
                raise SpecialisationError(msg)

    def _check_shape(self, shape: torch.Size) -> None:
        if self.spec is None:
            return
        if len(shape) != len(self.spec.shape) or any(
            n != m and dim not in self.free
            for dim, (n, m) in enumerate(zip(shape, self.spec.shape, strict=True))
        ):
            sizes = ", ".join(
                "any" if dim in self.free else str(n) for dim, n in enumerate(self.spec.shape)
            )
            msg = (
                f"argument {self.path!r} has shape {tuple(shape)}; the model was traced for "
                f"({sizes}) and no other size was shown to give the same graph. "
                "Trace again with an input of this shape"
            )
            raise SpecialisationError(msg)


def _same(old: object, new: object) -> bool:
    if old is new:
        return True
    if isinstance(new, torch.Tensor) or type(old) is not type(new):
        return False
    try:
        return bool(old == new)
    except Exception:  # noqa: BLE001 - a foreign __eq__ may raise anything; then they differ
        return False


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {TensorSpec.of(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def bind(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments by parameter name, defaults filled in.

    Raises:
        TypeError: the arguments do not fit the signature, in Python's own words.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def call_with(
    signature: inspect.Signature, arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the (args, kwargs) that pass `arguments`; the inverse of `bind`."""
    bound = inspect.BoundArguments(signature, OrderedDict(arguments))
    return bound.args, bound.kwargs


@attrs.frozen
class CallSpec:
    """How the arguments of a traced call were laid out.

    Attributes:
        layout: the arguments by name, in the place of every leaf a zero.
        leaves: what the leaves were, in order.
        tree: torch's pytree of `layout`.
    """

    layout: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    tree: Any = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "tree", pytree.tree_structure(dict(self.layout)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the tree, whose own pickling warns of a deprecation in torch 2.13.
        return CallSpec, (self.layout, self.leaves)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> CallSpec:
        """Return the layout of `arguments`, as `bind` gave them.

        Raises:
            TraceError: an argument is an object whose tensors cannot be seen.
        """
        flat, tree = pytree.tree_flatten_with_path(dict(arguments))
        leaves: list[Leaf] = []
        for keys, value in flat:
            path = ".".join(_key_text(key) for key in keys)
            same = sum(leaf.path.partition("@")[0] == path for leaf in leaves)
            path = f"{path}@{same}" if same else path  # {"a.b": …, "a": {"b": …}}
            if isinstance(value, torch.Tensor):
                leaves.append(Leaf(path, spec=TensorSpec.of(value)))
                continue
            if not isinstance(value, _PLAIN) and _holds_tensor(value):
                msg = (
                    f"argument {path!r} is a {type(value).__qualname__} that holds tensors "
                    "fxray cannot see; pass them as tensors, or in a tuple, list or dict, or "
                    "register the class with torch.utils._pytree.register_pytree_node"
                )
                raise TraceError(msg)
            leaves.append(Leaf(path, constant=value))
        layout = pytree.tree_unflatten([0] * len(leaves), tree)
        return cls(layout, tuple(leaves))

    @property
    def tensor_leaves(self) -> tuple[Leaf, ...]:
        """The leaves that are tensors, in the order the graph takes them."""
        return tuple(leaf for leaf in self.leaves if leaf.spec is not None)

    @property
    def all_plain_tensors(self) -> bool:
        """Whether every argument is one tensor, so that nothing need be flattened."""
        return all(leaf.spec is not None and "." not in leaf.path for leaf in self.leaves)

    def fill(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return the arguments with these tensors in place of those that were traced."""
        given = iter(tensors)
        flat = [leaf.constant if leaf.spec is None else next(given) for leaf in self.leaves]
        arguments: dict[str, Any] = pytree.tree_unflatten(flat, self.tree)
        return arguments

    def flatten(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the tensors of `arguments`, checked against what was traced.

        Raises:
            SpecialisationError: another layout, constant or size than was traced.
        """
        flat, tree = pytree.tree_flatten(dict(arguments))
        if tree != self.tree:
            msg = (
                "the model is called with arguments laid out otherwise than when it was "
                f"traced: then {', '.join(leaf.path for leaf in self.leaves)}, now "
                f"{', '.join(leaf.path for leaf in CallSpec.of(arguments).leaves)}. "
                "Trace again with such a call"
            )
            raise SpecialisationError(msg)
        tensors = []
        for leaf, value in zip(self.leaves, flat, strict=True):
            leaf.check(value)
            if leaf.spec is not None:
                tensors.append(value)
        return tensors


def _key_text(key: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def _holds_tensor(value: object) -> bool:
    fields = getattr(value, "__dict__", None) or {}
    slots = [getattr(value, s, None) for s in getattr(type(value), "__slots__", ())]
    return any(isinstance(v, torch.Tensor) for v in (*fields.values(), *slots))


@attrs.frozen
class OpenCall:
    """A call of which only the signature is known: what a trace without an input takes.

    Attributes:
        required: names of the arguments without a default; the graph's placeholders.
        defaults: value of every other argument, which every call must leave as it is.
    """

    required: tuple[str, ...]
    defaults: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Nothing is known of the leaves."""
        return ()

    @property
    def all_plain_tensors(self) -> bool:
        """Whether nothing need be checked or flattened: never."""
        return False

    def flatten(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the required arguments, in the order of the placeholders.

        Raises:
            SpecialisationError: another argument differs from its default.
        """
        for name, default in self.defaults.items():
            if name in arguments and not _same(default, arguments[name]):
                msg = (
                    f"argument {name!r} was left at {_short(default)} when the model was traced "
                    f"without an input and is {_short(arguments[name])} now; trace with an input "
                    f"that passes it: fxray.trace(model, …, {name}=…)"
                )
                raise SpecialisationError(msg)
        return [arguments[name] for name in self.required]
