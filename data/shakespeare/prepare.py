"""Tiny Shakespeare, 1.1 MB of plays. The last 10% is for validation, as is usual in the field."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name
from data.lib.download import download
from data.lib.flags import flag, script
from data.text.prepare import prepare

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@script
def main(
    file: str | None = flag(None, "a copy that is already there, instead of the download"),
    name: str = flag("shakespeare", "folder of data/ to write"),
    tokenizer: str = flag("bytes", "bytes, gpt2, bpe:N to learn N tokens, or a checkpoint's path"),
):
    path = download(URL, DATA / "shakespeare" / "input.txt", SHA256, copy=file)
    prepare(path, name, tokenizer_by_name(tokenizer))
