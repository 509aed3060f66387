"""SIGKILL at every phase of a save leaves a valid checkpoint: of the step before, or the new one."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.processes import run_warm

# A child for each phase: it is killed before its n-th call that changes files, until one ends by itself.
_GRID = """
import json, os, signal, sys
from pathlib import Path

import torch

from launcher.checkpoint.atomic_io import AtomicCheckpointIO
from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import candidates, newest_valid, publish_again, remove_checkpoint
from launcher.checkpoint.reader import Trust, read_file

CHANGES = ("open", "os.rename", "os.remove", "os.link", "os.chmod", "os.mkdir", "os.rmdir")
torch.set_num_threads(1)


def content(step):
    return {"global_step": step, "state_dict": {"w": torch.full((50_000,), float(step))}}


def save_in_background(plugin, writer, folder, step):
    new, last = folder / f"step={step}.ckpt", folder / "last.ckpt"
    with writer.opened():
        plugin.save_checkpoint(content(step), new)
    writer.after_write(lambda: remove_checkpoint(folder / f"step={step - 1}.ckpt"))
    writer.after_write(lambda: publish_again(new, last))
    writer.wait()


def save(folder, number):
    writer = BackgroundWriter()
    plugin = AtomicCheckpointIO(Trust(folder), background=writer)
    save_in_background(plugin, writer, folder, 1)
    left = [number]

    def count(event, arguments):
        if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and arguments[1] == "r":
            return
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_in_background(plugin, writer, folder, 2)


# The children inherit what the first save imports.
(Path(sys.argv[1]) / "first").mkdir(mode=0o700)
save_in_background(AtomicCheckpointIO(background=(first := BackgroundWriter())), first, Path(sys.argv[1]) / "first", 1)
results, number = [], 0
while True:
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir(mode=0o700)
    pid = os.fork()
    if not pid:
        try:
            save(folder, number)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    found, skipped = newest_valid(folder, "last.ckpt")
    step = read_file(found, None)["global_step"]
    others = [read_file(path, None)["global_step"] for path in candidates(folder, "last.ckpt")]
    results.append([os.WIFSIGNALED(status), step, max(others), [f"{k}: {v}" for k, v in skipped.items()]])
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    number += 1
print("RESULTS " + json.dumps(results))
"""


@pytest.mark.slow
def test_a_kill_at_any_phase_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    # A disk on which a sync takes no time.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        output = run_warm([sys.executable, "-c", _GRID, folder], tmp_path, timeout=100).check().output
    results = json.loads(output.partition("RESULTS ")[2].splitlines()[0])
    killed = [step for was_killed, step, _, _ in results if was_killed]
    assert len(killed) >= 8, "the file, its manifest, the rename, the removal, the second name and its manifest"
    assert set(killed) == {1, 2}, "phases before and after the new checkpoint"
    assert killed == sorted(killed)
    assert results[-1][:2] == [False, 2]
    assert [skipped for *_, skipped in results if skipped] == [], "no checkpoint is damaged"
