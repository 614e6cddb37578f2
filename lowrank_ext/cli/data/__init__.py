"""The data of all commands: files to records, records to examples, examples to rows of tokens.

sources     what --text and --eval may name
records     the one reader: files and datasets to records
formats     records to examples, by their keys
chat        examples to text, and which parts are trained on
encoding    text to tokens, these to pieces of at most one sequence
packing     pieces to rows
rows        rows as a dataset of torch; batches
examples    the examples of all sources, and which are held out
options     what a command reads
corpus      all of that together
report      the table before training
preview     examples as the model sees them
blocks      plain text in blocks of equal length
"""

from lowrank_ext.cli.data.chat import TRAIN_ON
from lowrank_ext.cli.data.corpus import Corpus, load_corpus, load_held_out
from lowrank_ext.cli.data.examples import Examples, load_examples, read_records
from lowrank_ext.cli.data.formats import FORMATS, PreferenceExample, to_example
from lowrank_ext.cli.data.options import PACKING, DataOptions
from lowrank_ext.cli.data.report import DataReport
from lowrank_ext.cli.data.rows import Rows, collate, pad_id_of
from lowrank_ext.cli.data.sources import absolute, check_source

__all__ = [
    "FORMATS",
    "PACKING",
    "TRAIN_ON",
    "Corpus",
    "DataOptions",
    "DataReport",
    "Examples",
    "PreferenceExample",
    "Rows",
    "absolute",
    "check_source",
    "collate",
    "load_corpus",
    "load_examples",
    "load_held_out",
    "pad_id_of",
    "read_records",
    "to_example",
]
