"""How good given weights are, and how definite a matrix is, in the layout of `_qp_solvers`."""

import torch
from torch import Tensor

from maha_attn.ops._qp_solvers import matvec, soft_choice, soft_value


def certificate(
    M: Tensor, q: Tensor, w: Tensor, constraint: str, tau: float
) -> tuple[Tensor, Tensor]:
    """Residual and gap as defined in `solve_qp`."""
    g = matvec(M, w).sub_(q)
    if constraint == "box":
        residual = (w - g).clamp_(0, 1).sub_(w).abs_().amax(0)
        return residual, (w * g).sub_(g.clamp_(max=0)).sum(0)
    if tau:
        p, conjugate = soft_choice(-g, constraint, tau).weights, soft_value(-g, constraint, tau)
        off = (w - p).abs_().mul_((tau / torch.minimum(w, p)).clamp_(max=1))
        log_w = w.clamp(min=torch.finfo(w.dtype).tiny).log_()
        return off.amax(0), log_w.mul_(tau).add_(g).mul_(w).sum(0).add_(conjugate)
    total = w.sum(0)
    product = (w * g).sum(0)
    nu = product / total.clamp(min=torch.finfo(w.dtype).tiny)
    lowest = g.amin(0)
    off = total - 1
    if constraint == "capped":
        nu.clamp_(max=0)
        lowest.clamp_(max=0)
        off = torch.minimum(-nu, -off)
    return torch.maximum(torch.minimum(w, g - nu).abs_().amax(0), off.abs_()), product - lowest


def relative_pivot(M: Tensor) -> Tensor:
    """The least pivot over its diagonal entry: positive where ``M`` is positive definite."""
    T, S = M.clone(), M.shape[0]
    for j in range(S - 1):
        factors = (T[j, j + 1 :] / T[j, j])[:, None]
        T[j + 1 :, j + 1 :].addcmul_(factors, T[j, None, j + 1 :], value=-1)
    return (T.diagonal().T / M.diagonal().T.abs()).nan_to_num_(0.0).amin(0)
