# The loss of one element above the knee: core is beta and core / beta is exactly 1. What in_range
# asks for is the loss, Loss, and |d| before it is rounded is D = Loss + beta / 2, at least beta.
# The rounding of d counts twice there, for beta / Loss is up to 2. Half of a beta below SMALL is
# rounded.
@rnd = float<$FORMAT, ne>;

beta = rnd(any);
D = Loss + 0.5 * beta;
d = rnd(D);
half rnd= 0.5 * beta;
beyond rnd= d - beta;
loss rnd= beyond + half;
ratio = beta / Loss;

{ Loss in [$SMALL, $LARGE] /\ beta in [$FROM, $TO] /\ ratio in [0, $RATIO]
  -> (loss - Loss) / Loss in [-$BOUND, $BOUND] }

(d - D) / Loss -> ((d - D) / D) * (1 + 0.5 * ratio) { Loss <> 0, D <> 0 };
(d - beta) / Loss -> 1 - 0.5 * ratio + (d - D) / Loss { Loss <> 0 };
(beyond - (d - beta)) / Loss -> ((beyond - (d - beta)) / (d - beta)) * ((d - beta) / Loss)
  { Loss <> 0, d - beta <> 0 };
(beyond + half - Loss) / Loss -> (d - D) / Loss + (beyond - (d - beta)) / Loss
  + (half - 0.5 * beta) / Loss { Loss <> 0 };
(loss - Loss) / Loss -> (beyond + half - Loss) / Loss
  + ((loss - (beyond + half)) / (beyond + half)) * (1 + (beyond + half - Loss) / Loss)
  { Loss <> 0, beyond + half <> 0 };
