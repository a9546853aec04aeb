"""Agents and environments: a Markov decision process as arrays, learners as pure functions, whole loops in one jit."""
