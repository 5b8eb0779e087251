"""acmds-tune: search the settings of the trainer, report what was found, check the machine."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmds_optimizer import __version__
from acmds_optimizer.closed_pipe import ends_with_its_reader
from acmds_optimizer.config import nearest
from acmds_optimizer.errors import ACMDSError, ConfigError
from acmds_tune.journal import is_unbegun, make_room
from acmds_tune.space import Space
from acmds_tune.space_load import load, load_again

if TYPE_CHECKING:
    from acmds_tune.search import SearchResult

_DIRECTORY: tuple[str, dict[str, Any]] = (
    "directory",
    {"type": Path, "metavar": "DIR", "help": "folder of the study, such as results/quickstart"},
)
_SET: tuple[str, dict[str, Any]] = (
    "--set",
    {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "a fixed setting, whatever the file says; repeatable",
    },
)

EPILOG = """examples:
  acmds-tune search search_spaces/quickstart.yaml
  acmds-tune resume results/quickstart
  acmds-tune extend results/quickstart --trials +20
  acmds-tune status results/quickstart
  acmds-train --config results/quickstart/best.json"""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""A full disk, or one that may only be read: for the user to mend."""

INTERRUPTED_EXIT = 130
"""What a shell expects of a program that Ctrl-C ended."""


@ends_with_its_reader
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0; 1 where it failed; 2 for wrong usage; 130 after Ctrl-C."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0].lstrip("-").partition("=")[0], list(vars(arguments)))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    logging.basicConfig(level=logging.WARNING, format="acmds-tune: %(message)s", stream=sys.stderr)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C; a search that runs has its own
    try:
        return int(arguments.run(arguments))
    except ACMDSError as error:
        print(f"acmds-tune: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename or 'the study'}: cannot be written: {error.strerror}"
        print(f"acmds-tune: {what}; nothing that was written before is lost", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("acmds-tune: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acmds-tune",
        description="Search the settings of the trainer, report what was found, check the machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = commands.add_parser(
        "search",
        help="run a search from a search-space file",
        description="Run a search from a search-space file (docs/search_spaces.md) and write everything to a folder.",
    )
    search.add_argument(
        "file", type=Path, metavar="FILE.yaml", help="what to search, such as search_spaces/quickstart.yaml"
    )
    search.add_argument(
        "--name", help="name of the study, and of its folder; else the file says it, or its own name is it"
    )
    search.add_argument(
        "--results-dir", type=Path, metavar="DIR", default=Path("results"), help="where studies are kept (%(default)s)"
    )
    search.add_argument("--resume", action="store_true", help="go on with the study if it exists")
    search.add_argument("--trials", type=int, metavar="N", help="how many trials, whatever the file says")
    search.add_argument(_SET[0], **_SET[1])
    _add_backend(search)
    search.set_defaults(run=_search)

    resume = commands.add_parser(
        "resume",
        help="go on with a search that was ended",
        description="Go on with the search in a folder, with what its sampler knows.",
    )
    resume.add_argument(_DIRECTORY[0], **_DIRECTORY[1])
    resume.add_argument("--trials", type=int, metavar="N", help="how many trials in all, whatever the study says")
    _add_backend(resume)
    resume.set_defaults(run=_resume)

    extend = commands.add_parser(
        "extend",
        help="run more trials in a study",
        description="Run more trials in a study that has run all it was asked for, with what its sampler knows.",
    )
    extend.add_argument(_DIRECTORY[0], **_DIRECTORY[1])
    extend.add_argument("--trials", required=True, metavar="+N", help="how many more, such as +20; N: how many in all")
    _add_backend(extend)
    extend.set_defaults(run=_extend)

    report = commands.add_parser(
        "report",
        help="write the tables, best.json and report.html again",
        description="Write trials.csv, events.csv, best.json and report.html again, from the study's journal.",
    )
    report.add_argument(_DIRECTORY[0], **_DIRECTORY[1])
    report.set_defaults(run=_report)

    best = commands.add_parser(
        "best",
        help="show the best settings found",
        description="Print the path of best.json and the searched settings in it.",
    )
    best.add_argument(_DIRECTORY[0], **_DIRECTORY[1])
    best.set_defaults(run=_best)

    _add_looks(commands)

    doctor = commands.add_parser(
        "doctor",
        help="check the machine and the installation",
        description="Check packages, CUDA, a training run, the journal and Ray. Exit code 1 if something fails.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_looks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that start no trial; acmds_tune.commands has them."""
    looks: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
        "status": ("say how far a study is, and what is best so far", [_DIRECTORY]),
        "show": (
            "print the trials of a study, or one of them",
            [_DIRECTORY, ("trial", {"type": int, "nargs": "?", "metavar": "TRIAL", "help": "number of one trial"})],
        ),
        "compare": (
            "print the best of two studies beside each other",
            [("one", _DIRECTORY[1]), ("other", _DIRECTORY[1])],
        ),
        "import": (
            "make the trials of another study known to this one",
            [_DIRECTORY, ("source", {"type": Path, "metavar": "FROM", "help": "folder of the other study"})],
        ),
        "dashboard": (
            "serve optuna-dashboard for a study",
            [_DIRECTORY, ("--port", {"type": int, "default": 8080, "help": "of the page (%(default)s)"})],
        ),
        "validate": (
            "check a search-space file",
            [("file", {"type": Path, "metavar": "FILE.yaml", "help": "what to check"}), _SET],
        ),
        "schema": ("print the JSON schema of search-space files, for editors", []),
    }
    for name, (what, arguments) in looks.items():
        command = commands.add_parser(name, help=what, description=f"{what[:1].upper()}{what[1:]}.")
        for argument, options in arguments:
            command.add_argument(argument, **options)
        command.set_defaults(run=_look, look=name)


def _look(arguments: argparse.Namespace) -> int:
    from acmds_tune import commands  # imports pydantic's schemas and plots' helpers

    values = {name: value for name, value in vars(arguments).items() if name not in ("run", "look")}
    if "set" in values:
        values["fixed"] = dict(_pair(text) for text in values.pop("set"))
    function = {"import": "import_study"}.get(arguments.look, arguments.look)
    return int(getattr(commands, function)(**values))


def _add_backend(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--backend",
        choices=("ray", "local"),
        default="ray",
        help="who starts the trials: Ray, or this process itself, which starts sooner (%(default)s)",
    )
    command.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="join this Ray cluster (auto, or host:6379); its machines must share the study's folder",
    )


def _search(arguments: argparse.Namespace) -> int:
    fixed = dict(_pair(text) for text in arguments.set)
    overrides = {"name": arguments.name, "trials": arguments.trials}
    elsewhere = arguments.ray_address is not None

    def checked(resumed: bool) -> Space:
        return load(arguments.file, overrides=overrides, fixed=fixed, resumed=resumed, elsewhere=elsewhere)

    space = checked(arguments.resume)
    directory = arguments.results_dir / space.name
    if arguments.resume and not _has_begun(directory):  # only the file knows which folder it is
        space = checked(False)
    yaml_text = arguments.file.read_text(encoding="utf-8")
    return _run(arguments, space, directory, yaml_text, fixed, resume=arguments.resume)


def _has_begun(directory: Path) -> bool:
    return directory.exists() and not is_unbegun(directory)


def _resume(arguments: argparse.Namespace) -> int:
    return _go_on(arguments, lambda asked, _: asked if arguments.trials is None else arguments.trials)


def _extend(arguments: argparse.Namespace) -> int:
    text = arguments.trials
    if not text.removeprefix("+").isdecimal() or int(text) == 0:
        raise ConfigError("command line", [f"--trials {text}: write +20 for 20 more, or 50 for 50 in all"])

    def wanted(asked: int, had: int) -> int:
        before = max(asked, had)  # fewer may have been asked for since
        if not text.startswith("+") and int(text) <= before:
            raise ConfigError("command line", [f"--trials {text}: the study has {before} already; write +{text}?"])
        return before + int(text) if text.startswith("+") else int(text)

    return _go_on(arguments, wanted)


def _go_on(arguments: argparse.Namespace, trials: Callable[[int, int], int]) -> int:
    """Resume a study; `trials` makes the number that it is to have from the one that it was to have and has now."""
    from acmds_tune.report import record
    from acmds_tune.storage import about_of, open_study  # imports Optuna

    opened = open_study(arguments.directory)
    about, study = about_of(opened, arguments.directory), record(opened, arguments.directory)
    stage = "train" if study.of_stages(("screen",)) else "search"  # what `trials` counts
    had = sum(row.status != "running" and not row.interrupted for row in study.of_stages((stage,)))
    space = load_again(arguments.directory, about, trials(about["space"]["trials"], had))
    text = (arguments.directory / "study.yaml").read_text(encoding="utf-8")
    return _run(arguments, space, arguments.directory, text, about["set"], resume=True)


def _run(
    arguments: argparse.Namespace,
    space: Space,
    directory: Path,
    yaml_text: str,
    fixed: dict[str, str],
    *,
    resume: bool,
) -> int:
    if arguments.backend == "local" and arguments.ray_address:
        raise ConfigError("command line", ["--ray-address: does not go with --backend local"])
    resume = resume and _has_begun(directory)
    if not resume:  # before Optuna and Ray are even imported
        make_room(directory)
    from acmds_tune.search import run_search

    where = {"backend": arguments.backend, "ray_address": arguments.ray_address}
    result = run_search(space, directory, yaml_text, fixed=fixed, resume=resume, **where)
    return _conclude(result, directory)


def _conclude(result: SearchResult, directory: Path) -> int:
    """Say what came out. The path of best.json goes to stdout."""
    if result.ending:
        left = "1 trial is" if result.missing == 1 else f"{result.missing} trials are"
        print(f"acmds-tune: {result.ending}; {left} left. Go on with: acmds-tune resume {directory}", file=sys.stderr)
        if result.best is None and not result.interrupted:
            hint = "if it is the search-space file that has to change, search with it under another --name"
            print(f"  {hint}", file=sys.stderr)
    if result.best is not None:
        figures = {name: value for name, value in result.best.figures.items() if value is not None}
        shown = ("samples_per_second", "val_loss", "val_accuracy", "headroom_min_gb", "batch_size_mean")
        text = ", ".join(f"{name} {figures[name]:.4g}" for name in shown if name in figures)
        print(f"best: trial {result.best.number}: {text}", file=sys.stderr)
        if result.confirmed:
            print(f"  confirmed: {result.confirmed}", file=sys.stderr)
        for label, ratio in result.compared.items():
            print(f"  {ratio:.3f} times {label}", file=sys.stderr)
    print(f"report: {directory / 'report.html'}", file=sys.stderr)
    if result.best is not None:
        print(f"train with it: acmds-train --config {directory / 'best.json'}", file=sys.stderr)
        print(directory / "best.json")
    if result.interrupted:
        return INTERRUPTED_EXIT
    return 0 if result.best is not None else 1


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("command line", [f"--set {text}: write KEY=VALUE"])
    return key, value


def _report(arguments: argparse.Namespace) -> int:
    from acmds_tune.report import write_all  # imports Optuna and plotly

    best = write_all(arguments.directory)
    print(arguments.directory / "report.html")
    return 0 if best is not None else 1


def _best(arguments: argparse.Namespace) -> int:
    from acmds_tune.report import load_study  # imports Optuna

    study, path = load_study(arguments.directory), arguments.directory / "best.json"
    if not path.is_file():
        raise ConfigError(str(arguments.directory), ["has no best.json: no trial was feasible, or none has ended yet"])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trial, config = content["acmds_study"]["trial"], dict(content["config"])
    except (ValueError, KeyError, TypeError):
        what = f"is not what was written there; acmds-tune report {arguments.directory} writes it again"
        raise ConfigError(str(path), [what]) from None
    print(path)
    print(f"trial: {trial}")
    for name in study.searched:
        print(f"{name}: {json.dumps(config.get(name))}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from acmds_tune.doctor import examine

    return examine()


if __name__ == "__main__":
    sys.exit(main())
