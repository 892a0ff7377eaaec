"""The denoiser: one Transformer that sees a canvas with holes and says what belongs in each.

It knows nothing about noise. The masks in the canvas already show the noise level, so it takes no
time input (2406.03736), and it never predicts `<mask>` itself ("SUBS", 2406.07524). With
`causal=True` the same lines are GPT.
"""

import dataclasses
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.files import replacing
from data.flags import Mistake
from data.tokenizer import tokenizer_from_state


@dataclass
class ModelConfig:
    vocab_size: int = 257
    mask_id: int = 256
    block_size: int = 256  # longest sequence that the positions are made for
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 192
    dropout: float = 0.0
    conv: int = 5  # neighbours that a block's convolution mixes, the token itself included; 0: none
    causal: bool = False  # a token sees itself and those to its left, as in GPT
    norm: str = "pre"  # "pre": normalise what a layer reads; "post": what it has written, as in BERT
    position: str = "rope"  # "rope": rotate queries and keys; "learned": add a vector, as in BERT


def rotary_angles(T, D, device):
    """cos and sin of the rotary embedding (2104.09864, eq. 15), each (T, D/2)."""
    frequency = 10000 ** -(torch.arange(0, D, 2, device=device) / D)  # (D/2,)
    angle = torch.arange(T, device=device)[:, None] * frequency  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channels i and i + D/2 of x (B, T, H, D) together, by the angle of the position."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].type_as(x), sin[:, None].type_as(x)  # (T, 1, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.causal, self.dropout = config.n_head, config.causal, config.dropout
        # Three matrices and not one, because Muon orthogonalises each on its own.
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # Normalised queries and keys bound the attention logits, which Muon would let grow.
        self.query_norm = nn.LayerNorm(config.n_embd // config.n_head, bias=False)
        self.key_norm = nn.LayerNorm(config.n_embd // config.n_head, bias=False)

    def forward(self, x, rotation):
        B, T, C = x.shape
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight))  # one product is faster
        q, k, v = F.linear(x, weight).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, D)
        q, k = self.query_norm(q).type_as(v), self.key_norm(k).type_as(v)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
        )  # fmt: skip
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Convolution(nn.Module):
    """Adds to each token a weighted sum of its neighbours, channel by channel.

    Most of what tells a character is next to it, and this is the cheapest way to look there: a
    short depthwise convolution as in Primer (2109.08668), here on the residual stream.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, 1, 1, config.conv))
        self.padding = config.conv - 1 if config.causal else config.conv // 2

    def forward(self, x):
        # (B, T, C) seen as an image of height 1 in channels-last layout, so that nothing is copied.
        image = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
        mixed = F.conv2d(image, self.weight, padding=(0, self.padding), groups=x.shape[2])
        return x + mixed.squeeze(2).transpose(1, 2)[:, : x.shape[1]]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.convolution = Convolution(config) if config.conv else nn.Identity()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation):
        x = self.convolution(x)
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, rotation)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)

    def init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx, where=None):
        """Logits of the clean token at every position.

        idx: (B, T) int64, with `mask_id` at the holes. Returns (B, T, V) float32; with where, a
        (B, T) bool, only those positions' logits, (N, V), in row-major order: only holes have a
        loss, and at a large vocabulary the full logits would be the largest tensor there is.
        """
        T = idx.shape[1]
        x = self.token_embedding(idx)  # (B, T, C)
        rotation = None
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[:T]
        else:
            rotation = rotary_angles(T, self.config.n_embd // self.config.n_head, idx.device)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation)
        if where is None:
            logits = self.head(self.norm(x)).float()
        else:
            # Padded to a multiple of 256: a CPU's matrix kernels are made, and kept, for each shape.
            rows = where.flatten().nonzero().squeeze(1)  # (N,)
            x = x.flatten(0, 1).index_select(0, F.pad(rows, (0, -len(rows) % 256)))
            logits = self.head(self.norm(x))[: len(rows)].float()
        logits[..., self.config.mask_id] = -torch.inf  # SUBS: a hole is never filled with a hole
        return logits


def save_checkpoint(path, model, tokenizer, **more):
    """Write one file that holds all it takes to sample; `more` is what resuming needs besides.

    OSError when it cannot be written; the file that was there before then stays.
    """
    checkpoint = {
        "config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer.state,
        **more,
    }
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports that the file could not be written
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path, device="cpu", **changes):
    """Read what save_checkpoint wrote: (model in eval mode, tokenizer, the whole dict).

    changes: fields of the config to be set otherwise, such as dropout. Nothing in the file is
    executed (`weights_only`). Raises Mistake when it is not a checkpoint of ours.
    """
    if not os.path.exists(path):
        raise Mistake(f"{path}: there is no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one sentence
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError
    except Exception as error:  # torch raises a different one for every way to be no checkpoint
        raise Mistake(f"{path}: truncated, or not a checkpoint ({type(error).__name__})") from None
    try:
        model = Transformer(ModelConfig(**{**checkpoint["config"], **changes}))
        model.load_state_dict(checkpoint["model"])
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Mistake(f"{path}: not a checkpoint of setitem ({reason})") from None
    return model.to(device).eval(), tokenizer, checkpoint


# --- where and in which precision it runs --------------------------------------------------------


def pick_device(name):
    """The torch.device called name; `auto` is cuda, then mps, then cpu. Mistake when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    with suppress(RuntimeError, KeyError):
        device = torch.device(name)
        if there[device.type]:
            torch.empty(0, device=device)  # fails for a number that is not there, as in cuda:9
            return device
    raise Mistake(f"--device {name}: not on this machine; there is {', '.join(k for k in there if there[k])}")


def autocast(device, dtype="auto"):
    """Context in which matrix products run in dtype, its `fast_dtype`.

    auto: bfloat16 where the machine multiplies it faster than float32, which a CPU does with AMX or
    AVX-512 BF16 instructions and otherwise does not; float32 elsewhere.
    """
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capable = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot say
            fast = device.type == "cpu" and (capable.get("amx_bf16") or capable.get("avx512_bf16"))
        dtype = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
