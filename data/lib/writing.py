"""What `python sample.py` does around the sampler: models, prompts, conversations, views and summaries.

The sampler itself, `denoise` and `log_likelihood`, is handed in by sample.py.
"""

import math
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.lib.chat import chat_of, converse, reply_length
from data.lib.errors import Mistake
from data.lib.history import History
from data.lib.machine import autocast, pick_device
from data.lib.pixels import as_shown
from data.lib.prompt import make_canvas, read_text, shown_of, standing
from data.lib.sample_settings import check_writing, default_checkpoint, flags_for
from data.lib.terminal import Watch
from data.lib.views import save_histories


class Plan(NamedTuple):
    """What one model writes in one order: canvases, a list of ids for each prompt, and the flags of denoise."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    canvases: list
    flags: dict


class Written(NamedTuple):
    """The texts that a plan of this name produced, how each came to be, and a line about time and passes."""

    name: str
    tokenizer: object
    texts: list[str]
    histories: list
    summary: str


class Session:
    """One call of sample.py: its config, the flags that were given, and the loaded models."""

    def __init__(self, config, given, load_checkpoint):
        self.config, self.given = config, given
        self.prompts = [*config.prompt, *map(read_text, config.prompt_file)]
        check_writing(config, given, self.prompts)
        config.ckpt = config.ckpt or [default_checkpoint()]
        self.device = pick_device(config.device)
        keep = getattr(torch, config.dtype, None)
        self.loaded = [load_checkpoint(path, self.device, keep) for path in config.ckpt]
        self.judge = None if config.judge is None else load_checkpoint(config.judge, self.device, keep)
        if self.judge and self.judge[1].bos_id is not None:
            raise Mistake(f"--judge {config.judge}: its lines begin with a special token, so it can't judge text")
        if self.judge and any(tokenizer.kinds != self.judge[1].kinds for _, tokenizer, _ in self.loaded):
            raise Mistake(f"--judge {config.judge}: its canvas has other kinds of tokens than what is written")

    @contextmanager
    def inference(self):
        with torch.no_grad(), autocast(self.device, self.config.dtype):
            yield

    def run(self, denoise, log_likelihood):
        """Print a score, or write."""
        if self.config.score is not None:
            self.print_score(log_likelihood)
        else:
            self.write(denoise, log_likelihood)

    # --- writing ---------------------------------------------------------------------------------

    def write(self, denoise, log_likelihood):
        """Write all texts, or have a conversation; print them, and save how they came to be."""
        config, rounds = self.config, []  # one round, or one for each turn of a conversation

        def answer(prompts):
            plans = list(self.plans(prompts))
            with Watch([plan.name for plan in plans]) if config.watch else nullcontext() as watch:
                results = []
                for plan in plans:
                    results.append(follow(plan, config, denoise, watch))
                    if watch:
                        watch.next()
            rounds.append(results)
            self.print_texts(results, log_likelihood)
            return results[0].texts[0]

        try:
            with self.inference():
                if not config.chat:
                    answer(self.prompts or [""])
                elif self.prompts:
                    answer([[{"role": "user", "content": text}] for text in self.prompts])
                else:
                    (path,), ((_, tokenizer, checkpoint),) = config.ckpt, self.loaded
                    converse(chat_of(path, checkpoint, tokenizer), lambda messages: answer([messages]))
        finally:  # a conversation may end in a mistake
            if config.save is not None and rounds:
                texts = [text for results in rounds for text in zip(*(each.histories for each in results))]
                save_histories(config.save, texts, [result.name for result in rounds[0]])

    def plans(self, prompts):
        """The Plan of each checkpoint and order. prompts: texts; with --chat the messages before each reply."""
        config, loaded = self.config, self.loaded
        W = min((model.config.context for model, _, _ in loaded if not model.config.kinds), default=0)
        all_causal = all(model.config.block == 1 for model, _, _ in loaded)
        by_path, by_order = len(loaded) > 1 or len(config.order) == 1, len(config.order) > 1
        for path, (model, tokenizer, checkpoint) in zip(config.ckpt, loaded):
            if config.chat:
                chat, length = (
                    chat_of(path, checkpoint, tokenizer),
                    config.length or reply_length(checkpoint, W),
                )
                canvases = [chat.canvas(messages, length) for messages in prompts]
            else:
                canvases = [make_canvas(text, config.suffix, config.length, tokenizer, W) for text in prompts]
            for flags in flags_for(config, self.given, path, model, canvases, all_causal):
                name = ", ".join([path] * by_path + [flags["order"]] * by_order)
                yield Plan(name, model, tokenizer, canvases, flags)

    def print_texts(self, results, log_likelihood):
        """Print texts on stdout, and everything else on stderr."""
        for name, tokenizer, texts, _, summary in results:
            for number, text in enumerate(texts, 1):
                if len(texts) > 1:
                    print(f"--- {number} of {len(texts)}", file=sys.stderr, flush=True)
                print(as_shown(text, tokenizer) if sys.stdout.isatty() else text, flush=True)
            if self.judge:
                with self.inference():
                    nats = [nats_per_byte(*self.judge[:2], text, log_likelihood) for text in texts]
                judged = ", ".join(f"{each:.3f}" for each in nats)
                summary += f"; under {self.config.judge} {judged} nats per byte"
            print(f"{name}: {summary}", file=sys.stderr)

    # --- scoring ---------------------------------------------------------------------------------

    def print_score(self, log_likelihood):
        """Print how likely the text of a file is, under the steps that would write it."""
        (plan,), path = self.plans([""]), self.config.score
        tokenizer, order = plan.tokenizer, plan.flags["order"]
        if order in ("random", "remask"):
            raise Mistake(f"--score: under --order {order} a text has no one probability; try confidence")
        if tokenizer.bos_id is not None:
            raise Mistake("--score: the model's lines begin with a special token, so it can't score text")
        text = read_text(path)
        if not text:
            raise Mistake(f"--score {path}: it is empty")
        ids = tokenizer.encode(text)
        if tokenizer.kinds and not (len(ids) == tokenizer.canvas_len and standing(ids, tokenizer) == ids):
            raise Mistake(f"--score {path}: not a whole canvas of the model, of {tokenizer.canvas_len} tokens")
        with self.inference():
            nats = -log_likelihood(plan.model, torch.tensor(ids), **plan.flags)
        bits = nats / math.log(2) / tokenizer.n_bytes(text)
        print(f"{nats / len(ids):.4f} nats per token, {bits:.4f} bits per byte; {len(ids):,} tokens")


def nats_per_byte(model, tokenizer, text, log_likelihood):
    """Nats per byte of a text under a judge that sets the most certain token in each step; a GPT's goes from
    the left, because its blocks are single tokens.
    """
    ids = tokenizer.encode(text)
    nats = -log_likelihood(model, torch.tensor(ids), max(1, len(ids)), order="confidence")
    return nats / max(1, tokenizer.n_bytes(text))


def follow(plan, config, denoise, watch):
    """Write num_samples texts for each canvas of a plan: Written."""
    name, model, tokenizer, canvases, flags = plan
    passes, seconds, done = [], 0.0, {}
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    rows = [(ids, config.seed + i) for ids in canvases for i in range(config.num_samples)]
    for T in sorted({len(ids) for ids, _ in rows}):  # rows of one batch have one length
        numbers = [number for number, (ids, _) in enumerate(rows) if len(ids) == T]
        batch, seeds = zip(*(rows[number] for number in numbers))
        written, took = write(model, tokenizer, torch.tensor(batch), seeds, flags, config, denoise, watch)
        done |= zip(numbers, written)
        seconds += took
    hook.remove()
    n = sum(ids.count(tokenizer.mask_id) for ids, _ in rows)
    summary = f"{n:,} tokens in {seconds:.2f} s: {n / seconds:,.0f} tokens/s, {len(passes)} forward passes"
    texts = []
    for number, (old, _) in enumerate(rows):
        start = old.index(tokenizer.mask_id) if config.chat else 0  # the reply alone
        ids = shown_of(done[number][0], old, tokenizer.mask_id, model.config.end_ids, start)
        texts.append(tokenizer.decode(ids))
    return Written(name, tokenizer, texts, [done[number][1] for number in range(len(rows))], summary)


def write(model, tokenizer, canvas, seeds, flags, config, denoise, watch):
    """Fill a canvas (B, T): (ids, History or None) of each row, and the seconds that it took without showing
    it.
    """
    shown = config.watch or config.save is not None
    histories = [History(tokenizer, ids) for ids in canvas.tolist()] if shown else [None] * len(canvas)
    how = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    log_p = torch.zeros(canvas.shape)  # also finds logits that are not finite
    canvases = denoise(model, canvas, seeds=seeds, log_p=log_p, **how, **flags)
    seconds, began = 0.0, time.perf_counter()
    for canvas in tqdm(canvases, unit="step", leave=False, disable=config.watch):
        seconds += time.perf_counter() - began
        if shown:
            for history, ids, p in zip(histories, canvas.tolist(), log_p.exp().tolist()):
                history.add(ids, p, seconds)
        if watch:
            watch.show(histories[0], len(histories))
        began = time.perf_counter()
    return zip(canvas.tolist(), histories), seconds
