"""Timestamps of users' files, checked for one form, one unit and rounding."""

import dataclasses
import decimal
import math
from datetime import UTC, datetime

from sdpo_jax.data.readers import raw
from sdpo_jax.system.errors import InputError, brief

# Times from 1979 to 2128 are between _FROM and _TO in seconds, and in another unit between these
# times its factor; the ranges do not overlap.
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_FROM, _TO = 3 * 10**8, 5 * 10**9


@dataclasses.dataclass
class _Seen:
    """The first line of a kind of timestamps, its text, and their number."""

    where: str
    text: str
    count: int = 0


class Clock:
    """Reads timestamps one by one; `checked` then checks that they have one unit."""

    def __init__(self):
        self.count = 0
        self._form: str | None = None
        self._units: dict[str, _Seen] = {}
        self._rounded: _Seen | None = None
        self._finest = 999  # of numbers with an exponent: the power of ten of their last digit

    def seconds(self, where: str, text: str) -> float:
        """A number unchanged; ISO 8601 in seconds since 1970, in UTC if it has no zone.

        Raises InputError for other text, and for a mix of both forms.
        """
        found = _number(text)
        form = "ISO 8601" if found is None else "a number"
        found = _iso(where, text) if found is None else found
        if self._form not in (None, form):
            expected = f"{self._form} as in the lines before"
            raise raw.bad(where, f"timestamp {brief(text)}, {form}", expected)
        self._form = form
        if form == "a number":
            self.number(where, text, found)
        return found

    def number(self, where: str, text: str, value: float) -> None:
        """Records a timestamp that is a number in the file, written as `text`."""
        self.count += 1
        for unit, factor in _UNITS.items():
            if _FROM * factor <= value < _TO * factor:
                self._units.setdefault(unit, _Seen(where, text)).count += 1
        if value and ("e" in text or "E" in text):
            self._rounded = self._rounded or _Seen(where, text)
            self._rounded.count += 1
            self._finest = min(self._finest, int(decimal.Decimal(text).as_tuple().exponent))

    def checked(self) -> str:
        """The message that a spreadsheet rounded most of the timestamps, or "".

        Raises InputError if units are mixed, such as seconds and milliseconds.
        """
        if len(self._units) > 1:
            (most, usual), *others = sorted(self._units.items(), key=lambda unit: -unit[1].count)
            unit, odd = others[0]
            raise InputError(
                f"{odd.where}: found timestamp {brief(odd.text)}, which is {unit} as in "
                f"{odd.count:,} of {self.count:,} rows, expected {most} as in {usual.count:,} rows "
                f"({usual.where}): write all in one unit"
            )
        if self._rounded is None or self._finest < 1 or 2 * self._rounded.count < self.count:
            return ""
        return (
            f"{self._rounded.where}: found timestamp {brief(self._rounded.text)}, rounded to "
            f"{10**self._finest:,} as spreadsheets do, in {self._rounded.count:,} of "
            f"{self.count:,} rows"
        )


def _number(text: str) -> float | None:
    try:
        number = math.nan if "_" in text else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _iso(where: str, text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        expected = "a number or ISO 8601 (2026-11-24T12:30:00Z)"
        raise raw.bad(where, f"timestamp {brief(text)}", expected) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
