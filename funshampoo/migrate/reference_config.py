"""The configs and arguments of the Distributed Shampoo reference, translated to ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funshampoo.blocks.layout import Merge
from funshampoo.core.checks import check_flag, hint
from funshampoo.core.contract import GradientTransformation, Hyper, Schedule
from funshampoo.core.live import initial
from funshampoo.transforms import scale_by_adagrad, scale_by_adam, scale_by_rms, scale_by_sgd
from funshampoo.transforms.weight_decay import DecayKind

Config = Mapping[str, Any]

GRAFTED = ("SGD", "AdaGrad", "RMSprop", "Adam")
"""Methods that can be grafted onto, and can also be the whole method."""

DECAY_KINDS: dict[str, DecayKind] = {
    "L2": "coupled",
    "DECOUPLED": "decoupled",
    "CORRECTED": "corrected",
    "INDEPENDENT": "independent",
}


class Fields:
    """The fields of one config, read one by one; unread ones are an error.

    Args:
        config: None means an empty one, of the first supported type.
        argument: the argument that it was passed as.
        built: the supported types.

    Raises:
        TypeError: not a dict.
        NotImplementedError: an unsupported type.
    """

    def __init__(self, config: Config | None, argument: str, built: Sequence[str]) -> None:
        self.argument = argument
        check_config(config, argument)
        self.left: dict[str, Any] = {"type": built[0]} if config is None else dict(config)
        self._inside: list[Fields] = []
        self._known = ["type"]
        self.type = str(self.left.pop("type", ""))
        if not self.type:
            raise NotImplementedError(
                f"{argument}: a config without a type is not built here; its 'type' is one of "
                f"{', '.join(built)}."
            )
        if self.type not in built:
            raise NotImplementedError(
                f"{argument}: {self.type} is not built here yet; built are {', '.join(built)}"
                f"{hint(self.type, built)}"
            )

    def take(self, field: str, default: Any) -> Any:
        """The field's value; marks the field as read.

        Raises:
            TypeError: a flag is not a bool: "no" would be taken for yes.
        """
        self._known.append(field)
        found = self.left.pop(field, default)
        if isinstance(default, bool):
            check_flag(field, found)
        return found

    def function(self, field: str) -> Any:
        """A field whose value is a function, or None.

        Raises:
            TypeError: it is neither.
        """
        found = self.take(field, None)
        if found is not None and not callable(found):
            raise TypeError(f"{field} is {found!r}; give a function, or None.")
        return found

    def nested(self, field: str, *built: str) -> Fields:
        """The fields of the config in a field, which `finish` checks too."""
        self._inside.append(Fields(self.take(field, None) or None, field, built))
        return self._inside[-1]

    def by_order(self, field: str, default: Any = None) -> Any:
        """A field whose value is a dict by the number of sides."""
        found = self.take(field, default)
        if found is not None and not (
            isinstance(found, Mapping) and all(isinstance(order, int) for order in found)
        ):
            raise TypeError(f"{field} is {found!r}; write it as {{number of sides: value}}.")
        return found

    def drop(self, *fields: str) -> None:
        """Mark fields as read that have no effect here."""
        for field in fields:
            self.take(field, None)

    def finish(self) -> None:
        """Raises TypeError if a field has not been read: the type has none of this name."""
        for inside in self._inside:
            inside.finish()
        if self.left:
            field = sorted(self.left)[0]
            near = hint(field, self._known)
            raise TypeError(f"{self.argument}: {self.type} has no field {field!r}{near}")


def check_config(config: Any, argument: str) -> None:
    """Raises TypeError if it is not a mapping: perhaps an object of the reference's own class."""
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"{argument} is a {type(config).__name__}; write it as "
            '{"type": its class\'s name, field: value}.'
        )


def grafting(config: Config | None, own_steps: bool) -> GradientTransformation | None:
    """The method to graft onto, or None."""
    if config is None:
        return None
    fields = Fields(config, "grafting_config", tuple(f"{n}PreconditionerConfig" for n in GRAFTED))
    partner = diagonal(fields, own_steps)
    fields.finish()
    return partner


def diagonal(fields: Fields, own_steps: bool) -> GradientTransformation:
    """The direction of SGD, AdaGrad, RMSprop or Adam, without its first moment."""
    method = fields.type.removesuffix("PreconditionerConfig")
    if method == "SGD":
        return scale_by_sgd()
    epsilon = fields.take("epsilon", 1e-10)
    if method == "AdaGrad":
        return scale_by_adagrad(epsilon)
    beta2 = fields.take("beta2", 0.999 if method == "Adam" else 0.99)
    weighted = not fields.take("drop_weighting_factor_on_gsquare", False)
    if beta2 == 1 and not weighted:
        return scale_by_adagrad(epsilon)  # V ← V + G²
    if beta2 == 1:
        raise ValueError(
            f"{fields.argument}: {method} with beta2=1 weighs every G² by 1 - beta2 = 0, so that "
            "its second moment stays 0; AdaGradPreconditionerConfig is the plain sum."
        )
    if method == "Adam":
        return scale_by_adam(0.0, beta2, epsilon, weighted=weighted, own_steps=own_steps)
    return scale_by_rms(beta2, epsilon, weighted=weighted)


def first_step(start: int | float | str, frequency: int) -> int:
    """The number of the step with the first refresh."""
    if start == -1:
        return frequency
    whole = _int_or_none("start_preconditioning_step", start)
    return sys.maxsize if whole is None else whole


WITHOUT_EFFECT = (
    "distributed_config",  # except one of its fields, see `merging_target`
    "shampoo_runtime_config",
    "concurrency_config",
    "shampoo_pt2_compile_config",
    "use_pin_memory",
)
"""Arguments of the reference that have no effect here."""


def merging_target(target: int | float | str, config: Config | None) -> int | float | str:
    """The merging target, which the reference keeps in its distributed_config.

    Raises:
        TypeError: the config is not a mapping, or has a misspelt field; other fields concern ranks.
    """
    check_config(config, "distributed_config")
    name = "target_parameter_dimensionality"
    for field in config or {}:
        if field != name and hint(str(field), [name]) != ".":
            raise TypeError(f"distributed_config has no field {field!r}{hint(field, [name])}")
    found: int | float | str = (config or {}).get(name, target)
    return found


def blocking(size: int | float | str, target: int | float | str) -> tuple[int | None, Merge, int]:
    """(max_size, merge, keep) of `blocked`."""
    block = _int_or_none("max_preconditioner_dim", size)
    keep = _int_or_none("target_parameter_dimensionality", target)
    return (block, "none", 1) if keep is None else (block, "small", keep)


def _int_or_none(name: str, value: int | float | str) -> int | None:
    if value in ("inf", float("inf")):
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 1, or 'inf'.")
    return value


def peak_of(lr: Hyper | Schedule) -> Hyper:
    """The constructor's lr: lr itself, or the largest value that a schedule has early on."""
    if not callable(lr):
        constant: Hyper = initial(lr)  # whatever lr is later
        return constant
    values = []
    for count in range(10_000):
        try:
            values.append(float(lr(torch.tensor(count, device="cpu"))))
        except (IndexError, KeyError):  # a schedule that reads from a list of rates
            break
    if not values:
        raise ValueError("lr is a schedule without a value at count 0.")
    return max(values)
