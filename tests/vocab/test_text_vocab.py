"""Identifiers in words are ids that the tokenizer has had all along."""

import pytest
import torch

from llm_itemtok.errors import ItemTokError
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.text_vocab import TextVocab, extended, resolved
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import text_codes, tiny_codes, tiny_tokenizer

TITLES = ["red lamp", "red", "old green chair", "one", "red"]


def test_paths_are_the_tokenizers_ids_and_nothing_is_added():
    tokenizer = tiny_tokenizer()
    before = len(tokenizer)
    vocab = extended(tokenizer, text_codes(TITLES))
    assert (len(tokenizer), vocab.num_tokens) == (before, 0)
    assert vocab.lengths.tolist() == [3, 2, 4, 2, 3]
    for row, title in enumerate([*TITLES[:4], "red title"]):
        ids = tokenizer(title, add_special_tokens=False)["input_ids"]
        assert vocab.paths[row, : vocab.lengths[row]].tolist() == [*ids, tokenizer.eos_token_id]
    assert vocab.spell(2) == "old green chair </s>"


def test_codewords_become_ids_one_level_or_many_at_a_time():
    vocab = resolved(tiny_tokenizer(), text_codes(TITLES))
    codes = torch.tensor(vocab.codes.table, dtype=torch.long)
    counted = torch.arange(codes.shape[1]) < torch.from_numpy(vocab.lengths).unsqueeze(1)
    by_level = torch.stack([vocab.token_ids(codes[:, level], level) for level in range(codes.shape[1])], dim=1)
    together = vocab.token_ids(codes, torch.arange(codes.shape[1]).expand_as(codes))
    assert torch.equal(by_level[counted], vocab.paths[counted])
    assert torch.equal(together, by_level)
    plain = ItemVocab.add_to(tiny_tokenizer(), tiny_codes())
    codes = torch.tensor(plain.codes.table, dtype=torch.long)
    assert torch.equal(plain.token_ids(codes, torch.arange(3).expand_as(codes)), plain.paths)
    assert torch.equal(plain.token_ids(codes[:, 1], 1), plain.paths[:, 1])


def test_codes_say_which_vocabulary_they_need():
    assert isinstance(resolved(tiny_tokenizer(), text_codes(TITLES)), TextVocab)
    assert not isinstance(extended(tiny_tokenizer(), tiny_codes()), TextVocab)


def test_words_that_the_tokenizer_lacks_are_refused():
    codes = text_codes(["red lamp", "lantern"], split=lambda texts: [text.split() for text in texts])
    with pytest.raises(ItemTokError, match="but 1 are missing, such as 'lantern'; its codes and its tokenizer come fr"):
        resolved(tiny_tokenizer(), codes)


def test_identifiers_in_words_cannot_be_updated():
    vocab = resolved(tiny_tokenizer(), text_codes(TITLES))
    with pytest.raises(ItemTokError, match="identifiers in words of the vocabulary cannot change"):
        vocab.with_codes(vocab.codes)


def test_the_trie_knows_where_items_end():
    codes = text_codes(TITLES)
    trie = ItemTrie(codes)
    for item in range(len(TITLES)):
        node = 0
        for level in range(codes.num_levels):
            children, child_codes, legal = trie.children(torch.tensor(node), level)
            place = (legal & (child_codes == int(codes.table[item, level]))).int().argmax()
            node = int(children[place])
            assert bool(trie.ended[level][node]) == (codes.lengths[item] <= level + 1)
    assert ItemTrie(tiny_codes()).ended is None
