"""The text encoder: CLIP's frozen text transformer over learnable prompts, only at positions that matter.

The sequence of a class is [SOS] + 10 learnable rows + the name's tokens + 10 learnable rows + [EOS] + learnable rows.
The transformer is causal, so nothing after EOS affects the result. Positions 0..10 are the same for every class and are
computed once, as a prefix that all classes attend to.
"""

import errno
import hashlib
import io
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from operator import index
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..data.errors import DataError
from ..modules import MLP
from ..ops._residual_block import residual_mlp
from ..ops._triton import fused
from .frozen import lowered, release

CONTEXT = 77  # CLIP's sequence length
VOCABULARY = 49408
SOS, EOS = 49406, 49407
LEARNABLE = 10  # rows before and after the name
PREFIX = 1 + LEARNABLE  # [SOS] and the first learnable rows, shared by all classes
OPENAI_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
OPENAI_URL = f"https://openaipublic.azureedge.net/clip/models/{OPENAI_SHA256}/ViT-B-16.pt"
INFLATED = "holds more than its bytes: it is compressed, as torch.save does not; save it again with that"

_log = logging.getLogger("avadclip_fast")


class TextWeightsError(RuntimeError):
    """CLIP's text weights are unavailable; the message says what to do."""


def tokenize(names: list[str]) -> list[list[int]]:
    """CLIP's BPE token ids of class names, from [SOS] to [EOS] (open_clip's tokenizer). Raises TextWeightsError."""
    try:
        from open_clip import tokenizer
    except (ImportError, RuntimeError) as error:  # RuntimeError: with a torchvision of another torch
        raise TextWeightsError(
            f"class names need open_clip's tokenizer: pip install open_clip_torch ({error})"
        ) from error
    with torch.device("cpu"):  # whatever the default device
        tokens = tokenizer.tokenize(names, context_length=CONTEXT)  # [C, 77], EOS has the highest id
    return [row[: int(row.argmax()) + 1].tolist() for row in tokens]


class TextBlock(nn.Module):
    """Pre-norm transformer block of CLIP's text tower; rows are the prefix, then S rows per class.

    Its weights are assumed to be frozen: those of products are converted for autocast once, not in every call.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)  # holds the parameters under CLIP's names
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, rows: int, only: Tensor | None = None) -> Tensor:
        """x (11 + C·S, W), rows S -> (11 + C·S, W).

        only: (C,) int or None; the rows of x to compute -> (C, W)
        """
        attn, mlp = self.attn, self.mlp
        qkv = _linear(x, attn.in_proj_weight, attn.in_proj_bias, norm=(self.ln_1.weight, self.ln_1.bias))
        mixed = ops.prefix_attention(qkv, PREFIX, rows, self.heads)  # as x
        if only is not None:
            x, mixed = x.index_select(0, only), mixed.index_select(0, only)
        x = _linear(mixed, attn.out_proj.weight, attn.out_proj.bias, residual=x)
        norm = (self.ln_2.weight, self.ln_2.bias)
        fc, proj = ((lowered(layer.weight), lowered(layer.bias)) for layer in (mlp.c_fc, mlp.c_proj))
        if fused(None, x, *fc, *proj):
            return residual_mlp(x, norm, fc, proj)
        h = _linear(x, mlp.c_fc.weight, mlp.c_fc.bias, "quick_gelu", norm=norm)
        return _linear(h, mlp.c_proj.weight, mlp.c_proj.bias, residual=x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", **named) -> Tensor:
    return ops.linear_act(x, lowered(weight), lowered(bias), activation, **named)


class Transformer(nn.Module):
    """Holds the blocks under CLIP's names."""

    def __init__(self, blocks: Iterable[TextBlock]):
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def blocks(self) -> Iterator[TextBlock]:
        return cast(Iterator[TextBlock], iter(self.resblocks))


class TextEncoder(nn.Module):
    """Class features from CLIP's frozen text transformer and learnable prompts (official code of arXiv 2504.04495).

        text = TextEncoder(tokenize(["normal", "fighting"]))
        features = text()                     # (C, 512)

    Weights have CLIP's names and are frozen; only `prompt` (77, W) is trained, with row p at position p.

    tokens: one list of token ids per class, [SOS] name [EOS]
    Raises DataError if a name has more than 55 tokens, ValueError on other invalid settings.
    """

    codes: Tensor  # (11 + C·S,) int64, CLIP's token of each row
    fixed: Tensor  # (11 + C·S, 1) bool, True for tokens, False for learnable rows
    positions: Tensor  # (11 + C·S,) int64, of the rows in their sequences
    eos: Tensor  # (C,) int64, the row of each class that ends it

    def __init__(self, tokens: list[list[int]], dim: int = 512, width: int = 512, layers: int = 12):
        super().__init__()
        heads = max(1, width // 64)
        if width % heads:
            raise ValueError(f"text_width must be a multiple of 64, the width of a head, or below 128; got {width}")
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, width))
        self.transformer = Transformer(TextBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, dim))
        # CLIP's temperature is unused, but kept so that official checkpoints round-trip.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))
        self.requires_grad_(False)
        self.prompt = nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.prompt.weight, std=0.01)
        self.set_tokens(tokens)

    def _apply(self, *args, **named) -> Self:
        release(self)  # before the layers within are converted
        on_meta = self.codes.is_meta
        super()._apply(*args, **named)
        if on_meta:  # `to_empty` gives the rows memory, and nothing in it
            self.set_tokens(self.tokens)
        return self

    def _load_from_state_dict(self, *args, **named) -> None:
        """Also lays out the rows, which are not saved: a model that was made on "meta" has not got them."""
        release(self)  # before the layers within load theirs
        super()._load_from_state_dict(*args, **named)
        self.set_tokens(self.tokens)

    def set_tokens(self, tokens: list[list[int]]) -> None:
        """Sets the classes and lays out their rows after the shared prefix. Raises DataError like the class."""
        tokens = [[index(i) for i in t] for t in tokens]  # plain numbers, which config.json can hold
        # CLIP's tokenizer pads, and what is last is taken for [EOS].
        ends = all(len(t) >= 2 and (t[0], t[-1]) == (SOS, EOS) for t in tokens)
        if not ends or not all(0 <= i < VOCABULARY for t in tokens for i in t):
            wanted = f"in 0..{VOCABULARY - 1}, from [SOS] {SOS} to [EOS] {EOS}, without padding"
            raise ValueError(f"class_tokens must be ids of CLIP's tokens, {wanted}")
        eos = [len(t) - 1 for t in tokens]  # index of EOS in the plain tokenisation
        if max(eos) + 2 * LEARNABLE >= CONTEXT:
            worst = eos.index(max(eos))
            cut = " or more" if max(eos) == CONTEXT - 1 else ""  # where CLIP's tokenizer cuts a name off
            raise DataError(
                f"class name number {worst + 1} has {max(eos) - 1} tokens{cut}; "
                f"at most {CONTEXT - 2 * LEARNABLE - 2} fit between the prompt rows: shorten it"
            )
        rows = max(eos) + LEARNABLE  # S: the longest name's tokens, 10 learnable rows, EOS
        with torch.device("cpu"):  # whatever the default device
            laid_out = _laid_out(tokens, rows)
        device = self.positional_embedding.device
        self.tokens = tokens
        self.rows = rows
        for buffer, value in laid_out.items():
            there = getattr(self, buffer, None)
            if there is not None and there.shape == value.shape and there.device == device:
                there.copy_(value)  # in place: a CUDA graph may read it
            else:
                self.register_buffer(buffer, value.to(device), persistent=False)

    def forward(self) -> Tensor:
        """Class features, (C, D)."""
        x = torch.where(self.fixed, self.token_embedding(self.codes), self.prompt(self.positions))
        x = x + F.embedding(self.positions, self.positional_embedding)  # [11 + C·S, W]
        *blocks, last = self.transformer.blocks()
        for block in blocks:
            x = block(x, self.rows)
        x = last(x, self.rows, only=self.eos)  # [C, W]
        norm = (self.ln_final.weight, self.ln_final.bias)
        return ops.linear_act(x, lowered(self.text_projection).T, norm=norm)

    @torch.no_grad()
    def randomize(self, seed: int = 0) -> None:
        """Draws the frozen weights like CLIP's initialisation, from a separate generator seeded with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        width, layers = self.positional_embedding.shape[1], len(self.transformer.resblocks)

        def draw(parameter: Tensor, std: float) -> None:
            drawn = torch.empty(parameter.shape, device="cpu")  # where the generator is, whatever the default device
            parameter.copy_(drawn.normal_(0, std, generator=generator))

        draw(self.token_embedding.weight, 0.02)
        draw(self.positional_embedding, 0.01)
        draw(self.text_projection, width**-0.5)
        for block in self.transformer.blocks():
            draw(block.attn.in_proj_weight, width**-0.5)
            draw(block.attn.out_proj.weight, (2 * layers * width) ** -0.5)
            draw(block.mlp.c_fc.weight, (2 * width) ** -0.5)
            draw(block.mlp.c_proj.weight, (2 * layers * width) ** -0.5)
            for bias in (block.attn.in_proj_bias, block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                bias.zero_()

    def load(self, weights: str | Path) -> None:
        """Fills the frozen weights.

        weights: "openai" (downloaded once, verified by SHA-256), "random" (the same each time), or the path of CLIP's
        ViT-B-16.pt, an open_clip .safetensors file or an official AVadCLIP checkpoint
        Raises TextWeightsError if they are unavailable or do not match.
        """
        if weights == "random":
            self.randomize()
            return
        source = openai_weights("--text-weights") if weights == "openai" else Path(weights)
        state = read_weights(source)
        own = {name: p for name, p in self.state_dict().items() if not name.startswith("prompt.")}
        wrong = [
            f"{name}: expected {list(p.shape)}, found {list(state[name].shape) if name in state else 'none'}"
            for name, p in own.items()
            if name not in state or state[name].shape != p.shape
        ]
        if wrong:
            raise TextWeightsError(f"{source} does not hold this text transformer:\n  " + "\n  ".join(wrong))
        self.load_state_dict({name: state[name].float() for name in own}, strict=False)


def _laid_out(tokens: list[list[int]], rows: int) -> dict[str, Tensor]:
    """The buffers of a `TextEncoder`: the shared prefix, then `rows` rows per class."""
    codes = torch.zeros(len(tokens), rows, dtype=torch.long)
    fixed = torch.zeros(len(tokens), rows, dtype=torch.bool)
    ends = [LEARNABLE + len(t) - 2 for t in tokens]  # row of EOS in its class
    for c, (t, end) in enumerate(zip(tokens, ends, strict=True)):
        name = t[1:-1]
        codes[c, : len(name)] = torch.tensor(name, dtype=torch.long)
        codes[c, end] = t[-1]
        fixed[c, : len(name)] = True
        fixed[c, end] = True
    sos = torch.tensor([tokens[0][0]] + [0] * LEARNABLE)
    positions = torch.arange(PREFIX + rows)
    return {
        "codes": torch.cat([sos, codes.flatten()]),
        "fixed": torch.cat([torch.arange(PREFIX) == 0, fixed.flatten()])[:, None],
        "positions": torch.cat([positions[:PREFIX], positions[PREFIX:].repeat(len(tokens))]),
        "eos": PREFIX + torch.arange(len(tokens)) * rows + torch.tensor(ends),
    }


def openai_weights(option: str) -> Path:
    """Returns OpenAI's ViT-B-16.pt, downloaded into ~/.cache/clip once and verified by SHA-256.

    option: what takes a local path instead, named by the TextWeightsError if the download fails
    """
    try:
        from open_clip.pretrained import download_pretrained_from_url

        return Path(download_pretrained_from_url(OPENAI_URL))
    except Exception as error:  # network, proxy, full disk: the remedy is the same
        raise TextWeightsError(
            f"CLIP's ViT-B/16 weights could not be fetched ({type(error).__name__}: {error}). Download {OPENAI_URL} "
            f"into ~/.cache/clip, or give its path as {option}; 'random' ({option} random) runs without them, for "
            "tests and demonstrations only"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads CLIP's tensors under CLIP's names from any supported file. Raises TextWeightsError."""
    if not path.is_file():
        raise TextWeightsError(f"text weights: no file {path}; give 'openai', 'random' or the path of CLIP's weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            state = load_tensors(path)
        except RuntimeError:
            with open(path, "rb") as file:
                held = file.read(1 << 29)  # theirs has 350 MB
            # TorchScript, as theirs is, runs the code in it as it is read: from what was checked, not again from a file
            # that may have been replaced.
            if hashlib.sha256(held).hexdigest() != OPENAI_SHA256:
                raise
            return torch.jit.load(io.BytesIO(held), map_location="cpu").state_dict()
    except Exception as error:
        reason = str(error) if path.suffix == ".safetensors" else unreadable(error)
        raise TextWeightsError(f"text weights: {path} cannot be read: {reason}") from error
    if isinstance(state, dict):
        state = state.get("model_state_dict", state)
    if not isinstance(state, dict):
        raise TextWeightsError(f"text weights: {path} holds a {type(state).__name__}, not a state dict")
    prefixes = re.compile(r"^(module\.)?(clipmodel\.)?")  # of DataParallel, and of an AVadCLIP checkpoint
    return {prefixes.sub("", name): tensor for name, tensor in tensors(state).items()}


def load_tensors(path: str | Path) -> Any:
    """Reads what torch.save wrote, with weights_only=True so that it cannot run code.

    Raises as torch.load does, and ValueError if the parts of the file take more bytes than it has.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(part.file_size for part in file.infolist() if "/code/" not in part.filename)  # of TorchScript
        if size > os.path.getsize(path):
            raise ValueError(INFLATED)
    return torch.load(path, map_location="cpu", weights_only=True)


def unreadable(error: Exception) -> str:
    """Returns one line on why `load_tensors` failed; torch's own message may be a bare "105" or a page.

    A truncated file fails with EINVAL, since torch seeks to a point before its start.
    """
    if str(error) == INFLATED:
        return INFLATED
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return str(error.strerror)
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "holds more than tensors, and cannot be read without running code"
    if "TorchScript" in str(error):
        return "holds code (TorchScript), and is not OpenAI's own file; save the model's state_dict() with torch.save"
    return "not a PyTorch weights file, or cut short"


def tensors(state: object) -> dict[str, Tensor]:
    """The named tensors of a checkpoint's content, ignoring everything else."""
    items = state.items() if isinstance(state, dict) else ()
    return {name: x for name, x in items if isinstance(name, str) and isinstance(x, Tensor)}
