"""What the alignments of ETEGRec promise: the equations by hand, gradients where they belong, one batch of many."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from llm_itemtok.training.alignment import (
    PREFERENCE,
    SEQUENCE,
    Alignments,
    first_of_each,
    pairs,
    preference_alignment,
    sequence_alignment,
)
from llm_itemtok.training.examples import TASKS as ALL_TASKS
from llm_itemtok.training.next_token import NextToken
from tests.process_pairs import run_alone_and_in_pair
from tests.tiny import KINDS, states
from tests.training.aligned import BOTH, VECTORS, align, tiny_quantizer
from tests.training.runs import make_trainer, weights
from tests.training.test_invariants import assert_close, training_lines

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
EXAMPLES = [
    {"task": 0, "items": [5, 7, 11, 9], "first": 3, "weight": 1.0},
    {"task": 0, "items": [8, 9], "first": 1, "weight": 1.0},
    {"task": 1, "items": [11], "first": 0, "weight": 0.3},
    {"task": 0, "items": [3, 2, 4], "first": 2, "weight": 1.0},
]
LATENT = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))


def logits(quantizer, latent, *, stopped=False):
    return quantizer.assignment_logits(latent, straight_through_residual=stopped)


def test_divergence_is_the_symmetric_one_by_hand():
    """(1/6, 1/6, 2/3) and thirds; the release makes (4/9, 4/9, 1/9) of the first, and a mean halves two levels' sum."""
    one, even = torch.tensor([[1.0, 1.0, 4.0]]).log(), torch.zeros(1, 3)
    assert sequence_alignment([one], [even]).item() == pytest.approx(2 / 3 * math.log(2))
    assert sequence_alignment([one, even], [even, one]).item() == pytest.approx(4 / 3 * math.log(2))
    farthest = sequence_alignment([one, one], [one, even], variant="release")
    assert farthest.item() == pytest.approx(4 / 9 * math.log(2))
    assert sequence_alignment([one, one], [one, even], variant="release", means=True).item() == farthest.item() / 2


def test_divergence_of_the_far_is_finite_and_of_the_same_is_zero():
    """Squared distances of hundreds leave a probability of 0, whose logarithm is still known."""
    far = torch.tensor([[0.0, -900.0]], requires_grad=True)
    near = torch.tensor([[-900.0, 0.0]])
    found = sequence_alignment([far], [near])
    assert found.item() == pytest.approx(1800)
    found.sum().backward()
    assert torch.isfinite(far.grad).all()
    assert sequence_alignment([far], [far]).item() == 0


def test_histories_that_are_where_their_items_are_agree_and_coming_nearer_is_better():
    quantizer = tiny_quantizer()
    own = quantizer.to_latent(VECTORS[:9])
    losses = [
        sequence_alignment(logits(quantizer, own), logits(quantizer, own + share * (LATENT - own))).sum().item()
        for share in (0.0, 0.01, 0.1, 1.0)
    ]
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert losses[1] > 0


def test_the_likeliest_codeword_is_the_nearest_and_in_the_release_the_farthest():
    """So histories on two codewords differ in the paper by what is near them, in the release by what is far."""
    quantizer = tiny_quantizer(levels=1)
    (at,) = logits(quantizer, quantizer.codebooks[0])
    assert at.argmax(-1).tolist() == list(range(6))
    for one, other in itertools.combinations(at.split(1), 2):
        paper, release = (sequence_alignment([one], [other], variant=name).item() for name in ("paper", "release"))
        ends = (-one).softmax(-1), (-other).softmax(-1)
        by_hand = ((ends[0] - ends[1]) * (ends[0] / ends[1]).log()).sum()
        assert release == pytest.approx(by_hand.item(), rel=1e-3, abs=1e-6)
        assert paper != pytest.approx(release, rel=1e-3)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_every_level_teaches_and_in_the_release_the_first_alone(variant):
    quantizer = tiny_quantizer(levels=3)
    items = logits(quantizer, quantizer.to_latent(VECTORS[:9]))
    for level in range(3):
        history = LATENT.clone().requires_grad_()
        theirs = logits(quantizer, history, stopped=variant == "release")
        loss = sequence_alignment(items[level : level + 1], theirs[level : level + 1], variant=variant).sum()
        taught = loss.requires_grad and bool(torch.autograd.grad(loss, history)[0].any())
        assert taught == (variant == "paper" or level == 0)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_variant_decides_on_the_gradients_of_both_sides(variant):
    """In the alignment of histories: what comes of the levels below the first is nothing in the release."""
    quantizer, stopped = tiny_quantizer(levels=3), variant == "release"
    quantizer.encoder.requires_grad_(True)
    sides = [LATENT.clone().requires_grad_(), *quantizer.encoder.parameters()]
    found = Alignments(1.0, 0.0, variant=variant)(quantizer, VECTORS[:9], VECTORS[:9], sides[0], VECTORS[:9])[SEQUENCE]
    items, theirs = (logits(quantizer, part, stopped=stopped) for part in (quantizer.to_latent(VECTORS[:9]), sides[0]))
    first = sequence_alignment(items[:1], theirs[:1], variant=variant)
    of_all, of_first = (torch.autograd.grad(loss.sum(), sides, retain_graph=True) for loss in (found, first))
    assert all(torch.allclose(one, other) == stopped for one, other in zip(of_all, of_first, strict=True))


def test_the_encoder_hears_of_preferences_once_whatever_the_number_of_levels():
    """One straight-through on the sum of the codewords: the gradient is that through an identity."""
    for levels in (1, 3):
        quantizer = tiny_quantizer(levels)
        quantizer.encoder.requires_grad_(True)
        latent = quantizer.to_latent(VECTORS[:4])
        rebuilt = quantizer(VECTORS[:4])
        loss = preference_alignment(rebuilt.reconstruction, VECTORS[4:8], temperature=0.5).sum()
        at = rebuilt.latent.detach().requires_grad_()
        direct = preference_alignment(quantizer.from_latent(at), VECTORS[4:8], temperature=0.5).sum()
        (expected,) = torch.autograd.grad(latent, list(quantizer.encoder.parameters())[:1],
                                          torch.autograd.grad(direct, at)[0])  # fmt: skip
        (found,) = torch.autograd.grad(loss, list(quantizer.encoder.parameters())[:1])
        torch.testing.assert_close(found, expected)


def test_preferences_are_told_apart_in_both_directions_by_hand():
    """Two items at right angles, both histories towards the first: lengths do not matter."""
    items, preferences = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    found = preference_alignment(items, preferences, temperature=1.0)
    expected = [math.log(2) + math.log(1 + math.exp(-1)), math.log(2) + math.log(1 + math.e)]
    assert found.tolist() == pytest.approx(expected)


def test_each_distinct_target_counts_where_it_stands_first():
    assert first_of_each(torch.tensor([9, 4, 9, 1, 4, 7])).tolist() == [0, 1, 3, 5]
    assert first_of_each(torch.tensor([], dtype=torch.long)).tolist() == []


def setting(tmp_path, family, examples=EXAMPLES, alignments=BOTH, pool="mean"):
    """Model, objective and a batch."""
    trainer = align(make_trainer(tmp_path, family=family), alignments, pool=pool)
    trainer.objective.objective = NextToken(ALL_TASKS)
    return trainer, trainer.objective, trainer.data_collator(examples)


@EVERY_KIND
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_terms_are_those_of_plain_passes_over_each_history(tmp_path, family, pool):
    """Item 9 is the target of two rows and counts once; the text task is no pair; padding is not read."""
    trainer, objective, batch = setting(tmp_path, family, pool=pool)
    model, adapters, quantizer = trainer.model, trainer.model.beside, tiny_quantizer()
    prompts = trainer.data_collator.collator.prompts
    histories, targets = [[5, 7, 11], [3, 2]], torch.tensor([9, 4])
    own, preferences = [], []
    for items, target in zip(histories, targets.tolist(), strict=True):
        prompt = prompts.history(items)
        (here,) = states(model, [prompt], model.vocab.paths[[target]])[0, :1]
        if model.answer_start is not None:
            ids = torch.from_numpy(prompt)[None]
            pooled = model.read(ids, torch.ones_like(ids))[0].mean(0)
        elif pool == "last":
            pooled = here
        else:
            pooled = model.hidden(torch.from_numpy(prompt)[None], use_cache=False).last_hidden_state[0, 1:].mean(0)
        own.append(adapters.sequence(pooled))
        preferences.append(adapters.preference(here))
    items = VECTORS[targets]
    sequence = sequence_alignment(logits(quantizer, quantizer.to_latent(items)), logits(quantizer, torch.stack(own)))
    preference = preference_alignment(
        quantizer(items).reconstruction, torch.stack(preferences), temperature=BOTH.temperature
    )
    totals = objective.denominators(batch)
    assert int(totals["aligned"]) == 2
    found = objective(model, batch, totals)
    assert found[SEQUENCE].item() == pytest.approx(0.3 * sequence.mean().item(), rel=1e-4)
    assert found[PREFERENCE].item() == pytest.approx(0.2 * preference.mean().item(), rel=1e-4)


def test_every_target_of_a_row_of_all_positions_has_the_history_before_it_and_the_first_has_none(tmp_path):
    row = {"task": 0, "items": [5, 7, 11, 9], "first": 0, "weight": 1.0}
    trainer, objective, batch = setting(tmp_path, "llama", [row])
    assert pairs(batch)[2].tolist() == [7, 11, 9]
    cut = [{**row, "items": row["items"][:end], "first": end - 1} for end in (2, 3, 4)]
    _, _, alone = setting(tmp_path, "llama", cut)
    ours, theirs = (objective(trainer.model, each, objective.denominators(each)) for each in (batch, alone))
    for name in (SEQUENCE, PREFERENCE):
        assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-4)


@EVERY_KIND
def test_the_recommender_learns_from_both_and_the_quantizer_does_not(tmp_path, family):
    trainer, objective, batch = setting(tmp_path, family)
    quantizer = objective._quantizer
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for name in (SEQUENCE, PREFERENCE):
        trainer.model.zero_grad()
        objective(trainer.model, batch, objective.denominators(batch))[name].backward()
        assert trainer.model.rows.input_rows.grad.any()
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    align(make_trainer(tmp_path / "run", family=family, weight_decay=0.1), quantizer=quantizer).train()
    assert_close(quantizer.state_dict(), before, atol=0, rtol=0)


@EVERY_KIND
def test_without_alignments_the_training_is_the_plain_one_bit_for_bit(tmp_path, family):
    settings = {"steps": 3, "dropout": 0.2, "family": family}
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    ours = align(make_trainer(tmp_path / "ours", **settings), Alignments(0.0, 0.0))
    ours.train()
    found = {name: value for name, value in weights(ours).items() if not name.startswith("beside")}
    assert_close(found, weights(plain), atol=0, rtol=0)


def test_a_batch_of_texts_alone_has_no_pairs_and_still_trains(tmp_path):
    trainer, objective, batch = setting(tmp_path, "llama", [EXAMPLES[2]])
    terms = objective(trainer.model, batch, objective.denominators(batch))
    assert terms[SEQUENCE].item() == terms[PREFERENCE].item() == 0
    sum(terms.values()).backward()


def test_terms_over_accumulated_batches_are_the_mean_over_their_targets(tmp_path):
    """Each micro-batch has its own negatives, but all targets weigh the same."""
    trainer = align(make_trainer(tmp_path, batch=4, accumulation=2, steps=1))
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in rows]) for rows in (range(4), range(4, 8))]
    counts = [trainer.objective.denominators(batch) for batch in batches]
    totals = {name: counts[0][name] + counts[1][name] for name in counts[0]}
    assert counts[0]["aligned"] != counts[1]["aligned"]
    with torch.no_grad():
        expected = sum(trainer.objective(trainer.model, batch, totals)[PREFERENCE].item() for batch in batches)
    trainer.train()
    assert training_lines(tmp_path)[0][f"loss/{PREFERENCE}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@EVERY_KIND
def test_two_processes_train_as_one(tmp_path, family):
    """The same global batch: negatives of both, with their gradients, and targets counted once over both."""
    one, two = [tmp_path / "one", 4, 2, family], [tmp_path / "two", 2, 2, family]
    run_alone_and_in_pair("tests.training.aligned", one, two, two)
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for two_lines, one_lines in zip(*(training_lines(tmp_path / name) for name in ("two", "one")), strict=True):
        assert two_lines == pytest.approx(one_lines, rel=1e-5)
