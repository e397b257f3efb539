"""Whatever kills a run, and wherever: gone on with, it ends as one that nothing happened to.

The recipe is a small one whose item tokens are updated, so that a kill can fall into everything that a run does. What
happens is drawn with a seed: a signal at any moment, death in the middle of a write, of a deletion or of an update, and
between two runs a flipped bit in a checkpoint.
"""

import json
import random
import signal

import pytest

from llm_itemtok.items.codes import ItemCodes
from tests.chaos.child import PLACES, Run

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 16, collisions: reassign}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
examples: {history_length: 8, tasks: {next-item: 1.0, title-to-item: 0.3}}
update:
  {kind: self-improve, source: both, every: {steps: 8}, outliers: 0.2, candidates: 4, adapt: 0.2, tolerance: 0.9}
trainer: {max_steps: 40, per_device_train_batch_size: 16, learning_rate: 2.0e-3, logging_steps: 1, use_cpu: true}
evaluation: {every: 0.2, baselines: [popularity]}
"""
TIMES = ("seconds", "peak_mb", "speed", "_share")
"""What tells of times and memory, by its place in `metrics.json` and by its name in the log of updates."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("chaos") / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(recipe):
    """The run that nothing happens to."""
    run = Run(recipe, recipe.parent / "straight")
    assert run.end() == 0, run.said()
    return recipe.parent / "straight"


def left(folder):
    """What must be the same: the metrics, each version of the codes, the trained model, the logs."""
    metrics = flat(json.loads((folder / "metrics.json").read_text()), "metrics")
    log, rounds = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "updates.jsonl")
    )
    return {
        **{place: value for place, value in metrics.items() if not any(word in place for word in TIMES)},
        "codes": {path.name: ItemCodes.load(path).sha256 for path in sorted((folder / "codes").glob("v*"))},
        "log": [line for line in log if "train_runtime" not in line],
        "rounds": [{name: part for name, part in line.items() if not name.endswith(TIMES)} for line in rounds],
        "model": (folder / "model" / "model.safetensors").read_bytes(),
        "ranks": (folder / "ranks.parquet").read_bytes(),
    }


def flat(value, place):
    """The leaves of nested dictionaries by their places, so that a difference is told by its place."""
    if not isinstance(value, dict):
        return {place: value}
    return {at: leaf for name, part in value.items() for at, leaf in flat(part, f"{place}.{name}").items()}


def flip_a_bit(folder, draw):
    """Somewhere in a checkpoint; says where, None if there is none."""
    files = sorted(path for path in folder.glob("checkpoints/checkpoint-*/*") if path.is_file() and path.stat().st_size)
    if not files:
        return None
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))
    return f"{path.parent.name}/{path.name}"


def kill_once(recipe, out, draw):
    """Go on with a run until something drawn happens to it; says what, None if it came to its end before."""
    kind = draw.choice(["SIGKILL", "SIGTERM", *PLACES])
    if kind in PLACES:
        count = draw.randint(1, 8 if kind == "replace" else 3)
        run = Run(recipe, out, place=kind, count=count, delay=draw.random() / 4)
        status = run.end()
    else:
        run = Run(recipe, out)
        run.wait(draw.uniform(0.1, 5.0))
        run.signal(getattr(signal, kind))
        status = run.end()
    assert status in (0, 143, -signal.SIGTERM, -signal.SIGKILL), f"{kind}: {run.said()}"
    return None if status == 0 else f"{kind} → {status}"


def torment(recipe, folder, straight, *, kills, seed):
    """Kill, damage and go on until there were so many kills; each run that comes to its end is compared."""
    draw, happened, lives, compared = random.Random(seed), [], 0, 0
    while len(happened) < kills:
        out = folder / f"run-{lives}"
        what = kill_once(recipe, out, draw)
        if what is None:
            assert left(out) == left(straight), happened
            lives, compared = lives + 1, compared + 1
        else:
            happened.append(what)
            if draw.random() < 0.3 and (where := flip_a_bit(out, draw)):
                happened[-1] += f", flipped {where}"
    out = folder / f"run-{lives}"
    last = Run(recipe, out)
    assert last.end() == 0, f"{happened}\n{last.said()}"
    assert left(out) == left(straight), happened
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in straight.iterdir()), happened
    return happened, compared + 1


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(1))
def test_after_twenty_kills_a_run_ends_as_one_without(recipe, straight, tmp_path, seed):
    happened, ends = torment(recipe, tmp_path, straight, kills=20, seed=seed)
    (tmp_path / "happened.txt").write_text("\n".join([f"{ends} ends compared", *happened]))
    assert len(happened) == 20


@pytest.mark.slow
def test_after_four_kills_a_run_ends_as_one_without(recipe, straight, tmp_path):
    torment(recipe, tmp_path, straight, kills=4, seed=7)
