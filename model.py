"""The denoiser: a Transformer that reads text with holes and predicts which token belongs in each of them.

A hole is a position that shows `<mask>`. The network has no time input, because the number of holes gives the noise
level (2406.03736), and it never predicts `<mask>` (2406.07524). Two settings define the method:

    block     a text is written in blocks of K tokens, and a token sees its own block and those before it
    shift_id  each position reads the token before the one that it predicts; this id is read at the start

    block  shift_id
    None   None      masked diffusion: the canvas is one block, where every token sees every other
    K      None      block diffusion (2503.09573)
    1      id        GPT
    None   id        DiffuGPT (2410.17891)

Differences from GPT-2: rotary positions; normalised queries and keys; a short convolution at the start of each
layer; no biases; untied embeddings. `attend` and `Dropout` do what torch's do, but faster on a CPU. Published
models are subclasses, in data/weights/.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.lib.cache import Cache
from data.lib.checkpoint import check_config, published_network, read_checkpoint, refused
from data.lib.kernels import Dropout, allowed_tokens, attend, rows_at
from data.lib.tokenizer import tokenizer_from_state


@dataclass
class ModelConfig:
    learned_positions = False  # not a field; published models may have a table of positions
    vocab_size: int = 257
    mask_id: int = 256
    context: int = 256  # the most tokens that the model sees at once
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 160
    dropout: float = 0.0
    special_ids: tuple[int, ...] = ()  # never masked in training, never written
    end_ids: tuple[int, ...] = ()  # end a text: learned and written; nothing after one is shown
    kinds: tuple[tuple[int, int, int], ...] = ()  # (n, first, end): the next n places hold ids in [first, end); (): any
    block: int | None = None  # tokens; None: the canvas is one block
    shift_id: int | None = None  # read before the first token; None: each position reads its own token
    conv: int = 5  # taps of each layer's convolution; 0: no convolution
    conv_right: int | None = None  # how many of them look to the right; None: half, but within the block

    def __post_init__(self):
        if self.conv_right is None:
            self.conv_right = self.within_block(max(0, (self.conv - 1) // 2))

    def within_block(self, n):
        return n if self.block is None else min(n, self.block - 1)


# --- who sees whom -------------------------------------------------------------------------------
#
# A hole is predicted from the finished blocks before its own and from what its own block shows. In training every
# block has holes, so a pass reads the text twice, [clean ; noisy], at the same positions. Each block, clean or noisy,
# sees itself and the clean blocks before it. When writing, earlier blocks are finished, so the text is read once, and a
# Cache keeps what the layers computed for them.


class Layout(NamedTuple):
    """What the layers need to know about a pass over S positions, those of the clean copy first."""

    angles: tuple  # cos and sin of the rotary embedding, (S, D/2) each
    sees: torch.Tensor | None  # (S, cached + S) bool; None: all see all, unless `causal`
    causal: bool  # every position sees itself and those before it
    n_clean: int  # positions of the clean copy
    strip: int  # positions that a convolution takes as one row: a block, or all
    cache: Cache | None
    first: int = 0  # positions before this one are seen, but not computed


def who_sees(positions, n_clean, n_cached, K):
    """(S, n_cached + S) bool: a row for each position that sees, a column for each that is seen.

    positions (S,): those of this pass, first the n_clean of the clean copy. The n_cached before them are clean, too.
    """
    S, device = len(positions), positions.device
    noisy = (torch.arange(S, device=device) >= n_clean) & (n_clean > 0)  # without a copy none counts as noisy
    key_block = torch.cat((torch.arange(n_cached, device=device), positions)) // K
    key_noisy, query_block = F.pad(noisy, (n_cached, 0)), (positions // K)[:, None]
    same_copy = ~(key_noisy ^ noisy[:, None])  # torch.compile fails on bool ==
    return (key_block < query_block) & ~key_noisy | (key_block == query_block) & same_copy


def rotary_angles(positions, D, base=10000.0):
    """cos and sin of the rotary embedding (2104.09864, eq. 15) at positions (S,), each (S, D/2)."""
    frequency = base ** -(torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angle = positions[:, None] * frequency  # (S, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate channels i and i + D/2 of x (B, S, H, D) together, by the angle of the position."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].type_as(x), sin[:, None].type_as(x)  # (S, 1, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# --- the layers ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.head_dim, self.dropout = D, Dropout(config.dropout)
        # Three matrices instead of one, because Muon orthogonalises each on its own.
        self.query, self.key, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        # Without these norms the attention logits grow under Muon.
        self.query_norm, self.key_norm = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)

    def place(self, q, k, layout):
        """Rotate queries and keys (B, S, H, D) by their positions."""
        cos, sin = layout.angles
        return rotate(q, cos[layout.first :], sin[layout.first :]), rotate(k, cos, sin)

    def forward(self, x, layout):
        q, k, v = self.query(x[:, layout.first :]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in (q, k, v))  # (B, S, H, D)
        q, k = self.query_norm(q).type_as(v), self.key_norm(k).type_as(v)  # CUDA's autocast leaves norms in float32
        q, k, v = (y.transpose(1, 2) for y in (*self.place(q, k, layout), v))  # (B, H, S, D)
        if layout.cache is not None:
            k, v = layout.cache.join((self, "key"), k), layout.cache.join((self, "value"), v)
        y = attend(q, k, v, self.dropout, layout.sees, layout.causal)  # softmax(q k^T / sqrt(D)) v
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Convolution(nn.Module):
    """Add to each token a weighted sum of the neighbours that it may see, channel by channel.

    Most of what determines a token is right next to it, and this is the cheapest way to look there: a short depthwise
    convolution as in Primer (2109.08668), but on the residual stream. The weights start at 0.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, 1, 1, config.conv))  # (C, 1, 1, conv)
        self.left = config.conv - 1 - config.conv_right
        self.right = config.within_block(config.conv_right)  # fewer, if a canvas model is fine-tuned with blocks

    def forward(self, x, layout):
        (B, S, C), K, left, right = x.shape, layout.strip, self.left, self.right
        if layout.cache is None:
            before = F.pad(x, (0, 0, left, 0))  # (B, left + S, C)
        else:
            before = layout.cache.join(self, x, left)[:, layout.cache.length :]  # join puts `left` zeros first
        blocks, n = F.pad(x, (0, 0, 0, -S % K)).view(B, -1, K, C), layout.n_clean // K
        before = before.unfold(1, left, K).transpose(2, 3)  # (B, S // K + 1, left, C)
        # Before noisy block i come the same clean tokens as before clean block i; after each block, zeros.
        before = torch.cat((before[:, :n], before[:, : blocks.shape[1] - n]), 1)
        after = x.new_zeros(B, blocks.shape[1], right, C)
        rows = torch.cat((before, blocks, after), 2)  # (B, blocks, left + K + right, C)
        # An image with one block per row, in channels-last layout, so that nothing is copied.
        weight = self.weight.flatten(1)[:, None, None, : left + 1 + right]
        mixed = F.conv2d(rows.permute(0, 3, 1, 2), weight, groups=C)
        return x + mixed.permute(0, 2, 3, 1).flatten(1, 2)[:, :S]  # (B, S, C)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.convolution = Convolution(config) if config.conv else None
        self.attention, self.attention_norm = Attention(config), nn.LayerNorm(config.n_embd, bias=False)
        self.mlp, self.mlp_norm = MLP(config), nn.LayerNorm(config.n_embd, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, layout):
        if self.convolution is not None:
            x = self.convolution(x, layout)
        x = x[:, layout.first :] + self.dropout(self.attention(self.attention_norm(x), layout))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    family, Config, Layer = "setitem", ModelConfig, Layer  # a published model has others

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.is_gpt = config.block == 1 and config.shift_id is not None  # no position reads a hole
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(self.Layer(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)

    def init_weights(self, module):  # embeddings keep torch's N(0, 1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def read(self, idx, clean):
        """The token read at each position of idx (B, T): its own or, with a shift, the one before.

        At the start of a block the one before belongs to another block, so it comes from the clean text. A shifted
        canvas has one more position, which shows its last token: (B, T + 1).
        """
        config, T = self.config, idx.shape[1]
        if config.shift_id is None:
            return idx
        n = T if config.block else T + 1
        idx, clean = (F.pad(tokens, (1, 0), value=config.shift_id)[:, :n] for tokens in (idx, clean))
        return torch.where(torch.arange(n, device=idx.device) % (config.block or n) == 0, clean, idx)

    def embed(self, tokens, positions):
        """Vectors (B, S, C) of tokens (B, S). Only published models use their positions (S,)."""
        return self.dropout(self.token_embedding(tokens))

    def angles(self, positions):
        return rotary_angles(positions, self.config.n_embd // self.config.n_head)

    def unembed(self, x, positions):
        """Logits (.., V) of the last layer's vectors (.., N, C), at positions (N,)."""
        bias = x.new_zeros(self.config.vocab_size) if self.head.bias is None else self.head.bias
        is_mask = torch.arange(len(bias), device=x.device) == self.config.mask_id
        logits = F.linear(self.final_norm(x), self.head.weight, bias.masked_fill(is_mask, -torch.inf))
        if not self.config.kinds:
            return logits
        allowed = allowed_tokens(self.config.kinds, len(bias), x.device)  # (T, V)
        return logits.masked_fill(~allowed[positions], -torch.inf)

    def plan(self, n_clean, n, cache, device):
        """Layout and positions (S,) of a pass: n_clean of the clean copy, then n after the cache."""
        n_cached, K = cache.length if cache else 0, self.config.block or n
        positions = torch.arange(n_cached, n_cached + n, device=device)
        positions = torch.cat((positions[:n_clean], positions))  # (S,); a clean copy excludes a cache
        causal = K == 1 and n > 1 and not (n_clean or n_cached)
        # n <= K is one block, because caches end where a block begins.
        sees = None if n <= K or causal else who_sees(positions, n_clean, n_cached, K)
        # One-token blocks only look left, so without a clean copy one row holds them all.
        strip = n if K == 1 and not n_clean else min(K, n)
        return Layout(self.angles(positions), sees, causal, n_clean, strip, cache), positions

    def forward(self, idx, where=None, clean=None, cache=None):
        """Logits (B, T, V) of the token that belongs at each position of idx (B, T) int64.

        where: (B, T) bool, or its nonzero indices: only compute the logits of these N positions, (N, V). A loss
            needs no others, and they would be the largest tensor of all.
        clean: (B, T), the text without holes, where each block sees those before it. By default idx, which is right
            if only the last block has holes.
        cache: a Cache. Only positions from its `length` on are read and get logits; `where` is ignored elsewhere.
        """
        T, n_cached = idx.shape[1], cache.length if cache else 0
        # The copy omits the last block, which no other sees. A canvas (one block) and a GPT (reads no hole) have none.
        K = self.config.block or T
        n_clean = 0 if clean is None or self.is_gpt else (T - 1) // K * K
        clean = idx if clean is None else clean
        tokens = self.read(idx, clean)[:, n_cached:]  # (B, n)
        layout, positions = self.plan(n_clean, tokens.shape[1], cache, idx.device)
        x = self.embed(torch.cat((self.read(clean, clean)[:, :n_clean], tokens), 1), positions)  # (B, S, C)
        for layer in self.layers[:-1]:
            x = layer(x, layout)
        if n_clean:  # from the last layer we only need the noisy copy
            layout = layout._replace(first=n_clean, sees=layout.sees[n_clean:])
        x = self.layers[-1](x, layout)[:, : T - n_cached]  # (B, T - n_cached, C), no extra position
        if cache:
            cache.length = T if self.is_gpt else cache.final  # the caller sets final: the unfinished block
        positions = torch.arange(n_cached, T, device=idx.device)
        if where is None:
            return self.unembed(x, positions)
        n, rows = rows_at(where, n_cached, T)  # padded to a few sizes, so a CPU reuses kernels
        return self.unembed(x.flatten(0, 1).index_select(0, rows), positions[rows % (T - n_cached)])[:n]


def load_checkpoint(path, device="cpu", keep=None, **changes):
    """Read a checkpoint: (model in eval mode, tokenizer, the whole dict). Raises errors.Mistake if it is not one.

    keep: a dtype that the weights stay in if all matrices have it (memory-mapped on a CPU); else they become float32.
    changes: fields of the config to override, such as dropout.
    """
    checkpoint = read_checkpoint(path)
    with refused(path):
        network = Transformer if checkpoint["family"] == "setitem" else published_network(checkpoint["family"])
        config = network.Config(**{**checkpoint["config"], **changes})
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        check_config(config, tokenizer, checkpoint)
        with torch.device("meta"):  # takes no memory, and draws no random weights
            model = network(config)
        model.load_state_dict(checkpoint["model"], assign=True)
    matrices = {weight.dtype for weight in model.parameters() if weight.ndim == 2}
    dtype = keep if matrices == {keep} else torch.float32
    return model.to(device, dtype).eval(), tokenizer, checkpoint
