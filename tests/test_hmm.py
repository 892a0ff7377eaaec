"""The source of known entropy has the probabilities of its definition."""

from itertools import product

import hmm
import numpy as np
import pytest
import torch
from toys import all_texts, chi_square_p

import data.lib.corpus
from data.lib.corpus import load_corpus


def test_the_start_is_the_stationary_distribution():
    start, move, emit = hmm.source()
    for table in (start[None], move, emit):
        np.testing.assert_allclose(table.sum(1), 1)
    np.testing.assert_allclose(start @ move, start, atol=1e-12)
    assert (start > 0).all()


def test_the_forward_algorithm_sums_over_all_paths():
    start, move, emit = hmm.source()
    letters = hmm.draw(4, hmm.source(), 7)
    total = 0.0
    for path in product(range(hmm.STATES), repeat=4):
        p = start[path[0]] * emit[path[0], letters[0]]
        for i in range(1, 4):
            p *= move[path[i - 1], path[i]] * emit[path[i], letters[i]]
        total += p
    assert hmm.letter_nats(letters[None], hmm.source()).sum() == pytest.approx(-np.log(total))


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_probabilities_of_all_texts_sum_to_one(floor):
    nats = hmm.letter_nats(all_texts(hmm.LETTERS, 3).numpy(), hmm.source(), floor)
    assert np.exp(-nats.sum(1)).sum() == pytest.approx(1)
    assert np.isfinite(nats).all() == (floor > 0)


def test_drawn_letters_follow_the_source():
    """It counts pairs of letters that are far enough apart to be nearly independent."""
    start, move, emit = hmm.source()
    letters = hmm.draw(400_000, hmm.source(), 3)
    pairs = emit.T @ (start[:, None] * move) @ emit  # (L, L): joint of two successive letters
    counts = np.zeros((hmm.LETTERS, hmm.LETTERS))
    np.add.at(counts, (letters[:-1:20], letters[1::20]), 1)
    assert chi_square_p(torch.from_numpy(counts).flatten(), torch.from_numpy(pairs).flatten()) > 0.001


def test_most_successions_of_letters_are_impossible():
    start, move, emit = hmm.source()
    pairs = emit.T @ (start[:, None] * move) @ emit
    assert (pairs[emit.any(0)][:, emit.any(0)] > 0).mean() < 0.5


def test_a_byte_that_is_no_letter_is_impossible():
    text = np.frombuffer(bytes(hmm.draw(5, hmm.source(), 1).astype(np.uint8) + ord("a")), dtype=np.uint8)
    assert np.isfinite(hmm.text_nats(text[None])).all()
    broken = np.where(np.arange(5) == 2, ord("?"), text)
    assert not np.isfinite(hmm.text_nats(broken[None])).all()
    assert np.isfinite(hmm.text_nats(broken[None], floor=1e-3)).all()


def test_the_corpus_and_its_entropy(tmp_path, monkeypatch, capsys):
    """The printed entropy is the mean over windows of the validation split, and --score agrees."""
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path)
    monkeypatch.setattr("sys.argv", ["hmm.py", "--tokens", "40960"])
    hmm.main()
    printed = capsys.readouterr().out
    train, val, _, _ = load_corpus("hmm")
    assert (len(train), len(val)) == (38_400, 2_560)
    windows = val.reshape(-1, hmm.WINDOW)
    nats = hmm.text_nats(windows)
    assert f"true entropy of windows of 64: {nats.mean():.4f} nats per token" in printed
    lines = b"\n".join(bytes(row.astype(np.uint8)) for row in windows)
    (tmp_path / "lines.txt").write_bytes(lines + b"\nnot its letters\n")
    monkeypatch.setattr("sys.argv", ["hmm.py", "--score", str(tmp_path / "lines.txt")])
    hmm.main()
    assert f"{nats.mean():.4f} nats per letter of 40 lines; 2.4% of 41" in capsys.readouterr().out
