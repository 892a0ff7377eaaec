"""Handwritten digits of 8 x 8 pixels and 17 greys, each with its word: text and picture on one canvas.

digits.csv.gz has a picture in each line, 64 greys and the digit; README.md says where it is from. They are in
the order of the forms that people filled in, each of some 130 digits. The last three forms validate, pictures
by hands that are not learned from; of the others each is there four times, as it is and a little changed.
"""

import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

from data.lib.corpus import check_name, write_tokens
from data.lib.errors import command
from data.lib.flags import flag, parse
from data.lib.tokenizer import PictureTokenizer

WORDS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
CAPTION, GREYS = 8, 17  # letters of a caption; greys of a pixel
COPIES = 3  # of each picture that is learned from
FORM = 1415  # the first picture of the twelfth of the fourteen


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


def as_by_others(pictures, digits, seed=0):
    """Pictures (N, 8, 8) and digits (N,), and then COPIES more of each as other hands might have written it:
    turned, slanted, stretched and moved a little, at random.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.from_numpy(pictures).float()[:, None].repeat(COPIES, 1, 1, 1)  # (COPIES * N, 1, 8, 8)
    most = torch.tensor([[0.15, 0.3, 0.12], [0.15, 0.15, 0.12]])  # a pixel is 0.25 wide, and all are 2
    change = (2 * torch.rand(len(whole), 2, 3, generator=generator) - 1) * most
    grid = F.affine_grid(torch.eye(2, 3) + change, whole.shape, align_corners=False)
    copies = F.grid_sample(whole, grid, "bicubic", align_corners=False).round().clamp(0, GREYS - 1)
    return np.concatenate((pictures, copies.int().squeeze(1).numpy())), np.tile(digits, 1 + COPIES)


def read_digits():
    """The pictures (1797, 8, 8), of numbers from 0 to 16, and the digit of each."""
    with gzip.open(Path(__file__).with_name("digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",").astype(int)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64]


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    check_name(config.name, own="digits")
    pictures, digits = read_digits()
    train = as_by_others(pictures[:FORM], digits[:FORM])
    splits = {"train": train, "val": (pictures[FORM:], digits[FORM:])}
    write_pictures(config.name, splits, "UCI, Optical Recognition of Handwritten Digits")


if __name__ == "__main__":
    command(main)
