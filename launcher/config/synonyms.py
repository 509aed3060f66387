"""Names that other tools have for our settings: Lightning 1 and its CLI, torchrun, accelerate, HF's Trainer, DeepSpeed.

An entry is the settings to give instead, separated by spaces. The first one gets the given value; `key=value` is a
setting with a value of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

# The strategy is that of the file if it can be read.
DEEPSPEED = "deepspeed_config strategy=deepspeed_stage_2"
SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "num_train_epochs", "epoch"), "trainer.max_epochs"),
    **dict.fromkeys(
        ("steps", "num_steps", "train_steps", "total_steps", "max_train_steps", "num_train_steps", "max_iters",
         "iterations", "train_iters"),
        "trainer.max_steps",
    ),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "ngpus", "gpus_per_node"), "devices accelerator=gpu"),
    **dict.fromkeys(
        ("nproc_per_node", "nproc", "num_processes", "n_proc", "procs", "ntasks_per_node", "tasks_per_node",
         "world_size", "num_devices", "n_devices", "devices_per_node", "ranks", "num_ranks"),
        "devices",
    ),
    **dict.fromkeys(("nnodes", "nodes", "num_machines", "n_nodes"), "num_nodes"),
    **dict.fromkeys(("cpu", "use_cpu", "no_cuda"), "accelerator=cpu"),
    **dict.fromkeys(("gpu", "cuda", "use_gpu"), "accelerator=gpu"),
    "device": "accelerator",
    **dict.fromkeys(("mixed_precision", "dtype", "torch_dtype", "compute_dtype"), "precision"),
    **dict.fromkeys(("fp16", "float16", "half"), "precision=16-mixed"),
    **dict.fromkeys(("bf16", "bfloat16"), "precision=bf16-mixed"),
    **dict.fromkeys(("fp32", "float32"), "precision=32-true"),
    **dict.fromkeys(("amp", "autocast"), "use_amp=true"),
    **dict.fromkeys(("deepspeed", "ds_config", "deepspeed_config_file"), DEEPSPEED),
    "use_deepspeed": "strategy=deepspeed_stage_2",
    **dict.fromkeys(("use_ddp", "multi_gpu", "distributed"), "strategy=ddp"),
    "ddp_find_unused_parameters": "strategy=ddp_find_unused_parameters_true",
    "find_unused_parameters": "strategy=ddp_find_unused_parameters_true",
    "ddp_timeout": "process_group_timeout",
    **dict.fromkeys(("ckpt", "checkpoint_path", "resume_from", "resume_from_checkpoint", "load_from", "restore"),
                    "resume"),
    **dict.fromkeys(("random_seed", "manual_seed", "rng_seed"), "seed"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "log_dir", "logging_dir", "work_dir", "default_root_dir",
                     "project_dir"), "runs_dir"),
    **dict.fromkeys(("run_name", "experiment_name", "exp_name", "job_name", "wandb_name"), "name"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum", "grad_accumulation", "accumulate", "accum_steps",
         "gradient_accumulation"),
        "trainer.accumulate_grad_batches",
    ),
    **dict.fromkeys(("max_grad_norm", "gradient_clip", "gradient_clipping", "grad_clip", "clip_grad", "clip_grad_norm"),
                    "trainer.gradient_clip_val"),
    **dict.fromkeys(("logging_steps", "log_interval", "log_every", "log_steps"), "trainer.log_every_n_steps"),
    **dict.fromkeys(("eval_steps", "eval_interval", "val_interval"), "trainer.val_check_interval"),
    **dict.fromkeys(("save_steps", "save_interval", "save_every", "checkpointing_steps"), "checkpoint.every_n_steps"),
    "save_total_limit": "checkpoint.save_top_k",
    "metric_for_best_model": "checkpoint.monitor",
    "wandb_project": "wandb.project",
    "project_name": "wandb.project",
    "wandb_entity": "wandb.entity",
    "wandb_group": "wandb.group",
    "wandb_tags": "wandb.tags",
    "wandb_mode": "wandb.mode",
    **dict.fromkeys(("no_wandb", "disable_wandb"), "wandb.mode=disabled"),
    **dict.fromkeys(("wandb_offline", "offline"), "wandb.mode=offline"),
    **dict.fromkeys(("datamodule", "dataset", "data_module"), "data"),
    **dict.fromkeys(("net", "network", "model_class", "module"), "model"),
    **dict.fromkeys(("optim", "optimizer_name", "opt"), "optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler_type", "sched"), "lr_scheduler"),
    "effective_batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "profile": "trainer.profiler=simple",
    "full_determinism": "trainer.deterministic=true",
    "sync_bn": "trainer.sync_batchnorm=true",
}  # fmt: skip

# Names of one argument of the user's classes.
SAME_ARGUMENT: tuple[tuple[str, ...], ...] = (
    ("lr", "learning_rate", "base_lr", "init_lr", "max_lr"),
    ("batch_size", "bs", "train_batch_size", "per_device_train_batch_size", "micro_batch_size", "batch",
     "train_micro_batch_size_per_gpu", "batchsize"),
    ("num_workers", "workers", "dataloader_num_workers", "n_workers"),
    ("weight_decay", "wd"),
    ("warmup_steps", "num_warmup_steps", "warmup"),
    ("data_dir", "data_path", "dataset_dir", "root"),
    ("dropout", "drop_rate", "dropout_rate"),
    ("hidden_size", "hidden_dim", "hidden", "d_model"),
    ("num_layers", "n_layers", "depth", "layers"),
)  # fmt: skip

# Names of other tools without a setting of their own here, with what to do.
NOT_NEEDED: Mapping[str, str] = {
    "standalone": "one node needs no rendezvous; remove it",
    "rdzv_backend": "the launcher has one kind of rendezvous; remove it",
    "local_rank": "each rank reads it from its environment; remove it",
    "local_ranks_filter": "write --terminal-ranks",
    **dict.fromkeys(("zero_stage", "ds_stage"), "write `strategy: deepspeed_stage_N`, with N from 1 to 3"),
    "report_to": "write `wandb.mode`, or `trainer.logger` for another logger",
    "patience": "write the callback EarlyStopping with `patience` in `trainer.callbacks`",
    "fsdp": "FSDP is not available; use `strategy: deepspeed_stage_3`, which shards the same states",
    "use_fsdp": "FSDP is not available; use `strategy: deepspeed_stage_3`, which shards the same states",
}

# Groups that are often given as one text, with the setting that is meant.
GROUPS: Mapping[str, str] = {"checkpoint": "resume", "wandb": "wandb.project"}

# Values of other tools that our settings do not accept.
VALUES: Mapping[str, Mapping[str, str]] = {
    "precision": {"no": "32-true", "false": "32-true", "fp8": "bf16-mixed", "amp": "16-mixed"},
    "accelerator": {"cuda:0": "gpu"},
    "devices": {"-1": "auto", "gpu": "auto", "cpu": "auto"},
}
