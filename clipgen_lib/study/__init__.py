"""Comparisons: ablations, other systems, the training of a small CLIP, and the weights of other projects."""
