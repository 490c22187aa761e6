"""LightningModules: they only connect a policy, a loss and metrics."""
