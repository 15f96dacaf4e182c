"""Losses of slide models: squared error, cross-entropy and Cox's partial likelihood."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ties = Literal["breslow", "efron"]


def cox_loss(risk: Tensor, time: Tensor, event: Tensor, *, ties: Ties = "breslow") -> Tensor:
    """Negative log partial likelihood, mean over deaths (paper A).

    The risk set of a death at ``t`` is everyone with time >= ``t``, the death itself included.
    A higher risk means an earlier death. The paper names no rule for ties [choice]: Breslow's
    lets all deaths at ``t`` face the whole risk set, Efron's takes the tied deaths out of it by
    equal parts.

    Parameters
    ----------
    risk : float (n,)
        Log hazard ratios.
    time : float (n,)
        In any unit.
    event : bool (n,)
        True where the death was seen, false where it is censored.

    Raises
    ------
    ValueError
        No event: such a batch has no gradient.
    """
    event = event.bool()
    if not bool(event.any()):
        raise ValueError("Cox loss: no event among these patients; put one in every batch")
    deaths, at = risk[event], time[event]
    at_risk = _masked_logsumexp(risk, time[None, :] >= at[:, None])
    if ties == "efron":
        tied = at[None, :] == at[:, None]
        earlier = torch.ones_like(tied).tril(-1)
        # 0, 1/d, ..., (d-1)/d for d tied deaths; counted in the risks' own precision
        share = (tied & earlier).sum(1, dtype=risk.dtype) / tied.sum(1, dtype=risk.dtype)
        tied_deaths = _masked_logsumexp(deaths, tied)
        at_risk = at_risk + torch.log1p(-share * torch.exp(tied_deaths - at_risk))
    return (at_risk - deaths).mean()


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """Row-wise log of the sum of exp(values) where ``mask`` (rows, n) is true."""
    return values[None, :].masked_fill(~mask, -torch.inf).logsumexp(1)
