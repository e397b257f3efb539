"""Short, real runs of ETEGRec, out of those of `update_runs.py`; as a script, one process of a distributed one."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from llm_itemtok.model.state import hold_quantizer
from llm_itemtok.training.alignment import Adapters, Alignments, WithAlignments
from llm_itemtok.training.alternate import Alternate, TakeTurns, Tuning, TurnMaterial, Turns
from llm_itemtok.training.collator import WithTargetItems
from llm_itemtok.training.trainer import ItemTokenTrainer
from llm_itemtok.training.updates import Rules
from tests.tiny import tiny_item_model
from tests.training.runs import weights
from tests.training.update_runs import Killed, Shuffle, make_updating, tiny_quantizer

BOTH = Alignments(sequence=0.3, preference=0.2, temperature=0.5)
TUNING = Tuning(learning_rate=0.03, batch_size=16, piece=4)


def kill_at(method: Alternate, step: int) -> None:
    """Let a turn be killed in the middle of its work."""
    inner = method.propose

    def propose(moment):
        if moment.step == step:
            raise Killed
        return inner(moment)

    method.propose = propose


def make_alternating(
    folder: Path,
    turns: Turns,
    *,
    family: str = "llama",
    alignments: Alignments = BOTH,
    tuning: Tuning = TUNING,
    killed_at: int | None = None,
    fitted: tuple | None = None,
    **settings: object,
) -> ItemTokenTrainer:
    """A trainer whose quantizer takes turns with it."""
    quantizer, vectors, codes = tiny_quantizer() if fitted is None else fitted
    model, _ = tiny_item_model(family, codes=codes, tied=False)
    hold_quantizer(model, quantizer)
    rules = Rules(rounds=turns.rounds, gate=None)
    trainer = make_updating(folder, Shuffle(1), rules, family=family, model=model, **settings)
    model.beside = Adapters(16, codeword=quantizer.codebooks.shape[2], vector=vectors.shape[1], seed=1)
    trainer.data_collator.num_levels = codes.num_levels
    trainer.data_collator = WithTargetItems(trainer.data_collator)
    material = TurnMaterial(trainer.train_dataset, trainer.data_collator, trainer.bind, vectors)
    method = Alternate(turns, tuning, alignments, material)
    if killed_at is not None:
        kill_at(method, killed_at)
    trainer.updates.method = method
    trainer.objective = WithAlignments(trainer.objective, alignments, quantizer, torch.from_numpy(vectors))
    trainer.callback_handler.callbacks.insert(0, TakeTurns(method, trainer.objective, model))
    return trainer


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    cut = {"batch": int(sys.argv[2]), "accumulation": int(sys.argv[3])}
    run = make_alternating(target, Turns(every=2, rounds=2, joint=sys.argv[5] == "joint"), family=sys.argv[4],
                           validate=lambda: {"ndcg@10": 0.5}, steps=6, every=3, **cut)  # fmt: skip
    run.train()
    if run.args.should_save:
        save_file(weights(run), target / "weights.safetensors")
        np.save(target / "codes.npy", run.model.vocab.codes.table)
        (target / "state.json").write_text(json.dumps({n: v.tolist() for n, v in run.updates.method.state().items()}))
