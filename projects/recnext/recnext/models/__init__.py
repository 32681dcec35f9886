"""The networks in torch alone: read :mod:`.recnext`, then :mod:`.semantic_fpn`, then :mod:`.label_map`."""
