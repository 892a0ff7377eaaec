"""Makes text of known entropy, from a hidden Markov model, and says how likely the model makes any text.

A hidden state moves to one of a few others and emits one of a few letters, with probabilities that a seed fixes. Most
successions of letters are impossible, so a text with an error can be recognised.

    python tests/experiments/hmm.py                  # write the corpus data/hmm and print its true entropy; a minute
    python tests/experiments/hmm.py --score FILE     # how likely each line of a file is
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.lib.corpus import split_at, write_corpus
from data.lib.errors import Mistake, command
from data.lib.flags import flag, parse
from data.lib.tokenizer import ByteTokenizer

STATES, LETTERS, SEED = 12, 16, 0  # letters are a, b, ..
MOVES, EMITS = 2, 2  # states that can follow each state, and letters that it can emit
WINDOW = 64  # letters of the texts whose entropy is printed


@dataclass
class HmmConfig:
    tokens: int = flag(4_000_000, "letters to write; the last sixteenth validates", least=10_000)
    score: str | None = flag(None, "print the nats per letter of a file's lines, and how many are impossible")


def source():
    """The hidden Markov model: start (S,), its stationary distribution; move (S, S); emit (S, L)."""
    generator = np.random.default_rng(SEED)
    move, emit = np.zeros((STATES, STATES)), np.zeros((STATES, LETTERS))
    for state in range(STATES):
        # The next state in a ring is always among them, so every state is reached.
        others = generator.permutation([s for s in range(STATES) if s != (state + 1) % STATES])[: MOVES - 1]
        move[state, [(state + 1) % STATES, *others]] = generator.dirichlet(np.ones(MOVES))
        emit[state, generator.permutation(LETTERS)[:EMITS]] = generator.dirichlet(np.ones(EMITS))
    return np.linalg.matrix_power(move, 10_000)[0], move, emit


def draw(n, model, seed):
    """Draw n successive letters from a model, as integers."""
    start, move, emit = model
    generator = np.random.default_rng(seed)
    u, v = generator.random((2, n))
    moves, emits = move.cumsum(1), emit.cumsum(1)
    letters, state = np.empty(n, dtype=np.int64), int(np.searchsorted(start.cumsum(), generator.random()))
    for i in range(n):
        letters[i] = np.searchsorted(emits[state], v[i] * emits[state, -1], side="right")
        state = np.searchsorted(moves[state], u[i] * moves[state, -1], side="right")
    return letters


def letter_nats(letters, model, floor=0.0):
    """-log p(x_i | x_1 .. x_{i-1}) of letters (N, T) by the forward algorithm, in nats: (N, T).

    It is infinite from the first impossible letter on. A floor gives every letter at least that fraction of the
    probability at each step, split evenly, and starts over after an impossible letter.
    """
    start, move, emit = model
    state = np.tile(start, (len(letters), 1))  # (N, S): p(state before letter i | letters before)
    restart = start if floor else np.nan
    nats = np.empty(letters.shape)
    for i, x in enumerate(letters.T):
        joint = state * emit[:, x].T  # (N, S)
        p = joint.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            nats[:, i] = -np.log(floor / LETTERS + (1 - floor) * p[:, 0])
            state = np.where(p > 0, joint / p, restart) @ move
    return np.where(np.isnan(nats), np.inf, nats)


def text_nats(texts, floor=0.0):
    """letter_nats of bytes (N, T). A byte that is no letter of the source is impossible."""
    letters = np.asarray(texts).astype(np.int64) - ord("a")
    letters = np.where((letters >= 0) & (letters < LETTERS), letters, -1)
    start, move, emit = source()
    return letter_nats(letters, (start, move, np.c_[emit, np.zeros(STATES)]), floor)  # -1 is the last column


def print_score(path):
    lines = [line.rstrip(b"\r") for line in Path(path).read_bytes().split(b"\n")]
    nats = [text_nats([list(line)])[0] for line in lines if line]
    if not nats:
        raise Mistake(f"--score {path}: the file has no line")
    possible = [line for line in nats if np.isfinite(line).all()]
    mean = np.concatenate(possible).mean() if possible else np.inf
    impossible = f"{1 - len(possible) / len(nats):.1%} of {len(nats)} are impossible"
    print(f"{mean:.4f} nats per letter of {len(possible)} lines; {impossible}")


def main():
    config = HmmConfig(**parse(HmmConfig, __doc__))
    if config.score is not None:
        return print_score(config.score)
    letters = draw(config.tokens, source(), SEED + 1)
    text = bytes(letters.astype(np.uint8) + ord("a")).decode()
    chunks = (text[i : i + 2**20] for i in range(0, len(text), 2**20))
    cut = len(text) - len(text) // 16
    write_corpus("hmm", split_at(chunks, cut), ByteTokenizer(), f"hidden Markov model, seed {SEED}")
    n_windows = (len(text) - cut) // WINDOW
    nats = letter_nats(letters[cut:][: n_windows * WINDOW].reshape(-1, WINDOW), source())
    error = nats.mean(1).std() / n_windows**0.5
    entropy = f"true entropy of windows of {WINDOW}: {nats.mean():.4f} nats per token"
    print(f"{entropy} (standard error over windows {error:.4f}); of their last token, {nats[:, -1].mean():.4f}")


if __name__ == "__main__":
    command(main)
