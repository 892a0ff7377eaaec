"""Handwritten digits of 8 x 8 pixels and 17 greys, each with its word: text and picture on one canvas.

digits.csv.gz has a picture in each line, 64 greys and the digit; README.md says where it is from. They are in
the order of the forms that people filled in, each of some 130 digits. The last three forms validate: no hand
that wrote them is learned from.
"""

import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.corpus import check_name, write_tokens
from data.run.errors import command
from data.run.flags import flag, parse
from data.tokenizer import PictureTokenizer

WORDS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
CAPTION, GREYS = 8, 17  # letters of a caption; greys of a pixel
FORM = 1415  # the first picture of the twelfth of fourteen


@dataclass
class PrepareConfig:
    name: str = flag("digits", "folder of data/ to write")


def write_pictures(name, splits, source):
    """Write the corpus data/NAME of captioned pictures. splits: by name, pixels (N, height, width) and digits
    (N,).
    """
    (_, height, width) = splits["train"][0].shape
    tokenizer = PictureTokenizer(CAPTION, width, height, GREYS)

    def pieces():
        for split, (pictures, digits) in splits.items():
            for pixels, digit in zip(pictures, digits):
                ids = tokenizer.canvas(WORDS[digit], pixels.flatten())
                yield split, ids, len(ids)  # as many bytes

    return write_tokens(name, pieces(), tokenizer, source)


def read_digits():
    """The pictures (1797, 8, 8), of numbers from 0 to 16, and the digit of each."""
    with gzip.open(Path(__file__).with_name("digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",").astype(int)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    check_name(config.name, own="digits")
    pictures, digits = read_digits()
    splits = {"train": (pictures[:FORM], digits[:FORM]), "val": (pictures[FORM:], digits[FORM:])}
    write_pictures(config.name, splits, "UCI, Optical Recognition of Handwritten Digits")


if __name__ == "__main__":
    command(main)
