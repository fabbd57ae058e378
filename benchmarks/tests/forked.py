"""Scripts as one runs them, with less to wait for: most of what a short one takes is the import of large libraries."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# mmengine imports transformers, where that is installed, for an optimizer of its; it takes as long as all the rest.
_WITHOUT_TRANSFORMERS = "import sys\nsys.modules['transformers'] = None\n"
# Not ours, and registering nothing. The toolboxes are imported by each script itself, in the order of a user's run.
_LIBRARIES = ('torch._dynamo', 'scipy.optimize', 'matplotlib.pyplot', 'pycocotools.coco', 'mmengine.runner')
# Forks for each line that it reads, and writes how the fork ended.
_SERVER = """
import importlib, json, os, runpy, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    call = json.loads(line)
    for path, descriptors in (os.devnull, [0]), (call['output'], [1, 2]):
        for descriptor in descriptors:
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
    os.chdir(call['folder'])
    os.environ.clear()
    os.environ.update(call['environment'])
    sys.path[:1] = call['path']
    sys.argv = call['command']
    runpy.run_path(sys.argv[0], run_name='__main__')
    break
"""


def environment(path: str = '', with_transformers: bool = False, **variables: str) -> dict[str, str]:
    """Variables for processes of tests, which so run on one thread and, with their children, without transformers.

    Args:
        path: in place of the ``PYTHONPATH`` of this process.
        with_transformers: as peft needs it.
    """
    first = '' if with_transformers else _without_transformers()
    path = os.pathsep.join(filter(None, [first, path or os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **variables}


def run_script(command: list[str], folder, variables: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of ``python COMMAND`` in a folder."""
    if torch.cuda.is_available():  # It does not work in forks.
        return run_process(command, folder, variables)
    path = [os.path.dirname(command[0]), *filter(None, variables.get('PYTHONPATH', '').split(os.pathsep))]
    with tempfile.NamedTemporaryFile('r') as output:
        call = dict(command=command, folder=str(folder), environment=variables, path=path, output=output.name)
        server = _server()
        server.stdin.write(json.dumps(call) + '\n')
        server.stdin.flush()
        return int(server.stdout.readline()), output.read()


def run_process(command: list[str], folder, variables: dict[str, str]) -> tuple[int, str]:
    """The same in a process of its own."""
    call = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return call.returncode, call.stdout


@functools.cache
def _without_transformers() -> str:
    """A folder whose sitecustomize, which every Python imports at its start, forbids the import."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    Path(folder.name, 'sitecustomize.py').write_text(_WITHOUT_TRANSFORMERS)
    return folder.name


@functools.cache
def _server() -> subprocess.Popen:
    command = [sys.executable, '-c', _SERVER, *_LIBRARIES]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
