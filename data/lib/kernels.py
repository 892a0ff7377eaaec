"""Made fast and small: attention, its cache, products and dropout on a CPU, cross-entropy, Muon."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def attend(q, k, v, dropout, sees=None, causal=False):
    """Each position's mean of the values that it sees, weighted by softmax(q k^T / sqrt(D)): (B, H, Q, D),
    of q (B, H, Q, D) and k, v (B, H, S, D), or with fewer heads, each for H/n neighbours (2305.13245). sees:
    (Q, S) bool, or all; causal: those up to its own.

    On a CPU torch has no fused kernel with dropout, and its bfloat16 kernel is slow from 64 queries on, as
    long as all scores fit into the caches: these lines take half the time at 256 positions.
    """
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    p = dropout.p if dropout.training else 0.0
    written_out = p or (q.dtype == torch.bfloat16 and q.shape[2] >= 64 and q.shape[2] * k.shape[2] <= 2**18)
    if q.device.type != "cpu" or not written_out:
        return F.scaled_dot_product_attention(q, k, v, sees, dropout_p=p, is_causal=causal)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, Q, S)
    if causal:
        sees = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if sees is not None:
        scores.masked_fill_(~sees, -torch.inf)
    return dropout(scores.softmax(-1)) @ v


# With AMX torch reads bfloat16 weights 1.4 times as fast for a vector as for a matrix of one row.
VECTORS = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")


def linear(x, weight, bias=None):
    """F.linear; the one token that is read when one is appended is a vector to it."""
    if not VECTORS or x.device.type != "cpu" or x.numel() != x.shape[-1]:
        return F.linear(x, weight, bias)
    y = weight @ x.flatten()
    return (y if bias is None else y + bias.type_as(y)).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


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


def rows_at(where, first, T):
    """N, how many positions `where` names; and their rows in a tensor (B * (T - first), C) that lacks those
    before `first`, with some of row 0 after them, (N or more,).

    where: (B, T) bool, or its indices, two of (N,): known beforehand, no device has to count them. The number
    of rows is a power of 2 or a multiple of 128: a CPU's kernels are made, and kept, for each shape, and of
    a training step they take 2 MB.
    """
    b, t = where[:, first:].nonzero(as_tuple=True) if torch.is_tensor(where) else (where[0], where[1] - first)
    multiple = next((power for power in (1, 2, 4, 8, 16, 32, 64) if len(b) <= power), 128)
    return len(b), F.pad(b * (T - first) + t, (0, -len(b) % multiple))


def allowed_tokens(kinds, V, device):
    """Which of V tokens may stand at each place of a canvas, by a tokenizer's kinds: (T, V) bool."""
    ids = torch.arange(V, device=device)
    return torch.cat([((ids >= first) & (ids < end)).expand(n, V) for n, first, end in kinds])


def rows_at_once(most, T, V):
    """How many rows of T positions, `most` at most, may be read at once, if all logits may be asked for."""
    return max(1, min(most, 2**29 // (T * V)))


def rows_at_a_time(logits):
    """How many rows of logits (N, V) to copy at a time, so that there is no float copy of them all."""
    return max(1, 2 ** (20 if logits.device.type == "cpu" else 26) // logits.shape[1])


def in_parts(function, logits, *more):
    """function(logits (N, V), ...), (N,), a few rows at a time."""
    rows = rows_at_a_time(logits)
    if len(logits) <= rows:
        return function(logits, *more)
    return torch.cat([function(*part) for part in zip(*(tensor.split(rows) for tensor in (logits, *more)))])


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy of logits (N, V) and target (N,), in nats, one for each (N,), without a float32 copy
    of the logits.

    The gradient takes the logits' place in memory, a few rows at a time: at RoBERTa's vocabulary
    they are by far the largest tensor of a training step.
    """

    @staticmethod
    def forward(ctx, logits, target):
        parts = logits.split(rows_at_a_time(logits))
        log_z = torch.cat([part.to(torch.float32).logsumexp(-1) for part in parts])  # (N,)
        ctx.save_for_backward(logits, target, log_z)
        return log_z - logits.gather(1, target[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        logits, target, log_z = ctx.saved_tensors
        logits, rows = logits.detach(), rows_at_a_time(logits)
        for part, y, z, g in zip(*(tensor.split(rows) for tensor in (logits, target, log_z, gradient))):
            p = (part.to(torch.float32) - z[:, None]).exp()
            p[torch.arange(len(p), device=p.device), y] -= 1
            part.copy_(p * g[:, None])
        return logits, None


cross_entropy = CrossEntropy.apply
