"""Where arrays come from: one file per origin, one pipeline for all."""
