"""Which settings to try first, by trying thousands of them on the plant; and whether it was right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from acmds_optimizer.config import TrainConfig, to_dict
from acmds_optimizer.errors import ConfigError
from acmds_tune.plant import CONTROLLED, Plant, simulate
from acmds_tune.records import DEFAULT, DONE, StudyRecord, TrialRecord
from acmds_tune.requires import Requirement, all_hold, distance, draw
from acmds_tune.space import Space, derived_seed
from acmds_tune.stages import SAMPLED

FROM_PLANT = "plant"
"""Label of trials that were chosen on the plant."""

PROMISED = 1.05
"""A prediction of this many times the defaults' throughput, or more, is one that can be held against the plant."""


def misled(study: StudyRecord) -> bool:
    """The plant's choice was to be faster than the defaults, and is slower or not feasible: it does not predict.

    Judged by trials that differ from the defaults in settings of the controller only, since it knows no others.
    """
    first = next((row for row in study.of_stages(SAMPLED) if row.label == DEFAULT and row.status in DONE), None)
    if first is None:
        return False
    speed = first.figures.get("samples_per_second")
    promised = [
        row
        for row in study.of_stages(SAMPLED)
        if row.label == FROM_PLANT and row.status not in ("running", "stopped") and comparable(study, row, first)
        and row.predicted and first.predicted and row.predicted >= PROMISED * first.predicted
    ]  # fmt: skip
    return bool(speed and promised) and not any(
        (row.figures.get("samples_per_second") or 0.0) > (speed or 0.0) and (row.feasible or not first.feasible)
        for row in promised
    )


def comparable(study: StudyRecord, one: TrialRecord, other: TrialRecord) -> bool:
    """Two trials have the same values for all settings that the plant knows nothing of."""
    return all(one.config.get(name) == other.config.get(name) for name in study.searched if name not in CONTROLLED)


def best_on_plant(
    plant: Plant,
    space: Space,
    default: Mapping[str, Any],
    requirements: Sequence[Requirement],
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """The `prescreen.keep` best of `prescreen.settings` random settings of the controller, no two of them alike.

    Of other settings the plant knows nothing. So the first has the defaults for them, and each further one another
    value for one of those with choices: since the controller is equally good in all of them, what differs is due to
    that one. The rest is left to the sampler. With all of them at the defaults, or by chance, the search got slower
    than without a plant (docs/experiments.md). Once it is `stopped` there are none.
    """
    known = {name: parameter for name, parameter in space.search.items() if name in CONTROLLED}
    if not known:
        return []
    rng = random.Random(derived_seed(space.seed, -3))
    defaults = to_dict(TrainConfig())

    def score(values: Mapping[str, Any], seeds: Sequence[int]) -> tuple[float, float] | None:
        settings = {**defaults, **space.settings(values)}
        if stopped() or not all_hold(requirements, settings):
            return None
        neighbour = [(step.at, step.holds_gb) for step in space.neighbour]
        try:
            runs = [simulate(plant, settings, neighbour, seed=seed) for seed in seeds]
        except ConfigError:  # two settings that do not go together
            return None
        figures = [asdict(run) for run in runs if run is not None]
        if len(figures) < len(runs):
            return None
        broken = [c.violation(each[c.figure]) for c in space.parsed_constraints for each in figures if c.figure in each]
        speed = sum(each["samples_per_second"] for each in figures) / len(figures)
        return max([0.0, *broken]), -speed

    drawn = [{**default, **{n: v for n, v in draw(space.search, rng).items() if n in known}} for _ in
             range(space.prescreen.settings)]  # fmt: skip
    scored = [(found, values) for values in drawn if (found := score(values, [0])) is not None]
    scored.sort(key=lambda item: item[0])
    finalists = [values for _, values in scored[: 10 * space.prescreen.keep]]
    scored = [(found, values) for values in finalists if (found := score(values, range(1, 5))) is not None]
    scored.sort(key=lambda item: item[0])
    if stopped():
        return []
    chosen: list[dict[str, Any]] = []
    for _, values in scored:
        if len(chosen) == space.prescreen.keep:
            break
        if all(distance(values, other, known) > 0.1 * len(known) for other in chosen):
            chosen.append({name: values[name] for name in known if name in values})
    return [values | others for values, others in zip(chosen, _one_changed(space, default), strict=False)]


def _one_changed(space: Space, default: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The default choices of the settings that are not the controller's, then with one of them changed, one by one."""
    others = {
        name: parameter.values
        for name, parameter in space.search.items()
        if name not in CONTROLLED and parameter.values and name in default and not parameter.when
    }
    yield {name: value for name, value in default.items() if name not in CONTROLLED}  # ranges too: see `misled`
    same = {name: default[name] for name in others}
    for name, values in others.items():
        for value in values:
            if value != default[name]:
                yield same | {name: value}
    while True:
        yield {}
