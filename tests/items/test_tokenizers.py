"""Item tokenizers: what all promise, and what each is for."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.codebooks import revive, start_codebooks
from llm_itemtok.items.product import ProductKMeans
from llm_itemtok.items.random_codes import RandomCodes
from llm_itemtok.items.residual_kmeans import ResidualKMeans, principal_components
from llm_itemtok.items.rqvae import RQVAE, RQVAEQuantizer


def vectors(num=120, dimensions=8, groups=6, seed=0):
    """Items around a few planted centres, each with a little of its own."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(groups, dimensions))
    return (centres[np.arange(num) % groups] + 0.2 * rng.normal(size=(num, dimensions))).astype(np.float32)


def rqvae(**changes):
    settings = {"levels": 2, "codebook_size": 8, "widths": (16,), "latent_dimensions": 4, "epochs": 12}
    return RQVAE(**(settings | {"warmup_epochs": 5, "batch_size": 32, "seed": 3} | changes))


MAKERS = {
    "residual-kmeans": lambda **changes: ResidualKMeans(**({"levels": 2, "codebook_size": 8, "seed": 3} | changes)),
    "residual-kmeans on components": lambda **changes: ResidualKMeans(
        **({"levels": 2, "codebook_size": 8, "components": 5, "seed": 3} | changes)
    ),
    "residual-kmeans of balanced clusters": lambda **changes: ResidualKMeans(
        **({"levels": 2, "codebook_size": 8, "balance": True, "seed": 3} | changes)
    ),
    "residual-kmeans on a sample": lambda **changes: ResidualKMeans(
        **({"levels": 2, "codebook_size": 8, "sample": 100, "seed": 3} | changes)
    ),
    "product": lambda **changes: ProductKMeans(**({"levels": 2, "codebook_size": 8, "seed": 3} | changes)),
    "product by opq": lambda **changes: ProductKMeans(
        **({"levels": 2, "codebook_size": 8, "rotation": "opq", "components": 6, "seed": 3} | changes)
    ),
    "rqvae": rqvae,
    "rqvae with everything": lambda **changes: rqvae(
        **({"estimator": "rotation", "revive_every": 3, "diversity_weight": 0.1} | changes)
    ),
    "rqvae by draws": lambda **changes: rqvae(**({"estimator": "gumbel"} | changes)),
    "random": lambda **changes: RandomCodes(**({"levels": 2, "codebook_size": 8, "seed": 3} | changes)),
}


LEARNED = [kind for kind in MAKERS if kind != "random"]


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_seed_gives_the_same_codes_and_spares_the_global_one(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = MAKERS[kind]().fit(vectors()), MAKERS[kind]().fit(vectors())
    assert first == second
    assert first != MAKERS[kind](seed=4).fit(vectors())
    assert torch.equal(before, torch.get_rng_state())
    assert first.sizes == (8, 8)
    assert first.num_items == 120
    assert first.provenance["tokenizer"]["kind"] == kind.split()[0]


@pytest.mark.parametrize("kind", LEARNED)
def test_the_quantizer_left_behind_gives_the_codes(kind):
    tokenizer = MAKERS[kind]()
    codes = tokenizer.fit(vectors())
    assert tokenizer.quantizer.encode(torch.from_numpy(vectors())).tolist() == codes.table.tolist()
    assert not tokenizer.quantizer.training


@pytest.mark.parametrize("kind", LEARNED)
def test_items_of_a_planted_group_share_their_first_codeword_more_often_than_others(kind):
    first = MAKERS[kind]().fit(vectors()).table[:, 0]
    group = np.arange(120) % 6
    together = first[:, None] == first
    assert together[group[:, None] == group].mean() > 0.5
    assert together[group[:, None] != group].mean() < 0.1


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("num", [1, 2, 5])
def test_catalogues_smaller_than_a_codebook_get_codes(kind, num):
    codes = MAKERS[kind]().fit(vectors(num))
    assert codes.num_items == num
    assert codes.is_injective


@pytest.mark.parametrize("kind", LEARNED)
def test_identical_items_share_one_code(kind):
    tokenizer = MAKERS[kind]()
    codes = tokenizer.fit(np.ones((20, 4), dtype=np.float32))
    assert len(np.unique(codes.table, axis=0)) == 1
    assert np.isfinite(tokenizer.quantizer.decode(torch.tensor(codes.table, dtype=torch.int64)).detach().numpy()).all()


@pytest.mark.parametrize("kind", LEARNED)
def test_vectors_may_be_read_only_of_any_layout_and_are_left_alone(kind):
    given = np.asfortranarray(vectors().astype(np.float64))
    given.setflags(write=False)
    assert MAKERS[kind]().fit(given) == MAKERS[kind]().fit(vectors())
    kept = vectors()
    MAKERS[kind]().fit(kept)
    np.testing.assert_array_equal(kept, vectors())


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([[0, np.nan]], np.float32), "1 of 1 rows hold NaN.*first is row 0"),
        (np.array([[0.0], [1e300]]), "or a larger number, the first is row 1"),
        (np.array([[0.0], [-1e25]]), "of at most 1e.12; 1 of 2 rows.*the first is row 1; scale the vectors"),
        (np.zeros((3, 2), int), "floating-point numbers, was: int64"),
        (np.zeros(3, np.float32), r"shape \(items, dimensions\).*was: \(3,\)"),
        (np.zeros((0, 3), np.float32), r"was: \(0, 3\)"),
    ],
)
def test_bad_vectors_are_refused(kind, bad, message):
    with pytest.raises(DataError, match=message):
        MAKERS[kind]().fit(bad)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("changes", [{"levels": 0}, {"codebook_size": 0}])
def test_codes_of_no_levels_or_codewords_are_refused(kind, changes):
    with pytest.raises(DataError, match="must be at least 1, was: "):
        MAKERS[kind](**changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({"epochs": 0}, {"batch_size": 0}, {"patience": 0}, {"warmup_epochs": -1}, {"learning_rate": 0.0}),
        {"stop": "never"},
    ],
)
def test_training_settings_out_of_range_are_refused(changes):
    with pytest.raises(DataError, match=r"must be at least 1|must be above 0|must be one of reconstruction, loss, was"):
        rqvae(**changes)


def test_residual_kmeans_rebuilds_better_with_every_level():
    x = torch.from_numpy(vectors())
    errors = []
    for levels in (1, 2, 3):
        tokenizer = ResidualKMeans(levels=levels, codebook_size=8)
        tokenizer.fit(x.numpy())
        errors.append((tokenizer.quantizer.decode(tokenizer.quantizer.encode(x)) - x).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_components_are_the_directions_of_largest_variance():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 3)) * [1, 5, 0.1] + [7, 7, 7]).astype(np.float32)
    np.testing.assert_allclose(principal_components(x, 2), [[0, 1], [1, 0], [0, 0]], atol=0.02)
    np.testing.assert_allclose(principal_components(x, 3).T @ principal_components(x, 3), np.eye(3), atol=1e-5)
    assert principal_components(np.array([[1.0], [2.0]], np.float32), 1).tolist() == [[1.0]]


def test_as_many_components_as_dimensions_change_nothing():
    plain, all_of_them = (ResidualKMeans(levels=2, codebook_size=8, components=n) for n in (None, 8))
    assert plain.fit(vectors()) == all_of_them.fit(vectors())
    with pytest.raises(DataError, match="`components` must be at least 1, or none given, was: 0"):
        ResidualKMeans(components=0)


def test_more_levels_leave_the_first_ones_alone():
    few, many = (ResidualKMeans(levels=levels, codebook_size=8, seed=1).fit(vectors()) for levels in (2, 3))
    np.testing.assert_array_equal(few.table, many.table[:, :2])


def test_rqvae_learns_and_returns_the_best_epoch_it_looked_at():
    tokenizer = rqvae(epochs=60, patience=60)
    codes = tokenizer.fit(vectors())
    looks = tokenizer.history
    assert looks[-1].loss < looks[0].loss
    assert min(look.reconstruction for look in looks) < 0.5
    training = codes.provenance["training"]
    assert training["collision_rate"] == codes.collision_rate
    assert training["epoch"] in {look.epoch for look in looks}
    assert training["reconstruction"] <= min(look.reconstruction for look in looks) * 1.05
    assert (training["epochs_run"], training["stop"]) == (looks[-1].epoch, "reconstruction")


def test_rqvae_goes_on_while_it_rebuilds_better_though_its_loss_was_lowest_at_the_start():
    """The loss counts the size of latent vectors, which grow; what codes are good for is told by the rebuilt ones."""
    settings = {"widths": (256, 128), "learning_rate": 3e-3, "warmup_epochs": 20, "batch_size": 120}
    settings |= {"epochs": 60, "patience": 10}
    by_loss, by_error = rqvae(stop="loss", **settings), rqvae(**settings)
    assert by_loss.fit(vectors()).provenance["training"]["reconstruction"] > (
        1.2 * by_error.fit(vectors()).provenance["training"]["reconstruction"]
    )
    assert 3 * by_loss.history[-1].epoch < by_error.history[-1].epoch


def test_rqvae_stops_when_the_error_is_flat_and_reports_progress_to_the_end():
    calls = []
    tokenizer = rqvae(epochs=200, patience=2, progress=lambda done, total: calls.append((done, total)))
    tokenizer.fit(np.ones((8, 4), dtype=np.float32))
    assert tokenizer.history[-1].epoch < 200
    assert calls[0] == (1, 200)
    assert calls[-1] == (200, 200)


def test_rqvae_codes_do_not_depend_on_the_unit_of_the_vectors():
    plain, scaled = rqvae().fit(vectors()), rqvae().fit(vectors() * 1024)  # a power of two: no rounding
    assert plain == scaled


def test_dead_codewords_are_moved_onto_residuals_and_the_optimizer_forgets_them():
    torch.manual_seed(0)
    quantizer = RQVAEQuantizer(levels=2, codebook_size=4, dimensions=8, widths=(), latent_dimensions=3)
    x = torch.from_numpy(vectors())
    start_codebooks(quantizer, x, seed=0)
    optimizer = torch.optim.AdamW([quantizer.codebooks])
    quantizer(x).codebook_loss.mean().backward()
    optimizer.step()
    quantizer.codebooks.data[0, 2] = 1e3
    used = torch.tensor([[5, 5, 0, 5], [5, 5, 5, 5]])
    untouched = quantizer.codebooks.detach().clone()
    assert revive(quantizer, optimizer, x, used, torch.Generator().manual_seed(0)) == 1
    changed = (quantizer.codebooks != untouched).any(dim=2)
    assert changed.tolist() == [[False, False, True, False], [False] * 4]
    assert (quantizer.to_latent(x) - quantizer.codebooks[0, 2]).square().sum(dim=1).min() == 0
    state = optimizer.state[quantizer.codebooks]
    assert state["exp_avg"][0, 2].abs().sum() == 0
    assert state["exp_avg"][0, 0].abs().sum() > 0


def test_random_codes_are_distinct_and_balanced_when_there_is_room():
    for num in (1, 7, 64, 100, 125):
        codes = RandomCodes(levels=3, codebook_size=5, seed=1).deal(num)
        assert codes.is_injective
        for level in range(3):
            counts = np.bincount(codes.table[:, level], minlength=5)
            assert counts.max() - counts.min() <= 1
        for prefix_counts in (codes.prefix_counts(1)[1], codes.prefix_counts(2)[1]):
            assert prefix_counts.max() - prefix_counts.min() <= 1


def test_random_codes_beyond_capacity_repeat_evenly():
    codes = RandomCodes(levels=2, codebook_size=3, seed=1).deal(18)
    assert codes.prefix_counts(2)[1].tolist() == [2] * 9


def test_random_codes_do_not_look_at_the_vectors():
    assert RandomCodes(seed=2).fit(vectors(30)) == RandomCodes(seed=2).fit(vectors(30, seed=9))
    assert RandomCodes(seed=2).fit(vectors(30)) != RandomCodes(seed=3).fit(vectors(30))
