"""Does the shipped model write words, and does it copy? Counts words that the training text has, and copied characters.

python tests/experiments/counts.py --texts 8     # 4 minutes on two cores; it prints, and draws no figure
"""

import re

import numpy as np
from common import context_of, main, windows, write

from data.lib.corpus import load_corpus
from data.lib.session import SHIPPED
from model import load_checkpoint

WORD = re.compile(r"[^\W\d_]+")
RUN = 30  # characters in a row that count as copied if they stand in the training text


def copied(text, runs):
    """The fraction of a text's characters that are in one of `runs`, strings of RUN characters."""
    is_copied = np.zeros(len(text), dtype=bool)
    for i in range(len(text) - RUN + 1):
        is_copied[i : i + RUN] |= text[i : i + RUN] in runs
    return is_copied.mean()


def counts(config, device):
    model, tokenizer, _ = load_checkpoint(SHIPPED, device)
    learned = tokenizer.decode(load_corpus("shakespeare")[0].tolist())
    known, runs = set(WORD.findall(learned)), {learned[i : i + RUN] for i in range(len(learned) - RUN + 1)}
    T = context_of(config) if config.quick else model.config.context
    ways = (T // 2, "random", 0.7), (T, "random", 0.5), (T // 16, "random", 0.7), (T, "confidence", 0.9)
    texts_of = {"of the validation split": windows("shakespeare", T, T * config.texts)}
    for steps, order, temperature in (*ways, (None, "threshold", 1.0)):
        name = f"`--order {order}{f' --steps {steps}' if steps else ''} --temperature {temperature}`"
        texts_of[name], _ = write(model, config.texts, T, steps, order, temperature=temperature)
    print("| text | words that the training text has | characters copied |")
    for name, tokens in texts_of.items():
        texts = [tokenizer.decode(row) for row in tokens.tolist()]
        # The first and the last word of a text may be cut.
        words = [word in known for text in texts for word in WORD.findall(text)[1:-1]]
        fraction = np.mean([copied(text, runs) for text in texts])
        print(f"| {name} | {np.mean(words):.1%} of {len(words):,} | {fraction:.1%} |")


if __name__ == "__main__":
    main(counts, texts=32)
