"""Corpora: what is in them, where they are split, and that they are whole or not there."""

import hashlib
import json
import os
import random
from contextlib import suppress
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizers import GPT2_PATTERN, bpe

import data.lib.corpus
import data.python.prepare as python_prepare
import train
from data.lib.corpus import load_corpus, split_at, windows_at, write_corpus, write_tokens
from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.tokenizer import BPETokenizer, ByteTokenizer
from data.text.prepare import prepare
from model import load_checkpoint

SMALL = "--n_layer 1 --n_head 1 --n_embd 16 --context 16 --batch_size 2 --max_iters 2 --evals 1"
SMALL += " --eval_tokens 64 --prompt_len 0 --dtype float32"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own."""
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path / "data")
    return tmp_path / "data"


# --- text ----------------------------------------------------------------------------------------


def test_a_corpus_is_the_text_cut_at_nine_tenths(tmp_path):
    text = "naïve façade — 漢字 🙂\n" * 5000
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    meta = prepare(tmp_path / "book.txt", "book", ByteTokenizer())
    train, val, tokenizer, loaded = load_corpus("book")
    raw = text.encode()
    assert train.dtype == val.dtype == np.uint16
    assert bytes(train.astype(np.uint8)) + bytes(val.astype(np.uint8)) == raw
    assert 0 <= int(len(raw) * 0.9) - len(train) < 4  # a character is never cut
    assert tokenizer.decode(train.tolist()) + tokenizer.decode(val.tolist()) == text
    assert loaded == meta
    for split, tokens in (("train", train), ("val", val)):
        assert meta[split]["tokens"] == meta[split]["bytes"] == len(tokens)
        assert meta[split]["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()


def test_a_validation_split_may_come_from_a_file_of_its_own(tmp_path):
    texts = "some text\n" * 26, "more\n" * 52
    for name, text in zip(("train", "val"), texts):
        (tmp_path / name).write_text(text)
    prepare(tmp_path / "train", "two", ByteTokenizer(), tmp_path / "val")
    assert [bytes(split.astype(np.uint8)).decode() for split in load_corpus("two")[:2]] == [*texts]
    (tmp_path / "val").write_text("five\n")
    with pytest.raises(Mistake, match="its val split has 5 tokens; 256 are needed"):
        prepare(tmp_path / "train", "two", ByteTokenizer(), tmp_path / "val")


def test_a_folder_is_its_texts_in_order(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (("b/2.txt", "two\r\n"), ("a.txt", "one "), ("c.txt", "three" * 2000), (".git/x", "no")):
        (folder / name).write_bytes(text.encode())
    (folder / "b" / "picture.png").write_bytes(b"\x89PNG")
    prepare(folder, "folder", bpe())
    assert "left out: " in (said := capsys.readouterr().err)
    assert "picture.png: not UTF-8 text" in said
    train, val, tokenizer, meta = load_corpus("folder")
    assert tokenizer.decode([*train.tolist(), *val.tolist()]) == "one two\r\n" + "three" * 2000
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 10_009


@given(st.lists(st.text(max_size=20), max_size=10), st.integers(0, 300))
def test_split_at_keeps_all_text_in_order(pieces, cut):
    pairs = list(split_at(pieces, cut))
    train = "".join(text for split, text in pairs if split == "train")
    val = "".join(text for split, text in pairs if split == "val")
    assert train + val == "".join(pieces)
    assert len(train.encode()) <= cut
    assert not val or cut - len(train.encode()) < 4


def test_reading_in_pieces_is_reading_at_once(tmp_path):
    text = "".join(random.Random(0).choices("aé漢🙂\n\r ", k=5000))
    (tmp_path / "t").write_bytes(text.encode())
    for size in (1, 7, 64, 10**6):
        assert "".join(data.lib.corpus.read_pieces(tmp_path / "t", size)) == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "too little"), (b"fine \xff", "not UTF-8"), (b"a", "too little")],
    ids=["empty", "not UTF-8", "one byte"],
)
def test_text_that_cannot_be_a_corpus_leaves_nothing(content, reason, tmp_path, data_folder):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(Mistake, match=reason):
        prepare(tmp_path / "bad", "bad", ByteTokenizer())
    assert not (data_folder / "bad").exists()


def test_a_failed_preparation_leaves_the_corpus_that_was_there(tmp_path):
    (tmp_path / "good").write_text("good text " * 300)
    (tmp_path / "bad").write_bytes(b"fine at first " * 200_000 + b"\xff")
    prepare(tmp_path / "good", "x", ByteTokenizer())
    with pytest.raises(Mistake):
        prepare(tmp_path / "bad", "x", ByteTokenizer())
    assert load_corpus("x")[3]["source"] == "good"
    assert len(list((data.lib.corpus.DATA / "x").iterdir())) == 3


def test_a_corpus_that_is_missing_is_told_which_command_makes_it():
    with pytest.raises(Mistake, match="ready are: none; `python data/text/prepare.py FILE --name NAME` makes one"):
        load_corpus("nope")
    write_corpus("mine", [("train", "abc"), ("val", "d")], ByteTokenizer(), "test")
    with pytest.raises(Mistake, match="ready are: mine"):
        load_corpus("nope")


MADE_BY = {
    "fairytales": "data/fairytales/prepare.py",
    "shakespeare": "data/shakespeare/prepare.py",
    "wikitext2": "data/wikitext/prepare.py wikitext2",
    "wikitext103": "data/wikitext/prepare.py wikitext103",
    "text8": "data/text8/prepare.py",
    "enwik8": "data/text8/prepare.py enwik8",
    "digits": "data/digits/prepare.py",
    "mnist": "data/digits/prepare.py mnist",
}


@pytest.mark.parametrize("name", MADE_BY)
def test_a_corpus_of_ours_that_is_missing_is_made_by_its_script(name, monkeypatch):
    folder = data.lib.corpus.Path(data.lib.corpus.__file__).parents[1]
    if (folder / name / "meta.json").exists():
        pytest.skip("it is there")
    monkeypatch.setattr(data.lib.corpus, "DATA", folder)
    with pytest.raises(Mistake, match=f"`python {MADE_BY[name]}` makes one"):
        load_corpus(name)


BROKEN = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "empty": {},
    "no counts": {"occurrences": None},
    "a count too few": {"occurrences": [0] * 256},
    "a count that is no number": {"occurrences": ["0"] * 257},
    "no sha256": {"val": {"tokens": 1, "bytes": 1, "sha256": None}},
    "no bytes": {"val": {"tokens": 1, "bytes": 0, "sha256": ""}},
    "other tokens": {"val": {"tokens": 2, "bytes": 1, "sha256": ""}},
    "no tokenizer": {"tokenizer": {"kind": "klingon"}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_corpus_whose_meta_json_is_broken_is_refused(kind, data_folder):
    meta = write_corpus("mine", [("train", "abc"), ("val", "d")], ByteTokenizer(), "test")
    broken = BROKEN[kind]
    text = broken if type(broken) is str else json.dumps(broken and {**meta, **broken})
    (data_folder / "mine" / "meta.json").write_text(text)
    with pytest.raises(Mistake, match="not a whole corpus"):
        load_corpus("mine")


def test_a_file_of_another_length_is_refused(data_folder):
    write_corpus("mine", [("train", "abc"), ("val", "d")], ByteTokenizer(), "test")
    for size in (8, 4, 3, 0):
        os.truncate(data_folder / "mine" / "train.bin", size)
        with pytest.raises(Mistake, match="not a whole corpus"):
            load_corpus("mine")


def test_a_token_that_is_not_the_tokenizer_s_is_found_where_it_is_read(data_folder):
    write_corpus("mine", [("train", "some text"), ("val", "more text")], ByteTokenizer(), "test")
    path = data_folder / "mine" / "val.bin"
    ids = np.fromfile(path, np.uint16)
    for wrong in (257, 65535):
        ids[-1] = wrong
        ids.tofile(path)
        _, val, _, _ = load_corpus("mine")
        assert windows_at(val, np.array([[0]]), 8)[0].tolist() == [list(b"more tex")]
        with pytest.raises(Mistake, match=f"val.bin: token {wrong} is not one of its tokenizer's"):
            windows_at(val, np.array([[1]]), 8)


def test_a_context_longer_than_a_split_is_refused():
    write_corpus("mine", [("train", "some text"), ("val", "more")], ByteTokenizer(), "test")
    load_corpus("mine", 4)
    with pytest.raises(Mistake, match="its val split has 4 tokens, fewer than one --context of 5"):
        load_corpus("mine", 5)


def test_an_interrupted_preparation_leaves_nothing(data_folder):
    def pieces():
        yield "train", np.zeros(100, np.uint8), 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens("x", pieces(), ByteTokenizer(), "test")
    assert not (data_folder / "x").exists()


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"one")
    with suppress(RuntimeError), replacing(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


# --- the standard library ------------------------------------------------------------------------


def test_python_files_are_real_sources_each_once(tmp_path):
    for name, text in {
        "os.py": "import sys\n",
        "json/decoder.py": "class JSONDecoder: ...\n",
        "copy_of_os.py": "import sys\n",
        "token.py": "# Auto-generated by Tools/build/generate_token.py\n",
        "html/entities.py": "html5 = {}\n",
        "encodings/cp437.py": "table = ''\n",
        "test/test_os.py": "assert 1\n",
        "json/tests/test_json.py": "assert 1\n",
        "site-packages/six.py": "six = 6\n",
        "pip/_vendor/x.py": "vendored = 1\n",
        "_sysconfigdata__linux.py": "build_time_vars = {}\n",
        "empty.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    found = dict(python_prepare.source_files(tmp_path))
    assert sorted(found.values()) == ["class JSONDecoder: ...\n", "import sys\n"]


def test_python_split_is_by_file_and_stable():
    assert [python_prepare.split_of(name) for name in ("os.py", "argparse.py", "abc.py")] == ["train"] * 3
    splits = [python_prepare.split_of(f"package/module_{i}.py") for i in range(5000)]
    assert 0.08 < splits.count("val") / 5000 < 0.12


def test_python_corpus_of_this_interpreter(monkeypatch):
    """As byte pairs, the default, and as bytes; both are the same text."""
    texts = []
    for more in [], ["--tokenizer", "bytes"]:
        monkeypatch.setattr("sys.argv", ["prepare.py", "--name", "lib", *more])
        python_prepare.main()
        *splits, tokenizer, meta = load_corpus("lib")
        texts.append([tokenizer.decode(split.tolist()) for split in splits])
        assert tokenizer.vocab_size == (257 if more else 8193)
        assert [len(text.encode()) for text in texts[-1]] == [meta[split]["bytes"] for split in ("train", "val")]
    assert texts[0] == texts[1]
    train, val = texts[0]
    assert len(train) > 4_000_000
    assert 0.03 < len(val) / len(train) < 0.3
    assert "def " in train
    assert python_prepare.split_of("argparse.py") == "train"
    assert "class ArgumentParser" in train
    assert "class ArgumentParser" not in val


# --- many tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A tokenizer of more tokens than 16 bits can count, whose longest words have the largest ids."""
    rare = [f"\xff{a}{b}" for a, b in product(map(chr, range(256)), repeat=2)]
    return BPETokenizer([*map(chr, range(256)), *rare, "th", "the", " t", " the"], GPT2_PATTERN)


def test_a_corpus_of_many_tokens_is_its_text_and_is_trained_on(wide, run, tmp_path):
    text = "then the other of the them\n" * 40
    meta = write_corpus("wide", [("train", text), ("val", text[:270])], wide, "test")
    train_split, val, tokenizer, loaded = load_corpus("wide")
    assert wide.vocab_size > 2**16
    assert train_split.dtype == val.dtype == np.uint32
    assert max(train_split) > 2**16
    assert tokenizer.decode(train_split.tolist()) == text
    assert tokenizer.decode(val.tolist()) == text[:270]
    assert loaded == meta
    counted = np.bincount(train_split, minlength=wide.vocab_size)
    assert meta["occurrences"] == counted.tolist()
    run(*f"--data wide --out_dir {tmp_path}/out {SMALL}".split(), main=train.main)
    assert load_checkpoint(tmp_path / "out" / "last.pt")[1].state == wide.state
