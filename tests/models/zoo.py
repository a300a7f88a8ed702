"""Small models of many kinds, and what their parameters are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from examples.networks import ConvNet
from examples.networks import Transformer as Text


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(Residual(4, 6), Residual(6, 6))
        self.layer2 = nn.Sequential(Residual(6, 8), Residual(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.fc(x.mean((-2, -1)))  # type: ignore[no-any-return]


class HeadFirst(nn.Module):
    """The output layer is registered before the rest; its shape is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 20)
        self.tokens = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)


class TwoTables(nn.Module):
    """As many positions as the hidden matrices have rows: their shape is no output's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.positions = nn.Embedding(8, 8)
        self.project = nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU())])
        self.out = nn.Linear(8, 5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up = nn.Parameter(torch.randn(3, 10, 6) / 3)
        self.down = nn.Parameter(torch.randn(3, 6, 10) / 3)
        self.up_bias = nn.Parameter(torch.zeros(3, 10))
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        hidden = torch.einsum("ehd,bd->beh", self.up, x) + self.up_bias
        mixed = torch.einsum("edh,beh,be->bd", self.down, hidden.relu(), weights)
        return self.out(mixed)  # type: ignore[no-any-return]


class BesideLayers(nn.Module):
    """Tensors of two sides and more that stand by themselves: some are weights, some are tables."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(11, 16))
        self.latents = nn.Parameter(torch.zeros(7, 1, 1, 16))
        self.axes = nn.Parameter(torch.zeros(2, 50, 16))
        self.bias_of_distances = nn.Parameter(torch.zeros(9, 2))
        self.decays = nn.Parameter(torch.zeros(32, 5))  # log A of Mamba
        self.in_proj = nn.Parameter(torch.zeros(48, 16))
        self.lora_a, self.lora_b = (nn.Parameter(torch.zeros(s)) for s in ((3, 16), (16, 3)))
        self.up, self.down = (nn.Parameter(torch.zeros(s)) for s in ((4, 26, 16), (4, 16, 13)))
        self.mix = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 13), nn.Linear(13, 16))
        self.conv = nn.Conv2d(16, 16, 3)
        self.conv.gain = nn.Parameter(torch.ones(16, 1, 1, 1))  # timm's ScaledStdConv2d
        self.out = nn.Linear(16, 2)


class BareBesideLayers(nn.Module):
    """Attention head by head, gated experts with their router, and parameters in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.zeros(4, 32, 8)) for _ in range(2))
        self.value = nn.Parameter(torch.zeros(4, 8, 32))
        self.router = nn.Linear(32, 6)
        self.gate_up = nn.Parameter(torch.zeros(6, 32, 2 * 43))
        self.down = nn.Parameter(torch.zeros(6, 43, 32))
        self.prompts = nn.ParameterList([nn.Parameter(torch.zeros(5, 32)) for _ in range(2)])
        self.lora = nn.ParameterDict({"a": torch.zeros(3, 32), "b": torch.zeros(32, 3)})
        self.out = nn.Linear(32, 2)


class Codebooks(nn.Module):
    """An output layer for each of several codebooks, as MusicGen has them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.ModuleList([nn.Embedding(21, 8) for _ in range(2)])
        self.hidden = nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 20) for _ in range(2)])

    def get_output_embeddings(self) -> nn.ModuleList:
        return self.heads


def transformers(name: str, config: str, **options: Any) -> nn.Module:
    library = pytest.importorskip("transformers")
    common = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made: nn.Module = getattr(library, name)(getattr(library, config)(**common, **options))
    return made


GPT2 = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 16}
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
}

gpt2 = functools.partial(transformers, "GPT2LMHeadModel", "GPT2Config", **GPT2)
llama = functools.partial(transformers, "LlamaForCausalLM", "LlamaConfig", **LLAMA)
mixtral = functools.partial(
    transformers, "MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4
)

# {model: (how to make it, {role: patterns of those that have it}); the rest are vectors}
ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "convolutional": (ConvNet, {"convolution": ["0.weight", "3.weight"], "head": ["7.weight"]}),
    "text": (
        lambda: Text(20, 16, width=8),
        {
            "embedding": ["position", "embedding.weight"],
            "matrix": ["blocks.*.attention.*.weight", "blocks.*.perceptron.*.weight"],
            "head": ["readout.weight"],
        },
    ),
    "resnet": (
        ResNet,
        {"convolution": ["conv1*", "*.conv?.weight", "*.shortcut*"], "head": ["fc.weight"]},
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
        {"heads": ["*.in_proj_weight"], "matrix": ["*.out_proj.weight", "*.linear?.weight"]},
    ),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"heads": ["in_p*t"], "matrix": ["out*t"]}),
    "other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
        {"matrix": ["?_proj_weight", "out_proj.weight"]},
    ),
    "head first": (
        HeadFirst,
        {"head": ["out.weight"], "embedding": ["tokens.weight"], "matrix": ["hidden.weight"]},
    ),
    "two tables": (
        TwoTables,
        {
            "embedding": ["tokens.weight", "positions.weight"],
            "matrix": ["project.weight", "layers.0.0.weight"],
            "head": ["out.weight"],
        },
    ),
    "experts": (
        Experts,
        {"experts": ["up", "down"], "matrix": ["router.weight"], "head": ["out.weight"]},
    ),
    "codebooks": (
        Codebooks,
        {"embedding": ["tokens.*"], "matrix": ["hidden.weight"], "head": ["heads.*.weight"]},
    ),
    "beside layers": (
        BesideLayers,
        {
            "embedding": ["positions", "latents", "axes", "bias_of_distances", "decays"],
            "matrix": ["in_proj", "lora_*", "mix.*.weight"],
            "experts": ["up", "down"],
            "convolution": ["conv.weight"],
            "head": ["out.weight"],
        },
    ),
    "bare beside layers": (
        BareBesideLayers,
        {
            "experts": ["query", "key", "value", "gate_up", "down"],
            "embedding": ["prompts.*"],
            "matrix": ["router.weight", "lora.*"],
            "head": ["out.weight"],
        },
    ),
    "norms with two sides": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm([4, 6, 6]), nn.Conv2d(4, 4, 3)),
        {"convolution": ["0.weight", "2.weight"]},
    ),
    "transposed convolution last": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ConvTranspose1d(4, 2, 3)),
        {"matrix": ["0.weight"], "convolution": ["1.weight"]},
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(4, 6), nn.Linear(6, 3)),
        {"matrix": ["0.weight_??_l0"], "head": ["1.weight"]},
    ),
    "gpt2": (
        gpt2,
        {
            "head": ["transformer.wte.weight"],
            "embedding": ["transformer.wpe.weight"],
            "heads": ["*.c_attn.weight"],
            "matrix": ["*.c_proj.weight", "*.c_fc.weight"],
        },
    ),
    "gpt2 without head": (
        functools.partial(transformers, "GPT2Model", "GPT2Config", **GPT2),
        {
            "embedding": ["wte.weight", "wpe.weight"],
            "heads": ["*.c_attn.weight"],
            "matrix": ["*.c_proj.weight", "*.c_fc.weight"],
        },
    ),
    "llama": (
        llama,
        {
            "embedding": ["model.embed_tokens.weight"],
            "matrix": ["*_proj.weight"],
            "head": ["lm_head.weight"],
        },
    ),
    "mixtral": (
        mixtral,
        {
            "embedding": ["model.embed_tokens.weight"],
            "matrix": ["*.self_attn.*_proj.weight", "*.gate.weight"],
            "experts": ["*.gate_up_proj", "*.down_proj"],
            "head": ["lm_head.weight"],
        },
    ),
}
