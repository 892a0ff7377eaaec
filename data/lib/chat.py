"""Turns a conversation into tokens with a template: three strings that are stored in checkpoints and corpora.

`opening` comes first. `turn` has {role}, {content}, and something that closes the turn. `end` is one token, which fills
the canvas after a reply. A template refers to special tokens by name; inside a message the same name is plain text.
"""

import itertools
import re
import sys

from data.lib.errors import Mistake

# ASCII has control characters for this: start of heading, start of text, end of text.
BYTES = {"opening": "", "turn": "\x01{role}\x02{content}\x03", "end": "\x03"}


def template_for(tokenizer):
    """A template for a tokenizer that comes without one."""
    if tokenizer.state["kind"] == "bytes":
        return BYTES
    ends = [name for name in ("<|endoftext|>", "</s>", "[SEP]") if name in tokenizer.special]
    if not ends:
        raise Mistake("the tokenizer has no token that ends a text, such as <|endoftext|>, </s> or [SEP]")
    opening = next((name for name, i in tokenizer.special.items() if i == tokenizer.bos_id), "")
    return {"opening": opening, "turn": "{role}: {content}" + ends[0], "end": ends[0]}


class Chat:
    """A template with its tokenizer. end_id fills the canvas after a reply; nothing after one of end_ids is shown."""

    def __init__(self, template, tokenizer):
        if template is None:
            raise Mistake("the model has no chat template; data/chat/prepare.py makes a corpus that teaches it one")
        self.tokenizer = tokenizer
        names = sorted(tokenizer.special, key=len, reverse=True)  # if one is a prefix of another, the longer matches
        self.special = re.compile(f"({'|'.join(map(re.escape, names))})")
        try:
            head, closing = template["turn"].split("{content}")
            before, after = head.split("{role}")
            self.opening, self.before, self.after = map(self.cut, (template["opening"], before, after))
            self.closing, (self.end_id,) = self.cut(closing), self.encode(self.cut(template["end"]))
            self.reserved = {c for c in "".join(template.values()) if c < " " and c not in "\n\r\t"}
            if not closing or tokenizer.mask_id in (self.end_id, *self.prompt([]), *self.reply("")):
                raise ValueError("nothing closes a turn, or there is a <mask>")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            needed = "{role}, {content} and a closing text in a turn, and one token as the end"
            raise Mistake(f"the chat template doesn't fit its tokenizer; it needs {needed} ({error})") from None
        self.end_ids = {self.end_id, *(part for part in self.closing[:1] if isinstance(part, int))}

    def cut(self, text):
        """Split a text of the template into texts and the ids of special tokens."""
        return [self.tokenizer.special.get(part, part) for part in self.special.split(text) if part]

    def encode(self, parts, begins=True):
        """Encode a list of strings and ids as a list of ids. Texts side by side are encoded as one.

        begins: whether the first text begins one, or goes on with what stands before it.
        """
        ids = []
        for kind, group in itertools.groupby(parts, type):
            encode = self.tokenizer.encode if begins or ids else self.tokenizer.encode_rest
            ids += encode("".join(group)) if kind is str else group
        return ids

    def check(self, messages):
        """Raise Mistake unless this is a list of messages that the template can hold."""
        try:
            for role, content in [(message["role"], message["content"]) for message in messages]:
                if role not in ("system", "user", "assistant"):
                    raise ValueError(f"the role {role!r} is none of system, user, assistant")
                content.encode()  # raises unless it is a str that UTF-8 can encode
                if reserved := self.reserved.intersection(content):
                    raise ValueError(f"the content has {min(reserved)!r}, which the template takes for itself")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Mistake(f'not a list of messages like {{"role": "user", "content": ".."}}: {error}') from None

    def prompt(self, messages):
        """The ids of messages, and of the beginning of the reply."""
        parts = [*self.opening]
        for message in messages:
            parts += [*self.before, message["role"], *self.after, message["content"].strip(), *self.closing]
        return self.encode([*parts, *self.before, "assistant", *self.after])

    def reply(self, content):
        """The ids of a reply and of the end of its turn."""
        return self.encode([content.strip(), *self.closing], begins=False)

    def canvas(self, messages, length):
        """Return the canvas for a reply to messages, `length` ids: the prompt's, then holes.

        The first turns are dropped until a quarter of the canvas is free for the reply, but never the last turn.
        """
        self.check(messages)
        ids, turns = self.prompt(messages), [i for i, message in enumerate(messages) if message["role"] == "user"]
        system = [message for message in messages[:1] if message["role"] == "system"]
        for i in turns[1:]:
            if len(ids) > length * 3 // 4:
                ids = self.prompt(system + messages[i:])
        if len(ids) >= length:
            raise Mistake(f"--chat: a conversation of {len(ids)} tokens; the canvas has {length} (--length)")
        return ids + [self.tokenizer.mask_id] * (length - len(ids))


def converse(chat, answer):
    """Hold a conversation: each line of stdin is a user's turn, and answer(messages) returns the reply, a text."""
    messages, is_terminal = [], sys.stdin.isatty()
    print("> " * is_terminal, end="", file=sys.stderr, flush=True)
    for line in sys.stdin.buffer:
        if content := line.decode(errors="replace").strip():
            messages.append({"role": "user", "content": content})
            reply = "".join(c for c in answer(messages) if c not in chat.reserved)
            messages.append({"role": "assistant", "content": reply})
        print("> " * is_terminal, end="", file=sys.stderr, flush=True)
    print("\n" * is_terminal, end="", file=sys.stderr)
