"""Test that a run that hangs ends and names the rank that it hangs on, and that other runs are left alone."""

import json
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_server import run_program

from lrnn.pretrain.config import WatchdogConfig
from lrnn.pretrain.distributed import COLLECTIVE_TIMEOUT
from lrnn.pretrain.watchdog import watchdog
from lrnn.pretrain.watchdog.hang_rules import BROKEN_SECONDS, Place, Seen, describe_wait, find_lost, find_stalled
from lrnn.pretrain.watchdog.heartbeats import Hub, connect
from lrnn.pretrain.watchdog.watchdog import HUNG, AwakeClock, Watchdog
from lrnn.records import read_metrics

SETTINGS = WatchdogConfig(lost_seconds=10, stall_seconds=100, startup_seconds=1000, heartbeat_seconds=20)
DATA, STEP = Place("waiting for data", 5, 30, False), Place("computing the step", 5, 31, False)
FIRST = Place("trying a first pass", 0, 3, True)


def seen(rank: int, place: Place = STEP, heard: float = 1000, moved: float = 1000, **more) -> Seen:
    return Seen(rank, f"node{rank}", 4000 + rank, place, heard, moved, **more)


# --- The judgement ----------------------------------------------------------------------------------------------------


def test_a_rank_that_speaks_or_said_goodbye_is_not_lost():
    others = [
        seen(1, heard=990.1),
        seen(2, heard=10, left=10.0),  # a normal end, long ago
        seen(3, left=990.1, error="OSError: disk"),  # the others may be about to end too
        seen(4, broken=1000.1 - BROKEN_SECONDS),
    ]
    assert find_lost(1000, [seen(0), *others], SETTINGS) is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"heard": 990}, "is lost: no sign of life for 10 s"),
        ({"broken": 1000 - BROKEN_SECONDS}, "is gone: it closed its connection without a goodbye"),
        ({"left": 990.0, "error": "OSError: disk"}, "ended with OSError: disk"),
    ],
)
def test_lost(state, words):
    verdict = find_lost(1000, [seen(0, moved=988), seen(1, DATA, **state), seen(2, moved=989), seen(3)], SETTINGS)
    assert verdict is not None and verdict.ranks == [1] and not verdict.stalled
    assert verdict.message == (
        f"rank 1 (node1, process 4001) {words}; it was last waiting for data (step 5); "
        "the others: ranks 0, 2-3 computing the step (step 5) for 0 s"
    )


def test_many_lost_ranks_make_a_short_message():
    verdict = find_lost(1000, [seen(0), *(seen(r, heard=0) for r in range(1, 200))], SETTINGS)
    assert verdict is not None and verdict.ranks == list(range(1, 200))
    assert "and 191 more ranks" in verdict.message and len(verdict.message) < 1500


def test_the_stalled_rank_is_the_one_furthest_behind():
    ranks = [seen(0, moved=900), seen(1, DATA, moved=899), seen(2, moved=899.5)]
    assert find_stalled(999, ranks, SETTINGS) is None
    verdict = find_stalled(1000, ranks, SETTINGS)
    assert verdict is not None and verdict.ranks == [1] and verdict.stalled
    assert verdict.message == (
        "the run is stalled: no rank has made progress for 100 s; furthest behind: rank 1 (node1, process 4001): "
        "waiting for data (step 5) for 101 s; the others: ranks 0, 2 computing the step (step 5) for 100 s"
    )


def test_a_stall_of_all_in_one_phase_blames_all():
    verdict = find_stalled(1100, [seen(0), seen(1)], SETTINGS)
    assert verdict is not None and verdict.ranks == [0, 1]
    assert "equally far: rank 0 (" in verdict.message and "; rank 1 (" in verdict.message


def test_one_rank_that_moves_is_no_stall():
    assert find_stalled(1100, [seen(0), seen(1, moved=1000.1)], SETTINGS) is None


def test_the_first_step_may_take_longer():
    ranks = [seen(0), seen(1, FIRST)]
    assert find_stalled(1999, ranks, SETTINGS) is None
    verdict = find_stalled(2000, ranks, SETTINGS)
    assert verdict is not None and verdict.ranks == [1]
    assert "rank 1 (node1, process 4001): trying a first pass for 1000 s" in verdict.message


def test_a_rank_that_left_is_not_behind():
    ranks = [seen(0), seen(1, DATA, left=1000.0)]
    verdict = find_stalled(1100, ranks, SETTINGS)
    assert verdict is not None and verdict.ranks == [0]
    assert find_stalled(1100, [seen(0, left=1000.0), ranks[1]], SETTINGS) is None


def test_a_rank_is_heard():
    peer = seen(1, DATA, heard=0, moved=0, broken=5.0)
    peer.hear(10, DATA)
    assert (peer.heard, peer.moved, peer.broken) == (10, 0, None)
    peer.hear(20)
    assert (peer.heard, peer.moved) == (20, 0)
    peer.hear(30, STEP)
    assert (peer.heard, peer.moved, peer.place) == (30, 30, STEP)


def test_the_line_about_a_long_phase():
    assert describe_wait(1060, [seen(0), seen(1)]) == "still computing the step (step 5): 60 s"
    ranks = [seen(0), seen(1, DATA, moved=990), seen(2, DATA, left=1000.0)]
    assert describe_wait(1060, ranks).endswith(": 60 s; rank 1 waiting for data (step 5) for 70 s")
    assert describe_wait(60, [seen(0, FIRST, moved=0)]) == "still trying a first pass: 60 s"


def test_time_in_which_the_process_could_not_run_does_not_count():
    times = iter([100, 102, 103, 9000, 9001])
    clock = AwakeClock(4, lambda: next(times))
    assert [clock.tick() for _ in range(4)] == [2, 3, 7, 8]


# --- Signs of life ----------------------------------------------------------------------------------------------------


def eventually(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_messages_arrive_whole_in_order_and_before_the_end():
    hub, heard = Hub(), []
    peer = connect(("127.0.0.1", hub.port), hub.token, 3)
    for i in range(500):
        peer.send({"i": i, "text": "x" * 100})
    peer.send({"goodbye": ""})
    peer.close()
    eventually(lambda: heard.extend(hub.receive()) or (heard and "goodbye" in heard[-1][1]))
    assert {rank for rank, _ in heard} == {3} and [m["i"] for _, m in heard[:-1]] == list(range(500))
    eventually(lambda: hub.receive() == [] and hub.connected() == set())
    hub.close()


def test_the_last_message_survives_a_close_on_unread_data():
    hub = Hub()
    peer = connect(("127.0.0.1", hub.port), hub.token, 1)
    eventually(lambda: hub.receive() == [] and hub.connected() == {1})
    peer.send({"place": "unread"})
    hub.send({"goodbye": ""})
    hub.close()
    messages: list = []
    eventually(lambda: messages.extend(peer.receive()) or peer.closed)
    assert messages == [{"goodbye": ""}]


def test_foreign_connections_are_ignored():
    hub = Hub()
    foreign = [connect(("127.0.0.1", hub.port), "wrong", 1), connect(("127.0.0.1", hub.port), hub.token, 1)]
    foreign[0].send({"place": "here"})
    foreign[1]._socket.send(b"GET / HTTP/1.1\n")
    eventually(lambda: hub.receive() == [] and foreign[0].receive() == [] and foreign[0].closed)
    eventually(lambda: hub.receive() == [] and hub.connected() == set())
    hub.close()


def test_nobody_waits_for_a_peer_that_does_not_read():
    hub = Hub()
    connect(("127.0.0.1", hub.port), hub.token, 1)
    start = time.monotonic()
    for _ in range(300):
        hub.send({"text": "x" * 60_000})
        hub.receive()
    assert time.monotonic() - start < 5
    hub.close()


def test_an_address_without_a_listener():
    hub = Hub()
    hub.close()
    assert connect(("127.0.0.1", hub.port), hub.token, 1, timeout_s=1) is None


# --- The threads of a few ranks ---------------------------------------------------------------------------------------

FAST = WatchdogConfig(lost_seconds=1, stall_seconds=100, startup_seconds=100, heartbeat_seconds=100)


class Group:
    """Watchdogs of ranks that are threads of this process; `exits` lists the statuses with which they end it."""

    def __init__(self, world_size: int, settings: WatchdogConfig, monkeypatch):
        self.exits: list[int] = []
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setattr(watchdog.os, "_exit", self._exit)
        barrier, values = threading.Barrier(world_size), [None] * world_size

        def gather(rank, value):
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        ranks = [
            SimpleNamespace(rank=r, world_size=world_size, is_main=r == 0, gather=lambda v, r=r: gather(r, v))
            for r in range(world_size)
        ]
        self.dogs = [Watchdog(r, settings) for r in ranks]
        threads = [threading.Thread(target=dog.__enter__) for dog in self.dogs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _exit(self, status: int):
        self.exits.append(status)
        threading.Event().wait()  # the thread does nothing more, as in a process that ended

    def leave(self, *order: int) -> None:
        """Make the ranks leave one after the other, with pauses longer than the limit for a lost rank."""
        for i, rank in enumerate(order):
            time.sleep(1.6 if i else 0)
            self.dogs[rank].__exit__(None, None, None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_end_in_any_order(order, monkeypatch, capfd):
    group = Group(3, FAST, monkeypatch)
    group.leave(*order)
    assert group.exits == [] and capfd.readouterr() == ("", "")


def test_a_broken_connection_is_restored(monkeypatch, capfd):
    group = Group(2, FAST, monkeypatch)
    time.sleep(0.8)
    group.dogs[1]._channel._socket.shutdown(2)
    time.sleep(1.6)
    group.leave(1, 0)
    assert group.exits == [] and capfd.readouterr() == ("", "")


def test_ranks_that_cannot_reach_the_main_one_are_not_watched(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "connect", lambda *arguments: None)
    group = Group(2, FAST, monkeypatch)
    time.sleep(1.6)
    group.leave(0, 1)
    out, err = capfd.readouterr()
    assert group.exits == [] and err == "" and out.count("\n") == 1
    assert "rank 1 does not reach 127.0.0.1:" in out and "go unnoticed" in out


def test_a_run_of_one_process_is_watched(monkeypatch, capfd):
    stall = WatchdogConfig(lost_seconds=9, stall_seconds=0.8, startup_seconds=100, heartbeat_seconds=0.3)
    group = Group(1, stall, monkeypatch)
    for step in (7, 8):  # the first of a process that resumes, and the second
        group.dogs[0].enter("waiting for data", step)
        time.sleep(0.2)
    eventually(lambda: group.exits == [HUNG])
    out, err = capfd.readouterr()
    assert "still waiting for data (step 8): 0 s" in out
    assert "lrnn: error: the run is stalled: no rank has made progress for 1 s; " in err
    assert "equally far: rank 0 (" in err and "test_a_run_of_one_process_is_watched" in err


def test_the_first_step_of_a_process_is_part_of_its_start(monkeypatch):
    (dog,) = Group(1, FAST, monkeypatch).dogs
    starting = []
    for step in (0, 7, 7, 8, 8):
        dog.enter("", step)
        starting.append(dog._place.starting)
    assert starting == [True, True, True, False, False]
    dog.__exit__(None, None, None)


def test_a_bug_in_the_watchdog_is_reported_and_ends_no_run(monkeypatch, capfd):
    def defect(*arguments):
        raise KeyError("defect")

    group = Group(2, FAST, monkeypatch)
    monkeypatch.setattr(watchdog, "find_stalled", defect)  # only the main rank calls it
    time.sleep(1.6)
    group.leave(0, 1)
    assert group.exits == [] and capfd.readouterr() == (
        "the watchdog of rank 0 failed, hangs go unnoticed: KeyError('defect')\n", ""
    )  # fmt: skip


def test_a_hang_ends_the_process_though_nothing_can_be_written(monkeypatch):
    """A process that hangs may block the outputs too."""
    monkeypatch.setattr(watchdog, "REPORT_S", 0.5)
    monkeypatch.setattr(watchdog, "_write", lambda text: time.sleep(20))
    stall = WatchdogConfig(lost_seconds=9, stall_seconds=0.4, startup_seconds=0.4, heartbeat_seconds=9)
    group = Group(1, stall, monkeypatch)
    eventually(lambda: group.exits == [HUNG], 3)


# --- Real trainings ---------------------------------------------------------------------------------------------------

LOST_S, STALL_S = 4, 5
MARGIN_S = 8  # allowance for intervals, last messages and a busy machine
RUNS = {  # the actions of the ranks while they fetch the data of step 3
    "stopped": ["", "stop"],
    "main stopped": ["stop", ""],
    "asleep": ["", "sleep"],
    "crashed": ["sleep", "crash"],
    "raised": ["sleep", "raise"],
    "paused": ["pause", "pause"],
}


class Outcome:
    """The end of one of `RUNS`."""

    def __init__(self, folder: Path, run_dir: Path):
        ended = json.loads((folder / "ended.json").read_text())
        self.status, self.seconds = ended["status"], ended["seconds"]
        self.out = [(folder / f"{rank}.out").read_text() for rank in range(2)]
        self.err = [(folder / f"{rank}.err").read_text() for rank in range(2)]
        self.events = [r for r in read_metrics(run_dir) if r.get("event") == "hang"]


@pytest.fixture(scope="module")
def outcomes(config_in, tmp_path_factory):
    """Run all of them side by side, because they mostly wait."""
    folder = tmp_path_factory.mktemp("hangs")
    # The other limit is out of reach, because a busy machine could exceed either.
    settings = {"lost_seconds": LOST_S, "stall_seconds": 60, "startup_seconds": 300, "heartbeat_seconds": 1}
    specs = {
        name: {"config": config_in(folder, f"run {name}", steps=4, watchdog=dict(settings)), "at_step_3": actions}
        for name, actions in RUNS.items()
    }
    specs["asleep"]["config"]["watchdog"] |= {"lost_seconds": 60, "stall_seconds": STALL_S}
    specs["crashed"]["config"]["watchdog"] |= {"lost_seconds": 80, "stall_seconds": 80}  # noticing takes less
    specs["paused"]["config"]["watchdog"] |= {"stall_seconds": STALL_S}
    (folder / "specs.json").write_text(json.dumps(specs))
    worker, output = Path(__file__).with_name("hanging_worker.py"), folder / "output"
    assert run_program(worker, output, folder / "specs.json") == 0, output.read_text()
    return {name: Outcome(folder / name, folder / f"run {name}") for name in RUNS}


def test_a_stopped_rank_is_named(outcomes):
    run = outcomes["stopped"]
    assert run.status == [HUNG, None] and LOST_S - 1 < run.seconds < LOST_S + MARGIN_S
    assert "lrnn: error: rank 1 (" in run.err[0] and "is lost: no sign of life for" in run.err[0]
    assert "it was last waiting for data (step 3)" in run.err[0]
    assert "the others: rank 0 agreeing whether to continue (step 3) for" in run.err[0]
    assert run.events[0]["ranks"] == [1] and run.events[0]["message"] in run.err[0]


def test_a_stopped_main_rank_is_named_by_the_others(outcomes):
    run = outcomes["main stopped"]
    assert run.status == [None, HUNG] and LOST_S - 1 < run.seconds < LOST_S + MARGIN_S
    assert "lrnn: error: rank 0 (" in run.err[1] and "is lost" in run.err[1]
    assert "it was last waiting for data (step 3)" in run.err[1]
    assert "the others: rank 1 agreeing whether to continue (step 3)" in run.err[1]


def test_a_rank_that_never_returns_is_named_with_its_stack(outcomes):
    run = outcomes["asleep"]
    assert run.status == [HUNG, HUNG] and STALL_S - 1 < run.seconds < STALL_S + MARGIN_S
    assert run.err[0].count("lrnn: error:") == 1 and "lrnn: error:" not in run.err[1]
    assert "furthest behind: rank 1 (" in run.err[0] and "waiting for data (step 3)" in run.err[0]
    assert "stacks of rank 1 (" in run.err[1] and "in forget_the_time" in run.err[1]
    assert "stacks of rank 0 (" in run.err[0] and "in worst" in run.err[0]
    assert run.events[0]["ranks"] == [1]
    assert "still agreeing whether to continue (step 3): 1 s; rank 1 waiting for data (step 3)" in run.out[0]


def test_a_crashed_rank_leaves_its_stack_and_is_named_where_no_launcher_does(outcomes):
    run = outcomes["crashed"]
    assert run.status == [HUNG, -signal.SIGSEGV] and run.seconds < BROKEN_SECONDS + MARGIN_S
    assert "Fatal Python error: Segmentation fault" in run.err[1] and "in act" in run.err[1]
    assert "rank 1 (" in run.err[0] and "is gone: it closed its connection without a goodbye" in run.err[0]


def test_a_rank_that_failed_while_others_wait_is_named(outcomes):
    run = outcomes["raised"]
    assert run.status == [HUNG, None] and LOST_S - 1 < run.seconds < LOST_S + MARGIN_S
    assert "rank 1 (" in run.err[0] and "ended with RuntimeError: the disk is broken" in run.err[0]


def test_a_suspended_run_continues(outcomes):
    run = outcomes["paused"]
    assert run.status == [0, 0] and run.seconds > LOST_S and run.seconds > STALL_S
    assert run.err == ["", ""] and run.events == []
    assert "done" in run.out[0] and "still waiting for data (step 3): 1 s" in run.out[0]


def test_collectives_do_not_give_up_before_the_watchdog(outcomes):
    limits = [field.metadata[1].le for field in WatchdogConfig.model_fields.values()]
    assert max(limits) < COLLECTIVE_TIMEOUT.total_seconds()
    said = [line for line in outcomes["paused"].out[0].splitlines() if line.startswith("collectives end after")]
    assert said == [f"collectives end after {COLLECTIVE_TIMEOUT}"] * 3  # our two groups, and one with torch's default
