"""Programs that loop, fork, fill memory, delete files, call home or kill: none of them harms anything."""

import os
import shutil
import socket
import sys
import threading
import time

import pytest

from fusion.evaluation import sandbox

PYTHON = [sys.executable, "-I", "-S"]

if why := sandbox.refusal():
    pytest.skip(f"this kernel cannot close the sandbox: {why}", allow_module_level=True)


def run(program, **options):
    return sandbox.run(PYTHON, program, ".py", **options)


def test_a_good_program_passes():
    found = run(
        "import math, threading\nt = threading.Thread(target=lambda: print(math.gcd(12, 18)))\nt.start(); t.join()"
    )
    assert found == (True, "passed", "6\n")


def test_a_wrong_program_fails():
    assert run("assert 1 == 2").how == "exit 1"
    assert run("this is no python").how == "exit 1"


def test_endless_loop_is_ended():
    start = time.monotonic()
    assert not run("while True: pass", seconds=0.5).ok
    assert not run("import time; time.sleep(60)", seconds=0.5).ok
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import multiprocessing as m\np = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    ],
)
def test_no_new_process(program):
    assert not run(program, seconds=3).ok


def test_memory_is_bounded():
    start = time.monotonic()
    found = run("x = []\nwhile True: x.append(bytearray(1 << 24))", memory=1 << 28)
    assert not found.ok
    assert "MemoryError" in found.output
    assert not run("import mmap; m = mmap.mmap(-1, 1 << 30); m.write(b'1' * (1 << 30))", memory=1 << 28).ok
    assert time.monotonic() - start < 10


def test_output_is_bounded():
    found = run("while True: print('x' * 100000)", seconds=5)
    assert not found.ok
    assert len(found.output) <= sandbox.OUTPUT


ACTS = [
    "os.remove(path + '/file')", "shutil.rmtree(path)", "open(path + '/file', 'w')", "open(path + '/new', 'w')",
    "os.rename(path + '/file', path + '/other')", "os.truncate(path + '/file', 0)", "os.mkdir(path + '/new')",
    "os.symlink('/', path + '/new')", "os.link(path + '/file', path + '/new')", "os.chmod(path + '/file', 0)",
    "os.utime(path + '/file', (0, 0))", "os.mkfifo(path + '/new')", "open('/tmp/fusion-new', 'w')",
    "open('new', 'w')", "os.remove(__file__)", "os.chown(path + '/file', 1, 1)",
    "os.setxattr(path + '/file', 'user.x', b'1')",
]  # fmt: skip


def test_files_are_safe(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("precious")
    before = (target / "file").stat()
    tries = "".join(f"try:\n    {act}\n    print({act!r})\nexcept OSError: pass\n" for act in ACTS)
    found = run(f"import os, shutil\npath = {str(target)!r}\n{tries}os.execv('/bin/rm', ['rm', '-rf', path])\n")
    assert found.how == "exit 1"
    assert "rm: cannot remove" in found.output
    assert not [act for act in ACTS if act in found.output]
    after = (target / "file").stat()
    assert (target / "file").read_text() == "precious"
    assert (before.st_mode, before.st_mtime, before.st_uid) == (after.st_mode, after.st_mtime, after.st_uid)
    assert os.listdir(target) == ["file"]


@pytest.mark.parametrize(
    "kind", ["AF_INET, socket.SOCK_STREAM", "AF_INET, socket.SOCK_DGRAM", "AF_UNIX, socket.SOCK_STREAM"]
)
def test_no_network(kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        found = run(f"import socket\ns = socket.socket(socket.{kind})\ns.connect(('127.0.0.1', {port}))\n")
        assert not found.ok
        assert "PermissionError" in found.output
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_processes_are_safe():
    program = f"import os, signal\nos.kill({os.getpid()}, signal.SIGTERM)"
    assert "PermissionError" in run(program).output
    assert "PermissionError" in run("import os; os.kill(-1, 9)").output
    lower = f"import resource; resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (5, 5))"
    assert "PermissionError" in run(lower).output


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-value")
    assert "secret-value" not in run("import os; print(dict(os.environ))").output


def test_nothing_is_left_behind():
    threads, folders = threading.active_count(), {p for p in os.listdir("/tmp") if p.startswith("fusion-")}
    run("while True: pass", seconds=0.5)
    assert threading.active_count() == threads
    assert {p for p in os.listdir("/tmp") if p.startswith("fusion-")} <= folders


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_javascript_runs():
    command = ["node", "--max-old-space-size=512"]
    assert sandbox.run(command, "console.log([1,2].map(x => x * 2))", ".js", reserve=False).ok
    assert not sandbox.run(command, "require('fs').writeFileSync('/tmp/fusion-x', 'x')", ".js", reserve=False).ok
    assert not sandbox.run(command, "x=[];while(1)x.push(new Array(1e6).fill(1))", ".js", reserve=False).ok
