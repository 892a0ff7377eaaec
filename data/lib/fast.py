"""Made fast and small: attention, its cache, products and dropout on a CPU, cross-entropy, Muon."""

from collections import defaultdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.lib.processes import piece_of, shared_out, whole


class Cache:
    """What each layer needs of the first `length` positions of a window of W: keys, values, and the inputs
    of its convolution. A pass reads the positions after them, and leaves here those that are final: the
    blocks before `final`, or in a GPT, where no position reads a hole, all.
    """

    def __init__(self, W):
        self.W, self.length, self.final, self.kept = W, 0, 0, {}

    def join(self, name, x, zeros=0):
        """What is kept under this name, and x (..., S, D) after it: (..., zeros + length + S, D).

        zeros: how many rows of zeros stand in front. There is room for W from the start: nothing is copied.
        """
        if name not in self.kept:
            self.kept[name] = x.new_zeros(*x.shape[:-2], zeros + self.W, x.shape[-1])
        kept = self.kept[name][..., : zeros + self.length + x.shape[-2], :]
        kept[..., zeros + self.length :, :] = x
        return kept


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


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is a matrix with singular values near 1 (Jordan 2024; 2502.16982).

    The step's size is that of AdamW's (2502.16982, eq. 4), so one learning rate serves both. This is
    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" but for two things: products are in `dtype`, the
    run's own, where torch's are in bfloat16, which a CPU without instructions for it multiplies a
    hundred times slower; and matrices of one shape are one product, or one in each process.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for (A, B), matrices in alike.items():
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                averages = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(averages, [p.grad for p in matrices], 1 - group["momentum"])
                ahead = [p.grad.lerp(x, group["momentum"]) for p, x in zip(matrices, averages)]  # Nesterov's
                ahead = torch.stack([whole(x) for x in ahead])
                updates = shared_out(lambda x: orthogonalised(x, self.dtype), ahead)
                updates = [piece_of(update, p) for update, p in zip(updates, matrices)]
                size = 0.2 * max(A, B) ** 0.5  # so that the root of the mean square is some 0.2, as AdamW's
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates, alpha=-group["lr"] * size)


def orthogonalised(x, dtype):
    """Matrices x (n, A, B) with all their singular values moved to about 1, in dtype, by five steps of a
    polynomial that has its steepest rise at 0 (Newton and Schulz; coefficients of Jordan 2024).
    """
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT
