"""The command: exit statuses, one message and no traceback, JSON alone on standard output."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llm_itemtok.cli import STAGES, main
from llm_itemtok.pipeline.stages import STAGE_NAMES
from tests.hub_server import Hub
from tests.process_pairs import PATIENCE
from tests.test_pipeline import RECIPE


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(RECIPE)
    assert main(["run", str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_commands_and_flags_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """A new flag is a promise; whoever adds one changes this list and the docs with it."""
    expected = {
        "run": {"--set", "--out", "--from", "--until", "--resume", "--fresh"},
        "check": {"--set"},
        "inspect": {"--compare", "--export", "--html"},
        "evaluate": {"--with", "--data", "--json"},
        "recommend": {"--with", "--history", "-k", "--allow", "--deny", "--json"},
        "report": set(),
        "merge": set(),
        "extend": {"--items", "--vectors", "--out"},
        "export": {"--format"},
        "push": {"--revision", "--public", "--message", "--merged", "--license"},
        "explain": set(),
        "bench": {"--json"},
        "reproduce": {"--dry-run", "--rerun", "--workers", "--minutes", "--results", "--runs"},
    }
    for command, flags in expected.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        words = capsys.readouterr().out.replace(",", " ").replace("[", " ").replace("]", " ").split()
        assert {word for word in words if word.startswith("-")} - {"-h", "--help"} == flags, command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "."], "folder"),
        (["check", "tiny.yaml", "--set", "tokenizer.codebok_size=8"], "did you mean `tokenizer.codebook_size`"),
        (["check", "tiny.yaml", "--set", "trainer.learning_rate='2e-5'"], "2.0e-5"),
        (["check", "tiny.yaml", "--set", "trainer.learning_rate=-1.0"], "learning_rate"),
        (["check", "tiny.yaml", "--set", "trainer.num_train_epochs=-3"], "num_train_epochs"),
        (["check", "tiny.yaml", "--set", "evaluation.beam=10"], "beam"),
        (["check", "tiny.yaml", "--set", "data.k_core=500"], "k_core"),
        (["evaluate", "nowhere"], "nowhere"),
        (["recommend", "nowhere", "--history", "1"], "nowhere"),
        (["recommend", ".", "--history", "1", "--allow", "@stock.txt"], "@stock.txt: a file of item ids"),
        (["inspect", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["push", "nowhere", "anna/toys"], "nowhere"),
        (["merge", "runs/no/such/thing", "out"], "runs/no/such/thing"),
        (["extend", "runs/no/such/thing", "--items", "new.csv"], "runs/no/such/thing"),
        (["export", "runs/no/such/thing", "out", "--format", "paths"], "runs/no/such/thing"),
        (["explain", "tokenizer.nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_status_2_with_one_message_and_no_traceback(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("itemtok: ")
    assert "Traceback" not in output.err
    assert output.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_the_stages_offered_are_those_of_the_pipeline() -> None:
    assert STAGES == STAGE_NAMES


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        main(["--debug", "run", str(tmp_path / "missing.yaml")])


def test_recommend_prints_json_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [json.loads(line)["id"] for line in (finished / "model/items.jsonl").read_text().splitlines()]
    history = f"{items[0]},{items[1]},unheard-of"
    assert main(["recommend", str(finished), "--history", history, "-k", "3", "--json"]) == 0
    output = capsys.readouterr()
    reply = json.loads(output.out)
    assert [item["rank"] for item in reply["items"]] == [1, 2, 3]
    assert {item["item_id"] for item in reply["items"]} <= set(items)
    assert "unheard-of" in output.err


def test_texts_of_a_bundle_cannot_write_to_the_terminal_but_as_text(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A title is anybody's, and `\x1b]0;` sets a window's name."""
    shutil.copytree(finished / "model", tmp_path / "model")
    items = tmp_path / "model/items.jsonl"
    titled = [json.loads(line) | {"title": "\x1b]0;x\x07\n  1 \x9b2J"} for line in items.read_text().splitlines()]
    items.write_text("".join(json.dumps(item) + "\n" for item in titled))
    assert main(["recommend", str(tmp_path / "model"), "--history", "", "-k", "3"]) == 0
    output = capsys.readouterr().out
    assert output.replace("\n", "").isprintable()
    assert output.count("\n") == output.count(r"\x1b]0;x\x07\n  1 \x9b2J") == 3
    assert main(["inspect", "\x1b[2Jnowhere"]) == 2
    assert r"itemtok: \x1b[2Jnowhere" in capsys.readouterr().err


def test_recommend_keeps_to_lists_given_as_ids_or_as_a_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [json.loads(line)["id"] for line in (finished / "model/items.jsonl").read_text().splitlines()]
    (tmp_path / "stock.txt").write_text("\ufeff" + "\r\n".join([*items[:4], "", "not, sold"]), encoding="utf-8")
    lists = ["--allow", f"@{tmp_path / 'stock.txt'}", "--deny", f"{items[1]},unheard-of"]
    assert main(["recommend", str(finished), "--history", "", "--json", *lists]) == 0
    output = capsys.readouterr()
    reply = json.loads(output.out)
    assert {item["item_id"] for item in reply["items"]} == {items[0], items[2], items[3]}
    assert (reply["unknown_allow"], reply["unknown_deny"]) == (["not, sold"], ["unheard-of"])
    assert "skipped 1 unknown items of --allow: not, sold" in output.err
    assert main(["recommend", str(finished), "--history", "", "--allow", "unheard-of"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "no item of --allow is known, so nothing is recommended" in output.err


def test_lists_of_the_command_hold_for_every_request(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [json.loads(line)["id"] for line in (finished / "model/items.jsonl").read_text().splitlines()]
    requests = [{"history": []}, {"history": [], "allow": items[2:6]}, {"history": [], "deny": items[:2]}]
    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(request) for request in requests))
    with (tmp_path / "requests.jsonl").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        allow, deny = ",".join(items[:4]), items[3]
        assert main(["recommend", str(finished), "--allow", allow, "--deny", deny]) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [{item["item_id"] for item in reply["items"]} for reply in replies]
    assert found == [set(items[:3]), {items[2]}, {items[2]}]


def test_a_list_that_is_no_text_is_bad_input(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stock.bin").write_bytes(b"\xff\xfe\x00")
    assert main(["recommend", str(finished), "--history", "", "--deny", f"@{tmp_path / 'stock.bin'}"]) == 2
    assert "stock.bin: must be text in UTF-8, one item id a line" in capsys.readouterr().err


def test_recommend_answers_json_lines_in_order(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [{"user": f"u{number}", "history": []} for number in range(40)]
    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(request) for request in requests))
    with (tmp_path / "requests.jsonl").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["recommend", str(finished), "-k", "2"]) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["user"] for reply in replies] == [request["user"] for request in requests]


def test_a_request_that_is_no_json_is_named_and_the_others_are_answered(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requests.jsonl").write_text('{"user": 1, "history": []}\nnonsense\n{"user": 3, "history": []}')
    with (tmp_path / "requests.jsonl").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["recommend", str(finished), "-k", "2"]) == 2
    output = capsys.readouterr()
    first, second, third = map(json.loads, output.out.splitlines())
    assert (first["user"], list(second), third["user"]) == (1, ["error"], 3)
    assert "standard input, line 2" in output.err


def test_evaluate_inspect_report_check_and_explain_answer(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["beam"] == 20
    for arguments in (["inspect"], ["report"], ["evaluate"]):
        assert main([*arguments, str(finished)]) == 0
        assert capsys.readouterr().out
    assert main(["check", str(finished.parent / "tiny.yaml")]) == 0
    assert "steps" in capsys.readouterr().out
    assert main(["explain", "tokenizer.levels"]) == 0
    assert "tokenizer.levels" in capsys.readouterr().out


def test_a_program_at_the_other_end_of_a_pipe_gets_each_reply_before_its_next_request(finished: Path) -> None:
    command = [sys.executable, "-m", "llm_itemtok", "recommend", str(finished), "-k", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for user in ("a", "b"):
            process.stdin.write(json.dumps({"user": user, "history": []}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["user"] == user
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0


@pytest.mark.slow
def test_sigterm_stops_after_a_checkpoint_with_143_and_resume_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("max_steps: 6", "max_steps: 240"))
    command = [sys.executable, "-m", "llm_itemtok", "run", str(tmp_path / "tiny.yaml"), "--out"]
    assert subprocess.run([*command, str(tmp_path / "whole")], check=False, capture_output=True).returncode == 0
    with subprocess.Popen([*command, str(tmp_path / "broken")], env=os.environ, stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "broken/metrics.jsonl"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        else:
            assert time.monotonic() < deadline, "training did not begin"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 143
    assert not (tmp_path / "broken/model").exists()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    kept = [int(path.name.split("-")[1]) for path in (tmp_path / "broken/checkpoints").glob("checkpoint-*")]
    assert max(kept) == max(steps)  # also when an older checkpoint is the best so far
    resumed = subprocess.run([*command, str(tmp_path / "broken"), "--resume"], check=False, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    whole, broken = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "broken"))
    for metrics in (whole, broken):  # what time and memory decide
        del metrics["speed"], metrics["training"]["seconds"], metrics["training"]["peak_mb"]
        for baseline in metrics["baselines"].values():
            baseline.pop("seconds", None)
    assert whole == broken


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # as in test_hub.py
def test_a_run_is_pushed_with_its_numbers(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(finished), "anna/toys"]) == 0
    assert capsys.readouterr().out.startswith("anna/toys (private, branch main): ")
    card = ModelCard(hub.model("anna/toys").files()["README.md"].decode())
    told = {result.metric_type: result.metric_value for result in card.data.eval_results}
    measured = json.loads((finished / "metrics.json").read_text())["test"]
    assert told == pytest.approx(measured, abs=1e-6)
    assert str(finished.parent) not in card.content
    assert main(["recommend", "anna/toys", "--history", "", "-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3
