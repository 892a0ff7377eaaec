"""The denoiser: a Transformer that sees text with some tokens replaced by `<mask>`, its holes, and gives the
logits of the token that belongs at each position.

Masking is the noise of this diffusion, and the holes show its level, so there is no time input
(2406.03736); `<mask>` itself has probability 0 ("SUBS", 2406.07524). Two numbers say who sees whom:

    K      a text is written in blocks of K tokens; a token sees its own block and those before it
    shift  a position reads the token before the one that it predicts

One block for the whole canvas is masked diffusion; K in between is block diffusion (2503.09573); K = 1 with
the shift is GPT, and one block with the shift is DiffuGPT (2410.17891).

Unlike GPT-2's, positions rotate queries and keys, which are normalised; a short convolution opens each
layer; there are no biases, and the head is not tied to the embedding. `attend` and `Dropout` are torch's own,
made faster on a CPU.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.run.checkpoint import read_checkpoint
from data.run.errors import Mistake
from data.run.fast import Dropout, Linear, attend, linear
from data.tokenizer import tokenizer_from_state


@dataclass
class ModelConfig:
    vocab_size: int = 257
    mask_id: int = 256
    block_size: int = 256  # tokens of a training sequence; the most that learned positions allow
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 192
    dropout: float = 0.0
    special_ids: tuple[int, ...] = ()  # not text: train.py never masks them, sample.py never writes them
    block_len: int = 0  # K, tokens of a block; 0: the canvas is one block
    shift_id: int | None = None  # what stands before a text that is read with a shift; None: no shift
    conv: int = 5  # neighbours that a layer's convolution mixes, the token itself included; 0: none
    conv_right: int | None = None  # how many of them are to its right; None: half, but none of another block
    norm: str = "pre"  # "pre": normalise what a layer reads; "post": the sum after it, as in BERT
    position: str = "rope"  # "rope": rotate queries and keys; "learned": add a vector, as in BERT
    qk_norm: bool = True  # normalise queries and keys: Muon would let the attention logits grow
    # What only BERT, RoBERTa and GPT-2 set, besides "learned", no qk_norm and no convolution:
    mlp_width: int = 0  # of the hidden layer; 0: 4 * n_embd
    activation: str = "gelu"  # one of ACTIVATIONS
    bias: bool = False  # in linear layers and norms
    head_bias: bool = True  # in the head, too
    norm_eps: float = 1e-5  # added to the variance
    token_types: int = 0  # rows of a table whose first is added to every token; 0: none
    first_position: int = 0  # of the table of positions; RoBERTa's begin at 2
    head_activation: str | None = None  # of a layer before the head's matrix; None: no such layer
    tied: bool = False  # the head's matrix is the token embedding

    def __post_init__(self):
        if self.conv_right is None:
            self.conv_right = max(0, min((self.conv - 1) // 2, self.K - 1))

    @property
    def K(self):
        """Tokens of a block; of a canvas, which is one block, more than there are."""
        return self.block_len if 0 < self.block_len < self.block_size else 2**31

    @property
    def n_more(self):
        """Positions read after the last: with a shift the last token stands there, if any sees it."""
        return int(self.shift_id is not None and self.K > self.block_size)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def layer_norm(width, config):
    return nn.LayerNorm(width, config.norm_eps, bias=config.bias)


def rotary_angles(at, D):
    """cos and sin of the rotary embedding (2104.09864, eq. 15) at positions at (S,), each (S, D/2)."""
    frequency = 10000 ** -(torch.arange(0, D, 2, device=at.device) / D)  # (D/2,)
    angle = at[:, None] * frequency  # (S, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channels i and i + D/2 of x (B, S, H, D) together, by the angle of the position."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].type_as(x), sin[:, None].type_as(x)  # (S, 1, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# --- who sees whom -------------------------------------------------------------------------------
#
# Whoever predicts a hole of a block may know the clean text of the blocks before it, and of its own block
# what is not masked. In training all blocks have holes, each at a noise level of its own, and so a pass
# reads two halves, [x0 ; xt], at the same positions: the clean blocks see those before them and themselves,
# and each noisy block sees the clean ones before it and itself. Where text is written, all that stands before
# a block is clean already, and one half will do. What it gives is final, and stays in a Cache.


class Sight(NamedTuple):
    """Who sees whom in a pass over S positions, those of a clean half first; the same for every layer."""

    rotation: tuple | None  # cos and sin, (S, D/2) each, where positions are rotary
    visible: torch.Tensor | None  # (S, cached + S) bool: who sees which; None: all, or as `causal` says
    causal: bool  # who sees those before it and itself, for which there are kernels
    n_clean: int  # positions of the clean half
    strip: int  # tokens over which a convolution reaches both ways: a block, or all S
    cache: "Cache | None"
    first: int = 0  # positions before it are seen, but ask nothing: nobody reads what they become


def visible(at, n_clean, n_cached, K):
    """Who sees whom, (S, n_cached + S) bool, of positions at (S,), the n_clean first of them clean, and of
    n_cached before these: clean blocks before its own, and of its own what is as clean or noisy as itself.
    """
    device, S = at.device, len(at)
    noisy = (torch.arange(S, device=device) >= n_clean) & (n_clean > 0)  # without a clean half none is
    key, key_noisy = torch.cat((torch.arange(n_cached, device=device), at)), F.pad(noisy, (n_cached, 0))
    key, own = key // K, (at // K)[:, None]
    return (key < own) & ~key_noisy | (key == own) & (key_noisy == noisy[:, None])


class Cache:
    """What the layers know of the first `length` positions of a window of W, which are final. A pass reads
    what comes after these, and then `length` is `final`.
    """

    def __init__(self, W):
        self.W, self.length, self.final, self.rooms = W, 0, 0, {}

    def join(self, name, x, zeros=0):
        """x (..., S, D) behind what a layer keeps by this name: (..., zeros + length + S, D)."""
        if name not in self.rooms:
            self.rooms[name] = x.new_zeros(*x.shape[:-2], zeros + self.W + 1, x.shape[-1])
        room = self.rooms[name][..., : zeros + self.length + x.shape[-2], :]
        room[..., zeros + self.length :, :] = x
        return room


# --- the layers ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, Dropout(config.dropout)
        # Three matrices and not one, because Muon orthogonalises each on its own.
        self.query = Linear(config.n_embd, config.n_embd, config.bias)
        self.key = Linear(config.n_embd, config.n_embd, config.bias)
        self.value = Linear(config.n_embd, config.n_embd, config.bias)
        self.out = Linear(config.n_embd, config.n_embd, config.bias)
        head_dim = config.n_embd // config.n_head
        self.query_norm = layer_norm(head_dim, config) if config.qk_norm else nn.Identity()
        self.key_norm = layer_norm(head_dim, config) if config.qk_norm else nn.Identity()

    def forward(self, x, sight):
        q, k, v = self.query(x[:, sight.first :]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(2, (self.n_head, -1)) for y in (q, k, v))  # (B, S, H, D)
        q, k = self.query_norm(q).type_as(v), self.key_norm(k).type_as(v)  # CUDA makes norms float32
        if sight.rotation is not None:
            cos, sin = sight.rotation
            q, k = rotate(q, cos[sight.first :], sin[sight.first :]), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D)
        if sight.cache is not None:
            k, v = sight.cache.join((self, "key"), k), sight.cache.join((self, "value"), v)
        y = attend(q, k, v, self.dropout, sight.visible, sight.causal)
        return self.out(y.transpose(1, 2).flatten(2))  # softmax(q k^T / sqrt(D)) v, mixed


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.mlp_width or 4 * config.n_embd
        self.up = Linear(config.n_embd, width, config.bias)
        self.down = Linear(width, config.n_embd, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Convolution(nn.Module):
    """Adds to each token a weighted sum of the neighbours that it sees, channel by channel.

    Most of what determines a token is next to it, and this is the cheapest way to look there: a short
    depthwise convolution as in Primer (2109.08668), here on the residual stream. It begins as nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, 1, 1, config.conv))
        self.left, self.right = config.conv - 1 - config.conv_right, min(config.conv_right, config.K - 1)

    def forward(self, x, sight):
        (B, S, C), K, left, right = x.shape, sight.strip, self.left, self.right
        # In front of each block, clean or noisy, stand the clean tokens before it; behind it nothing is seen.
        if sight.cache is None:
            before = F.pad(x, (0, 0, left, 0))  # (B, left + S, C)
        else:
            before = sight.cache.join(self, x, left)[:, sight.cache.length :]
        blocks, n = F.pad(x, (0, 0, 0, -S % K)).view(B, -1, K, C), sight.n_clean // K
        before = before.unfold(1, left, K).transpose(2, 3)  # (B, blocks or more, left, C)
        before = torch.cat((before[:, :n], before[:, : blocks.shape[1] - n]), 1)
        rows = F.pad(torch.cat((before, blocks), 2), (0, 0, 0, right))  # (B, blocks, left + K + right, C)
        # Seen as an image with a block in each row, in channels-last layout, so that nothing is copied.
        mixed = F.conv2d(rows.permute(0, 3, 1, 2), self.weight[..., : left + 1 + right], groups=C)
        return x + mixed.permute(0, 2, 3, 1).flatten(1, 2)[:, :S]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.convolution = Convolution(config) if config.conv else None
        self.attention = Attention(config)
        self.attention_norm = layer_norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.mlp_norm = layer_norm(config.n_embd, config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, sight):
        if self.convolution:
            x = self.convolution(x, sight)
        if self.pre:
            x = x[:, sight.first :] + self.dropout(self.attention(self.attention_norm(x), sight))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x[:, sight.first :] + self.dropout(self.attention(x, sight)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        pre = config.norm == "pre"
        self.gpt = config.K == 1 and config.shift_id is not None  # reads earlier tokens alone: no hole
        self.opened = None  # while a GPT becomes a canvas: the share of what it hides that is seen
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            rows = config.first_position + config.block_size + config.n_more
            self.position_embedding = nn.Embedding(rows, config.n_embd)
        if config.token_types:
            self.type_embedding = nn.Embedding(config.token_types, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.embedding_norm = nn.Identity() if pre else layer_norm(config.n_embd, config)
        self.final_norm = layer_norm(config.n_embd, config) if pre else nn.Identity()
        if config.head_activation:
            self.transform = Linear(config.n_embd, config.n_embd, config.bias)
            self.transform_norm = layer_norm(config.n_embd, config)
        self.head = Linear(config.n_embd, config.vocab_size, config.bias and config.head_bias)
        self.tie()
        self.apply(self.init_weights)

    def tie(self):
        if self.config.tied:
            self.head.weight = self.token_embedding.weight

    def init_weights(self, module):  # embeddings keep torch's N(0, 1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def read(self, idx, clean):
        """What the positions read of idx (B, T): their own tokens; with a shift those before them, which are
        clean at the start of a block.
        """
        config, (_, T) = self.config, idx.shape
        if config.shift_id is None:
            return idx
        idx, clean = (F.pad(tokens, (1, config.n_more - 1), value=config.shift_id) for tokens in (idx, clean))
        return torch.where(torch.arange(T + config.n_more, device=idx.device) % config.K == 0, clean, idx)

    def embed(self, tokens, at):
        """Vectors of tokens (B, S) at positions at (S,): (B, S, C)."""
        x = self.token_embedding(tokens)
        if self.config.position == "learned":
            x = x + self.position_embedding(self.config.first_position + at)
        if self.config.token_types:
            x = x + self.type_embedding.weight[0]
        return self.dropout(self.embedding_norm(x))

    def unembed(self, x):
        """Logits (..., V) of the last block's vectors (..., C)."""
        x = self.final_norm(x)
        if self.config.head_activation:
            x = self.transform_norm(ACTIVATIONS[self.config.head_activation](self.transform(x)))
        bias = x.new_zeros(self.config.vocab_size) if self.head.bias is None else self.head.bias
        is_mask = torch.arange(len(bias), device=x.device) == self.config.mask_id
        # SUBS, without one more pass over the logits: no hole is filled with a hole.
        return linear(x, self.head.weight, bias.masked_fill(is_mask, -torch.inf))

    def sight(self, n_clean, n, cache, device):
        """The Sight of a pass over n_clean positions, and n after those of the cache; and where all are."""
        config, K, held = self.config, self.config.K, cache.length if cache else 0
        at = torch.cat([torch.arange(*span, device=device) for span in ((0, n_clean), (held, held + n))])
        one_block = not n_clean and held // K == (held + n - 1) // K  # whose positions see all
        causal = K == 1 and n > 1 and not (n_clean or held)
        seen = None if one_block or causal else visible(at, n_clean, held, K)
        if self.training and self.opened is not None:
            seen = (1 - torch.rand(n, n, device=device)).triu(1) <= self.opened
        strip = K if n_clean or n > K > 1 else n
        rope = config.position == "rope"
        rotation = rotary_angles(at, config.n_embd // config.n_head) if rope else None
        return Sight(rotation, seen, causal, n_clean, strip, cache), at

    def forward(self, idx, where=None, clean=None, cache=None):
        """Logits (B, T, V), in autocast's precision, of the token that belongs at each position of idx (B, T)
        int64, which has `mask_id` at the holes.

        where: (B, T) bool; only those positions' logits, (N, V), in row-major order: only holes have a
            loss, and at a large vocabulary the full logits would be the largest tensor there is.
        clean: (B, T), the text without holes, for the blocks after those that it fills. Without it they see
            idx as it is, of which then only the last block should have holes.
        cache: a Cache; only positions after its `length` are read, and where lies there.
        """
        (_, T), K, held = idx.shape, self.config.K, cache.length if cache else 0
        n_clean = 0 if clean is None or self.gpt else (T - 1) // K * K  # all but the last block
        clean = idx if clean is None else clean
        noisy = self.read(idx, clean)[:, held:]  # (B, n)
        sight, at = self.sight(n_clean, noisy.shape[1], cache, idx.device)
        x = self.embed(torch.cat((self.read(clean, clean)[:, :n_clean], noisy), 1), at)  # (B, S, C)
        for block in self.blocks[:-1]:
            x = block(x, sight)
        visible = None if sight.visible is None else sight.visible[n_clean:]
        x = self.blocks[-1](x, sight._replace(first=n_clean, visible=visible))[:, : T - held]
        if cache:
            cache.length = T if self.gpt else cache.final
        if where is None:
            return self.unembed(x)
        # Padded to a power of 2 or a multiple of 64: a CPU's kernels are made, and kept, for each shape.
        rows = where[:, held:].flatten().nonzero().squeeze(1)  # (N,)
        multiple = min(64, 1 << max(0, len(rows) - 1).bit_length())
        x = x.flatten(0, 1).index_select(0, F.pad(rows, (0, -len(rows) % multiple)))
        return self.unembed(x)[: len(rows)]


def load_checkpoint(path, device="cpu", **changes):
    """Read what save_checkpoint wrote: (model in eval mode, tokenizer, the whole dict).

    changes: fields of the config to be set otherwise, such as dropout. Raises Mistake when it is
    not a checkpoint of ours.
    """
    checkpoint = read_checkpoint(path)
    try:
        with torch.device("meta"):  # no memory, and no random weights that would be overwritten
            model = Transformer(ModelConfig(**{**checkpoint["config"], **changes}))
        model.load_state_dict(checkpoint["model"], assign=True)
        model.tie()
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Mistake(f"{path}: not a checkpoint of setitem ({reason})") from None
    return model.to(device).eval(), tokenizer, checkpoint
