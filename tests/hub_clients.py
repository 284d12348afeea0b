"""Processes that talk to the stand-in Hub: forked, each for one program, from one that has imported all."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fake_hub import TOKEN, Hub


ROOT = Path(__file__).parent.parent
# The child's words go to files: they must not mix with those between the two processes.
ZYGOTE = """
import json, os, socket, sys, time, traceback
import hsenet.cli, hsenet.publishing, datasets, stage_runs

time.sleep = lambda seconds: None  # the client library waits between its tries
socket.gethostname = lambda: sys.argv[1]  # the real one may be an ordinary word

for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(order["folder"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(order["environment"])
        try:
            code = 0
            exec(order["program"], {"arguments": order["arguments"], "__name__": "__main__"})
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if not isinstance(error.code, int): print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
MACHINE = "ctnode17.example.org"
COMMAND = "import sys; from hsenet.cli import main; sys.exit(main(arguments))"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


class Clients:
    """
    Args:
        hub: whose address they have all been told.
        folder: where they work, and where their cache is.
    """

    def __init__(self, hub: Hub, folder: Path):
        self.folder, self.pid = folder, 0
        settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **hub.environment(folder / "home"), **settings}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._zygote = subprocess.Popen([sys.executable, "-c", ZYGOTE, MACHINE], cwd=folder, env=environment, **pipes)

    def close(self) -> None:
        self._zygote.stdin.close()
        self._zygote.wait(10)

    def hsenet(self, *arguments: str | Path, **environment: str) -> Done:
        """The command `hsenet` with these arguments, logged in unless told HF_TOKEN=""."""
        return self.run(COMMAND, *arguments, **environment)

    def run(self, program: str, *arguments: str | Path, **environment: str) -> Done:
        """A program that finds `arguments`; `pid` is its process while it runs."""
        order = {"program": program, "arguments": list(map(str, arguments)), "folder": str(self.folder)}
        order["environment"] = {name: value for name, value in ({"HF_TOKEN": TOKEN} | environment).items() if value}
        print(json.dumps(order), file=self._zygote.stdin, flush=True)
        self.pid = int(self._zygote.stdout.readline())
        code = int(self._zygote.stdout.readline())
        return Done(code, *((self.folder / name).read_text() for name in ("out", "err")))
