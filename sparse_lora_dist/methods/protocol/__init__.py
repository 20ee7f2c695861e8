"""Records of data and functions that a method fills in: `Method`, `Form` and `Rewriting`."""
