"""What `python train.py` does from the first step to the last."""

import csv
import itertools
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from world import (
    SMALL,
    assert_same,
    copy_project,
    mistake,
    run_process,
    run_train,
    sample_text,
    state_of,
    weights,
    windows,
)

import data.lib.corpus
import data.lib.training
import train
from data.lib.errors import Mistake
from data.lib.flags import Rate
from data.lib.machine import autocast
from data.lib.train_settings import attention_of
from model import Transformer, load_checkpoint

pytestmark = pytest.mark.usefixtures("in_world")


def test_what_follows_the_shortest_prompt_chooses_the_checkpoint(tmp_path, monkeypatch, capsys):
    """And with the rate that was trained; it is said which bound that is."""
    flags = "--level uniform --rate slant:1 --prompt_len 4:8"
    run_train(monkeypatch, f"--data book --out_dir {tmp_path} --max_iters 2 {SMALL} {flags}")
    printed = float(
        re.findall(r"validation NELBO \(rate slant:1, after a prompt of 4\) ([\d.]+)", capsys.readouterr().out)[1]
    )
    model, _, checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    with autocast(torch.device("cpu")):
        bound = train.nelbo(model, windows(512), rate=Rate("slant", 1.0), prompt_len=4)
    assert float(checkpoint["best"]) == pytest.approx(bound)
    assert printed == pytest.approx(bound, abs=6e-4)
    assert (checkpoint["train"]["level"], checkpoint["train"]["prompt_len"]) == ("uniform", "4:8")


def test_the_best_of_a_run_stays_the_best_under_another_rate_that_has_no_bound(tmp_path, monkeypatch):
    """A spindle has none, so all are chosen by the bound of uniform rates; a slant's is another."""
    flags = f"--level uniform --rate spindle:0.3 --out_dir {tmp_path}"
    run_train(monkeypatch, f"--data book --max_iters 2 --evals 1 {SMALL} {flags}")
    stored = torch.load(tmp_path / "last.pt", weights_only=True)
    for rate, step in (("spindle:1", 2), ("t", 2), ("slant:1", 4)):
        torch.save({**stored, "best": 0.0}, tmp_path / "last.pt")  # no bound is as low
        run_train(monkeypatch, f"--init_from resume --max_iters 4 --rate {rate} --out_dir {tmp_path}")
        assert load_checkpoint(tmp_path / "ckpt.pt")[2]["step"] == step


def test_eval_only_prints_the_same_number_and_writes_nothing(world, monkeypatch, capsys):
    before = state_of(world)
    numbers = []
    for flags in ("out/ckpt.pt", "out/ckpt.pt --data book", "resume"):  # without --data, what it learned from
        run_train(monkeypatch, f"--eval_only --init_from {flags}")
        numbers.append(capsys.readouterr().out)
    assert numbers[0] == numbers[1] == numbers[2]
    for flags in ("", "--rate slant:1", "--level grid:8", "--prompt_len 4", "--eval_tokens 128"):
        run_train(monkeypatch, f"--eval_only --init_from resume {flags}")
        numbers.append(capsys.readouterr().out)
        nats, error, bits, perplexity = map(float, re.findall(r"\d+\.\d{3,}", numbers[-1]))
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
        assert bits == pytest.approx(nats / math.log(2), rel=1e-3)  # tokens are bytes
        assert 0 < error < nats
    assert len(set(numbers)) == 5
    assert state_of(world) == before


def test_python_corpus_is_made_when_it_is_missing(tmp_path):
    """In a copy of the project: a fresh clone has no corpus."""
    copy_project(tmp_path)
    result = run_process("train.py", "--max_iters", 1, *SMALL.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data/python is not there yet" in result.stdout
    assert load_checkpoint(tmp_path / "out/ckpt.pt")[0].config.vocab_size == 8193  # byte pairs and <mask>


def clock(patch):
    """Let a run go by a clock that stands still; returns what moves it on by some seconds."""
    now = [0.0]
    patch.setattr(data.lib.training, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def move(seconds):
        now[0] += seconds

    return move


def log_of(folder):
    """The rows of log.csv, each a dict of numbers; nan where there is none."""
    with open(folder / "log.csv") as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def test_minutes_bound_a_run_and_its_learning_rate(tmp_path, monkeypatch):
    """A step takes 6 seconds; it has the rate of the minutes before it. Those of a run that resumes count on."""
    move, draw_batch = clock(monkeypatch), train.draw_batch

    def draw_slowly(*args):
        move(6.0)
        return draw_batch(*args)

    monkeypatch.setattr(train, "draw_batch", draw_slowly)
    run_train(monkeypatch, f"--data book --out_dir {tmp_path} --max_minutes 1 --log_every 1 {SMALL}")
    rows = log_of(tmp_path)
    minutes = [row["minutes"] for row in rows]
    assert minutes == pytest.approx([0.1 * step for step in range(1, 11)], rel=1e-5)
    config = train.TrainConfig
    assert rows[0]["lr"] == pytest.approx(config.lr * 0.001 / config.warmup, rel=1e-4)
    whole = config.lr / (1 - config.warmup)
    expected = [whole * (1 - before) for before in minutes[:-1]]
    assert [row["lr"] for row in rows[1:]] == pytest.approx(expected, rel=1e-4)
    run_train(monkeypatch, f"--init_from resume --out_dir {tmp_path} --max_minutes 2")
    assert [row["minutes"] for row in log_of(tmp_path)] == pytest.approx(
        [0.1 * step for step in range(1, 21)], rel=1e-5
    )


def test_compiling_takes_no_training_time_and_leaves_no_trace(tmp_path, monkeypatch):
    """The passes before the clock starts draw numbers, and so must put back the state of every generator. Each
    pass takes a second: those of evaluations and samples are minutes of the run, but don't make it slower.
    """
    move, forward = clock(monkeypatch), Transformer.forward

    def forward_slowly(*args, **more):
        move(1.0)
        return forward(*args, **more)

    monkeypatch.setattr(Transformer, "compile", lambda model: None)
    monkeypatch.setattr(Transformer, "forward", forward_slowly)
    for name, flags in (("plain", ""), ("compiled", "--compile")):
        flags += f" --out_dir {tmp_path / name} --max_minutes 5 --log_every 1 --dropout 0.1"
        run_train(monkeypatch, f"--data book {flags} {SMALL}")
    assert_same(*(weights(tmp_path / name / "last.pt") for name in ("plain", "compiled")))
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("plain", "compiled")]
    assert logs[0] == logs[1]
    rows = log_of(tmp_path / "plain")
    assert rows[0]["minutes"] == pytest.approx(1 / 60, rel=1e-5)
    assert len(rows) < 5 * 60  # evaluations took the rest
    assert {row["tokens_per_second"] for row in rows} == {4 * 32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler on this machine")
@pytest.mark.parametrize(
    "flags",
    [
        "--grad_accum 2",
        "--attention block:8 --level uniform --weight elbo --init_from gpt2.pt",
        "--attention causal --optimizer adamw --init_from bert.pt",
        "--method diffugpt",
    ],
)
def test_compiled_or_not_the_losses_are_the_same(flags, tmp_path, monkeypatch):
    logs = []
    for compiled in ("", "--compile"):
        out = tmp_path / f"run{compiled}"
        more = f"{flags} {compiled} --dtype float32 --evals 8 --out_dir {out}"
        run_train(monkeypatch, f"--data book --max_iters 20 --log_every 1 {more} {SMALL}")
        with open(out / "log.csv") as file:
            rows = list(csv.DictReader(file))
        logs.append([[float(row[key] or 0) for key in ("loss", "val_nats_per_token")] for row in rows])
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=0, atol=1e-4)


def test_without_a_compiler_compile_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ["no-such-compiler"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(Mistake, match=f"InvalidCxxCompiler.*broken {tmp_path / 'cache'}"):
        run_train(monkeypatch, f"--data book --compile --max_iters 2 --out_dir {tmp_path / 'run'} {SMALL}")


def test_training_can_start_from_a_checkpoint(world, tmp_path, monkeypatch):
    flags = f"--data book --init_from out/ckpt.pt --out_dir {tmp_path} --max_iters 1 --lr 1e-30 --context 32"
    run_train(monkeypatch, f"{flags} --batch_size 2 --prompt_len 0 --weight_decay 0 --dropout 0.3")
    assert load_checkpoint(tmp_path / "last.pt")[0].config.dropout == 0.3
    assert_same(weights(tmp_path / "last.pt")[1], weights(world / "out" / "ckpt.pt")[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adamw --init_from bert.pt",
        "--attention causal --grad_accum 2",
        "--attention block:4 --level uniform --weight elbo --grad_accum 2",
    ],
)
def test_every_precision_and_variant_trains(dtype, flags, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, f"--data book --out_dir {tmp_path} --max_iters 3 --dtype {dtype} {flags} {SMALL}")
    assert f"in torch.{dtype}" in capsys.readouterr().out
    model = load_checkpoint(tmp_path / "last.pt")[0]
    assert (model.config.block == 1, model.config.block == 4, model.family == "bert") == tuple(
        name in flags for name in ("causal", "block:4", "bert")
    )


def test_a_causal_run_masks_nothing_and_reports_its_likelihood(world, monkeypatch, capsys):
    trained = load_checkpoint(world / "gpt" / "ckpt.pt")[2]["train"]
    assert [trained[name] for name in ("attention", "level", "prompt_len")] == ["causal", "1", "0"]
    model, tokenizer, _ = load_checkpoint("gpt/ckpt.pt")
    val = data.lib.corpus.load_corpus("book")[1]
    for seed, prompt_len in itertools.product((0, 5), (0, 8)):
        flags = f"--seed {seed} --prompt_len {prompt_len} --dtype float32"
        run_train(monkeypatch, f"--eval_only --init_from gpt/ckpt.pt {flags}")
        after = " (after a prompt of 8)" if prompt_len else ""
        exact = train.nelbo(model, windows(len(val)), prompt_len=prompt_len)
        printed = capsys.readouterr().out
        assert f"negative log-likelihood{after} {exact:.4f} nats per token (exact)" in printed
    # Not all of these windows start where one of sample.py does, so compare those that do.
    tokens = torch.from_numpy(val[: len(val) // 32 * 32].astype(np.int64))
    (world / "val.txt").write_text(tokenizer.decode(tokens.tolist()))
    printed = sample_text(["--ckpt", "gpt/ckpt.pt", "--score", "val.txt", "--dtype", "float32"], monkeypatch, capsys)
    (world / "val.txt").unlink()
    score = float(printed.out.split()[0])
    assert score == pytest.approx(float(train.nelbo(model, tokens.view(-1, 32))), abs=1e-4)


GOES_ON = [  # from a checkpoint, to an attention; and what that is where there is a shift
    "out canvas",
    "out shifted",
    "out causal",
    "out block:8",
    "gpt canvas shifted",
    "gpt shifted",
    "gpt block:4",
    "blocks causal",
    "blocks block:16",
    "blocks shifted",
    "shifted canvas shifted",
    "shifted causal",
]


@pytest.mark.parametrize("way", GOES_ON)
def test_a_checkpoint_goes_on_under_any_attention(way, world, tmp_path, monkeypatch, capsys):
    """Its weights stay, and its shift; a model that had none gets one for `causal` and `shifted`."""
    start, attention, *others = way.split()
    result = others[0] if others else attention
    flags = f"--data book --init_from {start}/ckpt.pt --attention {attention} --out_dir {tmp_path} --max_iters 1"
    run_train(monkeypatch, f"{flags} --lr 1e-30 --weight_decay 0 --prompt_len 0 --batch_size 2")
    before, after = (load_checkpoint(folder / "last.pt")[0] for folder in (world / start, tmp_path))
    assert all(a.equal(b) for a, b in zip(before.parameters(), after.parameters()))
    assert str(attention_of(after.config)) == result
    assert (after.config.shift_id is not None) == (start in ("gpt", "shifted") or result in ("causal", "shifted"))
    assert after.config.conv_right == before.config.conv_right
    capsys.readouterr()
    text = sample_text(["--ckpt", tmp_path / "last.pt", "--length", 80], monkeypatch, capsys).out
    assert len(text.encode()) >= 80
    run_train(monkeypatch, f"--init_from resume --attention {attention} --out_dir {tmp_path} --max_iters 2")
    assert str(attention_of(load_checkpoint(tmp_path / "last.pt")[0].config)) == result


def test_learned_positions_open_with_one_position_less(tmp_path, monkeypatch, capsys):
    """The last token of the canvas is also read, at a position of its own."""
    go_on = "--data book --init_from gpt2.pt --attention canvas --prompt_len 0 --batch_size 2 --max_iters 3"
    run_train(monkeypatch, f"{go_on} --out_dir {tmp_path}/canvas")
    model = load_checkpoint(tmp_path / "canvas" / "last.pt")[0]
    assert (model.config.context, model.config.shift_id, len(model.position_embedding.weight)) == (31, 256, 32)
    sentence = mistake(train.main, f"{go_on} --context 32 --out_dir new".split(), monkeypatch, capsys)
    assert "at most 31 tokens" in sentence
