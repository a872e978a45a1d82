"""Owns exact numbers: how JSON doubles become decimals and how decimals are printed."""

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal

# Doubles tell whole numbers apart only up to here; beyond it the number that was meant is unknown.
INTEGER_MAX = 2**53 - 1
# Digits that survive any arithmetic here: sums are exact whatever their size, as Decimal keeps every digit it is given.
_EXACT = Context(prec=200_000, rounding=ROUND_HALF_EVEN)
_PLACES_18 = Decimal(1).scaleb(-18)


class NotExact(ValueError):
    """A double that does not stand for one decimal: an integer beyond ±(2^53-1), NaN or an infinity."""


def plain(value: Decimal) -> str:
    """Print a finite decimal without exponent, trailing zeros or minus zero."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text


def short(value: float) -> str:
    """Return what `from_double` does where that is simple, else nothing."""
    if value.is_integer():
        return str(int(value)) if -INTEGER_MAX <= value <= INTEGER_MAX else ""
    text = repr(value)
    return "" if "e" in text or "n" in text else text


def from_double(value: float) -> str:
    """Return the shortest plain decimal that reads back as `value`.

    Raises NotExact for NaN, infinities and integers beyond ±(2^53-1), which a double cannot tell from their neighbours.
    """
    if value.is_integer():
        if abs(value) > INTEGER_MAX:
            raise NotExact
        return str(int(value))
    if not math.isfinite(value):
        raise NotExact
    text = repr(value)
    return plain(Decimal(text)) if "e" in text else text


def add(one: Decimal, other: Decimal) -> Decimal:
    """Add exactly."""
    return _EXACT.add(one, other)


def subtract(one: Decimal, other: Decimal) -> Decimal:
    """Subtract exactly."""
    return _EXACT.subtract(one, other)


def average(total: Decimal, count: int) -> Decimal:
    """Divide exactly and round half-even to 18 places."""
    # 18 places beyond the digits of the total are enough to know the 18th place; the remainder decides ties exactly.
    scaled = _EXACT.scaleb(total, 18)
    numerator, denominator = scaled.as_integer_ratio()
    denominator *= count
    quotient, remainder = divmod(abs(numerator), denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        quotient += 1
    return _EXACT.multiply(Decimal(-quotient if numerator < 0 else quotient), _PLACES_18)
