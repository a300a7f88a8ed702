"""The stages, one idea a file."""

from funshampoo.operators.mode_products import bias_corrected, precondition, unfold
from funshampoo.state.upstream import statistics_of
from funshampoo.transforms.clipping import clip, clip_by_global_norm, global_norm
from funshampoo.transforms.grafting import graft
from funshampoo.transforms.kronecker import kronecker_statistics
from funshampoo.transforms.learning_rate import scale, scale_by_learning_rate
from funshampoo.transforms.momentum import ema, trace
from funshampoo.transforms.orthogonalize import orthogonalize
from funshampoo.transforms.root_inverse import root_inverse
from funshampoo.transforms.scaling import (
    scale_by_adagrad,
    scale_by_adam,
    scale_by_rms,
    scale_by_sgd,
)
from funshampoo.transforms.weight_decay import add_decayed_weights

__all__ = [
    "add_decayed_weights",
    "bias_corrected",
    "clip",
    "clip_by_global_norm",
    "ema",
    "global_norm",
    "graft",
    "kronecker_statistics",
    "orthogonalize",
    "precondition",
    "root_inverse",
    "scale",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_rms",
    "scale_by_sgd",
    "statistics_of",
    "trace",
    "unfold",
]
