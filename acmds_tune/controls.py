"""Every search over a curriculum holds its control: the setting that turns the curriculum off."""

from __future__ import annotations

from collections.abc import Iterator

from acmds_tune.space import Parameter, Space

OFF: dict[str, str | float] = {"direction": "none", "noise_rate": 0.0, "start_resolution": 1.0}
"""Settings of the curriculum, and what turns each off: plain shuffling, no noise gate, full size throughout."""

ACTS_WITH = {
    "pacing": ("direction",),
    "start_fraction": ("direction",),
    "pacing_end_fraction": ("direction",),
    "coverage_epochs": ("direction",),
    "noise_action": ("direction", "noise_rate"),
    "resolution_stages": ("start_resolution",),
}
"""Settings that do something only where one of others is not off."""


def control_problems(space: Space) -> Iterator[tuple[str, str]]:
    """(searched setting, what is wrong) for each search that could not find that no curriculum is best."""
    for name, off in OFF.items():
        if name in space.search and not _holds(space.search[name], off):
            yield name, f"must have {off} among its values: what a curriculum has to beat is a run without it"
    for name, switches in ACTS_WITH.items():
        if name in space.search and not any(switch in space.search for switch in switches):
            which, off = " or ".join(switches), " or ".join(str(OFF[switch]) for switch in switches)
            yield name, f"acts only with {which}, which must be searched too, with {off} among its values"


def _holds(parameter: Parameter, value: str | float) -> bool:
    if parameter.values is not None:
        return value in parameter.values
    return value in (parameter.low, parameter.high)
