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
from linescan.backbones.feature_maps import DENSE_FORMS  # noqa: E402
from tests.parity import check  # noqa: E402

PARITY = Path(check.__file__).parent
DATA = Path(os.environ.get("LINESCAN_GOLDEN", PARITY / "data"))
FORMS = {f"{form.__module__}:{form.__name__}": cls.__name__ for cls, form in DENSE_FORMS.items()}
# The registered name whose arguments are its class's defaults, which the cases then change.
NAMES = {
    "Vim": "vim_tiny_patch16_224",
    "VMamba": "vmamba_tiny_s1l8",
    "LocalVim": "local_vim_tiny",
    "LocalVMamba": "local_vssm_tiny",
    "HierViG": "vig_h_tiny",
    "VisionRWKV": "vrwkv_tiny",
}
CASES = {
    stem: case
    for stem, case in tomllib.loads((PARITY / "cases.toml").read_text()).items()
    if case.get("factory") in FORMS and (DATA / f"{stem}.json").exists()
}


def through_the_registry(case, path):
    name = NAMES[FORMS[case["factory"]]]
    checkpoint = {"type": "Pretrained", "checkpoint": path}
    cfg = {"type": "LinescanBackbone", "model": name, "init_cfg": checkpoint, **case["kwargs"]}
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    # What the families' calls read beside the maps is the form's.
    return backbone.body if case["call"].startswith("tests.parity.calls:vim_") else backbone


def test_every_family_with_a_dense_form_has_a_case():
    kept = {FORMS[case["factory"]] for case in CASES.values()}
    whole = {"SegMANEncoder"}  # its golden data is of the segmentor: tests/heads/test_segman.py
    assert kept == set(NAMES) == set(FORMS.values()) - whole


@pytest.mark.parametrize("stem", CASES)
def test_golden(stem, monkeypatch):
    monkeypatch.setattr(check, "build", through_the_registry)
    failed, summary = check.run(stem, {"kwargs": {}} | CASES[stem], DATA, verbose=False)
    assert not failed, f"{stem}: {failed}"
    assert "original" not in summary, summary  # the parameter count is the original's
