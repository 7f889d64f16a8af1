"""Processes that use a bucket: to start them, to hear what they did, to see that none outlives a test."""

import contextlib
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

#: Seconds after which a process counts as hung. Nothing here asserts that anything is fast.
PATIENCE = 60.0


class Child:
    """A function that runs in a forked process of its own, and what it returned.

    Use it as a context: what still runs when it is left is killed.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.close(self._reader)
                os.write(writer, json.dumps(function(*args)).encode())
                code = 0
            except BaseException:  # noqa: BLE001 - a child must not return into the test runner
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        self.ended = False

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._reader)

    def result(self) -> Any:
        """Return what the function did; fail if it raises or hangs."""
        deadline, said = time.monotonic() + PATIENCE, b""
        while chunk := self._read(deadline):
            said += chunk
        _, status = os.waitpid(self.pid, 0)
        self.ended = True
        assert os.waitstatus_to_exitcode(status) == 0, "the child failed: see stderr"
        return json.loads(said)

    def kill(self) -> None:
        """Kill it with SIGKILL, unless it has ended."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _read(self, deadline: float) -> bytes:
        ready, _, _ = select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, "the child hangs"
        return os.read(self._reader, 65536)


@contextlib.contextmanager
def children(number: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in several processes: ``function(index, *args)``."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Child(function, index, *args)) for index in range(number)]


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a forked process."""
    with Child(function, *args) as child:
        return child.result()
