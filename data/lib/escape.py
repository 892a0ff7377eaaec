"""Text that is safe to show: no character in it moves the cursor, colours the terminal or turns text around."""

import unicodedata

# Pictures of the control characters (`␛` for an escape), and of what turns around the text beside it.
PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: "␡"}


PICTURES |= dict.fromkeys(
    [*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C], "\ufffd"
)


def inert(text):
    """The text with a picture in place of every character that does something."""
    text = text.translate(PICTURES)
    return "".join(c if unicodedata.category(c) not in ("Cs", "Cn", "Zl", "Zp") else "\ufffd" for c in text)
