"""Published optimizers as chains, from their constructors' arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from funshampoo.core.checks import check_entries, check_flag, check_range, hint
from funshampoo.core.contract import GradientTransformation
from funshampoo.migrate import (
    published_eigenbases,
    published_emerging,
    published_muon,
    published_schedule_free,
    published_soap_muon,
)
from funshampoo.migrate.reference import from_reference
from funshampoo.migrate.wording import in_their_words

Builder = Callable[..., GradientTransformation]

METHODS: Mapping[str, Builder] = {
    "SOAP (Emerging-Optimizers)": published_emerging.soap,
    "REKLS": published_emerging.rekls,
    "KL-SOAP (Emerging-Optimizers)": published_emerging.kl_soap,
    "KL-Shampoo": published_eigenbases.kl_methods,
    "KL-SOAP": functools.partial(published_eigenbases.kl_methods, using_klsoap=True),
    "KL-SOAP-H (hyperball)": published_eigenbases.klsoap_h,
    "Muon": published_muon.keller_jordan,
    "Muon (torch.optim)": published_muon.torch_optim,
    "Muon (Emerging-Optimizers)": published_muon.emerging_optimizers,
    "NorMuon": published_muon.dion,
    "AdamWScheduleFree": published_schedule_free.adamw,
    "SGDScheduleFree": published_schedule_free.sgd,
    "RAdamScheduleFree": published_schedule_free.radam,
    "SOAP": published_eigenbases.soap,
    "SOAP-Muon": published_soap_muon.soap_muon,
    "SOAP-Muon + EMA-Nesterov": functools.partial(published_soap_muon.soap_muon, lookahead={}),
    "SPlus": published_eigenbases.splus,
}
"""{name: function of the constructor's arguments, by keyword, with its defaults}."""


def from_published(method: str, **args: Any) -> GradientTransformation:
    """The chain that computes the same as a published optimizer, for users who switch from it.

    Args:
        method: one of

            - "Muon": KellerJordan/Muon, class Muon;
            - "Muon (torch.optim)": torch.optim.Muon;
            - "Muon (Emerging-Optimizers)": NVIDIA-NeMo/Emerging-Optimizers;
            - "SOAP (Emerging-Optimizers)", "REKLS", "KL-SOAP (Emerging-Optimizers)" (its KlSoapV3);
            - "SOAP": nikhilvyas/SOAP;
            - "NorMuon": microsoft/dion, on one device;
            - "KL-Shampoo", "KL-SOAP": yorkerlin/KL-Methods, class KLOpt;
            - "KL-SOAP-H (hyperball)": KLSOAPH of modded-nanogpt's track 3;
            - "SPlus": kvfrans/splus;
            - "SOAP-Muon", "SOAP-Muon + EMA-Nesterov": a record of modded-nanogpt, track 3, by its
              constants, with `roles`, one for each parameter;
            - "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree":
              facebookresearch/schedule_free.
        **args: the constructor's, by name, with its defaults. `lr` is a number, a tensor, or a
            schedule of the old step count instead of a scheduler. Methods that iterate in bfloat16
            do so here with dtype=torch.bfloat16, an argument of ours; without it they use float32
            or wider.

    Muon is only for matrices, as there: give other parameters to another method by `partition`.
    Its blocks are whole matrices, `guarded`. The parameters of the Schedule-Free methods are those
    that are trained; evaluate with `funshampoo.evaluation_parameters(state, params)`, as with SPlus
    and EMA-Nesterov, whose parameters are look-ahead points. The wrapper takes a function of the
    other arguments: `Optimizer(params, functools.partial(from_published, "SOAP"), lr=3e-3)`.

    A parameter whose gradients are None at first counts its own steps, or with Schedule-Free all
    steps, as in the original. Only refreshes fall on the same steps for all: a parameter that
    starts between two uses the identity until the next. So does one whose first gradient is zeros;
    its first basis is a decomposition, where the originals take a QR step from the identity.

    Raises:
        ValueError: the method, or the value of an argument, is unknown or out of range. The error
            names the argument as its constructor does.
        TypeError: the constructor has no such argument.
        NotImplementedError: an argument asks for something not built here; the error names it.

    >>> import torch
    >>> tx = from_published("Muon (torch.optim)", lr=0.02, weight_decay=0.0, ns_steps=10)
    >>> params = {"w": torch.eye(2)}
    >>> tx.update(params, tx.init(params), params)[0]["w"].abs().max() < 0.03
    tensor(True)
    """
    if method not in METHODS:
        near = hint(str(method), METHODS)
        raise ValueError(f"method is {method!r}; known are {', '.join(map(repr, METHODS))}{near}")
    builder = METHODS[method]
    known = inspect.signature(builder).parameters
    unknown = sorted(args.keys() - known.keys())
    if unknown:
        raise TypeError(
            f"the constructor of {method} has no argument {unknown[0]!r}; it has "
            f"{', '.join(known)}{hint(unknown[0], known)}"
        )
    for name, value in args.items():
        _check(name, value, known[name])
    return in_their_words(builder)(**args)


_ENTRIES = {"betas": 2, "ns_coefficients": 3}
_STATISTICS = ("shampoo_beta", "soap_beta2", "b2")


def _check(name: str, value: Any, known: inspect.Parameter) -> None:
    """Checks common to all constructors; stages check ranges."""
    if value is known.default:
        return
    if str(known.annotation).startswith("bool"):
        check_flag(name, value)
    if name == "lr":
        check_range(name, value, 0.0, schedule=True)
    if name in _STATISTICS:  # at 1 our stages would sum, while the originals stay at 0
        check_range(name, value, float("-inf"), 1.0, high_open=True)
    if name in _ENTRIES:
        check_entries(name, value, _ENTRIES[name])


def _signature_for(method: functools.partial[GradientTransformation]) -> inspect.Signature:
    """The arguments of the constructor that a partial of `from_published` leaves."""
    given = dict(method.keywords)
    name = given.pop("method", next(iter(method.args), None))
    if name not in METHODS:
        return inspect.signature(method)
    known = inspect.signature(METHODS[name])
    left = [p for n, p in known.parameters.items() if n not in given]
    return known.replace(parameters=left)


from_published.signature_for = _signature_for  # type: ignore[attr-defined]


def first_rate_of(method: Any) -> str | None:
    """The argument that passes on the constructor's lr; None if it can no longer be given.

    Some methods divide later rates by it.

    Args:
        method: `from_reference`, or a partial of it or of `from_published`; others have none.

    >>> import functools
    >>> first_rate_of(functools.partial(from_published, "SOAP-Muon"))
    'initial_lr'
    """
    function, given = getattr(method, "func", method), getattr(method, "keywords", {})
    if function is from_published:
        name = given.get("method", *getattr(method, "args", ())[:1])
        function = METHODS.get(str(name))
    elif function is not from_reference:
        return None
    known = inspect.signature(function).parameters if function else {}
    return next((n for n in ("peak_lr", "initial_lr") if n in known and n not in given), None)
