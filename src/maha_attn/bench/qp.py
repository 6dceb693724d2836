"""Benchmarks of the exact QP solver: certificates on millions of problems, and speed.

``maha bench qp certificates`` solves random problems of every kind and constraint
and recomputes their KKT residuals from the weights alone; ``maha bench qp speed``
times the solver against one ``torch.linalg.solve`` over the same matrices.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maha_attn.bench.measure import provenance
from maha_attn.ops.qp import solve_qp

KINDS = ("gram", "duplicates", "conditioned", "ties")
SETTINGS = (
    ("simplex", 0.0),
    ("capped", 0.0),
    ("box", 0.0),
    ("simplex", 1.0),
    ("capped", 1.0),
    ("simplex", 0.01),
    ("capped", 0.01),
)
SPEED_SETTINGS = (("simplex", 0.0), ("box", 0.0), ("simplex", 1.0))
_CONDITION = {torch.float32: 1e4, torch.float64: 1e8}


def random_problems(
    kind: str, num_problems: int, num_scales: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``M`` ``[P, S, S]`` and ``q`` ``[P, S]``.

    - ``gram``: ``UUᵀ/√K + ρI`` of independent normal outputs, ``K = 32``, ``ρ = 0.01``;
    - ``duplicates``: the same with identical, nearly identical and zero outputs;
    - ``conditioned``: random eigenvectors, eigenvalues from 1 down to 1e-8 (fp32: 1e-4);
    - ``ties``: ``M = I`` or ``I + 11ᵀ``, ``q`` of a few integers, so that multipliers vanish.

    ``q`` is a normal vector times 0.1 to 10, or for every second Gram matrix that of a target or a
    Nash game, ``diag(G)``.
    """
    P, S = num_problems, num_scales

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    identity = torch.eye(S, dtype=torch.float64)
    q = normal(P, S) * 10 ** (2 * uniform(P, 1) - 1)
    if kind == "ties":
        M = identity + torch.randint(0, 2, (P, 1, 1), generator=generator)
        q = torch.randint(-1, 3, (P, S), generator=generator)
    elif kind == "conditioned":
        vectors = torch.linalg.qr(normal(P, S, S)).Q
        depth = uniform(P, S)
        depth[:, 0], depth[:, -1] = 0, 1
        M = vectors * _CONDITION[dtype] ** -depth[:, None] @ vectors.mT
    else:
        outputs = normal(P, S, 32)
        if kind == "duplicates":
            source = torch.randint(0, S, (P, S, 1), generator=generator).expand(-1, -1, 32)
            copies = outputs.gather(1, source) + 1e-3 * normal(P, S, 32) * (uniform(P, S, 1) < 0.5)
            outputs = copies * (uniform(P, S, 1) < 0.9)
        gram = outputs @ outputs.mT / 32**0.5
        M = gram + 0.01 * identity
        q[::4] = (outputs[::4] @ normal(P, 32, 1)[::4])[..., 0] / 32**0.5
        q[1::4] = gram.diagonal(dim1=-2, dim2=-1)[1::4]
    return M.to(dtype), q.to(dtype)


def kkt_residual(M: Tensor, q: Tensor, w: Tensor, constraint: str, temperature: float) -> Tensor:
    """The largest violation of any optimality condition, ``[P]``, from ``w`` alone and in fp64.

    Feasibility; with ``g`` the gradient and ``ν`` the sum's multiplier, ``g_s = ν`` where
    ``w_s > 0`` and ``g_s ≥ ν`` where ``w_s = 0``; capped: ``ν ≤ 0``, and 0 unless ``Σw = 1``; box:
    the natural residual. ``τ > 0``: ``|g_s + τ log w_s - ν|`` wherever ``w_s`` has not underflown.
    """
    M, q, w = M.double(), q.double(), w.double()
    g = (0.5 * (M + M.mT) @ w[..., None])[..., 0] - q
    if constraint == "box":
        return torch.stack([(w - (w - g).clamp(0, 1)).abs(), -w, w - 1]).amax((0, -1))
    positive = w > 1e-30
    total = w.sum(-1, keepdim=True)
    if temperature:
        g = g + temperature * (w.clamp(min=1e-300).log() + (constraint == "capped"))
    support_mean = (g * w).sum(-1, keepdim=True) / total.clamp(min=1e-30)
    nu = support_mean
    excess = (total - 1).abs()
    if constraint == "capped":
        nu = nu.clamp(max=0)
        excess = torch.maximum(total - 1, torch.minimum(-nu, 1 - total))
    stationarity = torch.where(positive, (g - nu).abs(), nu - g)
    if temperature:
        stationarity = stationarity.masked_fill(~positive, 0)
    return torch.cat([stationarity, -w, excess], -1).amax(-1).clamp(min=0)


def certificates(num_problems: int, seed: int) -> list[dict[str, Any]]:
    """The worst residual, relative to ``1 + max |q_s|``, and the statuses of every set."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        for kind in KINDS:
            for constraint, temperature in SETTINGS:
                generator = torch.Generator().manual_seed(seed)
                worst, own, counts, begin = 0.0, 0.0, [0] * 4, time.perf_counter()
                for num_scales in range(2, 9):
                    for block in torch.empty(num_problems // 7).split(1 << 16):
                        M, q = random_problems(kind, len(block), num_scales, dtype, generator)
                        found = solve_qp(M, q, constraint, temperature)
                        size = 1 + q.double().abs().amax(-1)
                        checked = kkt_residual(M, q, found.weights, constraint, temperature)
                        worst = max(worst, float((checked / size).max()))
                        own = max(own, float((found.residual / size).max()))
                        for status, count in enumerate(found.status.int().bincount(minlength=4)):
                            counts[status] += int(count)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "problems": kind,
                        "constraint": constraint,
                        "temperature": temperature,
                        "num_problems": sum(counts),
                        "max_relative_kkt_residual": worst,
                        "max_relative_reported_residual": own,
                        "num_by_status": counts,
                        "seconds": round(time.perf_counter() - begin, 2),
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def speed(num_problems: int, seed: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Medians of alternating runs: forward + backward against one ``torch.linalg.solve``."""
    rows = []
    for num_scales in (4, 8):
        generator = torch.Generator().manual_seed(seed)
        problems = random_problems("gram", num_problems, num_scales, torch.float32, generator)
        M, q = (x.to(device) for x in problems)
        weight_grad = torch.randn(q.shape, generator=generator).to(device)
        runs: dict[str, Callable[[], Any]] = {}
        runs["linalg.solve"] = lambda M=M, q=q: torch.linalg.solve(M, q)
        for constraint, temperature in SPEED_SETTINGS:

            def forward(M=M, q=q, constraint=constraint, temperature=temperature):
                return solve_qp(M, q, constraint, temperature).weights

            def both(M=M, q=q, weight_grad=weight_grad, forward=forward):
                leaves = M.detach().requires_grad_(), q.detach().requires_grad_()
                return torch.autograd.grad(forward(*leaves), leaves, weight_grad)

            runs[f"{constraint} τ={temperature:g} forward"] = forward
            runs[f"{constraint} τ={temperature:g} forward+backward"] = both
        times = _alternate(runs, repeats, device)
        base = statistics.median(times["linalg.solve"])
        for name, ms in times.items():
            median = statistics.median(ms)
            row = {"threads": torch.get_num_threads(), "num_scales": num_scales}
            row |= {"num_problems": num_problems, "run": name}
            row |= {"median_ms": round(median, 3), "min_ms": round(min(ms), 3)}
            row |= {"max_ms": round(max(ms), 3), "over_linalg_solve": round(median / base, 2)}
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def _alternate(
    runs: dict[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each run in each of ``repeats`` rounds, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            synchronise()
            begin = time.perf_counter()
            run()
            synchronise()
            if round_number:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, prog="maha bench qp")
    commands = parser.add_subparsers(dest="what", required=True)
    for name, num_problems in (("certificates", 1_000_000), ("speed", 49_152)):
        command = commands.add_parser(name)
        command.add_argument("--num-problems", type=int, default=num_problems)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--output", type=Path, help="JSON file; default: standard output")
    commands.choices["speed"].add_argument("--repeats", type=int, default=11)
    commands.choices["speed"].add_argument("--device", default="cpu")
    threads = torch.get_num_threads()
    commands.choices["speed"].add_argument("--threads", type=int, nargs="+", default=[threads])
    options = parser.parse_args(arguments)
    if options.what == "certificates":
        rows = certificates(options.num_problems, options.seed)
    else:
        rows = []
        for num_threads in options.threads:
            torch.set_num_threads(num_threads)
            rows += speed(options.num_problems, options.seed, options.repeats, options.device)
    given = sys.argv[1:] if arguments is None else arguments
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    device = torch.device(settings.get("device", "cpu"))
    document = provenance(" ".join([parser.prog, *given]), settings, device) | {"results": rows}
    text = json.dumps(document, indent=1, ensure_ascii=False)
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
