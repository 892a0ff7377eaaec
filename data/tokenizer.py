"""Text to token ids and back. Every tokenizer has one id more than its text needs: `<mask>`.

A tokenizer is also a plain dict, its `state`, which meta.json and every checkpoint carry: two
tokenizers are the same when their states are.
"""

import tiktoken

from data.flags import Mistake


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text in any language, and no unknown characters."""

    vocab_size = 257
    mask_id = 256
    state = {"kind": "bytes"}

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        """Bytes that are not UTF-8, which a sample can hold, become U+FFFD."""
        pieces = (b"<mask>" if i == self.mask_id else bytes([i]) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding, the merging done by tiktoken.

    tokens: the byte string of each id, in the order in which they merge, as latin-1 text;
    pattern: the regular expression that cuts text into words first. `<mask>` is the id after them.
    """

    def __init__(self, tokens, pattern):
        self.state = {"kind": "bpe", "tokens": tokens, "pattern": pattern}
        self.mask_id = len(tokens)
        self.vocab_size = len(tokens) + 1
        self.encoding = tiktoken.Encoding(
            "bpe",
            pat_str=pattern,
            mergeable_ranks={token.encode("latin-1"): i for i, token in enumerate(tokens)},
            special_tokens={"<mask>": self.mask_id},
        )

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(ids)


def tokenizer_from_state(state):
    """The inverse of `.state`."""
    if state["kind"] == "bytes":
        return ByteTokenizer()
    return BPETokenizer(state["tokens"], state["pattern"])


def tokenizer_by_name(name):
    """`bytes`, or `gpt2`, whose merges tiktoken downloads once and keeps."""
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise Mistake(f"--tokenizer {name}: there are bytes and gpt2")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # what requests raises is an OSError
        raise Mistake(f"--tokenizer gpt2: tiktoken cannot download its merges ({error})") from None
    merges = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return BPETokenizer([token.decode("latin-1") for token in merges], encoding._pat_str)
