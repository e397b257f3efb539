"""Whatever kills a run, and wherever: gone on with, it ends as one that nothing happened to.

The recipes are small ones, one of each way to train, so that a kill can fall into everything that a run does. What
happens is drawn with a seed: a signal at any moment, death in the middle of a write, of a deletion, of an update of
item tokens or of a quantizer's step, and between two runs a flipped bit in a checkpoint.
"""

import json
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from llm_itemtok.items.codes import ItemCodes
from tests.chaos.child import BLOGER, ETEGREC, PLACES, SIIT, Run
from tests.equality import flat

EVERY = """
data: {source: synthetic, items: 60, users: 80}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
trainer:
  {max_steps: 40, per_device_train_batch_size: 16, learning_rate: 2.0e-3, logging_steps: 1, use_cpu: true,
   train_sampling_strategy: %s}
evaluation: {every: 0.2, baselines: [popularity]}
"""
PLAIN = """
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 16, collisions: reassign}
examples: {history_length: 8, tasks: {next-item: 1.0, title-to-item: 0.3}}
"""
RECIPE = f"""{EVERY % "random"}{PLAIN}
update:
  {{kind: self-improve, source: both, every: {{steps: 8}}, outliers: 0.2, candidates: 4, adapt: 0.2, tolerance: 0.9}}
"""
RQVAE = "kind: rqvae, levels: 2, codebook_size: 16, latent: 4, hidden: [8], epochs: 10, batch_size: 20"


class System(NamedTuple):
    """A way to train, and where beside the places of every run it can be killed."""

    recipe: str
    places: Mapping[str, int] = {}


SYSTEMS = {
    "SIIT": System(RECIPE, SIIT),
    "token-weighting": System(
        f"""{EVERY % "group_by_length"}{PLAIN}
objective: {{kind: token-weighted, pace: 0.05}}
"""
    ),
    "dense": System(
        f"""{EVERY % "random"}{PLAIN}
rescoring: {{kind: sasrec, width: 8, steps: 200}}
"""
    ),
    "IntRR": System(
        f"""{EVERY % "random"}{PLAIN}
scoring: {{kind: recursive, embedding: 8, hidden: 16, alignment: 0.1}}
"""
    ),
    "ETEGRec": System(
        f"""{EVERY % "random"}
vectors: {{kind: collaborative, source: co-occurrence, dimensions: 8}}
tokenizer: {{{RQVAE}, collisions: reassign}}
examples: {{history_length: 8}}
update: {{kind: alternate, every: {{steps: 6}}, rounds: 5, warmup: 0.5, batch_size: 32, learning_rate: 0.01}}
""",
        ETEGREC,
    ),
    "BLOGER": System(
        f"""{EVERY % "group_by_length"}
vectors: {{kind: tfidf-svd, dimensions: 16}}
tokenizer: {{{RQVAE}}}
examples: {{history_length: 8}}
update: {{kind: bilevel, every: {{steps: 3}}, learning_rate: 0.01}}
""",
        BLOGER,
    ),
}
TIMES = ("seconds", "peak_mb", "speed", "_share")
"""What tells of times and memory, by its place in `metrics.json` and by its name in the log of updates."""


class Straight(NamedTuple):
    """A run that nothing happened to: its recipe, its folder, and where its like can be killed."""

    recipe: Path
    folder: Path
    places: Mapping[str, int]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, request):
    """The run of a system."""
    system = SYSTEMS[request.param]
    recipe = tmp_path_factory.mktemp("chaos") / "tiny.yaml"
    recipe.write_text(system.recipe, encoding="utf-8")
    run = Run(recipe, recipe.parent / "straight")
    assert run.end() == 0, run.said()
    return Straight(recipe, recipe.parent / "straight", {**PLACES, **system.places})


def left(folder):
    """What must be the same: the metrics, each version of the codes, the trained model, the logs."""
    metrics = flat(json.loads((folder / "metrics.json").read_text()), "metrics")
    log, rounds = (read(folder / name) for name in ("metrics.jsonl", "updates.jsonl"))
    shares = flat(read_one(folder / "rescoring.json"), "shares")
    figures = [folder / name for name in ("token_weights.json", "item_paths.json")]
    binary = [*(folder / "model").glob("*.safetensors"), *(folder / "codes").rglob("*.safetensors")]
    return {
        **{at: value for at, value in (metrics | shares).items() if not any(word in at for word in TIMES)},
        "codes": {path.name: ItemCodes.load(path).sha256 for path in sorted((folder / "codes").glob("v*"))},
        "log": [line for line in log if "train_runtime" not in line],
        "rounds": [{name: part for name, part in line.items() if not name.endswith(TIMES)} for line in rounds],
        **{str(path.relative_to(folder)): path.read_bytes() for path in [*binary, *filter(Path.exists, figures)]},
        "ranks": (folder / "ranks.parquet").read_bytes(),
    }


def read_one(path):
    """What a file of figures holds; nothing if this way to train has none."""
    return json.loads(path.read_text()) if path.exists() else {}


def read(log):
    """The lines of a log; none of one that this way to train has not."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


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


def kinds(straight, draw):
    """What happens to a run, without end: each kind as often as any other."""
    while True:
        drawn = ["SIGKILL", "SIGTERM", *straight.places]
        draw.shuffle(drawn)
        yield from drawn


def kill_once(straight, out, kind, draw):
    """Go on with a run until this happens to it; says what, None if it came to its end before."""
    if kind in straight.places:
        run = Run(
            straight.recipe, out, place=kind, count=draw.randint(1, straight.places[kind]), delay=draw.random() / 4
        )
        status = run.end()
    else:
        run = Run(straight.recipe, out)
        run.wait(draw.uniform(0.1, 5.0))
        run.signal(getattr(signal, kind))
        status = run.end()
    assert status in (0, 143, -signal.SIGTERM, -signal.SIGKILL), f"{kind}: {run.said()}"
    return None if status == 0 else f"{kind} → {status}"


def torment(straight, folder, *, kills, seed):
    """Kill, damage and go on until there were so many kills; each run that comes to its end is compared."""
    draw, happened, lives, compared = random.Random(seed), [], 0, 0
    drawn = kinds(straight, random.Random(seed + 100))  # apart from the rest, which goes by what the machine does
    while len(happened) < kills:
        out = folder / f"run-{lives}"
        what = kill_once(straight, out, next(drawn), draw)
        if what is None:
            assert left(out) == left(straight.folder), happened
            lives, compared = lives + 1, compared + 1
        else:
            happened.append(what)
            if draw.random() < 0.3 and (where := flip_a_bit(out, draw)):
                happened[-1] += f", flipped {where}"
    out = folder / f"run-{lives}"
    last = Run(straight.recipe, out)
    assert last.end() == 0, f"{happened}\n{last.said()}"
    assert left(out) == left(straight.folder), happened
    names = [sorted(path.name for path in place.iterdir()) for place in (out, straight.folder)]
    assert names[0] == names[1], happened
    return happened, compared + 1


@pytest.mark.chaos
@pytest.mark.parametrize(("straight", "seed"), [(name, at) for at, name in enumerate(SYSTEMS)], indirect=["straight"])
def test_after_twenty_kills_a_run_ends_as_one_without(straight, tmp_path, seed):
    happened, ends = torment(straight, tmp_path, kills=20, seed=seed)
    (tmp_path / "happened.txt").write_text("\n".join([f"{ends} ends compared", *happened]))
    assert len(happened) == 20
    own = tuple(straight.places.keys() - PLACES.keys())
    assert not own or any(what.startswith(own) for what in happened), "none fell into what is its own"


@pytest.mark.slow
@pytest.mark.parametrize("straight", ["SIIT"], indirect=True)
def test_after_four_kills_a_run_ends_as_one_without(straight, tmp_path):
    torment(straight, tmp_path, kills=4, seed=7)
