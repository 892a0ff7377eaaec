"""Everything that `python sample.py` does around the sampler: it loads models, writes, prints, judges and scores."""

import math
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from functools import partial

import torch
from tqdm import tqdm

from data.lib.chat import chat_of, converse, reply_length
from data.lib.errors import Mistake
from data.lib.history import History
from data.lib.machine import autocast, pick_device
from data.lib.pixels import as_shown
from data.lib.prompt import make_canvas, read_text, shown_of, standing
from data.lib.sample_settings import check_flags, default_checkpoint, flags_for
from data.lib.terminal import Watch
from data.lib.views import save_histories

# The canvases, lists of ids, that one model fills in one order, and the flags of denoise for that.
Plan = namedtuple("Plan", "name model tokenizer canvases flags")


class Session:
    """One call of sample.py, with its models. given: the flags on the command line. The functions are sample.py's."""

    def __init__(self, config, given, load_checkpoint, denoise, log_likelihood):
        self.config, self.given = config, given
        self.denoise, self.log_likelihood = denoise, log_likelihood
        self.prompts = [*config.prompt, *map(read_text, config.prompt_file)]
        check_flags(config, given, self.prompts)
        config.ckpt = config.ckpt or [default_checkpoint()]
        self.device = pick_device(config.device)
        keep = getattr(torch, config.dtype, None)
        self.loaded = [load_checkpoint(path, self.device, keep) for path in config.ckpt]
        self.judge = None if config.judge is None else load_checkpoint(config.judge, self.device, keep)
        if self.judge and self.judge[1].bos_id is not None:
            raise Mistake(f"--judge {config.judge}: its lines begin with a special token, so it can't judge text")
        self.rounds = []  # for each turn of a conversation, or once: the histories of each plan

    def run(self):
        """Print a score, or write texts or the replies of a conversation."""
        config = self.config
        with autocast(self.device, config.dtype):
            if config.score is not None:
                return self.print_score()
            try:
                if not config.chat:
                    self.answer(self.prompts or [""])
                elif self.prompts:
                    self.answer([[{"role": "user", "content": text}] for text in self.prompts])
                else:
                    (path,), ((_, tokenizer, checkpoint),) = config.ckpt, self.loaded
                    converse(chat_of(path, checkpoint, tokenizer), lambda messages: self.answer([messages]))
            finally:  # even if a conversation ends in a mistake
                if config.save is not None and self.rounds:
                    save_histories(config.save, [text for sides in self.rounds for text in zip(*sides)], self.names)

    def answer(self, prompts):
        """Write and print a text for each prompt, or with --chat a reply to each list of messages. Return the first."""
        plans = list(self.plans(prompts))
        self.names = [plan.name for plan in plans]
        with Watch(self.names) if self.config.watch else nullcontext() as watch:
            results = [self.follow(plan, watch and partial(watch.show, pane)) for pane, plan in enumerate(plans)]
        self.rounds.append([histories for _, histories, _ in results])
        for plan, (texts, _, speed) in zip(plans, results):
            self.print_texts(plan, texts, speed)
        return results[0][0][0]

    def plans(self, prompts):
        """Yield the Plan of each checkpoint and order."""
        config, loaded = self.config, self.loaded
        W = min((model.config.context for model, _, _ in loaded if not model.config.kinds), default=0)
        all_causal = all(model.config.block == 1 for model, _, _ in loaded)
        by_path, by_order = len(loaded) > 1 or len(config.order) == 1, len(config.order) > 1
        for path, (model, tokenizer, checkpoint) in zip(config.ckpt, loaded):
            if config.chat:
                chat, length = chat_of(path, checkpoint, tokenizer), config.length or reply_length(checkpoint, W)
                canvases = [chat.canvas(messages, length) for messages in prompts]
            else:
                canvases = [make_canvas(text, config.suffix, config.length, tokenizer, W) for text in prompts]
            for flags in flags_for(config, self.given, path, model, canvases, all_causal):
                name = ", ".join([path] * by_path + [flags["order"]] * by_order)
                yield Plan(name, model, tokenizer, canvases, flags)

    def follow(self, plan, show):
        """Write num_samples texts for each canvas of a plan: the texts, their histories, and a line about speed."""
        rows = [(ids, self.config.seed + i) for ids in plan.canvases for i in range(self.config.num_samples)]
        passes, seconds, written = [], 0.0, {}
        hook = plan.model.register_forward_hook(lambda *_: passes.append(1))
        for T in sorted({len(ids) for ids in plan.canvases}):  # the rows of a batch have one length
            numbers = [number for number, (ids, _) in enumerate(rows) if len(ids) == T]
            batch, took = self.fill(plan, [rows[number] for number in numbers], show)
            written.update(zip(numbers, batch))
            seconds += took
        hook.remove()
        texts, histories = zip(*(written[number] for number in range(len(rows))))
        n = sum(ids.count(plan.tokenizer.mask_id) for ids, _ in rows)
        speed = f"{n:,} tokens in {seconds:.2f} s: {n / seconds:,.0f} tokens/s, {len(passes)} forward passes"
        return texts, histories, speed

    def fill(self, plan, rows, show):
        """Fill rows, (ids, seed) of one length: (text, History or None) of each, and the seconds that denoise took."""
        config, is_recorded = self.config, show or self.config.save is not None
        histories = [History(plan.tokenizer, ids) if is_recorded else None for ids, _ in rows]
        canvas, seeds = torch.tensor([ids for ids, _ in rows]), [seed for _, seed in rows]
        log_p = torch.zeros(canvas.shape)  # with it, denoise also notices logits that are not finite
        how = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
        canvases = self.denoise(plan.model, canvas, seeds=seeds, log_p=log_p, **how, **plan.flags)
        seconds, began = 0.0, time.perf_counter()
        for canvas in tqdm(canvases, unit="step", leave=False, disable=bool(show)):
            seconds += time.perf_counter() - began
            if is_recorded:
                for history, ids, p in zip(histories, canvas.tolist(), log_p.exp().tolist()):
                    history.add(ids, p, seconds)
            if show:
                show(histories[0], len(histories))
            began = time.perf_counter()
        mask_id, end_ids, texts = plan.tokenizer.mask_id, plan.model.config.end_ids, []
        for (old, _), ids in zip(rows, canvas.tolist()):
            start = old.index(mask_id) if config.chat else 0  # only the reply
            texts.append(plan.tokenizer.decode(shown_of(ids, old, mask_id, end_ids, start)))
        return zip(texts, histories), seconds

    def print_texts(self, plan, texts, speed):
        """Print texts on stdout, and everything else on stderr."""
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                print(f"--- {number} of {len(texts)}", file=sys.stderr, flush=True)
            print(as_shown(text, plan.tokenizer) if sys.stdout.isatty() else text, flush=True)
        if self.judge:
            nats = (nats_per_byte(*self.judge[:2], text, self.log_likelihood) for text in texts)
            speed += f"; under {self.config.judge} {', '.join(f'{each:.3f}' for each in nats)} nats per byte"
        print(f"{plan.name}: {speed}", file=sys.stderr)

    def print_score(self):
        """Print how likely the text of a file is, under the steps that would write it."""
        (plan,), path = self.plans([""]), self.config.score
        tokenizer, order = plan.tokenizer, plan.flags["order"]
        if order in ("random", "remask"):
            raise Mistake(f"--score: under --order {order} a text has no one probability; try confidence")
        if tokenizer.bos_id is not None:
            raise Mistake("--score: the model's lines begin with a special token, so it can't score text")
        text = read_text(path)
        ids = tokenizer.encode(text)
        if not ids:
            raise Mistake(f"--score {path}: it is empty")
        if tokenizer.kinds and not (len(ids) == tokenizer.canvas_len and standing(ids, tokenizer) == ids):
            raise Mistake(f"--score {path}: not a whole canvas of the model, of {tokenizer.canvas_len} tokens")
        nats = -self.log_likelihood(plan.model, torch.tensor(ids), **plan.flags)
        n_bytes = tokenizer.canvas_len or len(text.encode())  # a letter or a pixel of a canvas counts as one
        bits = nats / math.log(2) / n_bytes
        print(f"{nats / len(ids):.4f} nats per token, {bits:.4f} bits per byte; {len(ids):,} tokens")


def nats_per_byte(model, tokenizer, text, log_likelihood):
    """Nats per byte of a text under a judge that sets the most certain token first (a GPT the leftmost), one a step."""
    ids = tokenizer.encode(text)
    nats = -log_likelihood(model, torch.tensor(ids), max(1, len(ids)), order="confidence")
    return nats / max(1, tokenizer.canvas_len or len(text.encode()))
