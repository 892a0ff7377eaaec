"""WikiText's lines, and downloads that are interrupted."""

import hashlib
import http.server
import io
import json
import re
import shutil
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_files import assert_equal, converted, same_vocabulary

import data.lib.checkpoint
import data.lib.corpus
import data.weights.hub
import data.wikitext2.prepare as wikitext_prepare
from data.lib.corpus import load_corpus
from data.lib.errors import Mistake
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.fixture(scope="session")
def expected(originals):
    """Our tensors of the small RoBERTa."""
    return converted(originals["roberta"][0]).state_dict()


@pytest.fixture
def hub(originals, tmp_path, monkeypatch):
    """A server with the small RoBERTa as roberta-base.

    requests: (file, Range, User-Agent) of each; limit: bytes after which it hangs up; ranges: whether
    it knows them; careless: whether it gives one of another file than was asked for.
    """
    folder = tmp_path / "www" / "FacebookAI" / "roberta-base" / "resolve" / "main"
    shutil.copytree(originals["roberta"][0], folder)
    hub = SimpleNamespace(folder=folder, requests=[], limit=None, ranges=True, careless=False)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            span = self.headers["Range"]
            hub.requests.append((Path(self.path).name, span, self.headers["User-Agent"]))
            content = (tmp_path / "www" / self.path[1:]).read_bytes()
            etag, condition = f'"{zlib.crc32(content)}"', self.headers["If-Range"]
            same = hub.careless or condition in (None, etag)
            start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and hub.ranges and same else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", etag)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:][: hub.limit])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(data.weights.hub, "HUB", f"http://127.0.0.1:{httpd.server_port}")
        yield hub
        httpd.shutdown()


FILES = ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"]


def test_a_name_is_downloaded_once(hub, run, expected, data_folder):
    run("roberta-base")
    assert [(name, span) for name, span, _ in hub.requests] == [(name, None) for name in FILES]
    assert not any("python" in agent.lower() for _, _, agent in hub.requests)
    assert_equal(load_checkpoint(data_folder / "weights" / "roberta-base.pt")[0].state_dict(), expected)
    assert sorted(path.name for path in (data_folder / "weights" / "roberta-base").iterdir()) == sorted(FILES)
    run("roberta-base", "--out", data_folder / "again.pt")
    assert len(hub.requests) == 4
    assert (data_folder / "again.pt").exists()
    run("roberta-base", "--export", data_folder / "exported")
    assert same_vocabulary(data_folder / "exported", hub.folder)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "none"])
def test_an_interrupted_download_goes_on_where_it_stopped(ranges, hub, run, data_folder):
    folder = data_folder / "weights" / "roberta-base"
    whole = (hub.folder / "pytorch_model.bin").read_bytes()
    hub.limit, hub.ranges = len(whole) // 3, ranges
    with pytest.raises(Mistake, match="pytorch_model.bin: no download"):
        run("roberta-base")
    done = (folder / "pytorch_model.bin.part").read_bytes()
    assert done == whole[: hub.limit]
    assert not (folder / "pytorch_model.bin").exists()
    assert not (data_folder / "weights" / "roberta-base.pt").exists()
    hub.limit = None
    run("roberta-base")
    assert [name for name, _, _ in hub.requests] == [*FILES, "pytorch_model.bin"]
    assert hub.requests[-1][1] == f"bytes={len(done)}-"
    assert (folder / "pytorch_model.bin").read_bytes() == whole
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("careless", [False, True], ids=["if-range", "careless"])
def test_a_download_does_not_go_on_from_a_part_of_another_file(careless, hub, run, data_folder):
    folder, remote = data_folder / "weights" / "roberta-base", hub.folder / "config.json"
    hub.limit = 40
    with pytest.raises(Mistake, match="config.json: no download"):
        run("roberta-base")
    assert (folder / "config.json.part").read_bytes() == remote.read_bytes()[:40]
    remote.write_text(json.dumps(json.loads(remote.read_text()), indent=7))
    hub.limit, hub.careless = None, careless
    if careless:
        with pytest.raises(Mistake, match="config.json: no download"):
            run("roberta-base")
    run("roberta-base")
    assert (folder / "config.json").read_bytes() == remote.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_a_part_longer_than_the_file_is_given_up(hub, run, data_folder):
    part = data_folder / "weights" / "roberta-base" / "config.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b" " * 10_000)
    with pytest.raises(Mistake, match="config.json: no download"):
        run("roberta-base")
    assert not part.exists()
    run("roberta-base")
    assert (part.parent / "config.json").read_bytes() == (hub.folder / "config.json").read_bytes()


def test_a_server_that_cannot_be_reached(mistake, monkeypatch, data_folder):
    (data_folder / "weights" / "roberta-base").mkdir(parents=True)
    with http.server.HTTPServer(("127.0.0.1", 0), None) as closed:
        monkeypatch.setattr(data.weights.hub, "HUB", f"http://127.0.0.1:{closed.server_port}")
    assert "name the folder of a copy" in mistake("roberta-base")


RAW = {
    "wiki.train.raw": " \n = Valkyria = \n \n A naïve @-@ game , 戦場 . \n\n \t \n Its 3rd line . \n",
    "wiki.valid.raw": " \n = Homarus = \n the last line has no end",
    "wiki.test.raw": " never read \n",
}
SPLIT_LINES = {
    "train": [" = Valkyria = \n", " A naïve @-@ game , 戦場 . \n", " Its 3rd line . \n"],
    "val": [" = Homarus = \n", " the last line has no end"],
}


@pytest.fixture
def raw(tmp_path):
    """A folder of WikiText's raw files, and the zip of it."""
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in RAW.items():
            (folder / name).write_bytes(text.encode())
            archive.write(folder / name, f"wikitext-2-raw/{name}")
    return folder, tmp_path / "raw.zip"


def read_wikitext(run, *arguments, **more):
    run(*arguments, main=wikitext_prepare.main, **more)
    return load_corpus("wikitext2")


def test_wikitext_lines_are_between_roberta_s_own_tokens(raw, originals, run, tmp_path):
    run(originals["roberta"][0], "--out", tmp_path / "roberta.pt")
    states = []
    for path in (*raw, raw[0] / "wiki.train.raw"):
        train, val, tokenizer, meta = read_wikitext(run, "--file", path, "--tokenizer", tmp_path / "roberta.pt")
        for split, ids in (("train", train), ("val", val)):
            lines = SPLIT_LINES[split]
            expected = [[0, *tokenizer.encode(line.rstrip("\n")), 2] for line in lines]
            assert ids.tolist() == sum(expected, [])
            text = "".join(line.rstrip("\n") for line in lines)
            assert meta[split]["bytes"] == len(text.encode())
            assert meta[split]["tokens"] == len(ids)
        states.append((meta["train"], meta["val"], meta["tokenizer"]))
    assert states[0] == states[1] == states[2]


def test_wikitext_lines_of_bytes_end_in_a_newline(raw, run):
    train, val, _, meta = read_wikitext(run, "--file", raw[1])
    for split, ids in (("train", train), ("val", val)):
        text = "".join(SPLIT_LINES[split]).encode()
        assert bytes(ids.tolist()) == text
        assert meta[split]["bytes"] == len(text)


def test_wikitext_is_downloaded_once(raw, hub, run, data_folder):
    shutil.copy(raw[1], hub.folder / "raw.zip")
    url = f"{data.weights.hub.HUB}/FacebookAI/roberta-base/resolve/main/raw.zip"
    digest = hashlib.sha256(raw[1].read_bytes()).hexdigest()
    for _ in range(2):
        train, _, _, _ = read_wikitext(run, url=url, sha256=digest)
        assert bytes(train.tolist()) == "".join(SPLIT_LINES["train"]).encode()
    assert [name for name, _, _ in hub.requests] == ["raw.zip"]
    assert not hub.requests[0][2].startswith("Python")


def test_wikitext_that_cannot_be_read_leaves_nothing(raw, mistake, tmp_path):
    folder, path = raw
    main, whole = wikitext_prepare.main, path.read_bytes()
    assert "no such file or folder" in mistake("--file", tmp_path / "none", main=main)
    path.write_bytes(whole[: len(whole) // 2])
    assert "raw.zip" in mistake("--file", path, main=main)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", RAW["wiki.train.raw"])
    assert "no wiki.valid.raw" in mistake("--file", path, main=main)
    (folder / "wiki.valid.raw").write_bytes(b"caf\xe9\n")
    assert "wiki.valid.raw" in mistake("--file", folder, main=main)
    (folder / "wiki.valid.raw").unlink()
    assert "no wiki.valid.raw" in mistake("--file", folder, main=main)
    (folder / "wiki.valid.raw").write_text(" \n\n")
    assert "empty" in mistake("--file", folder, main=main)


def test_a_line_without_end_is_refused_in_little_memory(mistake, tmp_path):
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wiki.train.raw", "a" * 2**25)  # one line
        archive.writestr("wiki.valid.raw", "b\n")
    assert (tmp_path / "large.zip").stat().st_size < 2**16
    tracemalloc.start()
    try:
        sentence = mistake("--file", tmp_path / "large.zip", main=wikitext_prepare.main)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "a line of 1,048,576 characters or more" in sentence
    assert peak < 2**24


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_with_a_damaged_byte_anywhere_leaves_nothing(compression, mistake, tmp_path):
    text = "".join(f"line {i} of the archive\n" for i in range(30))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name in RAW:
            archive.writestr(name, text)
    start = 30 + len("wiki.train.raw")  # behind the header of the first file
    for offset in (0, 1, 2, 40, 80):
        damaged = bytearray(packed.getvalue())
        damaged[start + offset] ^= 0x55
        (tmp_path / "damaged.zip").write_bytes(damaged)
        assert "damaged" in mistake("--file", tmp_path / "damaged.zip", main=wikitext_prepare.main)
