"""Every recipe is read here; what one of them does from end to end is tested under the marker `recipe`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_itemtok import artifacts
from llm_itemtok.config import RunConfig
from llm_itemtok.experiments.plan import LoadedPlan
from llm_itemtok.training.arguments import check_settings

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if not {"accelerate", "plans"} & set(path.parts))
PLANS = sorted((ROOT / "recipes" / "plans").glob("*.yaml"))
MAX_LINES = 60

SMALL = [
    "data.items=60",
    "data.users=80",
    "model.scratch.layers=1",
    "model.scratch.width=32",
    "model.scratch.heads=2",
    "model.scratch.pretrain_epochs=1",
    "tokenizer.codebook_size=16",
    "trainer.max_steps=20",
]
"""What makes the quickstart a matter of seconds."""


def _name(path):
    return path.relative_to(ROOT / "recipes").as_posix()


def test_the_quickstart_is_among_them():
    assert ROOT / "recipes" / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_a_recipe_resolves(path, monkeypatch, tmp_path):
    for name in ("ITEMTOK_DATA", "ITEMTOK_MINILM"):
        monkeypatch.setenv(name, str(tmp_path))
    config = RunConfig.load(path)
    check_settings(config.trainer, source=str(path))
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.load(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_a_recipe_says_what_it_is_and_how_to_run_it_in_sixty_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert lines[0].startswith("# ")
    assert f"itemtok run recipes/{_name(path)}" in header


@pytest.mark.parametrize("path", PLANS, ids=_name)
def test_a_plan_resolves_and_is_named_after_its_file(path, monkeypatch, tmp_path):
    for name in ("ITEMTOK_DATA", "ITEMTOK_MINILM"):
        monkeypatch.setenv(name, str(tmp_path))
    loaded = LoadedPlan.load(path)
    assert loaded.plan.name == path.stem
    for cell in (*loaded.tuning_cells(), *loaded.confirm_cells({})):
        check_settings(cell.config.trainer, source=cell.name)
    loaded.check()
    assert f"itemtok reproduce recipes/plans/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.recipe
@pytest.mark.parametrize(("name", "further"), [("quickstart", ()), ("siit-quickstart", ("update.every.epochs=2",))])
def test_a_quickstart_leaves_a_whole_run_folder(tmp_path, name, further):
    out = tmp_path / "run"
    settings = [part for setting in (*SMALL, *further) for part in ("--set", setting)]
    recipe = str(ROOT / "recipes" / f"{name}.yaml")
    command = [sys.executable, "-m", "llm_itemtok", "run", recipe, "--out", str(out), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = (
        artifacts.RECIPE, artifacts.ENVIRONMENT, artifacts.METRICS_LOG, artifacts.METRICS, artifacts.CODES,
        artifacts.PREDICTIONS, artifacts.MODEL, artifacts.REPORT,
    )  # fmt: skip
    assert [name for name in names if not (out / name).exists()] == []
    metrics = json.loads((out / artifacts.METRICS).read_text(encoding="utf-8"))
    assert {"protocol", "test", "ci95", "segments", "validation", "baselines", "codes", "speed"} <= set(metrics)
    assert RunConfig.load(out / artifacts.RECIPE).data.items == 60
