"""`python -m medim.cli`."""

from medim.cli import main

if __name__ == "__main__":
    main()
