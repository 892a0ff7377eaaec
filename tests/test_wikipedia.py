"""WikiText, text8 and enwik8: what is in them, where they are cut, and that they are theirs or not there."""

import hashlib
import zipfile
from functools import partial

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
def raw(request, tmp_path):
    """The name of a corpus, a folder of its raw files, the zip of it, and its command with the zip's sha256."""
    (tmp_path / "raw").mkdir()
    for name, text in RAW.items():
        (tmp_path / "raw" / name).write_bytes(text.encode())
    path = zipped(tmp_path / "raw.zip", {f"{request.param}/{name}": text for name, text in RAW.items()})
    name = "wikitext" + request.param.split("-")[1]
    return name, tmp_path / "raw", path, partial(wikitext.main, {name: (request.param, sha256(path))})


def test_the_zips_are_the_published_ones():
    assert {name: folder for name, (folder, _) in wikitext.CORPORA.items()} == {
        "wikitext2": "wikitext-2-raw",
        "wikitext103": "wikitext-103-raw",
    }


def test_wikitext_lines_of_bytes_end_in_a_newline(raw, run):
    name, folder, path, main = raw
    for copy in (folder, path):
        run(name, "--file", copy, main=main)
        train, val, _, meta = load_corpus(name)
        for split, ids in (("train", train), ("val", val)):
            text = "".join(LINES[split]).encode()
            assert bytes(ids.tolist()) == text
            assert meta[split]["bytes"] == len(text)


def test_wikitext_lines_are_between_the_tokenizer_s_own_tokens(raw, run, tmp_path):
    """As in RoBERTa's training, and the bytes of the newlines do not count."""
    name, folder, path, main = raw
    special = {"<s>": 256, "</s>": 257, "<mask>": 258}
    tokenizer = BPETokenizer([chr(i) for i in range(256)], r"\S+|\s+", special=special)
    config = ModelConfig(259, 258, n_layer=1, n_head=1, n_embd=16, context=16)
    save_checkpoint(tmp_path / "x.pt", Transformer(config), tokenizer)
    for copy in (folder, path):
        run(name, "--file", copy, "--tokenizer", tmp_path / "x.pt", main=main)
        train, val, _, meta = load_corpus(name)
        for split, ids in (("train", train), ("val", val)):
            lines = [line.rstrip("\n") for line in LINES[split]]
            assert ids.tolist() == sum(([256, *line.encode(), 257] for line in lines), [])
            assert meta[split]["bytes"] == len("".join(lines).encode())


def test_wikitext_that_cannot_be_read_leaves_nothing(raw, mistake, tmp_path):
    name, folder, path, main = raw
    assert "none" in mistake(name, "--file", tmp_path / "none", main=main)
    path.write_bytes(path.read_bytes()[:-1])
    assert "sha256" in mistake(name, "--file", path, main=main)
    (folder / "wiki.valid.raw").write_bytes(b"caf\xe9\n")
    assert "wiki.valid.raw: not UTF-8" in mistake(name, "--file", folder, main=main)
    (folder / "wiki.valid.raw").write_text(" \n\n")
    assert "its val split is empty" in mistake(name, "--file", folder, main=main)
    (folder / "wiki.valid.raw").unlink()
    assert "wiki.valid.raw" in mistake(name, "--file", folder, main=main)


# --- text8 and enwik8 ----------------------------------------------------------------------------

SIZES = {"train": 2_700_000, "val": 150_000, "test": 150_000}
TEXT = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)[np.arange(3_000_000) ** 2 % 9973 % 27].tobytes()


@pytest.fixture(params=["text8", "enwik8"])
def copies(request, tmp_path):
    """The name of a corpus, a shorter text in a file and in a zip, and the command for it."""
    path, archive = tmp_path / request.param, tmp_path / f"{request.param}.zip"
    path.write_bytes(TEXT)
    zipped(archive, {request.param: TEXT})
    sums = {path.name: sha256(path), archive.name: sha256(archive)}
    return request.param, path, archive, partial(text8.main, sums, SIZES)


def test_text8_is_cut_at_90_and_95_of_100_million():
    assert list(text8.SIZES.items()) == [("train", 90_000_000), ("val", 5_000_000), ("test", 5_000_000)]


def test_the_three_splits_are_the_text_and_the_last_validates_with_test(copies, run):
    name, *paths, main = copies
    for path in paths:
        run(name, "--file", path, main=main)
        run(name, "--file", path, "--test", main=main)
        train, val, tokenizer, meta = load_corpus(name)
        again, test, _, test_meta = load_corpus(f"{name}-test")
        assert [len(train), len(val), len(test)] == list(SIZES.values())
        assert b"".join(split.astype(np.uint8).tobytes() for split in (train, val, test)) == TEXT
        assert np.array_equal(again, train)
        for split, counts in ((train, meta["train"]), (val, meta["val"]), (test, test_meta["val"])):
            assert counts["tokens"] == counts["bytes"] == len(split)
            assert counts["sha256"] == hashlib.sha256(split.tobytes()).hexdigest()
        assert meta["occurrences"] == np.bincount(train, minlength=tokenizer.vocab_size).tolist()
        assert meta["source"] == path.name


def test_a_name_is_taken(copies, run, data_folder):
    name, path, _, main = copies
    run(name, "--file", path, "--name", "mine", main=main)
    assert [path.name for path in data_folder.iterdir()] == ["mine"]


def test_another_text_is_refused_and_leaves_nothing(copies, mistake, tmp_path):
    name, path, archive, main = copies
    for content in (TEXT.replace(b"q", b"Q", 1), TEXT[:-1], TEXT + b"a", b""):
        path.write_bytes(content)
        assert "sha256" in mistake(name, "--file", path, main=main)
        zipped(archive, {name: content})
        assert "sha256" in mistake(name, "--file", archive, "--test", main=main)
    assert "No such file" in mistake(name, "--file", tmp_path / "none", main=main)
    assert "Is a directory" in mistake(name, "--file", tmp_path, main=main)


@pytest.mark.slow
def test_a_hundred_million_bytes_are_cut_at_90_and_95(run, tmp_path):
    text = (bytes(range(251)) * 400_000)[: 10**8]
    (tmp_path / "enwik8").write_bytes(text)
    main = partial(text8.main, {"enwik8": sha256(tmp_path / "enwik8")})
    for flags, cut in (([], 90_000_000), (["--test"], 95_000_000)):
        run("enwik8", "--file", tmp_path / "enwik8", *flags, main=main)
        train, val, _, _ = load_corpus("enwik8-test" if flags else "enwik8")
        assert train.astype(np.uint8).tobytes() == text[:90_000_000]
        assert val.astype(np.uint8).tobytes() == text[cut : cut + 5_000_000]
