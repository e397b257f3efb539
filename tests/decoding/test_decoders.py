"""Every family decodes as plain `transformers` does, in one row a user or in one row a beam."""

import copy
import logging

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from llm_itemtok.decoding import tree
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.replicated import ReplicatedDecoder
from llm_itemtok.decoding.tree import TreeDecoder, takes_tree_masks
from llm_itemtok.model.export import fold_rows
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import (
    ALL_FAMILIES,
    DECODERS,
    ENCODER_DECODERS,
    slowly,
    states,
    tiny_codes,
    tiny_item_model,
    tiny_prompts,
)

# Item tokens: 3 an item. The longest history goes far beyond the windows of 6 tokens, the others end before or inside.
HISTORIES = [np.array([3, 7, 1, 9, 22]), np.array([5]), np.array([], dtype=int), np.arange(12)]
EVERY_FAMILY = pytest.mark.parametrize("family", ALL_FAMILIES)
WITHOUT_TREES = ("bloom", "falcon-alibi")


def subject(family: str, sizes: tuple[int, ...] = (6, 5, 4), **changes: object):
    model, tokenizer = tiny_item_model(family, codes=tiny_codes(min(60, int(np.prod(sizes))), sizes), **changes)
    prompts = tiny_prompts(model, tokenizer)
    return model, ItemTrie(model.vocab.codes), [prompts.history(history) for history in HISTORIES]


@torch.no_grad()
def plain_scores(model: ItemTokenModel, prompts: list[np.ndarray], normaliser: str) -> np.ndarray:
    """Log-probabilities `[B, N]`, each item's path run alone behind each prompt: no cache, no mask, no padding."""
    paths, codes = model.vocab.paths, torch.from_numpy(np.asarray(model.vocab.codes.table, dtype=np.int64))
    scores = []
    for prompt in prompts:
        hidden = states(model, [prompt] * len(paths), paths)
        scores.append(sum(
            model.level_log_probs(hidden[:, level], level, normaliser).gather(1, codes[:, level : level + 1])
            for level in range(codes.shape[1])
        ).squeeze(1).numpy())  # fmt: skip
    return np.stack(scores)


@torch.no_grad()
def generated(model: ItemTokenModel, prompt: np.ndarray, beam: int) -> tuple[list[int], np.ndarray]:
    """Items and scores of plain `generate` with a prefix function."""
    merged = fold_rows(copy.deepcopy(model.lm), model)
    paths = model.vocab.paths.tolist()
    before = len(prompt) if model.answer_start is None else 1

    def legal(_batch: int, ids: torch.Tensor) -> list[int]:
        prefix = ids.tolist()[before:]
        return sorted({path[len(prefix)] for path in paths if path[: len(prefix)] == prefix}) or [2]

    found = merged.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=beam,
        num_return_sequences=beam, max_new_tokens=3, min_new_tokens=3, do_sample=False, length_penalty=0.0,
        early_stopping=False, prefix_allowed_tokens_fn=legal, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    items = [paths.index(path) for path in found.sequences[:, before:].tolist()]
    return items, found.sequences_scores.numpy()


def ways(family: str, model: ItemTokenModel) -> list:
    """The decoders of a model: of decoder-only ones also the one that never fails, which knows no encoder."""
    return [decoder_for(model)] if family in ENCODER_DECODERS else [decoder_for(model), ReplicatedDecoder(model)]


def assert_same_ranking(family_scores: np.ndarray, items: np.ndarray, scores: np.ndarray) -> None:
    np.testing.assert_array_equal(items, np.argsort(-family_scores, axis=1))
    np.testing.assert_allclose(scores, -np.sort(-family_scores, axis=1), atol=1e-4)


@EVERY_FAMILY
def test_each_family_decodes_in_the_way_its_attention_allows(family):
    model, _, _ = subject(family)
    others = dict.fromkeys(WITHOUT_TREES, "replicated") | dict.fromkeys(ENCODER_DECODERS, "encoder-decoder tree")
    assert decoder_for(model).name == others.get(family, "tree")


@EVERY_FAMILY
def test_ranks_as_generate_with_a_prefix_function_does(family):
    model, trie, prompts = subject(family, padding=7)
    for beam, places in ((20, (0, 3)), (4, (1,))):
        found = beam_search(decoder_for(model), trie, prompts, beam=beam, normaliser="vocab")
        for place in places:
            items, scores = generated(model, prompts[place], beam)
            assert found.items[place].tolist() == items
            np.testing.assert_allclose(found.scores[place], scores, atol=2e-4)


@pytest.mark.slow
@EVERY_FAMILY
@pytest.mark.parametrize("padding", [0, 7, 40])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ranks_as_generate_does_wherever_the_item_tokens_fall(family, padding, tied):
    model, trie, prompts = subject(family, padding=padding, tied=tied, seed=1)
    both = [beam_search(decoder, trie, prompts, beam=20, normaliser="vocab") for decoder in ways(family, model)]
    for place, prompt in enumerate(prompts):
        items, scores = generated(model, prompt, 20)
        for found in both:
            assert found.items[place].tolist() == items
            np.testing.assert_allclose(found.scores[place], scores, atol=2e-4)


@EVERY_FAMILY
def test_either_way_ranks_the_catalogue_as_plain_paths_do(family):
    """Prompts of unlike lengths in one batch: neither padding nor neighbours may be seen."""
    model, trie, prompts = subject(family)
    expected = plain_scores(model, prompts, "level")
    for decoder in ways(family, model):
        found = beam_search(decoder, trie, prompts, beam=trie.num_items)
        assert_same_ranking(expected, found.items, found.scores)


@pytest.mark.slow
@EVERY_FAMILY
@pytest.mark.parametrize("sizes", [(60,), (1, 1, 60), (2, 2, 2, 2, 4), (12, 6)])
@pytest.mark.parametrize("normaliser", ["level", "items", "vocab"])
def test_either_way_ranks_as_plain_paths_do_for_codes_of_any_depth(family, sizes, normaliser):
    model, trie, prompts = subject(family, sizes)
    expected = plain_scores(model, prompts, normaliser)
    for decoder in ways(family, model):
        found = beam_search(decoder, trie, prompts, beam=trie.num_items, normaliser=normaliser)
        assert_same_ranking(expected, found.items, found.scores)


@pytest.mark.parametrize("beam", [1, 4, 20])
@pytest.mark.parametrize("family", slowly(DECODERS))
def test_narrow_beams_are_the_same_either_way(family, beam):
    """Beams change their number from level to level, or keep it, and change their parents either way."""
    model, trie, prompts = subject(family, (3, 3, 3, 3))
    if family in WITHOUT_TREES:
        one_by_one = [beam_search(ReplicatedDecoder(model), trie, [prompt], beam=beam) for prompt in prompts]
        expected = [np.concatenate([getattr(found, name) for found in one_by_one]) for name in ("items", "scores")]
    else:
        shared = beam_search(TreeDecoder(model), trie, prompts, beam=beam)
        expected = [shared.items, shared.scores]
    found = beam_search(ReplicatedDecoder(model), trie, prompts, beam=beam)
    np.testing.assert_array_equal(found.items, expected[0])
    np.testing.assert_allclose(found.scores, expected[1], atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [(60,), (3, 3, 3, 3), (2, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_distances_in_a_decoders_tree_are_those_of_its_paths(family, sizes, implementation):
    """Deeper than the buckets of T5's bias are fine, in trees wider than its longest distance."""
    model, trie, prompts = subject(family, sizes)
    model.lm.set_attn_implementation(implementation)
    with torch.no_grad():
        model.lm.get_decoder().block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(5)
    found = beam_search(decoder_for(model), trie, prompts, beam=trie.num_items)
    assert_same_ranking(plain_scores(model, prompts, "level"), found.items, found.scores)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_reads_each_history_once_and_no_beam_makes_its_keys_again(family):
    model, trie, prompts = subject(family)
    read = []
    encoder, keys = model.lm.get_encoder(), model.lm.get_decoder().block[-1].layer[1].EncDecAttention.k
    hooks = [
        part.register_forward_hook(lambda *_call, name=name: read.append(name))
        for name, part in {"encoder": encoder, "keys": keys}.items()
    ]
    beam_search(decoder_for(model), trie, prompts, beam=20)
    assert read == ["encoder", "keys"]
    for hook in hooks:
        hook.remove()


def two_d_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention as FlashAttention has it: masks of padding only. Others are ignored, not refused."""
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    if attention_mask is not None and attention_mask.ndim == 2:
        seen = seen & attention_mask[:, None, None, :].bool()
    bias = torch.where(seen, 0.0, torch.finfo(query.dtype).min).expand(len(query), 1, -1, -1)
    return sdpa_attention_forward(module, query, key, value, bias, **kwargs)


def test_an_attention_that_ignores_tree_masks_is_found_out_and_decodes_right():
    AttentionInterface.register("two-d", two_d_attention)
    AttentionMaskInterface.register("two-d", flash_attention_mask)
    model, trie, prompts = subject("llama")
    expected = plain_scores(model, prompts, "level")
    assert takes_tree_masks(model)
    model.lm.set_attn_implementation("two-d")
    assert not takes_tree_masks(model)
    decoder = decoder_for(model)
    assert decoder.name == "replicated"
    found = beam_search(decoder, trie, prompts, beam=trie.num_items)
    assert_same_ranking(expected, found.items, found.scores)
    model.lm.set_attn_implementation("eager")
    assert takes_tree_masks(model)


def test_flash_attention_is_never_given_a_tree_mask():
    """Its kernels would read beyond their tables, which on an accelerator ends the process."""
    model, _, _ = subject("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_tree_masks(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [
    pytest.param(lambda allowed: torch.ones_like(allowed), id="all is seen"),
    pytest.param(lambda allowed: allowed.flip(1), id="beams are mixed up"),
    pytest.param(lambda allowed: allowed & (allowed.cumsum(-1) != allowed.sum(-1, keepdim=True) - 1), id="no parents"),
])  # fmt: skip
def test_wrong_masks_are_told_from_rounding(change, dtype, monkeypatch):
    model, _, _ = subject("qwen3")
    model.lm.to(dtype)
    assert takes_tree_masks(model)

    def wrong(config, dtype, allowed, *places, right=tree.attention_masks):
        return right(config, dtype, change(allowed), *places)

    monkeypatch.setattr(tree, "attention_masks", wrong)
    model.tree_masks.clear()
    assert not takes_tree_masks(model)


def test_trying_out_a_model_changes_nothing_of_it(caplog):
    model, _, prompts = subject("llama")
    model.train()
    model.lm.get_input_embeddings().eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger=tree.__name__):
        assert takes_tree_masks(model)
        assert takes_tree_masks(model)
    assert [record.getMessage() for record in caplog.records] == [
        "llama with sdpa attention: beams of a user share one row"
    ]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    ids = torch.from_numpy(prompts[0])[None]
    model(ids, ids, torch.full_like(ids, 3)).sum().backward()  # nothing was left behind that gradients cannot pass


def test_an_error_that_is_not_about_masks_is_not_hidden():
    model, _, _ = subject("llama")
    model.lm.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        takes_tree_masks(model)
