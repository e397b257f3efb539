"""Item tokens are found through the tokenizer, survive decoding, and keep their ids when the codes change."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.item_vocab import ItemVocab, spellings
from tests.tiny import tiny_codes, tiny_tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer that rewrites text before it looks at it, as those of the first Llamas do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((letter, -5.0) for letter in "abcdeLMP")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_spellings_are_distinct_and_go_level_by_level():
    assert spellings((3, 1, 2)) == ["<a_0>", "<a_1>", "<a_2>", "<b_0>", "<c_0>", "<c_1>"]
    every = spellings((1,) * 26)
    assert (every[0], every[-1], len(set(every))) == ("<a_0>", "<z_0>", 26)


def test_ids_are_the_tokenizers_own():
    codes, tokenizer = tiny_codes(), tiny_tokenizer()
    before = len(tokenizer)
    vocab = ItemVocab.add_to(tokenizer, codes)
    assert (vocab.first_id, vocab.num_tokens) == (before, sum(codes.sizes))
    assert len(tokenizer) == before + vocab.num_tokens
    assert tokenizer.convert_tokens_to_ids(spellings(codes.sizes)) == list(range(before, before + vocab.num_tokens))
    for row in (0, 17, 59):
        assert tokenizer.convert_ids_to_tokens(vocab.paths[row].tolist()) == [
            f"<{'abc'[level]}_{code}>" for level, code in enumerate(codes.table[row])
        ]


def test_the_number_of_tokens_is_the_capacity_and_not_the_use():
    codes = ItemCodes(np.array([[0, 0], [0, 1]]), (50, 30))
    vocab = ItemVocab.add_to(tiny_tokenizer(), codes)
    assert (vocab.num_tokens, vocab.level_starts, vocab.num_levels) == (80, (0, 50), 2)


def test_spellings_that_the_tokenizer_has_are_refused_and_nothing_is_added():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<b_2>"])
    before = len(tokenizer)
    with pytest.raises(ItemTokError, match="already has 1 of 15, such as <b_2>; start from the model as it was before"):
        ItemVocab.add_to(tokenizer, tiny_codes())
    assert len(tokenizer) == before


def test_missing_tokens_are_refused():
    tokenizer = tiny_tokenizer()
    ItemVocab.add_to(tokenizer, tiny_codes(sizes=(6, 5, 4)))
    with pytest.raises(ItemTokError, match="must have all 16 item tokens, but 1 are missing, such as <c_4>"):
        ItemVocab.resolve(tokenizer, tiny_codes(sizes=(6, 5, 5)))


def test_ids_that_are_not_contiguous_are_refused():
    tokenizer = tiny_tokenizer()
    tokens = spellings((2, 2))
    tokenizer.add_tokens([*tokens[:3], "between", tokens[3]])
    with pytest.raises(ItemTokError, match="contiguous ids, but run from 21 to 25 with 4 tokens"):
        ItemVocab.resolve(tokenizer, ItemCodes(np.array([[0, 0]]), (2, 2)))


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace_tokenizer])
def test_adjacent_tokens_round_trip_through_text(make):
    codes, tokenizer = tiny_codes(), make()
    vocab = ItemVocab.add_to(tokenizer, codes)
    text = "".join(vocab.spell(row) for row in range(codes.num_items))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == vocab.paths.reshape(-1).tolist()
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text
    assert tokenizer(decoded.replace(" ", ""), add_special_tokens=False)["input_ids"] == ids


def test_item_tokens_are_plain_and_survive_skipping_special_tokens():
    codes, tokenizer = tiny_codes(), tiny_tokenizer()
    vocab = ItemVocab.add_to(tokenizer, codes)
    decoded = tokenizer.decode([1, *vocab.paths[3].tolist(), 2], skip_special_tokens=True)
    assert decoded.replace(" ", "") == vocab.spell(3)
    assert not set(spellings(codes.sizes)) & set(tokenizer.all_special_tokens)


def test_item_tokens_survive_saving_the_tokenizer(tmp_path):
    codes, tokenizer = tiny_codes(), tiny_tokenizer()
    vocab = ItemVocab.add_to(tokenizer, codes)
    tokenizer.save_pretrained(tmp_path)
    again = ItemVocab.resolve(PreTrainedTokenizerFast.from_pretrained(tmp_path), codes)
    assert again.paths.tolist() == vocab.paths.tolist()


def test_text_around_item_tokens_is_tokenised_as_before():
    codes, tokenizer = tiny_codes(), tiny_tokenizer()
    before = tokenizer("red lamp", add_special_tokens=False)["input_ids"]
    vocab = ItemVocab.add_to(tokenizer, codes)
    ids = tokenizer(f"red lamp{vocab.spell(0)}", add_special_tokens=False)["input_ids"]
    assert ids == [*before, *vocab.paths[0].tolist()]


def test_new_codes_keep_the_tokens_and_their_ids():
    vocab = ItemVocab.add_to(tiny_tokenizer(), tiny_codes(seed=0))
    codes = tiny_codes(seed=1)
    moved = vocab.with_codes(codes)
    assert (moved.first_id, moved.num_tokens, moved.level_starts) == (vocab.first_id, 15, vocab.level_starts)
    assert (moved.paths.numpy() - vocab.first_id - np.array(vocab.level_starts)).tolist() == codes.table.tolist()
    assert vocab.codes == tiny_codes(seed=0)


def test_new_codes_of_another_capacity_are_refused():
    vocab = ItemVocab.add_to(tiny_tokenizer(), tiny_codes(sizes=(6, 5, 4)))
    with pytest.raises(ItemTokError, match=r"the level sizes of the vocabulary, \(6, 5, 4\), was: \(6, 5, 5\)"):
        vocab.with_codes(tiny_codes(sizes=(6, 5, 5)))


def test_a_special_token_added_before_shifts_the_ids_and_not_the_meaning():
    codes, tokenizer = tiny_codes(), tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    vocab = ItemVocab.add_to(tokenizer, codes)
    assert vocab.first_id == len(tiny_tokenizer()) + 1
    assert tokenizer.convert_ids_to_tokens(vocab.first_id) == "<a_0>"
