"""A model from nothing: text round-trips, seeds decide, pre-training helps, and no text is fine too."""

import pytest
import torch
from transformers import AutoTokenizer

from llm_itemtok.errors import ItemTokError
from llm_itemtok.model import scratch
from llm_itemtok.model.families import refuse_unsupported
from tests.tiny import plain_class

SIZES = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0}


def test_texts_of_the_catalogue_round_trip(catalog):
    tokenizer = scratch.train_tokenizer(catalog.texts(), vocab_size=200)
    assert 50 < len(tokenizer) <= 200
    # Letters that are very rare among all texts have no piece.
    whole = [text for text in catalog.texts() if tokenizer.unk_token_id not in tokenizer(text)["input_ids"]]
    assert len(whole) >= 50
    for text in whole:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_runs_of_spaces_count_as_one(catalog):
    tokenizer = scratch.train_tokenizer(catalog.texts(), vocab_size=200)
    one, two = catalog.titles[0].split(" ", 1)
    assert tokenizer(f"{one}    {two}")["input_ids"] == tokenizer(f"{one} {two}")["input_ids"]


def test_a_tokenizer_survives_saving(catalog, tmp_path):
    tokenizer = scratch.train_tokenizer(catalog.texts(), vocab_size=200)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2, 2)
    for text in catalog.texts():
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_the_same_texts_give_the_same_tokenizer(catalog):
    vocabularies = [scratch.train_tokenizer(catalog.texts(), vocab_size=150).get_vocab() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_a_catalogue_without_text_gets_three_tokens_and_no_pre_training(texts):
    tokenizer = scratch.train_tokenizer(texts, vocab_size=200)
    assert len(tokenizer) == 3
    model = scratch.build_model(tokenizer, family="llama", seed=0, **SIZES)
    before = model.get_input_embeddings().weight.clone()
    scratch.pretrain(model, tokenizer, texts, epochs=3, seed=0)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert tokenizer("anything")["input_ids"] == [0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "t5"])
def test_the_same_seed_gives_the_same_weights(family, tmp_path):
    tokenizer = scratch.train_tokenizer([], vocab_size=10)
    first, again, other = (
        scratch.build_model(tokenizer, family=family, seed=seed, **SIZES).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    model = scratch.build_model(tokenizer, family=family, seed=1, **SIZES)
    refuse_unsupported(model)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = plain_class(family).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(first[name], loaded[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_pre_training_lowers_the_loss_and_is_the_same_for_the_same_seed(catalog, family):
    tokenizer = scratch.train_tokenizer(catalog.texts(), vocab_size=200)
    runs = []
    for _ in range(2):
        model = scratch.build_model(tokenizer, family=family, seed=0, **SIZES)
        seen = []
        scratch.pretrain(
            model, tokenizer, catalog.texts(), epochs=9, seed=0, batch_size=16, learning_rate=1e-2,
            progress=lambda *at, to=seen: to.append(at),
        )  # fmt: skip
        runs.append((seen, model.state_dict()))
        assert not model.training
    seen, state = runs[0]
    assert [at[:2] for at in seen] == [(step, 36) for step in range(1, 37)]
    assert seen[-1][2] < 0.8 * seen[0][2]
    assert runs[1][0] == seen
    assert all(torch.equal(state[name], runs[1][1][name]) for name in state)


@pytest.mark.parametrize(
    ("sizes", "blocks", "body"),
    [
        ({"layers": 4, "width": 128, "heads": 6, "head_dim": 64, "inner": 1024}, (4, 4), 4_459_776),
        ({"layers": 6, "width": 128, "heads": 4, "head_dim": 64, "inner": 512}, (6, 6), 3_939_328),
        ({"layers": 2, "decoder_layers": 1, "width": 16, "heads": 2}, (2, 1), 10_512),
    ],
    ids=["TIGER", "ETEGRec", "a shorter decoder"],
)
def test_an_encoder_decoder_comes_in_the_sizes_of_papers(sizes, blocks, body):
    """ETEGRec's 3.94 million is the figure of its code; the last one is summed up by hand."""
    tokenizer = scratch.train_tokenizer([], vocab_size=10)
    model = scratch.build_model(tokenizer, family="t5", dropout=0.1, seed=0, **sizes)
    assert (len(model.encoder.block), len(model.decoder.block)) == blocks
    matrices = {name: p for name, p in model.named_parameters() if "shared" not in name}
    assert sum(p.numel() for p in matrices.values()) == pytest.approx(body, rel=0.002)
    assert model.config.decoder_start_token_id == tokenizer.bos_token_id


def test_texts_that_are_empty_are_passed_over(catalog):
    tokenizer = scratch.train_tokenizer(catalog.texts(), vocab_size=200)
    steps = []
    model = scratch.build_model(tokenizer, family="llama", seed=0, **SIZES)
    scratch.pretrain(model, tokenizer, ["", *catalog.texts()[:3], " "], epochs=1, seed=0, batch_size=1,
                     progress=lambda *at: steps.append(at))  # fmt: skip
    assert len(steps) == 3


def test_more_letters_than_pieces_are_refused():
    texts = ["".join(chr(0x4E00 + 12 * row + column) for column in range(12)) for row in range(50)]
    with pytest.raises(ItemTokError, match=r"`model.scratch.vocab_size` must have room .* was: 300; set a larger one"):
        scratch.train_tokenizer(texts, vocab_size=300)
    assert len(scratch.train_tokenizer(texts, vocab_size=700)) > 600


def test_long_texts_are_learnt_from_too():
    assert len(scratch.train_tokenizer(["abc def " * 250], vocab_size=300)) > 3
    assert len(scratch.train_tokenizer(["\u4e00\u4e01 " * 660], vocab_size=300)) > 3
