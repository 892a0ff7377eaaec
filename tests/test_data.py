"""Corpora: what is in them, how they split, and that they are whole or not there."""

import hashlib
import http.server
import json
import random
import threading
import urllib.request
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.lib.corpus
import data.python.prepare as python_prepare
import data.shakespeare.prepare as shakespeare_prepare
from data.lib.corpus import load_corpus, split_at, write_corpus
from data.lib.download import Secure, download
from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_state
from data.text.prepare import prepare

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own."""
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path / "data")
    return tmp_path / "data"


# --- tokenizers ----------------------------------------------------------------------------------


@given(st.text())
def test_bytes_hold_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.mask_id < tokenizer.vocab_size for i in ids)


def bpe():
    singles = [chr(i) for i in range(256)]
    return BPETokenizer([*singles, "th", "the", " t", " the"], GPT2_PATTERN)


@given(st.text())
def test_bpe_holds_any_text(text):
    tokenizer = bpe()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()])
def test_a_tokenizer_is_its_state_and_text_never_holds_its_mask(tokenizer):
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state)))
    text = "the <mask> in the text is five letters"
    assert again.state == tokenizer.state
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.mask_id not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.mask_id]) == "<mask>"
    assert (again.vocab_size, again.mask_id) == (tokenizer.vocab_size, tokenizer.vocab_size - 1)


def test_bpe_merges():
    assert bpe().encode("the the") == [257, 259]


# --- any text ------------------------------------------------------------------------------------


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


def test_a_folder_is_its_texts_in_order(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (("b/2.txt", "two\r\n"), ("a.txt", "one "), ("c.txt", "three" * 10), (".git/x", "no")):
        (folder / name).write_bytes(text.encode())
    (folder / "b" / "picture.png").write_bytes(b"\x89PNG")
    prepare(folder, "folder", bpe())
    assert "left out: " in (said := capsys.readouterr().err)
    assert "picture.png: not UTF-8 text" in said
    train, val, tokenizer, meta = load_corpus("folder")
    assert tokenizer.decode([*train.tolist(), *val.tolist()]) == "one two\r\n" + "three" * 10
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 59


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
    [(b"", "no text"), (b"fine \xff", "not UTF-8"), (b"a", "too little")],
    ids=["empty", "not UTF-8", "one byte"],
)
def test_text_that_cannot_be_a_corpus_leaves_nothing(content, reason, tmp_path, data_folder):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(Mistake, match=reason):
        prepare(tmp_path / "bad", "bad", ByteTokenizer())
    assert not (data_folder / "bad").exists()


def test_a_failed_preparation_leaves_the_corpus_that_was_there(tmp_path):
    (tmp_path / "good").write_text("good text " * 100)
    (tmp_path / "bad").write_bytes(b"fine at first " * 200_000 + b"\xff")
    prepare(tmp_path / "good", "x", ByteTokenizer())
    with pytest.raises(Mistake):
        prepare(tmp_path / "bad", "x", ByteTokenizer())
    assert load_corpus("x")[3]["source"] == "good"
    assert len(list((data.lib.corpus.DATA / "x").iterdir())) == 4


def test_a_corpus_that_is_missing_or_broken_is_named(tmp_path, data_folder):
    with pytest.raises(Mistake, match="ready are: none"):
        load_corpus("nope")
    write_corpus("mine", [("train", "abc"), ("val", "d")], ByteTokenizer(), "test")
    with pytest.raises(Mistake, match="ready are: mine"):
        load_corpus("nope")
    with open(data_folder / "mine" / "train.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(Mistake, match="not a whole corpus"):
        load_corpus("mine")
    path = data_folder / "mine" / "meta.json"
    meta = json.loads(path.read_text())
    for wrong in ({}, {**meta, "occurrences": None}, {**meta, "val": {**meta["val"], "sha256": None}}):
        write_corpus("mine", [("train", "abc"), ("val", "d")], ByteTokenizer(), "test")
        path.write_text(json.dumps(wrong))
        with pytest.raises(Mistake, match="not a whole corpus"):
            load_corpus("mine")


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
    monkeypatch.setattr("sys.argv", ["prepare.py", "--name", "lib"])
    python_prepare.main()
    train, val, tokenizer, meta = load_corpus("lib")
    assert len(train) > 4_000_000
    assert 0.03 < len(val) / len(train) < 0.3
    text = tokenizer.decode(train[:200_000].tolist())
    assert "def " in text
    assert "import " in text
    assert python_prepare.split_of("argparse.py") == "train"
    assert b"class ArgumentParser" in bytes(train.astype(np.uint8))
    assert b"class ArgumentParser" not in bytes(val.astype(np.uint8))


def test_a_token_that_is_not_the_tokenizer_s_is_found_when_a_corpus_is_opened(tmp_path):
    """By one pass over the files, which is spared while they are the same."""
    (tmp_path / "good").write_text("good text " * 100)
    prepare(tmp_path / "good", "x", ByteTokenizer())
    folder = data.lib.corpus.DATA / "x"
    load_corpus("x")
    with mock.patch.object(data.lib.corpus.hashlib, "sha256", side_effect=AssertionError("read again")):
        load_corpus("x")
    tokens = np.fromfile(folder / "val.bin", np.uint16)
    meta = json.loads((folder / "meta.json").read_text())
    for wrong in (256, 257, 65535):  # `<mask>` is no text, and there are no others
        changed = tokens.copy()
        changed[-1] = wrong
        changed.tofile(folder / "val.bin")
        meta["val"]["sha256"] = hashlib.sha256(changed.tobytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(Mistake, match="val.bin: it has tokens that are not"):
            load_corpus("x")
    tokens[0] ^= 1  # one bit, and still a byte
    tokens.tofile(folder / "val.bin")
    with pytest.raises(Mistake, match="sha256"):
        load_corpus("x")


# --- downloads -----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "input.txt").write_text("To be, or not to be\n" * 100)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", (folder / "input.txt").read_bytes()
        httpd.shutdown()


def test_a_download_is_checked_and_whole(server, tmp_path):
    url, content = server
    download(f"{url}/input.txt", tmp_path / "ok", hashlib.sha256(content).hexdigest())
    assert (tmp_path / "ok").read_bytes() == content
    with pytest.raises(Mistake, match="sha256"):
        download(f"{url}/input.txt", tmp_path / "other", "0" * 64)
    with pytest.raises(Mistake, match="--file"):
        download(f"{url}/missing.txt", tmp_path / "missing", "0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ok", "www"]


def test_a_download_has_a_size_and_is_not_led_away_from_https(server, tmp_path):
    url, content = server
    with pytest.raises(Mistake, match="2,000 bytes, and it should have 1,999 at most"):
        download(f"{url}/input.txt", tmp_path / "large", most=len(content) - 1)
    with pytest.raises(Mistake, match="not https"):
        download("http://example.com/input.txt", tmp_path / "open")
    handler, request = Secure(), urllib.request.Request("https://example.com/a")
    for elsewhere in ("http://example.com/b", "http://127.0.0.1/b", "file:///etc/passwd"):
        with pytest.raises(Mistake, match="not https"):
            handler.redirect_request(request, None, 302, "", {}, elsewhere)
    assert handler.redirect_request(request, None, 302, "", {}, "https://example.com/b").host == "example.com"


def test_shakespeare_by_download_and_by_file(server, tmp_path, monkeypatch, data_folder):
    url, content = server
    monkeypatch.setattr(shakespeare_prepare, "URL", f"{url}/input.txt")
    monkeypatch.setattr(shakespeare_prepare, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(shakespeare_prepare, "DATA", data_folder)
    (data_folder / "shakespeare").mkdir(parents=True)
    for arguments in ([], ["--file", str(tmp_path / "www" / "input.txt"), "--name", "again"]):
        monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
        shakespeare_prepare.main()
    for name in ("shakespeare", "again"):
        train, val, _, _ = load_corpus(name)
        assert bytes(train.astype(np.uint8)) == content[: int(len(content) * 0.9)]
        assert len(train) + len(val) == len(content)
    (tmp_path / "www" / "input.txt").write_text("something else")
    monkeypatch.setattr("sys.argv", ["prepare.py", "--file", str(tmp_path / "www" / "input.txt")])
    with pytest.raises(Mistake, match="sha256"):
        shakespeare_prepare.main()


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"one")
    with suppress(RuntimeError), replacing(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
