"""Memory of a mesh from shapes alone: placement, traced graphs, lifetimes, footprint."""
