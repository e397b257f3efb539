import dataclasses
import re

import pytest
import yaml
from transformers import TrainingArguments

from llm_itemtok import settings, strict
from llm_itemtok.config import RunConfig, _contradictions
from llm_itemtok.errors import RecipeError
from llm_itemtok.experiments.pool import recipe_hash
from llm_itemtok.explain import _field_docs, explain
from llm_itemtok.training.arguments import OWNED
from llm_itemtok.update_settings import SelfImproveUpdate

SYNTHETIC = "data: {source: synthetic}\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="x.yaml"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_defaults_fill_what_a_recipe_does_not_say(recipe):
    config = RunConfig.load(recipe(SYNTHETIC))
    assert config.tokenizer == settings.ResidualKMeansTokenizer(levels=3, codebook_size=256)
    assert config.vectors == settings.TfidfSvdVectors(dimensions=128)
    assert config.model.name == "scratch"
    assert config.examples.tasks == {"next-item": 1.0, "title-to-item": 0.0, "item-to-title": 0.0}
    assert config.evaluation.baselines == ("popularity", "markov", "item-knn")


def test_settings_never_change(recipe):
    config = RunConfig.load(recipe(SYNTHETIC))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.k_core = 5


@pytest.mark.parametrize(
    "text",
    [
        SYNTHETIC,
        "data: {path: somewhere, split: temporal, test_share: 0.2, filter: {column: rating, min: 4}}",
        "data: {path: x, columns: {user_id: 'no'}}\nmodel: {name: org/model, adapter: lora, lora: {rank: 4}}",
        "data: {path: x}\ntokenizer: {kind: rqvae, hidden: [8, 4], learning_rate: 1.0e-4}\ntrainer: {max_steps: 3}",
        "data: {path: x, filter: {column: event, keep: [buy, 5, 2.5]}}\nvectors: {kind: file, path: v.npy}",
        SYNTHETIC + "evaluation: {segments: {b 1: {kind: item-order, column: title}}}",
        "data: {path: x}\nevaluation: {segments: {country: {kind: user-column, column: land}}}",
    ],
)
def test_the_resolved_recipe_loads_to_the_same_config(recipe, text):
    config = RunConfig.load(recipe(text))
    again = RunConfig.load(recipe(config.to_yaml(), "resolved.yaml"))
    assert again == config
    assert recipe_hash(again.portable({})) == recipe_hash(config.portable({}))
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


def test_sizes_of_an_encoder_decoder_are_no_settings_of_the_others_and_change_no_recipe_of_theirs(recipe):
    """Runs are known by the hash of their resolved recipe."""
    tiger = {"family": "t5", "layers": 4, "width": 128, "heads": 6, "head_dim": 64, "inner": 1024}
    text = SYNTHETIC + f"examples: {{kind: windows}}\nmodel: {{scratch: {tiger}}}"
    assert RunConfig.load(recipe(text)).to_dict()["model"]["scratch"].items() >= tiger.items()
    plain = RunConfig.load(recipe(SYNTHETIC)).to_dict()["model"]["scratch"]
    assert not {"decoder_layers", "head_dim", "inner"} & set(plain)


def test_settings_that_do_not_apply_are_not_in_the_resolved_recipe(recipe):
    plain = RunConfig.load(recipe("data: {path: x}\nmodel: {name: org/model}")).to_dict()
    assert {"items", "users", "test_share"}.isdisjoint(plain["data"])
    assert {"lora", "scratch"}.isdisjoint(plain["model"])


def test_whole_numbers_serve_where_numbers_are_asked_for(recipe):
    config = RunConfig.load(recipe(SYNTHETIC), ["evaluation.every=2", "examples.tasks.next-item=3"])
    assert config.evaluation.every == 2.0
    assert isinstance(config.evaluation.every, float)
    assert config.examples.tasks["next-item"] == 3.0


def test_hash_depends_on_seed_but_not_on_the_order_of_keys_or_on_spelling_out_defaults(recipe):
    one = RunConfig.load(recipe("seed: 0\ndata: {source: synthetic, items: 50}"))
    other = RunConfig.load(recipe("data: {items: 50, source: synthetic}\ntokenizer: {levels: 3}", "y.yaml"))
    assert recipe_hash(one.portable({})) == recipe_hash(other.portable({}))
    assert RunConfig.load(recipe(SYNTHETIC), ["seed=1"]) != RunConfig.load(recipe(SYNTHETIC))


def test_recipe_hash_with_content_hashes_does_not_depend_on_where_the_data_lies(recipe):
    here = RunConfig.load(recipe("data: {path: /here/beauty}"))
    there = RunConfig.load(recipe("data: {path: /there/b}"))
    assert recipe_hash(here.portable({})) != recipe_hash(there.portable({}))
    assert recipe_hash(here.portable({"data.path": "ab12"})) == recipe_hash(there.portable({"data.path": "ab12"}))
    assert recipe_hash(here.portable({"data.path": "ab12"})) != recipe_hash(here.portable({"data.path": "cd34"}))


CONCAT = "vectors.parts=[{kind: tfidf-svd, dimensions: 8}, {kind: file, path: /here/x.npy}]"


def test_parts_of_concatenated_vectors_are_sections_of_their_own(recipe):
    config = RunConfig.load(recipe(SYNTHETIC), ["vectors.kind=concat", CONCAT, "vectors.weights=[1, 0.5]"])
    assert config.vectors.parts == (
        settings.TfidfSvdVectors(dimensions=8), settings.FileVectors(path="/here/x.npy")
    )  # fmt: skip
    assert list(config.vector_sources) == ["vectors.parts.0", "vectors.parts.1"]
    assert RunConfig.load(recipe(config.to_yaml(), "again.yaml")) == config
    assert config.portable({"vectors.parts.1.path": "ab"})["vectors"]["parts"][1]["path"] == "sha256:ab"
    assert "vectors.parts.0.dimensions: Length of a vector" in explain("vectors.parts.0.dimensions")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("[{kind: tfidf-svd}]", "at least two sources to put side by side, was: 1"),
        ("[{dimensions: 3}, {kind: tfidf-svd}]", r"`vectors.parts\[0\].kind` must be given"),
        ("[{kind: tfidf-svd, dimensoins: 3}, {kind: llm}]", r"did you mean `vectors.parts\[0\].dimensions`"),
        ("[{kind: tfidf-svd, window: 3}, {kind: llm}]", r"parts\[0\].window` does not apply to `kind: tfidf-svd`"),
        ("[{kind: concat, parts: []}, {kind: llm}]", "must be one of tfidf-svd"),
        ("[{kind: tfidf-svd}, {kind: file, path: x.csv}]", r"`vectors.parts.1.path` must end in .npy"),
        ("[{kind: collaborative, window: 3}, {kind: tfidf-svd}]", "applies only with source: co-occurrence"),
        ("{kind: tfidf-svd}", "must be a list"),
    ],
)  # fmt: skip
def test_parts_that_are_not_as_the_schema_says_are_refused(recipe, parts, message):
    with pytest.raises(RecipeError, match=message):
        RunConfig.load(recipe(SYNTHETIC), ["vectors.kind=concat", f"vectors.parts={parts}"])


def test_weights_of_concatenated_vectors_are_one_a_part(recipe):
    with pytest.raises(RecipeError, match=r"one a source of `vectors\.parts`, 2 of them, was: 1"):
        RunConfig.load(recipe(SYNTHETIC), ["vectors.kind=concat", CONCAT, "vectors.weights=[1]"])


# Layers


def test_an_empty_mapping_takes_away_what_the_parent_has(recipe):
    """Such as rules about columns that one's own data do not have."""
    parent = recipe(SYNTHETIC + "evaluation: {k: 7, segments: {x: {kind: item-order, column: brand}}}", "parent.yaml")
    child = recipe("extends: parent.yaml\nevaluation: {segments: {}}", "child.yaml")
    assert list(RunConfig.load(parent).evaluation.segments) == ["x"]
    assert (RunConfig.load(child).evaluation.segments, RunConfig.load(child).evaluation.k) == ({}, 7)
    assert RunConfig.load(parent, ["evaluation.segments={}"]).evaluation.segments == {}


def test_mappings_merge_with_the_parent_and_everything_else_replaces(recipe):
    recipe(
        "data: {source: synthetic, items: 100, users: 90}\nevaluation: {baselines: [popularity, markov]}", "base.yaml"
    )
    child = recipe("extends: base.yaml\ndata: {items: 50}\nevaluation: {baselines: [markov]}")
    config = RunConfig.load(child)
    assert (config.data.items, config.data.users) == (50, 90)
    assert config.evaluation.baselines == ("markov",)


def test_a_parent_is_found_beside_its_child_and_may_have_one_itself(recipe, tmp_path):
    (tmp_path / "deep").mkdir()
    recipe(SYNTHETIC + "seed: 1\n", "grand.yaml")
    recipe("extends: ../grand.yaml\ntokenizer: {levels: 2}", "deep/base.yaml")
    config = RunConfig.load(recipe("extends: deep/base.yaml"))
    assert (config.seed, config.tokenizer.levels) == (1, 2)


def test_overrides_win_and_are_read_as_yaml(recipe):
    config = RunConfig.load(
        recipe(SYNTHETIC + "seed: 1\n"),
        ["seed=2", "seed=3", "tokenizer.kind=rqvae", "tokenizer.hidden=[8, 4]", "trainer.report_to=none"],
    )
    assert config.seed == 3
    assert config.tokenizer.hidden == (8, 4)
    assert config.trainer == {"report_to": "none"}


def test_changing_the_kind_leaves_the_parents_options_of_the_old_kind_behind(recipe):
    path = recipe(SYNTHETIC + "tokenizer: {kind: residual-kmeans, levels: 2, iterations: 5}")
    tokenizer = RunConfig.load(path, ["tokenizer.kind=random"]).tokenizer
    assert tokenizer == settings.RandomTokenizer(levels=2)


def test_changing_the_source_leaves_the_parents_options_of_the_old_source_behind(recipe):
    path = recipe("data: {source: synthetic, items: 50, k_core: 2}\nmodel: {scratch: {layers: 1}}")
    config = RunConfig.load(path, ["data.source=folder", "data.path=x", "model.name=org/model"])
    assert config.data == settings.Data(source="folder", path="x", k_core=2)


def test_one_layer_may_not_both_choose_a_kind_and_give_options_of_another(recipe):
    path = recipe(SYNTHETIC + "tokenizer: {kind: residual-kmeans, iterations: 5}")
    with pytest.raises(
        RecipeError, match=r"`tokenizer\.iterations` does not apply to `kind: random`, which takes: codebook"
    ):
        RunConfig.load(path, ["tokenizer.kind=random", "tokenizer.iterations=7"])


def test_variables_expand_in_path_settings_only(recipe, monkeypatch):
    monkeypatch.setenv("SHOP", "/data/shop")
    text = "data: {path: '${SHOP}/logs', columns: {user_id: '${SHOP}'}}\nvectors: {kind: file, path: '${SHOP}/v.npy'}"
    config = RunConfig.load(recipe(text))
    assert config.data.path == "/data/shop/logs"
    assert config.vectors.path == "/data/shop/v.npy"
    assert config.data.columns == {"user_id": "${SHOP}"}


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_bad_input(recipe, monkeypatch, value):
    monkeypatch.delenv("SHOP", raising=False)
    if value is not None:
        monkeypatch.setenv("SHOP", value)
    with pytest.raises(RecipeError, match=r"`data\.path` uses \$\{SHOP\}, but that environment variable is not set"):
        RunConfig.load(recipe("data: {path: '${SHOP}/logs'}"))


# Files that are no recipes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "must be a mapping `setting: value`, was: list"),
        ("just text", "must be a mapping `setting: value`, was: str"),
        ("data: {path: x\nseed: 1\n", r"x\.yaml:2: broken YAML"),
        ("data:\n\tpath: x\n", r"x\.yaml:2: broken YAML"),
        ("seed: 1\ndata: {path: x}\nseed: 2\n", r"x\.yaml:3: broken YAML: `seed` is given twice"),
        ("data: {path: x, path: y}\n", r"x\.yaml:1: broken YAML: `path` is given twice"),
        ("data: {no: x}\n", r"x\.yaml:1: broken YAML: a key must be text, was: False \(YAML reads it as bool\)"),
        ("data: &a {path: x}\nvocab: *a\n", r"x\.yaml:1: broken YAML: anchors \(&name\) and aliases"),
        ("data: !!python/object:os.system x\n", r"x\.yaml:1: broken YAML: could not determine a constructor"),
        ("seed: 1\n---\nseed: 2\n", "broken YAML: but found another document"),
        ("seed: 2024-13-45\n", "broken YAML: month must be in 1..12"),
        (b"seed: \xff\xfe\n", "broken YAML: .*byte"),
        (b"seed: \x00\n", "broken YAML: unacceptable character"),
        ("seed: " + "[" * 3000, "broken YAML: maximum recursion depth"),
        ("seed: " + "1" * 5000, "broken YAML: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_the_line(recipe, content, message):
    path = recipe(content)
    with pytest.raises(RecipeError, match=message) as raised:
        RunConfig.load(path)
    assert str(raised.value).startswith(str(path))


def test_a_missing_recipe_and_a_folder_in_its_place(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: there is no such recipe$"):
        RunConfig.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="a recipe is a YAML file, was: a folder"):
        RunConfig.load(tmp_path)


def test_a_missing_parent_names_the_child(recipe):
    with pytest.raises(RecipeError, match=r"none\.yaml: there is no such recipe; .*x\.yaml extends it"):
        RunConfig.load(recipe("extends: none.yaml"))


def test_a_circle_of_parents_ends(recipe):
    recipe("extends: x.yaml", "y.yaml")
    with pytest.raises(RecipeError, match=r"y\.yaml: `extends: x\.yaml` makes a circle"):
        RunConfig.load(recipe("extends: y.yaml"))


def test_only_one_parent(recipe):
    with pytest.raises(RecipeError, match=r"`extends` must be the path of one recipe, was: \['a', 'b'\]"):
        RunConfig.load(recipe("extends: [a, b]"))


@pytest.mark.parametrize("override", ["seed", "=3", "data..path=x", "", ".=1"])
def test_an_override_that_is_not_key_value_is_refused(recipe, override):
    with pytest.raises(RecipeError, match=f"--set takes KEY=VALUE.*was: {re.escape(override)}$"):
        RunConfig.load(recipe(SYNTHETIC), [override])


def test_an_override_cannot_change_the_parent_or_be_broken_yaml(recipe):
    with pytest.raises(RecipeError, match="--set cannot change `extends`"):
        RunConfig.load(recipe(SYNTHETIC), ["extends=y.yaml"])
    with pytest.raises(RecipeError, match=r"--set seed:1: broken YAML"):
        RunConfig.load(recipe(SYNTHETIC), ["seed=["])


# Settings: names, types, ranges


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.codebok_size=3", r"`tokenizer\.codebok_size` is not a setting; did you mean `tokenizer\.codebook_si"
            r"ze`\?\n  `tokenizer` takes: balance, codebook_size, collisions, components, iterations, kind, levels"),
        ("tokenizr.kind=random", r"`tokenizr` is not a setting; did you mean `tokenizer`\?\n  a recipe takes: data, e"),
        ("extend=y.yaml", "`extend` is not a setting; did you mean `extends`"),
        ("examples.tasks.nextitem=1", "did you mean `examples.tasks.next-item`"),
        ("zzz=1", r"`zzz` is not a setting\n"),
        ("seed=-1", "`seed` must be at least 0 and at most 4294967295, was: -1"),
        ("seed=1.0", "`seed` must be a whole number .*, was: 1.0; write 1"),
        ("seed=1e3", "was: the text '1e3'; write 1000"),
        ("seed=true", r"was: true \(YAML reads yes, no, on and off as true and false\)"),
        ("seed=", r"was: nothing \(null\)"),
        ("seed.x=1", "`seed` must be a whole number .* was: a mapping"),
        ("tokenizer=3", "`tokenizer` must be a mapping of settings, was: 3"),
        ("vectors=", r"`vectors` must be a mapping of settings, was: nothing \(null\)"),
        ("tokenizer.levels=0", "must be at least 1 and at most 16, was: 0"),
        ("tokenizer.codebook_size=1", "must be at least 2"),
        ("model.adapter=no", r"`model\.adapter` must be one of lora, none, was: false \(YAML reads"),
        ("model.adapter=loar", "was: the text 'loar'; did you mean lora"),
        ("model.input_dropout=1", "must be at least 0 and below 1, was: 1"),
        ("evaluation.mask_seen='yes'", "must be true or false, was: the text 'yes'; write true or false"),
        ("evaluation.every=2e-5", "above 0, was: the text '2e-5'; YAML reads 2e-5 as text; write 2.0e-5"),
        ("evaluation.every=1.0e5", r"YAML reads 1.0e5 as text; write 1.0e\+5"),
        ("evaluation.every='0.5'", "was: the text '0.5'; write 0.5, without quotes"),
        ("evaluation.every=.inf", "must be a finite number, was: inf"),
        ("evaluation.every=.nan", "must be a finite number, was: nan"),
        ("evaluation.every=0", "must be above 0, was: 0"),
        ("evaluation.beam=10", r"`evaluation\.beam` must be at least 20, was: 10"),
        ("evaluation.baselines=popularity", r"must be a list, .*; write it in \[brackets\]"),
        ("evaluation.baselines=[popular]", r"`evaluation\.baselines\[0\]` must be one of .* did you mean popularity"),
        ("examples.tasks.next-item=-1", r"`examples\.tasks\.next-item` must be at least 0, was: -1"),
        ("examples.tasks=[next-item]", "must be a mapping, was: a list of 1"),
        ("model.name=7", "must be text, was: 7; put it in quotes"),
        ("evaluation.segments.x={column: a}", r"`evaluation\.segments\.x\.kind` must be given: one of item-order, us"),
        ("evaluation.segments.x.kind=itemorder", r"`evaluation\.segments\.x\.kind` must be one of .*did you mean item"),
        ("evaluation.segments.x={kind: item-order}", r"`evaluation\.segments\.x\.column` must be given: text"),
        ("evaluation.segments.x={kind: item-order, kolumn: a}", r"did you mean `evaluation\.segments\.x\.column`\?"),
        ("evaluation.segments.x=asin", r"`evaluation\.segments\.x` must be a mapping of settings, was: the text"),
        ("evaluation.segments=asin", r"`evaluation\.segments` must be a mapping, was: the text 'asin'"),
    ],
)  # fmt: skip
def test_what_is_not_as_the_schema_says_is_named_and_answered(recipe, override, message):
    with pytest.raises(RecipeError, match=message) as raised:
        RunConfig.load(recipe(SYNTHETIC), [override])
    assert "x.yaml with --set: `" in str(raised.value)


def test_what_a_kind_cannot_do_without_must_be_given(recipe):
    with pytest.raises(RecipeError, match=r"`vectors\.model` must be given: text"):
        RunConfig.load(recipe(SYNTHETIC), ["vectors.kind=sentence-transformers"])


# Contradictions


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=folder"], r"`data\.path` must be given"),
        (["data.path=x"], r"`data\.path` applies only with another source than synthetic; `data\.source` was: synth"),
        (["data.test_share=0.2"], r"applies only with split: temporal; `data\.split` was: leave-last-out"),
        (["data.split=temporal", "data.test_share=0.95"], r"must leave something to train on, was: 0\.1 \+ 0\.95"),
        (["data.source=folder", "data.path=x", "data.items=50"], r"`data\.items` applies only with source: synthetic"),
        (["data.source=folder", "data.path=x", "data.filter={min: 3}"], r"`data\.filter\.column` must be given"),
        (["data.source=folder", "data.path=x", "data.filter={column: r}"], "must say which rows to keep"),
        (["data.source=folder", "data.path=x", "data.filter={column: r, min: 3, keep: [a]}"], "not both"),
        (["data.source=folder", "data.path=x", "data.filter={column: r, min: 3, max: 1}"], r"was: 3\.0 > 1\.0"),
        (["update.kind=bilevel", "update.look_ahead=-1"], r"`update\.look_ahead` must be at least 0, was: -1"),
        (["update.kind=alternate", "update.every={steps: 0}"], r"`update\.every\.steps` must be at least 1, was: 0"),
        (["model.lora.rank=4"], r"`model\.lora` applies only with adapter: lora; `model\.adapter` was: none"),
        (["model.name=org/m", "model.scratch.layers=2"], r"`model\.scratch` applies only with name: scratch"),
        (["model.revision=main"], r"`model\.revision` applies only with another name than scratch"),
        (["model.trust_remote_code=true"], r"`model\.trust_remote_code` applies only with another name than scratch"),
        (["model.name=''"], r"`model\.name` must be a Hub id, a folder or `scratch`"),
        (["model.scratch.heads=3"], r"`model\.scratch\.heads` must divide `width`, was: 128 / 3"),
        (["model.scratch.family=t5"], r"all-positions` needs a decoder-only model: .*use `examples.kind: windows`"),
        (["model.scratch.inner=64"], r"`model\.scratch\.inner` .*family: t5"),
        (["model.scratch.width=12"], "must have an even width / heads for llama"),
        (["model.dtype=auto"], "`scratch` is not saved yet"),
        (["model.adapter=lora", "model.scratch.pretrain_epochs=0"], "freezes the base model"),
        (["vectors.kind=llm", "model.scratch.pretrain_epochs=0"], "takes the base model's states"),
        (["model.dtype=bfloat16", "trainer.fp16=true"], r"`trainer\.fp16` needs `model\.dtype: float32`"),
        (["evaluation.k=21"], r"`evaluation\.k` must be at most `evaluation\.beam`, was: 21 > 20"),
        (["evaluation.baselines=[markov, markov]"], "must name each baseline once"),
        (["examples.tasks.next-item=0"], "at least one task a weight above 0"),
        (["tokenizer.kind=rqvae", "tokenizer.hidden=[]"], "at least one width"),
        (["evaluation.segments={'a: b': {kind: item-order, column: title}}"], r"names of letters, .*, was: 'a: b'"),
        (["evaluation.segments={a: {kind: item-order, column: asin}}"], r"`evaluation\.segments\.a\.column` must be "),
        (["evaluation.segments={a: {kind: user-column, column: land}}"], "have none beside user, item and time"),
        (["vectors.kind=file", "vectors.path=v.csv"], r"must end in \.npy, \.safetensors or \.parquet, was: 'v\.csv'"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_with_the_reason(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        RunConfig.load(recipe(SYNTHETIC), overrides)


# Help


def _sections():
    return [value for value in vars(settings).values() if isinstance(value, type) and dataclasses.is_dataclass(value)
            and value.__module__ == settings.__name__]  # fmt: skip


@pytest.mark.parametrize("section", [*_sections(), RunConfig])
def test_every_setting_has_a_text_and_a_default_that_it_would_accept(section):
    """A default of another type, such as 32 for a number, would resolve to another recipe than itself written out."""
    docs = _field_docs(section)
    for part in dataclasses.fields(section):
        assert docs[part.name].endswith("."), part.name
        annotation, default = strict.annotations_of(section)[part.name], strict.default_of(part)
        if default is not dataclasses.MISSING and not strict.sections_in(annotation):
            checked = strict.Checker("default").value(annotation, default, (part.name,))
            assert (checked, type(checked)) == (default, type(default))


def test_explain_prints_the_text_under_the_field_once():
    assert explain("tokenizer.levels") == (
        "  tokenizer.levels: Codewords an item's code has, before an extra level.\n"
        "      (a whole number at least 1 and at most 16; default 3)"
    )
    assert "Attention heads a block." in explain("model.scratch.heads")
    assert "only with source: synthetic" in explain("data.items")


def test_explain_gives_kinds_as_one_list_with_the_default_of_their_section():
    """Each kind's class has its own name as default, which is the default of no recipe."""
    for name in ("update", "tokenizer", "rescoring", "scoring", "objective", "vectors"):
        text, default = explain(f"{name}.kind"), getattr(RunConfig(), name).kind
        sections = strict.sections_in(strict.annotations_of(RunConfig)[name])
        kinds = [strict.choices_of(strict.annotations_of(section)["kind"])[0] for section in sections]
        assert len(kinds) > 1
        assert text.count("default") == 1
        assert text.endswith(f'(one of {", ".join(kinds)}; default "{default}")')
        assert re.findall(r"^      ([\w-]+): \w", text, re.M) == kinds


def test_explain_says_what_kinds_share_once():
    assert explain("update.every").count("update.every.steps: ") == 1


def test_below_a_kind_there_is_nothing_and_entries_may_have_any_name():
    for name in ("update.kind.x", "tokenizer.kind.levels", "seed.x"):
        with pytest.raises(RecipeError, match="has none below it"):
            explain(name)
    for name in ("k", "repeats", "segments", "asin"):  # settings of the section that holds the entries, and another
        assert explain(f"evaluation.segments.{name}.kind").count(f"evaluation.segments.{name}.kind: ") == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("learning_rate", "(a number at least 0; default 5e-05)"),
        ("dataloader_num_workers", "(a whole number at least 0; default 0)"),
        ("train_sampling_strategy", 'one of random, sequential, group_by_length, batch_rebalance; default "random"'),
        ("include_for_metrics", "not for the recipe to set"),
        ("learning_rte", "did you mean `trainer.learning_rate`"),
        ("warmup_ratio", "write `trainer.warmup_steps`"),
    ],
)
def test_settings_of_the_library_are_explained_by_what_it_says_of_them(name, text):
    try:
        said = explain(f"trainer.{name}")
        assert said.startswith(f"  trainer.{name}: ")
    except RecipeError as error:
        said = str(error)
    assert text in said


@pytest.mark.parametrize(("name", "default"), [("save_total_limit", "2"), ("ddp_timeout", "86400"), ("fp16", "false")])
def test_defaults_are_told_as_they_are_here(name, default):
    """Not as they are in the library where nobody else changes them."""
    assert explain(f"trainer.{name}").endswith(f"; default {default})")


def test_names_in_a_mapping_are_explained_by_the_mapping():
    assert explain("examples.tasks.next-item") == explain("examples.tasks")
    assert "a mapping of next-item, title-to-item, item-to-title" in explain("examples.tasks")
    assert explain("data.columns.user_id") == explain("data.columns")
    with pytest.raises(RecipeError, match=r"`examples\.tasks` takes: item-to-title, next-item, title-to-item"):
        explain("examples.tasks.nonsense")


def test_every_setting_of_the_library_is_explained_or_refused():
    for name in set(TrainingArguments.__dataclass_fields__) - set(OWNED):
        assert "; default " in explain(f"trainer.{name}")


def test_entries_of_a_mapping_are_explained_under_any_name():
    text = explain("evaluation.segments")
    assert text.startswith("  evaluation.segments: Name → rule")
    assert "evaluation.segments.NAME.column: Column of the items file" in text
    assert "evaluation.segments.asin.column: Column of the interactions file" in explain("evaluation.segments.asin")
    assert explain("evaluation.segments.asin.kind").count("evaluation.segments.asin.kind: ") == 2
    with pytest.raises(RecipeError, match=r"did you mean `evaluation\.segments\.asin\.column`"):
        explain("evaluation.segments.asin.kolumn")


def test_segments_of_parent_and_child_stand_side_by_side_and_one_may_change_its_kind(recipe):
    recipe("data: {path: x}\nevaluation: {segments: {a: {kind: item-order, column: asin}}}", "base.yaml")
    child = recipe("extends: base.yaml\nevaluation: {segments: {b: {kind: user-column, column: land}}}")
    assert RunConfig.load(child, ["evaluation.segments.a.kind=user-column"]).evaluation.segments == {
        "a": settings.UserColumnSegments(kind="user-column", column="asin"),
        "b": settings.UserColumnSegments(kind="user-column", column="land"),
    }


def test_explain_refuses_unknown_settings_with_the_nearest():
    with pytest.raises(RecipeError, match=r"did you mean `tokenizer\.levels`"):
        explain("tokenizer.lvels")
    with pytest.raises(RecipeError, match="`seed` has none below it"):
        explain("seed.x")


@pytest.mark.parametrize(
    ("name", "homes"),
    [
        ("levels", "`tokenizer.levels`"),
        ("kind", "`vectors.kind` or .*`tokenizer.kind` or .*"),
        ("num_train_epochs", "`trainer.num_train_epochs`"),
    ],
)
def test_explain_says_where_a_setting_stands(name, homes):
    with pytest.raises(RecipeError, match=f"stands in a section; ask for {homes}$"):
        explain(name)


def test_sections_that_share_a_name_explain_it_alike():
    """A setting of several kinds means the same in each, so a reader learns it once."""
    kinds = strict.sections_in(strict.annotations_of(RunConfig)["tokenizer"])
    for name in ("levels", "codebook_size", "collisions"):
        having = [kind for kind in kinds if name in strict.annotations_of(kind)]
        assert len({(str(strict.annotations_of(kind)[name]), _field_docs(kind)[name]) for kind in having}) == 1


TEXT = ("tokenizer.kind=title", "objective.normaliser=vocab")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("tokenizer.kind=title",), "`tokenizer.kind: title` needs `objective.normaliser: vocab`, was: level"),
        (
            ("tokenizer.kind=numeric", "objective.normaliser=items"),
            "numeric` needs `objective.normaliser: vocab`, was: i",
        ),
        ((*TEXT, "evaluation.decode_normaliser=level"), "must be same, vocab or children with `tokenizer.kind: title`"),
        ((*TEXT, "examples.tasks.title-to-item=0.5"), "`examples.tasks.title-to-item` must be 0 with `tokenizer.kind"),
        ((*TEXT, "tokenizer.levels=3"), "tokenizer.levels"),
        ((*TEXT, "tokenizer.collisions=reassign"), "tokenizer.collisions"),
    ],
)
def test_identifiers_in_words_take_what_item_tokens_alone_can_do_from_no_recipe(recipe, overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        RunConfig.load(recipe(SYNTHETIC), overrides)


def test_identifiers_in_words_are_never_updated(recipe):
    config = RunConfig.load(recipe(SYNTHETIC), TEXT)
    later = dataclasses.replace(config, update=SelfImproveUpdate())
    assert any("title` needs `update.kind: fixed`, was: self-improve" in said for said in _contradictions(later))
    assert not [*_contradictions(config)]


def test_numbers_may_be_asked_for_by_title(recipe):
    tokenizer = ("tokenizer.kind=numeric", "objective.normaliser=vocab", "evaluation.decode_normaliser=children")
    config = RunConfig.load(recipe(SYNTHETIC), (*tokenizer, "examples.tasks.title-to-item=0.5"))
    assert config.tokenizer.order == "random"


IMPROVED = ("update.kind=self-improve", "examples.tasks.title-to-item=0.1")


def test_self_improvement_resolves_and_says_what_it_takes(recipe):
    config = RunConfig.load(recipe(SYNTHETIC), [*IMPROVED, "update.source=both", "update.every.steps=50",
                                                "update.every.epochs=null"])  # fmt: skip
    assert (config.update.every.steps, config.update.every.epochs) == (50, None)
    assert RunConfig.load(recipe(config.to_yaml(), "again.yaml")) == config
    assert "update.every.epochs: The same in epochs." in explain("update.every")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("update.source=generate", "examples.tasks.title-to-item=0"), "`update.source: generate` asks the model what "
         "it learns by the task `title-to-item`; give `examples.tasks.title-to-item` a weight above 0, was: 0"),
        (("update.source=both", "examples.tasks.next-item=0"), "asks the model what it learns by the task `next-item`"),
        (("update.source=both", "objective.normaliser=children"), "`objective.normaliser` cannot be children"),
        (("update.every={}",), "must be either .* was: steps None, epochs None"),
        (("update.every={steps: 5, epochs: 1}",), "must be either .* was: steps 5, epochs 1.0"),
        (("update.every={steps: 1.5}",), "`update.every.steps` must be a whole number"),
        (("update.source=generate", "update.groups=3"), "`update.groups` must divide `update.candidates`, was: 10 / 3"),
        (("update.source=embeddings", "update.groups=2"), "applies only with source: generate | both"),
        (("update.source=random", "update.price=1"), "applies only with another source than random"),
        (("update.source=random", "update.scope=all"), "write `update.scope: outliers`"),
        (("update.gate=none", "update.adapt=2"), "applies only with another gate than none"),
        (("update.scope=all", "update.outliers=0.2"), "applies only with scope: outliers"),
        (("trainer.fsdp=true",), "`trainer.fsdp` shards what `update.kind: self-improve` must be able to take back"),
        (("update.tolerance=-1",), "`update.tolerance` must be above -1 and below 1"),
    ],
)  # fmt: skip
def test_self_improvement_that_makes_no_sense_is_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message.replace("|", r"\|")):
        RunConfig.load(recipe(SYNTHETIC), [*IMPROVED, *overrides])
