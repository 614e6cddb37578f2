"""The command line tool ``lowrank-ext``: ``finetune``, ``guard``, ``doctor``. Needs ``pip install
'lowrank-ext[cli]'``."""
