"""One call of a model as named leaves: tensors that vary, constants that must not."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import nn

from fxray.architecture import TensorSpec
from fxray.errors import SpecialisationError, TraceError
from fxray.torch_private import pytree
from fxray.tracing.leaf import NEVER, PLAIN, Leaf, same_constant, short_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["CallSpec", "Passed", "Varying", "bind", "passed_as"]

_DEEPEST = 5

Varying = tuple[tuple[int, int, int], ...]
"""Sizes of a call that a layout was not traced for: (index of the leaf, dim, size)."""


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


def passed_as(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Passed:
    """Return how a call passed its arguments, to pass others alike."""
    positional: list[str] = []
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind == parameter.VAR_POSITIONAL or index < len(args):
            positional.append(name)
        if parameter.kind == parameter.VAR_POSITIONAL:
            break
    return Passed(signature, tuple(positional), tuple(kwargs))


@attrs.frozen
class Passed:
    """By position, by keyword or not at all: a forward may tell them apart.

    Attributes:
        signature: of the forward.
        positional: names of the arguments passed by position.
        keywords: those passed by keyword, in order.
    """

    signature: inspect.Signature
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def call(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the (args, kwargs) that pass `arguments`, as `bind` gave them, alike."""
        kinds = {name: p.kind for name, p in self.signature.parameters.items()}
        args: list[Any] = []
        for name in self.positional:
            several = kinds[name] == inspect.Parameter.VAR_POSITIONAL
            args.extend(arguments[name] if several else [arguments[name]])
        rest = [n for n, kind in kinds.items() if kind == inspect.Parameter.VAR_KEYWORD]
        further = arguments.get(rest[0], {}) if rest else {}
        named = {n: further[n] if n in further else arguments[n] for n in self.keywords}
        return tuple(args), named


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
            if not isinstance(value, PLAIN) and _holds_tensor(value):
                msg = (
                    f"argument {path!r} is a {type(value).__qualname__}, with tensors or random "
                    "numbers fxray cannot see; pass tensors, or a tuple, list or dict of them, or "
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

    def varying(self, arguments: Mapping[str, Any]) -> Varying | None:
        """Return the sizes of a call that are not accepted yet, if nothing else differs.

        None where the call is laid out otherwise, or a constant, a rank or anything else
        that is required of a tensor is another; empty where the call fits as it is.
        """
        flat, tree = pytree.tree_flatten(dict(arguments))
        if tree != self.tree:
            return None
        found: list[tuple[int, int, int]] = []
        for index, (leaf, value) in enumerate(zip(self.leaves, flat, strict=True)):
            if leaf.spec is not None and isinstance(value, torch.Tensor):
                if value.dim() != len(leaf.spec.shape):
                    return None
                new = [(d, n) for d, n in enumerate(value.shape) if not leaf.accepts(d, n)]
                found += [(index, dim, size) for dim, size in new]
                leaf = leaf.with_shown(dict(new), NEVER)  # noqa: PLW2901 - all but the sizes
            try:
                leaf.check(value)
            except SpecialisationError:
                return None
        return tuple(found)

    def with_shown(self, varying: Varying, free_after: int = 3) -> CallSpec:
        """Return the layout that accepts these sizes too, as `varying` gave them.

        A dim with `free_after` distinct sizes in all, the traced one included, is free from
        then on; sizes 0 and 1 are special to many models and stay to be shown.
        """
        by_leaf: dict[int, dict[int, int]] = {}
        for index, dim, size in varying:
            by_leaf.setdefault(index, {})[dim] = size
        leaves = tuple(
            leaf.with_shown(by_leaf[index], free_after) if index in by_leaf else leaf
            for index, leaf in enumerate(self.leaves)
        )
        return attrs.evolve(self, leaves=leaves)

    def grown_since(self, before: CallSpec) -> tuple[tuple[int, int], ...]:
        """Return (tensor, dim) of what is taken to be free and was not `before`."""
        pairs = zip(self.tensor_leaves, before.tensor_leaves, strict=True)
        return tuple(
            (index, dim)
            for index, (now, then) in enumerate(pairs)
            for dim in sorted(now.grown - then.grown)
        )

    def with_fixed(self, places: Sequence[tuple[int, int]]) -> CallSpec:
        """Return the layout that never takes these (tensor, dim) to be free."""
        leaves, index = [], 0
        for leaf in self.leaves:
            fixed = leaf.fixed
            if leaf.spec is not None:
                fixed |= {dim for i, dim in places if i == index}
                index += 1
            leaves.append(attrs.evolve(leaf, fixed=fixed, grown=leaf.grown - fixed))
        return attrs.evolve(self, leaves=tuple(leaves))

    def exact(self, tensors: Sequence[torch.Tensor], reads: frozenset[str]) -> CallSpec:
        """Return the layout that requires all the forward looked at in the `tensors` it got."""
        given = iter(tensors)
        leaves = [
            leaf if leaf.spec is None else leaf.exact(next(given), reads) for leaf in self.leaves
        ]
        return attrs.evolve(self, leaves=tuple(leaves))


def _key_text(key: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


_RUNS_ON = (torch.Tensor, torch.Generator, nn.Module, np.random.Generator, np.random.RandomState)


def _holds_tensor(value: object, depth: int = 0) -> bool:
    """Return whether a trace would change an argument: a tensor in it, a generator, a module."""
    if isinstance(value, _RUNS_ON):
        return True
    if depth > _DEEPEST or isinstance(value, (*PLAIN, type, types.FunctionType)):
        return False
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = value
    else:
        fields = getattr(value, "__dict__", None) or {}
        slots = [getattr(value, s, None) for s in getattr(type(value), "__slots__", ())]
        inner = (*fields.values(), *slots)
    return any(_holds_tensor(item, depth + 1) for item in inner)


@attrs.frozen
class OpenCall:
    """A call of which only the signature is known: what a trace without an input takes.

    Attributes:
        required: names of the arguments without a default; the graph's placeholders.
        defaults: value of every other argument, which every call must leave as it is.
        shown: the arguments, sizes included, for which the graph was seen to be right.
        free: those of them, without sizes, that came at enough sizes to take any.
    """

    required: tuple[str, ...]
    defaults: Mapping[str, Any] = attrs.field(factory=dict)
    shown: frozenset[Any] = frozenset()
    free: frozenset[Any] = frozenset()

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
            SpecialisationError: another argument differs from its default, or the graph was
                not yet seen to be right for such arguments.
        """
        self._check_defaults(arguments)
        sizes, kinds = _told_apart(arguments)
        if kinds not in self.free and (sizes, kinds) not in self.shown:
            msg = "the graph was traced without an input, and not yet seen to be right for this one"
            raise SpecialisationError(msg)
        return [arguments[name] for name in self.required]

    def _check_defaults(self, arguments: Mapping[str, Any]) -> None:
        for name, default in self.defaults.items():
            if name in arguments and not same_constant(default, arguments[name]):
                was, now = short_text(default), short_text(arguments[name])
                msg = (
                    f"argument {name!r} was left at {was} when the model was traced without an "
                    f"input and is {now} now; trace with an input that passes it: "
                    f"fxray.trace(model, …, {name}=…)"
                )
                raise SpecialisationError(msg)

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether it would take these arguments, were they shown to give the same."""
        try:
            self._check_defaults(arguments)
        except SpecialisationError:
            return False
        return True

    def with_shown(self, arguments: Mapping[str, Any], free_after: int) -> OpenCall:
        """Return the call that takes these arguments too; after so many sizes, any size."""
        sizes, kinds = _told_apart(arguments)
        shown = self.shown | {(sizes, kinds)}
        enough = sum(others == kinds for _, others in shown) >= free_after
        return attrs.evolve(self, shown=shown, free=self.free | {kinds} if enough else self.free)


def _told_apart(arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the sizes of arguments, and all else by which a forward may tell them apart."""
    flat, tree = pytree.tree_flatten(dict(arguments))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    kinds: list[Any] = [str(tree)]
    for value in flat:
        if isinstance(value, torch.Tensor):
            kinds.append((value.dim(), value.dtype))
        else:
            # `flag is True` and `y is None` were answered without asking the graph.
            kinds.append(value if isinstance(value, (bool, str, type(None))) else type(value))
    return tuple(tuple(tensor.shape) for tensor in tensors), tuple(kinds)
