"""The commands as a user runs them: from text to samples, and every mistake in one sentence."""

import ast
import csv
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figures import apply, readme_changes
from toys import make_book

import data.lib.corpus
import data.lib.report
import data.lib.training
import sample
import train
from data.lib import slim
from data.lib.checkpoint import byte_sum, read_checkpoint, save_checkpoint, tensors
from data.lib.corpus import spaced_windows, write_corpus
from data.lib.errors import Mistake, command
from data.lib.flags import Rate
from data.lib.machine import autocast
from data.lib.settings import SHIPPED, attention_of
from data.lib.tokenizer import BPETokenizer, ByteTokenizer
from data.lib.writing import nats_per_byte
from data.text.prepare import prepare
from data.weights import bert, gpt2
from model import Transformer, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--n_layer 1 --n_head 1 --n_embd 16 --context 32 --batch_size 4 --prompt_len 0:8 --eval_tokens 512"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a corpus, a checkpoint of each kind of attention trained on it, and two of published networks."""
    folder = tmp_path_factory.mktemp("world")
    make_book(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.lib.corpus, "DATA", folder / "data")
        run_train(patch, f"--data book --out_dir {folder}/out --max_iters 4 --evals 2 {SMALL}")
        for name, attention in (("gpt", "causal"), ("blocks", "block:8"), ("shifted", "shifted")):
            flags = f"--out_dir {folder}/{name} --attention {attention} --max_iters 4 --evals 1"
            run_train(patch, f"--data book {flags} {SMALL.replace('0:8', '0')}")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 32}
    for name, network, more in (("bert", bert, {}), ("gpt2", gpt2, {"block": 1, "shift_id": 256})):
        torch.manual_seed(0)
        model = network.Network(network.Network.Config(**shape, **more))
        save_checkpoint(folder / f"{name}.pt", model, ByteTokenizer())
    return folder


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    monkeypatch.chdir(world)


def run_train(patch, flags):
    patch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()


def run_process(*arguments, **kwargs):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)


def copy_project(folder):
    """The code without its corpora, as in a fresh clone."""
    for path in [ROOT / "model.py", ROOT / "train.py", ROOT / "sample.py", *(ROOT / "data").rglob("*.*")]:
        if path.suffix in (".py", ".html"):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def windows(n_tokens):
    """Windows of the validation split, evenly spaced, about n_tokens in all: (N, 32)."""
    return torch.from_numpy(spaced_windows(data.lib.corpus.load_corpus("book")[1], 32, n_tokens)[0])


def store(checkpoint, path):
    """Write the dict of a checkpoint as it is, with the sums that belong to its tensors."""
    sums = [byte_sum(tensor) for tensor in tensors({**checkpoint, "sums": []})]
    torch.save({**checkpoint, "sums": sums}, path)


def state_of(folder):
    """Every file below folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- from text to samples ------------------------------------------------------------------------


def sample_text(flags, monkeypatch, capsys):
    """What sample.py prints: (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()
    return capsys.readouterr()


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


def test_from_a_text_to_samples_as_a_user_would(tmp_path):
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    copy_project(tmp_path)
    prepared = run_process("data/text/prepare.py", "poem.txt", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    flags = f"--data poem --max_iters 60 --evals 2 {SMALL}".split()
    trained = run_process("train.py", *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "nats per token" in trained.stdout
    assert "bits per byte" in trained.stdout
    assert "tokens/s" in trained.stderr
    with open(tmp_path / "out" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    assert float(rows[-1]["val_nats_per_token"]) < float(rows[0]["loss"]) < 5.5
    ckpt = tmp_path / "out" / "ckpt.pt"
    sampled = run_process(
        ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "the <mask*5> fox", "--num_samples", 2, cwd="/"
    )
    assert sampled.returncode == 0, sampled.stderr
    assert "tokens/s" in sampled.stderr
    assert sampled.stdout.count("the ") >= 2
    assert "<mask>" not in sampled.stdout
    assert "--- 2 of 2" in sampled.stderr


def test_the_loop_of_the_readme_runs_as_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})
    assert len(capsys.readouterr().out) > 8


CHANGED = """
import torch
from sample import ORDERS, highest

holes, place = torch.ones(1, 8, dtype=torch.bool), torch.arange(8)
for order in "left", "spread":
    chosen = highest(ORDERS[order](None, None, place)[None], holes, torch.tensor([[3]]))
    print(*chosen[0].nonzero().flatten().tolist())
"""


def test_the_changes_of_the_readme_can_be_made_and_do_what_it_says(world, tmp_path):
    """All five in one copy: `left` begins at the right, `spread` leaves gaps; a model learns and writes."""
    copy_project(tmp_path)
    shutil.copytree(world / "data" / "book", tmp_path / "data" / "book")
    for change in readme_changes():
        apply(change, tmp_path)
    chosen = run_process("-c", CHANGED, cwd=tmp_path)
    assert chosen.stdout.splitlines() == ["5 6 7", "2 5 7"], chosen.stderr
    trained = run_process(
        "train.py", *f"--data book --out_dir out --max_iters 2 --evals 1 {SMALL}".split(), cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    written = run_process("sample.py", "--order", "left", "spread", "--steps", 8, cwd=tmp_path)
    assert written.returncode == 0, written.stderr


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
        store({**stored, "best": 0.0}, tmp_path / "last.pt")  # no bound is as low
        run_train(monkeypatch, f"--init_from resume --max_iters 4 --rate {rate} --out_dir {tmp_path}")
        assert load_checkpoint(tmp_path / "ckpt.pt")[2]["step"] == step


def test_sampling_repeats_itself_and_stdout_is_text_alone(world, monkeypatch, capsys):
    outputs = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sys, "argv", f"sample.py --prompt line --length 30 --seed {seed}".split())
        sample.main()
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("line")


def test_a_checkpoint_needs_nothing_beside_it(world, tmp_path):
    alone = tmp_path / "alone.pt"
    alone.write_bytes((world / "out" / "ckpt.pt").read_bytes())
    result = run_process(ROOT / "sample.py", "--ckpt", alone, "--length", 20, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


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
    assert (tmp_path / "data/python/train.bin").stat().st_size > 8_000_000
    assert (tmp_path / "out/ckpt.pt").exists()


# --- reproducible, resumable ---------------------------------------------------------------------


@contextmanager
def stopped_in(step, script=train, number=signal.SIGINT):
    """Context in which a run of a script gets a signal in this step, and ends as one that was stopped."""
    draw_batch, steps = script.draw_batch, []

    def interrupt(*args):
        steps.append(args)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return draw_batch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "draw_batch", interrupt)
        with pytest.raises(SystemExit) as stopped:
            yield
    assert stopped.value.code == 128 + number


def weights(path):
    checkpoint = load_checkpoint(path)[2]
    return checkpoint["step"], checkpoint["model"], checkpoint["optimizers"]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.equal(b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        [assert_same(a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [assert_same(*pair) for pair in zip(a, b)]
    else:
        assert a == b


def test_a_run_is_reproducible_to_the_bit(tmp_path, monkeypatch):
    for name in "ab":
        run_train(monkeypatch, f"--data book --out_dir {tmp_path / name} --max_iters 5 --dropout 0.1 {SMALL}")
    assert_same(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt"))


# The rows of the table of methods, who sees whom, published networks, the optimizers, accumulation, precisions.
RUNS = [
    ("", signal.SIGINT),
    ("--attention block:8 --level uniform --weight elbo", signal.SIGTERM),
    ("--attention causal --prompt_len 4 --grad_accum 2", signal.SIGINT),
    ("--level grid:10 --one_level --optimizer adamw", signal.SIGTERM),
    ("--level 0.15 --dtype float32 --grad_accum 4 --optimizer adamw", signal.SIGINT),
    ("--level uniform --weight elbo --rate slant:2 --dtype bfloat16", signal.SIGINT),
    ("--level uniform --rate spindle:1 --dtype bfloat16 --visible 0.1", signal.SIGINT),
    ("--level grid:4 --weight elbo --attention block:4 --init_from bert.pt", signal.SIGINT),
    ("--method diffugpt --init_from gpt2.pt --context 31 --optimizer adamw", signal.SIGTERM),
    ("--dtype float16 --conv 0 --attention block:1", signal.SIGINT),
]
SLOW_RUNS = [pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[4:]]


@pytest.mark.parametrize(("more", "number"), [*RUNS[:4], *SLOW_RUNS], ids=str)
def test_resume_is_bitwise_identical(more, number, tmp_path, monkeypatch):
    """A run stopped by Ctrl-C or SIGTERM after some steps and resumed equals one that was never stopped."""
    flags = f"--data book --max_iters 12 --evals 3 --log_every 1 --dropout 0.1 {SMALL} {more}"
    run_train(monkeypatch, f"{flags} --out_dir {tmp_path}/whole")
    with stopped_in(7, number=number):
        run_train(monkeypatch, f"{flags} --out_dir {tmp_path}/halves")
    assert weights(tmp_path / "halves" / "last.pt")[0] == 7
    run_train(monkeypatch, f"--init_from resume --out_dir {tmp_path}/halves")
    assert_same(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "halves" / "last.pt"))
    assert_same(weights(tmp_path / "whole" / "ckpt.pt"), weights(tmp_path / "halves" / "ckpt.pt"))
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "halves")]
    steps_and_losses = [[(row.split(",")[0], row.split(",")[2]) for row in log] for log in logs]
    assert steps_and_losses[0] == steps_and_losses[1]


def test_a_run_stopped_before_its_first_evaluation_leaves_a_checkpoint_to_sample(tmp_path, monkeypatch):
    """The model as it is; the first evaluation replaces it, whatever its bound."""
    flags = f"--data book --max_iters 4 --evals 1 {SMALL} --out_dir {tmp_path}"
    with stopped_in(1):
        run_train(monkeypatch, flags)
    assert weights(tmp_path / "ckpt.pt")[0] == 1
    run_train(monkeypatch, f"--init_from resume --out_dir {tmp_path}")
    assert weights(tmp_path / "ckpt.pt")[0] == 4


def test_a_run_does_not_resume_on_another_text(tmp_path, monkeypatch, capsys):
    """Nor under the same name: its bound would be that of another text, and might replace the best."""
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path / "data")
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, word in zip(texts, ("book", "play")):
        text.write_text("".join(f"line {i} of the {word}\n" for i in range(600)))
    prepare(texts[0], "again", ByteTokenizer())
    run_train(monkeypatch, f"--data again --max_iters 2 --evals 1 {SMALL} --out_dir {tmp_path}/out")
    before = state_of(tmp_path / "out")
    prepare(texts[1], "again", ByteTokenizer())
    flags = f"--init_from resume --max_iters 4 --out_dir {tmp_path}/out".split()
    assert "data/again has another text" in mistake(train.main, flags, monkeypatch, capsys)
    assert state_of(tmp_path / "out") == before
    prepare(texts[0], "again", ByteTokenizer())
    run_train(monkeypatch, " ".join(flags))


def test_the_bell_of_a_run_widens_from_step_to_step(tmp_path, monkeypatch):
    draw_batch, levels = train.draw_batch, []

    def record(*args):
        levels.append(args[4])
        return draw_batch(*args)

    monkeypatch.setattr(train, "draw_batch", record)
    run_train(monkeypatch, f"--data book --max_iters 4 {SMALL} --out_dir {tmp_path}/out --level bell:1.2")
    assert [level.value for level in levels] == pytest.approx([0, 0.3, 0.6, 0.9])


def test_a_killed_run_resumes_from_its_last_evaluation_and_its_log_has_no_row_twice(tmp_path, monkeypatch):
    flags = f"--data book --max_iters 12 --evals 3 --log_every 1 {SMALL} --out_dir {tmp_path}/out"
    draw_batch, steps = train.draw_batch, []

    def die_in_step_7(*args):
        steps.append(args)
        if len(steps) == 7:
            raise RuntimeError("killed")
        return draw_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batch", die_in_step_7)
        with pytest.raises(RuntimeError, match="killed"):
            run_train(patch, flags)
    run_train(monkeypatch, f"--init_from resume --out_dir {tmp_path}/out")
    with open(tmp_path / "out" / "log.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 13))


def clock(patch):
    """Let a run go by a clock that stands still; returns what moves it on by some seconds."""
    now = [0.0]
    for module in (data.lib.report, data.lib.training):
        patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

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
        more = f"{flags} {compiled} --dtype float32 --out_dir {out}"
        run_train(monkeypatch, f"--data book --max_iters 20 --log_every 1 {more} {SMALL}")
        with open(out / "log.csv") as file:
            rows = list(csv.DictReader(file))
        logs.append([[float(row[key] or 0) for key in ("loss", "val_nats_per_token")] for row in rows])
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=0, atol=1e-4)


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


# --- append and set ------------------------------------------------------------------------------


def test_a_causal_run_masks_nothing_and_reports_its_likelihood(world, monkeypatch, capsys):
    trained = load_checkpoint(world / "gpt" / "ckpt.pt")[2]["train"]
    assert [trained[name] for name in ("attention", "level", "prompt_len")] == ["causal", "1.0", "0"]
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


def test_one_block_for_all_resumes_under_either_name(tmp_path, monkeypatch):
    flags = f"--data book --out_dir {tmp_path} {SMALL} --attention"
    run_train(monkeypatch, f"{flags} block:32 --max_iters 1")
    run_train(monkeypatch, f"--init_from resume {flags} block:32 --max_iters 2")
    run_train(monkeypatch, f"--init_from resume {flags} canvas --max_iters 3")
    assert weights(tmp_path / "last.pt")[0] == 3


def test_learned_positions_open_with_one_position_less(tmp_path, monkeypatch, capsys):
    """The last token of the canvas is also read, at a position of its own."""
    go_on = "--data book --init_from gpt2.pt --attention canvas --prompt_len 0 --batch_size 2 --max_iters 3"
    run_train(monkeypatch, f"{go_on} --out_dir {tmp_path}/canvas")
    model = load_checkpoint(tmp_path / "canvas" / "last.pt")[0]
    assert (model.config.context, model.config.shift_id, len(model.position_embedding.weight)) == (31, 256, 32)
    sentence = mistake(train.main, f"{go_on} --context 32 --out_dir new".split(), monkeypatch, capsys)
    assert "at most 31 tokens" in sentence


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


# --- mistakes ------------------------------------------------------------------------------------


def mistake(main, arguments, monkeypatch, capsys):
    """The sentence that a command ends with, which must be one line, with exit code 2."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        command(main)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("script.py: ")
    return lines[0]


TRAIN_MISTAKES = {
    "--data book --level grid:0": "grid:N",
    "--data book --level 1.5": "a number in (0, 1]",
    "--data book --level grid:99999999999999999999": "grid:N",
    "--eval_only --init_from out/ckpt.pt --level 0.15": "--level 0.15: --eval_only prints the bound",
    "--eval_only --init_from out/ckpt.pt --level uniform:": "a number in (0, 1]",
    "--eval_only --init_from out/ckpt.pt --rate spindle:0.3": "--rate spindle:0.3",
    "--eval_only --init_from out/ckpt.pt --rate slant:1 --level grid:4": "--rate slant:1",
    "--eval_only --init_from out/ckpt.pt --prompt_len 0:16": "one number",
    "--rate slant:-1": "slant:W or spindle:W, where W > 0",
    "--rate slant:0": "W > 0",
    "--rate spindle:inf": "W > 0",
    "--rate slant": "W > 0",
    "--rate t:1": "W > 0",
    "--rate 0.3": "t, slant:W or spindle:W",
    "--data book --rate spindle:0.3 --level uniform --weight elbo": "no bound",
    "--data book --level uniform --weight elbo --visible 0.1": "--visible 0.1",
    "--data book --rate slant:1 --level grid:4 --weight elbo": "--rate slant:1",
    "--data book --method d3pm --rate spindle:0.3": "no bound",
    "--data book --method gpt --level uniform": "each token is a hole",
    "--method autoregression": "ar-diffusion",
    "--init_from resume --method mdlm --max_iters 9": "--method mdlm: the run in out/last.pt has default",
    "--nonsense 1": "--nonsense",
    "--max_iter 5": "--max_iter",  # no abbreviations either
    "--batch_size two": "two",
    "--optimizer middle": "muon",
    "--data nope": "ready are: book",
    "--data book --context 1000000": "fewer than one --context",
    "--level grid:0": "grid:N",
    "--level grid:x": "grid:N",
    "--level bell:0": "bell:S",
    "--level bell": "bell:S",
    "--level 1.5": "1.5",
    "--level 0": "(0, 1]",
    "--level uniform:3": "uniform",
    "--level nan": "nan",
    "--level 0.15 --weight elbo": "--weight mean",
    "--weight elbo": "--weight mean",  # with the default level, a bell
    "--prompt_len 5:2": "0:64",
    "--prompt_len x": "0:64",
    "--prompt_len -1": "--prompt_len",
    "--prompt_len 256": "256",
    "--batch_size 6 --grad_accum 4": "--batch_size 6",
    "--n_embd 30 --n_head 4": "--n_head 4",
    "--n_layer 0": "at least 1",
    "--lr 0": "above 0",
    "--lr nan": "finite",
    "--max_minutes inf": "finite",
    "--seed -1": "at least 0",
    "--seed 99999999999999999999": "at most",
    "--dropout 1": "below 1",
    "--max_minutes 0": "above 0",
    "--eval_only": "--init_from",
    "--init_from nope.pt --data book": "no such checkpoint",
    "--init_from resume --out_dir nowhere": "no such checkpoint",
    "--data book --context 32 --max_iters 1": "--out_dir out: there is a run in it",
    "--init_from out/ckpt.pt --data book --max_iters 1": "--out_dir out: there is a run in it",
    "--init_from resume --data other": "--data other: the run in out/last.pt reads book",
    "--init_from out/ckpt.pt --out_dir new --n_layer 3 --data book": "has 1",
    "--init_from resume": "complete",
    "--init_from resume --max_iters 9 --optimizer adamw": "not with these flags",
    "--data book --out_dir book.txt --context 32 --prompt_len 0": "book.txt",
    "--data book --out_dir book.txt/below --context 32 --prompt_len 0": "book.txt",
    "--attention block": "block:K for blocks of K tokens",
    "--attention sideways": "canvas, shifted, block:K",
    "--attention shifted:4": "canvas, shifted, block:K",
    "--attention block:5 --context 32 --data book": "K must divide --context 32",
    "--attention causal --level uniform --data book": "each token is a hole",
    "--attention causal --rate slant:1 --data book": "each token is a hole",
    "--init_from resume --attention causal --max_iters 9": "--attention causal: the model in",
    "--init_from resume --attention shifted --max_iters 9": "--attention shifted: the model in",
    "--init_from out/ckpt.pt --out_dir new --data book --attention block:5": "K must divide",
    "--init_from gpt/ckpt.pt --eval_only --level grid:9": "each token is a hole",
    "--data book --context 32 --device nonsense": "nonsense",
    "--data book --context 32 --device cpu:x": "cpu:x",
    "--data book --context 32 --device cuda:99": "cuda:99",
}


@pytest.mark.parametrize("flags", TRAIN_MISTAKES)
def test_train_mistakes(flags, world, monkeypatch, capsys):
    before = state_of(world)
    assert TRAIN_MISTAKES[flags] in mistake(train.main, flags.split(), monkeypatch, capsys)
    assert state_of(world) == before


SAMPLE_MISTAKES = {
    ("--steps", "0"): "at least 1",
    ("--temperature", "-1"): "at least 0",
    ("--top_p", "2"): "at most 1",
    ("--top_p", "0"): "above 0",
    ("--top_k", "-3"): "at least 0",
    ("--num_samples", "0"): "at least 1",
    ("--order", "upward"): "confidence",
    ("--length", "9999999"): "at most",
    ("--prompt", "x" * 33): "33 tokens with its holes; the canvas has 32",
    ("--prompt", "hello", "--length", "4"): "the canvas has 4",
    ("--prompt", "<mask*999999999>"): "999999999 holes; the canvas has 1000000",
    ("--prompt", "<mask*9>", "--length", "8"): "9 holes; the canvas has 8",
    ("--prompt", "<mask*9:3>"): "<mask*9:3>: a hole is",
    ("--prompt", "a <mask:8>"): "<mask:8>: a hole is",
    ("--prompt", "<mask*9999999999>"): "9999999999 holes",
    ("--prompt", "<mask*4:12>"): "<mask*4:12>: a hole is",
    ("--prompt", "\udcff"): "UTF-8",
    ("--prompt", "a", "--suffix", "<mask>"): "--suffix",
    ("--prompt_file", "none.txt"): "none.txt: No such file",
    ("--prompt_file", "data"): "data: Is a directory",
    ("--prompt_file", "out/ckpt.pt"): "not UTF-8",
    ("--block", "0"): "at least 1",
    ("--block", "33"): "sees 32 tokens",
    ("--gamma", "-1"): "at least 0",
    ("--guidance", "1"): "--guidance",
    ("--save", "run.png"): ".html",
    ("--save", ""): "--save",
    ("--save", "nowhere/run.svg"): "nowhere/run.svg",
    ("--order", "threshold", "--steps", "9"): "--steps 9",
    ("--order", "entropy-bound", "threshold", "--steps", "9"): "--steps 9",
    ("--order", "information"): "entropy-bound",
    ("--score", "book.txt", "--order", "random"): "no one probability",
    ("--score", "book.txt", "--order", "remask"): "no one probability",
    ("--score", "book.txt", "--order", "left", "--top_k", "3"): "--top_k",
    ("--score", "none.txt", "--order", "left"): "none.txt: No such file",
    ("--score", os.devnull, "--order", "left"): "it is empty",
    ("--score", "book.txt", "--order", "left", "--temperature", "1"): "--temperature",
    ("--steps", "9" * 20): "at most",
    ("--block", "32", "--length", "64"): "sees 32 tokens",
    ("--save", "data/.svg"): ".html",
    ("--ckpt", "gpt/ckpt.pt", "--suffix", "x"): "--suffix: the model in gpt/ckpt.pt",
    ("--ckpt", "blocks/ckpt.pt", "--suffix", "x"): "--suffix: the model in blocks/ckpt.pt",
    (
        "--ckpt",
        "gpt/ckpt.pt",
        "--order",
        "confidence",
    ): "--order confidence: the model in gpt/ckpt.pt is causal",
    ("--ckpt", "gpt/ckpt.pt", "--order", "random"): "--order random: the model in gpt/ckpt.pt is causal",
    ("--ckpt", "gpt/ckpt.pt", "--steps", "3"): "--steps 3: the model in gpt/ckpt.pt is causal",
    ("--ckpt", "gpt/ckpt.pt", "--block", "4"): "--block 4",
    ("--ckpt", "gpt/ckpt.pt", "--gamma", "1"): "--gamma 1.0: the model in gpt/ckpt.pt is causal",
    ("--ckpt", "gpt/ckpt.pt", "--prompt", "a", "--guidance", "2"): "--guidance 2.0",
    ("--ckpt", "blocks/ckpt.pt", "--block", "3"): "--block 3: it must divide",
    ("--ckpt", "blocks/ckpt.pt", "--score", "book.txt"): "no one probability",
    ("--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", "--score", "book.txt"): "of one model at a time",
    ("--order", "left", "margin", "--score", "book.txt"): "under one order at a time",
    ("--order", "left", "upward"): "confidence",
    ("--ckpt", "gpt/ckpt.pt", "--order", "left", "margin"): "--order left margin: the model in gpt/ckpt.pt",
    ("--ckpt", "gpt/ckpt.pt", "gpt/ckpt.pt", "--order", "left", "--steps", "3"): "--steps 3",
    ("--judge", "nope.pt"): "nope.pt: there is no such checkpoint",
    ("--ckpt", "nope.pt"): "no such checkpoint",
    ("--ckpt", "book.txt"): "not a checkpoint",
    ("--ckpt", "data"): "data",
}


@pytest.mark.parametrize("flags", SAMPLE_MISTAKES)
def test_sample_mistakes(flags, monkeypatch, capsys):
    assert SAMPLE_MISTAKES[flags] in mistake(sample.main, flags, monkeypatch, capsys)


@pytest.mark.parametrize("main", [train.main, sample.main])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_device_that_is_not_there(main, monkeypatch, capsys):
    assert "--device cuda" in mistake(main, ["--device", "cuda"], monkeypatch, capsys)


def test_without_a_checkpoint_sample_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.lib.settings, "SHIPPED", tmp_path / "none.pt")
    assert "python train.py" in mistake(sample.main, [], monkeypatch, capsys)


def test_sample_takes_ones_own_checkpoint_or_else_the_one_that_is_there(world, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "data" / "shipped.pt"
    shipped.parent.mkdir()
    shipped.write_bytes((world / "blocks" / "ckpt.pt").read_bytes())
    monkeypatch.setattr(data.lib.settings, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert "data/shipped.pt: 32 tokens in" in sample_text([], monkeypatch, capsys).err
    monkeypatch.chdir(world)
    assert "out/ckpt.pt: 32 tokens in" in sample_text([], monkeypatch, capsys).err


# --- a small checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("KING <mask*7> III:\n", "KING RICHARD III:\n"),
        ("Good <mask*6>, my lord.", "Good father, my lord."),
        ("Good morrow, my <mask*9>.", "Good morrow, my good lord."),
    ],
)
def test_the_shipped_model_knows_its_shakespeare(prompt, text, tmp_path, monkeypatch, capsys):
    """Of one checkpoint and its likeliest text, which another may not share: these are easy."""
    monkeypatch.chdir(tmp_path)  # where no model of one's own is in out/
    written = sample_text(["--prompt", prompt, "--order", "confidence", "--temperature", 0], monkeypatch, capsys)
    assert "data/shakespeare/ckpt.pt: " in written.err
    assert written.out == text + "\n"


def test_the_shipped_model_is_small_and_can_be_trained_on(tmp_path, monkeypatch):
    """12 MB at most, in bfloat16, without what only resuming needs."""
    assert SHIPPED.stat().st_size <= 12e6
    stored = torch.load(SHIPPED, weights_only=True)
    assert {tensor.dtype for tensor in stored["model"].values()} == {torch.bfloat16}
    assert "optimizers" not in stored
    run_train(monkeypatch, f"--init_from {SHIPPED} --data book --out_dir {tmp_path} --max_iters 1 --evals 1")
    assert load_checkpoint(tmp_path / "ckpt.pt")[0].config == load_checkpoint(SHIPPED)[0].config


def test_a_slim_checkpoint_is_the_model_in_bfloat16(world, tmp_path, monkeypatch, capsys):
    """It writes, it scores, and training goes on from it; but does not resume."""
    monkeypatch.setattr(sys, "argv", ["slim.py", "out/ckpt.pt", str(tmp_path / "slim.pt")])
    slim.main()
    model, tokenizer, checkpoint = load_checkpoint("out/ckpt.pt")
    small, same_tokenizer, rest = load_checkpoint(tmp_path / "slim.pt")
    assert same_tokenizer.state == tokenizer.state
    assert small.config == model.config
    assert {**rest["train"], "out_dir": "out"} == {**checkpoint["train"], "out_dir": "out"}
    assert "out_dir" not in rest["train"]
    stored = torch.load(tmp_path / "slim.pt", weights_only=True)["model"]
    for (name, p), q in zip(model.state_dict().items(), small.state_dict().values()):
        assert stored[name].dtype == torch.bfloat16
        assert q.dtype == torch.float32
        assert_same(q, p.bfloat16().float())
    assert "optimizers" not in rest
    go_on = f"--init_from {tmp_path}/slim.pt --data book --out_dir {tmp_path}/on --max_iters 2 --context 32"
    run_train(monkeypatch, go_on)
    written = sample_text(["--ckpt", tmp_path / "slim.pt", "--length", 9], monkeypatch, capsys)
    assert "slim.pt: 9 tokens in" in written.err
    (tmp_path / "on" / "last.pt").write_bytes((tmp_path / "slim.pt").read_bytes())
    again = f"--init_from resume --out_dir {tmp_path}/on --max_iters 9".split()
    assert "not with these flags" in mistake(train.main, again, monkeypatch, capsys)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_files_that_are_no_checkpoints(world, tmp_path, monkeypatch, capsys):
    """Truncated, empty, of another program, or a pickle that would run code: which it does not."""
    monkeypatch.chdir(tmp_path)
    good = (world / "out" / "ckpt.pt").read_bytes()
    config = load_checkpoint(world / "out" / "ckpt.pt")[2]["config"]
    ours = {"family": "setitem", "config": config, "model": {}, "tokenizer": {"kind": "bytes"}, "sums": []}
    files = {
        "empty.pt": b"",
        "truncated.pt": good[: len(good) // 2],
        "nearly_whole.pt": good[:-100],
        "pickle.pt": pickle.dumps(Malicious()),
        **{f"text_{letter}.pt": f"{letter}ext\n".encode() for letter in ".GKQRabeqrstu"},
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name, content in {
        "malicious.pt": {"config": Malicious()},
        "tensor.pt": torch.zeros(3),
        "other_keys.pt": {"state_dict": {}},
        "other_config.pt": {**ours, "config": {"width": 3}},
        "other_weights.pt": ours,
        "other_family.pt": {**ours, "family": "mamba"},
    }.items():
        torch.save(content, name)
    with zipfile.ZipFile("zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    for path in sorted(Path().glob("*.pt")):
        assert path.name in mistake(sample.main, ["--ckpt", path.name], monkeypatch, capsys)
        for flags in (f"--init_from {path} --data book", f"--eval_only --init_from {path} --data book"):
            flags += " --out_dir new"
            assert path.name in mistake(train.main, flags.split(), monkeypatch, capsys)
    assert not Path("executed").exists()
    with pytest.raises(Mistake):
        load_checkpoint("malicious.pt")


def test_a_checkpoint_of_another_tokenizer(monkeypatch, capsys):
    tokenizer = BPETokenizer([chr(i) for i in range(256)], r"\S+|\s+")
    write_corpus("bpe", [("train", "some text " * 50), ("val", "more text " * 50)], tokenizer, "test")
    capsys.readouterr()
    flags = "--init_from out/ckpt.pt --data bpe --out_dir new"
    assert "tokenizer" in mistake(train.main, flags.split(), monkeypatch, capsys)


PREPARE_MISTAKES = [
    ("text", ["good", "--nonsense"], "--nonsense"),
    ("text", ["good", "--tokenizer", "klingon"], "bytes, gpt2"),
    ("text", ["good", "--name", "{here}/new"], "one folder of data/"),
    ("text", ["good", "--name", "../new"], "--name ../new"),
    ("text", ["good", "--name", "text/new"], "--name text/new"),
    ("text", ["good", "--name", ".."], "--name .."),
    ("text", ["good", "--name", ""], "one folder of data/"),
    ("python", ["--name", "../new"], "--name ../new"),
    ("hmm", ["--name", "../new", "--tokens", "10000"], "--name ../new"),
    ("text", ["good", "--name", "prepare.py/.."], "one folder of data/"),
    ("text", ["good", "--name", "python"], "data/python is this project's own folder"),
    ("text", [], "path"),
    ("text", ["none"], "no such file"),
    ("text", ["latin", "--name", "never-written"], "not UTF-8"),
    ("text", ["empty", "--name", "never-written"], "no text"),
    ("python", ["--tokenizer", "klingon"], "bytes, gpt2"),
    ("shakespeare", ["--file", "good"], "sha256"),
    ("shakespeare", ["--file", "none"], "No such file"),
    ("text8", ["--file", "none"], "No such file"),
    ("text8", ["--file", "good", "--name", "new"], "text8 has 100,000,000 bytes, and this has fewer"),
    ("enwik8", ["--file", "good", "--test"], "enwik8 has 100,000,000 bytes, and this has fewer"),
    ("fineweb", ["--tokenizer", "klingon"], "bytes, gpt2"),
    ("fineweb", ["--tokenizer", "bytes", "--dir", "none"], "no <|endoftext|>"),
    ("fineweb", ["--shards", "0"], "at least 1"),
]


def test_prepare_mistakes(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "good").write_text("text " * 100)
    before = state_of(tmp_path), sorted((ROOT / "data").iterdir())
    for corpus, arguments, reason in PREPARE_MISTAKES:
        script = ROOT / "data" / corpus / "prepare.py"
        result = run_process(script, *(a.format(here=tmp_path) for a in arguments), cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("prepare.py: ")
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert reason in result.stderr
    assert (state_of(tmp_path), sorted((ROOT / "data").iterdir())) == before


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux tells it")
def test_a_corpus_is_streamed(tmp_path):
    """Ten times the text takes no more memory."""
    script = (
        "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for megabytes in (6, 60):
        (tmp_path / "text").write_text("A line of text that comes again and again.\n" * (megabytes * 23_000))
        copy_project(tmp_path)
        prepare_text = tmp_path / "data/text/prepare.py", tmp_path / "text", "--name", "corpus"
        peaks.append(int(run_process("-c", script, *prepare_text).stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 10


@contextmanager
def no_space_beyond(size):
    """A limit on the size of files stands in for a full disk: a write fails half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_no_space_left_keeps_the_checkpoint_that_was_there(share, world, tmp_path, monkeypatch, capsys):
    flags = f"--data book --out_dir {tmp_path} --max_iters 2 {SMALL} --n_embd 128"
    run_train(monkeypatch, flags)
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "ckpt.pt")}
    again = f"{flags} --init_from resume --max_iters 4 --evals 4".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *again])
    with no_space_beyond(int(len(before["last.pt"]) * share)), pytest.raises(SystemExit) as ended:
        command(train.main)
    assert ended.value.code == 2
    sentences = capsys.readouterr().err.strip().splitlines()
    assert any("step 3: no checkpoint (File too large); the earlier one stays" in line for line in sentences)
    assert "File too large" in sentences[-1]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_goes_on_where_no_checkpoint_could_be_written_and_tries_again(tmp_path, monkeypatch, capsys):
    flags = f"--data book --max_iters 6 --evals 3 --log_every 1 {SMALL}"
    run_train(monkeypatch, f"{flags} --out_dir {tmp_path}/free")
    evaluate, full = train.evaluate, ExitStack()

    def fill_the_disk_for_a_while(run, *args, **more):
        full.close()
        if run.step == 2:
            full.enter_context(no_space_beyond(1000))
        return evaluate(run, *args, **more)

    monkeypatch.setattr(train, "evaluate", fill_the_disk_for_a_while)
    run_train(monkeypatch, f"{flags} --out_dir {tmp_path}/full")
    sentence = "step 2: no checkpoint (File too large); there is none yet, and the next evaluation tries again"
    assert sentence in capsys.readouterr().err
    for name in ("last.pt", "ckpt.pt"):
        assert_same(*(weights(tmp_path / folder / name) for folder in ("free", "full")))
    logs = [(tmp_path / folder / "log.csv").read_text().count("\n") for folder in ("free", "full")]
    assert logs == [7, 7]


def test_the_last_checkpoints_stay_under_the_number_of_their_step(tmp_path, monkeypatch):
    flags = f"--data book --max_iters 8 --evals 4 --keep 2 {SMALL} --out_dir {tmp_path}"
    run_train(monkeypatch, flags)
    numbered = sorted(path.name for path in tmp_path.glob("step*"))
    assert numbered == ["step-00000006.pt", "step-00000008.pt"]
    assert [weights(tmp_path / name)[0] for name in numbered] == [6, 8]
    assert_same(weights(tmp_path / numbered[1]), weights(tmp_path / "last.pt"))


def test_a_folder_is_of_one_run_at_a_time_and_a_killed_one_does_not_hold_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "last.pt.123.tmp").write_text("left half-written by a run that was killed")
    flags = f"--data book --out_dir {tmp_path} --max_iters 1 {SMALL}".split()
    script = "import sys, time; from data.lib.files import alone_in\nwith alone_in(sys.argv[1]): "
    script += "print('there', flush=True); time.sleep(60)"
    other = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(other, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == b"there\n"
            assert "another run is writing there" in mistake(train.main, flags, monkeypatch, capsys)
        finally:
            process.kill()
    run_train(monkeypatch, " ".join(flags))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "last.pt", "log.csv"]


def test_a_checkpoint_that_a_run_replaces_while_it_is_read_is_read_again(world, tmp_path, monkeypatch):
    """torch opens it by its name twice, and has the weights of one file in the places of the other."""
    path, new = shutil.copy(world / "gpt" / "last.pt", tmp_path / "last.pt"), world / "out" / "last.pt"
    opened, times = torch.UntypedStorage.from_file, []

    def open_late(*arguments):
        if not times:
            os.replace(shutil.copy(new, tmp_path / "new.pt"), path)
        times.append(1)
        return opened(*arguments)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", open_late)
    assert_same(read_checkpoint(path)["model"], read_checkpoint(new)["model"])
    assert len(times) == 3


def test_a_bit_that_flips_in_any_tensor_is_found(world, tmp_path):
    """In the weights and in what resuming needs; and a file without sums is not read at all."""
    content = (world / "out" / "last.pt").read_bytes()
    stored = torch.load(world / "out" / "last.pt", weights_only=True)
    there = [tensor for tensor in tensors(stored) if tensor.ndim]
    assert len(there) > 20
    for tensor in there:
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for offset in (0, len(data) - 1):
            damaged = bytearray(content)
            damaged[content.find(data) + offset] ^= 1
            (tmp_path / "damaged.pt").write_bytes(damaged)
            with pytest.raises(Mistake, match="damaged"):
                read_checkpoint(tmp_path / "damaged.pt")
    stored.pop("sums")
    torch.save(stored, tmp_path / "without.pt")
    with pytest.raises(Mistake, match="damaged"):
        read_checkpoint(tmp_path / "without.pt")


def test_weights_that_are_not_finite_are_said(world, tmp_path, monkeypatch, capsys):
    stored = torch.load(world / "out" / "ckpt.pt", weights_only=True)
    stored["model"]["head.weight"][0, 0] = torch.nan
    store(stored, tmp_path / "nan.pt")
    flags = ["--ckpt", str(tmp_path / "nan.pt")]
    assert "head.weight has values that are not finite" in mistake(sample.main, flags, monkeypatch, capsys)


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


def test_what_no_run_writes_is_refused(world, tmp_path, monkeypatch, capsys):
    stored = torch.load(world / "out" / "last.pt", weights_only=True)
    weight = stored["model"]["head.weight"]
    bad = weight.clone()
    bad[0, 0] = torch.nan
    adamw, muon = (dict(saved) for saved in stored["optimizers"])
    muon["state"] = {i: {name: torch.zeros(()) for name in kept} for i, kept in muon["state"].items()}
    strange = [
        ({"model": {**stored["model"], "head.weight": weight[:1].expand_as(weight)}}, "damaged"),  # one row
        ({"model": {**stored["model"], "head.weight": bad}, "more": bad.detach()}, "not finite"),
        ({"config": {**stored["config"], "conv_right": 99}}, "not of the size"),
        ({"config": {**stored["config"], "n_head": 16}}, "not of the size"),
        ({"config": {**stored["config"], "dropout": math.nan}}, "dropout is no value"),
        ({"config": {**stored["config"], "position": "learned"}}, "not a checkpoint of setitem"),
        ({"family": "mamba"}, "its family 'mamba' is unknown"),
        ({"family": "gpt2"}, "not a checkpoint of setitem"),
        ({"train": "x"}, "its flags are none of a run's"),
        ({"train": {**stored["train"], "context": "x"}}, "its flags are none of a run's"),
        *[({"step": step}, "not with these flags") for step in (-1, math.inf, 10**400)],
        ({"best": math.nan}, "not with these flags"),
        ({"optimizers": [adamw, muon]}, "not with these flags"),
    ]
    for change, words in strange:
        store({**stored, **change}, tmp_path / "last.pt")
        flags = f"--init_from resume --out_dir {tmp_path} --max_iters 9".split()
        assert words in mistake(train.main, flags, monkeypatch, capsys)
    store({**stored, "model": {**stored["model"], "head.weight": weight.T.clone().T}}, tmp_path / "last.pt")
    read_checkpoint(tmp_path / "last.pt")  # in another order, but each number once
    stored = torch.load(world / "bert.pt", weights_only=True)
    strange = [({"norm_eps": math.nan}, "norm_eps is no value"), ({"activation": "x"}, "not a checkpoint of setitem")]
    for change, words in strange:
        store({**stored, "config": {**stored["config"], **change}}, tmp_path / "bert.pt")
        assert words in mistake(sample.main, ["--ckpt", str(tmp_path / "bert.pt")], monkeypatch, capsys)


def zeros(n_bytes):
    """What meta.json says of a split of zeros."""
    digest, chunk = hashlib.sha256(), bytes(10**5)
    for _ in range(n_bytes // len(chunk)):
        digest.update(chunk)
    digest.update(bytes(n_bytes % len(chunk)))
    return {"tokens": n_bytes // 2, "bytes": n_bytes // 2, "sha256": digest.hexdigest()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_training_on_5_gb_takes_no_more_memory_than_on_a_little(tmp_path):
    """Of its own: pages of the file that are mapped are the system's, which takes them back. The file is
    sparse: its zeros are no bytes of the disk.
    """
    copy_project(tmp_path)
    script = "import runpy, sys; del sys.argv[0]; runpy.run_path('train.py', run_name='__main__'); "
    script += "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')))"
    sizes = []
    for n_bytes in (10**5, 5 * 10**9):
        folder = tmp_path / "data" / f"zeros{n_bytes}"
        folder.mkdir()
        meta = {"source": "", "train": zeros(n_bytes), "val": zeros(2000)}
        meta |= {"tokenizer": ByteTokenizer.state, "occurrences": [1] * 257}
        (folder / "meta.json").write_text(json.dumps(meta))
        for split, size in (("train", n_bytes), ("val", 2000)):
            with open(folder / f"{split}.bin", "wb") as file:
                file.truncate(size)
        flags = f"train.py --data {folder.name} --max_iters 3 --evals 1 --out_dir {n_bytes} {SMALL}"
        process = run_process("-c", script, *flags.split(), cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        sizes.append(int(process.stdout.split()[-1]) / 1024)
    assert sizes[1] < sizes[0] + 20


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    forward, calls = Transformer.forward, []

    def explode_later(model, idx, where=None, **more):
        calls.append(model.training)
        return forward(model, idx, where) * (torch.nan if sum(calls) > 6 else 1)

    monkeypatch.setattr(Transformer, "forward", explode_later)
    flags = f"--data book --out_dir {tmp_path} --max_iters 8 --evals 2 {SMALL}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        command(train.main)
    assert ended.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search("step [78]:", sentence)  # found where it is shown: at the end, or after half a second
    assert "last.pt" in sentence
    step, model, _ = weights(tmp_path / "last.pt")
    assert step == 4
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_help_shows_every_flag_with_its_default(monkeypatch, capsys):
    for main, config in ((train.main, train.TrainConfig), (sample.main, sample.SampleConfig)):
        monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            command(main)
        text = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        for name, value in vars(config()).items():
            assert f"--{name}" in text
            shown = " ".join(value) if name == "order" else value
            assert value in (None, ()) or f"default: {shown}" in text


def test_a_reader_that_leaves_is_no_mistake(world):
    script = f"{sys.executable} {ROOT}/sample.py --num_samples 2 --length 30 | head -c 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, cwd=world)
    assert b"Traceback" not in result.stderr


def test_corpora_larger_than_memory_are_mapped(world):
    train_split, val_split, _, _ = data.lib.corpus.load_corpus("book")
    assert isinstance(train_split, np.memmap)
    assert isinstance(val_split, np.memmap)


PARSE = "import ast, sys; [ast.parse(open(path, encoding='utf-8').read()) for path in sys.argv[1:]]\n"


def own_imports(paths):
    """The lines that import something of Python's own library."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", node.names[0].name)
                if module.partition(".")[0] in sys.stdlib_module_names:
                    yield ast.unparse(node)


@pytest.mark.parametrize("minor", range(10, 15))
def test_each_python_parses_it_and_has_what_it_imports(minor):
    """Each that is on this machine; of earlier ones than this one at least the grammar is known."""
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0][0] != "."]
    python = shutil.which(f"python3.{minor}")
    there = python is not None and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    if (3, minor) <= sys.version_info:
        for path in paths:
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, minor))
    elif not there:
        pytest.skip(f"no Python 3.{minor} on this machine")
    if there:
        script = PARSE + "\n".join({*own_imports(paths)})
        result = subprocess.run([python, "-c", script, *paths], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
