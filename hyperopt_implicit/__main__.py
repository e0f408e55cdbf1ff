"""``python -m hyperopt_implicit`` is the command ``hyperopt-implicit``."""

from hyperopt_implicit.cli import main

if __name__ == "__main__":
    main()
