"""The command acmds-tune: exit codes, messages, and what goes to stdout."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from acmds_optimizer.closed_pipe import EXIT, ends_with_its_reader
from acmds_optimizer.config import TrainConfig
from acmds_optimizer.config import load as load_config
from acmds_tune import doctor, search
from acmds_tune.cli import INTERRUPTED_EXIT, main
from acmds_tune.doctor import Finding
from acmds_tune.journal import hold
from acmds_tune.objective import Ended
from acmds_tune.search import SearchResult
from acmds_tune.space import Space
from acmds_tune.space_load import load
from acmds_tune.space_yaml import read
from acmds_tune.study import SearchStudy
from tests.fake_objectives import figures

TEXT = """
trials: 2
fixed: {device: cpu, dataset: digits, model: small_cnn}
search:
  lr: {low: 0.0001, high: 0.1, log: true}
"""


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def study(tmp_path: Path, space_file: Path) -> Path:
    """A study of two trials, the second infeasible, without the files that a report makes."""
    directory = tmp_path / "results" / "mine"
    made = SearchStudy.create(directory, load(space_file), TEXT, {})
    for oom_events in (0, 2):
        made.finish(made.propose().number, Ended("ok", "finished", figures(oom_events=oom_events), 1.0))
    made.close()
    return directory


def test_a_file_with_problems_is_wrong_usage_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("trails: 3\n", encoding="utf-8")
    assert main(["search", str(path)]) == 2
    output, messages = capsys.readouterr()
    assert output == ""
    assert messages == (f"acmds-tune: {path}: 1 problem\n  line 1: trails: unknown key (did you mean 'trials'?)\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{file}", "--set", "lr"], "--set lr: write KEY=VALUE"),
        (["search", "{file}", "--set", "modle=x"], "--set modle: the trainer has no such setting"),
        (["search", "{file}", "--trials", "0"], "trials: 0: input should be greater than or equal to 1"),
        (["search", "none.yaml"], "does not exist"),
        (["resume", "nowhere"], "is not the folder of a study"),
        (["extend", "nowhere", "--trials", "+2"], "is not the folder of a study"),
        (["extend", "nowhere", "--trials", "+0"], "--trials +0: write +20 for 20 more, or 50 for 50 in all"),
        (["search", "{file}", "--backend", "local", "--ray-address", "auto"], "does not go with --backend local"),
        (["report", "nowhere"], "is not the folder of a study"),
        (["best", "nowhere"], "is not the folder of a study"),
    ],
)
def test_wrong_usage_is_explained_and_has_exit_code_2(
    space_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([text.replace("{file}", str(space_file)) for text in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"), [(["--trails", "3"], " (did you mean 'trials'?)"), (["--zzz"], ""), (["a", "b"], "")]
)
def test_the_nearest_flag_is_named(
    arguments: list[str], hint: str, space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["search", str(space_file), *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {' '.join(arguments)}{hint}\n")


def test_a_results_folder_that_cannot_be_made_is_said_before_anything_starts(
    space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(space_file), "--results-dir", str(space_file)]) == 2
    messages = capsys.readouterr().err
    assert messages.startswith(f"acmds-tune: {space_file / 'mine'}: 1 problem\n  cannot be made: ")


def test_an_existing_study_is_refused_before_anything_starts(
    study: Path, space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(space_file), "--results-dir", str(study.parent)]) == 2
    assert "add --resume to go on with it, or give another one with --name" in capsys.readouterr().err


def test_report_makes_every_file_again_and_prints_the_page(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(study)]) == 0
    assert capsys.readouterr().out == f"{study / 'report.html'}\n"
    for name in ("trials.csv", "events.csv", "best.json", "report.html"):
        assert (study / name).is_file()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_study_that_cannot_be_written_is_said_without_a_traceback(
    number: int, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    assert main(["report", str(study)]) == 1
    said = capsys.readouterr().err
    why = f"cannot be written: {os.strerror(number)}; nothing that was written before is lost"
    assert said == f"acmds-tune: {study / 'trials.csv'}: {why}\n"


def test_best_prints_the_path_and_the_searched_settings_to_stdout(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(study)])
    capsys.readouterr()
    assert main(["best", str(study)]) == 0
    assert capsys.readouterr().out == f"{study / 'best.json'}\ntrial: 0\nlr: 0.001\n"


@pytest.mark.parametrize("content", ['{"acmds_study": {', "[]", "{}"])
def test_a_best_json_that_was_damaged_is_named_with_how_to_make_it_again(
    study: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    main(["report", str(study)])
    (study / "best.json").write_text(content, encoding="utf-8")
    assert main(["best", str(study)]) == 2
    assert f"acmds-tune report {study} writes it again" in capsys.readouterr().err


def test_a_study_is_extended_by_more_trials_and_never_by_fewer(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_search(space: Space, directory: Path, *_: Any, **options: Any) -> SearchResult:
        asked.append((space.trials, options["resume"], options["backend"]))
        return SearchResult(directory, None, "", 0)

    monkeypatch.setattr(search, "run_search", run_search)
    main(["extend", str(study), "--trials", "+20", "--backend", "local"])
    main(["extend", str(study), "--trials", "7"])
    assert asked == [(22, True, "local"), (7, True, "ray")]
    assert main(["extend", str(study), "--trials", "2"]) == 2
    assert "the study has 2 already; write +2?" in capsys.readouterr().err
    assert main(["extend", str(study), "--trials", "+²"]) == 2
    assert "write +20 for 20 more" in capsys.readouterr().err
    assert main(["resume", str(study), "--trials", "0"]) == 2
    assert "trials: 0: input should be greater than or equal to 1" in capsys.readouterr().err


@pytest.mark.parametrize("screen", ["", "screen: {trials: 6}\n"])
def test_a_study_is_extended_from_what_it_has_where_that_is_more_than_it_was_asked_for_last(
    tmp_path: Path, screen: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT.replace("trials: 2", "trials: 4") + f"{screen}anchor_every: 2\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    made = SearchStudy.create(tmp_path / "mine", load(tmp_path / "mine.yaml"), text, {})
    interrupted = made.propose()  # it does not count
    made.finish(interrupted.number, Ended("stopped", "the search was interrupted"), interrupted=True)
    while made.missing:
        made.finish(made.propose().number, Ended("ok", "finished", figures(), 1.0))
    made.close()
    fewer = load(tmp_path / "mine.yaml", overrides={"trials": 2}, resumed=True)
    SearchStudy.resume(tmp_path / "mine", fewer).close()  # as `resume --trials 2` does
    asked = []

    def run_search(space: Space, directory: Path, *_: Any, **__: Any) -> SearchResult:
        asked.append(space.trials)
        return SearchResult(directory, None, "", 0)

    monkeypatch.setattr(search, "run_search", run_search)
    main(["extend", str(tmp_path / "mine"), "--trials", "+1"])
    main(["extend", str(tmp_path / "mine"), "--trials", "6"])
    main(["resume", str(tmp_path / "mine")])
    assert asked == [5, 6, 2]
    assert main(["extend", str(tmp_path / "mine"), "--trials", "3"]) == 2
    assert "the study has 4 already; write +3?" in capsys.readouterr().err


@pytest.mark.parametrize("unbegun", [False, True])
def test_names_are_checked_also_with_resume_while_there_is_no_study_to_go_on_with(
    tmp_path: Path, unbegun: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "run_search", lambda *_, **__: pytest.fail("it was started"))
    path = tmp_path / "other.yaml"
    path.write_text(TEXT.replace("small_cnn", "smal_cnn") + "name: mine\n", encoding="utf-8")
    if unbegun:  # by a search that was killed
        (tmp_path / "results" / "mine").mkdir(parents=True)
        (tmp_path / "results" / "mine" / ".lock").touch()
    arguments = ["search", str(path), "--resume", "--results-dir", str(tmp_path / "results")]
    assert main(arguments) == 2
    assert main([*arguments, "--name", "another"]) == 2
    assert capsys.readouterr().err.count("fixed.model: no model named 'smal_cnn'") == 2


def test_a_study_that_has_begun_is_gone_on_with_by_its_file_whatever_has_become_of_its_data(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, bool]] = []

    def run_search(space: Space, directory: Path, *_: Any, **options: Any) -> SearchResult:
        asked.append((directory, options["resume"]))
        return SearchResult(directory, None, "", 0)

    monkeypatch.setattr(search, "run_search", run_search)
    text = TEXT.replace("digits", "gone/data") + f"warm_start: ['{tmp_path / 'gone'}']\n"
    (tmp_path / "other.yaml").write_text(text, encoding="utf-8")
    arguments = ["search", str(tmp_path / "other.yaml"), "--resume", "--results-dir", str(study.parent)]
    assert main([*arguments, "--name", "mine"]) == 1
    assert asked == [(study, True)]


def test_a_study_is_extended_from_its_journal_alone(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (study / "study.yaml").unlink()
    asked: list[int] = []

    def run_search(space: Space, *_: Any, **__: Any) -> SearchResult:
        asked.append(space.trials)
        return SearchResult(study, None, "", 0)

    monkeypatch.setattr(search, "run_search", run_search)
    main(["extend", str(study), "--trials", "+1"])
    assert asked == [3]
    assert (study / "study.yaml").read_text(encoding="utf-8") == TEXT


def test_sigterm_before_the_first_trial_is_said_like_ctrl_c(study: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from acmds_tune import search\n"
        "from acmds_tune.cli import main\n"
        "search.run_search = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(main(['resume', {str(study)!r}]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (INTERRUPTED_EXIT, "acmds-tune: interrupted\n")


def test_a_changed_copy_of_the_file_in_the_study_is_refused_with_the_difference(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "study.yaml").write_text(TEXT.replace("high: 0.1", "high: 0.3"), encoding="utf-8")
    assert main(["resume", str(study)]) == 2
    assert "search.lr.high: 0.1 in the study, 0.3 now" in capsys.readouterr().err


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """A study with a baseline, an anchor and a confirmation: faster towards lr 0.01, the halving at 500."""
    text = TEXT.replace("trials: 2", "trials: 3")
    text += "baselines: [default, halving]\nconfirm: {top: 1, seeds: 2}\nanchor_every: 2\n"
    (tmp_path / "compared.yaml").write_text(text, encoding="utf-8")
    made = SearchStudy.create(tmp_path / "results" / "compared", load(tmp_path / "compared.yaml"), text, {})
    while made.missing:
        proposal = made.propose()
        measured = figures(proposal.settings["lr"])
        if proposal.label == "halving":
            measured["samples_per_second"] = 500.0
        made.finish(proposal.number, Ended("ok", "finished", measured, 1.0))
    made.close()
    return made.directory


def test_status_says_how_far_a_study_is_and_what_is_best(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (compared / ".lock").unlink()
    assert main(["status", str(compared)]) == 0
    assert not (compared / ".lock").exists()  # nothing is written to look at a study
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "compared: no search is running",
        "trials: 3 search, 1 anchor, 1 baseline, 4 confirm",
        "asked for: 3",
    ]
    assert "± 0 (n=2)" in next(line for line in lines if line.startswith("best: trial"))
    assert "  default: samples_per_second 100 (mean of 2)" in lines
    descriptor = hold(compared)
    try:
        main(["status", str(compared)])
    finally:
        os.close(descriptor)
    assert capsys.readouterr().out.startswith("compared: a search is running")


def test_show_prints_all_trials_or_one(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(compared)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 9 + 1
    assert any("baseline halving" in row and "500" in row for row in rows)
    assert main(["show", str(compared), "0"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("trial 0 of compared: search default\nstatus: ok (finished)\nsamples_per_second: 100\n")
    assert main(["show", str(compared), "99"]) == 2
    assert "has no trial 99; its trials are 0 to 8" in capsys.readouterr().err


def test_a_study_without_a_trial_has_none_to_show(
    space_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SearchStudy.create(tmp_path / "new", load(space_file), TEXT, {}).close()
    assert main(["show", str(tmp_path / "new"), "0"]) == 2
    assert "has no trial 0; none was started" in capsys.readouterr().err


def test_compare_prints_what_differs_between_the_best_of_two_studies(
    compared: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study), str(compared)]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "samples_per_second 100 (one run)" in lines["best"]
    assert "(n=2)" in lines["best"]
    assert lines["config/lr"].split()[1] == "0.001"
    assert "config/model" not in lines


def test_import_makes_another_studys_trials_known(
    study: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(study), str(compared)]) == 0
    assert f"3 trials of {compared} are known to the sampler of {study}" in capsys.readouterr().out
    assert main(["show", str(study)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 1  # they are not trials of this study
    assert main(["import", str(study), str(study.parent)]) == 2


def test_a_study_is_imported_once_and_never_into_itself(
    study: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def known() -> list[str]:
        return (study / "journal.log").read_text(encoding="utf-8").splitlines()

    assert main(["import", str(study), str(compared)]) == 0
    before = len(known())
    assert main(["import", str(study), str(compared)]) == 0
    assert "0 trials of" in capsys.readouterr().out.splitlines()[-1]
    assert len([line for line in known()[before:] if '"op_code":4' in line]) == 0  # no trial was made
    assert main(["import", str(study), str(study)]) == 2
    assert "is the same study" in capsys.readouterr().err


def test_a_study_is_resumed_though_the_one_that_it_began_with_is_gone(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT + f"warm_start: ['{study}']\n"
    (tmp_path / "later.yaml").write_text(text, encoding="utf-8")
    SearchStudy.create(tmp_path / "later", load(tmp_path / "later.yaml"), text, {}).close()
    study.rename(tmp_path / "elsewhere")
    resumed: list[Space] = []

    def run_search(space: Space, directory: Path, *_: Any, **__: Any) -> SearchResult:
        resumed.append(space)
        return SearchResult(directory, None, "", 0)

    monkeypatch.setattr(search, "run_search", run_search)
    assert main(["resume", str(tmp_path / "later")]) == 1
    assert [space.warm_start for space in resumed] == [[str(study)]]
    assert main(["validate", str(tmp_path / "later.yaml")]) == 2


def test_validate_checks_a_file_without_starting_anything(space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(space_file)]) == 0
    assert "searches 1 settings to maximize samples_per_second, about 2 trials" in capsys.readouterr().out
    assert main(["validate", str(space_file), "--set", "modle=x"]) == 2


def test_the_dashboard_is_served_from_the_journal_or_says_how_to_install_it(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["dashboard", str(study)]) == 1
    assert "pip install optuna-dashboard" in capsys.readouterr().err
    served = []
    module = ModuleType("optuna_dashboard")
    module.run_server = lambda storage, host, port: served.append((len(storage.get_all_studies()), host, port))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optuna_dashboard", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert main(["dashboard", str(study), "--port", "8123"]) == 0
    assert served == [(1, "127.0.0.1", 8123)]


@pytest.mark.parametrize(
    ("port", "error", "code", "said"),
    [
        ("99999", None, 2, "--port 99999: write a number from 1 to 65535"),
        ("80", PermissionError(13, "Permission denied"), 1, "port 80: Permission denied; give another one with --port"),
    ],
)
def test_a_port_that_cannot_be_had_is_told(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, port, error, code, said
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("acmds_tune.storage.serve_dashboard", refuse)
    assert main(["dashboard", str(study), "--port", port]) == code
    assert said in capsys.readouterr().err


def test_every_search_space_fits_the_schema_and_a_misspelt_key_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema = pytest.importorskip("jsonschema", reason="checks files against the schema")
    validator = jsonschema.Draft202012Validator(schema)
    for path in sorted((Path(__file__).resolve().parent.parent / "search_spaces").glob("*.yaml")):
        validator.validate(read(path)[0])
    wrongs: list[dict[str, Any]] = [
        {"trails": 3},
        {"search": {"modle": {}}},
        {"search": {"lr": {"lo": 1}}},
        {"trials": 0},
    ]
    for wrong in wrongs:
        assert not validator.is_valid({"search": {"lr": {"low": 1e-3, "high": 1e-2}}, **wrong})
    assert schema["properties"]["fixed"]["properties"]["lr"]["description"] == "Peak learning rate."


def test_the_tables_are_written_as_parquet_with_their_types_and_the_front_by_itself(compared: Path) -> None:
    main(["report", str(compared)])
    table, rows = pd.read_parquet(compared / "trials.parquet"), pd.read_csv(compared / "trials.csv")
    assert list(table.columns) == list(rows.columns)
    assert (table.oom_events.dtype, table.feasible.dtype) == (np.int64, bool)
    assert list(table.samples_per_second) == list(rows.samples_per_second)
    front = pd.read_csv(compared / "pareto.csv")
    assert list(front.trial) == [json.loads((compared / "best.json").read_text())["acmds_study"]["trial"]]
    assert list(pd.read_csv(compared / "importance.csv").columns) == ["objective", "setting", "share"]


def test_the_page_and_best_json_tell_the_confirmation_the_baselines_and_the_drift(compared: Path) -> None:
    main(["report", str(compared)])
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "Confirmation and baselines" in page
    assert "Drift: the default settings, run again, measured +0.0 %" in page
    assert "<tr><td>halving<td class=n>1<td class=n>500" in page
    about = json.loads((compared / "best.json").read_text(encoding="utf-8"))["acmds_study"]
    assert about["confirmed"]["seeds"] == about["compared_with"]["default"]["seeds"]
    assert about["compared_with"]["default"]["samples_per_second"]["mean"] == pytest.approx(100.0)


def test_doctor_fails_where_a_check_fails_and_only_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def checks(level: str) -> None:
        for name in ("packages", "cuda", "cpu_training", "gpu_training", "journal", "ray"):
            monkeypatch.setattr(doctor, f"check_{name}", lambda: iter([Finding("ok", "fine")]))
        monkeypatch.setattr(doctor, "check_cuda", lambda: iter([Finding(level, "no CUDA")]))

    checks("warn")
    assert main(["doctor"]) == 0
    assert "warn  cuda: no CUDA\n" in capsys.readouterr().out
    checks("fail")
    assert main(["doctor"]) == 1


def test_a_check_that_breaks_is_a_failure_and_the_others_are_still_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("disk\nfull")

    for name in ("packages", "cuda", "cpu_training", "gpu_training", "ray"):
        monkeypatch.setattr(doctor, f"check_{name}", lambda: iter([]))
    monkeypatch.setattr(doctor, "check_packages", broken)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "fail  installed: OSError: disk full"
    assert output[1].startswith("ok    optuna journal: a trial written and read back")


def test_the_doctor_meets_an_out_of_memory_error_on_the_cpu_card_and_gets_over_it() -> None:
    (finding,) = doctor.check_cpu_training()
    assert finding.level == "ok"
    assert "0 out-of-memory events" not in finding.text


def test_the_doctor_says_why_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = doctor.check_cuda()
    assert finding.level == "warn"
    assert "is a build without it; install a CUDA build of PyTorch" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (finding,) = doctor.check_cuda()
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in finding.text


@pytest.mark.timeout(400)  # it starts Ray, and PyTorch five times
def test_a_search_trains_and_its_best_settings_are_read_by_the_trainer(
    tmp_path: Path, space_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from acmds_tune.ray_backend import quiet_ray

    with quiet_ray(Space()):  # once for both searches
        _search_train_and_resume(tmp_path / "results", space_file, capsys)


def _search_train_and_resume(results: Path, space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", str(space_file), "--results-dir", str(results), "--name", "real"]
    limits = ["--set", "max_steps=4", "--set", "memory_limit_gb=0.02", "--set", "target_headroom_gb=0.002"]
    assert main([*arguments, *limits]) == 0
    output, messages = capsys.readouterr()
    assert output == f"{results / 'real' / 'best.json'}\n"
    assert f"train with it: acmds-train --config {results / 'real' / 'best.json'}" in messages
    best: TrainConfig = load_config(results / "real" / "best.json")
    content = json.loads((results / "real" / "best.json").read_text(encoding="utf-8"))
    trial = results / "real" / "trials" / f"{content['acmds_study']['trial']:04d}"
    ran: TrainConfig = load_config(trial / "config.json")
    assert (best.lr, best.seed, best.max_steps, best.memory_limit_gb) == (ran.lr, ran.seed, 4, 0.02)
    assert (ran.checkpoint_every, best.checkpoint_every) == (0, 1)
    assert (trial / "steps.csv").read_text(encoding="utf-8").count("\n") == 5
    assert main(["resume", str(results / "real"), "--trials", "3", "--backend", "local"]) == 0
    assert (results / "real" / "trials" / "0002" / "outcome.json").is_file()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("acmds_tune.cli", ["schema"]),
        ("acmds_tune.cli", ["show", "{study}"]),
        ("acmds_tune.cli", ["status", "{study}"]),
        ("acmds_optimizer.cli", ["--help"]),
    ],
)
def test_a_command_whose_reader_has_gone_ends_without_a_traceback(
    study: Path, module: str, arguments: list[str], unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", module, *(text.replace("{study}", str(study)) for text in arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode in (0, EXIT)  # 0: argparse leaves out what nobody reads


def test_a_broken_pipe_to_another_process_is_not_taken_for_a_reader_that_has_gone() -> None:
    @ends_with_its_reader
    def command() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        command()
