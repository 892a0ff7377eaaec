"""Every two settings of a command go together, or are refused in a sentence."""

import random
from itertools import combinations

import pytest
import torch
from fuzz import run
from toys import make_book

import data.lib.corpus
import sample
import train
from data.lib.chat import BYTES
from data.lib.checkpoint import save_checkpoint
from data.lib.tokenizer import ByteTokenizer
from model import ModelConfig, Transformer

TRAIN = {
    "level": ["uniform", "bell:1.2", "grid:4", "0.15"],
    "one_level": [True],
    "widen": ["0", "0.5"],
    "slant": ["0", "2"],
    "spindle": ["0", "0.5"],
    "visible": ["0", "0.2"],
    "weight": ["elbo", "mean"],
    "prompt_len": ["0", "3", "0:8"],
    "n_layer": ["1", "2"],
    "n_head": ["1", "2", "4"],
    "n_embd": ["16", "32"],
    "context": ["16", "32"],
    "dropout": ["0", "0.1"],
    "conv": ["0", "1", "4", "5"],
    "attention": ["canvas", "block:4", "block:1", "causal"],
    "norm": ["pre", "post"],
    "position": ["rope", "learned"],
    "batch_size": ["4", "6"],
    "grad_accum": ["1", "2"],
    "grad_checkpoint": [True],
    "optimizer": ["muon", "adamw"],
    "lr": ["0.001", "0.01"],
    "beta2": ["0.95", "0.99"],
    "warmup": ["0", "0.5"],
    "weight_decay": ["0", "0.1"],
    "grad_clip": ["0", "1"],
    "max_iters": ["1", "2"],
    "epochs": ["0.001", "10"],
    "max_minutes": ["10"],
    "evals": ["1", "3"],
    "keep": ["0", "1"],
    "eval_tokens": ["64"],
    "log_every": ["1", "7"],
    "dtype": ["float32", "bfloat16", "float16"],
    "init_from": ["scratch", "canvas.pt", "layers.pt", "causal.pt"],
    "open_steps": ["0", "2"],
    "eval_only": [True],
    "device": ["cpu"],
    "compile": [True],
    "seed": ["0", "1"],
}
SHAPE = {"context": "32", "n_layer": "1", "n_embd": "16"}

# What a flag is nothing without.
NEEDS = {
    "context": {"prompt_len": "0"},
    "eval_only": {"init_from": "canvas.pt"},
    "open_steps": {"init_from": "causal.pt", "attention": "canvas"},
    "weight": {"level": "uniform"},
    "visible": {"weight": "mean"},
    "tau": {"order": "threshold"},
    "guidance": {"prompt": "a"},
    "score": {"order": "left"},
    "chat": {"prompt": "a"},
}
SAMPLE = {
    "ckpt": ["canvas.pt", "layers.pt", "causal.pt", "canvas.pt causal.pt"],
    "prompt": ["a", "a<mask*3>b", "a<mask*1:2>"],
    "prompt_file": ["book.txt"],
    "suffix": ["end"],
    "chat": [True],
    "length": ["20", "70"],
    "steps": ["1", "4"],
    "order": [*sample.ORDERS, "random left"],
    "tau": ["0", "0.9"],
    "block": ["4", "8"],
    "revise": ["0", "0.1"],
    "guidance": ["0", "1"],
    "temperature": ["0", "1"],
    "top_k": ["0", "3"],
    "top_p": ["0.5", "1"],
    "num_samples": ["1", "2"],
    "judge": ["canvas.pt", "causal.pt"],
    "score": ["book.txt"],
    "watch": [True],
    "save": ["run.html", "run.svg"],
    "dtype": ["float32", "bfloat16", "float16"],
    "device": ["cpu"],
    "seed": ["0", "5"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a corpus and a model of each kind of attention."""
    folder, n_threads = tmp_path_factory.mktemp("world"), torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small
    make_book(folder, n_lines=100)
    (folder / "book.txt").write_text("line 1 of")
    shape = {"n_layer": 2, "n_head": 1, "n_embd": 16, "context": 32}
    kinds = {"canvas": {}, "blocks": {"block": 8}, "causal": {"block": 1, "shift_id": 256, "conv": 0}}
    for name, more in kinds.items():
        model, nats = Transformer(ModelConfig(**shape, **more)), torch.ones(257)
        save_checkpoint(folder / f"{name}.pt", model, ByteTokenizer(), token_nats=nats, chat=BYTES)
    yield folder
    torch.set_num_threads(n_threads)


def pairs_of(row):
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def a_row_with(pair, settings, missing, rng):
    """A value for each flag that has some pair in it that no run had yet, for the others none."""
    row = dict(pair)
    for name, value in pair:
        row = {**NEEDS.get(name, {}), **row}

    def gain(one):
        return sum(frozenset([one, other]) in missing for other in row.items())

    for name in rng.sample(list(settings), len(settings)):
        best = max(((name, value) for value in settings[name]), key=gain)
        if name not in row and gain(best):
            row[name] = best[1]
    return row


def flags(row):
    for name, value in row.items():
        yield f"--{name}"
        if value is not True:
            yield from [value] if name == "prompt" else value.split()


def test_no_flag_is_missing():
    # data and out_dir are the world's; shard takes processes.
    assert vars(train.TrainConfig()).keys() == {*TRAIN, "data", "out_dir", "shard"}
    assert vars(sample.SampleConfig()).keys() == {*SAMPLE}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sample"])
def test_every_two_settings_run_or_are_refused_in_a_sentence(command, world, monkeypatch, tmp_path):
    """Rows of many flags at once. A row that is refused loses the flags that its sentence names, or else half
    of those that its pair does not need, until it runs, or only the pair and what it needs are left.
    """
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    monkeypatch.chdir(world)
    monkeypatch.setattr(Transformer, "compile", lambda model: None)  # a minute each time
    main, settings = {"train": (train.main, TRAIN), "sample": (sample.main, SAMPLE)}[command]
    rng, n_runs, refused = random.Random(0), 0, []

    def refusal(row):
        nonlocal n_runs
        n_runs += 1
        more = {"ckpt": "canvas.pt"}
        if main is train.main:
            more = {"data": "book", "max_iters": "2", "out_dir": str(tmp_path / str(n_runs)), **SHAPE}
            if row.get("init_from", "scratch") != "scratch":
                more = {name: value for name, value in more.items() if name not in ("n_layer", "n_embd")}
        code, said = run(main, flags(more | row))
        sentences = [line for line in said.splitlines() if line.startswith("script.py: ")]
        assert code == 0 or (code == 2 and len(sentences) == 1), (row, said)
        return "".join(sentences)

    values = [(name, value) for name in settings for value in settings[name]]
    every = [pair for pair in combinations(values, 2) if pair[0][0] != pair[1][0]]
    missing = set(map(frozenset, every))
    while missing:
        pair = rng.choice([pair for pair in every if frozenset(pair) in missing])
        row = a_row_with(pair, settings, missing, rng)
        least = a_row_with(pair, {}, missing, rng)
        while (sentence := refusal(row)) and row != least:
            others = [name for name in row if name not in least]
            named = [name for name in others if f"--{name} " in sentence]
            for name in named or rng.sample(others, (len(others) + 1) // 2):
                del row[name]
        missing -= {frozenset(pair)} if sentence else pairs_of(row)
        refused += [pair] if sentence else []
    print(f"{command}: {len(every):,} pairs in {n_runs} runs, {len(refused)} refused")
    assert {setting for pair in every if pair not in refused for setting in pair} == set(values)
    assert len(refused) < len(every) / 10
