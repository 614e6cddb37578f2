"""The options of every command that runs a model: --device, --dtype, --threads."""

import torch

from lowrank_ext.cli.checks import DTYPES, MOST_THREADS, check_at_least, check_choice


def check_machine(dtype: str, threads: int | None) -> None:
    """Raises UserError for a wrong --dtype or --threads; sets the threads."""
    check_choice("--dtype", dtype, DTYPES)
    if threads is not None:
        check_at_least("--threads", threads, 1, most=MOST_THREADS)
        torch.set_num_threads(threads)
