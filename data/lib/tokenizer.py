"""Turns text into token ids and back.

A tokenizer's `state` is a plain dict, which meta.json and every checkpoint carry. Tokenizers are the same if their
states are. Training never masks the tokens in `special`, such as `<mask>`, and sampling never writes them.
"""

import codecs
import re
from functools import lru_cache
from unicodedata import category, normalize

import tiktoken

from data.lib.errors import Mistake

# How special tokens look in decoded text. All others are left out.
SHOWN = {"<mask>": "<mask>", "[MASK]": "<mask>", "[UNK]": "[UNK]", "<unk>": "<unk>"}
SHOWN |= {"</s>": "\n", "[SEP]": "\n", "<|endoftext|>": "\n"}
# A pixel is shown as its grey in a circle, from 0 to 50.
GREYS = "".join(map(chr, [0x24EA, *range(0x2460, 0x2474), *range(0x3251, 0x3260), *range(0x32B1, 0x32C0)]))
# What BERT calls Chinese: ideographs, but no kana or hangul.
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"


class Tokenizer:
    """What all tokenizers share. special: the ids that are not text, by name. bytes_of: the bytes of each other id."""

    kinds = ()  # for a canvas whose places accept different tokens: (n, first, end) for each stretch of n places
    pixels = None  # for a picture: its first place, its columns, and how its greys are shown
    names = ()  # for a picture with a caption: the captions that there are
    template = None  # for a checkpoint that chats
    begins_with_space = False  # whether the token of a word includes the space before it
    prefix = ""  # what encode puts before a text, and decode leaves out

    def __init__(self, special, bytes_of):
        self.special, self.special_ids = special, tuple(sorted(special.values()))
        self.shown = {i: SHOWN.get(name, "") for name, i in special.items()}
        self.bytes_of = bytes_of | {i: text.encode() for i, text in self.shown.items()}
        self.vocab_size = len(self.bytes_of)
        self.mask_id = self.first("<mask>", "[MASK]")
        self.bos_id = self.first("<s>", "[CLS]")  # opens a line, if the tokenizer has one
        self.eos_id = self.first("</s>", "[SEP]")  # closes it
        self.canvas_len = sum(n for n, _, _ in self.kinds)  # 0 without kinds

    def first(self, *names):
        """The id of the first of these special tokens that the tokenizer has, or None."""
        return next((self.special[name] for name in names if name in self.special), None)

    def encode_rest(self, text):
        """Encode a text that goes on after something else, such as a hole."""
        return self.encode(text)

    def encode_line(self, line):
        """Encode a line. If there are tokens that open and close a line, they replace its newline."""
        if self.bos_id is None or self.eos_id is None:
            return self.encode_rest(line)
        return [self.bos_id, *self.encode(line.rstrip("\n")), self.eos_id]

    def decode(self, ids):
        return "".join(self.pieces(ids))

    def pieces(self, ids):
        """What each token adds to the text, list[str]. The last of several tokens adds the character that they make."""
        pieces, decoder = [], codecs.getincrementaldecoder("utf-8")(errors="replace")
        for before, i, following in zip([None, *ids], ids, [*ids[1:], self.mask_id]):
            # A special token ends an unfinished character. Bytes that are not UTF-8 become U+FFFD.
            piece = decoder.decode(self.bytes_of[i], final=following in self.shown or i in self.shown)
            if before is None or (before in self.shown and before != self.mask_id):
                piece = piece.removeprefix(self.prefix)
            repeated = i == before and self.special.get("<|endoftext|>") == i
            pieces.append("" if repeated else piece)
        return pieces


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, which write any text in any language."""

    state = {"kind": "bytes"}

    def __init__(self):
        super().__init__({"<mask>": 256}, {i: bytes([i]) for i in range(256)})

    def encode(self, text):
        return list(text.encode("utf-8"))


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding by tiktoken.

    tokens: byte strings as latin-1, in the order in which they merge. ids: their ids. A token with the id -1 only helps
    to merge: `encode` writes the ids of its bytes, and drops a byte that has none. form: how a text is prepared. NFC is
    a Unicode normal form; `sentencepiece` puts a space in front of a text and reads ▁ as a space.
    """

    begins_with_space = True

    def __init__(self, tokens, pattern, ids=None, special=None, form=None):
        special = special or {"<mask>": len(tokens)}
        self.state = {"kind": "bpe", "tokens": tokens, "pattern": pattern, "ids": ids, "special": special, "form": form}
        self.ids, self.form, self.prefix = ids or range(len(tokens)), form, " " * (form == "sentencepiece")
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
        super().__init__(special, {i: token for i, token in zip(self.ids, ranks) if i != -1})
        there = [i for i in self.ids if i != -1]
        each_once = sorted([*there, *special.values()]) == [*range(self.vocab_size)] and len(ranks) == len(self.ids)
        bytes_there = {bytes([i]) for i in range(256)} <= ranks.keys()
        if form not in (None, "NFC", "sentencepiece") or not each_once or not bytes_there:
            raise ValueError("its tokens or their ids repeat, or some of them are missing")
        id_of = dict(zip(tokens, self.ids))
        helpers = ((rank, token) for rank, token in enumerate(tokens) if id_of[token] == -1)  # they only help to merge
        self.spelled = {rank: [id_of[byte] for byte in token if id_of[byte] != -1] for rank, token in helpers}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        return self.encode_rest(self.prefix + text) if text else []

    def encode_rest(self, text):
        try:
            text = normalize("NFC", text) if self.form == "NFC" else text
            text = text.replace("▁", " ") if self.form == "sentencepiece" else text
            ranks = self.encoding.encode_ordinary(text)
            return [i for rank in ranks for i in self.spelled.get(rank, (self.ids[rank],))]
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException:  # tiktoken panics at a bad pattern, and a panic isn't an Exception
            raise Mistake("the tokenizer's pattern does not cut this text into words") from None


class PictureTokenizer(Tokenizer):
    """A canvas of two kinds of tokens: a caption of ASCII letters, padded with spaces, and the pixels of a picture.

    caption: its number of letters. A pixel's value is a grey from 0 (white) to greys - 1; in text it is one of the
    characters in GREYS. names: the captions that there are; none means any.
    """

    def __init__(self, caption, width, height, greys, names=()):
        sizes = {"caption": caption, "width": width, "height": height, "greys": greys}
        if not all(type(n) is int and 1 <= n <= 1000 for n in sizes.values()) or not 2 <= greys <= len(GREYS):
            raise ValueError("its picture has no size that we can show")
        if not all(type(name) is str and len(name) <= caption for name in names):
            raise ValueError("its names are not captions")
        self.state = {"kind": "picture", **sizes, "names": list(names)}
        self.caption, self.width, self.names = caption, width, names
        self.size = [width, height, width * height]
        self.kinds = (caption, 32, 127), (width * height, 257, 257 + greys)
        self.pixels = {"first": caption, "columns": width, "greys": GREYS[:greys]}
        self.id_of = {chr(i): i for i in range(32, 127)} | {c: 257 + i for i, c in enumerate(GREYS[:greys])}
        texts = {i: c.encode() for c, i in self.id_of.items()}
        super().__init__({"<mask>": 256}, {i: bytes([i]) for i in range(256)} | texts)

    def encode(self, text):
        """Encode letters and pixels, ignoring the ends of lines, or a plain PGM, whose largest number is white."""
        greys = self.pixels["greys"]
        try:
            if re.match(r"P2\s", text) and not set(text) & set(greys):
                width, height, most, *values = map(int, re.sub("#.*", "", text).split()[1:])
                if [width, height, len(values)] != self.size or not 0 <= min(values) <= max(values) <= most:
                    raise ValueError
                return [257 + round((len(greys) - 1) * (1 - value / most)) for value in values]
            return [self.id_of[c] for c in text if c not in "\r\n"]
        except KeyError as error:
            either = f"a letter of a caption, in ASCII, nor a pixel, {greys[0]} to {greys[-1]}"
            raise Mistake(f"{error} is neither {either}") from None
        except (ValueError, ZeroDivisionError):
            raise Mistake(f"not plain PGM of {self.size[0]} x {self.size[1]} pixels, which the model needs") from None

    def decode(self, ids):
        pieces, ends = self.pieces(ids), range(self.caption, len(ids), self.width)  # the caption and each row are lines
        return "\n".join("".join(pieces[i:j]) for i, j in zip((0, *ends), (*ends, len(ids))))

    def canvas(self, caption, pixels):
        """The ids of a canvas. pixels: numbers from 0 to greys - 1, row by row."""
        return [*caption.encode().ljust(self.caption), *(257 + int(grey) for grey in pixels)]


class WordPieceTokenizer(Tokenizer):
    """BERT's tokens (1810.04805, sec. 3), listed by id: words, and pieces such as `##ing` that continue one."""

    special_pattern = re.compile(r"</?s>|<(pad|unk|mask)>|\[(PAD|UNK|CLS|SEP|MASK|[Uu]nused ?\d*)\]")

    def __init__(self, tokens, lowercase, strip_accents, split_chinese):
        special = {token: i for i, token in enumerate(tokens) if self.special_pattern.fullmatch(token)}
        super().__init__(special, {i: token.encode() for i, token in enumerate(tokens)})
        self.state = {"kind": "wordpiece", "tokens": tokens, "lowercase": lowercase}
        self.state |= {"strip_accents": strip_accents, "split_chinese": split_chinese}
        self.id_of = {token: i for i, token in enumerate(tokens) if i not in self.shown}
        self.unknown = self.first("[UNK]", "<unk>")
        self.symbol = re.compile(rf"[!-/:-@\[-`{{-~{CHINESE if split_chinese else ''}]")
        self.spaced, self.pieces_of = lru_cache(self.spaced), lru_cache(2**16)(self.pieces_of)  # both see repeats

    def encode(self, text):
        text = normalize("NFD", text) if self.state["strip_accents"] else text
        text = text.lower() if self.state["lowercase"] else text
        return [i for word in "".join(map(self.spaced, text)).split() for i in self.pieces_of(word)]

    def spaced(self, c):
        """How a character enters words: between spaces if it is a word of its own, and as "" if it is dropped."""
        kind = category(c)
        if c in "\t\n\r":
            return " "
        if c == "\ufffd" or kind[0] == "C" or (kind == "Mn" and self.state["strip_accents"]):
            return ""
        return f" {c} " if kind[0] == "P" or self.symbol.match(c) else c

    def pieces_of(self, word):
        """Cut the longest token off the left, again and again. If none fits, the whole word is unknown."""
        ids, mark = [], ""
        if len(word) > 100:  # as in BERT
            return [self.unknown]
        while word:
            end = next((n for n in range(len(word), 0, -1) if mark + word[:n] in self.id_of), None)
            if end is None:
                return [self.unknown]
            ids.append(self.id_of[mark + word[:end]])
            word, mark = word[end:], "##"
        return ids

    def pieces(self, ids):
        """What each token adds to the text, list[str]. A word that follows another begins with a space."""
        pieces, before = [], "\n"
        for i in ids:
            word = self.bytes_of[i].decode()
            if word and before != "\n":
                word = word[2:] if word.startswith("##") else " " * (word != "\n") + word
            pieces.append(word)
            before = word[-1:] or before
        return pieces


def tokenizer_from_state(state):
    """Make the tokenizer that has this state. Raises some error if the dict is not such a state."""
    kinds = {"bytes": ByteTokenizer, "bpe": BPETokenizer, "wordpiece": WordPieceTokenizer, "picture": PictureTokenizer}
    tokenizer = kinds[state["kind"]](**{name: value for name, value in state.items() if name != "kind"})
    if tokenizer.mask_id is None:
        raise ValueError("it has no <mask>")
    return tokenizer
