"""huey's SqliteHuey: an event is the argument of a task. The consumer is a process of its own, as its guide says.

This file is also the application that `huey_consumer work_huey.huey` imports; what it should do there stands in the environment.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
from huey import SqliteHuey

SETTINGS = {
    # name: (fsync, shortest delay between polls in seconds)
    "default": (None, 0.1),
    "fsync": (True, 0.001),
    "no-fsync": (False, 0.001),
}

FOLDER = Path(os.environ.get("PEERS_FOLDER", "."))
FSYNC, DELAY = SETTINGS[os.environ.get("PEERS_SETTING", "default")]

huey = SqliteHuey("peers", filename=str(FOLDER / "huey.db"), **({} if FSYNC is None else {"fsync": FSYNC}))


class CallsInFile:
    """The calls of a handler that runs in another process: eight bytes appended for each."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def mark(self) -> None:
        os.write(self._file, time.monotonic_ns().to_bytes(8, "little"))

    def count(self) -> int:
        return os.fstat(self._file).st_size // 8

    def last(self) -> int:
        return int.from_bytes(os.pread(self._file, 8, (self.count() - 1) * 8), "little")

    def clear(self) -> None:
        os.ftruncate(self._file, 0)


calls = CallsInFile(FOLDER / "calls")


@huey.task()
def handle(event: common.OrderPlaced) -> None:
    calls.mark()


def consumer() -> subprocess.Popen[bytes]:
    """One worker thread, the default; no log line for each task; polling again after DELAY."""
    command = [str(Path(sys.prefix) / "bin" / "huey_consumer"), "work_huey.huey", "--quiet", "--no-periodic", "--workers", "1"]
    if DELAY != 0.1:
        command += ["--delay", str(DELAY), "--max-delay", str(DELAY)]
    here = str(Path(__file__).parent)
    return subprocess.Popen(command, cwd=here, env={**os.environ, "PYTHONPATH": here})


def work(task: common.Task) -> dict[str, object]:
    settings = common.pragmas(huey.storage.conn.execute, "PRAGMA on huey.storage.conn")
    running = consumer()
    try:
        return {"settings": settings, **measured(task)}
    finally:
        running.send_signal(signal.SIGINT)  # graceful
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()


def measured(task: common.Task) -> dict[str, object]:
    if task.measure == "latency":
        figures = common.latency(lambda i: handle(common.event(i)), calls, task.seconds, spread=max(DELAY, 0.005))
        return {"figures": figures, "how": f"handle(event); the consumer polls each {DELAY * 1000:g} ms"}

    at_once = common.BATCH if task.measure == "many" else 1

    def run(number: int) -> None:
        calls.clear()
        limit = task.limit()
        for first in range(0, number, at_once):
            if at_once == 1:
                handle(common.event(first))
            else:
                handle.map((common.event(i),) for i in range(first, first + at_once))
            common.hold_back(calls, first + at_once, limit)
        common.wait_for_calls(calls, number, limit)

    figures = common.throughput(run, task.seconds, at_once)
    return {"figures": figures, "how": "handle(event)" if at_once == 1 else f"handle.map({at_once} events): a commit for each"}


if __name__ == "__main__":
    import argparse

    # Before the application is imported for the second time, under its own name: the class of the task belongs to that one.
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting")
    parser.add_argument("--folder")
    given, _ = parser.parse_known_args()
    os.environ["PEERS_SETTING"] = given.setting
    os.environ["PEERS_FOLDER"] = given.folder
    Path(given.folder).mkdir(parents=True, exist_ok=True)
    import work_huey

    common.main(work_huey.work)
