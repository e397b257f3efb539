"""A plan is matched by construction: arms differ by their own settings only, and tuning never meets confirm."""

import itertools

import pytest
import yaml

from llm_itemtok.errors import RecipeError
from llm_itemtok.experiments.plan import LoadedPlan, points

RECIPE = "data: {source: synthetic, items: 60, users: 80}\ntrainer: {learning_rate: 1.0e-3, max_steps: 20}\n"
PLAN = {
    "name": "demo",
    "question": "Does it work?",
    "datasets": {
        "first": {"recipe": "base.yaml"},
        "second": {"recipe": "base.yaml", "settings": {"data": {"users": 90}}},
    },
    "arms": {
        "demo": {"title": "the method", "settings": {"trainer": {"weight_decay": 0.1}}},
        "random": {"control": True, "settings": {"tokenizer": {"kind": "random"}}},
        "side": {
            "probe": True,
            "settings": {"trainer": {"max_steps": 10}},
            "grid": {"tokenizer.levels": [2, 3]},
            "seeds": [1],
        },
        "longer": {
            "probe": True,
            "settings": {"trainer": {"max_steps": 40}},
            "based_on": "demo",
            "datasets": ["first"],
        },
    },
    "tuning": {"dataset": "first", "seed": 9, "grid": {"trainer.learning_rate": [1.0e-3, 1.0e-5]}},
    "confirm": {"seeds": [1, 2]},
}


@pytest.fixture
def load(tmp_path):
    (tmp_path / "base.yaml").write_text(RECIPE, encoding="utf-8")

    def written(**changes):
        plan = {name: value for name, value in {**PLAN, **changes}.items() if value is not None}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
        return LoadedPlan.load(tmp_path / "plan.yaml")

    return written


def test_tuning_tries_every_point_for_every_arm_and_blocks_are_matched(load):
    cells = load().tuning_cells()
    assert {cell.stage for cell in cells} == {"screen"}
    assert {cell.config.seed for cell in cells} == {9}
    blocks = {block: list(rows) for block, rows in itertools.groupby(cells, lambda cell: cell.block)}
    assert list(blocks) == ["first, learning_rate 0.001", "first, learning_rate 1e-05"]
    for rows, rate in zip(blocks.values(), (1e-3, 1e-5), strict=True):
        assert [row.arm for row in rows] == ["demo", "random", "side", "side"]
        assert {row.config.trainer["learning_rate"] for row in rows} == {rate}
    assert [row.config.tokenizer.levels for row in blocks["first, learning_rate 0.001"][2:]] == [2, 3]


def test_a_cell_of_tuning_is_named_by_what_sets_it_apart_in_its_block(load):
    cells = load().tuning_cells()
    assert [cell.own for cell in cells] == [(), (), ("levels 2",), ("levels 3",)] * 2
    named = {(cell.block, cell.arm, cell.own) for cell in cells}
    assert len(named) == len(cells)
    assert {cell.own for cell in load().confirm_cells({})} == {()}


def test_arms_differ_by_their_own_settings_only(load):
    cells = [cell for cell in load().confirm_cells({}) if (cell.dataset, cell.config.seed) == ("second", 1)]
    method, control, _side = (cell.config.to_dict() for cell in cells)
    assert method["trainer"].pop("weight_decay") == 0.1
    assert control.pop("tokenizer")["kind"] == "random"
    method.pop("tokenizer")
    assert method == control
    assert method["data"]["users"] == 90


def test_confirm_carries_the_chosen_point_over_and_probes_may_have_fewer_runs(load):
    cells = load().confirm_cells({"demo": (("trainer.learning_rate", 1e-5),)})
    assert {(cell.dataset, cell.arm, cell.config.seed) for cell in cells} == {
        *itertools.product(("first", "second"), ("demo", "random"), (1, 2)),
        *itertools.product(("first", "second"), ("side",), (1,)),
        *itertools.product(("first",), ("longer",), (1, 2)),
    }
    rates = {cell.arm: cell.config.trainer["learning_rate"] for cell in cells}
    longer = next(cell.config for cell in cells if cell.arm == "longer")
    assert (longer.trainer["weight_decay"], longer.trainer["max_steps"]) == (0.1, 40)
    assert rates == {"demo": 1e-5, "random": 1e-3, "side": 1e-3, "longer": 1e-5}
    assert all(cell.block == cell.dataset and cell.stage == "confirm" for cell in cells)


def test_what_the_plan_asks_about_comes_before_side_comparisons_and_first_seeds_before_others(load):
    cells = load().confirm_cells({})
    order = [(cell.arm in ("side", "longer"), cell.config.seed) for cell in cells]
    assert order == sorted(order)
    assert len(set(order)) == 4


def test_entries_that_share_a_data_folder_are_blocks_of_their_own(load):
    shared = {"recipe": "base.yaml", "folder": "first", "settings": {"tokenizer": {"levels": 2}}}
    plan = load(datasets={**PLAN["datasets"], "first, two levels": shared})
    cells = [
        cell for cell in plan.confirm_cells({}) if (cell.dataset, cell.arm, cell.config.seed) == ("first", "demo", 1)
    ]
    assert [(cell.block, cell.config.tokenizer.levels) for cell in cells] == [("first", 3), ("first, two levels", 2)]
    assert {cell.dataset for cell in load().tuning_cells()} == {"first"}


def test_variants_are_tuned_as_wholes_and_another_arm_may_take_one_that_was_not_chosen(load):
    few, many = {"tokenizer": {"kind": "rqvae", "epochs": 5}}, {"tokenizer": {"kind": "product", "levels": 4}}
    plan = load(
        arms={
            "demo": {"variants": {"few": few, "many": many}},
            "random": {"control": True, "settings": {"tokenizer": {"kind": "random"}}},
            "next": {"probe": True, "based_on": "demo", "variant": "few", "settings": {"tokenizer": {"levels": 2}}},
        }
    )
    tuned = [cell for cell in plan.tuning_cells() if cell.arm == "demo"]
    assert [dict(cell.point)["variant"] for cell in tuned] == ["few", "many"] * 2
    assert {cell.config.tokenizer.kind for cell in tuned if dict(cell.point)["variant"] == "few"} == {"rqvae"}

    chosen = (("trainer.learning_rate", 1e-5), ("variant", "many"))
    cells = {cell.arm: cell for cell in plan.confirm_cells({"demo": chosen})}
    assert (cells["demo"].config.tokenizer.kind, cells["demo"].config.tokenizer.levels) == ("product", 4)
    other = cells["next"]
    fitted = other.config.tokenizer
    assert (fitted.kind, fitted.epochs, fitted.levels) == ("rqvae", 5, 2)
    assert other.config.trainer["learning_rate"] == 1e-5
    assert dict(other.point)["variant"] == "few"


def test_an_arm_may_start_from_recipes_of_its_own_and_a_plan_may_compare_several_methods(load, tmp_path):
    (tmp_path / "other.yaml").write_text("extends: base.yaml\n\ntokenizer:\n  levels: 2\n", encoding="utf-8")
    arms = {
        "plain": {"control": True},
        "shallow": {"recipes": {"first": "other.yaml"}},
        "random": {"settings": {"tokenizer": {"kind": "random"}}},
        "both": {"probe": True, "based_on": "shallow", "settings": {"trainer": {"max_steps": 40}}},
    }
    changed = {"trainer": {"learning_rate": 1e-5}}
    data = {"first": {"recipe": "base.yaml", "settings": changed}, "second": {"recipe": "base.yaml"}}
    cells = load(arms=arms, datasets=data, tuning=None).confirm_cells({})
    configs = {(cell.dataset, cell.arm): cell.config for cell in cells if cell.config.seed == 1}
    depth = {at: config.tokenizer.levels for at, config in configs.items() if at[1] != "random"}
    assert {at for at, levels in depth.items() if levels == 2} == {("first", "shallow"), ("first", "both")}
    assert {config.trainer["learning_rate"] for (data, _), config in configs.items() if data == "first"} == {1e-5}
    assert configs["first", "both"].trainer["max_steps"] == 40


def test_every_outcome_of_tuning_is_looked_at_before_anything_runs(load):
    """A side comparison that does not fit one of the variants would show after hours."""
    flat, unique = {"tokenizer": {"kind": "random"}}, {"tokenizer": {"kind": "product"}}
    arms = {"demo": {"variants": {"few": {"tokenizer": {"levels": 2}}, "flat": flat}}, "other": {"control": True}}
    load(arms=arms).check()
    load(arms={**arms, "side": {"probe": True, "based_on": "demo", "settings": unique}}).check()
    kmeans = {"probe": True, "based_on": "demo", "settings": {"tokenizer": {"iterations": 7}}}
    with pytest.raises(RecipeError, match=r"base\.yaml with arm `side` of .*plan\.yaml: `tokenizer\.iterations"):
        load(arms={**arms, "side": kmeans}).check()
    load(arms={**arms, "side": {**kmeans, "variant": "few"}}).check()


def test_every_point_that_all_tune_is_looked_at_before_anything_runs(load):
    tuning = {**PLAN["tuning"], "grid": {"objective.normaliser": ["vocab", "level"]}}
    numeric = {"probe": True, "based_on": "demo", "settings": {"tokenizer": {"kind": "numeric"}}}
    with pytest.raises(RecipeError, match=r"needs `objective\.normaliser: vocab`, was: level"):
        load(arms={**PLAN["arms"], "numeric": numeric}, tuning=tuning).check()


def test_arms_are_looked_at_one_by_one(load):
    """Three choices of each of 16 arms are 48 recipes, and not the 43 million ways to choose of all."""

    def tuned(**settings):
        return {"grid": {"trainer.weight_decay": [0.1, 0.2, 0.3]}, "settings": settings}

    arms = {f"arm-{steps}": tuned(trainer={"max_steps": steps}) for steps in range(1, 16)}
    load(arms={**arms, "random": {"control": True, **tuned(tokenizer={"kind": "random"})}}).check()


def test_a_side_comparison_that_turns_out_to_be_another_arm_is_not_run_again(load):
    variants = {"few": {"tokenizer": {"levels": 2}}, "many": {"tokenizer": {"levels": 5}}}
    few = {"probe": True, "based_on": "demo", "variant": "few"}
    plan = load(arms={"few": few, "demo": {"variants": variants}, "random": PLAN["arms"]["random"]})
    plan.check()

    def arms(variant):
        rate = ("trainer.learning_rate", 1e-3)
        cells = plan.confirm_cells({"demo": (rate, ("variant", variant)), "random": (rate,)})
        return {cell.arm for cell in cells}

    assert arms("few") == {"demo", "random"}
    assert arms("many") == {"demo", "random", "few"}


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"probe": True, "based_on": "demo"}, r"first those of `arms\.added` and `arms\.demo` can be"),
        (
            {"probe": True, "based_on": "demo", "settings": {"trainer": {"max_steps": 40}}},
            r"`arms\.added` and `arms\.longer` can be the same",
        ),
        ({"settings": {"tokenizer": {"kind": "random"}}}, r"`arms\.added` and `arms\.random` can be the same"),
    ],
)
def test_arms_that_cannot_differ_and_methods_that_may_not_are_refused(load, added, said):
    plan = load(arms={**PLAN["arms"], "added": added})
    with pytest.raises(RecipeError, match=said):
        plan.check()


def test_where_a_grid_has_one_point_nothing_is_chosen(load):
    assert load().foregone() == {}
    assert load(tuning=None).foregone() == {}
    one = load(tuning={**PLAN["tuning"], "grid": {"trainer.learning_rate": [1e-5]}}).foregone()
    assert one == dict.fromkeys(("demo", "random"), (("trainer.learning_rate", 1e-5),))  # `side` has a grid of its own


def test_an_arm_may_begin_with_the_item_tokens_of_another_ones_run(load):
    fresh = {"probe": True, "based_on": "random", "codes_of": "demo", "seeds": [2], "datasets": ["second"]}
    loaded = load(arms={**PLAN["arms"], "fresh": fresh})
    assert "fresh" not in {cell.arm for cell in loaded.tuning_cells()}
    cells = loaded.confirm_cells({"demo": (("trainer.learning_rate", 1e-5),)})
    (cell,) = [cell for cell in cells if cell.arm == "fresh"]
    assert cell.codes_of in cells
    assert (cell.codes_of.arm, cell.codes_of.dataset, cell.codes_of.config.seed) == ("demo", "second", 2)
    assert cell.codes_of.config.trainer["learning_rate"] == 1e-5
    (control,) = [other for other in cells if (other.arm, other.dataset, other.config.seed) == ("random", "second", 2)]
    assert cell.config.tokenizer.kind == "file"
    assert {**cell.config.to_dict(), "tokenizer": None} == {**control.config.to_dict(), "tokenizer": None}


def test_a_grid_gives_every_combination_once():
    assert points({}) == [()]
    assert points({"a": [1, 2], "b": ["x"]}) == [(("a", 1), ("b", "x")), (("a", 2), ("b", "x"))]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"demo": {}}}, "exactly one with `control: true`, was: none"),
        ({"arms": {"other": {}, "random": {"control": True}}}, "must bear its name, `arms.demo`"),
        ({"arms": {"random": {"control": True}, "side": {"probe": True}}}, "neither control nor probe, was: none"),
        ({"arms": {**PLAN["arms"], "other": {"recipes": {"third": "base.yaml"}}}}, "`arms.other.recipes` must be of"),
        (
            {"arms": {**PLAN["arms"], "other": {"based_on": "demo", "recipes": {"first": "x"}}}},
            "whose recipes it takes",
        ),
        ({"arms": {"demo": {"controls": True}}}, "did you mean `arms.demo.control`"),
        ({"tuning": {**PLAN["tuning"], "seed": 1}}, "must be none of the seeds of `confirm`, was: 1"),
        ({"tuning": {**PLAN["tuning"], "dataset": "third"}}, "must be one of first, second, was: third"),
        ({"tuning": {**PLAN["tuning"], "grid": {"seed": [1, 2]}}}, "and not seeds"),
        ({"confirm": {"seeds": [1, 1]}}, "must be distinct"),
        ({"confirm": {"seeds": []}}, "at least one"),
        ({"name": "a/b", "arms": {"a/b": {}, "random": {"control": True}}}, "as it names files"),
        ({"question": None}, "`question` must be given"),
        ({"datasets": {}}, "`datasets` must name at least one"),
        ({"arms": {**PLAN["arms"], "other": {"based_on": "longer"}}}, "must be an arm that is tuned itself"),
        ({"arms": {**PLAN["arms"], "other": {"datasets": ["third"]}}}, "must be of first, second, was: third"),
        ({"arms": {**PLAN["arms"], "demo": {"seeds": [1]}}}, "it takes all seeds and data sets"),
        ({"arms": {**PLAN["arms"], "other": {"seeds": []}}}, "distinct and at least one"),
        ({"arms": {**PLAN["arms"], "other": {"based_on": "demo", "variant": "x"}}}, "based on (none), was: x"),
        ({"arms": {**PLAN["arms"], "other": {"based_on": "demo", "variants": {"x": {}}}}}, "which is not tuned"),
        ({"arms": {**PLAN["arms"], "other": {"variants": {"x": {}}}}, "tuning": None}, "need `tuning`"),
        ({"arms": {**PLAN["arms"], "other": {"codes_of": "demo"}}}, "in one which is `based_on` another"),
        ({"arms": {**PLAN["arms"], "other": {"based_on": "demo", "codes_of": "x"}}}, "with a tokenizer of its own"),
        (
            {"arms": {**PLAN["arms"], "other": {"based_on": "demo", "codes_of": "demo", "seeds": [5]}}},
            "`arms.demo` must run wherever `arms.other` needs its codes, but lacks: seed 5",
        ),
    ],
)
def test_a_plan_that_cannot_be_right_is_refused_with_the_reason(load, changes, says):
    with pytest.raises(RecipeError, match=r"plan\.yaml") as caught:
        load(**changes)
    assert says in str(caught.value)
