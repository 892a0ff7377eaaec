"""Handwritten digits, each with its word: text and picture on one canvas, with 17 greys.

    python data/digits/prepare.py           # data/digits: 1,797 of 8 x 8 pixels, from digits.csv.gz (see README.md)
    python data/digits/prepare.py mnist     # data/mnist: 70,000 of 28 x 28 pixels, a download

The digits are in the order of the forms that people filled in, some 130 on each. The last three forms validate, so
nobody's hand is in both splits. The others are there four times, as they are and with three kinds of small changes.
MNIST's test set validates.
"""

import gzip
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

from data.lib.corpus import DATA, check_name, write_tokens
from data.lib.download import check_sha256, download
from data.lib.errors import command
from data.lib.flags import argument, flag, parse
from data.lib.tokenizer import PictureTokenizer

WORDS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
CAPTION, GREYS = 8, 17  # letters of a caption; greys of a pixel
COPIES = 3  # changed copies of each digit to train on
FORM = 1415  # the first digit of the twelfth of the fourteen forms
URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FILES = {  # MNIST's pictures and labels, with their sha256
    "train": {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    },
    "val": {
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
}


@dataclass
class PrepareConfig:
    corpus: Literal["digits", "mnist"] = argument("which of the two", "digits")
    dir: str | None = flag(None, "a folder with copies of MNIST's four files, instead of the download")
    name: str | None = flag(None, "folder of data/ to write (default: the corpus)")


def canvases(splits, tokenizer):
    """Yield (split, ids, bytes) of each canvas. splits: by name, pictures (N, height, width) and digits (N,)."""
    for split, (pictures, digits) in splits.items():
        for pixels, digit in zip(pictures, digits):
            ids = tokenizer.canvas(WORDS[digit], pixels.flatten())
            yield split, ids, len(ids)  # a letter or a pixel counts as a byte


def as_by_others(pictures, digits, seed=0):
    """Add COPIES of each picture (N, 8, 8), turned, slanted, stretched and moved a little, as if by another hand."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.from_numpy(pictures).float()[:, None].repeat(COPIES, 1, 1, 1)  # (COPIES * N, 1, 8, 8)
    most = torch.tensor([[0.15, 0.3, 0.12], [0.15, 0.15, 0.12]])  # the picture is 2 wide, and a pixel 0.25
    change = (2 * torch.rand(len(whole), 2, 3, generator=generator) - 1) * most
    grid = F.affine_grid(torch.eye(2, 3) + change, whole.shape, align_corners=False)
    copies = F.grid_sample(whole, grid, "bicubic", align_corners=False).round().clamp(0, GREYS - 1)
    return np.concatenate((pictures, copies.int().squeeze(1).numpy())), np.tile(digits, 1 + COPIES)


def read_digits():
    """The pictures (1797, 8, 8), numbers from 0 (white) to 16, and their digits (1797,)."""
    with gzip.open(Path(__file__).with_name("digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",").astype(int)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def read_mnist(folder, files):
    """The splits of MNIST, with greys from 0 (white) to 16. Without a folder the files are downloaded."""
    splits = {}
    for split, sums in files.items():
        content = []
        for name, sha256 in sums.items():
            path = Path(folder or DATA / "mnist") / name
            if folder is None:
                download(URL + name, path, sha256, "--dir takes copies of the files")
            check_sha256(path, sha256)
            with gzip.open(path) as file:
                content.append(np.frombuffer(file.read(), np.uint8))
        pictures, digits = content[0][16:].reshape(-1, 28, 28), content[1][8:]  # after the headers
        splits[split] = ((GREYS - 1) * pictures.astype(np.uint16) + 127) // 255, digits
    return splits


def main(files=FILES):
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    name = config.name or config.corpus
    check_name(name, own="digits")
    if config.corpus == "mnist":
        splits = read_mnist(config.dir, files)
    else:
        pictures, digits = read_digits()
        splits = {"train": as_by_others(pictures[:FORM], digits[:FORM]), "val": (pictures[FORM:], digits[FORM:])}
    (_, height, width) = splits["train"][0].shape
    tokenizer = PictureTokenizer(CAPTION, width, height, GREYS)
    source = {"digits": "UCI, Optical Recognition of Handwritten Digits", "mnist": "MNIST"}[config.corpus]
    write_tokens(name, canvases(splits, tokenizer), tokenizer, source)


if __name__ == "__main__":
    command(main)
