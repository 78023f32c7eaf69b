"""Products of activations with packed matrices, or with matrices read in place in stacks."""
