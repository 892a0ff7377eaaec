"""What every script shares: flags from a dataclass, Ctrl-C, and mistakes told in one sentence."""

import argparse
import dataclasses
import math
import operator
import os
import signal
import sys
import types
from contextlib import contextmanager
from typing import Literal, get_args, get_origin, get_type_hints


class Mistake(ValueError):
    """What the user asked for cannot be done; the message is the sentence that says why."""


# What a bound of flag() demands of a value, and how to say so.
BOUNDS = {
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def flag(default, help, **bounds):
    """A dataclass field that becomes `--name`, with its help text beside its default.

    bounds: `least`, `most` (included), `above`, `below` (not included).
    """
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


def argument(help, default=dataclasses.MISSING):
    """A dataclass field that becomes a positional argument, required unless it has a default."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": {}, "positional": True})


def parse(config_class, description):
    """Read sys.argv into a dict of the fields that were given, typed as config_class annotates them.

    Fields that were not given are left out, so that whoever resumes a run can tell the two apart;
    `config_class(**parse(...))` fills in the defaults.
    """
    parser = Parser(description=description, allow_abbrev=False)
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, text = hints[field.name], field.metadata["help"].replace("%", "%%")
        if isinstance(kind, types.UnionType):  # `int | None`
            kind = get_args(kind)[0]
        options = {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        elif get_origin(kind) is list:
            options = {"type": get_args(kind)[0], "nargs": "+", "action": "extend"}
        text += "" if field.default in (None, (), dataclasses.MISSING) else f" (default: {field.default})"
        if "positional" not in field.metadata:
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **options)
        elif field.default is dataclasses.MISSING:
            parser.add_argument(field.name, help=text, **options)
        else:
            parser.add_argument(field.name, nargs="?", default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args())
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} {value}: must be a finite number")
    for field in dataclasses.fields(config_class):
        for bound, limit in field.metadata["bounds"].items():
            value, (holds, words) = given.get(field.name), BOUNDS[bound]
            if value is not None and not holds(value, limit):
                parser.error(f"--{field.name} {value}: must be {words} {limit}")
    return given


@contextmanager
def ctrl_c():
    """A list that is no longer empty after Ctrl-C, so that the step under way is finished; a second
    Ctrl-C ends the program at once."""
    came = []

    def note(*_):
        came.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def command(main):
    """Call main(). A Mistake, or a refusal of the system such as a full disk, ends the process
    with one sentence on stderr and exit code 2; anything else is a bug and keeps its traceback.
    """
    sys.stdout.reconfigure(errors="replace")  # text that the terminal cannot show must not end a run
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Mistake, OSError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}"
        print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
