"""The denoiser: a Transformer that sees text with some tokens replaced by `<mask>`, its holes, and gives the
logits of the token that belongs at each position.

Masking is the noise of this diffusion, and the holes show its level, so there is no time input
(2406.03736); `<mask>` itself has probability 0 ("SUBS", 2406.07524). Unlike GPT-2's, every token sees
all others; positions rotate queries and keys, which are normalised; a short convolution opens each
block; there are no biases, and the head is not tied to the embedding. `attend` and `Dropout`, last, are
torch's own, made faster on a CPU.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.run.checkpoint import read_checkpoint
from data.run.errors import Mistake
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
    conv: int = 5  # neighbours that a block's convolution mixes, the token itself included; 0: none
    causal: bool = False  # a token sees itself and those to its left
    norm: str = "pre"  # "pre": normalise what a layer reads; "post": the sum after it, as in BERT
    position: str = "rope"  # "rope": rotate queries and keys; "learned": add a vector, as in BERT
    qk_norm: bool = True  # normalise queries and keys: Muon would let the attention logits grow
    # What only BERT and RoBERTa set, besides "post", "learned", no qk_norm and no convolution:
    mlp_width: int = 0  # of the hidden layer; 0: 4 * n_embd
    activation: str = "gelu"  # one of ACTIVATIONS
    bias: bool = False  # in linear layers and norms
    norm_eps: float = 1e-5  # added to the variance
    token_types: int = 0  # rows of a table whose first is added to every token; 0: none
    first_position: int = 0  # of the table of positions; RoBERTa's begin at 2
    head_activation: str | None = None  # of a layer before the head's matrix; None: no such layer
    tied: bool = False  # the head's matrix is the token embedding


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def layer_norm(width, config):
    return nn.LayerNorm(width, config.norm_eps, bias=config.bias)


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
        self.n_head, self.causal, self.dropout = config.n_head, config.causal, Dropout(config.dropout)
        # Three matrices and not one, because Muon orthogonalises each on its own.
        self.query = nn.Linear(config.n_embd, config.n_embd, config.bias)
        self.key = nn.Linear(config.n_embd, config.n_embd, config.bias)
        self.value = nn.Linear(config.n_embd, config.n_embd, config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, config.bias)
        head_dim = config.n_embd // config.n_head
        self.query_norm = layer_norm(head_dim, config) if config.qk_norm else nn.Identity()
        self.key_norm = layer_norm(head_dim, config) if config.qk_norm else nn.Identity()

    def forward(self, x, rotation):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.n_head, -1) for linear in (self.query, self.key, self.value))
        q, k = self.query_norm(q).type_as(v), self.key_norm(k).type_as(v)  # CUDA makes norms float32
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        y = attend(q, k, v, self.dropout, self.causal)  # softmax(q k^T / sqrt(D)) v
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.mlp_width or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, width, config.bias)
        self.down = nn.Linear(width, config.n_embd, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Convolution(nn.Module):
    """Adds to each token a weighted sum of its neighbours, channel by channel.

    Most of what determines a token is next to it, and this is the cheapest way to look there: a short
    depthwise convolution as in Primer (2109.08668), here on the residual stream. It begins as nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_embd, 1, 1, config.conv))
        self.padding = config.conv - 1 if config.causal else config.conv // 2

    def forward(self, x):
        # (B, T, C) seen as an image of height 1 in channels-last layout, so that nothing is copied. It is
        # padded at both ends; the cut at the right makes the causal one look to the left alone.
        image = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
        mixed = F.conv2d(image, self.weight, padding=(0, self.padding), groups=x.shape[2])
        return x + mixed.squeeze(2).transpose(1, 2)[:, : x.shape[1]]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.convolution = Convolution(config) if config.conv else nn.Identity()
        self.attention = Attention(config)
        self.attention_norm = layer_norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.mlp_norm = layer_norm(config.n_embd, config)
        self.dropout = Dropout(config.dropout)

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
        pre = config.norm == "pre"
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.first_position + config.block_size, config.n_embd)
        if config.token_types:
            self.type_embedding = nn.Embedding(config.token_types, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.embedding_norm = nn.Identity() if pre else layer_norm(config.n_embd, config)
        self.final_norm = layer_norm(config.n_embd, config) if pre else nn.Identity()
        if config.head_activation:
            self.transform = nn.Linear(config.n_embd, config.n_embd, config.bias)
            self.transform_norm = layer_norm(config.n_embd, config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, config.bias)
        self.tie()
        self.apply(self.init_weights)

    def tie(self):
        if self.config.tied:
            self.head.weight = self.token_embedding.weight

    def init_weights(self, module):  # embeddings keep torch's N(0, 1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def embed(self, idx):
        """Vectors of the tokens idx (B, T): (B, T, C)."""
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            first = self.config.first_position
            x = x + self.position_embedding.weight[first : first + idx.shape[1]]
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
        return F.linear(x, self.head.weight, bias.masked_fill(is_mask, -torch.inf))

    def forward(self, idx, where=None):
        """Logits (B, T, V), in autocast's precision, of the token that belongs at each position of idx (B, T)
        int64, which has `mask_id` at the holes.

        where: (B, T) bool; only those positions' logits, (N, V), in row-major order: only holes have a
        loss, and at a large vocabulary the full logits would be the largest tensor there is.
        """
        rotation = None
        if self.config.position == "rope":
            rotation = rotary_angles(idx.shape[1], self.config.n_embd // self.config.n_head, idx.device)
        x = self.embed(idx)  # (B, T, C)
        for block in self.blocks:
            x = block(x, rotation)
        if where is None:
            return self.unembed(x)
        # Padded to a multiple of 64: a CPU's matrix kernels are made, and kept, for each shape.
        rows = where.flatten().nonzero().squeeze(1)  # (N,)
        x = x.flatten(0, 1).index_select(0, F.pad(rows, (0, -len(rows) % 64)))
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


# --- faster on a CPU -----------------------------------------------------------------------------


def attend(q, k, v, dropout, causal):
    """Each position's mean of the values, weighted by softmax(q k^T / sqrt(D)): (B, H, T, D), as q, k, v are.

    With dropout torch has no fused kernel for this on a CPU, and is slower without one than these lines.
    """
    p = dropout.p if dropout.training else 0.0
    if not p or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, T)
    if causal:
        T = q.shape[2]
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    return dropout(scores.softmax(-1)) @ v


class Dropout(nn.Dropout):
    """Zeroes each value with probability p in training, and scales the rest so that the mean stays.

    On a CPU torch draws its random numbers one by one. Sixteen bits are enough for each, and a
    64-bit draw has four of these: five times faster. p is then a multiple of 2**-16.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept.type_as(x).mul_(1 / (1 - self.p))
