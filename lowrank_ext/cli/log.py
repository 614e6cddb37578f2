"""finetune.log: what a run did, the warnings of libraries, and the traceback of a fault."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_ext.cli.errors import Interrupted, UserError
from lowrank_ext.cli.files import open_log

LOG = logging.getLogger("lowrank_ext.finetune")


@contextmanager
def log_file(path: Path, append: bool) -> Iterator[None]:
    """Sends the log of this run, and the warnings of libraries, to a file only."""
    handler = logging.StreamHandler(open_log(path, append))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = (LOG, logging.getLogger("py.warnings"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    LOG.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception:
        LOG.exception("the run ended by a fault")
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
        handler.stream.close()
