"""Estimates and findings with honest intervals. Knows no models and no files; scipy is imported when first needed.

`compare_groups` is the front door: it takes scores as they were collected and picks the test by their design. Rules of every `Finding`: the
effect is after - before, no effect is 0, and interval and p-value come from one method, so that they agree (docs/statistics.md).
"""

from .bayes import Posterior, rope_signed_rank, rope_t
from .corrections import Correction, adjust
from .crossed import Freedom, interquartile_mean, performance_profile, seeds_and_items
from .design import Comparison, compare_groups
from .dominance import almost_stochastic_order
from .effects import a12, cliffs_delta, cohen_d, eta_squared, glass_delta, hedges_g, odds_ratio, omega_squared, rank_biserial, risk_difference
from .groups import Check, anova, clustered_anova, cochran_q, friedman, kruskal_wallis, levene, repeated_anova, shapiro, welch_anova
from .intervals import bootstrap, majority_rate, mean_estimate, paired_difference, wilson
from .looks import Boundaries, group_sequential
from .permutation import permutation_test
from .planning import Plan, plan
from .posthoc import dunn, games_howell, nemenyi, tukey
from .powered import judged_difference, judged_mean
from .proportions import chi_square, clopper_pearson, fisher_exact, mcnemar_exact, proportion_difference
from .ranking import Rank, rank_sets, tied_sets
from .ranks import brunner_munzel, mann_whitney, wilcoxon
from .sequential import anytime_difference
from .significance import Side, clustered_t, paired_t, student_t, tost, welch_t

__all__ = [
    "Boundaries",
    "Check",
    "Comparison",
    "Correction",
    "Freedom",
    "Plan",
    "Posterior",
    "Rank",
    "Side",
    "a12",
    "adjust",
    "almost_stochastic_order",
    "anova",
    "anytime_difference",
    "bootstrap",
    "brunner_munzel",
    "chi_square",
    "cliffs_delta",
    "clopper_pearson",
    "clustered_anova",
    "clustered_t",
    "cochran_q",
    "cohen_d",
    "compare_groups",
    "dunn",
    "eta_squared",
    "fisher_exact",
    "friedman",
    "games_howell",
    "glass_delta",
    "group_sequential",
    "hedges_g",
    "interquartile_mean",
    "judged_difference",
    "judged_mean",
    "kruskal_wallis",
    "levene",
    "majority_rate",
    "mann_whitney",
    "mcnemar_exact",
    "mean_estimate",
    "nemenyi",
    "odds_ratio",
    "omega_squared",
    "paired_difference",
    "paired_t",
    "performance_profile",
    "permutation_test",
    "plan",
    "proportion_difference",
    "rank_biserial",
    "rank_sets",
    "repeated_anova",
    "risk_difference",
    "rope_signed_rank",
    "rope_t",
    "seeds_and_items",
    "shapiro",
    "student_t",
    "tied_sets",
    "tost",
    "tukey",
    "welch_anova",
    "welch_t",
    "wilcoxon",
    "wilson",
]
