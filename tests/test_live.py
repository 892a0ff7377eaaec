"""The page with a box to type in (`sample.py --page`): its server, and the page in a browser."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from browser import browser_page, evaluator
from world import ROOT

from data.lib.live import events
from data.lib.session import Session, Writer
from data.lib.tokenizer import ByteTokenizer
from model import ModelConfig, Transformer, load_checkpoint
from sample import SampleConfig, denoise

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def address(world):
    """The page of three models: a canvas, a GPT, and one that writes in blocks."""
    with page_of("--ckpt", "out/ckpt.pt", "gpt/ckpt.pt", "blocks/ckpt.pt", "--dtype", "float32", cwd=world) as (url, _):
        yield url


@contextmanager
def page_of(*flags, cwd):
    command = [sys.executable, ROOT / "sample.py", "--page", *flags]
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
    try:
        yield next(line for line in process.stderr if line.startswith("http")).split()[0], process
    finally:
        process.kill()
        process.communicate()


def post(url, what, **request):
    """The status and the lines of what the server answers."""
    data = json.dumps(request).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + what, data), timeout=60) as answer:
            return answer.status, answer.read().decode().splitlines()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().splitlines()


def test_a_canvas_fills_as_denoise_fills_it(address, world):
    request = {"models": [0], "prompt": "line <mask*5> of<mask*4>", "order": "confidence", "steps": "4", "seed": "3"}
    status, lines = post(address, "write", temperature="1", **request)
    first, *steps = map(json.loads, lines)
    model, _, _ = load_checkpoint(world / "out" / "ckpt.pt")
    canvas = torch.tensor([[*b"line ", *[256] * 5, *b" of", *[256] * 4]])
    expected = [*denoise(model, canvas, 4, "confidence", seeds=[3])]
    ids = first["run"]["ids"]
    assert (status, first["side"], first["run"]["prompt"]) == (200, 0, "line <mask*5> of<mask*4>")
    assert ids == [None if i == 256 else i for i in canvas[0].tolist()]
    assert len(steps) == len(expected) == 4
    for step, canvas in zip(steps, expected):
        for i, _, _, token in step["changes"]:
            ids[i] = token
        assert ids == [None if i == 256 else i for i in canvas[0].tolist()]


def test_what_was_set_by_hand_stays_and_the_model_fills_the_rest(address):
    cells = [*b"line ", "2", None, "\n", 98, None]
    _, lines = post(address, "write", models=[0], cells=cells)
    first, *steps = map(json.loads, lines)
    assert first["run"]["ids"] == [*b"line 2", None, 10, 98, None]
    assert sorted(i for step in steps for i, *_ in step["changes"]) == [6, 9]


def test_a_race_writes_each_text_as_it_is_written_alone_and_in_the_order_of_their_times(address):
    alone = [post(address, "write", models=[i], prompt="line ", length="20")[1] for i in range(3)]
    together = [json.loads(line) for line in post(address, "write", models=[0, 1, 2], prompt="line ", length="20")[1]]
    for side, lines in enumerate(alone):
        changes = [event["changes"] for event in together if event["side"] == side and "changes" in event]
        assert changes == [json.loads(line)["changes"] for line in lines[1:]]
    assert {event["side"] for event in together[:3]} == {0, 1, 2}
    seconds = [event["second"] for event in together]
    assert seconds == sorted(seconds)


@torch.no_grad()
def test_the_alternatives_of_a_hole_are_the_model_s(address, world):
    for number, name in enumerate(("out", "gpt", "blocks")):
        cells = [*b"line", None, 49, None]
        status, (line,) = post(address, "look", models=[number], cells=cells)
        guesses = json.loads(line)
        model, _, _ = load_checkpoint(world / name / "ckpt.pt")
        ids = [256 if cell is None else cell for cell in cells]
        end = {"out": 7, "gpt": 5, "blocks": 4 + model.config.block if name == "blocks" else 0}[name]
        p = model(torch.tensor([ids[:end]]))[0].softmax(-1)
        assert status == 200
        holes = [i for i in (4, 6) if i < end]
        assert len(guesses) == len(holes)
        for i, tokens in zip(holes, guesses):
            assert [p for _, p in tokens] == pytest.approx(p[i].topk(5).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"models": [0], "prompt": "<Mask*3>"}, "a hole is <mask>"),
        ({"models": [0], "prompt": "<mask*5000>"}, "the page shows up to 4,096"),
        ({"models": [0], "prompt": "", "steps": "many"}, "--steps: must be an integer"),
        ({"models": [0], "prompt": "", "order": "middle"}, "--order"),
        ({"models": [], "prompt": ""}, "no model"),
        ({"models": [9], "prompt": ""}, "not a request of this page"),
        ({"prompt": ""}, "not a request of this page"),
        ({"models": [0], "cells": 3}, "not a request of this page"),
        ([], "not a request of this page"),
    ],
)
def test_mistakes_are_one_sentence_and_the_page_goes_on(request_, said, address):
    data = json.dumps(request_).encode()
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(address + "write", data), timeout=60)
    assert error.value.code == 400
    assert said in error.value.read().decode()
    assert post(address, "write", models=[0], prompt="a<mask>")[0] == 200


def test_nobody_gets_in_without_the_secret_and_nothing_large_does(address):
    host = re.match(r"http://127\.0\.0\.1:\d+/", address)[0]
    for url in (host, host + "wrong/", address + "more"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url, timeout=60)
        assert post(url, "write", models=[0], prompt="a")[0] == 404
    connection = http.client.HTTPConnection(host[len("http://") : -1], timeout=60)
    connection.putrequest("POST", address[len(host) - 1 :] + "write")
    connection.putheader("Content-Length", str(2**20 + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413  # before the rest is sent
    connection.close()


def test_a_closed_tab_ends_the_computation_and_ctrl_c_the_server(world):
    """While a long text is written, a second tab is told so; once the first is closed, it has its turn."""
    with page_of("--ckpt", "out/ckpt.pt", cwd=world) as (url, process):
        port = int(re.search(r":(\d+)/", url)[1])
        body = json.dumps({"models": [0], "prompt": "<mask*4000>", "order": "confidence", "steps": "40000"})
        head = f"POST {url.partition(str(port))[2]}write HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall((head + body).encode())
            assert client.recv(10)
            assert post(url, "write", models=[0], prompt="a") == (
                400,
                ["the model is busy; stop the text that is being written, or wait"],
            )
        began = time.time()
        assert post(url, "write", models=[0], prompt="a<mask>")[0] == 200
        assert time.time() - began < 10
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_draft_is_a_hole_until_it_is_certain():
    def denoise(model, canvas, drafts, **flags):
        drafts[0, 1] = True
        yield torch.tensor([[97, 98]])
        drafts[0, 1] = False
        yield torch.tensor([[97, 98]])

    session = object.__new__(Session)
    session.config, session.denoise = SampleConfig(), denoise
    model = Transformer(ModelConfig(n_embd=16, n_layer=1, context=8))
    start, drafted, certain = events(session, [(0, Writer("", "", model, BYTES, None, {"order": "draft"}), [256, 256])])
    assert start["run"]["ids"] == [None, None]
    assert drafted["changes"] == [[0, "a", 1.0, 97], [1, "b", "draft", None]]
    assert certain["changes"] == [[1, "b", 1.0, 98]]


def wait(evaluate, condition):
    for _ in range(300):
        if evaluate(condition):
            return
        time.sleep(0.1)
    raise AssertionError(condition)


def test_type_watch_punch_a_hole_set_a_letter_refill_and_race(address, tmp_path):
    with browser_page(address, tmp_path / "profile") as call:
        evaluate = evaluator(call)
        assert evaluate("play.disabled && slider.disabled && fillButton.disabled")  # there is no text yet

        def text():
            return evaluate("document.querySelector('.canvas').textContent")

        def press(key):
            for kind in ("keyDown", "keyUp"):
                call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

        evaluate("at('prompt').value = 'line <mask*6> of a book'; at('steps').value = 3; at('form').requestSubmit()")
        wait(evaluate, "sides.length && !writing && sides[0].steps.length == 3")
        assert re.fullmatch(r"line .* of a book", text(), re.DOTALL)
        assert evaluate("status.textContent") == "step 3 of 3, 100% filled"
        assert "order random, temperature 0.7, seed 0" in evaluate("document.querySelector('figcaption').textContent")
        evaluate("document.querySelectorAll('.canvas span')[1].click()")
        assert text().startswith("l·ne ")
        evaluate("document.querySelector('.canvas .hole').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
        wait(evaluate, "token.textContent.startsWith('position 1: ')")
        assert evaluate("token.textContent").count("%") == 5
        press("X")
        assert text().startswith("lXne ")
        press("é")
        assert text().startswith("lXée ")
        press("Backspace")
        assert text().startswith("lX·e ")
        assert evaluate("getComputedStyle(document.querySelector('.chosen')).outlineStyle") == "solid"
        evaluate("fillButton.click()")
        wait(evaluate, "!writing && sides[0].steps.length == 1")
        assert re.match(r"lX[^·]e ", text())
        press("Y")  # no place of the new canvas was chosen
        assert "Y" not in text()
        evaluate("at('race').click()")
        wait(evaluate, "sides.length == 3 && !writing")
        captions = evaluate("[...document.querySelectorAll('figcaption')].map(e => e.textContent).join('|')").split("|")
        assert [caption.partition(",")[0] for caption in captions] == ["out/ckpt.pt", "gpt/ckpt.pt", "blocks/ckpt.pt"]
        assert all(" 100% filled, " in caption for caption in captions)
        evaluate("at('prompt').value = '<Mask*3>'; at('form').requestSubmit()")
        wait(evaluate, "token.textContent.includes('a hole is <mask>')")


def test_a_text_can_be_stopped_and_filled_on(address, tmp_path):
    with browser_page(address, tmp_path / "profile") as call:
        evaluate = evaluator(call)
        evaluate("at('prompt').value = '<mask*2000>'; at('steps').value = 2000; at('form').requestSubmit()")
        wait(evaluate, "sides.length && sides[0].steps.length > 3")
        evaluate("stop.click()")
        wait(evaluate, "!writing")
        n = evaluate("sides[0].steps.length")
        assert n < 2000
        assert not evaluate("fillButton.disabled")
        evaluate("at('steps').value = 2; fillButton.click()")
        wait(evaluate, "!writing && !sides[0].ids.includes(null)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_window_in_light_and_dark(scheme, address, tmp_path):
    with browser_page(address, tmp_path / "profile") as call:
        evaluate = evaluator(call)
        call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
        call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        evaluate("at('prompt').value = 'line '; at('race').click()")
        wait(evaluate, "sides.length == 3 && !writing")
        assert evaluate("document.documentElement.scrollWidth") <= 360
        page, ink = (evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (page, ink)]
        assert (brightness[0] > brightness[1]) == (scheme == "light")
