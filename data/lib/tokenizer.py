"""Text to token ids and back.

A tokenizer is also a plain dict, its `state`, which meta.json and every checkpoint carry: two
tokenizers are the same when their states are. `special` names the ids that are not text:
`<mask>` in all of them, and what begins and ends a line in BERT's. Training never masks these, and
sampling never writes them.
"""

import codecs
import functools
import re
import unicodedata

import tiktoken

from data.lib.errors import Mistake

# What a special token becomes in decoded text; the others become nothing.
SHOWN = {"<mask>": "<mask>", "[MASK]": "<mask>", "[UNK]": "[UNK]", "<unk>": "<unk>"}
SHOWN |= {"</s>": "\n", "[SEP]": "\n", "<eos>": "\n", "<|endoftext|>": "\n"}
# A pixel as a character: its grey in a circle, 0 to 50.
GREYS = "".join(map(chr, [0x24EA, *range(0x2460, 0x2474), *range(0x3251, 0x3260), *range(0x32B1, 0x32C0)]))


class Tokenizer:
    """What all tokenizers share. special: the ids that are not text, by name.

    kinds: where the place of a token says what it is, (n, first id, id after the last) each: of that kind are
    the next n tokens of a canvas. With none, any token may stand anywhere.
    """

    kinds = ()
    pixels = None  # of a picture: its first token, how many tokens are a row, and the text of each grey

    def __init__(self, special, vocab_size):
        self.special, self.vocab_size = special, vocab_size
        self.special_ids = tuple(sorted(special.values()))
        self.shown = {i: SHOWN.get(name, "") for name, i in special.items()}
        self.mask_id = self.first("<mask>", "[MASK]")
        self.bos_id = self.first("<s>", "[CLS]", "<cls>")  # opens a line; None where lines are only text
        self.eos_id = self.first("</s>", "[SEP]", "<eos>")  # closes it

    @property
    def canvas_len(self):
        """Tokens of a canvas whose places have kinds; 0 without."""
        return sum(n for n, _, _ in self.kinds)

    def n_bytes(self, text):
        """How many bytes a text has, which "bits per byte" are of."""
        return len(text.encode())

    def decode(self, ids):
        return "".join(self.pieces(ids))

    def first(self, *names):
        return next((self.special[name] for name in names if name in self.special), None)

    def encode_line(self, line):
        """Ids of a line, which ends in a newline; the tokens that open and close a line stand for it,
        where there are such.
        """
        if self.bos_id is None or self.eos_id is None:
            return self.encode(line)
        return [self.bos_id, *self.encode(line.rstrip("\n")), self.eos_id]


class ByteLevelTokenizer(Tokenizer):
    """What the two whose tokens are bytes share. bytes_of: those of each id that is text."""

    def __init__(self, special, bytes_of):
        super().__init__(special, len(bytes_of) + len(special))
        self.bytes_of = bytes_of | {i: text.encode() for i, text in self.shown.items()}

    def pieces(self, ids):
        """What each token adds to the text, list[str]; a character of several tokens comes with the last,
        and bytes that are not UTF-8, which a sample can hold, become U+FFFD. A row of `<|endoftext|>` is one.
        """
        pieces, decoder = [], codecs.getincrementaldecoder("utf-8")(errors="replace")
        for before, i, following in zip([None, *ids], ids, [*ids[1:], self.mask_id]):
            # Nothing waits for the other half of a character across a token that is not text.
            piece = decoder.decode(self.bytes_of[i], final=following in self.shown or i in self.shown)
            again = i == before and self.special.get("<|endoftext|>") == i
            pieces.append("" if again else piece)
        return pieces


class ByteTokenizer(ByteLevelTokenizer):
    """The 256 bytes of UTF-8: any text in any language, and no unknown characters."""

    state = {"kind": "bytes"}

    def __init__(self):
        super().__init__({"<mask>": 256}, {i: bytes([i]) for i in range(256)})

    def encode(self, text):
        return list(text.encode("utf-8"))


class BPETokenizer(ByteLevelTokenizer):
    """Byte-level byte-pair encoding, the merging done by tiktoken.

    tokens: the byte string of each token, in the order in which they merge, as latin-1 text;
    pattern: the regular expression that cuts text into words first; ids: the id of each token (its
    place); special: the ids of all others (`<mask>`, after the rest).
    """

    def __init__(self, tokens, pattern, ids=None, special=None):
        special = special or {"<mask>": len(tokens)}
        self.state = {"kind": "bpe", "tokens": tokens, "pattern": pattern, "ids": ids, "special": special}
        pieces = [token.encode("latin-1") for token in tokens]
        self.ids = ids or range(len(tokens))
        super().__init__(special, dict(zip(self.ids, pieces)))
        ranks = {piece: i for i, piece in enumerate(pieces)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        try:
            return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]
        except BaseException as error:  # tiktoken panics, which is no Exception, at a pattern of no words
            if isinstance(error, (KeyboardInterrupt, MemoryError)):
                raise
            raise Mistake("the tokenizer's pattern does not cut this text into words") from None


class PictureTokenizer(ByteLevelTokenizer):
    """A canvas of two kinds: a caption, of letters in ASCII, filled up with spaces; and the pixels of a
    picture, row by row, a token for each grey that they may have.

    As text the caption is a line, and so is each row, a pixel being one of GREYS. Or a picture is plain PGM.
    """

    def __init__(self, caption, width, height, greys):
        """caption: how many letters; width and height: how many pixels. ValueError if these cannot be."""
        self.state = {"kind": "picture", "caption": caption, "width": width, "height": height, "greys": greys}
        self.caption, self.width, self.height = caption, width, height
        sizes = all(type(n) is int and 1 <= n <= 1000 for n in (caption, width, height, greys))
        if not (sizes and 2 <= greys <= len(GREYS)):
            raise ValueError("its picture is of no size")
        self.greys = GREYS[:greys]
        pixels = {257 + i: c.encode() for i, c in enumerate(self.greys)}
        super().__init__({"<mask>": 256}, {i: bytes([i]) for i in range(256)} | pixels)
        self.id_of = {chr(i): i for i in range(32, 127)} | {c: 257 + i for i, c in enumerate(self.greys)}
        self.kinds = (caption, 32, 127), (width * height, 257, 257 + greys)
        self.pixels = {"first": caption, "columns": width, "greys": self.greys}

    def encode(self, text):
        """Ids of letters and pixels; ends of lines say nothing. Mistake for anything else."""
        if re.match(r"P2\s", text) and not set(text) & set(self.greys):
            return self.canvas("", self.read_pgm(text))[self.caption :]
        text = re.sub(r"[\r\n]", "", text)
        if unknown := next((c for c in text if c not in self.id_of), None):
            greys = f"{self.greys[0]} to {self.greys[-1]}"
            raise Mistake(f"{unknown!r} is neither a letter of a caption, in ASCII, nor a pixel, {greys}")
        return [self.id_of[c] for c in text]

    def n_bytes(self, text):
        """A byte for each letter and pixel."""
        return len(self.encode(text))

    def read_pgm(self, text):
        """The pixels of a plain PGM, whose largest number is white: numbers from 0, white, to greys - 1."""
        words = re.sub("#.*", "", text).split()[1:]
        if not all(word.isascii() and word.isdecimal() and len(word) < 6 for word in words):
            raise Mistake("the picture is not plain PGM: after P2 there are numbers alone")
        width, height, most, *values = map(int, words) if len(words) > 3 else (0, 0, 0)
        whole = (width, height, len(values)) == (self.width, self.height, width * height)
        if not whole or not 0 < most >= max(values):
            size = f"{self.width} x {self.height}"
            raise Mistake(f"the picture is not plain PGM of {size} pixels, which the model was trained on")
        return [round((len(self.greys) - 1) * (1 - value / most)) for value in values]

    def decode(self, ids):
        """The text of a canvas."""
        pieces, ends = self.pieces(ids), range(self.caption, len(ids), self.width)
        return "\n".join("".join(pieces[i:j]) for i, j in zip((0, *ends), (*ends, len(ids))))

    def canvas(self, caption, pixels):
        """The ids of a canvas: a caption, and pixels, numbers from 0 to greys - 1, row by row."""
        return [*caption.encode().ljust(self.caption), *(257 + int(grey) for grey in pixels)]


class WordPieceTokenizer(Tokenizer):
    """BERT's tokens (1810.04805, sec. 3): words, or the longest pieces of them that are in the vocabulary.

    tokens: all, in the order of their ids. A piece that continues a word is written `##ing`. A
    vocabulary without such pieces is an alphabet, of proteins say: then pieces need no mark, and
    no space stands between them.
    """

    # Not `[S]`, which is sulphur.
    special_pattern = re.compile(
        r"</?s>|<(pad|unk|cls|sep|eos|bos|mask|null_\d)>|\[(PAD|UNK|CLS|SEP|EOS|BOS|MASK|[Uu]nused ?\d*)\]"
    )
    # Where BERT takes a word to end; its other control characters vanish.
    space = re.compile(r"[\t\n\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

    def __init__(self, tokens, lowercase, strip_accents, split_chinese):
        special = {token: i for i, token in enumerate(tokens) if self.special_pattern.fullmatch(token)}
        super().__init__(special, len(tokens))
        self.state = {"kind": "wordpiece", "tokens": tokens, "lowercase": lowercase}
        self.state |= {"strip_accents": strip_accents, "split_chinese": split_chinese}
        self.id_of = {token: i for i, token in enumerate(tokens) if i not in self.shown}
        self.unknown = self.first("[UNK]", "<unk>")
        self.mark = "##" if any(token.startswith("##") for token in self.id_of) else ""
        self.longest = max(map(len, self.id_of), default=0)
        self.encode_word = functools.lru_cache(2**16)(self.encode_word)  # words repeat

    def encode(self, text):
        return [i for word in self.space.split(text) for i in self.encode_word(word)]

    def pieces(self, ids):
        """What each token adds to the text, list[str]: a space ahead of a word that follows another."""
        pieces, before = [], "\n"
        for i in ids:
            word = self.shown[i] if i in self.shown else self.state["tokens"][i]
            if self.mark and word and before != "\n":
                word = word[len(self.mark) :] if word.startswith(self.mark) else " " * (word != "\n") + word
            pieces.append(word)
            before = word[-1:] or before
        return pieces

    def encode_word(self, word):
        """Ids of what stands between two spaces."""
        characters = (c for c in word if c not in "\0\ufffd" and unicodedata.category(c)[0] != "C")
        word = "".join(characters)
        if self.state["strip_accents"]:
            word = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
        if self.state["lowercase"]:
            word = word.lower()
        if not self.mark:
            return self.longest_matches(word)
        # Punctuation and Chinese characters are words of their own.
        pieces = "".join(f" {c} " if self.stands_alone(c) else c for c in word).split()
        return [i for piece in pieces for i in self.longest_matches(piece)]

    def stands_alone(self, c):
        ascii_symbol = c.isascii() and not c.isalnum()
        return ascii_symbol or unicodedata.category(c)[0] == "P" or (self.state["split_chinese"] and chinese(c))

    def longest_matches(self, word):
        """Greedy, from the left; a word in which that fails is unknown, and in an alphabet its character."""
        if self.mark and len(word) > 100:  # as BERT has it
            return [self.unknown]
        ids, start = [], 0
        while start < len(word):
            mark = self.mark if start else ""
            for end in range(min(len(word), start + self.longest), start, -1):
                if (i := self.id_of.get(mark + word[start:end])) is not None:
                    break
            else:
                if self.mark:
                    return [self.unknown]
                i, end = self.unknown, start + 1
            ids.append(i)
            start = end
        return ids


def chinese(c):
    """Whether c is in the blocks that BERT takes for Chinese: the ideographs, without kana or hangul."""
    blocks = (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)
    blocks += (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)
    return any(first <= ord(c) <= last for first, last in blocks)


def tokenizer_from_state(state):
    """The inverse of `.state`."""
    classes = {"bytes": ByteTokenizer, "bpe": BPETokenizer, "wordpiece": WordPieceTokenizer}
    classes |= {"picture": PictureTokenizer}
    tokens, special = state.get("tokens", []), state.get("special") or {}
    if not all(type(token) is str for token in tokens):
        raise ValueError("its tokens are not texts")
    if state["kind"] == "bpe" and (len({*tokens}) < len(tokens) or not {*map(chr, range(256))} <= {*tokens}):
        raise ValueError("its tokens are not every byte, and others that differ")
    tokenizer = classes[state["kind"]](**{name: value for name, value in state.items() if name != "kind"})
    ids = [*(state.get("ids") or range(len(tokens))), *special.values()]
    if state["kind"] == "bpe" and sorted(ids) != [*range(tokenizer.vocab_size)]:
        raise ValueError("its ids are not the numbers from 0 on")
    if tokenizer.mask_id is None:
        raise ValueError("it has no <mask>")
    return tokenizer
