"""Vectors of an embedding model of the user's choice, in place of a base's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .retrieval import Floats

Embedding = Callable[[list[str]], Any]  # texts -> (N, D)
OWN = "function"  # what a base says of a function that was given
_LIBRARIES = ("model2vec", "sentence-transformers")


def load(name: str) -> Embedding:
    """The model of `LIBRARY:FOLDER` or `LIBRARY:HUB_ID`. Raises ConfigError for another library, and for one that is
    not installed."""
    library, _, model = name.partition(":")
    if library not in _LIBRARIES or not model:
        raise ConfigError(f"embedding = {name!r}: must be a function, or LIBRARY:MODEL with one of "
                          f"{', '.join(_LIBRARIES)}")
    try:
        if library == "model2vec":
            from model2vec import StaticModel

            return StaticModel.from_pretrained(model).encode
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(model).encode
    except ImportError:
        raise ConfigError(f"embedding = {name!r}: {library} is not installed") from None


def embed(embedding: Embedding, texts: Sequence[str], dims: int | None = None) -> Floats:
    """(N, D) of unit length. Raises ConfigError for vectors of another shape than `dims` or that are not finite."""
    vectors = np.asarray(embedding(list(texts)), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts) or dims not in (None, vectors.shape[1]):
        raise ConfigError(f"embedding: gives an array of shape {vectors.shape} for {len(texts)} texts: must be "
                          f"({len(texts)}, {dims or 'dimensions'})")
    if not np.isfinite(vectors).all():
        raise ConfigError("embedding: gives numbers that are not finite")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
