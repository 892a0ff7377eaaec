"""Several processes under torchrun are one run: the same losses, one checkpoint, one end."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toys import make_book

from data.lib.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--n_layer 2 --n_head 2 --n_embd 16 --context 32 --batch_size 8 --eval_tokens 512 --log_every 1"
SMALL += " --dtype float32 --max_iters 20"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# train.py in a world of one corpus, and there, in a process and a step, what is to happen.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import data.lib.corpus, train
from data.lib.processes import command
data.lib.corpus.DATA = Path("data").resolve()
draw, steps = train.draw_batch, []
def draw_batch(*args):
    steps.append(1)
    if os.environ.get("RANK", "0") == "1":
        exec(EVENT)
    return draw(*args)
train.draw_batch = draw_batch
command(train.main)
threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
print(*[name for name in threads if "gloo" in name], file=sys.stderr, end="")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_book(folder)
    return folder


def start(world, n, flags, event="pass"):
    """A run of train.py by n processes, under way."""
    script = world / "script.py"
    script.write_text(SCRIPT.replace("EVENT", repr(event)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    line = [sys.executable, *torchrun, script, "--data", "book", *f"{SMALL} {flags}".split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=world, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def run(world, n, flags, event="pass", code=0):
    """What it printed, and said on stderr."""
    out, err = (process := start(world, n, flags, event)).communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def losses(folder):
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    names = "loss", "val_nats_per_token"  # six digits each
    return torch.tensor([[float(row[name] or 0) for name in names] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "more",
    [
        "--grad_accum 2 --eval_tokens 32",
        "--attention draft:3",
        pytest.param("--attention block:8 --level uniform --weight elbo", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_have_the_losses_of_one(more, optimizer, world, tmp_path):
    """To 1e-5 over 20 steps, whether each keeps the whole model or pieces; and one model at the end. In one
    case the bound is of one window, and a process has none.
    """
    flags = f"{more} --optimizer {optimizer} --evals 2 --out_dir {tmp_path}"
    run(world, 1, f"{flags}/one")
    expected, model = losses(tmp_path / "one"), read_checkpoint(tmp_path / "one" / "last.pt")["model"]
    assert len(expected) == 20
    for name, shard in (("whole", ""), ("pieces", "--shard")):
        out, err = run(world, 2, f"{flags}/{name} {shard}")
        assert out.count("parameters on cpu") == 1
        assert "arning" not in err
        assert shard or "gloo" not in err  # no thread is left that could abort the process on its way out
        torch.testing.assert_close(losses(tmp_path / name), expected, rtol=0, atol=1.001e-5)
        weights = read_checkpoint(tmp_path / name / "last.pt")["model"]
        assert weights.keys() == model.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, model[key], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_resumes_in_any_number_of_processes_sharded_or_not(world, tmp_path):
    """No window repeated or skipped: the losses are those of a run that was never stopped."""
    flags = "--evals 4 --keep 4 --batch_size 12"
    run(world, 1, f"{flags} --out_dir {tmp_path}/one")
    expected, folder = losses(tmp_path / "one"), tmp_path / "one"
    for step, n, shard in ((5, 3, "--shard"), (10, 2, ""), (15, 1, "")):
        before = read_checkpoint(folder / f"step-{step:08}.pt")
        folder = shutil.copytree(folder, tmp_path / f"from-{step}")
        shutil.copy(folder / f"step-{step:08}.pt", folder / "last.pt")
        run(world, n, f"{flags} --init_from resume --out_dir {folder} {shard}")
        torch.testing.assert_close(losses(folder), expected, rtol=0, atol=1.001e-5)
        after = read_checkpoint(folder / "last.pt")
        assert list(before["optimizers"][1]) == list(after["optimizers"][1])
    out, _ = run(world, 2, f"--eval_only --init_from {folder}/last.pt --eval_tokens 512")
    assert out == run(world, 1, f"--eval_only --init_from {folder}/last.pt --eval_tokens 512")[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_processes_stop_after_one_step_and_leave_one_checkpoint(number, world, tmp_path):
    """Whichever of them the signal comes to."""
    event = f"if len(steps) == 7: os.kill(os.getpid(), {int(number)})"
    _, err = run(world, 2, f"--out_dir {tmp_path}/out", event, code=1)
    assert err.count("stopped at step 7") == 1
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] == 7
    run(world, 2, f"--init_from resume --out_dir {tmp_path}/out")
    assert len(losses(tmp_path / "out")) == 20


@pytest.mark.slow
def test_torchrun_itself_stops_all_processes_after_a_step(world, tmp_path):
    event = "if len(steps) == 7: import time; open('there', 'w').close(); time.sleep(1)"
    process = start(world, 2, f"--out_dir {tmp_path}/out --max_iters 1000000", event)
    while not (world / "there").exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "stopped at step" in err
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] >= 7


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("1 / (len(steps) - 4)", "ZeroDivisionError"),
        pytest.param("if len(steps) == 4: os.kill(os.getpid(), 9)", "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_when_one_process_dies_all_end_with_its_error(event, said, world, tmp_path):
    began = time.monotonic()
    _, err = run(world, 2, f"--out_dir {tmp_path}/out", event, code=1)
    assert said in err
    assert "closed by peer" not in err
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--batch_size 9", "--batch_size 9: not a multiple of"),
        ("--init_from resume --out_dir nowhere", "No such file"),
    ],
)
def test_a_mistake_is_said_once(flags, sentence, world):
    _, err = run(world, 2, flags, code=1)
    assert err.count(sentence) == 1


def test_shard_is_for_several_processes(world):
    _, err = run(world, 1, "--shard", code=2)
    assert err.strip().splitlines()[-1].startswith("script.py: --shard: ")
