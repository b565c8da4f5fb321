"""A Python that starts in a moment, for tests that start programs.

Every program is a fork of one process that has imported torch and the libraries of the experiments, which costs a new
interpreter 3 to 10 s of CPU. The repository's own modules are imported anew, from the program's working folder.

    subprocess.run([python(), "-m", "nanoGPT.train", "--steps", "2"], cwd=checkout)
    subprocess.run(["bash", "nanoGPT/run.sh"], env=os.environ | {"PYTHON": python()}, cwd=checkout)

It takes `-m MODULE`, `-c CODE` and FILE, forwards signals and the exit status, and a program whose starter is killed is
killed too. For other options, or with other settings for libraries to read on import, it is the real interpreter.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
READ_ON_IMPORT = ("HF_", "LC_", "OMP_", "PYTHON")  # prefixes of variables, but for these:
NOT_READ = ("PYTHON", "PYTHONPATH")  # the run scripts' interpreter; folders, which the fork adds
LIBRARIES = (
    "datasets",
    "matplotlib.pyplot",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torchtitan.train",
    "tyro",
    "wandb",
)


@contextmanager
def warm_python() -> Iterator[str]:
    """Start the process that programs are forked from; yields the path of an executable that stands for Python."""
    if not hasattr(os, "pidfd_open"):  # not Linux
        yield sys.executable
        return
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as door:
        folder = Path(name)
        executable = folder / "python"
        executable.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {folder} {sys.executable} "$@"\n')
        executable.chmod(0o755)
        (folder / "settings").write_text(json.dumps(_settings()))
        door.bind(str(folder / "door"))
        door.listen(64)
        code = f"from tests.warm import Forks; Forks({door.fileno()}).serve()"
        command = [sys.executable, "-c", code]
        server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[door.fileno()])
        try:
            yield str(executable)
        finally:
            server.communicate()  # the end of its input ends it


def python() -> str:
    """Return the executable that tests/conftest.py has started."""
    return os.environ["WARM_PYTHON"]


def _settings() -> dict[str, str]:
    read = {name: value for name, value in os.environ.items() if name.startswith(READ_ON_IMPORT)}
    return {name: value for name, value in read.items() if name not in NOT_READ}


# In a program's place: a small process that its starter sees.
def ask(folder: str, interpreter: str, *arguments: str) -> None:
    """Have the program forked, pass signals on to it, and end as it ends."""
    plain = [argument for argument in arguments[:2] if argument != "-u"] + list(arguments[2:])
    forkable = plain and (plain[0] in ("-m", "-c") or not plain[0].startswith("-"))
    if not forkable or _settings() != json.loads(Path(folder, "settings").read_text()):
        os.execv(interpreter, [interpreter, *arguments])
    request = {"arguments": plain, "folder": os.getcwd(), "environment": dict(os.environ), "python": f"{folder}/python"}
    with socket.socket(socket.AF_UNIX) as server, os.fdopen(os.memfd_create("request"), "w") as file:
        server.connect(f"{folder}/door")
        json.dump(request, file)
        file.flush()
        socket.send_fds(server, [b"."], [0, 1, 2, file.fileno()])
        pid = int(server.recv(16) or 0)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(server.recv(16) or -signal.SIGKILL)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# In the process that forks.
class Forks:
    """The programs that run, each with the client that stands for it; every source of events has its callback."""

    def __init__(self, door: int):
        self._listener, self._selector = socket.socket(fileno=door), selectors.DefaultSelector()
        self._programs: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that tells of the program's end
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._stop)
        self._selector.register(self._listener, selectors.EVENT_READ, self._start)

    def serve(self) -> None:
        """Fork a program per request until stdin ends."""
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _stop(self) -> None:
        for pid, _ in self._programs.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os._exit(0)

    def _start(self) -> None:
        _import_libraries()
        client, _ = self._listener.accept()
        _, descriptors, _, _ = socket.recv_fds(client, 1, 4)
        if not descriptors:  # the client was killed
            client.close()
            return
        pid = os.fork()
        if not pid:
            self._close_all(client)
            _run(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        client.sendall(str(pid).encode())
        end = os.pidfd_open(pid)
        self._programs[end] = (pid, client)
        self._selector.register(end, selectors.EVENT_READ, partial(self._ended, end))
        self._selector.register(client, selectors.EVENT_READ, partial(self._abandoned, pid, client))

    def _close_all(self, client: socket.socket) -> None:
        """Close, in a fork, all that belongs to the process that forks."""
        for held in (self._listener, self._selector, client, *(client for _, client in self._programs.values())):
            held.close()
        for end in self._programs:
            os.close(end)

    def _abandoned(self, pid: int, client: socket.socket) -> None:
        """End the program of a client that was killed: it says nothing after its request."""
        if client.fileno() < 0:  # both have ended, and the program was seen first
            return
        os.kill(pid, signal.SIGKILL)
        self._selector.unregister(client)

    def _ended(self, end: int) -> None:
        """Tell the client, if it lives, the exit status of its program."""
        pid, client = self._programs.pop(end)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):
            client.sendall(str(status).encode())
        with suppress(KeyError):
            self._selector.unregister(client)
        self._selector.unregister(end)
        os.close(end)
        client.close()


@cache
def _import_libraries() -> None:
    """Import what takes seconds, for the first request."""
    import Llama  # noqa: F401  (lets torchtitan be imported without a GPU)

    for name in LIBRARIES:
        importlib.import_module(name)
    for name in list(sys.modules):  # a program imports the repository from its own folder
        if (ROOT / name.split(".")[0]).is_dir():
            del sys.modules[name]
    sys.excepthook = sys.__excepthook__
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # forks then share the memory of all that is imported


def _run(stdin: int, stdout: int, stderr: int, request: int) -> None:
    with os.fdopen(request) as file:
        file.seek(0)
        asked = json.load(file)
    for descriptor, place in ((stdin, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.setsid()
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.executable = asked["python"]  # that of ranks and of other programs
    random.seed()
    import numpy

    numpy.random.seed()
    added = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = [asked["folder"], *filter(None, added.split(os.pathsep))]
    try:
        _execute(*asked["arguments"])
        status = 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(status)  # the interpreter's own end would take a second for so many modules


def _execute(kind: str, *rest: str) -> None:
    if kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = [kind, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [kind, *rest], str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    ask(*sys.argv[1:])
