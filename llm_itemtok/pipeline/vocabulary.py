"""The stage `vocab`: the item tokens of a run, and what their vectors begin as."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_itemtok.artifacts import CODES, atomic_folder
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError, RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model import item_network
from llm_itemtok.model.prompts import encode_text
from llm_itemtok.model.rows import input_table
from llm_itemtok.pipeline.base_model import base_model
from llm_itemtok.pipeline.prepare import Dataset, Log, item_vectors
from llm_itemtok.vocab import init
from llm_itemtok.vocab.text_vocab import extended

VOCAB = "vocab"


def make_vocab(config: RunConfig, data: Dataset, codes: ItemCodes, folder: Path, log: Log) -> None:
    """Compute the initial rows of the item tokens; write them to `vocab/`."""
    lm, tokenizer = base_model(config, data.catalog, folder, log)
    vocab = extended(tokenizer, codes, known=config.vocab.init == "base")
    table = input_table(lm).weight.detach().float().cpu()  # a quantised model is on its accelerator by now
    if vocab.num_tokens == 0:
        rows = table[:0]
    elif config.vocab.init == "base":
        refuse_network(config)
        rows = table[vocab.first_id : vocab.first_id + vocab.num_tokens]
    elif config.vocab.init == "text-mean":
        rows = init.text_mean(vocab, table, encode_text(tokenizer, data.catalog.texts()), seed=config.seed)
    elif config.vocab.init == "codebook":
        matrix = item_vectors(config, data, folder, log)
        assert matrix is not None
        rows = init.codebook(vocab, table, matrix, seed=config.seed)
    else:
        rows = init.normal(vocab, table, seed=config.seed)
    with atomic_folder(folder / VOCAB) as new:
        save_file({"rows": rows.contiguous()}, new / "initial_rows.safetensors")
    if vocab.num_tokens == 0:
        log(f"  no new tokens, so no initial rows; an item is such as {vocab.spell(0)}")
    else:
        log(f"  {vocab.num_tokens:,} item tokens from id {vocab.first_id:,}; an item is such as {vocab.spell(0)}")


def refuse_network(config: RunConfig) -> None:
    """Raise `RecipeError` if training is to go on from a bundle that has more of its items than their tokens."""
    if (network := Path(config.model.name) / item_network.FILE_NAME).is_file():
        raise RecipeError(
            f"{network}: `vocab.init: base` goes on with item tokens alone, but this model knows more of its "
            "items; choose a bundle of `scoring.kind: tokens`"
        )


def read_vocab(folder: Path) -> tuple[ItemCodes, Tensor]:
    """Codes and initial rows float32 `[T, D]` of a run.

    Raises:
        ArtifactError: if a stage before has not run.
    """
    rows = folder / VOCAB / "initial_rows.safetensors"
    if not rows.is_file():
        raise ArtifactError(
            f"{rows}: the stage `vocab` must have run, but its file is missing; start with `--from vocab`"
        )
    return ItemCodes.load(folder / CODES / "v0"), load_file(rows)["rows"]
