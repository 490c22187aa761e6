"""From the rows of a source to batches: record, example, tokens, stream."""
