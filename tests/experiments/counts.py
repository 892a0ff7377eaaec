"""Does an included model write words, does it copy, and how likely does a language model find its text?

python data/fairytales/prepare.py --tokenizer bpe:8192
python data/weights/prepare.py smollm2-135m-instruct     # the judge
python tests/experiments/counts.py --texts 10            # the page's table, and .github/tales.svg
python tests/experiments/counts.py --ckpt data/fairytales/draft.pt
python tests/experiments/counts.py --way "random --steps 128 --temperature 0.7" --texts 100

A word exists if it occurs in the training text or in the file --words. A text's first and last word, which may be cut,
don't count. A copy is a run of words that the training text has, too; its length is printed.
"""

import itertools
import re
from collections import Counter
from math import log2
from pathlib import Path

from common import context_of, main, plot, train_model, windows, write
from pretrained import judge_texts

from data.lib.corpus import load_corpus
from model import load_checkpoint

WORD = re.compile(r"[^\W\d_]+")


def ways(model, T):
    """The flags of `denoise` that are compared, each with its name: every order with two or three temperatures."""
    if model.config.is_gpt:
        return {f"`--temperature {t}`": {"temperature": t} for t in (0.7, 0.85, 1.0)}
    flags = [{"order": "random", "steps": steps} for steps in (T // 8, T // 4, T // 2, T)]
    flags += [{"order": order, "steps": T} for order in ("confidence", "entropy", "margin")]
    flags += [{"order": "entropy", "steps": T, "block": T // 8}, {"order": "left", "steps": T}]
    flags += [{"order": "threshold", "tau": 0.6}, {"order": "entropy-bound", "gamma": 0.5}]
    named = {}
    for each, t in itertools.product(flags, (0.5, 0.7, 0.9)):
        each = each | {"temperature": t}
        named[f"`{' '.join(f'--{name} {value}' for name, value in each.items())}`"] = each
    return named


def pairs_entropy(texts):
    """Entropy of the pairs of successive words in texts, lists of words, in bits."""
    counts = Counter(itertools.chain.from_iterable(itertools.pairwise(words) for words in texts))
    return -sum(n / counts.total() * log2(n / counts.total()) for n in counts.values())


def longest_copy(words, learned):
    """The length of the longest run of words that stands in `learned`, a string of words between spaces."""
    first, longest = 0, 0
    for end in range(1, len(words) + 1):
        while first < end and f" {' '.join(words[first:end])} " not in learned:
            first += 1
        longest = max(longest, end - first)
    return longest


def draw(points):
    """Draw (name, nats, bits) of several ways, one line for each order, from the lowest temperature to the highest."""
    panel, save = plot("tales")
    lines = {}
    for name, nats, bits in points:
        lines.setdefault(re.sub(r" --temperature .*|`|--order ", "", name), []).append((bits, nats))
    for i, (name, line) in enumerate(lines.items()):  # there are ten colours
        style = {"color": f"C{i}", "linestyle": "-" if i <= 10 else "--"} if len(line) > 1 else {"color": "black"}
        panel.plot(*zip(*line), marker="o", label=name, **style)
    panel.set(xlabel="entropy of pairs of words, bits", ylabel="SmolLM2's nats per byte")
    panel.figure.set_size_inches(7.5, 4.5)
    panel.figure.legend(loc="outside right")
    save()


def counts(config, device):
    ckpt, judge = config.ckpt, config.judge
    if config.quick:
        ckpt, judge = (train_model(config, name, flag) for name, flag in
                       (("out-canvas", ""), ("out-judge", "--attention causal")))  # fmt: skip
    model, tokenizer, checkpoint = load_checkpoint(ckpt, device)
    judge, corpus = load_checkpoint(judge, device)[:2], checkpoint["train"]["data"]
    T = context_of(config) if config.quick else model.config.context
    learned = WORD.findall(tokenizer.decode(load_corpus(corpus)[0].tolist()).lower())
    listed = Path(config.words).read_text().lower().split() if Path(config.words).exists() else []
    known, learned = {*learned, *listed}, f" {' '.join(learned)} "
    print("| text | passes | words that exist | longest copy, words | judge, nats per byte | word pairs, bits |")
    print("| --- | --- | --- | --- | --- | --- |")
    points = []
    for name, flags in {"of the validation split": {}, **ways(model, T)}.items():
        if flags and config.way != "all" and config.way not in name:
            continue
        tokens, passes = write(model, config.texts, T, **flags) if flags else (windows(corpus, T, T * config.texts), "")
        texts = [tokenizer.decode(row) for row in tokens.tolist()]
        words = [WORD.findall(text.lower())[1:-1] for text in texts]
        there = [word in known for text in words for word in text]
        row = f"{sum(there) / max(1, len(there)):.1%} of {len(there):,} | "
        points.append((name, judge_texts(texts, judge)[0], pairs_entropy(words)))
        row += f"{max(longest_copy(text, learned) for text in words)} | {points[-1][1]:.3f}"
        print(f"| {name} | {passes} | {row} | {points[-1][2]:.2f} |", flush=True)
    if config.way == "all" and not model.config.is_gpt:
        draw(points)


if __name__ == "__main__":
    names = {"ckpt": "data/fairytales/canvas.pt", "judge": "data/weights/smollm2-135m-instruct.pt"}
    main(counts, texts=20, way="all", words="/usr/share/dict/words", **names)
