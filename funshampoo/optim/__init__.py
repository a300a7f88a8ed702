"""torch.optim's interface around any chain."""

from funshampoo.optim.optimizer import Optimizer
from funshampoo.optim.shampoo import Shampoo

__all__ = ["Optimizer", "Shampoo"]
