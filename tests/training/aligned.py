"""Short, real runs with ETEGRec's alignments, out of those of `runs.py`; as a script, one of several processes."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_itemtok.items.rqvae import RQVAEQuantizer
from llm_itemtok.training.alignment import Adapters, Alignments, Pool, WithAlignments
from llm_itemtok.training.collator import WithTargetItems
from llm_itemtok.training.trainer import ItemTokenTrainer
from tests.training.runs import make_trainer, weights

VECTORS = torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
BOTH = Alignments(sequence=0.3, preference=0.2, temperature=0.5)


def tiny_quantizer(levels: int = 2, codewords: int = 6) -> RQVAEQuantizer:
    """Small, with random codewords, frozen as a model holds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        quantizer = RQVAEQuantizer(
            levels=levels, codebook_size=codewords, dimensions=5, widths=[8], latent_dimensions=4
        )
        for level in range(levels):
            torch.nn.init.normal_(quantizer.codebooks.data[level], std=1.5 / (1 + level))
    return quantizer.requires_grad_(False).eval()


def align(
    trainer: ItemTokenTrainer, alignments: Alignments = BOTH, *, pool: Pool = "mean", quantizer=None
) -> ItemTokenTrainer:
    """Give a trainer of `make_trainer` alignments."""
    trainer.model.beside = Adapters(16, codeword=4, vector=5, pool=pool, seed=1)
    trainer.objective = WithAlignments(trainer.objective, alignments, quantizer or tiny_quantizer(), VECTORS)
    trainer.data_collator = WithTargetItems(trainer.data_collator)
    return trainer


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    cut = {"batch": int(sys.argv[2]), "accumulation": int(sys.argv[3])}
    run = align(make_trainer(target, **cut, steps=3, every=2, tied=False, family=sys.argv[4]))
    run.train()
    if run.args.should_save:
        save_file(weights(run), target / "weights.safetensors")
