"""Nested dicts of parameters: flattened to paths, nested again, joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxtyping import PyTree


def join(tree: Mapping[str, PyTree], other: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Merges two nested dicts that share no leaf."""
    shared = {name: join(tree[name], other[name]) for name in tree.keys() & other.keys()}
    return {**tree, **other, **shared}


def path_name(path: Iterable[object]) -> str:
    """Formats a leaf's key path, as `jax.tree_util.tree_flatten_with_path` returns it: "blocks/mlp/up/kernel"."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def nest(leaves: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Nests leaves by their paths: {"a/b": x} becomes {"a": {"b": x}}."""
    tree: dict[str, PyTree] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, PyTree], prefix: str = "") -> dict[str, PyTree]:
    """Flattens nested dicts to leaves by path: {"a": {"b": x}} becomes {"a/b": x}."""
    leaves: dict[str, PyTree] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves
