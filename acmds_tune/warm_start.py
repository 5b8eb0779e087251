"""What a study takes from an earlier one: its best settings, and where both measured the same thing its trials."""

from __future__ import annotations

import os
from typing import Any

from acmds_tune import nvml
from acmds_tune.records import DONE, StudyRecord, TrialRecord, ranked
from acmds_tune.samplers import contains
from acmds_tune.space import Space
from acmds_tune.stages import SAMPLED, searched

WARM_STARTS = 5
"""Best configurations of an earlier study that are tried first."""


def best_settings(theirs: StudyRecord, space: Space) -> list[dict[str, Any]]:
    """Of their best configurations the settings that are searched here, with values that may be tried here."""
    found = []
    for row in ranked(theirs, most=WARM_STARTS):
        found.append({name: v for name, v in searched(space, row).items() if contains(space.search[name], v)})
    return [values for values in found if values]


def usable_trials(theirs: StudyRecord, space: Space) -> list[tuple[TrialRecord, dict[str, Any]]]:
    """Their trials with a result, and their searched settings, where these are all within `space`."""
    found = [(row, searched(space, row)) for row in theirs.of_stages(SAMPLED[-1:])]
    return [
        (row, params)
        for row, params in found
        if row.status in DONE
        and row.values is not None
        and all(contains(space.search[name], value) for name, value in params.items())
    ]


def fingerprint(space: Space) -> dict[str, Any]:
    """What must be the same for the figures of two studies to be comparable."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    gpus = nvml.visible_devices() if space.device != "cpu" else []
    about = space.model_dump(mode="json", include={"fixed", "objective", "constraints", "budget", "neighbour"})
    about["fixed"].pop("data_dir", None)
    about["budget"].pop("minutes", None)
    return {
        **about,
        "objective": str(about["objective"]),
        "constraints": str(about["constraints"]),
        "neighbour": str(about["neighbour"]),
        "card": nvml.name(gpus[0]) if gpus else f"{os.cpu_count()} CPU cores",
        "torch": installed("torch"),
        "acmds": installed("acmds"),
    }
