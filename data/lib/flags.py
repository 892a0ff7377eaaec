"""Command-line flags from a dataclass: each field is a flag, and its annotation says how the flag is read."""

import argparse
import dataclasses
import difflib
import math
from contextlib import suppress
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from data.lib.errors import Mistake, command

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def number(kind, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """A function for argparse that reads a finite int or float within bounds, which include `least` and `most`."""
    bounds = {"at least": least, "at most": most, "above": above, "below": below}
    wanted = ["an integer" if kind is int else "a finite number"]
    wanted += [f"{words} {bound}" for words, bound in bounds.items() if abs(bound) < math.inf]

    def read(text):
        with suppress(ValueError):
            value = kind(text)
            if least <= value <= most and above < value < below:
                return value
        raise argparse.ArgumentTypeError(f"must be {', '.join(wanted)}, not {text}")

    return read


class Choice(NamedTuple):
    """A value written `kind` or `kind:number`. A subclass lists its kinds, each with its number's reader or None."""

    kind: str
    value: float | None = None

    @classmethod
    def from_text(cls, text):
        kind, _, value = text.partition(":")
        if kind not in cls.kinds:
            kind, value = "fixed", text  # a number alone
        with suppress(LookupError, argparse.ArgumentTypeError):
            read = cls.kinds[kind]
            if read or not value:
                return cls(kind, read and read(value))
        raise argparse.ArgumentTypeError(f"{text} is none of {cls.wanted}")

    def __str__(self):
        text = self.kind if self.value is None else f"{self.kind}:{self.value}"
        return text.removeprefix("fixed:").removesuffix(".0")


class Level(Choice):
    """How noise levels are drawn."""

    kinds = {"uniform": None, "bell": number(float, above=0), "grid": number(int, least=1, most=2**20)}
    kinds |= {"fixed": number(float, above=0, most=1)}
    wanted = "uniform, bell:S with S > 0, grid:N with N >= 1, a number in (0, 1]"


class Rate(Choice):
    """A token's masking rate at level t: t itself, slanted by its position, or spindled by its information."""

    kinds = {"t": None, "slant": number(float, above=0), "spindle": number(float, above=0)}
    wanted = "t, slant:W or spindle:W, where W > 0"


class Attention(Choice):
    """Who sees whom. model.py says what the kinds mean."""

    kinds = dict.fromkeys(("canvas", "shifted", "causal")) | dict.fromkeys(("block", "draft"), number(int, least=1))
    wanted = "canvas, shifted, causal, block:K for blocks of K tokens, or draft:K for a GPT that drafts K tokens"

    @property
    def K(self):
        return 1 if self.kind in ("causal", "draft") else self.value


class Span(NamedTuple):
    """A number of tokens, or a range such as `0:64` that includes both ends."""

    low: int
    high: int

    @classmethod
    def from_text(cls, text):
        low, _, high = text.partition(":")
        with suppress(ValueError):
            if 0 <= int(low) <= int(high or low):
                return cls(int(low), int(high or low))
        raise argparse.ArgumentTypeError(f"{text} is neither a number of tokens such as 16 nor a range such as 0:64")

    def __str__(self):
        return f"{self.low}:{self.high}" if self.low < self.high else str(self.low)


def flag(default, help, **bounds):
    """A dataclass field that becomes `--name`. bounds: those of `number`."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


def argument(help, default=dataclasses.MISSING):
    """A dataclass field that becomes a positional argument, which is required unless it has a default."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": {}, "positional": True})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        hint = "--help lists every flag"
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        if near := difflib.get_close_matches(unknown, self._option_string_actions, 1):
            hint = f"did you mean {near[0]}?"
        elif unknown and not unknown.startswith("-") and "--prompt" in self._option_string_actions:
            hint = f'did you mean --prompt "{unknown}"?'
        raise Mistake(f"{message.removeprefix('argument ')} ({hint})")


def parse(config_class, doc="", words=None):
    """Read words, by default sys.argv, into a dict of the fields that were given. Mistake if a flag is wrong.

    `config_class(**parse(config_class))` fills in the defaults, and a resumed run can tell which flags are new.
    doc: the script's docstring; --help shows its first line and its examples. A class may have `groups`, the titles
    under which --help lists the flags from a certain one on.
    """
    examples = "\n".join(line for line in doc.splitlines() if line.startswith("    python "))
    description = "\n\n".join(part for part in (doc.partition("\n")[0], examples) if part)
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, usage=argparse.SUPPRESS, formatter_class=layout, allow_abbrev=False)
    group, hints = parser, get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in getattr(config_class, "groups", {}):
            group = parser.add_argument_group(config_class.groups[field.name])
        name, kind, default, options, shown = f"--{field.name}", hints[field.name], field.default, {}, ""
        if type(None) in get_args(kind):  # int | None
            kind = get_args(kind)[0]
        if "positional" in field.metadata:
            name, options = field.name, {} if default is dataclasses.MISSING else {"nargs": "?", "default": default}
        if get_origin(kind) is list:
            kind, default, options = get_args(kind)[0], " ".join(default), {"nargs": "+", "action": "extend"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options |= {"choices": get_args(kind), "metavar": field.name.upper()}
            shown = f": {', '.join(get_args(kind))}"
        elif kind in (int, float):
            options["type"] = number(kind, **field.metadata["bounds"])
        else:
            options["type"] = getattr(kind, "from_text", kind)
        if field.default is not False and field.default not in (None, (), "", dataclasses.MISSING):
            shown += f" (default: {default})"
        group.add_argument(name, help=field.metadata["help"] + shown, **{"default": argparse.SUPPRESS, **options})
    return vars(parser.parse_args(words))


def as_plain(config):
    """The fields of a config as a dict of numbers and strings, which a checkpoint can hold."""
    return {name: str(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}


def from_plain(config_class, plain):
    """Turn what as_plain returned back into a config. Mistake if a flag in it is unknown, or has a wrong value."""
    words = [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in plain.items()
        if value is not None
    ]
    return config_class(**parse(config_class, words=words))


def script(main):
    """Decorate a script's main function: its parameters, whose defaults are flags or arguments, come from sys.argv.

    If the file is run as a script, this calls main, so main has to be the last thing in the file.
    """
    fields = [(*hint, default) for hint, default in zip(get_type_hints(main).items(), main.__defaults__)]
    config_class = dataclasses.make_dataclass("Config", fields)

    def run():
        main(**vars(config_class(**parse(config_class, main.__globals__["__doc__"]))))

    if main.__module__ == "__main__":
        command(run)
    return run
