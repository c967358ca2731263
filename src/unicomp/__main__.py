"""Run the command line with `python -m unicomp`."""

from unicomp.cli.main import main

if __name__ == "__main__":
    main()
