"""WikiText-103, raw (1609.07843): as WikiText-2, with 50 times the articles and the same validation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.errors import command
from data.wikitext2.prepare import main

URL = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"
SHA256 = "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"

if __name__ == "__main__":
    command(lambda: main("wikitext103", URL, SHA256, __doc__))
