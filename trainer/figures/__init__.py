"""Figures of attention maps over photographs, for papers and for the sample images of a run."""
