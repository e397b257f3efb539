"""When training ends and which epoch is kept, told by figures alone."""

import numpy as np
import pytest
import torch
from torch import nn

from llm_itemtok.errors import DataError
from llm_itemtok.items.stopping import WITHIN, Look, Watch


def kept(rule, looks):
    """The epoch kept of looks (loss, collision rate, error), one an epoch; the weights kept must be those of then."""
    module = nn.Linear(1, 1, bias=False)
    watch = Watch(rule, patience=len(looks))
    for epoch, (loss, collision_rate, error) in enumerate(looks, start=1):
        nn.init.constant_(module.weight, epoch)
        watch.is_over(epoch, loss=loss, reconstruction=error)
        watch.look(Look(epoch, loss, collision_rate, error), module)
    look, weights = watch.best()
    assert weights["weight"].item() == look.epoch
    return look.epoch


def test_the_fewest_collisions_win_among_those_that_rebuild_nearly_best():
    looks = [(1.0, 0.01, 0.50), (1.0, 0.05, 0.103), (1.0, 0.04, 0.104), (1.0, 0.07, 0.10), (1.0, 0.02, 0.106)]
    assert kept("reconstruction", looks) == 3


def test_an_epoch_that_was_second_is_found_again_when_the_first_falls_out_of_the_bound():
    """Holding only the best so far would have nothing but the last to return."""
    assert kept("reconstruction", [(1.0, 0.05, 1.0), (1.0, 0.06, 0.97), (1.0, 0.07, 0.94)]) == 2


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_what_a_look_back_over_all_epochs_would_choose(seed):
    rng = np.random.default_rng(seed)
    falling = np.linspace(1.0, 0.8, 30) + rng.normal(0, 0.03, 30)
    looks = [(1.0, round(rate, 2), error) for rate, error in zip(rng.random(30), falling.tolist(), strict=True)]
    near = [place for place in range(30) if looks[place][2] <= (1 + WITHIN) * min(look[2] for look in looks)]
    assert kept("reconstruction", looks) == 1 + min(near, key=lambda place: looks[place][1:])


def test_the_loss_is_not_looked_at():
    assert kept("reconstruction", [(0.1, 0.5, 1.0), (9.0, 0.1, 0.5)]) == 2


def test_by_the_loss_an_early_lowest_one_leaves_the_newest_look():
    """What records from before the choice were made by; it must stay as it was."""
    watch = Watch("loss", patience=9)
    module = nn.Linear(1, 1)
    watch.is_over(1, loss=0.1, reconstruction=1.0)  # lowest, and not looked at
    for epoch, collision_rate in ((5, 0.1), (10, 0.2), (15, 0.3)):
        watch.is_over(epoch, loss=1.0, reconstruction=1.0)
        watch.look(Look(epoch, 1.0, collision_rate, 1.0), module)
    assert watch.best()[0].epoch == 15
    assert kept("loss", [(1.0, 0.3, 1.0), (0.97, 0.2, 1.0), (0.99, 0.2, 1.1), (0.96, 0.4, 0.5)]) == 2


@pytest.mark.parametrize(("rule", "over_at"), [("loss", 4), ("reconstruction", 6)])
def test_patience_counts_from_the_last_fall_of_what_the_rule_watches(rule, over_at):
    watch = Watch(rule, patience=3)
    losses, errors = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 0.9, 0.8, 0.7995, 0.81, 0.9]  # 0.7995 is 0.06 % less
    over = [
        watch.is_over(epoch, loss=loss, reconstruction=error)
        for epoch, (loss, error) in enumerate(zip(losses, errors, strict=True), start=1)
    ]
    assert over.index(True) + 1 == over_at


def test_errors_that_are_no_numbers_are_never_kept():
    assert kept("reconstruction", [(1.0, 0.0, float("nan")), (1.0, 0.5, 0.5), (1.0, 0.0, float("nan"))]) == 2
    with pytest.raises(DataError, match="lower the learning rate"):
        kept("reconstruction", [(1.0, 0.0, float("nan"))])


def test_weights_that_are_kept_do_not_follow_the_module():
    module = nn.Linear(2, 2)
    watch = Watch("reconstruction", patience=1)
    before = module.weight.detach().clone()
    watch.look(Look(1, 1.0, 0.0, 0.5), module)
    nn.init.zeros_(module.weight)
    assert torch.equal(watch.best()[1]["weight"], before)
