"""Flags of accelerate's and DeepSpeed's launchers: what to write instead for `launcher run`."""

from __future__ import annotations

from collections.abc import Mapping

_IN_THE_SCRIPT = "set it in the script: Accelerator({})"
_DEEPSPEED = _IN_THE_SCRIPT.format("deepspeed_plugin=DeepSpeedPlugin(...)")
_FSDP = _IN_THE_SCRIPT.format("fsdp_plugin=FullyShardedDataParallelPlugin(...)")
_DYNAMO = _IN_THE_SCRIPT.format("dynamo_backend=...") + ", or ACCELERATE_DYNAMO_BACKEND in the environment"
_DEVICES = "set CUDA_VISIBLE_DEVICES=0,1 in the environment instead"
_MEGATRON = _IN_THE_SCRIPT.format("megatron_lm_plugin=MegatronLMPlugin(...)")
_PARALLELISM = _IN_THE_SCRIPT.format("parallelism_config=ParallelismConfig(...)")
_FP8 = _IN_THE_SCRIPT.format("kwargs_handlers=[...]") + " with a recipe for FP8"
_NO_TPU = "not supported; start the script with accelerate launch"
_THREADS = "set OMP_NUM_THREADS in the environment instead"
_HOSTFILE = "start the same command on each node, with --nnodes and --rdzv-endpoint HOST:PORT"
_ONE_RANK_EACH = "remove it; --nproc-per-node gpu starts a rank for each GPU"

# By the name without dashes at its beginning, and with underscores.
FLAG_ADVICE: Mapping[str, str] = {
    "num_processes": "write --nproc-per-node N, the number on each node",
    **dict.fromkeys(("num_gpus", "np", "n"), "write --nproc-per-node N, the number on each node"),
    **dict.fromkeys(("num_machines", "num_nodes"), "write --nnodes N"),
    "machine_rank": "write --node-rank N",
    "main_process_ip": "write --master-addr HOST",
    "main_process_port": "write --master-port PORT",
    "hostfile": _HOSTFILE,
    "same_network": "remove it; all nodes use --rdzv-endpoint",
    "multi_gpu": _ONE_RANK_EACH,
    "cpu": _IN_THE_SCRIPT.format("cpu=True") + ", or ACCELERATE_USE_CPU=true in the environment",
    "mixed_precision": _IN_THE_SCRIPT.format("mixed_precision=...")
    + ", or ACCELERATE_MIXED_PRECISION in the environment",
    "gradient_accumulation_steps": _IN_THE_SCRIPT.format("gradient_accumulation_steps=N"),
    "config_file": "accelerate's config is not read; give its values as options, or in Accelerator(...)",
    **dict.fromkeys(("gpu_ids", "include", "exclude"), _DEVICES),
    **dict.fromkeys(("num_cpu_threads_per_process", "num_threads"), _THREADS),
    "enable_cpu_affinity": "not supported; bind the ranks in the script",
    "gradient_clipping": "clip in the script, with accelerator.clip_grad_norm_",
    "use_deepspeed": _DEEPSPEED,
    "use_fsdp": _FSDP,
    "use_megatron_lm": _MEGATRON,
    "use_parallelism_config": _PARALLELISM,
    **dict.fromkeys(("tpu", "no_tpu_cluster", "vm", "main_training_function", "downcast_bf16"), _NO_TPU),
    "env": "set the variable in front of the command instead",
    "mpirun_hostfile": _HOSTFILE,
    "deepspeed_hostfile": _HOSTFILE,
    "quiet": "remove it; the report has no frames of the launcher",
}  # fmt: skip
# Groups of flags with the same beginning.
_GROUPS: Mapping[str, str] = {
    **dict.fromkeys(("deepspeed_", "zero_", "zero3_", "offload_"), _DEEPSPEED),
    "fsdp_": _FSDP,
    "dynamo_": _DYNAMO,
    "fp8_": _FP8,
    "megatron_lm_": _MEGATRON,
    "parallelism_config_": _PARALLELISM,
    **dict.fromkeys(("tpu_", "aws_"), _NO_TPU),
}


def find_flag_advice(name: str) -> str:
    """What to do instead of a flag of another launcher, by its name without `--`; empty for one that is not known."""
    key = name.replace("-", "_")
    found = FLAG_ADVICE.get(key)
    return found if found is not None else next((text for begin, text in _GROUPS.items() if key.startswith(begin)), "")
