"""The corpora of handwritten digits, which are pictures with captions."""

import gzip
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from digits_world import SMALL, TOKENIZER
from world import sample_text

import data.digits.prepare as digits
import data.lib.corpus
import train
from data.lib.corpus import load_corpus, windows_at, write_tokens
from data.lib.download import check_sha256
from data.lib.errors import Mistake

SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"  # of digits.csv.gz

pytestmark = pytest.mark.usefixtures("in_digits_world")


def test_the_file_of_digits_is_the_corpus_and_no_hand_is_in_both_splits():
    """1,797 pictures; of the forms that people filled in, 0 to 9 three times and then a hundred digits in a
    fixed order, the last three validate.
    """
    check_sha256(Path(digits.__file__).with_name("digits.csv.gz"), SHA256)
    pictures, labels = digits.read_digits()
    assert pictures.shape == (1797, 8, 8)
    assert (pictures.min(), pictures.max()) == (0, 16)
    text = "".join(map(str, labels))
    forms = [match.start() - 31 for match in re.finditer("95565098", text)]
    assert len(forms) == 14
    assert forms[-3] == digits.FORM
    assert text[digits.FORM :].startswith("0123456789" * 3 + "0955650989")
    train_split, val, tokenizer, meta = load_corpus("digits")
    for split, chosen in ((train_split, slice(None, digits.FORM)), (val, slice(digits.FORM, None))):
        x0, prompts = windows_at(split, np.arange(len(labels[chosen]))[:, None], 72)
        assert (x0[:, 8:] - 257 == pictures[chosen].reshape(-1, 64)).all()
        assert not prompts.any()
        words = ["".join(map(chr, row)) for row in x0[:, :8]]
        assert words == [digits.WORDS[digit].ljust(8) for digit in labels[chosen]]
    assert meta["val"]["tokens"] == 72 * 382
    assert tokenizer.canvas_len == 72


def test_what_is_learned_from_is_also_there_as_others_might_have_written_it():
    """Three copies of each, under the same word, that look like it and are not it."""
    train_split, _, _, _ = load_corpus("digits")
    x0, _ = windows_at(train_split, np.arange(len(train_split.starts))[:, None], 72)
    originals, *copies = x0.reshape(4, digits.FORM, 72)
    assert (copies[0] != copies[1])[:, 8:].any(1).all()
    for copy in copies:
        assert (copy[:, :8] == originals[:, :8]).all()
        alike = [np.corrcoef(*pair)[0, 1] for pair in zip(originals[:, 8:], copy[:, 8:])]
        others = [np.corrcoef(*pair)[0, 1] for pair in zip(originals[:, 8:], np.roll(copy[:, 8:], 1, 0))]
        assert np.mean(alike) > 0.75
        assert np.mean(others) < 0.5


def test_a_token_that_may_not_stand_at_its_place_stops_a_run_in_a_sentence(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path)
    ids = TOKENIZER.canvas("ab", [0] * 6)
    write_tokens("odd", [("train", [*ids[:9], 32], 10), ("val", ids, 10)], TOKENIZER, "made")
    monkeypatch.chdir(tmp_path)
    flags = SMALL.replace("digits", "odd").replace("288", "10")
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split(), "--max_iters", "2"])
    with pytest.raises(Mistake, match="loss"):
        train.main()


def idx(array):
    """An array as a gzipped IDX file."""
    header = np.array([0x800 + array.ndim, *array.shape], ">u4")
    return gzip.compress(header.tobytes() + array.tobytes(), mtime=0)


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with four files in place of MNIST's, of four random pictures each; and the arrays in them."""
    rng, sums, arrays = np.random.default_rng(0), {}, []
    for i, name in enumerate(digits.FILES):
        arrays.append(rng.integers(0, 10, 4, np.uint8) if i % 2 else rng.integers(0, 256, (4, 28, 28), np.uint8))
        (tmp_path / name).write_bytes(idx(arrays[-1]))
        sums[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setattr(digits, "FILES", sums)
    return tmp_path, arrays


def test_mnist_is_captioned_pictures_of_17_greys(small_mnist, run, monkeypatch, capsys):
    folder, arrays = small_mnist
    run("mnist", "--dir", folder, "--name", "few", main=digits.main)
    for split, pictures, labels in zip(load_corpus("few"), arrays[::2], arrays[1::2]):
        x0, _ = windows_at(split, np.arange(len(labels))[:, None], 792)
        assert (x0[:, 8:] - 257 == np.round(pictures.reshape(-1, 784) / 255 * 16)).all()
        assert bytes(x0[0, :8].tolist()).decode().rstrip() == digits.WORDS[labels[0]]
    flags = SMALL.replace("digits", "few").replace("288", "792")
    run(*f"{flags} --max_iters 1 --out_dir {folder}/out".split(), main=train.main)
    lines = sample_text(["--ckpt", folder / "out" / "last.pt", "--steps", 2], monkeypatch, capsys).out.split()
    assert [len(line) for line in lines[-28:]] == [28] * 28


def test_other_files_than_mnist_s_are_refused_and_leave_nothing(small_mnist, mistake, digits_world):
    folder, _ = small_mnist
    path = folder / [*digits.FILES][3]
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert "sha256" in mistake("mnist", "--dir", folder, "--name", "none", main=digits.main)
    path.unlink()
    assert "No such file" in mistake("mnist", "--dir", folder, "--name", "none", main=digits.main)
    assert not (digits_world / "data" / "none").exists()
