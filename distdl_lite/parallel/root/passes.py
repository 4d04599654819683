"""Forward and backward of all ranks of a `RootDataParallel` together: rows and weights go out, results come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from distdl_lite.agreement import TensorStructure, autocast
from distdl_lite.buckets import grouped
from distdl_lite.operator import Operator
from distdl_lite.parallel.root.batch import (
    Output,
    Places,
    Report,
    check_movable,
    cut_rows,
    dim_in,
    outputs_of,
    rows_in,
    runs,
)
from distdl_lite.parallel.root.protocol import NAME, Agreed
from distdl_lite.parallel.root.run import Call, Leaf, Result, Run, apply, local_gradients, slotted
from distdl_lite.parallel.root.weights import Weights
from distdl_lite.private import flattened, unflattened

_KEPT_OPERATORS = 256
# From the name of a meeting, a forward's number, a value and an error of this rank to the values by position.
Gather = Callable[[str, int, Any, BaseException | None], dict[int, Any]]


class Passes:
    """The forwards and backwards that a team makes together: the root gives tensors, weights and gradients, others None."""

    def __init__(self, team: Places) -> None:
        self._team, self._weights = team, Weights()
        self._weights_operator = lru_cache(_KEPT_OPERATORS)(team.weights_operator)
        self._rows_operator = lru_cache(_KEPT_OPERATORS)(team.rows_operator)

    def call(
        self, module: torch.nn.Module, dim: int, leaves: list[Any], nesting: Any, tensors: list[torch.Tensor]
    ) -> tuple[Call, list[torch.Tensor]]:
        """The root's message to the others about a forward, and its weights."""
        structures = tuple(TensorStructure.of(tensor) for tensor in tensors)
        for number, structure in enumerate(structures):
            check_movable(structure, f"tensor {number} of the arguments")
        cuts = cut_rows(rows_in(structures, dim), len(self._team.ranks), self._team.root)
        copied = {i: tensor.detach().cpu().clone() for i, tensor in enumerate(tensors) if not tensor.dim()}
        arguments = slotted(leaves, nesting)
        news, weights = self._weights.news(module)
        modes = torch.is_grad_enabled(), autocast()
        return Call(arguments, structures, copied, dim, cuts, news, *modes), weights

    def forward(
        self,
        module: torch.nn.Module,
        number: int,
        call: Call,
        gather: Gather,
        tensors: list[torch.Tensor] | None = None,
        weights: list[torch.Tensor] | None = None,
    ) -> tuple[Run, Result | None]:
        """A forward, and what the module returned on this rank."""
        self._weights.send(call.news, weights, self._weights_operator)
        cutters = [self._cutter(structure, call) for structure in call.tensors]
        blocks = [self._block(call, i, cutter, tensors) for i, cutter in enumerate(cutters)]
        error = report = result = None
        replica: list[torch.Tensor] = []
        try:
            replica = self._replica(module, call, weights)
            assert self._team.place is not None
            if runs(call.cuts, self._team.place, self._team.root):
                names = [(name, t) for w, t in zip(self._weights.weights, replica, strict=True) for name in w.names]
                aliases = {name: t for name, t in names if weights is not None and t.requires_grad}
                result = apply(module, call, blocks, aliases if call.is_grad_enabled else {})
                report = Report.of(result.nesting, result.items)
        except BaseException as raised:
            error = raised
        outputs = self._outputs(call.dim, gather("outputs", number, report, error))
        local = None if result is None else result.tensors
        returned = [_joined(*output, local and local[i]) for i, output in enumerate(outputs)]
        if not any(output.requires_grad for output, _ in outputs):
            return Run(number, [], outputs, None, returned), result
        leaves = [Leaf(w.structure, None, part) for w, part in zip(self._weights.weights, replica, strict=True)]
        leaves += map(Leaf, call.tensors, cutters, blocks)
        leaves = [leaf for leaf in leaves if leaf.structure.requires_grad]
        return Run(number, leaves, outputs, local, returned), result

    def _cutter(self, structure: TensorStructure, call: Call) -> Operator | None:
        dim = dim_in(structure.shape, call.dim)
        return None if dim is None else self._rows_operator(structure.shape, dim, call.cuts)

    def _block(
        self, call: Call, number: int, cutter: Operator | None, tensors: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """This rank's part of a tensor argument, a leaf of its graph."""
        structure = call.tensors[number]
        if cutter is None:
            block = call.copied[number].to(structure.device)
        else:
            block = cutter.apply(_nothing_like(structure) if tensors is None else tensors[number].detach())
        return block.requires_grad_(call.is_grad_enabled and structure.requires_grad)

    def _replica(self, module: torch.nn.Module, call: Call, weights: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """The module's weights for this forward: on the root aliases, so that hooks see the whole gradient alone."""
        if weights is None:
            return self._weights.install(module, call.news.training)
        return [w.detach().requires_grad_() if w.requires_grad and call.is_grad_enabled else w for w in weights]

    def _outputs(self, dim: int, reports: dict[int, Report]) -> list[tuple[Output, Operator]]:
        try:
            outputs = outputs_of(reports, len(self._team.ranks), dim)
        except (TypeError, ValueError) as error:
            raise Agreed(type(error)(f"{NAME}: {error}")) from error
        return [(output, self._rows_operator(output.shape, output.dim, output.cuts)) for output in outputs]

    def backward(
        self,
        run: Run,
        keep: bool,
        given: Sequence[bool],
        gather: Gather,
        gradients: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor | None]:
        """The gradients of the leaves, on the root; `given` tells which outputs have one, `keep` whether the graph stays."""
        received = [
            operator.apply(_nothing_like(output) if gradients is None else gradients[i]) if given[i] else None
            for i, (output, operator) in enumerate(run.outputs)
        ]
        error = None
        found: list[torch.Tensor | None] = [None] * len(run.leaves)
        try:
            found = local_gradients(run, received, keep)
        except BaseException as raised:
            error = raised
        masks = gather("gradients", run.number, [gradient is not None for gradient in found], error).values()
        return self._summed(run, found, [any(flags) for flags in zip(*masks, strict=True)])

    def _summed(
        self, run: Run, found: Sequence[torch.Tensor | None], used: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """Bring the ranks' gradients of the leaves to the root."""
        totals: list[torch.Tensor | None] = [None] * len(found)
        parts = [torch.zeros_like(leaf.part) if g is None else g for leaf, g in zip(run.leaves, found, strict=True)]
        copies = []
        for i, leaf in enumerate(run.leaves):
            if used[i] and leaf.cutter is not None:
                totals[i] = leaf.cutter.adjoint.apply(parts[i])
            elif used[i]:
                copies.append(i)
        structures = [leaf.structure for leaf in run.leaves]
        for group in grouped(copies, lambda i: (structures[i].dtype, structures[i].device)):
            members = [parts[i] for i in group]
            total = self._weights_operator(sum(part.numel() for part in members)).adjoint.apply(flattened(members))
            if self._team.place == self._team.root:
                for i, part in zip(group, unflattened(total, members), strict=True):
                    totals[i] = part
        return totals


def _joined(output: Output, operator: Operator, block: torch.Tensor | None) -> torch.Tensor:
    """An output, whole on the root."""
    if block is None:
        block = torch.empty(operator.plan.shape_out or (), dtype=output.dtype, device=output.device)
    return operator.adjoint.apply(block.detach())


def _nothing_like(what: TensorStructure | Output) -> torch.Tensor:
    """The argument of an operator on a rank that holds nothing of a tensor."""
    return torch.empty(0, dtype=what.dtype, device=what.device)
