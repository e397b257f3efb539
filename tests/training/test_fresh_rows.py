"""Rows of codewords that mean something else begin anew; all others stay, and so does what the optimiser knows."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.training.fresh_rows import moved_codewords, refresh_rows
from tests.tiny import tiny_item_model

OLD = ItemCodes(np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 2]]), (4, 3))
NEW = ItemCodes(np.array([[0, 0], [0, 1], [1, 2], [1, 0], [2, 1], [3, 2]]), (4, 3))
"""Codeword 0 of the first level keeps two of three items, 1 keeps one of two, 2 loses its only one and gets another, 3
is new."""


def test_a_codeword_moved_when_it_lost_more_than_half_of_its_items_and_has_others():
    assert moved_codewords(OLD, NEW, 0).tolist() == [2]
    assert moved_codewords(OLD, NEW, 1).tolist() == []
    emptied = ItemCodes(np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]), (4, 3))
    assert moved_codewords(OLD, emptied, 0).tolist() == []


@pytest.mark.parametrize("tied", [True, False])
def test_its_rows_become_the_mean_of_what_its_items_had_and_their_moments_zero(tied):
    model, _ = tiny_item_model("llama", codes=OLD, tied=tied)
    optimizer = torch.optim.AdamW(model.rows.parameters(), lr=0.1)
    for table in model.rows.parameters():
        table.grad = torch.randn_like(table)
    optimizer.step()
    tables = list(model.rows.parameters())
    before = [table.detach().clone() for table in tables]
    assert refresh_rows(model, optimizer, OLD, NEW) == 1
    for table, rows in zip(tables, before, strict=True):
        assert_close(table[2].detach(), rows[1])  # the item under it now, row 4, was under codeword 1
        kept = torch.arange(len(rows)) != 2
        assert_close(table[kept].detach(), rows[kept], atol=0, rtol=0)
        state = optimizer.state[table]
        assert (state["exp_avg"][2] == 0).all()
        assert (state["exp_avg_sq"][2] == 0).all()
        assert (state["exp_avg"][kept] != 0).all()
        assert float(state["step"]) == 1
    assert len(tables) == (1 if tied else 2)
