"""Another process on the card of a trial, on purpose: it takes and frees memory as the trial goes on.

On CUDA it is a real process; on the CPU's card a number that its budget is less by.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from acmds_optimizer.config import GIB
from acmds_tune.objective import share_done

if TYPE_CHECKING:
    import torch

PIECE_BYTES = GIB // 4
POLL_S = 0.02
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
            if connection.poll(POLL_S):
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


def serve_alone(ours: Connection, theirs: Connection, held: Any, device: str) -> None:
    """`serve` in a forked process, which must not itself keep the other end open that it waits for the end of."""
    ours.close()
    serve(theirs, held, device)


class Script:
    """Moves the neighbour of one trial as its script says.

    Args:
        steps: (share of the trial that is done, GB that the neighbour holds from then on), ascending.
        settings: of the trial: its device, and the memory that its card is to have.

    On CUDA the neighbour first takes so much that only memory_limit_gb are free, so that on a larger card, too, what it
    takes later is missing. It must be made before this process starts CUDA.
    """

    def __init__(self, steps: Sequence[tuple[float, float]], settings: Mapping[str, Any]) -> None:
        self._steps = list(steps)
        self._due = 0
        """Steps of the script that are carried out."""
        self._reached: dict[str, float] = {}
        self._orders: Connection | None = None
        device = str(settings.get("device", "cuda"))
        self._seconds = settings.get("max_seconds")
        if device == "cpu":
            return
        context = multiprocessing.get_context("fork")  # torch is imported here already, and CUDA is not started
        self._orders, theirs = context.Pipe()
        held = context.Value("d", 0.0)
        # of the trial's process group, so it ends with it
        orders = (self._orders, theirs, held, device)
        context.Process(target=serve_alone, args=orders, daemon=True, name="neighbour").start()
        theirs.close()
        if settings.get("memory_limit_gb"):
            self._orders.send(("leave", int(settings["memory_limit_gb"] * GIB)))
            self._orders.recv()

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
