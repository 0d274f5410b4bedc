"""``python -m d2obench``."""

from d2obench.cli import main

if __name__ == "__main__":
    main()
