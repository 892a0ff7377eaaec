"""Corpora of many tokens."""

import hashlib
import json
import os
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import test_roberta
import torch

import data.corpus
import data.hub
import train
from data.corpus import id_type, load_corpus, unigram_nats, write_corpus, write_tokens
from data.run.errors import Mistake
from data.tokenizer import BPETokenizer, ByteTokenizer
from model import load_checkpoint

START = "<|endoftext|>"
SMALL = "--n_layer 1 --n_head 1 --n_embd 16 --block_size 16 --batch_size 2 --max_iters 2 --evals 1"
SMALL += " --eval_tokens 64 --prompt_len 0 --dtype float32"

run, mistake = test_roberta.run, test_roberta.mistake


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(data.corpus, "DATA", tmp_path / "data")
    return tmp_path / "data"


# --- many tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A tokenizer of more tokens than 16 bits can count, whose longest words have the largest ids."""
    rare = [f"\xff{a}{b}" for a, b in product(map(chr, range(256)), repeat=2)]
    return BPETokenizer([*map(chr, range(256)), *rare, "th", "the", " t", " the"], data.hub.GPT2_PATTERN)


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
    counted = unigram_nats({}, train_split, wide.vocab_size)
    assert np.array_equal(counted, unigram_nats(meta, train_split, wide.vocab_size))
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
