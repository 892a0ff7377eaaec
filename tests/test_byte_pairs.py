"""Byte pairs learned from a corpus: the same tokens as `tokenizers` learns, and corpora that are made of them."""

import math
import random

import pytest
from model_files import library_text
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import data.chat.prepare as chat_prepare
import data.text.prepare as text_prepare
import train
from data.lib.byte_pairs import PATTERN, learn_byte_pairs, merge
from data.lib.corpus import load_corpus
from data.lib.tokenizer import BPETokenizer

ALPHABET = {  # how `tokenizers` writes a byte
    chr(i)
    if chr(i).isprintable() and i != 32
    else chr(256 + sum(not chr(j).isprintable() or j == 32 for j in range(i))): i
    for i in range(256)
}


def reference(text, n):
    """A tokenizer that `tokenizers` has trained."""
    trained = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=n, min_frequency=2, initial_alphabet=[*ALPHABET], show_progress=False, special_tokens=[]
    )
    trained.train_from_iterator([text], trainer)
    return trained


def ours(text, n):
    return BPETokenizer([token.decode("latin-1") for token in learn_byte_pairs([text], n)], PATTERN)


def some_code():
    return library_text()[:300_000]


def some_noise():
    """Text of few letters, where many pairs are equally frequent and letters repeat."""
    draw = random.Random(0)
    return "".join(draw.choices("aab é'7_ \n", k=20_000))


def some_scripts():
    """Letters with combining marks, which belong to their words, and numbers that aren't digits."""
    draw = random.Random(1)
    return " ".join(draw.choices("हिन्दी भाषा में cafe\u0301 שָׁלוֹם ภาษาไทย m² ½ x₂ ٣٤ a_b".split(), k=2_000))


@pytest.mark.parametrize("text", [some_code, some_noise, some_scripts])
def test_the_tokens_and_their_order_are_those_of_tokenizers(text):
    text, n = text(), 1000
    theirs = reference(text, n)
    names = sorted(theirs.get_vocab(), key=theirs.token_to_id)
    assert learn_byte_pairs([text], n) == [bytes(ALPHABET[c] for c in name) for name in names]
    assert ours(text, n).encode(text) == theirs.encode(text).ids


def test_the_most_frequent_pair_merges_first():
    tokens = learn_byte_pairs(["abab abab", "xy xy xy abab"], 300)
    assert sorted(tokens[:256]) == [bytes([i]) for i in range(256)]
    assert tokens[256:] == [b"ab", b"xy", b"abab", b" xy", b" abab"]  # 6, 3, 3, 2 and 2 times
    assert merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]


def test_a_text_of_any_characters_comes_back():
    tokenizer = ours("some text, some more text", 270)
    for text in (
        "Ünïcödé ✓ 漢字 e\u0301 \u200d\u00a0\u2028 ²½ ٣",
        "\x00\x1f tabs\t\r\n\n  end  ",
        "'ll we'll don't _a_b_ 3.14",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_corpus_learns_its_tokens_from_its_training_split(data_folder, run, tmp_path):
    train_text, val_text = some_code()[:40_000], "zqzq " * 2000
    (tmp_path / "a.txt").write_text(train_text)
    (tmp_path / "b.txt").write_text(val_text)
    run(
        tmp_path / "a.txt",
        "--val",
        tmp_path / "b.txt",
        "--name",
        "pairs",
        "--tokenizer",
        "bpe:400",
        main=text_prepare.main,
    )
    train_split, val_split, tokenizer, meta = load_corpus("pairs")
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (401, 400)
    assert tokenizer.state == ours(train_text, 400).state
    assert tokenizer.decode(train_split.tolist()) == train_text
    assert tokenizer.decode(val_split.tolist()) == val_text
    assert meta["val"]["bytes"] == len(val_text)
    assert len(val_split) > 2 * len(val_text) / 3  # no "zqzq" was learned


def test_bounds_stay_comparable_in_bits_per_byte(data_folder, run, tmp_path, capsys):
    """A network that knows nothing has ln(V) nats per token, and that much over the bytes per token in bits."""
    (tmp_path / "a.txt").write_text(some_code())
    run(tmp_path / "a.txt", "--name", "pairs", "--tokenizer", "bpe:512", main=text_prepare.main)
    _, val, _, meta = load_corpus("pairs")
    size = ["--n_layer", 1, "--n_embd", 16, "--context", 32, "--max_iters", 1, "--lr", 1e-9, "--eval_tokens", 2048]
    run("--data", "pairs", "--out_dir", tmp_path / "out", *size, main=train.main)
    row = (tmp_path / "out" / "log.csv").read_text().splitlines()[-1].split(",")
    nats, bits = float(row[-2]), float(row[-1])
    assert abs(nats - math.log(512)) < 0.5
    assert bits == pytest.approx(nats * meta["val"]["tokens"] / meta["val"]["bytes"] / math.log(2), rel=1e-4)


@pytest.mark.parametrize("name", ["bpe", "bpe:256", "bpe:-300", "bpe:3e3", "bpe:99999999"])
def test_other_numbers_of_tokens_are_refused(name, data_folder, mistake, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    assert "bpe:N (N above 256)" in mistake(tmp_path / "a.txt", "--tokenizer", name, main=text_prepare.main)


def test_conversations_need_a_token_that_ends_them(data_folder, mistake, tmp_path):
    (tmp_path / "a.jsonl").write_text("[]")
    assert "no token that ends a text" in mistake(
        tmp_path / "a.jsonl", "--tokenizer", "bpe:300", main=chat_prepare.main
    )


def test_a_failed_download_of_gpt2_s_pairs_is_one_sentence(data_folder, mistake, tmp_path, monkeypatch):
    def fail(name):
        raise ConnectionError("HTTPSConnectionPool(host=..): Max retries exceeded (Caused by ...)")

    monkeypatch.setattr("tiktoken.get_encoding", fail)
    (tmp_path / "a.txt").write_text("some text " * 100)
    said = mistake(tmp_path / "a.txt", "--tokenizer", "gpt2", main=text_prepare.main)
    assert said.endswith("--tokenizer gpt2: tiktoken could not download it; bpe:N needs no download\n")
