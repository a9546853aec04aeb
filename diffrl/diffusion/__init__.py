"""What happens between data and noise: pure mathematics on arrays.

A reading order: `process`, `prediction`, `times`, `losses`, `samplers`, `sampling`; then `guidance`, `likelihood`
and `mixtures`, the oracle that all of them are tested with.
"""
