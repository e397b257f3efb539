"""A model that knows items beyond their tokens is saved and loaded whole, or refused in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_itemtok import bundle
from llm_itemtok.errors import ArtifactError, UnsupportedModelError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_network import FILE_NAME
from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.model.recursive import Recursion
from llm_itemtok.pipeline.export import export
from llm_itemtok.pipeline.merge import merge
from llm_itemtok.recommender import Recommender
from llm_itemtok.vocab import init
from tests.recursive import embeddings, named_model, recursive_model
from tests.test_bundle import change
from tests.test_recommender import answers, made_of, merged
from tests.tiny import KINDS, tiny_codes, tiny_lm, tiny_tokenizer

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
EVERY_TIE = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def whole(kind: str = "uid", family: str = "llama", **changes) -> Recommender:
    """A whole model: `named`, or recursive with a kind of guidance."""
    made = named_model(family, **changes) if kind == "named" else recursive_model(family, guidance=kind, **changes)
    return made_of(*made, reads=made[0].reads)


def adapter(base: Path, family: str, *, tied: bool, kind: str = "uid") -> Recommender:
    """The same beside a base model with LoRA, whose weights are not where they began."""
    tiny_lm(family, tied=tied, padding=7).save_pretrained(base)
    tokenizer, codes = tiny_tokenizer(), tiny_codes()
    tokenizer.save_pretrained(base)
    lm, peft_model = add_lora(tiny_lm(family, tied=tied, padding=7), rank=2, alpha=4, dropout=0.1, rslora=False, seed=0)
    rows = lambda vocab, table: init.normal(vocab, table, seed=0)  # noqa: E731
    model = with_item_tokens(lm, tokenizer, codes, rows, one_table=kind != "named")
    if kind == "named":
        model.own = embeddings(16, codes)
    else:
        items = embeddings(16, codes, guidance=kind)
        model.recursion = Recursion(items, levels=3, width=16, hidden=12, mixing="soft")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made_of(model, tokenizer, peft_model, layout="adapter", base=str(base), reads=model.reads)


@pytest.mark.parametrize("kind", ["uid", "vectors", "both", "named"])
@EVERY_TIE
@EVERY_KIND
def test_a_saved_and_loaded_model_answers_the_same(family, tied, kind, tmp_path):
    saved = whole(kind, family, tied=tied)
    folder = saved.save_pretrained(tmp_path / "bundle")
    loaded = Recommender.from_pretrained(folder)
    assert answers(loaded) == answers(saved)
    again = loaded.save_pretrained(tmp_path / "again")
    for file in folder.rglob("*"):
        if file.is_file():
            assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name
    assert FILE_NAME in bundle.files(folder)
    assert not (folder / "custom_generate").exists()


@pytest.mark.parametrize("kind", ["both", "named"])
@EVERY_TIE
@EVERY_KIND
def test_an_adapter_answers_the_same_and_so_does_what_it_is_merged_into(family, tied, kind, tmp_path):
    """On an untied base the network has one table all the same, of which both forms keep one."""
    saved = adapter(tmp_path / "base", family, tied=tied, kind=kind)
    folder = saved.save_pretrained(tmp_path / "bundle")
    assert answers(Recommender.from_pretrained(folder)) == answers(saved)
    as_one = Recommender.from_pretrained(merge(folder, tmp_path / "merged"))
    for ours, theirs in zip(answers(as_one)[0], answers(saved)[0], strict=True):
        assert [item.item_id for item in ours] == [item.item_id for item in theirs]
        assert [item.score for item in ours] == pytest.approx([item.score for item in theirs], abs=1e-4)


def test_a_whole_model_in_bfloat16_keeps_its_network_in_float32(tmp_path):
    saved = whole("both")
    for parameter in saved.model.lm.parameters():
        parameter.data = parameter.data.bfloat16()
    loaded = Recommender.from_pretrained(saved.save_pretrained(tmp_path / "bundle"))
    assert next(loaded.model.lm.parameters()).dtype == torch.bfloat16
    assert loaded.model.rows.input_rows.dtype == torch.float32
    assert answers(loaded) == answers(saved)


def test_the_card_says_that_it_loads_through_this_package_only():
    for kind in ("uid", "named"):
        card = whole(kind).card()
        assert "It loads through this package only" in card
        assert "item_network.safetensors" in card
        assert "library_name: llm-itemtok" in card
        assert "custom_generate" not in card
        assert "Recommender.from_pretrained(HERE)" in card
    assert "reads each item as one vector" in whole("uid").card()


def test_what_does_not_belong_together_is_refused(tmp_path):
    folder = whole().save_pretrained(tmp_path / "bundle")
    content = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).unlink()
    with pytest.raises(ArtifactError, match=f"`items` must hold {FILE_NAME}, which is missing"):
        Recommender.from_pretrained(folder)
    with pytest.raises(ArtifactError, match=f"must hold {FILE_NAME}, which is missing"):
        bundle.files(folder)
    others = {
        "of another kind": (whole("named"), "one that reads `named`"),
        "of other codes": (whole(codes=tiny_codes(seed=3)), "were files mixed from two runs"),
        "of another width": (whole(hidden_size=24), r"item rows are \(15, 24\) and those of the model \(15, 16\)"),
    }
    for name, (other, message) in others.items():
        source = other.save_pretrained(tmp_path / name)
        (folder / FILE_NAME).write_bytes((source / FILE_NAME).read_bytes())
        with pytest.raises(ArtifactError, match=message):
            Recommender.from_pretrained(folder)
    (folder / FILE_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="cut short"):
        Recommender.from_pretrained(folder)
    (folder / FILE_NAME).write_bytes(content)
    change(folder / "generation.json", reads="pictures")
    with pytest.raises(ArtifactError, match="`reads` must be tokens or named or items, was: 'pictures'"):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize("settings", ["", "{}", "[]", '{"reads": "items", "items": {"dimensions": 7}}'])
def test_a_file_that_does_not_say_what_it_holds_is_refused(settings, tmp_path):
    folder = whole().save_pretrained(tmp_path / "bundle")
    tensors = load_file(folder / FILE_NAME)
    save_file(tensors, folder / FILE_NAME, {"format": "pt", "settings": settings})
    with pytest.raises(ArtifactError, match="must say what network it holds"):
        Recommender.from_pretrained(folder)


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    folder = whole().save_pretrained(tmp_path / "bundle")
    codes, tensors = ItemCodes.load(folder).sha256, load_file(folder / FILE_NAME)
    settings = {"reads": "items", "items": {"dimensions": 7, "vector_dimensions": 0}, "hidden": 12, "mixing": "hard"}
    metadata = {"format": "pt", "item_codes_sha256": codes, "settings": json.dumps(settings)}
    del tensors["items.table"]
    save_file(tensors, folder / FILE_NAME, metadata)
    with pytest.raises(ArtifactError, match=r"(?s)weights must be those of the network .*items\.table"):
        Recommender.from_pretrained(folder)


def test_bundles_of_earlier_versions_read_tokens(tmp_path):
    saved = merged()
    folder = saved.save_pretrained(tmp_path / "bundle")
    settings = json.loads((folder / "generation.json").read_text())
    assert settings.pop("reads") == "tokens"
    (folder / "generation.json").write_text(json.dumps(settings))
    assert answers(Recommender.from_pretrained(folder)) == answers(saved)
    whole().save_pretrained(tmp_path / "other")
    (folder / FILE_NAME).write_bytes((tmp_path / "other" / FILE_NAME).read_bytes())
    assert FILE_NAME not in bundle.files(folder)  # left there from another time


@pytest.mark.parametrize("kind", ["uid", "vectors", "both", "named"])
def test_new_items_have_their_vectors_or_no_embedding(kind, tmp_path):
    old = whole(kind)
    before = old.score(["item-3", "item-7"], [f"item-{row}" for row in range(60)])
    table = old.model.vocab.codes.table
    free = np.argwhere(~np.isin(np.arange(120), np.ravel_multi_index(table.T, (6, 5, 4)))).ravel()[:2]
    codes = ItemCodes(np.vstack([table, np.stack(np.unravel_index(free, (6, 5, 4)), axis=1)]), (6, 5, 4))
    vectors = np.ones((2, 5), dtype=np.float32)
    new = old.extended(codes, ["new-1", "new-2"], ["", ""], vectors)
    items = new.model.own if kind == "named" else new.model.recursion.items
    assert items.has(torch.tensor([60, 61])).tolist() == [kind in ("vectors", "both")] * 2
    assert new.score(["item-3", "item-7"], [f"item-{row}" for row in range(60)]) == before
    assert new.recommend(["new-1", "item-3"], 5)
    loaded = Recommender.from_pretrained(new.save_pretrained(tmp_path / "bundle"))
    assert loaded.recommend(["new-1", "item-3"], 62) == new.recommend(["new-1", "item-3"], 62)


def test_vectors_of_new_items_have_the_width_of_the_old_ones():
    old = whole("both")
    table = old.model.vocab.codes.table
    free = np.flatnonzero(~np.isin(np.arange(120), np.ravel_multi_index(table.T, (6, 5, 4))))[:1]
    codes = ItemCodes(np.vstack([table, np.stack(np.unravel_index(free, (6, 5, 4)), axis=1)]), (6, 5, 4))
    with pytest.raises(ArtifactError, match="must have 5 dimensions, as those that the model reads, was: 4"):
        old.extended(codes, ["new-1"], [""], np.ones((1, 4), dtype=np.float32))


@pytest.mark.parametrize("kind", ["uid", "named"])
def test_servers_are_not_given_what_they_cannot_serve(kind, tmp_path):
    folder = whole(kind).save_pretrained(tmp_path / "bundle")
    with pytest.raises(UnsupportedModelError, match=r"knows items beyond them .* a network that no server has"):
        export(folder, tmp_path / "out", "paths")
    assert not (tmp_path / "out").exists()


def test_the_language_model_of_an_untied_bundle_has_the_rows_in_both_tables(tmp_path):
    """Of the head's, the library would make random ones, others at every saving."""
    saved = whole(tied=False)
    lm = AutoModelForCausalLM.from_pretrained(saved.save_pretrained(tmp_path / "bundle"))
    span = slice(saved.model.vocab.first_id, None)
    torch.testing.assert_close(lm.get_output_embeddings().weight[span], saved.model.rows.input_rows.detach())
