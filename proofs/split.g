# CompensatedSum splits v, in units of sigma: into high, a multiple of u, and a rest of u at most,
# and no operation but the first rounds. FROM and TO: either sign; below 2^-54, high is 0.
@rnd = float<53, -1074, ne>;
v = rnd(any);
t = rnd(v + 1);
high = t - 1;
low = v - high;

{ v in [$FROM, $TO] -> @FIX(high, -53) /\ rnd(high) - high in [0, 0]
  /\ |low| in [0, $UNIT] /\ rnd(low) - low in [0, 0] }

low -> (v + 1) - t;
