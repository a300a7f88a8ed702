"""funshampoo: gradient transformations for PyTorch, with Distributed Shampoo at their heart.

>>> import torch, funshampoo
>>> tx = funshampoo.shampoo(0.01)
>>> params = {"w": torch.eye(2)}
>>> state = tx.init(params)
>>> grads = torch.func.grad(lambda p: (p["w"] ** 2).sum())(params)
>>> updates, state = tx.update(grads, state, params)
>>> params = funshampoo.apply_updates(params, updates)
"""

from funshampoo import blocks, linalg, migrate, models, recipes, schedules, state
from funshampoo.blocks import blocked
from funshampoo.blocks.evaluated import evaluation_parameters
from funshampoo.combinators.accumulation import multi_steps
from funshampoo.combinators.chaining import chain
from funshampoo.combinators.compilation import compiled
from funshampoo.combinators.cuda_graphs import cuda_graphed
from funshampoo.combinators.every_k import every_k
from funshampoo.combinators.failures import FailureLimitError
from funshampoo.combinators.guard import guarded
from funshampoo.combinators.hyperparams import inject_hyperparams
from funshampoo.combinators.masks import masked, partition
from funshampoo.combinators.tensor_float import in_tf32
from funshampoo.combinators.wrapping import wrapping
from funshampoo.core.applying import apply_updates, update_in_place
from funshampoo.core.clock import refresh_due
from funshampoo.core.contract import (
    EmptyState,
    GradientTransformation,
    Schedule,
    identity,
    stateless,
)
from funshampoo.core.interrupted import InterruptedStepError
from funshampoo.core.tree import MaskedNode
from funshampoo.distributed import sharded
from funshampoo.migrate.published import from_published
from funshampoo.migrate.reference import from_reference
from funshampoo.models import for_model, roles, routing_table
from funshampoo.optim import Optimizer, Shampoo
from funshampoo.plan import plan
from funshampoo.recipes import (
    adamw,
    eigenvalue_shampoo,
    kl_shampoo,
    kl_soap,
    lion,
    muon,
    normuon,
    sgd,
    shampoo,
    sign_descent,
    soap,
    soap_muon,
    spectral_descent,
    splus,
)
from funshampoo.transforms import (
    AgreementGate,
    adaptive_clip,
    add_cautious_decay,
    add_decayed_weights,
    blend_towards,
    cautious,
    centralize,
    clip,
    clip_by_global_norm,
    decay_after_step,
    ema,
    ema_nesterov,
    global_norm,
    graft,
    hyperball,
    in_eigenbasis,
    kl_statistics,
    kronecker_statistics,
    normalize_rows,
    orthogonalize,
    primal_average,
    radial_brake,
    root_inverse,
    scale,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_eigenvalues,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_second_moment,
    scale_by_sgd,
    scale_by_shape,
    schedule_free,
    sign,
    stochastic_rounding,
    tail_average,
    trace,
    update_floor,
)

__version__ = "0.2.0.dev0"

__all__ = [
    "AgreementGate",
    "EmptyState",
    "FailureLimitError",
    "GradientTransformation",
    "InterruptedStepError",
    "MaskedNode",
    "Optimizer",
    "Schedule",
    "Shampoo",
    "adamw",
    "adaptive_clip",
    "add_cautious_decay",
    "add_decayed_weights",
    "apply_updates",
    "blend_towards",
    "blocked",
    "blocks",
    "cautious",
    "centralize",
    "chain",
    "clip",
    "clip_by_global_norm",
    "compiled",
    "cuda_graphed",
    "decay_after_step",
    "eigenvalue_shampoo",
    "ema",
    "ema_nesterov",
    "evaluation_parameters",
    "every_k",
    "for_model",
    "from_published",
    "from_reference",
    "global_norm",
    "graft",
    "guarded",
    "hyperball",
    "identity",
    "in_eigenbasis",
    "in_tf32",
    "inject_hyperparams",
    "kl_shampoo",
    "kl_soap",
    "kl_statistics",
    "kronecker_statistics",
    "linalg",
    "lion",
    "masked",
    "migrate",
    "models",
    "multi_steps",
    "muon",
    "normalize_rows",
    "normuon",
    "orthogonalize",
    "partition",
    "plan",
    "primal_average",
    "radial_brake",
    "recipes",
    "refresh_due",
    "roles",
    "root_inverse",
    "routing_table",
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
    "schedules",
    "sgd",
    "shampoo",
    "sharded",
    "sign",
    "sign_descent",
    "soap",
    "soap_muon",
    "spectral_descent",
    "splus",
    "state",
    "stateless",
    "stochastic_rounding",
    "tail_average",
    "trace",
    "update_floor",
    "update_in_place",
    "wrapping",
]
