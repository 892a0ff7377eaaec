"""Handwritten digits with their names. A canvas is a caption followed by a picture in 17 greys.

The digits are in the order of fourteen forms that people filled in. The last three forms, all by new writers, are the
validation split. The training split has every other digit four times: once unchanged, and three slightly altered
copies. MNIST's own test set is its validation split.
"""

import gzip
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, SPLITS, check_name, write_tokens
from data.lib.download import download
from data.lib.flags import argument, flag, script
from data.lib.tokenizer import PictureTokenizer

WORDS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
CAPTION, GREYS = 8, 17  # letters per caption; grey levels per pixel
COPIES = 3  # changed copies of each digit to train on
FORM = 1415  # the first digit of the twelfth form
URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FILES = {  # MNIST's pictures and digits, first for training and then for validation, with their sha256
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


def as_by_others(pictures, digits):
    """Add COPIES of each picture (N, 8, 8), turned, slanted, stretched and moved a little, as if by another hand."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.from_numpy(pictures).float()[:, None].repeat(COPIES, 1, 1, 1)  # (COPIES * N, 1, 8, 8)
    most = torch.tensor([[0.15, 0.3, 0.12], [0.15, 0.15, 0.12]])  # the picture is 2 wide, and a pixel 0.25
    change = (2 * torch.rand(len(whole), 2, 3, generator=generator) - 1) * most
    grid = F.affine_grid(torch.eye(2, 3) + change, whole.shape, align_corners=False)
    copies = F.grid_sample(whole, grid, "bicubic", align_corners=False).round().clamp(0, GREYS - 1)
    return np.concatenate((pictures, copies.int().squeeze(1).numpy())), np.tile(digits, 1 + COPIES)


def read_digits():
    """The pictures (1797, 8, 8), which are numbers from 0 (white) to 16, and the digits (1797,)."""
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), int, delimiter=",")
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def read_mnist(folder):
    """Yield MNIST's pictures (N, 28, 28) and digits (N,) for training, and then those for validation."""
    contents = []
    for name, sha256 in FILES.items():
        copy = folder and Path(folder, name)
        path = download(URL + name, DATA / "mnist" / name, sha256, copy, "--dir takes copies of the files")
        contents.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8))
    for pictures, digits in (contents[:2], contents[2:]):
        greys = ((GREYS - 1) * pictures[16:].astype(np.uint16) + 127) // 255  # after a header of 16 bytes
        yield greys.reshape(-1, 28, 28), digits[8:]


@script
def main(
    corpus: Literal["digits", "mnist"] = argument("1,797 of 8 x 8 pixels, or 70,000 of 28 x 28, a download", "digits"),
    dir: str | None = flag(None, "a folder with copies of MNIST's four files, instead of the download"),
    name: str | None = flag(None, "folder of data/ to write (default: the corpus)"),
):
    check_name(name or corpus)
    if corpus == "mnist":
        splits, source = [*read_mnist(dir)], "MNIST"
    else:
        pictures, digits = read_digits()
        splits = [as_by_others(pictures[:FORM], digits[:FORM]), (pictures[FORM:], digits[FORM:])]
        source = "UCI, Optical Recognition of Handwritten Digits"
    _, height, width = splits[0][0].shape
    tokenizer = PictureTokenizer(CAPTION, width, height, GREYS, WORDS)
    pieces = (
        (split, tokenizer.canvas(WORDS[digit], pixels.flatten()), tokenizer.canvas_len)
        for split, pairs in zip(SPLITS, splits)
        for pixels, digit in zip(*pairs)
    )
    write_tokens(name or corpus, pieces, tokenizer, source)
