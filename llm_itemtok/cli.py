"""The command `itemtok`: arguments in, exit status out; everything else is imported when a command needs it.

Exit status: 0 done, 1 the run failed, 2 bad usage or bad input (one message on standard error, a traceback only with
`--debug`), 143 after a checkpoint on SIGTERM.
"""

import argparse
import json
import os
import shlex
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_itemtok.printable import json_line, lines, one_line

if TYPE_CHECKING:
    from llm_itemtok.answering import Answering

STOPPED = 143
STAGES = ("data", "items", "vocab", "train", "evaluate", "report")
BENCHMARKS = ("decode", "train", "rows", "trie", "evaluate", "tokenize", "recursive", "gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as given on the command line, without the program's name.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        more = "; `--resume` goes on from the last checkpoint" if options.command is _run else ""
        print(f"itemtok: interrupted{more}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of standard output went away (such as `| head`): not a fault, and nothing to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """Say what went wrong, and return the status it stands for."""
    from llm_itemtok.errors import ItemTokError

    if isinstance(error, ItemTokError):
        _tell(f"itemtok: {error}")
        return 2
    files = FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError
    if isinstance(error, files) and error.filename is not None:
        _tell(f"itemtok: {error.filename}: {error.strerror}")
        return 2
    if "no space left on device" in str(error).lower():  # torch and safetensors have errors of their own for it
        print("itemtok: failed: the disk is full; make room and go on (a training with `--resume`)", file=sys.stderr)
        return 1
    _tell(f"itemtok: failed: {type(error).__name__}: {error}\n  `--debug` shows where")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="itemtok", description="Turn a pretrained language model into a recommender with item tokens."
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback when something goes wrong")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "carry out a recipe: data, items, vocab, train, evaluate, report")
    _recipe_arguments(run)
    run.add_argument("--out", type=Path, help="run folder (default: runs/<recipe name>)")
    run.add_argument("--from", dest="start", choices=STAGES, help="run this stage and all after it again")
    run.add_argument("--until", choices=STAGES, help="stop after this stage")
    run.add_argument("--resume", action="store_true", help="let training go on from its last checkpoint")
    run.add_argument("--fresh", action="store_true", help="empty the run folder first")

    check = _command(commands, "check", _check, "validate a recipe and its data; print sizes and estimates")
    _recipe_arguments(check)

    inspect = _command(commands, "inspect", _inspect, "examine the item tokens of a run, a model, or a file of codes")
    _inspect_arguments(inspect)

    evaluate = _command(commands, "evaluate", _evaluate, "measure a run or a model by full ranking")
    evaluate.add_argument("path", help="run folder, model folder, or Hub id, OWNER/NAME or OWNER/NAME@REVISION")
    _together(evaluate)
    evaluate.add_argument("--data", type=Path, help="data folder (default: the run's own)")
    evaluate.add_argument("--json", action="store_true", help="print metrics.json instead of a table")

    recommend = _command(
        commands, "recommend", _recommend, "recommend items for a history, or for many on standard input"
    )
    recommend.add_argument("model", help="run folder, model folder, or Hub id, OWNER/NAME or OWNER/NAME@REVISION")
    _together(recommend)
    recommend.add_argument(
        "--history",
        metavar="ID,ID|@FILE",
        help="item ids, oldest first; empty for a new user; a file has one id a line",
    )
    recommend.add_argument("-k", type=int, default=10, help="number of items (default: 10)")
    lists = {"allow": "only these items may come out, of any request", "deny": "these items must not come out"}
    for name, text in lists.items():
        recommend.add_argument(f"--{name}", metavar="ID,ID|@FILE", help=f"{text}; a file has one id a line")
    recommend.add_argument("--json", action="store_true", help="print JSON")

    report = _command(commands, "report", _write_report, "write report.html of a run again")
    report.add_argument("run", type=Path)

    _model_commands(commands)

    reproduce = _command(
        commands, "reproduce", _reproduce, "carry out an experiment plan, or go on with it; write its results page"
    )
    _plan_arguments(reproduce)

    bench = _command(commands, "bench", _bench, "measure speed and memory beside the usual ways, on random models")
    bench.add_argument("group", choices=BENCHMARKS)
    bench.add_argument("--json", action="store_true", help="print JSON")

    explain = _command(commands, "explain", _explain, "what a recipe setting means")
    explain.add_argument("setting", nargs="?", default="", help="such as tokenizer.levels; all of them if left out")
    return parser


def _together(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--with",
        dest="others",
        metavar="MODEL",
        action="append",
        default=[],
        help="another model of the same catalogue, to answer together with it; may be given more than once",
    )


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(command=function)
    return parser


def _inspect_arguments(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("path", type=Path)
    inspect.add_argument("--compare", type=Path, help="other codes of the same items: what moved")
    text = "write the codes: *.index.json (LC-Rec), *.json (a FlashRec catalogue), *.csv, or item_codes.safetensors"
    inspect.add_argument("--export", type=Path, metavar="FILE", help=text)
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures, verdict and pictures")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, was: {text}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, was: {text}")
    return number


def _model_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What a trained model is made into."""
    merge = _command(commands, "merge", _merge, "write an adapter and its base model as one whole model")
    merge.add_argument("model", help="adapter: run folder, model folder, or Hub id, OWNER/NAME or OWNER/NAME@REVISION")
    merge.add_argument("out", type=Path, help="folder of the merged model")

    push = _command(commands, "push", _push, "put a run's model into a Hub repository, private unless said otherwise")
    push.add_argument("path", type=Path, help="run folder or model folder")
    push.add_argument("repo", help="OWNER/NAME; made when missing")
    push.add_argument("--revision", help="branch (default: the main one); made when missing")
    push.add_argument("--public", action="store_true", help="everybody may see a new repository, or does see this one")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--merged", action="store_true", help="the whole model in place of an adapter")
    push.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0")

    export = _command(commands, "export", _export, "write a model and its items for a server that keeps beams to them")
    export.add_argument("model", help="run folder, model folder, or Hub id, OWNER/NAME or OWNER/NAME@REVISION")
    export.add_argument("out", type=Path, help="folder to write")
    export.add_argument("--format", choices=("flashrec", "paths"), required=True, help="a catalogue, or token ids")

    extend = _command(commands, "extend", _extend, "let a model recommend new items, without training")
    extend.add_argument("model", help="run folder, model folder, or Hub id, OWNER/NAME or OWNER/NAME@REVISION")
    extend.add_argument("--items", type=Path, required=True, help="file of the new items: .jsonl, .csv or .parquet")
    extend.add_argument("--vectors", type=Path, help="their vectors (default: made as the run made those of its items)")
    extend.add_argument("--out", type=Path, help="folder of the extended model (default: in place of the model)")


def _plan_arguments(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument("plan", type=Path)
    instead = reproduce.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="say what would run and how long it takes")
    instead.add_argument("--rerun", metavar="RUN", help="run this row (first digits of its hash) again and compare")
    instead.add_argument("--minutes", type=_positive, help="stop after this time, with checkpoints")
    reproduce.add_argument("--workers", type=_count, default=2, help="runs at a time, one thread each (default: 2)")
    reproduce.add_argument("--results", type=Path, default=Path("docs/results"), help="default: docs/results")
    reproduce.add_argument("--runs", type=Path, default=Path("runs/pool"), help="run folders (default: runs/pool)")


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path)
    text = "override a setting; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help=text)


def _run(options: argparse.Namespace) -> int:
    from llm_itemtok.config import RunConfig

    config = RunConfig.load(options.recipe, options.overrides)
    from llm_itemtok.pipeline.fit import Stopped
    from llm_itemtok.pipeline.run import run
    from llm_itemtok.processes import leave

    _quiet()
    out = options.out or Path("runs") / options.recipe.stem
    how = {"start": options.start, "until": options.until, "resume": options.resume, "fresh": options.fresh}
    try:
        folder = run(config, out, **how, log=_say)
    except Stopped:
        leave()
        print("itemtok: stopped after a checkpoint; the same command with --resume goes on from it", file=sys.stderr)
        return STOPPED
    except BaseException:
        leave(failed=True)
        raise
    leave()
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        _say(f"run folder: {folder}")
        if options.until is None:
            _say(_next_steps(folder, own=config.data.source != "synthetic"))
    return 0


def _next_steps(folder: Path, *, own: bool) -> str:
    """What to do with a finished run, with ids from its catalogue, which is the user's `own` or made up."""
    from llm_itemtok.artifacts import EXAMPLES, REPORT, read_json

    history = [item["item_id"] for item in read_json(folder / EXAMPLES)[0]["history"]]
    ids = shlex.quote(",".join([item_id for item_id in history if item_id == one_line(item_id).replace(",", "")][-3:]))
    lines = [
        "next:",
        f"  open {folder / REPORT} in a browser",
        f"  itemtok recommend {shlex.quote(str(folder))} --history {ids}",
        f"  itemtok inspect {shlex.quote(str(folder))}",
    ]
    if not own:
        lines.append("  for your own data, make a folder with items.csv and interactions.csv (docs/data.md), then")
        lines.append("  itemtok check RECIPE --set data.path=FOLDER")
    return "\n".join(lines)


def _check(options: argparse.Namespace) -> int:
    from llm_itemtok.config import RunConfig

    config = RunConfig.load(options.recipe, options.overrides)
    from llm_itemtok.pipeline.check import check

    _say(check(config))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from llm_itemtok.pipeline.inspect import inspect

    _say(inspect(options.path, options.compare, export=options.export, html=options.html))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from llm_itemtok.pipeline.evaluate import evaluate_path, table

    _quiet()
    metrics = evaluate_path(options.path, options.data, options.others, log=_tell)
    _say(json.dumps(metrics, indent=2) if options.json else table(metrics))
    return 0


def _recommend(options: argparse.Namespace) -> int:
    from llm_itemtok.ensemble import load
    from llm_itemtok.serving import BATCH, answer, answer_lines, ids_of, text_lines

    _quiet()
    if options.history is None and (sys.stdin is None or sys.stdin.isatty()):
        print("itemtok: give a history with --history, or JSON Lines requests on standard input", file=sys.stderr)
        return 2
    given_allow = None if options.allow is None else ids_of(options.allow)  # before the model, which takes its time
    given_deny = ids_of(options.deny or "")
    given_history = ids_of(options.history or "")
    recommender = load([options.model, *options.others])
    allow, unknown_allow = _known(recommender, given_allow or [], "--allow")
    deny, unknown_deny = _known(recommender, given_deny, "--deny")
    lists: dict[str, Any] = {"allow": None if given_allow is None else allow, "deny": deny}
    if lists["allow"] == []:
        print("itemtok: no item of --allow is known, so nothing is recommended", file=sys.stderr)
    if options.history is None:
        # A file is answered in batches; a program at the other end of a pipe gets each reply before its next request.
        whole = sys.stdin.isatty() or stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)
        for line in answer_lines(recommender, sys.stdin.buffer, options.k, batch=BATCH if whole else 1, **lists):
            print(line, flush=True)
        return 0
    history, unknown = _known(recommender, given_history, "--history")
    if unknown and not history:
        print("itemtok: no id of the history (commas between) is known; a new user gets this", file=sys.stderr)
    items = recommender.recommend(history, options.k, **lists)
    reply = answer(None, items, unknown, unknown_allow=unknown_allow, unknown_deny=unknown_deny)
    for line in [json_line(reply)] if options.json else text_lines(items):
        print(line)
    return 0


def _known(recommender: "Answering", ids: list[str], option: str) -> tuple[list[str], list[str]]:
    """Known and unknown ids; standard error names some of the unknown ones."""
    unknown = recommender.known(ids)[1]
    if unknown:
        few = one_line(", ".join(unknown[:5]))
        _tell(f"itemtok: skipped {len(unknown)} unknown items of {option}: {few}")
    absent = set(unknown)
    return [item_id for item_id in ids if item_id not in absent], unknown


def _write_report(options: argparse.Namespace) -> int:
    from llm_itemtok.report.page import write_report

    _say(write_report(options.run))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from llm_itemtok.pipeline.merge import merge

    _quiet()
    _say(merge(options.model, options.out))
    return 0


def _push(options: argparse.Namespace) -> int:
    from llm_itemtok.pipeline.push import push, told

    _quiet()
    try:
        pushed = push(
            options.path,
            options.repo,
            revision=options.revision,
            public=options.public,
            message=options.message,
            merged=options.merged,
            licence=options.license,
        )
    except KeyboardInterrupt:
        print("itemtok: interrupted; the same command goes on, and the Hub shows no half of it", file=sys.stderr)
        return 130
    _say(told(pushed))
    return 0


def _export(options: argparse.Namespace) -> int:
    from llm_itemtok.pipeline.export import export

    _quiet()
    _say(export(options.model, options.out, options.format))
    return 0


def _extend(options: argparse.Namespace) -> int:
    from llm_itemtok.pipeline.extend import extend

    _quiet()
    _say(extend(options.model, options.items, vectors=options.vectors, out=options.out, log=_tell))
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from llm_itemtok.experiments import reproduce as plans

    _quiet()
    places = {"results": options.results, "runs": options.runs}
    if options.dry_run:
        _say(plans.dry_run(options.plan, workers=options.workers, **places))
        return 0
    try:
        if options.rerun is not None:
            same, text = plans.rerun(options.plan, options.rerun, log=_say_with_time, **places)
            _say(text)
            return 0 if same else 1
        page = plans.reproduce(
            options.plan, workers=options.workers, minutes=options.minutes, log=_say_with_time, **places
        )
    except plans.Interrupted as stop:
        print("itemtok: stopped after checkpoints; the same command goes on", file=sys.stderr)
        return 130 if stop.signal == signal.SIGINT else STOPPED
    except plans.Failed as failure:
        _tell(f"itemtok: {failure}\n  the same command tries again")
        return 1
    _say(f"results: {page}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from llm_itemtok.bench import run

    _quiet()
    results = run.bench(options.group, log=_tell)
    _say(json.dumps([asdict(result) for result in results], indent=2) if options.json else run.details(results))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from llm_itemtok.explain import explain

    print(explain(options.setting))
    return 0


def _quiet() -> None:
    """Keep the libraries' progress bars for single files out of our own progress lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(text: object) -> None:
    print(lines(str(text)), flush=True)


def _tell(text: str) -> None:
    print(lines(text), file=sys.stderr, flush=True)


def _say_with_time(line: str) -> None:
    _say(f"{time.strftime('%H:%M:%S')}  {line}")
