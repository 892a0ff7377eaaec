"""What `python sample.py` prints: texts, summaries, scores and judgements."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from world import mistake, sample_text

import data.lib.corpus
import data.lib.report
import data.lib.training
import sample
import train
from data.lib.checkpoint import byte_sum, tensors
from data.lib.errors import Mistake
from data.lib.sampling import nats_per_byte
from model import Transformer, load_checkpoint

pytestmark = pytest.mark.usefixtures("in_world")


def store(checkpoint, path):
    """Write the dict of a checkpoint as it is, with the sums that belong to its tensors."""
    sums = [byte_sum(tensor) for tensor in tensors({**checkpoint, "sums": []})]
    torch.save({**checkpoint, "sums": sums}, path)


def test_prompts_of_every_kind_in_one_batch_are_written_as_alone(tmp_path, monkeypatch, capsys):
    """Two flags, a file and stdin; holes and a suffix; longer than the model's 32 tokens, and not."""
    (tmp_path / "prompt.txt").write_text("the <mask*3> of\n")
    prompts = ["line 1<mask*20>", "<mask*50> book", "line <mask*3> of"]
    flags = ["--suffix", "!\n", "--steps", 4, "--dtype", "float32"]
    alone = [sample_text(["--prompt", prompt, *flags], monkeypatch, capsys).out for prompt in prompts]
    alone.append(sample_text(["--prompt_file", tmp_path / "prompt.txt", *flags], monkeypatch, capsys).out)
    stdin = SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"<mask*4>"))
    monkeypatch.setattr(sys, "stdin", stdin)
    alone.append(sample_text(["--prompt_file", "-", *flags], monkeypatch, capsys).out)
    files = ["--prompt_file", tmp_path / "prompt.txt", "-"]
    together = sample_text(["--prompt", *prompts, *files, *flags], monkeypatch, capsys)
    assert together.out == "".join(alone)
    assert all(text.endswith("!\n\n") for text in alone)
    assert [len(text.encode()) for text in alone[:2]] == [29, 58] or "\ufffd" in "".join(alone)


def test_passes_are_reported(monkeypatch, capsys):
    for flags, passes in ((["--steps", 5], 5), (["--prompt", "a<mask*3>"], 3), (["--order", "left"], 32)):
        printed = sample_text(["--length", 32, *flags] if passes != 3 else flags, monkeypatch, capsys)
        assert f" {passes} forward passes" in printed.err


def test_a_long_canvas_takes_no_more_memory(monkeypatch, capsys):
    """Nothing that the model sees or says is larger at 4,000 tokens than at 64."""
    largest = {}
    forward = Transformer.forward

    def watched(self, idx, where=None, **more):
        logits = forward(self, idx, where, **more)
        largest["size"] = max(largest.get("size", 0), idx.numel(), logits.numel())
        return logits

    monkeypatch.setattr(Transformer, "forward", watched)
    sizes = []
    for length in (64, 4000):
        largest.clear()
        printed = sample_text(["--length", length, "--steps", length // 4], monkeypatch, capsys)
        assert len(printed.out.encode()) >= length
        sizes.append(largest["size"])
    assert sizes[1] <= sizes[0]


def test_score_prints_the_likelihood_of_the_sampler(tmp_path, monkeypatch, capsys):
    """From the left, one token a step: the chain rule, in two windows, of which the second is short."""
    text = "line 7 of the book\nline 8 of the book\n"
    (tmp_path / "text.txt").write_text(text)
    flags = ["--score", tmp_path / "text.txt", "--order", "left", "--steps", 32, "--dtype", "float32"]
    printed = sample_text(flags, monkeypatch, capsys).out
    model, tokenizer, _ = load_checkpoint("out/ckpt.pt")
    nats = 0.0
    for window in torch.tensor(tokenizer.encode(text)).split(32):
        for i in range(len(window)):
            xt = window.clone()
            xt[i:] = tokenizer.mask_id
            nats -= model(xt[None])[0, i].log_softmax(-1)[window[i]].item() / len(text)
    assert float(printed.split()[0]) == pytest.approx(nats, abs=2e-4)
    assert float(printed.split()[4]) == pytest.approx(nats / np.log(2), abs=2e-4)
    assert f"{len(text)} tokens" in printed


def test_sampling_repeats_itself_and_stdout_is_text_alone(world, monkeypatch, capsys):
    outputs = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sys, "argv", f"sample.py --prompt line --length 30 --seed {seed}".split())
        sample.main()
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("line")


def test_two_models_write_the_same_prompt_one_after_the_other(world, monkeypatch, capsys):
    flags = ["--prompt", "line 1", "the", "--length", 20, "--dtype", "float32"]
    alone = [sample_text(["--ckpt", f"{name}/ckpt.pt", *flags], monkeypatch, capsys) for name in ("gpt", "out")]
    judged = ["--judge", "gpt/ckpt.pt"]
    both = sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", *judged, *flags], monkeypatch, capsys)
    assert both.out == "".join(each.out for each in alone)
    for name in ("gpt", "out"):
        line = next(line for line in both.err.splitlines() if f"{name}/ckpt.pt: 31 tokens in " in line)
        assert re.search(r"tokens/s, 17 forward passes; under gpt/ckpt.pt [\d.]+, [\d.]+ nats per byte", line)


def test_the_judge_says_how_likely_each_text_is(world, monkeypatch, capsys):
    flags = ["--prompt", "line 1", "--length", 20, "--dtype", "float32"]
    model, tokenizer, _ = load_checkpoint("gpt/ckpt.pt")
    both = ["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", "--judge", "gpt/ckpt.pt"]
    said = sample_text([*both, *flags], monkeypatch, capsys).err
    nats = []
    for name in ("gpt", "out"):
        alone = sample_text(["--ckpt", f"{name}/ckpt.pt", *flags], monkeypatch, capsys).out
        nats.append(nats_per_byte(model, tokenizer, alone.removesuffix("\n"), sample.log_likelihood))
    judged = re.findall(r"under gpt/ckpt.pt ([\d.]+) nats", said)
    assert list(map(float, judged)) == pytest.approx(nats, abs=1e-3)
    text = "line 3 of the book\nand more than one window of it\n"
    ids = torch.tensor(tokenizer.encode(text))
    whole = len(ids) // 32 * 32
    nats = float(train.nelbo(model, ids[None, :whole])) * whole
    nats += float(train.nelbo(model, ids[None, whole:])) * (len(ids) - whole)
    assert nats_per_byte(model, tokenizer, text, sample.log_likelihood) == pytest.approx(nats / len(text), abs=1e-4)


@pytest.mark.parametrize("ending", ["html", "svg"])
def test_two_models_are_saved_side_by_side(ending, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"run.{ending}"
    sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", "--length", 9, "--save", path], monkeypatch, capsys)
    written = path.read_text()
    assert "gpt/ckpt.pt" in written
    assert "out/ckpt.pt" in written


def test_a_flag_that_one_of_two_models_can_follow_is_for_that_one(monkeypatch, capsys):
    flags = ["--prompt", "line 1", "--order", "confidence", "--steps", 3, "--length", 20]
    alone = sample_text(["--ckpt", "out/ckpt.pt", *flags], monkeypatch, capsys)
    both = sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", *flags], monkeypatch, capsys)
    assert both.out.endswith(alone.out)
    assert " 14 forward passes" in both.err
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
        alone += sample_text([*flags, "--order", order, *steps], monkeypatch, capsys).out
    page = tmp_path / "gallery.html"
    flags += ["--order", *orders, "--steps", 5, "--save", page]
    together = sample_text(flags, monkeypatch, capsys)
    assert together.out == alone
    for order in orders:
        assert f"{order}: 31 tokens in" in together.err
    runs = json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page.read_text())[1])
    assert [[side["name"] for side in run] for run in runs] == [orders] * 2
    both = sample_text(["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", *flags], monkeypatch, capsys).err
    for name in ("gpt/ckpt.pt, left", *(f"out/ckpt.pt, {order}" for order in orders)):
        assert f"{name}: 31 tokens in" in both


def test_without_a_checkpoint_sample_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.lib.sample_settings, "SHIPPED", tmp_path / "none.pt")
    assert "python train.py" in mistake(sample.main, [], monkeypatch, capsys)


def test_sample_takes_ones_own_checkpoint_or_else_the_one_that_is_there(world, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "data" / "shipped.pt"
    shipped.parent.mkdir()
    shipped.write_bytes((world / "blocks" / "ckpt.pt").read_bytes())
    monkeypatch.setattr(data.lib.sample_settings, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert "data/shipped.pt: 32 tokens in" in sample_text([], monkeypatch, capsys).err
    monkeypatch.chdir(world)
    assert "out/ckpt.pt: 32 tokens in" in sample_text([], monkeypatch, capsys).err


def test_logits_that_are_not_finite_are_said(world, tmp_path, monkeypatch):
    stored = torch.load(world / "out" / "ckpt.pt", weights_only=True)
    for name, tensor in stored["model"].items():
        tensor *= 1e36 if name.startswith("layers") else 1  # finite still, but for their products
    store(stored, tmp_path / "large.pt")
    for flags in ("", "--top_p 0.9", "--top_k 3", "--temperature 0"):
        flags = f"sample.py --ckpt {tmp_path}/large.pt --dtype float32 {flags}".split()
        monkeypatch.setattr(sys, "argv", flags)
        with pytest.raises(Mistake, match="logits are not finite"):
            sample.main()
