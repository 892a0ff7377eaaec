"""Faster or smaller than torch's own: attention, convolution, dropout, products, cross-entropy, logits in parts."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F


def attend(q, k, v, dropout, sees=None, causal=False):
    """softmax(q k^T / sqrt(D)) v of q (B, H, Q, D), k, v (B, H or fewer (2305.13245), S, D). sees: (Q, S) or None."""
    p, (H, Q), S = dropout.p if dropout.training else 0.0, q.shape[1:3], k.shape[2]
    # On a CPU, torch has no fused kernel with dropout, and from 64 queries on its bfloat16 kernel takes 2 to 5 times as
    # long as ours, while the scores fit into the caches. For the few queries of appending it is faster.
    if q.device.type != "cpu" or not (p or (q.dtype == torch.bfloat16 and Q >= 64 and Q * S <= 2**18)):
        return F.scaled_dot_product_attention(q, k, v, sees, p, is_causal=causal, enable_gqa=k.shape[1] < H)
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, Q, S)
    sees = torch.ones(Q, S, dtype=torch.bool).tril() if causal else sees
    if sees is not None:
        scores.masked_fill_(~sees, -torch.inf)
    return dropout(scores.softmax(-1)) @ v


def depthwise_convolution(rows, weight):
    """Convolve rows (B, N, W, C), without padding, by weight (C, taps): (B, N, W - taps + 1, C)."""
    if rows.numel() < 2**14 and not torch.is_grad_enabled():  # conv2d has 30 us of overhead
        return (rows.unfold(2, weight.shape[1], 1) * weight).sum(-1).type_as(rows)
    # An image with one row per block, in channels-last layout, so that nothing is copied.
    return F.conv2d(rows.permute(0, 3, 1, 2), weight[:, None, None], groups=rows.shape[3]).permute(0, 2, 3, 1)


class Dropout(nn.Dropout):
    """Zero each value with probability p in training, and scale the others so that the mean doesn't change."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        # One 64-bit draw serves four values. This is two to five times as fast, and makes p a multiple of 2**-16.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept.type_as(x).mul_(1 / (1 - self.p))


def pack(model, dtype):
    """Pack a model's matrices for oneDNN: a CPU then takes half the time for a few rows in bfloat16.

    The model can only write afterwards. dtype: of its products. A canvas reads many rows, so its model isn't changed.
    """
    can_pack = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if can_pack and dtype == torch.bfloat16 and model.head.weight.is_cpu and model.config.block:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), 1)
                layer.forward = functools.partial(product, layer, packed)


def product(layer, packed, x):
    """The output (.., N) of an nn.Linear for x (.., C). packed: its matrix, which only pays for few rows."""
    if x.numel() > 32 * x.shape[-1]:
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, layer.bias, "none", [], "")


def rows_at(where, first, T):
    """The number of positions in `where` (B, T), bool or indices, and their rows in a tensor (B * (T - first), C)."""
    b, t = where[:, first:].nonzero(as_tuple=True) if torch.is_tensor(where) else (where[0], where[1] - first)
    # Rows are padded with row 0 to a few sizes, because a CPU compiles and keeps kernels for each size (2 MB per
    # training step).
    multiple = next((power for power in (1, 2, 4, 8, 16, 32, 64) if len(b) <= power), 128)
    return len(b), F.pad(b * (T - first) + t, (0, -len(b) % multiple))


def allowed_tokens(kinds, V, device):
    """Which of V tokens may stand at each place of a canvas with these kinds, (T, V) bool."""
    ids = torch.arange(V, device=device)
    return torch.cat([((ids >= first) & (ids < end)).expand(n, V) for n, first, end in kinds])


def rows_at_once(most, T, V):
    """How many texts of T tokens fit in one pass if all their logits are asked for; `most` at most."""
    return max(1, min(most, 2**29 // (T * V)))


def rows_at_a_time(logits):
    return max(1, 2 ** (20 if logits.device.type == "cpu" else 26) // logits.shape[1])


def in_parts(function, logits, *more):
    """function(logits (N, V), ..), (N,), computed a few rows at a time to save memory."""
    parts = (tensor.split(rows_at_a_time(logits)) for tensor in (logits, *more))
    return torch.cat([function(*part) for part in zip(*parts)])


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy in nats, (N,), of logits (N, V) and target (N,). The gradient overwrites the logits."""

    @staticmethod
    def forward(ctx, logits, target):
        log_z = in_parts(lambda part: part.float().logsumexp(-1), logits)  # (N,)
        ctx.save_for_backward(logits, target, log_z)
        return log_z - logits.gather(1, target[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        logits, target, log_z = ctx.saved_tensors
        logits, rows = logits.detach(), rows_at_a_time(logits)  # to save memory, the gradient overwrites them
        for part, y, z, g in zip(*(tensor.split(rows) for tensor in (logits, target, log_z, gradient))):
            p = (part.float() - z[:, None]).exp()
            p[torch.arange(len(p), device=p.device), y] -= 1
            part.copy_(p * g[:, None])
        return logits, None


cross_entropy = CrossEntropy.apply


def soft_cross_entropy(logits, target):
    """Cross-entropy in nats, (N,), of logits (N, V) with the distribution of other logits, the target."""
    log_q = logits.float().log_softmax(-1).clamp(min=-1e4)  # minus infinity times a probability of 0 is not a number
    return -(target.float().softmax(-1) * log_q).sum(-1)
