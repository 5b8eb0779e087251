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
from multiprocessing.connection import Connection
from typing import Any

import torch

GIB = 1024**3
PIECE_BYTES = GIB // 4
_BALLAST_PIECE_BYTES = 4 * GIB
_POLL_S = 0.02


class Holder:
    """Holds bytes of one device.

    Args:
        device: `cuda`, `cuda:N`, or `cpu`, where memory never runs short.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.wanted_bytes = 0
        self._ballast: list[torch.Tensor] = []
        self._pieces: list[torch.Tensor] = []
        if self.device.type == "cuda":
            torch.cuda.init()
            self._free_bytes()  # the context takes its share before anything is measured

    @property
    def held_bytes(self) -> int:
        """What was taken so far, ballast apart."""
        return sum(piece.numel() for piece in self._pieces)

    def leave(self, free_bytes: int) -> None:
        """Take ballast until at most `free_bytes` of the card are free, to within 2 MB."""
        while (over := self._free_bytes() - free_bytes) >= 2**21:
            piece = self._allocate(min(over // 2**21 * 2**21, _BALLAST_PIECE_BYTES))
            if piece is None:
                return
            self._ballast.append(piece)

    def take(self, wanted_bytes: int) -> None:
        """From now on try to hold so many bytes; `poll` does it."""
        self.wanted_bytes = wanted_bytes

    def free(self) -> None:
        """Give all but the ballast back."""
        self.wanted_bytes = 0
        self._pieces.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def poll(self) -> bool:
        """Take what is wanted and free; whether anything was taken."""
        before = len(self._pieces)
        while (missing := self.wanted_bytes - self.held_bytes) > 0:
            piece = self._allocate(min(missing, PIECE_BYTES))
            if piece is None:
                break
            self._pieces.append(piece)
        return len(self._pieces) > before

    def _allocate(self, size: int) -> torch.Tensor | None:
        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0


def serve(connection: Connection, held: Any, device: str) -> None:
    """Obey (order, bytes) tuples until `quit` or the end of the connection: leave, take, free.

    Args:
        connection: `leave` is answered with None once it is done; the others are not answered.
        held: a shared value of type double, kept at the bytes held.
        device: as for `Holder`.
    """
    holder = Holder(device)
    orders: dict[str, Callable[[int], None]] = {
        "leave": holder.leave,
        "take": holder.take,
        "free": lambda _: holder.free(),
    }
    try:
        while True:
            if connection.poll(_POLL_S):
                order, size = connection.recv()
                if order == "quit":
                    return
                orders[order](size)
                if order == "leave":
                    connection.send(None)
            holder.poll()
            held.value = float(holder.held_bytes)
    except (EOFError, ConnectionError):
        return  # the run that it was the neighbour of is over


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
                time.sleep(min(_POLL_S, max(0.0, until - time.monotonic())))
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
