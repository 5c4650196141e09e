"""Architectures made by hand, for pictures that need no model and no tracing."""

from __future__ import annotations

from collections import Counter

from fxray.architecture import Architecture, Op, Role, TensorSpec


class Sketch:
    """Collects ops and edges; every method returns the path it added."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.ops: list[Op] = []
        self.edges: list[tuple[str, str, str]] = []
        self.modules: dict[str, str] = {"": model}
        self.returns: dict[str, tuple[str, ...]] = {}
        self.seen: Counter[str] = Counter()

    def add(
        self,
        path: str,
        kind: str,
        *inputs: str,
        shape: tuple[int, ...] = (),
        role: Role = "function",
        scope: tuple[str, ...] = (),
        settings: str = "",
        **parameters: tuple[int, ...],
    ) -> str:
        number = self.seen[kind]
        self.seen[kind] += 1
        specs = {name: TensorSpec(size, "float32") for name, size in parameters.items()}
        self.ops.append(
            Op(
                path,
                f"{kind}-{number}",
                kind,
                role,
                f"torch.nn.{kind}" if role == "module" else f"torch.{kind}",
                module=path if role == "module" else None,
                scope=scope,
                outputs=(TensorSpec(shape, "float32"),) if shape else (),
                parameters=specs,
                settings=settings,
                where=f"model.py:{10 + len(self.ops)}",
            )
        )
        self.edges.extend((tail, path, str(slot)) for slot, tail in enumerate(inputs))
        return path

    def module(self, path: str, kind: str, *inputs: str, **rest: object) -> str:
        self.modules[path] = kind
        return self.add(path, kind.lower(), *inputs, role="module", **rest)  # type: ignore[arg-type]

    def input(self, path: str, *shape: int) -> str:
        return self.add(path, "input", role="input", shape=shape)

    def build(self, *returned: str) -> Architecture:
        self.returns[""] = returned
        return Architecture.build(self.model, self.ops, self.edges, self.modules, self.returns)


def small_cnn() -> Architecture:
    """Two convolutions, functional activations, one output."""
    net = Sketch("SmallCNN")
    x = net.input("x", 2, 1, 28, 28)
    x = net.module(
        "conv1",
        "Conv2d",
        x,
        shape=(2, 8, 28, 28),
        settings="1, 8, kernel_size=(3, 3), padding=(1, 1)",
        weight=(8, 1, 3, 3),
        bias=(8,),
    )
    x = net.add("relu", "relu", x, shape=(2, 8, 28, 28))
    x = net.add("max_pool2d", "max_pool2d", x, shape=(2, 8, 14, 14))
    x = net.module(
        "conv2",
        "Conv2d",
        x,
        shape=(2, 16, 14, 14),
        settings="8, 16, kernel_size=(3, 3), padding=(1, 1)",
        weight=(16, 8, 3, 3),
        bias=(16,),
    )
    x = net.add("relu_1", "relu", x, shape=(2, 16, 14, 14))
    x = net.add("add", "add", x, x, shape=(2, 16, 14, 14))
    x = net.add("flatten", "flatten", x, shape=(2, 3136), role="method")
    x = net.module(
        "head",
        "Linear",
        x,
        shape=(2, 10),
        settings="in_features=3136, out_features=10",
        weight=(10, 3136),
        bias=(10,),
    )
    return net.build(x)


def residual_net() -> Architecture:
    """A stem, two layers of two residual blocks, a head: five levels of names."""
    net = Sketch("ResNet")
    x = net.input("x", 4, 3, 64, 64)
    x = net.module(
        "conv1",
        "Conv2d",
        x,
        shape=(4, 16, 32, 32),
        settings="3, 16, kernel_size=(7, 7), stride=(2, 2)",
        weight=(16, 3, 7, 7),
    )
    x = net.module(
        "bn1", "BatchNorm2d", x, shape=(4, 16, 32, 32), settings="16", weight=(16,), bias=(16,)
    )
    x = net.module("relu", "ReLU", x, shape=(4, 16, 32, 32), settings="inplace=True")
    width, side = 16, 32
    for layer in (1, 2):
        net.modules[f"layer{layer}"] = "Sequential"
        for block in (0, 1):
            here = f"layer{layer}.{block}"
            net.modules[here] = "BasicBlock"
            scope = (f"layer{layer}", here)
            down = layer == 2 and block == 0
            before, skip = width, x
            if down:
                width, side = width * 2, side // 2
            size = (4, width, side, side)
            y = net.module(
                f"{here}.conv1",
                "Conv2d",
                x,
                scope=scope,
                shape=size,
                settings=f"{before}, {width}, kernel_size=(3, 3)",
                weight=(width, before, 3, 3),
            )
            y = net.module(
                f"{here}.bn1",
                "BatchNorm2d",
                y,
                scope=scope,
                shape=size,
                settings=f"{width}",
                weight=(width,),
                bias=(width,),
            )
            y = net.add(f"{here}.relu", "relu", y, scope=scope, shape=size)
            y = net.module(
                f"{here}.conv2",
                "Conv2d",
                y,
                scope=scope,
                shape=size,
                settings=f"{width}, {width}, kernel_size=(3, 3)",
                weight=(width, width, 3, 3),
            )
            y = net.module(
                f"{here}.bn2",
                "BatchNorm2d",
                y,
                scope=scope,
                shape=size,
                settings=f"{width}",
                weight=(width,),
                bias=(width,),
            )
            if down:
                net.modules[f"{here}.downsample"] = "Sequential"
                inner = (*scope, f"{here}.downsample")
                skip = net.module(
                    f"{here}.downsample.0",
                    "Conv2d",
                    x,
                    scope=inner,
                    shape=size,
                    settings=f"{before}, {width}, kernel_size=(1, 1), stride=(2, 2)",
                    weight=(width, before, 1, 1),
                )
                skip = net.module(
                    f"{here}.downsample.1",
                    "BatchNorm2d",
                    skip,
                    scope=inner,
                    shape=size,
                    settings=f"{width}",
                    weight=(width,),
                    bias=(width,),
                )
            y = net.add(f"{here}.add", "add", y, skip, scope=scope, shape=size)
            x = net.add(f"{here}.relu_1", "relu", y, scope=scope, shape=size)
    x = net.module(
        "avgpool", "AdaptiveAvgPool2d", x, shape=(4, width, 1, 1), settings="output_size=1"
    )
    x = net.add("flatten", "flatten", x, shape=(4, width))
    x = net.module(
        "fc",
        "Linear",
        x,
        shape=(4, 10),
        settings=f"in_features={width}, out_features=10",
        weight=(10, width),
        bias=(10,),
    )
    return net.build(x)


def transformer(blocks: int = 12, width: int = 64) -> Architecture:
    """Nested blocks in a ModuleList that is never called, as most transformers have."""
    net = Sketch("Transformer")
    tokens, mask = net.input("tokens", 2, 16), net.input("mask", 2, 1, 16, 16)
    net.modules["blocks"] = "ModuleList"
    size = (2, 16, width)
    x = net.module(
        "embed", "Embedding", tokens, shape=size, settings=f"1000, {width}", weight=(1000, width)
    )
    place = net.add(
        "pos_embed", "parameter", role="parameter", shape=(1, 16, width), pos_embed=(1, 16, width)
    )
    x = net.add("add", "add", x, place, shape=size)

    def linear(path: str, x: str, scope: tuple[str, ...], into: int, out: int) -> str:
        return net.module(
            path,
            "Linear",
            x,
            scope=scope,
            shape=(2, 16, out),
            settings=f"in_features={into}, out_features={out}",
            weight=(out, into),
            bias=(out,),
        )

    for n in range(blocks):
        here = f"blocks.{n}"
        net.modules |= {here: "Block", f"{here}.attn": "Attention", f"{here}.mlp": "MLP"}
        scope, attn, mlp = (here,), (here, f"{here}.attn"), (here, f"{here}.mlp")
        y = net.module(
            f"{here}.norm1",
            "LayerNorm",
            x,
            scope=scope,
            shape=size,
            settings=f"({width},)",
            weight=(width,),
            bias=(width,),
        )
        q, k, v = (linear(f"{here}.attn.{name}", y, attn, width, width) for name in "qkv")
        s = net.add(f"{here}.attn.matmul", "matmul", q, k, scope=attn, shape=(2, 4, 16, 16))
        s = net.add(f"{here}.attn.add", "add", s, mask, scope=attn, shape=(2, 4, 16, 16))
        s = net.add(f"{here}.attn.softmax", "softmax", s, scope=attn, shape=(2, 4, 16, 16))
        s = net.add(f"{here}.attn.matmul_1", "matmul", s, v, scope=attn, shape=size)
        s = linear(f"{here}.attn.proj", s, attn, width, width)
        x = net.add(f"{here}.add", "add", x, s, scope=scope, shape=size)
        y = net.module(
            f"{here}.norm2",
            "LayerNorm",
            x,
            scope=scope,
            shape=size,
            settings=f"({width},)",
            weight=(width,),
            bias=(width,),
        )
        y = linear(f"{here}.mlp.fc1", y, mlp, width, 4 * width)
        y = net.add(f"{here}.mlp.gelu", "gelu", y, scope=mlp, shape=(2, 16, 4 * width))
        y = linear(f"{here}.mlp.fc2", y, mlp, 4 * width, width)
        x = net.add(f"{here}.add_1", "add", x, y, scope=scope, shape=size)
    x = net.module(
        "norm", "LayerNorm", x, shape=size, settings=f"({width},)", weight=(width,), bias=(width,)
    )
    x = net.module(
        "head",
        "Linear",
        x,
        shape=(2, 16, 1000),
        settings=f"in_features={width}, out_features=1000",
        weight=(1000, width),
    )
    return net.build(x)


def hostile() -> Architecture:
    """Names that Graphviz, HTML and SVG would each like to read as their own."""
    net = Sketch('<b>A & "B"</b>')
    x = net.input('a<b>&"c":d', 1)
    y = net.add("node:n\\N->m", "relu", x, shape=())
    net.modules["long"] = "Very" * 30
    scope = ("long",)
    y = net.add(
        "long." + "name" * 40, "</td>", y, x, scope=scope, settings='mode="<table>" & {x|y}'
    )
    y = net.add("long.\u00e9t\u00e9 \u6df1", "café", *[y] * 5, scope=scope)
    return net.build(y)


def flat(ops: int) -> Architecture:
    """One long chain without a single module."""
    net = Sketch("Flat")
    x = net.input("x", 2, 8)
    for n in range(ops):
        x = net.add(f"mul_{n}", "mul", x, x, shape=(2, 8))
    return net.build(x)
