"""Downloads: whole, checked, from https, and continued where they broke off."""

import csv
import hashlib
import http.server
import io
import re
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import data.fairytales.prepare as fairytales
import data.lib.corpus
import data.shakespeare.prepare as shakespeare
from data.lib.corpus import load_corpus
from data.lib.download import download
from data.lib.errors import Mistake

TEXT = b"To be, or not to be\n" * 200
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def server():
    """A server of one file, input.txt.

    requests: (Range, User-Agent) of each; limit: bytes after which it hangs up; ranges: whether it knows them.
    """
    server = SimpleNamespace(content=TEXT, requests=[], limit=None, ranges=True, length=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            span, content = self.headers["Range"], server.content
            server.requests.append((span, self.headers["User-Agent"]))
            if self.path == "/moved.txt":
                self.send_response(302)
                self.send_header("Location", server.location)
                return self.end_headers()
            if self.path != "/input.txt":
                return self.send_error(404)
            start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.ranges else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if server.length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: server.limit])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{httpd.server_port}/input.txt"
        yield server
        httpd.shutdown()


def test_a_download_is_whole_checked_and_made_once(server, tmp_path):
    for _ in range(2):
        download(server.url, tmp_path / "new" / "ok", SHA256)
        assert (tmp_path / "new" / "ok").read_bytes() == TEXT
    assert len(server.requests) == 1
    assert not server.requests[0][1].startswith("Python")
    with pytest.raises(Mistake, match="sha256"):
        download(server.url, tmp_path / "other", "0" * 64)
    with pytest.raises(Mistake, match=r"no download \(Not Found\); try again, or --file takes a copy"):
        download(server.url.replace("input", "missing"), tmp_path / "missing", SHA256)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("length", [True, False], ids=["a length", "no length"])
def test_a_download_has_a_largest_size(length, server, tmp_path):
    server.length = length
    with pytest.raises(Mistake, match="more than 3,999 bytes"):
        download(server.url, tmp_path / "large", most=len(TEXT) - 1)
    assert [*tmp_path.iterdir()] == []
    download(server.url, tmp_path / "large", most=len(TEXT))
    assert (tmp_path / "large").read_bytes() == TEXT


def test_what_comes_from_elsewhere_than_https_is_refused(server, tmp_path):
    """A server may redirect, and only the answer tells where to."""
    server.location = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(Mistake, match="http://localhost:.*/input.txt is not https"):
        download(server.url.replace("input", "moved"), tmp_path / "new" / "x")
    assert [*tmp_path.rglob("*")] == [tmp_path / "new"]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_download_that_broke_off_goes_on(ranges, server, tmp_path):
    server.limit, server.ranges = 700, ranges
    with pytest.raises(Mistake, match="no download"):
        download(server.url, tmp_path / "x")
    assert (tmp_path / "x.part").read_bytes() == TEXT[:700]
    assert not (tmp_path / "x").exists()
    server.limit = None
    download(server.url, tmp_path / "x")
    assert server.requests[-1][0] == "bytes=700-"
    assert (tmp_path / "x").read_bytes() == TEXT
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_part_of_another_file_is_found_by_the_sha256_and_given_up(server, tmp_path):
    (tmp_path / "x.part").write_bytes(b"x" * 700)
    with pytest.raises(Mistake, match="sha256"):
        download(server.url, tmp_path / "x", SHA256)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("size", [len(TEXT), len(TEXT) + 1])
def test_a_part_that_is_no_shorter_than_the_file_is_given_up(size, server, tmp_path):
    (tmp_path / "x.part").write_bytes(b"x" * size)
    with pytest.raises(Mistake, match="no download"):
        download(server.url, tmp_path / "x", SHA256)
    download(server.url, tmp_path / "x", SHA256)
    assert (tmp_path / "x").read_bytes() == TEXT


def test_a_server_that_cannot_be_reached_ends_in_a_sentence(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), None) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/x"
    with pytest.raises(Mistake, match="no download .*; try again, or fly"):
        download(url, tmp_path / "x", instead="fly")


def test_shakespeare_by_download_and_by_file(server, tmp_path, monkeypatch, run):
    folder = tmp_path / "data"
    for module, name, value in (
        (data.lib.corpus, "DATA", folder),
        (shakespeare, "DATA", folder),
        (shakespeare, "URL", server.url),
        (shakespeare, "SHA256", SHA256),
    ):
        monkeypatch.setattr(module, name, value)
    (tmp_path / "copy").write_bytes(TEXT)
    run(main=shakespeare.main)
    run("--file", tmp_path / "copy", "--name", "again", main=shakespeare.main)
    for name in ("shakespeare", "again"):
        train, val, _, _ = load_corpus(name)
        assert bytes(train.astype(np.uint8)) == TEXT[: len(TEXT) * 9 // 10]
        assert len(train) + len(val) == len(TEXT)
    (tmp_path / "copy").write_text("something else")
    with pytest.raises(Mistake, match="sha256"):
        run("--file", tmp_path / "copy", main=shakespeare.main)


def test_fairy_tales_by_download_and_by_folder(server, tmp_path, monkeypatch, run):
    tales = {"train": ["There lived\na king.\n\nHe slept.", "And woke."], "val": ["A cat"], "test": ["A dog"]}
    for split, sections in tales.items():
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("section", "text"), *enumerate(sections)])
        path = tmp_path / fairytales.FOLDER / split / "tale.csv"
        path.parent.mkdir(parents=True)
        path.write_text(table.getvalue(), newline="")
    (tmp_path / fairytales.FOLDER / "val" / ".DS_Store").touch()
    with zipfile.ZipFile(tmp_path / "tales.zip", "w") as archive:
        for path in tmp_path.rglob("*.csv"):
            archive.write(path, path.relative_to(tmp_path))
    server.content = (tmp_path / "tales.zip").read_bytes()
    expected = "A dog\n\n\n", "There lived a king.\n\nHe slept.\n\nAnd woke.\n\n\n", "A cat\n\n\n"
    monkeypatch.setattr(fairytales, "SHA256", hashlib.sha256("".join(expected).encode()).hexdigest())
    for module, name, value in (
        (data.lib.corpus, "DATA", tmp_path / "data"),
        (fairytales, "DATA", tmp_path / "data"),
        (fairytales, "URL", server.url),
    ):
        monkeypatch.setattr(module, name, value)
    run(main=fairytales.main)
    run("--dir", tmp_path / fairytales.FOLDER, "--val", "test", "--name", "again", main=fairytales.main)
    for name, val in (("fairytales", expected[2]), ("again", expected[0])):
        splits = [bytes(split.astype(np.uint8)).decode() for split in load_corpus(name)[:2]]
        assert splits == [expected[1], val]
    (tmp_path / fairytales.FOLDER / "val" / "tale.csv").write_text("section,text\n1,Another cat\n")
    with pytest.raises(Mistake, match="sha256"):
        run("--dir", tmp_path / fairytales.FOLDER, main=fairytales.main)
    (tmp_path / "data" / "fairytales" / "tales.zip").write_text("a web page")
    with pytest.raises(Mistake, match="not a copy of section-stories .*; replace it"):
        run(main=fairytales.main)
