"""funshampoo: gradient transformations for PyTorch, with Distributed Shampoo at their heart.

>>> import torch, funshampoo
>>> tx = funshampoo.shampoo(0.01)
>>> params = {"w": torch.eye(2)}
>>> state = tx.init(params)
>>> grads = torch.func.grad(lambda p: (p["w"] ** 2).sum())(params)
>>> updates, state = tx.update(grads, state, params)
>>> params = funshampoo.apply_updates(params, updates)
"""

from funshampoo import blocks, linalg, migrate, models, recipes, schedules, state, transforms
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
from funshampoo.recipes import *  # noqa: F403
from funshampoo.transforms import *  # noqa: F403

__version__ = "0.2.0.dev0"

__all__ = [
    "EmptyState",
    "FailureLimitError",
    "GradientTransformation",
    "InterruptedStepError",
    "MaskedNode",
    "Optimizer",
    "Schedule",
    "Shampoo",
    "apply_updates",
    "blocked",
    "blocks",
    "chain",
    "compiled",
    "cuda_graphed",
    "evaluation_parameters",
    "every_k",
    "for_model",
    "from_published",
    "from_reference",
    "guarded",
    "identity",
    "in_tf32",
    "inject_hyperparams",
    "linalg",
    "masked",
    "migrate",
    "models",
    "multi_steps",
    "partition",
    "plan",
    "recipes",
    "refresh_due",
    "roles",
    "routing_table",
    "schedules",
    "sharded",
    "state",
    "stateless",
    "update_in_place",
    "wrapping",
]
__all__ += recipes.__all__
__all__ += transforms.__all__
