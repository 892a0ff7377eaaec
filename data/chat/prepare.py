"""Prompts and replies as a corpus. train.py never masks the prompts (2502.09992, algorithm 2).

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}

Each line of the file is a conversation like this, or only its list. Every message of the assistant becomes an example:
everything before it is the prompt, and the model learns the reply and its end.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.chat import Chat, template_for
from data.lib.corpus import check_name, tokenizer_by_name, write_tokens
from data.lib.errors import Mistake, command
from data.lib.flags import argument, flag, parse


@dataclass
class PrepareConfig:
    path: str = argument("a file of conversations, one a line, as JSON")
    val: str | None = flag(None, "the same to validate with (default: the last tenth of the conversations)")
    name: str | None = flag(None, "folder of data/ to write (default: the name of the path)")
    tokenizer: str = flag("bytes", "bytes, or a checkpoint's path, whose chat template is taken, too")


def conversations(path, chat):
    """Yield the conversations of a file, each a list of messages. The Mistake for a bad one has its line number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                messages = json.loads(line)
                messages = messages.get("messages") if isinstance(messages, dict) else messages
                chat.check(messages)
                if not any(message["role"] == "assistant" for message in messages):
                    raise Mistake("the assistant says nothing in it")
            except (ValueError, RecursionError) as error:  # a Mistake is a ValueError
                raise Mistake(f"{path}:{number}: not a conversation ({str(error)[:200]})") from None
            yield messages


def examples(split, messages, chat):
    """Yield what write_tokens takes for each reply: split, ids, bytes of the reply, length of the prompt."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, reply = chat.prompt(messages[:i]), message["content"].strip()
            yield split, prompt + chat.reply(reply), len(reply.encode()), len(prompt)


def prepare(path, val, name, tokenizer):
    """Write the corpus data/NAME from the conversations in path, and those in val if it isn't None."""
    template = tokenizer.template or template_for(tokenizer)
    chat = Chat(template, tokenizer)
    n = sum(1 for _ in conversations(path, chat))
    n_train = n - max(1, n // 10) if val is None else n

    def pieces():
        for i, messages in enumerate(conversations(path, chat)):
            yield from examples("train" if i < n_train else "val", messages, chat)
        for messages in [] if val is None else conversations(val, chat):
            yield from examples("val", messages, chat)

    return write_tokens(name, pieces(), tokenizer, Path(path).name, template)


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    name = Path(config.path).resolve().stem if config.name is None else config.name
    check_name(name, own="")
    prepare(config.path, config.val, name, tokenizer_by_name(config.tokenizer))
    print(f"`python train.py --data {shlex.quote(name)} --out_dir {shlex.quote(f'out-{name}')}` trains on it")


if __name__ == "__main__":
    command(main)
