"""The names of hyperparameters: a recipe's, and torch.optim's for the same."""

from __future__ import annotations

import difflib
import inspect
import numbers
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from funshampoo.combinators.chaining import chain
from funshampoo.core.contract import GradientTransformation, as_transformation
from funshampoo.core.live import Live, is_live_argument, signature_of, takes_live
from funshampoo.core.traits import FLIPS, SOME
from funshampoo.migrate.published import first_rate_of, from_published
from funshampoo.optim.values import copied, is_fixed, is_number, same_value, structural
from funshampoo.transforms import scale_by_learning_rate

Method = Any  # a recipe, or a transformation
Arguments = Mapping[str, Any]
Lives = Mapping[str, Live]  # the numbers that a chain looks up, by argument
_RENAMED = {"learning_rate": "lr"}
OF_ALL_GROUPS = (
    "accept_adamw",
    "compile",
    "consolidate",
    "cuda_graph",
    "stochastic_rounding",
    "tf32",
)
"""Arguments of the optimizer that can't be set per group."""
_OURS = {"params", "param_names", "method", "maximize"}
# Other names for arguments, from torch and the published optimizers.
_SYNONYMS = {"eps": "epsilon", "learning_rate": "lr", "beta1": "betas", "beta2": "betas"} | {
    "adjust_lr_fn": "scale",
    "max_precond_dim": "max_size",
    "max_preconditioner_dim": "max_size",
    "ns_coefficients": "polynomials",
    "precondition_frequency": "every",
    "shampoo_beta": "statistics_beta",
}
SCALED_TWICE = (
    "the transformation scales by a learning rate already, and lr= would do it again: give it "
    "without scale_by_learning_rate, or give its recipe."
)
_ELSEWHERE = ": it is said once for all groups, as an argument of the optimizer."
# Entries that schedulers and other libraries keep in a group beside hyperparameters.
_NOTES = {
    "base_momentum",
    "differentiable",
    "initial_lr",
    "lr_scale",
    "max_lr",
    "max_momentum",
    "min_lr",
    "name",
    "rate_factor",
    "role",
    "step",
    "swa_lr",
}


class Vocabulary:
    """The names that a method has for its hyperparameters, and torch.optim's for the same.

    If the method takes no learning rate, as no transformation does, `lr` is the wrapper's: the
    updates are multiplied by -lr, or left as they are for lr=None.

    Args:
        method: a recipe, or a transformation.
        given: names of arguments. A recipe with **keywords gets those that it does not declare,
            except synonyms of one that it does.

    Attributes:
        extras: names of arguments that only **keywords take.
        takes_any: whether there are such **keywords.
        first_rate: the argument that is the constructor's original lr; None if there is none.

    >>> from funshampoo import adamw
    >>> Vocabulary(adamw).defaults({"lr": 0.1})["betas"]
    (0.9, 0.999)
    """

    def __init__(self, method: Method, given: Iterable[str] = ()) -> None:
        self.method = method
        self.fixed = not callable(method)
        if self.fixed:
            as_transformation(method)  # raises if it is not a transformation
        self._signature = inspect.Signature() if self.fixed else signature_of(method)
        parameters = self._signature.parameters.values()
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self._arguments = {p.name: p.default for p in parameters if p.kind not in variable}
        self.first_rate = first_rate_of(method)
        if self.first_rate in _NOTES:  # a group's entry of that name is a scheduler's
            self._arguments.pop(self.first_rate, None)
        theirs = getattr(method, "func", None) is from_published
        self._paired = {"beta1", "beta2"} <= self._arguments.keys() and not theirs
        # {torch's name: default, or inspect.Parameter.empty}
        self._names = {_RENAMED.get(name, name): x for name, x in self._arguments.items()}
        if self._paired:
            self._names["betas"] = (self._names.pop("beta1"), self._names.pop("beta2"))
        self.extras: set[str] = set()
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if self.takes_any:
            declared = {
                n for n, meant in _SYNONYMS.items() if meant == "lr" or meant in self._names
            }
            self.extras = set(given) - self._names.keys() - _OURS - _NOTES - declared
        if self.first_rate is not None and self.first_rate not in self._names:
            self.extras.add(self.first_rate)
        self.takes_rate = "lr" in self._names or "lr" in self.extras  # as an argument of its own
        if not self.takes_rate:
            self._names["lr"] = inspect.Parameter.empty

    @property
    def method_name(self) -> str:
        """The name of the method, if it has one."""
        name = getattr(self.method, "__name__", None) or getattr(self.method, "name", None)
        return str(name or "a method")

    @property
    def rate(self) -> str:
        """The name of the learning rate among the arguments."""
        return "learning_rate" if "learning_rate" in self._arguments else "lr"

    def live(self, arguments: Arguments) -> dict[str, Live]:
        """{argument: the live number that the chain looks up}, for those that may be edited freely.

        A pair (beta1, beta2) has two, "betas[0]" and "betas[1]".
        """
        return {
            name: Live(name, value)
            for name, value in _one_by_one(arguments).items()
            if is_number(value) and self._may_be_live(name.partition("[")[0])
        }

    def _may_be_live(self, name: str) -> bool:
        if name == "lr" and not self.takes_rate:
            return True  # the wrapper's own stage
        if self.fixed or not takes_live(self.method):
            return False
        parameter = self._signature.parameters.get(name)
        return parameter is not None and is_live_argument(self.method, parameter)

    def with_live(self, arguments: Arguments, live: Lives) -> dict[str, Any]:
        """The arguments with live numbers in their places."""

        def replaced(name: str, value: Any) -> Any:
            if type(value) is tuple and f"{name}[0]" in live:
                return tuple([live[f"{name}[{i}]"] for i in range(len(value))])
            return live.get(name, value)

        return {name: replaced(name, value) for name, value in arguments.items()}

    def hyper(self, arguments: Arguments, live: Lives) -> dict[str, Any]:
        """The current values of the live numbers."""
        values = _one_by_one(arguments)
        return {name: values.get(name) for name in live}

    def same_chain(self, now: Arguments, before: Arguments, live: Lives, in_graph: bool) -> bool:
        """Whether a chain is still valid for these arguments: live numbers may change their values.

        In a graph, a rate that is the same tensor is valid, too, since the graph reads it.
        """
        now, before = _one_by_one(now), _one_by_one(before)
        if now.keys() != before.keys():
            return False
        for name, value in now.items():
            old = before[name]
            if value is old and (is_fixed(value) or (in_graph and name == self.rate)):
                continue
            if name in live:
                same = self._kind(name, value) == self._kind(name, old)
            else:
                same = same_value(value, old)
            if not same:
                return False
        return True

    def structure(self, arguments: Arguments, live: Lives) -> Any:
        """The part of the arguments that can change the structure of the state."""
        values = _one_by_one(arguments)
        kinds = {name: self._kind(name, values.pop(name)) for name in live}
        return structural(values), kinds

    def _kind(self, name: str, value: Any) -> Any:
        """The part of a number's value that affects the structure: what it switches on or off."""
        if not is_number(value):
            return "no number"
        if name == self.rate:
            return "a number"
        return structural(value if isinstance(value, Tensor) else float(value))

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters: those given, the method's defaults for the rest.

        Raises:
            TypeError: one is unknown.
        """
        known = self._names.keys()
        unknown = sorted(set(given) - known - {"maximize"} - self.extras)
        if unknown:
            name = unknown[0]
            meant = self._meant(name, 0.6) or "".join(
                difflib.get_close_matches(name, OF_ALL_GROUPS, 1)
            )
            remedy = f"; did you mean '{meant}'?" if meant else "."
            raise TypeError(
                f"{self._subject()} has no hyperparameter '{name}'"
                + (_ELSEWHERE if name in OF_ALL_GROUPS else remedy)
                + f" It takes {', '.join(sorted(known | self.extras))}."
            )
        found = {**self._names, **given}
        return {name: v for name, v in found.items() if v is not inspect.Parameter.empty}

    def warn_unknown(self, entries: Iterable[str], edited: bool = False) -> None:
        """Warn of an entry of a group that looks like a misspelt or misplaced hyperparameter.

        Others are a client's, such as SAM's rho, and are kept, as torch.optim does.

        Args:
            entries: their names.
            edited: whether they came later, as most of clients' do: only those that are nearly a
                hyperparameter's, and not one with more words, such as "weight_decay_end".
        """
        words = {name for name in entries if isinstance(name, str)}  # torch.optim keeps any key
        for name in sorted(words - self._names.keys() - _OURS - _NOTES - self.extras):
            meant = self._meant(name, 0.8 if edited else 0.6)
            if edited and any([f"_{known}_" in f"_{name}_" for known in self._names]):
                meant = ""
            if meant or name in OF_ALL_GROUPS:
                remedy = f"; did you mean '{meant}'?" if meant else _ELSEWHERE
                warnings.warn(
                    f"the parameter group has an entry '{name}', which {self._subject()} does not "
                    f"read{remedy}",
                    stacklevel=4,
                )

    def raw(self, group: Mapping[str, Any]) -> list[Any]:
        """The entries of a group that `arguments` reads."""
        return [group.get(n, inspect.Parameter.empty) for n in (*self._names, *self.extras)]

    def arguments(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arguments from a group, as copies: the group may be edited in place.

        Raises:
            TypeError: one is missing, or lr is not a number.
            ValueError: betas is not a pair; lr is a tensor of several numbers.
        """
        check_rate(group.get("lr"))
        values = {n: copied(group[n]) for n in (*self._names, *self.extras) if n in group}
        if self._paired and "betas" in values:
            betas = values.pop("betas")
            if not isinstance(betas, (tuple, list)) or len(betas) != 2:
                raise ValueError(f"betas is {betas!r}; give the pair (beta1, beta2).")
            values["beta1"], values["beta2"] = betas
        arguments = {name: values[name] for name in self.extras if name in values}
        for name, default in self._arguments.items():
            own = _RENAMED.get(name, name)
            if own in values:
                arguments[name] = values[own]
            elif default is inspect.Parameter.empty:
                raise TypeError(f"{own} is missing: give it to the optimizer, or to every group.")
        if not self.takes_rate and "lr" in values:
            arguments["lr"] = values["lr"]
        return arguments

    def build(self, arguments: Arguments) -> GradientTransformation:
        """The transformation with these arguments.

        Raises:
            TypeError: the method injects its hyperparameters into its state, or scales by a
                learning rate itself, and `lr` is given.
        """
        own = {n: v for n, v in arguments.items() if n != "lr" or self.takes_rate}
        built = as_transformation(self.method if self.fixed else self.method(**own))
        if built.name == "inject_hyperparams" and not self.fixed:
            raise TypeError(
                "inject_hyperparams keeps numbers in the state, where edits of param_groups do not "
                "reach them: give the recipe itself."
            )
        if self.takes_rate or arguments.get("lr") is None:
            return built
        if {FLIPS, FLIPS + SOME} & built.traits.keys():
            raise TypeError(SCALED_TWICE)
        return chain(built, scale_by_learning_rate(arguments["lr"]))

    def _meant(self, name: str, least: float) -> str:
        """The hyperparameter, at least this similar, that a name stands for; "" for none."""
        known = self._names.keys()
        for meant in (_SYNONYMS.get(name), name.lower()):
            if meant in known:
                return str(meant)
        return "".join(difflib.get_close_matches(name, known, n=1, cutoff=least))

    def _subject(self) -> str:
        """The method, as the subject of a sentence."""
        return "a transformation" if self.fixed else getattr(self.method, "__name__", "the method")


def check_rate(lr: Any) -> None:
    """Raise TypeError or ValueError for an lr that is not a single number."""
    if callable(lr) and not isinstance(lr, Tensor):
        raise TypeError(
            "lr is a function; the wrapper takes numbers. Use a scheduler of "
            "torch.optim.lr_scheduler, or the schedule in a functional loop."
        )
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; give one number.")
    if isinstance(lr, Tensor) and (lr.is_complex() or lr.dtype == torch.bool):
        raise TypeError(f"lr is a tensor of {lr.dtype}; give one real number.")
    if lr is not None and not isinstance(lr, (Tensor, numbers.Real)):
        raise TypeError(f"lr is {lr!r}; give one number.")


def _one_by_one(arguments: Arguments) -> dict[str, Any]:
    """The arguments, with "betas[0]" and "betas[1]" for a tuple of numbers."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if type(value) is tuple and all(map(is_number, value)):
            found |= {f"{name}[{i}]": x for i, x in enumerate(value)}
        else:
            found[name] = value
    return found


def check_given(params: Any) -> None:
    """Raise TypeError for what is easily mistaken for parameters; torch checks the rest."""
    if params is None or isinstance(params, (torch.nn.Module, Mapping)):
        kind = "None" if params is None else f"a {type(params).__name__}"
        remedy = ", or its items()" if isinstance(params, Mapping) else ""
        raise TypeError(
            f"params is {kind}; give parameters, model.parameters() or model.named_parameters()"
            f"{remedy}. funshampoo.for_model takes a module, and a method by name."
        )
