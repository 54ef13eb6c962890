"""The operations of the official code in eager PyTorch, the baseline of the training and inference benchmarks.

It is written from the model's description and has the costs of the official code: loops over the batch in the graphs
and losses, all 77 positions of every class name, convolutions that transpose [B, T, D], concatenations, and a distance
matrix built in every call. Parameters are looked up in a dict by their official names, so that both sides can use the
same weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_distance_graph import official as distance_graph
from .bench_mil_loss import loops as mil_losses
from .bench_similarity_graph import official as similarity_graph

TEXT_HEADS = 8
TEACHER_WINDOW, STUDENT_WINDOW = 4, 64
Weights = dict[str, Tensor]


def linear(s: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def norm(s: Weights, name: str, x: Tensor) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, s[f"{name}.bias"]).to(x.dtype)


def mlp(s: Weights, name: str, x: Tensor) -> Tensor:
    return linear(s, f"{name}.c_proj", quick_gelu(linear(s, f"{name}.c_fc", x)))


def block(s: Weights, name: str, x: Tensor, heads: int, mask: Tensor) -> Tensor:
    """A pre-norm block over x [T, B, D]."""
    y = norm(s, f"{name}.ln_1", x)
    attended, _ = F.multi_head_attention_forward(
        y, y, y, x.shape[2], heads, s[f"{name}.attn.in_proj_weight"], s[f"{name}.attn.in_proj_bias"], None, None, False,
        0.0, s[f"{name}.attn.out_proj.weight"], s[f"{name}.attn.out_proj.bias"], need_weights=False, attn_mask=mask,
    )  # fmt: skip
    x = x + attended
    return x + mlp(s, f"{name}.mlp", norm(s, f"{name}.ln_2", x))


def layers(s: Weights, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in s if name.startswith(prefix)})


def conv(s: Weights, name: str, x: Tensor, **how) -> Tensor:
    """A convolution over x [B, D, T]."""
    return F.conv1d(x, s[f"{name}.weight"], s[f"{name}.bias"], **how)


def graph_conv(s: Weights, name: str, x: Tensor, mix) -> Tensor:
    skip = x
    if f"{name}.residual.weight" in s:
        skip = conv(s, f"{name}.residual", x.permute(0, 2, 1), padding=2).permute(0, 2, 1)
    return mix(x @ s[f"{name}.weight"]) + skip


def temporal(s: Weights, visual: Tensor, lengths: Tensor, window: int) -> Tensor:
    rows = visual.shape[1]
    at = torch.arange(rows, device=visual.device)
    positions = F.embedding(at.expand(len(visual), -1), s["frame_position_embeddings.weight"])
    x = visual.permute(1, 0, 2) + positions.permute(1, 0, 2)
    of = at // window
    mask = torch.zeros(rows, rows, device=x.device, dtype=x.dtype).masked_fill(of[:, None] != of, -math.inf)
    for layer in range(layers(s, "temporal.resblocks.")):
        x = block(s, f"temporal.resblocks.{layer}", x, 1, mask)
    x = x.permute(1, 0, 2)

    def alike(values: Tensor) -> Tensor:
        return similarity_graph(x, values, lengths)

    x1 = quick_gelu(graph_conv(s, "gc1", x, alike))
    x2 = quick_gelu(graph_conv(s, "gc3", x, distance_graph))
    x1 = quick_gelu(graph_conv(s, "gc2", x1, alike))
    x2 = quick_gelu(graph_conv(s, "gc4", x2, distance_graph))
    return linear(s, "linear", torch.cat((x1, x2), 2))


def audio_net(s: Weights, audio: Tensor, dropout: float) -> Tensor:
    x = audio.permute(0, 2, 1)
    for level in range(layers(s, "temporalconvnet.network.")):
        h, pad = x, 2**level
        for name in ("conv1", "conv2"):
            name = f"temporalconvnet.network.{level}.{name}"
            weight = torch._weight_norm(s[f"{name}.weight_v"], s[f"{name}.weight_g"], 0)
            h = F.conv1d(h, weight, s[f"{name}.bias"], padding=pad, dilation=pad)[:, :, :-pad].contiguous()
            h = F.dropout(F.relu(h), dropout)
        x = F.relu(h + x)
    return x.permute(0, 2, 1)


def fuse(s: Weights, visual: Tensor, audio: Tensor) -> Tensor:
    z = torch.cat((visual, audio), -1)
    gate = torch.sigmoid(linear(s, "temporalgatedresidual.gate_proj.0", z))
    hidden = F.gelu(linear(s, "temporalgatedresidual.residual_proj.0", z))
    return visual + gate * linear(s, "temporalgatedresidual.residual_proj.2", hidden)


def uncertain(s: Weights, v: Tensor) -> tuple[Tensor, Tensor]:
    mean = x = v.permute(0, 2, 1)
    for i in range(3):
        mean = mean + F.relu(conv(s, f"fe_net.conv.{i}.conv.0", mean, padding=1))
    h = F.relu(conv(s, "fe_net.theta.theta.0", x))
    h = F.relu(conv(s, "fe_net.theta.theta.3", conv(s, "fe_net.theta.theta.2", h, padding=1)))
    return mean.permute(0, 2, 1), -(x + h).permute(0, 2, 1)


def text(s: Weights, tokens: list[list[int]]) -> Tensor:
    """Returns text features (C, D), computed over all 77 positions of every class name."""
    x = s["text_prompt_embeddings.weight"].repeat(len(tokens), 1, 1)
    at = []
    for c, name in enumerate(tokens):
        words, eos = (
            F.embedding(torch.tensor(name, device=x.device), s["clipmodel.token_embedding.weight"]),
            len(name) - 1,
        )
        x[c, 0] = words[0]
        x[c, 11 : 10 + eos] = words[1:eos]
        x[c, 20 + eos] = words[eos]
        at.append(20 + eos)
    x = (x + s["clipmodel.positional_embedding"]).permute(1, 0, 2)
    mask = torch.full((77, 77), -math.inf, device=x.device, dtype=x.dtype).triu(1)
    for layer in range(layers(s, "clipmodel.transformer.resblocks.")):
        x = block(s, f"clipmodel.transformer.resblocks.{layer}", x, TEXT_HEADS, mask)
    x = norm(s, "clipmodel.ln_final", x.permute(1, 0, 2))
    return x[torch.arange(len(tokens)), torch.tensor(at)] @ s["clipmodel.text_projection"]


def heads(s: Weights, v: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    logits = linear(s, "classifier", v + mlp(s, "mlp2", v))  # [B, T, 1]
    pooled = logits.permute(0, 2, 1) @ v
    pooled = pooled / pooled.norm(dim=-1, keepdim=True)
    prompts = classes.expand(len(v), -1, -1)
    pooled = pooled.expand(-1, len(classes), -1)
    weights = F.softmax(prompts @ pooled.permute(0, 2, 1), dim=-1)
    y = prompts + weights @ pooled
    y = y + mlp(s, "mlp1", y)
    frames = v / v.norm(dim=-1, keepdim=True)
    y = y / y.norm(dim=-1, keepdim=True)
    return logits[..., 0], frames @ y.permute(0, 2, 1) / 0.07


def losses(s: Weights, out: tuple[Tensor, Tensor], classes: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    total = mil_losses(*out, labels, lengths, s["alpha"])
    normal = classes[0] / classes[0].norm()
    apart = torch.zeros(1, device=labels.device)
    for c in range(1, len(classes)):
        apart = apart + (normal @ (classes[c] / classes[c].norm())).abs()
    return total + 1e-4 * apart[0] / (len(classes) - 1)


def teacher_features(s: Weights, visual: Tensor, audio: Tensor, lengths: Tensor, dropout: float) -> Tensor:
    return fuse(s, temporal(s, visual, lengths, TEACHER_WINDOW), audio_net(s, audio, dropout))


def teacher_loss(s: Weights, tokens, visual, audio, labels, lengths, dropout: float) -> Tensor:
    v = teacher_features(s, visual, audio, lengths, dropout)
    classes = text(s, tokens)
    return losses(s, heads(s, v, classes), classes, labels, lengths)


def distil_loss(s: Weights, teacher: Weights, tokens, visual, audio, labels, lengths) -> Tensor:
    """Returns the student's loss; the frozen teacher runs its whole forward pass, as in the official code."""
    with torch.no_grad():
        guide = teacher_features(teacher, visual, audio, lengths, 0.0)
        heads(teacher, guide, text(teacher, tokens))
    mean, theta = uncertain(s, temporal(s, visual, lengths, STUDENT_WINDOW))
    classes = text(s, tokens)
    total = losses(s, heads(s, mean, classes), classes, labels, lengths)
    return total + 1e-8 * ((guide - mean) ** 2 / (1e-6 + 2 * theta.exp()) + theta).mean()


def student_scores(s: Weights, tokens, visual, lengths) -> tuple[Tensor, Tensor]:
    """Returns anomaly and class logits; uncertainty and text features are computed in every call."""
    mean, _ = uncertain(s, temporal(s, visual, lengths, STUDENT_WINDOW))
    return heads(s, mean, text(s, tokens))
