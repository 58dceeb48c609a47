"""How far a command has come: a bar on terminals, now and then a line in logs."""

from __future__ import annotations

import time

import click
from tqdm import tqdm

SECONDS = 60.0
"""Between two lines in a log."""


class Progress:
    """Shows how much of a total is done, on the standard error.

    Args:
        total: of the units.
        unit: their name.
        done: so many of them before.
        shown: whether this process shows anything.
        leave: whether a bar stays at the end.
    """

    def __init__(
        self, total: int, unit: str, *, done: int = 0, shown: bool = True, leave: bool = False
    ) -> None:
        self._unit = unit
        # None: a bar where there is a terminal.
        hidden = None if shown else True
        self._bar = tqdm(
            total=total, unit=unit, initial=done, disable=hidden, dynamic_ncols=True, leave=leave
        )
        self.in_log = shown and bool(self._bar.disable)
        self._total, self._before, self._done = total, done, done
        self._start = self._last = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """So many more units are done; the note says what is known of them."""
        count = min(count, self._total - self._done)
        self._done += count
        if not self.in_log:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= SECONDS:
            self._last = now
            line = tqdm.format_meter(
                self._done,
                self._total,
                now - self._start,
                initial=self._before,
                unit=self._unit,
                postfix=note or None,
                ncols=0,  # no bar
            )
            click.echo(line.strip(), err=True)

    def close(self) -> None:
        """Leave the terminal to others."""
        self._bar.close()
