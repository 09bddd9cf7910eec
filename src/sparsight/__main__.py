"""`python -m sparsight` is the command line."""

from sparsight.cli import main

if __name__ == "__main__":
    main()
