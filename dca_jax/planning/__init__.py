"""Memory plans and explanations of settings, without loading anything."""
