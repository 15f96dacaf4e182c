"""Start the project's commands without importing their packages anew each time.

The imports of ``nic`` and ``dagster`` take 2 to 10 s of processor time, and tests start a hundred
such commands. A server process imports the packages once and forks for each command. The commands
run as usual: in a process of their own, with the folder, the environment, the files 0, 1 and 2 and
the exit status of a program. Only what happens during the imports is not tested this way.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGES = (
    "nic_assets.cli",
    "nic_assets.build",
    "nic_core.cli",
    "dagster._cli",
    "dagster_dg_cli.cli",
)
PROGRAMS = ("nic", "dagster", "dg")
CLIENT = "command_client.py"


@contextlib.contextmanager
def command_server() -> Iterator[Path]:
    """Yield a folder with the programs ``nic``, ``dagster``, ``dg`` and ``python``."""
    # not pytest's folder: the path of a socket has at most 108 characters
    with tempfile.TemporaryDirectory(prefix="commands-") as temporary:
        folder, address = Path(temporary), str(Path(temporary) / "socket")
        client = Path(__file__).with_name(CLIENT)
        for name in (*PROGRAMS, "python"):
            program = folder / name
            start = f"'{sys.executable}' -IS '{client}' '{address}' {name}"
            program.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
            program.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
                stdin=subprocess.PIPE,  # its end ends the server
                pass_fds=[listener.fileno()],
            )
        with server:
            yield folder


def next_command(listener: socket.socket) -> list[str]:
    """Wait for commands, and return in a new process for each with its arguments."""
    before = set(os.environ)
    for package in PACKAGES:
        import_module(package)
    settings = {name: os.environ[name] for name in os.environ if name not in before}
    gc.collect()
    gc.freeze()  # what was imported stays in memory that the processes share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            with connection.makefile("rb") as stream:
                request = json.load(stream)
            command = os.fork()
            if command == 0:
                connection.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                os.chdir(request["folder"])
                os.environ.clear()
                os.environ.update(settings | request["environment"])
                if "PYTHONWARNINGS" in os.environ:  # an action, as at the start of Python
                    warnings.simplefilter(os.environ["PYTHONWARNINGS"])
                return request["arguments"]
            _, status = os.waitpid(command, 0)
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        connection.close()
    os._exit(0)


def run(arguments: Sequence[str]) -> None:
    """Do what the named program does with its arguments, as the module ``__main__``."""
    program, *rest = arguments
    if program in PROGRAMS:
        path = str(Path(sys.executable).with_name(program))
        sys.argv, sys.path[0] = [path, *rest], str(Path(path).parent)
        runpy.run_path(path, run_name="__main__")
    elif rest[0] == "-m":
        sys.argv, sys.path[0] = rest[1:], os.getcwd()
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:  # -c TEXT, or a program on the standard input
        text, given = (rest[1], rest[2:]) if rest[0] == "-c" else (sys.stdin.read(), rest[1:])
        sys.argv, sys.path[0] = [rest[0], *given], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), main.__dict__)


class Ending:
    """The end of a command, without the deletion of every imported object.

    That deletion takes longer than most commands. The other functions for the exit are called
    before, since they are registered later.
    """

    def __init__(self) -> None:
        self.status = 0
        atexit.register(self.leave)

    def leave(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = error.code if isinstance(error, SystemExit) else error
        self.status = code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    ending = Ending()
    arguments = next_command(socket.socket(fileno=int(sys.argv[1])))
    with ending:
        run(arguments)
