"""Turn a pretrained language model into a recommender with item tokens.

    from llm_itemtok import RunConfig, Recommender, run

    run(RunConfig.load("recipes/quickstart.yaml"), "runs/quickstart")
    model = Recommender.from_pretrained("runs/quickstart")
    for item in model.recommend(["bk00007", "bk00012"], k=5):
        print(item.rank, item.title, item.score)

Public names are resolved on first use: importing the package loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_itemtok.config import RunConfig
    from llm_itemtok.data.catalog import Catalog
    from llm_itemtok.data.interactions import Interactions
    from llm_itemtok.ensemble import Ensemble
    from llm_itemtok.evaluation.full_ranking import rank_cases
    from llm_itemtok.items.base import ItemTokenizer
    from llm_itemtok.items.codes import ItemCodes
    from llm_itemtok.pipeline.run import run
    from llm_itemtok.recommender import Recommender
    from llm_itemtok.training.objective import Objective
    from llm_itemtok.training.trainer import ItemTokenTrainer
    from llm_itemtok.vocab.item_vocab import ItemVocab
    from llm_itemtok.vocab.trie import ItemTrie

_PLACES = {
    "Catalog": ("data.catalog", "Catalog"),
    "Ensemble": ("ensemble", "Ensemble"),
    "Interactions": ("data.interactions", "Interactions"),
    "ItemCodes": ("items.codes", "ItemCodes"),
    "ItemTokenTrainer": ("training.trainer", "ItemTokenTrainer"),
    "ItemTokenizer": ("items.base", "ItemTokenizer"),
    "ItemTrie": ("vocab.trie", "ItemTrie"),
    "ItemVocab": ("vocab.item_vocab", "ItemVocab"),
    "Objective": ("training.objective", "Objective"),
    "Recommender": ("recommender", "Recommender"),
    "RunConfig": ("config", "RunConfig"),
    "rank_cases": ("evaluation.full_ranking", "rank_cases"),
    "run": ("pipeline.run", "run"),
}

__all__ = [
    "Catalog",
    "Ensemble",
    "Interactions",
    "ItemCodes",
    "ItemTokenTrainer",
    "ItemTokenizer",
    "ItemTrie",
    "ItemVocab",
    "Objective",
    "Recommender",
    "RunConfig",
    "rank_cases",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
