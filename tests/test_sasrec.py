"""SASRec reads the past only, treats every interaction as a target once, and is the same for the same seed."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.sasrec import SASRec, _batches, _loss, _windows, fit

TINY = {"width": 16, "layers": 2, "heads": 2, "max_length": 8}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SASRec(12, **TINY, dropout=0.5).eval()


def rows(*items):
    return np.array(items, dtype=np.int64)


def chain(users, num_items, seed=0):
    """Users walk 0, 1, 2, … around a circle, each from a place of their own: every item is as popular as any other."""
    starts = np.random.default_rng(seed).integers(0, num_items, size=users)
    return [(start + np.arange(6)) % num_items for start in starts]


def hits(model, sequences):
    """Share of sequences whose last item is first after the rest."""
    scores = model.scores([sequence[:-1] for sequence in sequences])
    return float((scores.argmax(axis=1) == [sequence[-1] for sequence in sequences]).mean())


def test_later_items_do_not_change_earlier_outputs(model):
    """The network would otherwise train on what it is to predict."""
    one = torch.tensor([[12, 3, 4, 5, 6, 7]])
    other = torch.tensor([[12, 3, 4, 5, 0, 1]])

    assert torch.equal(model(one)[:, :4], model(other)[:, :4])
    assert not torch.allclose(model(one)[:, 4:], model(other)[:, 4:], atol=1e-3)


def test_scores_do_not_depend_on_the_company(model):
    """Short histories are padded to the longest of their batch; padding must not be read."""
    histories = [rows(1, 2, 3), rows(), rows(5), rows(*range(8))]

    together = model.scores(histories)

    assert together.shape == (4, 12)
    assert together.dtype == np.float32
    for history, scores in zip(histories, together, strict=True):
        np.testing.assert_allclose(scores, model.scores([history])[0], rtol=0, atol=1e-5)


def test_the_newest_items_of_a_long_history_are_read(model):
    long, newest = rows(*range(11)), rows(*range(3, 11))

    assert model.scores([long]).tolist() == model.scores([newest]).tolist()


def test_no_histories_have_no_scores(model):
    assert model.scores([]).shape == (0, 12)


def test_scores_are_products_with_the_item_vectors(model):
    """What `item_vectors` hands out is what the model scores with, so other parts can use it as its geometry."""
    vectors = model.item_vectors()
    hidden = model(torch.tensor([[12, 4]]))[0, -1].detach().numpy()

    assert vectors.dtype == np.float32
    assert vectors.shape == (12, 16)
    np.testing.assert_allclose(model.scores([rows(4)])[0], vectors @ hidden, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 8, 9, 10, 17, 18, 40])
def test_every_interaction_is_a_target_once(length):
    """Windows of 9 share one item with their neighbour, and it counts as a target in the older of the two only."""
    sequence = np.arange(length)

    windows = list(_windows([sequence], 9))

    targets = [item for items, starts in windows for item in (items if starts else items[1:])]
    assert sorted(targets) == sequence.tolist()
    assert all(len(items) <= 9 for items, _ in windows)


def test_batches_deal_out_every_window_once_with_little_padding():
    rng = np.random.default_rng(0)
    windows = list(_windows([np.arange(length) for length in rng.integers(1, 30, size=300)], 9))

    batches, left = [], len(windows)
    for batch in _batches(windows, 100, rng):
        batches.append(batch)
        left -= len(batch)
        if left <= 0:
            break

    assert sorted(id(window) for batch in batches for window in batch) == sorted(map(id, windows))
    targets = [sum(len(window.items) for window in batch) for batch in batches]
    assert max(targets) <= 110
    padded = sum(max(len(window.items) for window in batch) * len(batch) for batch in batches)
    assert padded < 1.15 * sum(targets)


def test_drawn_items_estimate_the_loss_over_the_catalogue():
    """Each drawn item stands for those that were not, so over many draws the two losses are about the same."""
    torch.manual_seed(0)
    model = SASRec(400, **TINY).eval()
    batch = list(_windows([rows(*range(i, i + 9)) for i in range(30)], 9))
    rng = np.random.default_rng(0)

    whole = _loss(model, batch, 400, rng).item()
    drawn = np.mean([_loss(model, batch, 100, rng).item() for _ in range(50)])

    assert drawn == pytest.approx(whole, rel=0.01)
    assert abs(_loss(model, batch, 100, rng).item() - np.log(101)) > 1  # what it would be if they stood for themselves


@pytest.mark.parametrize("drawn", [20, 100])
def test_a_planted_chain_is_learned(drawn):
    """Popularity is right one time in forty; who reads the last item is nearly always right."""
    train, unseen = chain(200, 40), chain(100, 40, seed=1)

    fitted = fit(
        train, 40, validate=lambda model: hits(model, unseen), **TINY, dropout=0.1, drawn=drawn, batch_targets=100,
        learning_rate=5e-3, steps=200, every=100,
    )  # fmt: skip

    assert fitted.score == hits(fitted.model, unseen)
    assert fitted.score > 0.9


def test_same_seed_same_weights_and_the_callers_random_numbers_are_left_alone():
    def weights(seed):
        model = fit(chain(30, 12), 12, validate=lambda _: 0.0, **TINY, seed=seed, steps=4, drawn=5).model
        return model.state_dict()

    before = torch.get_rng_state()
    one, same, other = weights(0), weights(0), weights(1)

    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["items.weight"], other["items.weight"])


def test_the_best_weights_are_kept_and_training_stops():
    """Validation is best at the second look. Two looks later training goes back to it, and two later it ends."""
    looks, tables = iter([0.1, 0.5, 0.4, 0.3, 0.4, 0.3, 0.9]), []

    def validate(model):
        tables.append(model.item_vectors())
        return next(looks)

    done = []
    fitted = fit(
        chain(30, 12), 12, validate=validate, **TINY, steps=50, every=3, patience=2,
        progress=lambda step, steps: done.append((step, steps)),
    )  # fmt: skip

    assert (fitted.score, fitted.step) == (0.5, 6)
    assert fitted.model.item_vectors().tolist() == tables[1].tolist()
    assert done == [(step, 50) for step in (3, 6, 9, 12, 15, 18)]
    # The fifth look is three slow steps from the second; the fourth was six fast ones away.
    away = [np.abs(table - tables[1]).max() for table in tables]
    assert away[4] < away[3] / 4


def test_numbers_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"a width that its heads divide .* was: 12 items, width 10, .* 3 heads"):
        SASRec(12, width=10, heads=3)
    with pytest.raises(DataError, match=r"needs training interactions.*was: 0 windows"):
        fit([rows()], 12, validate=lambda _: 0.0)


@pytest.mark.gpu
def test_it_trains_and_scores_on_a_gpu():
    fitted = fit(chain(200, 40), 40, validate=lambda model: hits(model, chain(50, 40, seed=1)), **TINY, dropout=0.1,
                 batch_targets=100, learning_rate=5e-3, steps=200, every=100, device="cuda")  # fmt: skip

    assert fitted.score > 0.9
