"""WikiText, raw (1609.07843): good articles of Wikipedia, which its makers split by article."""

import sys
import zipfile
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name, write_corpus
from data.lib.download import download
from data.lib.flags import argument, flag, script

URL = "https://wikitext.smerity.com/{}-v1.zip"
CORPORA = {  # the folder in the zip, and the sha256 of the zip
    "wikitext2": ("wikitext-2-raw", "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "wikitext103": ("wikitext-103-raw", "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
}


@script
def main(
    corpus: Literal["wikitext2", "wikitext103"] = argument("11 MB, or 50 times the articles to train on", "wikitext2"),
    file: str | None = flag(None, "a copy of the zip, instead of the download"),
    name: str | None = flag(None, "folder of data/ to write (default: the corpus)"),
    tokenizer: str = flag("bytes", "bytes, gpt2, bpe:N to learn N tokens, or a checkpoint's path"),
):
    tokenizer, (folder, sha256) = tokenizer_by_name(tokenizer), CORPORA[corpus]
    path = download(URL.format(folder), DATA / corpus / f"{folder}-v1.zip", sha256, copy=file)
    pieces = (
        (split, line)
        for split, file in (("train", "wiki.train.raw"), ("val", "wiki.valid.raw"))
        for line in zipfile.Path(path, f"{folder}/{file}").open(encoding="utf-8", newline="\n")
        if line.strip()
    )
    write_corpus(name or corpus, pieces, tokenizer, path.name, by_line=True)
