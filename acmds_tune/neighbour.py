"""Another process on the card of a trial, on purpose: it takes and frees memory as the trial goes on.

On CUDA it is a real process; on the CPU's card a number that its budget is less by.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from acmds_optimizer.config import GIB
from acmds_tune.objective import share_done

if TYPE_CHECKING:
    import torch

PIECE_BYTES = GIB // 4
POLL_S = 0.02
ANSWER_S = 60.0
"""Seconds in which a neighbour answers: its first answer waits for CUDA to start."""
_BALLAST_PIECE_BYTES = 4 * GIB


class Holder:
    """Holds bytes of one device.

    Args:
        device: `cuda`, `cuda:N`, or `cpu`, where memory never runs short.
    """

    def __init__(self, device: str) -> None:
        import torch

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
        """From now on try to hold so many bytes: give back what is more, and let `poll` take what is missing."""
        import torch

        self.wanted_bytes = wanted_bytes
        while self.held_bytes > wanted_bytes:
            self._pieces.pop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free(self) -> None:
        """Give all but the ballast back."""
        self.take(0)

    def clear(self) -> None:
        """Give all back, the ballast as well."""
        self._ballast.clear()
        self.free()

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
        import torch

        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def _free_bytes(self) -> int:
        import torch

        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0


def serve(connection: Connection, held: Any, device: str) -> None:
    """Obey (order, bytes) tuples until `quit` or the end of the connection: leave, take, free, clear.

    Args:
        connection: `leave` and `clear` are answered with their names once they are done; the others are not answered.
        held: a shared value of type double, kept at the bytes held; None: nobody asks.
        device: as for `Holder`.
    """
    holder = Holder(device)
    orders: dict[str, Callable[[int], None]] = {
        "leave": holder.leave,
        "take": holder.take,
        "free": lambda _: holder.free(),
        "clear": lambda _: holder.clear(),
    }
    try:
        while True:
            if connection.poll(POLL_S):
                order, size = connection.recv()
                if order == "quit":
                    return
                orders[order](size)
                if order in ("leave", "clear"):
                    connection.send(order)
            holder.poll()
            if held is not None:
                held.value = float(holder.held_bytes)
    except (EOFError, ConnectionError):
        return  # the run that it was the neighbour of is over


class Neighbour:
    """A process that holds memory of one card, for one trial after the other: its CUDA starts once, not in each.

    It ends with the process that made it. To be made while the fork server's preload is set.

    Args:
        device: as for `Holder`.
        visible_devices: CUDA_VISIBLE_DEVICES of it; None: that of the process that makes it.

    Attributes:
        orders: takes what `serve` obeys; of a trial at a time.
    """

    def __init__(self, device: str, visible_devices: str | None) -> None:
        context = multiprocessing.get_context("forkserver")
        self.orders, theirs = context.Pipe()
        arguments = (theirs, device, visible_devices)
        self._process = context.Process(target=_serve_trials, args=arguments, daemon=True, name="neighbour")
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    def clear(self) -> bool:
        """Have it give all back, ballast included; whether it has answered within ANSWER_S."""
        until = time.monotonic() + ANSWER_S
        try:
            self.orders.send(("clear", 0))
            while self.orders.poll(max(0.0, until - time.monotonic())):
                if self.orders.recv() == "clear":  # an answer before it may be to a trial that was killed
                    return True
        except (EOFError, OSError):
            pass
        return False

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.orders.close()


def _serve_trials(orders: Connection, device: str, visible_devices: str | None) -> None:
    os.setsid()  # Ctrl-C goes to the search only
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the fork server has it blocked
    if visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices
    serve(orders, None, device)


class Script:
    """Moves the neighbour of one trial as its script says.

    Args:
        steps: (share of the trial that is done, GB that the neighbour holds from then on), ascending.
        settings: of the trial: its device, and the memory that its card is to have.
        orders: of a cleared `Neighbour`, on CUDA.

    On CUDA the neighbour first takes so much that only memory_limit_gb are free, so that on a larger card, too, what it
    takes later is missing. It must be made before this process starts CUDA.

    Raises:
        EOFError, OSError: the neighbour does not live.
    """

    def __init__(
        self, steps: Sequence[tuple[float, float]], settings: Mapping[str, Any], orders: Connection | None = None
    ) -> None:
        self._steps = list(steps)
        self._due = 0
        """Steps of the script that are carried out."""
        self._reached: dict[str, float] = {}
        self._seconds = settings.get("max_seconds")
        self._orders = orders
        if orders is not None and settings.get("memory_limit_gb"):
            orders.send(("leave", int(settings["memory_limit_gb"] * GIB)))
            orders.recv()

    def follow(self, progress: Mapping[str, Any]) -> None:
        """The trial is so far. Where it has begun anew, as the halving baseline does, so does the script."""
        # not its share: that of a run whose batches grow can fall a little, with the steps that are expected
        reached = {name: float(progress[name]) for name in ("step", "seconds") if progress.get(name) is not None}
        anew = any(value < self._reached.get(name, 0.0) for name, value in reached.items())
        self._reached.update(reached)
        share, due = share_done(progress, self._seconds), 0 if anew else self._due
        while due < len(self._steps) and share >= self._steps[due][0]:
            due += 1
        if due != self._due or self._orders is None:  # on the CPU each time: an attempt has a card of its own
            self._due = due
            self._hold(int(self._steps[due - 1][1] * GIB) if due else 0)

    def _hold(self, size: int) -> None:
        if self._orders is not None:
            self._orders.send(("take", size) if size else ("free", 0))
            return
        from acmds_optimizer.memory.device import occupy_cpu_cards

        occupy_cpu_cards(size)
