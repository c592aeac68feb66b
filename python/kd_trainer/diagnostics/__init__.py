"""What a distillation did beside its loss; ``kdk diagnose`` prints each.

``fidelity``     agreement, KL both ways, acceptance, overlap, calibration: on texts and on the student's own prefixes
``exposure``     excess accumulated error: what a student's own contexts cost it
``accepted``     accepted length: what a round of speculative decoding yields with a student as the draft
``flips``        negative flips and churn between two models
``bottleneck``   head spectrum, anisotropy, and the KL that no head of a width can go below
"""
