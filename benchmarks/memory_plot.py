"""One picture of the neighbour scenario: memory, batch size and the neighbour over time, ours beside a fixed batch."""

from __future__ import annotations

from pathlib import Path

from benchmarks.memory_plant import Point
from benchmarks.memory_scenarios import Setting

_OURS = ("ours_no_knee", "ours", "ours_hold")
_FIXED = ("fixed_cap", "oracle", "lightning_power", "lightning_binsearch")


def draw(timelines: dict[str, tuple[str, list[Point]]], setting: Setting, path: Path) -> None:
    """Draw into a PNG at `path`, and write the steps behind it to NAME_steps.csv beside it.

    Args:
        timelines: status and steps by system, of the scenario neighbour; one of ours and a fixed batch are drawn.
        setting: of the table.
        path: its folder is made.

    Raises:
        ValueError: none of them is there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [next((name for name in names if name in timelines), None) for names in (_OURS, _FIXED)]
    names = [name for name in shown if name is not None]
    if not names:
        raise ValueError("--plot needs the scenario neighbour with ours or a fixed batch")
    scale, unit = (1.0, "GB") if setting.cap_gb >= 1 else (1024.0, "MB")
    figure, axes = plt.subplots(
        2, len(names), figsize=(6 * len(names), 5.5), sharex=True, sharey="row", squeeze=False,
        height_ratios=(3, 1), layout="constrained",
    )  # fmt: skip
    for column, name in enumerate(names):
        memory, batch = axes[0][column], axes[1][column]
        status, points = timelines[name]
        seconds = [point.seconds for point in points]
        memory.plot(seconds, [p.budget_gb * scale for p in points], color="black", lw=1, label="budget")
        memory.plot(seconds, [p.target_gb * scale for p in points], color="black", lw=1, ls="--", label="target")
        memory.plot(seconds, [p.reserved_gb * scale for p in points], color="tab:blue", label="reserved")
        memory.fill_between(
            seconds, [p.neighbour_gb * scale for p in points], color="tab:orange", alpha=0.4, label="neighbour"
        )
        memory.set_title(name)
        if status != "ok":
            memory.axvline(seconds[-1], color="tab:red")
            memory.annotate(
                f" ended: {status.replace('_', ' ')}", (seconds[-1], 0.5), color="tab:red",
                xycoords=("data", "axes fraction"),
            )  # fmt: skip
        memory.set_ylim(0, setting.cap_gb * scale * 1.05)
        batch.plot(seconds, [p.batch for p in points], color="tab:green", drawstyle="steps-post")
        batch.set_ylim(0, 1.1 * max(p.batch for each in names for p in timelines[each][1]))
        batch.set_xlabel("seconds")
    axes[0][0].set_ylabel(unit)
    axes[1][0].set_ylabel("micro-batch")
    axes[0][-1].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with path.with_name(f"{path.stem}_steps.csv").open("w", encoding="utf-8") as file:
        file.write("system,seconds,images,micro_batch,reserved_gb,budget_gb,target_gb,neighbour_gb\n")
        for name in names:
            for p in timelines[name][1]:
                file.write(
                    f"{name},{p.seconds:.4f},{p.images},{p.batch},{p.reserved_gb:.5g},{p.budget_gb:.5g},"
                    f"{p.target_gb:.5g},{p.neighbour_gb:.5g}\n"
                )
