"""torch.optim's interface around any chain."""

from funshampoo.optim.optimizer import Optimizer, Shampoo

__all__ = ["Optimizer", "Shampoo"]
