"""AdamW whose half-precision parameters have fp32 masters, and checks of its stored state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.cli.typed import has_type
from lowrank_ext.files import quoted
from lowrank_ext.files.tensor_file import is_finite
from lowrank_ext.sharding import divided_like, full_tensor

_MASTERS = "masters"


class MasterAdamW(torch.optim.AdamW):
    """AdamW in fp32. A bf16 or fp16 parameter has an fp32 master that is rounded into it once per
    step, so that small updates are not lost. `param_groups` hold the masters.

    Args:
        groups: dicts with `params`, `lr` and `weight_decay`.
        options: AdamW's own, as `betas`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.masters = [
            parameter
            if parameter.dtype is torch.float32
            else nn.Parameter(parameter.detach().float())
            for parameter in self.parameters
        ]
        masters = iter(self.masters)
        super().__init__(
            [{**group, "params": [next(masters) for _ in group["params"]]} for group in groups],
            fused=True,
            **options,
        )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the parameters' gradients."""
        for parameter, master in self._halves():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        super().step(closure)
        with torch.no_grad():
            for parameter, master in self._halves():
                if master.grad is not None:
                    parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter in self.parameters:
            parameter.grad = None

    def _halves(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = zip(self.parameters, self.masters, strict=True)
        return [(parameter, master) for parameter, master in pairs if master is not parameter]

    def forget_frozen(self) -> None:
        """Drops the moments of frozen parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if not parameter.requires_grad:
                parameter.grad = master.grad = None
                self.state.pop(master, None)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and the fp32 masters, None for parameters that are their own. Sharded ones
        are gathered, so every process must call it."""
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = [
            None if master is parameter else full_tensor(master) for parameter, master in pairs
        ]
        own = super().state_dict()
        state = {
            index: {name: full_tensor(tensor) for name, tensor in moments.items()}
            for index, moments in own["state"].items()
        }
        return {**own, "state": state, _MASTERS: masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave. Raises ValueError for the state of other parameters."""
        check_state(state_dict, self)
        state = {
            index: {
                name: tensor if name == "step" else divided_like(tensor, self.masters[index])
                for name, tensor in moments.items()
            }
            for index, moments in state_dict["state"].items()
        }
        super().load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
        for master, stored in zip(self.masters, state_dict[_MASTERS], strict=True):
            if stored is not None:
                master.copy_(divided_like(stored, master))


def check_state(state: dict[str, Any], optimizer: MasterAdamW) -> None:
    """Raises ValueError unless ``state`` is of an optimizer of the same parameters: AdamW itself
    would take moments of any shape."""
    own = optimizer.state_dict()
    if state.keys() != own.keys():
        raise ValueError(f"optimizer must hold {sorted(own)}, got {quoted(sorted(state))}")
    _check_groups(state["param_groups"], own["param_groups"])
    masters = dict(enumerate(optimizer.masters))
    for index, moments in state["state"].items():
        if index not in masters or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"optimizer: state {quoted(index)} must be of a parameter")
        like = {"step": torch.tensor(0.0)}
        for name, tensor in moments.items():
            _check_like(tensor, like.get(name, masters[index]), f"optimizer: {name} of {index}")
    if len(state[_MASTERS]) != len(masters):
        raise ValueError(f"optimizer must have {len(masters)} masters, got {len(state[_MASTERS])}")
    pairs = zip(state[_MASTERS], own[_MASTERS], strict=True)
    for index, (stored, own_master) in enumerate(pairs):
        if (stored is None) != (own_master is None):
            raise ValueError(f"optimizer: master {index} must be there for half precision alone")
        if stored is not None:
            _check_like(stored, own_master, f"optimizer: master {index}")


def _check_groups(stored_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    def ignoring_rates(group: dict[str, Any]) -> tuple[Any, Any]:
        return group.keys() - {"initial_lr"}, group["params"]

    if list(map(ignoring_rates, stored_groups)) != list(map(ignoring_rates, groups)):
        raise ValueError(
            f"optimizer must have groups of {[len(g['params']) for g in groups]} parameters with "
            f"the same options, got {quoted(stored_groups)}"
        )
    for stored, group in zip(stored_groups, groups, strict=True):
        for name, value in group.items():
            if name in ("params", "initial_lr"):  # compared above; a scheduler's
                continue
            if not has_type(stored[name], type(value)) or (name != "lr" and stored[name] != value):
                raise ValueError(f"optimizer: {name} must be {value!r}, got {quoted(stored[name])}")


def _check_like(tensor: Any, like: Tensor, what: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
        got = (
            f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else quoted(tensor)
        )
        raise ValueError(f"{what} must be {like.dtype} {list(like.shape)}, got {got}")
    if not is_finite(tensor):
        raise ValueError(f"{what} must be finite, got inf or nan")


def forget_frozen(optimizer: Any) -> None:
    """Drops the moments of parameters that are frozen, of whatever optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if isinstance(inner, MasterAdamW):
        inner.forget_frozen()
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                parameter.grad = None
                inner.state.pop(parameter, None)
