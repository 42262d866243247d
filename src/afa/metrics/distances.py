"""Metrics as pure functions of features: FID, KID, IS, CMMD and cosine similarity.

All of them compute in float64, are deterministic and do not use the global random state. Tests
compare FID, KID and IS with torchmetrics, which is not used because its FID takes eigenvalues of a
non-symmetric product, which is inaccurate with fewer pictures than features, and its KID and IS
shuffle randomly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_BLOCK = 1024  # rows of a kernel matrix in memory at a time
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Compute the squared Fréchet distance of Gaussian fits to features (FID, Heusel et al., 2017).

    ``|mu_g - mu_r|^2 + tr(S_g) + tr(S_r) - 2 tr((S_g S_r)^(1/2))`` with unbiased covariances `S`.
    Biased upwards for few pictures: compare only sets of the same size.
    https://arxiv.org/abs/1706.08500

    Args:
        generated: features of generated pictures, [n, d].
        real: features of real pictures, [m, d].

    Raises:
        AfaError: if the features are not matrices of the same width, have fewer than two rows, or
            contain NaN or infinity.
    """
    generated, real = _two_sets(generated, real, "FID", min_rows=2)
    mean = (generated.mean(0) - real.mean(0)).square().sum()
    generated_root, real_root = _covariance_root(generated), _covariance_root(real)
    # tr((S_g S_r)^(1/2)) is the nuclear norm of R_g R_r^T with S = R^T R; this is accurate even if
    # the covariances are rank-deficient, because it avoids the square root of a square
    overlap = torch.linalg.svdvals(generated_root @ real_root.T).sum()
    spread = generated_root.square().sum() + real_root.square().sum()
    return max((mean + spread - 2 * overlap).item(), 0.0)


def _covariance_root(features: Tensor) -> Tensor:
    """`R` [min(n, d), d] with ``R^T R`` equal to the unbiased covariance of features [n, d]."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    subset_size: int | None = None,
    num_subsets: int = 100,
    seed: int = 0,
) -> float:
    """Compute the squared MMD with a cubic kernel (KID, Bińkowski et al., 2018).

    The kernel is ``(x.y / d + 1)^3``. The estimate is unbiased, so it can be negative.
    https://arxiv.org/abs/1801.01401

    Args:
        generated: features of generated pictures, [n, d].
        real: features of real pictures, [m, d].
        subset_size: number of pictures per random subset, over which the result is averaged; None
            uses all pictures, in time n * m.
        num_subsets: number of subsets.
        seed: seed of the subsets.

    Raises:
        AfaError: see `frechet_distance`; or if `subset_size` is less than 2 or larger than a set.
    """
    generated, real = _two_sets(generated, real, "KID", min_rows=2)
    if subset_size is None:
        return _cubic_discrepancy(generated, real)
    smaller = min(len(generated), len(real))
    if not 2 <= subset_size <= smaller or num_subsets < 1:
        raise AfaError(
            "AFA-METRIC-004",
            f"KID requires at least one subset of 2 to {smaller} pictures, the size of the smaller "
            f"set; got {num_subsets} of {subset_size}. Lower or remove subset_size.",
        )
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(num_subsets):
        of_generated = torch.randperm(len(generated), generator=generator)[:subset_size]
        of_real = torch.randperm(len(real), generator=generator)[:subset_size]
        total += _cubic_discrepancy(generated[of_generated], real[of_real])
    return total / num_subsets


def _cubic_discrepancy(generated: Tensor, real: Tensor) -> float:
    width = generated.shape[1]

    def cubic(product: Tensor) -> Tensor:
        return (product / width + 1) ** 3

    def within(features: Tensor) -> float:
        num = len(features)
        diagonal = cubic(features.square().sum(1)).sum().item()
        return (_kernel_sum(features, features, cubic) - diagonal) / (num * (num - 1))

    across = _kernel_sum(generated, real, cubic) / (len(generated) * len(real))
    return within(generated) + within(real) - 2 * across


def inception_score(logits: Tensor) -> float:
    """Compute the Inception Score of class logits [n, c] (Salimans et al., 2016).

    ``exp(mean KL(p(y|x) || p(y)))`` over all pictures at once, as Barratt & Sharma advise. The
    mean over ten splits, which some report, is lower for small splits. Ranges from 1 to c.
    https://arxiv.org/abs/1606.03498, https://arxiv.org/abs/1801.01973

    Raises:
        AfaError: if the logits are not a matrix with rows, or contain NaN or infinity.
    """
    log_each = _features(logits, "IS", "logits", min_rows=1).log_softmax(1)
    log_mean = log_each.logsumexp(0) - torch.tensor(float(len(logits)), dtype=torch.float64).log()
    return (log_each.exp() * (log_each - log_mean)).sum(1).mean().exp().item()


def cmmd(generated: Tensor, real: Tensor) -> float:
    """Compute the CLIP maximum mean discrepancy (CMMD, Jayasumana et al., CVPR 2024).

    1000 times the squared MMD of normalized embeddings with a Gaussian kernel of width 10. Uses the
    biased estimate of the authors' code, which is never negative, and zero for equal sets.
    https://arxiv.org/abs/2401.09603

    Args:
        generated: CLIP embeddings of generated pictures, [n, d]; they need not be normalized.
        real: CLIP embeddings of real pictures, [m, d].

    Raises:
        AfaError: see `frechet_distance`; or if an embedding is zero.
    """
    generated, real = _two_sets(generated, real, "CMMD", min_rows=1)
    generated, real = _unit(generated, "CMMD"), _unit(real, "CMMD")

    def gaussian(product: Tensor) -> Tensor:
        return torch.exp((product - 1) / _CMMD_SIGMA**2)  # |x - y|^2 = 2 - 2 x.y for unit vectors

    def mean(first: Tensor, second: Tensor) -> float:
        return _kernel_sum(first, second, gaussian) / (len(first) * len(second))

    squared = mean(generated, generated) + mean(real, real) - 2 * mean(generated, real)
    return max(_CMMD_SCALE * squared, 0.0)


def cosine_scores(first: Tensor, second: Tensor) -> list[float]:
    """Compute the cosine similarity of corresponding rows of embeddings [n, d] and [n, d].

    CLIP-I and CLIP-T are the similarities of pictures with their references and prompts.

    Raises:
        AfaError: if the shapes differ, a value is NaN or infinity, or a row is zero.
    """
    first, second = _two_sets(first, second, "Cosine similarity", min_rows=1)
    if len(first) != len(second):
        raise AfaError(
            "AFA-METRIC-005",
            f"Cosine similarity requires pairs of embeddings; got {len(first)} and {len(second)}. "
            "Pass the same number of both.",
        )
    return (_unit(first, "Cosine similarity") * _unit(second, "Cosine similarity")).sum(1).tolist()


def _kernel_sum(first: Tensor, second: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """Sum a kernel of inner products over all pairs of rows, block by block."""
    return sum(kernel(block @ second.T).sum().item() for block in first.split(_BLOCK))


def _unit(features: Tensor, metric: str) -> Tensor:
    lengths = features.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise AfaError(
            "AFA-METRIC-006",
            f"{metric} requires nonzero embeddings; row {int(lengths.argmin())} is zero. Compute "
            "the features again.",
        )
    return features / lengths


def _two_sets(
    generated: Tensor, real: Tensor, metric: str, *, min_rows: int
) -> tuple[Tensor, Tensor]:
    if generated.ndim == 2 and real.ndim == 2 and generated.shape[1] != real.shape[1]:
        raise AfaError(
            "AFA-METRIC-007",
            f"{metric} requires features of one network; got the widths {generated.shape[1]} and "
            f"{real.shape[1]}. Compute the features of both sets with the same weights.",
        )
    return (
        _features(generated, metric, "generated features", min_rows=min_rows),
        _features(real, metric, "real features", min_rows=min_rows),
    )


def _features(features: Tensor, metric: str, what: str, *, min_rows: int) -> Tensor:
    if features.ndim != 2 or len(features) < min_rows or features.shape[1] == 0:
        raise AfaError(
            "AFA-METRIC-008",
            f"{metric} requires {what} [pictures, width] of at least {min_rows} pictures; got "
            f"{list(features.shape)}. Use more pictures.",
        )
    finite = torch.isfinite(features).all(1)
    if not finite.all():
        raise AfaError(
            "AFA-METRIC-009",
            f"{metric} requires finite {what}; row {int((~finite).nonzero()[0])} contains NaN or "
            "infinity. Compute the features again in float32.",
        )
    return features.cpu().double()
