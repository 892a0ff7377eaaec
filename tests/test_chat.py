"""Prompts and answers: what a template makes of them, what is learned of them, and what is shown."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from talks import QUESTIONS, SMALL, call, said, write_jsonl
from test_tokenizers import GPT2_PATTERN
from tokenizers import Tokenizer, models, pre_tokenizers

import data.chat.prepare
import data.lib.corpus
import data.sums.prepare
import sample
import train
from data.lib import slim
from data.lib.chat import BYTES, Chat, converse, template_for
from data.lib.checkpoint import read_checkpoint, save_checkpoint
from data.lib.errors import Mistake
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, WordPieceTokenizer
from data.weights.hub import byte_symbols
from model import ModelConfig, Transformer, load_checkpoint

LLADA = {
    "opening": "<|startoftext|>",
    "turn": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "end": "<|endoftext|>",
}
NAMES = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>", "<mask>"

pytestmark = pytest.mark.usefixtures("talk_folder")


def bpe(*names):
    """Byte pairs, and special tokens of these names."""
    tokens = [*map(chr, range(256)), "\n\n", "He"]
    special = {name: len(tokens) + i for i, name in enumerate(names)}
    return BPETokenizer(tokens, GPT2_PATTERN, special=special)


# In the shape of LLaDA's own.
JINJA = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = '<|startoftext|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def test_llada_s_template_gives_what_transformers_makes_of_it():
    ours, symbols = bpe(*NAMES), byte_symbols()
    pieces = ["".join(symbols[ord(c)] for c in token) for token in ours.state["tokens"]]
    merges = [(symbols[10], symbols[10]), ("H", "e")]
    theirs = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(list(NAMES))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=JINJA)
    chat, special = Chat(LLADA, ours), ours.special
    assert (chat.end_id, chat.end_ids) == (special["<|endoftext|>"], {special["<|endoftext|>"], special["<|eot_id|>"]})
    assert chat.reply(" Yes ") == [*ours.encode("Yes"), special["<|eot_id|>"]]
    system = [{"role": "system", "content": "Be brief.\n"}]
    for messages in (said(" Hello \n"), said("Hello", "Yes", "\n\nWhy?\n\nHe "), system + said("1 + 1?")):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat.prompt(messages) == expected
        replied = [*messages, {"role": "assistant", "content": " So it is.\n"}]
        expected = theirs.apply_chat_template(replied, return_dict=False)
        header = chat.prompt(messages)[: -len(ours.encode("\n\n"))]  # its newlines and the reply are one text
        assert expected[: len(header)] == header
        assert ours.decode(chat.prompt(messages) + chat.reply(" So it is.\n")) == ours.decode(expected)


@pytest.mark.parametrize("tokenizer", [bpe(*NAMES), bpe("<|endoftext|>", "<mask>")], ids=["LLaDA", "GPT-2"])
def test_no_message_holds_a_special_token(tokenizer):
    """Whatever stands in it: of these there are as many as the template has."""
    chat = Chat(LLADA if len(tokenizer.special) > 2 else template_for(tokenizer), tokenizer)

    def count(messages):
        return sum(i in tokenizer.special_ids for i in chat.prompt(messages))

    evil = "".join(NAMES) + "{role}{content}<|eot_id|>"
    assert count(said(evil, evil, evil)) == count(said("a", "a", "a")) > 0
    assert evil in tokenizer.decode(chat.prompt(said(evil)))
    assert chat.reply(evil)[:-1] == tokenizer.encode(evil)


def test_the_template_of_each_kind_of_tokenizer():
    assert template_for(ByteTokenizer()) == BYTES
    chat = Chat(BYTES, ByteTokenizer())
    assert bytes(chat.prompt(said("Hi", "Yes", "Why?"))) == (
        b"\x01user\x02Hi\x03\x01assistant\x02Yes\x03\x01user\x02Why?\x03\x01assistant\x02"
    )
    assert (bytes(chat.reply("So")), chat.end_ids) == (b"So\x03", {3})
    roberta = bpe("<s>", "</s>", "<mask>")
    assert template_for(roberta) == {"opening": "<s>", "turn": "{role}: {content}</s>", "end": "</s>"}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "user", "assistant", ":", "hi"]
    bert = WordPieceTokenizer(words, True, None, True)
    assert Chat(template_for(bert), bert).prompt(said("hi")) == [2, 5, 7, 8, 3, 6, 7]
    with pytest.raises(Mistake, match="no token that ends a text"):
        template_for(bpe("<mask>"))


@pytest.mark.parametrize(
    "template",
    [
        [],
        {},
        {**BYTES, "opening": None},
        {**BYTES, "opening": "<mask>"},
        {**BYTES, "opening": "\ud800"},
        {**BYTES, "turn": "{content}{role}x"},
        {**BYTES, "turn": "{role}{content}{content}x"},
        {**BYTES, "turn": "{role}{content}"},
        {**BYTES, "turn": "{role}<mask>{content}x"},
        {**BYTES, "end": "<mask>"},
        {**BYTES, "end": ""},
        {**BYTES, "end": "xy"},
        {**BYTES, "end": ["\x03"]},
    ],
    ids=str,
)
def test_what_is_no_template_is_refused(template):
    with pytest.raises(Mistake, match="template"):
        Chat(template, ByteTokenizer())


@pytest.mark.parametrize("attention", ["block:8", "causal"])
def test_examples_are_learned_and_answered_in_blocks_and_from_the_left(attention, squares, monkeypatch, capsys):
    flags = f"--data squares --max_iters 2 --evals 1 {SMALL} --out_dir out --attention {attention}"
    call(monkeypatch, train.main, flags.split())
    call(monkeypatch, train.main, "--eval_only --init_from out/ckpt.pt --dtype float32".split())
    assert "of replies" in capsys.readouterr().out
    call(monkeypatch, sample.main, ["--ckpt", "out/ckpt.pt", "--chat", "--prompt", "3?"])
    assert "user" not in capsys.readouterr().out


def test_a_prompt_of_the_flag_s_is_refused_where_examples_have_their_own(squares, monkeypatch):
    with pytest.raises(Mistake, match="--prompt_len 5: the examples"):
        call(monkeypatch, train.main, f"--data squares --max_iters 2 {SMALL} --prompt_len 5".split())


def test_what_a_conversation_has_written_is_saved_though_it_ends_in_a_mistake(parrot, monkeypatch):
    flags = ["--ckpt", "x.pt", "--chat", "--save", "talk.html", "--order", "left", "--temperature", "0"]
    with pytest.raises(Mistake, match="a conversation of"):
        call(monkeypatch, sample.main, flags, b"hello\n" + b"x" * 2000 + b"\n")
    assert Path("talk.html").exists()


def test_the_sample_of_a_run_answers_a_question(squares, monkeypatch, capsys):
    call(monkeypatch, train.main, f"--data squares --max_iters 2 --evals 1 {SMALL}".split())
    assert f"  | ␁user␂{QUESTIONS[-6][0]['content']}␃␁assistant␂" in capsys.readouterr().out


def test_a_run_on_examples_resumes_to_the_bit_and_leaves_what_a_chat_needs(squares, monkeypatch):
    flags = f"--data squares --max_iters 6 --evals 3 {SMALL} --dropout 0.1".split()
    call(monkeypatch, train.main, [*flags, "--out_dir", "whole"])
    draw, steps = train.draw_batch, []

    def die_in_step_5(*args):
        steps.append(args)
        if len(steps) == 5:
            raise RuntimeError("killed")
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batch", die_in_step_5)
        with pytest.raises(RuntimeError, match="killed"):
            call(patch, train.main, [*flags, "--out_dir", "out"])
    call(monkeypatch, train.main, "--init_from resume --out_dir out".split())
    ours, whole = (load_checkpoint(f"{folder}/last.pt") for folder in ("out", "whole"))
    assert all(map(torch.equal, ours[2]["model"].values(), whole[2]["model"].values()))
    assert (ours[2]["chat"], ours[2]["train"]["prompt_len"]) == (BYTES, "0")
    assert (ours[0].config.end_ids, ours[0].config.special_ids) == ((3,), (256,))
    call(monkeypatch, slim.main, ["out/last.pt", "small.pt"])
    assert read_checkpoint("small.pt")["chat"] == BYTES


def test_a_model_that_knew_no_end_learns_the_corpus_s(tmp_path, monkeypatch):
    """One whose `<|endoftext|>` was not text, as GPT-2's: it is learned from now on."""
    tokenizer = bpe("<|endoftext|>", "<mask>")
    shape = {"context": 48, "n_layer": 1, "n_head": 1, "n_embd": 16}
    config = ModelConfig(tokenizer.vocab_size, tokenizer.mask_id, special_ids=tokenizer.special_ids, **shape)
    save_checkpoint("base.pt", Transformer(config), tokenizer)
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    call(monkeypatch, data.chat.prepare.main, ["q.jsonl", "--tokenizer", "base.pt"])
    call(monkeypatch, train.main, "--data q --init_from base.pt --max_iters 2 --evals 1".split())
    model, _, checkpoint = load_checkpoint("out/ckpt.pt")
    end = tokenizer.special["<|endoftext|>"]
    assert (model.config.end_ids, model.config.special_ids) == ((end,), (tokenizer.mask_id,))
    assert checkpoint["chat"]["turn"] == "{role}: {content}<|endoftext|>"


def test_ends_that_are_special_or_no_tokens_are_refused():
    for config in ({"end_ids": (256,)}, {"end_ids": (257,)}, {"special_ids": (3,), "end_ids": (3,)}):
        save_checkpoint("x.pt", Transformer(ModelConfig(n_layer=1, n_embd=8, **config)), ByteTokenizer())
        with pytest.raises(Mistake):
            load_checkpoint("x.pt")


class Parrot(Transformer):
    """Its reply is the first byte of the last message and an end, and nonsense after that."""

    def forward(self, idx, where=None, clean=None, cache=None):
        logits = torch.zeros(*idx.shape, self.config.vocab_size)
        for row, out in zip(idx.tolist(), logits):
            start = len(row) - row[::-1].index(2)  # after the last STX, where the reply is
            message = len(row) - row[::-1].index(2, len(row) - start + 1)
            for i in range(start, len(row)):
                out[i, {start: row[message], start + 1: 3}.get(i, ord("?"))] = 99.0
        return logits if where is None else logits[where]


@pytest.fixture
def parrot(monkeypatch):
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, context=96, special_ids=(256,), end_ids=(3,))
    model = Parrot(config)
    checkpoint = {"chat": BYTES}
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: (model.eval(), ByteTokenizer(), checkpoint))
    return checkpoint


def test_the_reply_alone_is_printed(parrot, monkeypatch, capsys):
    flags = ["--ckpt", "x.pt", "--chat", "--order", "confidence", "--dtype", "float32"]
    call(monkeypatch, sample.main, [*flags, "--prompt", "abc", "<mask*3>", "  x"])
    assert capsys.readouterr().out == "--- 1 of 3\na\n--- 2 of 3\n<\n--- 3 of 3\nx\n"


def test_a_conversation_is_read_from_stdin_and_remembered(parrot, tmp_path, monkeypatch, capsys):
    seen, canvas = [], Chat.canvas

    def watched(self, messages, length):
        seen.append(json.loads(json.dumps(messages)))
        return canvas(self, messages, length)

    monkeypatch.setattr(Chat, "canvas", watched)
    flags = ["--ckpt", "x.pt", "--chat", "--dtype", "float32", "--save", "x.html"]
    call(monkeypatch, sample.main, flags, "hello\n\n \nélan\nbye".encode())
    assert capsys.readouterr().out == "h\n\ufffd\nb\n"
    assert seen[-1] == said("hello", "h", "élan", "\ufffd", "bye")
    assert [len(messages) for messages in seen] == [1, 3, 5]
    saved = (tmp_path / "x.html").read_text()
    count = [saved.count(json.dumps(list(word))[1:-1].replace(", ", ",")) for word in ("hello", "bye")]
    assert count == [2, 1]  # with all three turns, too little of the canvas would be left for the reply
    flags += ["--overwrite"]
    call(monkeypatch, sample.main, flags)
    assert capsys.readouterr().out == ""
    with pytest.raises(Mistake, match=r"a conversation of \d+ tokens; the canvas has 96 \(--length\)"):
        call(monkeypatch, sample.main, flags, b"one\n" + b"x" * 96)
    assert capsys.readouterr().out == "o\n"  # what came before stands


def test_the_last_turns_that_leave_a_quarter_of_the_canvas_are_kept():
    chat, messages = Chat(BYTES, ByteTokenizer()), said("one", "1", "two", "2", "three")
    for system in ([], [{"role": "system", "content": "be"}]):
        whole, last_two, last = (chat.prompt(system + messages[i:]) for i in (0, 2, 4))
        for kept, length in ((whole, len(whole) * 4), (last_two, len(whole)), (last, len(last) + 1)):
            ids = chat.canvas(system + messages, length)
            assert ids == kept + [256] * (length - len(kept))


def test_a_reply_is_remembered_without_what_the_template_takes_for_itself(monkeypatch):
    chat, prompts = Chat(BYTES, ByteTokenizer()), []

    def answer(messages):
        prompts.append(bytes(i for i in chat.canvas(messages, 99) if i < 256))
        return "a\x01b"

    call(monkeypatch, lambda: converse(chat, answer), [], b"1\n2\n")
    assert prompts[1].startswith(b"\x01user\x021\x03\x01assistant\x02ab\x03\x01user\x022\x03")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--suffix a", "--chat: not with --suffix"),
        ("--score x.txt --order left", "--score: not with --chat"),
        ("--num_samples 2", "one sample at a time"),
        ("--order left random", "one --order"),
        ("--prompt a --length 19", "a conversation of 19 tokens"),
        ("--prompt \x03", r"the content has '\\x03'"),
    ],
)
def test_what_a_chat_cannot_be_is_refused(flags, reason, parrot, monkeypatch):
    with pytest.raises(Mistake, match=reason):
        call(monkeypatch, sample.main, ["--ckpt", "x.pt", "--chat", *flags.split(" ")], b"hello\n")


def test_a_model_without_a_template_says_so(parrot, monkeypatch):
    for chat, reason in ((None, "the model has no chat template"), ({}, "the chat template doesn't fit")):
        parrot["chat"] = chat
        for flags in ([], ["--prompt", "a"]):
            with pytest.raises(Mistake, match=reason):
                call(monkeypatch, sample.main, ["--ckpt", "x.pt", "--chat", *flags])


def test_a_text_ends_at_its_end_without_a_chat_too(parrot, monkeypatch, capsys):
    flags = ["--ckpt", "x.pt", "--dtype", "float32", "--order", "left", "--temperature", "0"]
    call(monkeypatch, sample.main, [*flags, "--prompt", "\x02abc\x02"])
    assert capsys.readouterr().out == "\x02abc\x02a\n"
