"""Made-up files of published models, and what it takes to run the commands on them."""

import json
import random
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import data.lib.checkpoint
import data.lib.corpus
import data.text.prepare as text_prepare
import data.weights.hub
import data.wikitext.prepare as wikitext_prepare
import sample
import train
from data.lib.errors import command

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
FIRST = ("<s>", "<pad>", "</s>", "<unk>")
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PROTEINS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def shape(width, layers, heads, inside, positions=26):
    """The settings that give a model its shape."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inside,
        "max_position_embeddings": positions,
    }


CLASSES = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
}


@pytest.fixture
def data_folder(tmp_path, monkeypatch, request):
    """Everything is written to a folder of the test's own."""
    (tmp_path / "data").mkdir()
    for module in (data.lib.corpus, request.module.prepare, wikitext_prepare):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run(monkeypatch, request):
    """Call a command's main, that of the `prepare` which a module tests, with these arguments."""

    def run(*arguments, main=None, **more):
        main = main or request.module.prepare.main
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        main(**more)

    return run


@pytest.fixture
def mistake(run, tmp_path, capsys):
    """Call a command that must end in one sentence, with exit code 2 and no file changed; the sentence."""

    def mistake(*arguments, main=None):
        capsys.readouterr()
        before = state_of(tmp_path)
        with pytest.raises(SystemExit) as ended:
            command(lambda: run(*arguments, main=main))
        captured = capsys.readouterr()
        assert (ended.value.code, captured.out) == (2, "")
        assert len(captured.err.strip().splitlines()) == 1, captured.err
        assert state_of(tmp_path) == before
        return captured.err

    return mistake


@pytest.fixture
def use(run, tmp_path, capsys):
    """Call every command with a checkpoint, and with no flag that names its model."""

    def use(path):
        capsys.readouterr()
        run("--ckpt", path, "--prompt", "def", "--watch", main=sample.main)
        assert capsys.readouterr().out.startswith("def")
        (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 200)
        run("--ckpt", path, "--score", tmp_path / "text.txt", "--order", "left", main=sample.main)
        assert "nats per token" in capsys.readouterr().out
        run(tmp_path / "text.txt", "--name", "own", "--tokenizer", path, main=text_prepare.main)
        capsys.readouterr()
        run("--init_from", path, "--eval_only", "--data", "own", main=train.main)
        assert capsys.readouterr().out.startswith("own: NELBO")

    return use


def state_of(folder):
    """Everything below folder, files with their content."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def assert_equal(ours, theirs):
    """Assert that two dicts of tensors are the same to the bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].equal(theirs[name]), name


@pytest.fixture(scope="session")
def merges():
    """1,500 merges of a byte-level BPE, learned from the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([library_text()[:500_000]], trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def library_text():
    paths = sorted(LIBRARY.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def write_bpe(folder, merges, first=FIRST, last=("<mask>",)):
    """vocab.json and merges.txt; returns the number of tokens."""
    text = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    tokens = list(dict.fromkeys([*first, *text, *last]))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return len(tokens)


def random_model(kind, **settings):
    """transformers' model with random weights, those of the padding too."""
    config_class, model_class = CLASSES[kind]
    settings = shape(32, 2, 4, 48) | settings
    torch.manual_seed(0)
    model = model_class(config_class(initializer_range=settings["hidden_size"] ** -0.5, **settings)).eval()
    move_biases(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(std=model.config.initializer_range)
    return model


@torch.no_grad()
def move_biases(model):
    """Make no bias zero, and no norm without effect."""
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a bias, which was 0, or a norm's weight, which was 1
            parameter += 0.3 * torch.randn_like(parameter)


def write_roberta(folder, merges, first=FIRST, **settings):
    """A folder with the files of a random RoBERTa but its weights; returns its model."""
    folder.mkdir()
    vocab_size = write_bpe(folder, merges, first)
    settings = {"layer_norm_eps": 1e-5, "pad_token_id": first.index("<pad>"), **settings}
    model = random_model("roberta", vocab_size=vocab_size, **settings)
    model.config.save_pretrained(folder)
    return model


def write_bert(folder, tokens=PROTEINS, **settings):
    """A folder with the files of a random BERT but its weights; returns its model."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    pad = tokens.index("[PAD]")
    model = random_model("bert", vocab_size=len(tokens), pad_token_id=pad, **settings)
    model.config.save_pretrained(folder)
    return model


def save_weights(folder, tensors, **options):
    torch.save(tensors, folder / "pytorch_model.bin", **options)


@pytest.fixture(scope="session")
def originals(merges, tmp_path_factory):
    """A small RoBERTa and a small BERT, whole: the folder of each and its model."""
    folder = tmp_path_factory.mktemp("originals")
    found = {
        "roberta": write_roberta(folder / "roberta", merges[:200]),
        "bert": write_bert(folder / "bert"),
    }
    for kind, model in found.items():
        save_weights(folder / kind, model.state_dict())
    return {kind: (folder / kind, model) for kind, model in found.items()}


@pytest.fixture
def roberta(originals, tmp_path):
    """A copy of the small RoBERTa's folder, for the test to change."""
    return shutil.copytree(originals["roberta"][0], tmp_path / "model")


def edit(path, **changes):
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(tensors, pattern, by):
    return {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}


def without(tensors, *ends):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def same_vocabulary(a, b):
    """Whether two folders' vocab.json and merges.txt say the same."""
    ids = [json.loads((folder / "vocab.json").read_text(encoding="utf-8")) for folder in (a, b)]
    lines = [(folder / "merges.txt").read_text(encoding="utf-8").splitlines() for folder in (a, b)]
    return ids[0] == ids[1] and lines[0] == lines[1]


@pytest.fixture(scope="session")
def mixed_lines():
    """20,000 lines: code, prose, Unicode from every plane, control characters, long runs of spaces."""
    draw = random.Random(0)
    project = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("data/**/*.py"), *ROOT.glob("tests/*.py")]
    project = [line for path in sorted(project) for line in path.read_text(encoding="utf-8").splitlines(True)]
    lines = draw.choices(project, k=3000) + draw.sample(library_text().splitlines(True), 12000)
    for i in range(2500):
        points = draw.choices(range(i % 17 << 16, (i % 17 + 1) << 16), k=draw.randrange(1, 20))
        lines.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    controls = [chr(point) for point in (*range(32), *range(0x7F, 0xA1), 0x2028, 0xFEFF)]
    lines += ["".join(draw.choices([*controls, "a", "é", "7"], k=draw.randrange(1, 30))) for _ in range(1250)]
    spaces = [" ", " " * 17, " " * 300, "\t", "\n", "\r\n", "\u3000", "\xa0"]
    lines += ["".join(draw.choices([*spaces, "a", "It's", "漢"], k=draw.randrange(1, 20))) for _ in range(1250)]
    assert len(lines) == 20_000
    return lines
