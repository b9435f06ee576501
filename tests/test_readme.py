"""The README's Python examples run as they are written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("code", [b for b in BLOCKS if "runs/demo" not in b])
def test_example(code):
    exec(compile(code, str(README), "exec"), {})


def test_there_are_examples():
    assert len(BLOCKS) >= 4


def test_documents_name_files_that_exist():
    for document in [README, *README.parent.glob("docs/*.md"), README.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
