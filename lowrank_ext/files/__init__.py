"""Reads and writes files; every file that the library loads or saves passes through here.

    messages.py     content of files in error messages: quoted, cut, without control characters
    reading.py      opens regular files only; reads up to a limit; torch.save's files
    json_object.py  JSON objects: limits, no duplicate keys, no numbers beyond 64 bits
    patterns.py     regular expressions from files: those that always end soon
    tensor_file.py  safetensors: the header first, values on demand, never mapped into memory
    writing.py      new files under random names, renamed; locks between savers

Nothing here knows adapters; ``lowrank_ext/adapter_files.py`` does.
"""

from lowrank_ext.files.json_object import parse_json_object, read_json_object
from lowrank_ext.files.messages import clean_errors, printable, quoted
from lowrank_ext.files.patterns import check_pattern
from lowrank_ext.files.reading import open_file, read_bytes, read_torch_file
from lowrank_ext.files.tensor_file import TensorFile
from lowrank_ext.files.writing import locked, new_file, sync_directory, write_file

__all__ = [
    "TensorFile",
    "check_pattern",
    "clean_errors",
    "locked",
    "new_file",
    "open_file",
    "parse_json_object",
    "printable",
    "quoted",
    "read_bytes",
    "read_json_object",
    "read_torch_file",
    "sync_directory",
    "write_file",
]
