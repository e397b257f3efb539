"""A pinned tiny run: it tells when a change of the code alters results.

If it fails and the change is meant, raise `RESULTS_VERSION` (recorded runs of experiment plans become stale, and are
run again by the next `itemtok reproduce`), and write the new numbers here under it. Rounding differs a little between
machines and library releases, hence the tolerances; what a change of method does is far above them.
"""

import json

import pytest

from llm_itemtok.config import RunConfig
from llm_itemtok.pipeline.run import run
from llm_itemtok.pipeline.stages import RESULTS_VERSION

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: KIND, levels: 2, codebook_size: 8}
model:
  name: scratch
  input_dropout: 0.1
  output_dropout: 0.1
  scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}
examples: {history_length: 8, tasks: {next-item: 1.0, title-to-item: 0.2, item-to-title: 0.1}}
trainer: {max_steps: 12, per_device_train_batch_size: 16, learning_rate: 5.0e-3, logging_steps: 4, use_cpu: true}
evaluation: {every: 1, baselines: [popularity, markov, item-knn]}
"""
PINNED = {
    1: {
        "residual-kmeans": {"losses": [2.13641, 2.06791, 2.17476], "test": 0.23902},
        "rqvae": {"losses": [2.16017, 2.10572, 2.21922], "test": 0.23083},
        "random": {"losses": [2.19519, 2.09957, 2.16185], "test": 0.12086},
    }
}
BASELINES = {"popularity": 0.123658319, "markov": 0.493005412, "item-knn": 0.586777915}


def measured(folder, kind):
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("KIND", kind), encoding="utf-8")
    out = run(RunConfig.load(path), folder / "run", until="evaluate")
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {"losses": [line["loss"] for line in log if "loss" in line], "test": metrics["test"]["ndcg@20"]}, metrics


@pytest.mark.parametrize("kind", PINNED[RESULTS_VERSION])
def test_results_are_those_of_this_results_version(tmp_path, kind):
    found, metrics = measured(tmp_path, kind)
    expected = PINNED[RESULTS_VERSION][kind]
    message = f"results changed: {found}; if that is meant, raise RESULTS_VERSION and pin the new numbers"
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3), message
    assert found["test"] == pytest.approx(expected["test"], abs=0.02), message
    baselines = {name: metrics["baselines"][name]["test"]["ndcg@20"] for name in BASELINES}
    assert baselines == pytest.approx(BASELINES, abs=1e-6)
