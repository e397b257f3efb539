"""Fifty million interactions of five million items go through every stage up to training, within 16 GB.

Only by its marker (`pytest -m scale tests/test_scale.py -s`): it takes the better part of an hour on two cores, and 3
GB of disk. Says time and memory of each stage.
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

USERS, ITEMS, ROWS, SHARDS, DIMENSIONS = 5_000_000, 5_000_000, 50_000_000, 25, 32
LIMIT = 16e9
RECIPE = """
data: {{source: folder, path: {folder}}}
vectors: {{kind: file, path: {folder}/vectors.npy}}
tokenizer: {{kind: residual-kmeans, levels: 4, codebook_size: 256, sample: 500000, collisions: reassign}}
model: {{name: scratch, scratch: {{layers: 2, width: 64, heads: 2, pretrain_epochs: 0}}}}
vocab: {{init: codebook}}
examples: {{history_length: 10}}
trainer: {{max_steps: 20, per_device_train_batch_size: 64, use_cpu: true}}
evaluation: {{every: 0.00005, validation_users: 100, baselines: [popularity]}}
"""
"""Validation and a checkpoint come after a few of the 20 steps."""


def named(letter, numbers):
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")


def make_data(folder):
    """A log in shards by time, each with a few interactions of all users; some items much more often than others."""
    draw = np.random.default_rng(0)
    for name in ("items", "interactions"):
        (folder / name).mkdir(parents=True)
    for part, rows in enumerate(np.array_split(np.arange(ITEMS), 4)):
        items = pa.table({"item_id": named("i", rows), "title": pa.nulls(len(rows), pa.string())})
        pq.write_table(items, folder / "items" / f"part-{part:05}.parquet")
    for part in range(SHARDS):
        rows = ROWS // SHARDS
        popular = (ITEMS * draw.random(rows) ** 3).astype(np.int64)
        log = {
            "user_id": named("u", draw.integers(USERS, size=rows)),
            "item_id": named("i", np.minimum(popular, ITEMS - 1)),
            "timestamp": np.sort(draw.integers(10 * 86_400, size=rows)) + 1_600_000_000 + part * 10 * 86_400,
        }
        pq.write_table(pa.table(log), folder / "interactions" / f"part-{part:05}.parquet")
    centres = draw.normal(size=(2_000, DIMENSIONS)).astype(np.float32)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (ITEMS, DIMENSIONS))
    for start in range(0, ITEMS, 2**18):
        some = vectors[start : start + 2**18]
        some[:] = centres[draw.integers(len(centres), size=len(some))] + draw.normal(size=some.shape, scale=0.5)
    vectors.flush()


def run(recipe, out, stage):
    """Carry a stage out in a process of its own; returns its seconds and the most memory it took, in bytes.

    Training is stopped by SIGTERM once a checkpoint is whole.
    """
    began = time.monotonic()
    words = ["run", str(recipe), "--out", str(out), "--until", stage]
    process = subprocess.Popen([sys.executable, "-m", "llm_itemtok", *words])
    while stage == "train" and not list(out.glob("checkpoints/checkpoint-*/checksums.json")):
        assert process.poll() is None, "the process ended before its first checkpoint"
        time.sleep(0.1)
    if stage == "train":
        process.send_signal(signal.SIGTERM)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (143 if stage == "train" else 0)
    return time.monotonic() - began, used.ru_maxrss * 1024


@pytest.mark.scale
def test_fifty_million_interactions_go_through_within_16_gb(tmp_path):
    make_data(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "data"), encoding="utf-8")
    for stage in ("data", "items", "vocab", "train"):
        seconds, memory = run(recipe, tmp_path / "run", stage)
        sys.stdout.write(f"{stage}: {seconds:,.0f} s, {memory / 1e9:.1f} GB\n")
        assert memory < LIMIT, stage
