"""One long text shared by several devices along the mesh axis `context`."""
