"""Coming from other optimizers: the reference, published methods, and torch.optim.AdamW."""

from funshampoo.migrate.published import from_published
from funshampoo.migrate.reference import from_reference
from funshampoo.migrate.seeding import seed_from_adamw

__all__ = ["from_published", "from_reference", "seed_from_adamw"]
