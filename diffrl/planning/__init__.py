"""Trajectories as data: Diffuser, Decision Diffuser, and how their plans are carried out."""
