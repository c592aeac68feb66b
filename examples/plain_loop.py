"""Distillation in a plain PyTorch loop: hidden states and two heads in, loss and gradients out, no logits anywhere.

Run: python examples/plain_loop.py
"""

import torch

from kd_kernels import LinearLogits, kd_loss

torch.manual_seed(0)
vocab, hidden, tokens = 1000, 64, 512
teacher = torch.nn.Linear(16, vocab, bias=False).requires_grad_(False)  # stand-ins for two models' heads,
student = torch.nn.Linear(hidden, vocab, bias=False)
body = torch.nn.Linear(16, hidden)  # and for all that is below the student's
optimizer = torch.optim.AdamW([*body.parameters(), *student.parameters()], lr=1e-2)

for step in range(30):
    x = torch.randn(tokens, 16)
    loss = kd_loss(LinearLogits(body(x), student.weight), LinearLogits(x, 4 * teacher.weight), "jsd(beta=0.5)").loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 29:
        print(f"step {step:2d}  loss {loss.item():.4f}")
