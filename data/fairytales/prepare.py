"""FairytaleQA's 278 tales (2203.13947), 3.2 MB in simple words, from Project Gutenberg, in the published splits."""

import csv
import hashlib
import re
import sys
import zipfile
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name, write_corpus
from data.lib.download import download
from data.lib.errors import Mistake
from data.lib.flags import flag, script

COMMIT = "a24ddc17364666b7c13a425b9970c87368b03417"
URL = f"https://codeload.github.com/uci-soe/FairytaleQAData/zip/{COMMIT}"
FOLDER = f"FairytaleQAData-{COMMIT}/data-by-train-split/section-stories"
# Of all tales, because GitHub may pack the same files differently one day.
SHA256 = "a7cd781d5d0750c98b30bc5610bd6a9c0640598c206fac72d043a5b208eeb7fc"


def read_tale(path):
    """The text of a tale, whose file has a row for each section. Lines are joined to paragraphs."""
    with path.open(encoding="utf-8", newline="") as file:
        sections = [row["text"].strip() for row in csv.DictReader(file)]
    return re.sub(r"(?<!\n)\n(?!\n)", " ", "\n\n".join(sections)) + "\n\n\n"


@script
def main(
    dir: str | None = flag(None, "a copy of the folder section-stories, instead of the download"),
    val: Literal["val", "test"] = flag("val", "the published split to validate on"),
    name: str = flag("fairytales", "folder of data/ to write"),
    tokenizer: str = flag("bytes", "bytes, gpt2, or a checkpoint's path"),
):
    tokenizer = tokenizer_by_name(tokenizer)
    zip_file, instead = DATA / "fairytales" / "tales.zip", "--dir takes a copy of its section-stories"
    folder = Path(dir) if dir else zipfile.Path(download(URL, zip_file, instead=instead), f"{FOLDER}/")
    try:
        files = [(split, path.name, path) for split in ("train", "val", "test") for path in (folder / split).iterdir()]
        tales = [(split, read_tale(path)) for split, file, path in sorted(files) if file.endswith(".csv")]
    except (OSError, KeyError, ValueError) as error:
        raise Mistake(f"{folder}: not a copy of section-stories ({error})") from None
    if (found := hashlib.sha256("".join(text for _, text in tales).encode()).hexdigest()) != SHA256:
        raise Mistake(f"{folder}: the tales' sha256 is {found}, but {SHA256} was expected; get another copy")
    pieces = (("train" if split == "train" else "val", text) for split, text in tales if split in ("train", val))
    write_corpus(name, pieces, tokenizer, f"FairytaleQA {COMMIT}")
