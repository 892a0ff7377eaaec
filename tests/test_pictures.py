"""Text and pictures on one canvas: where the place of a token says what it is."""

import csv
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from digits_world import SMALL, TOKENIZER
from world import assert_same, run_train, sample_text

import data.digits.prepare as digits
import data.lib.corpus
import data.text.prepare
import sample
import train
from data.lib.checkpoint import read_checkpoint
from data.lib.corpus import Examples
from data.lib.errors import Mistake
from data.lib.flags import Level, Span
from data.lib.history import HOLE, History
from data.lib.layout import as_shown, half_blocks
from data.lib.noise import random_tokens
from data.lib.prompt import make_canvas
from data.lib.terminal import Watch
from data.lib.tokenizer import GREYS, PictureTokenizer
from data.lib.views import save_histories
from model import ModelConfig, Transformer, load_checkpoint
from sample import ORDERS, denoise
from train import TrainConfig, draw_batch, loss_of

CAUSAL = "--attention causal"
T = 10
CANVASES = np.arange(0, 1000 * T, T)[:, None] * (1, 0)  # where each begins, and no prompt
GPT = {"block": 1, "shift_id": 256}

pytestmark = pytest.mark.usefixtures("in_digits_world")


def make_model(device="cpu", **config):
    """A random model of TOKENIZER's canvas, with opinions about everything."""
    torch.manual_seed(0)
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context": T, "kinds": TOKENIZER.kinds, **config}
    model = Transformer(ModelConfig(TOKENIZER.vocab_size, TOKENIZER.mask_id, **config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model.eval().to(device)


def stands(tokens):
    """Whether each token of canvases (B, T) is of the kind of its place."""
    letters, pixels = tokens[:, :4], tokens[:, 4:]
    return ((letters >= 32) & (letters < 127)).all() and ((pixels >= 257) & (pixels < 262)).all()


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"block": 5}, GPT, {"shift_id": 256}])
def test_the_network_gives_nothing_to_what_may_not_stand_at_a_place(shape, device):
    """And to the rest what it would give without kinds, normalised: in all of a canvas, at holes, and in
    training, where a block is seen in two halves.
    """
    model, plain = make_model(device, **shape), make_model(device, kinds=(), **shape)
    xt = random_tokens(3, T, model.config, torch.Generator().manual_seed(1)).to(device)
    holes = (torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.5).to(device)
    expected = plain(xt.masked_fill(holes, 256)).clone()
    expected[:, :4, :32] = expected[:, :4, 127:] = expected[:, 4:, :257] = -torch.inf
    logits = model(xt.masked_fill(holes, 256))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(model(xt.masked_fill(holes, 256), where=holes), logits[holes])
    halves = model(xt.masked_fill(holes, 256), where=holes, clean=xt)
    assert ((halves > -torch.inf) == (logits[holes] > -torch.inf)).all()


@pytest.mark.parametrize("order", [*ORDERS, "remask"])
def test_no_hole_of_a_picture_is_filled_with_a_letter_whatever_the_order(order, device):
    """At a temperature at which all that may stand there is drawn alike, with guidance and without."""
    model = make_model(device)
    canvas = torch.full((50, T), 256)
    canvas[:, 1], canvas[:, 5] = ord("a"), 257
    for guidance in (0.0, 2.0):
        *_, text = denoise(model, canvas.to(device), 4, order, temperature=1e5, guidance=guidance)
        assert stands(text.cpu())
    assert len(text[:, 4].unique()) == 5  # all greys came


@torch.no_grad()
def test_the_probabilities_of_all_pictures_sum_to_one():
    """Of two pixels, given the rest, as `--score` has them in each order that looks."""
    model, n = make_model(), 5
    texts = torch.tensor(TOKENIZER.canvas("ab", [0] * 6)).repeat(n * n, 1)
    texts[:, 4], texts[:, 8] = 257 + torch.arange(n * n) // n, 257 + torch.arange(n * n) % n
    canvas = texts.clone()
    canvas[:, [4, 8]] = 256
    for order in ("left", "confidence", "margin", "entropy"):
        log_p = torch.zeros(texts.shape)
        *_, _ = denoise(model, canvas, 2, order, text=texts, log_p=log_p)
        assert log_p.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_random_tokens_are_of_their_places_and_of_all_these_alike():
    config = make_model().config
    words = random_tokens(20_000, T, config, torch.Generator().manual_seed(0))
    assert stands(words)
    assert words[:, 0].unique().tolist() == [*range(32, 127)]
    shares = words[:, 4:].flatten().bincount(minlength=262)[257:] / 120_000
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.005)


def test_each_kind_has_a_level_of_its_own_but_in_the_bound():
    """Of 40,000 canvases: any share of a caption is seen beside any share of a picture. With the weight elbo
    a canvas has one level, without which there is no bound.
    """
    model_config, generator = make_model().config, torch.Generator().manual_seed(0)
    split = Examples(random_tokens(1000, T, model_config, generator).flatten().numpy(), CANVASES, 0, T)
    config = TrainConfig(context=T, batch_size=40_000, level=Level("uniform"), prompt_len=Span(0, 0))
    for way, together in (({}, 1 / 5 / 7), ({"weight": "elbo"}, 1 / 11)):
        batch = draw_batch(split, replace(config, **way), generator, model_config)
        letters, pixels = batch[2][:, :4].sum(1), batch[2][:, 4:].sum(1)
        assert ((letters == 0) & (pixels == 0)).float().mean().item() == pytest.approx(together, abs=0.005)
        # The number of holes of a kind is uniform either way, as that of a canvas is.
        assert (letters.bincount() / 40_000).tolist() == pytest.approx([1 / 5] * 5, abs=0.01)
    half = replace(config, one_level=True, level=Level("fixed", 0.5))  # one for all of a batch, if asked for
    letters, pixels = (draw_batch(split, half, generator, model_config)[2][:, i] for i in (0, 4))
    assert (letters & pixels).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_what_is_seen_and_has_a_loss_is_replaced_by_tokens_of_its_place():
    model_config, generator = make_model().config, torch.Generator().manual_seed(0)
    split = Examples(random_tokens(1000, T, model_config, generator).flatten().numpy(), CANVASES, 0, T)
    config = TrainConfig(context=T, batch_size=1000, prompt_len=Span(0, 0), visible=0.5)
    x0, xt, asked, _ = draw_batch(split, config, generator, model_config)
    assert (asked & (xt != 256) & (xt != x0)).float().mean() > 0.05
    assert stands(torch.where(xt == 256, x0, xt))


def canvas_of(prompt, suffix="", tokenizer=TOKENIZER):
    return make_canvas(prompt, suffix, None, tokenizer, tokenizer.canvas_len)


def test_text_goes_to_the_next_place_where_it_may_stand_and_all_else_is_holes():
    holes = [256] * T
    assert canvas_of("") == holes
    assert canvas_of("ab") == [*b"ab", *holes[2:]]
    assert canvas_of("⓪①②") == [*holes[:4], 257, 258, 259, *holes[7:]]  # half a picture, and no caption
    assert canvas_of("a①") == [ord("a"), *holes[1:4], 258, *holes[5:]]
    assert canvas_of("a<mask>b<mask>④") == [ord("a"), 256, ord("b"), 256, 261, *holes[5:]]
    assert canvas_of("<mask*4>\n⓪①②\n③④⓪") == [*holes[:4], 257, 258, 259, 260, 261, 257]
    assert canvas_of("a", suffix="③④⓪") == [ord("a"), *holes[1:7], 260, 261, 257]
    assert canvas_of("P2\n# by hand\n3 2 255\n255 191 128 64 0 254") == [*holes[:4], *range(257, 262), 257]


@pytest.mark.parametrize(
    ("prompt", "suffix", "words"),
    [
        ("abcde", "", "'e' has no place left on the model's canvas"),
        ("①a", "", "'a' has no place"),
        ("⓪⓪⓪⓪⓪⓪⓪", "", "'⓪' has no place"),
        ("<mask*11>", "", "11 tokens with its holes; the canvas has 10"),
        ("a\tb", "", "'\\t' is neither a letter of a caption, in ASCII, nor a pixel, ⓪ to ④"),
        ("é", "", "'é' is neither"),
        ("", "a", "'a' has no place"),
        ("⓪⓪⓪⓪⓪", "⓪⓪", "'⓪' has no place"),
        ("P2 3 2 255 0 0 0 0 0", "", "not plain PGM of 3 x 2 pixels"),
        ("P2 3 2 4 0 0 0 0 0 5", "", "not plain PGM of 3 x 2 pixels"),
        ("P2 3 2 255 0 0 -1 0 0 0", "", "not plain PGM of 3 x 2 pixels"),
    ],
)
def test_what_has_no_place_on_the_canvas_is_refused(prompt, suffix, words):
    with pytest.raises(Mistake, match=re.escape(words)):
        canvas_of(prompt, suffix)


def test_a_caption_that_no_picture_has_is_refused():
    named = PictureTokenizer(4, 3, 2, 5, ["two", "four"])
    for prompt in ("two", "four", "f", "<mask>o<mask>r", "", "two<mask>", "two\n⓪①②\n③④⓪", "⓪"):
        assert len(canvas_of(prompt, tokenizer=named)) == T
    for prompt, name in (("dog", "dog"), ("fo<mask>l", "fo<mask>l"), ("twos", "twos")):
        with pytest.raises(Mistake, match=f"no picture is called '{name}'; there are two, four"):
            canvas_of(prompt, tokenizer=named)


def test_a_canvas_has_all_its_places():
    with pytest.raises(Mistake, match="--length 9: the model's canvas has 10 tokens"):
        make_canvas("", "", 9, TOKENIZER, T)
    for others in (3, 1000):  # beside a model that sees fewer tokens, or more
        assert len(make_canvas("a<mask*2>④", "", None, TOKENIZER, others)) == T


def make_history():
    """Of a canvas whose caption is given, and whose pixels come one by one, one of them twice."""
    canvas, done = canvas_of("ab  "), TOKENIZER.canvas("ab", [0, 1, 2, 3, 4, 0])
    history = History(TOKENIZER, canvas)
    for i in (9, 4, 5, 6, 7, 8):
        canvas = [*canvas[:i], done[i], *canvas[i + 1 :]]
        history.add(canvas, [0.5] * T, i / 10)
        if i == 4:
            canvas = [*canvas[:4], 256, *canvas[5:]]
            history.add(canvas, [0.5] * T, 0.4)
    history.add(done, [0.5] * T, 1.0)
    return history


def test_a_terminal_shows_two_rows_in_a_line_of_half_blocks():
    (line,) = half_blocks(["⓪②·", "④③⓪"], TOKENIZER.pixels)
    cells = [(255, 232), (244, 238), (67, 255)]  # white, black, greys; blue is a hole
    assert line == "".join(f"\x1b[38;5;{a};48;5;{b}m▀" for a, b in cells) + "\x1b[0m"
    assert half_blocks(["⓪", "⓪", "④"], TOKENIZER.pixels)[1] == "\x1b[38;5;232m▀\x1b[0m"  # no row is below
    assert as_shown("a\x1b\n⓪②④\n④③⓪", TOKENIZER).splitlines()[0] == "a␛"


def test_watch_shows_the_picture_while_it_comes(monkeypatch, capsys):
    watch, history = Watch(1), make_history()
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr("os.get_terminal_size", lambda _: (40, 10))
    watch.show(0, history, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "\x1b[Kab  "
    assert lines[1].count("▀") == 3
    assert "100% filled" in lines[2]


def test_a_picture_that_is_taller_than_the_terminal_is_cut(monkeypatch, capsys):
    """What is drawn has to be reached again from below."""
    tall, watch = PictureTokenizer(4, 30, 40, 5), Watch(1)
    history = History(tall, tall.canvas("ab", [0] * 1200))
    history.add(history.canvas, [1.0] * 1204, 1.0)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr("os.get_terminal_size", lambda _: (20, 10))
    watch.show(0, history, 1)
    assert watch.back == "\x1b[9F"
    assert capsys.readouterr().err.count("▀") == 7 * 20


def test_pixels_of_a_wide_picture_are_smaller_in_the_animation(tmp_path):
    wide = PictureTokenizer(4, 60, 2, 5)
    history = History(wide, wide.canvas("ab", [0, 4] * 60))
    history.add(history.canvas, [1.0] * 124, 1.0)
    save_histories(tmp_path / "run.svg", [[history]])
    svg = (tmp_path / "run.svg").read_text()
    width = float(re.search(r'viewBox="0 0 (\d+)', svg)[1])
    ends = [float(x) + float(w) for x, w in re.findall(r'd="M([\d.]+) [\d.]+h([\d.]+)', svg)]
    assert len(ends) >= 120
    assert max(ends) < width


def test_the_page_and_the_animated_picture_have_the_pixels(tmp_path):
    history = make_history()
    save_histories(tmp_path / "run.svg", [[history]])
    svg = (tmp_path / "run.svg").read_text()
    *_, last = re.findall("<g .*?</g>", svg, re.DOTALL)
    rows = re.findall(r'fill="#(..)\1\1" d="M(\d+) (\d+)h(\d+)', last)
    greys = [round(255 - 255 * i / 4) for i in (0, 1, 2, 3, 4, 0)]
    assert [int(grey, 16) for grey, *_ in rows] == greys
    assert [(int(x), int(y)) for _, x, y, _ in rows] == [(12 + 17 * i, 51 + 17 * j) for j in (0, 1) for i in range(3)]
    first = svg[svg.index("<g") :].split("</g>")[0]
    assert re.findall(r'class="pixel" d="M12 (\d+)h(\d+)', first) == [("51", "51"), ("68", "51")]
    save_histories(tmp_path / "run.html", [[history]])
    page = (tmp_path / "run.html").read_text()
    ((run,),) = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["texts"]
    assert run["pixels"] == {"first": 4, "columns": 3, "greys": "⓪①②③④"}
    assert run["start"][4:] == [HOLE] * 6
    assert run["steps"][2] == [[4, None, None]]


def pixels_of(text):
    return "".join(text.splitlines()[1:])


def test_holes_decide_the_task(digits_world, monkeypatch, capsys):
    """A word draws, a picture is named, half of one is completed, nothing invents both; as printed, and read
    again.
    """
    flags = ["--ckpt", digits_world / "out" / "last.pt", "--steps", 4]
    drawn = sample_text([*flags, "--prompt", "three"], monkeypatch, capsys).out
    assert drawn.startswith("three")
    assert [len(line) for line in drawn.splitlines()] == [8] * 9
    assert set(pixels_of(drawn)) <= set(GREYS[:17])
    half = pixels_of(drawn)[:32]
    (digits_world / "half.txt").write_text(half)
    completed = sample_text([*flags, "--prompt_file", digits_world / "half.txt"], monkeypatch, capsys).out
    assert pixels_of(completed)[:32] == half
    (digits_world / "picture.txt").write_text(pixels_of(drawn))
    named = sample_text([*flags, "--prompt_file", digits_world / "picture.txt"], monkeypatch, capsys).out
    assert pixels_of(named) == pixels_of(drawn)
    numbers = " ".join(str(16 - GREYS.index(c)) for c in pixels_of(drawn))
    (digits_world / "picture.pgm").write_text(f"P2 8 8 16 {numbers}\n")
    assert sample_text([*flags, "--prompt_file", digits_world / "picture.pgm"], monkeypatch, capsys).out == named
    suffix = [*flags, "--suffix", half]
    assert pixels_of(sample_text(suffix, monkeypatch, capsys).out)[32:] == half
    assert len(pixels_of(sample_text(flags, monkeypatch, capsys).out)) == 64
    (digits_world / "whole.txt").write_text(f"three   {pixels_of(drawn)}")
    score = ["--ckpt", digits_world / "out" / "last.pt", "--score", digits_world / "whole.txt", "--order", "left"]
    assert "72 tokens" in sample_text(score, monkeypatch, capsys).out


@pytest.mark.parametrize(
    ("more", "prompt_len"),
    [("", "0"), ("--visible 0.1 --prompt_len 3:8", "3:8"), ("--attention block:8", "0"), (CAUSAL, "0")],
)
def test_a_run_on_pictures_needs_no_flags_and_resumes_to_the_bit(more, prompt_len, tmp_path, run):
    """All of a canvas becomes holes, unless one asks for something else."""
    flags = f"{SMALL} {more} --evals 2"
    for folder in ("whole", "resumed"):
        run(*f"{flags} --max_iters 4 --out_dir {tmp_path}/{folder} --keep 2".split(), main=train.main)
    (tmp_path / "resumed" / "step-00000002.pt").replace(tmp_path / "resumed" / "last.pt")
    run(*f"--init_from resume --out_dir {tmp_path}/resumed".split(), main=train.main)
    assert read_checkpoint(tmp_path / "resumed" / "last.pt")["train"]["prompt_len"] == prompt_len
    model, tokenizer, checkpoint = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert (model.config.context, model.config.kinds) == (72, tokenizer.kinds)
    resumed = read_checkpoint(tmp_path / "resumed" / "last.pt")
    assert_same(resumed["model"], checkpoint["model"])
    with open(tmp_path / "whole" / "log.csv") as file:
        assert all(float(row["val_nats_per_token"]) < 5.5 for row in csv.DictReader(file))


def test_mistakes_with_pictures_end_in_a_sentence(digits_world, tmp_path, monkeypatch, mistake):
    out = f"--out_dir {tmp_path}/none"
    words = mistake(*f"{SMALL} --context 64 {out}".split(), main=train.main)
    assert "--context 64: a canvas of --data digits has 72 tokens" in words
    words = mistake(*f"{SMALL} --attention block:7 {out}".split(), main=train.main)
    assert "K must divide --context 72" in words  # and 9 does, which does not divide the default's 256
    run_train(monkeypatch, f"{SMALL} --attention block:9 --max_iters 1 --out_dir {tmp_path}/nine")
    assert not (tmp_path / "none").exists()
    ckpt = digits_world / "out" / "last.pt"
    (digits_world / "data" / "ours").mkdir()
    (digits_world / "data" / "ours" / "prepare.py").touch()
    words = mistake("--name", "ours", main=digits.main)
    assert "this project's own folder" in words
    words = mistake(tmp_path / "text.txt", "--tokenizer", ckpt, main=data.text.prepare.main)
    assert "not of a text" in words
    assert "has no place left" in mistake("--ckpt", ckpt, "--prompt", "thirteenth", main=sample.main)
    assert "--length 64" in mistake("--ckpt", ckpt, "--length", 64, main=sample.main)
    (tmp_path / "word.txt").write_text("three")
    words = mistake("--ckpt", ckpt, "--score", tmp_path / "word.txt", "--order", "left", main=sample.main)
    assert "not a whole canvas" in words


@pytest.mark.parametrize("kinds", [((8, 0, 256),), ((72, 0, 274),), (), ((8, 32, 256), (64, 257, 999))])
def test_a_checkpoint_whose_kinds_are_not_its_tokenizers_is_refused(kinds, digits_world, tmp_path):
    content = torch.load(digits_world / "out" / "last.pt", weights_only=True)
    content["config"]["kinds"] = kinds
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(Mistake):
        load_checkpoint(tmp_path / "odd.pt")


def test_the_bound_counts_captions_and_pixels_alike_under_what_may_stand_there(device):
    """The loss at each hole is that of a softmax over the kind of its place, by another computation."""
    model = make_model(device)
    x0 = random_tokens(2, T, model.config, torch.Generator().manual_seed(0)).to(device)
    holes = torch.ones_like(x0, dtype=torch.bool)
    plain = make_model(device, kinds=())
    logits = plain(x0.masked_fill(holes, 256)).double()
    letters = logits[:, :4, 32:127].log_softmax(-1).gather(2, x0[:, :4, None] - 32)
    pixels = logits[:, 4:, 257:].log_softmax(-1).gather(2, x0[:, 4:, None] - 257)
    expected = -torch.cat((letters, pixels), 1).sum((1, 2))
    loss = loss_of(model, x0, x0.masked_fill(holes, 256), holes, holes.float())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
