"""The command line tool ``lowrank-ext``: ``finetune`` and ``doctor``. Needs ``pip install
'lowrank-ext[cli]'``."""
