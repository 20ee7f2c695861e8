"""Read files and data sets, tokenise and pack them, and make the micro-batches of any step.

The modules, in the order in which data goes through them, and in brackets what each makes. An
example is one item of the data as the user gave it, a document is one tokenised example (or a part
of a long text), and a row is one sequence of a batch:

    language modelling: read_files (examples) -> fields, chat, tokens (documents) -> batches (rows,
        micro-batches)
    classification: read_files (examples) -> labels (classes), labelled (documents)
        -> batches (rows) -> labelled (micro-batches)

``read_files`` finds the files with ``folders``, reads them with ``local_files`` and keeps them in
``examples``. ``reading`` records what was read and what was not, ``notes`` what is not learned as
one may think.
"""

from sparse_lora_dist.data.batches import (
    Batch,
    Collate,
    MicroBatch,
    Rows,
    micro_batches,
    pack,
    packed_batch,
)
from sparse_lora_dist.data.labelled import LabelledBatch, labelled_batch, load_labelled
from sparse_lora_dist.data.labels import class_names, names_beside_numbers, read_classes
from sparse_lora_dist.data.read_files import be_quiet
from sparse_lora_dist.data.reading import Reading
from sparse_lora_dist.data.tokens import (
    FEATURES,
    NOT_A_TARGET,
    Document,
    Documents,
    document_row,
    load_documents,
)

__all__ = [
    "FEATURES",
    "NOT_A_TARGET",
    "Batch",
    "Collate",
    "Document",
    "Documents",
    "LabelledBatch",
    "MicroBatch",
    "Reading",
    "Rows",
    "be_quiet",
    "class_names",
    "document_row",
    "labelled_batch",
    "load_documents",
    "load_labelled",
    "micro_batches",
    "names_beside_numbers",
    "pack",
    "packed_batch",
    "read_classes",
]
