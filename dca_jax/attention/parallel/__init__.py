"""Context parallelism: one long text split over devices along the mesh axis `context`."""
