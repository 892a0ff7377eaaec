"""A folder with a small corpus and checkpoints, made once, and what it takes to run the commands in it."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from toys import make_book

import data.lib.corpus
import data.lib.report
import data.lib.session
import data.lib.training
import sample
import train
from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import spaced_windows
from data.lib.errors import command
from data.lib.tokenizer import ByteTokenizer
from data.weights import bert, gpt2
from model import load_checkpoint

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


@pytest.fixture
def in_world(world, monkeypatch):
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    monkeypatch.setattr(data.lib.session, "SHIPPED", world / "out" / "ckpt.pt")
    monkeypatch.chdir(world)


def run_train(patch, flags):
    patch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()


def run_process(*arguments, **kwargs):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)


def copy_project(folder):
    """The code without its corpora, as in a fresh clone."""
    for path in [ROOT / "model.py", ROOT / "train.py", ROOT / "sample.py", *(ROOT / "data").rglob("*.*")]:
        if path.suffix in (".py", ".html", ".svg"):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def windows(n_tokens):
    """Windows of the validation split, evenly spaced, about n_tokens in all: (N, 32)."""
    return torch.from_numpy(spaced_windows(data.lib.corpus.load_corpus("book")[1], 32, n_tokens)[0])


def state_of(folder):
    """Every file below folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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


def sample_text(flags, monkeypatch, capsys):
    """What sample.py prints: (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()
    return capsys.readouterr()


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


@contextmanager
def no_space_beyond(size):
    """A limit on the size of files stands in for a full disk: a write fails half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
