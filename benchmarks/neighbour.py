"""Another process on the same card: takes and frees memory, by script or by order.

    python -m benchmarks.neighbour wait 5 take 8 wait 10 free          # on a CUDA card
    python -m benchmarks.neighbour leave 24 wait 5 take 8 wait 10 free # a large card made to look like one of 24 GB

`leave N` first takes ballast until N GB of the card are free, so that a card larger than the one studied has no
reserves. `take N` takes N GB piece by piece, and waits for what is not free, as a process that is starting up beside
a training run would have to. `free` gives them back, `wait S` waits S seconds. On stdout: one line a change of what
is held, as CSV (seconds,held_gb). GB are 2**30 bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from acmds_optimizer.config import GIB
from acmds_tune.neighbour import POLL_S, Holder


def parse(words: Sequence[str]) -> list[tuple[str, float]]:
    """(order, number) pairs of a script; `free` has no number and gets 0.

    Raises:
        ValueError: an unknown order, or a number that is missing or negative.
    """
    orders: list[tuple[str, float]] = []
    rest = list(words)
    while rest:
        order = rest.pop(0)
        if order == "free":
            orders.append((order, 0.0))
        elif order in ("leave", "take", "wait"):
            try:
                number = float(rest.pop(0))
            except (IndexError, ValueError):
                raise ValueError(f"{order} needs a number") from None
            if number < 0:
                raise ValueError(f"{order} {number:g}: must not be negative")
            orders.append((order, number))
        else:
            raise ValueError(f"{order!r} is none of leave, take, wait, free")
    return orders


def play(orders: Sequence[tuple[str, float]], holder: Holder, report: Callable[[float, int], None]) -> None:
    """Carry out a script; `report(seconds, held_bytes)` at each change."""
    began = time.monotonic()
    report(0.0, 0)
    for order, number in orders:
        if order == "wait":
            until = time.monotonic() + number
            while time.monotonic() < until:
                if holder.poll():
                    report(time.monotonic() - began, holder.held_bytes)
                time.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
            continue
        if order == "leave":
            holder.leave(int(number * GIB))
        elif order == "take":
            holder.take(int(number * GIB))
            holder.poll()
        else:
            holder.free()
        report(time.monotonic() - began, holder.held_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.neighbour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("script", nargs="+", help="leave GB, take GB, wait SECONDS and free, in any order")
    options = parser.parse_args(argv)
    try:
        orders = parse(options.script)
    except ValueError as error:
        parser.error(str(error))
    print("seconds,held_gb", flush=True)
    play(orders, Holder(options.device), lambda s, held: print(f"{s:.3f},{held / GIB:.4f}", flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
