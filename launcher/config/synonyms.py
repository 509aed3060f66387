"""Names of other tools for our settings and options: Lightning 1 and its CLI, torchrun, torchtitan, accelerate,
HF's Trainer, DeepSpeed, mpirun, sbatch and submitit.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    """A table whose keys have several names each, as one with a name each."""
    return {name: text for names, text in table.items() for name in names.split()}


# The strategy is that of the file if it can be read.
DEEPSPEED = "deepspeed_config strategy=deepspeed_stage_2"
# Names of settings. The first one of an entry gets the given value; `key=value` is a setting with a value of its own;
# ` | ` is between two settings of which either may be meant.
SYNONYMS: Mapping[str, str] = _by_name({
    "epochs num_epochs n_epochs nb_epochs total_epochs max_num_epochs num_train_epochs train_epochs epoch":
        "trainer.max_epochs",
    "steps num_steps train_steps total_steps max_train_steps num_train_steps max_iters iterations train_iters nsteps "
    "n_steps nb_steps total_iters max_iterations num_iterations":
        "trainer.max_steps",
    "gpus num_gpus n_gpus ngpus n_gpu gpu_count gpus_per_node": "devices accelerator=gpu",
    "nproc_per_node nproc num_processes n_proc procs ntasks_per_node tasks_per_node world_size num_devices n_devices "
    "devices_per_node ranks num_ranks": "devices",
    "nnodes nodes num_machines n_nodes": "num_nodes",
    "cpu use_cpu no_cuda": "accelerator=cpu",
    "gpu cuda use_gpu": "accelerator=gpu",
    "device": "accelerator",
    "mixed_precision dtype torch_dtype compute_dtype": "precision",
    "fp16 float16 half half_precision fp16_mixed": "precision=16-mixed",
    "bf16 bfloat16 bf16_mixed": "precision=bf16-mixed",
    "fp32 float32": "precision=32-true",
    "amp autocast": "use_amp=true",
    "no_amp": "use_amp=false",
    "zero1": "strategy=deepspeed_stage_1",
    "zero2": "strategy=deepspeed_stage_2",
    "zero3": "strategy=deepspeed_stage_3",
    "deepspeed ds_config deepspeed_config_file": DEEPSPEED,
    "use_deepspeed": "strategy=deepspeed_stage_2",
    "use_ddp multi_gpu distributed": "strategy=ddp",
    "distributed_strategy parallel_strategy": "strategy",
    "use_fsdp use_fsdp2 fully_shard fully_sharded_data_parallel": "strategy=fsdp2",
    "fsdp_cpu_offload fsdp_offload_params": "strategy=fsdp2_offload",
    "fsdp_transformer_layer_cls_to_wrap transformer_layer_cls_to_wrap fsdp_auto_wrap_policy auto_wrap_policy "
    "wrap_class wrap_classes wrap_cls wrap_policy wrapped_classes": "fsdp.wrap",
    "data_parallel_shard_degree dp_shard_degree dp_shard fsdp_size": "fsdp.shard_ranks strategy=hsdp",
    "mixed_precision_param": "precision",
    "fsdp_activation_checkpointing activation_checkpoint recompute_activations gradient_checkpointing "
    "use_activation_checkpointing use_gradient_checkpointing grad_checkpointing": "activation_checkpointing=true",
    "ddp_find_unused_parameters find_unused_parameters": "strategy=ddp_find_unused_parameters_true",
    "ddp_timeout": "process_group_timeout",
    "ckpt checkpoint_path resume_from resume_from_checkpoint resume_path resume_ckpt resume_checkpoint resume_run "
    "load_from load_checkpoint load_ckpt continue_from init_from restore": "resume",
    "auto_resume continue continue_training": "resume=auto",
    "random_seed random_state manual_seed rng_seed": "seed",
    "output_dir out_dir save_dir log_dir logging_dir work_dir default_root_dir project_dir root_dir result_dir "
    "results_dir exp_dir experiment_dir checkpoint_dir checkpoints_dir ckpt_dir save_path output_path": "runs_dir",
    "run_name experiment_name exp_name job_name wandb_name wandb_run_name exp": "name",
    "gradient_accumulation_steps grad_accum grad_accumulation accumulate accum_steps gradient_accumulation":
        "trainer.accumulate_grad_batches",
    "max_grad_norm gradient_clip gradient_clipping grad_clip clip_grad clip_grad_norm clip clip_value clip_norm "
    "grad_norm max_norm": "trainer.gradient_clip_val",
    "logging_steps log_interval log_every log_steps log_freq log_frequency print_every print_freq print_interval":
        "trainer.log_every_n_steps",
    "eval_steps eval_interval val_interval val_steps validation_steps validation_interval val_every_n_steps "
    "eval_every_n_steps": "trainer.val_check_interval",
    "val_every_n_epoch val_every_n_epochs eval_every_n_epochs val_every_epoch eval_every_epoch val_epochs eval_epochs":
        "trainer.check_val_every_n_epoch",
    "val_every eval_every validate_every validation_every evaluate_every val_freq eval_freq validation_freq "
    "val_frequency eval_frequency validation_frequency":
        "trainer.check_val_every_n_epoch | trainer.val_check_interval",
    "save_steps save_interval checkpointing_steps checkpoint_steps checkpoint_interval save_every_n_steps "
    "checkpoint_every_n_steps": "checkpoint.every_n_steps",
    "save_every save_freq save_frequency checkpoint_every ckpt_every checkpoint_freq checkpoint_frequency":
        "checkpoint.every_n_steps | checkpoint.every_n_epochs",
    "save_epochs save_every_n_epochs save_every_epoch checkpoint_every_n_epochs": "checkpoint.every_n_epochs",
    "async async_save async_checkpoint async_checkpointing save_async background_save": "checkpoint.background",
    "save_total_limit max_to_keep keep_last max_checkpoints num_checkpoints": "checkpoint.save_top_k",
    "metric_for_best_model best_metric monitor_metric": "checkpoint.monitor",
    "time_limit max_duration max_runtime": "trainer.max_time",
    "no_progress_bar disable_progress_bar disable_tqdm": "trainer.enable_progress_bar=false",
    "no_checkpoint no_checkpointing disable_checkpointing": "trainer.enable_checkpointing=false",
    "wandb_project project_name": "wandb.project",
    "wandb_entity": "wandb.entity",
    "wandb_group": "wandb.group",
    "wandb_tags": "wandb.tags",
    "wandb_mode": "wandb.mode",
    "no_wandb disable_wandb": "wandb.mode=disabled",
    "wandb_offline offline": "wandb.mode=offline",
    "datamodule dataset data_module": "data",
    "net network model_class module": "model",
    "optim optimizer_name opt": "optimizer",
    "scheduler lr_scheduler_type sched": "lr_scheduler",
    "effective_batch_size effective_batch train_batch_size total_batch_size total_batch global_bs": "global_batch_size",
    "profile": "trainer.profiler=simple",
    "full_determinism": "trainer.deterministic=true",
    "cudnn_benchmark": "trainer.benchmark=true",
    "sync_bn": "trainer.sync_batchnorm=true",
})  # fmt: skip

# Names of one argument of the user's classes.
SAME_ARGUMENT: tuple[tuple[str, ...], ...] = (
    ("lr", "learning_rate", "base_lr", "init_lr", "max_lr"),
    ("batch_size", "bs", "train_batch_size", "per_device_train_batch_size", "micro_batch_size", "batch",
     "train_micro_batch_size_per_gpu", "batchsize", "per_gpu_batch_size", "per_device_batch_size", "mini_batch_size",
     "minibatch_size", "micro_batch", "microbatch", "microbatch_size", "local_batch_size"),
    ("val_batch_size", "eval_batch_size", "test_batch_size", "per_device_eval_batch_size"),
    ("num_workers", "workers", "dataloader_num_workers", "n_workers", "num_worker"),
    ("pin_memory", "dataloader_pin_memory"),
    ("shuffle", "shuffle_train"),
    ("momentum", "mom"),
    ("betas", "adam_betas"),
    ("weight_decay", "wd"),
    ("warmup_steps", "num_warmup_steps", "warmup"),
    ("data_dir", "data_path", "dataset_dir", "root", "data_root", "datadir", "train_dir"),
    ("dropout", "drop_rate", "dropout_rate"),
    ("hidden_size", "hidden_dim", "hidden", "d_model"),
    ("num_layers", "n_layers", "depth", "layers"),
)  # fmt: skip

_HOSTFILE = "start the same command on each node, with --nnodes and --rdzv-endpoint HOST:PORT"
_IN_THE_SCRIPT = "set it in the script: Accelerator({})"
_RANKS: Mapping[str, str] = _by_name({
    "num_processes nproc np n": "--nproc-per-node",
    "num_machines n_nodes nodes": "--nnodes",
    "machine_rank": "--node-rank",
    "main_process_ip master_addr": "--rdzv-endpoint",
    "main_process_port master_port": "give the port in --rdzv-endpoint HOST:PORT",
    "rdzv_timeout": "give it in --rdzv-conf join_timeout=SECONDS",
    "monitor_interval": "the agent learns of a failure at once; remove it",
    "hostfile": _HOSTFILE,
    "tee redirects t r": "log files contain all ranks; write --terminal-ranks all to see them",
    "local_ranks_filter": "--terminal-ranks",
})  # fmt: skip
# By command and name, with underscores: an option to give instead, or what to do. Names for `run` may be patterns.
# "settings" is for all commands with settings, on the command line and in files.
ADVICE: Mapping[str, Mapping[str, str]] = {
    "settings": _by_name({
        "standalone": "one node needs no rendezvous; remove it",
        "rdzv_backend": "the launcher has one kind of rendezvous; remove it",
        "local_rank": "each rank reads it from its environment; remove it",
        "local_ranks_filter": "write --terminal-ranks",
        "zero_stage ds_stage stage zero zero_optimization":
            "write `strategy: deepspeed_stage_N`, with N from 1 to 3",
        "sharding sharding_strategy fsdp_sharding_strategy fsdp_strategy reshard_after_forward "
        "fsdp_reshard_after_forward reshard_after_forward_policy":
            "write `strategy: fsdp2`, or fsdp2_grad_op, which gathers parameters once in a step, or hsdp",
        "offload cpu_offload enable_cpu_offload offload_params":
            "write `strategy: fsdp2_offload`, `deepspeed_stage_2_offload` or `deepspeed_stage_3_offload`",
        "offload_optimizer":
            "write `strategy: deepspeed_stage_2_offload` or `strategy: deepspeed_stage_3_offload`",
        "data_parallel_replicate_degree dp_replicate_degree dp_replicate":
            "write `strategy: hsdp`, and the ranks of one replica as `fsdp.shard_ranks`",
        "tensor_parallel_size tensor_parallel_degree tp_size pipeline_parallel_size pipeline_parallel_degree pp_size":
            "not supported; `strategy: fsdp2` shards the model over the ranks",
        "fsdp_state_dict_type state_dict_type":
            "checkpoints are sharded, and `launcher convert` writes one file; remove it",
        "mixed_precision_reduce grad_reduce_dtype":
            "write `fsdp.reduce_dtype`, which is fp32, or param for the type of the computation",
        "fsdp_version fsdp_use_orig_params fsdp_sync_module_states fsdp_cpu_ram_efficient_loading "
        "fsdp_forward_prefetch fsdp_backward_prefetch fsdp_backward_prefetch_policy use_orig_params "
        "sync_module_states":
            "FSDP2 does not need it; remove it",
        "fsdp_config fsdp_plugin": "write its settings under `fsdp`: wrap, shard_ranks, reduce_dtype, compile",
        "report_to tensorboard tb mlflow": "write `wandb.mode`, or `trainer.logger` for another logger",
        "use_wandb wandb_enabled enable_wandb wandb_log log_wandb":
            "write `wandb.mode`, which is auto, online, offline or disabled",
        "wandb_id wandb_run_id": "a run that is resumed has its W&B id already; remove it",
        "eval_strategy evaluation_strategy":
            "write `trainer.check_val_every_n_epoch` or `trainer.val_check_interval`",
        "save_strategy": "write `checkpoint.every_n_epochs` or `checkpoint.every_n_steps`",
        "overwrite overwrite_output_dir": "a run is never overwritten; remove it, or give another `name`",
        "tf32 matmul_precision float32_matmul_precision":
            "write torch.set_float32_matmul_precision('high') in the model's module",
        "gpu_ids device_ids devices_ids cuda_visible_devices visible_devices":
            "set CUDA_VISIBLE_DEVICES=0,1 in the environment instead",
        "patience early_stopping early_stop early_stopping_patience":
            "write the callback EarlyStopping with `patience` in `trainer.callbacks`",
    }),
    **dict.fromkeys(("fit", "validate", "test", "predict"), _RANKS),
    "plan": {"num_gpus": "--gpus"},
    "submit": _by_name({
        "nproc_per_node ntasks_per_node tasks_per_node num_processes nproc procs np": "--devices",
        "gpus num_gpus G gpus_per_task": "--gpus-per-node",
        "nnodes num_machines n_nodes": "--nodes",
        "ntasks n": "one task on each node starts its ranks; give --nodes N and --devices N",
        "gres": "give the number of GPUs with --gpus-per-node N",
        "job_name J": "--name",
        "timeout_min time_limit walltime slurm_timeout_min": "--time",
        "mem_gb memory": "--mem",
        "queue slurm_queue": "--partition",
        "output error o e log_dir":
            "each rank has a log in the run directory; remove it, and read one with `launcher logs RUN`",
        "export": "--export-env",
        "cpus": "--cpus-per-task",
        "w": "--nodelist",
        "C": "--constraint",
        "x": "--exclude",
        "d": "--dependency",
        "a": "--array",
        "requeue": "jobs are queued again without it; remove it",
        "wait": "submit does not wait; remove it, and use `launcher status RUN --watch`",
        "wrap chdir": "the job trains from the current folder; remove it",
        "exclusive": "not supported; remove it, or request all cores with --cpus-per-task N",
    }),
    "run": _by_name({
        "num_processes num_gpus ngpus gpus nproc devices np n": "write --nproc-per-node N, the number on each node",
        "num_machines num_nodes": "write --nnodes N",
        "machine_rank": "write --node-rank N",
        "main_process_ip": "write --master-addr HOST",
        "main_process_port": "write --master-port PORT",
        "hostfile mpirun_hostfile deepspeed_hostfile": _HOSTFILE,
        "same_network": "remove it; all nodes use --rdzv-endpoint",
        "multi_gpu": "remove it; --nproc-per-node gpu starts a rank for each GPU",
        "cpu": _IN_THE_SCRIPT.format("cpu=True") + ", or ACCELERATE_USE_CPU=true in the environment",
        "mixed_precision":
            _IN_THE_SCRIPT.format("mixed_precision=...")
            + ", or ACCELERATE_MIXED_PRECISION in the environment",
        "gradient_accumulation_steps": _IN_THE_SCRIPT.format("gradient_accumulation_steps=N"),
        "config_file": "accelerate's config is not read; give its values as options, or in Accelerator(...)",
        "gpu_ids include exclude": "set CUDA_VISIBLE_DEVICES=0,1 in the environment instead",
        "num_cpu_threads_per_process num_threads": "set OMP_NUM_THREADS in the environment instead",
        "enable_cpu_affinity": "not supported; bind the ranks in the script",
        "gradient_clipping": "clip in the script, with accelerator.clip_grad_norm_",
        "use_deepspeed deepspeed_* zero_* zero3_* offload_*":
            _IN_THE_SCRIPT.format("deepspeed_plugin=DeepSpeedPlugin(...)"),
        "use_fsdp fsdp_*": _IN_THE_SCRIPT.format("fsdp_plugin=FullyShardedDataParallelPlugin(...)"),
        "use_megatron_lm megatron_lm_*": _IN_THE_SCRIPT.format("megatron_lm_plugin=MegatronLMPlugin(...)"),
        "use_parallelism_config parallelism_config_*":
            _IN_THE_SCRIPT.format("parallelism_config=ParallelismConfig(...)"),
        "dynamo_*": _IN_THE_SCRIPT.format("dynamo_backend=...") + ", or ACCELERATE_DYNAMO_BACKEND in the environment",
        "fp8_*": _IN_THE_SCRIPT.format("kwargs_handlers=[...]") + " with a recipe for FP8",
        "tpu no_tpu_cluster vm main_training_function downcast_bf16 tpu_* aws_*":
            "not supported; start the script with accelerate launch",
        "env": "set the variable in front of the command instead",
        "quiet": "remove it; the report has no frames of the launcher",
    }),
    # torchrun's flags that `run` refuses.
    "torchrun": _by_name({
        "event_log_handler": "the launcher writes its events to events.jsonl in the run directory; leave it out",
        "logs_specs": "the launcher writes logs/rank-<r>.log in the run directory; leave it out",
        "duplicate_stdout_filters duplicate_stderr_filters":
            "filter the files logs/rank-<r>.log in the run directory instead",
        "numa_binding": "not supported; start the script with torchrun, or bind the ranks in the script",
        "virtual_local_rank": "not supported; use LOCAL_RANK to choose the GPU",
        "local_addr": "not supported; give the node's address in --rdzv-endpoint of the other nodes",
        "shutdown_timeout":
            "the ranks have 120 s after the first one has ended, and 10 s after a failure; leave it out",
    }),
}  # fmt: skip

# Groups that are often given as one text, with the setting that is meant.
GROUPS: Mapping[str, str] = {"checkpoint": "resume", "wandb": "wandb.project"}

# Values of other tools that our settings do not accept.
VALUES: Mapping[str, Mapping[str, str]] = {
    "precision": {"no": "32-true", "false": "32-true", "fp8": "bf16-mixed", "amp": "16-mixed"},
    "accelerator": {"cuda:0": "gpu"},
    "devices": {"-1": "auto", "gpu": "auto", "cpu": "auto"},
    "strategy": _by_name(
        {
            "fsdp fsdp1 fully_shard fully_sharded FSDP FSDP2 FULL_SHARD full_shard sharded zero": "fsdp2",
            "SHARD_GRAD_OP shard_grad_op": "fsdp2_grad_op",
            "HYBRID_SHARD hybrid_shard hybrid hfsdp hsdp2": "hsdp",
            "fsdp2_cpu_offload fsdp_offload fsdp2-offload": "fsdp2_offload",
            "NO_SHARD no_shard": "ddp",
            "zero1 zero_1 zero-1 ds1": "deepspeed_stage_1",
            "zero2 zero_2 zero-2 ds2": "deepspeed_stage_2",
            "zero3 zero_3 zero-3 ds3": "deepspeed_stage_3",
            "zero_offload zero2_offload zero_2_offload": "deepspeed_stage_2_offload",
            "zero3_offload zero_3_offload zero_infinity": "deepspeed_stage_3_offload",
        }
    ),
}


def find_advice(name: str) -> str:
    """What to do instead of an option that `launcher run` does not have, by its name without `--`; empty if unknown."""
    key = name.replace("-", "_")
    return next((text for pattern, text in ADVICE["run"].items() if fnmatchcase(key, pattern)), "")
