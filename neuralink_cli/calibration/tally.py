"""The rows of a dataset that cannot be read: counted, the first of them named, and too many of them an error."""

from __future__ import annotations

import logging

from neuralink_cli.errors import InputError

logger = logging.getLogger(__name__)

# More than this share of the rows is no accident: the file is read wrongly.
MOST_UNREADABLE = 0.05
_NAMED = 3
_REASON_CHARACTERS = 120
# After so many unreadable rows nobody needs to wait for the end of the file.
_ENOUGH = 200


class RowTally:
    """Rows read from a dataset, and those of them that were left out."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._rows = self._unreadable = 0
        self._first: list[str] = []
        self._concluded = False

    def count(self) -> None:
        """A row has been read."""
        self._rows += 1

    def leave_out(self, place: str, reason: str) -> None:
        """The row that was counted last cannot be used.

        Raises:
            InputError: Too many cannot.
        """
        self._unreadable += 1
        if len(self._first) < _NAMED:
            self._first.append(f"{place} {reason}"[:_REASON_CHARACTERS])
        if self._unreadable >= _ENOUGH:
            self._require_few()

    def conclude(self) -> None:
        """Say what was left out, once no more rows are read.

        Raises:
            InputError: Too many rows cannot be read.
        """
        if not self._concluded:
            self._concluded = True
            self._require_few()
            if self._unreadable:
                logger.warning("%s: %s and are left out", self._where, self._found())

    def _require_few(self) -> None:
        if self._unreadable > MOST_UNREADABLE * self._rows:
            raise InputError(self._found(), where=self._where, fix="mend the file, or name other columns")

    def _found(self) -> str:
        more = self._unreadable - len(self._first)
        named = "; ".join(self._first) + (f"; and {more:,} more" if more else "")
        return f"{self._unreadable:,} of {self._rows:,} rows cannot be read ({named})"
