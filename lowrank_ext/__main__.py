"""``python -m lowrank_ext``: the command line, as torchrun and accelerate launch start it."""

from lowrank_ext.cli.main import app

if __name__ == "__main__":
    app(prog_name="lowrank-ext")
