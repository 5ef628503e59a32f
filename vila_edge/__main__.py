"""python -m vila_edge, and the command vila-edge"""

import sys

from vila_edge.huge_pages import restart

RUNS_A_MODEL = ("bench", "chat")


def main() -> None:
    """Run a command; one that runs a model has large pages of memory first."""
    if sys.argv[1:2] and sys.argv[1] in RUNS_A_MODEL:
        restart()
    from vila_edge.cli import main as run  # behind the restart, which it would make slower

    run()


if __name__ == "__main__":
    main()
