"""Conversations as tokens: lists of messages, `{"role": "user", "content": "Hello"}`, by a template.

A template is plain data, three texts that a checkpoint and a corpus carry:

    opening   stands before the first turn
    turn      has {role} and then {content}; what comes after that closes a turn
    end       is one token: it fills what a reply leaves of its canvas, and is learned

In them the names of the tokenizer's special tokens stand for these. In a message they are text: the template
is cut at them before content is put in.
"""

import itertools
import re
import sys

from data.lib.errors import Mistake

ROLES = "system", "user", "assistant"
# Control characters that ASCII has for this: a heading starts (SOH), a text starts (STX) and ends (ETX).
BYTES = {"opening": "", "turn": "\x01{role}\x02{content}\x03", "end": "\x03"}
ENDS = "<|endoftext|>", "</s>", "[SEP]"  # what ends a turn in a vocabulary that has no template of its own


def template_for(tokenizer):
    """The template for a tokenizer that has none of its own."""
    if tokenizer.state["kind"] == "bytes":
        return BYTES
    end = next((name for name in ENDS if name in tokenizer.special), None)
    if end is None:
        raise Mistake(f"the tokenizer has no token that ends a text, which would be one of {', '.join(ENDS)}")
    opening = next((name for name, i in tokenizer.special.items() if i == tokenizer.bos_id), "")
    return {"opening": opening, "turn": "{role}: {content}" + end, "end": end}


class Chat:
    """A template and its tokenizer. end_ids: end_id, the end's, and a special token's that closes turns."""

    def __init__(self, template, tokenizer):
        """Mistake if it is no template, or not one for this tokenizer."""
        self.tokenizer = tokenizer
        try:
            names = sorted(filter(None, tokenizer.special), key=len, reverse=True)  # of two the longer
            self.names = re.compile(f"({'|'.join(map(re.escape, names))})")
            self.parse(**template)
        except (TypeError, AttributeError, ValueError) as error:
            raise Mistake(f"the chat template is not one of this tokenizer's ({str(error)[:200]})") from None

    def parse(self, opening, turn, end):
        whole, (head, _, closing) = self.cut(turn), turn.partition("{content}")
        for field in ("{role}", "{content}"):
            if turn.count(field) != 1 or sum(field in part for part in whole if type(part) is str) != 1:
                raise ValueError(f"its turn has {field} once, and no token in that")
        if "{role}" not in head or not closing:
            raise ValueError("its turn has {role} before {content}, and what closes it after that")
        self.opening, self.head, self.closing = self.cut(opening), self.cut(head), self.cut(closing)
        ids = self.encode(self.cut(end))
        if len(ids) != 1 or self.tokenizer.mask_id in (*ids, *self.opening, *whole):
            raise ValueError("its end is one token, and no part of it is <mask>")
        (self.end_id,) = ids
        self.end_ids = {self.end_id, *(part for part in self.closing[:1] if type(part) is int)}
        self.reserved = {c for c in opening + turn + end if c < " " and c not in "\n\r\t"}
        self.prompt([]), self.reply("")  # what cannot be encoded is found now

    def cut(self, text):
        """Its parts: texts, and the ids of the special tokens that stand between them."""
        parts = enumerate(self.names.split(text))  # every second one is a name
        return [self.tokenizer.special[part] if i % 2 else part for i, part in parts if part]

    def encode(self, parts):
        """The ids of parts; texts that touch are encoded as one."""
        ids = []
        for kind, group in itertools.groupby(parts, type):
            ids += self.tokenizer.encode("".join(group)) if kind is str else group
        return ids

    def begin(self, role):
        """The parts of a turn up to its content."""
        return [part.replace("{role}", role) if type(part) is str else part for part in self.head]

    def check(self, messages):
        """Raise Mistake unless these are messages that the template can hold."""
        if not isinstance(messages, list):
            raise Mistake("a conversation is a list of messages")
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= {*message}:
                raise Mistake('a message is {"role": .., "content": ..}')
            if message["role"] not in ROLES:
                raise Mistake(f"the role {str(message['role'])[:40]!r} is none of {', '.join(ROLES)}")
            if type(message["content"]) is not str or re.search("[\ud800-\udfff]", message["content"]):
                raise Mistake("the content of a message is no text")
            if reserved := self.reserved.intersection(message["content"]):
                raise Mistake(f"the content has {min(reserved)!r}, which the template takes for itself")

    def prompt(self, messages):
        """The ids of messages, and of the beginning of the reply's turn."""
        parts = list(self.opening)
        for message in messages:
            parts += [*self.begin(message["role"]), message["content"].strip(), *self.closing]
        return self.encode([*parts, *self.begin("assistant")])

    def reply(self, content):
        """The ids of what follows the prompt: a reply, and what closes its turn."""
        return self.encode([content.strip(), *self.closing])

    def canvas(self, messages, length):
        """The canvas, a list of `length` ids, of the reply to messages: the prompt, and holes."""
        self.check(messages)
        ids = self.prompt(messages)
        if len(ids) >= length:
            raise Mistake(f"--chat: a conversation of {len(ids)} tokens; the canvas has {length} (--length)")
        return ids + [self.tokenizer.mask_id] * (length - len(ids))


def chat_of(path, checkpoint, tokenizer):
    """The Chat of a checkpoint that has been read from path."""
    if checkpoint.get("chat") is None:
        raise Mistake(
            f"--chat: the model in {path} has no chat template; data/chat/prepare.py makes a corpus of "
            "prompts and answers, and `train.py --init_from` teaches it that one's"
        )
    try:
        return Chat(checkpoint["chat"], tokenizer)
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from None


def reply_length(checkpoint, W):
    """Tokens of a prompt with its reply: those that a model was trained with, or else the W that it sees."""
    trained = checkpoint.get("train")
    length = trained.get("context") if isinstance(trained, dict) else None
    return length if type(length) is int and 0 < length < W else W


def converse(chat, answer):
    """A conversation on stdin: each line is a user's turn, and answer(messages) -> text the reply to it."""
    messages, asks = [], sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            break
        try:
            content = line.decode().strip()
        except UnicodeDecodeError:
            raise Mistake("--chat: stdin is not UTF-8") from None
        if content:
            messages.append({"role": "user", "content": content})
            reply = "".join(c for c in answer(messages) if c not in chat.reserved)
            messages.append({"role": "assistant", "content": reply})
    if asks:
        print(file=sys.stderr)
