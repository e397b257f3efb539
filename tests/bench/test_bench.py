"""Benchmarks compare like with like, and the work done is what the arithmetic says."""

import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_itemtok.bench import decode, evaluate, gpu, measure, rows, run, subjects, train, trie
from llm_itemtok.bench.usual import DictTrie, Windows, generate_items, one_prefill
from llm_itemtok.cli import BENCHMARKS, main
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.vocab.trie import ItemTrie

TINY = subjects.Shape(layers=2, width=32, heads=2, inner=64, vocabulary=50)
SIZES = (8, 8, 8)


def subject(num_items: int = 200) -> tuple:
    model = subjects.item_model(TINY, subjects.codes(num_items, SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that rankings are decided, not accidental
    return model, subjects.plain_model(model), ItemTrie(model.vocab.codes), subjects.prompts(model.vocab, 3, 11)


def test_the_usual_ways_find_what_tree_shaped_beams_find():
    model, plain, item_trie, prompts = subject()
    ours = beam_search(TreeDecoder(model), item_trie, prompts, beam=20, normaliser="vocab")
    paths = model.vocab.paths.numpy()
    found, scores = generate_items(plain, DictTrie(iter(paths.tolist())), prompts, beam=20, levels=3)
    np.testing.assert_array_equal(paths[ours.items], found)
    np.testing.assert_allclose(ours.scores, scores, atol=1e-4)
    first_ids = [model.vocab.first_id + start for start in model.vocab.level_starts]
    np.testing.assert_array_equal(one_prefill(plain, item_trie, first_ids, np.stack(prompts), beam=20), ours.items)


def test_windows_hold_every_target_once_with_its_history():
    paths = torch.arange(10, 40).reshape(10, 3)
    windows = Windows(paths, [np.array([4, 2, 7]), np.array([1])], start=1, history_length=1)
    assert [example.tolist() for example in windows.examples] == [
        [1, *paths[4].tolist()],
        [1, *paths[4].tolist(), *paths[2].tolist()],
        [1, *paths[2].tolist(), *paths[7].tolist()],
        [1, *paths[1].tolist()],
    ]
    (ids, mask, labels), last = windows.batches(3)
    assert ids[0].tolist() == [0, 0, 0, 1, *paths[4].tolist()]
    assert mask.sum(1).tolist() == [4, 7, 7]
    assert labels[1].tolist() == [-100] * 4 + paths[2].tolist()
    assert last[0].shape == (1, 4)


def test_training_on_rows_and_on_windows_agree_on_every_target():
    run_ = train.Training(TINY, users=12)
    assert run_.targets == len(run_.windows.examples)
    assert 0 < run_.largest_difference() < 1e-5
    for way in (run_.usual, run_.better, run_.ours):
        way()  # gradients flow
    assert run_.model.rows.input_rows.grad.abs().sum() > 0


@pytest.fixture
def counted_attention(monkeypatch: pytest.MonkeyPatch):
    """Attention in plain products, since the counter does not know the fused kernel of processors."""
    build = subjects.item_model

    def eager(*arguments: object, **settings: object):
        model = build(*arguments, **settings)
        model.lm.set_attn_implementation("eager")
        return model

    monkeypatch.setattr(subjects, "item_model", eager)


@pytest.mark.usefixtures("counted_attention")
def test_beams_do_little_more_arithmetic_than_the_floor():
    shape = subjects.Shape(layers=4, width=64, heads=4, inner=172, vocabulary=500)
    model = subjects.item_model(shape, subjects.codes(500, (16, 16, 16, 16)))
    prompts = subjects.prompts(model.vocab, 4, 40)
    with FlopCounterMode(display=False) as counter:
        beam_search(TreeDecoder(model), ItemTrie(model.vocab.codes), prompts, beam=10)
    floor = subjects.floor_gflop(shape, users=4, tokens=40, beam=10, levels=(16, 16, 16, 16))
    # Beams attend to each other's masked places, and causal attention is counted whole: no more than that.
    assert 1 <= counter.get_total_flops() / 1e9 / floor < 1.08


@pytest.mark.usefixtures("counted_attention")
def test_training_does_not_pay_for_the_text_vocabulary():
    def flops(vocabulary: int) -> int:
        run_ = train.Training(subjects.Shape(2, 32, 2, 64, vocabulary), users=4)
        with FlopCounterMode(display=False) as counter:
            run_.ours()
        return counter.get_total_flops()

    assert flops(50) == flops(5000)


@pytest.mark.usefixtures("counted_attention")
def test_the_floor_of_whole_layers_is_what_a_plain_pass_costs():
    """One beam and one level need one pass over the history, and its logits."""
    model, _, _, prompts = subject()
    ids = torch.from_numpy(np.stack(prompts))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.level_log_probs(model.hidden(ids, use_cache=False).last_hidden_state[:, -1], 0, "level")
    floor = 1e9 * subjects.floor_gflop(TINY, users=3, tokens=11, beam=1, levels=(8,))
    uncausal = 2 * TINY.layers * TINY.attention_width * 11 * (11 - 1) * 3  # the counter counts masked products too
    assert counter.get_total_flops() == pytest.approx(floor + uncausal)


def allocate(megabytes: int):
    return lambda: torch.ones(megabytes, 2**18).sum()


@pytest.mark.slow
def test_memory_of_a_call_is_what_it_holds_at_its_widest():
    assert measure.peak_mb(allocate, 200) == pytest.approx(200, abs=20)


def test_interleaved_times_order_calls_by_their_work():
    def work(size: int) -> object:
        return torch.ones(size, size) @ torch.ones(size, size)

    with measure.one_thread():
        much, little = measure.cpu_seconds(partial(work, 700), partial(work, 50), repeats=3)
        assert torch.get_num_threads() == 1
    assert much > little


def test_results_say_whether_a_target_is_met():
    assert measure.at_least("D1", 10.0, 10, {}).met
    assert not measure.at_least("D1", 9.99, 10, {}).met
    assert measure.at_most("R2", 0.02, 0.02, {}).met
    assert not measure.at_most("R2", 0.0201, 0.02, {}).met
    assert measure.at_least("D1", 1.23456, 1, {"a": {"b": 0.0123456}}).details == {"a": {"b": 0.01235}}


def test_the_command_knows_every_group():
    assert tuple(run.GROUPS) == BENCHMARKS


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Benchmarks of a second instead of minutes, on the same code."""
    monkeypatch.setattr(subjects, "SMALL", TINY)
    monkeypatch.setattr(subjects, "LARGE_VOCABULARY", TINY)
    monkeypatch.setattr(subjects, "ENCODER_DECODER", replace(TINY, family="t5"))
    monkeypatch.setattr(evaluate, "SHAPE", TINY)
    for module, settings in (
        (decode, {"ITEMS": 300, "TOKENS": 8}),
        (train, {"ITEMS": 300}),
        (rows, {"ITEMS": 300, "TOKENS": 8, "WIDE": TINY}),
        (evaluate, {"ITEMS": 300, "USERS": 40, "FEW": 4, "PASS_ITEMS": 8, "PASS_FEW": 2, "PASS_TOKENS": 8}),
    ):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(decode, "peak_mb", lambda _prepare, way: {"usual": 2.0}.get(way, 1.0))
    monkeypatch.setattr(train, "peak_mb", lambda _prepare, way: {"usual": 2.0, "body": 1.0}.get(way, 1.0))
    monkeypatch.setattr(rows, "peak_mb", lambda _prepare, way: {"theirs": 2.0}.get(way, 1.0))
    monkeypatch.setitem(run.GROUPS, "rows", partial(rows.rows, 1))
    monkeypatch.setitem(run.GROUPS, "trie", partial(trie.trie, 5000, 1))
    monkeypatch.setitem(run.GROUPS, "decode", partial(decode.decode, 1))
    monkeypatch.setitem(run.GROUPS, "train", partial(train.train, 1))
    monkeypatch.setitem(run.GROUPS, "evaluate", partial(evaluate.evaluate, 1))


@pytest.mark.parametrize(
    ("group", "ids"),
    [
        ("decode", "D1-exact D1-level D1-memory D3-exact D3-level D4 D2-exact D2-level T5-decode"),
        ("train", "R1-9k R1-152k R2"),
        ("rows", "ROW-time-9k ROW-time-152k ROW-mb-152k"),
        ("trie", "T1-build-s T1-mb T1-lookup-ms"),
        ("evaluate", "E1 S1"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_group_prints_one_value_for_each_of_its_ids(group: str, ids: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", group, "--json"]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert [result["id"] for result in results] == ids.split()
    fields = {"id", "value", "unit", "baseline", "target", "met", "details"}
    assert all(result.keys() == fields for result in results)
    assert all(result["value"] >= 0 for result in results if result["id"] != "R2")
    assert all(result["details"].get("same_ranking", 1.0) == 1.0 for result in results)
    assert len(printed.err.splitlines()) == len(results)


@pytest.mark.usefixtures("small")
def test_people_read_lines_and_details(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "trie"]) == 0
    printed = capsys.readouterr()
    assert "T1-build-s" in printed.err
    assert "baseline_s" in printed.out


def test_what_runs_on_a_gpu_runs_here_too():
    shape = subjects.Shape(2, 32, 4, 64, 50, key_value_heads=2, head_dim=16, family="qwen3")
    rate = gpu.gemm_tflops("cpu", 1, side=64)
    results = [
        gpu.beams("G1-tiny", shape, "cpu", rate, repeats=1, users=3, usual_users=(1, 2)),
        gpu.long_histories(1000, shape, "cpu", repeats=1, beam=5, num_items=300),
        gpu.training(shape, "cpu", rate, repeats=1, users=4),
    ]
    assert [result.id for result in results] == ["G1-tiny", "G2-1000", "G3"]
    assert all(result.value > 0 for result in results)


def test_without_a_gpu_its_group_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_result_is_plain_data():
    assert json.loads(json.dumps(asdict(measure.at_most("R2", 0.1, 1, {"tokens": 3})))) == {
        "id": "R2", "value": 0.1, "unit": "share", "baseline": "", "target": 1, "met": True, "details": {"tokens": 3},
    }  # fmt: skip
