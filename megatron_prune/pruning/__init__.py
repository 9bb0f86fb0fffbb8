"""One pruning: what was asked for, the measuring, the plan, the fit."""
