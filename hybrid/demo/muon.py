"""Implements Muon, momentum with orthogonalised updates, for matrices and stacks of them.

torch's own Muon takes matrices only; a layer's experts are one ``[E, rows, columns]`` tensor, of
which each expert is a matrix by itself.
"""

from collections.abc import Iterable

import torch


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring the singular values of ``[..., rows, columns]`` close to one.

    A quintic Newton-Schulz iteration with the coefficients of Jordan et al., "Muon: an optimizer
    for hidden layers" (2024), which trade exactness (values end between about 0.7 and 1.2) for
    speed.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    An update has singular values near ``lr * sqrt(max(1, rows / columns))``, whatever the
    gradient's scale.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(gradient, 1 - momentum)
                update = orthogonalise(gradient.lerp(average, momentum))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)
