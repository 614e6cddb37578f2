"""finetune.log: what a run did, the warnings of libraries, and the traceback of a fault."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lowrank_ext.cli.errors import Interrupted, UserError
from lowrank_ext.cli.files import alone_in, open_log
from lowrank_ext.cli.processes import is_main_process, process_index

LOG = logging.getLogger("lowrank_ext.finetune")
# What these log when they are imported, by other libraries and for models that do not need them,
# is of parts that they lack.
_IMPORTED = tuple(
    logging.getLogger(name) for name in ("bitsandbytes", "torchao", "torch.utils._pytree")
)
_NOWHERE = logging.NullHandler()


def hush_libraries() -> None:
    """Keeps off the terminal what libraries log when they are imported; see `log_file`."""
    for logger in _IMPORTED:
        logger.addHandler(_NOWHERE)
        logger.propagate = False


@contextmanager
def log_file(path: Path, resumed: bool) -> Iterator[None]:
    """Sends the log of this run, and the warnings of libraries, to a file only. Of several
    processes the first one logs, of the others a fault alone. Raises UserError while another run
    logs there."""
    alone = ExitStack()
    if is_main_process():
        alone.enter_context(alone_in(path.parent))
    stream = open_log(path, resumed) if is_main_process() else None
    handler = logging.NullHandler() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = (LOG, logging.getLogger("py.warnings"))
    hush_libraries()
    for logger in loggers:
        logger.propagate = False
    for logger in (*loggers, *_IMPORTED):
        logger.addHandler(handler)
    LOG.setLevel(logging.INFO)
    logging.captureWarnings(True)
    LOG.info("the run continues" if resumed else "a new run")
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception:
        LOG.exception("the run ended by a fault")
        if stream is None:
            _append_fault(path)
        raise
    finally:
        logging.captureWarnings(False)
        for logger in (*loggers, *_IMPORTED):
            logger.removeHandler(handler)
        for logger in loggers:
            logger.propagate = True
        if stream is not None:
            stream.close()
        alone.close()


def _append_fault(path: Path) -> None:
    with open_log(path, resumed=True) as file:
        file.write(f"process {process_index()} ended by a fault\n{traceback.format_exc()}")
