"""The published dense models, built through OpenMMLab's registry and filled through `init_cfg`, against golden data.

LINESCAN_GOLDEN names another folder of golden data, for cases too large to be kept here.
"""

import os
from pathlib import Path

import pytest
import tomllib

pytest.importorskip("mmengine")

from mmengine.registry import MODELS  # noqa: E402

import linescan.openmmlab  # noqa: E402, F401
from tests.parity import check  # noqa: E402

PARITY = Path(check.__file__).parent
DATA = Path(os.environ.get("LINESCAN_GOLDEN", PARITY / "data"))
CASES = {
    stem: case
    for stem, case in tomllib.loads((PARITY / "cases.toml").read_text()).items()
    if case.get("factory", "").endswith(":dense_backbone") and (DATA / f"{stem}.json").exists()
}


def through_the_registry(case, path):
    backbone = MODELS.build(
        {"type": "LinescanBackbone", "init_cfg": {"type": "Pretrained", "checkpoint": path}, **case["kwargs"]}
    )
    backbone.init_weights()
    return backbone


def test_every_family_with_a_dense_form_has_a_case():
    # That of SegMAN is the whole segmentor: tests/heads/test_segman.py.
    kept = {case["kwargs"]["model"] for case in CASES.values()}
    assert kept == {
        "vim_tiny_patch16_224",
        "vmamba_tiny_s1l8",
        "local_vim_tiny",
        "local_vssm_tiny",
        "vig_h_tiny",
        "vrwkv_tiny",
        "mambavision_tiny",
    }


@pytest.mark.parametrize("stem", CASES)
def test_golden(stem, monkeypatch):
    monkeypatch.setattr(check, "build", through_the_registry)
    failed, summary = check.run(stem, CASES[stem], DATA, verbose=False)
    assert not failed, f"{stem}: {failed}"
