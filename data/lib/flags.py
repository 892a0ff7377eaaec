"""Flags from a dataclass: its fields are the flags, its annotations say how they are read."""

import argparse
import dataclasses
import math
import operator
import types
from contextlib import suppress
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# What a bound of flag() demands of a value, and how to say so.
BOUNDS = {
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


class Span(NamedTuple):
    """A number of tokens, or a range of them such as `0:64`, both ends included."""

    low: int
    high: int

    @classmethod
    def from_text(cls, text):
        low, _, high = text.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)):
            raise ValueError("a number of tokens such as 16, or a range such as 0:64")
        return cls(int(low), int(high or low))

    def __str__(self):
        return f"{self.low}:{self.high}" if self.low < self.high else str(self.low)


class Level(NamedTuple):
    """How noise levels are drawn: `uniform`, `bell:S`, `grid:N`, or a number, which is kind `fixed`."""

    kind: str
    value: float = 0.0

    @classmethod
    def from_text(cls, text):
        kind, colon, value = text.partition(":")
        if not colon and kind != "uniform":
            kind, value = "fixed", text
        try:
            value = int(value) if kind == "grid" else float(value or 0)
            limits = {"uniform": not colon, "bell": 0 < value < math.inf, "grid": 1 <= value <= 2**20}
            fits = {**limits, "fixed": 0 < value <= 1 and not colon}[kind]
        except (ValueError, KeyError):
            fits = False
        if not fits:
            raise ValueError("uniform, bell:S, grid:N or a number in (0, 1]; S > 0, N >= 1, at most 2**20")
        return cls(kind, value)

    def __str__(self):
        return {"uniform": "uniform", "fixed": str(self.value)}.get(self.kind, f"{self.kind}:{self.value}")


class Rate(NamedTuple):
    """The masking rate of a token at level t: `t`, `slant:W` by its position, or `spindle:W` by its
    information.
    """

    kind: str
    value: float = 0.0

    @classmethod
    def from_text(cls, text):
        kind, colon, value = text.partition(":")
        with suppress(ValueError):
            if (kind == "t" and not colon) or (kind in ("slant", "spindle") and 0 < float(value) < math.inf):
                return cls(kind, float(value or 0))
        raise ValueError("t, slant:W or spindle:W, where W > 0")

    def __str__(self):
        return "t" if self.kind == "t" else f"{self.kind}:{self.value:g}"


class Attention(NamedTuple):
    """Who sees whom. `canvas`: all see all. `shifted`: the same, and a position reads the token before its
    own. `block:K`: each token sees its block of K and those before it. `causal`: each sees what stands before
    it.
    """

    kind: str
    K: int | None = None

    @classmethod
    def from_text(cls, text):
        kind, colon, K = text.partition(":")
        if kind == "block" and K.isdecimal() and int(K) > 0:
            return cls(kind, int(K))
        if kind in ("canvas", "shifted", "causal") and not colon:
            return cls(kind, 1 if kind == "causal" else None)
        raise ValueError("canvas, shifted, block:K for blocks of K tokens, or causal")

    def __str__(self):
        return f"block:{self.K}" if self.kind == "block" else self.kind


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
    `config_class(**parse(...))` fills in the defaults. An annotation with a method `from_text` reads
    its value by that; its ValueError says what was expected.
    """
    parser = Parser(description=description, allow_abbrev=False)
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, text = hints[field.name], field.metadata["help"].replace("%", "%%")
        if isinstance(kind, types.UnionType):  # `int | None`
            kind = get_args(kind)[0]
        several, default = get_origin(kind) is list, field.default
        if several:
            kind, default = get_args(kind)[0], " ".join(default)
        options = {"type": str if hasattr(kind, "from_text") else kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        if several:
            options |= {"nargs": "+", "action": "extend"}
        text += "" if field.default in (None, (), dataclasses.MISSING) else f" (default: {default})"
        if "positional" not in field.metadata:
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **options)
        elif field.default is dataclasses.MISSING:
            parser.add_argument(field.name, help=text, **options)
        else:
            parser.add_argument(field.name, nargs="?", default=field.default, help=text, **options)
    given = vars(parser.parse_args())
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} {value}: must be a finite number")
    try:
        check_bounds(config_class, given)
    except ValueError as error:
        parser.error(str(error))
    for name, value in given.items():
        if hasattr(hints[name], "from_text"):
            try:
                given[name] = hints[name].from_text(value)
            except ValueError as error:
                parser.error(f"--{name} {value}: {error}")
    return given


def check_bounds(config_class, given):
    """Raise ValueError for the first value that is out of its field's bounds."""
    for field in dataclasses.fields(config_class):
        for bound, limit in field.metadata["bounds"].items():
            value, (holds, words) = given.get(field.name), BOUNDS[bound]
            if value is not None and not holds(value, limit):
                raise ValueError(f"--{field.name} {value}: must be {words} {limit}")


def fits(kind, value):
    """Whether a value is one that a field with this annotation may have."""
    if get_origin(kind) in (types.UnionType, Literal):
        return any(fits(each, value) if isinstance(each, type) else each == value for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(fits(get_args(kind)[0], each) for each in value)
    return type(value) is kind or (kind is float and type(value) is int)


def as_plain(config):
    """The fields of a config as a dict of numbers and strings, which a checkpoint can hold."""
    plain = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(config).items()}


def from_plain(config_class, fields):
    """The inverse of as_plain. TypeError for a field that is not there, ValueError for a value."""
    hints, values = get_type_hints(config_class), {}
    for name, value in fields.items():
        kind = hints.get(name)
        values[name] = kind.from_text(value) if hasattr(kind, "from_text") else value
        if kind is not None and not fits(kind, values[name]):
            raise ValueError(f"its --{name} is no value for that")
    check_bounds(config_class, values)
    return config_class(**values)
