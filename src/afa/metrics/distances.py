"""Metrics as pure functions of stored features: FID, KID, IS, CMMD and cosines.

All of them compute in float64, draw nothing from the global random state and give the same number
on every run. torchmetrics has FID, KID and IS as well, and the tests hold these against it; its
classes are not used here since its FID takes eigenvalues of a non-symmetric product, which loses
digits where there are fewer pictures than features, and its KID and IS shuffle at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_BLOCK = 1024  # rows of a kernel matrix that are in memory at a time
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to the features (FID, Heusel et al., 2017).

    ``|mu_g - mu_r|^2 + tr(S_g) + tr(S_r) - 2 tr((S_g S_r)^(1/2))`` with unbiased covariances `S`.
    Biased upwards where there are few pictures: compare only sets of one size.
    https://arxiv.org/abs/1706.08500

    Args:
        generated: features of generated pictures, [n, d].
        real: features of real pictures, [m, d].

    Raises:
        AfaError: not two matrices of one width, fewer than two rows, or NaN or infinity in one.
    """
    generated, real = _two_sets(generated, real, "FID", min_rows=2)
    mean = (generated.mean(0) - real.mean(0)).square().sum()
    generated_root, real_root = _covariance_root(generated), _covariance_root(real)
    # tr((S_g S_r)^(1/2)) is the nuclear norm of R_g R_r^T where S = R^T R: nothing is squared and
    # rooted again, so sets that span only a few directions lose no digits
    overlap = torch.linalg.svdvals(generated_root @ real_root.T).sum()
    spread = generated_root.square().sum() + real_root.square().sum()
    return max((mean + spread - 2 * overlap).item(), 0.0)


def _covariance_root(features: Tensor) -> Tensor:
    """`R` [min(n, d), d] with ``R^T R`` the unbiased covariance of features [n, d]."""
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
    """Squared maximum mean discrepancy with a cubic kernel (KID, Bińkowski et al., 2018).

    The kernel is ``(x.y / d + 1)^3``, the estimate unbiased: it may be below zero.
    https://arxiv.org/abs/1801.01401

    Args:
        generated: features of generated pictures, [n, d].
        real: features of real pictures, [m, d].
        subset_size: None takes all pictures, in time n * m; a number, the mean over random subsets
            of so many pictures of each set.
        num_subsets: how many subsets.
        seed: of the subsets.

    Raises:
        AfaError: see `frechet_distance`; or a subset of fewer than two or of more than all.
    """
    generated, real = _two_sets(generated, real, "KID", min_rows=2)
    if subset_size is None:
        return _cubic_discrepancy(generated, real)
    smaller = min(len(generated), len(real))
    if not 2 <= subset_size <= smaller or num_subsets < 1:
        raise AfaError(
            "AFA-METRIC-004",
            f"KID needs one or more subsets of 2 to {smaller} pictures, the size of the smaller "
            f"set, came {num_subsets} of {subset_size}. Name a smaller subset_size or none.",
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
        itself = cubic(features.square().sum(1)).sum().item()
        return (_kernel_sum(features, features, cubic) - itself) / (num * (num - 1))

    across = _kernel_sum(generated, real, cubic) / (len(generated) * len(real))
    return within(generated) + within(real) - 2 * across


def inception_score(logits: Tensor) -> float:
    """Inception Score of class logits [n, c]: ``exp(mean KL(p(y|x) || p(y)))`` (Salimans, 2016).

    Over all pictures at once, as Barratt & Sharma recommend; the mean over ten splits that some
    report is lower where a split is small. From 1 (all alike) to c.
    https://arxiv.org/abs/1606.03498, https://arxiv.org/abs/1801.01973

    Raises:
        AfaError: no matrix, no rows, or numbers that are not finite.
    """
    log_each = _features(logits, "IS", "logits", min_rows=1).log_softmax(1)
    log_mean = log_each.logsumexp(0) - torch.tensor(float(len(logits)), dtype=torch.float64).log()
    return (log_each.exp() * (log_each - log_mean)).sum(1).mean().exp().item()


def cmmd(generated: Tensor, real: Tensor) -> float:
    """CLIP maximum mean discrepancy (CMMD, Jayasumana et al., CVPR 2024).

    1000 times the squared discrepancy of unit-length embeddings, Gaussian kernel of width 10, in
    the biased estimate of the authors' code: never below zero, and zero for equal sets.
    https://arxiv.org/abs/2401.09603

    Args:
        generated: CLIP embeddings of generated pictures, [n, d], of any length.
        real: CLIP embeddings of real pictures, [m, d].

    Raises:
        AfaError: see `frechet_distance`; or an embedding of length zero.
    """
    generated, real = _two_sets(generated, real, "CMMD", min_rows=1)
    generated, real = _unit(generated, "CMMD"), _unit(real, "CMMD")

    def gaussian(product: Tensor) -> Tensor:
        return torch.exp((product - 1) / _CMMD_SIGMA**2)  # |x - y|^2 = 2 - 2 x.y at unit length

    def mean(first: Tensor, second: Tensor) -> float:
        return _kernel_sum(first, second, gaussian) / (len(first) * len(second))

    squared = mean(generated, generated) + mean(real, real) - 2 * mean(generated, real)
    return max(_CMMD_SCALE * squared, 0.0)


def cosine_scores(first: Tensor, second: Tensor) -> list[float]:
    """The cosine of each row with its partner, for embeddings [n, d] and [n, d].

    CLIP-I and CLIP-T are these, of pictures with their own references and prompts.

    Raises:
        AfaError: matrices of different shape, numbers that are not finite, or a row of length zero.
    """
    first, second = _two_sets(first, second, "A cosine", min_rows=1)
    if len(first) != len(second):
        raise AfaError(
            "AFA-METRIC-005",
            f"A cosine score needs a partner for every picture, came {len(first)} and "
            f"{len(second)} embeddings. Pair them one to one.",
        )
    return (_unit(first, "A cosine") * _unit(second, "A cosine")).sum(1).tolist()


def _kernel_sum(first: Tensor, second: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """The sum of a kernel of inner products over all pairs of rows, a block at a time."""
    return sum(kernel(block @ second.T).sum().item() for block in first.split(_BLOCK))


def _unit(features: Tensor, metric: str) -> Tensor:
    lengths = features.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise AfaError(
            "AFA-METRIC-006",
            f"{metric} needs embeddings that are not zero, row {int(lengths.argmin())} is. "
            "Make the features again.",
        )
    return features / lengths


def _two_sets(
    generated: Tensor, real: Tensor, metric: str, *, min_rows: int
) -> tuple[Tensor, Tensor]:
    if generated.ndim == 2 and real.ndim == 2 and generated.shape[1] != real.shape[1]:
        raise AfaError(
            "AFA-METRIC-007",
            f"{metric} needs features of one network, came widths {generated.shape[1]} and "
            f"{real.shape[1]}. Make both sets' features with the same weights.",
        )
    return (
        _features(generated, metric, "generated features", min_rows=min_rows),
        _features(real, metric, "real features", min_rows=min_rows),
    )


def _features(features: Tensor, metric: str, what: str, *, min_rows: int) -> Tensor:
    if features.ndim != 2 or len(features) < min_rows or features.shape[1] == 0:
        raise AfaError(
            "AFA-METRIC-008",
            f"{metric} needs {what} [pictures, width] of {min_rows} or more pictures, came "
            f"{list(features.shape)}. Give it more pictures.",
        )
    finite = torch.isfinite(features).all(1)
    if not finite.all():
        raise AfaError(
            "AFA-METRIC-009",
            f"{metric} needs finite {what}, row {int((~finite).nonzero()[0])} holds NaN or "
            "infinity. Make the features again, in float32.",
        )
    return features.to(device="cpu", dtype=torch.float64)
