"""A bundle answers as the model that was saved, loads with plain libraries, and refuses what is mixed up."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from llm_itemtok.artifacts import FORMAT_VERSION
from llm_itemtok.bundle import Generation, items_sha256
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.decoding.dense import Rescorer
from llm_itemtok.errors import ArtifactError, DataError, ItemTokError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.recommender import Recommender
from llm_itemtok.sasrec import SASRec
from llm_itemtok.vocab import init
from tests.recursive import recursive_model
from tests.tiny import (
    FAMILIES,
    KINDS,
    hidden,
    logits,
    plain_class,
    tiny_codes,
    tiny_item_model,
    tiny_lm,
    tiny_tokenizer,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_KIND = pytest.mark.parametrize("family", KINDS)
EVERY_TIE = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
IDS = [f"item-{row}" for row in range(60)]
HISTORIES = [["item-3", "item-7", "item-3"], [], ["item-1"], [f"item-{row}" for row in range(30)]]


def made_of(model, tokenizer, peft_model=None, **changes) -> Recommender:
    generation = Generation(
        layout="merged",
        base=None,
        revision=None,
        normaliser="level",
        training_normaliser="level",
        beam=20,
        history_length=5,
        mask_seen=False,
        catalog_sha256="0" * 64,
        codes_sha256=model.vocab.codes.sha256,
    )
    size = model.vocab.codes.num_items
    titles = [f"title “{row}”" if row % 3 else "" for row in range(size)]
    generation = dataclasses.replace(generation, **changes)
    return Recommender(
        model, tokenizer, item_ids=IDS[:size], titles=titles, generation=generation, peft_model=peft_model
    )


def merged(family: str = "llama", *, tied: bool = True, codes: ItemCodes | None = None, **changes) -> Recommender:
    return made_of(*tiny_item_model(family, tied=tied, codes=codes), **changes)


def adapter(base: Path, family: str = "llama", *, tied: bool = True) -> Recommender:
    """LoRA on a base model that stands, with its tokenizer, in a folder of its own."""
    tiny_lm(family, tied=tied, padding=7).save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base)
    lm, peft_model = add_lora(tiny_lm(family, tied=tied, padding=7), rank=2, alpha=4, dropout=0.1, rslora=False, seed=0)
    model = with_item_tokens(lm, tokenizer, tiny_codes(), lambda v, table: init.normal(v, table, seed=0))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made_of(model, tokenizer, peft_model, layout="adapter", base=str(base))


def answers(recommender: Recommender) -> list:
    return [recommender.recommend_batch(HISTORIES, 12), recommender.score(HISTORIES[0], IDS)]


def of_kind(kind: str) -> Recommender:
    """The same one every time, that nobody has asked before."""
    if kind == "recursive":
        model, tokenizer = recursive_model(guidance="both")
        return made_of(model, tokenizer, reads=model.reads)
    if kind == "dense model beside":
        torch.manual_seed(0)
        return merged().with_rescorer(Rescorer(SASRec(len(IDS), width=8), items_sha256(IDS)), 0.5)
    return merged(kind)


@pytest.mark.parametrize("kind", [*FAMILIES, "recursive", "dense model beside"])
def test_threads_that_ask_at_once_get_what_each_gets_alone(kind):
    alone, shared, together = of_kind(kind), of_kind(kind), Barrier(6)
    expected = [(alone.recommend(history, 12), alone.score(history, IDS)) for history in HISTORIES]

    def ask(number: int) -> list:
        together.wait()
        asked = [HISTORIES[(number + turn) % len(HISTORIES)] for turn in range(4)]
        return [(shared.recommend(history, 12), shared.score(history, IDS)) for history in asked]

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(ask, range(6)))
    finally:
        sys.setswitchinterval(usual)
    assert found == [[expected[(number + turn) % len(HISTORIES)] for turn in range(4)] for number in range(6)]


@pytest.mark.parametrize("layout", ["merged", "adapter"])
@EVERY_TIE
@EVERY_FAMILY
def test_a_saved_and_loaded_recommender_answers_the_same(family, tied, layout, tmp_path):
    saved = adapter(tmp_path / "base", family, tied=tied) if layout == "adapter" else merged(family, tied=tied)
    saved.save_pretrained(tmp_path / "bundle")
    loaded = Recommender.from_pretrained(tmp_path / "bundle")
    assert answers(loaded) == answers(saved)
    assert (loaded.generation, loaded.item_ids, loaded.titles) == (saved.generation, saved.item_ids, saved.titles)
    loaded.save_pretrained(tmp_path / "again")
    assert answers(Recommender.from_pretrained(tmp_path / "again")) == answers(saved)


@EVERY_TIE
@EVERY_FAMILY
@torch.no_grad()
def test_plain_libraries_load_both_layouts_with_equal_logits(family, tied, tmp_path):
    ids = torch.randint(0, 36, (2, 11), generator=torch.Generator().manual_seed(0))
    kind = plain_class(family)
    for layout in ("merged", "adapter"):
        bundle = tmp_path / layout
        saved = adapter(tmp_path / "base", family, tied=tied) if layout == "adapter" else merged(family, tied=tied)
        saved.save_pretrained(bundle)
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        assert len(tokenizer) == 36
        if layout == "adapter":
            plain = kind.from_pretrained(tmp_path / "base")
            plain.config.tie_word_embeddings = tied  # the configurations of T5 say tied whatever the checkpoint holds
            plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            plain = PeftModel.from_pretrained(plain, bundle)
        else:
            plain = kind.from_pretrained(bundle)
        ours = saved.model.vocab_logits(hidden(saved.model, ids))
        tolerance = 1e-6 if layout == "adapter" else 1e-5
        assert torch.allclose(logits(plain, ids), ours, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normaliser", ["level", "items", "vocab", "children"])
@EVERY_KIND
def test_scores_are_those_of_recommendations(family, normaliser):
    recommender = merged(family, normaliser=normaliser)
    for history in HISTORIES:
        items = recommender.recommend(history, 60)
        assert sorted(item.item_id for item in items) == sorted(IDS)
        assert [item.rank for item in items] == list(range(1, 61))
        scores = recommender.score(history, [item.item_id for item in items])
        assert [item.score for item in items] == pytest.approx(scores, abs=1e-4)


def test_unknown_ids_are_skipped_and_told():
    recommender = merged()
    assert recommender.known(["x", "item-3", 5, "item-7"]) == ([3, 7], ["x", "5"])
    with pytest.warns(UserWarning, match=r"2 of 3 items of the history are not in the catalogue .* x, y"):
        assert recommender.recommend(["x", "item-3", "y"]) == recommender.recommend(["item-3"])
    assert recommender.score(["x", "item-3"], IDS[:4]) == recommender.score(["item-3"], IDS[:4])
    with pytest.warns(UserWarning, match="1 of 1"):
        assert recommender.recommend(["x"]) == recommender.recommend([])


def test_a_text_in_place_of_a_list_of_ids_is_refused():
    with pytest.raises(DataError, match="must be a list of item ids, was: the text 'item-3'"):
        merged().recommend("item-3")


def test_unknown_ids_of_all_lists_are_told_in_one_warning():
    recommender = merged()
    told = r"^1 of 1 items of the history .*: h; 2 of 3 items of `allow` .*: a, b; 1 of 2 items of `deny` .*: d$"
    with pytest.warns(UserWarning, match=told) as warned:
        found = recommender.recommend(["h"], allow=["a", "item-4", "b"], deny=["d", "item-5"])
    assert [item.item_id for item in found] == ["item-4"]
    assert len(warned) == 1


def test_where_no_allowed_item_is_known_nothing_is_recommended():
    recommender = merged()
    with pytest.warns(UserWarning, match="2 of 2 items of `allow`"):
        assert recommender.recommend(["item-3"], allow=["x", "y"]) == []
    assert recommender.recommend(["item-3"], allow=[]) == []


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("sizes", [(60,), (6, 5, 4), (2, 2, 3, 5)])
def test_lists_leave_what_the_whole_ranking_has_of_them(sizes, mask_seen):
    """For every `k`: below the beam and above it, above the number of allowed items, above that of all items."""
    recommender = merged(codes=tiny_codes(60, sizes), beam=7)
    everything = recommender.recommend(["item-3", "item-9"], 60)
    recommender = recommender.with_generation(mask_seen=mask_seen)
    rng = np.random.default_rng(5)
    for num_allowed, num_denied in [(1, 0), (5, 2), (30, 10), (60, 55), (60, 0), (3, 60)]:
        allow, deny = (rng.choice(IDS, size, replace=False).tolist() for size in (num_allowed, num_denied))
        seen = ["item-3", "item-9"] if mask_seen else []
        left = [item for item in everything if item.item_id in set(allow) - set(deny) - set(seen)]
        for k in (1, 4, 12, 60, 100):
            found = recommender.recommend(["item-3", "item-9"], k, allow=iter(allow), deny=iter(deny))
            assert [item.rank for item in found] == list(range(1, min(k, len(left)) + 1))
            assert {item.item_id for item in found} <= {item.item_id for item in left}
            if num_allowed <= 7 or k >= 60:  # no beam is lost on the way, so the search is exact
                assert [item.item_id for item in found] == [item.item_id for item in left[:k]]
                scores = [item.score for item in left[:k]]
                assert [item.score for item in found] == pytest.approx(scores, abs=1e-5)


@EVERY_KIND
def test_each_request_of_a_batch_has_its_own_lists(family):
    recommender = merged(family)
    allow = [IDS[:5], None, IDS[:5], [], IDS]
    deny = [None, IDS[10:], ["item-1"], IDS[:3], ()]
    histories = [["item-3"], [], ["item-3", "item-4"], ["item-5"], ["item-1"]]
    together = recommender.recommend_batch(histories, 8, allow=allow, deny=deny)
    for history, mine, not_mine, items in zip(histories, allow, deny, together, strict=True):
        alone = recommender.recommend(history, 8, allow=mine, deny=not_mine or ())
        assert [item.item_id for item in items] == [item.item_id for item in alone]
    assert [len(items) for items in together] == [5, 8, 4, 0, 8]


@pytest.mark.parametrize("name", ["allow", "deny"])
def test_lists_that_are_not_one_for_each_request_are_refused(name):
    with pytest.raises(DataError, match=f"`{name}` must have one list per history, 2, was: 1"):
        merged().recommend_batch([[], []], 3, **{name: [["item-1"]]})


@pytest.mark.parametrize("name", ["allow", "deny"])
def test_a_text_in_place_of_a_list_of_items_is_refused(name):
    with pytest.raises(DataError, match="must be a list of item ids, was: the text 'item-3'"):
        merged().recommend([], **{name: "item-3"})


def test_items_to_score_may_come_twice_and_keep_their_order():
    recommender = merged()
    once = dict(zip(IDS, recommender.score(["item-3"], IDS), strict=True))
    asked = ["item-9", "item-2", "item-9", "item-40"]
    assert recommender.score(["item-3"], asked) == pytest.approx([once[item_id] for item_id in asked], abs=1e-5)


@EVERY_KIND
def test_an_empty_history_is_answered(family):
    items = merged(family).recommend([], 7)
    assert len({item.item_id for item in items}) == 7
    assert all(np.isfinite(item.score) for item in items)
    assert items[0].title == ("" if int(items[0].item_id[5:]) % 3 == 0 else f"title “{items[0].item_id[5:]}”")


@EVERY_KIND
def test_only_the_most_recent_items_are_read(family):
    recommender = merged(family)
    long = [f"item-{row}" for row in range(40)]
    assert recommender.recommend(long) == recommender.recommend(long[-5:])
    assert recommender.recommend(long) != recommender.recommend(long[-4:])


def test_more_than_the_catalogue_are_all_of_it():
    recommender = merged(codes=tiny_codes(9))
    assert len(recommender.recommend(["item-3"], 100)) == 9
    assert len(recommender.recommend(["item-3"], 9)) == 9


def test_more_than_the_beam_are_given_too():
    assert len(merged(beam=3).recommend(["item-3"], 25)) == 25


@pytest.mark.parametrize("k", [0, -3, 2.5, "5", None])
def test_what_is_no_number_of_items_is_refused(k):
    with pytest.raises(DataError, match=f"must be a whole number of at least 1, was: {k!r}"):
        merged().recommend([], k)
    assert len(merged().recommend([], np.int64(2))) == 2


@pytest.mark.parametrize("history", [None, 7, "item-3"])
def test_what_is_no_list_of_ids_is_refused(history):
    with pytest.raises(DataError, match="must be a list of item ids, was: "):
        merged().recommend(history)
    with pytest.raises(DataError, match="must be a list of item ids, was: "):
        merged().score(history, ["item-3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normaliser": "foo"}, "`normaliser` must be level or .*, was: 'foo'"),
        ({"repeats": "no"}, "`repeats` must be true or false, was: 'no'"),
        ({"beam": -3}, "`beam` must be a whole number of at least 1, was: '-3'"),
        ({"beam": "x"}, "`beam` must be a whole number of at least 1, was: 'x'"),
        ({"history_length": 0}, "`history_length` must be a whole number of at least 1, was: '0'"),
    ],
)
def test_no_model_is_decoded_in_a_way_that_its_bundle_could_not_say(changes, message):
    with pytest.raises(ArtifactError, match=message):
        merged().with_generation(**changes)


def test_no_histories_give_no_answers_and_no_items_no_scores():
    recommender = merged()
    assert recommender.recommend_batch([]) == []
    assert recommender.score([], []) == []


def test_scoring_an_item_that_is_not_there_is_refused():
    with pytest.raises(DataError, match=r"items to score must be in the catalogue, 1 are not: \['nowhere'\]"):
        merged().score([], ["item-1", "nowhere"])


@pytest.mark.parametrize("sizes", [(60,), (60, 1), (6, 5, 4), (4, 60)])
def test_items_of_the_history_are_left_out_and_others_take_their_place(sizes):
    """Even where the model would rank the whole history first, in a tree whose inner nodes have one child each."""
    plain = merged(codes=tiny_codes(60, sizes), beam=10, history_length=1)
    masking = plain.with_generation(mask_seen=True)
    everything = plain.recommend(["item-0"], 60)
    history = [*(item.item_id for item in everything[:25]), everything[0].item_id, "item-0"]
    left = [item for item in everything if item.item_id not in history]
    found = masking.recommend(history, 10)
    assert len(found) == 10
    assert not {item.item_id for item in found} & set(history)
    if sizes[0] == 60:  # no beam is lost on the way, so the search is exact
        assert [item.item_id for item in found] == [item.item_id for item in left[:10]]
    whole = masking.recommend(history, 60)
    assert [item.item_id for item in whole] == [item.item_id for item in left]
    assert [item.score for item in whole] == pytest.approx([item.score for item in left], abs=1e-5)
    assert masking.recommend([*IDS[1:], IDS[0]], 10) == []


def test_the_same_model_can_be_decoded_in_another_way():
    recommender = merged()
    wide = recommender.with_generation(beam=60)
    assert wide.generation.beam == 60
    assert recommender.generation.beam == 20
    assert wide.model is recommender.model


@EVERY_KIND
def test_batches_answer_as_single_requests_do(family):
    recommender = merged(family)
    together = recommender.recommend_batch(HISTORIES, 8)
    for history, items in zip(HISTORIES, together, strict=True):
        alone = recommender.recommend(history, 8)
        assert [item.item_id for item in items] == [item.item_id for item in alone]
        assert [item.score for item in items] == pytest.approx([item.score for item in alone], abs=1e-5)


def test_a_run_folder_leads_to_its_bundle(tmp_path):
    saved = merged()
    assert saved.save_pretrained(tmp_path / "run" / "model") == tmp_path / "run" / "model"
    assert answers(Recommender.from_pretrained(str(tmp_path / "run"))) == answers(saved)


def test_saving_over_a_bundle_replaces_it_whole(tmp_path):
    merged("gpt2").save_pretrained(tmp_path / "bundle")
    saved = adapter(tmp_path / "base")
    saved.save_pretrained(tmp_path / "bundle", card="# Card\n")
    assert not (tmp_path / "bundle" / "model.safetensors").exists()
    assert (tmp_path / "bundle" / "README.md").read_text() == "# Card\n"
    assert answers(Recommender.from_pretrained(tmp_path / "bundle")) == answers(saved)


def test_a_bundle_holds_items_and_nothing_of_users(tmp_path):
    merged().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "custom_generate", "generation.json", "generation_config.json",
        "item_codes.safetensors", "items.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [set(item) for item in items] == [{"id", "title", "code"}] * 60
    settings = json.loads((tmp_path / "generation.json").read_text())
    assert set(settings) == {field.name for field in dataclasses.fields(Generation)}


@pytest.fixture
def bundle(tmp_path) -> Path:
    return merged().save_pretrained(tmp_path / "bundle")


def change(path: Path, **changes) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value != "nothing"}))


def test_codes_of_another_run_are_refused(bundle):
    tiny_codes(seed=1).save(bundle)
    with pytest.raises(ArtifactError, match=r"item codes and generation.json must belong together.*mixed from two run"):
        Recommender.from_pretrained(bundle)


@pytest.mark.parametrize("rows", [slice(0, 59), slice(None, None, -1)], ids=["one less", "another order"])
def test_items_of_another_run_are_refused(bundle, rows):
    lines = (bundle / "items.jsonl").read_text().splitlines()
    (bundle / "items.jsonl").write_text("\n".join(lines[rows]) + "\n")
    with pytest.raises(ArtifactError, match=r"codes and (catalogue|items.jsonl) must"):
        Recommender.from_pretrained(bundle)


def test_a_tokenizer_of_another_run_is_refused(bundle):
    tiny_tokenizer().save_pretrained(bundle)
    with pytest.raises(ItemTokError, match="must have all 15 item tokens, but 15 are missing, such as <a_0>"):
        Recommender.from_pretrained(bundle)


@pytest.mark.parametrize("content", ['{"id": "item-0"', '{"id": "item-0"}', "[]"])
def test_items_that_cannot_be_read_are_refused_by_line(bundle, content):
    lines = (bundle / "items.jsonl").read_text().splitlines()
    lines[4] = content
    (bundle / "items.jsonl").write_text("\n".join(lines))
    with pytest.raises(ArtifactError, match=r"items.jsonl:5: "):
        Recommender.from_pretrained(bundle)


def test_a_bundle_without_items_is_refused(bundle):
    (bundle / "items.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"items.jsonl: a bundle must hold this file, which is missing"):
        Recommender.from_pretrained(bundle)


def test_a_newer_format_is_refused(bundle):
    change(bundle / "generation.json", format_version=FORMAT_VERSION + 1)
    with pytest.raises(ArtifactError, match=rf"bundle format {FORMAT_VERSION + 1} is newer .*; update llm-itemtok"):
        Recommender.from_pretrained(bundle)


@pytest.mark.parametrize("changes", [{"beam": "nothing"}, {"bream": 3}, {"layout": "other"}])
def test_settings_that_are_not_ours_are_refused(bundle, changes):
    change(bundle / "generation.json", **changes)
    with pytest.raises(ArtifactError, match=r"generation.json: .*(beam|bream|layout)"):
        Recommender.from_pretrained(bundle)


def test_settings_that_are_no_settings_are_refused(bundle):
    (bundle / "generation.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"generation.json: "):
        Recommender.from_pretrained(bundle)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder_that_is_no_bundle_is_refused(tmp_path, as_text):
    with pytest.raises(
        ArtifactError, match=r"a bundle must be a folder with generation.json, which is missing; name one"
    ):
        Recommender.from_pretrained(str(tmp_path) if as_text else tmp_path)


def test_a_name_that_is_neither_folder_nor_repository_is_refused():
    with pytest.raises(ArtifactError, match=r"runs/no/such/thing: neither a folder here nor a Hub repository"):
        Recommender.from_pretrained("runs/no/such/thing")


def test_an_adapter_whose_base_is_gone_is_refused(tmp_path):
    adapter(tmp_path / "base").save_pretrained(tmp_path / "bundle")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ItemTokError, match=r"must be a folder with a safetensors model or a Hub id"):
        Recommender.from_pretrained(tmp_path / "bundle")


def test_codes_and_items_of_different_number_are_refused():
    model, tokenizer = tiny_item_model()
    generation = merged().generation
    with pytest.raises(ArtifactError, match="must have the same items, found: 60 codes and 2 items"):
        Recommender(model, tokenizer, item_ids=["a", "b"], titles=["", ""], generation=generation)


def test_another_catalogue_is_refused():
    def catalog(ids):
        empty = ("",) * len(ids)
        return Catalog(tuple(ids), empty, ((),) * len(ids), empty, empty)

    recommender = merged()
    recommender.check_catalog(catalog(IDS))
    with pytest.raises(ArtifactError, match="their items differ: 60 in the model, 59 in the data, 59 in both"):
        recommender.check_catalog(catalog(IDS[1:]))
    with pytest.raises(ArtifactError, match="the model's 60 items, but they lack the last 1; where `itemtok extend`"):
        recommender.check_catalog(catalog(IDS[:-1]))
    with pytest.raises(ArtifactError, match=rf"from item 59 on, {IDS[-1]} stands where {IDS[-2]} was"):
        recommender.check_catalog(catalog([*IDS[:-2], IDS[-1], IDS[-2]]))
