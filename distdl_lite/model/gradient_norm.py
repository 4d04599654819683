"""Gradients of cut and replicated weights: norms, clipping, and which optimizers look at one element at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from weakref import WeakKeyDictionary

import torch

from distdl_lite.layout import Layout
from distdl_lite.model.weights import check_cut_weights, team_of
from distdl_lite.nn.parameter import Place
from distdl_lite.transport import Team

# Their update of an element depends on that element alone, so it is the same on a block as on the whole weight.
_ELEMENTWISE = {
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "SparseAdam",
}  # fmt: skip


def _counted_once(module: torch.nn.Module, team: Team) -> Iterator[torch.Tensor]:
    """This rank's gradients of which it is the first holder, as the ranks tell each other once for a module.

    A tied weight, which several layers have, counts once, and a plain torch parameter on the first rank that has it. So do
    lines, where each has a layer of its own.
    """
    transport = team.world
    held = {id(p): (f"{path}.{name}", place, p) for path, name, place, p in reversed(list(_held(module)))}
    mine = [(name, place) for name, place, _ in held.values()]
    known = transport.local.setdefault("counted once", WeakKeyDictionary())
    places, counted = known.get(module, ([], set()))
    if transport.agree(team, int(places != mine)):  # a rank's module may have changed alone
        check_cut_weights(module, team)
        told = transport.gather_objects(team, [(name, place and place.layout) for name, place in mine])
        first: dict[str, tuple[int, Layout | None]] = {}
        for rank, names in zip(team, told, strict=True):
            for name, layout in names:
                first.setdefault(name, (rank, layout))
        counted = {
            name
            for name, place in mine
            if transport.rank == (first[name][0] if place is None else next(iter(place.replicas.team), -1))
            and first[name][1] == (place and place.layout)
        }
        known[module] = mine, counted
    for name, _, parameter in held.values():
        if name in counted and parameter.grad is not None and parameter.numel():
            yield parameter.grad


def _held(module: torch.nn.Module) -> Iterator[tuple[str, str, Place | None, torch.Tensor]]:
    for path, inner in module.named_modules():
        places = getattr(inner, "_distdl_places", {})
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield path, name, places.get(name), parameter


def grad_norm(module: torch.nn.Module, norm_type: float = 2.0) -> torch.Tensor:
    """The norm of all gradients of a distributed model, each weight counted once.

    Parameters
    ----------
    module : torch.nn.Module
        The ranks of its layers call this together.
    norm_type : float
        p of the p-norm, above 0; ``inf`` is the largest absolute value.

    Returns
    -------
    torch.Tensor
        A scalar of the parameters' dtype, the same on all ranks of the model's layers and what the serial model's would
        be; 0 on ranks outside.

    Raises
    ------
    ValueError
        For a `norm_type` that is not above 0; on all ranks, for a cut weight that a parametrization has replaced.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 1, 2)), 1, 1, 1, bias=False)
    ...     net(torch.ones(1, 1, 2)).sum().backward()  # four points over two ranks
    ...     return dl.grad_norm(net).item()
    >>> dl.testing.spmd(2, body)
    [4.0, 4.0]
    """
    if not norm_type > 0:
        raise ValueError(f"grad_norm: norm_type must be above 0, not {norm_type}")
    team = team_of(module)
    transport = team.world
    total = torch.zeros((), dtype=torch.float64)
    if transport.rank not in team:
        return total.to(_dtype_of(module))
    is_largest = math.isinf(norm_type)
    for gradient in _counted_once(module, team):
        norm = torch.linalg.vector_norm(
            gradient.detach(), norm_type, dtype=torch.promote_types(gradient.dtype, torch.float64)
        ).to("cpu")
        total = torch.maximum(total, norm) if is_largest else total + norm.double() ** norm_type
    transport.all_reduce(team, total, "max" if is_largest else "sum")
    return (total if is_largest else total ** (1 / norm_type)).to(_dtype_of(module))


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    """The real dtype of the parameters, which all ranks have the same of, also those that hold none of their elements."""
    dtypes = [parameter.dtype for parameter in module.parameters()]
    return reduce(torch.promote_types, dtypes).to_real() if dtypes else torch.get_default_dtype()


def clip_grad_norm_(
    module: torch.nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scale all gradients of a distributed model so that their norm is at most `max_norm`, as torch does serially.

    Parameters
    ----------
    module : torch.nn.Module
        The ranks of its layers call this together.
    max_norm, norm_type : float
        As in ``torch.nn.utils.clip_grad_norm_``.
    error_if_nonfinite : bool
        Whether a norm that is nan or infinite raises, on all ranks.

    Returns
    -------
    torch.Tensor
        The norm before scaling.

    Raises
    ------
    RuntimeError
        With `error_if_nonfinite`, if the norm is not finite.
    ValueError
        As in `grad_norm`.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> def body(world):
    ...     net = dl.nn.DistributedConv1d(world.grid((1, 1, 2)), 1, 1, 1, bias=False)
    ...     net(torch.ones(1, 1, 2)).sum().backward()
    ...     before = dl.clip_grad_norm_(net, max_norm=1.0).item()
    ...     return before, round(net.weight.grad.item(), 4)
    >>> dl.testing.spmd(2, body)
    [(4.0, 1.0), (4.0, 1.0)]
    """
    norm = grad_norm(module, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"the gradients' norm of order {norm_type} is {norm.item()}, it cannot be clipped")
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.detach().mul_(factor.to(parameter.grad.device, parameter.grad.dtype))
    return norm


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step looks across a tensor, which is wrong where weights are cut or absent.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Nothing but its class is looked at.

    Raises
    ------
    ValueError
        If the optimizer is not known to be elementwise; Adafactor, Muon and LBFGS are not.

    Examples
    --------
    >>> import torch
    >>> import distdl_lite as dl
    >>> dl.check_optimizer(torch.optim.Adam(torch.nn.Linear(2, 2).parameters()))
    >>> dl.check_optimizer(torch.optim.LBFGS(torch.nn.Linear(2, 2).parameters()))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: LBFGS is not known to update each element by itself, which cut weights need; these do: ...
    """
    name = type(optimizer).__name__
    if name not in _ELEMENTWISE:
        raise ValueError(
            f"{name} is not known to update each element by itself, which cut weights need; "
            f"these do: {', '.join(sorted(_ELEMENTWISE))}"
        )
