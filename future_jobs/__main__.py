"""``python -m future_jobs``."""

from .cli import main

if __name__ == "__main__":
    main()
