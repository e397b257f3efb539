"""One process = two processes, for every way to train: a whole run, from data to report, step by step.

"Equal" is what a number of the log may differ by as additions are done in another order: 1e-5 of itself. The epochs do
not divide by the batch, so their ends, where one of two processes has fewer examples or none, are among the steps.

    pytest tests/test_equality.py -m slow --log-cli-level INFO

shows the largest differences, as `docs/distributed.md` has them.
"""

import json
import logging

import pytest

from llm_itemtok.items.codes import ItemCodes
from tests.equality import carry_out, flat

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 16, collisions: reassign}
model:
  name: scratch
  scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1, dropout: 0.0}
examples: {history_length: 8}
trainer: {max_steps: 22, per_device_train_batch_size: 16, learning_rate: 5.0e-3, logging_steps: 1, use_cpu: true}
evaluation: {every: 1.0, baselines: [popularity]}
"""
"""Two epochs of 168 examples, or one and a half of 228: no dropout, whose masks would be others."""
RQVAE = "tokenizer={kind: rqvae, levels: 2, codebook_size: 16, latent: 4, hidden: [8], epochs: 10, batch_size: 20}"
SYSTEMS = {
    "plain": (),
    "plain, by length": ("trainer.train_sampling_strategy=group_by_length",),
    "SIIT": (
        "examples.tasks={next-item: 1.0, title-to-item: 0.3}",
        "update={kind: self-improve, source: both, every: {steps: 4}, outliers: 0.2, candidates: 4, adapt: 0.2, "
        "tolerance: 0.9}",
    ),
    "token weighting": ("objective={kind: token-weighted, pace: 0.05}",),
    "IntRR": ("scoring={kind: recursive, embedding: 8, hidden: 16, alignment: 0.1}",),
    "ETEGRec": (
        RQVAE,
        "tokenizer.collisions=reassign",
        "vectors={kind: collaborative, source: co-occurrence, dimensions: 8}",
        "update={kind: alternate, every: {steps: 5}, rounds: 4, warmup: 0.5, batch_size: 32, learning_rate: 0.01}",
    ),
    "BLOGER": (RQVAE, "update={kind: bilevel, every: {steps: 5}, learning_rate: 0.01}"),
}
NEAR = 1e-5
STEPS = 20
UNLIKE = ("seconds", "peak_mb", "speed", "flops", "_share")
"""What tells of times, of memory, and of padding, which is that of each process's own batches."""


def lines(path):
    """The lines of a log; none where there is no log."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [line for line in found if "train_runtime" not in line]


def comparable(value):
    return {place: leaf for place, leaf in flat(value).items() if not any(word in place for word in UNLIKE)}


def metrics(folder):
    return comparable(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def codes(folder):
    return {path.name: ItemCodes.load(path).sha256 for path in sorted((folder / "codes").glob("v*"))}


def largest(ours, theirs, wanted):
    """The largest relative difference of some numbers of lines beside each other, and its step."""
    found = [
        (abs(one[name] - other[name]) / abs(other[name]) if one[name] != other[name] else 0.0, other["step"])
        for one, other in zip(ours, theirs, strict=True)
        for name in other
        if wanted(name)
    ]
    return max(found)


def assert_near(line, other):
    """Of a round: numbers nearly, some being differences that nearly cancel; everything else to the letter."""
    assert line.keys() == other.keys()
    for place, value in other.items():
        numeric = isinstance(value, float)
        assert line[place] == (pytest.approx(value, rel=1e-4, abs=1e-5) if numeric else value), place


def shown(difference):
    value, step = difference
    return f"{value:.1e} (step {step})"


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_carry_a_recipe_out_as_one(tmp_path, system, record_property):
    """Each step's loss, terms and gradient, each update, the codes of each version, and all metrics."""
    (recipe := tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    one, two, said = tmp_path / "one", tmp_path / "two", tmp_path / "said.txt"
    settings = [word for change in SYSTEMS[system] for word in ("--set", change)]
    halved = ["--set", "trainer.per_device_train_batch_size=8"]
    carry_out(
        said,
        (1, ["run", recipe, "--out", one, *settings]),
        (2, ["run", recipe, "--out", two, *settings, *halved]),
    )
    ours, theirs = (lines(folder / "metrics.jsonl") for folder in (two, one))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    assert [line["step"] for line in theirs if "loss" in line] == list(range(1, 23))
    assert any("validation/ndcg@10" in line and line["step"] < STEPS for line in theirs)
    within = [[line for line in found if line["step"] <= STEPS] for found in (ours, theirs)]
    differences = {
        "loss and its terms": largest(*within, lambda name: name.startswith("loss")),
        "norm of the gradient": largest(*within, lambda name: name == "grad_norm"),
    }
    rounds = [[comparable(line) for line in lines(folder / "updates.jsonl")] for folder in (two, one)]
    same = metrics(two)
    carry_out(said, (1, ["run", recipe, "--out", two, *settings, *halved, "--from", "evaluate"]))
    told = {
        **{name: shown(difference) for name, difference in differences.items()},
        "codes": f"{len(codes(one))} alike" if codes(two) == codes(one) else "other",
        "metrics": "alike" if same == metrics(one) else "other",
    }
    for name, value in told.items():
        record_property(name, value)
    logging.getLogger(__name__).info(" | ".join([system, *told.values()]))

    assert all(value <= NEAR for value, _ in differences.values()), told
    assert metrics(two) == same, "metrics of the same weights must not depend on the number of processes"
    for line, other in zip(*rounds, strict=True):
        assert_near(line, other)
    assert bool(rounds[0]) == any(change.startswith("update=") for change in SYSTEMS[system])
    assert codes(two) == codes(one)
    for line, other in zip(ours, theirs, strict=True):  # the steps behind these as well
        assert line == pytest.approx(other, rel=NEAR)
    assert same == metrics(one)
