"""What the verbs look like on the command line: parse, one call, print. `cli.py` registers them."""
