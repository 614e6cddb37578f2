"""BaseKeys: a module whose state dict has the keys of the module that it replaces."""

from typing import Any

from torch import nn

_KEPT = "base_layer."


class BaseKeys(nn.Module):
    """State dict of a module that keeps its base, where that is more than a plain linear, in
    ``base_layer``: the base's tensors have the keys that they have in the base itself, and
    ``base_layer.`` before them only where the module has a tensor of that name (the base has
    adapters of its own, as in a recursive model).

    A state dict with ``base_layer.`` in its keys loads, too.
    """

    base_layer: nn.Module | None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of nn.Module, with the base's keys."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in [key for key in state if key.startswith(prefix + _KEPT)]:
            short = prefix + key.removeprefix(prefix + _KEPT)
            if short not in state:
                state[short] = state.pop(key)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.base_layer is not None:
            tensors = {**self._parameters, **self._buffers}
            own = {name for name, value in tensors.items() if value is not None}
            children = tuple(f"{name}." for name, child in self._modules.items() if child)
            for key in [key for key in state_dict if key.startswith(prefix)]:
                name = key.removeprefix(prefix)
                if name not in own and not name.startswith(children):
                    state_dict[prefix + _KEPT + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
