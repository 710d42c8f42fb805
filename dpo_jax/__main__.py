"""`python -m dpo_jax`, the same as `dpo-jax`."""

from dpo_jax.cli import main

if __name__ == "__main__":
    main()
