"""Pure decisions of a training run (precision, batch split, choice of strategy) and the strategies themselves."""
