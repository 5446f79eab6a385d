"""The HIPPO force field: multipoles of diffuse charge, by pairs and on a mesh."""
