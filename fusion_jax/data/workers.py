"""Runs a function over tasks in worker processes, with a progress bar."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

import tqdm

from fusion_jax.command_line.cli import out_of_ctrl_c
from fusion_jax.errors import UserError


def progress_bar(total: int, done: int, description: str, shown: bool) -> tqdm.tqdm:
    """Returns a bar over records: live in a terminal, an occasional line in a log file."""
    slow = {} if sys.stderr.isatty() else {"mininterval": 10.0}
    return tqdm.tqdm(total=total, initial=done, unit="record", desc=description, disable=not shown, **slow)


def run_in_processes(
    function: Callable[[Any, Callable[[int], None]], Any],
    tasks: Iterable[Any],
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[Any]:
    """Yields the result of `function` for each task, in the order in which they finish. No process outlives this one by
    more than a record, even if this one is killed.

    Raises:
      UserError: a process died, or as `function` does.
      OSError: as `function` does, also for its ValueError and RuntimeError.
    """
    tasks = iter(tasks)
    if workers == 1:
        yield from (function(task, advance) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[connection.Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for _, task in zip(range(workers), tasks):  # in this order, zip never takes a task that it does not yield
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(function, far, os.getpid()), daemon=True)
            with out_of_ctrl_c():
                process.start()
            far.close()
            near.send(task)
            running[near] = process
        while running:
            for pipe in connection.wait(list(running)):
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError) as e:
                    raise UserError("A worker process was killed; the same command continues from here.") from e
                if kind == "advance":
                    advance(value)
                    continue
                if kind == "error":
                    raise value
                if (task := next(tasks, None)) is None:
                    pipe.close()
                    running.pop(pipe).join()
                else:
                    pipe.send(task)
                yield value
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _serve(function: Callable[[Any, Callable[[int], None]], Any], pipe: connection.Connection, parent: int) -> None:
    """Runs tasks from a pipe until the parent closes it or ends."""
    waiting, sent = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal waiting, sent
        waiting += count
        if time.monotonic() - sent > 0.25:
            pipe.send(("advance", waiting))  # fails, and so ends the process, once the parent has ended
            waiting, sent = 0, time.monotonic()

    with contextlib.suppress(EOFError, ConnectionError):
        while os.getppid() == parent:
            task = pipe.recv()
            try:
                result = function(task, advance)
            except UserError as e:
                pipe.send(("error", UserError(f"{e}")))
            except (OSError, RuntimeError, ValueError) as e:
                if isinstance(e, ConnectionError):
                    raise
                pipe.send(("error", OSError(f"{e}")))  # the parent may not know the classes of other errors
            else:
                pipe.send(("advance", waiting))
                pipe.send(("done", result))
                waiting = 0
