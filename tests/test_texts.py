"""text8, enwik8 and FineWeb: what is in them, where they are cut, and that they are theirs or not there."""

import hashlib
import http.server
import io
import json
import os
import threading
import tracemalloc
import zipfile
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from good_files import MERGES, write_shard
from model_files import save_weights
from test_gpt2 import write_gpt2

import data.fineweb.prepare as fineweb
import data.gpt2.prepare as gpt2_prepare
import data.lib.corpus
import data.text8.prepare as text8
import train
from data.lib.checkpoint import read_checkpoint
from data.lib.corpus import id_type, load_corpus, write_corpus, write_tokens
from data.lib.errors import Mistake
from data.lib.noise import unigram_nats
from data.lib.tokenizer import BPETokenizer, ByteTokenizer
from data.weights import hub
from model import load_checkpoint

START = "<|endoftext|>"
SMALL = "--n_layer 1 --n_head 1 --n_embd 16 --context 16 --batch_size 2 --max_iters 2 --evals 1"
SMALL += " --eval_tokens 64 --prompt_len 0 --dtype float32"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own."""
    (tmp_path / "data").mkdir()
    for module in (data.lib.corpus, text8, fineweb):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server of tmp_path/www, which is also the hub: its address, and the files that were asked for."""
    (tmp_path / "www").mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *_):
            asked.append(self.path.rpartition("/")[2])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(hub, "HUB", address)
        yield address, asked
        httpd.shutdown()


# --- text8 and enwik8 ----------------------------------------------------------------------------

SIZES = {"train": 2_700_000, "val": 150_000, "test": 150_000}
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
TEXT = LETTERS[np.arange(3_000_000) ** 2 % 9973 % 27].tobytes()


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def main_of(text=TEXT, **more):
    """text8's command for a shorter text."""
    return partial(text8.main, sha256=hashlib.sha256(text).hexdigest(), **{"sizes": SIZES, **more})


@pytest.fixture
def copies(tmp_path):
    """The text, as it is and in a zip."""
    (tmp_path / "text8").write_bytes(TEXT)
    (tmp_path / "text8.zip").write_bytes(zipped({"read.me": "no", "text8": TEXT}))
    return tmp_path / "text8", tmp_path / "text8.zip"


def test_text8_is_cut_at_90_and_95_of_100_million():
    assert list(text8.SIZES.items()) == [("train", 90_000_000), ("val", 5_000_000), ("test", 5_000_000)]


def test_the_three_splits_are_the_text_and_the_last_validates_with_test(copies, run):
    for path in copies:
        run("--file", path, main=main_of())
        run("--file", path, "--test", main=main_of())
        train_split, val, tokenizer, meta = load_corpus("text8")
        again, test, _, test_meta = load_corpus("text8-test")
        assert [len(train_split), len(val), len(test)] == list(SIZES.values())
        assert b"".join(split.astype(np.uint8).tobytes() for split in (train_split, val, test)) == TEXT
        assert np.array_equal(again, train_split)
        for split, counts in ((train_split, meta["train"]), (val, meta["val"]), (test, test_meta["val"])):
            assert counts["tokens"] == counts["bytes"] == len(split)
            assert counts["sha256"] == hashlib.sha256(split.tobytes()).hexdigest()
        assert meta["occurrences"] == np.bincount(train_split, minlength=tokenizer.vocab_size).tolist()
        assert meta["source"] == path.name


def test_a_name_is_taken(copies, run, data_folder):
    run("--file", copies[0], "--name", "mine", main=main_of())
    assert [path.name for path in data_folder.iterdir()] == ["mine"]


def test_another_text_is_refused_and_leaves_nothing(copies, mistake, tmp_path):
    (path, archive), small = copies, main_of()
    for content, reason in (
        (TEXT.replace(b"q", b"Q", 1), "sha256"),
        (TEXT[:-1], "text8 has 3,000,000 bytes, and this has fewer"),
        (TEXT[: SIZES["train"] - 1], "fewer"),
        (b"", "fewer"),
        (TEXT + b"a", "text8 has 3,000,000 bytes, and this has more"),
    ):
        path.write_bytes(content)
        assert reason in mistake("--file", path, main=small)
        archive.write_bytes(zipped({"text8": content}))
        assert reason in mistake("--file", archive, "--test", main=small)
    archive.write_bytes(zipped({"text9": TEXT}))
    assert "there is no text8 in it" in mistake("--file", archive, main=small)
    assert "No such file" in mistake("--file", tmp_path / "none", main=small)
    assert "Is a directory" in mistake("--file", tmp_path, main=small)
    assert "one folder of data/" in mistake("--file", path, "--name", "", main=small)


def test_a_zip_that_is_damaged_is_refused_and_leaves_nothing(copies, mistake):
    whole = copies[1].read_bytes()
    for content in (whole[:-30], whole[:5000], whole[:200] + b"xxxx" + whole[204:]):
        copies[1].write_bytes(content)
        assert "text8" in mistake("--file", copies[1], main=main_of())


PACKED = {zipfile.ZIP_DEFLATED: "more", zipfile.ZIP_BZIP2: "deflate", zipfile.ZIP_LZMA: "deflate"}


@pytest.mark.parametrize("compression", PACKED)
def test_a_text_without_end_is_refused_in_little_memory(compression, mistake, tmp_path):
    (tmp_path / "bomb.zip").write_bytes(zipped({"text8": bytes(2**28)}, compression))
    assert (tmp_path / "bomb.zip").stat().st_size < 2**19
    tracemalloc.start()
    try:
        assert PACKED[compression] in mistake("--file", tmp_path / "bomb.zip", main=main_of())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**25


def test_text8_is_downloaded_once_and_what_arrives_is_checked(served, copies, run, tmp_path, data_folder):
    address, asked = served
    content = copies[1].read_bytes()
    (tmp_path / "www" / "text8.zip").write_bytes(content)
    more = {"url": f"{address}/text8.zip", "zip_sha256": "0" * 64}
    with pytest.raises(Mistake, match="sha256"):
        run(main=main_of(**more))
    assert [*data_folder.rglob("*")] == [data_folder / "text8"]
    more["zip_sha256"] = hashlib.sha256(content).hexdigest()
    for flags in ([], ["--test"]):
        run(*flags, main=main_of(**more))
    assert asked == ["text8.zip"] * 2  # once each
    assert [len(load_corpus(name)[1]) for name in ("text8", "text8-test")] == [150_000, 150_000]


@pytest.mark.slow
def test_a_hundred_million_bytes_are_cut_at_90_and_95(run, tmp_path):
    text = (bytes(range(251)) * 400_000)[: 10**8]
    (tmp_path / "enwik8").write_bytes(text)
    for flags, cut in (([], 90_000_000), (["--test"], 95_000_000)):
        run("--file", tmp_path / "enwik8", *flags, main=main_of(text, name="enwik8", sizes=text8.SIZES))
        train_split, val, _, _ = load_corpus("enwik8-test" if flags else "enwik8")
        assert train_split.astype(np.uint8).tobytes() == text[:90_000_000]
        assert val.astype(np.uint8).tobytes() == text[cut : cut + 5_000_000]


# --- FineWeb -------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(run, tmp_path):
    """A checkpoint of a small GPT-2."""
    folder = tmp_path / "gpt2"
    model = write_gpt2(folder, MERGES)
    save_weights(folder, model.state_dict())
    run(folder, "--out", tmp_path / "gpt2.pt", main=gpt2_prepare.main)
    return tmp_path / "gpt2.pt"


TEXTS = {"val_000000": "in the beginning", "train_000001": "naïve — 漢字 " * 50, "train_000002": "the third"}


@pytest.fixture
def shards(gpt2, tmp_path):
    """A folder of small shards, one document each."""
    tokenizer, folder = load_checkpoint(gpt2)[1], tmp_path / "shards"
    folder.mkdir()
    for name, text in TEXTS.items():
        write_shard(folder / f"fineweb_{name}.bin", [tokenizer.first(START), *tokenizer.encode(text)])
    return folder


def test_fineweb_is_the_tokens_of_its_shards(gpt2, shards, run):
    run("--dir", shards, "--shards", "2", "--tokenizer", gpt2, main=fineweb.main)
    train_split, val, tokenizer, meta = load_corpus("fineweb")
    start = tokenizer.first(START)
    documents = {name: [start, *tokenizer.encode(text)] for name, text in TEXTS.items()}
    assert val.tolist() == documents["val_000000"]
    assert train_split.tolist() == documents["train_000001"] + documents["train_000002"]
    assert tokenizer.decode(val.tolist()) == "\n" + TEXTS["val_000000"]
    assert meta["val"]["bytes"] == len(TEXTS["val_000000"])
    assert meta["train"]["bytes"] == len((TEXTS["train_000001"] + TEXTS["train_000002"]).encode())
    assert meta["occurrences"] == np.bincount(train_split, minlength=tokenizer.vocab_size).tolist()
    assert meta["occurrences"][start] == 2


def test_a_long_shard_is_read_in_pieces_and_kept_whole(gpt2, shards, run):
    ids = np.arange(3_000_000) % 250
    write_shard(shards / "fineweb_train_000001.bin", ids)
    run("--dir", shards, "--tokenizer", gpt2, main=fineweb.main)
    train_split, _, tokenizer, meta = load_corpus("fineweb")
    assert np.array_equal(train_split, ids)
    assert meta["train"]["bytes"] == sum(len(tokenizer.bytes_of[i]) for i in range(250)) * 12_000


def test_a_gpt2_goes_on_with_fineweb(gpt2, shards, run, tmp_path):
    run("--dir", shards, "--tokenizer", gpt2, main=fineweb.main)
    flags = f"--init_from {gpt2} --data fineweb --out_dir {tmp_path}/out --max_iters 2 --context 8"
    run(*flags.split(), "--dtype", "float32", main=train.main)
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] == 2


def test_gpt2_s_tokenizer_of_tiktoken_is_that_of_its_files(gpt2, monkeypatch):
    """Whatever the checkpoint of data/gpt2 is trained on has the same tokens, and the same state."""
    theirs = load_checkpoint(gpt2)[1]
    ranks = {piece: i for i, piece in theirs.bytes_of.items() if i not in theirs.special_ids}
    special = {START: theirs.first(START)}
    assert sorted(ranks.values()) == [*range(special[START])]
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    assert fineweb.gpt2_tokenizer().state == theirs.state


HEADERS = {
    "a file without content": (b"", "not a shard"),
    "half a header": (np.array([20240520, 1, 4], "<i4").tobytes(), "1,032"),
    "wrong magic": (np.array([20240801, 1, 4] + [0] * 253, "<i4").tobytes() + bytes(8), "20240520, 1"),
    "wrong version": (np.array([20240520, 7, 4] + [0] * 253, "<i4").tobytes() + bytes(8), "20240520, 1"),
    "more tokens": (np.array([20240520, 1, 5] + [0] * 253, "<i4").tobytes() + bytes(8), "5 tokens"),
    "fewer tokens": (np.array([20240520, 1, 3] + [0] * 253, "<i4").tobytes() + bytes(8), "3 tokens"),
    "half a token": (np.array([20240520, 1, 4] + [0] * 253, "<i4").tobytes() + bytes(7), "1,031 bytes"),
    "negative": (np.array([20240520, 1, -500], "<i4").tobytes() + bytes(12), "-500 tokens"),
    "all": (np.array([20240520, 1, 2**31 - 1] + [0] * 253, "<i4").tobytes() + bytes(8), "2,147,483,647"),
    "no tokens": (np.array([20240520, 1, 0] + [0] * 253, "<i4").tobytes(), "its train split is empty"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_promises_what_the_file_does_not_hold_is_refused(kind, gpt2, shards, mistake):
    content, reason = HEADERS[kind]
    (shards / "fineweb_train_000001.bin").write_bytes(content)
    assert reason in mistake("--dir", shards, "--tokenizer", gpt2, main=fineweb.main)


def test_fineweb_mistakes_leave_nothing(gpt2, shards, mistake, tmp_path):
    flags = ["--dir", shards, "--tokenizer", gpt2]
    main = fineweb.main
    mask_id = load_checkpoint(gpt2)[1].mask_id
    for wrong in (mask_id, mask_id + 1, 65535):
        write_shard(shards / "fineweb_train_000002.bin", [1, wrong, 2])
        sentence = mistake(*flags, "--shards", "2", main=main)
        assert f"it has a token {wrong}, and the last is {mask_id - 1}" in sentence
    assert "no fineweb_train_000003.bin" in mistake(*flags, "--shards", "3", main=main)
    assert "no fineweb_val_000000.bin" in mistake("--dir", tmp_path / "none", "--tokenizer", gpt2, main=main)
    assert "no fineweb_val_000000.bin" in mistake("--dir", gpt2, "--tokenizer", gpt2, main=main)
    assert f"no {START}" in mistake("--dir", shards, "--tokenizer", "bytes", main=main)
    assert "at most 103" in mistake(*flags, "--shards", "104", main=main)
    (shards / "fineweb_val_000000.bin").unlink()
    (shards / "fineweb_val_000000.bin").mkdir()
    assert "Is a directory" in mistake(*flags, main=main)


def test_a_shard_that_is_there_is_not_fetched_again(served, gpt2, shards, run, tmp_path, data_folder):
    folder = tmp_path / "www" / "datasets" / "kjj0" / "fineweb10B-gpt2" / "resolve" / "main"
    folder.parent.mkdir(parents=True)
    shards.rename(folder)
    names = [f"fineweb_{name}.bin" for name in TEXTS]
    run("--tokenizer", gpt2, main=fineweb.main)
    assert served[1] == names[:2]
    run("--tokenizer", gpt2, "--shards", "2", main=fineweb.main)
    assert served[1] == names
    assert len(load_corpus("fineweb")[0]) > 0
    (folder / names[2]).unlink()
    (data_folder / "fineweb" / names[2]).unlink()
    with pytest.raises(Mistake, match="--dir takes"):
        run("--tokenizer", gpt2, "--shards", "2", main=fineweb.main)


# --- many tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A tokenizer of more tokens than 16 bits can count, whose longest words have the largest ids."""
    rare = [f"\xff{a}{b}" for a, b in product(map(chr, range(256)), repeat=2)]
    return BPETokenizer([*map(chr, range(256)), *rare, "th", "the", " t", " the"], hub.GPT2_PATTERN)


def test_ids_are_of_32_bits_where_16_do_not_count_the_tokens(wide):
    for vocab_size, kind in ((257, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)):
        assert id_type(SimpleNamespace(vocab_size=vocab_size)) == kind
    assert wide.vocab_size > 2**16


def test_a_corpus_of_many_tokens_is_its_text_and_is_trained_on(wide, run, tmp_path):
    text = "then the other of the them\n" * 40
    meta = write_corpus("wide", [("train", text), ("val", text[:270])], wide, "test")
    train_split, val, tokenizer, loaded = load_corpus("wide")
    assert train_split.dtype == val.dtype == np.uint32
    assert max(train_split) > 2**16
    assert tokenizer.decode(train_split.tolist()) == text
    assert tokenizer.decode(val.tolist()) == text[:270]
    assert loaded == meta
    counted = np.bincount(train_split, minlength=wide.vocab_size)
    assert meta["occurrences"] == counted.tolist()
    shares = (counted + 1) / (len(train_split) + wide.vocab_size)
    np.testing.assert_allclose(unigram_nats(meta["occurrences"]), -np.log(shares), rtol=1e-6)
    run(*f"--data wide --out_dir {tmp_path}/out {SMALL}".split(), main=train.main)
    model, again, checkpoint = load_checkpoint(tmp_path / "out" / "last.pt")
    assert (again.state, checkpoint["step"]) == (wide.state, 2)
    assert model.token_embedding.weight.isfinite().all()
    assert torch.tensor(train_split[:8].astype(np.int64)).max() < model.config.vocab_size


def test_a_token_beyond_the_tokenizer_s_is_found_in_32_bits_too(wide, data_folder):
    write_corpus("wide", [("train", " the" * 9), ("val", " the" * 9)], wide, "test")
    path, meta_path = data_folder / "wide" / "val.bin", data_folder / "wide" / "meta.json"
    meta = json.loads(meta_path.read_text())
    for wrong in (wide.mask_id, wide.vocab_size, 2**31, 2**32 - 1):
        ids = np.fromfile(path, np.uint32)
        ids[-1] = wrong
        ids.tofile(path)
        meta["val"]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
        meta_path.write_text(json.dumps(meta))
        with pytest.raises(Mistake, match="tokens that are not its tokenizer's"):
            load_corpus("wide")
    os.truncate(path, 34)
    with pytest.raises(Mistake, match="not a whole corpus"):
        load_corpus("wide")


def test_an_interrupted_preparation_leaves_nothing(data_folder):
    def pieces():
        yield "train", np.zeros(100, np.uint8), 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens("x", pieces(), ByteTokenizer(), "test")
    assert not (data_folder / "x").exists()
