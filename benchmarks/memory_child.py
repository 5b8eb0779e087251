"""One child process of the memory benchmark: one system in one scenario, or the offline search."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from acmds_optimizer.engine.run import environment
from acmds_optimizer.errors import first_line
from acmds_optimizer.memory.device import prefer_expandable_segments
from acmds_optimizer.memory.out_of_memory import is_out_of_memory
from benchmarks import memory_systems as systems
from benchmarks.memory_ours import Variant, system
from benchmarks.memory_plant import Meter, Neighbour, Plant
from benchmarks.memory_scenarios import Scenario, Setting

SYSTEMS: dict[str, Callable[[Plant, Meter, systems.Known], None]] = {
    "oracle": systems.oracle,
    "oracle_phases": systems.oracle_phases,
    "fixed_cap": systems.fixed_cap,
    "accelerate": systems.accelerate_find,
    "lightning_power": systems.lightning_power,
    "lightning_binsearch": systems.lightning_binsearch,
    "halving": systems.halving,
    "aimd": systems.aimd,
    "ours": system(Variant()),
    "ours_hold": system(Variant(policy="hold")),
    "ours_no_knee": system(Variant(knee=False)),
    "ours_auto": system(Variant(auto=True)),
}
"""Every system of the table, by the name in its `system` column."""


def run(
    connection: Connection,
    setting: Setting,
    scenario_name: str,
    system_name: str,
    known: systems.Known,
    neighbour_connection: Connection | None,
    held: Any,
) -> None:
    """Run one system, and send (row, timeline) or, if it cannot be run, ({status, reason}, [])."""
    _prepare(setting)
    meter: Meter | None = None
    try:
        plant = Plant(setting)
        neighbour = Neighbour(plant, neighbour_connection, held)
        neighbour.settle()
        meter = Meter(plant, Scenario(scenario_name, setting), neighbour)
        SYSTEMS[system_name](plant, meter, known)
    except (systems.MissingPackageError, systems.NothingFitsError) as error:
        connection.send(({"status": "skipped", "reason": str(error)}, []))
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, it is a row of the table
        if meter is None or not is_out_of_memory(error):
            _send_error(connection)
            return
        meter.escaped = str(error)
        del error
    plant.model.zero_grad(set_to_none=True)
    status, reason = ("out_of_memory", first_line(meter.escaped)) if meter.escaped else ("ok", "")
    connection.send(({**meter.row(), "status": status, "reason": reason}, meter.timeline()))


def probe(connection: Connection, setting: Setting, sides: list[int], timed_seconds: float) -> None:
    """Search offline, and send ({probes, environment, status}, [])."""
    _prepare(setting)
    try:
        plant = Plant(setting)
        found = systems.probe(plant, sides, timed_seconds)
        facts = environment(plant.device)
    except Exception:  # noqa: BLE001  # likewise
        _send_error(connection)
        return
    connection.send(({"status": "ok", "reason": "", "probes": found, "environment": facts}, []))


def _send_error(connection: Connection) -> None:
    kind, error, _ = sys.exc_info()
    traceback.print_exc()
    connection.send(({"status": "error", "reason": f"{kind.__name__ if kind else ''}: {first_line(error)}"}, []))


def _prepare(setting: Setting) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    # says that a child may not start workers, which it needs none of
    logging.getLogger("acmds_optimizer.engine.decode").setLevel(logging.ERROR)
    if setting.device != "cpu":
        prefer_expandable_segments()  # for all systems, as our trainer does
    if setting.device == "cpu":
        torch.set_num_threads(1)  # two threads that wait for each other on a busy machine make times mean nothing
