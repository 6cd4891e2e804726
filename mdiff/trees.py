"""Pytrees whose leaves have names.

A leaf's name is its path joined by "/", as in "enc/8x8_block0/conv0/kernel". Sharding rules, weight
decay and later repairs pick leaves by regular expressions over these names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`[(name, leaf), …]` in the tree's own order."""
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, with the leaf's name as the first argument of `fn`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(_name(path), *leaves), tree, *rest)


def mask(tree: Any, pattern: str) -> Any:
    """A tree of booleans: does the leaf's name contain a match of `pattern`?"""
    return map_named(lambda name, _: re.search(pattern, name) is not None, tree)


def size(tree: Any) -> int:
    """Total number of elements (also of a tree of `ShapeDtypeStruct`)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Total bytes of its arrays (also of a tree of `ShapeDtypeStruct`)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
