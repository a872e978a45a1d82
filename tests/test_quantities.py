"""Exact numbers: doubles become the decimals that were meant, decimals are printed plain, averages round once."""

import math
import re
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.domain.quantities import INTEGER_MAX, NotExact, average, from_double, plain, short

PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?")
ROOMY = Context(prec=10_000, rounding=ROUND_HALF_EVEN)

DIGITS = st.integers(min_value=-(10**60), max_value=10**60)
DECIMALS = st.builds(lambda digits, places: ROOMY.scaleb(Decimal(digits), places), DIGITS, st.integers(-40, 40))
HUGE = st.builds(
    lambda digits, places: ROOMY.scaleb(Decimal(digits), -places),
    st.integers(min_value=-(10**900), max_value=10**900),
    st.integers(0, 18),
)


@given(value=st.floats() | st.integers(-(10**17), 10**17).map(float))
@example(value=-0.0)
@example(value=float(INTEGER_MAX))
@example(value=float(INTEGER_MAX + 1))
def test_the_short_way_agrees_with_the_long_one(value: float) -> None:
    """Where the short way to print a double answers at all, its answer is that of the long way."""
    if text := short(value):
        assert text == from_double(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0", "0"),
        ("-0", "0"),
        ("-0.000", "0"),
        ("0E+5", "0"),
        ("-0E-30", "0"),
        ("1.50", "1.5"),
        ("100", "100"),
        ("1E+3", "1000"),
        ("-1.20E-7", "-0.00000012"),
        ("1E-18", "0.000000000000000001"),
        ("10.0", "10"),
        ("9" * 38, "9" * 38),
        ("-0.5", "-0.5"),
    ],
)
def test_plain_is_as_people_write(value: str, text: str) -> None:
    """No exponent, no trailing zeros, no minus zero, and zeros before the point stay."""
    assert plain(Decimal(value)) == text


@given(st.one_of(DECIMALS, HUGE))
def test_plain_loses_nothing(value: Decimal) -> None:
    """Whatever its size, a printed decimal is in plain form and reads back as the same number."""
    text = plain(value)
    assert PLAIN.fullmatch(text)
    assert text != "-0"
    assert Decimal(text) == value


@given(DECIMALS)
def test_plain_is_canonical(value: Decimal) -> None:
    """Equal decimals are printed alike, however many zeros they carry."""
    padded = ROOMY.quantize(value, Decimal(1).scaleb(-45))
    assert plain(padded) == plain(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (0.1 + 0.2, "0.30000000000000004"),
        (-0.0, "0"),
        (60.0, "60"),
        (1e15, "1000000000000000"),
        (float(INTEGER_MAX), "9007199254740991"),
        (-float(INTEGER_MAX), "-9007199254740991"),
        (1e-7, "0.0000001"),
        (-2.5e-10, "-0.00000000025"),
        (5e-324, "0." + "0" * 323 + "5"),
        (4503599627370495.5, "4503599627370495.5"),
    ],
)
def test_a_double_is_the_decimal_that_was_meant(value: float, text: str) -> None:
    """The shortest decimal that reads back as the double, in plain form."""
    assert from_double(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(2.2250738585072014e-308)
@example(0.5)
def test_doubles_round_trip_shortest(value: float) -> None:
    """Every double that is taken reads back as itself, and no text with fewer digits would."""
    if value.is_integer() and abs(value) > INTEGER_MAX:
        with pytest.raises(NotExact):
            from_double(value)
        return
    text = from_double(value)
    assert PLAIN.fullmatch(text)
    assert float(text) == value
    digits = len(Decimal(text).normalize(ROOMY).as_tuple().digits)
    if value and digits > 1:
        shorter = Decimal(value).normalize(Context(prec=digits - 1, rounding=ROUND_HALF_EVEN))
        assert float(shorter) != value


@given(st.integers(min_value=-INTEGER_MAX, max_value=INTEGER_MAX))
def test_integers_within_doubles_are_themselves(value: int) -> None:
    """A whole number up to 2^53-1 is printed as the number that was sent."""
    assert from_double(float(value)) == str(value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2.0**53, -(2.0**53), 2.0**53 + 2, 1e16, 1e300, -1.7976931348623157e308]
)
def test_what_a_double_cannot_tell_is_refused(value: float) -> None:
    """NaN, infinities and whole numbers beyond 2^53-1 stand for no one decimal."""
    with pytest.raises(NotExact):
        from_double(value)


def half_even(total: Decimal, count: int) -> Fraction:
    """The definition: the exact quotient, rounded to 18 places, ties to the even neighbour."""
    # `round` of a Fraction to an integer is half-even by definition.
    return Fraction(round(Fraction(total) / count * 10**18), 10**18)


@pytest.mark.parametrize(
    ("total", "count", "text"),
    [
        ("1", 3, "0.333333333333333333"),
        ("2", 3, "0.666666666666666667"),
        ("-2", 3, "-0.666666666666666667"),
        ("0.000000000000000001", 2, "0"),  # half of the last place: to the even neighbour
        ("0.000000000000000003", 2, "0.000000000000000002"),
        ("-0.000000000000000001", 2, "0"),
        ("-0.000000000000000003", 2, "-0.000000000000000002"),
        ("0.000000000000000005", 10, "0"),
        ("0.0000000000000000051", 10, "0.000000000000000001"),
        ("10", 4, "2.5"),
        ("0", 7, "0"),
        ("9" * 400 + ".1", 1, "9" * 400 + ".1"),
    ],
)
def test_average_rounds_half_even_at_the_18th_place(total: str, count: int, text: str) -> None:
    """Ties at the 18th place go to the even neighbour, on both sides of zero."""
    assert plain(average(Decimal(total), count)) == text


@given(st.one_of(DECIMALS, HUGE), st.integers(min_value=1, max_value=10**12))
def test_average_is_the_exact_quotient_rounded_once(total: Decimal, count: int) -> None:
    """For totals and counts of any size the average is the fraction's, rounded half-even to 18 places."""
    assert Fraction(average(total, count)) == half_even(total, count)


@given(DIGITS, st.integers(min_value=1, max_value=10**6))
def test_average_of_a_tie_is_even(units: int, count: int) -> None:
    """A total that lies exactly between two results of 18 places goes to the even one."""
    count *= 2
    total = ROOMY.scaleb(Decimal((2 * units + 1) * count // 2), -18)
    found = Fraction(average(total, count)) * 10**18
    assert found == half_even(total, count) * 10**18
    assert found.denominator == 1
    assert found.numerator % 2 == 0
