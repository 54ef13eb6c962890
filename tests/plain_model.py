"""Teacher and student written out operation by operation, one video at a time, on an official state dict.

Slow, and independent of the library: nothing of it is imported here. Every function takes the state dict `s`, and rows
(T, ...) of one video of which the first n are valid.
"""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * s[f"{name}.weight"] + s[f"{name}.bias"]


def mlp(s: State, name: str, x: Tensor) -> Tensor:
    return linear(s, f"{name}.c_proj", quick_gelu(linear(s, f"{name}.c_fc", x)))


def attention(s: State, name: str, x: Tensor, sees: list[list[int]], heads: int) -> Tensor:
    """Multi-head attention in which row i sees the rows sees[i]."""
    width = x.shape[1]
    q, k, v = (x @ s[f"{name}.in_proj_weight"].T + s[f"{name}.in_proj_bias"]).split(width, dim=1)
    rows = []
    for i, seen in enumerate(sees):
        parts = []
        for head in range(heads):
            of = slice(head * width // heads, (head + 1) * width // heads)
            scores = torch.stack([q[i, of] @ k[j, of] for j in seen]) / math.sqrt(width / heads)
            weights = torch.exp(scores) / torch.exp(scores).sum()
            parts.append(sum(w * v[j, of] for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(parts))
    return linear(s, f"{name}.out_proj", torch.stack(rows))


def block(s: State, name: str, x: Tensor, sees: list[list[int]], heads: int) -> Tensor:
    x = x + attention(s, f"{name}.attn", layer_norm(s, f"{name}.ln_1", x), sees, heads)
    return x + mlp(s, f"{name}.mlp", layer_norm(s, f"{name}.ln_2", x))


def blocks(s: State, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in s if name.startswith(prefix)})


def conv(x: Tensor, weight: Tensor, bias: Tensor, offsets: list[int]) -> Tensor:
    """out_t = sum_k weight[:, :, k] x_(t + offsets[k]) + bias, zero outside the video."""
    rows = []
    for t in range(len(x)):
        y = bias
        for k, offset in enumerate(offsets):
            if 0 <= t + offset < len(x):
                y = y + weight[:, :, k] @ x[t + offset]
        rows.append(y)
    return torch.stack(rows)


def centred(s: State, name: str, x: Tensor) -> Tensor:
    weight = s[f"{name}.weight"]
    reach = weight.shape[2] // 2
    return conv(x, weight, s[f"{name}.bias"], list(range(-reach, reach + 1)))


def similarity(x: Tensor, n: int) -> Tensor:
    rows = []
    for i in range(len(x)):
        if i >= n:
            rows.append(torch.zeros(len(x), dtype=x.dtype))
            continue
        edges = []
        for j in range(n):
            cosine = (x[i] @ x[j]) / (torch.sqrt(x[i] @ x[i]) * torch.sqrt(x[j] @ x[j]) + 1e-20)
            edges.append(torch.exp(cosine if cosine > 0.7 else torch.zeros_like(cosine)))
        weights = torch.stack(edges)
        rows.append(torch.cat([weights / weights.sum(), torch.zeros(len(x) - n, dtype=x.dtype)]))
    return torch.stack(rows)


def distance(count: int) -> Tensor:
    rows = [[math.exp(-abs(i - j) / math.e) for j in range(count)] for i in range(count)]
    return torch.tensor(rows, dtype=torch.float64)


def graph_conv(s: State, name: str, x: Tensor, graph: Tensor) -> Tensor:
    skip = centred(s, f"{name}.residual", x) if f"{name}.residual.weight" in s else x
    return graph @ (x @ s[f"{name}.weight"]) + skip


def temporal(s: State, x: Tensor, n: int, window: int) -> Tensor:
    x = x + s["frame_position_embeddings.weight"][: len(x)]
    sees = [[j for j in range(len(x)) if j // window == i // window] for i in range(len(x))]
    for layer in range(blocks(s, "temporal.resblocks.")):
        x = block(s, f"temporal.resblocks.{layer}", x, sees, 1)
    alike, close = similarity(x, n), distance(len(x))
    x1 = quick_gelu(graph_conv(s, "gc2", quick_gelu(graph_conv(s, "gc1", x, alike)), alike))
    x2 = quick_gelu(graph_conv(s, "gc4", quick_gelu(graph_conv(s, "gc3", x, close)), close))
    return linear(s, "linear", torch.cat([x1, x2], dim=1))


def causal(s: State, name: str, x: Tensor, dilation: int) -> Tensor:
    g, v = s[f"{name}.weight_g"], s[f"{name}.weight_v"]
    weight = torch.stack([g[o] * v[o] / torch.sqrt((v[o] ** 2).sum()) for o in range(len(v))])
    return conv(x, weight, s[f"{name}.bias"], [-dilation, 0])


def audio_net(s: State, x: Tensor) -> Tensor:
    for level in range(blocks(s, "temporalconvnet.network.")):
        name = f"temporalconvnet.network.{level}"
        h = relu(causal(s, f"{name}.conv1", x, 2**level))
        x = relu(relu(causal(s, f"{name}.conv2", h, 2**level)) + x)
    return x


def fuse(s: State, v: Tensor, a: Tensor) -> Tensor:
    z = torch.cat([v, a], dim=1)
    gate = 1 / (1 + torch.exp(-linear(s, "temporalgatedresidual.gate_proj.0", z)))
    h = linear(s, "temporalgatedresidual.residual_proj.0", z)
    h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    return v + gate * linear(s, "temporalgatedresidual.residual_proj.2", h)


def uncertain(s: State, v: Tensor) -> tuple[Tensor, Tensor]:
    mean = v
    for i in range(3):
        mean = mean + relu(centred(s, f"fe_net.conv.{i}.conv.0", mean))
    h = relu(centred(s, "fe_net.theta.theta.0", v))
    h = centred(s, "fe_net.theta.theta.3", centred(s, "fe_net.theta.theta.2", h))
    return mean, -(v + relu(h))


def text(s: State, tokens: list[list[int]], heads: int) -> Tensor:
    """All 77 positions of every class, under the causal mask."""
    features = []
    for name in tokens:
        eos = len(name) - 1
        x = s["text_prompt_embeddings.weight"].clone()
        embedding = s["clipmodel.token_embedding.weight"]
        x[0] = embedding[name[0]]
        for i in range(1, eos):
            x[10 + i] = embedding[name[i]]
        x[20 + eos] = embedding[name[eos]]
        x = x + s["clipmodel.positional_embedding"]
        sees = [list(range(i + 1)) for i in range(77)]
        for layer in range(blocks(s, "clipmodel.transformer.resblocks.")):
            x = block(s, f"clipmodel.transformer.resblocks.{layer}", x, sees, heads)
        features.append(layer_norm(s, "clipmodel.ln_final", x)[20 + eos] @ s["clipmodel.text_projection"])
    return torch.stack(features)


def heads(s: State, v: Tensor, classes: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
    """Anomaly logits (T,) and class logits (T, C) of features v (T, D) and class features (C, D)."""
    logits1 = linear(s, "classifier", v + mlp(s, "mlp2", v))[:, 0]
    g = sum(logits1[t] * v[t] for t in range(len(v)))
    g = g / torch.sqrt(g @ g)
    if prompt == "official":
        y = torch.stack([x + g for x in classes])
        prompts = y + mlp(s, "mlp1", y)
    else:
        weights = torch.exp(classes @ g)
        weights = weights / weights.sum()
        y = torch.stack([x + w * g for x, w in zip(classes, weights, strict=True)])
        prompts = classes + mlp(s, "mlp1", y)
    rows = []
    for t in range(len(v)):
        cosines = [(v[t] @ x) / (torch.sqrt(v[t] @ v[t]) * torch.sqrt(x @ x)) for x in prompts]
        rows.append(torch.stack(cosines) / 0.07)
    return logits1, torch.stack(rows)


def top_mean(scores: Tensor, n: int) -> Tensor:
    best = sorted(scores[:n], key=lambda x: x.item(), reverse=True)[: n // 16 + 1]
    return sum(best) / len(best)


def video_losses(s: State, logits1: Tensor, logits2: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The two multiple-instance losses of one video: their means over the batch are L_mil and L_align."""
    p = top_mean(1 / (1 + torch.exp(-logits1)), n)
    mil = -torch.log(p) if labels[0] == 0 else -torch.log(1 - p)
    scores = torch.stack([top_mean(logits2[:, c], n) for c in range(logits2.shape[1])])
    share = torch.exp(scores) / torch.exp(scores).sum()
    y = labels / labels.sum()
    ce = -(y * torch.log(share)).sum()
    focal = (y * s["alpha"]).sum() * (1 - (y * share).sum()) ** 2 * ce
    return mil, (ce + focal) / 2


def text_loss(x: Tensor) -> Tensor:
    size = [torch.sqrt(row @ row) for row in x]
    return sum(abs(x[0] @ x[c] / (size[0] * size[c])) for c in range(1, len(x))) / (len(x) - 1)


def distill_terms(teacher: Tensor, student: Tensor, theta: Tensor) -> Tensor:
    return (teacher - student) ** 2 / (1e-6 + 2 * torch.exp(theta)) + theta
