"""Prompts, and what the model sees of them: holes, suffixes, the sliding window, guidance."""

import sys
from types import SimpleNamespace

import pytest
import torch
from toys import tiny_model
from world import sample_text

from data.lib.byte_pairs import PATTERN
from data.lib.errors import Mistake
from data.lib.prompt import make_canvas, read_text, shown_of
from data.lib.tokenizer import BPETokenizer, ByteTokenizer
from data.lib.window import blocks
from model import Transformer
from sample import denoise


def canvas(prompt, length=None, suffix="", context=16):
    return make_canvas(prompt, suffix, length, ByteTokenizer(), context)


def test_holes_in_a_prompt():
    assert canvas("<mask*12>") == [256] * 12
    assert canvas("<masks> <MASK>")[:14] == [*b"<masks> <MASK>"]
    for text in (
        "<Mask*3>",
        "<mask *3>",
        "< MASK * 3 >",
        "<mask*4:12>",
        "<mask*0>",
        "<mask*>",
        "<mask*9999999>",
        "<mask*99999999999>",
    ):
        with pytest.raises(Mistake, match="a hole is <mask>"):
            canvas(text)


def test_a_prompt_file_is_bounded(tmp_path):
    (tmp_path / "a").write_text("é" * 4)
    assert read_text(tmp_path / "a") == read_text(tmp_path / "a", 8) == "é" * 4
    with pytest.raises(Mistake, match="a prompt of more than 7 bytes"):
        read_text(tmp_path / "a", 7)


def test_canvas_of_a_prompt():
    assert canvas("ab") == [97, 98] + [256] * 14
    assert canvas("é<mask*3>b") == [*"é".encode(), 256, 256, 256, 98]
    assert canvas("a<mask>b", 5) == [97, 256, 98, 256, 256]
    assert canvas("a", 4, "b") == [97, 256, 256, 98]
    assert canvas("a<mask>", None, "b") == [97, 256, 98]
    assert canvas("<mask*2>a<mask>") == [256, 256, 97, 256]
    assert canvas("a<mask*3>", 6, "b") == [97, 256, 256, 256, 256, 98]
    assert len(canvas("a<mask*40>")) == 41  # longer than context
    assert len(canvas("a" * 20, 30)) == 30
    for prompt, length in (("too long", 4), ("a" * 17, None), ("a<mask*4>", 4)):
        with pytest.raises(Mistake, match="the canvas has"):
            canvas(prompt, length)


def test_a_space_before_a_hole_is_left_to_it_if_the_tokens_of_words_begin_with_one():
    tokenizer = BPETokenizer([*map(chr, range(256))], PATTERN)
    for prompt, same in (("a <mask> b", "a<mask> b"), ("a  <mask>", "a <mask>"), ("a\n<mask>", "a\n<mask>")):
        assert [*map(chr, make_canvas(prompt, "", None, tokenizer, 16))] == [
            *same.replace("<mask>", chr(tokenizer.mask_id))
        ]
    assert make_canvas("a ", "", 3, tokenizer, 16) == [97, 256, 256]
    assert make_canvas("<mask>a ", "", None, tokenizer, 16) == [256, 97, 32]
    assert canvas("a <mask>") == [97, 32, 256]


def test_what_is_shown_ends_at_the_first_end_that_was_written():
    canvas = [3, 0, 9, 1, 9, 9, 9]  # 9 is the hole; the end in the prompt ends nothing
    ids = [3, 0, 5, 1, 6, 3, 7]
    assert shown_of(ids, canvas, 9, (3,)) == [3, 0, 5, 1, 6]
    assert shown_of(ids, canvas, 9, ()) == ids
    assert shown_of([3, 0, 3], [3, 0, 9], 9, (3,)) == [3, 0]
    assert shown_of([3, 0], [3, 0], 9, (3,)) == [3, 0]
    assert shown_of([3, 0, 3, 1], [9, 9, 9, 1], 9, (3,)) == [3, 0, 3, 1]  # the prompt's own end is kept
    assert shown_of([3, 0], [9, 9], 9, (3,)) == []


def test_guidance_is_the_formula():
    """(1 + w) times the logits minus w times those without the prompt (2410.18514). Special tokens stay visible."""
    model = tiny_model(V=6, T=5, special_ids=(0, 6))
    canvas, blank = torch.tensor([[0, 2, 6, 3, 6]]), torch.tensor([[0, 6, 6, 6, 6]])
    where = canvas == 6
    ((_, _, _, look),) = blocks(model, canvas, guidance=1.5)
    guided = look(where)[:, 1:6]
    expected = 2.5 * model(canvas)[0, [2, 4], 1:6] - 1.5 * model(blank)[0, [2, 4], 1:6]
    torch.testing.assert_close(guided, expected)
    *_, strong = denoise(model, canvas, 1, temperature=0, guidance=1.5)
    assert strong[0, 2] == expected[0].argmax() + 1


def test_a_long_canvas_is_seen_through_a_window_that_moves():
    """Every pass sees at most `context` tokens, and blocks are filled from left to right."""
    model, seen = tiny_model(V=5, T=16), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    start = torch.full((2, 100), 5)
    start[:, 40:50] = 1
    before, frontier = start, 0
    for canvas in denoise(model, start, 100, "confidence"):
        changed = (canvas != before).any(0).nonzero().flatten()
        assert changed.numel() == 0 or changed.min() // 4 == changed.max() // 4
        assert (changed >= frontier).all()
        frontier = changed.min().item() // 4 * 4 if changed.numel() else frontier
        before = canvas
    assert max(idx.shape[1] for idx in seen) == 16
    assert [idx.shape[1] for idx in seen[-4:]] == [12] * 4
    assert seen[-1][:, :8].ne(5).all()  # the last block of four has eight tokens to its left
    assert canvas[:, 40:50].eq(1).all()


@pytest.mark.usefixtures("in_world")
def test_a_long_canvas_takes_no_more_memory(monkeypatch, capsys):
    """Nothing that the model sees or says is larger at 4,000 tokens than at 64."""
    largest = {}
    forward = Transformer.forward

    def watched(self, idx, where=None, **more):
        logits = forward(self, idx, where, **more)
        largest["size"] = max(largest.get("size", 0), idx.numel(), logits.numel())
        return logits

    monkeypatch.setattr(Transformer, "forward", watched)
    sizes = []
    for length in (64, 4000):
        largest.clear()
        printed = sample_text(["--length", length, "--steps", length // 4], monkeypatch, capsys)
        assert len(printed.out.encode()) >= length
        sizes.append(largest["size"])
    assert sizes[1] <= sizes[0]


@pytest.mark.usefixtures("in_world")
def test_prompts_of_every_kind_in_one_batch_are_written_as_alone(tmp_path, monkeypatch, capsys):
    """Two flags, a file and stdin; holes and a suffix; longer than the model's 32 tokens, and not."""
    (tmp_path / "prompt.txt").write_text("the <mask*3> of\n")
    prompts = ["line 1<mask*20>", "<mask*50> book", "line <mask*3> of"]
    flags = ["--suffix", "!\n", "--steps", 4, "--dtype", "float32"]
    alone = [sample_text(["--prompt", prompt, *flags], monkeypatch, capsys).out for prompt in prompts]
    alone.append(sample_text(["--prompt_file", tmp_path / "prompt.txt", *flags], monkeypatch, capsys).out)
    stdin = SimpleNamespace(buffer=SimpleNamespace(read=lambda _: b"<mask*4>"))
    monkeypatch.setattr(sys, "stdin", stdin)
    alone.append(sample_text(["--prompt_file", "-", *flags], monkeypatch, capsys).out)
    files = ["--prompt_file", tmp_path / "prompt.txt", "-"]
    together = sample_text(["--prompt", *prompts, *files, *flags], monkeypatch, capsys)
    assert together.out == "".join(f"--- {i} of 5\n{text}" for i, text in enumerate(alone, 1))
    assert all(text.endswith("!\n\n") for text in alone)
    assert [len(text.encode()) for text in alone[:2]] == [29, 58] or "\ufffd" in "".join(alone)
