"""What holds weights: how a policy is built, and the engine that turns batches into log-probabilities."""
