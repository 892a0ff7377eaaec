"""FineWeb: a corpus is the tokens of its shards, and a file that is no shard is refused."""

import numpy as np
import pytest
import tiktoken
from model_files import save_weights, write_gpt2

import data.fineweb.prepare as fineweb
import data.lib.corpus
import data.weights.prepare as weights_prepare
from data.lib.corpus import load_corpus
from data.lib.tokenizer import BPETokenizer
from model import load_checkpoint

START = "<|endoftext|>"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own."""
    (tmp_path / "data").mkdir()
    for module in (data.lib.corpus, fineweb):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def gpt2(monkeypatch):
    """A tokenizer such as GPT-2's, of fewer tokens, in its place."""
    special = {START: 258, "<mask>": 259}
    tokenizer = BPETokenizer([*map(chr, range(256)), "th", "the"], r" ?\w+|\s+|[^\s\w]+", special=special)
    monkeypatch.setattr(fineweb, "gpt2_tokenizer", lambda: tokenizer)
    return tokenizer


def write_shard(path, ids):
    path.write_bytes(header(20240520, 1, len(ids)) + np.array(ids, "<u2").tobytes())


def header(magic, version, n):
    return np.array([magic, version, n] + [0] * 253, "<i4").tobytes()


TEXTS = {"val_000000": "in the beginning", "train_000001": "naïve — 漢字 " * 50, "train_000002": "the third"}


@pytest.fixture
def shards(gpt2, tmp_path):
    """A folder of small shards, one document each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, text in TEXTS.items():
        write_shard(folder / f"fineweb_{name}.bin", [gpt2.first(START), *gpt2.encode(text)])
    return folder


def test_fineweb_is_the_tokens_of_its_shards(shards, run):
    run("--dir", shards, "--shards", "2", main=fineweb.main)
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


def test_a_long_shard_is_read_in_pieces_and_kept_whole(shards, run):
    ids = np.arange(3_000_000) % 250
    write_shard(shards / "fineweb_train_000001.bin", ids)
    run("--dir", shards, main=fineweb.main)
    train_split, _, tokenizer, meta = load_corpus("fineweb")
    assert np.array_equal(train_split, ids)
    assert meta["train"]["bytes"] == sum(len(tokenizer.bytes_of[i]) for i in range(250)) * 12_000


def test_the_tokenizer_made_of_tiktoken_s_is_that_of_gpt2_s_files(run, tmp_path, monkeypatch):
    """So that a GPT-2 that was read from its files goes on with this corpus."""
    model = write_gpt2(tmp_path / "gpt2", ["t h", "th e", "Ġ a", "i n"])
    save_weights(tmp_path / "gpt2", model.state_dict())
    run(tmp_path / "gpt2", "--out", tmp_path / "theirs.pt", main=weights_prepare.main)
    theirs = load_checkpoint(tmp_path / "theirs.pt")[1]
    ranks = {piece: i for i, piece in theirs.bytes_of.items() if i not in theirs.special_ids}
    special = {START: theirs.first(START)}
    assert sorted(ranks.values()) == [*range(special[START])]
    fake = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    assert fineweb.gpt2_tokenizer().state == theirs.state


WHOLE = "not a whole shard"
FILES = {
    "nothing": (b"", WHOLE),
    "half a header": (header(20240520, 1, 4)[:12], WHOLE),
    "other magic": (header(20240801, 1, 4) + bytes(8), WHOLE),
    "other version": (header(20240520, 7, 4) + bytes(8), WHOLE),
    "a token too few": (header(20240520, 1, 5) + bytes(8), WHOLE),
    "a token too many": (header(20240520, 1, 3) + bytes(8), WHOLE),
    "half a token": (header(20240520, 1, 4) + bytes(7), WHOLE),
    "a negative number": (header(20240520, 1, -500) + bytes(24), WHOLE),
    "no tokens": (header(20240520, 1, 0), "its train split has 0 tokens"),
    "<mask>": (header(20240520, 1, 1) + b"\x03\x01", "it has a token 259, and the last is 258"),
    "a large id": (header(20240520, 1, 1) + b"\xff\xff", "it has a token 65535"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_shard_is_refused_and_leaves_nothing(kind, shards, mistake):
    content, reason = FILES[kind]
    (shards / "fineweb_train_000001.bin").write_bytes(content)
    assert reason in mistake("--dir", shards, main=fineweb.main)


def test_flags_that_do_not_fit_are_refused(shards, mistake):
    assert "fineweb_train_000003.bin" in mistake("--dir", shards, "--shards", "3", main=fineweb.main)
    assert "at most 103" in mistake("--dir", shards, "--shards", "104", main=fineweb.main)


def test_shards_are_downloaded_into_the_corpus_s_folder(shards, run, monkeypatch, data_folder):
    asked = []

    def download(url, path, instead, most):
        asked.append(url.rpartition("/")[2])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((shards / path.name).read_bytes())

    monkeypatch.setattr(fineweb, "download", download)
    run("--shards", "2", main=fineweb.main)
    assert asked == [f"fineweb_{name}.bin" for name in TEXTS]
    assert (data_folder / "fineweb" / "fineweb_train_000002.bin").exists()
    assert len(load_corpus("fineweb")[0]) > 0
