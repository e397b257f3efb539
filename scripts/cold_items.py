"""How well a model ranks items that it was given after training: beside nearest texts and chance.

Some items are taken out of a recipe's data, catalogue and log. The recipe is carried out on the rest, `extend` gives
the model the items that were taken out, and then users are asked for whose last item is one of them: what came before
it, without the items taken out, is the history. So the model has seen neither the item nor anything later.

    python scripts/cold_items.py recipes/quickstart.yaml --share 0.1
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions
from llm_itemtok.data.synthetic import write_folder
from llm_itemtok.evaluation.metrics import metrics_from_ranks, ranks_from_scores
from llm_itemtok.items.vectors import tfidf_svd
from llm_itemtok.pipeline.extend import extend
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender

SHOWN = ("recall@10", "ndcg@10", "recall@20")


def main() -> None:
    """Hold out, train, extend, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="of the items, to take out (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    options = parser.parse_args()
    config = RunConfig.load(options.recipe, options.overrides)
    data = load_data(config.data, config.seed, {})
    size = len(data.catalog)
    cold = np.zeros(size, dtype=bool)
    cold[np.random.default_rng(options.seed).choice(size, round(options.share * size), replace=False)] = True
    rows = np.concatenate([np.flatnonzero(~cold), np.flatnonzero(cold)])  # as the extended model has them
    with tempfile.TemporaryDirectory() as place:
        recommender = _trained(options, data.catalog, data.interactions, cold, Path(place))
    cases = _cases(data.interactions, cold, np.argsort(rows), recommender.generation.history_length)
    print(f"{cold.sum():,} of {size:,} items taken out; {len(cases):,} users whose last item is one of them")
    texts = [data.catalog.text(row) for row in rows.tolist()]
    _table(_scores(recommender, texts, cases, int((~cold).sum())), cases, int(cold.sum()))


def _trained(
    options: argparse.Namespace, catalog: Catalog, log: Interactions, cold: np.ndarray, place: Path
) -> Recommender:
    """The recipe, carried out without the cold items, and then given them."""
    warm_rows = np.cumsum(~cold) - 1
    kept = log.take(~cold[log.items])
    warm = dataclasses.replace(kept, items=warm_rows[kept.items])
    write_folder(catalog.subset(np.flatnonzero(~cold)), warm, place / "data")
    write_folder(catalog.subset(np.flatnonzero(cold)), log.take(np.zeros(len(log), dtype=bool)), place / "new")
    overrides = ["data.source=folder", f"data.path={place / 'data'}", "data.k_core=0"]
    config = RunConfig.load(options.recipe, [*options.overrides, *overrides, "evaluation.baselines=[popularity]"])
    folder = run(config, place / "run", log=print)
    print(extend(folder, place / "new" / "items.jsonl", log=print))
    return Recommender.from_pretrained(folder)


def _cases(log: Interactions, cold: np.ndarray, row_of: np.ndarray, length: int) -> list[tuple[np.ndarray, int]]:
    """Histories and targets, as rows of the extended model."""
    found = []
    for user in range(log.num_users):
        items = log.of(user)
        history = items[:-1][~cold[items[:-1]]]
        if cold[items[-1]] and len(history):
            found.append((row_of[history][-length:], int(row_of[items[-1]])))
    return found


def _scores(
    recommender: Recommender, texts: list[str], cases: list[tuple[np.ndarray, int]], warm: int
) -> dict[str, np.ndarray]:
    """Scores of every item for every case, by who gives them; float64 `[cases, items]`."""
    ids = recommender.item_ids
    vectors = tfidf_svd(texts[:warm], others=texts[warm:])
    near = vectors @ vectors.T
    model = [recommender.score([ids[row] for row in history.tolist()], ids) for history, _ in cases]
    return {
        "model, extended": np.array(model),
        "nearest text, whole history": np.array([near[history].mean(axis=0) for history, _ in cases], dtype=np.float64),
        "nearest text, last item": np.array([near[history[-1]] for history, _ in cases], dtype=np.float64),
    }


def _table(scores: dict[str, np.ndarray], cases: list[tuple[np.ndarray, int]], cold: int) -> None:
    targets = np.array([target for _, target in cases])
    items = next(iter(scores.values())).shape[1]
    for what, first in (("among all items", 0), ("among the items taken out", items - cold)):
        print(f"\n{what}: {items - first:,}")
        print(f"{'':<28}" + "".join(f"{name:>12}" for name in SHOWN))
        for name, values in scores.items():
            metrics = metrics_from_ranks(ranks_from_scores(values[:, first:], targets - first))
            print(f"{name:<28}" + "".join(f"{metrics[shown]:>12.4f}" for shown in SHOWN))
        among = items - first
        gains = 1 / np.log2(np.arange(2, 12))[:among]
        chance = (min(1.0, 10 / among), gains.sum() / among, min(1.0, 20 / among))
        print(f"{'chance':<28}" + "".join(f"{value:>12.4f}" for value in chance))


if __name__ == "__main__":
    main()
