"""What counts as a secret, and that nothing that is written or compared holds one."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.agreement.facts import RankFacts, agree_on
from launcher.checkpoint.secrets import hide_hyperparameters
from launcher.config.loading import load_values
from launcher.config.schema import RunConfig, config_fields
from launcher.core.errors import AgreementError, ConfigError
from launcher.core.secrets import (
    HIDDEN,
    digests,
    find_secrets,
    hide_in_arguments,
    redact,
    references,
    resolve_references,
    scrub,
    with_references,
    without_secrets,
)
from launcher.loggers.selection import choose_loggers
from launcher.process.rank_status import RankStatusWriter
from launcher.runs.directory import open_run_directory
from launcher.runs.oom_record import OomRecord
from launcher.runs.selection import find_newest_matching_run
from tests.support.run_directories import config, ended

CANARY = "CANARY-x9"
SECRET_NAMES = [
    "api_key", "hf_token", "token", "password", "aws_secret", "db_passwd", "credentials", "credential", "access_key",
    "AUTH_TOKEN", "WANDB_API_KEY", "apikey", "auth", "auth_header", "key", "my_key", "secret_access_key", "hfToken",
    "APIKey", "clientSecret", "token_1", "tokens", "basic_auth",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_recognized_by_its_key_at_any_depth(name: str) -> None:
    values = {"model": {"init_args": {name: CANARY, "several": [{name: [CANARY]}], "lr": 0.1}}}
    assert CANARY not in repr(redact(values))
    assert CANARY not in repr(without_secrets(values))
    assert CANARY not in repr(redact({"model": Namespace(**{name: CANARY})}))
    assert redact(values)["model"]["init_args"]["lr"] == 0.1
    assert set(find_secrets(values)) == {f"model.init_args.{name}", f"model.init_args.several.0.{name}.0"}


ORDINARY: dict[str, Any] = {
    "num_tokens": 3, "max_tokens": 5, "tokens_per_batch": 4096, "tokenizer": "BPE9", "key_dim": 8, "monkey": "George7",
    "key_padding_mask": "X9", "keyboard": "X9", "label_key": "label", "image_key": "image_2",
    "keys": ["Image9", "label"], "target_key": "SMILES9", "inputKey": "X9",
    "pad_token": "[PAD]", "eos_token": "</s>", "image_token": "IMG9", "pad_token_id": 0, "token_type": "BPE-9",
    "ntoken": 33278, "secretary": "S9", "author": "A9", "authors": ["A9"], "use_auth_token": True, "token": None,
    "password": "", "password_file": "/run/secrets/B9", "auth": "basic", "uri": "s3://bucket/X9",
    "secret_loss_scale": 1.5, "password_weight": 0.1,
    "git": "ssh://git@github.com/x", "api_key_env": "WANDB_API_KEY", "secrets": {"class_path": "my.Vault9"},
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_keys_that_only_resemble_a_secret_are_shown_and_stored(name: str) -> None:
    values = {name: ORDINARY[name]}
    assert redact(values) == without_secrets(values) == with_references(values, {}) == values
    assert find_secrets(values) == {}


@pytest.mark.parametrize(
    "url", ["postgres://me:pw@host/db", "https://ghp_0123456789abcdefghij@github.com/x",
            "https://b.example/x?X-Amz-Signature=abc", "redis://:pw@host", "https://b.example/x?v=1&api_key=abc"],
)  # fmt: skip
def test_a_url_with_credentials_is_a_secret_under_any_key(url: str) -> None:
    values = {"data": {"init_args": {"uri": url, "urls": [url]}}}
    assert redact(values) == {"data": {"init_args": {"uri": HIDDEN, "urls": [HIDDEN]}}}
    assert hide_in_arguments(["fit", "--data.uri", url, f"--data.x={url}"]) == [
        "fit", "--data.uri", HIDDEN, f"--data.x={HIDDEN}",
    ]  # fmt: skip


def test_other_values_stay_unchanged() -> None:
    arrays = {"weights": np.ones(3), "key": np.array(["X9"]), "tokens": torch.ones(2), "records": np.zeros(2, "i4,f4")}
    for values in (redact(arrays), without_secrets(arrays), with_references(arrays, {})):
        assert all(values[name] is arrays[name] for name in arrays)
    assert find_secrets(arrays) == {}


def test_values_below_a_secret_key_are_secrets() -> None:
    assert redact({"credentials": {"user": "u", "more": [1, "b"]}}) == {
        "credentials": {"user": HIDDEN, "more": [HIDDEN, HIDDEN]}
    }


def test_no_setting_of_the_launcher_counts_as_a_secret() -> None:
    assert find_secrets({path: "x" * 30 for path, _ in config_fields()}) == {}
    assert redact(RunConfig().to_dict()) == RunConfig().to_dict()


LEAVES = st.one_of(st.text(max_size=8), st.integers(), st.none(), st.booleans(), st.just("a://u:p@h"))
KEYS = st.sampled_from([*SECRET_NAMES, "lr", "name", "key_dim", "uri"])
TREES = st.recursive(LEAVES, lambda t: st.dictionaries(KEYS, t, max_size=3) | st.lists(t, max_size=3), max_leaves=12)


@given(TREES.filter(lambda t: "${" not in repr(t)), st.dictionaries(st.sampled_from(["HF_TOKEN", "X"]), st.text()))
def test_a_stored_config_holds_no_secret_and_is_read_back_by_its_variables(tree: Any, env: dict[str, str]) -> None:
    values = {"model": tree}
    stored = with_references(values, env)
    assert find_secrets(stored) == {}
    read, missing = resolve_references(stored, references(values, env))
    assert missing == {}
    # A variable holds text.
    assert {p: str(v) for p, v in find_secrets(read).items()} == {p: str(v) for p, v in find_secrets(values).items()}
    assert redact(read) == redact(stored) == redact(values)
    assert set(resolve_references(stored, {})[1]) == set(find_secrets(values))


def test_a_config_is_stored_with_a_variable_that_holds_the_secret_already() -> None:
    made = RunConfig(model={"class_path": "a.B", "init_args": {"hf_token": CANARY, "api_key": "k9"}})
    text = made.to_yaml({"HF_TOKEN": CANARY, "HOSTNAME": "k9"})
    assert yaml.safe_load(text)["model"]["init_args"] == {
        "hf_token": "${oc.env:HF_TOKEN}", "api_key": "${oc.env:LAUNCHER_SECRET_MODEL_INIT_ARGS_API_KEY}",
    }  # fmt: skip


def test_a_stored_config_names_missing_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunConfig(model={"class_path": "a.B", "init_args": {"hf_token": CANARY}})
    stored = yaml.safe_load(made.to_yaml())
    with pytest.raises(ConfigError) as refused:
        load_values(stored)
    assert "model.init_args.hf_token: its value is a secret" in str(refused.value)
    assert "LAUNCHER_SECRET_MODEL_INIT_ARGS_HF_TOKEN is not set" in str(refused.value)
    monkeypatch.setenv("LAUNCHER_SECRET_MODEL_INIT_ARGS_HF_TOKEN", CANARY)
    assert load_values(stored) == made


def test_a_secret_does_not_change_the_digest_but_must_be_equal_on_all_ranks() -> None:
    one, two = (RunConfig(model={"class_path": "a.B", "init_args": {"api_key": key}}) for key in (CANARY, "other-x9"))
    assert one.digest() == two.digest() != RunConfig(model={"class_path": "a.B"}).digest()
    facts = [
        RankFacts(rank, rank, 2, 0, "host", config_digest=each.digest(), secrets=digests(each.to_dict()))
        for rank, each in enumerate((one, two))
    ]
    with pytest.raises(AgreementError) as refused:
        agree_on([RankFacts.from_json(fact.to_json()) for fact in facts])
    assert "model.init_args.api_key: differs on rank 1 (host) from rank 0 (host)" in str(refused.value)
    assert "x9" not in str(refused.value) + "".join(fact.to_json() for fact in facts)
    assert len(agree_on([facts[0], RankFacts(1, 1, 2, 0, "host", config_digest=two.digest(),
                                             secrets=facts[0].secrets)]).facts) == 2  # fmt: skip


def test_a_secret_is_removed_from_a_text_in_any_spelling() -> None:
    secrets = ["a'b\\c9", "CANARY", "CANARY-x9", 7]
    assert scrub("given 'CANARY-x9', \"a'b\\\\c9\" and a'b\\c9; 7 left", secrets) == (
        f"given '{HIDDEN}', \"{HIDDEN}\" and {HIDDEN}; 7 left"
    )


def test_an_error_of_user_code_is_reported_without_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    report = RankStatusWriter(None, 0)
    report.hide_values([CANARY])
    try:
        raise ValueError(f"401 for {CANARY}")
    except ValueError as error:
        report.write_traceback(error)
    shown = capsys.readouterr().err
    assert f"ValueError: 401 for {HIDDEN}" in shown
    assert CANARY not in shown.replace('f"401 for {CANARY}"', "")


def test_checkpoints_keep_hyperparameters_that_are_no_secrets() -> None:
    optimizer, tensor = object(), [1, 2]
    values = {"hf_token": CANARY, "lr": optimizer, "hub": {"password": CANARY, "name": "n"}, "layers": tensor}
    checkpoint: dict[str, Any] = {"hyper_parameters": values, "datamodule_hyper_parameters": {"size": 3}, "state": 1}
    untouched = checkpoint["datamodule_hyper_parameters"]
    assert hide_hyperparameters(checkpoint) == ["hf_token", "hub.password"]
    kept = checkpoint["hyper_parameters"]
    assert (kept["lr"], kept["layers"]) == (optimizer, tensor)
    assert (kept["hf_token"], kept["hub"]) == (HIDDEN, {"password": HIDDEN, "name": "n"})
    assert checkpoint["datamodule_hyper_parameters"] is untouched
    assert values["hf_token"] == CANARY, "the model's own stay"
    assert hide_hyperparameters(checkpoint) == []


def test_a_run_and_its_oom_record_match_with_another_secret(tmp_path: Path) -> None:
    def with_token(token: str) -> RunConfig:
        arguments = {"hf_token": token, "uri": f"db://me:{token}@host", "lr": 0.1}
        return config(tmp_path, name=None, resume="auto", model={"class_path": "a.B", "init_args": arguments})

    run = ended(open_run_directory(with_token(CANARY)))
    (run.checkpoints / "last.ckpt").write_bytes(b"")
    assert CANARY not in (run.path / "config.yaml").read_text()
    assert find_newest_matching_run(with_token("another")) == run.name
    plan = {"strategy": {"name": "ddp"}, "precision": "32-true", "world_size": 1, "memory": None,
            "batch": {"micro_batch_size": 4}}  # fmt: skip
    stored = yaml.safe_load((run.path / "config.yaml").read_text())
    assert OomRecord.of(with_token("another").to_dict(), plan) == OomRecord.of(stored, plan)


def test_loggers_of_the_launcher_store_no_secret(tmp_path: Path) -> None:
    run = ended(open_run_directory(config(tmp_path)))
    (logger,) = choose_loggers([], None, run, is_off=False)
    for params in ({"hf_token": CANARY, "lr": 0.1}, Namespace(hub={"password": CANARY}, size=3)):
        logger.log_hyperparams(params)  # pyright: ignore[reportArgumentType] -- Lightning's own signature is narrower
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    (stored,) = run.path.rglob("hparams.yaml")
    assert yaml.safe_load(stored.read_text()) == {"hf_token": HIDDEN, "lr": 0.1, "hub": {"password": HIDDEN}, "size": 3}
