"""Makes text safe to show: nothing in it moves the cursor, colours the terminal or reverses the text beside it."""

import unicodedata

# A control character becomes its picture (`␛` for an escape); a character that sets the text direction becomes U+FFFD.
SUBSTITUTES = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"} | {127: "␡"}
SUBSTITUTES |= dict.fromkeys([*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
SUBSTITUTES |= dict.fromkeys([0x200E, 0x200F, 0x61C], "\ufffd")


def inert(text):
    """Replace every character that has an effect, keeping the text's length."""
    text = text.translate(SUBSTITUTES)
    return "".join(c if unicodedata.category(c) not in ("Cs", "Cn", "Zl", "Zp") else "\ufffd" for c in text)
