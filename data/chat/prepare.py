"""Prompts and answers as a corpus, whose prompts train.py never masks (2502.09992, algorithm 2).

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}

A line of the file is a conversation, this or the list alone. Each of its assistant's messages becomes an
example: the prompt is all that comes before it, however long, and the reply is learned, with its end.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.chat import Chat, template_for
from data.lib.corpus import check_name, tokenizer_and_template, write_tokens
from data.lib.errors import Mistake, command
from data.lib.flags import argument, flag, parse

VAL_SHARE = 0.1


@dataclass
class PrepareConfig:
    path: str = argument("a file of conversations, one a line, as JSON")
    val: str | None = flag(None, "the same to validate with (default: the last tenth of the conversations)")
    name: str | None = flag(None, "folder of data/ to write (default: the name of the path)")
    tokenizer: str = flag("bytes", "bytes, or a checkpoint's path, whose chat template is taken, too")


def conversations(path, chat):
    """The conversations of a file, lists of messages that the Chat can hold. Mistake with the line if not."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line = line.decode().strip()
                if not line:
                    continue
                messages = json.loads(line)
                messages = messages.get("messages") if isinstance(messages, dict) else messages
                chat.check(messages)
                if not any(message["role"] == "assistant" for message in messages):
                    raise Mistake("the assistant says nothing in it")
            except Mistake as mistake:
                raise Mistake(f"{path}:{number}: {mistake}") from None
            except UnicodeDecodeError:
                raise Mistake(f"{path}:{number}: not UTF-8 text") from None
            except (ValueError, RecursionError) as error:
                raise Mistake(f"{path}:{number}: not JSON ({str(error)[:100]})") from None
            yield messages


def examples(split, messages, chat):
    """For each message of the assistant what write_tokens takes: split, ids, bytes of the reply, and how many
    of the ids are prompt.
    """
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, reply = chat.prompt(messages[:i]), message["content"].strip()
            yield split, prompt + chat.reply(reply), len(reply.encode()), len(prompt)


def prepare(path, val, name, tokenizer, template=None):
    """Write the corpus data/NAME; the same as the command."""
    template = template or template_for(tokenizer)
    chat = Chat(template, tokenizer)
    n = sum(1 for _ in conversations(path, chat))
    cut = n - max(1, int(n * VAL_SHARE)) if val is None else n

    def pieces():
        for i, messages in enumerate(conversations(path, chat)):
            yield from examples("train" if i < cut else "val", messages, chat)
        for messages in [] if val is None else conversations(val, chat):
            yield from examples("val", messages, chat)

    return write_tokens(name, pieces(), tokenizer, Path(path).name, template)


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    name = Path(config.path).resolve().stem if config.name is None else config.name
    check_name(name, own="")
    prepare(config.path, config.val, name, *tokenizer_and_template(config.tokenizer))
    command = shlex.join(["python", "train.py", "--data", name, "--out_dir", f"out-{name}"])
    print(f"`{command}` trains on it")


if __name__ == "__main__":
    command(main)
