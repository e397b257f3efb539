"""Speed and memory, each beside the way it is usually done: what `itemtok bench` measures."""
