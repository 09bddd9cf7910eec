"""`python -m sparsight` is the command line."""

from sparsight.cli.app import main

if __name__ == "__main__":
    main()
