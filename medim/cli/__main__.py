"""`python -m medim.cli`, the same as `python -m medim`."""

from runpy import run_module

if __name__ == "__main__":
    run_module("medim", run_name="__main__")
