"""FixedSize: a module whose out_features cannot change."""

from torch import nn


class FixedSize(nn.Module):
    """A module with adapters, which have a row for each output: ``out_features`` stays.

    ``resize_token_embeddings`` of transformers sets it, after it has replaced a tied weight.
    """

    _out_features: int

    @property
    def out_features(self) -> int:
        """N."""
        return self._out_features

    @out_features.setter
    def out_features(self, size: int) -> None:
        made_for = vars(self).setdefault("_out_features", size)
        if size != made_for:
            raise ValueError(
                f"{type(self).__name__}: out_features must stay {made_for}, for which the adapter "
                f"was made, got {size}; call resize_token_embeddings before adapt or load_adapter, "
                "or after unload"
            )
