"""Text to training batches: sources, preparation into token shards, and the loader.

>>> corpus = open_corpus("texts/")                                         # doctest: +SKIP
>>> tokenizer = train_bpe(corpus.texts("train"), vocab_size=8192)          # doctest: +SKIP
>>> print(prepare(corpus, "data/", tokenizer).summary())                   # doctest: +SKIP
>>> dataset = TokenDataset.open("data/", "train")                          # doctest: +SKIP
>>> loader = PackedLoader(dataset, batch_size=8, context_length=512)       # doctest: +SKIP

Names are imported when first used: reading text needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openxlstm.lazy import lazy_names

if TYPE_CHECKING:
    from openxlstm.data.corpus import Corpus, CorpusDocument, open_corpus
    from openxlstm.data.dataset import TokenDataset
    from openxlstm.data.loader import Batch, PackedLoader
    from openxlstm.data.preparation import prepare
    from openxlstm.data.shards import Manifest
    from openxlstm.data.sources import (
        FileTree,
        JSONLines,
        Source,
        TextFile,
        Texts,
        as_source,
        python_standard_library,
    )

__all__ = [
    "Batch",
    "Corpus",
    "CorpusDocument",
    "FileTree",
    "JSONLines",
    "Manifest",
    "PackedLoader",
    "Source",
    "TextFile",
    "Texts",
    "TokenDataset",
    "as_source",
    "open_corpus",
    "prepare",
    "python_standard_library",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Batch": "loader",
        "Corpus": "corpus",
        "CorpusDocument": "corpus",
        "FileTree": "sources",
        "JSONLines": "sources",
        "Manifest": "shards",
        "PackedLoader": "loader",
        "Source": "sources",
        "TextFile": "sources",
        "Texts": "sources",
        "TokenDataset": "dataset",
        "as_source": "sources",
        "open_corpus": "corpus",
        "prepare": "preparation",
        "python_standard_library": "sources",
    },
)
