"""One optimizer step: micro-batches, the loss of pairs, metrics."""
