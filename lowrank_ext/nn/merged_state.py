"""State dicts of modules that can be merged: while one is, its adapter is in the weight alone."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class MergedState(nn.Module):
    """Leaves the adapter's tensors out of a merged module's state dict, and refuses to load one.

    Attributes:
        merged: whether the base's weight holds the adapter.
        blocks, merges_after_blocks: of ``disable_adapter``; a copy is in no block.
    """

    merged: bool
    blocks: int
    merges_after_blocks: bool

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by name."""
        raise NotImplementedError

    def _names_of_adapter(self) -> Iterable[str]:
        """What the state dict holds beside the base."""
        return self.adapter_tensors()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.blocks, self.merges_after_blocks = 0, False

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in self._names_of_adapter():
                del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            where = prefix.removesuffix(".") or type(self).__name__
            error_msgs.append(f"{where} is merged: call unmerge() before loading a state dict")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
