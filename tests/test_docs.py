"""README and docs say what is true of the code beside them: commands parse, recipes load, Python runs, links lead on.

Conventions of a page:
- A fenced `bash` block holds commands as they can be typed; a fenced `yaml` block is a recipe, or an experiment plan,
  named in its first line (`# my.yaml`) where commands of the page use it.
- A fenced `python` block under the line `<!-- run -->` is executed after a small quickstart, in the folder of the run.
- Code in a sentence, such as `tokenizer.levels` or `tokenizer.kind: rqvae`, is a setting, and takes the value.
"""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from transformers import TrainingArguments

import llm_itemtok
from llm_itemtok.cli import _parser
from llm_itemtok.config import RunConfig
from llm_itemtok.experiments.plan import LoadedPlan
from llm_itemtok.explain import explain
from llm_itemtok.settings import Data
from llm_itemtok.training.arguments import check_settings
from tests.test_recipes import SMALL

ROOT = Path(__file__).parents[1]  # the checkout, or the folder that .ci/run copies tests and recipes to
README = ROOT / "README.md"
PAGES = [page for page in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))) if page.exists()]
MAX_README_LINES = 150

FENCE = re.compile(r"^(?P<mark><!-- run -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"(?P<name>[a-z]+(?:\.[a-z0-9_]+)+)(?:: (?P<value>\S+))?")
FILES = (".py", ".json", ".jsonl", ".yaml", ".csv", ".parquet")
"""What looks like a setting and is a file."""


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    run: bool


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            if match["language"] == language:
                found.append(Block(page, language, match["text"], match["mark"] is not None))
    return found


def words_in_sentences(page: Path) -> list[str]:
    """Inline code of a page, without its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="without the docs")
def test_the_api_pages_describe_every_public_name():
    pages = (ROOT / "docs" / "api").glob("*.md")
    shown = {
        name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for name in llm_itemtok.__all__:
        public = getattr(llm_itemtok, name)
        assert {public.__module__, f"{public.__module__}.{public.__qualname__}"} & shown, name


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="without the docs")
def test_messages_that_troubleshooting_explains_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for path in Path(llm_itemtok.__file__).parent.rglob("*.py"))
    assert len(said) > 10
    assert [message for message in said if message not in code] == []


def commands() -> list[tuple[Path, list[str]]]:
    """The words of every command in the `bash` blocks, one list for each part of a pipe."""
    found = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
            lexer.whitespace_split = True
            part: list[str] = []
            for word in [*lexer, "|"]:
                if word and set(word) <= set("|;&"):
                    found += [(block.page, part)] if part else []
                    part = []
                else:
                    part.append(word)
    return found


def itemtok_arguments(words: list[str]) -> list[str] | None:
    """Arguments of `itemtok`, however it is started; None if the command is another."""
    if words[0] == "itemtok":
        return words[1:]
    if words[:2] != ["accelerate", "launch"]:
        return None
    if "llm_itemtok" in words:
        return words[words.index("llm_itemtok") + 1 :]
    at = words.index("--config")
    assert words[at - 1] == "scripts/train.py"
    return ["run", words[at + 1], *words[at + 2 :]]


def parsed(page: Path, arguments: list[str]) -> argparse.Namespace:
    try:
        return _parser().parse_args(arguments)
    except SystemExit:
        raise AssertionError(f"{page.name}: `itemtok {shlex.join(arguments)}` is refused") from None


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for recipe in (ROOT / "recipes").glob("**/*.yaml"):
        for name in re.findall(r"\$\{(\w+)\}", recipe.read_text(encoding="utf-8")):
            monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with the recipes of the docs, by name, and those of the checkout in `recipes/`."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        assert name, f"{block.page.name}: a yaml block must begin with `# NAME.yaml`, was: {block.text[:40]!r}"
        path = tmp_path / name[1]
        assert not path.exists() or path.read_text(encoding="utf-8") == block.text, f"two recipes are called {name[1]}"
        path.write_text(block.text, encoding="utf-8")
    return tmp_path


def test_a_checkout_has_a_readme_and_docs():
    # The folder that .ci/run copies the tests to need not have them; a checkout, which has a Makefile, does.
    assert not (ROOT / "Makefile").exists() or {README, ROOT / "docs" / "index.md"} <= set(PAGES)


def test_the_readme_is_short():
    assert not README.exists() or len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_relative_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            path = target.partition("#")[0]
            if path and "://" not in target:
                assert (page.parent / path).exists(), f"{page.name}: the link to {target} leads nowhere"


def test_paths_in_sentences_exist():
    for page in PAGES:
        for word in words_in_sentences(page):
            if re.fullmatch(r"(recipes|scripts|docs|tests|llm_itemtok)/\S+", word):
                assert (ROOT / word).exists(), f"{page.name}: {word} does not exist"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)) if PAGES else set()
    named = [(page, words[1:]) for page, words in commands() if words[0] == "make"]
    named += [(page, word.split()[1:]) for page in PAGES for word in words_in_sentences(page) if word[:5] == "make "]
    for page, names in named:
        assert set(names) <= targets, f"{page.name}: make {' '.join(names)}"


def test_every_command_parses_and_its_recipe_resolves(recipes, monkeypatch):
    monkeypatch.chdir(recipes)
    for page, words in commands():
        arguments = itemtok_arguments(words)
        if arguments is None:
            continue
        options = parsed(page, arguments)
        if hasattr(options, "recipe"):
            check_settings(RunConfig.load(options.recipe, options.overrides).trainer)
        if hasattr(options, "setting"):
            assert explain(options.setting)
        if hasattr(options, "plan"):
            assert LoadedPlan.load(options.plan).confirm_cells({})


def test_every_recipe_of_the_docs_resolves(recipes):
    for recipe in recipes.glob("*.yaml"):
        if "arms" in yaml.safe_load(recipe.read_text(encoding="utf-8")):
            assert LoadedPlan.load(recipe).confirm_cells({})
        else:
            check_settings(RunConfig.load(recipe).trainer, source=recipe.name)


def test_commands_and_flags_in_sentences_exist():
    subparsers = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    flags = {flag for parser in [_parser(), *subparsers.choices.values()] for flag in parser._option_string_actions}
    for page in PAGES:
        for word in words_in_sentences(page):
            first, *rest = word.split()
            if first == "itemtok" and rest and not rest[0].startswith("-"):
                assert rest[0] in subparsers.choices, f"{page.name}: `{word}`"
            if first == "itemtok" or first.startswith("--"):
                assert {flag for flag in word.split() if flag.startswith("--")} <= flags, f"{page.name}: `{word}`"


def test_settings_in_sentences_exist_and_take_the_values_that_stand_beside_them():
    sections = set(yaml.safe_load(RunConfig(data=Data(source="synthetic")).to_yaml())) | {"trainer"}
    for page in PAGES:
        for word in words_in_sentences(page):
            match = SETTING.fullmatch(word)
            if not match or match["name"].split(".")[0] not in sections or match["name"].endswith(FILES):
                continue
            if match["name"].startswith("trainer."):
                assert match["name"].partition(".")[2] in TrainingArguments.__dataclass_fields__, f"{page.name}: {word}"
                continue
            meaning = explain(match["name"])
            choices = {choice for line in re.findall(r"one of ([^;)]+)", meaning) for choice in line.split(", ")}
            assert not match["value"] or not choices or match["value"] in choices, f"{page.name}: `{word}`"


def settings_below(section: str) -> set[str]:
    """Every setting of a section and of the sections in it, dotted."""
    lines = re.findall(r"^  ([\w.]+): .*\n      \((.*)\)", explain(section), re.MULTILINE)
    inner = {name for name, kind in lines if kind.startswith("a mapping") and explain(name).startswith(name)}
    return {name for name, _ in lines} - inner | {name for part in inner for name in settings_below(part)}


def test_the_page_on_recipes_names_every_setting():
    page = ROOT / "docs" / "recipes.md"
    if page.exists():
        named = {word.partition(":")[0] for word in words_in_sentences(page)}
        assert settings_below("") - named == set()


def test_python_in_the_docs_compiles():
    for block in blocks("python"):
        ast.parse(block.text, filename=block.page.name)


def test_python_in_the_docs_runs_after_the_quickstart(tmp_path):
    runnable = [block for block in blocks("python") if block.run]
    assert runnable or not PAGES
    script = [
        "from llm_itemtok import RunConfig, run",
        f"run(RunConfig.load({str(ROOT / 'recipes' / 'quickstart.yaml')!r}, {SMALL!r}), 'runs/quickstart')",
        *(f"exec(compile({block.text!r}, {block.page.name!r}, 'exec'), {{}})" for block in runnable),
        "print('all of it ran')",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all of it ran\n")
