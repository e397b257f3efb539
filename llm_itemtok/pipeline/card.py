"""The bundle's model card: what it is, how to use it with and without this package, what was measured.

Written from `metrics.json` and `generation.json` alone, so it says nothing about users and names no local path.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_itemtok.bundle import Generation
from llm_itemtok.training.next_token import NextToken

_MERGED = """from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = {auto}.from_pretrained(FOLDER)"""

_ADAPTER = """from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
base = {auto}.from_pretrained("{base}")
{untie}base.resize_token_embeddings(max(base.config.vocab_size, len(tokenizer)), mean_resizing=False)
model = PeftModel.from_pretrained(base, FOLDER)"""

_CARD = """---
library_name: transformers
tags: [recommendation, semantic-ids, llm-itemtok]
{front}---

# A recommender over {items:,} items

A language model whose vocabulary was extended by item tokens; each item is a path of {levels} of them
(`{spelling}` is one). Given the items of a history, it ranks the whole catalogue.

## Use

```python
from llm_itemtok import Recommender

recommender = Recommender.from_pretrained(FOLDER)
for item in recommender.recommend(HISTORY, k=10):  # item ids, oldest first
    print(item.rank, item.item_id, item.title, item.score)
```

Without that package, the model and its tokenizer load as usual:

```python
{plain}
```

`items.jsonl` gives the item tokens of every item. {prompt}; only paths of existing items are answers, so decode with a
constraint.

## Measured

Protocol: {split}, {k_core}-core, histories of {history} items at most, full ranking over all items
(seen items {seen}), beam {beam}, scores normalised over the {normaliser}, seed {seed}; {users:,} test users.

{table}

Intervals are 95 % by bootstrap over users. Trained on {interactions:,} interactions of {train_users:,} users.

## Citation

```bibtex
{citation}
```
"""


_PROMPTS = {
    False: "A prompt is the start token followed by the item tokens of the\nhistory",
    True: "The encoder reads the item tokens of the history and the end\ntoken",
}
"""By whether the model has an encoder."""


def card(
    metrics: Mapping[str, Any], generation: Generation, *, levels: int, spelling: str, encoder: bool, tied: bool
) -> str:
    """Write the card.

    Args:
        metrics: as in `metrics.json`.
        generation: of the bundle.
        levels: tokens an item has.
        spelling: item tokens of some item.
        encoder: whether the model is an encoder–decoder.
        tied: whether its head is its input table.
    """
    protocol, counts = metrics["protocol"], metrics["protocol"]["counts"]
    on_hub = generation.base is not None and not Path(generation.base).exists()
    base = generation.base if on_hub else "BASE"
    # The library takes every T5's head for tied, and without this would make it so where the table grows.
    untie = "base.config.tie_word_embeddings = False\n" if encoder and not tied else ""
    plain = (_ADAPTER if generation.layout == "adapter" else _MERGED).format(
        base=base, untie=untie, auto="AutoModelForSeq2SeqLM" if encoder else "AutoModelForCausalLM"
    )
    return _CARD.format(
        front=f"base_model: {generation.base}\n" if on_hub else "",
        items=counts["items"],
        levels=levels,
        spelling=spelling,
        plain=plain,
        prompt=_PROMPTS[encoder],
        split=protocol["split"],
        k_core=protocol["k_core"],
        history=protocol["history_length"],
        seen="left out" if protocol["mask_seen"] else "included",
        beam=protocol["beam"],
        normaliser=protocol["normaliser"],
        seed=protocol["seed"],
        users=counts["test_cases"],
        interactions=counts["train_interactions"],
        train_users=counts["train_users"],
        table=_table(metrics, ("recall@5", "recall@10", "ndcg@10", "mrr@20")),
        citation=NextToken.citation,
    )


def _table(metrics: Mapping[str, Any], keys: Sequence[str]) -> str:
    rows = [("this model", metrics), *metrics["baselines"].items()]
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, part in rows:
        cells = ["{:.4f} [{:.4f}, {:.4f}]".format(part["test"][key], *part["ci95"][key]) for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
