"""Decisions that a reviewer should not have to remember: layers, budgets, what an import costs."""

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import llm_itemtok

PACKAGE = Path(llm_itemtok.__file__).parent
ROOT = Path(__file__).parents[1]  # the checkout, or the folder that .ci/run copies tests and recipes to
MODULES = sorted(PACKAGE.rglob("*.py"))
GUIDE = ROOT / "CONTRIBUTING.md"

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60
EXCEPTIONS: dict[str, int] = {}
"""Module, or `module:function` → the lines it may have, each with its reason beside it."""


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring: documentation is never too long for the budget."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_imports_go_downwards_only():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_fits_in_a_readers_head(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= EXCEPTIONS.get(_name(path), MAX_MODULE_LINES), f"{_name(path)}: {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_function_fits_on_a_page(path):
    for function in _functions(path):
        name, lines = f"{_name(path)}:{function.name}", _code_lines(function)
        assert lines <= EXCEPTIONS.get(name, MAX_FUNCTION_LINES), f"{name}: {lines} lines"


def test_only_the_command_line_prints():
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not prints or _name(path) == "cli.py", f"{_name(path)}: print in lines {prints}"


def test_exceptions_from_the_budgets_are_still_needed():
    known = {_name(path) for path in MODULES}
    known |= {f"{_name(path)}:{function.name}" for path in MODULES for function in _functions(path)}
    assert set(EXCEPTIONS) <= known


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_quick_and_loads_neither_torch_nor_transformers():
    code = (
        "import sys, time; start = time.process_time(); import llm_itemtok; seconds = time.process_time() - start;"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules); assert not heavy, heavy;"
        "print(seconds)"
    )
    # The best of three: a busy machine must not look like a slow import.
    assert min(float(_python(code)) for _ in range(3)) <= 0.5


def test_asking_for_help_loads_neither_torch_nor_transformers():
    code = """
import runpy, sys
sys.argv = ["itemtok", "--help"]
try:
    runpy.run_module("llm_itemtok", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "transformers", "peft", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    assert "usage" in _python(code).lower()


def test_tests_cannot_reach_the_network():
    # 0.0.0.0 is this machine too, so that nothing would leave it even if the guard were missing.
    with socket.socket() as connection, pytest.raises((RuntimeError, UserWarning), match="tried to use socket"):
        connection.connect(("0.0.0.0", 9))


def _tree_in(text: str) -> set[str]:
    """Paths in an annotated file tree (`├── name   what it is`), folders with a trailing slash."""
    paths, parents = set(), []
    for line in text.splitlines():
        head, branch, rest = line.partition("── ")
        if branch and head.strip(" │├└") == "":
            depth = (len(head) - 1) // 4
            name = rest.split()[0]
            parents[depth:] = [name]
            paths.add("".join(parents))
    return paths


@pytest.mark.skipif(not GUIDE.exists(), reason="a wheel comes without it")
def test_the_file_tree_for_contributors_is_the_one_on_disk():
    tree = _tree_in(GUIDE.read_text(encoding="utf-8"))
    for path in tree:
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), f"CONTRIBUTING.md: {path} does not exist"
    listed = {path for path in tree if path.endswith(".py")}
    top = {_name(path) for path in PACKAGE.glob("*.py")}
    assert listed
    assert top <= {Path(path).name for path in listed} | {"__main__.py"}
