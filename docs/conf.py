"""Builds the site: `make docs` writes it to build/docs/index.html.

The pages are Markdown. Docstrings are too, with sections (Args, Returns, ...) in the style of Google; `plain_docstring`
makes them what Sphinx reads.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import linescan  # noqa: E402

project, author = "linescan", "The linescan authors"
version = release = linescan.__version__
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["benchmarks/*/**"]
default_role = "code"
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"linescan {release}"
html_copy_source = False

# Commands and demos are for the shell, kernels are called by recurrences alone.
LEFT_OUT = ["__main__.py", "cli", "configs", "demos", "scans/kernels/triton"]
if find_spec("mmengine") is None:
    LEFT_OUT.append("openmmlab")
apidoc_modules = [
    {
        "path": "../linescan",
        "destination": "api",
        "exclude_patterns": [f"*/linescan/{name}" for name in LEFT_OUT],
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members"},
    }
]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_param = False  # lists, in which a line may describe several: "q, k: queries and keys"
napoleon_custom_sections = [("Attributes", "params_style")]

FILES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages of the site, and the files of the repository that they show."""


def show_file(app, page, source):
    """Puts a file of the repository in front of what its page holds."""
    if page in FILES:
        text = (ROOT / FILES[page]).read_text()
        for other, name in FILES.items():
            text = text.replace(f"]({name})", f"]({other}.md)")
        source[0] = re.sub(r"(\]\(|src=\")docs/", r"\1", text) + "\n" + source[0]


def plain_docstring(app, what, name, thing, options, lines):
    """Markdown to reStructuredText: indented blocks are code, lists need no blank line, no other letter is markup."""
    text, code = [], False
    for line in lines:
        above = text[-1].strip() if text else ""
        if line.startswith("    ") and not above and text and not code:
            text += ["::", ""]
            code = True
        code = code and (line.startswith("    ") or not line.strip())
        if not code:
            line = re.sub(r"(`[^`]*`)|([*|\\]|_\b)", lambda match: match[1] or "\\" + match[2], line)
            line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)
            if line.startswith("- ") and above and not above.startswith("- "):
                text.append("")
        text.append(line)
    lines[:] = text


def is_from_elsewhere(app, what, name, thing, skip, options):
    """Skips what a module exports of another: it is described where it is defined."""
    home = getattr(thing, "__module__", None)
    return True if what == "module" and home and home != app.env.temp_data["autodoc:module"] else None


def setup(app):
    app.connect("autodoc-skip-member", is_from_elsewhere)
    app.connect("source-read", show_file)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon's, at 500
