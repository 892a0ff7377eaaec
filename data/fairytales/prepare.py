"""FairytaleQA (2203.13947): 278 tales from Project Gutenberg in simple words. Writes two of the published splits."""

import csv
import hashlib
import re
import sys
import zipfile
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, check_name, tokenizer_by_name, write_corpus
from data.lib.download import download
from data.lib.errors import Mistake
from data.lib.flags import flag, script

COMMIT = "a24ddc17364666b7c13a425b9970c87368b03417"
URL = f"https://codeload.github.com/uci-soe/FairytaleQAData/zip/{COMMIT}"
FOLDER = f"FairytaleQAData-{COMMIT}/data-by-train-split/section-stories"
# Of the tales' text, because GitHub doesn't promise that an archive keeps its bytes.
SHA256 = "a7cd781d5d0750c98b30bc5610bd6a9c0640598c206fac72d043a5b208eeb7fc"


def read_tale(path):
    """Read a tale's CSV file, which has a row for each section. The lines of a paragraph are joined."""
    with path.open(encoding="utf-8", newline="") as file:
        sections = [row["text"].strip() for row in csv.DictReader(file)]
    return re.sub(r"(?<!\n)\n(?!\n)", " ", "\n\n".join(sections)) + "\n\n\n"


@script
def main(
    dir: str | None = flag(None, "a copy of the folder section-stories, instead of the download"),
    val: Literal["val", "test"] = flag("val", "the published split to validate on"),
    name: str = flag("fairytales", "folder of data/ to write"),
    tokenizer: str = flag("bytes", "bytes, gpt2, bpe:N to learn N tokens, or a checkpoint's path"),
):
    check_name(name)
    tokenizer = tokenizer_by_name(tokenizer)
    copy = dir or download(URL, DATA / "fairytales" / "tales.zip", instead="--dir takes a copy of section-stories")
    try:
        folder = Path(dir) if dir else zipfile.Path(copy, f"{FOLDER}/")
        files = [(split, path.name, path) for split in ("train", "val", "test") for path in (folder / split).iterdir()]
        tales = [(split, read_tale(path)) for split, file, path in sorted(files) if file.endswith(".csv")]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise Mistake(f"{copy}: not a copy of section-stories ({error}); replace it") from None
    if (found := hashlib.sha256("".join(text for _, text in tales).encode()).hexdigest()) != SHA256:
        raise Mistake(f"{copy}: the tales' sha256 is {found}, but {SHA256} was expected; replace it")
    pieces = (("train" if split == "train" else "val", text) for split, text in tales if split in ("train", val))
    write_corpus(name, pieces, tokenizer, f"FairytaleQA {COMMIT}")
