"""Every case of cases.toml whose golden data is kept in tests/parity/data, judged as `check.py` judges it."""

import re
from math import prod
from pathlib import Path

import pytest
import tomllib

from ..building import uninitialised
from . import check

HERE = Path(__file__).parent
CASES = tomllib.loads((HERE / "cases.toml").read_text())
UNUSED = [f"cross_attn.{part}.{of}" for part in ("qkv", "proj") for of in ("weight", "bias")]
# What only the original has: a final norm behind the last feature, a layer that is never run.
USELESS = {
    "vimseg__unit": ["norm_f.weight"],
    "vimseg__unit_residual": ["norm_f.weight"],
    "mambafcs__tiny_fft_fusion": UNUSED,
    "mambafcs__tiny_scd": [f"decoder_bcd.fuse_layer_{i}.{key}" for i in (1, 2, 3, 4) for key in UNUSED],
    "OccRWKV__tiny_blocks": ["sgfe.scale_selection.0.weight", "sgfe.scale_selection.0.bias"],
}
KEPT = [stem for stem in CASES if (HERE / "data" / f"{stem}.json").exists()]


def test_every_family_keeps_golden_data():
    assert {stem.partition("__")[0] for stem in CASES} == {stem.partition("__")[0] for stem in KEPT}


def test_cases_are_the_families_together():
    families = sorted((HERE / "cases").glob("*.toml"))
    assert CASES == {k: v for f in families for k, v in tomllib.loads(f.read_text()).items()}


@pytest.mark.parametrize("stem", KEPT)
def test_golden(stem):
    with uninitialised():
        failed, summary = check.run(stem, CASES[stem], HERE / "data", verbose=False)
    assert not failed, f"{stem}: {failed}"
    manifest = check.recipe.load_manifest(HERE / "data" / f"{stem}.json")
    if counts := re.search(r"(\d+) parameters, original (\d+)", summary):
        # The original keeps parameters that nothing reads; ours would break distributed training.
        useless = sum(prod(shape) for key, shape, _ in manifest["params"] if key in USELESS.get(stem, ()))
        assert int(counts[1]) + useless == int(counts[2]), summary
