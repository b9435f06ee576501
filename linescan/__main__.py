"""`python -m linescan` is `linescan`."""

from linescan.cli import main

if __name__ == "__main__":
    main()
