"""Whatever a model was trained with, every way out of training and back gives its logits."""

import pytest
from peft import PeftModel

from llm_itemtok.errors import ArtifactError, UnsupportedModelError
from llm_itemtok.model import export
from llm_itemtok.model.load import add_lora
from llm_itemtok.pipeline.merge import merge
from tests.model.matrix import FAMILIES, MODES, TIES, build, measure, plain_peft, recommender
from tests.tiny import tiny_lm, tiny_tokenizer

FAST = ("llama", "t5")
CELLS = [
    pytest.param(family, tie, mode, marks=() if family in FAST else pytest.mark.slow, id=f"{family}-{tie}-{mode}")
    for family in FAMILIES
    for tie in TIES
    for mode in MODES
]


@pytest.mark.parametrize(("family", "tie", "mode"), CELLS)
def test_logits_survive_saving_loading_merging_and_a_resumed_training(family, tie, mode, tmp_path):
    cell = measure(family, tie, mode, tmp_path)
    assert cell.load == 0
    assert cell.resume == 0
    assert cell.merge <= 1e-5
    if mode == "full":
        assert cell.peft is None
        return
    assert cell.peft is not None
    assert cell.peft <= 1e-6
    assert cell.moved == 0, "an adapter leaves every row of the base model's table as it was"
    # PEFT has no name for the three modules that share T5's input table, so each carries the rows.
    copies = 2 if (family, tie) == ("t5", "untied") else 1
    assert cell.tensors == cell.lora + copies * cell.rows
    assert cell.rows <= 2 * 15 * 16 * 4  # 15 item tokens, 16 wide, float32, both sides
    assert cell.file - cell.tensors <= 1024 + 200 * cell.names


@pytest.mark.parametrize("family", FAST)
def test_full_training_has_no_adapter_to_load_or_to_merge(family, tmp_path):
    """The refused cells of the matrix."""
    base = tmp_path / "base"
    tiny_lm(family, padding=7).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    bundle = recommender(base, *build(base, "full")).save_pretrained(tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        plain_peft(family, True, base, bundle)
    with pytest.raises(ArtifactError, match="what is merged must be an adapter, found: a whole model; use it as it is"):
        merge(bundle, tmp_path / "merged")


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("changes", [{"dora": True, "dropout": 0.0}, {"dora": False, "dropout": 0.1}])
def test_what_peft_cannot_put_on_packed_experts_is_refused_with_its_reason(family, changes):
    with pytest.raises(UnsupportedModelError, match=r"PEFT says: lora.ParamWrapper does not .*Set `dora: false`"):
        add_lora(tiny_lm(family), rank=2, alpha=4, rslora=False, seed=0, **changes)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    """Also the metadata, whose order safetensors leaves to chance."""
    base = tmp_path / "base"
    tiny_lm("llama", padding=7).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model, _, peft_model = build(base, "dora")
    assert isinstance(peft_model, PeftModel)
    contents = set()
    for attempt in range(6):
        export.save_adapter(model, peft_model, tmp_path, base=str(base), revision=None)
        contents.add((tmp_path / export.ADAPTER_WEIGHTS).read_bytes())
        assert len(contents) == 1, attempt
