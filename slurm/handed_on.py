"""Which variables of the submitting shell a job gets: by name, so that no value is in a script. Pure."""

from __future__ import annotations

from collections.abc import Iterable

_NAMES = {"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LIBRARY_PATH", "LOADEDMODULES", "LOGNAME", "MODULEPATH",
          "PATH", "SHELL", "TERM", "TZ", "USER", "VIRTUAL_ENV"}  # fmt: skip
_PREFIXES = ("CONDA_", "CUDA_", "CUDNN_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "LC_", "MAMBA_", "MKL_",
             "NCCL_", "NVIDIA_", "NVTE_", "OMP_", "PYTHON", "PYTORCH_", "SSL_CERT_", "TORCH", "TRITON_", "UCX_",
             "WANDB_", "XLA_")  # fmt: skip
# SLURM and the agent set these anew on each node.
_NEVER = {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "PYTHONHOME"}


def names_to_hand_on(present: Iterable[str], more: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the variables to hand on, sorted.

    Args:
        present: names of the submitting shell's variables.
        more: names that the user listed.
    """
    # torchelastic's own are a rank's.
    known = {name for name in present if name in _NAMES or name.startswith(_PREFIXES)}
    known -= _NEVER | {name for name in known if name.startswith("TORCHELASTIC_")}
    return tuple(sorted(known | set(more)))
