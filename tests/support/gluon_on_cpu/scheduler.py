"""Choose the order in which things happen: parts of a program, operations under way, and barriers, step by step."""

import operator
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Deadlock(AssertionError):
    """Raised if nothing can continue, but not all parts have ended."""


class _Stopped(BaseException):
    """Raised in the thread of a part, to end it after a failure elsewhere."""


class Operation:
    """An operation under way: its effect when it ends, and the effect once its part has waited for it."""

    def __init__(self, kind: str, finish: Callable[[], None], release: Callable[[], None] = lambda: None):
        self.kind, self.finish, self.release = kind, finish, release
        self.done = False


class Barrier:
    """An mbarrier, which counts outstanding arrivals and bytes. Its phase ends when none is outstanding."""

    def __init__(self, label: str):
        self.label = label
        self.count, self.missing, self.bytes, self.parity = 0, 0, 0, 0

    def initialise(self, count: int) -> None:
        assert self.count == 0, f"{self} is initialised twice"
        self.count = self.missing = count

    def invalidate(self) -> None:
        assert self.count and self.missing == self.count and self.bytes == 0, f"{self} is still in use"
        self.count = 0

    def arrive(self, count: int) -> None:
        assert self.count, "a barrier is used that was not initialised"
        self.missing -= count
        assert self.missing >= 0, f"{self.label}: more arrivals than its count of {self.count}"
        self._end_phase()

    def receive(self, size: int) -> None:
        self.bytes -= size
        assert self.bytes >= 0, f"{self.label}: more bytes came than were expected"
        self._end_phase()

    def _end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count

    def __str__(self) -> str:
        return f"{self.label} (parity {self.parity}, {self.missing} arrivals and {self.bytes} bytes missing)"


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, number: int, count: int):
        self.barriers = [Barrier(f"barrier {i} of allocation {number}") for i in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.barriers[operator.index(i)]


class _Waiting:
    """Return what a part waits for, from the barrier's current state."""

    def __init__(self, barrier: Barrier, parity: int):
        self.barrier, self.parity = barrier, parity

    def __str__(self) -> str:
        return f"the end of a phase of parity {self.parity} of {self.barrier}"


class Part:
    """A part of a program, in a thread that runs when the scheduler resumes it."""

    def __init__(self, scheduler: "Scheduler", name: str, function: Callable[[], None]):
        self.scheduler, self.name, self.function = scheduler, name, function
        self.turn = threading.Semaphore(0)
        self.may_go_on: Callable[[], bool] = lambda: True
        self.what: Any = "its start"
        self.ended = False
        self.error: BaseException | None = None
        self.products: list[Operation] = []  # begun but not waited for, in order
        self.copies: list[Operation] = []  # out of shared memory, likewise
        self.unfenced: list[torch.Tensor] = []  # flags of shared memory that it stored to since its last fence
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self.scheduler.stopping:
                self.function()
                assert not self.products, "a part ends before its last product"
                assert not self.copies, "a part ends before its last copy has read shared memory"
        except _Stopped:
            pass
        except BaseException as error:
            error.add_note(f"in {self.name}")
            self.error = error
        self.ended = True
        self.scheduler.baton.release()

    def where(self) -> str:
        # lines of kernels at which the thread is, from the inside out
        frame, lines = sys._current_frames().get(self.thread.ident or 0), []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.parent.name == "hopper":
                lines.append(f"line {frame.f_lineno} of {path.name} in {frame.f_code.co_name}")
            frame = frame.f_back
        return ", ".join(lines)


class Scheduler:
    """Choose which part or operation continues. One program runs at a time, with the operations that it has begun."""

    def __init__(self, chance: random.Random, programs: int):
        self.chance, self.programs, self.program = chance, programs, 0
        self.baton = threading.Semaphore(0)
        self.parts: list[Part] = []
        self.loads: list[Operation] = []  # copies into shared memory under way
        self.barriers: list[Barriers] = []
        self.stopping = False
        self.weights: dict[Any, float] = {}
        self.current: Part

    def run_program(self, program: int, function: Callable[[], None]) -> None:
        self.program, self.stopping = program, False
        self.parts, self.loads, self.barriers, self.weights = [], [], [], {}
        self.start("the kernel", function)
        try:
            while not all(part.ended for part in self.parts):
                self._go_on()
            assert not self.loads, "a program ends before a copy into its shared memory"
            for barrier in (b for group in self.barriers for b in group.barriers):
                assert barrier.bytes == 0, f"at the end of a program: {barrier}"
        except BaseException as error:
            error.add_note(f"in program {program} of {self.programs}")
            raise
        finally:
            self.stopping = True
            for part in self.parts:
                part.turn.release()
            for part in self.parts:
                part.thread.join()

    def _go_on(self) -> None:
        # run one part up to its next step, or end one operation
        choices: list[Part | Operation] = []
        weights: list[float] = []

        def add(choice: Part | Operation, kind: Any) -> None:
            if kind not in self.weights:
                self.weights[kind] = self.chance.choice((1, 1 / 16, 1 / 256))
            choices.append(choice)
            weights.append(self.weights[kind])

        for number, part in enumerate(self.parts):
            if not part.ended and part.may_go_on():
                add(part, number)
            first = next((x for x in part.products if not x.done), None)  # products of a part end in order
            if first is not None:
                add(first, (number, first.kind))
            for x in part.copies:
                if not x.done:
                    add(x, (number, x.kind))
        for x in self.loads:
            add(x, x.kind)
        if not choices:
            waiting = "\n".join(f"{p.name} waits for {p.what}: {p.where()}" for p in self.parts if not p.ended)
            raise Deadlock(f"deadlock:\n{waiting}")
        choice = self.chance.choices(choices, weights)[0]
        if isinstance(choice, Operation):
            choice.finish()
            choice.done = True
            if choice in self.loads:
                self.loads.remove(choice)
            return
        self.current = choice
        choice.turn.release()
        self.baton.acquire()
        if choice.error is not None:
            raise choice.error

    def start(self, name: str, function: Callable[[], None]) -> Part:
        self.parts.append(Part(self, name, function))
        return self.parts[-1]

    def step(self, what: Any, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Let others run now, and until `may_go_on` is true. Parts call this."""
        part = self.current
        part.what, part.may_go_on = what, may_go_on
        self.baton.release()
        part.turn.acquire()
        if self.stopping:
            raise _Stopped

    def allocate_barriers(self, count: int) -> Barriers:
        self.barriers.append(Barriers(len(self.barriers), count))
        return self.barriers[-1]

    def wait_for_barrier(self, barrier: Barrier, parity: int) -> None:
        assert barrier.count, "a barrier is used that was not initialised"
        assert parity in (0, 1)
        # The phase of this parity is over while the barrier is in a phase of the other parity.
        self.step(_Waiting(barrier, parity), lambda: barrier.parity != parity)

    def wait_for_operations(self, operations: list[Operation], pending: int) -> list[Operation]:
        """Wait until at most `pending` of a part's operations are under way, and return those that are over."""
        over = operations[: max(0, len(operations) - pending)]
        self.step("its products or copies", lambda: all(x.done for x in over))
        for x in over:
            x.release()
        del operations[: len(over)]
        return over
