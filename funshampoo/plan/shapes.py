"""Parameter shapes of well-known models, for plans without downloads or allocations.

Each function returns {name: shape}, generated from the architecture's dimensions, with the names
and the memory order of the model's usual PyTorch implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def resnet50(classes: int = 1000) -> Shapes:
    """ResNet-50 (He et al., arXiv 1512.03385), as in torchvision: 25,557,032 parameters."""
    shapes = _convolution("conv1", "bn1", 3, 64, 7)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 64 * 2 ** (stage - 1)
        for i in range(blocks):
            block = f"layer{stage}.{i}"
            shapes |= _convolution(f"{block}.conv1", f"{block}.bn1", channels, width, 1)
            shapes |= _convolution(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            shapes |= _convolution(f"{block}.conv3", f"{block}.bn3", width, 4 * width, 1)
            if i == 0:
                skip = f"{block}.downsample"
                shapes |= _convolution(f"{skip}.0", f"{skip}.1", channels, 4 * width, 1)
            channels = 4 * width
    return shapes | _linear("fc", channels, classes)


def vit_b_16(classes: int = 1000) -> Shapes:
    """ViT-B/16 at 224² (Dosovitskiy et al., arXiv 2010.11929), as in torchvision: 86,567,656."""
    width, hidden, patch, layers = 768, 3072, 16, 12
    patches = (224 // patch) ** 2
    shapes: Shapes = {
        "class_token": (1, 1, width),
        "conv_proj.weight": (width, 3, patch, patch),
        "conv_proj.bias": (width,),
        "encoder.pos_embedding": (1, patches + 1, width),
    }
    for i in range(layers):
        layer = f"encoder.layers.encoder_layer_{i}"
        attention = f"{layer}.self_attention"
        shapes |= _norm(f"{layer}.ln_1", width)
        shapes |= {f"{attention}.in_proj_weight": (3 * width, width)}
        shapes |= {f"{attention}.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{attention}.out_proj", width, width)
        shapes |= _norm(f"{layer}.ln_2", width)
        shapes |= _linear(f"{layer}.mlp.0", width, hidden)
        shapes |= _linear(f"{layer}.mlp.3", hidden, width)
    return shapes | _norm("encoder.ln", width) | _linear("heads.head", width, classes)


def gpt2() -> Shapes:
    """GPT-2 of 124M (Radford et al., 2019), its head tied to the embedding: 124,439,808.

    Its matrices are stored as (inputs, outputs), as in the original.
    """
    width, layers, vocabulary, context = 768, 12, 50257, 1024
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        shapes |= _norm(f"h.{i}.ln_1", width)
        shapes |= _transposed_linear(f"h.{i}.attn.c_attn", width, 3 * width)
        shapes |= _transposed_linear(f"h.{i}.attn.c_proj", width, width)
        shapes |= _norm(f"h.{i}.ln_2", width)
        shapes |= _transposed_linear(f"h.{i}.mlp.c_fc", width, 4 * width)
        shapes |= _transposed_linear(f"h.{i}.mlp.c_proj", 4 * width, width)
    return shapes | _norm("ln_f", width)


def llama3_8b() -> Shapes:
    """Llama 3 8B (arXiv 2407.21783): 8,030,261,248 parameters."""
    return _llama3(width=4096, hidden=14336, layers=32, heads=32)


def llama3_70b() -> Shapes:
    """Llama 3 70B (arXiv 2407.21783): 70,553,706,496 parameters."""
    return _llama3(width=8192, hidden=28672, layers=80, heads=64)


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet-50": resnet50,
    "vit-b-16": vit_b_16,
    "gpt2": gpt2,
    "llama3-8b": llama3_8b,
    "llama3-70b": llama3_70b,
}
"""The models that `funshampoo.plan` knows by name."""


def model_shapes(name: str) -> Shapes:
    """{parameter: shape} of the model with this name.

    Raises:
        ValueError: an unknown name; the error lists the names.

    >>> model_shapes("gpt2")["h.0.attn.c_attn.weight"]
    (768, 2304)
    """
    if name not in MODELS:
        raise ValueError(
            f"model is {name!r}; the known names are {', '.join(MODELS)}. Of any other model, pass "
            "its module or {name: shape}."
        )
    return MODELS[name]()


def _llama3(width: int, hidden: int, layers: int, heads: int) -> Shapes:
    vocabulary, kv_heads = 128256, 8
    kv_width = width // heads * kv_heads
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.k_proj.weight": (kv_width, width),
            f"{layer}.self_attn.v_proj.weight": (kv_width, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_proj.weight": (hidden, width),
            f"{layer}.mlp.up_proj.weight": (hidden, width),
            f"{layer}.mlp.down_proj.weight": (width, hidden),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def _convolution(name: str, norm: str, inputs: int, outputs: int, size: int) -> Shapes:
    """A convolution without bias, and the batch normalization after it."""
    return {f"{name}.weight": (outputs, inputs, size, size)} | _norm(norm, outputs)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _transposed_linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
