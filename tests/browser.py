"""Chromium without a window, for the tests of pages."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest


@contextmanager
def browser_page(url, profile, *flags):
    """A function that calls a method of Chromium's DevTools protocol on the page at url. profile: a new folder."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_in, write_out)]

    def three_and_four():  # where it listens and speaks
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", *flags]
    command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
    process = subprocess.Popen([*command, url], preexec_fn=three_and_four, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
    for end in (read_in, write_out, *ends):
        os.close(end)
    session, number = {}, 0

    def call(method, **params):
        nonlocal number
        number += 1
        os.write(
            write_in,
            json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0",
        )
        while True:
            answer = b""
            while not answer.endswith(b"\0"):
                assert select.select([read_out], [], [], 60)[0], "the browser does not answer"
                byte = os.read(read_out, 1)
                assert byte, "the browser has ended"
                answer += byte
            answer = json.loads(answer[:-1])
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    try:
        for _ in range(100):
            pages = [t for t in call("Target.getTargets")["targetInfos"] if t["url"] == url]
            if pages:
                break
            time.sleep(0.1)
        assert pages, "the browser has not opened the page"
        session["sessionId"] = call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        yield call
    finally:
        process.kill()
        process.wait()
        for end in (write_in, read_out):
            os.close(end)


def evaluator(call):
    """A function that runs a script in the page, once that is there, and returns its value."""

    def evaluate(script):
        result = call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    for _ in range(100):
        if evaluate("typeof choose == 'function' && document.readyState == 'complete'"):
            return evaluate
        time.sleep(0.1)
    raise AssertionError("the page has not loaded")
