# The loss of one element above the knee, D = x beta with x >= 1, in the format FORMAT: core is beta,
# core / beta is exactly 1, halving is exact. Loss = D - beta / 2 is at least half of D, which is why
# the rounding of d counts twice: (D - rnd(D)) / Loss = ((D - rnd(D)) / D) (1 + 0.5 / (x - 0.5)).
@rnd = float<FORMAT, ne>;

beta = rnd(any);
D = x * beta;
d = rnd(D);
half = 0.5 * beta;
beyond rnd= d - beta;
loss rnd= beyond + half;

Loss = D - half;

{ x in [1, LARGE] /\ beta in [SMALL, LARGE] /\ D in [SMALL, LARGE]
  -> (loss - Loss) / Loss in [-BOUND, BOUND] }

(d - D) / Loss -> ((d - D) / D) * (1 + 0.5 / (x - 0.5)) { Loss <> 0, D <> 0, x - 0.5 <> 0 };
(d - beta) / Loss -> 1 - 0.5 / (x - 0.5) + (d - D) / Loss
  { Loss <> 0, beta <> 0, x - 0.5 <> 0 };
(beyond - (d - beta)) / Loss -> ((beyond - (d - beta)) / (d - beta)) * ((d - beta) / Loss)
  { Loss <> 0, d - beta <> 0 };
(beyond + half - Loss) / Loss -> (d - D) / Loss + (beyond - (d - beta)) / Loss { Loss <> 0 };
(loss - Loss) / Loss -> (beyond + half - Loss) / Loss
  + ((loss - (beyond + half)) / (beyond + half)) * (1 + (beyond + half - Loss) / Loss)
  { Loss <> 0, beyond + half <> 0 };
