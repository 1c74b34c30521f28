"""Timestamps that are none: several units, what a spreadsheet rounded, moments in other forms."""

import pytest

from sdpo_jax.data.readers.times import Clock
from sdpo_jax.system.errors import InputError


def read(texts):
    clock = Clock()
    return [clock.seconds(f"my.csv:{n}", text) for n, text in enumerate(texts, 2)], clock


@pytest.mark.parametrize(
    "texts",
    [
        ["0", "1", "2"],  # steps
        ["1999", "2004"],  # years
        ["44562.5", "44563"],  # days of a spreadsheet
        ["964982703", "1700000000"],
        ["1660180000000", "1700000000001"],
        ["1.660180000001e12", "1.7E12"],  # with all digits, as Java writes them
        ["1.5e+09", "1500000001", "1500000002"],  # R writes the shorter form
        ["-1.5", "0.25"],
        ["0e99999", "5"],
    ],
)
def test_numbers_of_one_unit_are_kept_as_they_are(texts):
    found, clock = read(texts)
    assert found == [float(text) for text in texts]
    assert clock.checked() == ""


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            ["1700000000", "1700000000001", "1700000002"],
            "my.csv:3: found timestamp '1700000000001', which is milliseconds as in 1 of 3 rows, "
            "expected seconds as in 2 rows (my.csv:2): write all in one unit",
        ),
        (
            ["1700000000000000", "1700000000000", "1700000000001"],
            "my.csv:2: found timestamp '1700000000000000', which is microseconds as in 1 of 3",
        ),
        (
            ["1700000000000000000", "1700000000", "1700000001.5"],
            "my.csv:2: found timestamp '1700000000000000000', which is nanoseconds as in 1 of 3",
        ),
    ],
)
def test_two_units_are_told_with_their_lines_and_counts(texts, said):
    _, clock = read(texts)
    with pytest.raises(InputError) as error:
        clock.checked()
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("texts", "step"),
    [
        (["1.66018E+12", "1.66019E+12"], "10,000,000"),
        (["1.7e9", "1.71E9"], "10,000,000"),
        (["1.6602e+12", "1.66018e+12", "1660180000000"], "10,000,000"),  # most of them
    ],
)
def test_what_a_spreadsheet_rounded_is_told_with_its_step(texts, step):
    _, clock = read(texts)
    assert clock.checked().startswith(f"my.csv:2: found timestamp '{texts[0]}', rounded to {step}")


def test_forms_do_not_mix():
    with pytest.raises(InputError, match=r"my.csv:3: found timestamp '2001-09-09', ISO 8601, ex"):
        read(["1000", "2001-09-09"])
    with pytest.raises(InputError, match=r"my.csv:3: found timestamp '1000', a number, expected "):
        read(["2001-09-09", "1000"])
