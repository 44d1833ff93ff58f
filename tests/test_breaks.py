"""What breaks if: every row changes what it says in the files as they are, and the page has the returns' scores."""

import re

import breaks
import pytest

PAGE = (breaks.ROOT / "docs" / "breaks.md").read_text()
RESULTS = breaks.ROOT / "benchmarks" / "results" / "breaks"


@pytest.mark.parametrize("name", breaks.ROWS)
def test_a_row_changes_one_thing(name):
    row = breaks.ROWS[name]
    module = breaks.edited(row)
    plain = module.Args(**row.base)
    changed = {flag for flag, value in row.flags.items() if getattr(plain, flag) != value}
    assert changed == set(row.flags)
    assert len(changed) + bool(row.line) == (not name.endswith("as-it-is"))
    module.Args(**row.base | row.flags)


def test_the_page_has_every_row_its_picture_and_its_score():
    rows = breaks.read(RESULTS / "returns.csv")
    assert rows.keys() == breaks.ROWS.keys()
    for name, lines in rows.items():
        (line,) = [line for line in PAGE.splitlines() if f"breaks/{name}.png" in line]
        mean, deviation = map(float, re.search(r"\| ([\d.]+) ± ([\d.]+) \|", line).groups())
        last = breaks.scores(lines)[1][-1]
        assert (mean, deviation) == (pytest.approx(last.mean(), abs=0.51), pytest.approx(last.std(ddof=1), abs=0.51))
        assert (RESULTS / f"{name}.png").stat().st_size > 1000
