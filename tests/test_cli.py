"""acmds-train as a user calls it."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

import acmds_optimizer.console
from acmds_optimizer import cli
from acmds_optimizer.config import TrainConfig, field_help, field_names, load, read_file, to_dict
from acmds_optimizer.engine.telemetry import Progress
from acmds_optimizer.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = ["--model", "small_cnn", "--dataset", "digits", "--device", "cpu", "--memory-limit-gb", "1"]
CPU += ["--target-headroom-gb", "0.2"]


def resolve(*arguments: str) -> TrainConfig:
    """The configuration that a command line leads to."""
    options = vars(cli.build_parser().parse_args(arguments))
    flags = {
        name: value
        for name, value in options.items()
        if name not in ("config", "resume", "evaluate", "dry_run", "log_file", "quiet")
    }
    return cli._resolve(options["config"], None, flags)[0]


def test_every_setting_is_a_flag_with_its_help():
    text = cli.build_parser().format_help()
    for name in field_names():
        assert f"--{name.replace('_', '-')}" in text
        assert field_help()[name], f"{name} has no text under it"


def test_the_settings_are_listed_under_headings_and_their_defaults_as_a_file_has_them():
    text = cli.build_parser().format_help()
    assert field_names()[0] in cli.SECTIONS
    at = [text.index(f"settings: {heading}:\n") for heading in cli.SECTIONS.values()]
    assert at == sorted(at)
    assert text.index("settings: curriculum:") < text.index("  --direction ") < text.index("settings: speed:")
    assert "(default: true)" in text
    assert "(default: False)" not in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--model resnet50 --dataset cifar10 --num-classes 10 --epochs 50",
            {"model": "resnet50", "dataset": "cifar10", "num_classes": 10, "epochs": 50},
        ),
        (
            "--model resnet50 --dataset cifar10 --target-headroom-gb 4.0 --min-batch-size 8 --max-batch-size 32",
            {"target_headroom_gb": 4.0, "min_batch_size": 8, "max_batch_size": 32},
        ),
        (f"--config {REPOSITORY / 'config_example.json'}", {"effective_batch_size": 256, "epochs": 50}),
        (
            f"--config {REPOSITORY / 'config_example.json'} --epochs 3 --no-enable-amp",
            {"epochs": 3, "enable_amp": False},
        ),
    ],
)
def test_the_command_lines_users_know_keep_their_meaning(line, expected):
    config = resolve(*line.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 0.5\nmin-batch-size: 7\n")
    config: TrainConfig = load(path, {"lr": "0.25"})
    assert (config.lr, config.min_batch_size, config.max_batch_size) == (0.25, 7, 64)


def test_a_best_json_is_a_configuration_file(tmp_path):
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"acmds_study": {"trial": 3}, "config": to_dict(TrainConfig(lr=0.125))}))
    assert load(path).lr == 0.125


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_none_in_a_file_is_none_where_a_setting_may_be_none_as_it_is_in_a_flag(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    settings = {"output_dir": "none", "freeze": "none", "ema-decay": "none", "num_classes": None, "lr_scaling": "none"}
    path.write_text(json.dumps(settings) if suffix == ".json" else yaml.safe_dump(settings))
    config = load(path)
    found = (config.output_dir, config.freeze, config.ema_decay, config.num_classes, config.lr_scaling)
    assert found == (None, None, None, None, "none")
    path.write_text(json.dumps({"freeze": "backbone", "max_steps": 7}))
    config = resolve("--config", str(path), "--freeze", "none", "--max-steps", "none", "--lr-scaling", "none")
    assert (config.freeze, config.max_steps, config.lr_scaling) == (None, None, "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid YAML"),
        ("- a\n- b\n", "must hold keys and values, but holds a list"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"c.yaml: 1 problem\n  {message}"):
        read_file(path)


def test_all_problems_are_reported_at_once_with_the_nearest_key(tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"min_batch_sze": 3, "pid_kp": -1, "pacing": "foo"}))
    assert cli.main(["--config", str(path), "--epochs", "many"]) == 2
    message = capsys.readouterr().err
    for part in ("4 problems", "did you mean 'min_batch_size'?", "pid_kp: -1", "pacing: 'foo'", "epochs: 'many'"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("epochs: 3", "--lr -1", "command line: 1 problem\n  lr: '-1': input should be greater than 0\n"),
        ("lr: -1", "--epochs 3", "{file}: 1 problem\n  lr: -1: input should be greater than 0\n"),
        ("lr: -1", "--lr 0.5 --epochs 0", "command line: 1 problem\n  epochs: '0': "),
        ("min_batch_size: 100", "--lr 0.5", "{file}: 1 problem\n  min_batch_size 100 is above max_batch_size 64\n"),
        ("lr: 0.5", "--min-batch-size 100", "command line: 1 problem\n  min_batch_size 100 is above"),
        ("min_batch_size: 9", "--max-batch-size 8", "{file} and command line: 1 problem\n  min_batch_size 9 is above"),
        (
            "lr: -1\nepohcs: 3",
            "--epochs 0",
            "{file} and command line: 3 problems\n"
            "  {file}: epohcs: unknown key (did you mean 'epochs'?)\n"
            "  command line: epochs: '0': input should be greater than or equal to 1\n"
            "  {file}: lr: -1: input should be greater than 0\n",
        ),
    ],
)
def test_a_wrong_value_is_told_with_the_place_where_it_was_given(text, flags, message, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert cli.main(["--config", str(path), *flags.split()]) == 2
    assert f"acmds-train: {message.replace('{file}', str(path))}" in capsys.readouterr().err


def test_a_wrong_value_of_a_resumed_run_is_told_as_the_runs(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"lr": -1}))
    assert cli.main(["--resume", str(tmp_path), "--epochs", "3"]) == 2
    assert "settings of the run: 1 problem\n  lr: -1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere", "--device", "cpu"], "no data set and no folder named 'nowhere'"),
        (["--model", "resnet5", "--dataset", "read after this", "--device", "cpu"], "did you mean resnet50"),
        (["--resume", "nowhere"], "nowhere does not exist"),
        (["--device", "tpu", "--dataset", "digits"], "use cuda, cuda:N or cpu"),
        (["--config", "nowhere.json"], "nowhere.json: 1 problem"),
        ([*CPU, "--num-classes", "3"], "num_classes"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_to_change(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--epohcs", "3"], "--epochs"),
        (["--min_batchsize=8"], "--min-batch-size"),
        (["--evalute", "best.pt"], "--evaluate"),
        (["chek", "path/to/images"], "check"),
    ],
)
def test_the_nearest_flag_or_verb_is_named(arguments, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {' '.join(arguments)} (did you mean {meant}?)" in capsys.readouterr().err


def test_a_setting_named_as_in_other_trainers_is_refused_with_its_name_here(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("learning-rate: 0.1\nbatch_size: 8\n")
    assert cli.main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "learning_rate: unknown key; it is called lr\n" in message
    assert "batch_size: unknown key; there are two: effective_batch_size" in message
    with pytest.raises(SystemExit):
        cli.main(["--batch-size=8"])
    assert "arguments: --batch-size=8; there are two: effective_batch_size" in capsys.readouterr().err


def test_half_of_what_torchrun_sets_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(CPU) == 2
    assert "WORLD_SIZE is 2, but not set are MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_prints_its_figures_on_stdout_and_says_where_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*CPU, "--max-steps", "3", "--quiet", "--log-file", "log.txt"]) == 0
    out, error = capsys.readouterr()
    assert "steps: 3" in out.splitlines()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits_small_cnn_")
    assert str(folder.relative_to(tmp_path)) in error
    assert "epoch" in (tmp_path / "log.txt").read_text()
    assert gc.get_freeze_count() > 100_000  # of PyTorch, so that collecting garbage takes no 0.2 s of the GPU's time
    gc.unfreeze()


@pytest.mark.parametrize(
    ("ceiling", "step", "limit", "policy", "said"),
    [
        (100, 256, 1.0, "hold", True),
        (100, 256, 1.0, "free", False),
        (100, 100, 1.0, "hold", False),
        (64, 256, 0.008, "hold", False),
    ],
)
def test_a_ceiling_below_what_the_memory_and_the_optimizers_batch_allow_is_told_once(
    ceiling, step, limit, policy, said, capsys, tmp_path
):
    sizes = ["--max-batch-size", str(ceiling), "--effective-batch-size", str(step), "--memory-limit-gb", str(limit)]
    sizes += ["--target-headroom-gb", "0.002", "--batch-policy", policy]
    assert cli.main([*CPU, *sizes, "--epochs", "2", "--output-dir", str(tmp_path)]) == 0
    gc.unfreeze()
    words = capsys.readouterr().err
    advice = "max_batch_size 100 keeps micro-batches from growing, though 200 would keep the headroom as well: a higher"
    assert words.count(advice) == words.count("would keep the headroom as well") == int(said)


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_shows_steps_time_left_and_all_figures(width, monkeypatch):
    terminal = Console(width=width, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(acmds_optimizer.console, "console", lambda: terminal)
    bar = cli._make_bar()
    bar.add_task(
        "training", total=600, completed=333, text="52 samples/s  batch 64  free 0.965/0.2 GB  loss 1.1521  val 33.33%"
    )
    with terminal.capture() as capture:
        terminal.print(bar)
    shown = capture.get()
    for part in ("333/600", "-:--:--", "52", "batch", "0.965/0.2", "1.1521", "33.33%"):
        assert part in shown


def test_the_display_is_drawn_once_a_second_however_often_the_training_reports(monkeypatch):
    terminal = Console(width=100, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(acmds_optimizer.console, "console", lambda: terminal)
    drawn = []
    bar = cli._make_bar()
    monkeypatch.setattr(type(bar.live), "refresh", lambda self: drawn.append(1))
    display = cli._Display(quiet=True)
    display._bar = bar
    progress = Progress(1, 100, 1, 5.0, 8, 1.0, 0.5, 0.1, None, None, 0, 1.0)
    with display:
        begun = len(drawn)
        for _ in range(1000):
            display.update(progress)
        assert len(drawn) - begun <= 1
    assert bar.live.refresh_per_second == 1


def test_runs_that_are_started_at_once_have_folders_of_their_own(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    folders = []
    for process in (17, 18):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        folders.append(cli._resolve(None, None, {"dataset": "my/images"})[1])
    assert folders[0].name == "images_resnet50_20260101-000000-17"
    assert folders[1] != folders[0]


def test_names_of_folders_and_files_need_not_be_text(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/\xff"
    for name in (b"a", b"b"):
        os.makedirs(os.path.join(folder, name))  # noqa: PTH103, PTH118  # pathlib takes no bytes
        for number in range(4):
            with open(os.path.join(folder, name, b"%d\xff.png" % number), "wb") as file:  # noqa: PTH118, PTH123
                Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(file, "png")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | bytes) -> tuple[int, bytes, bytes]:
        """Exit code, stdout and stderr where stdout takes nothing but text; stderr takes all, as Python opens it."""
        kinds = {"stdout": "strict", "stderr": "backslashreplace"}
        streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for name, errors in kinds.items()}
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            code = cli.main([os.fsdecode(argument) for argument in arguments])
        for stream in streams.values():
            stream.flush()
        return code, streams["stdout"].buffer.getvalue(), streams["stderr"].buffer.getvalue()

    flags: list[str | bytes] = [*CPU, "--epochs", "1", "--output-dir", b"run\xfe", "--log-file", "log"]
    code, _, error = run(*flags, "--dataset", folder)
    assert (code, b"Logging error" in error) == (0, False), error.decode(errors="replace")
    assert "6 images to train on" in (tmp_path / "log").read_text(encoding="utf-8")
    page = tmp_path / os.fsdecode(b"run\xfe") / "run.html"
    assert not page.exists() or "\\udcff" in page.read_text(encoding="utf-8")
    broken = folder + b"/a/0\xff.png"
    with open(broken, "wb"):  # noqa: PTH123
        pass
    code, out, _ = run("check", folder)
    assert (code, out.partition(b": ")[0]) == (1, broken)


@pytest.mark.parametrize(
    ("closed", "shown"),
    [(">&-", ("", "done\n")), ("2>&-", ("figures\n", "")), (">&- 2>&-", ("", "")), ("<&- >&-", ("", "done\n"))],
)
def test_a_command_whose_output_is_closed_works_and_writes_nothing_elsewhere(closed, shown, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom acmds_optimizer.closed_pipe import ends_with_its_reader\n"
        "@ends_with_its_reader\ndef main():\n    print('figures')\n    print('done', file=sys.stderr)\n    return 0\n"
        "sys.exit(main())\n"
    )
    command = ["sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, *shown)
