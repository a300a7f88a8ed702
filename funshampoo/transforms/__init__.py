"""The public stages, one per file."""

# Authors of stages find these in `funshampoo.authoring`; they were here in 0.1.
from funshampoo.operators.mode_products import bias_corrected as bias_corrected
from funshampoo.operators.mode_products import precondition as precondition
from funshampoo.operators.mode_products import unfold as unfold
from funshampoo.state.partners import statistics_of as statistics_of
from funshampoo.transforms.adagrad import scale_by_adagrad
from funshampoo.transforms.adam import scale_by_adam
from funshampoo.transforms.adaptive_clip import adaptive_clip
from funshampoo.transforms.agreement import AgreementGate
from funshampoo.transforms.blend import blend_towards
from funshampoo.transforms.cautious import cautious
from funshampoo.transforms.cautious_decay import add_cautious_decay
from funshampoo.transforms.centralize import centralize
from funshampoo.transforms.clip import clip
from funshampoo.transforms.clip_by_global_norm import clip_by_global_norm, global_norm
from funshampoo.transforms.eigenbasis import in_eigenbasis
from funshampoo.transforms.ema import ema
from funshampoo.transforms.ema_nesterov import ema_nesterov
from funshampoo.transforms.grafting import graft
from funshampoo.transforms.hyperball import hyperball
from funshampoo.transforms.kl import kl_statistics
from funshampoo.transforms.kronecker import kronecker_statistics
from funshampoo.transforms.late_decay import decay_after_step
from funshampoo.transforms.learning_rate import scale, scale_by_learning_rate
from funshampoo.transforms.normalize_rows import normalize_rows
from funshampoo.transforms.orthogonalize import orthogonalize
from funshampoo.transforms.primal_average import primal_average
from funshampoo.transforms.radial_brake import radial_brake
from funshampoo.transforms.rms import scale_by_rms
from funshampoo.transforms.root_inverse import root_inverse
from funshampoo.transforms.scale_by_eigenvalues import scale_by_eigenvalues
from funshampoo.transforms.schedule_free import schedule_free
from funshampoo.transforms.second_moment import scale_by_second_moment
from funshampoo.transforms.sgd import scale_by_sgd
from funshampoo.transforms.shape import scale_by_shape
from funshampoo.transforms.sign import sign
from funshampoo.transforms.stochastic_rounding import stochastic_rounding
from funshampoo.transforms.tail_average import tail_average
from funshampoo.transforms.trace import trace
from funshampoo.transforms.update_floor import update_floor
from funshampoo.transforms.weight_decay import add_decayed_weights

__all__ = [
    "AgreementGate",
    "adaptive_clip",
    "add_cautious_decay",
    "add_decayed_weights",
    "blend_towards",
    "cautious",
    "centralize",
    "clip",
    "clip_by_global_norm",
    "decay_after_step",
    "ema",
    "ema_nesterov",
    "global_norm",
    "graft",
    "hyperball",
    "in_eigenbasis",
    "kl_statistics",
    "kronecker_statistics",
    "normalize_rows",
    "orthogonalize",
    "primal_average",
    "radial_brake",
    "root_inverse",
    "scale",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_eigenvalues",
    "scale_by_learning_rate",
    "scale_by_rms",
    "scale_by_second_moment",
    "scale_by_sgd",
    "scale_by_shape",
    "schedule_free",
    "sign",
    "stochastic_rounding",
    "tail_average",
    "trace",
    "update_floor",
]
