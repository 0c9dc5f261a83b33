"""What is not the method: runs on disk, checkpoints, processes, and the fast paths of a CPU."""
