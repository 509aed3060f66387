"""Plain PyTorch scripts for `launcher run`, as users of torchrun write them."""

from __future__ import annotations

# Writes what a script can see of its process.
SEEN = """\
import json, multiprocessing, os, pickle, sys, threading
import mpmath, strategies

def double(value):
    return 2 * value

def main():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
             "ROLE_NAME", "ROLE_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RESTART_COUNT",
             "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
             "TORCHINDUCTOR_CACHE_DIR")
    added = [name for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")
             if name in os.environ]
    threads = threading.active_count()  # before the pools: their threads end some time after them
    pools = [multiprocessing.get_context(m).Pool(1).map(double, [21]) for m in ("fork", "spawn", "forkserver")]
    seen = {
        "variables": {name: os.environ.get(name) for name in names}, "added": added, "argv": sys.argv,
        "name": __name__, "file": __file__, "spec": str(__spec__), "package": __package__, "path": sys.path,
        "method": multiprocessing.get_start_method(), "process": multiprocessing.current_process().name,
        "parent": str(multiprocessing.parent_process()), "daemon": multiprocessing.current_process().daemon,
        "thread": threading.current_thread() is threading.main_thread(), "threads": threads,
        "pools": pools, "pickled": pickle.loads(pickle.dumps(double)) is double, "cwd": os.getcwd(),
        "streams": [[stream.name, stream.encoding, stream.errors, stream.write_through, stream.line_buffering]
                    for stream in (sys.stdout, sys.stderr)],
        "own": [mpmath.OWN, strategies.OWN],
        "hook": sys.excepthook is sys.__excepthook__, "builtins": str(type(__builtins__)), "umask": os.umask(0o22),
    }
    with open(f"{os.environ['SEEN']}-{os.environ['RANK']}.json", "w") as file:
        json.dump(seen, file)

# Workers of the pools import this file too, and need no torch.
if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record
    record(main)()
"""

# DDP by hand, in a package, with a sibling import, a loader worker whose data set is in `__main__`, argparse and its
# own checkpoint.
TRAIN = """\
import argparse, os, signal, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
IMPORT

class Numbers(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.full((4,), float(index))

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", default="fork")
    parser.add_argument("--kill-at", type=int, default=-1)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    first = 0
    if os.path.exists("last.pt"):
        saved = torch.load("last.pt")
        first = saved["step"]
        model.module.load_state_dict(saved["model"])
    print(f"rank {rank} starts at step {first}")
    data = Numbers()
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=1, multiprocessing_context=options.workers)
    for step, batch in enumerate(loader, start=first):
        if step >= options.steps:
            break
        if step == options.kill_at and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model(batch).mean().backward()
        optimizer.step()
        if rank == 0:
            torch.save({"step": step + 1, "model": model.module.state_dict()}, "new.pt")
            os.replace("new.pt", "last.pt")
        dist.barrier()
    total = sum(parameter.sum() for parameter in model.parameters())
    print(f"rank {rank} ended with {total.item():.4f}")
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""
MODEL = "import torch\n\ndef make_model():\n    torch.manual_seed(0)\n    return torch.nn.Linear(4, 2)\n"

# Ends in the way that its argument names.
ENDS = """\
import argparse, atexit, os, signal, sys, time
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("how", choices=["before", "after", "code", "exit", "save", "hang", "fine", "lose", "crash"])
how = parser.parse_args().how
rank = int(os.environ["RANK"])

def hang_here():
    time.sleep(600)

class Loses:
    def __del__(self):
        print("waiting")
        while True:
            time.sleep(0.01)

def crash_here():
    import ctypes
    ctypes.string_at(0)

atexit.register(print, f"exit function of {rank}")
if how == "before" and rank == 1:
    raise ValueError("bad data in rank 1")
dist.init_process_group("gloo")
if how == "after" and rank == 1:
    raise ValueError("bad data in rank 1")
if how == "code":
    sys.exit(-1)
if how == "exit":
    print("flushed")
    os._exit(5)
if how == "save":
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    print("waiting")
    while not asked:
        time.sleep(0.01)
    print("saved")
    sys.exit(0)
if how == "lose":
    for _ in range(5):
        Loses()
    time.sleep(20)
    print("trained on")
if how == "crash" and rank == 1:
    crash_here()
if how == "hang" and rank == 1:
    hang_here()
dist.barrier()
print("last line without an end", end="")
"""
