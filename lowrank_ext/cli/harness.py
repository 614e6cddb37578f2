"""Tasks of lm-evaluation-harness, a package that a user may have installed."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowrank_ext.cli.errors import UserError, as_user_error, near_matches
from lowrank_ext.cli.files import require_directory
from lowrank_ext.cli.models import CausalLM, prepare_transformers


def check_tasks(names: list[str], directory: Path | None) -> None:
    """Raises UserError where lm_eval is not installed or does not know a task."""
    known = _task_manager(directory).all_tasks
    for name in names:
        if name not in known:
            raise UserError(f"--tasks: lm_eval knows no {name!r}{near_matches(name, known)}")


def _task_manager(directory: Path | None) -> Any:
    """lm_eval's own list of tasks, with those in a directory of the user's."""
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
    if directory is not None:
        require_directory(f"--tasks-from {directory}", directory)
    prepare_transformers()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises users of its own command
    os.environ["HF_DATASETS_OFFLINE"] = "1"  # data that is here is used, none is fetched
    with as_user_error("lm_eval cannot be imported", ImportError):
        from lm_eval.tasks import TaskManager
    with as_user_error("lm_eval cannot read its tasks", Exception):
        return TaskManager(include_path=None if directory is None else str(directory))


def run_tasks(
    model: CausalLM,
    tokenizer: Any,
    names: list[str],
    directory: Path | None,
    *,
    batch: int,
    few_shots: int | None,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task, subtasks too, by their names in lm_eval.

    Raises:
        UserError: lm_eval raises, as for a task whose data is not in the local cache.
    """
    manager = _task_manager(directory)
    with as_user_error("lm_eval", Exception):  # tasks and datasets raise many kinds
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=names,
            num_fewshot=few_shots,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
    return {
        task: {
            # "acc,none" is the metric and the filter of the answers
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and "," in key
        }
        for task, metrics in found["results"].items()
    }
