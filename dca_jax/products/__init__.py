"""Products of activations with matrices that are packed, or read where they lie in their stacks."""
