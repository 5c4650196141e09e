"""What the dims of the tensors of an op mean, as far as its type says."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxray.architecture import Architecture, Op

__all__ = ["ACTIVATIONS", "CONVOLUTIONS", "EMBEDDINGS", "LINEARS", "Layout"]

CONVOLUTIONS = tuple(
    f"{lazy}conv{way}{n}d" for lazy in ("", "lazy") for way in ("", "transpose") for n in "123"
)
LINEARS = ("linear", "lazylinear", "bilinear", "nondynamicallyquantizablelinear")
EMBEDDINGS = ("embedding", "embeddingbag")
ACTIVATIONS = (
    *("relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu"),
    *("mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "logsigmoid", "tanh"),
    *("softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "threshold", "glu"),
    *("softmax", "softmax2d", "logsoftmax", "softmin"),
)

_CHANNEL_FIRST = {1: "C", 2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
_CHANNEL_LAST = {1: "C", 2: "NC", 3: "NTC", 4: "NHWC", 5: "NDHWC"}
_ACTIVATION = {1: "C", 2: "NC", 3: "NTC", 4: "NCHW", 5: "NCDHW"}
_SPATIAL = {"1d": "NCL", "2d": "NCHW", "3d": "NCDHW"}
_WEIGHT = {1: "O", 2: "OI", 3: "OIL", 4: "OIHW", 5: "OIDHW"}

_ANY_CHANNEL_FIRST = ("batch_norm", "groupnorm", "group_norm", "instance_norm", "pixelshuffle")
_ANY_CHANNEL_LAST = (*LINEARS, *EMBEDDINGS)
_LAST_UNLESS_SEEN = ("layernorm", "layer_norm", "rmsnorm", "rms_norm")
_SPATIAL_STEMS = ("conv", "lazyconv", "maxpool", "avgpool", "adaptive", "lppool", "fractional")
_NORM_STEMS = ("batchnorm", "lazybatchnorm", "instancenorm", "lazyinstancenorm", "upsampl")
_SEQUENCE = ("lstm", "gru", "rnn", "multiheadattention")
_REARRANGING = frozenset(
    (
        *("permute", "transpose", "t", "mt", "h", "adjoint", "movedim", "moveaxis", "swapaxes"),
        *("swapdims", "view", "reshape", "flatten", "unflatten", "matmul", "mm", "bmm", "baddbmm"),
        *("einsum", "getitem", "chunk", "split", "unbind", "index_select", "gather"),
    )
)
"""Types that give a tensor whose dims may mean something else, though its shape be equal."""


class Layout:
    """Axes of the tensors of every op of an architecture.

    Args:
        architecture: what was traced; without shapes only convolutions and pools are known.
        kinds: types to take ops for, by path: of what torch has that theirs derives from.
    """

    def __init__(self, architecture: Architecture, kinds: Mapping[str, str]) -> None:
        self._architecture = architecture
        self._kinds = kinds
        self._outputs: dict[str, str] = {}
        for op in architecture.values():
            self._outputs[op.path] = self._output(op)

    def axes(self, op: Op, kind: str) -> str | None:
        """Return the axes of what is kept of `op` as `kind`, e.g. `"NCHW"`; None if unknown."""
        if kind in {"weight", "weight_grad"}:
            return self._weight(op) or None
        return (self._input(op) if kind == "input" else self._outputs[op.path]) or None

    def _kind(self, op: Op) -> str:
        return self._kinds.get(op.path, op.type)

    def _output(self, op: Op) -> str:
        ndim = len(op.outputs[0].shape) if op.outputs else None
        if op.role in {"input", "parameter"}:
            return self._ahead(op, ndim) if op.role == "input" else ""
        if own := _own_axes(op, self._kind(op), ndim):
            return own
        if op.outputs and self._kind(op) not in _REARRANGING:
            shape = op.outputs[0].shape
            for tail in self._architecture.graph.predecessors(op.path):
                before = self._architecture[tail]
                axes = self._outputs.get(tail)
                if axes and before.outputs and before.outputs[0].shape == shape:
                    return axes
        if self._kind(op) == "flatten" and ndim == 2:
            return "NC"
        if self._kind(op) in _LAST_UNLESS_SEEN:  # these keep the dims they are given
            return _CHANNEL_LAST.get(ndim or 0, "")
        return _ACTIVATION.get(ndim or 0, "") if self._kind(op) in ACTIVATIONS else ""

    def _ahead(self, op: Op, ndim: int | None) -> str:
        """Return the axes of an input of the model, from the first op that knows its own."""
        for head in self._architecture.graph.successors(op.path):
            after = self._architecture[head]
            if self._kind(after) in EMBEDDINGS:
                return {1: "N", 2: "NT"}.get(ndim or 0, "")
            if axes := _own_axes(after, self._kind(after), ndim):
                return axes
        return ""

    def _input(self, op: Op) -> str:
        ndim = len(op.inputs[0].shape) if op.inputs else None
        if self._kind(op) in EMBEDDINGS:
            return {1: "N", 2: "NT"}.get(ndim or 0, "")
        if own := _own_axes(op, self._kind(op), ndim):
            return own
        for tail in self._architecture.graph.predecessors(op.path):
            before = self._architecture[tail]
            if before.outputs[:1] == op.inputs[:1]:
                return self._outputs[tail]
        return ""

    def _weight(self, op: Op) -> str:
        ndim = max((len(spec.shape) for spec in op.parameters.values()), default=0)
        kind = self._kind(op) if op.role != "parameter" else self._used_as_weight(op)
        if kind in CONVOLUTIONS:
            axes = _WEIGHT.get(ndim, "")
            return f"IO{axes[2:]}" if "transpose" in kind and ndim > 1 else axes
        known = op.role != "parameter" or bool(kind)
        return _WEIGHT.get(ndim, "") if known and ndim <= 2 else ""

    def _used_as_weight(self, op: Op) -> str:
        """Return the type of the functional layer that takes a bare parameter, or empty."""
        for _, head, slots in self._architecture.graph.out_edges(op.path, data="slots"):
            kind = self._kind(self._architecture[head]).replace("_", "")
            if kind in {*CONVOLUTIONS, *LINEARS} and {"1", "weight"} & set(slots):
                return kind
        return ""


def _own_axes(op: Op, type_: str, ndim: int | None) -> str:
    """Return the axes that an op of `type_` gives a tensor of `ndim` dims, whatever its place."""
    kind = type_.replace("_", "")
    spatial = _SPATIAL.get(kind[-2:], "")
    if spatial and kind.startswith((*_SPATIAL_STEMS, *_NORM_STEMS)):
        if kind == "batchnorm1d" and ndim == 2:
            return "NC"
        # One sample may come without a batch.
        return {None: spatial, len(spatial): spatial, len(spatial) - 1: spatial[1:]}.get(ndim, "")
    if ndim is None:
        return ""
    if type_ in _SEQUENCE:
        first = "NT" if "batch_first=True" in op.settings else "TN"
        return {2: "TC", 3: f"{first}C"}.get(ndim, "")
    if type_ in _ANY_CHANNEL_FIRST or kind.startswith(("upsampl", "interpolate")):
        return _CHANNEL_FIRST.get(ndim, "")
    return _CHANNEL_LAST.get(ndim, "") if type_ in _ANY_CHANNEL_LAST else ""
