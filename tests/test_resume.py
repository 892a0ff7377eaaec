"""A run that is stopped, killed or refused goes on as if nothing had happened."""

import csv
import re
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from world import ROOT, SMALL, assert_same, mistake, no_space_beyond, run_train, state_of, stopped_in, weights

import data.lib.corpus
import train
from data.lib.errors import command
from data.lib.tokenizer import ByteTokenizer
from data.text.prepare import prepare
from model import Transformer

pytestmark = pytest.mark.usefixtures("in_world")


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
    sentence = "step 2: no checkpoint (File too large); the next evaluation tries again"
    assert sentence in capsys.readouterr().err
    for name in ("last.pt", "ckpt.pt"):
        assert_same(*(weights(tmp_path / folder / name) for folder in ("free", "full")))
    logs = [(tmp_path / folder / "log.csv").read_text().count("\n") for folder in ("free", "full")]
    assert logs == [7, 7]


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
    assert "a smaller --lr may help" in sentence
    step, model, _ = weights(tmp_path / "last.pt")
    assert step == 4
    assert all(tensor.isfinite().all() for tensor in model.values())
