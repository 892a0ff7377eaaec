"""Prompts and replies as a corpus. train.py never masks the prompts (2502.09992, algorithm 2).

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}

Each line is a conversation like this, or just its list of messages. Each reply is an example, prompted by everything
before it.
"""

import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.chat import Chat, template_for
from data.lib.corpus import check_name, tokenizer_by_name, write_tokens
from data.lib.errors import Mistake
from data.lib.flags import argument, flag, script


def conversations(path, chat):
    """Yield the conversations of a file, each a list of messages. A bad one raises Mistake with its line number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    messages = json.loads(line)
                    messages = messages.get("messages") if isinstance(messages, dict) else messages
                    chat.check(messages)
                except (ValueError, RecursionError) as error:  # a Mistake is a ValueError
                    raise Mistake(f"{path}:{number}: not a conversation ({str(error)[:200]})") from None
                yield messages


def prepare(path, val, name, tokenizer):
    """Write the corpus data/NAME from the conversations in path, and those in val if it isn't None."""
    template = tokenizer.template or template_for(tokenizer)
    chat = Chat(template, tokenizer)
    n = sum(1 for _ in conversations(path, chat))
    n_train = n if val else n - max(1, n // 10)

    def examples():
        for i, messages in enumerate(m for file in (path, val) if file for m in conversations(file, chat)):
            for j, message in enumerate(messages):
                if message["role"] == "assistant":
                    prompt, reply = chat.prompt(messages[:j]), message["content"].strip()
                    split = "train" if i < n_train else "val"
                    yield split, prompt + chat.reply(reply), len(reply.encode()), len(prompt)

    return write_tokens(name, examples(), tokenizer, Path(path).name, template)


@script
def main(
    path: str = argument("a file of conversations, one a line, as JSON"),
    val: str | None = flag(None, "the same to validate with (default: the last tenth of the conversations)"),
    name: str | None = flag(None, "folder of data/ to write (default: the name of the path)"),
    tokenizer: str = flag("bytes", "bytes, or a checkpoint's path, whose chat template is taken, too"),
):
    name = name or Path(path).resolve().stem
    check_name(name)
    prepare(path, val, name, tokenizer_by_name(tokenizer))
    print(f"`python train.py --data {shlex.quote(name)} --out_dir {shlex.quote(f'out-{name}')}` trains on it")
