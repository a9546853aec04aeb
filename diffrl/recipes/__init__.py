"""Assemblies that several experiments share: no mathematics, no loop, only how the parts are put together."""
