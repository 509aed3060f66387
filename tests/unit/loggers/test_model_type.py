"""`detect_model_type`: the family of a model by its name, also inside wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from launcher.loggers.wandb_config import build_wandb_config, detect_model_type


def named(name: str, base: type[nn.Module] = nn.Module) -> nn.Module:
    """A module with one layer whose class has this name."""

    def init(self: Any) -> None:
        base.__init__(self)
        self.layer = nn.Linear(2, 2)

    return type(name, (base,), {"__init__": init, "__module__": "theirs"})()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real process group of one rank, for DistributedDataParallel."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def bare(model: nn.Module) -> nn.Module:
    return model


def in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model)  # wraps only: compilation begins with the first call


class Training(pl.LightningModule):
    """A LightningModule with a neutral name, with its net under any name."""

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        super().__init__()
        setattr(self, name, model)


def in_module(model: nn.Module) -> nn.Module:
    return Training(model)


def in_ddp_of_module(model: nn.Module) -> nn.Module:
    return in_ddp(Training(model))


def in_module_of_compiled(model: nn.Module) -> nn.Module:
    return Training(compiled(model))


WRAPPERS = [bare, in_ddp, compiled, in_module, in_ddp_of_module, in_module_of_compiled]
MODELS = [
    ("GPT", "gpt"),
    ("GPT2LMHeadModel", "gpt"),
    ("LlamaForCausalLM", "gpt"),
    ("TinyGPT", "gpt"),
    ("BERT", "bert"),
    ("BertForMaskedLM", "bert"),
    ("RobertaModel", "bert"),
    ("DistilBertModel", "bert"),
    ("AlbertModel", "bert"),
    ("T5", "t5"),
    ("T5ForConditionalGeneration", "t5"),
    ("MT5Model", "t5"),
    ("FlanT5", "t5"),
    ("BartModel", "t5"),
    # Encoder-decoders with the name of another family.
    ("BertGPTEncoderDecoder", "t5"),
    ("GPT2EncoderDecoderModel", "t5"),
    ("BertSeq2Seq", "t5"),
    ("Net", "custom"),
    ("Net5", "custom"),
    ("UNET5", "custom"),
    ("ResNet50", "custom"),
    ("HilbertNet", "custom"),
    ("LibertyModel", "custom"),
]


@pytest.mark.case(30)
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize(("name", "family"), MODELS, ids=[name for name, _ in MODELS])
@pytest.mark.usefixtures("group")
def test_the_family_is_known_by_name_through_every_wrapper(
    name: str, family: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    assert detect_model_type(wrap(named(name))) == family


@pytest.mark.case(30)
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.usefixtures("group")
def test_a_lightning_module_that_is_named_itself(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for name, family in (("MyGPT", "gpt"), ("BertTraining", "bert"), ("T5Module", "t5"), ("Module", "custom")):
        assert detect_model_type(wrap(named(name, pl.LightningModule))) == family


@pytest.mark.case(30)
@pytest.mark.parametrize("attribute", ["gpt", "decoder", "lm_head_model", "policy"])
def test_a_lightning_module_may_name_its_net_freely(attribute: str) -> None:
    assert detect_model_type(Training(named("GPT"), attribute)) == "gpt"
    assert detect_model_type(Training(named("Net"), attribute)) == "custom"


@pytest.mark.case(30)
def test_a_loss_module_does_not_decide_the_family() -> None:
    module = Training(named("GPT"), "net")
    module.metric = named("BertScore")
    assert detect_model_type(module) == "gpt"


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({"is_encoder_decoder": True, "model_type": "bert"}, "t5"),
        ({"is_encoder_decoder": False, "model_type": "bert"}, "bert"),
        ({"model_type": "gpt_neox"}, "gpt"),
        ({"model_type": "mt5"}, "t5"),
        ({"model_type": "t5"}, "t5"),
        ({"model_type": "xlm-roberta"}, "bert"),
        ({"model_type": "net5"}, "custom"),
        ({"model_type": None}, "custom"),
        ({"model_type": 5}, "custom"),
        (None, "custom"),
        ("gpt", "custom"),
    ],
)
def test_the_settings_in_a_hugging_face_config_decide(settings: Any, family: str) -> None:
    model = named("Net")
    model.config = settings
    assert detect_model_type(model) == family


@pytest.mark.parametrize("thing", [None, 3, "gpt", object(), Path("gpt"), nn.Sequential(nn.Linear(2, 2))])
def test_anything_else_is_custom(thing: Any) -> None:
    assert detect_model_type(thing) == "custom"


@pytest.mark.usefixtures("group")
def test_modules_that_reference_each_other_are_visited_once() -> None:
    module = Training(named("Net"))
    object.__setattr__(module.model, "module", module)
    assert detect_model_type(module) == "custom"


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [bare, in_ddp, compiled], ids=lambda wrap: wrap.__name__)
def test_the_class_in_the_config_is_the_users_own_and_not_the_wrappers(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    assert build_wandb_config(wrap(named("TinyGPT")), None)["model_class"] == "TinyGPT"
