"""The kinds of memory, a folder each: `in_place`, a fast weight in the gated MLP. What stands here holds for all."""
