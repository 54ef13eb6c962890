"""Inputs of every op: small ones that reach each branch (CASES), and for a GPU real sizes, and more rows than one block
of threads or its shared memory holds (LARGE).

A case makes the keyword arguments of the op's public function: `case.make(dtype, device, seed)`. The numbers are the
same on every device. Tests, benchmarks and ahead-of-time compilation all draw from here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of an op: a name, and (dtype, device, seed) -> keyword arguments."""

    name: str
    make: Callable[..., dict[str, Any]]


# The arguments with a row per snippet, (B, T, ...), of which `lengths` hides rows; in uniform_pool and unpack_rows they
# come packed, (N, D).
ROWS = {
    "add_act": ("x", "residual"),
    "attention_pool": ("features", "logits"),
    "distance_graph": ("values",),
    "distill_loss": ("teacher", "student", "log_variance"),
    "gated_fusion": ("visual", "audio"),
    "linear_act": ("x", "residual"),
    "mil_align_loss": ("logits",),
    "mil_loss": ("logits",),
    "pack_rows": ("padded",),
    "prefix_attention": ("qkv",),
    "prompt_similarity": ("features",),
    "similarity_graph": ("features", "values"),
    "topk_mean": ("scores",),
    "uniform_pool": ("features",),
    "unpack_rows": ("packed",),
    "window_attention": ("q", "k", "v", "residual"),
}
# The arguments that need no gradient in any use: a backend may decline to make one.
FIXED = {"distill_loss": ("teacher",), "mil_align_loss": ("labels",), "mil_loss": ("labels",)}


def leaves(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a call by name; those of a tuple as "norm.0", "norm.1"."""
    for name, value in arguments.items():
        parts = {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
        yield from ((k, v) for k, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point())


def convert(arguments: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """The same call with every floating-point tensor replaced by change(name, tensor); names as in `leaves`."""

    def convert_one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert_one(f"{name}.{i}", v) for i, v in enumerate(value))
        return change(name, value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert_one(name, value) for name, value in arguments.items()}


class Draw:
    """Random tensors of one dtype and device from one seed."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def ints(self, values: list[int] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, device=self.device)

    def clustered(self, batch: int, rows: int, width: int, noise: float = 0.7) -> Tensor:
        """Rows around a few directions: some cosines above 0.7, some below, few of them close to it."""
        shape = (batch, rows, width)
        centre = torch.randn(batch, 4, width, generator=self.generator)
        chosen = torch.randint(4, (batch, rows, 1), generator=self.generator).expand(shape)
        size = torch.rand(batch, rows, 1, generator=self.generator) + 0.5
        x = centre.gather(1, chosen) + noise * torch.rand(batch, rows, 1, generator=self.generator) * torch.randn(
            shape, generator=self.generator
        )
        return (x * size).to(self.device, self.dtype)

    def labels(self, batch: int, classes: int) -> Tensor:
        """Multi-hot float32 labels: one class or two a video, the normal one (0) for every third."""
        labels = torch.zeros(batch, classes, device=self.device)
        for b in range(batch):
            labels[b, b % 3 * b % classes] = 1
            if b % 3 == 2:
                labels[b, -1] = 1
        return labels


def wide(x: Tensor) -> Tensor:
    """The same values as columns of a tensor twice as wide."""
    return torch.stack([x, x], dim=-2).flatten(-2)[..., : x.shape[-1]]


def time_last(x: Tensor) -> Tensor:
    """The same values stored as (B, D, T)."""
    return x.mT.contiguous().mT


def shifted(x: Tensor) -> Tensor:
    """The same values in one piece that starts an element after 16 aligned bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def same(x: Tensor) -> Tensor:
    return x


def _add_act(dtype, device, seed, *, shape, activation, layout=same, other=None):
    """other: the layout of the residual, where it is not that of x"""
    draw = Draw(dtype, device, seed)
    return {"x": layout(draw(*shape)), "residual": (other or layout)(draw(*shape)), "activation": activation}


def _attention_pool(dtype, device, seed, *, shape, lengths=None, layout=same, zeros=False):
    draw = Draw(dtype, device, seed)
    features, logits = draw(*shape), draw(*shape[:2])
    if zeros:
        features[0] = 0
    return {"features": layout(features), "logits": layout(logits), "lengths": draw.ints(lengths)}


def _distance_graph(dtype, device, seed, *, shape, lengths=None, scale=torch.e, layout=same):
    draw = Draw(dtype, device, seed)
    return {"values": layout(draw(*shape)), "scale": scale, "lengths": draw.ints(lengths)}


def _distill_loss(dtype, device, seed, *, shape, lengths=None, layout=same, spread=1.0):
    draw = Draw(dtype, device, seed)
    teacher, student, theta = draw(*shape), draw(*shape), draw(*shape, scale=spread)
    return {
        "teacher": layout(teacher),
        "student": layout(student),
        "log_variance": layout(theta),
        "lengths": draw.ints(lengths),
    }


def _gated_fusion(dtype, device, seed, *, shape, needed=None, layout=same):
    draw, width = Draw(dtype, device, seed), shape[2]
    return {
        "visual": layout(draw(*shape)),
        "audio": layout(draw(*shape)),
        "gate_weight": draw(width, 2 * width, scale=(2 * width) ** -0.5),
        "gate_bias": draw(width, scale=0.1),
        "hidden_weight": draw(width, 2 * width, scale=(2 * width) ** -0.5),
        "hidden_bias": draw(width, scale=0.1),
        "residual_weight": draw(width, width, scale=width**-0.5),
        "residual_bias": draw(width, scale=0.1),
        "needed": draw.ints(needed),
    }


def _linear_act(
    dtype,
    device,
    seed,
    *,
    shape,
    outputs,
    taps=None,
    bias=True,
    activation="none",
    residual=None,
    norm=False,
    dilation=1,
    causal=False,
    lengths=None,
    dot=False,
    dropout=None,
    needed=None,
    layout=same,
    transposed=False,
):
    """residual: "own", or "shared" for one row expanded over all; taps None: a matrix; transposed: its storage.

    dropout: its share, with a mask of any strides
    """
    draw, inputs = Draw(dtype, device, seed), shape[-1]
    kernel = () if taps is None else (taps,)
    weight = draw(outputs, inputs, *kernel, scale=(inputs * (taps or 1)) ** -0.5)
    added = {
        None: lambda: None,
        "own": lambda: layout(draw(*shape[:-1], outputs)),
        "shared": lambda: draw(outputs).expand(*shape[:-1], outputs),
    }
    return {
        "x": layout(draw(*shape)),
        "weight": weight.T.contiguous().T if transposed else weight,
        "bias": draw(outputs, scale=0.1) if bias else None,
        "activation": activation,
        "residual": added[residual](),
        "norm": (1 + draw(inputs, scale=0.1), draw(inputs, scale=0.1)) if norm else None,
        "dilation": dilation,
        "causal": causal,
        "lengths": draw.ints(lengths),
        "dot": draw(outputs) if dot else None,
        "dropout": None if dropout is None else (time_last(draw(*shape[:-1], outputs)) > 0, dropout),
        "needed": draw.ints(needed),
    }


def _mil_loss(dtype, device, seed, *, rows, lengths, classes=7, divisor=16, scale=2.0, layout=same):
    draw, batch = Draw(dtype, device, seed), len(lengths)
    return {
        "logits": layout(draw(batch, rows, scale=scale)),
        "labels": draw.labels(batch, classes),
        "lengths": draw.ints(lengths),
        "divisor": divisor,
    }


def _mil_align_loss(dtype, device, seed, *, rows, lengths, classes, divisor=16, scale=3.0, layout=same):
    draw, batch = Draw(dtype, device, seed), len(lengths)
    return {
        "logits": layout(draw(batch, rows, classes, scale=scale)),
        "labels": draw.labels(batch, classes),
        "lengths": draw.ints(lengths),
        "alpha": 0.25 + 0.05 * draw(classes).float(),
        "divisor": divisor,
    }


def _prompt_similarity(dtype, device, seed, *, shape, classes, temperature=0.07, layout=same):
    draw = Draw(dtype, device, seed)
    batch, _, width = shape
    features, prompts = layout(draw(*shape)), layout(draw(batch, classes, width))
    return {"features": features, "prompts": prompts, "temperature": temperature}


def _similarity_graph(dtype, device, seed, *, shape, width, lengths=None, threshold=0.7, layout=same):
    draw = Draw(dtype, device, seed)
    return {
        "features": layout(draw.clustered(*shape)),
        "values": layout(draw(*shape[:2], width)),
        "lengths": draw.ints(lengths),
        "threshold": threshold,
    }


def _prefix_attention(dtype, device, seed, *, prefix, rows, count, width, heads=1, layout=same):
    draw = Draw(dtype, device, seed)
    qkv = layout(draw(prefix + count * rows, 3 * width))
    return {"qkv": qkv, "prefix": prefix, "rows": rows, "heads": heads}


def _topk_mean(dtype, device, seed, *, shape, lengths, divisor=16, tied=False, layout=same):
    draw = Draw(dtype, device, seed)
    scores = draw(*shape)
    if tied:
        scores = scores.round()  # a handful of values: ties at every rank
    return {"scores": layout(scores), "lengths": draw.ints(lengths), "divisor": divisor}


def _window_attention(dtype, device, seed, *, shape, window, heads=1, lengths=None, residual=True, layout=same):
    draw = Draw(dtype, device, seed)
    q, k, v, added = (layout(draw(*shape)) for _ in range(4))
    added = added if residual else None
    return {"q": q, "k": k, "v": v, "window": window, "heads": heads, "lengths": draw.ints(lengths), "residual": added}


def _uniform_pool(dtype, device, seed, *, lengths, width, rows, layout=same):
    draw = Draw(dtype, device, seed)
    return {"features": layout(draw(sum(lengths), width)), "lengths": draw.ints(lengths), "rows": rows}


def _pack_rows(dtype, device, seed, *, shape, lengths, layout=same):
    draw = Draw(dtype, device, seed)
    return {"padded": layout(draw(*shape)), "lengths": draw.ints(lengths)}


def _unpack_rows(dtype, device, seed, *, lengths, width, rows, layout=same):
    draw = Draw(dtype, device, seed)
    return {"packed": layout(draw(sum(lengths), width)), "lengths": draw.ints(lengths), "rows": rows}


def _cases(make: Callable, **settings: dict[str, Any]) -> list[Case]:
    return [Case(name.replace("_", "-"), partial(make, **kwargs)) for name, kwargs in settings.items()]


_RAGGED = [1, 17, 33]  # of T = 33

CASES: dict[str, list[Case]] = {
    "add_act": _cases(
        _add_act,
        one_row={"shape": (1, 1, 8), "activation": "relu"},
        relu={"shape": (2, 64, 64), "activation": "relu"},
        quick_gelu={"shape": (3, 33, 48), "activation": "quick_gelu"},
        gelu_wide={"shape": (2, 16, 32), "activation": "gelu", "layout": wide},
        relu_wide={"shape": (2, 16, 300), "activation": "relu", "layout": wide},
        time_last={"shape": (3, 7, 32), "activation": "quick_gelu", "layout": time_last},
        two_layouts={"shape": (2, 16, 32), "activation": "gelu", "layout": wide, "other": time_last},
        plain_sum={"shape": (2, 9, 5), "activation": "none", "layout": shifted},
    ),
    "attention_pool": _cases(
        _attention_pool,
        one_row={"shape": (1, 1, 8)},
        all_rows={"shape": (2, 64, 64)},
        ragged={"shape": (3, 33, 48), "lengths": _RAGGED},
        ragged_wide={"shape": (2, 16, 32), "lengths": [5, 16], "layout": wide},
        time_last={"shape": (3, 7, 32), "layout": time_last},
        zero_video={"shape": (2, 2, 8), "zeros": True},
        many_channels={"shape": (2, 3, 520)},
    ),
    "distance_graph": _cases(
        _distance_graph,
        one_row={"shape": (1, 1, 8)},
        two_rows={"shape": (2, 2, 48)},
        all_rows={"shape": (2, 64, 32)},
        ragged={"shape": (3, 33, 48), "lengths": _RAGGED},
        ragged_wide={"shape": (2, 16, 64), "lengths": [5, 16], "layout": wide},
        time_last={"shape": (3, 7, 32), "layout": time_last, "lengths": [7, 2, 1]},
        short_reach={"shape": (1, 16, 8), "scale": 0.5},
        long_reach={"shape": (2, 33, 8), "scale": 20.0, "lengths": [33, 9]},
        odd_width={"shape": (2, 9, 5), "lengths": [9, 4]},
        shifted={"shape": (2, 9, 16), "layout": shifted},
    ),
    "distill_loss": _cases(
        _distill_loss,
        one_row={"shape": (1, 1, 8)},
        all_rows={"shape": (2, 64, 64)},
        ragged={"shape": (3, 33, 48), "lengths": _RAGGED},
        ragged_wide={"shape": (2, 16, 32), "lengths": [5, 16], "layout": wide},
        time_last={"shape": (3, 7, 32), "layout": time_last},
        # Slopes of up to 3e6, which float16 holds only once they are divided by the number of terms. Where the largest
        # is of a variance far from 1e-6, as with a spread of 6, float32 hangs on how a GPU rounds an exponent.
        wide_variance={"shape": (2, 2, 48), "spread": 5.0},
    ),
    "gated_fusion": _cases(
        _gated_fusion,
        one_row={"shape": (1, 1, 8)},
        seven={"shape": (3, 7, 48)},
        wide={"shape": (2, 33, 32), "layout": wide},
        time_last={"shape": (2, 16, 32), "layout": time_last},
        whole_blocks={"shape": (2, 64, 64)},
        needed={"shape": (3, 33, 32), "needed": _RAGGED},
        many_channels={"shape": (1, 3, 136)},
    ),
    "linear_act": _cases(
        _linear_act,
        one_row={"shape": (1, 1, 8), "outputs": 8},
        matrix_of_rows={"shape": (7, 32), "outputs": 48, "bias": False},
        relu={"shape": (2, 33, 32), "outputs": 64, "activation": "relu"},
        gelu={"shape": (2, 16, 48), "outputs": 8, "activation": "gelu"},
        quick_gelu_norm={"shape": (3, 7, 64), "outputs": 48, "activation": "quick_gelu", "norm": True},
        norm_wide={"shape": (3, 7, 32), "outputs": 8, "norm": True, "layout": wide},
        norm_time_last={"shape": (1, 7, 32), "outputs": 8, "norm": True, "layout": time_last},
        residual_wide={"shape": (2, 64, 32), "outputs": 32, "residual": "own", "layout": wide},
        residual_time_last={"shape": (2, 7, 32), "outputs": 8, "taps": 2, "residual": "own", "layout": time_last},
        shared_residual={"shape": (2, 7, 48), "outputs": 32, "residual": "shared", "activation": "gelu"},
        transposed_weight={"shape": (2, 16, 32), "outputs": 64, "bias": False, "transposed": True},
        dot={"shape": (2, 33, 32), "outputs": 48, "activation": "quick_gelu", "dot": True},
        dot_norm={"shape": (1, 7, 8), "outputs": 8, "dot": True, "norm": True, "bias": False},
        conv1={"shape": (2, 7, 32), "outputs": 8, "taps": 1, "activation": "relu", "residual": "own"},
        conv2_causal={"shape": (2, 16, 32), "outputs": 32, "taps": 2, "causal": True, "activation": "relu"},
        conv2_causal_4={"shape": (2, 33, 48), "outputs": 48, "taps": 2, "causal": True, "dilation": 4},
        dropout={"shape": (2, 16, 32), "outputs": 48, "dropout": 0.1, "residual": "own", "bias": False},
        dropout_of_rows={"shape": (7, 32), "outputs": 48, "dropout": 0.5, "activation": "gelu", "residual": "own"},
        dropout_norm={"shape": (3, 7, 64), "outputs": 8, "activation": "quick_gelu", "norm": True, "dropout": 0.3},
        dropout_causal={
            "shape": (2, 33, 32),
            "outputs": 48,
            "taps": 2,
            "causal": True,
            "activation": "relu",
            "dropout": 0.1,
        },
        dropout_ragged={
            "shape": (3, 33, 32),
            "outputs": 48,
            "taps": 3,
            "activation": "relu",
            "residual": "own",
            "lengths": _RAGGED,
            "dropout": 0.25,
        },
        dropout_unseen={
            "shape": (3, 33, 32),
            "outputs": 48,
            "taps": 2,
            "dilation": 4,
            "causal": True,
            "activation": "relu",
            "lengths": [1, 20, 33],
            "dropout": 0.1,
        },
        many_rows={"shape": (1030, 8), "outputs": 8, "dropout": 0.1, "activation": "gelu", "residual": "own"},
        many_outputs={"shape": (7, 8), "outputs": 136, "activation": "gelu"},
        all_dropped={"shape": (2, 7, 32), "outputs": 8, "dropout": 1.0},
        needed={"shape": (3, 33, 32), "outputs": 48, "residual": "own", "activation": "relu", "needed": _RAGGED},
        needed_norm={
            "shape": (3, 33, 32),
            "outputs": 48,
            "norm": True,
            "activation": "quick_gelu",
            "needed": _RAGGED,
            "dropout": 0.3,
        },
        needed_dot={"shape": (2, 7, 32), "outputs": 8, "activation": "quick_gelu", "dot": True, "needed": [7, 2]},
        needed_conv={"shape": (3, 33, 32), "outputs": 48, "taps": 5, "needed": [1, 17, 30]},
        needed_conv_ragged={
            "shape": (3, 33, 32),
            "outputs": 48,
            "taps": 3,
            "dilation": 2,
            "lengths": _RAGGED,
            "needed": [5, 9, 30],
        },
        conv3_ragged={
            "shape": (3, 33, 32),
            "outputs": 48,
            "taps": 3,
            "activation": "relu",
            "residual": "own",
            "lengths": _RAGGED,
        },
        conv3_dilated={"shape": (2, 16, 8), "outputs": 32, "taps": 3, "dilation": 2, "lengths": [16, 3]},
        conv3_norm={"shape": (2, 16, 48), "outputs": 32, "taps": 3, "norm": True, "lengths": [16, 5]},
        everything={
            "shape": (2, 16, 32),
            "outputs": 48,
            "taps": 3,
            "dilation": 2,
            "causal": True,
            "activation": "quick_gelu",
            "residual": "own",
            "norm": True,
            "lengths": [16, 5],
        },
        matrix_ragged={"shape": (2, 7, 32), "outputs": 8, "lengths": [3, 7]},  # which it does not look at
        conv4_dilated={"shape": (2, 16, 8), "outputs": 32, "taps": 4, "dilation": 2, "lengths": [16, 3]},
        conv5={"shape": (2, 64, 32), "outputs": 64, "taps": 5},
        conv5_short={"shape": (3, 2, 48), "outputs": 8, "taps": 5, "lengths": [1, 2, 2]},
        conv5_time_last={"shape": (2, 7, 32), "outputs": 32, "taps": 5, "layout": time_last, "activation": "gelu"},
        conv3_dot={"shape": (2, 7, 32), "outputs": 32, "taps": 3, "dot": True, "activation": "relu", "lengths": [4, 7]},
    ),
    "mil_loss": _cases(
        _mil_loss,
        one_row={"rows": 1, "lengths": [1]},
        ragged={"rows": 33, "lengths": _RAGGED},
        full={"rows": 64, "lengths": [64, 64]},
        wide={"rows": 16, "lengths": [16, 15, 2], "layout": wide, "classes": 2},
        all_pooled={"rows": 7, "lengths": [7, 3], "divisor": 1},
        many_pooled={"rows": 64, "lengths": [64, 17, 31], "divisor": 3, "scale": 6.0},
    ),
    "mil_align_loss": _cases(
        _mil_align_loss,
        one_row={"rows": 1, "lengths": [1], "classes": 1},
        ragged={"rows": 33, "lengths": _RAGGED, "classes": 7},
        two_classes={"rows": 64, "lengths": [64, 64], "classes": 2},
        twenty_classes={"rows": 16, "lengths": [16, 15, 2], "classes": 20, "layout": time_last},
        wide={"rows": 7, "lengths": [7, 3], "classes": 8, "divisor": 1, "layout": wide},
        many_pooled={"rows": 64, "lengths": [64, 17, 31], "classes": 7, "divisor": 3, "scale": 14.0},
    ),
    "prefix_attention": _cases(
        _prefix_attention,
        one_row={"prefix": 1, "rows": 1, "count": 1, "width": 8},
        alone={"prefix": 5, "rows": 3, "count": 0, "width": 16},
        text={"prefix": 11, "rows": 13, "count": 7, "width": 48, "heads": 2},
        long={"prefix": 3, "rows": 30, "count": 3, "width": 32, "heads": 4},
        widest_heads={"prefix": 2, "rows": 3, "count": 2, "width": 128, "heads": 2},
        long_prefix={"prefix": 29, "rows": 2, "count": 20, "width": 16},
        longer={"prefix": 7, "rows": 33, "count": 2, "width": 16},
        wide={"prefix": 2, "rows": 7, "count": 3, "width": 64, "heads": 2, "layout": wide},
        time_last={"prefix": 17, "rows": 16, "count": 2, "width": 24, "heads": 3, "layout": time_last},
    ),
    "prompt_similarity": _cases(
        _prompt_similarity,
        one_row={"shape": (1, 1, 8), "classes": 1},
        seven={"shape": (3, 33, 48), "classes": 7},
        twenty={"shape": (2, 64, 64), "classes": 20},
        forty={"shape": (2, 33, 48), "classes": 40},
        wide={"shape": (2, 16, 32), "classes": 2, "layout": wide},
        time_last={"shape": (2, 7, 64), "classes": 16, "layout": time_last, "temperature": 1.0},
    ),
    "similarity_graph": _cases(
        _similarity_graph,
        one_row={"shape": (1, 1, 8), "width": 8},
        two_rows={"shape": (2, 2, 48), "width": 8},
        all_rows={"shape": (2, 64, 32), "width": 48},
        tiles_of_padding={"shape": (2, 150, 16), "width": 16, "lengths": [20, 150]},
        ragged={"shape": (3, 33, 48), "width": 32, "lengths": _RAGGED},
        ragged_wide={"shape": (2, 16, 64), "width": 32, "lengths": [5, 16], "layout": wide},
        time_last={"shape": (3, 7, 32), "width": 64, "lengths": [7, 2, 1], "layout": time_last},
        weak_edges={"shape": (2, 16, 32), "width": 8, "threshold": 0.02},
        only_itself={"shape": (2, 16, 32), "width": 8, "threshold": 0.99},
        every_edge={"shape": (2, 16, 32), "width": 8, "threshold": -1.0, "lengths": [16, 5]},
    ),
    "topk_mean": _cases(
        _topk_mean,
        one_row={"shape": (1, 1, 1), "lengths": [1]},
        ragged={"shape": (3, 33, 7), "lengths": _RAGGED},
        full={"shape": (2, 64, 20), "lengths": [64, 64]},
        ties={"shape": (3, 33, 7), "lengths": _RAGGED, "tied": True, "divisor": 4},
        all_pooled={"shape": (2, 7, 2), "lengths": [7, 3], "divisor": 1},
        wide={"shape": (2, 16, 3), "lengths": [16, 2], "layout": wide},
        time_last={"shape": (3, 64, 8), "lengths": [64, 17, 31], "divisor": 3, "layout": time_last},
    ),
    "window_attention": _cases(
        _window_attention,
        one_row={"shape": (1, 1, 8), "window": 4, "residual": False},
        fours={"shape": (2, 64, 32), "window": 4},
        cut={"shape": (2, 33, 48), "window": 16},
        longer={"shape": (2, 7, 64), "window": 64, "residual": False},
        hundred={"shape": (1, 130, 16), "window": 100},
        window_of_one={"shape": (2, 2, 8), "window": 1},
        two_heads={"shape": (2, 33, 48), "window": 5, "heads": 2},
        four_heads_ragged={"shape": (3, 33, 64), "window": 7, "heads": 4, "lengths": _RAGGED},
        ragged={"shape": (3, 33, 32), "window": 4, "lengths": _RAGGED},
        ragged_wide={"shape": (2, 16, 32), "window": 16, "lengths": [5, 16], "layout": wide},
        time_last={"shape": (2, 16, 32), "window": 8, "layout": time_last},
    ),
    "uniform_pool": _cases(
        _uniform_pool,
        one_row={"lengths": [1], "width": 8, "rows": 1},
        shorter={"lengths": [5, 1, 16], "width": 32, "rows": 16},
        longer={"lengths": [33, 64, 17], "width": 48, "rows": 16},
        # Float32, or n r / 100, has others. So has n (1 / 100), as torch divides by a number on a GPU, of 114 rows.
        rounded_bounds={"lengths": [116, 58], "width": 3, "rows": 100},
        wide_rows={"lengths": [33, 7], "width": 130, "rows": 16},
        wide={"lengths": [33, 7], "width": 8, "rows": 7, "layout": wide},
        odd_width={"lengths": [9, 3], "width": 5, "rows": 4},
        shifted={"lengths": [9, 3], "width": 16, "rows": 4, "layout": shifted},
    ),
    "pack_rows": _cases(
        _pack_rows,
        one_row={"shape": (1, 1, 8), "lengths": [1]},
        ragged={"shape": (3, 33, 48), "lengths": _RAGGED},
        full={"shape": (2, 16, 32), "lengths": [16, 16], "layout": time_last},
        wide={"shape": (2, 7, 8), "lengths": [7, 2], "layout": wide},
        odd_width={"shape": (2, 9, 5), "lengths": [9, 4]},
        shifted={"shape": (2, 9, 16), "lengths": [9, 4], "layout": shifted},
    ),
    "unpack_rows": _cases(
        _unpack_rows,
        one_row={"lengths": [1], "width": 8, "rows": 1},
        ragged={"lengths": _RAGGED, "width": 48, "rows": 33},
        spare_rows={"lengths": [7, 2], "width": 32, "rows": 16},
        wide={"lengths": [7, 2], "width": 8, "rows": 7, "layout": wide},
        odd_width={"lengths": [9, 4], "width": 5, "rows": 11},
        shifted={"lengths": [9, 4], "width": 16, "rows": 9, "layout": shifted},
    ),
}

_FULL, _CUT = [256] * 4, [256, 17, 133, 1]
_BTD = (4, 256, 512)

LARGE: dict[str, list[Case]] = {
    "add_act": _cases(
        _add_act,
        tcn={"shape": _BTD, "activation": "relu"},
        graph={"shape": (4, 256, 256), "activation": "quick_gelu", "layout": wide},
    ),
    "attention_pool": _cases(_attention_pool, full={"shape": _BTD}, ragged={"shape": _BTD, "lengths": _CUT}),
    "distance_graph": _cases(
        _distance_graph,
        full={"shape": (4, 256, 256)},
        ragged={"shape": (4, 256, 256), "lengths": _CUT},
        long={"shape": (2, 700, 64), "lengths": [700, 300]},
    ),
    "distill_loss": _cases(_distill_loss, full={"shape": _BTD}, ragged={"shape": _BTD, "lengths": _CUT}),
    "gated_fusion": _cases(_gated_fusion, full={"shape": _BTD}),
    "linear_act": _cases(
        _linear_act,
        projection={"shape": _BTD, "outputs": 512, "norm": True},
        mlp_in={"shape": _BTD, "outputs": 2048, "activation": "quick_gelu", "norm": True},
        mlp_out={"shape": (4, 256, 2048), "outputs": 512, "residual": "own"},
        head={"shape": _BTD, "outputs": 2048, "activation": "quick_gelu", "dot": True},
        tcn={
            "shape": _BTD,
            "outputs": 512,
            "taps": 2,
            "dilation": 4,
            "causal": True,
            "activation": "relu",
            "dropout": 0.1,
        },
        conv3={
            "shape": _BTD,
            "outputs": 512,
            "taps": 3,
            "activation": "relu",
            "residual": "own",
            "lengths": _CUT,
        },
        conv5={"shape": _BTD, "outputs": 512, "taps": 5},
    ),
    "mil_loss": _cases(
        _mil_loss,
        full={"rows": 256, "lengths": _FULL},
        ragged={"rows": 256, "lengths": _CUT},
        long={"rows": 12000, "lengths": [12000, 700]},
    ),
    "mil_align_loss": _cases(
        _mil_align_loss,
        full={"rows": 256, "lengths": _FULL, "classes": 7},
        ragged={"rows": 256, "lengths": _CUT, "classes": 7},
        long={"rows": 3000, "lengths": [3000, 700], "classes": 7},
    ),
    "prefix_attention": _cases(
        _prefix_attention,
        text={"prefix": 11, "rows": 13, "count": 7, "width": 512, "heads": 8},
        longest={"prefix": 11, "rows": 32, "count": 14, "width": 512, "heads": 8},
    ),
    "prompt_similarity": _cases(_prompt_similarity, full={"shape": _BTD, "classes": 7}),
    "similarity_graph": _cases(
        _similarity_graph,
        full={"shape": _BTD, "width": 256},
        ragged={"shape": _BTD, "width": 256, "lengths": _CUT},
    ),
    "topk_mean": _cases(
        _topk_mean,
        full={"shape": (4, 256, 7), "lengths": _FULL},
        ragged={"shape": (4, 256, 7), "lengths": _CUT},
        long={"shape": (2, 12000, 2), "lengths": [12000, 700]},
    ),
    "window_attention": _cases(
        _window_attention,
        teacher={"shape": _BTD, "window": 4},
        student={"shape": _BTD, "window": 64, "residual": False},
        ragged={"shape": _BTD, "window": 64, "lengths": _CUT},
    ),
    "uniform_pool": _cases(_uniform_pool, long={"lengths": [256, 4000, 700, 30], "width": 512, "rows": 256}),
    "pack_rows": _cases(_pack_rows, ragged={"shape": _BTD, "lengths": _CUT}),
    "unpack_rows": _cases(_unpack_rows, ragged={"lengths": _CUT, "width": 512, "rows": 256}),
}
