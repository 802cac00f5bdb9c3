# above.g as the oracle has it, and SmoothL1Addends: half of beta is subtracted from d at once.
@rnd = float<$FORMAT, ne>;

beta = rnd(any);
D = Loss + 0.5 * beta;
d = rnd(D);
half rnd= 0.5 * beta;
loss rnd= d - half;
ratio = beta / Loss;

{ Loss in [$SMALL, $LARGE] /\ beta in [$FROM, $TO] /\ ratio in [0, $RATIO]
  -> (loss - Loss) / Loss in [-$BOUND, $BOUND] }

(d - D) / Loss -> ((d - D) / D) * (1 + 0.5 * ratio) { Loss <> 0, D <> 0 };
(d - half - Loss) / Loss -> (d - D) / Loss - (half - 0.5 * beta) / Loss { Loss <> 0 };
(loss - Loss) / Loss -> (d - half - Loss) / Loss
  + ((loss - (d - half)) / (d - half)) * (1 + (d - half - Loss) / Loss)
  { Loss <> 0, d - half <> 0 };
