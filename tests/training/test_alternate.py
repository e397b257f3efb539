"""ETEGRec's schedule: each side rests while the other learns, turns end as they should, a kill changes nothing."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llm_itemtok.items.collisions import extra_level
from llm_itemtok.items.product import ProductKMeans
from llm_itemtok.items.residual_kmeans import ResidualKMeans
from llm_itemtok.training.alignment import PREFERENCE, SEQUENCE, Adapters, Alignments
from llm_itemtok.training.alternate import TERMS, Tuning, Turns, _clipped
from tests.process_pairs import run_alone_and_in_pair
from tests.tiny import KINDS
from tests.training.alternating import make_alternating
from tests.training.runs import weights
from tests.training.test_invariants import assert_close, training_lines, without_times
from tests.training.test_updates import rounds as lines_of_rounds
from tests.training.test_updates import versions
from tests.training.update_runs import NUM_ITEMS, Killed, tiny_quantizer

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1}


def rounds(folder):
    """Lines of the rounds, without what differs from machine to machine."""
    return [{n: v for n, v in line.items() if not n.endswith("_seconds")} for line in lines_of_rounds(folder)]


class Watch(TrainerCallback):
    """Copies of everything before and after each round, and after each step."""

    def __init__(self, trainer):
        self.trainer, self.before, self.after, self.stepped = trainer, {}, {}, {}
        callbacks = trainer.callback_handler.callbacks
        method, inner = trainer.updates.method, trainer.updates.method.propose

        def propose(moment):
            self.before[moment.step] = weights(trainer)
            found = inner(moment)
            self.after[moment.step] = weights(trainer)
            return found

        method.propose = propose
        callbacks.append(self)

    def on_step_end(self, args, state, control, **_):
        self.stepped[state.global_step] = weights(self.trainer)


def changed(old, new):
    """Which of quantizer, codes and recommender differ."""
    parts = {"quantizer": "quantizer.", "codes": "item_codes"}
    found = set()
    for name in old:
        if not torch.equal(old[name], new[name]):
            found.add(next((part for part, begin in parts.items() if name.startswith(begin)), "recommender"))
    return found


@EVERY_KIND
def test_each_side_stands_still_bit_for_bit_while_the_other_learns(tmp_path, family):
    """Weight decay on, one process: what is frozen does not shrink either. Codes change behind a turn alone."""
    trainer = make_alternating(tmp_path, Turns(every=2, rounds=2), family=family, steps=6, **ADAM)
    watch, vectors = Watch(trainer), trainer.objective._vectors.clone()
    trainer.train()
    assert sorted(watch.before) == [0, 2]
    for step in (0, 2):
        assert changed(watch.before[step], watch.after[step]) == {"quantizer"}
    for step in range(2, 7):
        found = changed(watch.stepped[step - 1], watch.stepped[step])
        assert found == ({"recommender", "quantizer", "codes"} if step == 3 else {"recommender"})
    assert torch.equal(trainer.objective._vectors, vectors)
    assert all(line["moves"] > 0 for line in rounds(tmp_path))


def test_alignments_begin_after_the_warm_up_and_end_with_the_turns(tmp_path):
    """Turns at 0, 2, 4 and 6, the last with what the model has learnt in a cycle; the final stage begins at 8."""
    trainer = make_alternating(tmp_path, Turns(every=2, rounds=4, warmup=3), steps=10)
    trainer.train()
    aligned = [line["step"] for line in training_lines(tmp_path) if f"loss/{SEQUENCE}" in line]
    assert aligned == [4, 5, 6, 7, 8]
    found = rounds(tmp_path)
    assert [(line["step"], line["aligned"]) for line in found] == [(0, False), (2, False), (4, False), (6, True)]
    assert [line["losses"][SEQUENCE] > 0 for line in found] == [line["aligned"] for line in found]
    assert all(line["losses"]["reconstruction"] > 0 for line in found)


def test_training_may_begin_with_the_recommender_and_without_alignments(tmp_path):
    trainer = make_alternating(
        tmp_path, Turns(every=2, rounds=2, first=False), alignments=Alignments(0.0, 0.0), steps=8
    )
    trainer.train()
    assert [line["step"] for line in rounds(tmp_path)] == [2, 4]
    assert trainer.updates.method.end == 6
    assert not any(f"loss/{name}" in line for line in training_lines(tmp_path) for name in (SEQUENCE, PREFERENCE))


def test_turns_end_when_validation_stops_getting_better(tmp_path):
    """The best is that of step 2; the second that is not better is that of step 4, and the turn at 4 is not taken.

    Nor by a training that goes on from a checkpoint: of what came before it, it knows the best and the end.
    """
    scores = {1: 0.1, 2: 0.4, 3: 0.2, 4: 0.3, 5: 0.9, 6: 0.1}

    def make():
        trainer = make_alternating(
            tmp_path, Turns(every=2, rounds=9, patience=2), steps=6, every=1,
            validate=lambda: {"ndcg@10": scores[trainer.state.global_step]},
        )  # fmt: skip
        return trainer

    make().train()
    for step in (None, 3, 4):
        if step is not None:
            make().train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{step}"))
        assert [line["step"] for line in rounds(tmp_path)] == [0, 2]
        assert [line["step"] for line in training_lines(tmp_path) if f"loss/{SEQUENCE}" in line] == [1, 2, 3, 4]


def test_a_validation_that_is_as_good_as_the_best_is_not_better(tmp_path):
    """Where nothing is found yet, scores may all be 0: the first counts as the best, and two more end the turns."""
    trainer = make_alternating(
        tmp_path, Turns(every=2, rounds=9, patience=2), steps=6, every=1, validate=lambda: {"ndcg@10": 0.0}
    )
    trainer.train()
    assert [line["step"] for line in rounds(tmp_path)] == [0, 2]
    assert [line["step"] for line in training_lines(tmp_path) if f"loss/{SEQUENCE}" in line] == [1, 2, 3]


def test_gradients_of_the_quantizer_are_scaled_to_a_norm_over_all_of_them():
    long, short = torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [0.3]])
    first, nothing, second = _clipped([long, None, torch.tensor([[4.0]])])
    assert nothing is None
    torch.testing.assert_close(torch.cat([first, second[0]]), torch.tensor([0.6, 0.0, 0.8]))
    (same,) = _clipped([short])
    assert torch.equal(same, short)


def test_turns_end_when_hardly_an_item_moves(tmp_path):
    """The recommender has the rest of its cycle first."""
    trainer = make_alternating(tmp_path, Turns(every=2, rounds=9, converged=1.01), steps=6)
    trainer.train()
    assert [line["step"] for line in rounds(tmp_path)] == [0]
    assert [line["step"] for line in training_lines(tmp_path) if f"loss/{SEQUENCE}" in line] == [1, 2]


def test_without_turns_the_quantizer_learns_at_every_step_and_items_are_coded_at_the_same_moments(tmp_path):
    trainer = make_alternating(tmp_path, Turns(every=2, rounds=2, joint=True), steps=8, **ADAM)
    watch = Watch(trainer)
    trainer.train()
    assert [line["step"] for line in rounds(tmp_path)] == [2, 4]
    for step in range(2, 9):
        found = changed(watch.stepped[step - 1], watch.stepped[step])
        assert ("quantizer" in found) == (step <= 5)  # until the last new codes
        assert ("codes" in found) == (step in (3, 5))
    assert [line["quantizer_steps"] for line in rounds(tmp_path)] == [3, 2]


@pytest.mark.parametrize(
    ("turns", "coded"),
    [
        (Turns(every=3, rounds=2, joint=True), [3, 6]),
        (Turns(every=3, rounds=9, joint=True, converged=1.01), [3]),
        (Turns(every=3, rounds=9, joint=True, patience=1), [3, 6]),
    ],
    ids=["rounds", "converged", "patience"],
)
def test_without_turns_too_the_codes_at_the_end_are_those_of_the_quantizer(tmp_path, turns, coded):
    """Validation gets no better at step 5, inside a cycle: its codes are read off, and nothing is learnt after."""
    scores = {step: 0.5 if step < 5 else 0.1 for step in range(10)}
    trainer = make_alternating(
        tmp_path, turns, steps=9, every=5, validate=lambda: {"ndcg@10": scores[trainer.state.global_step]}, **ADAM
    )
    trainer.updates.method._best = 0.3
    watch = Watch(trainer)
    trainer.train()
    assert [line["step"] for line in rounds(tmp_path)] == coded
    last = {step for step in range(2, 10) if "quantizer" in changed(watch.stepped[step - 1], watch.stepped[step])}
    assert max(last) == coded[-1] + 1  # the step that follows the last codes was begun by learning


@EVERY_KIND
def test_a_turn_does_not_depend_on_how_the_steps_of_the_recommender_are_cut(tmp_path, family):
    """Nor, but for the last digits, on how many examples are read at a time: in the first turn with alignments.

    With dropout, whose random numbers each cut uses up in another way: there is none in what the turn reads.
    """
    found = {}
    for name, cut, piece in (("one", (8, 1), 4), ("many", (1, 8), 4), ("pieces", (8, 1), 16)):
        trainer = make_alternating(
            tmp_path / name, Turns(every=1, rounds=2), family=family, batch=cut[0], accumulation=cut[1], steps=2,
            tuning=Tuning(learning_rate=0.03, batch_size=16, piece=piece), learning_rate=0.0, dropout=0.2,
        )  # fmt: skip
        watch = Watch(trainer)
        trainer.train()
        assert rounds(tmp_path / name)[1]["aligned"]
        found[name] = {at: value for at, value in watch.after[1].items() if at.startswith("quantizer.")}
    assert_close(found["many"], found["one"], atol=0, rtol=0)
    assert_close(found["pieces"], found["one"], atol=1e-5, rtol=1e-4)


def test_a_step_of_the_quantizer_goes_by_its_distinct_targets_in_the_units_of_the_equations(tmp_path):
    """Rows of all positions: what has no history is rebuilt, but is no pair. Sums, or means as the release has them."""
    for variant, means in (("paper", False), ("release", True)):
        trainer = make_alternating(
            tmp_path / variant, Turns(every=9, rounds=1), alignments=Alignments(0.3, 0.2, 0.5, variant, means)
        )
        method, model = trainer.updates.method, trainer.model.eval()
        rows = np.array([row for row in method._examples.rows if trainer.train_dataset[int(row)]["first"] == 0][:5])
        rows = rows[method._examples.by_length(rows)]
        targets = {item for row in rows for item in trainer.train_dataset[int(row)]["items"]}
        items = sorted(targets)
        out = copy.deepcopy(model.quantizer)(torch.from_numpy(trainer.updates.method.vectors[items]))
        read = method._read(model, rows)
        assert set(read[0].tolist()) <= targets
        assert len(set(read[0].tolist())) == len(read[0])
        terms = method._terms(model.quantizer, method._there[items], np.array(items), read)
        dimensions, levels = (1, 1) if means else (5, 2 * 3)
        assert terms[TERMS[0]].item() == pytest.approx(dimensions * out.reconstruction_loss.mean().item(), rel=1e-5)
        quantization = (out.codebook_loss + 0.25 * out.commitment_loss).mean().item()
        assert terms[TERMS[1]].item() == pytest.approx(levels * quantization, rel=1e-5)
        batch = trainer.data_collator([trainer.train_dataset[int(row)] for row in rows])
        found = trainer.objective(model, trainer.bind(batch), trainer.objective.denominators(batch))
        for name in (SEQUENCE, PREFERENCE):
            assert terms[name].item() == pytest.approx(found[name].item(), rel=1e-4)


@EVERY_KIND
def test_of_an_items_pairs_that_of_the_row_drawn_first_counts_however_long_it_is(tmp_path, family):
    trainer = make_alternating(tmp_path, Turns(every=9, rounds=1), family=family)
    method, model = trainer.updates.method, trainer.model.eval()
    rows = method._examples.rows[np.random.default_rng(0).permutation(len(method._examples.rows))]
    alone = {}
    for row in rows:
        for item, sequence, preference in zip(*method._read(model, rows[rows == row]), strict=True):
            alone.setdefault(int(item), (sequence, preference))
    items, sequences, preferences = method._read(model, rows)
    assert sorted(items.tolist()) == sorted(alone)
    for item, *told in zip(items.tolist(), sequences, preferences, strict=True):
        assert_close(dict(enumerate(told)), dict(enumerate(alone[item])), atol=1e-5, rtol=1e-4)


def test_the_quantizers_rate_rises_over_the_first_turn_and_is_gone_after_the_last(tmp_path):
    turns, tuning = Turns(every=2, rounds=3), Tuning(learning_rate=0.03, batch_size=4)
    trainer = make_alternating(tmp_path, turns, tuning=tuning, steps=6)
    method, scales = trainer.updates.method, []
    scale = method._scale
    method._scale = lambda: scales.append(scale()) or scales[-1]
    trainer.train()
    turn = len(scales) // 3
    assert [line["quantizer_steps"] for line in rounds(tmp_path)] == [turn] * 3
    assert scales[: turn - 1] == sorted(scales[: turn - 1])
    assert scales[turn:] == sorted(scales[turn:], reverse=True)
    assert scales[-1] == pytest.approx(1 / (3 * turn))
    assert max(scales) < 1


def test_the_weights_of_the_quantizers_turn_may_be_its_own(tmp_path):
    trainer = make_alternating(tmp_path, Turns(every=2, rounds=3), alignments=Alignments(0.5, 0.5), steps=6)
    method = trainer.updates.method
    method.teaching = Alignments(0.0, 2.0)
    trainer.train()
    last = rounds(tmp_path)[-1]
    assert (last["aligned"], last["losses"][SEQUENCE] == 0, last["losses"][PREFERENCE] > 0) == (True, True, True)
    assert all(f"loss/{SEQUENCE}" in line for line in training_lines(tmp_path))


def test_histories_begin_in_the_middle_of_the_items():
    adapters = Adapters(16, codeword=3, vector=5, middle=torch.tensor([1.0, -2.0, 0.5]))
    assert adapters.sequence.bias.tolist() == [1.0, -2.0, 0.5]
    assert not adapters.preference.bias.any()


@pytest.mark.parametrize("tokenizer", [ResidualKMeans(levels=2, codebook_size=5, components=3),
                                       ProductKMeans(levels=2, codebook_size=5)])  # fmt: skip
def test_other_quantizers_learn_as_well(tmp_path, tokenizer):
    """Without networks there is nothing but codewords to learn, and k-means leaves little of that."""
    vectors = tiny_quantizer()[1]
    codes = extra_level(tokenizer.fit(vectors), size=NUM_ITEMS)
    trainer = make_alternating(
        tmp_path, Turns(every=2, rounds=2), fitted=(tokenizer.quantizer, vectors, codes), steps=4,
        tuning=Tuning(learning_rate=0.1, batch_size=4),
    )  # fmt: skip
    trainer.train()
    assert any(line["moves"] > 0 for line in rounds(tmp_path))


@pytest.mark.parametrize("joint", [False, pytest.param(True, marks=pytest.mark.slow)])
@EVERY_KIND
def test_a_training_killed_inside_a_cycle_goes_on_as_if_nothing_had_been(tmp_path, family, joint):
    """The checkpoint of step 3 lies between turns at 2 and 4, that of 6 where one begins."""
    turns = Turns(every=2, rounds=4, warmup=1, patience=9, joint=joint)
    settings = {"family": family, "steps": 9, "every": 3, "dropout": 0.2, "train_sampling_strategy": "random", **ADAM}

    def make(folder, **more):
        trainer = make_alternating(
            folder, turns, validate=lambda: {"ndcg@10": trainer.state.global_step / 100}, **settings, **more
        )
        return trainer

    straight = make(tmp_path / "straight")
    straight.train()
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make(folder, killed_at=6).train()
    for step in (3, 6):
        resumed = make(folder)
        with torch.no_grad():
            for parameter in resumed.model.parameters():
                parameter.zero_()
        resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / f"checkpoint-{step}"))
        assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
        assert_close(resumed.updates.method.state(), straight.updates.method.state(), atol=0, rtol=0)
        assert without_times(folder) == without_times(tmp_path / "straight")
        assert rounds(folder) == rounds(tmp_path / "straight")
        assert versions(folder) == versions(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["turns", "joint"])
@EVERY_KIND
def test_two_processes_are_one(tmp_path, family, kind):
    """Codes and weights of both sides; the alignments' negatives are those of both processes."""
    one, two = [tmp_path / "one", 4, 2, family, kind], [tmp_path / "two", 2, 2, family, kind]
    run_alone_and_in_pair("tests.training.alternating", one, two, two)
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert np.array_equal(np.load(tmp_path / "one/codes.npy"), np.load(tmp_path / "two/codes.npy"))
    for two_lines, one_lines in zip(*(training_lines(tmp_path / name) for name in ("two", "one")), strict=True):
        assert two_lines == pytest.approx(one_lines, rel=1e-4)
