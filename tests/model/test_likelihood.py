"""Likelihoods among what leads to an item: of all items they sum to 1, and training and ranking mean the same."""

import numpy as np
import pytest
import torch

from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.likelihood import items_nll
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import build
from llm_itemtok.training.next_token import MODEL_INPUTS
from llm_itemtok.vocab.trie import ItemTrie
from tests.recursive import recursive_model
from tests.tiny import ENCODER_DECODERS, KINDS, tiny_codes, tiny_item_model, tiny_prompts

UNEVEN = ItemCodes(np.array([[0, 0, 0], [0, 0, 3], [0, 2, 1], [1, 4, 2], [5, 1, 0], [5, 1, 1], [5, 2, 2]]), (6, 5, 4))


def random_logits(codes, seed=0):
    """Of each level `[N, K]`, alike for items that begin alike, as any model's are."""
    draw, found = torch.Generator().manual_seed(seed), []
    for level, size in enumerate(codes.sizes):
        _, begin = np.unique(codes.table[:, :level], axis=0, return_inverse=True)
        found.append(torch.randn(begin.max() + 1, size, generator=draw)[begin].requires_grad_())
    return found


@pytest.mark.parametrize("codes", [UNEVEN, tiny_codes(), tiny_codes(1, (6, 5, 4)), tiny_codes(24, (2, 3, 4))])
def test_items_share_all_probability_and_other_codewords_hear_nothing(codes):
    logits, table = random_logits(codes), torch.from_numpy(codes.table.astype("int64"))
    nll = items_nll(logits, table, trie=ItemTrie(codes))
    assert nll.shape == table.shape
    assert float((-nll.detach().sum(1)).exp().sum()) == pytest.approx(1, abs=1e-5)
    nll.sum().backward()
    for level, scores in enumerate(logits):
        for row, code in enumerate(codes.table):
            siblings = np.unique(codes.table[(codes.table[:, :level] == code[:level]).all(1), level])
            own = scores.detach()[row]
            expected = own[siblings.tolist()].logsumexp(0) - own[code[level]]
            assert nll[row, level].item() == pytest.approx(float(expected), abs=1e-5)
            assert not np.delete(scores.grad[row].numpy(), siblings).any()
            if len(siblings) == 1:
                assert nll[row, level].item() == 0


def test_label_smoothing_spreads_its_share_over_the_siblings():
    logits, table = random_logits(UNEVEN), torch.from_numpy(UNEVEN.table.astype("int64"))
    smooth = items_nll(logits, table, trie=ItemTrie(UNEVEN), smoothing=0.3)
    log_probs = logits[1][0][[0, 2]].log_softmax(0)  # after 0 come 0 and 2
    assert smooth[0, 1].item() == pytest.approx((-0.7 * log_probs[0] - 0.3 * log_probs.mean()).item(), abs=1e-6)
    assert smooth[3, 2].item() == 0  # an only child


@pytest.mark.parametrize("reads", ["tokens", "items"])
@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_what_is_learnt_is_what_items_are_ranked_by(family, reads):
    """Also after an update of the item tokens, whose tree is another one."""
    model, tokenizer = tiny_item_model(family) if reads == "tokens" else recursive_model(family)
    model.normaliser = "children"
    history = np.array([3, 9, 4, 7])
    for codes in (model.vocab.codes, tiny_codes(seed=7)):
        model.take_codes(codes)
        prompts = tiny_prompts(model, tokenizer)
        kind = "last" if family in ENCODER_DECODERS else "all-positions"
        table = build([history, history[:2]], kind=kind, history_length=20,
                      tasks={"next-item": 1.0}, text_rows=torch.arange(0).numpy())  # fmt: skip
        rows = {tuple(row["items"]): row for row in table}
        batch = Collator(prompts, 3)(list(rows.values()))
        nll = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        for row, items in enumerate(rows):
            after = [len(items) - 1] if kind == "last" else range(1, len(items))
            found = nll[row][batch["levels"][row] >= 0].view(-1, 3).sum(1)[-len(after) :]
            for at, place in enumerate(after):
                before, target = np.array(items[:place]), np.array([items[place]])
                trie = ItemTrie(model.vocab.codes)
                expected = score_items(model, trie, [prompts.history(before)], [target], normaliser="children")[0]
                assert float(found[at]) == pytest.approx(-float(expected[0]), abs=1e-4)
