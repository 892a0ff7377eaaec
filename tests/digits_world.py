"""The corpus of digits with a model trained on it, made once, and a canvas of a few pixels."""

import sys

import pytest

import data.digits.prepare as digits
import data.lib.corpus
import train
from data.lib.tokenizer import PictureTokenizer

SMALL = "--data digits --n_layer 1 --n_head 1 --n_embd 16 --batch_size 4 --eval_tokens 288 --dtype float32"
TOKENIZER = PictureTokenizer(4, 3, 2, 5)  # a caption of 4 letters, and 3 x 2 pixels of 5 greys


@pytest.fixture(scope="session")
def digits_world(tmp_path_factory):
    """A folder with the corpus of digits and a model trained on it for two steps."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.lib.corpus, "DATA", folder / "data")
        patch.setattr(sys, "argv", ["prepare.py"])
        digits.main()
        patch.setattr(sys, "argv", f"train.py {SMALL} --max_iters 2 --out_dir {folder}/out".split())
        train.main()
    return folder


@pytest.fixture
def in_digits_world(digits_world, monkeypatch):
    monkeypatch.setattr(data.lib.corpus, "DATA", digits_world / "data")
    monkeypatch.chdir(digits_world)
