"""Units are read from words and symbols, converted, and told from counted things."""

from fractions import Fraction

import pytest

from lim_sglang.programs.grading.units import Unit, read_unit, singular


@pytest.mark.parametrize(
    ("text", "same", "ratio"),
    [
        ("h", "minutes", 60),
        ("km/h", "kilometres per hour", 1),
        ("m^2", "square centimeters", 10_000),
        ("m s^-2", "m/s^2", 1),
        ("kWh", "MJ", Fraction(18, 5)),
        ("mL", "cm^3", 1),
        ("feet", "in", 12),
        ("kg of rice", "g", 1000),
        ("years old", "months", 12),
        ("µm", "nm", 1000),
        ("$", "cents", 100),
        ("degrees", "°", 1),
    ],
)
def test_units_of_one_dimension_agree_and_convert(text: str, same: str, ratio: int) -> None:
    one, other = read_unit(text), read_unit(same)
    assert one
    assert other
    assert one.agrees(other)
    assert one.factor / other.factor == ratio


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("m", "m^2"),
        ("km", "kg"),
        ("m/s", "m/s^2"),
        ("dollars", "euros"),
        ("°C", "°F"),
        ("apples", "oranges"),
        ("red apples", "green apples"),
        ("apples", "kg"),
        ("mW", "MW/s"),
    ],
)
def test_other_units_do_not_agree(text: str, other: str) -> None:
    one, another = read_unit(text), read_unit(other)
    assert one
    assert another
    assert not one.agrees(another)
    assert not another.agrees(one)


def test_adjectives_change_no_counted_thing_and_units_alone_say_nothing() -> None:
    one, other = read_unit("different ways"), read_unit("way")
    assert one
    assert other
    assert one.agrees(other)
    assert read_unit("square units") == read_unit("in total") == Unit()


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        ("children", "child"),
        ("boxes", "box"),
        ("cities", "city"),
        ("eggs", "egg"),
        ("glass", "glass"),
    ],
)
def test_nouns_have_a_singular(plural: str, expected: str) -> None:
    assert singular(plural) == expected


@pytest.mark.parametrize("text", ["", "3", "m + n", "x = y", "5 m", "^2"])
def test_anything_else_is_no_unit(text: str) -> None:
    assert read_unit(text) is None
