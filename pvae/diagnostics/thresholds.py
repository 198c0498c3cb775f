"""Every number by which a diagnostic calls something good, worth a look, or bad."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ACTIVITY",
    "CHANCE",
    "COLLAPSED",
    "CORRELATION",
    "CURVE",
    "DISTANCE",
    "ENOUGH_EPOCHS",
    "ENOUGH_ROWS",
    "ERRORS",
    "FALL",
    "GAP",
    "HIDDEN",
    "INFORMATION",
    "JOINT_GAP",
    "JOINT_KHAT",
    "KHAT",
    "LOOSE",
    "MARGINAL_KL",
    "MARGINAL_SHARE",
    "NOISE",
    "OFFSET",
    "P_VALUE",
    "REPLICATES",
    "RHAT",
    "SD_RATIO",
    "TRIAL",
    "UNRELIABLE",
    "WHOLE",
    "Threshold",
    "Verdict",
    "table",
]


Verdict = Literal["good", "look", "bad", "none"]
"""``"look"`` is worth a look, ``"none"`` a number by which nothing is judged."""


@dataclass(frozen=True)
class Threshold:
    """Where a number becomes worth a look, and where it becomes bad.

    A number that is equal to a threshold counts as past it.

    Attributes:
        quantity: What the number is.
        look: From where on it is worth a look; infinite, or minus infinity, for never.
        bad: From where on it is bad; likewise.
        reason: Why there: a source, or what the number means.
        used_by: The diagnostics that judge by it.
        is_least: Whether trouble lies below the thresholds, not above.

    Example:
        >>> P_VALUE.verdict(0.2), P_VALUE.verdict(0.01), P_VALUE.verdict(1e-4)
        ('good', 'look', 'bad')
    """

    quantity: str
    look: float
    bad: float
    reason: str
    used_by: str
    is_least: bool = False

    def verdict(self, value: float) -> Verdict:
        """What a number is by these thresholds; one that is not a number is never judged."""
        if math.isnan(value):
            return "none"
        for verdict, threshold in (("bad", self.bad), ("look", self.look)):
            if value <= threshold if self.is_least else value >= threshold:
                return verdict  # type: ignore[return-value]
        return "good"


P_VALUE = Threshold(
    "p-value, times the number of tests behind the line, or on the screen (Bonferroni)",
    0.05,
    0.001,
    "how often a verdict is a false alarm, at most, for all tests behind the line, or on the "
    "screen, together",
    "sbc, tarp, pit, predictive, aggregated_posterior (there worth a look at most)",
    is_least=True,
)
DISTANCE = Threshold(
    "Kolmogorov-Smirnov distance of q(z_d) and p(z_d), where the p-value is 0.05 or less",
    0.1,
    0.25,
    "a test finds any difference once data are many, so size decides: a tenth of the codes, or a "
    "quarter, lie where the prior's draws don't",
    "aggregated_posterior",
)
REPLICATES = Threshold(
    "standard deviations of the replicates from their mean to T(x), where none reaches T(x)",
    5.0,
    math.inf,
    "few replicates give no small p-value, and so nothing bad; by chance so far off is 1 in 700 "
    "with 10 replicates, by Student's t, and rarer with more",
    "predictive",
)
ENOUGH_EPOCHS = 20
"""Epochs below which a learning curve could hide a rise behind its noise."""

ENOUGH_ROWS = 20
"""Rows of data below which a share of them, or a statistic, shows little."""

KHAT = 0.7
"""Pareto k-hat from which importance sampling isn't to be relied on (Vehtari et al., 2024)."""

UNRELIABLE = Threshold(
    f"share of data whose Pareto k-hat is above {KHAT}",
    0.05,
    0.25,
    f"above k-hat {KHAT} averages don't settle (Vehtari et al., 2024); one datum in twenty, or in "
    "four",
    "importance",
)
JOINT_KHAT = Threshold(
    "Pareto k-hat of the joint weights of a data set, where latents are shared by all data",
    0.5,
    KHAT,
    "weights have no finite variance from 0.5 on, and averages don't settle from 0.7 on "
    "(Vehtari et al., 2024; Yao et al., 2018)",
    "importance, with global latents",
)
JOINT_GAP = Threshold(
    "evidence less ELBO of a data set by joint weights, less two standard errors, nats",
    0.5,
    1.0,
    "KL(q \\|\\| p(g \\| x)), at least: a nat is a correlation of 0.93 that independent latents "
    "miss, or a standard deviation four times too small",
    "importance, with global latents",
)
RHAT = Threshold(
    "largest R-hat of an entry's Markov chains",
    1.05,
    1.2,
    "chains that have mixed are below 1.01 in the long run (Vehtari et al., 2021), with few draws "
    "within a few hundredths; from 1.2 on nothing is judged by them",
    "against_nuts",
)
SD_RATIO = Threshold(
    "factor between the standard deviations of q and of NUTS, the worst entry, less three errors",
    1.25,
    2.0,
    "intervals a quarter too narrow or wide, or half",
    "against_nuts",
)
OFFSET = Threshold(
    "distance of the means of q and of NUTS in standard deviations, the worst entry, less three "
    "errors",
    0.25,
    1.0,
    "a nominal 95% interval that is off by a quarter of a deviation holds 94%, by one 83%",
    "against_nuts",
)
CORRELATION = Threshold(
    "difference of two entries' correlation under q and under NUTS, the worst, less four errors",
    0.25,
    0.5,
    "what depends on both, such as a prediction, has another spread",
    "against_nuts",
)
NOISE = Threshold(
    "standard deviation of a joint weight's log over its local draws, nats",
    1.0,
    3.0,
    "from a nat on it is the nested estimates, not the draws of global latents, that weights rest "
    "on",
    "importance, with global latents",
)
GAP = Threshold(
    "amortisation gap or approximation gap, nats a datum",
    0.1,
    1.0,
    "a nat is a factor e in the likelihood of a datum, a tenth of one a tenth of it",
    "gap",
)
LOOSE = Threshold(
    "evidence less ELBO, as a share of the rate",
    0.5,
    math.inf,
    "the bound loses half as much as all that the code says",
    "the evidence line of the screen",
)
INFORMATION = Threshold(
    "information of z about its datum, nats",
    0.1,
    0.1,
    "of a tenth of a nat a decoder has no use: the whole latent has collapsed",
    "surgery",
    is_least=True,
)
MARGINAL_SHARE = 0.2
"""Share of the rate below which KL(q(z) || p(z)) is as it should be, however large the rate is."""

MARGINAL_KL = Threshold(
    f"KL(q(z) \\|\\| p(z)), nats, where it is at least {MARGINAL_SHARE:.0%} of the rate",
    1.0,
    math.inf,
    "codes are e times as likely under q(z), on average, as under the prior that samples are from",
    "surgery",
)
ACTIVITY = 0.01
"""Variance over data of E[z_d | x] from which a unit is active (Burda et al., 2016)."""

COLLAPSED = Threshold(
    f"share of latent units that have collapsed: activity and rate below {ACTIVITY}",
    0.5,
    1.0,
    f"{ACTIVITY} is that of Burda et al. (2016); with half of them idle a smaller latent does, "
    "with all there is no latent",
    "surgery, active units",
)
CURVE = Threshold(
    "rise of the learning curve over its last quarter, nats a datum",
    0.1,
    math.inf,
    "less is no reason to go on, and a trend isn't found below p = 0.001",
    "learning_curve",
)
HIDDEN = 1.0
"""Nats a datum; a curve whose noise could hide as much in a window hasn't levelled off."""

TRIAL = Threshold(
    "gain of 50 trial steps, nats a datum, where it is at least 3 standard errors",
    0.05,
    math.inf,
    "the first steps out of a start are short ones; of a data set whose latents are shared by all "
    "data, one nat in all is enough",
    "trial",
)
ERRORS, WHOLE = 3.0, 1.0
"""Standard errors that a gain has to have; nats of a whole data set."""

FALL = Threshold(
    "fall of the learning curve since it was best, in its standard errors",
    0.0,
    10.0,
    "a fall is found at p = 0.001; ten errors are far beyond that",
    "learning_curve",
)
CHANCE = Threshold(
    "score of disentanglement less that of shuffled rows, in standard errors",
    3.0,
    3.0,
    "within three standard errors there may be nothing but chance",
    "disentanglement",
    is_least=True,
)


def table() -> str:
    """All thresholds, as the Markdown table of docs/diagnostics.md.

    Example:
        >>> print(table().splitlines()[0])
        | number | worth a look | bad | reason | used by |
    """
    lines = ["| number | worth a look | bad | reason | used by |", "|---|---|---|---|---|"]
    for row in [row for row in globals().values() if isinstance(row, Threshold)]:
        side = "less" if row.is_least else "more"
        look, bad = (f"{v:g} or {side}" if math.isfinite(v) else "" for v in (row.look, row.bad))
        look = "" if look == bad else look
        lines.append(f"| {row.quantity} | {look} | {bad} | {row.reason} | {row.used_by} |")
    return "\n".join(lines)
