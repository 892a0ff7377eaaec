"""WikiText, text8 and enwik8: what is in them, where they are cut, and that they are theirs or not there."""

import hashlib
import zipfile

import numpy as np
import pytest

import data.lib.corpus
import data.text8.prepare as text8
import data.wikitext.prepare as wikitext
from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus
from data.lib.tokenizer import BPETokenizer
from model import ModelConfig, Transformer


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own, and nothing is downloaded."""
    (tmp_path / "data").mkdir()
    for module in (data.lib.corpus, text8, wikitext):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return tmp_path / "data"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# --- WikiText ------------------------------------------------------------------------------------

RAW = {
    "wiki.train.raw": " \n = Valkyria = \n \n A naïve @-@ game , 戦場 . \n\n \t \n Its 3rd line . \n",
    "wiki.valid.raw": " \n = Homarus = \n the last line has no end",
    "wiki.test.raw": " never read \n",
}
LINES = {
    "train": [" = Valkyria = \n", " A naïve @-@ game , 戦場 . \n", " Its 3rd line . \n"],
    "val": [" = Homarus = \n", " the last line has no end"],
}


@pytest.fixture(params=["wikitext-2-raw", "wikitext-103-raw"])
def raw(request, tmp_path, monkeypatch):
    """The name of a corpus, and a small zip in place of its own."""
    path = zipped(tmp_path / "raw.zip", {f"{request.param}/{name}": text for name, text in RAW.items()})
    name = "wikitext" + request.param.split("-")[1]
    monkeypatch.setattr(wikitext, "CORPORA", {name: (request.param, sha256(path))})
    return name, path


def test_the_zips_are_the_published_ones():
    assert {name: folder for name, (folder, _) in wikitext.CORPORA.items()} == {
        "wikitext2": "wikitext-2-raw",
        "wikitext103": "wikitext-103-raw",
    }


def test_wikitext_lines_of_bytes_end_in_a_newline(raw, run):
    name, path = raw
    run(name, "--file", path, main=wikitext.main)
    train, val, _, meta = load_corpus(name)
    for split, ids in (("train", train), ("val", val)):
        text = "".join(LINES[split]).encode()
        assert bytes(ids.tolist()) == text
        assert meta[split]["bytes"] == len(text)


def test_wikitext_lines_are_between_the_tokenizer_s_own_tokens(raw, run, tmp_path):
    """As in RoBERTa's training, and the bytes of the newlines do not count."""
    name, path = raw
    special = {"<s>": 256, "</s>": 257, "<mask>": 258}
    tokenizer = BPETokenizer([chr(i) for i in range(256)], r"\S+|\s+", special=special)
    config = ModelConfig(259, 258, n_layer=1, n_head=1, n_embd=16, context=16)
    save_checkpoint(tmp_path / "x.pt", Transformer(config), tokenizer)
    run(name, "--file", path, "--tokenizer", tmp_path / "x.pt", main=wikitext.main)
    train, val, _, meta = load_corpus(name)
    for split, ids in (("train", train), ("val", val)):
        lines = [line.rstrip("\n") for line in LINES[split]]
        assert ids.tolist() == sum(([256, *line.encode(), 257] for line in lines), [])
        assert meta[split]["bytes"] == len("".join(lines).encode())


def test_wikitext_that_cannot_be_read_leaves_nothing(raw, mistake, tmp_path):
    name, path = raw
    assert "none" in mistake(name, "--file", tmp_path / "none", main=wikitext.main)
    path.write_bytes(path.read_bytes()[:-1])
    assert "sha256" in mistake(name, "--file", path, main=wikitext.main)


# --- text8 and enwik8 ----------------------------------------------------------------------------

SIZES = [2_700_000, 150_000, 150_000]  # of what trains, validates and tests
TEXT = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)[np.arange(3_000_000) ** 2 % 9973 % 27].tobytes()


@pytest.fixture(params=["text8", "enwik8"])
def copy(request, tmp_path, monkeypatch):
    """The name of a corpus, and a zip of a shorter text in place of its own."""
    path = zipped(tmp_path / f"{request.param}.zip", {request.param: TEXT})
    monkeypatch.setattr(text8, "SHA256", {request.param: sha256(path)})
    return request.param, path


def test_the_three_splits_are_the_text_and_the_last_validates_with_test(copy, run):
    name, path = copy
    run(name, "--file", path, main=text8.main)
    run(name, "--file", path, "--test", main=text8.main)
    train, val, tokenizer, meta = load_corpus(name)
    again, test, _, test_meta = load_corpus(f"{name}-test")
    assert [len(train), len(val), len(test)] == SIZES
    assert b"".join(split.astype(np.uint8).tobytes() for split in (train, val, test)) == TEXT
    assert np.array_equal(again, train)
    for split, counts in ((train, meta["train"]), (val, meta["val"]), (test, test_meta["val"])):
        assert counts["tokens"] == counts["bytes"] == len(split)
        assert counts["sha256"] == hashlib.sha256(split.tobytes()).hexdigest()
    assert meta["occurrences"] == np.bincount(train, minlength=tokenizer.vocab_size).tolist()
    assert meta["source"] == path.name


def test_a_name_is_taken(copy, run, data_folder):
    name, path = copy
    run(name, "--file", path, "--name", "mine", main=text8.main)
    assert [path.name for path in data_folder.iterdir()] == ["mine"]


def test_another_text_is_refused_and_leaves_nothing(copy, mistake, tmp_path):
    name, path = copy
    for content in (TEXT.replace(b"q", b"Q", 1), TEXT[:-1], TEXT + b"a", b""):
        zipped(path, {name: content})
        assert "sha256" in mistake(name, "--file", path, "--test", main=text8.main)
    assert "No such file" in mistake(name, "--file", tmp_path / "none", main=text8.main)
    assert "Is a directory" in mistake(name, "--file", tmp_path, main=text8.main)


@pytest.mark.slow
def test_a_hundred_million_bytes_are_cut_at_90_and_95(run, tmp_path, monkeypatch):
    text = (bytes(range(251)) * 400_000)[: 10**8]
    path = zipped(tmp_path / "enwik8.zip", {"enwik8": text})
    monkeypatch.setattr(text8, "SHA256", {"enwik8": sha256(path)})
    for flags, cut in (([], 90_000_000), (["--test"], 95_000_000)):
        run("enwik8", "--file", path, *flags, main=text8.main)
        train, val, _, _ = load_corpus("enwik8-test" if flags else "enwik8")
        assert train.astype(np.uint8).tobytes() == text[:90_000_000]
        assert val.astype(np.uint8).tobytes() == text[cut : cut + 5_000_000]
