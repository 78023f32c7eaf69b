"""`python -m dca_jax`: the same as the command `dca-jax`."""

from dca_jax.cli import main

if __name__ == "__main__":
    main()
