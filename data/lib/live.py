"""Serves a page on 127.0.0.1 on which one types, watches canvases fill, and sets letters by hand (`--page`)."""

import contextlib
import dataclasses
import heapq
import itertools
import json
import secrets
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args, get_type_hints

import torch

from data.lib.errors import Mistake
from data.lib.escape import inert
from data.lib.flags import parse
from data.lib.history import History
from data.lib.machine import autocast
from data.lib.prompt import make_canvas, prompt_of, standing
from data.lib.session import flags_for
from data.lib.views import page, run_of

MOST_BYTES, MOST_TOKENS = 2**20, 4096  # of a request, and of a canvas
FLAGS = "order", "steps", "temperature", "length", "seed"


def canvas_of(request, config, model, tokenizer):
    """The canvas of a request, a list of ids: from its prompt, or from cells, which are ids, texts and holes (None)."""
    if "cells" not in request:
        context = model.config.context
        ids = make_canvas(str(request.get("prompt", "")), "", config.length, tokenizer, context)
    else:
        ids = []
        for cell in request["cells"]:
            is_id = type(cell) is int and 0 <= cell < tokenizer.vocab_size
            ids += [tokenizer.mask_id] if cell is None else [cell] if is_id else tokenizer.encode(str(cell))
        if tokenizer.kinds and (len(ids) != tokenizer.canvas_len or standing(ids, tokenizer) != ids):
            raise Mistake("this can't stand at that place of the canvas")
    if not 0 < len(ids) <= MOST_TOKENS:
        raise Mistake(f"a canvas of {len(ids):,} tokens; the page shows up to {MOST_TOKENS:,}")
    return ids


def settings_of(session, request):
    """The SampleConfig of a request, and the flags that were given. Mistake if one is wrong."""
    words = [f"--{name}={request[name]}" for name in FLAGS if name in request]
    given = parse(type(session.config), words=words)
    return dataclasses.replace(session.config, **given), given


def write(session, request):
    """Yield what happens while the models of a request fill its canvas, as dicts.

    First each side's run comes, then its steps. Several models take turns so that each keeps its own speed.
    """
    config, given = settings_of(session, request)
    queue = []
    for side, number in enumerate(request["models"]):
        path, (model, tokenizer, _) = config.ckpt[number], session.loaded[number]
        flags = flags_for(config, given, path, model, all_causal=False)[0]
        ids = canvas_of(request, config, model, tokenizer)
        about = f"{path}, order {flags['order']}, temperature {config.temperature:g}, seed {config.seed}"
        history = History(tokenizer, ids, path, about, prompt_of(ids, tokenizer), config.seed)
        start = [None if i == tokenizer.mask_id else i for i in ids]
        yield {"side": side, "run": run_of(history) | {"ids": start, "model": number}}
        log_p, drafts = torch.zeros(1, len(ids)), torch.zeros(1, len(ids), dtype=torch.bool)
        how = {"seeds": [config.seed], "temperature": config.temperature, "log_p": log_p, "drafts": drafts, **flags}
        steps = session.denoise(model, torch.tensor([ids]), **how)
        queue.append((0.0, side, history, steps, log_p, drafts))
    while queue:
        seconds, side, history, steps, log_p, drafts = heapq.heappop(queue)
        began = time.perf_counter()
        canvas = next(steps, None)
        if canvas is not None:
            seconds += time.perf_counter() - began
            history.add(canvas[0].tolist(), log_p[0].exp().tolist(), seconds, drafts[0].tolist())
            changes = [[*change, history.canvas[change[0]]] for change in history.steps[-1]]
            changes = [[i, text, p, None if text is None else token] for i, text, p, token in changes]
            yield {"side": side, "changes": changes, "second": history.seconds[-1]}
            heapq.heappush(queue, (seconds, side, history, steps, log_p, drafts))


def look(session, request):
    """The likeliest tokens of each hole in the first block that has one, with their probabilities, by place."""
    model, tokenizer, _ = session.loaded[request["models"][0]]
    ids = canvas_of(request, session.config, model, tokenizer)
    if len(ids) > model.config.context:
        raise Mistake(f"the model sees {model.config.context} tokens at once, and the canvas has {len(ids)}")
    K = model.config.block or len(ids)
    ids = ids[: (ids.index(tokenizer.mask_id) // K + 1) * K]
    holes = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    with torch.no_grad():
        top = model(torch.tensor([ids], device=session.device))[0, holes].float().softmax(-1).topk(5)  # (N, 5)
    names = [[inert(tokenizer.decode([i])) for i in row] for row in top.indices.tolist()]
    return {i: list(zip(*row)) for i, *row in zip(holes, names, top.values.tolist())}


def serve(session):
    """Serve the page until Ctrl-C. The address has a secret, so that no other page can use the models."""
    secret, lock = secrets.token_urlsafe(16), threading.Lock()
    (order,) = get_args(get_type_hints(type(session.config))["order"])  # list[Literal]
    live = {"models": session.config.ckpt, "orders": [name for name in get_args(order) if name != "draft"]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != f"/{secret}/":
                return self.send_error(404)
            self.answer(200, "text/html; charset=utf-8")
            self.wfile.write(page([], live=live).encode())

        def do_POST(self):
            size = self.headers.get("Content-Length", "")
            if self.path not in (f"/{secret}/write", f"/{secret}/look"):
                return self.send_error(404)
            if not size.isdecimal() or int(size) > MOST_BYTES:
                return self.send_error(413)
            if not lock.acquire(timeout=5):  # a text that was stopped ends after its step
                return self.refuse("another text is being written; stop it, or wait")
            with contextlib.ExitStack() as stack:
                stack.callback(lock.release)
                stack.enter_context(autocast(session.device, session.config.dtype))
                try:
                    self.respond(json.loads(self.rfile.read(int(size))))
                except Mistake as mistake:
                    self.refuse(str(mistake))
                except (AttributeError, LookupError, TypeError, ValueError):
                    self.refuse("that is not a request of this page")
                except ConnectionError:  # the page was closed or stopped it, so the computation ends, too
                    pass

        def respond(self, request):
            if self.path.endswith("look"):
                content = json.dumps(look(session, request)).encode()
                self.answer(200, "application/json")
                return self.wfile.write(content)
            events = write(session, request)
            first = next(events)  # a Mistake comes before any of the answer
            self.answer(200, "application/x-ndjson")
            try:
                for event in itertools.chain([first], events):
                    self.wfile.write(json.dumps(event).encode() + b"\n")
            except Mistake as error:
                self.wfile.write(json.dumps({"error": str(error)}).encode() + b"\n")

        def refuse(self, sentence):
            self.answer(400, "text/plain; charset=utf-8")
            self.wfile.write(sentence.encode())

        def answer(self, code, kind):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(
        f"http://127.0.0.1:{server.server_port}/{secret}/ shows the page; Ctrl-C ends it", file=sys.stderr, flush=True
    )
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
