"""Everything that `python sample.py` does around the sampler: it checks flags, loads models, writes and scores."""

import heapq
import itertools
import math
import os
import re
import shlex
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data.lib.chat import Chat, converse
from data.lib.errors import Mistake
from data.lib.history import History
from data.lib.kernels import pack
from data.lib.layout import as_shown, wrapped
from data.lib.machine import autocast, pick_device
from data.lib.prompt import MOST, make_canvas, prompt_of, read_text, shown_of, standing
from data.lib.terminal import Watch
from data.lib.views import save_histories

OWN = Path("out/ckpt.pt")  # where train.py writes by default
TALES = Path(__file__).parents[1] / "fairytales"  # its README.md says how the included models were made
SHIPPED, SHIPPED_DRAFT = TALES / "canvas.pt", TALES / "draft.pt"

# A model that writes in one order. canvas_of makes a canvas, list[int], of a prompt; flags are those of denoise.
Writer = namedtuple("Writer", "name path model tokenizer canvas_of flags")


class Written:
    """The texts of a writer, and the forward passes and seconds that they took, without recording and showing them."""

    def __init__(self):
        self.histories, self.n_tokens, self.passes, self.seconds = [], 0, 0, 0.0

    def step(self, model, steps):
        """The canvas after the next of the steps, or None after the last."""

        def count(*_):
            self.passes += 1

        began = time.perf_counter()
        with model.layers[0].register_forward_hook(count):
            canvas = next(steps, None)
        self.seconds += time.perf_counter() - began
        return canvas


class Session:
    """One call of sample.py, with its models. given: the flags on the command line. The functions are sample.py's."""

    def __init__(self, config, given, load_checkpoint, denoise, log_likelihood):
        self.config, self.given, self.denoise, self.log_likelihood = config, given, denoise, log_likelihood
        self.prompts = [*config.prompt, *(read_text(path, MOST) for path in config.prompt_file)]
        check_flags(config, given, self.prompts)
        if config.score is not None:
            self.text = read_text(config.score)
            config.order = config.order if "order" in given else ["confidence"]
        config.ckpt = config.ckpt or [*map(os.path.relpath, [SHIPPED_DRAFT] * config.race + [SHIPPED])]
        config.watch |= config.race
        self.device, keep = pick_device(config.device), getattr(torch, config.dtype, None)
        self.loaded = loaded = [load_checkpoint(path, self.device, keep) for path in config.ckpt]
        self.judge = None if config.judge is None else load_checkpoint(config.judge, self.device, keep)
        context = min((model.config.context for model, _, _ in loaded if not model.config.kinds), default=0)
        all_causal = all(model.config.block == 1 for model, _, _ in loaded)
        canvas_of_text = partial(make_canvas, suffix=config.suffix, length=config.length, context=context)
        self.writers, self.saved = [], []  # saved: for each text, its History by each writer
        for path, (model, tokenizer, checkpoint) in zip(config.ckpt, loaded):
            pack(model, autocast(self.device, config.dtype).fast_dtype)
            canvas_of = partial(canvas_of_text, tokenizer=tokenizer)
            if config.chat:
                self.chat = Chat(checkpoint.get("chat"), tokenizer)
                canvas_of = partial(self.chat.canvas, length=config.length or context)
            learned = model.family != "setitem" or checkpoint.get("train", {}).get("visible")  # BERTs have, too
            if "remask" in config.order and not (learned or all_causal or config.score is not None):
                said = "was trained without --visible, so it hardly knows what belongs where a token stands"
                print(f"--order remask: the model in {path} {said}", file=sys.stderr)
            for flags in flags_for(config, given, path, model, all_causal):
                names = [path] * (len(loaded) > 1) + [flags["order"]] * (len(config.order) > 1)
                if config.race:
                    verb = "set" if not model.config.is_gpt else "append" if flags["order"] == "left" else "draft"
                    names = [path] * ("ckpt" in given) + [verb]
                self.writers.append(Writer(", ".join(names or [path]), path, model, tokenizer, canvas_of, flags))

    def run(self):
        with autocast(self.device, self.config.dtype):
            if self.config.score is not None:
                self.print_score()
            elif not self.config.chat:
                self.answer(self.prompts or [""])
            elif self.prompts:
                self.answer([[{"role": "user", "content": text}] for text in self.prompts])
            else:
                converse(self.chat, lambda messages: self.answer([messages]))
        if "ckpt" not in self.given and OWN.exists():
            print(f"this was the included model; --ckpt {OWN} takes the one that you trained", file=sys.stderr)

    def answer(self, prompts):
        """Write a text for each prompt, or with --chat a reply to each list of messages. Return the first."""
        config, results = self.config, [Written() for _ in self.writers]
        canvases = [list(map(writer.canvas_of, prompts)) for writer in self.writers]
        with Watch(len(canvases)) if config.watch and sys.stderr.isatty() else nullcontext() as watch:
            shows = [watch and partial(watch.show, pane) for pane in range(len(canvases))]
            runs = [*map(self.write, self.writers, canvases, results, shows)]
            try:  # side by side, the writer that has taken the least time goes next, so each has its own speed
                for _ in heapq.merge(*runs) if watch else itertools.chain(*runs):
                    pass
            except KeyboardInterrupt:
                for writer, written in zip(self.writers, results):
                    print(f"\n{writer.name}: stopped after {written.passes} forward passes", file=sys.stderr)
                raise
        for writer, written in zip(self.writers, results):
            histories, seconds, n = written.histories, written.seconds, written.n_tokens
            for number, history in enumerate(histories, 1):
                names = [writer.name] * (len(results) > 1) + [f"{number} of {len(histories)}"] * (len(histories) > 1)
                if names:
                    print(f"--- {', '.join(names)}", flush=True)
                print(as_shown(history.text, writer.tokenizer) if sys.stdout.isatty() else history.text, flush=True)
            speed = f"{n:,} tokens in {seconds:.2f} s: {n / seconds:,.0f} tokens/s, {written.passes} forward passes"
            if self.judge:
                nats = (nats_per_byte(*self.judge[:2], history.text, self.log_likelihood) for history in histories)
                speed += f"; under {config.judge} {', '.join(f'{each:.3f}' for each in nats)} nats per byte"
            print(wrapped(f"{writer.name}: {speed}"), file=sys.stderr)
        if config.save is not None:
            self.saved += zip(*(written.histories for written in results))
            save_histories(config.save, self.saved, shlex.join(["python", *sys.argv]))
        return results[0].histories[0].text

    def write(self, writer, canvases, written, show):
        """Write num_samples texts for each canvas. Yield, before the first step and after each, the seconds taken."""
        config, tokenizer = self.config, writer.tokenizer
        how = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")} | writer.flags
        seeds = range(config.seed, config.seed + config.num_samples)
        about = f"{writer.path}, order {how['order']}, temperature {how['temperature']:g}, seed"
        written.histories = [
            History(tokenizer, ids, writer.name, f"{about} {seed}", prompt_of(ids, tokenizer), seed)
            for ids, seed in itertools.product(canvases, seeds)
        ]
        yield written.seconds
        for T in sorted({len(ids) for ids in canvases}):  # the rows of a batch have one length
            histories = [history for history in written.histories if len(history.canvas) == T]
            starts, seeds = zip(*((history.canvas, history.seed) for history in histories))
            canvas, end_ids = torch.tensor(starts), writer.model.config.end_ids

            def shown(canvas):
                return [shown_of(ids, start, tokenizer.mask_id, end_ids) for ids, start in zip(canvas.tolist(), starts)]

            log_p = torch.zeros(canvas.shape)  # with it, denoise also notices logits that are not finite
            drafts = torch.zeros(canvas.shape, dtype=torch.bool)  # tokens on the canvas that aren't certain yet
            steps = self.denoise(writer.model, canvas, seeds=seeds, log_p=log_p, drafts=drafts, **how)
            before, n_holes = written.seconds, canvas.eq(tokenizer.mask_id).sum().item()
            written.n_tokens += n_holes
            bar = tqdm(total=n_holes, unit=" tokens", leave=False, disable=bool(show))
            while (after := written.step(writer.model, steps)) is not None:
                canvas = after
                bar.update(n_holes - canvas.eq(tokenizer.mask_id).sum().item() - bar.n)
                if show or config.save is not None:
                    columns = canvas.tolist(), log_p.exp().tolist(), drafts.tolist()
                    for history, ids, p, is_draft in zip(histories, *columns):
                        history.add(ids, p, written.seconds - before, is_draft)
                if show:
                    show(histories[0], len(histories))
                yield written.seconds
                if writer.model.config.is_gpt and end_ids:
                    final = canvas.masked_fill(drafts, tokenizer.mask_id)  # a draft can't end a text
                    if all(len(ids) < T and tokenizer.mask_id not in ids for ids in shown(final)):
                        written.n_tokens -= final.eq(tokenizer.mask_id).sum().item()
                        break  # nothing after a text's end is part of it
            bar.close()
            for history, start, ids in zip(histories, starts, shown(canvas)):
                history.text = tokenizer.decode(ids[start.index(tokenizer.mask_id) if config.chat else 0 :])

    def print_score(self):
        (writer,), text = self.writers, self.text
        tokenizer, order = writer.tokenizer, writer.flags["order"]
        if order in ("random", "remask"):
            raise Mistake(f"--score: under --order {order} a text has no one probability; try confidence")
        ids = tokenizer.encode(text)
        if not ids or tokenizer.canvas_len not in (0, len(ids)) or standing(ids, tokenizer) != ids:
            raise Mistake(f"--score {self.config.score}: it is empty, or not a whole canvas of a model of pictures")
        nats = nats_per_byte(writer.model, tokenizer, text, self.log_likelihood, **writer.flags)
        per_token = nats * (tokenizer.canvas_len or len(text.encode())) / len(ids)
        print(f"{per_token:.4f} nats per token, {nats / math.log(2):.4f} bits per byte; {len(ids):,} tokens")


def nats_per_byte(model, tokenizer, text, log_likelihood, steps=10**6, order="confidence", **flags):
    """How likely `denoise` is to write a text; by default it sets the most certain token first, one per step."""
    if tokenizer.bos_id is not None:
        raise Mistake("a model whose lines begin with a special token, such as [CLS], can't score or judge text")
    nats = -log_likelihood(model, torch.tensor(tokenizer.encode(text)), steps, order=order, **flags)
    return nats / max(1, tokenizer.canvas_len or len(text.encode()))  # letters and pixels of a canvas count as bytes


def check_flags(config, given, prompts):
    """Raise Mistake for flags that don't go together, whatever the model. given: the flags on the command line."""
    several = len(config.ckpt) > 1 or len(config.order) > 1
    if config.score is not None:
        if others := given.keys() - {"score", "ckpt", "order", "steps", "tau", "gamma", "block", "device", "dtype"}:
            raise Mistake(f"--score: not with --{', --'.join(sorted(others))}; it is at temperature 1")
        if several:
            raise Mistake("--score: it takes one --ckpt and one --order")
    alone = {"prompt", "prompt_file", "suffix", "chat", "num_samples", "judge", "score", "watch", "race", "save"}
    if config.page and (others := given.keys() & alone):
        raise Mistake(f"--page: not with --{', --'.join(sorted(others))}")
    if re.search("[\ud800-\udfff]", "".join([*prompts, config.suffix])):  # how Python reads bytes that aren't UTF-8
        raise Mistake("--prompt: it is not UTF-8")
    if config.chat and config.race:
        raise Mistake("--race: not with --chat")
    if config.chat and (config.suffix or (not prompts and (several or config.num_samples > 1))):
        raise Mistake("--chat: not with --suffix; a conversation has one --ckpt, one --order, and one sample at a time")
    if config.save is not None and Path(config.save).suffix not in (".html", ".svg"):
        raise Mistake(f"--save {config.save}: its name must end in .html or .svg")
    if config.save is not None and Path(config.save).exists() and not config.overwrite:
        raise Mistake(f"--save {config.save}: that file exists; --overwrite replaces it")


def flags_for(config, given, path, model, all_causal):
    """The flags of denoise for each order. Raises Mistake if no model of this call can use them."""
    K, W = model.config.block, model.config.context
    if config.suffix and K:  # in a prompt, a GPT may fill a hole without seeing what stands after it
        raise Mistake(f"--suffix: the model in {path} fills holes without seeing what stands after them")
    flags = {name: getattr(config, name) for name in ("steps", "tau", "gamma", "block", "guidance")}
    drafts = model.config.draft_len is not None
    if ("draft" in config.order or config.draft_len) and not drafts:
        makes = "train.py --attention draft:8 makes one that does"
        raise Mistake(f"--order draft: the model in {path} doesn't draft; {makes}")
    if K == 1:
        orders = [order for order in config.order if order in ("left", "draft")]
        wrong = [f"--{name}" for name in flags if name in given]
        wrong += ["--order"] if "order" in given and orders != config.order else []
        if wrong and all_causal:
            raise Mistake(f"{', '.join(wrong)}: the model in {path} is causal and writes from the left")
        default = ["left"] * config.race + ["draft"] if drafts else ["left"]  # in a race it takes part twice
        return [{"order": order, "draft_len": config.draft_len} for order in orders or default]
    if K and K % (config.block or 1):
        raise Mistake(f"--block {config.block}: it must divide the blocks of {path}, of {K} tokens")
    if (config.block or 0) >= W:
        raise Mistake(f"--block {config.block}: the model sees {W} tokens at a time, and a block must be smaller")
    return [{"order": order, **flags} for order in config.order]
