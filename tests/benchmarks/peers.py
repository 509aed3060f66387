"""The command lines with which other launchers start the same plain Lightning script, `launch_clock.py`.

accelerate, torchx and NeMo-Run are not installed with the tests: `pip install accelerate torchx`; NeMo-Run, which
removes torchx's local scheduler, needs a separate virtual environment: `pip install nemo_run "leptonai<0.40"`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("launch_clock.py")
# Variables that the script reads, for launchers that pass only listed variables.
VARIABLES = ("MARKS", "PYTHONPATH", "OMP_NUM_THREADS", "STEPS", "PAUSE", "DEVICES")
PEERS = ("torchrun", "lightning", "accelerate", "torchx", "nemo_run")


def peer_command(who: str, ranks: int, restarts: int) -> list[str]:
    """How `who` starts the script on this machine.

    Args:
        who: one of `PEERS`.
        ranks: how many.
        restarts: number after a failure, if the peer supports them.
    """
    python = [sys.executable, "-m"]
    commands = {
        # Lightning starts the other ranks from the script.
        "lightning": [sys.executable, str(SCRIPT)],
        "torchrun": [*python, "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", str(restarts), str(SCRIPT)],
        # `--cpu` starts one rank, or needs MPI.
        "accelerate": [*python, "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks),
                       "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                       "--max_restarts", str(restarts), "--main_process_port", "0", str(SCRIPT)],
        "torchx": [*python, "torchx.cli.main", "run", "-s", "local_cwd", "dist.ddp", "-j", f"1x{ranks}",
                   "--max_retries", str(restarts), "--script", str(SCRIPT)],
        "nemo_run": [*python, "tests.benchmarks.peers", str(ranks), str(restarts)],
    }  # fmt: skip
    return commands[who]


def main() -> None:
    """A command line for NeMo-Run, which has none for scripts."""
    # By default it writes experiments into the home folder.
    os.environ.setdefault("NEMORUN_HOME", str(Path.cwd()))
    import nemo_run

    ranks, restarts = map(int, sys.argv[1:])
    env = {name: os.environ[name] for name in VARIABLES}
    executor = nemo_run.LocalExecutor(ntasks_per_node=ranks, launcher="torchrun", env_vars=env, retries=restarts)
    nemo_run.run(nemo_run.Script(path=str(SCRIPT), entrypoint="python"), executor=executor, tail_logs=False)


if __name__ == "__main__":
    main()
