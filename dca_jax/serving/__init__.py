"""A server: many texts read and continued at once over one cache in pages."""
