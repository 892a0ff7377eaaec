"""Everything that `python sample.py` does around the sampler: it loads models, writes, prints, judges and scores."""

import math
import os
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from functools import partial

import torch
from tqdm import tqdm

from data.lib.chat import chat_of, converse
from data.lib.errors import Mistake
from data.lib.history import History
from data.lib.machine import autocast, pick_device
from data.lib.pixels import as_shown
from data.lib.prompt import make_canvas, read_text, shown_of, standing
from data.lib.sample_settings import OWN, SHIPPED, check_flags, flags_for
from data.lib.terminal import Watch
from data.lib.views import save_histories

# A model that writes in one order. canvas_of makes a canvas, list[int], of a prompt; flags are those of denoise.
Writer = namedtuple("Writer", "name model tokenizer canvas_of flags")


class Session:
    """One call of sample.py, with its models. given: the flags on the command line. The functions are sample.py's."""

    def __init__(self, config, given, load_checkpoint, denoise, log_likelihood):
        self.config, self.denoise, self.log_likelihood = config, denoise, log_likelihood
        self.prompts = [*config.prompt, *map(read_text, config.prompt_file)]
        check_flags(config, given, self.prompts)
        config.ckpt = config.ckpt or [os.path.relpath(OWN if OWN.exists() else SHIPPED)]
        self.device = pick_device(config.device)
        keep = getattr(torch, config.dtype, None)
        loaded = [load_checkpoint(path, self.device, keep) for path in config.ckpt]
        self.judge = None if config.judge is None else load_checkpoint(config.judge, self.device, keep)
        if self.judge and self.judge[1].bos_id is not None:
            raise Mistake(f"--judge {config.judge}: its lines begin with a special token, so it can't judge text")
        context = min((model.config.context for model, _, _ in loaded if not model.config.kinds), default=0)
        all_causal = all(model.config.block == 1 for model, _, _ in loaded)
        by_path, by_order = len(loaded) > 1 or len(config.order) == 1, len(config.order) > 1
        self.writers, self.saved = [], []  # saved: for each text, its History by each writer
        for path, (model, tokenizer, checkpoint) in zip(config.ckpt, loaded):
            if config.chat:
                self.chat = chat_of(path, checkpoint, tokenizer)
                canvas_of = partial(self.chat.canvas, length=config.length or context)
            else:
                settings = {"suffix": config.suffix, "length": config.length, "context": context}
                canvas_of = partial(make_canvas, tokenizer=tokenizer, **settings)
            for flags in flags_for(config, given, path, model, all_causal):
                name = ", ".join([path] * by_path + [flags["order"]] * by_order)
                self.writers.append(Writer(name, model, tokenizer, canvas_of, flags))

    def run(self):
        """Print a score, or write texts or the replies of a conversation."""
        with autocast(self.device, self.config.dtype):
            if self.config.score is not None:
                self.print_score()
            elif not self.config.chat:
                self.answer(self.prompts or [""])
            elif self.prompts:
                self.answer([[{"role": "user", "content": text}] for text in self.prompts])
            else:
                converse(self.chat, lambda messages: self.answer([messages]))

    def answer(self, prompts):
        """Print a text for each prompt, or with --chat a reply to each list of messages, and save how they filled.

        Returns the first text.
        """
        canvases, results = [list(map(writer.canvas_of, prompts)) for writer in self.writers], []
        with Watch(len(canvases)) if self.config.watch and sys.stderr.isatty() else nullcontext() as watch:
            for pane, writer in enumerate(self.writers):
                results.append(self.write(writer, canvases[pane], watch and partial(watch.show, pane)))
        for writer, (texts, _, speed) in zip(self.writers, results):
            self.print_texts(writer, texts, speed)
        if self.config.save is not None:
            self.saved += zip(*(histories for _, histories, _ in results))
            save_histories(self.config.save, self.saved, [writer.name for writer in self.writers])
        return results[0][0][0]

    def write(self, writer, canvases, show):
        """Write num_samples texts for each canvas: the texts, their histories, and a line about speed."""
        config, tokenizer, passes, seconds = self.config, writer.tokenizer, [], 0.0
        rows = [ids for ids in canvases for _ in range(config.num_samples)]
        seeds = [config.seed + i for _ in canvases for i in range(config.num_samples)]
        texts, histories = [""] * len(rows), [History(tokenizer, ids) for ids in rows]
        how = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")} | writer.flags
        hook = writer.model.register_forward_hook(lambda *_: passes.append(1))
        for T in sorted({len(ids) for ids in rows}):  # the rows of a batch have one length
            batch = [i for i, ids in enumerate(rows) if len(ids) == T]
            canvas = torch.tensor([rows[i] for i in batch])
            log_p = torch.zeros(canvas.shape)  # with it, denoise also notices logits that are not finite
            steps = self.denoise(writer.model, canvas, seeds=[seeds[i] for i in batch], log_p=log_p, **how)
            took, began = 0.0, time.perf_counter()
            for canvas in tqdm(steps, unit="step", leave=False, disable=bool(show)):
                took += time.perf_counter() - began  # without what it takes to record and show the step
                if show or config.save is not None:
                    for i, ids, p in zip(batch, canvas.tolist(), log_p.exp().tolist()):
                        histories[i].add(ids, p, took)
                if show:
                    show(histories[batch[0]], len(batch))
                began = time.perf_counter()
            seconds += took
            for i, ids in zip(batch, canvas.tolist()):
                start = rows[i].index(tokenizer.mask_id) if config.chat else 0  # only the reply
                shown = shown_of(ids, rows[i], tokenizer.mask_id, writer.model.config.end_ids)
                texts[i] = tokenizer.decode(shown[start:])
        hook.remove()
        n = sum(ids.count(tokenizer.mask_id) for ids in rows)
        speed = f"{n:,} tokens in {seconds:.2f} s: {n / seconds:,.0f} tokens/s, {len(passes)} forward passes"
        return texts, histories, speed

    def print_texts(self, writer, texts, speed):
        """Print texts on stdout, and everything else on stderr."""
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                print(f"--- {number} of {len(texts)}", file=sys.stderr, flush=True)
            print(as_shown(text, writer.tokenizer) if sys.stdout.isatty() else text, flush=True)
        if self.judge:
            nats = (nats_per_byte(*self.judge[:2], text, self.log_likelihood) for text in texts)
            speed += f"; under {self.config.judge} {', '.join(f'{each:.3f}' for each in nats)} nats per byte"
        print(f"{writer.name}: {speed}", file=sys.stderr)

    def print_score(self):
        """Print how likely the text of a file is, under the steps that would write it."""
        (writer,), path = self.writers, self.config.score
        tokenizer, order = writer.tokenizer, writer.flags["order"]
        if order in ("random", "remask"):
            raise Mistake(f"--score: under --order {order} a text has no one probability; try confidence")
        if tokenizer.bos_id is not None:
            raise Mistake("--score: the model's lines begin with a special token, so it can't score text")
        text = read_text(path)
        ids = tokenizer.encode(text)
        if not ids or tokenizer.canvas_len not in (0, len(ids)) or standing(ids, tokenizer) != ids:
            raise Mistake(f"--score {path}: it is empty, or not a whole canvas of a model that writes pictures")
        nats = -self.log_likelihood(writer.model, torch.tensor(ids), **writer.flags)
        bits = nats / math.log(2) / tokenizer.n_bytes(text)
        print(f"{nats / len(ids):.4f} nats per token, {bits:.4f} bits per byte; {len(ids):,} tokens")


def nats_per_byte(model, tokenizer, text, log_likelihood):
    """Nats per byte of a text under a judge that sets the most certain token first (a GPT the leftmost), one a step."""
    ids = tokenizer.encode(text)
    nats = -log_likelihood(model, torch.tensor(ids), max(1, len(ids)), order="confidence")
    return nats / max(1, tokenizer.n_bytes(text))
