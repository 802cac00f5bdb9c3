# A rounding in the subnormal range loses half of the smallest number. Seven are made at most: over
# beta and over the count by the graph, one by the oracle, four by gradient_bound, which adds
# exactly.
@rnd = float<53, -1074, ne>;

{ |x| in [0, 1b-1022] -> 7 * |rnd(x) - x| / 1b-1074 in [0, $UNDERFLOWS] }
