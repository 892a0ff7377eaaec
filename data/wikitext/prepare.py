"""WikiText, raw (1609.07843): good articles of Wikipedia, which its makers split by article.

    python data/wikitext/prepare.py                 # data/wikitext2, 11 MB
    python data/wikitext/prepare.py wikitext103     # 50 times the articles to train on, and the same to validate

Blank lines are dropped. If the tokenizer has `<s>` and `</s>`, as RoBERTa's does, they enclose each line. Otherwise a
newline ends it.
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name, write_corpus
from data.lib.download import check_sha256, download
from data.lib.errors import Mistake, command
from data.lib.flags import argument, flag, parse

URL = "https://wikitext.smerity.com/{}-v1.zip"
CORPORA = {  # the folder in the zip, and the sha256 of the zip
    "wikitext2": ("wikitext-2-raw", "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "wikitext103": ("wikitext-103-raw", "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
}
FILES = {"train": "wiki.train.raw", "val": "wiki.valid.raw"}


@dataclass
class PrepareConfig:
    corpus: Literal["wikitext2", "wikitext103"] = argument("which of the two", "wikitext2")
    file: str | None = flag(None, "a copy of the zip, or a folder with the raw files, instead of the download")
    name: str | None = flag(None, "folder of data/ to write (default: the corpus)")
    tokenizer: str = flag("bytes", "bytes, gpt2, or a checkpoint's path")


def lines(folder):
    """Yield (split, line) for each line that isn't blank. folder: a Path, or a zipfile.Path."""
    for split, name in FILES.items():
        try:
            with (folder / name).open("r", encoding="utf-8", newline="\n") as file:
                yield from ((split, line) for line in file if line.strip())
        except UnicodeDecodeError as error:
            raise Mistake(f"{folder}/{name}: not UTF-8 text ({error.reason})") from None


def main(corpora=CORPORA, url=URL):
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    tokenizer, (folder, sha256) = tokenizer_by_name(config.tokenizer), corpora[config.corpus]
    path = Path(config.file or DATA / config.corpus / f"{folder}-v1.zip")
    if config.file is None:
        download(url.format(folder), path, sha256)
    if path.is_file():
        check_sha256(path, sha256)
    texts = zipfile.Path(path) / folder if path.is_file() else path
    write_corpus(config.name or config.corpus, lines(texts), tokenizer, path.name, encode=tokenizer.encode_line)


if __name__ == "__main__":
    command(main)
