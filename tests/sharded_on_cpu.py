"""FSDP2 on CPU processes, for the tests: the engine is the real one, the door to it is opened here.

torch shards on CPUs by gloo. Accelerate looks at FSDP for accelerators alone and trains without it on CPUs, in silence,
which is why the package refuses that. `open_the_door` lets Accelerate take the plugin that it has made of the
launcher's settings there, too, and lifts the refusal; everything else runs as it would on GPUs.

As a script, one process of a distributed run, with the variables of a launcher set; `ENGINE` is `ddp` or `fsdp2`:
`python -m tests.sharded_on_cpu ENGINE itemtok ...` with what `itemtok` takes, or `... ENGINE steps FOLDER FAMILY TIED`
for 20 steps of a tiny trainer.
"""

import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from llm_itemtok.pipeline import engines
from tests.process_pairs import finish, pair, start

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch` makes of `recipes/accelerate/fsdp2.yaml` (tests/test_distributed_engines.py)."""


def open_the_door() -> None:
    """Let Accelerate shard on CPUs from now on."""
    os.environ.update(LAUNCHED)
    engines.UNSHARDED_DEVICES = ()
    without = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        without(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def run_pair(*arguments: object) -> None:
    """Run this module as the two processes of a group that talks by gloo on the loopback; both must end well."""
    finish([start(["-m", "tests.sharded_on_cpu", *arguments], settings) for settings in pair()])


def twenty_steps(engine: str, folder: Path, family: str, tied: bool) -> None:
    """Train a tiny model whose batches differ in which of its parameters they use, from process to process."""
    from llm_itemtok.training.sharding import ShardedTrainer
    from llm_itemtok.training.trainer import ItemTokenTrainer
    from tests.training.runs import make_trainer

    folder.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(
        folder, batch=2, accumulation=2, steps=20, tied=tied, family=family, max_grad_norm=1.0, optim="adamw_torch",
        learning_rate=1e-2, weight_decay=0.1, kind_of_trainer=ShardedTrainer if engine == "fsdp2" else ItemTokenTrainer,
    )  # fmt: skip
    trainer.train()
    assert trainer.is_fsdp_enabled == (engine == "fsdp2")


if __name__ == "__main__":
    engine, what, *rest = sys.argv[1:]
    if engine == "fsdp2":
        open_the_door()
    status = 0
    if what == "steps":
        twenty_steps(engine, Path(rest[0]), rest[1], rest[2] == "tied")
    else:
        from llm_itemtok.cli import main

        status = main(rest)
    # What is to be shown is written; a process of a group was seen to abort as the interpreter took its threads down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
