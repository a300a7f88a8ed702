"""Everything for writing your own stages and solvers: the names of docs/stages.md.

They stay importable from here, wherever in the package they are defined.
"""

from funshampoo.combinators.wrapping import wrapping
from funshampoo.core.context import Context, changed
from funshampoo.core.contract import EmptyState, GradientTransformation, identity, stateless
from funshampoo.core.live import Live, number
from funshampoo.core.tree import compute_dtype, map_leaves, update_columns, update_leaves
from funshampoo.linalg.basis import Basis, power_step
from funshampoo.linalg.eigensolver import EigenSolver
from funshampoo.linalg.norms import block_norm, is_readable
from funshampoo.linalg.products import each_matrix, matmul, power
from funshampoo.linalg.solver import InverseRoot, RootSolver
from funshampoo.linalg.spectral import decompose
from funshampoo.operators import columns, leaf_ops
from funshampoo.operators.leafwise import leafwise
from funshampoo.operators.mode_products import (
    bias_corrected,
    mode_flops,
    precondition,
    rotate,
    unfold,
)
from funshampoo.operators.noise import random_normal
from funshampoo.operators.packed import unpack
from funshampoo.refresh import Found, Refreshing, RefreshSchedule, Rule
from funshampoo.state import find_state, meaning
from funshampoo.state.nodes import first_state
from funshampoo.state.partners import statistics_of

__all__ = [
    "Basis",
    "Context",
    "EigenSolver",
    "EmptyState",
    "Found",
    "GradientTransformation",
    "InverseRoot",
    "Live",
    "RefreshSchedule",
    "Refreshing",
    "RootSolver",
    "Rule",
    "bias_corrected",
    "block_norm",
    "changed",
    "columns",
    "compute_dtype",
    "decompose",
    "each_matrix",
    "find_state",
    "first_state",
    "identity",
    "is_readable",
    "leaf_ops",
    "leafwise",
    "map_leaves",
    "matmul",
    "meaning",
    "mode_flops",
    "number",
    "power",
    "power_step",
    "precondition",
    "random_normal",
    "rotate",
    "stateless",
    "statistics_of",
    "unfold",
    "unpack",
    "update_columns",
    "update_leaves",
    "wrapping",
]
