"""Serves a page on 127.0.0.1 where you type a prompt, watch canvases fill and set tokens by hand (`--page`)."""

import contextlib
import copy
import dataclasses
import heapq
import json
import operator
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args, get_type_hints

import torch

from data.lib.errors import Mistake
from data.lib.escape import inert
from data.lib.flags import parse
from data.lib.machine import autocast, device_of
from data.lib.prompt import make_canvas, standing
from data.lib.session import Writer, Written, flags_for
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
            ids += [tokenizer.mask_id] if cell is None else [cell] if is_id else tokenizer.encode_rest(str(cell))
        if tokenizer.kinds and (len(ids) != tokenizer.canvas_len or standing(ids, tokenizer) != ids):
            raise Mistake("that token can't go there on the canvas")
    if not 0 < len(ids) <= MOST_TOKENS:
        raise Mistake(f"a canvas of {len(ids):,} tokens; the page shows up to {MOST_TOKENS:,}")
    return ids


def sides_of(session, request):
    """What `events` takes: a Session with the flags of a request, and for each text its model's number, Writer, ids."""
    given = parse(type(session.config), words=[f"--{name}={request[name]}" for name in FLAGS if name in request])
    config, sides = dataclasses.replace(session.config, **given), []
    for number in request["models"]:
        path, (model, tokenizer, _) = config.ckpt[number], session.loaded[number]
        flags = flags_for(config, given, path, model, all_causal=False)[0]
        ids = canvas_of(request, config, model, tokenizer)
        sides.append((number, Writer(path, path, model, tokenizer, None, flags), ids))
    if not sides:
        raise Mistake("no model")
    session = copy.copy(session)
    session.config = config
    return session, sides


def events(session, sides):
    """Yield what happens while texts are written, as dicts: first the canvas of each side, then all steps.

    The next step is always that of the text that has taken the least time, so each keeps its own speed.
    """
    runs = (events_of(session, side, *which) for side, which in enumerate(sides))
    return heapq.merge(*runs, key=operator.itemgetter("second"))


def events_of(session, side, number, writer, ids):
    """Yield an event with the canvas of a text, and one after each step; `second` is how long the steps have taken."""
    written = Written()
    for seconds in session.write(writer, [ids], written, show=lambda *_: None):
        (history,) = written.histories
        if not history.steps:
            ids = [None if is_hole else i for i, is_hole in zip(ids, history.holes)]
            yield {"side": side, "run": run_of(history) | {"ids": ids, "model": number}, "second": seconds}
        else:
            changes = [  # a draft that isn't certain yet is a hole
                [i, text, p, None if text is None or p == "draft" else history.canvas[i]]
                for i, text, p in history.steps[-1]
            ]
            yield {"side": side, "changes": changes, "second": seconds}


def canvas_to_look_at(session, request):
    """Model, tokenizer, and the canvas up to the end of the first block with a hole: the model can see no further."""
    model, tokenizer, _ = session.loaded[request["models"][0]]
    ids = canvas_of(request, session.config, model, tokenizer)
    if len(ids) > model.config.context:
        raise Mistake(f"the model sees {model.config.context} tokens at once, and the canvas has {len(ids)}")
    K = model.config.block or len(ids)
    return model, tokenizer, ids[: (ids.index(tokenizer.mask_id) // K + 1) * K]


@torch.no_grad()
def look(model, tokenizer, ids):
    """The five likeliest tokens of each hole of a canvas, from left to right, with their probabilities."""
    holes = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
    logits = model(torch.tensor([ids], device=device_of(model)))[0, holes]  # (N, V)
    top = logits.float().softmax(-1).topk(5)
    # What each token adds after a hole, so that " a" and "a" differ.
    names = [[inert(tokenizer.pieces([tokenizer.mask_id, i])[1]) for i in row] for row in top.indices.tolist()]
    return [list(zip(*row)) for row in zip(names, top.values.tolist())]


def serve(session):
    """Serve the page until Ctrl-C. The address has a secret, so that no other page can use the models."""
    secret, lock, config = secrets.token_urlsafe(16), threading.Lock(), session.config
    (orders,) = get_args(get_type_hints(type(config))["order"])  # list[Literal]
    flags = {name: getattr(config, name) for name in FLAGS} | {"order": config.order[0]}
    live = {"models": config.ckpt, "orders": [name for name in get_args(orders) if name != "draft"], "flags": flags}

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds that a reader may keep us waiting

        def do_GET(self):
            if self.path != f"/{secret}/":
                return self.send_error(404)
            self.answer(200, "text/html; charset=utf-8", page([], live=live).encode())

        def do_POST(self):
            size = self.headers.get("Content-Length", "")
            if self.path not in (f"/{secret}/write", f"/{secret}/look"):
                return self.send_error(404)
            if not size.isdecimal() or int(size) > MOST_BYTES:
                return self.send_error(413)
            with contextlib.suppress(OSError):  # the page was closed, or stopped it, so the computation ends, too
                body = self.rfile.read(int(size))
                if not lock.acquire(timeout=5):  # a text that was stopped ends after its step
                    return self.refuse("the model is busy; stop the text that is being written, or wait")
                try:
                    with autocast(session.device, config.dtype):
                        self.respond(body)
                finally:
                    lock.release()

        def respond(self, body):
            prepare = canvas_to_look_at if self.path.endswith("look") else sides_of
            try:
                prepared = prepare(session, json.loads(body))
            except Mistake as mistake:
                return self.refuse(str(mistake))
            except (AttributeError, LookupError, TypeError, ValueError):
                return self.refuse("that is not a request of this page")
            if prepare is canvas_to_look_at:
                return self.answer(200, "application/json", json.dumps(look(*prepared)).encode())
            self.answer(200, "application/x-ndjson")
            try:
                for event in events(*prepared):
                    self.wfile.write(json.dumps(event).encode() + b"\n")
            except Mistake as error:
                self.wfile.write(json.dumps({"error": str(error)}).encode() + b"\n")

        def refuse(self, sentence):
            self.answer(400, "text/plain; charset=utf-8", sentence.encode())

        def answer(self, code, kind, content=b""):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}/{secret}/"
    print(f"{address} shows the page; Ctrl-C ends it", file=sys.stderr, flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
