"""A GPT that drafts writes what it would append, letter for letter, and nothing leaks."""

import itertools

import pytest
import torch
from toys import CAUSAL, MASK, NETWORKS, chi_square_p, texts, tiny_model
from world import SMALL, run_train

from data.lib.ahead import Ahead, gumbel_noise
from model import Drafter, load_checkpoint, who_sees
from sample import denoise, draw_with_noise, log_likelihood, weigh
from train import loss_of, loss_with_drafts, nelbo


def drafter(K=3, T=8, **config):
    return tiny_model(V=5, T=T, **CAUSAL, draft_len=K, draft_rank=K, **config)


def written(model, canvas, **options):
    *_, canvas = denoise(model, canvas, **options)
    return canvas


@torch.no_grad()
def slowly(model, canvas, seeds, temperature, top_k, top_p):
    """Append one token at a time by whole passes without a cache, each row alone, with the same noise."""
    canvas, (W, V) = canvas.clone(), (model.config.context, model.config.vocab_size)
    for row, seed in zip(canvas, seeds):
        for i in (row == MASK).nonzero().flatten().tolist():
            jump = max(1, W // 4)
            left = max(0, -((W - (i + 1)) // jump) * jump)
            logits = model(row[None, left : i + 1])[0, -1:]
            logits[:, [MASK, *model.config.special_ids]] = -torch.inf
            noise = gumbel_noise([seed], 0, V)(torch.tensor([[i]]))[0]
            row[i] = draw_with_noise(logits, noise, temperature, top_k, top_p)
    return canvas


@pytest.mark.parametrize("T", [6, 8, 21])  # shorter than the context, as long, and longer, so that windows slide
@pytest.mark.parametrize("K", [1, 2, 5, 11])
@pytest.mark.parametrize("name", NETWORKS)
def test_drafting_writes_what_appending_writes(name, K, T, device):
    model = drafter(K, **NETWORKS[name]).to(device)
    x0, canvas, _ = texts(B=6, T=T, seed=K)
    canvas[0, : T // 2] = x0[0, : T // 2]  # prompts of several lengths, with holes between
    canvas[1] = MASK
    canvas[2] = x0[2]  # nothing to write
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.8), (0.0, 0, 1.0)):
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        expected = slowly(model, canvas.to(device), range(6), **how)
        for draft_len in (None, 1, 4):
            assert written(model, canvas.to(device), draft_len=draft_len, **how).equal(expected)
        assert written(model, canvas.to(device), order="left", **how).equal(expected)
        alone = written(model, canvas[3:4].to(device), seeds=[3], **how)
        assert alone.equal(expected[3:4])


def test_a_pass_keeps_one_token_at_least_and_all_of_a_sure_draft():
    """A network that ignores what it reads drafts what it appends, so each pass keeps K + 1 tokens."""
    model = drafter(3, T=16)
    for layer in model.layers:
        for p in layer.parameters():
            torch.nn.init.zeros_(p)
    for p in model.drafter.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.ones_(model.token_embedding.weight)
    passes = list(denoise(model, torch.full((1, 16), MASK)))
    assert len(passes) == 1 + 15 // 4 + 1  # the first pass has no drafts to verify
    assert len(list(denoise(model, torch.full((1, 16), MASK), order="left"))) == 16


def test_a_canvas_without_holes_is_yielded_once():
    x0 = texts(B=2)[0]
    assert [canvas.equal(x0) for canvas in denoise(drafter(), x0)] == [True]


@pytest.mark.parametrize("order", ["left", "draft"])
def test_prompts_of_very_different_lengths_are_continued_as_if_alone(order):
    model, canvas = drafter(3, T=64), texts(B=2, T=81)[0]
    canvas[0, 80], canvas[1, 63:] = MASK, MASK  # the first one's window has moved, so it has fewer tokens to read
    together = written(model, canvas, order=order)
    for i in range(2):
        assert together[i].equal(written(model, canvas[i : i + 1], order=order, seeds=[i])[0])


def test_drafts_are_reported_until_they_are_certain():
    model, start = drafter(3, T=16), torch.full((2, 16), MASK)
    start[0, 9] = 2
    drafts = torch.zeros(2, 16, dtype=torch.bool)
    final = written(model, start)
    for canvas in denoise(model, start, drafts=drafts):
        assert not drafts[start != MASK].any()
        certain = (canvas != MASK) & ~drafts
        assert canvas[certain].equal(final[certain])
        assert (certain.int().diff(dim=1)[start[:, 1:] == MASK] <= 0).all()  # from left to right
    assert not drafts.any()


def test_what_is_appended_follows_the_distribution():
    model, n = tiny_model(V=3, T=3, **{**CAUSAL, "shift_id": 3}), 6000
    x = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        log_p = model(x)[..., :3].log_softmax(-1).gather(2, x[..., None]).sum((1, 2))
    written_texts = written(model, torch.full((n, 3), 3), seeds=range(n))
    counts = (written_texts * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert chi_square_p(counts, log_p.exp().double()) > 1e-3


def test_the_noise_depends_on_the_seed_and_the_place_alone():
    places = torch.tensor([[4, 5], [0, 4]])
    noise = gumbel_noise([7, 9], 2, 6)(places)
    assert gumbel_noise([9], 0, 6)(torch.tensor([[4]]))[0, 0].equal(noise[1, 1])
    assert gumbel_noise([7], 5, 6)(torch.tensor([[1, 4]]))[0, 1].equal(noise[0, 0])
    assert not noise[0, 0].equal(noise[1, 1])
    assert not noise[0, 0].equal(noise[0, 1])


def test_gumbel_noise_draws_from_the_transformed_distribution():
    logits, n = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]]), 20_000
    noise = torch.cat([gumbel_noise([seed], 0, 5)(torch.tensor([[0]]))[0] for seed in range(n)])
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.7)):
        tokens = draw_with_noise(logits.expand(n, -1), noise, 0.8, top_k, top_p)
        weights, ids = weigh(logits, 0.8, top_k, top_p)
        expected = torch.zeros(5).scatter(0, torch.arange(5) if ids is None else ids[0], weights[0])
        counts = tokens.bincount(minlength=5)
        assert counts[expected == 0].sum() == 0
        kept = expected > 0
        assert chi_square_p(counts[kept], expected[kept].double() / expected.sum()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_no_draft_sees_its_anchor_or_later_and_no_clean_position_sees_a_mask(name):
    """A draft of the group from s on sees the tokens up to s - 2, and the last few. A GPT sees no mask."""
    K, T, first = 6, 13, 1
    model = drafter(K, T=T, **NETWORKS[name])
    x0 = texts(B=1, T=T)[0]
    where = torch.ones(1, T, dtype=torch.bool).nonzero(as_tuple=True)
    append, draft = model(x0, where=where, clean=x0, drafts_from=first)
    torch.testing.assert_close(append, model(x0)[0])  # as without drafts
    for j in range(T):
        changed = x0.clone()
        changed[0, j] = (x0[0, j] + 1) % 5
        _, moved = model(changed, where=where, clean=changed, drafts_from=first)
        moved = (moved - draft)[:, :5].abs().amax(1) > 1e-6
        for i in range(first, T):
            s = first + (i - first) // K * K
            assert moved[i] == (j <= s - 2 or i - Drafter.LOOK <= j < i), (i, j)


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_writing_drafts_from_the_same_logits_as_training(name, kept):
    K, T, end = 3, 13, 4
    model, x0 = drafter(K, T=T, **NETWORKS[name]), texts(B=2, T=T)[0]
    ahead, text = Ahead(model, 2, T, K, n=3), torch.nn.functional.pad(x0, (0, 2 * K))
    ahead.look(text, torch.tensor([end, end]))
    for i, guess in enumerate(ahead.guesses(torch.tensor([kept - 1, kept - 1]))):
        place = torch.tensor([end + kept + i] * 2)
        _, draft = model(x0, where=([0, 1], place), clean=x0, drafts_from=(end + kept) % K)
        torch.testing.assert_close(guess(text, place[:, None])[:, 0, :5], draft[:, :5])


def test_one_rule_says_who_sees_whom_in_blocks_drafts_and_gpts():
    starts = torch.tensor([0, 0, 2, 2])
    blocks = who_sees(2, 2, starts).int().tolist()  # the text is read twice; K = 2
    drafts = who_sees(4, 1, starts).int().tolist()
    assert blocks == [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0]] * 2 + [[1, 1, 0, 0, 1, 1]] * 2
    gpt = torch.ones(4, 4).tril().int()
    assert drafts[:4] == torch.cat((gpt, torch.zeros(4, 4).int()), 1).tolist()
    assert drafts[4:] == [[0, 0, 0, 0, 1, 1, 0, 0]] * 2 + [[1, 1, 0, 0, 0, 0, 1, 1]] * 2
    assert who_sees(4, 1, starts[:0]).int().equal(gpt)


def test_the_loss_is_the_mean_of_both_halves():
    model, x0 = drafter(3, T=12), texts(B=4, T=12)[0]
    where = torch.ones(4, 12, dtype=torch.bool).nonzero(as_tuple=True)
    weights = torch.full((4, 12), 1 / 48)
    first = 2
    _, draft = model(x0, where=where, clean=x0, drafts_from=first)
    n = (12 - first) // 3 * 3
    nats = torch.nn.functional.cross_entropy(
        draft.view(4, 12, -1)[:, first : first + n].flatten(0, 1), x0[:, first : first + n].flatten()
    )
    both = loss_with_drafts(model, x0, torch.full_like(x0, MASK), where, weights, 3, first).sum()
    append = loss_of(model, x0, torch.full_like(x0, MASK), where, weights).sum()
    torch.testing.assert_close(both, (append + nats) / 2)


def test_the_drafts_of_a_frozen_gpt_learn_its_distribution():
    """The drafts' loss is a cross-entropy with the GPT's distribution, not with the true tokens."""
    model, (x0, *_) = drafter(4), texts(B=4)
    where = torch.ones_like(x0, dtype=torch.bool).nonzero(as_tuple=True)
    weights = torch.full((4, 8), 1 / 32)
    append, draft = model(x0, where=where, clean=x0, drafts_from=0)
    p, log_q = append.softmax(-1)[:, :MASK].detach(), draft.log_softmax(-1)[:, :MASK]
    nats = -append.log_softmax(-1).gather(1, x0.view(-1, 1)).squeeze(1).detach() - (p * log_q).sum(1)
    loss = loss_with_drafts(model, x0, torch.full_like(x0, MASK), where, weights, 4, 0, frozen=True)
    torch.testing.assert_close(loss, nats.view(4, 8).sum(1) / 64)
    expected = torch.autograd.grad(nats.sum() / 64, model.drafter.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss.sum(), model.drafter.parameters()), expected):
        torch.testing.assert_close(ours, theirs)


def test_bound_and_likelihood_are_those_of_the_gpt():
    model, x0 = drafter(3), texts(B=4)[0]
    gpt = tiny_model(V=5, T=8, **CAUSAL)
    gpt.load_state_dict({name: x for name, x in model.state_dict().items() if "drafter" not in name})
    assert nelbo(model, x0) == nelbo(gpt, x0)
    assert log_likelihood(model, x0.flatten()) == log_likelihood(gpt, x0.flatten())
    assert nelbo(model, x0) == pytest.approx(-log_likelihood(model, x0.flatten()) / x0.numel(), rel=1e-5)


@torch.no_grad()
def test_a_known_text_is_a_draft_that_is_verified_many_tokens_at_a_time(device):
    model, x0 = drafter(3, T=8).to(device), texts(B=3, T=21)[0]
    log_p, canvas = torch.zeros(3, 21), torch.full((3, 21), MASK)
    canvas[1, :10] = x0[1, :10]  # a prompt
    passes = list(denoise(model, canvas.to(device), text=x0, log_p=log_p))
    assert passes[-1].cpu().equal(x0)
    assert len(passes) == 1 + -(-(21 - 8) // 2)  # the context, and then two tokens each time that the window moves
    for row, i in (canvas == MASK).nonzero().tolist():
        left = max(0, -((8 - (i + 1)) // 2) * 2)
        logits = model(x0[row : row + 1, left : i + 1].to(device))[0, -1].cpu()
        torch.testing.assert_close(log_p[row, i], logits.log_softmax(-1)[x0[row, i]])
    assert not log_p[1, :10].any()


def test_a_gpt_learns_to_draft_and_stays_as_it_was(in_world, monkeypatch, tmp_path):
    flags = f"--data book --init_from gpt/ckpt.pt --attention draft:4 --freeze --out_dir {tmp_path}/d"
    run_train(monkeypatch, f"{flags} --max_iters 6 --evals 2 {SMALL.replace('0:8', '0')}")
    before, _, _ = load_checkpoint("gpt/ckpt.pt")
    after, _, checkpoint = load_checkpoint(tmp_path / "d" / "ckpt.pt")
    assert checkpoint["step"] == 6  # the bound is the same all the time
    theirs = after.state_dict()
    assert all(x.equal(theirs[name]) for name, x in before.state_dict().items())
    canvas = torch.full((2, 40), before.config.mask_id)
    assert written(before, canvas).equal(written(after, canvas))
    assert all(x.any() for name, x in theirs.items() if name.startswith("drafter."))
    frozen = f"--data book --init_from {tmp_path}/d/ckpt.pt --out_dir {tmp_path}/b --max_iters 1 --evals 1"
    run_train(monkeypatch, f"{frozen} --attention block:8")  # a model that doesn't draft has no adapters
    assert load_checkpoint(tmp_path / "b" / "ckpt.pt")[0].config.draft_rank == 0


@pytest.mark.slow
def test_a_trained_model_drafts_10_000_tokens_of_append_in_fewer_passes(in_world, monkeypatch, tmp_path):
    shape = SMALL.replace("0:8", "0").replace("--n_layer 1", "--n_layer 2").replace("--n_embd 16", "--n_embd 48")
    run_train(
        monkeypatch,
        f"--data book --attention draft:4 --out_dir {tmp_path} --max_iters 300 --evals 1 {shape} --batch_size 16",
    )
    model, _, _ = load_checkpoint(tmp_path / "ckpt.pt")
    start = torch.full((4, 2_500), model.config.mask_id)  # contexts slide about three hundred times
    passes = list(denoise(model, start, temperature=0.8))
    assert passes[-1].equal(written(model, start, order="left", temperature=0.8))
    assert len(passes) < 2_000
