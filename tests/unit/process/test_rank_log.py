"""Every rank's output is in its file, rank zero's also on the terminal: with real processes."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.process.rank_log import RankLog
from tests.support.processes import Finished

_PRELUDE = """
import ctypes, os, signal, sys
from pathlib import Path
from launcher.process.rank_log import RankLog

folder = Path("logs").absolute()
libc = ctypes.CDLL(None)

def c_say(text):
    libc.puts(text.encode())
    libc.fflush(None)

def await_logged(text):
    while text not in log.path.read_bytes():
        pass

log = RankLog(folder, int(sys.argv[1]))
log.attach()
"""
_WRITE_EVERYTHING = """
print("python out")
print("python err", file=sys.stderr)
os.write(1, b"raw out\\n")
os.write(2, b"raw err\\n")
c_say("from C")
os.system("echo from a child")
"""
WAYS = {"python out", "python err", "raw out", "raw err", "from C", "from a child"}


def run_rank(
    rank: int, body: str, folder: Path, env: Mapping[str, str] | None = None, *, before: str = "", shell: str = ""
) -> Finished:
    # Not `tests.support.processes.run`: tee ends a moment after its rank, by design.
    program = _PRELUDE.replace("log.attach()\n", before + "\nlog.attach()\n") + body
    command = [sys.executable, "-c", program, str(rank)]
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *command] if shell else command,
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        start_new_session=True,
        check=False,
    )
    return Finished(ended.returncode, ended.stdout)


def logged(folder: Path, pattern: str) -> str:
    (file,) = (folder / "logs").glob(pattern)
    return file.read_text()


def test_all_output_of_rank_zero_is_in_the_file_and_on_the_terminal(tmp_path: Path) -> None:
    ended = run_rank(0, _WRITE_EVERYTHING + "log.detach()", tmp_path).check()
    for text in (ended.output, logged(tmp_path, ".pending-*-rank-0.log")):
        lines = text.splitlines()
        assert sorted(lines) == sorted(WAYS), "each once"


def test_all_output_of_another_rank_is_only_in_the_file(tmp_path: Path) -> None:
    ended = run_rank(1, _WRITE_EVERYTHING, tmp_path).check()
    assert ended.output == ""
    assert sorted(logged(tmp_path, ".pending-*-rank-1.log").splitlines()) == sorted(WAYS)


def test_output_after_detach_is_on_the_terminal(tmp_path: Path) -> None:
    body = "print('before'); log.detach(); print('out after'); print('err after', file=sys.stderr)"
    ended = run_rank(1, body, tmp_path).check()
    assert ended.output.splitlines() == ["out after", "err after"]
    assert logged(tmp_path, ".pending-*").splitlines() == ["before"]


_AS_ANY_FILE = """
import io, logging, shutil, subprocess
out = sys.stdout
out.buffer.write("bytes \\u00e9\\n".encode()[:7])
out.buffer.write("bytes \\u00e9\\n".encode()[7:])
out.flush()
out.reconfigure(errors="replace", line_buffering=False)
print("reconfigured", out.encoding, out.errors, out.line_buffering)
out.reconfigure(line_buffering=True)
subprocess.run(["echo", "from a child"], stdout=out, check=True)
subprocess.run(["echo", "from a child's errors"], stdout=sys.stderr, check=True)
os.write(out.fileno(), b"to its descriptor\\n")
logging.basicConfig(stream=out, format="%(message)s", force=True)
logging.error("logged")
print("in order", file=out, flush=True)
io.TextIOWrapper(out.buffer, encoding="utf-8", write_through=True).write("another wrapper\\n")
print("still open")
"""
AS_ANY_FILE = {"bytes \u00e9", "reconfigured utf-8 replace False", "from a child", "from a child's errors",
               "to its descriptor", "logged", "in order", "another wrapper", "still open"}  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_stdout_supports_the_interface_of_a_text_file(tmp_path: Path, rank: int, unbuffered: dict[str, str]) -> None:
    env = {"PYTHONUTF8": "1", **unbuffered}
    ended = run_rank(rank, _AS_ANY_FILE + "\nlog.detach()", tmp_path, env).check()
    lines = logged(tmp_path, f".pending-*-rank-{rank}.log").splitlines()
    assert sorted(lines) == sorted(AS_ANY_FILE), "each once"
    assert sorted(ended.output.splitlines()) == ([] if rank else sorted(AS_ANY_FILE))


def test_a_terminal_is_asked_for_its_size_through_stdout(tmp_path: Path) -> None:
    body = "size = os.get_terminal_size(sys.stdout.fileno()); print('columns', size.columns)"
    resize = "import fcntl, struct, termios; fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 77, 0, 0))\n"
    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-c", resize + _PRELUDE + body + "\nlog.detach()", "0"]
        subprocess.run(command, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, timeout=30, check=True)
    finally:
        os.close(slave)
        os.close(master)
    assert "columns 77" in logged(tmp_path, ".pending-*")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_moved_file_has_all_output_in_order(tmp_path: Path, rank: int) -> None:
    moved = f"""
os.write(2, b"first\\n")
await_logged(b"first")
log.move_to(Path("runs/x/logs/rank-{rank}.log").absolute())
os.write(2, b"second\\n")
log.detach()
"""
    run_rank(rank, moved, tmp_path).check()
    file = tmp_path / "runs" / "x" / "logs" / f"rank-{rank}.log"
    assert file.read_text().splitlines() == ["first", "second"]
    assert list((tmp_path / "logs").iterdir()) == [], "the pending file is gone"
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_logs_of_earlier_attempts_are_kept_numbered_oldest_first(tmp_path: Path) -> None:
    for attempt in ("one", "two", "three"):
        body = f"print({attempt!r}); log.move_to(folder / 'rank-1.log'); log.detach()"
        run_rank(1, body, tmp_path).check()
    kept = {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert kept == {"rank-1.1.log": "one\n", "rank-1.2.log": "two\n", "rank-1.log": "three\n"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_right_after_output_loses_none_of_it(tmp_path: Path, rank: int) -> None:
    body = "print('out'); os.write(2, b'x' * 50_000 + b' last line\\n'); os.kill(os.getpid(), signal.SIGKILL)"
    run_rank(rank, body, tmp_path).check(-9)
    text = logged(tmp_path, ".pending-*")
    assert "out\n" in text
    assert f"{'x' * 50_000} last line\n" in text


def test_a_crash_in_c_code_writes_its_stack_to_the_file_of_a_rank_above_zero(tmp_path: Path) -> None:
    run_rank(1, "ctypes.string_at(0)", tmp_path).check(-11)
    assert "Fatal Python error: Segmentation fault" in logged(tmp_path, ".pending-*")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_does_not_end_the_log_of_rank_zero(tmp_path: Path, number: int) -> None:
    body = f"""
signal.signal({int(number)}, lambda *_: os.write(2, b"still here\\n"))
os.write(2, b"ready\\n")
await_logged(b"ready")
os.killpg(0, {int(number)})
log.detach()
"""
    ended = run_rank(0, body, tmp_path).check()
    assert ended.output == "ready\nstill here\n"
    assert logged(tmp_path, ".pending-*") == "ready\nstill here\n"


def test_a_signal_right_after_the_start_does_not_end_the_log_of_rank_zero(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGINT, lambda *_: os.write(2, b"still here\\n"))
os.killpg(0, signal.SIGINT)
log.detach()
"""
    assert run_rank(0, body, tmp_path).check().output == "still here\n"


def test_a_move_right_after_the_start_keeps_all_output_of_rank_zero(tmp_path: Path) -> None:
    body = """
os.write(2, b"first\\n")
log.move_to(Path("runs/x/rank-0.log").absolute())
os.write(2, b"second\\n")
log.detach()
"""
    # A tee that is slow to start: it opens its file only after the move.
    tee = tmp_path / "bin" / "tee"
    tee.parent.mkdir()
    tee.write_text(
        "#!/bin/sh\nfor _ in $(seq 500); do [ -e runs/x/rank-0.log ] && break; sleep 0.01; done\n"
        f'exec {shutil.which("tee")} "$@"\n'
    )
    tee.chmod(0o755)
    run_rank(0, body, tmp_path, {"PATH": f"{tee.parent}:{os.environ['PATH']}"}).check()
    assert (tmp_path / "runs" / "x" / "rank-0.log").read_text().splitlines() == ["first", "second"]
    assert list((tmp_path / "logs").iterdir()) == []


def test_redraws_and_colours_are_only_on_the_terminal(tmp_path: Path) -> None:
    body = r"""
assert sys.stdout.isatty()
sys.stdout.write("\r  50%")
sys.stdout.write("\x1b[2K\x1b[1A")
sys.stdout.write("\x1b[?25l")
print("\x1b[32mgreen\x1b[0m and \x1b[1;31mred\x1b[0m")
sys.stdout.write("\r 100%\n")
sys.stdout.flush()
log.detach()
"""
    shown = _on_a_terminal([sys.executable, "-c", _PRELUDE + body, "0"], tmp_path)
    assert logged(tmp_path, ".pending-*") == "green and red\n"
    for sequence in ("\r  50%", "\x1b[2K\x1b[1A", "\x1b[?25l", "\x1b[32mgreen\x1b[0m"):
        assert sequence in shown


def _on_a_terminal(command: list[str], folder: Path) -> str:
    """Run in a new pseudo-terminal; returns the text on it."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:
            pass  # Linux raises EIO when the other side is closed
        os.close(ours)
        assert process.wait(30) == 0, shown.decode()
    return shown.decode()


def test_without_a_tee_rank_zero_keeps_its_terminal_and_its_python_output(tmp_path: Path) -> None:
    body = "print('out'); os.write(2, b'err\\n'); log.detach()"
    ended = run_rank(0, body, tmp_path, {"PATH": str(tmp_path)}).check()
    assert sorted(ended.output.splitlines()) == ["err", "out"]
    assert logged(tmp_path, ".pending-*") == "out\n"


def test_a_folder_that_cannot_be_created_raises_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log = RankLog(tmp_path / "file" / "logs", 1)
    with pytest.raises(OSError, match="file"):
        log.attach()
    # The later calls of `fit` do nothing without a log.
    log.move_to(tmp_path / "x" / "rank-1.log")
    log.detach()
    assert not (tmp_path / "x").exists()


def test_only_a_pending_file_is_discarded(tmp_path: Path) -> None:
    run_rank(1, "log.detach(); log.discard_pending()", tmp_path).check()
    assert list((tmp_path / "logs").iterdir()) == []
    run_rank(1, "log.move_to(folder / 'rank-1.log'); log.detach(); log.discard_pending()", tmp_path).check()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["rank-1.log"]


_TEE = """
class Tee:
    def __init__(self):
        self.parts = [open("theirs.txt", "w"), sys.__stdout__]
    def write(self, text):
        for part in self.parts:
            part.write(text)
            part.flush()
        return len(text)
"""
# Python flushes its buffers at exit.
_BACK = "sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__"
_USERS_STREAMS = {
    "a Tee that cannot flush": f"{_TEE}sys.stdout = Tee(); emit = print",
    "a Tee of the errors": f"{_TEE}sys.stderr = Tee(); emit = lambda text: print(text, file=sys.stderr)",
    "a file": "sys.stdout = open('theirs.txt', 'w', buffering=1); emit = print",
    "a buffer": """
import io
class Kept(io.StringIO):
    def write(self, text):
        with open("theirs.txt", "a") as file:
            file.write(text)
        return super().write(text)
sys.stdout = Kept()
def emit(text):
    print(text)
    assert text in sys.stdout.getvalue()
""",
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("users", _USERS_STREAMS.values(), ids=_USERS_STREAMS)
def test_a_users_object_in_place_of_a_stream_receives_the_text(tmp_path: Path, rank: int, users: str) -> None:
    """A stream around the training, as of `contextlib.redirect_stdout`; the log has its text once."""
    body = f"emit('during'); log.detach(); assert (sys.stdout, sys.stderr) == mine; emit('after'); {_BACK}"
    run_rank(rank, body, tmp_path, before=f"{users}\nmine = (sys.stdout, sys.stderr); emit('before')").check()
    assert (tmp_path / "theirs.txt").read_text().splitlines() == ["before", "during", "after"]
    assert logged(tmp_path, f".pending-*-rank-{rank}.log").splitlines() == ["during"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_that_user_code_installs_during_training_stays(tmp_path: Path, rank: int) -> None:
    body = f"{_TEE.replace('sys.__stdout__', 'sys.stdout')}sys.stdout = Tee(); print('during'); log.detach()"
    run_rank(rank, f"{body}\nprint('after'); {_BACK}", tmp_path).check()
    assert (tmp_path / "theirs.txt").read_text().splitlines() == ["during", "after"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "<&-"])
def test_closed_standard_streams_only_lose_output(tmp_path: Path, rank: int, closed: str) -> None:
    body = """
own = open("own.txt", "w")
assert own.fileno() > 2
print("out")
print("err", file=sys.stderr)
os.write(2, b"raw\\n")
log.detach()
print("after")
"""
    run_rank(rank, body, tmp_path, shell=closed).check()
    assert sorted(logged(tmp_path, f".pending-*-rank-{rank}.log").splitlines()) == ["err", "out", "raw"]
    assert (tmp_path / "own.txt").read_text() == ""


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_command_runs_with_closed_standard_streams(tmp_path: Path, closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "launcher", "completion", "bash"]
    assert subprocess.run(command, cwd=tmp_path, timeout=30, check=False).returncode == 0
