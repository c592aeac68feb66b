"""Our losses inside the trainers and behind the names that people already use: an import line, or one argument, is the
change.

===============  =====================================================================================================
module           what it stands in for
===============  =====================================================================================================
``hf``           transformers' ``Trainer``: ``KDTrainer``, or ``KDCallback`` for a Trainer that stays as it is
``trl``          TRL's ``DistillationTrainer``, ``GKDTrainer`` and ``GOLDTrainer`` (one tokenizer)
``liger``        liger-kernel's six distillation losses
``torchtune``    torchtune's six KL losses
``torch``        ``F.kl_div``, ``nn.KLDivLoss``, ``F.linear_cross_entropy``
===============  =====================================================================================================

Nothing is imported here: each module needs its own library, at the versions that it was tested with, and refuses
others. :mod:`kd_trainer.integrations.versions` names them; ``pip install ".[integrations]"`` brings them.
"""
