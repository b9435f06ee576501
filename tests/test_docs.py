"""README, CONTRIBUTING and all pages of docs/: their code runs, their commands and links exist.

`python -m tests.test_docs PAGE...` runs the code of pages in an empty folder.
"""

import ast
import builtins
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from linescan.cli.train import with_recipe

from .conftest import ENVIRONMENT, REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
BLOCK = re.compile(r"(?P<unrun><!-- not run -->\n)?^```(?P<language>[\w{}]*)\n(?P<text>.*?)^```$", re.M | re.S)
ELSEWHERE = {"docs/add-a-task.md": "tests/tasks/test_base.py"}
"""Pages whose code another test runs."""


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def code_of(page: Path, run: bool) -> list[str]:
    """The Python of a page, that which runs or that which cannot; with the page's line numbers."""
    text = page.read_text()
    found = [b for b in BLOCK.finditer(text) if b["language"] == "python" and bool(b["unrun"]) != run]
    return ["\n" * text[: b.start("text")].count("\n") + b["text"] for b in found]


def run_pages(names: list[str]) -> None:
    """Runs the blocks of each page as one program; a failure has the page and its line in the traceback."""
    for name in names:
        print(name, file=sys.stderr)
        module = sys.modules[name] = ModuleType(name)
        for code in code_of(REPOSITORY / name, run=True):
            exec(compile(code, name, "exec"), vars(module))


RUN = [name_of(page) for page in PAGES if code_of(page, run=True) and name_of(page) not in ELSEWHERE]


@pytest.mark.parametrize("names", [RUN[::2], RUN[1::2]], ids=["even", "odd"])
def test_code_of_pages_runs(names, tmp_path):
    args = [sys.executable, "-W", "error:::docs", "-m", "tests.test_docs", *names]
    done = subprocess.run(args, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pages_that_another_test_runs():
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (REPOSITORY / test).read_text()


# -- what cannot run: files and weights are missing -------------------------------------------------------------------


def resolve(node: ast.expr, scope: dict):
    """What a name, or attributes of one, stand for; None where only running the code would say."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, scope)) is not None:
        return getattr(owner, node.attr)
    return None


def check_names(code: str, page: str) -> None:
    """Imports what code imports; every attribute, class and argument of these exists. Defines only known names."""
    tree, scope = ast.parse(code, page), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), page, "exec"), scope)
    kinds = {}
    for node in ast.walk(tree):  # what a variable is, where a class says it
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = resolve(node.value.func, scope)
            if inspect.isclass(made) and isinstance(node.targets[0], ast.Name):
                kinds[node.targets[0].id] = made
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := resolve(node.func, scope)) is not None:
            arguments = [None] * len(node.args)
            inspect.signature(called).bind(*arguments, **{key.arg: None for key in node.keywords if key.arg})
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in kinds:
            kind = kinds[node.value.id]
            own = hasattr(kind, node.attr) or f"self.{node.attr}" in inspect.getsource(kind)
            told = any(f"self.{node.attr}" in inspect.getsource(base) for base in kind.__mro__[1:-1])
            assert own or told, f"{page}:{node.lineno}: a {kind.__name__} has no {node.attr}"
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stored |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    unknown = read - stored - set(scope) - set(vars(builtins))
    assert not unknown, f"{page}: {', '.join(sorted(unknown))} stand for nothing"


UNRUN = [(name_of(page), code) for page in PAGES for code in code_of(page, run=False)]


@pytest.mark.parametrize("page, code", UNRUN, ids=[f"{page}:{code.count(chr(10))}" for page, code in UNRUN])
def test_names_in_code_that_cannot_run(page, code):
    check_names(code, page)


@pytest.mark.parametrize(
    "code, said",
    [
        ("from linescan import Clasifier", "Clasifier"),
        ("import linescan\nlinescan.zoo.entrys()", "entrys"),
        ("from linescan import load_checkpoint\nload_checkpoint(1, 'a.pth', strictly=True)", "strictly"),
        ("from linescan import Classifier\nc = Classifier('m')\nc.predict('a.jpg')", "predict"),
        ("print(model)", "model"),
        ("print(", "never closed"),
    ],
)
def test_wrong_names_are_found(code, said):
    with pytest.raises((ImportError, AttributeError, TypeError, AssertionError, SyntaxError), match=said):
        check_names(code, "page")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_other_blocks(page):
    """JSON is JSON; blocks name their language."""
    for block in BLOCK.finditer(page.read_text()):
        if block["language"] == "json":
            json.loads(block["text"])
        else:
            assert block["language"] in ("python", "text", "{toctree}"), block[0]


# -- commands ---------------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[str]:
    """The indented lines of a page that run linescan, a tool of tools/ or make; continuations joined."""
    text = re.sub(r" *\\\n\s*", " ", text)
    lines = re.findall(r"^    (?:.*\| |torchrun [^\n]* -m )?((?:linescan |make |python tools/)[^\n|]*)", text, re.M)
    return [re.sub(r"\s{2,}#? .*|\s+# .*", "", line) for line in lines]


def options_of(words: list[str]) -> set[str]:
    """The options of `linescan WORDS`; of training, evaluating and comparing, those of the task at hand."""
    from linescan.cli import app
    from linescan.cli.train import evaluation_of, training_of

    command = typer.main.get_command(app).commands[words[0]]
    if hasattr(command, "commands"):  # a group
        command = command.commands[words[1]]
    parameters = list(command.params)
    by_task = {"train": training_of, "evaluate": evaluation_of, "compare": training_of}.get(words[0])
    if by_task:
        task = words[words.index("--task") + 1] if "--task" in words else "classify"
        parameters += by_task(task).params
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def check_command(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([\w./-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        assert all(word in targets for word in words if "=" not in word), line
    elif program == "python":
        assert (REPOSITORY / words[0]).exists(), line
    elif words and not words[0].startswith("-"):
        if "--recipe" in words and "." not in words[words.index("--recipe") + 1]:  # one of linescan's
            words[1:] = with_recipe(words[1:])
        known = options_of(words)
        for word in words[1:]:
            assert not re.match(r"--?[a-z]", word) or word.partition("=")[0] in known, f"{word} in: {line}"


COMMANDS = sorted({(name_of(page), line) for page in PAGES for line in commands_of(page.read_text())})


def test_commands_exist():
    assert len(COMMANDS) > 30
    for page, line in COMMANDS:
        try:
            check_command(line)
        except KeyError as error:
            pytest.fail(f"{page}: linescan has no command {error}")


@pytest.mark.parametrize(
    "line",
    ["linescan clasify a.jpg", "linescan train --lerning-rate 1", "make everything", "python tools/nothing.py"],
)
def test_wrong_commands_are_found(line):
    with pytest.raises((AssertionError, KeyError)):
        check_command(commands_of(f"    {line}\n")[0])


# -- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for link, _, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(#([^)]*))?\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def test_every_page_is_reached():
    """From README, by links: the index of the site has them all, as Sphinx sees to."""
    reached, left = set(), [REPOSITORY / "README.md"]
    while left:
        page = left.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            links = re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text())
            left += [(page.parent / link).resolve() for link in links]
    index = {REPOSITORY / "docs" / name for name in ("index.md", "contributing.md", "changelog.md")}
    missed = {name_of(page) for page in set(PAGES) - reached - index}
    assert missed <= {"CHANGELOG.md"}, missed


if __name__ == "__main__":
    run_pages(sys.argv[1:])
