"""The command line tool ``lowrank-ext``: ``finetune``, ``recursive``, ``guard``, ``doctor``.

Commands that load a model need ``pip install 'lowrank-ext[finetune]'``.
"""
