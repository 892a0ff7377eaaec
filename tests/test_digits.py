"""The corpora of handwritten digits, and the tokenizer of a captioned picture."""

import functools
import gzip
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from good_files import idx, write_mnist
from world import sample_text

import data.digits.prepare as digits
import data.lib.corpus
import data.mnist.prepare as mnist
import data.text.prepare
import train
from data.lib.corpus import load_corpus, windows_at, write_tokens
from data.lib.download import check_sha256
from data.lib.errors import Mistake
from data.lib.tokenizer import GREYS, PictureTokenizer, tokenizer_from_state

SMALL = "--data digits --n_layer 1 --n_head 1 --n_embd 16 --batch_size 4 --eval_tokens 288 --dtype float32"
TOKENIZER = PictureTokenizer(4, 3, 2, 5)  # a caption of 4 letters, and 3 x 2 pixels of 5 greys
T = 10
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"  # of digits.csv.gz


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the corpus of digits and a model trained on it for two steps."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.lib.corpus, "DATA", folder / "data")
        patch.setattr(sys, "argv", ["prepare.py"])
        digits.main()
        patch.setattr(sys, "argv", f"train.py {SMALL} --max_iters 2 --out_dir {folder}/out".split())
        train.main()
    return folder


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
    monkeypatch.setattr(data.lib.corpus, "DATA", world / "data")
    monkeypatch.chdir(world)


def test_the_text_of_a_canvas_is_read_as_that_canvas_and_shows_its_rows():
    ids = TOKENIZER.canvas("ab", [0, 1, 2, 3, 4, 0])
    assert TOKENIZER.decode(ids) == "ab  \n⓪①②\n③④⓪"
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids == TOKENIZER.encode("ab  \r\n⓪①②③\r\n④⓪\n")
    assert tokenizer_from_state(json.loads(json.dumps(TOKENIZER.state))).kinds == TOKENIZER.kinds
    assert len(set(GREYS)) == 51
    assert GREYS[20] == "⑳"
    assert GREYS[50] == "㊿"
    assert TOKENIZER.n_bytes("ab  \n⓪①②\n③④⓪") == T


@pytest.mark.parametrize(
    "change",
    [{"caption": 0}, {"width": "3"}, {"greys": 52}, {"height": 10**9}, {"width": True}, {"greys": 1}],
)
def test_a_state_that_is_no_picture_is_refused(change):
    with pytest.raises(ValueError, match="no size"):
        tokenizer_from_state({**TOKENIZER.state, **change})


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


def test_a_corpus_whose_tokens_are_not_of_their_places_is_refused(world, tmp_path, monkeypatch):
    """And one that ends within a canvas: neither has the sums of a file that was damaged."""
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path)
    ids = TOKENIZER.canvas("ab", [0] * 6)
    for name, odd, words in (
        ("letter", [*ids[:9], 32], "may not stand where they are"),
        ("pixel", [257, *ids[1:]], "may not stand where they are"),
        ("short", ids[:-1], "not a whole corpus"),
    ):
        write_tokens(name, [("train", ids, T), ("val", odd, T)], TOKENIZER, "made")
        with pytest.raises(Mistake, match=words):
            load_corpus(name)


@pytest.fixture
def small_mnist(tmp_path):
    """A folder with four files as MNIST's, of few pictures; the files' sums, and what is in them."""
    content, sums = write_mnist(tmp_path, 4), {}
    for split, names in mnist.FILES.items():
        sums[split] = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    return tmp_path, sums, content


def test_mnist_is_captioned_pictures_of_17_greys(small_mnist, run, monkeypatch, capsys):
    folder, files, content = small_mnist
    run("--dir", folder, "--name", "few", main=functools.partial(mnist.main, files=files))
    for split, (pictures, labels) in zip(load_corpus("few"), content.values()):
        x0, _ = windows_at(split, np.arange(len(labels))[:, None], 792)
        assert (x0[:, 8:] - 257 == np.round(pictures.reshape(-1, 784) / 255 * 16)).all()
        assert bytes(x0[0, :8].tolist()).decode().rstrip() == digits.WORDS[labels[0]]
    flags = SMALL.replace("digits", "few").replace("288", "792")
    run(*f"{flags} --max_iters 1 --out_dir {folder}/out".split(), main=train.main)
    lines = sample_text(["--ckpt", folder / "out" / "last.pt", "--steps", 2], monkeypatch, capsys).out.split()
    assert [len(line) for line in lines[-28:]] == [28] * 28


def test_damaged_files_of_mnist_are_refused_and_leave_nothing(small_mnist, mistake, world):
    folder, files, content = small_mnist
    pictures, labels = map(Path, (folder / name for name in files["train"]))
    main = functools.partial(mnist.main, files=files)
    whole = pictures.read_bytes()
    arrays = content["train"]
    odd = {
        "sha256": whole[:-1] + b"\1",
        "not an IDX file of 28 x 28": idx(arrays[0][:, :27]),
        "is damaged": idx(arrays[0])[:-300],
        "not an IDX file": idx(arrays[1]),
        "not an IDX": gzip.compress(b"\0\0"),
        "it has more bytes than it says": gzip.compress(gzip.decompress(whole) + b"more", mtime=0),
        "it has fewer bytes than it says": gzip.compress(gzip.decompress(whole)[:-1], mtime=0),
        "Not a gzipped": b"no gzip at all",
        "does not have a digit for each": idx(arrays[0][:-1]),
    }
    for words, damaged in odd.items():
        pictures.write_bytes(damaged)
        if words != "sha256":
            files["train"][pictures.name] = hashlib.sha256(damaged).hexdigest()
        assert words in mistake("--dir", folder, "--name", "none", main=main)
    pictures.write_bytes(whole)
    files["train"][pictures.name] = hashlib.sha256(whole).hexdigest()
    wrong = idx(np.full_like(arrays[1], 10))
    labels.write_bytes(wrong)
    files["train"][labels.name] = hashlib.sha256(wrong).hexdigest()
    assert "does not have a digit for each" in mistake("--dir", folder, "--name", "none", main=main)
    assert not (world / "data" / "none").exists()
