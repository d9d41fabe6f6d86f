"""Where arrays live: the mesh, the one table from logical axes to mesh axes, and how a stack of layers is run. Knows no model."""
