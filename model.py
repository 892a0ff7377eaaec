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

A GPT with a `draft_len` of K also drafts K tokens at once and verifies them in its next pass (2511.08923).

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
from data.lib.checkpoint import Unfilled, check_config, published_network, read_checkpoint, refused
from data.lib.kernels import Dropout, allowed_tokens, attend, depthwise_convolution, rows_at
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
    draft_len: int | None = None  # a GPT also drafts this many tokens at once; None: it only appends
    draft_rank: int = 0  # width of the adapters applied to masks before each layer (--freeze); 0: none
    conv: int = 5  # taps of each layer's convolution; 0: no convolution
    conv_right: int | None = None  # how many of them look to the right; None: half, but within the block

    def __post_init__(self):
        if self.conv_right is None:
            self.conv_right = self.within_block(max(0, (self.conv - 1) // 2))

    @property
    def is_gpt(self):  # no position reads a hole, and a text is appended to
        return self.block == 1 and self.shift_id is not None

    def within_block(self, n):
        return n if self.block is None else min(n, self.block - 1)


# --- who sees whom -------------------------------------------------------------------------------
#
# A hole is predicted from the finished blocks before its own and from what its own block shows. In training every
# block has holes, so a pass reads the text twice: first the text without holes, and then groups of holes, each with the
# text before its start. When writing, earlier blocks are finished, so the text is read once, and a Cache keeps what the
# layers computed for them. Drafts are groups, too, after any token of a text that is read as a GPT reads it.


class Layout(NamedTuple):
    """What the layers need to know about a pass over S positions: n of the text, and then M in groups."""

    angles: tuple  # see `rotary_angles`
    sees: torch.Tensor | None  # (S, cached + S) bool, or (B, 1, S, cached + S); None: all see all, unless `causal`
    causal: bool  # every position sees itself and those before it
    n: int
    width: int  # positions that a convolution takes as one row: a block, a group, or all
    starts: torch.Tensor  # where each of these rows starts, counted from the end of the cache
    cache: Cache | None
    first: int = 0  # positions before this one are seen, but not computed


def who_sees(n, K, starts):
    """(S, S) bool: a row for each position that sees, a column for each that is seen. All see what is in the cache.

    First come n tokens of the text, in blocks of K; each sees its own block and those before it. Then come M tokens in
    groups, with the starts of their groups (M,); each sees its group, and the text before the start.
    """
    place = torch.arange(n, device=starts.device)
    ends = torch.cat(((place // K + 1) * K, starts))  # (S,)
    group = torch.cat((torch.full_like(place, -1), starts))  # (S,); -1: the text
    return torch.cat((place < ends[:, None], starts == group[:, None]), 1)


def rotary_angles(positions, D, base=10000.0):
    """Cosines and signed sines for `rotate` (2104.09864, eq. 15) at positions (.., S), each (.., S, 1, D)."""
    frequency = 1 / base ** (torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angle = positions[..., None, None] * frequency  # (.., S, 1, D/2)
    return torch.cat((angle, angle), -1).cos(), torch.cat((-angle, angle), -1).sin()


def rotate(x, cos, sin):
    """Rotate channels i and i + D/2 of x (B, S, H, D) together, by the angle of the position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.type_as(x) + torch.cat((b, a), dim=-1) * sin.type_as(x)


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

    def rotate(self, q, k, layout):
        """Rotate queries and keys (B, S, H, D) by their positions."""
        asking = (angles[..., layout.first :, :, :] for angles in layout.angles)
        return rotate(q, *asking), rotate(k, *layout.angles)

    def forward(self, x, layout):
        q, k, v = self.query(x[:, layout.first :]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(2, (-1, self.head_dim)) for y in (q, k, v))  # (B, S, H, D)
        q, k = self.query_norm(q).type_as(v), self.key_norm(k).type_as(v)  # CUDA's autocast leaves norms in float32
        q, k, v = (y.transpose(1, 2) for y in (*self.rotate(q, k, layout), v))  # (B, H, S, D)
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
        (B, S, C), n, width, left = x.shape, layout.n, layout.width, self.left
        text, groups = x[:, :n], x[:, n:]
        # These begin `left` places before the text, so what is before a row begins where the row does.
        before = F.pad(text, (0, 0, left, 0)) if layout.cache is None else layout.cache.recent(self, text, left)
        before = before[:, layout.starts[:, None] + torch.arange(left, device=x.device)]  # (B, R, left, C), of R rows
        rows = [F.pad(part, (0, 0, 0, -part.shape[1] % width)) for part in (text, groups)]  # up to the end of a row
        after = x.new_zeros(B, len(layout.starts), self.right, C)
        rows = torch.cat(rows, 1).unflatten(1, (-1, width))  # (B, R, width, C)
        rows = torch.cat((before, rows, after), 2)  # (B, R, left + width + right, C)
        y = depthwise_convolution(rows, self.weight.flatten(1)[:, : left + 1 + self.right]).flatten(1, 2)
        return x + torch.cat((y[:, :n], y[:, n + -n % width :][:, : S - n]), 1)


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


class Drafter(nn.Module):
    """What drafting adds to a GPT: a look at the tokens before each draft and, with --freeze, adapters for the masks.

    All masks of a group are read at once, so their vectors don't know the tokens that are drafted before them. With a
    look at the last few, the drafts are a Markov chain instead of independent guesses.
    """

    LOOK = 4  # tokens

    def __init__(self, config):
        super().__init__()
        C, r = config.n_embd, config.draft_rank
        self.mix = nn.Sequential(nn.LayerNorm(C, bias=False), nn.Linear(C, 4 * C, bias=False))
        self.before, self.out = nn.Linear(self.LOOK * C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(C), nn.Linear(C, r), nn.SiLU(), nn.Linear(r, C))
            for _ in range(config.n_layer if r else 0)
        )
        for p in (self.out.weight, *(p for adapter in self.adapters for p in adapter[-1].parameters())):
            nn.init.zeros_(p)  # at first it changes nothing

    def forward(self, x, before):
        """Vectors (.., C) of drafts, from the masks' x (.., C) and embeddings (.., LOOK, C) of the tokens before."""
        return x + self.out(F.silu(self.mix(x) + self.before(before.flatten(-2))))


class Transformer(nn.Module):
    family, Config, Layer = "setitem", ModelConfig, Layer  # a published model has others

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(self.Layer(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        self.drafter = Drafter(config) if config.draft_len else None

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
        logits = self.head(self.final_norm(x))
        logits.detach()[..., self.config.mask_id] = -torch.inf  # detached, because its gradient is 0 anyway
        if not self.config.kinds:
            return logits
        allowed = allowed_tokens(self.config.kinds, self.config.vocab_size, x.device)  # (T, V)
        return logits.masked_fill(~allowed[positions], -torch.inf)

    def plan(self, n, places, group, cache=None):
        """Layout and positions (S,) of a pass over n tokens of the text after the cache, and M tokens in groups.

        places (M,): their positions, counted from the end of the cache. Each group has `group` neighbours.
        """
        K, device, is_ragged = self.config.block or n, places.device, cache is not None and cache.is_ragged
        width = group if len(places) else n if K == 1 else min(K, n)  # one-token blocks only look left
        starts = torch.cat((torch.arange(0, n, width, device=device), places[::group]))
        positions = torch.cat((torch.arange(n, device=device), places))  # (S,)
        if cache:  # a table of positions ends at the context, and what a draft reads beyond it is never kept
            positions = (cache.length + positions).clamp(max=self.config.context - 1)
        is_plain = not (len(places) or is_ragged)  # a text alone, of rows that see equally much
        one_block = is_plain and n <= K  # it sees all, because caches end where a block begins
        causal = is_plain and self.config.block == 1 and n > 1 and not (cache and cache.length)
        group_starts = places[::group].repeat_interleave(group)[: len(places)]  # (M,)
        sees = None if one_block or causal else who_sees(n, K, group_starts)
        if cache and sees is not None:
            sees = cache.sees(sees)
        return Layout(self.angles(positions), sees, causal, n, width, starts, cache), positions

    def run(self, text, groups, places, group, cache=None, first=0):
        """Vectors (B, S - first, C) of the text (B, n) after the cache and of groups (B, M); for places, see `plan`."""
        n = text.shape[1]
        layout, positions = self.plan(n, places, group, cache)
        x = self.embed(torch.cat((text, groups), 1), positions)  # (B, S, C)
        for i, layer in enumerate(self.layers):
            if self.config.draft_rank and n < x.shape[1]:  # the groups are masks
                x = torch.cat((x[:, :n], x[:, n:] + self.drafter.adapters[i](x[:, n:])), 1)
            if first and layer is self.layers[-1]:  # from the last layer we need no others
                layout = layout._replace(first=first, sees=layout.sees[first:])
            x = layer(x, layout)
        return x

    def forward(self, idx, where=None, clean=None, cache=None, drafts_from=None):
        """Logits (B, T, V) of the token that belongs at each position of idx (B, T) int64.

        where: (B, T) bool, or its nonzero indices: only compute the logits of these N positions, (N, V). A loss
            needs no others, and they would be the largest tensor of all.
        clean: (B, T), the text without holes, where each block sees those before it. By default idx, which is right
            if only the last block has holes.
        cache: a Cache. Only positions from its `length` on are read and get logits; `where` is ignored elsewhere.
        drafts_from: also draft, in groups from this position on. Return two (N, V), first the GPT's and then the
            drafts', which mean nothing at positions outside the groups.
        """
        if drafts_from is not None:
            return self.append_and_draft(clean, where, drafts_from)
        T, n_cached, K = idx.shape[1], cache.length if cache else 0, self.config.block or idx.shape[1]
        tokens = self.read(idx, idx if clean is None else clean)[:, n_cached:]  # (B, n)
        if clean is None or self.config.is_gpt or T <= K:  # a GPT reads no holes; a canvas has no blocks before it
            x = self.run(tokens, tokens[:, :0], torch.arange(0, device=idx.device), K, cache)
        else:
            text = self.read(clean, clean)[:, : (T - 1) // K * K]  # no block sees the last
            x = self.run(text, tokens, torch.arange(T, device=idx.device), K, cache, first=text.shape[1])
        x = x[:, : T - n_cached]  # (B, T - n_cached, C), no extra position
        if cache:
            cache.length = T if self.config.is_gpt else cache.final  # the caller sets final: the unfinished block
        positions = torch.arange(n_cached, T, device=idx.device)
        if where is None:
            return self.unembed(x, positions)
        n, rows = rows_at(where, n_cached, T)  # padded to a few sizes, so a CPU reuses kernels
        return self.unembed(x.flatten(0, 1).index_select(0, rows), positions[rows % (T - n_cached)])[:n]

    def append_and_draft(self, x0, where, first):
        """`forward` for training a GPT that drafts. where: indices. A draft sees the true tokens before it."""
        (B, T), group = x0.shape, self.config.draft_len
        text = self.read(x0, x0)
        places = torch.arange(first, first + (T - first) // group * group, device=x0.device)  # (M,)
        x = self.run(text, x0.new_full((B, len(places)), self.config.mask_id), places, group)  # (B, T + M, C)
        row, place = where
        drafted = x[row, T + (place - first).clamp(0, len(places) - 1)]  # (N, C)
        look = Drafter.LOOK
        before = F.pad(text, (look - 1, 0), value=self.config.shift_id).unfold(1, look, 1)  # (B, T, look)
        drafted = self.drafter(drafted, self.token_embedding(before[where]))
        return self.unembed(x[where], place), self.unembed(drafted, place)


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
        with torch.device("meta"), Unfilled():  # takes no memory, and draws no random weights
            model = network(config)
        weights = {name: x for name, x in checkpoint["model"].items() if config.draft_len or "drafter." not in name}
        if config.draft_len:  # what it has to learn yet, if it is a GPT that didn't draft, or wasn't frozen
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                new = {f"drafter.{name}": x for name, x in Drafter(config).state_dict().items()}
            if new.keys() & weights.keys():
                new = {name: x for name, x in new.items() if name.startswith("drafter.adapters.")}
            weights = new | weights
        model.load_state_dict(weights, assign=True)
    matrices = {weight.dtype for weight in model.parameters() if weight.ndim == 2}
    dtype = keep if matrices == {keep} else torch.float32
    return model.to(device, dtype).eval(), tokenizer, checkpoint
