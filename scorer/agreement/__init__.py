"""Whether one model ranks as another does: rank correlations and overlaps of what they select."""
