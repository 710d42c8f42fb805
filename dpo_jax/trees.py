"""TODO trees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def join(tree: Any, other: Any) -> dict[str, Any]:
    """The leaves of two nested dicts that have none in common."""
    both = {name: join(tree[name], other[name]) for name in tree.keys() & other.keys()}
    return {**tree, **other, **both}


def path_name(path: Iterable[Any]) -> str:
    """A leaf's path in a tree, as in blocks/mlp/up/kernel."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def nest(leaves: Mapping[str, Any]) -> dict:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} as {"a/b": x}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves
