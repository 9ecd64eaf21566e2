"""Figures of attention maps drawn over photographs, for papers and for watching a run."""
