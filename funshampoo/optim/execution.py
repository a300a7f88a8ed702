"""How the steps of an optimizer's chains are carried out."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from torch import Tensor

from funshampoo.combinators.compilation import compiled
from funshampoo.combinators.cuda_graphs import cuda_graphed
from funshampoo.combinators.tensor_float import in_tf32
from funshampoo.core.contract import GradientTransformation
from funshampoo.distributed.gathering import spreads
from funshampoo.optim.rounded import rounded


class Execution(NamedTuple):
    """What the optimizer wraps around the chain of every group.

    Attributes:
        compile: options of `compiled`; None: not compiled.
        cuda_graph: whether to wrap it in `cuda_graphed`.
        tf32: whether to wrap it in `in_tf32`.
        rounds: whether `stochastic_rounding` is the last stage.
    """

    compile: Mapping[str, Any] | None = None
    cuda_graph: bool = False
    tf32: bool = False
    rounds: bool = False

    @property
    def in_graphs(self) -> bool:
        """Whether numbers may be baked into a graph made on an earlier step."""
        return self.compile is not None or self.cuda_graph

    def wrap(self, transformation: GradientTransformation) -> GradientTransformation:
        """The transformation that is stepped: the chain with everything around it."""
        if self.rounds:
            transformation = rounded(transformation)
        if self.compile is not None:
            transformation = compiled(transformation, **self.compile)
        if self.tf32:
            transformation = in_tf32(transformation)
        return cuda_graphed(transformation) if self.cuda_graph else transformation

    def check(
        self, arguments: Mapping[str, Any], read: Set[str], chain: GradientTransformation
    ) -> None:
        """Raise if an argument of the recipe can't be used in a graph.

        Args:
            arguments: the recipe's arguments by name.
            read: the names of those that are looked up on every step.
            chain: that the recipe made of them.

        Raises:
            ValueError: names the argument.
        """
        if not self.in_graphs:
            return
        word = "cuda_graph" if self.cuda_graph else "compile"
        others = ("distribute",) if self.cuda_graph else ("distribute", "stagger")
        for other in others:
            # One's own recipe may have a function there that shards nothing.
            if arguments.get(other) and (other != "distribute" or list(spreads(chain))):
                raise ValueError(f"{word} and {other} do not go together: leave out one of them.")
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name not in read:
                raise ValueError(
                    f"{name} is a tensor, which may have been written to, so that every step would "
                    f"need a new graph: give a number, or leave out {word}."
                )


def execution(compile: Any, flags: Mapping[str, Any]) -> Execution:
    """The `Execution` for these options of `Optimizer`.

    Raises:
        TypeError: compile is neither a bool nor a dict; a flag is not a bool.
        ValueError: two options exclude each other.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}; give True or False.")
    cuda_graph, tf32 = flags["cuda_graph"], flags["tf32"]
    if not isinstance(compile, (bool, Mapping)):
        raise TypeError(f"compile is {compile!r}; give True, or a dict of torch.compile's options.")
    if cuda_graph and compile is not False:
        raise ValueError(
            "compile and cuda_graph do not go together: leave out one of them. "
            "compile={'mode': 'reduce-overhead'} has torch.compile make CUDA graphs."
        )
    options = dict(compile) if isinstance(compile, Mapping) else {} if compile else None
    return Execution(options, cuda_graph, tf32, flags["stochastic_rounding"])
