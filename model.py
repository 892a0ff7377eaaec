"""The denoiser: a Transformer that sees text with some tokens replaced by `<mask>`, its holes, and gives the
logits of the token that belongs at each position.

Masking is the noise of this diffusion, and the holes show its level, so there is no time input
(2406.03736); `<mask>` itself has probability 0 ("SUBS", 2406.07524). Two numbers say who sees whom:

    K      a text is written in blocks of K tokens; a token sees its own block and those before it
    shift  a position reads the token before the one that it predicts

One block for the whole canvas is masked diffusion; K in between is block diffusion (2503.09573); K = 1 with
the shift is GPT, and one block with the shift is DiffuGPT (2410.17891).

What GPT-2 does otherwise: here positions rotate queries and keys, which are normalised; a short convolution
opens each layer; there are no biases, and the head is not tied to the embedding. Dropout, Linear, linear and
`attend`, which is softmax attention, are torch's own, made faster on a CPU.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.lib.checkpoint import check_config, read_checkpoint
from data.lib.errors import Mistake
from data.lib.fast import Cache, Dropout, Linear, attend, linear, rows_at
from data.lib.tokenizer import tokenizer_from_state


@dataclass
class ModelConfig:
    vocab_size: int = 257
    mask_id: int = 256
    block_size: int = 256  # tokens of a training sequence; the most that learned positions allow
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 160
    dropout: float = 0.0
    special_ids: tuple[int, ...] = ()  # not text: train.py never masks them, sample.py never writes them
    end_ids: tuple[int, ...] = ()  # end a text: learned and written, and nothing after one is shown
    kinds: tuple[tuple[int, int, int], ...] = ()  # what may stand where, as the tokenizer says; (): anything
    block_len: int = 0  # K, tokens of a block; 0: the canvas is one. sample.py's --block_len may be shorter
    shift_id: int | None = None  # what stands before a text that is read with a shift; None: no shift
    conv: int = 5  # neighbours that a layer's convolution mixes, the token itself included; 0: none
    conv_right: int | None = None  # how many of them are to its right; None: half, but none of another block
    norm: str = "pre"  # "pre": normalise what a layer reads; "post": the sum after it, as in BERT
    position: str = "rope"  # "rope": rotate queries and keys; "learned": add a vector, as in BERT
    qk_norm: bool = True  # normalise queries and keys: Muon would let the attention logits grow
    # What only models from elsewhere set, besides "learned", no qk_norm and no convolution:
    n_kv_head: int = 0  # heads of keys and values, each of which several queries' heads share; 0: n_head
    rope_base: float = 10000.0
    rms: bool = False  # norms divide by the root of the mean square, and subtract no mean (1910.07467)
    gated: bool = False  # the MLP's hidden layer times one without an activation (GLU, 2002.05202)
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
        """1 if the last token is read too, at position T: with a shift, where all see all. Else 0."""
        return int(self.shift_id is not None and self.K > self.block_size)


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
ACTIVATIONS["gelu_tanh"] = functools.partial(F.gelu, approximate="tanh")


def norm_of(width, config):
    if config.rms:
        return nn.RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, config.norm_eps, bias=config.bias)


def rotary_angles(positions, D, base):
    """cos and sin of the rotary embedding (2104.09864, eq. 15) at positions (S,), each (S, D/2)."""
    frequency = base ** -(torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angle = positions[:, None] * frequency  # (S, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn channels i and i + D/2 of x (B, S, H, D) together, by the angle of the position."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].type_as(x), sin[:, None].type_as(x)  # (S, 1, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# --- who sees whom -------------------------------------------------------------------------------
#
# A hole is predicted from the text of the blocks before its own, and from what its own block still shows.
# In training every block has holes, so a pass reads two halves, [x0 ; xt], at the same positions: each block,
# clean or noisy, sees itself and the clean ones before it. When text is written, the blocks before are clean
# already, and one half will do. What the layers made of them does not change again, so a Cache keeps it.


class Sight(NamedTuple):
    """Who sees whom in a pass over S positions, those of a clean half first."""

    rotation: tuple | None  # cos and sin, (S, D/2) each, where positions are rotary
    sees: torch.Tensor | None  # (S, cached + S) bool, row by row; None: all see all, or as `causal` says
    causal: bool  # each sees itself and those before it: no mask is needed, and kernels are faster without
    n_clean: int  # positions of the clean half
    strip: int  # tokens that a convolution takes as one row, seeing nothing after its end: a block, or all
    cache: Cache | None
    first: int = 0  # positions before it are seen and see nothing: their result is not needed


def sees(positions, n_clean, n_cached, K):
    """Who sees whom, (S, n_cached + S) bool: a row for each position that sees, a column for each one seen.

    positions (S,): those of the pass, the clean half first, n_clean long. The n_cached before them are clean.
    Each sees the clean blocks before its own, and of its own block the half that it stands in itself.
    """
    S, device = len(positions), positions.device
    noisy = (torch.arange(S, device=device) >= n_clean) & (n_clean > 0)  # one half alone counts as clean
    keys = torch.cat((torch.arange(n_cached, device=device), positions)) // K
    keys_noisy, own = F.pad(noisy, (n_cached, 0)), (positions // K)[:, None]
    return (keys < own) & ~keys_noisy | (keys == own) & ~(keys_noisy ^ noisy[:, None])  # inductor fails at ==


def may_stand(kinds, V, device):
    """Which of V tokens may stand at each place of a canvas, by a tokenizer's kinds: (T, V) bool."""
    ids = torch.arange(V, device=device)
    return torch.cat([((ids >= first) & (ids < end)).expand(n, V) for n, first, end in kinds])


# --- the layers ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, self.dropout = config.n_embd // config.n_head, Dropout(config.dropout)
        # Three matrices and not one, because Muon orthogonalises each on its own.
        self.query = Linear(config.n_embd, config.n_embd, config.bias)
        width = self.head_dim * (config.n_kv_head or config.n_head)
        self.key = Linear(config.n_embd, width, config.bias)
        self.value = Linear(config.n_embd, width, config.bias)
        self.out = Linear(config.n_embd, config.n_embd, config.bias)
        self.query_norm = norm_of(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.key_norm = norm_of(self.head_dim, config) if config.qk_norm else nn.Identity()

    def forward(self, x, sight):
        q, k, v = self.query(x[:, sight.first :]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in (q, k, v))  # (B, S, H, D), of k and v fewer H
        q, k = self.query_norm(q).type_as(v), self.key_norm(k).type_as(v)  # CUDA makes norms float32
        if sight.rotation is not None:
            cos, sin = sight.rotation
            q, k = rotate(q, cos[sight.first :], sin[sight.first :]), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D)
        if sight.cache is not None:
            k, v = sight.cache.join((self, "key"), k), sight.cache.join((self, "value"), v)
        y = attend(q, k, v, self.dropout, sight.sees, sight.causal)  # softmax(q k^T / sqrt(D)) v
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.mlp_width or 4 * config.n_embd
        self.gate = Linear(config.n_embd, width, config.bias) if config.gated else None
        self.up = Linear(config.n_embd, width, config.bias)
        self.down = Linear(width, config.n_embd, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        if self.gate:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Convolution(nn.Module):
    """Adds to each token a weighted sum of the neighbours that it sees, channel by channel.

    Most of what determines a token is next to it, and this is the cheapest way to look there: a short
    depthwise convolution as in Primer (2109.08668), here on the residual stream. Its weights begin at 0.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, 1, 1, config.conv))  # (C, 1, 1, conv)
        self.left = config.conv - 1 - config.conv_right
        self.right = min(config.conv_right, config.K - 1)  # fewer if a canvas's model goes on with blocks

    def forward(self, x, sight):
        (B, S, C), K, left, right = x.shape, sight.strip, self.left, self.right
        # To the left of each block, clean or noisy, stand the clean tokens before it; to its right, zeros.
        if sight.cache is None:
            before = F.pad(x, (0, 0, left, 0))  # (B, left + S, C)
        else:
            before = sight.cache.join(self, x, left)[:, sight.cache.length :]
        blocks, n = F.pad(x, (0, 0, 0, -S % K)).view(B, -1, K, C), sight.n_clean // K
        before = before.unfold(1, left, K).transpose(2, 3)  # (B, S / K or more, left, C)
        before = torch.cat((before[:, :n], before[:, : blocks.shape[1] - n]), 1)
        after = x.new_zeros(B, blocks.shape[1], right, C)
        rows = torch.cat((before, blocks, after), 2)  # (B, blocks, left + K + right, C)
        # Seen as an image with a block in each row, in channels-last layout, so that nothing is copied.
        weight = self.weight.flatten(1)[:, None, None, : left + 1 + right]  # its gradient has its strides
        mixed = F.conv2d(rows.permute(0, 3, 1, 2), weight, groups=C)
        return x + mixed.permute(0, 2, 3, 1).flatten(1, 2)[:, :S]  # (B, S, C)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.convolution = Convolution(config) if config.conv else None
        self.attention = Attention(config)
        self.attention_norm = norm_of(config.n_embd, config)
        self.mlp = MLP(config)
        self.mlp_norm = norm_of(config.n_embd, config)
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
        self.gpt = config.K == 1 and config.shift_id is not None  # no position reads a hole, or its own token
        self.opened = None  # while a GPT is trained into a canvas: the share that it sees of what it hid
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            rows = config.first_position + config.block_size + config.n_more
            self.position_embedding = nn.Embedding(rows, config.n_embd)
        if config.token_types:
            self.type_embedding = nn.Embedding(config.token_types, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.n_layer))  # by GPT-2's name
        self.embedding_norm = nn.Identity() if pre else norm_of(config.n_embd, config)
        self.final_norm = norm_of(config.n_embd, config) if pre else nn.Identity()
        if config.head_activation:
            self.transform = Linear(config.n_embd, config.n_embd, config.bias)
            self.transform_norm = norm_of(config.n_embd, config)
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
        """What is read at each position of idx (B, T): (B, T + n_more). Its own token; with a shift the token
        before it, and at the start of a block that of the clean text, since it belongs to another block.
        """
        config, (_, T) = self.config, idx.shape
        if config.shift_id is None:
            return idx
        idx, clean = (F.pad(tokens, (1, config.n_more - 1), value=config.shift_id) for tokens in (idx, clean))
        return torch.where(torch.arange(T + config.n_more, device=idx.device) % config.K == 0, clean, idx)

    def embed(self, tokens, positions):
        """Vectors of tokens (B, S) at positions (S,): (B, S, C)."""
        x = self.token_embedding(tokens)
        if self.config.position == "learned":
            x = x + self.position_embedding(self.config.first_position + positions)
        if self.config.token_types:
            x = x + self.type_embedding.weight[0]
        return self.dropout(self.embedding_norm(x))

    def unembed(self, x, positions):
        """Logits (..., V) of the last layer's vectors, (N, C) or (B, N, C), at positions (N,) of the canvas;
        minus infinity for what may not stand there.
        """
        x = self.final_norm(x)
        if self.config.head_activation:
            x = self.transform_norm(ACTIVATIONS[self.config.head_activation](self.transform(x)))
        bias = x.new_zeros(self.config.vocab_size) if self.head.bias is None else self.head.bias
        is_mask = torch.arange(len(bias), device=x.device) == self.config.mask_id
        # SUBS, without one more pass over the logits: no hole is filled with a hole.
        logits = linear(x, self.head.weight, bias.masked_fill(is_mask, -torch.inf))
        if not self.config.kinds:
            return logits
        return logits.masked_fill(~may_stand(self.config.kinds, len(bias), x.device)[positions], -torch.inf)

    def sight(self, n_clean, n, cache, device):
        """The Sight of a pass over n_clean positions of a clean half and then n after those of the cache; and
        (S,), which positions these are.
        """
        config, K, held = self.config, self.config.K, cache.length if cache else 0
        positions = torch.arange(held, held + n, device=device)
        positions = torch.cat((positions[:n_clean], positions))  # (S,); a pass with a clean half has no cache
        causal = K == 1 < n and not (n_clean or held)
        seen = None if n <= K or causal else sees(positions, n_clean, held, K)  # within one block all see all
        if self.training and self.opened is not None:  # a draw in (0, 1]: at 0 nothing to the right is seen
            seen = (1 - torch.rand(n, n, device=device)).triu(1) <= self.opened
        # Blocks of one token look to the left alone: in one half they are mixed as one row, without copies.
        strip = n if K == 1 and not n_clean else min(K, n)
        D, rope = config.n_embd // config.n_head, config.position == "rope"
        rotation = rotary_angles(positions, D, config.rope_base) if rope else None
        return Sight(rotation, seen, causal, n_clean, strip, cache), positions

    def forward(self, idx, where=None, clean=None, cache=None):
        """Logits (B, T, V), in autocast's precision, of the token that belongs at each position of idx (B, T)
        int64, which has `mask_id` at the holes.

        where: (B, T) bool, or the indices (N,) and (N,) of what is True there, as nonzero gives them; only
            those positions' logits, (N, V), in row-major order: only holes have a loss, and at a large
            vocabulary the full logits would be the largest tensor there is.
        clean: (B, T), the same text without holes: what a block sees of those before it. Without it they are
            seen as idx has them, which is right if only the last block has holes.
        cache: a Cache; of idx only what comes after its `length` is read, and where counts only there.
        """
        (_, T), K, held = idx.shape, self.config.K, cache.length if cache else 0
        # The clean half: all blocks but the last, which no other sees. One block needs none, nor does a GPT.
        n_clean = 0 if clean is None or self.gpt else (T - 1) // K * K
        clean = idx if clean is None else clean
        tokens = self.read(idx, clean)[:, held:]  # (B, n)
        sight, positions = self.sight(n_clean, tokens.shape[1], cache, idx.device)
        x = self.embed(torch.cat((self.read(clean, clean)[:, :n_clean], tokens), 1), positions)  # (B, S, C)
        *layers, last = self.blocks
        for layer in layers:
            x = layer(x, sight)
        if n_clean:  # what the last layer would make of the clean half is not needed
            sight = sight._replace(first=n_clean, sees=sight.sees[n_clean:])
        x = last(x, sight)[:, : T - held]  # (B, T - held, C), without what a shift reads at T
        if cache:
            cache.length = T if self.gpt else cache.final
        positions = torch.arange(held, T, device=idx.device)
        if where is None:
            return self.unembed(x, positions)
        n, rows = rows_at(where, held, T)
        return self.unembed(x.flatten(0, 1).index_select(0, rows), positions[rows % (T - held)])[:n]


def load_checkpoint(path, device="cpu", keep=None, **changes):
    """Read what save_checkpoint wrote: (model in eval mode, tokenizer, the whole dict).

    keep: a dtype; if the matrices in the file are of it, they stay so, on a CPU even in the file; else all
    become float32. changes: fields of the config to be set otherwise, such as dropout. Raises Mistake when it
    is not a checkpoint of ours.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = ModelConfig(**{**checkpoint["config"], **changes})
        check_config(config, checkpoint)
        with torch.device("meta"):  # no memory, and no random weights that would be overwritten
            model = Transformer(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        model.tie()
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        own, said = ((x.vocab_size, x.mask_id, x.kinds) for x in (tokenizer, config))
        if own != said:
            raise ValueError("its tokenizer is another model's")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Mistake(f"{path}: not a checkpoint of setitem ({str(error)[:200]})") from None
    matrices = {weight.dtype for weight in model.parameters() if weight.ndim == 2}
    dtype = keep if matrices == {keep} else torch.float32
    return model.to(device, dtype).eval(), tokenizer, checkpoint
