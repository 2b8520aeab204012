"""Drawn world: procedural scenes of shapes on textured ground with complete annotations, as a data set."""
