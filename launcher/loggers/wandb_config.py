"""Describes a model and its precision for the config of a W&B run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

from launcher.core.secrets import without_secrets
from launcher.planning.plan import Plan

ModelType = Literal["gpt", "bert", "t5", "custom"]
# In order: an encoder-decoder may have 'Bert' or 'GPT' in its name.
_FAMILIES: tuple[tuple[ModelType, re.Pattern[str]], ...] = (
    # A capital T at the start of a word: 'Net5' and 'UNET5' do not match.
    (
        "t5",
        re.compile(
            r"(?<![A-Z])(?:U?M)?T5|(?:^|[_\W])(?:u?m|by|long)?t5"
            r"|(?i:encoder_?decoder|seq2seq|sequence_?to_?sequence|bart|marian|pegasus)"
        ),
    ),
    (
        "bert",
        # 'bert' within a word counts only in names of the family: 'Hilbert' and 'Liberty' do not match.
        re.compile(
            r"Bert|BERT|(?<![A-Za-z])bert"
            r"|(?i:(?:ro|de|al|camem|distil|mobile|flau)berta?|electra|maskedlm|masked_lm|encoder_?only)"
        ),
    ),
    ("gpt", re.compile(r"(?i:gpt|llama|mistral|mixtral|qwen|bloom|causallm|causal_lm|decoder_?only)")),
)
# Attributes in which wrappers hold the model: DDP, DeepSpeed, torch.compile and, by convention, LightningModules. In a
# LightningModule they are tried before the other children, such as metrics.
_WRAPPED = ("module", "_orig_mod", "_forward_module", "model", "net", "network", "backbone", "transformer", "lm")
_MODEL_FIELDS = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_length")
# Names of the same settings in the large model families.
_SPELLINGS = {
    "hidden_size": ("hidden_size", "d_model", "n_embd", "embed_dim"),
    "num_layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers"),
    "num_heads": ("num_heads", "num_attention_heads", "n_head", "n_heads"),
    "max_length": ("max_length", "max_position_embeddings", "n_positions", "block_size", "max_seq_len"),
}


def build_wandb_config(
    model: Any, config: Any, hyperparameters: Mapping[str, Any] | None = None, plan: Plan | None = None
) -> dict[str, Any]:
    """The `config` of a W&B run: the model, the hyperparameters, and in which precision it trains.

    Args:
        model: the module, wrapped or not; for any other object the model's facts are None.
        config: the model's settings, an object or a mapping; may be None.
        hyperparameters: of the training; kept under their own names, without values that look like secrets.
        plan: the run's, for what the hyperparameters do not contain.

    Returns:
        The hyperparameters, and `model_type`, `model_class`, `total_parameters`, `trainable_parameters`,
        `vocab_size`, `hidden_size`, `num_layers`, `num_heads`, `max_length` (None where unknown), `mixed_precision`,
        `precision`, `use_amp`, and with a plan `strategy`, `world_size`, `global_batch_size`.
    """
    given = cast("dict[str, Any]", without_secrets(hyperparameters or {}))
    counts = _count_parameters(model)
    planned = plan is not None and plan.precision.endswith("-mixed")
    use_amp = bool(given["use_amp"]) if given.get("use_amp") is not None else planned
    values: dict[str, Any] = {
        **given,
        "model_type": detect_model_type(model),
        "model_class": _class_of(model),
        "total_parameters": counts[0],
        "trainable_parameters": counts[1],
        **{name: _setting(config, name) for name in _MODEL_FIELDS},
        "use_amp": use_amp,
        "mixed_precision": bool(given.get("mixed_precision", use_amp)),
        "precision": given.get("precision", None if plan is None else plan.precision),
    }
    if plan is not None:
        values.update(
            strategy=plan.strategy.name, world_size=plan.world_size, global_batch_size=plan.batch.global_batch_size
        )
    return values


def detect_model_type(model: Any) -> ModelType:
    """The family of a model by its name: decoder ('gpt'), encoder ('bert'), encoder-decoder ('t5') or 'custom'.

    Unwraps DistributedDataParallel, torch.compile, DeepSpeed's engine and LightningModules.

    Args:
        model: the module.
    """
    for layer in _layers(model):
        settings = getattr(layer, "config", None)
        if _setting_of(settings, "is_encoder_decoder") is True:
            return "t5"
        names = [base.__name__ for base in type(layer).__mro__ if base.__module__.split(".")[0] not in _NOT_NAMED]
        names.append(str(_setting_of(settings, "model_type") or ""))
        for name in names:
            for family, pattern in _FAMILIES:
                if pattern.search(name):
                    return family
    return "custom"


# Class names of these packages do not identify the user's model.
_NOT_NAMED = ("torch", "lightning", "pytorch_lightning", "deepspeed", "builtins", "abc", "typing")


def _layers(model: Any) -> Iterator[Any]:
    """The model and the models that it wraps, outermost first, each once."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        layer = waiting.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer
        # Not every attribute is a module: a `model` may be a name or a path.
        inner = [getattr(layer, name, None) for name in _WRAPPED]
        if any(base.__name__ == "LightningModule" for base in type(layer).__mro__):
            inner += layer.children()
        waiting += [each for each in inner if hasattr(each, "parameters")]


def _class_of(model: Any) -> str:
    """Name of the user's class; of the outermost class if all are torch's, as in a plain Sequential."""
    classes = [type(layer) for layer in _layers(model)]
    own = (cls for cls in classes if cls.__module__.split(".")[0] not in _NOT_NAMED)
    return next(own, classes[0]).__name__


def _count_parameters(model: Any) -> tuple[int | None, int | None]:
    """Numbers of all and of trainable parameters; None without parameters, or if the first batch sets their shapes."""
    listed = getattr(model, "parameters", None)
    parameters: list[Any] = [] if isinstance(model, type) or not callable(listed) else list(cast(Any, listed)())
    if not parameters or any(hasattr(p, "materialize") for p in parameters):
        return None, None
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _setting(config: Any, name: str) -> Any:
    found = (_setting_of(config, spelling) for spelling in _SPELLINGS.get(name, (name,)))
    return next((value for value in found if value is not None), None)


def _setting_of(config: Any, name: str) -> Any:
    return cast(Mapping[str, Any], config).get(name) if isinstance(config, Mapping) else getattr(config, name, None)
