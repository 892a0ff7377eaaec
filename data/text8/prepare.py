"""text8 and enwik8: 100 million characters or bytes of Wikipedia, cut where all papers cut them.

The first 90 million are for training and the next 5 for validation; papers report the last 5. With --test those are the
validation split instead.
"""

import sys
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, write_tokens
from data.lib.download import download
from data.lib.flags import argument, flag, script
from data.lib.tokenizer import ByteTokenizer

URL = "https://mattmahoney.net/dc/{}.zip"
SHA256 = {  # sha256 of each zip
    "text8": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
}


@script
def main(
    corpus: Literal["text8", "enwik8"] = argument("letters from a to z and spaces, or with the markup", "text8"),
    file: str | None = flag(None, "a copy of the zip, instead of the download"),
    test: bool = flag(False, "the test split validates; for train.py --eval_only"),
    name: str | None = flag(None, "folder of data/ to write (default: the corpus, and -test)"),
):
    path = download(URL.format(corpus), DATA / corpus / f"{corpus}.zip", SHA256[corpus], copy=file)
    hundredths = np.array_split(np.frombuffer(zipfile.ZipFile(path).read(corpus), np.uint8), 100)
    pieces = [("train", ids, len(ids)) for ids in hundredths[:90]]
    pieces += [("val", ids, len(ids)) for ids in (hundredths[95:] if test else hundredths[90:95])]
    write_tokens(name or (f"{corpus}-test" if test else corpus), pieces, ByteTokenizer(), path.name)
