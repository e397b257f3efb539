"""What becomes of a trained model's logits on every way out of training and back: one cell of the adapter matrix.

`scripts/adapter_matrix.py` prints the whole of it for the documentation, `test_matrix.py` holds it to its bounds.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from llm_itemtok.bundle import Generation
from llm_itemtok.model import export
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import add_lora, load_base, with_item_tokens
from llm_itemtok.pipeline.merge import merge
from llm_itemtok.recommender import Recommender
from llm_itemtok.vocab import init
from tests.tiny import hidden, logits, plain_class, tiny_codes, tiny_lm, tiny_tokenizer
from tests.training.runs import make_trainer

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "t5")
TIES = ("tied", "untied")
MODES = ("lora", "dora", "full")
IDS = torch.randint(0, 36, (2, 11), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Cell:
    """Largest differences of logits, as shares of the largest logit, and sizes in bytes.

    Attributes:
        load: after saving and loading here.
        peft: as plain `peft` loads the adapter; None where there is none.
        merge: as plain `transformers` loads the merged model, or the whole one.
        resume: of a training that was cut in two.
        file: the adapter's weights; 0 where there is none.
        tensors: of it, what is not its table of contents.
        names: tensors in it.
        lora: LoRA weights alone.
        rows: item rows of both sides, or of the one side where they are tied.
        moved: rows of text tokens that training changed.
    """

    load: float
    peft: float | None
    merge: float
    resume: float
    file: int
    tensors: int
    names: int
    lora: int
    rows: int
    moved: int


def build(base: Path, mode: str) -> tuple[ItemTokenModel, object, PeftModel | None]:
    """A model with item tokens as training begins, its tokenizer, and PEFT's view of it if it has LoRA."""
    lm, tokenizer = load_base(base)
    peft_model = None
    if mode != "full":
        lm, peft_model = add_lora(lm, rank=2, alpha=4, dropout=0.0, rslora=False, seed=0, dora=mode == "dora")
    model = with_item_tokens(lm, tokenizer, tiny_codes(), lambda vocab, table: init.normal(vocab, table, seed=0))
    return model, tokenizer, peft_model


def recommender(base: Path, model: ItemTokenModel, tokenizer: object, peft_model: PeftModel | None) -> Recommender:
    """The trained model as a bundle is made of it."""
    generation = Generation(
        layout="merged" if peft_model is None else "adapter",
        base=str(base),
        revision=None,
        normaliser="level",
        training_normaliser="level",
        beam=20,
        history_length=5,
        mask_seen=False,
        catalog_sha256="0" * 64,
        codes_sha256=model.vocab.codes.sha256,
        dtype="float32",
    )
    ids = [f"item-{row}" for row in range(60)]
    return Recommender(model, tokenizer, item_ids=ids, titles=ids, generation=generation, peft_model=peft_model)


@torch.no_grad()
def ours(model: ItemTokenModel) -> torch.Tensor:
    """Logits over the extended vocabulary."""
    model.eval()
    return model.vocab_logits(hidden(model, IDS))


def plain_peft(family: str, tied: bool, base: Path, bundle: Path) -> PreTrainedModel:
    """The lines of a bundle's card."""
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    lm = plain_class(family).from_pretrained(base)
    if not tied:
        lm.config.tie_word_embeddings = False
    lm.resize_token_embeddings(max(lm.config.vocab_size, len(tokenizer)), mean_resizing=False)
    return PeftModel.from_pretrained(lm, bundle).eval()


def measure(family: str, tie: str, mode: str, folder: Path) -> Cell:
    """Train for four steps, with a checkpoint after two, and take every way out."""
    base, tied = folder / "base", tie == "tied"
    tiny_lm(family, tied=tied, padding=7).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = {"steps": 4, "every": 2, "family": family, "optim": "adamw_torch", "learning_rate": 0.02}
    model, tokenizer, peft_model = build(base, mode)
    table = model.lm.get_input_embeddings().weight.detach().clone()
    make_trainer(folder / "run", model=model, **settings).train()
    moved = int((model.lm.get_input_embeddings().weight != table).any(1).sum())
    expected = ours(model)
    largest = expected.abs().max()

    again, _, _ = build(base, mode)
    checkpoint = folder / "run" / "checkpoints" / "checkpoint-2"
    make_trainer(folder / "resumed", model=again, **settings).train(resume_from_checkpoint=str(checkpoint))

    bundle = recommender(base, model, tokenizer, peft_model).save_pretrained(folder / "bundle")
    whole = bundle if mode == "full" else merge(bundle, folder / "merged")
    found = {
        "load": ours(Recommender.from_pretrained(bundle).model),
        "merge": logits(plain_class(family).from_pretrained(whole).eval(), IDS).detach(),
        "resume": ours(again),
    }
    if mode != "full":
        with torch.no_grad():
            found["peft"] = logits(plain_peft(family, tied, base, bundle), IDS)
    differences = {name: float((value - expected).abs().max() / largest) for name, value in found.items()}
    return Cell(**{"peft": None, **differences}, **_sizes(bundle / export.ADAPTER_WEIGHTS, model), moved=moved)


def _sizes(weights: Path, model: ItemTokenModel) -> dict[str, int]:
    tensors = load_file(weights) if weights.is_file() else {}
    return {
        "file": weights.stat().st_size if tensors else 0,
        "tensors": sum(value.nbytes for value in tensors.values()),
        "names": len(tensors),
        "lora": sum(value.nbytes for name, value in tensors.items() if ".lora_" in name),
        "rows": sum(part.nbytes for part in model.rows.parameters()),
    }
