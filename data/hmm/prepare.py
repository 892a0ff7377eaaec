"""Text from a hidden Markov model, whose entropy is known: how close can a trained model come?

A hidden state moves to one of a few others and emits one of a few letters, by probabilities that a
seed fixes. Most successions of letters are impossible, so that a text with an error shows it.

    python data/hmm/prepare.py                  # writes the corpus and prints its true entropy
    python data/hmm/prepare.py --score FILE     # how likely the source makes each line of a file
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

STATES, LETTERS, SEED = 12, 16, 0  # of the source; letters are a, b, ..
MOVES, EMITS = 2, 2  # states that follow each, and letters that it can emit


@dataclass
class PrepareConfig:
    name: str = flag("hmm", "folder of data/ to write")
    tokens: int = flag(4_000_000, "letters in all; a sixteenth of them validates", least=10_000)
    window: int = flag(64, "tokens of the windows whose entropy is printed", least=1)
    score: str | None = flag(None, "print nats per letter of a file's lines, and the share that is impossible")


def source():
    """The model: (start (S,), move (S, S), emit (S, L)), probabilities; it starts as it goes on for ever."""
    generator = np.random.default_rng(SEED)
    move, emit = np.zeros((STATES, STATES)), np.zeros((STATES, LETTERS))
    for state in range(STATES):
        # The next state in a ring is always among them, so that every state is reached.
        others = generator.permutation([s for s in range(STATES) if s != (state + 1) % STATES])[: MOVES - 1]
        move[state, [(state + 1) % STATES, *others]] = generator.dirichlet(np.ones(MOVES))
        emit[state, generator.permutation(LETTERS)[:EMITS]] = generator.dirichlet(np.ones(EMITS))
    start = np.linalg.matrix_power(move, 10_000)[0]
    return start, move, emit


def draw(n, model, seed):
    """n successive letters of the source, int."""
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
    """-log p(x_i | x_1 .. x_{i-1}) of letters (N, T), by the forward algorithm: (N, T), in nats.

    Infinite where the text has become impossible; with a floor, every letter has at least that share
    of the probability at every step, and the state is forgotten where it was impossible.
    """
    start, move, emit = model
    state = np.tile(start, (len(letters), 1))  # (N, S): p(state before letter i | letters before)
    forgotten = start if floor else np.nan
    nats = np.empty(letters.shape)
    for i, x in enumerate(letters.T):
        joint = state * emit[:, x].T  # (N, S)
        p = joint.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            nats[:, i] = -np.log(floor / LETTERS + (1 - floor) * p[:, 0])
            state = np.where(p > 0, joint / p, forgotten) @ move
    return np.where(np.isnan(nats), np.inf, nats)  # and all that follows an impossible letter is so


def to_letters(texts):
    """Bytes (N, T) as letters 0, 1, ..; -1 for what is none."""
    letters = np.asarray(texts).astype(np.int64) - ord("a")
    return np.where((letters >= 0) & (letters < LETTERS), letters, -1)


def text_nats(texts, floor=0.0):
    """letter_nats of bytes (N, T); a byte that is no letter of the source is impossible."""
    letters = to_letters(texts)
    start, move, emit = source()
    return letter_nats(letters, (start, move, np.c_[emit, np.zeros(STATES)]), floor)  # -1 is the last column


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    if config.score is not None:
        try:
            lines = [line.rstrip(b"\r") for line in Path(config.score).read_bytes().split(b"\n")]
        except OSError as error:
            raise Mistake(f"--score {config.score}: {error.strerror}") from None
        nats = [text_nats([list(line)])[0] for line in lines if line]
        if not nats:
            raise Mistake(f"--score {config.score}: there is no line in it")
        possible = [line for line in nats if np.isfinite(line).all()]
        mean = np.concatenate(possible).mean() if possible else np.inf
        share = 1 - len(possible) / len(nats)
        print(f"{mean:.4f} nats per letter of {len(possible)} lines; {share:.1%} of {len(nats)} are impossible")
        return
    if config.window > config.tokens // 16:
        raise Mistake(f"--window {config.window}: longer than the validation split of --tokens {config.tokens}")
    model = source()
    letters = draw(config.tokens, model, SEED + 1)
    text = bytes(letters.astype(np.uint8) + ord("a")).decode()
    chunks = (text[i : i + 2**20] for i in range(0, len(text), 2**20))
    cut = len(text) - len(text) // 16
    write_corpus(config.name, split_at(chunks, cut), ByteTokenizer(), f"hidden Markov model, seed {SEED}")
    val = letters[cut:]
    windows = val[: len(val) // config.window * config.window].reshape(-1, config.window)
    nats = letter_nats(windows, model)
    error = nats.mean(1).std() / len(nats) ** 0.5
    print(f"true entropy of windows of {config.window}: {nats.mean():.4f} nats per token", end="")
    print(f" (standard error over windows {error:.4f}); of their last token, {nats[:, -1].mean():.4f}")


if __name__ == "__main__":
    command(main)
