"""The table of the command."""

import pytest

from explain_client.table import EXPLANATIONS, LEVELS, Table, decimal, percent

NAME = "photograph-of-a-long-name-0041.jpg"
CELLS = {
    EXPLANATIONS: [NAME, "Egyptian cat and more", "100.0%", "tiger cat", "1000", "12.3%", "-0.0012", "123456"],
    LEVELS: [NAME, "Egyptian cat and more", "100.0%", "50", "0.51%", "12345"],
}


@pytest.mark.parametrize("columns", CELLS)
@pytest.mark.parametrize("width", [40, 60, 80, 97, 200])
def test_lines_fit_and_numbers_are_below_their_titles(columns, width):
    table = Table(columns, width)
    header, row = table.header(), table.row(CELLS[columns])
    assert max(len(header), len(row)) <= width
    for title, cell in (("prob.", "100.0%"), ("error", CELLS[columns][5 if columns is EXPLANATIONS else 4])):
        assert header.index(title) + len(title) == row.index(cell) + len(cell)
    assert "0041.jpg" in row or "1.jpg" in row


def test_what_is_left_out_of_a_narrow_terminal():
    assert Table(EXPLANATIONS, 60).header().split() == ["image", "label", "prob.", "explained", "steps", "error", "ms"]
    assert "delta" in Table(EXPLANATIONS, 80).header()


def test_width_is_the_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert len(Table(EXPLANATIONS).header()) <= 60


@pytest.mark.parametrize(
    ("value", "text"), [(-0.00001, "0.0000"), (-0.0, "0.0000"), (-0.12344, "-0.1234"), (1.5, "1.5000")]
)
def test_zero_has_no_sign(value, text):
    assert decimal(value) == text


def test_an_absent_estimate_is_a_dash():
    assert percent(float("nan")) == "-"
    assert percent(0.0213) == "2.1%"
