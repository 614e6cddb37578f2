"""Commands of lowrank-ext, one after another, in the processes that torchrun has started.

    torchrun --nproc-per-node 2 process_commands.py COMMANDS.json

The file holds a list of lists of arguments. Each process writes its exit codes to
COMMANDS.<rank>.json. A start of torchrun and the imports take longer than such a command.
"""

import json
import os
import sys
from pathlib import Path

import torch

from lowrank_ext.cli import main, processes
from lowrank_ext.cli.error_lines import EXIT_FAULT


def run(arguments: list[str]) -> int:
    try:
        main.app(arguments, prog_name="lowrank-ext")
    except SystemExit as end:
        if end.code == EXIT_FAULT:  # the others may wait for this process
            processes.leave(EXIT_FAULT)
        return int(end.code or 0)
    raise AssertionError("a command ends by SystemExit")


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = Path(sys.argv[1])
    main.leave = lambda exit_code: None  # the process goes on with the next command
    codes = []
    for number, arguments in enumerate(json.loads(commands.read_text())):
        processes._ENDS = f"ends/{number}"  # each command has a first process that fails
        codes.append(run(arguments))
    commands.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(codes))
    processes.leave(0)
