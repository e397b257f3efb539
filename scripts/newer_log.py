"""What training on from a bundle keeps and gains: an older log, then a newer one of other users, with new items.

Half of a recipe's users are yesterday's, without some items that are not there yet. The recipe is carried out on their
log; `extend` gives the model the new items; then training goes on from that bundle on the log of the other half alone
(`vocab.init: base`). Both halves are asked for their last items by the model before, after, and by one trained on the
newer log from the beginning.

    python scripts/newer_log.py recipes/scientific-small.yaml --epochs 5
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions
from llm_itemtok.data.splits import Cases
from llm_itemtok.data.synthetic import write_folder
from llm_itemtok.evaluation.metrics import metrics_from_ranks
from llm_itemtok.pipeline.evaluate import rank
from llm_itemtok.pipeline.extend import extend
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender

SHOWN = ("recall@10", "ndcg@10")


def main() -> None:
    """Split, train, extend, go on, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--new", type=float, default=0.05, help="share of the items that are new (default: 0.05)")
    parser.add_argument("--epochs", type=float, default=5.0, help="of the training that goes on (default: 5)")
    parser.add_argument("--learning-rate", type=float, default=5.0e-4, help="of it (default: 5.0e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    options = parser.parse_args()
    config = RunConfig.load(options.recipe, options.overrides)
    data = load_data(config.data, config.seed, {})
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _write(data.catalog, data.interactions, options, place)
        first = _run(options, place / "yesterday", place / "first")
        print(extend(first, place / "new" / "items.jsonl", out=place / "extended", log=print))
        fresh = _run(options, place / "newer", place / "fresh")
        on = _run(options, place / "newer", place / "on", *_going_on(options, place / "extended"))
        cases = [_cases(options, place / half) for half in ("yesterday", "newer")]
        print(f"\n{'':<38}{'yesterday, ' + str(len(cases[0])) + ' users':>26}{f'newer, {len(cases[1])} users':>26}")
        print(f"{'':<38}" + "".join(f"{shown:>13}" for shown in SHOWN * 2))
        for title, folder in (("before", place / "extended"), ("after", on), ("the newer log alone", fresh)):
            recommender = Recommender.from_pretrained(folder)
            found = [
                metrics_from_ranks(rank(recommender, half, batch_size=64, log=_nothing, what="").ranks)[shown]
                for half in cases
                for shown in SHOWN
            ]
            print(f"{title:<38}" + "".join(f"{value:>13.4f}" for value in found))


def _write(catalog: Catalog, log: Interactions, options: argparse.Namespace, place: Path) -> None:
    """The folders of both halves, and the new items alone; the new ones stand last in the newer catalogue."""
    random = np.random.default_rng(options.seed)
    new = np.zeros(len(catalog), dtype=bool)
    new[random.choice(len(catalog), round(options.new * len(catalog)), replace=False)] = True
    newer = np.zeros(log.num_users, dtype=bool)
    newer[random.choice(log.num_users, log.num_users // 2, replace=False)] = True
    users = np.repeat(np.arange(log.num_users), np.diff(log.offsets))
    rows = np.concatenate([np.flatnonzero(~new), np.flatnonzero(new)])
    row_of = np.argsort(rows)
    whole = catalog.subset(rows)
    for name, kept, items in (
        ("yesterday", ~newer[users] & ~new[log.items], int((~new).sum())),
        ("newer", newer[users], len(catalog)),
    ):
        part = log.take(kept)
        part = dataclasses.replace(part, items=row_of[part.items])
        write_folder(whole.subset(np.arange(items)), part, place / name)
    nothing = log.take(np.zeros(len(log), dtype=bool))
    write_folder(catalog.subset(np.flatnonzero(new)), nothing, place / "new")


def _run(options: argparse.Namespace, data: Path, out: Path, *overrides: str) -> Path:
    settings = ["data.source=folder", f"data.path={data}", "data.k_core=0", "evaluation.baselines=[popularity]"]
    return run(RunConfig.load(options.recipe, [*options.overrides, *settings, *overrides]), out, log=print)


def _going_on(options: argparse.Namespace, bundle: Path) -> list[str]:
    return [
        f"model.name={bundle}",
        f"tokenizer={{kind: file, path: {bundle}}}",
        "vocab.init=base",
        f"trainer.num_train_epochs={options.epochs}",
        f"trainer.learning_rate={options.learning_rate}",
    ]


def _cases(options: argparse.Namespace, data: Path) -> Cases:
    """Test cases of a half; its items are the first ones of the newer catalogue."""
    settings = ["data.source=folder", f"data.path={data}", "data.k_core=0"]
    config = RunConfig.load(options.recipe, [*options.overrides, *settings])
    return load_data(config.data, config.seed, {}).split.test


def _nothing(_line: str) -> None:
    """Says nothing."""


if __name__ == "__main__":
    main()
