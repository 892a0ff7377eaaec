"""Corpora of prompts with replies."""

import json
import math

import numpy as np
import pytest
import torch
from talks import QUESTIONS, SMALL, call, said, write_jsonl
from toys import tiny_model

import data.chat.prepare
import data.lib.corpus
import data.sums.prepare
import train
from data.chat.prepare import prepare
from data.lib.chat import BYTES, Chat
from data.lib.corpus import Examples, load_corpus, spaced_windows, windows_at, write_tokens
from data.lib.errors import Mistake
from data.lib.flags import Level, Span
from data.lib.report import standard_error
from data.lib.tokenizer import ByteTokenizer
from model import ModelConfig, load_checkpoint
from train import TrainConfig, draw_batch, nelbo, sequence_bounds

pytestmark = pytest.mark.usefixtures("talk_folder")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (3, "list of messages"),
        (["hi"], "list of messages"),
        ([{"role": "user"}], "list of messages"),
        ([{"role": "root", "content": ""}], "'root' is none of system, user"),
        ([{"role": ["user"], "content": ""}], "is none of"),
        ([{"role": "user", "content": 3}], "list of messages"),
        ([{"role": "user", "content": "\ud800"}], "list of messages"),
        ([{"role": "user", "content": "a\x03\x01assistant\x02b"}], r"'\\x01', which the template"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(messages, reason):
    with pytest.raises(Mistake, match=reason):
        Chat(BYTES, ByteTokenizer()).check(messages)


def test_each_reply_is_an_example_after_all_that_came_before_it(tmp_path):
    """Both forms of a line, and the conversations of the last tenth to validate."""
    long = [{"role": "system", "content": "Be brief."}, *said("1", "one", "2", "two")]
    path = write_jsonl(tmp_path / "x.jsonl", [long] * 9)
    path.write_text(path.read_text() + "\n" + json.dumps(said("3", "three")) + "\n")
    meta = prepare(path, None, "x", ByteTokenizer())
    train_split, val, tokenizer, loaded = load_corpus("x", 128)
    chat = Chat(loaded["chat"], tokenizer)
    assert [meta[split]["examples"] for split in ("train", "val")] == [18, 1]
    assert [loaded[split]["tokens"] for split in ("train", "val")] == [18 * 128, 128]
    assert [meta[split]["bytes"] for split in ("train", "val")] == [9 * 6, 5]
    x0, prompt_len = windows_at(train_split, np.array([[0], [1]]), 128)
    for row, n, before, reply in zip(x0, prompt_len[:, 0], (long[:2], long[:4]), ("one", "two")):
        prompt, rest = chat.prompt(before), chat.reply(reply)
        assert row.tolist() == prompt + rest + [3] * (128 - len(prompt) - len(rest))
        assert n == len(prompt)
    assert spaced_windows(val, 128, 10**9)[0][0, :1].tolist() == [1]


def test_a_file_to_validate_with_is_taken_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [said("1", "2")] * 5)
    write_jsonl(tmp_path / "b.jsonl", [said("3", "4")] * 2)
    meta = prepare(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "x", ByteTokenizer())
    assert [meta[split]["examples"] for split in ("train", "val")] == [5, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not a conversation"),
        (b"[" * 10**5, "not a conversation"),
        (b"3", "list of messages"),
        (b'{"text": "a"}', "list of messages"),
        (b"\xff", "not a conversation"),
        (b'[{"role": "user", "content": "a\\u0002"}]', "the template takes"),
    ],
    ids=str,
)
def test_a_malformed_line_is_named_and_nothing_is_written(line, reason, tmp_path, talk_folder):
    path = write_jsonl(tmp_path / "x.jsonl", [said("1", "2")] * 20)
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(Mistake, match=rf"x.jsonl:22: .*{reason}"):
        prepare(path, None, "x", ByteTokenizer())
    assert not (talk_folder / "x").exists()


def test_a_block_that_is_too_small_is_told_what_would_do(squares):
    with pytest.raises(Mistake, match=r"of (\d+) tokens needs --context \1$") as caught:
        load_corpus("squares", 40)
    least = int(str(caught.value).split()[-1])
    load_corpus("squares", least)
    with pytest.raises(Mistake, match=f"needs --context {least}"):
        load_corpus("squares", least - 1)


def test_an_index_that_does_not_fit_its_tokens_is_refused(squares, talk_folder):
    path = talk_folder / "squares" / "train.rows"
    good = np.fromfile(path, np.int64)

    def refused(rows):
        rows.tofile(path)
        with pytest.raises(Mistake, match="not a whole corpus"):
            load_corpus("squares", 64)

    far = 2**62
    for place, value in ((0, 1), (1, -1), (1, far), (2, 0), (2, far), (2, -2 * far), (3, 40), (-2, 10**6)):
        changed = good.copy()
        changed[place] = value
        refused(changed)
    changed = good.copy()
    changed[:8] = 0, 0, 10, 0, 5 - 2 * far, 0, 3, 0  # each difference to the next overflows into a length
    refused(changed)
    refused(good[:-2])
    refused(good[:-1])
    refused(good[:0])
    path.unlink()
    with pytest.raises(Mistake, match="not a whole corpus"):
        load_corpus("squares", 64)


def examples(T=12):
    """Prompts of 0 to 10 tokens, and a reply of 1."""
    lengths = np.arange(1, 12)
    starts = np.cumsum(lengths) - lengths
    rows = np.stack((starts, lengths - 1), 1)
    return Examples(np.arange(lengths.sum(), dtype=np.uint16) % 5, rows, end_id=5, T=T), rows


@pytest.mark.parametrize("level", [Level("fixed", 1.0), Level("uniform")], ids=str)
def test_prompts_are_never_masked_and_padding_is_learned(level):
    split, rows = examples()
    config = TrainConfig(batch_size=64, context=12, level=level, prompt_len=Span(0, 0))
    shape, seen = ModelConfig(vocab_size=8, mask_id=7, special_ids=(7,), end_ids=(5,)), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x0, xt, holes, weights = draw_batch(split, config, generator, shape)
        padding = (x0 == 5).sum(1)  # what the prompt and the one token of the reply leave
        n_prompt = 11 - padding
        seen |= set(n_prompt.tolist())
        prompt = torch.arange(12) < n_prompt[:, None]
        assert not holes[prompt].any()
        assert (xt[prompt] == x0[prompt]).all()
        assert (xt[holes] == 7).all()
        if level.kind == "fixed":  # all the rest is, padding too
            assert (holes == ~prompt).all()
            assert weights[holes].sum() == pytest.approx(1)
        else:
            assert holes[x0 == 5].any()
    assert seen == set(range(11))


def test_the_bound_of_replies_is_that_of_a_plain_loop():
    """Of each window: with m of its M holes left, whichever, a step costs 1/m of what all of them would."""
    model = tiny_model(V=6, T=5, special_ids=(6,), end_ids=(5,))
    x0 = torch.tensor([[0, 1, 2, 5, 5], [3, 4, 0, 1, 5], [1, 5, 5, 5, 5]])
    prompt_len = torch.tensor([[2], [3], [1]])
    total = 0.0
    for row, n in zip(x0, prompt_len.flatten().tolist()):
        for mask in range(1, 2 ** (5 - n)):
            places = [n + i for i in range(5 - n) if mask >> i & 1]
            xt = row.clone()
            xt[places] = 6
            nats = -model(xt[None])[0].log_softmax(-1)[places, row[places]].sum().item()
            total += nats / len(places) / math.comb(5 - n, len(places))
    exact = total / (15 - 6)
    bound = nelbo(model, x0, prompt_len=prompt_len, draws=4000)
    error = standard_error(*sequence_bounds(model, x0, prompt_len=prompt_len, draws=4000))
    assert bound == pytest.approx(exact, abs=5 * error + 1e-4)
    assert error < 0.02 * exact


def test_bits_per_byte_are_those_of_the_replies(squares, monkeypatch, capsys):
    """Of all their windows, what fills them included, over the bytes of what was replied."""
    call(monkeypatch, train.main, f"--data squares --max_iters 2 --evals 1 {SMALL} --out_dir out".split())
    capsys.readouterr()
    call(monkeypatch, train.main, "--eval_only --init_from out/ckpt.pt --dtype float32".split())
    printed = capsys.readouterr().out
    assert "NELBO of replies" in printed
    words = printed.split()
    nats, bits = (float(words[words.index(unit) - 1]) for unit in ("nats", "bits"))
    _, val, _, meta = load_corpus("squares", 48)
    tokens, prompt_len = map(torch.from_numpy, spaced_windows(val, 48, 10**9))
    model = load_checkpoint("out/ckpt.pt")[0]
    assert nats == pytest.approx(nelbo(model, tokens, prompt_len=prompt_len, draws=44), abs=6e-5)
    n = (48 - prompt_len).sum().item()
    assert f"{n} validation tokens" in printed
    assert bits == pytest.approx(nats * n / meta["val"]["bytes"] / np.log(2), rel=1e-3)
    assert meta["val"]["bytes"] == sum(len(question[1]["content"]) for question in QUESTIONS[-6:])


def test_another_index_is_another_corpus_for_a_run(squares, monkeypatch):
    """Even if its tokens are the same."""
    call(monkeypatch, train.main, f"--data squares --max_iters 2 --evals 1 {SMALL}".split())
    _, _, tokenizer, meta = load_corpus("squares", 48)
    splits = {split: np.fromfile(f"data/squares/{split}.bin", np.uint16) for split in ("train", "val")}
    rows = {split: np.fromfile(f"data/squares/{split}.rows", np.int64).reshape(-1, 2) for split in splits}
    rows["train"][0, 1] -= 1

    def pieces():
        for split, tokens in splits.items():
            for (start, n_prompt), end in zip(rows[split], [*rows[split][1:, 0], len(tokens)]):
                yield split, tokens[start:end], 1, n_prompt

    write_tokens("squares", pieces(), tokenizer, "the same", meta["chat"])
    with pytest.raises(Mistake, match="another text"):
        call(monkeypatch, train.main, "--init_from resume --max_iters 4".split())


def test_the_questions_are_right_each_once_and_of_a_seed(monkeypatch):
    pairs = list(data.sums.prepare.questions(20_000, seed=0))
    assert pairs == list(data.sums.prepare.questions(20_000, seed=0))
    assert pairs != list(data.sums.prepare.questions(20_000, seed=1))
    same = set()
    for question, answer in pairs:
        if question.startswith("What is "):
            a, b = sorted(map(int, question[8:-1].split(" + ")))
            assert (int(answer), b < 10**5) == (a + b, True)
            same.add((a, b))
        else:
            word = question.removeprefix("Reverse: ")
            assert answer == word[::-1]
            same.add(min(word, answer))
    assert len(same) == 20_000  # so none of those held out is learned, the other way round either


def test_the_made_corpus_holds_out_its_last_tenth(monkeypatch):
    call(monkeypatch, data.sums.prepare.main, ["--examples", "200"])
    train_split, val, tokenizer, meta = load_corpus("sums", 48)
    assert [meta[split]["examples"] for split in ("train", "val")] == [180, 20]
    rows = {tuple(row) for row in spaced_windows(train_split, 48, 10**9)[0].tolist()}
    held_out = spaced_windows(val, 48, 10**9)[0].tolist()
    assert len(rows) == 180
    assert not rows & set(map(tuple, held_out))
    questions = list(data.sums.prepare.questions(200, 0))
    assert f"{questions[180][0]}\x03\x01assistant\x02{questions[180][1]}\x03" in tokenizer.decode(held_out[0])
