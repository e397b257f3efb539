"""What a short training reads, step by step; as a script, one process of a distributed one."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.training.runs import make_trainer


class Remembered:
    """An objective, and the targets of each row that counted."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.rows: list[list[list[int]]] = []

    def denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.inner.denominators(batch)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        rows = zip(batch["labels"], batch["loss_weights"], strict=True)
        self.rows.append([labels[weights > 0].tolist() for labels, weights in rows if weights.any()])
        return self.inner(model, batch, totals)


def remembering(folder: Path, strategy: str, family: str, batch: int, **settings):
    """A trainer with dropout, and its objective, which remembers."""
    settings = {"steps": 6, "dropout": 0.2, "train_sampling_strategy": strategy, **settings}
    trainer = make_trainer(folder, family=family, batch=batch, **settings)
    trainer.objective = Remembered(trainer.objective)
    return trainer, trainer.objective


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    found = {}
    for kind, batch in (("llama", 4 * int(sys.argv[2])), ("t5", 3 * int(sys.argv[2]))):
        for order in ("sequential", "random", "group_by_length"):
            run, objective = remembering(target, order, kind, batch)
            run.train()
            found[f"{kind} {order}"] = {"rows": objective.rows, "targets": run.effort.targets}
    (target / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")
