"""What happens between data and noise: pure mathematics on arrays.

A reading order: `process`, `prediction`, `times`, `losses`, `sampling`, `samplers`, and `mixtures`, the oracle that all
are tested with.  Then, by interest:

    faster samples      dpm_solver, unipc, parallel (in time), consistency, distillation
    steered samples     guidance, classifier_guidance, constraints, operators, inverse
    likelihoods         likelihood (the bound), ode_likelihood (exact), dequantisation
    continuous time     sde, langevin, fokker_planck, gaussian_processes, score_matching
"""
