"""What a model takes and what a setting does, worked out before anything is loaded."""
