"""Masking rates other than t, the bound under a slanted rate, and the loss at visible tokens."""

import functools

import torch


def segment_lengths(model_config, T, weight):
    """Lengths of the segments that have a noise level of their own: the blocks, the kinds, or the whole text."""
    # A level for each kind lets the holes decide the task (2303.06555). The elbo weight needs one level for all.
    if model_config.kinds and not model_config.block and weight == "mean":
        return [n for n, _, _ in model_config.kinds]
    K = model_config.block or T
    return [K] * (T // K)


def slanted_rate(t, slant, K, T):
    """clip(t (1 + w) - w (1 - i / (K - 1)), 0, 1) for token i of each block of K, at levels t (B, T)."""
    return (t * (1 + slant) - slant * (1 - torch.linspace(0, 1, K).repeat(T // K))).clamp(0, 1)


def rates_of(rate, uniform_rates, model_config, occurrences=None):
    """Return rates(t, x0) -> each token's rate and its slope in t, (B, T). occurrences: of each token in the corpus."""
    if rate.kind == "spindle":
        counts = torch.tensor(occurrences) + 1.0  # one more of each, so that all logarithms are finite
        token_nats = (counts.sum() / counts).log()  # (V,)

    def rates(t, x0):
        K = model_config.block or x0.shape[1]
        if rate.kind == "slant":  # masks the right end of each block first, so it is written last (2305.09515)
            r = slanted_rate(t, rate.value, K, x0.shape[1])
            return r, (1 + rate.value) * (r < 1)  # a rate clipped at 1 no longer rises
        # spindle masks informative tokens first (DiffusionBERT, 2211.15029). It has no bound, so its slope is just 1.
        nats = token_nats[x0].unflatten(1, (-1, K))
        information = (1 - nats.mean(-1, keepdim=True) / nats).flatten(1)  # compared with the block's mean, (B, T)
        return (t + rate.value * torch.sin(torch.pi * t) * information).clamp(0, 1), 1.0

    return uniform_rates if rate.kind == "t" else rates


def bound_holes(level, rate, exact_holes, grid_holes):
    """Choose how `sequence_bounds` of train.py draws holes. spindle:W gets the bound of uniform rates."""
    if rate.kind == "slant":
        return {"uniform": functools.partial(slanted_holes, slant=rate.value)}[level.kind]
    return {"uniform": exact_holes, "grid": grid_holes}[level.kind]  # other levels have no bound


def slanted_holes(x0, maskable, t, generator, K, slant):
    """`exact_holes` of train.py for the rates of slant:W.

    Token i is masked at level s_i = (u_i + w (1 - i/(K-1))) / (1 + w), where its rate rises above u_i. The first
    k = ceil(tM) that are masked become holes. If the last is masked at s, P(i is the last | the k holes) is
    proportional to r_i'(s) / r_i(s). Weights M P(i is the last) <= M give the same expected loss as rate'/rate.
    """
    maskable, t = maskable.reshape(-1, K), t.reshape(-1, K)  # (B * T/K, K)
    M, u = maskable.sum(1, keepdim=True), torch.rand(t.shape, generator=generator)
    masked_at = (u + slant * (1 - torch.linspace(0, 1, K))) / (1 + slant)
    holes = masked_at.masked_fill(~maskable, torch.inf).argsort(1).argsort(1) < (t * M).ceil()
    last = masked_at.masked_fill(~holes, 0).amax(1, keepdim=True)  # (B * T/K, 1)
    rates = slanted_rate(last, slant, K, K)
    # A rate that reached 1 earlier doesn't rise at s. The last hole itself must not be lost to rounding.
    odds = holes * ((rates < 1) | (masked_at == last)) / rates.clamp(min=1e-12)
    weights = M * odds / odds.sum(1, keepdim=True).clamp(min=1e-12)
    return holes.view_as(x0), weights.view_as(x0)


def with_visible(x0, xt, holes, maskable, fraction, model_config, generator):
    """Also train on some visible tokens, half of them randomised (BERT, 1810.04805): xt, trained positions, weights."""
    # Otherwise a network learns nothing about tokens that it sees, and `--order remask` spoils them.
    u = torch.rand(x0.shape, generator=generator)
    visible = maskable & ~holes & (u < fraction)
    xt = torch.where(visible & (u < fraction / 2), random_tokens(*x0.shape, model_config, generator), xt)
    trained = holes | visible
    return xt, trained, torch.full(x0.shape, 1 / max(1, trained.sum().item()))


def random_tokens(B, T, model_config, generator):
    """Tokens (B, T), each drawn uniformly from those that may stand at its place."""
    special, places = torch.tensor([model_config.mask_id, *model_config.special_ids]), []
    for n, first, end in model_config.kinds or ((T, 0, model_config.vocab_size),):
        ids = torch.arange(first, end)
        ids = ids[torch.isin(ids, special, invert=True)]
        places.append(ids[torch.randint(len(ids), (B, n), generator=generator)])
    return torch.cat(places, 1)
