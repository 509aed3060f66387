"""Imports of the fork server of `tests.support.limited_runs`, shared by all ranks."""

import deepspeed as deepspeed
import lightning.pytorch as lightning_pytorch  # noqa: F401

import strategies.deepspeed_strategy as deepspeed_strategy  # noqa: F401
import tests.support.limited_runs as limited_runs  # noqa: F401
import tests.support.model_families as model_families  # noqa: F401
