"""Questions with one right answer, drawn from a seed: sums with carries, and words to write backwards.

No question comes twice, even with terms swapped or a word reversed, so none in the last tenth, the validation split,
was trained on.
"""

import json
import random
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.chat.prepare import prepare
from data.lib.corpus import DATA, check_name
from data.lib.files import replacing
from data.lib.flags import flag, script
from data.lib.tokenizer import ByteTokenizer


def questions(n, seed):
    """Yield n pairs (question, answer), sums and words in turn."""
    rng, seen = random.Random(seed), set()
    while len(seen) < n:
        if len(seen) % 2 == 0:
            a, b = (rng.randrange(10 ** rng.randint(1, 5)) for _ in "ab")
            key, question, answer = (min(a, b), max(a, b)), f"What is {a} + {b}?", str(a + b)
        else:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 10)))
            key, question, answer = min(word, word[::-1]), f"Reverse: {word}", word[::-1]
        if key not in seen:
            seen.add(key)
            yield question, answer


@script
def main(
    name: str = flag("sums", "folder of data/ to write"),
    examples: int = flag(200_000, "questions in all, half of them sums", least=20, most=400_000),
    seed: int = flag(0, "of the questions", least=0),
):
    check_name(name)
    path = DATA / name / "questions.jsonl"
    with replacing(path) as file:
        for question, answer in questions(examples, seed):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}).encode() + b"\n")
    prepare(path, None, name, ByteTokenizer())
