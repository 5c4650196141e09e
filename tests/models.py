"""Six small models, and for each a twin that tells by hand what every op gave.

A twin is the same model with its forward written out once more, every functional op through
`Witness.op`. Modules are witnessed by plain forward hooks on the model itself. Neither knows
fxray: together they are the independent route that captures are compared with.
"""

# To mypy a module's attribute is Tensor | Module, and wrong types are given here on purpose.
# mypy: ignore-errors

from __future__ import annotations

import collections
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# ---------------------------------------------------------------- who watches without fxray


def tensors_in(value: Any, item: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (item, tensor); written again here, so that a slip in fxray's own would show."""
    if isinstance(value, torch.Tensor):
        yield item, value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors_in(value[key], f"{item}.{key}".strip("."))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from tensors_in(part, f"{item}.{place}".strip("."))


class Witness:
    """What was seen, by (op, kind, item): a list with one tensor for each time."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, str], list[torch.Tensor]] = collections.defaultdict(list)
        self._calls: collections.Counter[str] = collections.Counter()

    def begin(self) -> None:
        """Begin a forward: calls are counted from 0 again."""
        self._calls.clear()

    def call(self, path: str) -> str:
        """Return the name of this call of the module at `path`."""
        self._calls[path] += 1
        return path if self._calls[path] == 1 else f"{path}@{self._calls[path] - 1}"

    def given(self, op: str, args: Any, kwargs: Any) -> None:
        everything = {str(place): arg for place, arg in enumerate(args)} | dict(kwargs)
        for item, tensor in tensors_in(everything):
            self.seen[op, "input", item].append(tensor.detach().clone())

    def gave(self, op: str, out: Any) -> Any:
        for item, tensor in tensors_in(out):
            self.seen[op, "output", item].append(tensor.detach().clone())
            if tensor.requires_grad and not tensor.is_leaf:
                seen = self.seen[op, "grad", item]
                tensor.register_hook(lambda grad, seen=seen: seen.append(grad.detach().clone()))
        return out

    def op(self, path: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and see what it is given and gives."""
        self.given(path, args, kwargs)
        return self.gave(path, function(*args, **kwargs))

    def hook(self, model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> None:
        """See every module of `model` of these classes, by plain hooks of torch."""
        names: dict[nn.Module, list[str]] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.given(names[module][-1], args, kwargs)

        def after(module: nn.Module, _: Any, out: Any) -> None:
            self.gave(names[module].pop(), out)

        for path, module in model.named_modules():
            if type(module) in leaves:
                module.register_forward_pre_hook(
                    lambda m, *_, p=path: names.setdefault(m, []).append(self.call(p))
                )
                module.register_forward_pre_hook(before, with_kwargs=True)
                module.register_forward_hook(after)


LEAVES = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.AdaptiveAvgPool2d,
    nn.Linear,
    nn.Embedding,
    nn.LSTM,
    nn.LayerNorm,
    nn.GELU,
)


class Twin:
    """Base of the twins: a forward of its own, and a witness."""

    witness: Witness


# ---------------------------------------------------------------- 1. functional activations


class FunctionalCNN(nn.Module):
    """Its activations are functions: no module hook sees one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6 * 2 * 2, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.relu(self.conv2(x))
        x = x.view(x.size(0), -1)
        return self.fc(x)


class FunctionalCNNTwin(Twin, FunctionalCNN):
    def forward(self, x):
        op = self.witness.op
        x = op("relu", F.relu, self.witness.gave("conv1", self.conv1(x)))
        x = op("max_pool2d", F.max_pool2d, x, 2)
        x = op("relu_1", torch.relu, self.conv2(x))
        x = op("view", torch.Tensor.view, x, x.size(0), -1)
        return self.fc(x)


# ---------------------------------------------------------------- 2. in place, called twice


class Block(nn.Module):
    """One ReLU used twice, in place; an addition in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNetLike(nn.Module):
    """A block called twice, with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = Block(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.block(self.stem(x))
        x = self.block(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class BlockTwin(Twin, Block):
    def forward(self, x):
        call, identity = self.witness.call("block"), x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.witness.op(f"{call}.add", torch.Tensor.__iadd__, out, identity)
        return self.relu(out)


class ResNetLikeTwin(Twin, ResNetLike):
    def __init__(self) -> None:
        super().__init__()
        self.block = BlockTwin(4)

    def forward(self, x):
        self.block.witness = self.witness
        x = self.block(self.stem(x))
        x = self.block(x)
        return self.fc(self.witness.op("flatten", torch.flatten, self.pool(x), 1))


# ---------------------------------------------------------------- 3. recurrent


class LSTMClassifier(nn.Module):
    """A module that returns a nest of three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens):
        out, (h, _) = self.lstm(self.embedding(tokens))
        return self.head(torch.cat((out.mean(1), h[-1]), dim=1))


class LSTMClassifierTwin(Twin, LSTMClassifier):
    def forward(self, tokens):
        op = self.witness.op
        out, (h, _) = self.lstm(self.embedding(tokens))
        mean = op("mean", torch.Tensor.mean, out, 1)
        last = op("getitem", torch.Tensor.__getitem__, h, -1)
        return self.head(op("cat", torch.cat, (mean, last), dim=1))


# ---------------------------------------------------------------- 4. transformer


class Attention(nn.Module):
    """Attention by hand, sizes taken from the tensor."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, c))


class Layer(nn.Module):
    """Dropout whose rate hangs on `self.training`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2)
        self.up, self.act, self.down = nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)

    def forward(self, x):
        attended = self.attention(self.norm1(x))
        x = x + F.dropout(attended, 0.1, training=self.training)
        return x + self.down(self.act(self.up(self.norm2(x))))


class TransformerEncoder(nn.Module):
    """Bare parameters: a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.ModuleList([Layer(8) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        cls = self.cls.expand(x.size(0), -1, -1)
        x = torch.cat([cls, self.embed(x)], dim=1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class AttentionTwin(Twin, Attention):
    path: str

    def forward(self, x):
        op, at = self.witness.op, f"{self.path}.attention"
        b, n, c = x.shape
        shape = (b, n, 3, self.heads, c // self.heads)
        qkv = op(f"{at}.view", torch.Tensor.view, self.qkv(x), *shape)
        qkv = op(f"{at}.permute", torch.Tensor.permute, qkv, 2, 0, 3, 1, 4)
        q, k, v = op(f"{at}.unbind", torch.Tensor.unbind, qkv, 0)
        name = "scaled_dot_product_attention"
        x = op(f"{at}.{name}", F.scaled_dot_product_attention, q, k, v)
        x = op(f"{at}.transpose", torch.Tensor.transpose, x, 1, 2)
        return self.out(op(f"{at}.reshape", torch.Tensor.reshape, x, b, n, c))


class LayerTwin(Twin, Layer):
    path: str

    def forward(self, x):
        op, at = self.witness.op, self.path
        attended = self.attention(self.norm1(x))
        dropped = op(f"{at}.dropout", F.dropout, attended, 0.1, training=self.training)
        x = op(f"{at}.add", torch.add, x, dropped)
        return op(f"{at}.add_1", torch.add, x, self.down(self.act(self.up(self.norm2(x)))))


class TransformerEncoderTwin(Twin, TransformerEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LayerTwin(8) for _ in range(2)])
        for place, layer in enumerate(self.layers):
            layer.attention = AttentionTwin(8, 2)
            layer.path = layer.attention.path = f"layers.{place}"

    def forward(self, x):
        op = self.witness.op
        cls = op("expand", torch.Tensor.expand, self.cls, x.size(0), -1, -1)
        x = op("cat", torch.cat, [cls, self.embed(x)], dim=1)
        x = op("add", torch.add, x, self.position)
        for layer in self.layers:
            layer.witness = layer.attention.witness = self.witness
            x = layer(x)
        return self.head(op("getitem", torch.Tensor.__getitem__, x, (slice(None), 0)))


# ---------------------------------------------------------------- 5. two inputs, a dict output


class TwoInputs(nn.Module):
    """Takes an image and numbers beside it, returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.numbers = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, image, numbers, scale=1.0):
        features = F.leaky_relu(self.conv(image), 0.1).mean((2, 3))
        embedding = features * torch.sigmoid(self.numbers(numbers)) * scale
        return {"logits": self.head(embedding), "embedding": embedding}


class TwoInputsTwin(Twin, TwoInputs):
    def forward(self, image, numbers, scale=1.0):
        op = self.witness.op
        features = op("leaky_relu", F.leaky_relu, self.conv(image), 0.1)
        features = op("mean", torch.Tensor.mean, features, (2, 3))
        gate = op("sigmoid", torch.sigmoid, self.numbers(numbers))
        embedding = op("mul", torch.mul, features, gate)
        embedding = op("mul_1", torch.mul, embedding, scale)
        return {"logits": self.head(embedding), "embedding": embedding}


@dataclass
class Answer:
    """An output with names."""

    logits: torch.Tensor
    embedding: torch.Tensor
    extra: torch.Tensor | None = None


class Pair(NamedTuple):
    logits: torch.Tensor
    embedding: torch.Tensor


class ModelOutput(OrderedDict):
    """What transformers' models return: an OrderedDict with attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Returning(TwoInputs):
    """The same, returned as an instance of `cls`."""

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.cls = cls

    def forward(self, image, numbers, scale=1.0):
        out = super().forward(image, numbers, scale)
        return self.cls(logits=out["logits"], embedding=out["embedding"])


# ---------------------------------------------------------------- 6. tied weights


class TiedLanguageModel(nn.Module):
    """One tensor is the embedding and the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, tokens):
        x = torch.tanh(self.hidden(self.embedding(tokens)))
        return F.linear(x, self.embedding.weight)


class TiedLanguageModelTwin(Twin, TiedLanguageModel):
    def forward(self, tokens):
        op = self.witness.op
        x = op("tanh", torch.tanh, self.hidden(self.embedding(tokens)))
        return op("linear", F.linear, x, self.embedding.weight)


# ---------------------------------------------------------------- cases


def logits_of(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return out["logits"] if isinstance(out, dict) else out.logits


class Case(NamedTuple):
    """A model, how to feed it and how to train it.

    Attributes:
        make: gives a fresh model; the twin likewise.
        inputs: gives the arguments of a call, for a batch size and a generator.
        symbolic: whether torch.fx can trace it without an input.
    """

    name: str
    make: Callable[[], nn.Module]
    twin: Callable[[], Any]
    inputs: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    paths: tuple[str, ...]
    keys: tuple[str, ...]

    def batch(self, size: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Return arguments; the global random numbers are left alone."""
        return self.inputs(size, torch.Generator().manual_seed(seed))

    def loss(self, out: Any) -> torch.Tensor:
        """Return a loss whose targets follow from the place in the batch alone."""
        logits = logits_of(out)
        flat = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(flat, torch.arange(len(flat)) % flat.shape[1])
        if isinstance(out, dict):
            loss = loss + out["embedding"].square().mean()
        return loss


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def _images(n: int, g: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randn(n, 1, 8, 8, generator=g),)


def _tokens(n: int, g: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 11, (n, 6), generator=g),)


def _block(call: str, k: int) -> list[str]:
    """Return the paths of one call of the ResNet's block, its `k`-th."""
    at = f"@{k}" if k else ""
    first, second = (f"@{2 * k}" if k else ""), f"@{2 * k + 1}"
    return [
        *(f"block.{name}{at}" for name in ("conv1", "bn1")),
        f"block.relu{first}",
        *(f"block.{name}{at}" for name in ("conv2", "bn2")),
        f"{call}.add",
        f"block.relu{second}",
    ]


def _layer(i: int) -> list[str]:
    ops = (
        "norm1 attention.qkv attention.view attention.permute attention.unbind "
        "attention.scaled_dot_product_attention attention.transpose attention.reshape "
        "attention.out dropout add norm2 up act down add_1"
    )
    return [f"layers.{i}.{op}" for op in ops.split()]


_LAYER_KEYS = (
    ("layernorm", "linear", "view", "permute", "unbind", "scaled_dot_product_attention"),
    ("transpose", "reshape", "linear", "dropout", "add", "layernorm", "linear", "gelu"),
    ("linear", "add"),
)


def _counted(types: list[str]) -> tuple[str, ...]:
    counts: collections.Counter[str] = collections.Counter()
    keys = []
    for kind in types:
        keys.append(f"{kind}-{counts[kind]}")
        counts[kind] += 1
    return tuple(keys)


_BLOCK_TYPES = ["conv2d", "batchnorm2d", "relu", "conv2d", "batchnorm2d", "add", "relu"]
_LAYER_TYPES = [kind for row in _LAYER_KEYS for kind in row]

CASES = (
    Case(
        "functional-cnn",
        FunctionalCNN,
        FunctionalCNNTwin,
        _images,
        _sgd,
        ("x", "conv1", "relu", "max_pool2d", "conv2", "relu_1", "view", "fc"),
        ("input-0", "conv2d-0", "relu-0", "maxpool2d-0", "conv2d-1", "relu-1", "view-0", "linear-0"),
    ),
    Case(
        "resnet-like",
        ResNetLike,
        ResNetLikeTwin,
        _images,
        _sgd,
        ("x", "stem.0", "stem.1", "stem.2", *_block("block", 0), *_block("block@1", 1),
         "pool", "flatten", "fc"),
        _counted(["input", "conv2d", "batchnorm2d", "relu", *_BLOCK_TYPES, *_BLOCK_TYPES,
                  "adaptiveavgpool2d", "flatten", "linear"]),
    ),
    Case(
        "lstm",
        LSTMClassifier,
        LSTMClassifierTwin,
        _tokens,
        _adam,
        ("tokens", "embedding", "lstm", "mean", "getitem", "cat", "head"),
        ("input-0", "embedding-0", "lstm-0", "mean-0", "getitem-0", "cat-0", "linear-0"),
    ),
    Case(
        "transformer",
        TransformerEncoder,
        TransformerEncoderTwin,
        lambda n, g: (torch.randn(n, 4, 5, generator=g),),
        _adam,
        ("x", "cls", "expand", "embed", "cat", "position", "add", *_layer(0), *_layer(1),
         "getitem", "head"),
        _counted(["input", "parameter", "expand", "linear", "cat", "parameter", "add",
                  *_LAYER_TYPES, *_LAYER_TYPES, "getitem", "linear"]),
    ),
    Case(
        "two-inputs",
        TwoInputs,
        TwoInputsTwin,
        lambda n, g: (*_images(n, g), torch.randn(n, 3, generator=g)),
        _sgd,
        ("image", "numbers@input", "conv", "leaky_relu", "mean", "numbers", "sigmoid", "mul",
         "mul_1", "head"),
        _counted(["input", "input", "conv2d", "leakyrelu", "mean", "linear", "sigmoid", "mul",
                  "mul", "linear"]),
    ),
    Case(
        "tied",
        TiedLanguageModel,
        TiedLanguageModelTwin,
        _tokens,
        _adam,
        ("tokens", "embedding", "hidden", "tanh", "embedding.weight", "linear"),
        ("input-0", "embedding-0", "linear-0", "tanh-0", "parameter-0", "linear-1"),
    ),
)  # fmt: skip
