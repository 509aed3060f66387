"""A config as YAML with a comment on each setting; a valid file for `--config`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.config.schema import config_fields
from launcher.core.yaml_loader import dump_yaml

_SECTIONS: dict[str, tuple[str, ...]] = {
    "Model and data": ("model", "data", "global_batch_size"),
    "Hardware and cluster": ("accelerator", "devices", "num_nodes", "slurm"),
    "Precision and strategy": (
        "use_amp",
        "precision",
        "precision_fallback",
        "strategy",
        "fsdp",
        "activation_checkpointing",
        "static_graph",
    ),
    "Training": ("trainer", "checkpoint", "resume", "resume_trust", "seed"),
    "Run and logging": ("name", "runs_dir", "wandb"),
}
_OTHER = "More settings"
_COMMENTS = {
    "model": "The LightningModule by import path, and the arguments of its constructor.",
    "data": "The LightningDataModule; a model with its own data loaders needs none.",
    "global_batch_size": "Samples per optimizer step, over all ranks.",
    "accelerator": "Kind of device; auto takes a GPU if there is one.",
    "devices": "Ranks on each node; auto takes all GPUs, or one process on a CPU.",
    "num_nodes": "Number of nodes; auto takes the number of torchrun or SLURM.",
    "slurm": "What `launcher submit` requests from SLURM; its flags override it.",
    "use_amp": "true: mixed precision if the hardware supports it; false: none.",
    "precision": "auto, or a precision that every rank must support: 16-mixed, bf16-mixed, 32-true ...",
    "precision_fallback": "If a rank does not support it, use the best precision that all ranks share.",
    "strategy": "How the ranks share the work; auto chooses one and reports why.",
    "fsdp": "How FSDP2 shards: fsdp2, fsdp2_grad_op, hsdp and fsdp2_offload read it.",
    "fsdp.wrap": "Classes of the blocks that are gathered one after another; by default they are found.",
    "fsdp.shard_ranks": "Ranks that share the states under hsdp; by default those of a node.",
    "activation_checkpointing": "Whether blocks are computed again in the backward pass, which saves memory.",
    "static_graph": "Whether every step uses the same parameters; auto reads the model's static_graph.",
    "trainer": "Lightning's own Trainer arguments.",
    "trainer.max_epochs": "Passes over the data.",
    "trainer.max_steps": "Optimizer steps at most; -1 for no limit.",
    "trainer.limit_train_batches": "Most batches of an epoch (a whole number), or a share of them (a fraction).",
    "trainer.limit_val_batches": "The same for validation.",
    "trainer.gradient_clip_val": "Largest norm of the gradients; larger ones are clipped.",
    "checkpoint": "When checkpoints are written, in addition to the one at the end.",
    "checkpoint.every": "auto: as often as the cost of a save and the run's failures advise.",
    "checkpoint.every_n_steps": "Most steps that a crash may lose.",
    "checkpoint.monitor": "The metric that decides which checkpoints are the best.",
    "resume": "none, auto (this run's last checkpoint, if it has one) or the path of a checkpoint.",
    "resume_trust": "Whether the checkpoint may run code when it is loaded; only for files from a trusted source.",
    "seed": "Seed of all random generators and of the order of the data.",
    "name": "Name of the run and of its folder.",
    "runs_dir": "Folder of all runs.",
    "wandb": "Weights & Biases.",
    "wandb.mode": "auto (online if an API key is configured), online, offline or disabled.",
}
# Written as comments if they are not set, to show further settings.
_ABSENT = {
    "model": """\
No model is set: the built-in demo is trained. To train your own:
model:
  class_path: my_pkg.MyModule
  init_args: {lr: 1.0e-4}
data:
  class_path: my_pkg.MyData""",
    "global_batch_size": "global_batch_size: 256   # samples per optimizer step, over all ranks",
    "use_amp": "use_amp: true   # mixed precision if the hardware supports it, otherwise 32-true",
}


def commented_yaml(values: Mapping[str, Any], header: Sequence[str] = (), footer: Sequence[str] = ()) -> str:
    """Nested plain values in sections, with a comment above each setting, and comment lines before and after."""
    placed = {key for keys in _SECTIONS.values() for key in keys}
    sections = {**_SECTIONS, _OTHER: tuple(key for key in values if key not in placed)}
    parts = ["".join(map(_comment, header))]
    for title, keys in sections.items():
        body = "".join(_entry(key, values) for key in keys)
        if body:
            parts.append(f"# --- {title} ---\n{body}")
    if not values:
        # A file without settings is an error, in case it was truncated.
        parts.append("model: null\n")
    parts.append("".join(map(_comment, footer)))
    return "\n".join(part for part in parts if part)


def _entry(key: str, values: Mapping[str, Any]) -> str:
    value = values.get(key)
    if value is None and key in _ABSENT:
        return textwrap.indent(_ABSENT[key], "# ") + "\n"
    if key not in values:
        return ""
    if isinstance(value, Mapping) and any(path.startswith(f"{key}.") for path, _ in config_fields()):
        lines = "".join(_comment_of(f"{key}.{name}") + dump_yaml({name: each}) for name, each in value.items())
        return f"{_comment_of(key)}{key}:\n{textwrap.indent(lines, '  ')}" if lines else ""
    return _comment_of(key) + dump_yaml({key: value})


def _comment_of(path: str) -> str:
    return _comment(_COMMENTS[path]) if path in _COMMENTS else ""


def _comment(text: str) -> str:
    """One comment line; a line break in `text` must not start a setting."""
    return f"# {' '.join(text.split())}\n"
