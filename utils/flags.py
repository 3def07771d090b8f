"""Parts of a command line that argparse lacks: faults in one line, honest booleans, checked
numbers."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text that does not tell it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help and "(default" in action.help
        return action.help if told else super()._get_help_string(action)


class BooleanFlag(argparse.Action):
    """`--flag`, `--no-flag`, `--flag=True`, `--flag=False`: unlike type=bool, False is false."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        negated = {f"--no-{name[2:]}" for name in option_strings}
        negated |= {name.replace("_", "-") for name in negated}
        self.negated = negated
        super().__init__([*option_strings, *sorted(negated)], dest, nargs="?", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001
        word = "true" if values is None else str(values).lower()
        if option_string in self.negated:
            if values is not None:
                parser.error(f"{option_string}={values}: takes no value")
            word = "false"
        if word not in ("true", "false", "1", "0", "yes", "no"):
            parser.error(f"{option_string}={values}: must be True or False")
        setattr(namespace, self.dest, word in ("true", "1", "yes"))


def number(
    kind: Callable[[str], float], low: float, strict: bool = False, high: float = math.inf
) -> Callable[[str], float]:
    """A type for argparse: int or float, not below `low` (above it if strict), at most `high`."""
    above = f"above {low:g}" if strict else f"at least {low:g}"
    allowed = f"a {'whole' if kind is int else 'finite'} number {above}"
    allowed += "" if high == math.inf else f" and at most {high:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be {allowed}") from None
        if not (low < value if strict else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be {allowed}")
        return value

    return parse


def power_of_two(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 2 <= value <= 65536 or value & (value - 1):
        raise argparse.ArgumentTypeError(
            f"{text}: must be a power of two from 2 to 65536 (a codeword number is stored in "
            "log2(K) whole bits)"
        )
    return value


def is_file(name: str) -> bool:
    """Whether what names a network is a file or a folder, and not the network's own name."""
    return "/" in name or name.endswith(".pt") or Path(name).exists()
