"""End a run that hangs on all ranks, with a message that names the rank it hangs on; show that a long phase is alive.

A thread on each rank tells rank 0 every few seconds where the rank's main thread is. Rank 0 judges the others by
`hang_rules`, and the others judge rank 0.
"""

import faulthandler
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from lrnn.pretrain.config import WatchdogConfig
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.watchdog.hang_rules import Place, Seen, Verdict, describe_wait, find_lost, find_stalled
from lrnn.pretrain.watchdog.heartbeats import Channel, Hub, Message, connect

HUNG = 1  # exit status
LONGEST_INTERVAL_S = 2.0  # largest interval between two heartbeats
REPORT_S = 5.0  # largest time for a rank's last message, and for rank 0 to wait until the others have ended


class AwakeClock:
    """Count the seconds in which this process could run.

    While a job is suspended or a laptop sleeps, all ranks are silent although none hangs. A late tick therefore counts
    as at most `longest` seconds.
    """

    def __init__(self, longest: float, read: Callable[[], float] = time.monotonic):
        self._longest, self._read, self._last = longest, read, read()
        self.now = 0.0

    def tick(self) -> float:
        """Advance the clock and return its time."""
        read = self._read()
        self.now += min(read - self._last, self._longest)
        self._last = read
        return self.now


class Watchdog:
    """Watch over the `with` block, which all ranks enter together. Leaving it says goodbye to the other ranks.

    A hang ends the process with status `HUNG`, even if its main thread is blocked.

    Args:
        ranks: the processes of the run.
        settings: limits in seconds.

    Attributes:
        log: if set, rank 0 says there that a phase takes long, and records a hang.
    """

    def __init__(self, ranks: Ranks, settings: WatchdogConfig):
        self.log: MetricsLog | None = None
        self._ranks, self._settings = ranks, settings
        shortest = min(settings.model_dump().values())
        self._interval_s = min(LONGEST_INTERVAL_S, shortest / 4)
        self._clock = AwakeClock(2 * self._interval_s)
        self._place, self._first_step = Place("starting", 0, 0, True), 0
        self._hub: Hub | None = None
        self._channel: Channel | None = None
        self._error = ""
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._said = 0  # number of lines about the present phase

    def enter(self, phase: str, step: int) -> None:
        """Note what the main thread does from now on. All ranks enter the same phases in the same order.

        Args:
            phase: completes the sentence "the rank is ...", as in "waiting for data".
            step: the step it works on; 0 before the first.
        """
        self._first_step = self._first_step or step
        self._place = Place(phase, step, self._place.changes + 1, step in (0, self._first_step))

    def __enter__(self) -> "Watchdog":
        ranks = self._ranks
        alone = ranks.world_size == 1
        if ranks.is_main and not alone:
            self._hub = Hub()
        address = (self._hub.port, self._hub.token) if self._hub is not None else None
        peers = ranks.gather((socket.gethostname(), os.getpid(), address))
        self._seen = [Seen(r, host, pid, self._place, 0.0, 0.0) for r, (host, pid, _) in enumerate(peers)]
        if not alone:
            # The others have already reached rank 0 at this address, when their group was made.
            port, self._token = peers[0][2]
            self._address = (os.environ["MASTER_ADDR"], port)
            if not ranks.is_main:
                self._channel = connect(self._address, self._token, ranks.rank)
            reached = ranks.gather(ranks.is_main or self._channel is not None)
            if not all(reached):  # An unwatched run is better than none.
                self._stop_talking()
                if ranks.is_main:
                    where = f"{self._address[0]}:{self._address[1]}"
                    self._say(f"rank {reached.index(False)} does not reach {where}: lost ranks go unnoticed")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._error = "" if kind is None else f"{kind.__name__}: {error}"
        self._leaving.set()
        self._thread.join(timeout=REPORT_S)

    def _run(self) -> None:
        tick = self._watch_all if self._ranks.is_main else self._watch_main
        try:
            while not self._leaving.wait(self._interval_s):
                tick(self._clock.tick())
        except Exception as error:  # A bug of the watchdog must not end the run, nor be overlooked.
            self._say(f"the watchdog of rank {self._ranks.rank} failed, hangs go unnoticed: {error!r}")
        finally:
            self._stop_talking()

    def _stop_talking(self) -> None:
        """Say goodbye, so that the others do not expect this rank any more."""
        if self._hub is not None:
            self._hub.receive()  # Accept ranks that connected in the meantime, so that they hear it too.
        for side in (self._hub, self._channel):
            if side is not None:
                side.send({"goodbye": self._error})
                side.close()
        self._hub = self._channel = None

    def _watch_all(self, now: float) -> None:
        """Hear the other ranks, judge them, and report long phases. Runs on rank 0."""
        seen, own = self._seen, self._seen[0]
        own.hear(now, self._place)
        if self._hub is not None:
            for rank, message in self._hub.receive():
                _note(seen[rank], message, now)
            connected = self._hub.connected()
            for peer in seen[1:]:
                if peer.rank not in connected and peer.broken is None:
                    peer.broken = now
            self._hub.send({"place": self._place})
        else:
            seen = [own]
        verdict = find_lost(now, seen, self._settings) or find_stalled(now, seen, self._settings)
        if verdict is not None:
            self._end_all(verdict)
        lines = int((now - own.moved) // self._settings.heartbeat_seconds)
        if lines > self._said:
            self._say(describe_wait(now, seen))
        self._said = lines

    def _watch_main(self, now: float) -> None:
        """Send this rank's place, and judge rank 0. Runs on all other ranks."""
        if self._channel is None:
            return
        main, own = self._seen[0], self._seen[self._ranks.rank]
        own.hear(now, self._place)
        self._channel.send({"place": self._place})
        for message in self._channel.receive():
            if "abort" in message:
                self._report("", message["abort"])  # Rank 0 says why.
                os._exit(HUNG)
            _note(main, message, now)
        if self._channel.closed and main.left is None:
            main.broken = now if main.broken is None else main.broken
            again = connect(self._address, self._token, self._ranks.rank, self._interval_s)
            if again is not None:
                self._channel.close()
                self._channel = again
        verdict = find_lost(now, [main, own], self._settings)
        if verdict is not None:
            self._report(verdict.message, verdict.stalled)
            os._exit(HUNG)

    def _end_all(self, verdict: Verdict) -> None:
        """End the run on all ranks. Runs on rank 0."""
        if self._hub is not None:
            self._hub.send({"abort": verdict.stalled})
        self._report(verdict.message, verdict.stalled, verdict)
        deadline = time.monotonic() + REPORT_S
        mute = set() if verdict.stalled else set(verdict.ranks)
        while self._hub is not None and self._hub.connected() - mute and time.monotonic() < deadline:
            self._hub.receive()
            time.sleep(0.05)
        os._exit(HUNG)

    def _report(self, message: str, stacks: bool, verdict: Verdict | None = None) -> None:
        """Say why the run ends. A thread does it, because outputs or the disk may be blocked too."""

        def report() -> None:
            if message:
                _write(f"lrnn: error: {message}\n")
            if stacks:
                _write_stacks(f"stacks of {self._seen[self._ranks.rank]}:\n")
            if self.log is not None and verdict is not None:
                self.log.write({"event": "hang", "message": verdict.message, "ranks": verdict.ranks})

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(timeout=REPORT_S)

    def _say(self, text: str) -> None:
        self.log.say(text) if self.log is not None else print(text, flush=True)


def _note(peer: Seen, message: Message, now: float) -> None:
    place: Any = message.get("place")
    peer.hear(now, None if place is None else Place(*place))
    if "goodbye" in message:
        peer.leave(now, message["goodbye"])


def _write(text: str) -> None:
    """Write to stderr in one piece, because other ranks write there too."""
    os.write(2, text.encode())


def _write_stacks(title: str) -> None:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        _write(title + file.read().decode(errors="replace"))
