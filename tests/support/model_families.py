"""Model families that no memory formula was fitted to: small ones to compare peaks, large ones to exhaust memory.

The small ones are held out: `tests.benchmarks.peak_memory` reports them separately from those of
`tests.support.model_zoo`, with which the formulas were written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from launcher.demo.model import DemoGPT
from tests.support.model_zoo import MODELS, Entry, Net, TiedGPT, adamw, mlp, momentum, rmsprop, two_groups


class ViT(nn.Module):
    """Patches, a class token, non-causal attention (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, layers: int, patch: int = 4, image: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + (image // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


class MixerBlock(nn.Module):
    """One MLP across patches, one across channels (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.before_tokens, self.before_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * width), nn.GELU(), nn.Linear(2 * width, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.before_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.before_channels(x))


class Mixer(nn.Module):
    def __init__(self, width: int, layers: int, patch: int = 4, image: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((image // patch) ** 2, width) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


class UNet(nn.Module):
    """Down, up, with skip connections (Ronneberger et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = self._pair(3, width)
        self.down = nn.ModuleList(self._pair(width << i, width << (i + 1)) for i in range(2))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(width << (i + 1), width << i, 2, 2) for i in (1, 0))
        self.up = nn.ModuleList(self._pair(width << (i + 1), width << i) for i in (1, 0))
        self.leave = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _pair(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(1, after), nn.ReLU(),
                             nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(1, after), nn.ReLU())  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.enter(x)]
        for part in self.down:
            kept.append(part(nn.functional.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for rise, part in zip(self.rise, self.up, strict=True):
            x = part(torch.cat([kept.pop(), rise(x)], 1))
        return self.leave(x)


class DeepLSTM(nn.Module):
    def __init__(self, width: int, layers: int, inputs: int = 24) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, layers, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class EncoderDecoder(nn.Module):
    """Both sides read the same tokens; cross-attention joins them (Vaswani et al. 2017)."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.Transformer(width, 4, layers, layers, 4 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]).to(x.dtype)
        return self.head(self.body(x, x, tgt_mask=mask, tgt_is_causal=True))


class Bert(nn.Module):
    """Tokens read in both directions (Devlin et al. 2019), with a classification head."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with batch norms, whose statistics are buffers (Howard et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        for step in range(3):
            now, then = width << step, width << (step + 1)
            layers += [nn.Conv2d(now, now, 3, 2, 1, groups=now), nn.BatchNorm2d(now), nn.ReLU(),
                       nn.Conv2d(now, then, 1), nn.BatchNorm2d(then), nn.ReLU()]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width << 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


HELD_OUT: dict[str, Entry] = {
    "vit": Entry(lambda: Net(ViT(64, 3), two_groups), (3, 16, 16), (10,)),
    "mixer": Entry(lambda: Net(Mixer(64, 3), adamw), (3, 16, 16), (10,)),
    "unet": Entry(lambda: Net(UNet(12), adamw), (3, 16, 16), (3, 16, 16)),
    "deep_lstm": Entry(lambda: Net(DeepLSTM(96, 2), adamw), (20, 24), (5,)),
    "encoder_decoder": Entry(lambda: Net(EncoderDecoder(64, 2, 200), adamw, tokens=True), (16,), (), 200),
    "separable": Entry(lambda: Net(Separable(24), adamw), (3, 16, 16), (10,)),
}

SMALL = {**MODELS, **HELD_OUT}

# 8 to 25 million parameters: large compared with a process's few MiB, and two ranks on two cores can train them.
LARGE: dict[str, Entry] = {
    "mlp": Entry(lambda: Net(mlp(256, 4096, 4096, 1536, 64), adamw), (256,), (64,)),
    "deep_mlp": Entry(lambda: Net(mlp(256, *[1536] * 10, 64), adamw), (256,), (64,)),
    "momentum": Entry(lambda: Net(mlp(256, *[1536] * 10, 64), momentum), (256,), (64,)),
    "gpt": Entry(lambda: Net(_gpt(), two_groups, tokens=True), (64,), (), 97),
    "tied": Entry(lambda: Net(TiedGPT(30000, 512, 2), adamw, tokens=True), (32,), (), 30000),
    "vit": Entry(lambda: Net(ViT(512, 6), two_groups), (3, 16, 16), (10,)),
    "mixer": Entry(lambda: Net(Mixer(768, 4), adamw), (3, 16, 16), (10,)),
    "unet": Entry(lambda: Net(UNet(128), adamw), (3, 16, 16), (3, 16, 16)),
    "deep_lstm": Entry(lambda: Net(DeepLSTM(1024, 3), adamw), (20, 24), (5,)),
    "encoder_decoder": Entry(lambda: Net(EncoderDecoder(512, 2, 4000), adamw, tokens=True), (32,), (), 4000),
    "separable": Entry(lambda: Net(Separable(320), adamw), (3, 16, 16), (10,)),
    "autoencoder": Entry(lambda: Net(mlp(1024, 3000, 600, 3000, 1024), rmsprop), (1024,), (1024,)),
    "bert": Entry(lambda: Net(Bert(512, 4, 8000), adamw, tokens=True), (48,), (), 8000),
}


# The families that were not used while the memory formulas were written.
UNSEEN = ("separable", "autoencoder", "bert")


def _gpt() -> nn.Module:
    return DemoGPT(block_size=64, n_layer=6, n_head=8, n_embd=512)
