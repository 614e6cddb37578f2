"""``lowrank-ext recursive``: convert, uptrain, evaluate, generate, bench.

app.py               the commands and their options
convert.py           folds a model and writes a directory
uptrain.py           trains it; settings.py: what determines such a run, pictures.py: loss.png
evaluate.py          loops, exits and skipped loops on held-out text
generate.py          texts by the engine, streamed
bench.py             the engine's policies side by side
models.py            a converted directory with its tokenizer; exit rules as users type them
"""
