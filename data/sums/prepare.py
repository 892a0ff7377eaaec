"""Questions with one right answer, made by a seed: sums with carries, and words to write backwards.

    What is 48769 + 956?     49725
    Reverse: qlwhtz          zthwlq

Each is there once: a sum not with its terms exchanged either, nor a word backwards. So no question that the
last tenth asks, which validates, is answered in the rest.
"""

import json
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.chat.prepare import prepare
from data.lib.corpus import DATA, check_name
from data.lib.errors import command
from data.lib.files import replacing
from data.lib.flags import flag, parse
from data.lib.tokenizer import ByteTokenizer

DIGITS, LETTERS = 5, (3, 10)  # of a term at most; of a word, from .. to


@dataclass
class PrepareConfig:
    name: str = flag("sums", "folder of data/ to write")
    examples: int = flag(200_000, "questions in all, half of them sums", least=20, most=400_000)
    seed: int = flag(0, "of the questions", least=0)


def questions(n, seed):
    """n questions, (question, answer) each, sums and words in turn."""
    rng, seen = random.Random(seed), set()
    while len(seen) < n:
        if len(seen) % 2 == 0:
            a, b = (rng.randrange(10 ** rng.randint(1, DIGITS)) for _ in "ab")
            same, question, answer = (min(a, b), max(a, b)), f"What is {a} + {b}?", str(a + b)
        else:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(*LETTERS)))
            same, question, answer = min(word, word[::-1]), f"Reverse: {word}", word[::-1]
        if same not in seen:
            seen.add(same)
            yield question, answer


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    check_name(config.name, own="sums")
    path = DATA / config.name / "questions.jsonl"
    with replacing(path) as file:
        for question, answer in questions(config.examples, config.seed):
            turns = zip(("user", "assistant"), (question, answer))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}).encode() + b"\n")
    prepare(path, None, config.name, ByteTokenizer())


if __name__ == "__main__":
    command(main)
