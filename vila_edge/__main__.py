"""python -m vila_edge"""

from vila_edge.cli import main

if __name__ == "__main__":
    main()
