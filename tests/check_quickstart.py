"""Checks what the quickstart study and a training run from its best.json left behind. Called by .ci/run, not by pytest.

python tests/check_quickstart.py study results/quickstart
python tests/check_quickstart.py run runs/quickstart_best
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

MIN_TRIALS = 16
MIN_VAL_ACCURACY = 0.95


def check_study(study: Path) -> list[str]:
    """What is wrong with a study directory, as sentences; nothing where all is well."""
    problems = [f"{name} is missing" for name in missing(study, "trials.csv", "events.csv", "best.json", "report.html")]
    if problems:
        return problems
    trials = pd.read_csv(study / "trials.csv").set_index("trial")
    best = json.loads((study / "best.json").read_text(encoding="utf-8"))["acmds_study"]["trial"]
    if len(trials) < MIN_TRIALS:
        problems.append(f"{len(trials)} trials, fewer than {MIN_TRIALS}")
    if not (trials["oom_events"] > 0).any():
        problems.append("no trial met an out-of-memory event")
    if trials.loc[best, "oom_events"] != 0 or trials.loc[best, "status"] != "ok":
        problems.append(f"the best trial, {best}, is not free of trouble: {trials.loc[best, ['status', 'oom_events']]}")
    print(f"{len(trials)} trials, {int((trials['oom_events'] > 0).sum())} with out-of-memory events, best: {best}")
    return problems


def check_run(run: Path) -> list[str]:
    """What is wrong with the output directory of acmds-train, as sentences."""
    problems = [f"{name} is missing" for name in missing(run, "outcome.json", "steps.csv", "config.json")]
    if problems:
        return problems
    outcome = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    accuracy, events, recovered = (outcome[key] for key in ("val_accuracy", "oom_events", "oom_recovered"))
    if accuracy < MIN_VAL_ACCURACY:
        problems.append(f"validation accuracy {accuracy:.4f}, below {MIN_VAL_ACCURACY}")
    if recovered != events:
        problems.append(f"{events} out-of-memory events, but {recovered} recovered")
    print(f"validation accuracy {accuracy:.4f}, {events} out-of-memory events, {recovered} recovered")
    return problems


def missing(folder: Path, *names: str) -> list[str]:
    """Those of `names` that are not files in `folder`."""
    return [str(folder / name) for name in names if not (folder / name).is_file()]


def main() -> int:
    """Exit code 0 where all is well, 1 with the problems on stderr, 2 for wrong usage."""
    checks = {"study": check_study, "run": check_run}
    if len(sys.argv) != 3 or sys.argv[1] not in checks:
        print(__doc__, file=sys.stderr)
        return 2
    problems = checks[sys.argv[1]](Path(sys.argv[2]))
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
