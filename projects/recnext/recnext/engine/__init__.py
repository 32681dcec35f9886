"""MMEngine's Runner as it is run here: configs, checks before a run, hooks, loops, several processes."""
