"""Coming from other optimizers: the reference implementation, and torch.optim.AdamW."""

from funshampoo.migrate.reference import from_reference
from funshampoo.migrate.seeding import seed_from_adamw

__all__ = ["from_reference", "seed_from_adamw"]
