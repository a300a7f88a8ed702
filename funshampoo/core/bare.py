"""Parameter names without the prefixes that module wrappers insert."""

from __future__ import annotations

from collections.abc import Iterable

# By torch.compile, (Distributed)DataParallel, activation checkpointing, and sharding.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def bare_names(names: Iterable[str]) -> list[str]:
    """The parameters' names in the module itself; unchanged if two would coincide.

    >>> bare_names(["_orig_mod.blocks.0._checkpoint_wrapped_module.weight", "module.bias"])
    ['blocks.0.weight', 'bias']
    """
    given = list(names)
    bare = [".".join([x for x in n.split(".") if x not in _WRAPPERS]) for n in given]
    return bare if len(set(bare)) == len(set(given)) else given
