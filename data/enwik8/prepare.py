"""enwik8: the first 100 million bytes of Wikipedia, markup and all, cut as text8 is (its script says how)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.errors import command
from data.text8.prepare import main

URL = "https://mattmahoney.net/dc/enwik8.zip"
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"  # of the text in it

if __name__ == "__main__":
    command(lambda: main("enwik8", URL, ZIP_SHA256, SHA256, description=__doc__))
