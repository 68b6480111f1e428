"""`python -m medim.cli`."""

from medim.cli import main

main()
