"""YAML without surprises."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Refuses a mapping that has one key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {key!r} stands twice in one mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
