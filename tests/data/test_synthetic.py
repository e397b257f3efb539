"""The made-up bookshop: seeded, readable, learnable, and with an oracle that tells the truth."""

import numpy as np
import pytest

from llm_itemtok.data.readers import read
from llm_itemtok.data.splits import check_leaks, leave_last_out, temporal
from llm_itemtok.data.synthetic import generate, write_folder
from llm_itemtok.errors import DataError


@pytest.fixture(scope="module")
def shop():
    return generate(num_items=400, num_users=600, seed=0)


def test_the_same_seed_gives_the_same_data(shop):
    catalog, log, _ = shop
    again, log_again, _ = generate(num_items=400, num_users=600, seed=0)
    other, other_log, _ = generate(num_items=400, num_users=600, seed=1)
    assert (again.sha256, log_again.sha256) == (catalog.sha256, log.sha256)
    assert other.sha256 != catalog.sha256
    assert other_log.sha256 != log.sha256


def test_the_catalogue_is_complete_and_titles_tell_books_apart(shop):
    catalog, _, _ = shop
    assert len(catalog) == 400
    assert len(set(catalog.titles)) == 400
    assert all(len(parts) == 3 for parts in catalog.categories)
    assert sum("Book 2)" in title for title in catalog.titles) > 30


def test_nothing_is_read_twice_and_time_runs_forward(shop):
    _, log, _ = shop
    assert log.lengths.min() >= 6
    for user in range(log.num_users):
        assert len(set(log.of(user).tolist())) == len(log.of(user))
    same_user = log.owners[1:] == log.owners[:-1]
    assert (np.diff(log.timestamps)[same_user] > 0).all()


def test_the_oracle_gives_probabilities_of_unread_books(shop):
    _, log, oracle = shop
    histories = [log.of(user)[: user % 7] for user in range(50)]
    scores = oracle.scores(histories, log.user_ids[:50])
    assert scores.dtype == np.float32
    assert scores.shape == (50, 400)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert all((row[history] == 0).all() for row, history in zip(scores, histories, strict=True))


def test_the_oracle_is_the_distribution_the_log_was_drawn_from(shop):
    """If books are drawn with the oracle's probabilities p, then the mean of p(drawn) is the mean of sum(p^2)."""
    _, log, oracle = shop
    users = np.repeat(np.arange(log.num_users), 5)
    cuts = np.tile(np.arange(1, 6), log.num_users)
    histories = [log.of(user)[:cut] for user, cut in zip(users, cuts, strict=True)]
    drawn = np.array([log.of(user)[cut] for user, cut in zip(users, cuts, strict=True)])
    scores = oracle.scores(histories, [log.user_ids[user] for user in users]).astype(np.float64)
    chosen = scores[np.arange(len(drawn)), drawn]
    expected = (scores**2).sum(axis=1)
    assert chosen.min() > 0
    error = (chosen - expected).std() / np.sqrt(len(drawn))
    assert abs((chosen - expected).mean()) < 4 * error
    likely = scores > 0.3  # and books it calls likely are chosen as often as it says
    hits = likely[np.arange(len(drawn)), drawn].sum()
    spread = np.sqrt((scores * (1 - scores) * likely).sum())
    assert abs(hits - scores[likely].sum()) < 4 * spread


def recall_at_10(scores, targets):
    own = scores[np.arange(len(targets)), targets][:, None]
    ranks = 1 + (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return (ranks <= 10).mean()


def test_the_oracle_is_clearly_above_a_markov_chain_and_that_above_popularity(shop):
    catalog, log, oracle = shop
    split = leave_last_out(log, num_items=len(catalog))
    popularity = np.tile(split.item_counts(), (len(split.test), 1)).astype(float)
    chain = np.zeros((len(catalog), len(catalog)))
    for sequence in split.train_sequences():
        np.add.at(chain, (sequence[:-1], sequence[1:]), 1)
    last = np.array([history[-1] for history in split.test.histories()])
    markov = chain[last] + 1e-6 * popularity
    best = oracle.scores(split.test.histories(), split.test.users)
    recalls = [recall_at_10(scores, split.test.targets) for scores in (popularity, markov, best)]
    assert recalls[0] < 0.15
    assert recalls[0] + 0.2 < recalls[1]
    assert recalls[1] + 0.2 < recalls[2]


@pytest.mark.parametrize("num_items", [20, 50, 100])
def test_small_shops_work_too(num_items):
    catalog, log, oracle = generate(num_items=num_items, num_users=40, seed=2)
    assert len(set(catalog.titles)) == num_items
    scores = oracle.scores([log.of(user)[:-1] for user in range(40)], log.user_ids)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)


def test_both_splits_of_the_log_work_and_do_not_leak(shop):
    catalog, log, _ = shop
    for split in (leave_last_out(log, num_items=len(catalog)), temporal(log, num_items=len(catalog))):
        check_leaks(split, log)
        assert len(split.test) > 50


def test_what_is_written_is_read_back(shop, tmp_path):
    catalog, log, _ = shop
    write_folder(catalog, log, tmp_path / "new" / "shop")
    raw = read(tmp_path / "new" / "shop")
    assert raw.catalog.sha256 == catalog.sha256
    assert raw.interactions.sha256 == log.sha256
    assert raw.notes["duplicate_rows"] == 0


def test_strangers_and_empty_shops_are_refused(shop):
    with pytest.raises(DataError, match="at least 20 items and 1 user, was: 3 and 600"):
        generate(num_items=3)
    with pytest.raises(DataError, match="only the readers it was made with, was: 'stranger'"):
        shop[2].scores([np.array([1])], ["stranger"])
