"""FixedSize, FixedVocabulary: modules whose number of outputs, or of rows, cannot change."""

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
        check_stays(self, "out_features", made_for, size)


class FixedVocabulary(nn.Module):
    """A module in place of an embedding, with tensors that have a row for each token.

    ``resize_token_embeddings`` of transformers sets ``num_embeddings`` where the size stays.
    """

    in_features: int
    out_features: int

    @property
    def num_embeddings(self) -> int:
        """The number of rows, as models read it from an embedding."""
        return self.in_features

    @num_embeddings.setter
    def num_embeddings(self, size: int) -> None:
        check_stays(self, "num_embeddings", self.in_features, size)

    @property
    def embedding_dim(self) -> int:
        """The number of columns."""
        return self.out_features


def check_stays(module: nn.Module, name: str, made_for: object, got: object) -> None:
    """Raise ValueError where a size of an adapted module would change."""
    if got != made_for:
        raise ValueError(
            f"{type(module).__name__}: {name} must stay {made_for}, for which the adapter was "
            f"made, got {got}; call resize_token_embeddings before adapt or load_adapter, or "
            "after unload"
        )
