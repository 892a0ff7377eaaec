"""What `python sample.py` prints for several models and orders, and which checkpoint it takes."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from world import sample_text

import data.lib.session
import sample
import train
from data.lib.checkpoint import save_checkpoint
from data.lib.errors import Mistake
from data.lib.tokenizer import ByteTokenizer
from model import ModelConfig, Transformer, load_checkpoint

pytestmark = pytest.mark.usefixtures("in_world")


def test_passes_are_reported(monkeypatch, capsys):
    for flags, passes in ((["--steps", 5], 5), (["--prompt", "a<mask*3>"], 3), (["--order", "left"], 32)):
        printed = sample_text(["--length", 32, *flags] if passes != 3 else flags, monkeypatch, capsys)
        assert f" {passes} forward passes" in printed.err


def test_the_last_line_breaks_between_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    printed = sample_text(["--ckpt", "out/ckpt.pt", "--length", 32, "--steps", 5], monkeypatch, capsys).err
    last = printed[printed.index("out/ckpt.pt: 32 tokens") :].splitlines()
    assert len(last) > 1
    assert max(map(len, last)) <= 40
    assert " ".join(last).endswith(" tokens/s, 5 forward passes")


def test_sampling_repeats_itself_and_stdout_is_the_text(world, monkeypatch, capsys):
    outputs = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sys, "argv", f"sample.py --prompt line --length 30 --seed {seed}".split())
        sample.main()
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("line")


@pytest.mark.parametrize("order", ["left", "draft"])
def test_a_gpt_stops_when_all_its_texts_have_ended(order, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    ends = tuple(range(64, 80))  # so that about one token in sixteen ends a text
    model = Transformer(
        ModelConfig(n_embd=16, n_layer=1, context=256, block=1, shift_id=256, draft_len=2, end_ids=ends)
    )
    for p in model.parameters():
        torch.nn.init.normal_(p)  # so that the drafter and the GPT disagree
    save_checkpoint(tmp_path / "gpt.pt", model.eval(), ByteTokenizer())
    flags = f"--ckpt {tmp_path / 'gpt.pt'} --order {order} --temperature 1 --dtype float32".split()
    for seeds in ((0, 1, 2), *((seed,) for seed in range(3, 9))):
        more = ["--seed", seeds[0], "--num_samples", len(seeds)]
        printed = sample_text([*flags, *more], monkeypatch, capsys)
        start = torch.full((len(seeds), 256), 256)
        *_, whole = sample.denoise(model, start, order="left", temperature=1, seeds=seeds)
        lengths = [next(i for i, token in enumerate(ids) if token in ends) for ids in whole.tolist()]
        texts = [ByteTokenizer().decode(ids[:n]) for ids, n in zip(whole.tolist(), lengths)]
        assert re.sub(r"--- \d of 3\n", "", printed.out) == "".join(f"{text}\n" for text in texts)
        passes = int(re.search(r"(\d+) forward passes", printed.err)[1])
        assert passes == max(lengths) + 1 if order == "left" else passes <= max(lengths) + 1


def test_two_models_write_the_same_prompt_one_after_the_other_by_their_names(world, monkeypatch, capsys):
    flags = ["--prompt", "line 1", "the", "--length", 20, "--dtype", "float32"]
    alone = [sample_text(["--ckpt", f"{name}/ckpt.pt", *flags], monkeypatch, capsys) for name in ("gpt", "out")]
    judged = ["--judge", "gpt/ckpt.pt"]
    both = sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", *judged, *flags], monkeypatch, capsys)
    named = [each.out.replace("--- ", f"--- {name}/ckpt.pt, ") for name, each in zip(("gpt", "out"), alone)]
    assert both.out == "".join(named)
    assert both.out.startswith("--- gpt/ckpt.pt, 1 of 2\nline 1")
    for name, passes in (("gpt", 18), ("out", 17)):  # a GPT reads its prompts first, in a pass of their own
        line = next(line for line in both.err.splitlines() if f"{name}/ckpt.pt: 31 tokens in " in line)
        assert re.search(rf"tokens/s, {passes} forward passes; under gpt/ckpt.pt [\d.]+, [\d.]+ nats per byte", line)


def test_a_flag_that_one_of_two_models_can_follow_is_for_that_one(monkeypatch, capsys):
    flags = ["--prompt", "line 1", "--order", "confidence", "--steps", 3, "--length", 20]
    alone = sample_text(["--ckpt", "out/ckpt.pt", *flags], monkeypatch, capsys)
    both = sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", *flags], monkeypatch, capsys)
    assert both.out.endswith(alone.out)
    assert " 15 forward passes" in both.err  # the prompt, and 14 tokens
    assert " 3 forward passes" in both.err


def test_several_orders_write_what_each_writes_alone(tmp_path, monkeypatch, capsys):
    """One after the other, each by its name, and side by side in what is saved."""
    flags, orders = (
        ["--prompt", "line 1", "the", "--length", 20, "--dtype", "float32"],
        ["left", "threshold", "remask"],
    )
    alone = ""
    for order in orders:
        steps = [] if order == "threshold" else ["--steps", 5]
        text = sample_text([*flags, "--order", order, *steps], monkeypatch, capsys).out
        alone += text.replace("--- ", f"--- {order}, ")
    page = tmp_path / "gallery.html"
    flags += ["--order", *orders, "--steps", 5, "--save", page]
    together = sample_text(flags, monkeypatch, capsys)
    assert together.out == alone
    for order in orders:
        assert f"{order}: 31 tokens in" in together.err
    runs = json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page.read_text())[1])["texts"]
    assert [[side["name"] for side in run] for run in runs] == [orders] * 2
    both = sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", "--overwrite", *flags], monkeypatch, capsys).err
    for name in ("gpt/ckpt.pt, left", *(f"out/ckpt.pt, {order}" for order in orders)):
        assert f"{name}: 31 tokens in" in both


def test_without_ckpt_the_included_model_writes_whatever_one_has_trained(tmp_path, monkeypatch, capsys):
    """There is a model in out/, too, where train.py writes by default."""
    shipped = tmp_path / "data" / "shipped.pt"
    shipped.parent.mkdir()
    shutil.copy("blocks/ckpt.pt", shipped)
    monkeypatch.setattr(data.lib.session, "SHIPPED", shipped)
    said = sample_text([], monkeypatch, capsys).err
    assert "data/shipped.pt: 32 tokens in" in said
    assert said.endswith("\nthis was the included model; --ckpt out/ckpt.pt takes the one that you trained\n")
    assert Path("out/ckpt.pt").exists()
    said = sample_text(["--ckpt", "out/ckpt.pt"], monkeypatch, capsys).err
    assert "out/ckpt.pt: 32 tokens in" in said
    assert "included" not in said


def test_in_a_race_the_next_step_is_of_the_model_that_has_taken_the_least_time(tmp_path, monkeypatch, capsys):
    """A step of append takes one second by the test's clock, a step of draft two, and one of set five."""
    model = Transformer(ModelConfig(n_embd=16, n_layer=1, context=32, block=1, shift_id=256, draft_len=2))
    save_checkpoint(tmp_path / "draft.pt", model, ByteTokenizer())
    clock, turns, panes = [0.0], [], []

    def denoise(model, canvas, order, **flags):
        for _ in range(3):
            clock[0] += {"left": 1, "draft": 2, "random": 5}[order]
            turns.append(order)
            yield canvas

    class Shown:
        def __init__(self, n_panes):
            assert n_panes == 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def show(self, pane, history, n_canvases):
            panes.append((pane, history.name, history.seconds[-1]))

    monkeypatch.setattr(data.lib.session, "SHIPPED_DRAFT", tmp_path / "draft.pt")
    monkeypatch.setattr(data.lib.session, "Watch", Shown)
    monkeypatch.setattr(sample, "denoise", denoise)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = sample_text(["--race"], monkeypatch, capsys).err
    assert turns == ["left", "draft", "random", "left", "left", "draft", "draft", "random", "random"]
    assert panes[:4] == [(0, "append", 1), (1, "draft", 2), (2, "set", 5), (0, "append", 2)]
    assert [line.split(" in ")[:2] for line in said.splitlines() if " tokens in " in line] == [
        ["append: 32 tokens", "3.00 s: 11 tokens/s, 0 forward passes"],
        ["draft: 32 tokens", "6.00 s: 5 tokens/s, 0 forward passes"],
        ["set: 32 tokens", "15.00 s: 2 tokens/s, 0 forward passes"],
    ]
    named = sample_text(["--race", "--ckpt", tmp_path / "draft.pt", "out/ckpt.pt"], monkeypatch, capsys).err
    assert f"{tmp_path}/draft.pt, append: 32" in named
    assert "out/ckpt.pt, set: 32" in named


def test_logits_that_are_not_finite_are_said(tmp_path, monkeypatch):
    model, tokenizer, _ = load_checkpoint("out/ckpt.pt")
    for weight in model.layers.parameters():
        weight.data *= 1e36  # still finite, but their products are not
    save_checkpoint(tmp_path / "large.pt", model, tokenizer)
    for flags in ("", "--top_p 0.9", "--top_k 3", "--temperature 0"):
        monkeypatch.setattr(sys, "argv", f"sample.py --ckpt {tmp_path}/large.pt --dtype float32 {flags}".split())
        with pytest.raises(Mistake, match="logits are not finite"):
            sample.main()


def test_a_file_is_not_replaced_unless_one_says_so(tmp_path, monkeypatch, capsys):
    page = tmp_path / "run.html"
    sample_text(["--save", page, "--prompt", "one <mask>"], monkeypatch, capsys)
    before = page.read_bytes()
    with pytest.raises(Mistake, match="that file exists; --overwrite replaces it"):
        sample_text(["--save", page, "--prompt", "two <mask>"], monkeypatch, capsys)
    assert page.read_bytes() == before
    sample_text(["--save", page, "--prompt", "two <mask>", "--overwrite"], monkeypatch, capsys)
    assert page.read_bytes() != before


def test_a_score_needs_no_other_flag_and_its_file_is_looked_for_first(tmp_path, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_text("line 1 of a book")
    alone = sample_text(["--score", path], monkeypatch, capsys).out
    assert alone == sample_text(["--score", path, "--order", "confidence"], monkeypatch, capsys).out
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        sample_text(["--score", tmp_path / "none.txt", "--ckpt", "none.pt"], monkeypatch, capsys)


def test_ctrl_c_says_how_far_it_was(monkeypatch, capsys):
    denoise = sample.denoise

    def interrupted(*args, **flags):
        yield from list(denoise(*args, **flags))[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "denoise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_text(["--steps", 5], monkeypatch, capsys)
    assert "out/ckpt.pt: stopped after 5 forward passes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["Hello", "you"], 'did you mean --prompt "Hello"?'),
        (["--promt", "x"], "did you mean --prompt?"),
        (["--temprature=1"], "did you mean --temperature?"),
        (["--xyz"], "--help lists every flag"),
        ([""], "--help lists every flag"),
        (["--order", "unrecognized"], "--help lists every flag"),
    ],
)
def test_an_unknown_flag_suggests_the_nearest(flags, hint, monkeypatch, capsys):
    with pytest.raises(Mistake) as mistake:
        sample_text(flags, monkeypatch, capsys)
    assert str(mistake.value).endswith(f"({hint})")


def test_help_has_the_examples_first_and_the_flags_in_groups(monkeypatch, capsys):
    for script, titles in ((sample, sample.SampleConfig.groups), (train, train.TrainConfig.groups)):
        monkeypatch.setattr(sys, "argv", ["x", "--help"])
        with pytest.raises(SystemExit):
            script.main()
        text = capsys.readouterr().out
        places = [text.index(part) for part in ("    python ", *(f"\n{title}:\n" for title in titles.values()))]
        assert places == sorted(places)


def test_remask_says_if_the_model_has_not_learned_visible_tokens(tmp_path, monkeypatch, capsys):
    model, tokenizer, checkpoint = load_checkpoint("out/ckpt.pt")
    save_checkpoint(tmp_path / "visible.pt", model, tokenizer, train={**checkpoint["train"], "visible": 0.1})
    for path, says in (("out/ckpt.pt", True), (tmp_path / "visible.pt", False)):
        said = sample_text(["--ckpt", path, "--order", "remask", "--steps", 3], monkeypatch, capsys).err
        assert ("--order remask: the model in out/ckpt.pt was trained without --visible" in said) == says
