"""Many ways of pruning one model, side by side: the grid, its cells, the run, and the search for the best split."""
