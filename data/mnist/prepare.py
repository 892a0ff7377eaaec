"""MNIST: 70,000 handwritten digits of 28 x 28 pixels, each with its word, as data/digits has them.

The 10,000 of the test set validate. A grey is one of 17 here, not of 256, as in data/digits.
"""

import gzip
import math
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.digits.prepare import GREYS, write_pictures
from data.lib.corpus import DATA, check_name
from data.lib.download import check_sha256, download
from data.lib.errors import Mistake, command
from data.lib.flags import flag, parse

URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FILES = {  # of each split the pictures and the digits, with their sha256
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
    dir: str | None = flag(None, "a folder with copies of the four files, instead of the download")
    name: str = flag("mnist", "folder of data/ to write")


def read_idx(path, *shape):
    """The numbers of a gzipped IDX file, (N, *shape) uint8. Mistake if it has others, or is none."""
    kind, size = 0x800 + 1 + len(shape), math.prod(shape)  # bytes, in so many dimensions
    try:
        with gzip.open(path) as file:
            header = file.read(4 * (2 + len(shape))).ljust(4 * (2 + len(shape)), b"\0")
            magic, n, *sizes = np.frombuffer(header, ">u4").tolist()
            if (magic, tuple(sizes)) != (kind, shape) or n > 10**6:
                raise Mistake(f"{path}: not an IDX file of {' x '.join(map(str, shape)) or 'single'} bytes")
            content = file.read(n * size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Mistake(f"{path}: it is damaged ({error})") from None
    if len(content) != n * size:
        raise Mistake(f"{path}: it has {'more' if len(content) > n * size else 'fewer'} bytes than it says")
    return np.frombuffer(content, np.uint8).reshape(n, *shape)


def main(url=URL, files=FILES):
    config, splits = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0])), {}
    check_name(config.name, own="mnist")
    folder = DATA / "mnist" if config.dir is None else Path(config.dir)
    for split, sums in files.items():
        paths = [folder / name for name in sums]
        for path, sha256 in zip(paths, sums.values()):
            if config.dir is None and not path.exists():
                download(url + path.name, path, sha256, "--dir takes copies of the files")
            check_sha256(path, sha256)
        pictures, digits = read_idx(paths[0], 28, 28), read_idx(paths[1])
        if len(pictures) != len(digits) or digits.max(initial=0) > 9:
            raise Mistake(f"{paths[1]}: it does not have a digit for each picture of {paths[0].name}")
        splits[split] = ((GREYS - 1) * pictures.astype(np.uint16) + 127) // 255, digits
    write_pictures(config.name, splits, "MNIST")


if __name__ == "__main__":
    command(main)
