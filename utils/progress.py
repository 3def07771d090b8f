"""Progress bars: drawn often on a terminal and seldom into a log."""

import sys

from tqdm import tqdm


def progress(total: int, done: int, what: str | None, unit: str, shown: bool = True) -> tqdm:
    """A bar.

    Args:
        total: how many there are.
        done: how many of them were done before.
        what: in front of the bar.
        unit: of what is counted.
        shown: False draws nothing.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        dynamic_ncols=True,
        disable=not shown,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
