"""``celery limits``: shows, explains, changes and checks limits.

Celery finds this command by its entry point and loads it with every ``celery`` program, whatever app that is
for. So it imports nothing of `rate_limiter.celery` before `check` needs it, and asks workers by remote control
alone. It exits with 2 if an argument is wrong, and with 69 if no worker or no broker answers, as Celery's own
commands do for a worker.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import click

from ..redis_state import somebody
from .table import Table

__all__ = ["limits"]

#: The exit statuses.
_WRONG_ARGUMENT: Final = 2
_NO_WORKER: Final = 69

#: Seconds to wait for replies, as Celery's own commands do.
_TIMEOUT: Final = 1.0


def _common(command: Any) -> Any:
    """Add the options of Celery's own commands that ask workers. They may stand before a subcommand too."""
    nodes = click.option("-d", "--destination", metavar="NODE,…", help="Ask these workers only.")
    wait = f"Seconds to wait for replies. Default: {_TIMEOUT:g}."
    seconds = click.option("-t", "--timeout", type=click.FloatRange(0, min_open=True), help=wait)
    return nodes(seconds(command))


_queues = click.option(
    "-Q",
    "--queues",
    metavar="QUEUE,…",
    help="Look at the lanes of these queues. Default: all queues of the app.",
)


@click.group(invoke_without_command=True)
@_common
@click.option("-j", "--json", "as_json", is_flag=True, help="Print the workers' replies as JSON.")
@click.option(
    "-w", "--watch", is_flag=True, help="Draw the table again every second, with current rates."
)
@click.pass_context
def limits(ctx: click.Context, /, as_json: bool, watch: bool, **_: Any) -> None:
    """Show the rate limits of the workers; or explain, change and check them."""
    if ctx.invoked_subcommand is not None:
        return
    if as_json and watch:
        raise click.UsageError("--json and --watch exclude each other")
    if as_json:
        click.echo(json.dumps(_replies(ctx, "limits"), indent=2))
    elif watch:
        _watch(ctx)
    else:
        for line in Table(_replies(ctx, "limits")).lines():
            click.echo(line)


@limits.command()
@click.argument("task_id")
@_queues
@_common
@click.pass_context
def explain(ctx: click.Context, /, task_id: str, queues: str | None, **_: Any) -> None:
    """Tell where the job TASK_ID is, and why and how long it waits."""
    replies = _replies(ctx, "explain", task_id=task_id)
    for node, reply in sorted(replies.items()):
        if "error" in reply:
            click.echo(f"{node}: {reply['error']}")
        elif reply["state"] == "held":
            click.echo(
                f"{node}: {reply['task']} is held by limit {reply['limit']}, {reply['before']} jobs before it; "
                f"it runs in {reply['seconds']:.3g} s, if a slot of the pool is free"
            )
        elif reply["state"] == "parked":
            click.echo(
                f"{node}: {task_id} is parked in {reply['lane']}, unless another worker has it now"
            )
        elif reply["state"] != "unknown":
            click.echo(f"{node}: {reply['task']} {reply['state']}")
    if any(reply.get("state", "unknown") != "unknown" for reply in replies.values()):
        return
    if parked := _find_parked(ctx, task_id, _split(queues)):
        click.echo(f"{task_id} is parked in {parked[0]}, {parked[1]} jobs before it")
    else:
        text = f"No worker has the job {task_id}: it is in its queue, has ended, or never was"
        _end(ctx, text, _WRONG_ARGUMENT)


@limits.command(name="set")
@click.argument("name")
@click.option("--rate", metavar="RATE", help="Tokens per time: 10/m, 5/s, or a number per second.")
@click.option("--capacity", metavar="TOKENS", help="The most tokens in the bucket: the largest burst.")
@click.option("--key", help="Change the bucket of this key only.")
@click.option("--reason", default="", help="Shown with the limit.")
@_common
@click.pass_context
def set_(ctx: click.Context, /, name: str, **order: Any) -> None:
    """Change the rate or the capacity of the limit NAME in all workers.

    The change lasts until the worker ends; for a limit in Redis, until `restore`.
    """
    _change(ctx, name, order)


@limits.command()
@click.argument("name")
@click.argument("duration")
@click.option("--key", help="Pause the bucket of this key.")
@click.option("--reason", default="", help="Shown with the limit.")
@_common
@click.pass_context
def pause(ctx: click.Context, /, name: str, duration: str, **order: Any) -> None:
    """Let no job of the limit NAME go for DURATION: 30s, 5m, 2h."""
    _change(ctx, name, order | {"pause": duration})


@limits.command()
@click.argument("name")
@click.option("--key", help="Resume the bucket of this key.")
@click.option("--reason", default="", help="Shown with the limit.")
@_common
@click.pass_context
def resume(ctx: click.Context, /, name: str, **order: Any) -> None:
    """End the pause of the limit NAME."""
    _change(ctx, name, order | {"resume": True})


@limits.command()
@click.argument("name")
@click.option("--key", help="Restore the bucket of this key only.")
@_common
@click.pass_context
def restore(ctx: click.Context, /, name: str, **order: Any) -> None:
    """Clear what `set` has stored in Redis for the limit NAME: the numbers of the code count again."""
    _change(ctx, name, order | {"restore": True})


@limits.command()
@click.pass_context
def check(ctx: click.Context) -> None:
    """Check all declarations of the app without a broker.

    Prints a line for each problem. Exits with 1 if there is one.
    """
    from ..celery.check import count, problems  # noqa: PLC0415 - see above

    found = problems(ctx.obj.app)
    for problem in found:
        click.echo(problem)
    if found:
        ctx.exit(1)
    number = count(ctx.obj.app)
    click.echo(f"All limits are well: {number}." if number else "No limit is declared.")


@limits.command()
@click.argument("name", required=False)
@_queues
@click.pass_context
def unpark(ctx: click.Context, /, name: str | None, queues: str | None) -> None:
    """Put parked jobs of the limit NAME, or of all, back into their queues, in front.

    A worker whose limit parks moves them aside again.
    """
    from ..celery.lanes import find_lanes, unpark  # noqa: PLC0415 - see above

    app = ctx.obj.app
    with _broker(ctx):
        found = find_lanes(app, name, _split(queues))
        click.echo(f"Put {unpark(app, found)} jobs back from {len(found)} lanes.")


@limits.command()
@click.argument("name", required=False)
@_queues
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.pass_context
def purge(ctx: click.Context, /, name: str | None, queues: str | None, force: bool) -> None:
    """Delete parked jobs of the limit NAME, or of all. `celery purge` does not find them."""
    from ..celery.lanes import find_lanes, purge  # noqa: PLC0415 - see above

    app = ctx.obj.app
    with _broker(ctx):
        found = find_lanes(app, name, _split(queues))
        for lane in found:
            click.echo(f"{lane.name}: {lane.jobs} jobs")
        if found and (force or click.confirm("Delete them?", abort=True)):
            click.echo(f"Deleted {purge(app, found)} jobs.")
        elif not found:
            click.echo("Nothing is parked.")


def _find_parked(ctx: click.Context, task_id: str, queues: list[str]) -> tuple[str, int] | None:
    try:
        from ..celery.lanes import find_job  # noqa: PLC0415 - see above

        return find_job(ctx.obj.app, task_id, queues)
    except Exception as error:  # noqa: BLE001 - permissions, or an app without the library
        click.echo(f"Could not look into the lanes of parked jobs: {error}", err=True)
        return None


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def _change(ctx: click.Context, name: str, order: dict[str, Any]) -> None:
    common = ("destination", "timeout")
    given = {each: value for each, value in order.items() if value is not None and each not in common}
    given["who"] = somebody()
    replies = _replies(ctx, "limit", name=name, **given)
    for node, reply in sorted(replies.items()):
        click.echo(f"{node}: {reply.get('ok') or reply['error']}")
    if any("error" in reply for reply in replies.values()):
        ctx.exit(_WRONG_ARGUMENT)


def _replies(ctx: click.Context, command: str, **arguments: Any) -> dict[str, Any]:
    """Return the reply of each worker, of one at least."""
    replies = _ask(ctx, command, **arguments)
    if not replies:
        _end(ctx, f"No worker has answered within {_timeout(ctx):g} s", _NO_WORKER)
    return replies


def _ask(ctx: click.Context, command: str, **arguments: Any) -> dict[str, Any]:
    nodes = _option(ctx, "destination")
    with _broker(ctx):
        replies = ctx.obj.app.control.broadcast(
            command,
            arguments=arguments,
            destination=nodes and [node.strip() for node in nodes.split(",")],
            timeout=_timeout(ctx),
            reply=True,
        )
    merged = {node: reply for each in replies for node, reply in each.items()}
    for node, reply in merged.items():
        error = reply.get("error")
        if isinstance(error, str) and error.startswith("KeyError"):  # Celery's, to an unknown command
            merged[node] = {"error": "this worker's app does not use rate_limiter"}
    return merged


@contextlib.contextmanager
def _broker(ctx: click.Context) -> Iterator[None]:
    """End with a line that names the broker, if that does not answer or has no lanes."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except Exception as error:
        from ..celery.lanes import why_no_broker  # noqa: PLC0415 - see above

        if why := why_no_broker(ctx.obj.app, error):
            _end(ctx, why, _NO_WORKER)
        raise


def _timeout(ctx: click.Context) -> float:
    return _option(ctx, "timeout") or _TIMEOUT


def _option(ctx: click.Context, name: str) -> Any:
    """Return an option of `_common`, given to the subcommand or to the command before it."""
    above = ctx.parent.params.get(name) if ctx.parent else None
    return ctx.params.get(name) or above


def _watch(ctx: click.Context) -> None:
    """Draw the table every second until Ctrl-C."""
    try:
        from rich.live import Live  # noqa: PLC0415 - of the extra "cli"
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        for text in _looks(ctx):
            click.clear()
            click.echo(text)
        return
    with Live(auto_refresh=False, screen=True) as live:
        for text in _looks(ctx):
            live.update(Text(text, no_wrap=True), refresh=True)


def _looks(ctx: click.Context) -> Iterator[str]:
    table = None
    while True:
        began = time.monotonic()
        table = Table(_ask(ctx, "limits"), watched=True, before=table)
        yield "\n".join(table.lines())
        time.sleep(max(0.0, _TIMEOUT - (time.monotonic() - began)))


def _end(ctx: click.Context, message: str, status: int) -> NoReturn:
    click.echo(message, err=True)
    ctx.exit(status)
