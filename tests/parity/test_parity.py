"""Every case of cases.toml whose golden data is kept in tests/parity/data, judged as `check.py` judges it."""

from pathlib import Path

import pytest
import tomllib

from . import check

HERE = Path(__file__).parent
CASES = tomllib.loads((HERE / "cases.toml").read_text())
KEPT = [stem for stem in CASES if (HERE / "data" / f"{stem}.json").exists()]


def test_every_family_keeps_golden_data():
    assert {stem.partition("__")[0] for stem in CASES} == {stem.partition("__")[0] for stem in KEPT}


def test_cases_are_the_families_together():
    families = sorted((HERE / "cases").glob("*.toml"))
    assert CASES == {k: v for f in families for k, v in tomllib.loads(f.read_text()).items()}


@pytest.mark.parametrize("stem", KEPT)
def test_golden(stem):
    failed, summary = check.run(stem, CASES[stem], HERE / "data", verbose=False)
    assert not failed, f"{stem}: {failed}"
    assert "original" not in summary, summary  # the parameter count is the original's
