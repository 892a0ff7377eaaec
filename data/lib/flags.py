"""Command-line flags from a dataclass: each field is a flag, and its annotation says how the flag is read."""

import argparse
import dataclasses
import math
from contextlib import suppress
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from data.lib.errors import Mistake, command

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Span(NamedTuple):
    """A number of tokens, or a range such as `0:64` that includes both ends."""

    low: int
    high: int

    @classmethod
    def from_text(cls, text):
        low, _, high = text.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)):
            raise ValueError(f"{text} is neither a number of tokens such as 16 nor a range such as 0:64")
        return cls(int(low), int(high or low))

    def __str__(self):
        return f"{self.low}:{self.high}" if self.low < self.high else str(self.low)


class Level(NamedTuple):
    """How noise levels are drawn: `uniform`, `bell:S`, `grid:N`, or a number, which is called `fixed`."""

    kind: str
    value: float = 0.0

    @classmethod
    def from_text(cls, text):
        kind, _, value = text.partition(":")
        with suppress(ValueError):
            if text == "uniform":
                return cls("uniform")
            if kind == "bell" and 0 < float(value) < math.inf:
                return cls("bell", float(value))
            if kind == "grid" and 1 <= int(value) <= 2**20:
                return cls("grid", int(value))
            if kind == text and 0 < float(text) <= 1:
                return cls("fixed", float(text))
        raise ValueError(f"{text} is none of uniform, bell:S with S > 0, grid:N with N >= 1, a number in (0, 1]")

    def __str__(self):
        return {"uniform": "uniform", "fixed": str(self.value)}.get(self.kind, f"{self.kind}:{self.value}")


class Rate(NamedTuple):
    """A token's masking rate at level t: `t`, `slant:W` by its position, or `spindle:W` by its information."""

    kind: str
    value: float = 0.0

    @classmethod
    def from_text(cls, text):
        kind, _, value = text.partition(":")
        with suppress(ValueError):
            if text == "t" or (kind in ("slant", "spindle") and 0 < float(value) < math.inf):
                return cls(kind, float(value or 0))
        raise ValueError(f"{text} is none of t, slant:W or spindle:W, where W > 0")

    def __str__(self):
        return "t" if self.kind == "t" else f"{self.kind}:{self.value:g}"


class Attention(NamedTuple):
    """Who sees whom: `canvas`, `shifted`, `block:K` or `causal`, whose K is 1. model.py says what they mean."""

    kind: str
    K: int | None = None

    @classmethod
    def from_text(cls, text):
        kind, _, K = text.partition(":")
        if kind == "block" and K.isdecimal() and int(K) > 0:
            return cls(kind, int(K))
        if text in ("canvas", "shifted", "causal"):
            return cls(kind, 1 if kind == "causal" else None)
        raise ValueError(f"{text} is none of canvas, shifted, causal, or block:K for blocks of K tokens")

    def __str__(self):
        return f"block:{self.K}" if self.kind == "block" else self.kind


def flag(default, help, **bounds):
    """A dataclass field that becomes `--name`. bounds: least, most, above, below; see within."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


def argument(help, default=dataclasses.MISSING):
    """A dataclass field that becomes a positional argument, which is required unless it has a default."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": {}, "positional": True})


def within(value, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """Whether a number is finite and in its bounds; `least` and `most` are included."""
    return least <= value <= most and above < value < below


def reader(kind, bounds):
    """The function that argparse calls to read a flag of this kind."""
    words = {"least": "at least", "most": "at most"}

    def read(text):
        try:
            value = getattr(kind, "from_text", kind)(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if kind in (int, float) and not within(value, **bounds):
            limits = [f"{words.get(name, name)} {limit}" for name, limit in bounds.items()]
            raise argparse.ArgumentTypeError(f"must be {' and '.join(limits) or 'finite'}, not {value}")
        return value

    return read


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(f"{message.removeprefix('argument ')} (--help lists every flag)")


def parse(config_class, description=None, words=None):
    """Read words, by default sys.argv, into a dict of the fields that were given, typed as config_class annotates them.

    Fields that were not given are left out, so `config_class(**parse(...))` fills in the defaults, and a resumed run
    can tell which flags are new. A class with a method `from_text` is read by that. Mistake if a flag is wrong.
    """
    parser, hints = Parser(description=description, allow_abbrev=False), get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, kind, default, options = f"--{field.name}", hints[field.name], field.default, {}
        if "positional" in field.metadata:
            name, options = field.name, {} if default is dataclasses.MISSING else {"nargs": "?", "default": default}
        if get_origin(kind) is list:
            kind, default, options = get_args(kind)[0], " ".join(default), {"nargs": "+", "action": "extend"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:  # of `int | None` the int
            options["type"] = reader((*get_args(kind), kind)[0], field.metadata["bounds"])
        shown = "" if field.default in (None, (), dataclasses.MISSING) else f" (default: {default})"
        options["help"] = field.metadata["help"].replace("%", "%%") + shown
        parser.add_argument(name, **{"default": argparse.SUPPRESS, **options})
    return vars(parser.parse_args(words))


def as_plain(config):
    """The fields of a config as a dict of numbers and strings, which a checkpoint can hold."""
    plain = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(config).items()}


def from_plain(config_class, plain):
    """Turn what as_plain returned back into a config. Mistake if a flag in it is unknown, or has a wrong value."""
    words = []
    for name, value in plain.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return config_class(**parse(config_class, words=words))


def script(main):
    """Decorate the main function of a script, whose parameters, with flags and arguments as defaults, are in sys.argv.

    If the file is run as a script, main is called here, so it stands last.
    """
    fields = [(*hint, default) for hint, default in zip(get_type_hints(main).items(), main.__defaults__)]
    config_class = dataclasses.make_dataclass("Config", fields)
    description = main.__globals__["__doc__"].splitlines()[0]

    def run():
        main(**vars(config_class(**parse(config_class, description))))

    if main.__module__ == "__main__":
        command(run)
    return run
