"""Learns a vocabulary of byte pairs from text (1508.07909), for prepare.py's `--tokenizer bpe:N`.

Every word begins as its bytes. The pair of neighbouring tokens that occurs most often becomes a new token, everywhere,
and then the next pair, until there are N tokens. Frequent words end up as one token, rare ones as a few pieces.
"""

import re
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import pairwise
from unicodedata import category

# No token reaches across these, much as in GPT-2: words and numbers with the space before them, other marks, spaces.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"


def words_of(text):
    """Cut a text as tiktoken will. To tiktoken, but not to `re`, combining marks are letters and ² is none."""
    stand_ins = {c: "+" if category(c) == "No" else "a" for c in {*text} if category(c) in ("Mc", "Me", "Mn", "No")}
    same = text.translate(str.maketrans(stand_ins))
    return [text[word.start() : word.end()] for word in re.finditer(PATTERN, same)]


def merge(word, pair, new):
    """Replace each pair of neighbours in a word, a list of ids, by the id new."""
    merged = []
    for i in word:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def learn_byte_pairs(texts, n):
    """Learn n tokens, bytes each, in the order in which they merge. They are fewer if no pair occurs twice any more."""
    occurrences = Counter(word for text in texts for word in words_of(text))
    # First the bytes, in GPT-2's order: those that show as one character in Latin-1 come before the others.
    tokens = [bytes([i]) for i in sorted(range(256), key=lambda i: (i == 32 or not chr(i).isprintable(), i))]
    id_of = {token: i for i, token in enumerate(tokens)}
    words = [[id_of[bytes([byte])] for byte in word.encode("utf-8")] for word in occurrences]
    times, counts, places = [*occurrences.values()], Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[w]
            places[pair].add(w)
    heap = [(-count, pair) for pair, count in counts.items()]  # of equally frequent pairs, the lower ids come first
    heapify(heap)
    while heap and len(tokens) < n:
        count, pair = heappop(heap)
        if -count != counts[pair]:  # it has changed since
            heappush(heap, (-counts[pair], pair))
            continue
        if count > -2:
            break
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in id_of:  # the same bytes may have been merged from other parts
            id_of[token] = len(tokens)
            tokens.append(token)
        changed = set()
        for w in places[pair]:
            for old in pairwise(words[w]):
                counts[old] -= times[w]
            words[w] = merge(words[w], pair, id_of[token])
            for new in pairwise(words[w]):
                counts[new] += times[w]
                places[new].add(w)
                changed.add(new)
        for new in changed:
            heappush(heap, (-counts[new], new))
    return tokens
