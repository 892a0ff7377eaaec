"""Every two settings of a command go together, or are refused in a sentence; a method is a row of settings."""

import contextlib
import dataclasses
import io
import random
import sys
from itertools import combinations, permutations

import pytest
import torch
from toys import make_book

import data.lib.corpus
import data.lib.train_settings
import sample
import train
from data.lib.chat import BYTES
from data.lib.checkpoint import save_checkpoint
from data.lib.errors import Mistake, command
from data.lib.flags import Attention, Level, Rate, Span, as_plain, parse
from data.lib.tokenizer import ByteTokenizer
from data.lib.train_settings import check_memory, check_training, settle
from model import ModelConfig, Transformer, load_checkpoint

TRAIN = {
    "method": [*train.METHODS],
    "level": ["uniform", "bell:1.2", "grid:4", "0.15"],
    "one_level": [True],
    "widen": ["0", "0.5"],
    "rate": ["t", "slant:2", "spindle:0.5"],
    "visible": ["0", "0.2"],
    "weight": ["elbo", "mean"],
    "prompt_len": ["0", "3", "0:8"],
    "n_layer": ["1", "2"],
    "n_head": ["1", "2", "4"],
    "n_embd": ["16", "32"],
    "context": ["16", "32"],
    "dropout": ["0", "0.1"],
    "conv": ["0", "1", "4", "5"],
    "attention": ["canvas", "shifted", "block:4", "block:1", "causal", "draft:3"],
    "freeze": [True],
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
    "init_from": ["scratch", "canvas.pt", "shifted.pt", "blocks.pt", "causal.pt"],
    "eval_only": [True],
    "device": ["cpu"],
    "compile": [True],
    "seed": ["0", "1"],
}
SHAPE = {"context": "32", "n_layer": "1", "n_embd": "16"}

# What a flag, or one value of it, is nothing without.
NEEDS = {
    "context": {"prompt_len": "0"},
    "eval_only": {"init_from": "canvas.pt"},
    "freeze": {"init_from": "causal.pt", "attention": "draft:3"},
    "draft_len": {"ckpt": "draft.pt"},
    "order draft": {"ckpt": "draft.pt"},
    "weight": {"level": "uniform"},
    "visible": {"weight": "mean"},
    "tau": {"order": "threshold"},
    "gamma": {"order": "entropy-bound"},
    "guidance": {"prompt": "a"},
    "score": {"order": "left"},
    "chat": {"prompt": "a"},
}
SAMPLE = {
    "ckpt": ["canvas.pt", "shifted.pt", "blocks.pt", "causal.pt", "draft.pt", "canvas.pt causal.pt"],
    "prompt": ["a", "a<mask*3>b"],
    "prompt_file": ["book.txt"],
    "suffix": ["end"],
    "chat": [True],
    "length": ["20", "70"],
    "steps": ["1", "4"],
    "order": [*sample.ORDERS, "remask", "draft", "random left"],
    "draft_len": ["2", "5"],
    "tau": ["0", "0.9"],
    "gamma": ["0", "0.5"],
    "block": ["4", "8"],
    "guidance": ["0", "1"],
    "temperature": ["0", "1"],
    "top_k": ["0", "3"],
    "top_p": ["0.5", "1"],
    "num_samples": ["1", "2"],
    "judge": ["canvas.pt", "causal.pt"],
    "score": ["book.txt"],
    "watch": [True],
    "save": ["run.html", "run.svg"],
    "overwrite": [True],
    "dtype": ["float32", "bfloat16", "float16"],
    "device": ["cpu"],
    "seed": ["0", "5"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a corpus and a model of each kind of attention."""
    folder, n_threads = tmp_path_factory.mktemp("world"), torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small
    make_book(folder, n_lines=140)
    (folder / "book.txt").write_text("line 1 of")
    shape = {"n_layer": 2, "n_head": 1, "n_embd": 16, "context": 32}
    kinds = {"canvas": {}, "shifted": {"shift_id": 256}, "blocks": {"block": 8}}
    kinds["causal"] = {"block": 1, "shift_id": 256, "conv": 0}
    kinds["draft"] = {"block": 1, "shift_id": 256, "draft_len": 3}
    for name, more in kinds.items():
        save_checkpoint(folder / f"{name}.pt", Transformer(ModelConfig(**shape, **more)), ByteTokenizer(), chat=BYTES)
    yield folder
    torch.set_num_threads(n_threads)


def run(main, arguments):
    """The exit code of a command, and what it said on stderr."""
    sys.argv, err = ["script.py", *map(str, arguments)], io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            command(main)
    except SystemExit as ended:
        return ended.code, err.getvalue()
    return 0, ""


def test_a_flag_is_its_text():
    for kind, texts in (
        (Level, ("uniform", "bell:1.2", "bell:0.123456789", "grid:100", "0.15", "1")),
        (Rate, ("t", "slant:1", "slant:0.25", "spindle:0.3")),
        (Attention, ("canvas", "shifted", "block:4", "causal", "draft:8")),
        (Span, ("16", "0:64")),
    ):
        assert [str(kind.from_text(text)) for text in texts] == list(texts)


def pairs_of(row):
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def a_row_with(pair, settings, missing, rng):
    """A value for each flag that has some pair in it that no run had yet, for the others none."""
    row = dict(pair)
    for name, value in pair:
        row = {**NEEDS.get(name, {}), **NEEDS.get(f"{name} {value}", {}), **row}

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
    # --page doesn't end, and --race takes the included models: test_live.py and test_sample_command.py have them.
    assert vars(sample.SampleConfig()).keys() == {*SAMPLE, "page", "race"}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "sample"])
def test_every_two_settings_run_or_are_refused_in_a_sentence(script, world, monkeypatch, tmp_path):
    """Rows of many flags at once. A row that is refused loses the flags that its sentence names, or else half
    of those that its pair does not need, until it runs, or only the pair and what it needs are left.
    """
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    monkeypatch.chdir(world)
    monkeypatch.setattr(Transformer, "compile", lambda model: None)  # a minute each time
    main, settings = {"train": (train.main, TRAIN), "sample": (sample.main, SAMPLE)}[script]
    rng, n_runs, refused = random.Random(0), 0, []

    def refusal(row):
        nonlocal n_runs
        n_runs += 1
        for path in world.glob("run.*"):  # which --save would refuse to replace
            path.unlink()
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
    print(f"{script}: {len(every):,} pairs in {n_runs} runs, {len(refused)} refused")
    assert {setting for pair in every if pair not in refused for setting in pair} == set(values)
    assert len(refused) < len(every) / 10


# --- methods -------------------------------------------------------------------------------------

STARTS = "scratch", "canvas.pt", "shifted.pt", "blocks.pt", "causal.pt"


def settled(words, monkeypatch):
    """The config that `train.py` with these words comes to, and the ModelConfig of the model that it loads, if any."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    config, model, *_ = settle(parse(train.TrainConfig, ""), train.TrainConfig, train.METHODS, load_checkpoint)
    return config, model and model.config


def words_of(method):
    return [*flags(train.METHODS[method])]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", train.METHODS)
def test_a_method_equals_its_flags(method, start, world, monkeypatch):
    """It is for a canvas unless it says otherwise, whatever the checkpoint was."""
    monkeypatch.chdir(world)
    begin = ["--context", "32", "--init_from", start]
    config, model_config = settled([*begin, "--method", method], monkeypatch)
    by_flags = settled([*begin, "--attention", "canvas", *words_of(method)], monkeypatch)
    assert config.method == method
    assert (dataclasses.replace(config, method="default"), model_config) == by_flags


@pytest.mark.parametrize("start", ["scratch", "canvas.pt"])
def test_a_flag_beside_a_method_wins(start, world, monkeypatch):
    """On either side of it; what no flag says stays as the method has it."""
    monkeypatch.chdir(world)
    begin = ["--context", "32", "--init_from", start]
    for method, other in permutations(train.METHODS, 2):
        if "causal" in train.METHODS[method].values() and "attention" not in train.METHODS[other]:
            continue  # refused: each token is a hole
        words = [*begin, "--method", method], words_of(other)
        config = settled([*words[0], *words[1]], monkeypatch)[0]
        assert config == settled([*words[1], *words[0]], monkeypatch)[0]
        alone = settled(words[0], monkeypatch)[0]
        expected = {**as_plain(alone), **train.METHODS[other]}
        if config.attention.kind != "causal":
            assert as_plain(config) == expected
    config = settled([*begin, "--method", "mdlm", "--attention", "causal"], monkeypatch)[0]
    assert (config.level, config.weight, config.prompt_len) == (Level("fixed", 1.0), "mean", Span(0, 0))
    for method in ("ar-diffusion", "diffusionbert", "roberta-diffusion"):  # a GPT has no noise, whatever the method
        config = settled([*begin, "--method", method, "--attention", "causal"], monkeypatch)[0]
        assert (config.rate, config.level, config.one_level) == (Rate("t"), Level("fixed", 1.0), False)
    with pytest.raises(Mistake, match="each token is a hole"):
        settled([*begin, "--method", "gpt", "--level", "uniform"], monkeypatch)


def test_a_run_resumes_with_its_method_and_no_other(world, monkeypatch, tmp_path):
    """Whoever repeats the flags of a run gets that run, with what they overrode at first."""
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    out = {"data": "book", "eval_tokens": "64", "out_dir": str(tmp_path / "out")}
    began = {**out, "method": "mdlm", "rate": "slant:1", "max_iters": "1", **SHAPE}
    assert run(train.main, flags(began)) == (0, "")
    resume = {**out, "init_from": "resume", "max_iters": "2"}
    code, said = run(train.main, flags({**resume, "method": "d3pm"}))
    assert code == 2
    assert "--method d3pm: the run in " in said
    assert said.endswith("has mdlm\n")
    assert run(train.main, flags({**resume, "method": "mdlm"})) == (0, "")
    checkpoint = load_checkpoint(tmp_path / "out" / "last.pt")[2]
    assert checkpoint["step"] == 2
    assert [checkpoint["train"][name] for name in ("method", "level", "rate")] == ["mdlm", "uniform", "slant:1"]


def test_the_bound_under_a_method_is_that_under_its_flags(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    printed = []
    for more in ("--method d3pm", "--level grid:100", "--method mdlm", "", "--method ar-diffusion", "--rate slant:1"):
        arguments = f"train.py --eval_only --init_from canvas.pt --data book --eval_tokens 256 {more}"
        monkeypatch.setattr(sys, "argv", arguments.split())
        train.main()
        printed.append(capsys.readouterr().out)
    assert printed[0::2] == printed[1::2]
    assert len(set(printed)) == 3
    for method, name in (("bert", "--level 0.15"), ("diffusionbert", "--rate spindle:0.3")):
        words = ["--eval_only", "--init_from", "canvas.pt", "--method", method]
        with pytest.raises(Mistake, match=name):
            check_training(settled(words, monkeypatch)[0])


@pytest.mark.parametrize("attention", ["canvas", "shifted"])
def test_a_canvas_is_read_as_its_checkpoint_was(attention, world, monkeypatch):
    """From a GPT `canvas` is `shifted`, its shift stays; a canvas gets a shift when it is asked for one."""
    monkeypatch.chdir(world)
    for start in STARTS:
        config, model_config = settled(["--context", "32", "--init_from", start, "--attention", attention], monkeypatch)
        shifts = attention == "shifted" or start in ("causal.pt", "shifted.pt")
        assert config.attention.kind == ("shifted" if shifts else "canvas")
        if model_config:
            assert (model_config.block, model_config.shift_id) == (None, 256 if shifts else None)


def test_blocks_must_divide_a_corpus_s_canvas(monkeypatch):
    """Its length is that of the corpus's canvases, whatever --context is by default."""
    monkeypatch.setattr(data.lib.train_settings, "canvas_len", lambda name: 72)
    config = settled(["--attention", "block:9"], monkeypatch)[0]
    assert (config.context, config.attention) == (72, Attention("block", 9))
    config = settled(["--attention", "block:256"], monkeypatch)[0]
    with pytest.raises(Mistake, match="--attention block:256: K must divide --context 72"):
        check_training(config)


def test_vectors_of_16_bits_take_half_the_memory_of_float32(monkeypatch):
    """Two runs that differ in precision alone, on a device that has room for the smaller one."""
    monkeypatch.setattr(data.lib.train_settings, "memory_of", lambda device: 10**9)
    model = Transformer(ModelConfig(n_layer=6, n_embd=64, context=256))
    config = train.TrainConfig(batch_size=512, context=256, device="cpu", dtype="bfloat16")
    check_memory(config, model.config, model, Transformer.Layer)
    config.dtype = "float32"
    with pytest.raises(Mistake, match="training needs 2 GB or more .* there are 1 GB"):
        check_memory(config, model.config, model, Transformer.Layer)
