"""acmds-train: one training run from flags, a configuration file, or both."""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import logging
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from acmds_optimizer import __version__
from acmds_optimizer.closed_pipe import ends_with_its_reader
from acmds_optimizer.config import TrainConfig, field_help, field_types, hint, load, read_file
from acmds_optimizer.errors import ACMDSError, ConfigError
from acmds_optimizer.zoo.names import check_dataset, check_model

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from acmds_optimizer.engine.telemetry import Progress

EPILOG = """examples:
  acmds-train --model resnet50 --dataset cifar10 --num-classes 10 --epochs 50
  acmds-train --config results/quickstart/best.json --epochs 20
  acmds-train --model resnet50 --dataset path/to/images --target-headroom-gb 4 --min-batch-size 8 --max-batch-size 32
  acmds-train --model resnet50 --dataset cifar10 --dry-run
  acmds-train --resume runs/my_run
  acmds-train --evaluate runs/my_run/best.pt
  acmds-train check path/to/images
  acmds-train plot runs/my_run
  acmds-train export runs/my_run/best.pt my_model.safetensors

Flags override the file, the file overrides the defaults; `none` takes back what may be none. GB are 2**30 bytes."""


SECTIONS = {
    "target_headroom_gb": "memory",
    "pid_kp": "PID that trims what the memory model says",
    "direction": "curriculum",
    "enable_amp": "speed",
    "seed": "seed and model",
    "dataset": "data and augmentation",
    "device": "how long, and where",
    "optimizer": "optimizer and learning rate",
    "output_dir": "what is kept",
}
"""Headings of the settings in `--help`, by the first setting under each."""


def build_parser() -> argparse.ArgumentParser:
    """One flag a setting, made from TrainConfig, beside the few that are about the command itself."""
    parser = argparse.ArgumentParser(
        prog="acmds-train",
        usage="acmds-train [--config FILE] [--resume RUN | --evaluate CKPT | --dry-run] [SETTING ...]\n"
        "       acmds-train {check,export,plot} -h",  # a list of all settings would fill the screen
        description="Train an image classifier with a held memory headroom.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="settings in JSON or YAML, such as a best.json of acmds-tune")
    parser.add_argument(
        "--resume", metavar="RUN", help="continue a run: its folder or checkpoint; settings are the run's unless given"
    )
    parser.add_argument(
        "--evaluate", metavar="CKPT", help="only validate a checkpoint's weights; settings are its run's unless given"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what the model needs, and what batch would fit; without a GPU",
    )
    parser.add_argument("--log-file", metavar="FILE", help="also write the log to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress display; warnings only")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    defaults, kinds = TrainConfig(), field_types()
    for name, text in field_help().items():
        if name in SECTIONS:
            settings = parser.add_argument_group(f"settings: {SECTIONS[name]}")
        default = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        help_text = f"{text} (default: {_shown(default)})".replace("%", "%%")
        kind: dict[str, Any] = {"metavar": _metavar(kinds[name])}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif bool in get_args(kinds[name]):
            words = "true,false," + ",".join(get_args(get_args(kinds[name])[-1]))
            kind = {"nargs": "?", "const": True, "metavar": "{" + words + "}"}
            settings.add_argument(
                "--no-" + name.replace("_", "-"),
                dest=name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        settings.add_argument(flag, default=argparse.SUPPRESS, help=help_text, **kind)
    return parser


def _metavar(kind: Any) -> str:
    """What a value looks like: the choices, N for a whole number, X for any number."""
    members = [m for m in get_args(kind) if m is not type(None)] or [kind]
    if all(isinstance(member, str) for member in members):
        return "{" + ",".join(members) + "}"
    base = get_args(members[0])[0] if get_origin(members[0]) is Annotated else members[0]
    return {int: "N", float: "X"}.get(base, "TEXT")


@ends_with_its_reader
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a run that failed, 2 for wrong usage, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name need not be text: it is printed byte by byte
    try:
        return VERBS[argv[0]](argv[1:]) if argv and argv[0] in VERBS else _train_or_evaluate(argv)
    except ACMDSError as error:
        print(f"acmds-train: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if not str(error).startswith("CUDA is not available"):
            raise
        print(f"acmds-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("acmds-train: interrupted", file=sys.stderr)
        return 130


def _train_or_evaluate(argv: Sequence[str]) -> int:
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}{_nearest(unknown[0], [*vars(parsed), *field_types()])}"
        )
    options = vars(parsed)
    own = {name: options.pop(name) for name in ("config", "resume", "evaluate", "dry_run", "log_file", "quiet")}
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun's
        if own["dry_run"] or own["evaluate"]:
            raise ConfigError("torchrun", ["--evaluate and --dry-run are for one process; start acmds-train by itself"])
        own["quiet"] |= os.environ.get("RANK") != "0"
    if own["evaluate"] and (own["resume"] or own["dry_run"]):
        what = "--evaluate does not train, so it can neither --resume nor be a --dry-run"
        raise ConfigError("command line", [what])
    _set_up_logging(own["log_file"], quiet=own["quiet"])
    if own["dry_run"]:
        return _dry_run(own, options)
    return _evaluate(own, options) if own["evaluate"] else _train(own, options)


def _nearest(word: str, names: list[str]) -> str:
    """` (did you mean --x?)` for the closest flag or verb, or what others' flag is called here, or nothing."""
    if said := hint(word.partition("=")[0].lstrip("-"), []):
        return said
    flags = ["--" + name.replace("_", "-") for name in names]
    matches = difflib.get_close_matches(word.partition("=")[0], [*flags, *VERBS], n=1, cutoff=0.7)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _evaluate(own: dict[str, Any], flags: dict[str, Any]) -> int:
    from acmds_optimizer.engine import checkpoint
    from acmds_optimizer.engine.run import evaluate_checkpoint

    state = checkpoint.load(own["evaluate"])
    config = load(own["config"], flags, state["config"])
    for name, value in evaluate_checkpoint(state, config).items():
        print(f"{name}: {value}")
    return 0


def _dry_run(own: dict[str, Any], flags: dict[str, Any]) -> int:
    config, _ = _resolve(own["config"], Path(own["resume"]) if own["resume"] else None, flags)
    _check_names(config)
    from acmds_optimizer.engine.run import dry_run

    print("\n".join(dry_run(config)))
    return 0


def _export(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="acmds-train export", description="Write a checkpoint's weights as safetensors, for use elsewhere."
    )
    parser.add_argument("checkpoint", help="a checkpoint such as runs/my_run/best.pt, or the folder of a run")
    parser.add_argument("file", help="the file to write; must not exist")
    options = parser.parse_args(argv)
    from acmds_optimizer.engine.checkpoint import export_weights

    for name, value in export_weights(Path(options.checkpoint), Path(options.file)).items():
        print(f"{name}: {value}")
    return 0


def _plot(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="acmds-train plot", description="Draw a run, finished or not: run.png and run.html in its folder."
    )
    parser.add_argument("run", help="the folder of a run")
    options = parser.parse_args(argv)
    from acmds_optimizer.pictures import draw_run

    for path in draw_run(Path(options.run)):
        print(path)
    return 0


def _check(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="acmds-train check", description="Read every image of a folder and list those that are corrupt."
    )
    parser.add_argument("folder", help="a folder of images as --dataset takes it")
    options = parser.parse_args(argv)
    from acmds_optimizer.zoo.folders import corrupt_images, read_folder

    parts = [part for part in read_folder(Path(options.folder), 0.0) if part is not None]
    corrupt = [found for part in parts for found in corrupt_images(part)]
    for path, said in corrupt:
        print(f"{path}: {said}")
    for part in parts:
        counts = {name: int((part.targets == number).sum()) for number, name in enumerate(part.classes)}
        sizes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
        print(f"acmds-train: {len(part)} images in {part.root}: {sizes}", file=sys.stderr)
    print(f"acmds-train: {len(corrupt)} of them cannot be read", file=sys.stderr)
    return 1 if corrupt else 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {"check": _check, "export": _export, "plot": _plot}
"""What `acmds-train` does beside training, by its first word."""


def _train(own: dict[str, Any], flags: dict[str, Any]) -> int:
    resume = Path(own["resume"]) if own["resume"] else None
    config, output_dir = _resolve(own["config"], resume, flags)
    _check_names(config)
    from acmds_optimizer.engine.checkpoint import NEWEST  # torch loads here, after --help and typos
    from acmds_optimizer.engine.distributed import joined
    from acmds_optimizer.engine.run import run_training

    gc.freeze()  # PyTorch's 400,000 objects, through which each collection would look for 0.2 s while the GPU waits
    stop = _StopOnSignal()
    with joined(config.device) as ranks, _Display(quiet=own["quiet"]) as display, stop:
        output_dir = ranks.of_first(output_dir)  # its name may be the time of the start
        outcome = run_training(
            config,
            output_dir=output_dir,
            resume=resume,
            on_progress=display.update if ranks.first else None,
            should_stop=lambda: stop.asked,
            ranks=ranks,
        )
    if not ranks.first:
        return 130 if stop.asked and outcome.stopped_early else 0
    from acmds_optimizer.engine.telemetry import to_plain

    for name, value in to_plain(outcome).items():
        print(f"{name}: {_shown(value)}")
    _draw_if_possible(output_dir)
    if stop.asked and outcome.stopped_early:
        kept = f"; continue with: acmds-train --resume {output_dir}" if (output_dir / NEWEST).exists() else ""
        print(f"acmds-train: interrupted after step {outcome.steps}{kept}", file=sys.stderr)
        return 130
    kept = "records and checkpoint are" if (output_dir / NEWEST).exists() else "the records are"
    print(f"acmds-train: done; {kept} in {output_dir}", file=sys.stderr)
    return 0


def _draw_if_possible(output_dir: Path) -> None:
    """The pictures of a run that has ended: what they need is optional, and their failure is not the run's."""
    from acmds_optimizer.pictures import draw_run

    try:
        draw_run(output_dir)
    except ACMDSError as error:
        logging.getLogger(__name__).info("no pictures: %s", " ".join(str(error).split()))


def _shown(value: Any) -> str:
    """As a file of settings has it; outcome.json has all digits."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _resolve(config_file: str | None, resume: Path | None, flags: dict[str, Any]) -> tuple[TrainConfig, Path]:
    """The configuration and the output folder, from the resumed run, the file and the flags, in rising order."""
    base: dict[str, Any] = {}
    if resume is not None:
        if not resume.exists():
            raise ConfigError("--resume", [f"{resume} does not exist; give the folder of a run, or its checkpoint"])
        folder = resume if resume.is_dir() else resume.parent
        if not (folder / "config.json").is_file():
            raise ConfigError("--resume", [f"{folder} holds no config.json, so it is not the folder of a run"])
        base = read_file(folder / "config.json")
        flags = {"output_dir": str(folder), **flags}
    config = load(config_file, flags, base)
    if config.output_dir is not None:
        return config, Path(config.output_dir)
    name = f"{Path(config.dataset).name}_{config.model}".replace(":", "-").replace("/", "-")
    # the process too, since several runs may be started at once, each on a GPU of its own
    return config, Path("runs") / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _check_names(config: TrainConfig) -> None:
    """A misspelt name is told before PyTorch is imported."""
    check_model(config.model)
    check_dataset(config.dataset)


class _StopOnSignal:
    """The first Ctrl-C or SIGTERM asks the run to stop at the next step; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        logging.getLogger(__name__).warning("stopping after this step; press Ctrl-C again to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Display:
    """Progress on stderr: a live bar on a terminal, a line every ten seconds elsewhere."""

    _LINE_S = 10.0

    def __init__(self, *, quiet: bool) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._lines = not quiet and not sys.stderr.isatty()
        self._last_line = time.monotonic()
        if not quiet and not self._lines:
            self._bar = _make_bar()

    def __enter__(self) -> _Display:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=None, text="starting")
        return self

    def update(self, progress: Progress) -> None:
        text = describe(progress)
        if self._bar is not None and self._task is not None:
            total = max(progress.total_steps, progress.step) or None
            self._bar.update(self._task, completed=progress.step, total=total, text=text)
        elif self._lines and time.monotonic() - self._last_line >= self._LINE_S:
            self._last_line = time.monotonic()
            logging.getLogger(__name__).info("step %d of %d: %s", progress.step, progress.total_steps, text)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    from acmds_optimizer.console import console

    columns = (
        BarColumn(bar_width=10, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=False)),  # only the text gives way: to more lines
    )
    # to draw it takes the interpreter a millisecond, in which no step is launched
    return Progress(*columns, console=console(), transient=True, refresh_per_second=1)


def describe(progress: Progress) -> str:
    """One line: speed, micro-batch, free memory against the target, loss, validation, errors."""
    words = [
        f"{progress.samples_per_second or 0:,.0f} samples/s",
        f"batch {progress.batch_size}",
        f"free {progress.free_gb:.3g}/{progress.target_headroom_gb:.3g} GB",
    ]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.4f}")
    if progress.val_accuracy is not None:
        words.append(f"val {progress.val_accuracy:.2%}")
    if progress.oom_events:
        words.append(f"{progress.oom_events} OOM recovered")
    return "  ".join(words)


def _set_up_logging(log_file: str | None, *, quiet: bool) -> None:
    level = logging.WARNING if quiet else logging.INFO
    handlers: list[logging.Handler] = []
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        from acmds_optimizer.console import console

        handlers.append(RichHandler(console=console(), show_path=False, log_time_format="%H:%M:%S"))
        handlers[0].setFormatter(logging.Formatter("%(message)s"))  # time and level have columns of their own
    else:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    handlers[0].setLevel(level)
    if log_file:
        try:
            handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            print(f"acmds-train: --log-file: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


if __name__ == "__main__":
    sys.exit(main())
