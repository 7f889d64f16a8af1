"""Run the Python code blocks of a Markdown file in order, as a reader would.

python tests/code_blocks.py FILE

Every block fenced as ```python is executed, and knows what the blocks before it defined. Then:

- Functions that it defines are called if `ARGUMENTS` knows their parameters: as things stand, and once
  more with the block's buckets drained, when `RateLimitExceeded` is right. Endless loops are left out.
- Threads that it starts must end, and queues that it fills must become empty; neither may fail.
- A comment ``# Output: text`` must be among the lines that were printed, in order.
- A block of nothing but signatures is not executed, but compared with what it describes.

Line numbers in tracebacks are those of the Markdown file.
"""

import ast
import builtins
import contextlib
import faulthandler
import inspect
import io
import itertools
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_CALLS = """
do_batch do_work error_response execute fallback fetch_data handle_request perform_operation proceed
process process_batch process_data process_request rate_limited reject_request respond_429
respond_with_429 serve_from_cache serve_request
"""

#: What the API document leaves to the reader: work to do, things to do it with, and two imports.
STAND_INS: dict[str, Any] = {
    **dict.fromkeys(_CALLS.split(), lambda *_args: "done"),
    "get_user": lambda request: SimpleNamespace(tier=request),
    "work": lambda limiter: limiter.allow(),
    "batch_requests": [["a", "b"], ["c"]],
    "incoming_requests": ["a", "b", "c"],
    "items": [SimpleNamespace(weight=1), SimpleNamespace(weight=2.5)],
    "requests": ["a", "b", "c"],
    "threading": threading,
    "time": time,
}

#: Parameters of its functions, each with the values to call them with.
ARGUMENTS: dict[str, Sequence[Any]] = {
    "data_size": [50, 500],
    "items": [["a", "b", "c"]],
    "name": ["Thread-0"],
    "num_requests": [20],
    "op_type": ["read", "write", "delete", "list"],
    "payload_size": [10, 5000],
    "request": ["premium", "standard", "free"],
    "request_type": ["light", "medium", "heavy"],
    "requests": [["a", "b", "c"]],
    "worker_id": [1],
}


class Block:
    """A code block. ``line`` is that of its fence."""

    def __init__(
        self, path: Path, line: int, source: str, before: "Block | None", **known: Any
    ) -> None:
        self.path = path
        self.line = line
        self.source = source
        self.before = before
        self.known = known
        self.names: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"{self.path.name}:{self.line}"

    def run(self) -> None:
        """Execute it, after those before it, and raise what is wrong with it."""
        __tracebackhide__ = True  # pytest shows the block instead
        if self.before and self.before.names is None:
            with contextlib.suppress(Exception):
                self.before.run()
        known = self.before.names if self.before else {"__name__": self.path.stem}
        self.names = {**known, "__builtins__": {**vars(builtins), **self.known["stand_ins"]}}
        tree = ast.parse("\n" * self.line + self.source, str(self.path))
        code = compile(tree, str(self.path), "exec")
        described = [_described(node, self.names) for node in tree.body]
        if all(described):
            stubs = dict(self.names)
            exec(code, stubs)
            for node, real in zip(tree.body, described, strict=True):
                _compare(stubs[node.name], real, f"{self.path}:{node.lineno}")
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), _all_threads_well():
            exec(code, self.names)
            new = [value for name, value in self.names.items() if value is not known.get(name)]
            if self.known["arguments"]:
                functions = [value for value in new if self._is_to_be_called(value)]
                self._call(functions)
                for bucket in new:
                    if hasattr(bucket, "take_or_delay") and not isinstance(bucket, type):
                        bucket.allow(bucket.tokens or 1)
                with contextlib.suppress(self.names.get("RateLimitExceeded", ())):
                    self._call(functions)
            for value in new:
                if isinstance(value, queue.Queue):
                    _await(value.empty, "a queue is never emptied")
        lines = iter(printed.getvalue().splitlines())
        for number, text in enumerate(self.source.splitlines(), self.line + 1):
            if (output := re.search(r"# Output: (.*)", text)) and output[1] not in lines:
                raise AssertionError(
                    f"{self.path}:{number}: not printed: {output[1]!r}, but {printed.getvalue()!r}"
                )

    def _is_to_be_called(self, value: Any) -> bool:
        return (
            type(value) is FunctionType
            and value.__code__.co_filename == str(self.path)
            and "while True:" not in inspect.getsource(value)
        )

    def _call(self, functions: list[FunctionType]) -> None:
        for function in functions:
            parameters = inspect.signature(function).parameters.values()
            names = [p.name for p in parameters if p.default is p.empty]
            if self.known["arguments"].keys() >= set(names):
                for values in itertools.product(*(self.known["arguments"][name] for name in names)):
                    function(*values)


def blocks(
    path: Path,
    stand_ins: Mapping[str, Any] = STAND_INS,
    arguments: Mapping[str, Sequence[Any]] = ARGUMENTS,
) -> list[Block]:
    """Return the code blocks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        before = found[-1] if found else None
        found.append(Block(path, line, match[1], before, stand_ins=stand_ins, arguments=arguments))
    return found


def params(path: Path, **known: Mapping[str, Any]) -> list[Any]:
    """Return the blocks as parameters for a test that calls `Block.run`.

    Unless `STAND_INS` and `ARGUMENTS` are passed as to `blocks`, nothing stands in for undefined names,
    and the functions that a block defines are called by the blocks alone.
    """
    import pytest  # noqa: PLC0415 - not needed to run this file

    known = {"stand_ins": {}, "arguments": {}} | known
    return [pytest.param(block, id=repr(block)) for block in blocks(path, **known)]


def _described(node: ast.stmt, names: Mapping[str, Any]) -> Any:
    """Return the real thing, if this is but a signature: a class or a method without code."""
    if isinstance(node, ast.ClassDef) and all(map(_is_empty, node.body)):
        return names.get(node.name)
    if isinstance(node, ast.FunctionDef) and _is_empty(node):
        return getattr(names.get("TokenBucket"), node.name, None)
    return None


def _is_empty(node: ast.stmt) -> bool:
    body = node.body if isinstance(node, ast.FunctionDef) else [node]
    return all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body)


def _compare(stub: Any, real: Any, where: str) -> None:
    """Check that all is as described. More parameters are fine if they are optional."""
    if isinstance(stub, type):
        if stub.__bases__ != real.__bases__:
            raise AssertionError(f"{where}: bases of {stub.__name__}: {real.__bases__}")
        for name, method in vars(stub).items():
            if isinstance(method, FunctionType):
                _compare(method, vars(real)[name], where)
        return
    described, actual = inspect.signature(stub), inspect.signature(real)
    more = list(actual.parameters.values())[len(described.parameters) :]
    required = [p for p in actual.parameters.values() if p not in more or p.default is p.empty]
    if actual.replace(parameters=required) != described:
        raise AssertionError(f"{where}: {stub.__name__}{described} is in reality {actual}")


@contextlib.contextmanager
def _all_threads_well() -> Any:
    """Wait for the threads started inside, daemons apart, and raise what any of them raised."""
    before, errors, hook = set(threading.enumerate()), [], threading.excepthook
    threading.excepthook = lambda args: errors.append(args.exc_value)
    try:
        yield
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon:
                _await(lambda thread=thread: not thread.is_alive(), f"{thread} does not end")
    finally:
        threading.excepthook = hook
    if errors:
        raise errors[0]


def _await(condition: Callable[[], bool], failure: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(failure)
        time.sleep(0.005)


def main(path: Path) -> int:
    """Run all blocks of a file, and print those that fail."""
    faulthandler.dump_traceback_later(100, exit=True)  # says where it hangs
    sys.path.insert(0, str(ROOT))  # for `src.rate_limiter`
    start, found, failed = time.monotonic(), blocks(path), 0
    for block in found:
        try:
            block.run()
        except Exception:  # noqa: BLE001 - it is reported
            failed += 1
            sys.stderr.write(f"FAILED {path}:{block.line}\n{traceback.format_exc()}\n")
    seconds = time.monotonic() - start
    sys.stdout.write(f"{path}: {len(found)} code blocks, {failed} failed, {seconds:.0f} s\n")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
