"""A recipe that changes no field."""

from dpo_jax.config import base as get_config

__all__ = ["get_config"]
