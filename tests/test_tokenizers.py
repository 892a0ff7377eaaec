"""Tokenizers: text becomes ids and comes back, and a tokenizer is its state."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.lib.errors import Mistake
from data.lib.tokenizer import GREYS, BPETokenizer, ByteTokenizer, PictureTokenizer, tokenizer_from_state

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PICTURE = PictureTokenizer(4, 3, 2, 5)  # a caption of 4 letters, and 3 x 2 pixels of 5 greys


@given(st.text())
def test_bytes_hold_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.mask_id < tokenizer.vocab_size for i in ids)


def bpe():
    """A tokenizer of four merges."""
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


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": ["a", "b"]},
        {"tokens": [*bpe().state["tokens"][:-1], "th"]},
        {"tokens": [*bpe().state["tokens"][:-1], 3]},
        {"ids": [*range(1, 261)]},
        {"special": {"<mask>": 5}},
        {"special": {"<s>": 260}},
        {"kind": "klingon"},
    ],
    ids=["too few", "twice", "no text", "no 0", "taken", "no mask", "kind"],
)
def test_a_state_that_is_no_tokenizer_is_refused(change):
    with pytest.raises((ValueError, KeyError, AttributeError)):
        tokenizer_from_state({**bpe().state, **change})


def test_a_pattern_at_which_tiktoken_panics_ends_in_a_mistake():
    with pytest.raises(Mistake, match="pattern"):
        BPETokenizer([chr(i) for i in range(256)], "x*").encode("a")


# --- captioned pictures --------------------------------------------------------------------------


def test_the_text_of_a_canvas_is_read_as_that_canvas_and_shows_its_rows():
    ids = PICTURE.canvas("ab", [0, 1, 2, 3, 4, 0])
    assert PICTURE.decode(ids) == "ab  \n⓪①②\n③④⓪"
    assert PICTURE.encode(PICTURE.decode(ids)) == ids == PICTURE.encode("ab  \r\n⓪①②③\r\n④⓪\n")
    assert tokenizer_from_state(json.loads(json.dumps(PICTURE.state))).kinds == PICTURE.kinds
    assert (len(set(GREYS)), GREYS[20], GREYS[50]) == (51, "⑳", "㊿")
    assert PICTURE.canvas_len == 10


def test_a_plain_pgm_is_its_pixels_from_white_to_black():
    assert PICTURE.encode("P2 # a comment\n3 2\n8\n8 6 4 2 0 8\n") == [257, 258, 259, 260, 261, 257]


@pytest.mark.parametrize(
    "text", ["P2 3 2 8 8 6 4 2 0", "P2 2 3 8 1 1 1 1 1 1", "P2 3 2 8 9 1 1 1 1 1", "P2 3", "P2 ", "P2 x"]
)
def test_a_pgm_of_another_size_or_with_other_numbers_is_refused(text):
    with pytest.raises(Mistake, match="not plain PGM"):
        PICTURE.encode(text)


@pytest.mark.parametrize(
    "change", [{"caption": 0}, {"width": "3"}, {"greys": 52}, {"height": 10**9}, {"width": True}, {"greys": 1}]
)
def test_a_state_that_is_no_picture_is_refused(change):
    with pytest.raises(ValueError, match="no size"):
        tokenizer_from_state({**PICTURE.state, **change})
    with pytest.raises(ValueError, match="names are not captions"):
        tokenizer_from_state({**PICTURE.state, "names": ["zero", "seven"]})
