"""Being told to end while training: SIGTERM (a scheduler) and SIGINT (Ctrl-C) wait for the end of the step."""

import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist


T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Others wait here while rank 0 evaluates.
_TIMEOUT = timedelta(days=1)


class Interrupted(SystemExit):
    """The run has saved its state and ends; the exit code is the shell's for that signal: 143 SIGTERM, 130 SIGINT."""


class Interruption:
    """
    Remembers a signal until all processes can act on it together; to be entered by all of them.

    A second signal changes nothing: launchers pass on what a terminal has already sent to every process.
    """

    def __init__(self):
        self.received = 0
        self.group = None

    def __enter__(self) -> "Interruption":
        self.previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        if dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU, so that asking at every step does not make the accelerator wait.
            self.group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        self.received = number

    def agreed(self) -> int:
        """The signal that any process got, 0 if none did; the same answer everywhere."""
        if self.group is None:
            return self.received
        received = torch.tensor(self.received)
        dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self.group)
        return int(received)


def started(batches: Iterator[T]) -> Iterator[T]:
    """
    The same batches; signals wait until there is the first, and with it the loader's workers.

    Until workers leave signals to their parent, torch lets SIGTERM end them, and the run with them. These begin with
    signals held back; the parent hears of one afterwards.
    """
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, where no signal goes to a group of processes
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            first = next(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield first
    yield from batches


def leave_signals_to_parent(worker: int) -> None:
    """For a loader's workers: a signal to the whole process group must not end them before the last step is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
