"""``python -m qcore``: the same as the ``qcore`` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
