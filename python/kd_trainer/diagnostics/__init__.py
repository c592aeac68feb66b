"""What a distillation did beside its loss: whether a head is too narrow for a teacher, what an update broke.

``bottleneck``   head spectrum, anisotropy, and the KL that no head of a width can go below
``flips``        negative flips and churn between two models
"""
