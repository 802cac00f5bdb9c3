# Sigma of CompensatedSum is 4 times the power of two at or above the naive sum, w; here w is from 1
# on and below 2. The step is 0 or 2, for it is even: 0 for w = 1 alone, where Max takes w itself.
@rnd = float<53, -1074, ne>;
w = rnd(any);
step = rnd(1b53 * w + w) - 1b53 * w;

{ w in [1, 0x1.fffffffffffffp0] -> @FIX(step, 1) /\ rnd(step) - step in [0, 0]
  /\ step - w in [-1, 1] /\ 4 * step in [0, $SIGMA] }

step - w -> rnd(1b53 * w + w) - (1b53 * w + w);
step -> (step - w) + w;
