"""Append and set are two ends of one setting, the block of K tokens: GPT has K = 1, and a canvas is one block."""

import math
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from toys import CAUSAL, KS, MASK, NETWORKS, all_texts, chi_square_p, dial, every_shape, texts, tiny_model

from data.lib.flags import Attention, Level, Span
from data.lib.tokenizer import ByteTokenizer
from data.lib.train_settings import attention_fields, attention_of, model_config
from model import ModelConfig, Transformer
from sample import denoise, log_likelihood
from train import TrainConfig, corrupt, draw_batch, hole_weights, loss_of, nelbo, sequence_bounds


@torch.no_grad()
@every_shape
@pytest.mark.parametrize("K", KS)
def test_nothing_leaks_and_all_that_may_be_seen_is(K, shape, device):
    """A noisy position sees the noisy tokens of its own block, and the clean ones of the blocks before it."""
    model, canvas = dial(K, **shape).to(device), K is None
    K = K or 8
    x0, xt, _ = (tensor.to(device) for tensor in texts())
    x0[1], xt[1] = x0[0], xt[0]  # whatever changes in the second row, the first, which is alike, keeps its logits
    before = model(xt, clean=x0)
    for j in range(8):
        for noisy in (True, False):
            x0_changed, xt_changed = x0.clone(), xt.clone()
            changed = xt_changed if noisy else x0_changed
            changed[1, j] = (changed[1, j] + 1) % 5
            moved = (model(xt_changed, clean=x0_changed) - before)[..., :5].abs().amax(-1).cpu()  # (B, T)
            assert moved[[0, 2]].max() == 0
            i = torch.arange(8)
            if noisy:
                seen = i // K == j // K
                if shape["shift_id"] is not None and not canvas:  # the token before, clean at the start of a block
                    seen &= torch.tensor(j % K < K - 1 and j < 7)
            else:
                seen = i // K > j // K
            assert (moved[1][~seen] < 1e-6).all(), (j, noisy)
            assert (moved[1][seen] > 1e-5).all(), (j, noisy)


def test_a_block_of_all_positions_is_the_canvas():
    """The network sees 16 tokens, so its blocks of 8 are read as blocks."""
    x0, xt, holes = texts()
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for K in (None, 8):
        model = dial(K, T=16)
        assert model.config.block == K
        losses.append(loss_of(model, x0, xt, holes, weights))
        losses[-1].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0].equal(losses[1])
    assert all(a.equal(b) for a, b in zip(*gradients))


def block_nats(model, text, start, order):
    """Nats of the block of a text (T,) that begins at start, by the chain rule, in an order of its places."""
    canvas = text[: start + len(order)].clone()
    canvas[start:] = model.config.mask_id
    nats = 0.0
    for i in order:
        nats -= model(canvas[None])[0, start + i].log_softmax(-1)[text[start + i]]
        canvas[start + i] = text[start + i]
    return nats


@torch.no_grad()
def exact_bound(model, text):
    """The mean over all orders inside the blocks. Each pass reads the text once, up to the end of a block."""
    T = len(text)
    K = model.config.block or T
    orders = list(permutations(range(K)))
    return sum(block_nats(model, text, s, order) for s in range(0, T, K) for order in orders) / len(orders)


BLOCKS = [(K, shift) for K in (1, 2, 4, None) for shift in (None, 3)]


@torch.no_grad()
@pytest.mark.parametrize(("K", "shift"), BLOCKS)
def test_the_block_bound_is_the_mean_over_orders_inside_blocks(K, shift):
    """The pass over [clean ; noisy] gives it as a sum over all sets of k holes with weight 1 / (k C(K, k))."""
    model = tiny_model(V=3, T=4, block=K, shift_id=shift)
    x0, K = all_texts(3, 4)[[3, 17, 44, 80]], K or 4
    total = torch.zeros(len(x0))
    for places in product((False, True), repeat=K):
        if any(places):
            k = sum(places)
            holes = torch.tensor(places).repeat(4 // K).expand_as(x0)
            weights = torch.full(x0.shape, 1 / (k * math.comb(K, k)))
            total += loss_of(model, x0, x0.masked_fill(holes, 3), holes, weights)
    expected = torch.stack([exact_bound(model, text) for text in x0])
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("K", "shift"), [(2, None), (2, 3), (4, None), (None, None), (None, 3)])
def test_the_draws_of_corrupt_meet_the_block_bound(K, shift, seed):
    model = tiny_model(V=3, T=4, block=K, shift_id=shift)
    text = all_texts(3, 4)[44]
    expected = exact_bound(model, text).item()

    generator = torch.Generator().manual_seed(seed)
    x0, everything = text.expand(3000, -1), torch.ones(3000, 4, dtype=torch.bool)
    t = 1 - torch.rand(3000, 4 // (K or 4), generator=generator).repeat_interleave(K or 4, 1)  # independent levels
    xt, holes = corrupt(x0, t, everything, torch.rand(3000, 4, generator=generator), 3)
    weights = hole_weights("elbo", t, 1.0, holes, everything)
    nats = loss_of(model, x0, xt, holes, weights) * x0.numel()
    assert abs(nats.mean() - expected) < 3.5 * nats.std() / len(nats) ** 0.5

    # Batches of training have stratified levels, and are independent of each other.
    config = TrainConfig(batch_size=4, context=4, level=Level("uniform"), weight="elbo", prompt_len=Span(0, 0))
    split, generator = text.numpy(), torch.Generator().manual_seed(seed)
    batches = [draw_batch(split, config, generator, model.config) for _ in range(1000)]
    x0, xt, holes, weights = map(torch.cat, zip(*batches))
    nats = 4 * loss_of(model, x0, xt, holes, weights).view(1000, 4).sum(1)
    assert abs(nats.mean() - expected) < 3.5 * nats.std() / 1000**0.5

    # The bound draws levels and holes of its own.
    nats, _ = sequence_bounds(model, text.expand(20, -1), draws=60, seed=seed)
    nats = nats.view(60, 20).mean(1)
    assert abs(nats.mean() - expected) < 3.5 * nats.std() / 60**0.5


@pytest.mark.parametrize("K", [1, 2, 4, None])
def test_each_block_has_a_level_of_its_own(K):
    """The levels of a block are stratified over the batch, whatever those of other blocks are."""
    config = TrainConfig(batch_size=16, context=8, level=Level("uniform"))
    levels = []

    def rates(t, x0):
        levels.append(t)
        return t, 1.0

    draw_batch(torch.arange(500).numpy(), config, torch.Generator().manual_seed(0), ModelConfig(block=K), rates=rates)
    t = levels[0].unflatten(1, (-1, K or 8))  # (B, blocks, K)
    assert t.eq(t[..., :1]).all()
    gaps = t[..., 0].sort(0).values.diff(dim=0)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 16), atol=1e-5, rtol=0)
    assert len(t.unique()) == t[..., 0].numel()


@torch.no_grad()
def test_the_bound_of_one_token_blocks_is_the_chain_rule_and_exact():
    for shift_id in (None, 3):
        model = tiny_model(V=3, T=4, block=1, shift_id=shift_id)
        x0 = all_texts(3, 4)
        nats, _ = sequence_bounds(model, x0, draws=2)
        torch.testing.assert_close(nats[0], nats[1], atol=1e-5, rtol=0)
        assert (-nats[0]).exp().sum().item() == pytest.approx(1, abs=1e-5)
        expected = torch.stack([block_nats(model, text, i, (0,)) for text in x0[:9] for i in range(4)])
        torch.testing.assert_close(nats[0, :9].float(), expected.view(9, 4).sum(1))


@torch.no_grad()
def test_of_a_causal_model_score_bound_and_loss_are_one_number():
    model = dial(1, shift_id=MASK)
    x0, _, _ = texts(B=16)
    config = TrainConfig(
        batch_size=16, context=8, level=Level("fixed", 1.0), prompt_len=Span(0, 0), attention=Attention("causal")
    )
    everything = torch.full((16, 8), MASK), torch.ones(16, 8, dtype=torch.bool), torch.full((16, 8), 1 / 128)
    loss = loss_of(model, x0, *everything).sum().item()
    logits = model(x0)[..., :5]  # no position reads a hole, so the clean text gives the same
    assert F.cross_entropy(logits.flatten(0, 1), x0.flatten()).item() == pytest.approx(loss, abs=1e-5)
    assert nelbo(model, x0) == pytest.approx(loss, abs=1e-5)
    score = -log_likelihood(model, x0.flatten(), None, order="left") / 128
    assert score == pytest.approx(loss, abs=1e-5)
    _, xt, holes, weights = draw_batch(x0[0].numpy(), config, torch.Generator(), model.config)
    assert holes.all()
    assert (xt == MASK).all()
    assert weights.unique().tolist() == [1 / 128]


@torch.no_grad()
@pytest.mark.parametrize("order", ["left", "confidence"])
def test_probabilities_of_all_texts_sum_to_one_in_blocks(order):
    model = tiny_model(V=3, T=4, block=2)
    log_p = [log_likelihood(model, text, 4, order=order) for text in all_texts(3, 4)]
    assert torch.tensor(log_p).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shift_id", [None, 3])
def test_a_causal_model_draws_its_distribution(shift_id, device):
    model = tiny_model(V=3, T=3, block=1, shift_id=shift_id).to(device)
    nats, _ = sequence_bounds(model, all_texts(3, 3))
    *_, written = denoise(model, torch.full((4000, 3), 3, device=device), seeds=range(4000))
    counts = (written.cpu() * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert chi_square_p(counts, (-nats[0]).exp().float()) > 1e-3


@torch.no_grad()
def test_blocks_draw_their_distribution_in_any_order_inside():
    """p(text) is the product over blocks of the mean over both orders of their two tokens."""
    model = tiny_model(V=3, T=4, block=2)
    p = []
    for text in all_texts(3, 4):
        both = [[block_nats(model, text, start, order).neg().exp() for order in ((0, 1), (1, 0))] for start in (0, 2)]
        p.append(math.prod(sum(block) / 2 for block in both))
    *_, written = denoise(model, torch.full((4000, 4), 3), 4, seeds=range(4000))
    counts = (written * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81)
    assert chi_square_p(counts, torch.stack(p)) > 1e-3


def test_what_stands_after_a_block_is_not_seen():
    for shape in (CAUSAL, {"block": 2}):
        model = tiny_model(V=5, T=8, **shape)
        canvas = torch.tensor([[1, 2, MASK, MASK, 3, 4, 1, MASK], [1, 2, MASK, MASK, 0, 0, 0, MASK]])
        *_, written = denoise(model, canvas, seeds=[7, 7])
        assert written[0, :4].equal(written[1, :4])


@pytest.mark.parametrize("K", [1, 4])
def test_a_row_is_written_the_same_beside_longer_and_shorter_prompts(K):
    model = dial(K, conv=5, shift_id=MASK)
    _, canvas, _ = texts(B=5)
    *_, together = denoise(model, canvas, 8, seeds=range(5))
    for seed, row in enumerate(canvas):
        *_, alone = denoise(model, row[None], 8, seeds=[seed])
        assert alone[0].equal(together[seed])


def test_blocks_of_the_sampler_must_divide_those_of_the_model():
    with pytest.raises(ValueError, match="divide"):
        next(denoise(dial(4), torch.full((1, 8), MASK), block=3))


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 5])
def test_a_shifted_canvas_from_scratch_sees_all(conv):
    """A change of any token reaches every position (DiffuGPT, 2410.17891), and the first position reads no token."""
    config = TrainConfig(attention=Attention.from_text("shifted"), context=8, n_layer=2, n_embd=16, conv=conv)
    torch.manual_seed(0)
    model = Transformer(model_config(ModelConfig, config, ByteTokenizer())).eval()
    assert attention_of(model.config) == config.attention
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x0, _, _ = texts()
    before = model(x0)[..., :256]
    for j in range(8):
        changed = x0.clone()
        changed[1, j] += 1
        moved = (model(changed)[..., :256] - before).abs().amax(-1)  # (B, T)
        assert moved[[0, 2]].max() == 0
        assert moved[1].min() > 1e-5, j
    assert model.read(x0, x0).equal(F.pad(x0, (1, 0), value=model.config.mask_id))


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_causal_model_opens_into_a_canvas_that_reads_by_a_shift(network):
    """Position i reads token i - 1, the last token stands at position T, and each predicts its own."""
    causal = tiny_model(V=5, T=8, **CAUSAL, **network)
    config, fields = causal.config, attention_fields(Attention("shifted"), MASK, causal.config)
    opened = type(causal)(type(config)(**{**vars(config), **fields})).eval()
    opened.load_state_dict(causal.state_dict())
    T = opened.config.context  # one less than before in a table of positions
    plain = type(causal)(type(config)(**{**vars(opened.config), "shift_id": None, "context": T + 1})).eval()
    plain.load_state_dict(causal.state_dict())
    x0, xt, holes = (tensor[:, :T] for tensor in texts())
    read = F.pad(xt, (1, 0), value=MASK)
    torch.testing.assert_close(opened(xt), plain(read)[:, :T])
    weights = torch.full(x0.shape, 1 / holes.sum().item())
    nats = F.cross_entropy(plain(read)[:, :T][holes], x0[holes])
    assert loss_of(opened, x0, xt, holes, weights).sum().item() == pytest.approx(nats.item(), abs=1e-5)
