# The sum of the parts of a split, in units of sigma: multiples of u, which add up exactly while no
# sum is beyond 1 (limit.g).
@rnd = float<53, -1074, ne>;

{ @FIX(s, -53) /\ @FIX(high, -53) /\ |s + high| in [0, 1] -> rnd(s + high) - (s + high) in [0, 0] }
