"""Files and data sets -> tokenised, packed batches with a resumable position.

source -> read (examples) -> fields, chat, tokens (documents) -> rows (packed) -> batches
"""

from sparse_lora_dist.data.batches import Batch, micro_batches
from sparse_lora_dist.data.read import be_quiet
from sparse_lora_dist.data.rows import Rows, pack
from sparse_lora_dist.data.tokens import NOT_A_TARGET, Document, Documents, load_documents

__all__ = [
    "NOT_A_TARGET",
    "Batch",
    "Document",
    "Documents",
    "Rows",
    "be_quiet",
    "load_documents",
    "micro_batches",
    "pack",
]
